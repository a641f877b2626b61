"""Swin Transformer V2: Scaling Up Capacity and Resolution (Liu et al., 2022), with labels.

These have not been run by us; published by MMPretrain: top-1 on ImageNet-1k, of weights from the paper's own training.

| recipe | command | hardware | wall time | metric |
|---|---|---|---|---|
| swinv2-tiny-w8_3rdparty_in1k-256px | `--config=configs/swin_transformer_v2.py` | 16 GPUs | | 81.76 |
| swinv2-tiny-w16_3rdparty_in1k-256px | `--config=configs/swin_transformer_v2.py:NAME` | 16 GPUs | | 82.81 |
| swinv2-small-w8_3rdparty_in1k-256px | | 16 GPUs | | 83.74 |
| swinv2-small-w16_3rdparty_in1k-256px | | 16 GPUs | | 84.13 |
| swinv2-base-w8_3rdparty_in1k-256px | | 16 GPUs | | 84.20 |
| swinv2-base-w16_3rdparty_in1k-256px | | 16 GPUs | | 84.60 |
| swinv2-base-w16_in21k-pre_3rdparty_in1k-256px | | 16 GPUs | | 86.17 |
| swinv2-base-w24_in21k-pre_3rdparty_in1k-384px | | 16 GPUs | | 87.14 |
| swinv2-large-w16_in21k-pre_3rdparty_in1k-256px | | 16 GPUs | | 86.93 |
| swinv2-large-w24_in21k-pre_3rdparty_in1k-384px | | 16 GPUs | | 87.59 |
"""

from __future__ import annotations

from functools import partial

from ml_collections import ConfigDict

from jaxpretrain.config import pick
from jaxpretrain.followers import strong_augmentation
from jaxpretrain.supervised_recipes import CROSS_ENTROPY, LINEAR_INIT, from_scratch, larger_images

WIDTHS = dict(tiny=768, small=768, base=1024, large=1536)
DROP_PATHS = dict(tiny=0.2, small=0.3, base=0.5)


def swin(arch: str, window: int, pretrained: bool = False) -> ConfigDict:
    """In windows of `window` patches, half as wide in the last stage but for 8; at 384 pixels if there are 24, else at 256.

    `pretrained`: for weights of ImageNet-21k in windows of 12; the large one is then without mixed images and smoothed labels,
    as is, but for these, all at 384 pixels.
    """
    size = 384 if window == 24 else 256
    windows = {} if window == 8 else dict(window_size=[window, window, window, window // 2])
    if pretrained:
        windows |= dict(pretrained_window_sizes=[12, 12, 12, 6])
    large = arch == "large"
    mixed = not large and size == 256
    return from_scratch(
        dict(
            type="SwinTransformerV2",
            arch=arch,
            img_size=size,
            drop_path_rate=0.2 if pretrained else DROP_PATHS[arch],
            **windows,
        ),
        WIDTHS[arch],
        lr=1e-3,
        gpus=16,
        per_gpu=64,
        loss=CROSS_ENTROPY if large else None,
        mixed=mixed,
        head={} if large else dict(init_cfg=None),
        model=dict(neck=dict(type="GlobalAveragePooling"), **(dict(init_cfg=LINEAR_INIT) if mixed else {})),
        data=strong_augmentation(256) if size == 256 else larger_images(384),
    )


RECIPES = {
    **{
        f"swinv2-{arch}-w{window}_3rdparty_in1k-256px": partial(swin, arch, window)
        for arch in DROP_PATHS
        for window in (8, 16)
    },
    **{
        f"swinv2-{arch}-w{window}_in21k-pre_3rdparty_in1k-{size}px": partial(swin, arch, window, True)
        for arch in ("base", "large")
        for window, size in ((16, 256), (24, 384))
    },
}


def get_config(name: str | None = None) -> ConfigDict:
    return pick(RECIPES, name)
