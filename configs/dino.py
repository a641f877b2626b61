"""DINO: Emerging Properties in Self-Supervised Vision Transformers (Caron et al., 2021).

Measured here: `digits`, on 2 CPU cores. The others have not been run by us; published by the authors: kNN / linear probe on
ImageNet-1k. Recipes of 100 and 300 epochs are the commands of the release's README. Those of the released weights (800 and
400 epochs) follow the args.txt beside them, which is not in the release's repository: compare before a long run.

| recipe | command | hardware | wall time | metric |
|---|---|---|---|---|
| digits | `--config=configs/dino.py:digits` | 2 CPU cores | 4.5 CPU min | probe 86.2, trained 91.6; kNN 71.7, 72.7 |
| dino_vit-small-p16_8xb64-amp-coslr-100e_in1k | `--config=configs/dino.py` | 8 GPUs | 1.75 days (theirs) | 69.3 / 74.0 |
| dino_vit-small-p16_16xb64-amp-coslr-300e_in1k | `--config=configs/dino.py:NAME` | 16 GPUs | 2.6 days (theirs) | 73.3 / 76.0 |
| dino_vit-small-p16_16xb64-coslr-800e_in1k | | 16 GPUs | | 74.5 / 77.0 |
| dino_vit-base-p16_32xb32-coslr-400e_in1k | | 32 GPUs | | 76.1 / 78.2 |
| dino_resnet50_8xb64-amp-coslr-100e_in1k | | 8 GPUs | | |
| dino_resnet50_80xb51-amp-coslr-800e_in1k | | 80 GPUs | | 67.5 / 75.3 |
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

from ml_collections import ConfigDict

from jaxpretrain.config import pick
from jaxpretrain.recipes import (
    KINDS_NO_DECAY,
    LARS_EXCLUDE,
    NO_DECAY_OR_LARS,
    TINY_VIT,
    imagenet,
    imagenet_steps,
    multi_crop,
    recipe,
    tiny_multi_crop,
    warmup_cosine,
)


def method(backbone: dict, width: int, prototypes: int, base_momentum: float = 0.004, **options: Any) -> dict:
    """`options` beginning with `neck_` and `head_` are those parts' arguments."""
    neck, head = (
        {name.removeprefix(f"{part}_"): value for name, value in options.items() if name.startswith(f"{part}_")}
        for part in ("neck", "head")
    )
    return dict(
        type="DINO",
        base_momentum=base_momentum,
        backbone=backbone,
        neck=dict(type="DINONeck", in_channels=width, out_channels=prototypes, **neck),
        head=dict(type="DINOHead", out_channels=prototypes, **head),
    )


def pretrain(
    method: dict,
    data: dict,
    batch_size: int,
    epochs: int,
    optimizer: dict,
    *,
    weight_decay_end: float | None = 0.4,
    min_lr: float = 1e-6,
    frozen_epochs: int = 1,
    paramwise: dict = KINDS_NO_DECAY,
    clip: float | None = 3.0,
    dtype: str = "bfloat16",
    **fields: Any,
) -> ConfigDict:
    """The release's schedules; `optimizer` has the learning rate for a batch of 256, which is scaled."""
    lr = optimizer["lr"] * batch_size / 256
    frozen = {"last_layer": dict(begin=imagenet_steps(frozen_epochs, batch_size))}
    decay = dict(type="CosineAnnealingWeightDecay", eta_min=weight_decay_end, by_epoch=True, convert_to_iter_based=True)
    return recipe(
        method=method,
        data=data,
        batch_size=batch_size,
        max_epochs=epochs,
        optim_wrapper=dict(
            optimizer=dict(optimizer, lr=lr),
            paramwise_cfg=dict(paramwise, custom_keys={**paramwise.get("custom_keys", {}), **frozen}),
            clip_grad=None if clip is None else dict(max_norm=clip),
        ),
        param_scheduler=[
            *warmup_cosine(epochs, 10, 1e-9, eta_min=min_lr),
            *([] if weight_decay_end is None else [dict(decay, begin=0, end=epochs)]),
        ],
        auto_scale_lr=dict(base_batch_size=batch_size),
        dtype=dtype,
        **{"evaluation": dict(interval=20), **fields},
    )


