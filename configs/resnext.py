"""ResNeXt: Aggregated Residual Transformations for Deep Neural Networks (Xie et al., 2017), trained with labels.

None of these has been run by us; published by MMPretrain: top-1 on ImageNet-1k, of its own training.

| recipe | command | hardware | wall time | metric |
|---|---|---|---|---|
| resnext50-32x4d_8xb32_in1k | `--config=configs/resnext.py` | 8 GPUs | | 77.90 |
| resnext101-32x4d_8xb32_in1k | `--config=configs/resnext.py:NAME` | 8 GPUs | | 78.61 |
| resnext101-32x8d_8xb32_in1k |  | 8 GPUs | | 79.27 |
| resnext152-32x4d_8xb32_in1k |  | 8 GPUs | | 78.88 |

A GPU has 32 images there, normalised apart: BatchNorm in 8 groups.
"""

from __future__ import annotations

from functools import partial

from ml_collections import ConfigDict

from jaxpretrain.config import pick
from jaxpretrain.supervised_recipes import classic, plain_crops


def resnext(depth: int, width: int) -> ConfigDict:
    backbone = dict(
        type="ResNeXt",
        depth=depth,
        num_stages=4,
        out_indices=(3,),
        groups=32,
        width_per_group=width,
        style="pytorch",
        norm_cfg=dict(type="BN", requires_grad=True, groups=8),
    )
    return classic(backbone, 2048, data=plain_crops(backend="pillow"))


RECIPES = {
    f"resnext{depth}-32x{width}d_8xb32_in1k": partial(resnext, depth, width)
    for depth, width in ((50, 4), (101, 4), (101, 8), (152, 4))
}


def get_config(name: str | None = None) -> ConfigDict:
    return pick(RECIPES, name)
