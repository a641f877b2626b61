"""Swin Transformer: Hierarchical Vision Transformer using Shifted Windows (Liu et al., 2021), with labels.

These have not been run by us; published by MMPretrain: top-1 on the data set, of weights that it trained so or, where their
name has `3rdparty`, of the paper's own training. The recipe is the same, whatever the weights have come from.

| recipe | command | hardware | wall time | metric |
|---|---|---|---|---|
| swin-tiny_16xb64_in1k | `--config=configs/swin_transformer.py` | 16 GPUs | | 81.18 |
| swin-small_16xb64_in1k | `--config=configs/swin_transformer.py:NAME` | 16 GPUs | | 83.02 |
| swin-base_16xb64_in1k | | 16 GPUs | | 83.36 |
| swin-base_3rdparty_in1k-384 | | 16 GPUs | | 84.49 |
| swin-large_in21k-pre-3rdparty_in1k | | 16 GPUs | | 86.24 |
| swin-large_in21k-pre-3rdparty_in1k-384 | | 16 GPUs | | 87.25 |
| swin-large_8xb8_cub-384px | | 8 GPUs | | 91.87 |
"""

from __future__ import annotations

from functools import partial
from typing import Any

from ml_collections import ConfigDict

from jaxpretrain.config import pick
from jaxpretrain.followers import ENCODER
from jaxpretrain.recipes import SWIN_NO_DECAY, warmup_cosine
from jaxpretrain.supervised_recipes import CROSS_ENTROPY, LINEAR_INIT, birds, from_scratch, undecayed

WIDTHS = dict(tiny=768, small=768, base=1024, large=1536)
DROP_PATHS = dict(tiny=0.2, small=0.3, base=0.5)


def swin(arch: str) -> ConfigDict:
    return from_scratch(
        dict(type="SwinTransformer", arch=arch, img_size=224, drop_path_rate=DROP_PATHS[arch]),
        WIDTHS[arch],
        lr=1e-3,
        gpus=16,
        per_gpu=64,
        clip=5.0,
        head=dict(init_cfg=None),
        model=dict(neck=dict(type="GlobalAveragePooling"), init_cfg=LINEAR_INIT),
    )


def plain(arch: str, size: int, **settings: Any) -> ConfigDict:
    """Without mixed images and smoothed labels; in windows of 12 patches at 384 pixels."""
    windows = {} if size == 224 else dict(stage_cfgs=dict(block_cfgs=dict(window_size=12)))
    defaults: dict[str, Any] = dict(lr=1e-3, gpus=16, per_gpu=64)
    return from_scratch(
        dict(type="SwinTransformer", arch=arch, img_size=size, **windows),
        WIDTHS[arch],
        size=size,
        clip=5.0,
        loss=CROSS_ENTROPY,
        mixed=False,
        model=dict(neck=dict(type="GlobalAveragePooling")),
        **defaults | settings,
    )


def cub() -> ConfigDict:
    """Birds, by an encoder that was trained on ImageNet-21k at 384 pixels: `--config.load_from.path=FILE`."""
    return plain(
        "large",
        384,
        lr=5e-6,
        gpus=8,
        per_gpu=8,
        epochs=100,
        weight_decay=5e-4,
        no_decay=undecayed(*SWIN_NO_DECAY),
        head=dict(num_classes=200),
        load_from=ENCODER,
        data=birds(384, 510),
        param_scheduler=warmup_cosine(100, 5, 0.01, by_iter=False),
        auto_scale_lr=dict(base_batch_size=64),
        evaluators=dict(accuracy=dict(type="Accuracy", topk=(1,))),
    )


RECIPES = {
    **{f"swin-{arch}_16xb64_in1k": partial(swin, arch) for arch in DROP_PATHS},
    **{f"swin-{arch}_3rdparty_in1k": partial(swin, arch) for arch in DROP_PATHS},
    "swin-base_in21k-pre-3rdparty_in1k": partial(swin, "base"),
    "swin-base_3rdparty_in1k-384": partial(plain, "base", 384),
    "swin-base_in21k-pre-3rdparty_in1k-384": partial(plain, "base", 384),
    "swin-large_in21k-pre-3rdparty_in1k": partial(plain, "large", 224),
    "swin-large_in21k-pre-3rdparty_in1k-384": partial(plain, "large", 384),
    "swin-large_8xb8_cub-384px": cub,
}


def get_config(name: str | None = None) -> ConfigDict:
    return pick(RECIPES, name)
