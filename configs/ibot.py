"""iBOT: Image BERT Pre-Training with Online Tokenizer (Zhou et al., 2022).

Measured here: `digits`, on 2 CPU cores. The others have not been run by us; published by the authors: kNN / linear probe on
ImageNet-1k. ViT-S is the command of the release's README; ViT-B and ViT-L follow the paper's appendix and the args.txt beside the
released weights, which is not in the release's repository: compare before a long run.

| recipe | command | hardware | wall time | metric |
|---|---|---|---|---|
| digits | `--config=configs/ibot.py:digits` | 2 CPU cores | 5.8 CPU min | probe 86.2, trained 91.2; kNN 71.7, 74.1 |
| ibot_vit-small-p16_16xb64-amp-coslr-800e_in1k | `--config=configs/ibot.py` | 16 GPUs | | 75.2 / 77.9 |
| ibot_vit-base-p16_32xb32-amp-coslr-400e_in1k | `--config=configs/ibot.py:NAME` | 32 GPUs | | 77.1 / 79.5 |
| ibot_vit-large-p16_64xb16-amp-coslr-250e_in1k | | 64 GPUs | | 78.0 / 81.0 |
"""

from __future__ import annotations

from functools import partial
from typing import Any

from ml_collections import ConfigDict

from jaxpretrain.config import pick
from jaxpretrain.recipes import (
    KINDS_NO_DECAY,
    TINY_VIT,
    imagenet,
    imagenet_steps,
    multi_crop,
    recipe,
    tiny_multi_crop,
    warmup_cosine,
)


def method(
    backbone: dict, width: int, prototypes: int, neck: dict[str, Any], head: dict[str, Any], **more: Any
) -> dict:
    """One head for class tokens and patches."""
    return dict(
        type="IBOT",
        backbone=dict(type="IBOTViT", **backbone),
        neck=dict(type="IBOTNeck", in_channels=width, out_channels=prototypes, shared_head=True, **neck),
        head=dict(type="IBOTHead", out_channels=prototypes, **head),
        **more,
    )


def pretrain(
    arch: str,
    width: int,
    epochs: int,
    *,
    lr: float = 2e-3,
    min_lr: float = 1e-6,
    norm_last_layer: bool = True,
    drop_path_rate: float = 0.1,
    warmup_epochs: int = 50,
    frozen_epochs: int = 3,
    clip: float = 0.3,
) -> ConfigDict:
    """A batch of 1,024; `warmup_epochs` are those of the teacher's temperatures, `lr` is what the rule of 256 gives."""
    batch_size = 1024
    decay = dict(type="CosineAnnealingWeightDecay", eta_min=0.4, by_epoch=True, begin=0, end=epochs)
    return recipe(
        method=method(
            dict(arch=arch, img_size=224, patch_size=16, drop_path_rate=drop_path_rate),
            width,
            8192,
            dict(norm_last_layer=norm_last_layer),
            dict(
                teacher_temp=0.07,
                teacher_patch_temp=0.07,
                warmup_teacher_temp_epochs=warmup_epochs,
            ),
            base_momentum=0.004,
            pred_ratio=(0.0, 0.3),
            pred_ratio_var=(0.0, 0.2),
            pred_shape="block",
        ),
        data=imagenet(*multi_crop((0.25, 1.0), (0.05, 0.25), 10)),
        batch_size=batch_size,
        max_epochs=epochs,
        optim_wrapper=dict(
            optimizer=dict(type="AdamW", lr=lr, weight_decay=0.04),
            paramwise_cfg=dict(
                KINDS_NO_DECAY, custom_keys={"last_layer": dict(begin=imagenet_steps(frozen_epochs, batch_size))}
            ),
            clip_grad=dict(max_norm=clip),
        ),
        param_scheduler=[*warmup_cosine(epochs, 10, 1e-9, eta_min=min_lr), dict(decay, convert_to_iter_based=True)],
        auto_scale_lr=dict(base_batch_size=batch_size),
        dtype="bfloat16",
        evaluators=dict(attention=dict(type="AttentionMaps")),
        evaluation=dict(interval=20),
    )


def tiny() -> ConfigDict:
    """A small ViT on real handwritten digits, with 512 prototypes, and BatchNorm in the projector (see configs/dino.py)."""
    sharp = dict.fromkeys(
        ("warmup_teacher_temp", "teacher_temp", "warmup_teacher_patch_temp", "teacher_patch_temp"), 0.03
    )
    projector = dict(hidden_channels=128, bottleneck_channels=64, use_bn=True)
    return tiny_multi_crop(method(TINY_VIT, 64, 512, projector, sharp, base_momentum=0.03))


RECIPES = {
    "ibot_vit-small-p16_16xb64-amp-coslr-800e_in1k": partial(
        pretrain,
        "deit-small",
        384,
        800,
        norm_last_layer=False,
        warmup_epochs=30,
        frozen_epochs=1,
        clip=3.0,
    ),
    "ibot_vit-base-p16_32xb32-amp-coslr-400e_in1k": partial(pretrain, "base", 768, 400, lr=3e-3, min_lr=2e-6),
    "ibot_vit-large-p16_64xb16-amp-coslr-250e_in1k": partial(
        pretrain, "large", 1024, 250, lr=3e-3, min_lr=2e-6, drop_path_rate=0.4
    ),
    "digits": tiny,
}


def get_config(name: str | None = None) -> ConfigDict:
    return pick(RECIPES, name)
