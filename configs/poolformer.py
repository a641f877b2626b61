"""PoolFormer: MetaFormer is Actually What You Need for Vision (Yu et al., 2022), with labels.

These have not been run by us; published by MMPretrain: top-1 on ImageNet-1k, of weights from the paper's own training.

| recipe | command | hardware | wall time | metric |
|---|---|---|---|---|
| poolformer-s12_3rdparty_32xb128_in1k | `--config=configs/poolformer.py` | 32 GPUs | | 77.24 |
| poolformer-s24_3rdparty_32xb128_in1k | `--config=configs/poolformer.py:NAME` | 32 GPUs | | 80.33 |
| poolformer-s36_3rdparty_32xb128_in1k | | 32 GPUs | | 81.43 |
| poolformer-m36_3rdparty_32xb128_in1k | | 32 GPUs | | 82.14 |
| poolformer-m48_3rdparty_32xb128_in1k | | 32 GPUs | | 82.51 |
"""

from __future__ import annotations

from functools import partial

from ml_collections import ConfigDict

from jaxpretrain.config import pick
from jaxpretrain.supervised_recipes import CROSS_ENTROPY, POOLFORMER_INIT, from_scratch, resized


def poolformer(arch: str) -> ConfigDict:
    """Images are not mixed, and labels not smoothed."""
    small = arch.startswith("s")
    return from_scratch(
        dict(type="PoolFormer", arch=arch, drop_path_rate=0.1, init_cfg=POOLFORMER_INIT),
        512 if small else 768,
        lr=4e-3,
        gpus=32,
        per_gpu=128,
        clip=5.0,
        loss=CROSS_ENTROPY,
        mixed=False,
        model=dict(neck=dict(type="GlobalAveragePooling")),
        data=resized(248 if small else 236),
        auto_scale_lr=dict(base_batch_size=4096),
    )


RECIPES = {
    f"poolformer-{arch}_3rdparty_32xb128_in1k": partial(poolformer, arch)
    for arch in ("s12", "s24", "s36", "m36", "m48")
}


def get_config(name: str | None = None) -> ConfigDict:
    return pick(RECIPES, name)
