"""CSPNet: A New Backbone that can Enhance Learning Capability of CNN (Wang et al., 2020), trained with labels.

None of these has been run by us; published by MMPretrain: top-1 on ImageNet-1k, of timm's weights.

| recipe | command | hardware | wall time | metric |
|---|---|---|---|---|
| cspresnet50_3rdparty_8xb32_in1k | `--config=configs/cspnet.py` | 8 GPUs | | 79.55 |
| cspresnext50_3rdparty_8xb32_in1k | `--config=configs/cspnet.py:NAME` | 8 GPUs | | 79.96 |
| cspdarknet50_3rdparty_8xb32_in1k |  | 8 GPUs | | 80.05 |

A GPU has 32 images there, normalised apart: BatchNorm in 8 groups.
"""

from __future__ import annotations

from functools import partial

from ml_collections import ConfigDict

from jaxpretrain.config import pick
from jaxpretrain.supervised_recipes import PILLOW, classic, plain_crops


def csp(kind: str, depth: int, width: int, edge: int, tested: int) -> ConfigDict:
    backbone = dict(type=kind, depth=depth, norm_cfg=dict(type="BN", eps=1e-5, groups=8))
    return classic(backbone, width, data=plain_crops(edge=edge, tested=tested, **PILLOW))


RECIPES = {
    "cspresnet50_3rdparty_8xb32_in1k": partial(csp, "CSPResNet", 50, 1024, 288, 256),
    "cspresnext50_3rdparty_8xb32_in1k": partial(csp, "CSPResNeXt", 50, 2048, 256, 224),
    "cspdarknet50_3rdparty_8xb32_in1k": partial(csp, "CSPDarkNet", 53, 1024, 288, 256),
}


def get_config(name: str | None = None) -> ConfigDict:
    return pick(RECIPES, name)