def vit(
    arch: str,
    width: int,
    batch_size: int,
    epochs: int,
    views: tuple = ((0.4, 1.0), (0.05, 0.4), 8),
    lr: float = 5e-4,
    options: Mapping[str, Any] = MappingProxyType({}),
    **more: Any,
) -> ConfigDict:
    backbone = dict(type="VisionTransformer", arch=arch, img_size=224, patch_size=16, drop_path_rate=0.1)
    return pretrain(
        method(backbone, width, 65536, **options),
        imagenet(*multi_crop(*views)),
        batch_size,
        epochs,
        dict(type="AdamW", lr=lr, weight_decay=0.04),
        evaluators=dict(attention=dict(type="AttentionMaps")),
        **more,
    )


def warmer(epochs: int) -> dict[str, Any]:
    """The teacher's temperature rises from 0.04 to 0.07 in so many epochs."""
    return dict(head_teacher_temp=0.07, head_warmup_teacher_temp_epochs=epochs)


RESNET50 = dict(type="ResNet", depth=50, norm_cfg=dict(type="SyncBN"))


def resnet(epochs: int = 100) -> ConfigDict:
    return pretrain(
        method(RESNET50, 2048, 65536),
        imagenet(*multi_crop((0.14, 1.0), (0.05, 0.14), 8)),
        512,
        epochs,
        dict(type="SGD", lr=0.03, momentum=0.9, weight_decay=1e-4),
        weight_decay_end=None,
    )


def resnet_large_batch(epochs: int = 800) -> ConfigDict:
    projector = {f"mlp/{i}/scale": NO_DECAY_OR_LARS for i in (1, 4)}  # its BatchNorms
    return pretrain(
        method(RESNET50, 2048, 60000, neck_use_bn=True, **warmer(50)),
        imagenet(*multi_crop((0.14, 1.0), (0.05, 0.14), 6)),
        4080,
        epochs,
        dict(type="LARS", lr=0.3, momentum=0.9, weight_decay=1e-6),
        weight_decay_end=None,
        min_lr=0.0048,
        paramwise=dict(custom_keys={**LARS_EXCLUDE, **projector}),
        clip=None,
    )


def tiny() -> ConfigDict:
    """A small ViT on real handwritten digits, with 64 prototypes and a teacher that follows quickly.

    BatchNorm in the projector sets images apart from the first step on; without it, so short a run stays where the teacher
    says nothing (`teacher_entropy` near 1).
    """
    projector = dict(neck_hidden_channels=128, neck_bottleneck_channels=64, neck_use_bn=True)
    temperature = dict(head_warmup_teacher_temp=0.03, head_teacher_temp=0.03)
    backbone = dict(type="VisionTransformer", **TINY_VIT)
    return tiny_multi_crop(method(backbone, 64, 64, **projector, **temperature, base_momentum=0.03))


SMALL = partial(vit, "deit-small", 384)
WIDE_CROPS = ((0.25, 1.0), (0.05, 0.25), 10)

RECIPES = {
    "dino_vit-small-p16_8xb64-amp-coslr-100e_in1k": partial(SMALL, 512, 100),
    "dino_vit-small-p16_16xb64-amp-coslr-300e_in1k": partial(
        SMALL, 1024, 300, options=dict(neck_norm_last_layer=False, **warmer(30))
    ),
    "dino_vit-small-p16_16xb64-coslr-800e_in1k": partial(
        SMALL,
        1024,
        800,
        WIDE_CROPS,
        options=dict(neck_norm_last_layer=False, **warmer(30)),
        min_lr=1e-5,
        clip=None,
        dtype="float32",
    ),
    "dino_vit-base-p16_32xb32-coslr-400e_in1k": partial(
        vit,
        "base",
        768,
        1024,
        400,
        WIDE_CROPS,
        lr=7.5e-4,
        options=warmer(50),
        min_lr=2e-6,
        clip=0.3,
        frozen_epochs=3,
        dtype="float32",
    ),
    "dino_resnet50_8xb64-amp-coslr-100e_in1k": resnet,
    "dino_resnet50_80xb51-amp-coslr-800e_in1k": resnet_large_batch,
    "digits": tiny,
}


def get_config(name: str | None = None) -> ConfigDict:
    return pick(RECIPES, name)
