"""Wide ResNet: Wide Residual Networks (Zagoruyko & Komodakis, 2016), trained with labels.

None of these has been run by us; published by MMPretrain: top-1 on ImageNet-1k, of torchvision's and timm's weights.

| recipe | command | hardware | wall time | metric |
|---|---|---|---|---|
| wide-resnet50_3rdparty_8xb32_in1k | `--config=configs/wrn.py` | 8 GPUs | | 78.48 |
| wide-resnet101_3rdparty_8xb32_in1k | `--config=configs/wrn.py:NAME` | 8 GPUs | | 78.84 |
| wide-resnet50_3rdparty-timm_8xb32_in1k |  | 8 GPUs | | 81.45 |

A GPU has 32 images there, normalised apart: BatchNorm in 8 groups.
"""

from __future__ import annotations

from functools import partial

from ml_collections import ConfigDict

from jaxpretrain.config import pick
from jaxpretrain.supervised_recipes import PILLOW, classic, plain_crops


def wide_resnet(depth: int, **filters: str) -> ConfigDict:
    """The 3x3 convolutions of a ResNet at twice its width."""
    backbone = dict(
        type="ResNet",
        depth=depth,
        num_stages=4,
        out_indices=(3,),
        stem_channels=64,
        base_channels=128,
        expansion=2,
        style="pytorch",
        norm_cfg=dict(type="BN", requires_grad=True, groups=8),
    )
    return classic(backbone, 2048, data=plain_crops(**dict(backend="pillow") | filters))


RECIPES = {
    "wide-resnet50_3rdparty_8xb32_in1k": partial(wide_resnet, 50),
    "wide-resnet101_3rdparty_8xb32_in1k": partial(wide_resnet, 101),
    "wide-resnet50_3rdparty-timm_8xb32_in1k": partial(wide_resnet, 50, **PILLOW),
}


def get_config(name: str | None = None) -> ConfigDict:
    return pick(RECIPES, name)
