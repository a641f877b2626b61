"""DaViT: Dual Attention Vision Transformers (Ding et al., 2022), with labels.

These have not been run by us; published by MMPretrain: top-1 on ImageNet-1k, of weights from the paper's own training.

| recipe | command | hardware | wall time | metric |
|---|---|---|---|---|
| davit-tiny_3rdparty_in1k | `--config=configs/davit.py` | 4 GPUs | | 82.24 |
| davit-small_3rdparty_in1k | `--config=configs/davit.py:NAME` | 4 GPUs | | 83.61 |
| davit-base_3rdparty_in1k | | 4 GPUs | | 84.09 |
"""

from __future__ import annotations

from functools import partial

from ml_collections import ConfigDict

from jaxpretrain.config import pick
from jaxpretrain.supervised_recipes import from_scratch, resized


def davit(arch: str, width: int, drop_path_rate: float) -> ConfigDict:
    return from_scratch(
        dict(type="DaViT", arch=arch, out_indices=(3,), drop_path_rate=drop_path_rate),
        width,
        lr=1e-3,
        gpus=4,
        per_gpu=256,
        data=resized(236),
        model=dict(neck=dict(type="GlobalAveragePooling")),
    )


RECIPES = {
    "davit-tiny_3rdparty_in1k": partial(davit, "t", 768, 0.1),
    "davit-small_3rdparty_in1k": partial(davit, "small", 768, 0.2),
    "davit-base_3rdparty_in1k": partial(davit, "base", 1024, 0.4),
}


def get_config(name: str | None = None) -> ConfigDict:
    return pick(RECIPES, name)
