"""Inception v3: Rethinking the Inception Architecture for Computer Vision (Szegedy et al., 2016), trained with labels.

It has not been run by us; published by MMPretrain: top-1 on ImageNet-1k, of torchvision's weights.

| recipe | command | hardware | wall time | metric |
|---|---|---|---|---|
| inception-v3_3rdparty_8xb32_in1k | `--config=configs/inception_v3.py` | 8 GPUs | | 77.57 |

BatchNorm is over the whole batch here; MMPretrain's is over each GPU's 32 images.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from jaxpretrain.config import pick
from jaxpretrain.supervised_recipes import classic, cosine_schedule, plain_crops


def inception() -> ConfigDict:
    return classic(
        dict(type="InceptionV3", num_classes=1000, aux_logits=False),
        None,
        schedule=cosine_schedule(100),
        data=plain_crops(299, 342),
    )


RECIPES = {"inception-v3_3rdparty_8xb32_in1k": inception}


def get_config(name: str | None = None) -> ConfigDict:
    return pick(RECIPES, name)
