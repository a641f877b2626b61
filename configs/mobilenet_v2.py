"""MobileNetV2: Inverted Residuals and Linear Bottlenecks (Sandler et al., 2018), trained with labels.

This has not been run by us; published by MMPretrain: top-1 on ImageNet-1k.

| recipe | command | hardware | wall time | metric |
|---|---|---|---|---|
| mobilenet-v2_8xb32_in1k | `--config=configs/mobilenet_v2.py` | 8 GPUs | | 71.86 |

`8xb32` means 8 GPUs with 32 images each, normalised apart: BatchNorm in 8 groups, on any number of devices.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from jaxpretrain.config import pick
from jaxpretrain.supervised_recipes import classic, plain_crops


def mobilenet_v2() -> ConfigDict:
    """300 epochs of SGD, whose rate falls by 2 % after each."""
    return classic(
        dict(type="MobileNetV2", widen_factor=1.0, norm_cfg=dict(type="BN", groups=8)),
        1280,
        epochs=300,
        optimizer=dict(lr=0.045, weight_decay=4e-5),
        schedule=[dict(type="StepLR", by_epoch=True, step_size=1, gamma=0.98)],
        data=plain_crops(backend="pillow"),
    )


RECIPES = {"mobilenet-v2_8xb32_in1k": mobilenet_v2}


def get_config(name: str | None = None) -> ConfigDict:
    return pick(RECIPES, name)
