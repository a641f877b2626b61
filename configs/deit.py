"""DeiT: Training data-efficient image transformers & distillation through attention (Touvron et al., 2021), with labels.

These have not been run by us; published by MMPretrain: top-1 on ImageNet-1k, of weights that it trained so or, where their
name has `3rdparty`, of the paper's own training. That of `distilled` ones had a teacher; the recipes have none, as MMPretrain's.

| recipe | command | hardware | wall time | metric |
|---|---|---|---|---|
| deit-tiny_4xb256_in1k | `--config=configs/deit.py` | 4 GPUs | | 74.50 |
| deit-small_4xb256_in1k | `--config=configs/deit.py:NAME` | 4 GPUs | | 80.69 |
| deit-base_16xb64_in1k | | 16 GPUs | | 81.76 |
| deit-base_3rdparty_in1k | | 16 GPUs | | 81.79 |
| deit-tiny-distilled_3rdparty_in1k | | 4 GPUs | | 74.51 |
| deit-small-distilled_3rdparty_in1k | | 4 GPUs | | 81.17 |
| deit-base-distilled_3rdparty_in1k | | 16 GPUs | | 83.33 |
| deit-base_224px-pre_3rdparty_in1k-384px | | 16 GPUs | | 83.04 |
| deit-base-distilled_224px-pre_3rdparty_in1k-384px | | 16 GPUs | | 85.55 |
"""

from __future__ import annotations

from functools import partial

from ml_collections import ConfigDict

from jaxpretrain.config import pick
from jaxpretrain.recipes import KINDS_NO_DECAY, SWIN_NO_DECAY, warmup_cosine
from jaxpretrain.supervised_recipes import TOKENS_NO_DECAY, VIT_INIT, from_scratch

WIDTHS = dict(tiny=192, small=384, base=768)
NO_DECAY = KINDS_NO_DECAY | dict(custom_keys=SWIN_NO_DECAY | TOKENS_NO_DECAY["custom_keys"])


def network(arch: str, size: int, distilled: bool) -> tuple[dict, dict]:
    """(backbone, head): ViT, or one with a second token and a head for each."""
    kinds = (
        ("DistilledVisionTransformer", "DeiTClsHead")
        if distilled
        else ("VisionTransformer", "VisionTransformerClsHead")
    )
    return dict(type=kinds[0], arch=f"deit-{arch}", img_size=size, patch_size=16), dict(type=kinds[1])


def deit(arch: str, distilled: bool = False) -> ConfigDict:
    """Stochastic depth and averaged weights for the base model alone, if it is not distilled."""
    backbone, head = network(arch, 224, distilled)
    regularised = arch == "base" and not distilled
    return from_scratch(
        backbone | (dict(drop_path_rate=0.1) if regularised else {}),
        WIDTHS[arch],
        lr=1e-3,
        gpus=16 if arch == "base" else 4,
        per_gpu=64 if arch == "base" else 256,
        clip=5.0,
        averaged=4e-5 if regularised else None,
        no_decay=NO_DECAY,
        head=head,
        model=dict(init_cfg=VIT_INIT),
    )


def deit_384(distilled: bool = False) -> ConfigDict:
    """The base model at 384 pixels, without mixed images."""
    backbone, head = network("base", 384, distilled)
    return from_scratch(
        backbone,
        768,
        lr=3e-3,
        gpus=16,
        per_gpu=32,
        size=384,
        weight_decay=0.3,
        clip=1.0,
        mixed=False,
        no_decay=TOKENS_NO_DECAY,
        head=head,
        param_scheduler=warmup_cosine(300, 30, by_iter=False),
        auto_scale_lr=dict(base_batch_size=512),
    )


RECIPES = {
    "deit-tiny_4xb256_in1k": partial(deit, "tiny"),
    "deit-small_4xb256_in1k": partial(deit, "small"),
    "deit-base_16xb64_in1k": partial(deit, "base"),
    "deit-base_3rdparty_in1k": partial(deit, "base"),
    **{f"deit-{arch}-distilled_3rdparty_in1k": partial(deit, arch, True) for arch in WIDTHS},
    "deit-base_224px-pre_3rdparty_in1k-384px": deit_384,
    "deit-base-distilled_224px-pre_3rdparty_in1k-384px": partial(deit_384, True),
}


def get_config(name: str | None = None) -> ConfigDict:
    return pick(RECIPES, name)
