"""Rotation prediction: Unsupervised Representation Learning by Predicting Image Rotations (Gidaris et al., 2018).

Measured here: `digits`, on 2 CPU cores. The other has not been run by us; published by MMSelfSup, whose settings these are:
linear probe on ImageNet-1k.

| recipe | command | hardware | wall time | metric |
|---|---|---|---|---|
| digits | `--config=configs/rotation_pred.py:digits` | 2 CPU cores | 4.9 CPU min | probe 80.1, trained 87.5; kNN 70.4, 85.5 |
| rotation-pred_resnet50_8xb16-steplr-70e_in1k | `--config=configs/rotation_pred.py` | 8 GPUs | | 47.0 |
"""

from __future__ import annotations

from ml_collections import ConfigDict

from jaxpretrain.config import pick
from jaxpretrain.recipes import FLIP, digits, imagenet, jitter, recipe, tiny_siamese


def method(backbone: dict, width: int) -> dict:
    return dict(
        type="RotationPred",
        backbone=backbone,
        neck=dict(type="GlobalAveragePooling"),
        head=dict(
            type="LinearClsHead", in_channels=width, num_classes=4, loss=dict(type="CrossEntropyLoss"), cal_acc=True
        ),
    )


def pretrain() -> ConfigDict:
    return recipe(
        method=method(dict(type="ResNet", depth=50, norm_cfg=dict(type="SyncBN")), 2048),
        data=imagenet(
            [dict(type="RandomResizedCrop", scale=224, backend="pillow"), FLIP, dict(type="RotationWithLabels")], []
        ),
        batch_size=128,
        max_epochs=70,
        optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.2, momentum=0.9, weight_decay=1e-4)),
        param_scheduler=[
            dict(type="LinearLR", start_factor=0.1, by_epoch=True, begin=0, end=5, convert_to_iter_based=True),
            dict(type="MultiStepLR", by_epoch=True, milestones=[30, 50], gamma=0.1),
        ],
        checkpoint=dict(interval=10),
    )


def tiny() -> ConfigDict:
    """A narrow ResNet-18 on real handwritten digits, each at its four angles."""
    config = tiny_siamese(method, lr=0.05)
    crop = dict(type="RandomResizedCrop", scale=16, crop_ratio_range=(0.5, 1.0))
    config.data.update(digits([crop, dict(type="RotationWithLabels")], [jitter(0.6, 0.6, 0.0, 0.0)], size=16))
    return config


RECIPES = {
    "rotation-pred_resnet50_8xb16-steplr-70e_in1k": pretrain,
    "digits": tiny,
}


def get_config(name: str | None = None) -> ConfigDict:
    return pick(RECIPES, name)
