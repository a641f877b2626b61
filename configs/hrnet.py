"""HRNet: Deep High-Resolution Representation Learning for Visual Recognition (Wang et al., 2020), trained with labels.

None of these has been run by us; published by MMPretrain: top-1 on ImageNet-1k, of weights from the paper's own training.
Those named `ssld` come from PaddleClas's distillation; the recipe of that name is of plain training.

| recipe | command | hardware | wall time | metric |
|---|---|---|---|---|
| hrnet-w18_3rdparty_8xb32_in1k | `--config=configs/hrnet.py` | 4 GPUs | | 76.75 |
| hrnet-w30_3rdparty_8xb32_in1k | `--config=configs/hrnet.py:NAME` | 4 GPUs | | 78.19 |
| hrnet-w32_3rdparty_8xb32_in1k |  | 4 GPUs | | 78.44 |
| hrnet-w40_3rdparty_8xb32_in1k |  | 4 GPUs | | 78.94 |
| hrnet-w44_3rdparty_8xb32_in1k |  | 4 GPUs | | 78.88 |
| hrnet-w48_3rdparty_8xb32_in1k |  | 4 GPUs | | 79.32 |
| hrnet-w64_3rdparty_8xb32_in1k |  | 4 GPUs | | 79.46 |
| hrnet-w18_3rdparty_8xb32-ssld_in1k |  | 4 GPUs | | 81.06 |
| hrnet-w48_3rdparty_8xb32-ssld_in1k |  | 4 GPUs | | 83.63 |

The batch is that of MMPretrain's files, 4 GPUs with 32 images each, whatever the names say: BatchNorm in 4 groups.
"""

from __future__ import annotations

from functools import partial

from ml_collections import ConfigDict

from jaxpretrain.config import pick
from jaxpretrain.supervised_recipes import classic, cosine_schedule, plain_crops

GROUPS = 4


def hrnet(width: int) -> ConfigDict:
    neck = [
        dict(
            type="HRFuseScales",
            in_channels=tuple(width * 2**i for i in range(4)),
            norm_cfg=dict(type="BN", momentum=0.1, groups=GROUPS),
        ),
        dict(type="GlobalAveragePooling"),
    ]
    return classic(
        dict(type="HRNet", arch=f"w{width}", norm_cfg=dict(type="BN", groups=GROUPS)),
        2048,
        gpus=GROUPS,
        schedule=cosine_schedule(100),
        model=dict(neck=neck),
        data=plain_crops(backend="pillow"),
    )


RECIPES = {f"hrnet-w{width}_3rdparty_8xb32_in1k": partial(hrnet, width) for width in (18, 30, 32, 40, 44, 48, 64)}
RECIPES |= {f"hrnet-w{width}_3rdparty_8xb32-ssld_in1k": partial(hrnet, width) for width in (18, 48)}


def get_config(name: str | None = None) -> ConfigDict:
    return pick(RECIPES, name)
