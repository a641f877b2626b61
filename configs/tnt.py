"""TNT: Transformer in Transformer (Han et al., 2021), with labels.

This has not been run by us; published by MMPretrain: top-1 on ImageNet-1k, of weights from the paper's own training, which
mixed and augmented images more.

| recipe | command | hardware | wall time | metric |
|---|---|---|---|---|
| tnt-small-p16_3rdparty_in1k | `--config=configs/tnt.py` | 16 GPUs | | 81.52 |
"""

from __future__ import annotations

from ml_collections import ConfigDict

from jaxpretrain.config import pick
from jaxpretrain.followers import CENTRED
from jaxpretrain.recipes import warmup_cosine
from jaxpretrain.supervised_recipes import VIT_INIT, from_scratch, plain_crops


def tnt() -> ConfigDict:
    """Crops and mirrors alone; all parameters decay."""
    data = plain_crops(edge=248, backend="pillow")
    data["val"]["pipeline"][0]["interpolation"] = "bicubic"
    return from_scratch(
        dict(type="TNT", arch="s", img_size=224, patch_size=16, drop_path_rate=0.1, init_cfg=VIT_INIT),
        384,
        lr=1e-3,
        gpus=16,
        per_gpu=64,
        mixed=False,
        no_decay=dict(custom_keys={}),
        head=dict(init_cfg=VIT_INIT[0]),
        data=data,
        data_preprocessor=CENTRED,
        param_scheduler=warmup_cosine(300, 5, 1e-3, by_iter=False),
    )


RECIPES = {"tnt-small-p16_3rdparty_in1k": tnt}


def get_config(name: str | None = None) -> ConfigDict:
    return pick(RECIPES, name)
