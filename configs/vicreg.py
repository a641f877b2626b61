"""VICReg: Variance-Invariance-Covariance Regularization for Self-Supervised Learning (Bardes et al., 2022).

Measured here: `digits`, on 2 CPU cores. The others have not been run by us; published by the authors: linear probe on
ImageNet-1k. Both are commands of the release's README. (The release's LARS divides by the norm of gradient and weight decay
together, and keeps the learning rate out of its momentum; ours is MMPretrain's.)

| recipe | command | hardware | wall time | metric |
|---|---|---|---|---|
| digits | `--config=configs/vicreg.py:digits` | 2 CPU cores | 2.6 CPU min | probe 80.1, trained 98.0; kNN 70.4, 98.3 |
| vicreg_resnet50_32xb64-amp-coslr-1000e_in1k | `--config=configs/vicreg.py` | 32 GPUs | | 73.2 |
| vicreg_resnet50_8xb64-amp-coslr-100e_in1k | `--config=configs/vicreg.py:NAME` | 8 GPUs | | |
"""

from __future__ import annotations

from functools import partial
from typing import Any

from ml_collections import ConfigDict

from jaxpretrain.config import pick
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


def method(backbone: dict, width: int, expander: int) -> dict:
    """Linear, BatchNorm, ReLU, twice; and a linear layer without bias."""
    return dict(
        type="VICReg",
        backbone=backbone,
        neck=dict(
            type="NonLinearNeck",
            in_channels=width,
            hid_channels=expander,
            out_channels=expander,
            num_layers=3,
            with_bias=True,
            with_last_bn=False,
            with_avg_pool=True,
        ),
        head=dict(type="VICRegHead", loss=dict(type="VICRegLoss", sim_coeff=25.0, std_coeff=25.0, cov_coeff=1.0)),
    )


def pretrain(batch_size: int, epochs: int, base_lr: float) -> ConfigDict:
    """`base_lr` is for a batch of 256. The views are BYOL's."""
    backbone = dict(type="ResNet", depth=50, norm_cfg=dict(type="SyncBN"), zero_init_residual=True)
    return recipe(
        method=method(backbone, 2048, 8192),
        data=imagenet(*two_views(BYOL_CROP, *BYOL_VIEWS)),
        batch_size=batch_size,
        max_epochs=epochs,
        optim_wrapper=dict(
            optimizer=dict(type="LARS", lr=base_lr * batch_size / 256, momentum=0.9, weight_decay=1e-6),
            paramwise_cfg=dict(custom_keys=LARS_EXCLUDE),
        ),
        param_scheduler=warmup_cosine(epochs, 10, 1e-9, eta_min_ratio=1e-3),
        auto_scale_lr=dict(base_batch_size=batch_size),
        dtype="bfloat16",
    )


def tiny() -> ConfigDict:
    """A narrow ResNet on real handwritten digits, embeddings of 256 channels."""

    def small(backbone: dict[str, Any], width: int) -> dict[str, Any]:
        return method(backbone, width, 256)

    return tiny_siamese(small, lr=0.1)


RECIPES = {
    "vicreg_resnet50_32xb64-amp-coslr-1000e_in1k": partial(pretrain, 2048, 1000, 0.2),
    "vicreg_resnet50_8xb64-amp-coslr-100e_in1k": partial(pretrain, 512, 100, 0.3),
    "digits": tiny,
}


def get_config(name: str | None = None) -> ConfigDict:
    return pick(RECIPES, name)
