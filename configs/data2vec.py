"""data2vec 2.0 for images (Baevski et al., 2022, Efficient Self-supervised Learning with Contextualized Target
Representations for Vision, Speech and Language).

Measured here: `digits`, on 2 CPU cores. The others have not been run by us; published by the paper: top-1 on ImageNet-1k
after fine-tuning.

| recipe | command | hardware | wall time | metric |
|---|---|---|---|---|
| digits | `--config=configs/data2vec.py:digits` | 2 CPU cores | 4.3 CPU min | probe 87.5, trained 91.2; kNN 64.3, 73.1 |
| data2vec2_vit-base-p16_200e_in1k | `--config=configs/data2vec.py` | 16 GPUs | | |
| data2vec2_vit-large-p16_150e_in1k | `--config=configs/data2vec.py:NAME` | 16 GPUs | | 86.8 |
"""

from __future__ import annotations

from functools import partial
from typing import Any

from ml_collections import ConfigDict

from jaxpretrain.config import pick
from jaxpretrain.recipes import (
    FLIP,
    digits,
    imagenet,
    on_digits,
    recipe,
    warmup_cosine,
)


def pretrain(
    arch: str, epochs: int, lr: float, anneal: int, cls_loss: float, backbone: Any, neck: Any, top_k: int
) -> ConfigDict:
    """The released settings: AdamW, 20 epochs (50,040 steps) of warm-up, a cosine to zero, MAE's crops and flips, 16 masks.

    Epochs are the paper's; the files of the release stop both at 375,300 steps, which at a batch of 512 is 150 epochs.
    """
    crop = dict(
        type="RandomResizedCrop", scale=224, crop_ratio_range=(0.2, 1.0), backend="pillow", interpolation="bicubic"
    )
    return recipe(
        method=dict(
            type="Data2Vec2",
            backbone=dict(type="Data2VecViT", arch=arch, patch_size=16, num_masks=16, block_size=3, **backbone),
            neck=dict(type="Data2VecDecoder", decoder_groups=16, mask_noise_std=0.01, **neck),
            head=dict(type="Data2VecHead", top_k=top_k),
            cls_loss=cls_loss,
            ema_decay=0.9998,
            ema_end_decay=0.99999,
            ema_anneal_steps=anneal,
        ),
        data=imagenet([crop], [FLIP]),
        batch_size=512,
        max_epochs=epochs,
        optim_wrapper=dict(
            optimizer=dict(type="AdamW", lr=lr, betas=(0.9, 0.95), weight_decay=0.05),
            paramwise_cfg=dict(flat_decay_mult=0.0),  # no decay of vectors: biases and norms
            clip_grad=dict(max_norm=4.0),
        ),
        param_scheduler=warmup_cosine(epochs, 20, 1e-6),
        auto_scale_lr=dict(base_batch_size=512),
        dtype="bfloat16",
    )


def tiny() -> ConfigDict:
    """On real handwritten digits, for a laptop: 32-pixel images in 4-pixel patches, 3 layers of 64 units, 4 masks.

    240 steps are few for the slow copy, so it follows faster.
    """
    epochs = 20
    return on_digits(
        method=dict(
            type="Data2Vec2",
            backbone=dict(
                type="Data2VecViT",
                arch=dict(embed_dims=64, num_layers=3, num_heads=4, feedforward_channels=256),
                img_size=32,
                patch_size=4,
                mask_ratio=0.7,
                num_masks=4,
            ),
            neck=dict(type="Data2VecDecoder", decoder_dim=64, decoder_layers=2, decoder_groups=4),
            head=dict(type="Data2VecHead", top_k=3),
            cls_loss=0.1,
            ema_decay=0.98,
            ema_end_decay=0.999,
            ema_anneal_steps=200,
        ),
        data=digits([dict(type="RandomResizedCrop", scale=32, crop_ratio_range=(0.6, 1.0))], []),
        max_epochs=epochs,
        optim_wrapper=dict(
            optimizer=dict(type="AdamW", lr=2e-3, betas=(0.9, 0.95), weight_decay=0.05),
            paramwise_cfg=dict(flat_decay_mult=0.0),
            clip_grad=dict(max_norm=4.0),
        ),
        param_scheduler=warmup_cosine(epochs, 3),
    )


# (The weight of the class token's loss: see `Data2Vec2`. One GPU had 16 images of 16 masks for ViT-B, 8 for ViT-L.)
BASE: dict[str, Any] = dict(
    lr=1e-3,
    anneal=100_000,
    cls_loss=2.56,
    backbone=dict(mask_ratio=0.8, mask_adjust=0.07),
    neck=dict(decoder_dim=768, decoder_kernel=3, decoder_layers=6),
    top_k=10,
)
LARGE: dict[str, Any] = dict(
    lr=4e-4,
    anneal=150_000,
    cls_loss=1.28,
    backbone=dict(mask_ratio=0.75, mask_adjust=0.1),
    neck=dict(decoder_dim=1024, decoder_kernel=5, decoder_layers=3),
    top_k=18,
)
RECIPES = {
    "data2vec2_vit-base-p16_200e_in1k": partial(pretrain, "base", 200, **BASE),
    "data2vec2_vit-large-p16_150e_in1k": partial(pretrain, "large", 150, **LARGE),
    "digits": tiny,
}


def get_config(name: str | None = None) -> ConfigDict:
    return pick(RECIPES, name)
