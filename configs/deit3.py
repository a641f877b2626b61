"""DeiT III: Revenge of the ViT (Touvron et al., 2022), with labels.

These have not been run by us; published by MMPretrain: top-1 on ImageNet-1k, of weights from the paper's own training, which
was another.

| recipe | command | hardware | wall time | metric |
|---|---|---|---|---|
| deit3-small-p16_3rdparty_in1k | `--config=configs/deit3.py` | 64 GPUs | | 81.35 |
| deit3-small-p16_3rdparty_in1k-384px | `--config=configs/deit3.py:NAME` | 64 GPUs | | 83.43 |
| deit3-medium-p16_3rdparty_in1k | | 64 GPUs | | 82.99 |
| deit3-base-p16_3rdparty_in1k | | 64 GPUs | | 83.80 |
| deit3-base-p16_3rdparty_in1k-384px | | 64 GPUs | | 85.08 |
| deit3-large-p16_3rdparty_in1k | | 64 GPUs | | 84.87 |
| deit3-large-p16_3rdparty_in1k-384px | | 64 GPUs | | 85.82 |
| deit3-huge-p14_3rdparty_in1k | | 64 GPUs | | 85.21 |
"""

from __future__ import annotations

from functools import partial

from ml_collections import ConfigDict

from jaxpretrain.config import pick
from jaxpretrain.recipes import warmup_cosine
from jaxpretrain.supervised_recipes import PILLOW, TOKENS_NO_DECAY, VIT_INIT, from_scratch, plain_crops, resized

WIDTHS = dict(small=384, medium=512, base=768, large=1024, huge=1280)


def deit3(arch: str, drop_path_rate: float, per_gpu: int = 64, size: int = 224, patch_size: int = 16) -> ConfigDict:
    data = resized(224) if size == 224 else plain_crops(size, size, **PILLOW)
    return from_scratch(
        dict(type="DeiT3", arch=arch[0], img_size=size, patch_size=patch_size, drop_path_rate=drop_path_rate),
        WIDTHS[arch],
        lr=1e-5,
        gpus=64,
        per_gpu=per_gpu,
        weight_decay=0.1,
        no_decay=TOKENS_NO_DECAY,
        head=dict(type="VisionTransformerClsHead"),
        model=dict(init_cfg=VIT_INIT),
        data=data,
        param_scheduler=warmup_cosine(300, 30, by_iter=False),
        auto_scale_lr=dict(base_batch_size=64 * per_gpu),
    )


# Those whose name has `in21k` start from weights that were trained with labels of ImageNet-21k; the recipe is the same.
RECIPES = {
    f"deit3-{name}_{weights}3rdparty_in1k{pixels}": make
    for weights in ("", "in21k-pre_")
    for name, pixels, make in (
        ("small-p16", "", partial(deit3, "small", 0.05)),
        ("small-p16", "-384px", partial(deit3, "small", 0.0, 64, 384)),
        ("medium-p16", "", partial(deit3, "medium", 0.2)),
        ("base-p16", "", partial(deit3, "base", 0.2)),
        ("base-p16", "-384px", partial(deit3, "base", 0.15, 32, 384)),
        ("large-p16", "", partial(deit3, "large", 0.45)),
        ("large-p16", "-384px", partial(deit3, "large", 0.4, 16, 384)),
        ("huge-p14", "", partial(deit3, "huge", 0.55, 32, patch_size=14)),
    )
}


def get_config(name: str | None = None) -> ConfigDict:
    return pick(RECIPES, name)
