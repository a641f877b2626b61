"""Relative location: Unsupervised Visual Representation Learning by Context Prediction (Doersch et al., 2015).

Measured here: `digits`, on 2 CPU cores. The other has not been run by us; published by MMSelfSup, whose settings these are:
linear probe on ImageNet-1k.

| recipe | command | hardware | wall time | metric |
|---|---|---|---|---|
| digits | `--config=configs/relative_loc.py:digits` | 2 CPU cores | 7.1 CPU min | probe 84.2, trained 88.6; kNN 63.3, 81.5 |
| relative-loc_resnet50_8xb64-steplr-70e_in1k | `--config=configs/relative_loc.py` | 8 GPUs | | 40.4 |

`8xb64` means 8 GPUs with 64 images each, normalised apart: BatchNorm in 8 groups. Colours are dropped on the device, from
each patch for itself; MMSelfSup drops those of all nine, or of none.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from jaxpretrain.config import pick
from jaxpretrain.recipes import digits, imagenet, jitter, recipe, tiny_siamese


def method(backbone: dict, width: int, hidden: int) -> dict:
    return dict(
        type="RelativeLoc",
        backbone=backbone,
        neck=dict(type="RelativeLocNeck", in_channels=width, out_channels=hidden, with_avg_pool=True),
        head=dict(
            type="LinearClsHead",
            in_channels=hidden,
            num_classes=8,
            loss=dict(type="CrossEntropyLoss"),
            cal_acc=True,
            init_cfg=dict(type="Normal", std=0.005, layer="Linear"),
        ),
    )


def pretrain() -> ConfigDict:
    backbone = dict(type="ResNet", depth=50, norm_cfg=dict(type="BN", groups=8))
    return recipe(
        method=method(backbone, 2048, 4096),
        data=imagenet(
            [
                dict(type="ResizeEdge", scale=292, edge="short"),
                dict(type="RandomCrop", crop_size=255),
                dict(type="RandomPatchWithLabels"),
            ],
            [dict(type="RandomGrayscale", prob=0.66, keep_channels=True)],
        ),
        data_preprocessor=dict(mean=(124.0, 117.0, 104.0), std=(59.0, 58.0, 58.0)),
        batch_size=512,
        max_epochs=70,
        optim_wrapper=dict(
            optimizer=dict(type="SGD", lr=0.2, momentum=0.9, weight_decay=1e-4),
            paramwise_cfg=dict(custom_keys={"neck": dict(decay_mult=5.0), "head": dict(decay_mult=5.0)}),
        ),
        param_scheduler=[
            dict(type="LinearLR", start_factor=0.1, by_epoch=True, begin=0, end=5, convert_to_iter_based=True),
            dict(type="MultiStepLR", by_epoch=True, milestones=[30, 50], gamma=0.1),
        ],
        checkpoint=dict(interval=10),
    )


def tiny() -> ConfigDict:
    """A narrow ResNet-18 on patches of 12 pixels of real handwritten digits, enlarged to 48: two of their own pixels each."""
    config = tiny_siamese(lambda backbone, width: method(backbone, width, 128), lr=0.05)
    crop = dict(type="RandomResizedCrop", scale=48, crop_ratio_range=(0.7, 1.0))
    cut = dict(type="RandomPatchWithLabels", patch_jitter=4)
    config.data.update(digits([crop, cut], [jitter(0.6, 0.6, 0.0, 0.0)], size=48))
    return config


RECIPES = {
    "relative-loc_resnet50_8xb64-steplr-70e_in1k": pretrain,
    "digits": tiny,
}


def get_config(name: str | None = None) -> ConfigDict:
    return pick(RECIPES, name)
