"""BYOL: Bootstrap Your Own Latent (Grill et al., 2020).

Measured here: `digits`, on 2 CPU cores. The others have not been run by us; published by MMPretrain: top-1 on ImageNet-1k.

| recipe | command | hardware | wall time | metric |
|---|---|---|---|---|
| digits | `--config=configs/byol.py:digits` | 2 CPU cores | 2.9 CPU min | probe 80.1, trained 89.9; kNN 70.4, 83.8 |
| byol_resnet50_16xb256-coslr-200e_in1k | `--config=configs/byol.py` | 16 GPUs | | |
| resnet50_byol-pre_8xb512-linear-coslr-90e_in1k | `--config.load_from.path=RUN` | 8 GPUs | | 71.8 (linear probe) |
"""

from __future__ import annotations

from functools import partial

from ml_collections import ConfigDict

from jaxpretrain.config import pick
from jaxpretrain.followers import probe_resnet50
from jaxpretrain.recipes import (
    BYOL_CROP,
    BYOL_VIEWS,
    LARS_EXCLUDE,
    imagenet,
    recipe,
    tiny_siamese,
    two_views,
    warmup_cosine,
)


def mlp(in_channels: int, hid_channels: int, out_channels: int, pooled: bool) -> dict:
    """Projector or predictor: Linear, BatchNorm, ReLU, Linear."""
    return dict(
        type="NonLinearNeck",
        in_channels=in_channels,
        hid_channels=hid_channels,
        out_channels=out_channels,
        num_layers=2,
        with_bias=True,
        with_last_bn=False,
        with_avg_pool=pooled,
    )


def method(backbone: dict, width: int, hidden: int, out: int, base_momentum: float) -> dict:
    return dict(
        type="BYOL",
        base_momentum=base_momentum,
        backbone=backbone,
        neck=mlp(width, hidden, out, pooled=True),
        head=dict(
            type="LatentPredictHead",
            predictor=mlp(out, hidden, out, pooled=False),
            loss=dict(type="CosineSimilarityLoss"),
        ),
    )


def pretrain() -> ConfigDict:
    backbone = dict(type="ResNet", depth=50, norm_cfg=dict(type="SyncBN"), zero_init_residual=False)
    return recipe(
        method=method(backbone, 2048, 4096, 256, base_momentum=0.01),
        data=imagenet(*two_views(BYOL_CROP, *BYOL_VIEWS)),
        batch_size=4096,
        max_epochs=200,
        optim_wrapper=dict(
            optimizer=dict(type="LARS", lr=4.8, weight_decay=1e-6, momentum=0.9),
            paramwise_cfg=dict(custom_keys=LARS_EXCLUDE),
        ),
        param_scheduler=warmup_cosine(200, 10, by_iter=False),
        auto_scale_lr=dict(base_batch_size=4096),
    )


def tiny() -> ConfigDict:
    """A narrow ResNet-18 on real handwritten digits; the target follows fast, as the run has a few hundred steps only."""
    return tiny_siamese(lambda backbone, width: method(backbone, width, 128, 64, base_momentum=0.05), lr=0.1)


RECIPES = {
    "byol_resnet50_16xb256-coslr-200e_in1k": pretrain,
    "resnet50_byol-pre_8xb512-linear-coslr-90e_in1k": partial(
        probe_resnet50, dict(type="LARS", lr=1.6, weight_decay=0.0), 90, 512
    ),
    "digits": tiny,
}


def get_config(name: str | None = None) -> ConfigDict:
    return pick(RECIPES, name)
