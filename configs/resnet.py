"""ResNet: Deep Residual Learning for Image Recognition (He et al., 2015), trained with labels.

Measured here: `digits`, on 2 CPU cores. The others have not been run by us; published by MMPretrain: top-1 on the data set.

| recipe | command | hardware | wall time | metric |
|---|---|---|---|---|
| digits | `--config=configs/resnet.py:digits` | 2 CPU cores | 2.5 min | top-1 91.6; linear 76.4 to 95.6, kNN 62.3 to 96.0 |
| resnet50_8xb32_in1k | `--config=configs/resnet.py` | 8 GPUs | | 76.55 |
| resnet18_8xb32_in1k | `--config=configs/resnet.py:NAME` | 8 GPUs | | 69.90 |
| resnet34_8xb32_in1k | | 8 GPUs | | 73.62 |
| resnet101_8xb32_in1k | | 8 GPUs | | 77.97 |
| resnet152_8xb32_in1k | | 8 GPUs | | 78.48 |
| resnet18_8xb16_cifar10 | | 8 GPUs | | 94.82 |
| resnet34_8xb16_cifar10 | | 8 GPUs | | 95.34 |
| resnet50_8xb16_cifar10 | | 8 GPUs | | 95.55 |
| resnet101_8xb16_cifar10 | | 8 GPUs | | 95.58 |
| resnet152_8xb16_cifar10 | | 8 GPUs | | 95.76 |
| resnet50_8xb16_cifar100 | | 8 GPUs | | 79.90 |

`8xb32` means 8 GPUs with 32 images each, normalised apart: BatchNorm in 8 groups, on any number of devices.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from ml_collections import ConfigDict

from jaxpretrain.config import pick
from jaxpretrain.recipes import (
    FLIP,
    digits,
    frozen_feature_scores,
    imagenet,
    on_digits,
    recipe,
    warmup_cosine,
)

STEPS = [dict(type="MultiStepLR", by_epoch=True, milestones=(30, 60, 90), gamma=0.1)]
COSINE = [dict(type="CosineAnnealingLR", T_max=100, by_epoch=True, begin=0, end=100)]
WARMUP_STEPS = [dict(type="LinearLR", start_factor=0.25, by_epoch=False, begin=0, end=2500), *STEPS]
LABEL_SMOOTHING = dict(type="LabelSmoothLoss", label_smooth_val=0.1, loss_weight=1.0)
CIFAR = {
    10: dict(mean=(125.307, 122.961, 113.8575), std=(51.5865, 50.847, 51.255)),
    100: dict(mean=(129.304, 124.07, 112.434), std=(68.17, 65.392, 70.418)),
}


def classifier(
    backbone: dict, num_classes: int, in_channels: int, loss: dict | None = None, augments: Any = None
) -> dict:
    model = dict(
        type="ImageClassifier",
        backbone=dict(num_stages=4, out_indices=(3,), style="pytorch", **backbone),
        neck=dict(type="GlobalAveragePooling"),
        head=dict(
            type="LinearClsHead",
            num_classes=num_classes,
            in_channels=in_channels,
            loss=loss or dict(type="CrossEntropyLoss", loss_weight=1.0),
        ),
    )
    if augments:
        model["train_cfg"] = dict(augments=augments)
    return dict(type="Supervised", model=model)


def in1k(
    depth: int,
    *,
    kind: str = "ResNet",
    gpus: int = 8,
    per_gpu: int = 32,
    schedule: list = STEPS,
    filters: dict = {},  # noqa: B006 - read only
    optimizer: dict | None = None,
    **model: Any,
) -> ConfigDict:
    norm = dict(type="BN", requires_grad=True, groups=gpus)
    return recipe(
        method=classifier(dict(type=kind, depth=depth, norm_cfg=norm), 1000, 512 if depth < 50 else 2048, **model),
        data=imagenet(
            [dict(type="RandomResizedCrop", scale=224, **filters)],
            [FLIP],
            resize=dict(type="ResizeEdge", scale=256, edge="short", **filters),
        ),
        batch_size=gpus * per_gpu,
        max_epochs=100,
        optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.1, momentum=0.9, weight_decay=1e-4) | (optimizer or {})),
        param_scheduler=schedule,
        auto_scale_lr=dict(base_batch_size=gpus * per_gpu),
        evaluators=dict(accuracy=dict(type="Accuracy", topk=(1, 5))),
        evaluation=dict(interval=1),
    )


def cifar(depth: int, classes: int = 10, **model: Any) -> ConfigDict:
    norm = dict(type="BN", requires_grad=True, groups=8)
    more = dict(weight_decay=5e-4) if classes == 100 else dict(weight_decay=1e-4)
    milestones, gamma = ((60, 120, 160), 0.2) if classes == 100 else ((100, 150), 0.1)
    source = dict(type=f"CIFAR{classes}", data_root=f"data/cifar{classes}")
    return recipe(
        method=classifier(
            dict(type="ResNet_CIFAR", depth=depth, norm_cfg=norm), classes, 512 if depth < 50 else 2048, **model
        ),
        data=dict(
            train=dict(
                dataset=dict(source, split="train"),
                pipeline=[dict(type="RandomCrop", crop_size=32, padding=4)],
                device_pipeline=[FLIP],
            ),
            val=dict(dataset=dict(source, split="test"), pipeline=[]),
        ),
        data_preprocessor=CIFAR[classes],
        batch_size=128,
        max_epochs=200,
        optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.1, momentum=0.9, **more)),
        param_scheduler=[dict(type="MultiStepLR", by_epoch=True, milestones=milestones, gamma=gamma)],
        auto_scale_lr=dict(base_batch_size=128),
        evaluators=dict(accuracy=dict(type="Accuracy", topk=(1,))),
        evaluation=dict(interval=1),
    )


def tiny() -> ConfigDict:
    """A narrow ResNet-18 on real handwritten digits, with label smoothing, Mixup and CutMix."""
    epochs = 20
    return on_digits(
        method=classifier(
            dict(type="ResNet_CIFAR", depth=18, stem_channels=16, base_channels=16),
            10,
            128,
            loss=dict(type="LabelSmoothLoss", label_smooth_val=0.1, mode="original"),
            augments=[dict(type="Mixup", alpha=0.2), dict(type="CutMix", alpha=1.0)],
        ),
        data=digits([dict(type="RandomResizedCrop", scale=32, crop_ratio_range=(0.6, 1.0))], []),
        max_epochs=epochs,
        optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.1, momentum=0.9, weight_decay=1e-4, nesterov=True)),
        param_scheduler=warmup_cosine(epochs, 3),
        evaluators=frozen_feature_scores(accuracy=dict(type="Accuracy", topk=(1, 5))),
        evaluation=dict(interval=5, at_start=True),
        checkpoint=dict(interval=5, save_best="accuracy/top1"),
    )


NESTEROV = dict(lr=0.8, nesterov=True)
PILLOW = dict(backend="pillow")

RECIPES = {
    "resnet50_8xb32_in1k": partial(in1k, 50),
    "resnet18_8xb32_in1k": partial(in1k, 18),
    "resnet34_8xb32_in1k": partial(in1k, 34),
    "resnet101_8xb32_in1k": partial(in1k, 101),
    "resnet152_8xb32_in1k": partial(in1k, 152),
    "resnet50_8xb32-coslr_in1k": partial(in1k, 50, schedule=COSINE),
    "resnet50_8xb32-lbs_in1k": partial(in1k, 50, loss=LABEL_SMOOTHING),
    "resnet50_8xb32-mixup_in1k": partial(in1k, 50, augments=dict(type="Mixup", alpha=0.2)),
    "resnet50_8xb32-cutmix_in1k": partial(in1k, 50, augments=dict(type="CutMix", alpha=1.0)),
    "resnet50_32xb64-warmup_in1k": partial(in1k, 50, gpus=32, per_gpu=64, schedule=WARMUP_STEPS, optimizer=NESTEROV),
    "resnet50_32xb64-warmup-lbs_in1k": partial(
        in1k,
        50,
        gpus=32,
        per_gpu=64,
        schedule=WARMUP_STEPS,
        optimizer=NESTEROV,
        loss=LABEL_SMOOTHING | dict(num_classes=1000),
    ),
    "resnet50_32xb64-warmup-coslr_in1k": partial(
        in1k,
        50,
        gpus=32,
        per_gpu=64,
        schedule=warmup_cosine(100, 5, 0.25, by_iter=False),
        optimizer=NESTEROV,
    ),
    **{
        f"resnetv1{letter}{depth}_8xb32_in1k": partial(in1k, depth, kind=f"ResNetV1{letter}", filters=PILLOW)
        for letter in "cd"
        for depth in (50, 101, 152)
    },
    **{f"resnet{depth}_8xb16_cifar10": partial(cifar, depth) for depth in (18, 34, 50, 101, 152)},
    "resnet50_8xb16-mixup_cifar10": partial(cifar, 50, augments=dict(type="Mixup", alpha=1.0)),
    "resnet50_8xb16_cifar100": partial(cifar, 50, 100),
    "digits": tiny,
}


def get_config(name: str | None = None) -> ConfigDict:
    return pick(RECIPES, name)
