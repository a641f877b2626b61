"""Barlow Twins: Self-Supervised Learning via Redundancy Reduction (Zbontar et al., 2021).

Measured here: `digits`, on 2 CPU cores. The others have not been run by us; published by MMPretrain: top-1 on ImageNet-1k.

| recipe | command | hardware | wall time | metric |
|---|---|---|---|---|
| digits | `--config=configs/barlowtwins.py:digits` | 2 CPU cores | 3.0 CPU min | probe 80.1, trained 97.0; kNN 70.4, 88.2 |
| barlowtwins_resnet50_8xb256-coslr-300e_in1k | `--config=configs/barlowtwins.py` | 8 GPUs | | |
| barlowtwins_resnet50_8xb256-coslr-1000e_in1k | `--config=configs/barlowtwins.py:NAME` | 8 GPUs | | |
| resnet50_barlowtwins-pre_8xb32-linear-coslr-100e_in1k | `--config.load_from.path=RUN` | 8 GPUs | | 71.8 (linear probe) |
"""

from __future__ import annotations

from functools import partial

from ml_collections import ConfigDict

from jaxpretrain.config import pick
from jaxpretrain.followers import probe_resnet50
from jaxpretrain.recipes import BYOL_CROP, BYOL_VIEWS, imagenet, recipe, tiny_siamese, two_views, warmup_cosine

# Biases and BatchNorm learn at 0.0048 where weights do at 0.2, for a batch of 256.
EXCLUDED = dict(decay_mult=0.0, lr_mult=0.024, lars_exclude=True)


def method(backbone: dict, width: int, projection: int, loss: dict | None = None) -> dict:
    return dict(
        type="BarlowTwins",
        backbone=backbone,
        neck=dict(
            type="NonLinearNeck",
            in_channels=width,
            hid_channels=projection,
            out_channels=projection,
            num_layers=3,
            with_last_bn=False,
            with_last_bn_affine=False,
            with_avg_pool=True,
            init_cfg=dict(type="Kaiming", distribution="uniform", layer=["Linear"]),
        ),
        head=dict(
            type="LatentCrossCorrelationHead", in_channels=projection, loss=loss or dict(type="CrossCorrelationLoss")
        ),
    )


def pretrain(epochs: int) -> ConfigDict:
    backbone = dict(type="ResNet", depth=50, norm_cfg=dict(type="SyncBN"), zero_init_residual=True)
    return recipe(
        method=method(backbone, 2048, 8192),
        data=imagenet(*two_views(BYOL_CROP, *BYOL_VIEWS)),
        batch_size=2048,
        max_epochs=epochs,
        optim_wrapper=dict(
            optimizer=dict(type="LARS", lr=1.6, momentum=0.9, weight_decay=1e-6),
            paramwise_cfg=dict(custom_keys=dict.fromkeys(("bn", "bias", "downsample/1"), EXCLUDED)),
        ),
        param_scheduler=warmup_cosine(epochs, 10, 1.6e-4, eta_min=0.0016),
        auto_scale_lr=dict(base_batch_size=2048),
    )


def tiny() -> ConfigDict:
    """A narrow ResNet-18 on real handwritten digits."""
    loss = dict(type="CrossCorrelationLoss", lambd=0.02)  # of 128 channels, and not of 8,192
    return tiny_siamese(lambda backbone, width: method(backbone, width, 128, loss), lr=0.02)


RECIPES = {
    "barlowtwins_resnet50_8xb256-coslr-300e_in1k": partial(pretrain, 300),
    "barlowtwins_resnet50_8xb256-coslr-1000e_in1k": partial(pretrain, 1000),
    "resnet50_barlowtwins-pre_8xb32-linear-coslr-100e_in1k": partial(
        probe_resnet50, dict(type="SGD", lr=0.3, weight_decay=1e-6), 100, 32
    ),
    "digits": tiny,
}


def get_config(name: str | None = None) -> ConfigDict:
    return pick(RECIPES, name)
