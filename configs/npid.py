"""NPID: Unsupervised Feature Learning via Non-Parametric Instance Discrimination (Wu et al., 2018).

Measured here: `digits`, on 2 CPU cores. The others have not been run by us; published by MMSelfSup, whose settings these
are: linear probe on ImageNet-1k.

| recipe | command | hardware | wall time | metric |
|---|---|---|---|---|
| digits | `--config=configs/npid.py:digits` | 2 CPU cores | 1.7 CPU min | probe 80.1, trained 96.6; kNN 70.4, 89.9 |
| npid_resnet50_8xb32-steplr-200e_in1k | `--config=configs/npid.py` | 8 GPUs | | 58.3 |
| npid-ensure-neg_resnet50_8xb32-steplr-200e_in1k | `--config=configs/npid.py:NAME` | 8 GPUs | | - |

The memory holds a feature of each image: 656 MB for ImageNet-1k. Another data set needs its own `memory_bank.length`.
"""

from __future__ import annotations

from functools import partial

from ml_collections import ConfigDict

from jaxpretrain.config import pick
from jaxpretrain.recipes import FLIP, GRAYSCALE, MOCO_CROP, digits, imagenet, jitter, recipe, tiny_siamese


def method(
    backbone: dict, width: int, out: int, images: int, neg_num: int, ensure_neg: bool, norm: dict | None = None
) -> dict:
    return dict(
        type="NPID",
        neg_num=neg_num,
        ensure_neg=ensure_neg,
        backbone=backbone,
        neck=dict(type="LinearNeck", in_channels=width, out_channels=out, gap_dim=2, norm_cfg=norm),
        head=dict(type="ContrastiveHead", loss=dict(type="CrossEntropyLoss"), temperature=0.07),
        memory_bank=dict(type="SimpleMemory", length=images, feat_dim=out, momentum=0.5),
    )


def pretrain(ensure_neg: bool) -> ConfigDict:
    backbone = dict(type="ResNet", depth=50, norm_cfg=dict(type="SyncBN"))
    colours = dict(type="ColorJitter", brightness=0.4, contrast=0.4, saturation=0.4, hue=0.4)
    return recipe(
        method=method(backbone, 2048, 128, 1281167, 65536, ensure_neg),
        data=imagenet([MOCO_CROP], [GRAYSCALE, colours, FLIP]),
        batch_size=256,
        max_epochs=200,
        optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.03, weight_decay=1e-4, momentum=0.9)),
        param_scheduler=[dict(type="MultiStepLR", by_epoch=True, milestones=[120, 160], gamma=0.1)],
        checkpoint=dict(interval=10),
    )


def tiny() -> ConfigDict:
    """A narrow ResNet-18 on real handwritten digits: 1,500 features to remember, 512 negatives.

    The projector ends in a BatchNorm. Without, all features are alike at first, and each image meets those of the images
    before it as negatives that it cannot tell from itself: in so short a run that is not made up for.
    """

    def build(backbone: dict, width: int) -> dict:
        return method(backbone, width, 64, 1500, 512, ensure_neg=True, norm=dict(type="BN1d"))

    config = tiny_siamese(build, lr=0.05)
    crop = dict(type="RandomResizedCrop", scale=16, crop_ratio_range=(0.4, 1.0))
    config.data.update(digits([crop], [jitter(0.6, 0.6, 0.0, 0.0)], size=16))
    return config


RECIPES = {
    "npid_resnet50_8xb32-steplr-200e_in1k": partial(pretrain, False),
    "npid-ensure-neg_resnet50_8xb32-steplr-200e_in1k": partial(pretrain, True),
    "digits": tiny,
}


def get_config(name: str | None = None) -> ConfigDict:
    return pick(RECIPES, name)
