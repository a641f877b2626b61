"""MobileNetV3: Searching for MobileNetV3 (Howard et al., 2019), trained with labels.

None of these has been run by us; published by MMPretrain: top-1 on ImageNet-1k. Weights of a `3rdparty` name come from others'
training, whose recipe was another.

| recipe | command | hardware | wall time | metric |
|---|---|---|---|---|
| mobilenet-v3-large_8xb128_in1k | `--config=configs/mobilenet_v3.py` | 8 GPUs | | 73.49 |
| mobilenet-v3-small_8xb128_in1k | `--config=configs/mobilenet_v3.py:NAME` | 8 GPUs | | 66.68 |
| mobilenet-v3-large_3rdparty_in1k | | 8 GPUs | | 74.04 |
| mobilenet-v3-small_3rdparty_in1k | | 8 GPUs | | 67.66 |
| mobilenet-v3-small-075_3rdparty_in1k | | 8 GPUs | | 65.23 |
| mobilenet-v3-small-050_3rdparty_in1k | | 8 GPUs | | 57.91 |
| mobilenet-v3-small_8xb16_cifar10 | | 8 GPUs | | |

`8xb128` means 8 GPUs with 128 images each, normalised apart: BatchNorm in 8 groups, on any number of devices.
"""

from __future__ import annotations

from functools import partial

from ml_collections import ConfigDict

from jaxpretrain.config import IMAGENET_MEAN, IMAGENET_STD, pick
from jaxpretrain.recipes import FLIP, Cfg, imagenet
from jaxpretrain.supervised_recipes import classic, step_schedule

WIDTHS = dict(large=960, small=576, small_075=432, small_050=288)
BN: Cfg = dict(type="BN", eps=1e-3, momentum=0.01, groups=8)
TORCHVISION_BN: Cfg = dict(type="BN", eps=1e-5, momentum=0.1, groups=8)


def head(middle: int, **args: object) -> Cfg:
    return dict(type="StackedLinearClsHead", mid_channels=[middle], act_cfg=dict(type="HSwish"), **args)


def auto_augmented(**filters: str) -> Cfg:
    """`data` with AutoAugment and erased rectangles; evaluation on the middle of images."""
    filters = dict(backend="pillow", **filters)
    augmented: list[Cfg] = [
        dict(type="RandomResizedCrop", scale=224, **filters),
        FLIP,
        dict(type="AutoAugment", policies="imagenet", hparams=dict(pad_val=[124, 116, 104])),
        dict(
            type="RandomErasing",
            erase_prob=0.2,
            mode="rand",
            min_area_ratio=0.02,
            max_area_ratio=1 / 3,
            fill_color=list(IMAGENET_MEAN),
            fill_std=list(IMAGENET_STD),
        ),
    ]
    return imagenet(augmented, [], resize=dict(type="ResizeEdge", scale=256, edge="short", **filters))


def in1k(arch: str) -> ConfigDict:
    """600 epochs of RMSprop, whose rate falls by 2.7 % after every other."""
    narrow = arch in ("small_075", "small_050")
    return classic(
        dict(type="MobileNetV3", arch=arch, norm_cfg=TORCHVISION_BN if narrow else BN),
        WIDTHS[arch],
        per_gpu=128,
        epochs=600,
        optimizer=dict(type="RMSprop", lr=0.064, alpha=0.9, momentum=0.9, eps=0.0316, weight_decay=1e-5),
        schedule=[dict(type="StepLR", by_epoch=True, step_size=2, gamma=0.973)],
        head=head(
            1280 if arch == "large" else 1024,
            dropout_rate=0.2,
            init_cfg=dict(type="Normal", layer="Linear", mean=0.0, std=0.01, bias=0.0),
        ),
        data=auto_augmented(interpolation="bicubic") if narrow else auto_augmented(),
    )


def cifar10() -> ConfigDict:
    source: Cfg = dict(type="CIFAR10", data_root="data/cifar10")
    crop: Cfg = dict(type="RandomCrop", crop_size=32, padding=4)
    return classic(
        dict(type="MobileNetV3", arch="small", norm_cfg=BN),
        WIDTHS["small"],
        per_gpu=16,
        epochs=200,
        schedule=step_schedule(120, 170),
        head=head(1280, num_classes=10),
        data=dict(
            train=dict(dataset=dict(source, split="train"), pipeline=[crop], device_pipeline=[FLIP]),
            val=dict(dataset=dict(source, split="test"), pipeline=[]),
        ),
        data_preprocessor=dict(mean=(125.307, 122.961, 113.8575), std=(51.5865, 50.847, 51.255)),
        evaluators=dict(accuracy=dict(type="Accuracy", topk=(1,))),
    )


RECIPES = {
    "mobilenet-v3-large_8xb128_in1k": partial(in1k, "large"),
    "mobilenet-v3-small_8xb128_in1k": partial(in1k, "small"),
    "mobilenet-v3-large_3rdparty_in1k": partial(in1k, "large"),
    "mobilenet-v3-small_3rdparty_in1k": partial(in1k, "small"),
    "mobilenet-v3-small-075_3rdparty_in1k": partial(in1k, "small_075"),
    "mobilenet-v3-small-050_3rdparty_in1k": partial(in1k, "small_050"),
    "mobilenet-v3-small_8xb16_cifar10": cifar10,
}


def get_config(name: str | None = None) -> ConfigDict:
    return pick(RECIPES, name)
