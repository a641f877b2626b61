"""EfficientFormer: Vision Transformers at MobileNet Speed (Li et al., 2022), trained with labels.

These have not been run by us; published by MMPretrain: top-1 on ImageNet-1k, of weights from the paper's own training, with a
teacher. These recipes have none, and so not the head that learns from it; MMPretrain's have the head and cannot train.

| recipe | command | hardware | wall time | metric |
|---|---|---|---|---|
| efficientformer-l1_3rdparty_8xb128_in1k | `--config=configs/efficientformer.py` | 8 GPUs | | 80.46 |
| efficientformer-l3_3rdparty_8xb128_in1k | `--config=configs/efficientformer.py:NAME` | 8 GPUs | | 82.45 |
| efficientformer-l7_3rdparty_8xb128_in1k | | 8 GPUs | | 83.40 |
"""

from __future__ import annotations

from functools import partial

from ml_collections import ConfigDict

from jaxpretrain.config import pick
from jaxpretrain.supervised_recipes import CROSS_ENTROPY, from_scratch, resized

INIT = [
    dict(type="TruncNormal", layer=["Conv2d", "Linear"], std=0.02, bias=0.0),
    dict(type="Constant", layer=["GroupNorm"], val=1.0, bias=0.0),
    dict(type="Constant", layer=["LayerScale"], val=1e-5),
]


def efficientformer(arch: str, width: int) -> ConfigDict:
    """BatchNorm is over the whole batch here; MMPretrain's is over each GPU's 128 images."""
    return from_scratch(
        dict(type="EfficientFormer", arch=arch, drop_path_rate=0.0, init_cfg=INIT),
        width,
        lr=1e-3,
        gpus=8,
        per_gpu=128,
        loss=CROSS_ENTROPY,
        mixed=False,
        head=dict(type="EfficientFormerClsHead", distillation=False),
        model=dict(neck=dict(type="GlobalAveragePooling", dim=1)),
        data=resized(248),
    )


RECIPES = {
    "efficientformer-l1_3rdparty_8xb128_in1k": partial(efficientformer, "l1", 448),
    "efficientformer-l3_3rdparty_8xb128_in1k": partial(efficientformer, "l3", 512),
    "efficientformer-l7_3rdparty_8xb128_in1k": partial(efficientformer, "l7", 768),
}


def get_config(name: str | None = None) -> ConfigDict:
    return pick(RECIPES, name)
