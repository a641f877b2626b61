"""ViT: An Image is Worth 16x16 Words (Dosovitskiy et al., 2021), with labels.

These have not been run by us; published by MMPretrain: top-1 on ImageNet-1k; of weights that it trained so (the first), and of
the paper's own training on ImageNet-21k and at 384 pixels.

| recipe | command | hardware | wall time | metric |
|---|---|---|---|---|
| vit-base-p16_32xb128-mae_in1k | `--config=configs/vision_transformer.py` | 32 GPUs | | 82.37 |
| vit-base-p32_in21k-pre_3rdparty_in1k-384px | `--config=configs/vision_transformer.py:NAME` | 64 GPUs | | 84.01 |
| vit-base-p16_in21k-pre_3rdparty_in1k-384px | | 64 GPUs | | 85.43 |
| vit-large-p16_in21k-pre_3rdparty_in1k-384px | | 64 GPUs | | 85.63 |
"""

from __future__ import annotations

from functools import partial
from typing import Any

from ml_collections import ConfigDict

from jaxpretrain.config import pick
from jaxpretrain.followers import CENTRED, ENCODER
from jaxpretrain.recipes import KINDS_NO_DECAY, SWIN_NO_DECAY, warmup_cosine
from jaxpretrain.supervised_recipes import (
    CROSS_ENTROPY,
    PILLOW,
    TOKENS_NO_DECAY,
    VIT_INIT,
    classic,
    from_scratch,
    plain_crops,
    smoothing,
)

WIDTHS = dict(b=768, l=1024)
HEAD = dict(type="VisionTransformerClsHead")
AUTO_AUGMENT = dict(
    type="AutoAugment", policies="imagenet", hparams=dict(pad_val=[124, 116, 104], interpolation="bicubic")
)


def vit(
    arch: str, patch_size: int, size: int = 224, smooth: bool = False, backbone: dict | None = None, **settings: Any
) -> ConfigDict:
    """The paper's: a hidden layer in the head, AutoAugment and Mixup at 224 pixels; crops and mirrors alone at 384.

    Args:
        arch, patch_size, size: the network and its images.
        smooth: whether labels are smoothed.
        backbone: in place of the network itself.
        settings: others of `from_scratch`.
    """
    network = dict(type="VisionTransformer", arch=arch, img_size=size, patch_size=patch_size, drop_rate=0.1)
    if size == 224:
        data = plain_crops(**PILLOW)
        data["train"]["pipeline"].append(AUTO_AUGMENT)
        defaults: dict[str, Any] = dict(mixed=dict(type="Mixup", alpha=0.2), head=HEAD | dict(hidden_dim=3072))
    else:
        data = plain_crops(size, size, backend="pillow")
        defaults = dict(mixed=False, head=HEAD, data_preprocessor=CENTRED)
    defaults |= dict(gpus=64, data=data, param_scheduler=warmup_cosine(300, 30, by_iter=False))
    return from_scratch(
        backbone
        or network | dict(init_cfg=[dict(type="Kaiming", layer="Conv2d", mode="fan_in", nonlinearity="linear")]),
        WIDTHS[arch],
        lr=3e-3,
        per_gpu=64,
        weight_decay=0.3,
        clip=1.0,
        loss=smoothing(mode="classy_vision") if smooth else CROSS_ENTROPY,
        no_decay=TOKENS_NO_DECAY,
        auto_scale_lr=dict(base_batch_size=4096),
        **defaults | settings,
    )


def as_mae() -> ConfigDict:
    """From nothing as MAE's authors do it, for comparison with what they pre-train: 300 epochs, with averaged weights."""
    return from_scratch(
        dict(type="VisionTransformer", arch="base", img_size=224, patch_size=16, drop_path_rate=0.1),
        768,
        lr=1.6e-3,
        gpus=32,
        per_gpu=128,
        weight_decay=0.3,
        averaged=1e-4,
        optimizer=dict(betas=(0.9, 0.95)),
        no_decay=KINDS_NO_DECAY | dict(custom_keys=SWIN_NO_DECAY | TOKENS_NO_DECAY["custom_keys"]),
        head=HEAD,
        model=dict(init_cfg=VIT_INIT),
        auto_scale_lr=dict(base_batch_size=4096),
    )


def lora() -> ConfigDict:
    """Low-rank updates of attention's input layers, and the head: `--config.load_from.path=FILE` has the network."""
    network = dict(type="VisionTransformer", arch="b", img_size=384, patch_size=16, drop_rate=0.1)
    return vit(
        "b",
        16,
        384,
        smooth=True,
        backbone=dict(type="LoRAModel", module=network, alpha=16, rank=16, drop_rate=0.1, targets=[dict(type="qkv")]),
        gpus=8,
        epochs=50,
        head=HEAD | dict(init_cfg=[dict(type="TruncNormal", layer="Linear", std=2e-5)]),
        load_from=ENCODER,
        param_scheduler=warmup_cosine(50, 5, eta_min=1e-6),
    )


def ipu() -> ConfigDict:
    """5,000 steps of SGD from a trained encoder, as MMPretrain's file for four IPUs says, which is in the form of version 0."""
    return classic(
        dict(type="VisionTransformer", arch="b", img_size=224, patch_size=16, drop_rate=0.1),
        768,
        gpus=4,
        per_gpu=544,
        optimizer=dict(lr=0.08, weight_decay=1e-5),
        schedule=[
            dict(type="LinearLR", start_factor=0.02, by_epoch=False, begin=0, end=800),
            dict(type="CosineAnnealingLR", T_max=4200, by_epoch=False, begin=800, end=5000),
        ],
        no_decay=TOKENS_NO_DECAY,
        head=HEAD,
        model=dict(neck=None),
        load_from=ENCODER,
        data=plain_crops(edge=224, backend="pillow"),
        data_preprocessor=CENTRED,
        max_steps=5000,
        accumulative_counts=32,
        dtype="bfloat16",
    )


RECIPES = {
    "vit-base-p16_32xb128-mae_in1k": as_mae,
    "vit-base-p32_64xb64_in1k": partial(vit, "b", 32),
    "vit-base-p16_64xb64_in1k": partial(vit, "b", 16, smooth=True),
    "vit-large-p32_64xb64_in1k": partial(vit, "l", 32),
    "vit-large-p16_64xb64_in1k": partial(vit, "l", 16),
    "vit-base-p32_in21k-pre_3rdparty_in1k-384px": partial(vit, "b", 32, 384),
    "vit-base-p16_in21k-pre_3rdparty_in1k-384px": partial(vit, "b", 16, 384, smooth=True),
    "vit-large-p32_64xb64_in1k-384px": partial(vit, "l", 32, 384),
    "vit-large-p16_in21k-pre_3rdparty_in1k-384px": partial(vit, "l", 16, 384),
    "vit-base-p16_8xb64-lora_in1k-384px": lora,
    "vit-base-p16_4xb544-ipu_in1k": ipu,
}


def get_config(name: str | None = None) -> ConfigDict:
    return pick(RECIPES, name)
