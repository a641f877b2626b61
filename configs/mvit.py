"""MViTv2: Improved Multiscale Vision Transformers for Classification and Detection (Li et al., 2022), with labels.

These have not been run by us; published by MMPretrain: top-1 on ImageNet-1k, of weights from the paper's own training.

| recipe | command | hardware | wall time | metric |
|---|---|---|---|---|
| mvitv2-tiny_3rdparty_in1k | `--config=configs/mvit.py` | 8 GPUs | | 82.33 |
| mvitv2-small_3rdparty_in1k | `--config=configs/mvit.py:NAME` | 8 GPUs | | 83.63 |
| mvitv2-base_3rdparty_in1k | | 8 GPUs | | 84.34 |
| mvitv2-large_3rdparty_in1k | | 8 GPUs | | 85.25 |
"""

from __future__ import annotations

from functools import partial

from ml_collections import ConfigDict

from jaxpretrain.config import pick
from jaxpretrain.recipes import KINDS_NO_DECAY, NO_DECAY, SWIN_NO_DECAY
from jaxpretrain.supervised_recipes import LINEAR_INIT, from_scratch, undecayed

POSITIONS = ("/pos_embed", "/rel_pos_h", "/rel_pos_w")


def mvit(arch: str, drop_path_rate: float = 0.1, width: int = 768, **settings: object) -> ConfigDict:
    """The rate is for a batch of 2,048 images, after a warm-up of 70 epochs."""
    backbone = dict(dim_mul_in_attention=False) if arch == "large" else {}
    defaults = dict(weight_decay=0.3, no_decay=undecayed("/cls_token", *POSITIONS))
    return from_scratch(
        dict(type="MViT", arch=arch, drop_path_rate=drop_path_rate, **backbone),
        width,
        lr=2.5e-4,
        gpus=8,
        per_gpu=256,
        warmup=70,
        clip=1.0,
        model=dict(neck=dict(type="GlobalAveragePooling"), init_cfg=LINEAR_INIT),
        auto_scale_lr=dict(base_batch_size=2048),
        **defaults | settings,
    )


RECIPES = {
    "mvitv2-tiny_3rdparty_in1k": partial(mvit, "tiny"),
    "mvitv2-small_3rdparty_in1k": partial(mvit, "small"),
    "mvitv2-base_3rdparty_in1k": partial(
        mvit,
        "base",
        0.3,
        weight_decay=0.05,
        no_decay=KINDS_NO_DECAY | dict(custom_keys=SWIN_NO_DECAY | dict.fromkeys(POSITIONS, NO_DECAY)),
    ),
    "mvitv2-large_3rdparty_in1k": partial(mvit, "large", 0.5, 1152),
}


def get_config(name: str | None = None) -> ConfigDict:
    return pick(RECIPES, name)
