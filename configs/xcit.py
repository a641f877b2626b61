"""XCiT: Cross-Covariance Image Transformers (El-Nouby et al., 2021), trained with labels.

These have not been run by us; published by MMPretrain: top-1 on ImageNet-1k, of weights from the paper's own training.

| recipe | command | hardware | wall time | metric |
|---|---|---|---|---|
| xcit-nano-12-p16_3rdparty_in1k | `--config=configs/xcit.py` | 8 GPUs | | 70.35 |
| xcit-SIZE-DEPTH-pPATCH_3rdparty_in1k | `--config=configs/xcit.py:NAME` | 8 GPUs | | |
| xcit-SIZE-DEPTH-pPATCH_3rdparty-dist_in1k | | 8 GPUs | | |
| xcit-SIZE-DEPTH-pPATCH_3rdparty-dist_in1k-384px | | 8 GPUs | | |

with nano-12, tiny-12, tiny-24, small-12, small-24, medium-24, large-24 and patches of 16 or 8 pixels. Weights named `dist` come
from distillation; the recipe of that name is of plain training, as MMPretrain's.
"""

from __future__ import annotations

from functools import partial

from ml_collections import ConfigDict

from jaxpretrain.config import pick
from jaxpretrain.supervised_recipes import CROSS_ENTROPY, from_scratch

SIZES = dict(nano=(128, 4), tiny=(192, 4), small=(384, 8), medium=(512, 8), large=(768, 16))  # width, heads
KINDS = (("nano", 12), ("tiny", 12), ("tiny", 24), ("small", 12), ("small", 24), ("medium", 24), ("large", 24))


def xcit(kind: str, depth: int, patch_size: int, size: int = 224) -> ConfigDict:
    width, heads = SIZES[kind]
    return from_scratch(
        dict(
            type="XCiT",
            patch_size=patch_size,
            embed_dims=width,
            depth=depth,
            num_heads=heads,
            mlp_ratio=4,
            qkv_bias=True,
            layer_scale_init_value=1.0 if depth == 12 else 1e-5,
            tokens_norm=kind != "nano",
            out_type="cls_token",
            bn_norm_cfg=dict(type="BN", groups=8),
        ),
        width,
        lr=1e-3,
        gpus=8,
        per_gpu=128,
        size=size,
        loss=CROSS_ENTROPY,
    )


RECIPES = {
    f"xcit-{kind}-{depth}-p{patch}_{name}": partial(xcit, kind, depth, patch, size)
    for kind, depth in KINDS
    for patch in (16, 8)
    for name, size in (("3rdparty_in1k", 224), ("3rdparty-dist_in1k", 224), ("3rdparty-dist_in1k-384px", 384))
}


def get_config(name: str | None = None) -> ConfigDict:
    return pick(RECIPES, name)
