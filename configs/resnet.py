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
| resnetv1c50_8xb32_in1k | | 8 GPUs | | 77.01 |
| resnetv1c101_8xb32_in1k | | 8 GPUs | | 78.30 |
| resnetv1c152_8xb32_in1k | | 8 GPUs | | 78.76 |
| resnetv1d50_8xb32_in1k | | 8 GPUs | | 77.54 |
| resnetv1d101_8xb32_in1k | | 8 GPUs | | 78.93 |
| resnetv1d152_8xb32_in1k | | 8 GPUs | | 79.41 |
| resnet50_8xb32-fp16_in1k | | 8 GPUs | | 76.30 |
| resnet50_8xb256-rsb-a1-600e_in1k | | 8 GPUs | | 80.12 |
| resnet50_8xb256-rsb-a2-300e_in1k | | 8 GPUs | | 79.55 |
| resnet50_8xb256-rsb-a3-100e_in1k | | 8 GPUs | | 78.30 |
| resnet50_8xb8_cub | | 8 GPUs | | 88.45 |
| resnet18_8xb16_cifar10 | | 8 GPUs | | 94.82 |
| resnet34_8xb16_cifar10 | | 8 GPUs | | 95.34 |
| resnet50_8xb16_cifar10 | | 8 GPUs | | 95.55 |
| resnet101_8xb16_cifar10 | | 8 GPUs | | 95.58 |
| resnet152_8xb16_cifar10 | | 8 GPUs | | 95.76 |
| resnet50_8xb16_cifar100 | | 8 GPUs | | 79.90 |

`8xb32` means 8 GPUs with 32 images each, normalised apart: BatchNorm in 8 groups, on any number of devices. `fp16` is bfloat16
here, which needs no scaling of the loss.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from ml_collections import ConfigDict

from jaxpretrain.config import pick
from jaxpretrain.followers import ENCODER
from jaxpretrain.recipes import FLIP, digits, frozen_feature_scores, on_digits, warmup_cosine
from jaxpretrain.supervised_recipes import (
    PILLOW,
    birds,
    classic,
    cosine_schedule,
    plain_crops,
    rand_augment,
    smoothing,
    step_schedule,
)

WARMUP = dict(type="LinearLR", start_factor=0.25, by_epoch=False, begin=0, end=2500)
STAGES = dict(num_stages=4, out_indices=(3,), style="pytorch")
CIFAR = {
    10: dict(mean=(125.307, 122.961, 113.8575), std=(51.5865, 50.847, 51.255)),
    100: dict(mean=(129.304, 124.07, 112.434), std=(68.17, 65.392, 70.418)),
}


def resnet(depth: int, *, kind: str = "ResNet", gpus: int = 8, **settings: Any) -> ConfigDict:
    norm = dict(type="BN", requires_grad=True, groups=gpus)
    backbone = STAGES | dict(type=kind, depth=depth, norm_cfg=norm) | settings.pop("backbone", {})
    return classic(backbone, 512 if depth < 50 else 2048, gpus=gpus, **settings)


def in21k() -> ConfigDict:
    """The schedule would end at epoch 100; training does at 90. There is nothing to evaluate on."""
    data = plain_crops() | dict(val=dict(dataset=None, pipeline=[]))
    data["train"]["dataset"] = dict(type="ImageNet21k", data_root="data/imagenet21k", split="train")
    return resnet(
        50,
        per_gpu=128,
        epochs=90,
        optimizer=dict(lr=0.8, weight_decay=5e-5),
        schedule=cosine_schedule(100, warmup=5),
        head=dict(num_classes=21843),
        data=data,
        evaluators={},
        evaluation=dict(interval=-1),
    )


def strikes_back(
    epochs: int,
    *,
    mixup: float,
    level: int,
    lr: float = 0.005,
    weight_decay: float = 0.02,
    drop_path: float = 0.0,
    repeated: bool = True,
    loss: dict | None = None,
) -> ConfigDict:
    """ResNet strikes back (Wightman et al., 2021): LAMB and a binary loss of each class.

    Args:
        epochs: how long.
        mixup: `alpha` of Mixup, beside CutMix.
        level: of RandAugment.
        lr, weight_decay: of LAMB.
        drop_path: stochastic depth.
        repeated: whether an epoch has a third of the images, three times each.
        loss: of labels as they are by default.
    """
    data = plain_crops(edge=236, **PILLOW)
    data["train"]["pipeline"].append(rand_augment(level, interpolation="bicubic"))
    if repeated:
        data["train"]["sampler"] = dict(type="RepeatAugSampler")
    return resnet(
        50,
        backbone=dict(norm_cfg=dict(type="SyncBN", requires_grad=True), drop_path_rate=drop_path),
        per_gpu=256,
        epochs=epochs,
        optimizer=dict(type="Lamb", lr=lr, weight_decay=weight_decay),
        schedule=warmup_cosine(epochs, 5, by_iter=False, eta_min=1e-6),
        no_decay=dict(bias_decay_mult=0.0, norm_decay_mult=0.0),
        loss=loss or dict(type="CrossEntropyLoss", use_sigmoid=True, loss_weight=1.0),
        augments=[dict(type="Mixup", alpha=mixup), dict(type="CutMix", alpha=1.0)],
        data=data,
    )


def cub() -> ConfigDict:
    """Birds at 448 pixels, by an encoder trained on ImageNet-21k: `--config.load_from.path=FILE`."""
    return resnet(
        50,
        per_gpu=8,
        optimizer=dict(lr=0.01, weight_decay=5e-4, nesterov=True),
        schedule=warmup_cosine(100, 5, 0.01, by_iter=False),
        head=dict(num_classes=200),
        data=birds(448, 600),
        load_from=ENCODER,
        evaluators=dict(accuracy=dict(type="Accuracy", topk=(1,))),
    )


