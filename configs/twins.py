"""Twins: Revisiting the Design of Spatial Attention in Vision Transformers (Chu et al., 2021), with labels.

These have not been run by us; published by MMPretrain: top-1 on ImageNet-1k, of weights from the paper's own training.

| recipe | command | hardware | wall time | metric |
|---|---|---|---|---|
| twins-pcpvt-small_3rdparty_8xb128_in1k | `--config=configs/twins.py` | 8 GPUs | | 81.14 |
| twins-pcpvt-base_3rdparty_8xb128_in1k | `--config=configs/twins.py:NAME` | 8 GPUs | | 82.66 |
| twins-pcpvt-large_3rdparty_16xb64_in1k | | 16 GPUs | | 83.09 |
| twins-svt-small_3rdparty_8xb128_in1k | | 8 GPUs | | 81.77 |
| twins-svt-base_8xb128_3rdparty_in1k | | 8 GPUs | | 83.13 |
| twins-svt-large_3rdparty_16xb64_in1k | | 16 GPUs | | 83.60 |
"""

from __future__ import annotations

from functools import partial

from ml_collections import ConfigDict

from jaxpretrain.config import pick
from jaxpretrain.supervised_recipes import LINEAR_INIT, from_scratch


def twins(kind: str, arch: str, width: int = 512) -> ConfigDict:
    """`kind`: PCPVT, with Pyramid ViT's attention, or SVT, in windows and over a summary of each."""
    large = arch == "large"
    return from_scratch(
        dict(
            type=kind,
            arch=arch,
            out_indices=(3,),
            qkv_bias=True,
            norm_cfg=dict(type="LN", eps=1e-6) if kind == "PCPVT" else dict(type="LN"),
            norm_after_stage=[False, False, False, True],
            drop_path_rate=0.3,
        ),
        width,
        lr=1e-3,
        gpus=16 if large else 8,
        per_gpu=64 if large else 128,
        warmup=5,
        clip=5.0,
        model=dict(neck=dict(type="GlobalAveragePooling"), init_cfg=LINEAR_INIT),
    )


RECIPES = {
    "twins-pcpvt-small_3rdparty_8xb128_in1k": partial(twins, "PCPVT", "small"),
    "twins-pcpvt-base_3rdparty_8xb128_in1k": partial(twins, "PCPVT", "base"),
    "twins-pcpvt-large_3rdparty_16xb64_in1k": partial(twins, "PCPVT", "large"),
    "twins-svt-small_3rdparty_8xb128_in1k": partial(twins, "SVT", "small"),
    "twins-svt-base_8xb128_3rdparty_in1k": partial(twins, "SVT", "base", 768),
    "twins-svt-large_3rdparty_16xb64_in1k": partial(twins, "SVT", "large", 1024),
}


def get_config(name: str | None = None) -> ConfigDict:
    return pick(RECIPES, name)
