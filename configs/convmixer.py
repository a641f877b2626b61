"""ConvMixer: Patches Are All You Need? (Trockman & Kolter, 2022), with labels.

These have not been run by us; published by MMPretrain: top-1 on ImageNet-1k, of weights from the paper's own training.

| recipe | command | hardware | wall time | metric |
|---|---|---|---|---|
| convmixer-768-32_3rdparty_in1k | `--config=configs/convmixer.py` | 10 GPUs | | 80.16 |
| convmixer-1024-20_3rdparty_in1k | `--config=configs/convmixer.py:NAME` | 10 GPUs | | 76.94 |
| convmixer-1536-20_3rdparty_in1k | | 10 GPUs | | 81.37 |
"""

from __future__ import annotations

from functools import partial

from ml_collections import ConfigDict

from jaxpretrain.config import pick
from jaxpretrain.supervised_recipes import CROSS_ENTROPY, from_scratch, resized


def convmixer(arch: str, epochs: int = 150, **backbone: object) -> ConfigDict:
    return from_scratch(
        dict(type="ConvMixer", arch=arch, norm_cfg=dict(type="BN", groups=10), **backbone),
        int(arch.split("/")[0]),
        lr=0.01,
        gpus=10,
        per_gpu=64,
        epochs=epochs,
        clip=5.0,
        loss=CROSS_ENTROPY,
        mixed=False,
        model=dict(neck=dict(type="GlobalAveragePooling")),
        data=resized(233),
        auto_scale_lr=dict(base_batch_size=640),
    )


RECIPES = {
    "convmixer-768-32_3rdparty_in1k": partial(convmixer, "768/32", 300, act_cfg=dict(type="ReLU")),
    "convmixer-1024-20_3rdparty_in1k": partial(convmixer, "1024/20"),
    "convmixer-1536-20_3rdparty_in1k": partial(convmixer, "1536/20"),
}


def get_config(name: str | None = None) -> ConfigDict:
    return pick(RECIPES, name)
