"""EfficientNetV2: Smaller Models and Faster Training (Tan & Le, 2021), trained with labels.

None of these has been run by us; published by MMPretrain: top-1 on ImageNet-1k, of weights from the paper's own training, which
was another; its recipes are those of its ResNets, on images that are smaller in training than in evaluation.

| recipe | command | hardware | wall time | metric |
|---|---|---|---|---|
| efficientnetv2-s_3rdparty_in1k | `--config=configs/efficientnet_v2.py` | 8 GPUs | | 83.82 |
| efficientnetv2-m_3rdparty_in1k | `--config=configs/efficientnet_v2.py:NAME` | 8 GPUs | | 85.01 |
| efficientnetv2-l_3rdparty_in1k | | 8 GPUs | | 85.43 |
| efficientnetv2-b0_3rdparty_in1k | | 8 GPUs | | 78.52 |
| efficientnetv2-b1_3rdparty_in1k | | 8 GPUs | | 79.80 |
| efficientnetv2-b2_3rdparty_in1k | | 8 GPUs | | 80.63 |
| efficientnetv2-b3_3rdparty_in1k | | 8 GPUs | | 82.03 |
| efficientnetv2-s_in21k-pre_3rdparty_in1k | | 8 GPUs | | 84.29 |
| efficientnetv2-m_in21k-pre_3rdparty_in1k | | 8 GPUs | | 85.47 |
| efficientnetv2-l_in21k-pre_3rdparty_in1k | | 8 GPUs | | 86.31 |
| efficientnetv2-xl_in21k-pre_3rdparty_in1k | | 8 GPUs | | 86.39 |
| efficientnetv2-KIND_3rdparty_in21k | | 8 GPUs | | |

with s, m, l and xl as KIND: 21,843 classes, for which `--config.data.train.dataset` and `.val.dataset` are to be set; ImageNet-1k
stands there, as in MMPretrain. The recipes of `in21k-pre` are those without it. BatchNorm is that of 8 GPUs with 32 images each:
in 8 groups, on any number of devices.
"""

from __future__ import annotations

from functools import partial

from ml_collections import ConfigDict

from jaxpretrain.config import pick
from jaxpretrain.followers import CENTRED, strong_augmentation
from jaxpretrain.recipes import FLIP, Cfg, imagenet
from jaxpretrain.supervised_recipes import classic

WIDTHS = dict(b2=1408, b3=1536)  # of the features; 1280 elsewhere
SMALL = dict(b0=(192, 224), b1=(192, 240), b2=(208, 260), b3=(240, 300))  # edge of the images in training, evaluation
LARGE = dict(s=(300, 384), m=(384, 480), l=(384, 480), xl=(384, 512))


def crops(train: int, val: int, **args: int) -> Cfg:
    """EfficientNet's crops; in evaluation of whole images."""
    return whole(imagenet([dict(type="EfficientNetRandomCrop", scale=train, **args)], [FLIP]), val)


def whole(data: Cfg, size: int) -> Cfg:
    """`data` with evaluation on the largest square in the middle."""
    data["val"]["pipeline"] = [dict(type="EfficientNetCenterCrop", crop_size=size, crop_padding=0)]
    return data


def v2(arch: str, data: Cfg, num_classes: int = 1000, **fields: Cfg) -> ConfigDict:
    if arch in LARGE:
        fields = dict(data_preprocessor=CENTRED) | fields
    return classic(
        dict(type="EfficientNetV2", arch=arch, norm_cfg=dict(type="BN", eps=1e-3, momentum=0.1, groups=8)),
        WIDTHS.get(arch, 1280),
        head=dict(num_classes=num_classes),
        data=data,
        **fields,
    )


def small(arch: str) -> ConfigDict:
    train, val = SMALL[arch]
    return v2(arch, whole(strong_augmentation(train), val) if arch == "b0" else crops(train, val))


def large(arch: str) -> ConfigDict:
    return v2(arch, crops(*LARGE[arch], crop_padding=0))


def in21k(arch: str) -> ConfigDict:
    """At a low rate, with gradients cut."""
    wrapper = dict(optimizer=dict(type="SGD", lr=0.004, momentum=0.9, weight_decay=1e-4), clip_grad=dict(max_norm=5.0))
    return v2(arch, crops(224, 224), 21843, optim_wrapper=wrapper)


RECIPES = {f"efficientnetv2-{arch}_3rdparty_in1k": partial(large, arch) for arch in ("s", "m", "l")}
RECIPES |= {f"efficientnetv2-{arch}_3rdparty_in1k": partial(small, arch) for arch in SMALL}
RECIPES |= {f"efficientnetv2-{arch}_in21k-pre_3rdparty_in1k": partial(large, arch) for arch in LARGE}
RECIPES |= {f"efficientnetv2-{arch}_3rdparty_in21k": partial(in21k, arch) for arch in LARGE}


def get_config(name: str | None = None) -> ConfigDict:
    return pick(RECIPES, name)
