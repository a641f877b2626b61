"""RevViT: Reversible Vision Transformers (Mangalam et al., 2022), with labels.

These have not been run by us; published by MMPretrain: top-1 on ImageNet-1k, of weights from the paper's own training.

| recipe | command | hardware | wall time | metric |
|---|---|---|---|---|
| revvit-small_3rdparty_in1k | `--config=configs/revvit.py` | 8 GPUs | | 79.87 |
| revvit-base_3rdparty_in1k | `--config=configs/revvit.py:NAME` | 8 GPUs | | 81.81 |
"""

from __future__ import annotations

from functools import partial

from ml_collections import ConfigDict

from jaxpretrain.config import pick
from jaxpretrain.followers import jittered, strong_augmentation
from jaxpretrain.recipes import warmup_cosine
from jaxpretrain.supervised_recipes import VIT_INIT, from_scratch, undecayed


def revvit(arch: str, width: int) -> ConfigDict:
    return from_scratch(
        dict(type="RevVisionTransformer", arch=arch, img_size=224, patch_size=16, out_type="avg_featmap"),
        2 * width,
        lr=2e-3,
        gpus=8,
        per_gpu=256,
        clip=1.0,
        no_decay=undecayed("/cls_token", "/pos_embed"),
        model=dict(init_cfg=VIT_INIT),
        data=jittered(strong_augmentation(magnitude=7)),
        param_scheduler=warmup_cosine(300, 70, 5e-6, by_iter=False, eta_min=1e-5),
    )


RECIPES = {
    "revvit-small_3rdparty_in1k": partial(revvit, "deit-small", 384),
    "revvit-base_3rdparty_in1k": partial(revvit, "deit-base", 768),
}


def get_config(name: str | None = None) -> ConfigDict:
    return pick(RECIPES, name)
