"""DenseNet: Densely Connected Convolutional Networks (Huang et al., 2017), trained with labels.

None of these has been run by us; published by MMPretrain: top-1 on ImageNet-1k, of weights from the paper's own training.

| recipe | command | hardware | wall time | metric |
|---|---|---|---|---|
| densenet121_3rdparty_in1k | `--config=configs/densenet.py` | 4 GPUs | | 74.96 |
| densenet161_3rdparty_in1k | `--config=configs/densenet.py:NAME` | 4 GPUs | | 77.61 |
| densenet169_3rdparty_in1k |  | 4 GPUs | | 76.08 |
| densenet201_3rdparty_in1k |  | 4 GPUs | | 77.32 |

A GPU has 256 images there, normalised apart: BatchNorm in 4 groups.
"""

from __future__ import annotations

from functools import partial

from ml_collections import ConfigDict

from jaxpretrain.config import pick
from jaxpretrain.supervised_recipes import classic


def densenet(arch: str, width: int) -> ConfigDict:
    backbone = dict(type="DenseNet", arch=arch, norm_cfg=dict(type="BN", groups=4))
    return classic(backbone, width, gpus=4, per_gpu=256, epochs=90)


RECIPES = {
    f"densenet{arch}_3rdparty_in1k": partial(densenet, arch, width)
    for arch, width in (("121", 1024), ("161", 2208), ("169", 1664), ("201", 1920))
}


def get_config(name: str | None = None) -> ConfigDict:
    return pick(RECIPES, name)
