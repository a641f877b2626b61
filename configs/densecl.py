"""DenseCL: Dense Contrastive Learning for Self-Supervised Visual Pre-Training (Wang et al., 2021).

Measured here: `digits`, on 2 CPU cores. The others have not been run by us; published by MMPretrain: top-1 on ImageNet-1k.

| recipe | command | hardware | wall time | metric |
|---|---|---|---|---|
| digits | `--config=configs/densecl.py:digits` | 2 CPU cores | 1.9 CPU min | probe 80.1, trained 82.8; kNN 70.4, 63.0 |
| densecl_resnet50_8xb32-coslr-200e_in1k | `--config=configs/densecl.py` | 8 GPUs | | |
| resnet50_densecl-pre_8xb32-linear-steplr-100e_in1k | `--config.load_from.path=RUN` | 8 GPUs | | 63.5 (linear probe) |

`8xb32` means 8 GPUs with 32 images each, normalised apart: BatchNorm in 8 groups, on any number of devices.
"""

from __future__ import annotations

from functools import partial

from ml_collections import ConfigDict

from jaxpretrain.config import pick
from jaxpretrain.followers import probe_resnet50
from jaxpretrain.recipes import MOCO_CROP, MOCO_VIEW, imagenet, recipe, tiny_siamese, two_views


def method(backbone: dict, width: int, hidden: int, out: int, **more: int | float) -> dict:
    return dict(
        type="DenseCL",
        feat_dim=out,
        loss_lambda=0.5,
        backbone=backbone,
        neck=dict(type="DenseCLNeck", in_channels=width, hid_channels=hidden, out_channels=out, num_grid=None),
        head=dict(type="ContrastiveHead", loss=dict(type="CrossEntropyLoss"), temperature=0.2),
        **more,
    )


def pretrain() -> ConfigDict:
    """The dense loss joins in after 1,000 steps, as in the paper's code; MMPretrain's recipe has no such hook."""
    backbone = dict(type="ResNet", depth=50, norm_cfg=dict(type="BN", groups=8), zero_init_residual=False)
    return recipe(
        method=method(backbone, 2048, 2048, 128, queue_len=65536, momentum=0.001, start_iters=1000),
        data=imagenet(*two_views(MOCO_CROP, MOCO_VIEW)),
        batch_size=256,
        max_epochs=200,
        optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.03, weight_decay=1e-4, momentum=0.9)),
        param_scheduler=[dict(type="CosineAnnealingLR", T_max=200, by_epoch=True, begin=0, end=200)],
        auto_scale_lr=dict(base_batch_size=256),
        checkpoint=dict(interval=10),
    )


def tiny() -> ConfigDict:
    """A narrow ResNet-18 on real handwritten digits, a queue of 8 batches, normalised in 4 parts."""

    def build(backbone: dict, width: int) -> dict:
        backbone = dict(backbone, norm_cfg=dict(type="BN", groups=4))
        return method(backbone, width, 128, 64, queue_len=1024, momentum=0.05, start_iters=44)

    return tiny_siamese(build, lr=0.1)


RECIPES = {
    "densecl_resnet50_8xb32-coslr-200e_in1k": pretrain,
    "resnet50_densecl-pre_8xb32-linear-steplr-100e_in1k": partial(
        probe_resnet50,
        dict(type="SGD", lr=30.0, weight_decay=0.0),
        100,
        32,
        [dict(type="MultiStepLR", by_epoch=True, milestones=[60, 80], gamma=0.1)],
    ),
    "digits": tiny,
}


def get_config(name: str | None = None) -> ConfigDict:
    return pick(RECIPES, name)
