"""Res2Net: A New Multi-scale Backbone Architecture (Gao et al., 2019), trained with labels.

None of these has been run by us; published by MMPretrain: top-1 on ImageNet-1k, of weights from the paper's own training.

| recipe | command | hardware | wall time | metric |
|---|---|---|---|---|
| res2net50-w26-s8_3rdparty_8xb32_in1k | `--config=configs/res2net.py` | 8 GPUs | | 79.20 |
| res2net50-w14-s8_3rdparty_8xb32_in1k | `--config=configs/res2net.py:NAME` | 8 GPUs | | 78.14 |
| res2net101-w26-s4_3rdparty_8xb32_in1k |  | 8 GPUs | | 79.19 |

A GPU has 32 images there, normalised apart: BatchNorm in 8 groups.
"""

from __future__ import annotations

from functools import partial

from ml_collections import ConfigDict

from jaxpretrain.config import pick
from jaxpretrain.supervised_recipes import classic, plain_crops


def res2net(depth: int, base_width: int, scales: int) -> ConfigDict:
    backbone = dict(
        type="Res2Net",
        depth=depth,
        scales=scales,
        base_width=base_width,
        deep_stem=False,
        avg_down=False,
        norm_cfg=dict(type="BN", requires_grad=True, groups=8),
    )
    return classic(backbone, 2048, data=plain_crops(backend="pillow"))


RECIPES = {
    f"res2net{depth}-w{width}-s{scales}_3rdparty_8xb32_in1k": partial(res2net, depth, width, scales)
    for depth, width, scales in ((50, 26, 8), (50, 14, 8), (101, 26, 4))
}


def get_config(name: str | None = None) -> ConfigDict:
    return pick(RECIPES, name)
