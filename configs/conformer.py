"""Conformer: Local Features Coupling Global Representations for Visual Recognition (Peng et al., 2021), with labels.

These have not been run by us; published by MMPretrain: top-1 on ImageNet-1k, but for the last of weights from the paper's
own training.

| recipe | command | hardware | wall time | metric |
|---|---|---|---|---|
| conformer-tiny-p16_3rdparty_in1k | `--config=configs/conformer.py` | 8 GPUs | | 81.31 |
| conformer-small-p16_3rdparty_in1k | `--config=configs/conformer.py:NAME` | 8 GPUs | | 83.32 |
| conformer-base-p16_3rdparty_in1k | | 8 GPUs | | 83.82 |
| conformer-small-p32_8xb128_in1k | | 8 GPUs | | 81.96 |
"""

from __future__ import annotations

from functools import partial

from ml_collections import ConfigDict

from jaxpretrain.config import pick
from jaxpretrain.supervised_recipes import LINEAR_INIT, from_scratch, undecayed


def conformer(arch: str, convolution_width: int, width: int = 384, patch_size: int = 16) -> ConfigDict:
    """Two classifiers, of `convolution_width` and `width` channels. BatchNorm rests, as the backbone has it by default."""
    return from_scratch(
        dict(type="Conformer", arch=arch, patch_size=patch_size, drop_path_rate=0.1),
        width,
        lr=1e-3,
        gpus=8,
        per_gpu=128,
        warmup=5,
        no_decay=undecayed("/cls_token"),
        head=dict(type="ConformerHead", in_channels=[convolution_width, width], init_cfg=None),
        model=dict(init_cfg=LINEAR_INIT),
    )


RECIPES = {
    "conformer-tiny-p16_3rdparty_in1k": partial(conformer, "tiny", 256),
    "conformer-small-p16_3rdparty_in1k": partial(conformer, "small", 1024),
    "conformer-base-p16_3rdparty_in1k": partial(conformer, "base", 1536, 576),
    "conformer-small-p32_8xb128_in1k": partial(conformer, "small", 1024, patch_size=32),
}


def get_config(name: str | None = None) -> ConfigDict:
    return pick(RECIPES, name)
