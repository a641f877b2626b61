"""ShuffleNet: An Extremely Efficient Convolutional Neural Network for Mobile Devices (Zhang et al., 2017), with labels.

This has not been run by us; published by MMPretrain: top-1 on ImageNet-1k.

| recipe | command | hardware | wall time | metric |
|---|---|---|---|---|
| shufflenet-v1-1x_16xb64_in1k | `--config=configs/shufflenet_v1.py` | 16 GPUs | | 68.13 |

`16xb64` means 16 GPUs with 64 images each, normalised apart: BatchNorm in 16 groups, on any number of devices.
"""

from __future__ import annotations

from functools import partial

from ml_collections import ConfigDict

from jaxpretrain.config import pick
from jaxpretrain.supervised_recipes import shufflenet

RECIPES = {
    "shufflenet-v1-1x_16xb64_in1k": partial(shufflenet, dict(type="ShuffleNetV1", groups=3), 960),
}


def get_config(name: str | None = None) -> ConfigDict:
    return pick(RECIPES, name)
