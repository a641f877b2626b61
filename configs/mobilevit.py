"""MobileViT: Light-weight, General-purpose, and Mobile-friendly Vision Transformer (Mehta & Rastegari, 2021), with labels.

These have not been run by us; published by MMPretrain: top-1 on ImageNet-1k, of weights from the paper's own training, which
was another; its recipe is that of its ResNets.

| recipe | command | hardware | wall time | metric |
|---|---|---|---|---|
| mobilevit-small_3rdparty_in1k | `--config=configs/mobilevit.py` | 8 GPUs | | 78.25 |
| mobilevit-xsmall_3rdparty_in1k | `--config=configs/mobilevit.py:NAME` | 8 GPUs | | 74.75 |
| mobilevit-xxsmall_3rdparty_in1k | | 8 GPUs | | 69.02 |

The network takes colours from 0 to 1, blue first. BatchNorm is that of 8 GPUs with 128 images each: in 8 groups, on any number
of devices.
"""

from __future__ import annotations

from functools import partial

from ml_collections import ConfigDict

from jaxpretrain.config import pick
from jaxpretrain.supervised_recipes import classic, plain_crops


def mobilevit(arch: str, width: int) -> ConfigDict:
    return classic(
        dict(type="MobileViT", arch=arch, norm_cfg=dict(type="BN", groups=8)),
        width,
        per_gpu=128,
        data=plain_crops(edge=288, tested=256),
        data_preprocessor=dict(mean=(0.0,) * 3, std=(255.0,) * 3, channel_order="bgr"),
        auto_scale_lr=dict(base_batch_size=256),
    )


RECIPES = {
    "mobilevit-small_3rdparty_in1k": partial(mobilevit, "small", 640),
    "mobilevit-xsmall_3rdparty_in1k": partial(mobilevit, "x_small", 384),
    "mobilevit-xxsmall_3rdparty_in1k": partial(mobilevit, "xx_small", 320),
}


def get_config(name: str | None = None) -> ConfigDict:
    return pick(RECIPES, name)