def cifar(depth: int, classes: int = 10, **settings: Any) -> ConfigDict:
    source = dict(type=f"CIFAR{classes}", data_root=f"data/cifar{classes}")
    if classes == 100:
        settings |= dict(schedule=step_schedule(60, 120, 160, gamma=0.2), optimizer=dict(weight_decay=5e-4))
    return resnet(
        depth,
        kind="ResNet_CIFAR",
        per_gpu=16,
        epochs=200,
        head=dict(num_classes=classes),
        data=dict(
            train=dict(
                dataset=dict(source, split="train"),
                pipeline=[dict(type="RandomCrop", crop_size=32, padding=4)],
                device_pipeline=[FLIP],
            ),
            val=dict(dataset=dict(source, split="test"), pipeline=[]),
        ),
        data_preprocessor=CIFAR[classes],
        evaluators=dict(accuracy=dict(type="Accuracy", topk=(1,))),
        **dict(schedule=step_schedule(100, 150)) | settings,
    )


def tiny() -> ConfigDict:
    """A narrow ResNet-18 on real handwritten digits, with label smoothing, Mixup and CutMix."""
    epochs = 20
    model = dict(
        type="ImageClassifier",
        backbone=STAGES | dict(type="ResNet_CIFAR", depth=18, stem_channels=16, base_channels=16),
        neck=dict(type="GlobalAveragePooling"),
        head=dict(type="LinearClsHead", num_classes=10, in_channels=128, loss=smoothing(mode="original")),
        train_cfg=dict(augments=[dict(type="Mixup", alpha=0.2), dict(type="CutMix", alpha=1.0)]),
    )
    return on_digits(
        method=dict(type="Supervised", model=model),
        data=digits([dict(type="RandomResizedCrop", scale=32, crop_ratio_range=(0.6, 1.0))], []),
        max_epochs=epochs,
        optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.1, momentum=0.9, weight_decay=1e-4, nesterov=True)),
        param_scheduler=warmup_cosine(epochs, 3),
        evaluators=frozen_feature_scores(accuracy=dict(type="Accuracy", topk=(1, 5))),
        evaluation=dict(interval=5, at_start=True),
        checkpoint=dict(interval=5, save_best="accuracy/top1"),
    )


# At a batch of 2,048.
LARGE = partial(resnet, 50, gpus=32, per_gpu=64, optimizer=dict(lr=0.8, nesterov=True))

RECIPES = {
    **{f"resnet{depth}_8xb32_in1k": partial(resnet, depth) for depth in (50, 18, 34, 101, 152)},
    "resnet50_8xb32-coslr_in1k": partial(resnet, 50, schedule=cosine_schedule(100)),
    "resnet50_8xb32-coslr-preciseBN_in1k": partial(
        resnet, 50, schedule=cosine_schedule(100), precise_bn=dict(num_samples=8192, interval=1)
    ),
    "resnet50_8xb32-lbs_in1k": partial(resnet, 50, loss=smoothing(loss_weight=1.0)),
    "resnet50_8xb32-mixup_in1k": partial(resnet, 50, augments=dict(type="Mixup", alpha=0.2)),
    "resnet50_8xb32-cutmix_in1k": partial(resnet, 50, augments=dict(type="CutMix", alpha=1.0)),
    "resnet50_8xb32-fp16_in1k": partial(resnet, 50, dtype="bfloat16"),
    "resnet50_8xb32-fp16-dynamic_in1k": partial(resnet, 50, dtype="bfloat16"),
    "resnet50_32xb64-warmup_in1k": partial(LARGE, schedule=[WARMUP, *step_schedule(30, 60, 90)]),
    "resnet50_32xb64-warmup-lbs_in1k": partial(
        LARGE, schedule=[WARMUP, *step_schedule(30, 60, 90)], loss=smoothing(loss_weight=1.0, num_classes=1000)
    ),
    "resnet50_32xb64-warmup-coslr_in1k": partial(LARGE, schedule=warmup_cosine(100, 5, 0.25, by_iter=False)),
    "resnet50_8xb256-rsb-a1-600e_in1k": partial(
        strikes_back,
        600,
        mixup=0.2,
        level=7,
        weight_decay=0.01,
        drop_path=0.05,
        loss=smoothing(mode="original", use_sigmoid=True, loss_weight=1.0),
    ),
    "resnet50_8xb256-rsb-a2-300e_in1k": partial(strikes_back, 300, mixup=0.1, level=7, drop_path=0.05),
    "resnet50_8xb256-rsb-a3-100e_in1k": partial(strikes_back, 100, mixup=0.1, level=6, lr=0.008, repeated=False),
    "resnet50_8xb128_coslr-90e_in21k": in21k,
    **{
        f"resnetv1{letter}{depth}_8xb32_in1k": partial(
            resnet, depth, kind=f"ResNetV1{letter}", data=plain_crops(backend="pillow")
        )
        for letter in "cd"
        for depth in (50, 101, 152)
    },
    "resnet50_8xb8_cub": cub,
    **{f"resnet{depth}_8xb16_cifar10": partial(cifar, depth) for depth in (18, 34, 50, 101, 152)},
    "resnet50_8xb16-mixup_cifar10": partial(cifar, 50, augments=dict(type="Mixup", alpha=1.0)),
    "resnet50_8xb16_cifar100": partial(cifar, 50, 100),
    "digits": tiny,
}


def get_config(name: str | None = None) -> ConfigDict:
    return pick(RECIPES, name)
