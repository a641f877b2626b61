"""HorNet: Efficient High-Order Spatial Interactions with Recursive Gated Convolutions (Rao et al., 2022), with labels.

These have not been run by us; published by MMPretrain: top-1 on ImageNet-1k, of weights from the paper's own training.

| recipe | command | hardware | wall time | metric |
|---|---|---|---|---|
| hornet-tiny_3rdparty_in1k | `--config=configs/hornet.py` | 8 GPUs | | 82.84 |
| hornet-tiny-gf_3rdparty_in1k | `--config=configs/hornet.py:NAME` | 8 GPUs | | 82.98 |
| hornet-small_3rdparty_in1k | | 8 GPUs | | 83.79 |
| hornet-small-gf_3rdparty_in1k | | 8 GPUs | | 83.98 |
| hornet-base_3rdparty_in1k | | 8 GPUs | | 84.24 |
| hornet-base-gf_3rdparty_in1k | | 8 GPUs | | 84.32 |
"""

from __future__ import annotations

from functools import partial

from ml_collections import ConfigDict

from jaxpretrain.config import pick
from jaxpretrain.supervised_recipes import LINEAR_INIT, from_scratch


def hornet(arch: str, width: int, drop_path_rate: float, clip: float, per_gpu: int = 64) -> ConfigDict:
    scale = dict(type="Constant", layer=["LayerScale"], val=1e-6)
    return from_scratch(
        dict(type="HorNet", arch=arch, drop_path_rate=drop_path_rate),
        width,
        lr=4e-3,
        gpus=8,
        per_gpu=per_gpu,
        clip=clip,
        averaged=4e-5,
        head=dict(init_cfg=None),
        model=dict(init_cfg=[*LINEAR_INIT, scale]),
    )


RECIPES = {
    "hornet-tiny_3rdparty_in1k": partial(hornet, "tiny", 512, 0.2, 100.0, 128),
    "hornet-tiny-gf_3rdparty_in1k": partial(hornet, "tiny-gf", 512, 0.2, 1.0, 128),
    "hornet-small_3rdparty_in1k": partial(hornet, "small", 768, 0.4, 5.0),
    "hornet-small-gf_3rdparty_in1k": partial(hornet, "small-gf", 768, 0.4, 1.0),
    "hornet-base_3rdparty_in1k": partial(hornet, "base", 1024, 0.5, 5.0),
    "hornet-base-gf_3rdparty_in1k": partial(hornet, "base-gf", 1024, 0.5, 1.0),
}


def get_config(name: str | None = None) -> ConfigDict:
    return pick(RECIPES, name)
