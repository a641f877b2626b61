"""SE-ResNet: Squeeze-and-Excitation Networks (Hu et al., 2018), trained with labels.

None of these has been run by us; published by MMPretrain: top-1 on ImageNet-1k, of its own training. There are no weights of
`seresnext`.

| recipe | command | hardware | wall time | metric |
|---|---|---|---|---|
| seresnet50_8xb32_in1k | `--config=configs/seresnet.py` | 8 GPUs | | 77.74 |
| seresnet101_8xb32_in1k | `--config=configs/seresnet.py:NAME` | 8 GPUs | | 78.26 |
| seresnext50-32x4d_8xb32_in1k |  | 8 GPUs | | |
| seresnext101-32x4d_8xb32_in1k |  | 8 GPUs | | |

A GPU has 32 images there, normalised apart: BatchNorm in 8 groups.
"""

from __future__ import annotations

from functools import partial

from ml_collections import ConfigDict

from jaxpretrain.config import pick
from jaxpretrain.supervised_recipes import classic, plain_crops, step_schedule


def seresnet(depth: int, kind: str = "SEResNet", **settings: object) -> ConfigDict:
    wide = dict(groups=32, width_per_group=4, se_ratio=16) if kind == "SEResNeXt" else {}
    backbone = dict(
        type=kind,
        depth=depth,
        num_stages=4,
        out_indices=(3,),
        style="pytorch",
        norm_cfg=dict(type="BN", requires_grad=True, groups=8),
    )
    return classic(backbone | wide, 2048, data=plain_crops(backend="pillow"), **settings)


RECIPES = {
    "seresnet50_8xb32_in1k": partial(seresnet, 50, epochs=140, schedule=step_schedule(40, 80, 120)),
    "seresnet101_8xb32_in1k": partial(seresnet, 101),
    "seresnext50-32x4d_8xb32_in1k": partial(seresnet, 50, "SEResNeXt"),
    "seresnext101-32x4d_8xb32_in1k": partial(seresnet, 101, "SEResNeXt"),
}


def get_config(name: str | None = None) -> ConfigDict:
    return pick(RECIPES, name)
