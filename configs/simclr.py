"""SimCLR: A Simple Framework for Contrastive Learning of Visual Representations (Chen et al., 2020).

Measured here: `digits`, on 2 CPU cores. The others have not been run by us; published by MMPretrain: linear probe on ImageNet-1k,
by the recipes at the end, whose names say on which encoder; they start from `--config.load_from.path=RUN`.

| recipe | command | hardware | wall time | metric |
|---|---|---|---|---|
| digits | `--config=configs/simclr.py:digits` | 2 CPU cores | 3 min | linear probe 76.4, trained 96.0; kNN 62.3, 96.6 |
| simclr_resnet50_16xb256-coslr-200e_in1k | `--config=configs/simclr.py` | 16 GPUs | | 66.9 |
| simclr_resnet50_16xb256-coslr-800e_in1k | `--config=configs/simclr.py:NAME` | 16 GPUs | | 69.2 |
| simclr_resnet50_8xb32-coslr-200e_in1k | | 8 GPUs | | - |
| resnet50_simclr-200e-pre_8xb512-linear-coslr-90e_in1k | | 8 GPUs | | 66.9 |
| resnet50_simclr-800e-pre_8xb512-linear-coslr-90e_in1k | | 8 GPUs | | 69.2 |
"""

from __future__ import annotations

from functools import partial

from ml_collections import ConfigDict

from jaxpretrain.config import pick
from jaxpretrain.followers import probe_resnet50
from jaxpretrain.recipes import (
    FLIP,
    GRAYSCALE,
    LARS_EXCLUDE,
    blur,
    digits,
    imagenet,
    jitter,
    on_digits,
    recipe,
    two_views,
    warmup_cosine,
)

CROP = dict(type="RandomResizedCrop", scale=224, backend="pillow")
VIEW = [FLIP, jitter(0.8, 0.8, 0.8, 0.2), GRAYSCALE, blur(0.5)]


def pretrain(batch_size: int, epochs: int, lr: float, base_batch_size: int | None = None) -> ConfigDict:
    return recipe(
        method=dict(
            type="SimCLR",
            backbone=dict(type="ResNet", depth=50, norm_cfg=dict(type="SyncBN"), zero_init_residual=True),
            neck=dict(
                type="NonLinearNeck",
                in_channels=2048,
                hid_channels=2048,
                out_channels=128,
                num_layers=2,
                with_avg_pool=True,
            ),
            head=dict(type="ContrastiveHead", loss=dict(type="CrossEntropyLoss"), temperature=0.1),
        ),
        data=imagenet(*two_views(CROP, VIEW)),
        batch_size=batch_size,
        max_epochs=epochs,
        optim_wrapper=dict(
            optimizer=dict(type="LARS", lr=lr, weight_decay=1e-6, momentum=0.9),
            paramwise_cfg=dict(custom_keys=LARS_EXCLUDE),
        ),
        param_scheduler=warmup_cosine(epochs, 10, by_iter=False),
        auto_scale_lr=dict(base_batch_size=base_batch_size),
        checkpoint=dict(interval=10),
    )


def tiny() -> ConfigDict:
    """A narrow ResNet-18 on real handwritten digits; the views are crops and changes of contrast."""
    epochs = 12
    crop = dict(type="RandomResizedCrop", scale=32, crop_ratio_range=(0.4, 1.0))
    return on_digits(
        method=dict(
            type="SimCLR",
            backbone=dict(type="ResNet_CIFAR", depth=18, stem_channels=16, base_channels=16),
            neck=dict(type="NonLinearNeck", in_channels=128, hid_channels=128, out_channels=64),
            head=dict(type="ContrastiveHead", loss=dict(type="CrossEntropyLoss"), temperature=0.2),
        ),
        data=digits(*two_views(crop, [jitter(0.6, 0.6, 0.0, 0.0)])),
        max_epochs=epochs,
        optim_wrapper=dict(
            optimizer=dict(type="LARS", lr=1.0, weight_decay=1e-6, momentum=0.9, eta=0.02),
            paramwise_cfg=dict(custom_keys=LARS_EXCLUDE),
        ),
        param_scheduler=warmup_cosine(epochs, 2, by_iter=False),
        evaluation=dict(interval=4, at_start=True),
        checkpoint=dict(interval=4),
    )


PROBE = partial(probe_resnet50, dict(type="LARS", lr=1.6, weight_decay=0.0), 90, 512)

RECIPES = {
    "simclr_resnet50_16xb256-coslr-200e_in1k": partial(pretrain, 4096, 200, 4.8),
    # Named 16xb256, but the recipe itself says 32 images per GPU; the name and the learning rate mean 4,096.
    "simclr_resnet50_16xb256-coslr-800e_in1k": partial(pretrain, 4096, 800, 4.8),
    "simclr_resnet50_8xb32-coslr-200e_in1k": partial(pretrain, 256, 200, 0.3, base_batch_size=256),
    "resnet50_simclr-200e-pre_8xb512-linear-coslr-90e_in1k": PROBE,
    "resnet50_simclr-800e-pre_8xb512-linear-coslr-90e_in1k": PROBE,
    "digits": tiny,
}


def get_config(name: str | None = None) -> ConfigDict:
    return pick(RECIPES, name)
