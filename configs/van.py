"""VAN: Visual Attention Network (Guo et al., 2023), with labels.

These have not been run by us; published by MMPretrain: top-1 on ImageNet-1k, of weights from the paper's own training.

| recipe | command | hardware | wall time | metric |
|---|---|---|---|---|
| van-tiny_3rdparty_in1k | `--config=configs/van.py` | 8 GPUs | | 75.41 |
| van-small_3rdparty_in1k | `--config=configs/van.py:NAME` | 8 GPUs | | 81.01 |
| van-base_3rdparty_in1k | | 8 GPUs | | 82.8 |
| van-large_3rdparty_in1k | | 8 GPUs | | 83.86 |
"""

from __future__ import annotations

from functools import partial

from ml_collections import ConfigDict

from jaxpretrain.config import pick
from jaxpretrain.followers import CENTRED, jittered
from jaxpretrain.supervised_recipes import LINEAR_INIT, from_scratch, resized


def van(arch: str, width: int = 512, drop_path_rate: float = 0.1, mixed: bool = True) -> ConfigDict:
    """`mixed`: with mixed images, and kernels of linear layers from a narrow normal distribution.

    BatchNorm is over the whole batch here; MMPretrain's is over each GPU's 128 images.
    """
    data = resized(248, fill=(127.5,) * 3, fill_std=(127.5,) * 3, pad=(128, 128, 128))
    return from_scratch(
        dict(type="VAN", arch=arch, drop_path_rate=drop_path_rate),
        width,
        lr=1e-3,
        gpus=8,
        per_gpu=128,
        clip=5.0,
        mixed=mixed,
        head=dict(init_cfg=None),
        model=dict(neck=dict(type="GlobalAveragePooling")) | (dict(init_cfg=LINEAR_INIT) if mixed else {}),
        data=jittered(data),
        data_preprocessor=CENTRED,
    )


RECIPES = {
    "van-tiny_3rdparty_in1k": partial(van, "tiny", 256),
    "van-small_3rdparty_in1k": partial(van, "small"),
    "van-base_3rdparty_in1k": partial(van, "base", mixed=False),
    "van-large_3rdparty_in1k": partial(van, "large", drop_path_rate=0.2, mixed=False),
}


def get_config(name: str | None = None) -> ConfigDict:
    return pick(RECIPES, name)
