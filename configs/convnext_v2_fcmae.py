"""FCMAE: ConvNeXt V2: Co-designing and Scaling ConvNets with Masked Autoencoders (Woo et al., 2023).

Measured here: `digits`, on 2 CPU cores. MMPretrain has the encoders and no recipe for pre-training: the settings are the
paper's, written down from memory of its appendix and of its release, and not run by us. Published by the paper's authors:
top-1 on ImageNet-1k after fine-tuning at 224 px, for pre-training of 1,600 epochs.

| recipe | command | hardware | wall time | metric |
|---|---|---|---|---|
| digits | `--config=configs/convnext_v2_fcmae.py:digits` | 2 CPU cores | 4.5 CPU min | probe 92.6, trained 97.0; kNN 62.3, 69.4 |
| convnext-v2-base_fcmae-1600e_in1k | `--config=configs/convnext_v2_fcmae.py` | 64 GPUs | | 84.9 |
| convnext-v2-ARCH_fcmae-1600e_in1k | `--config=configs/convnext_v2_fcmae.py:NAME` | | | |
| atto, femto, pico, nano | | | | 76.7, 78.5, 80.3, 81.9 |
| tiny, large, huge | | | | 83.0, 85.8, 86.3 |
"""

from __future__ import annotations

from functools import partial

from ml_collections import ConfigDict

from jaxpretrain.config import pick
from jaxpretrain.recipes import (
    FLIP,
    NO_DECAY,
    digits,
    frozen_feature_scores,
    imagenet,
    on_digits,
    recipe,
    warmup_cosine,
)

L2 = dict(type="PixelReconstructionLoss", criterion="L2")
ENCODER = dict(
    type="SparseConvNeXt", use_grn=True, sparse_grn=True, layer_scale_init_value=0.0, gap_before_output=False
)
# Weight decay is for kernels only.
PARAMETERS = dict(bias_decay_mult=0.0, flat_decay_mult=0.0, custom_keys={"mask_token": NO_DECAY})


def pretrain(arch: str, epochs: int = 1600) -> ConfigDict:
    """The paper's recipe: batch 4,096, AdamW at 1.5e-4 for 256 images, 40 epochs of warm-up, crops and flips only."""
    crop = dict(type="RandomResizedCrop", scale=224, crop_ratio_range=(0.2, 1.0), backend="pillow")
    return recipe(
        method=dict(
            type="FCMAE",
            mask_ratio=0.6,
            backbone=dict(ENCODER, arch=arch),
            neck=dict(type="FCMAEDecoder", decoder_embed_dim=512, decoder_depth=1, patch_size=32),
            head=dict(type="MAEPretrainHead", norm_pix=True, patch_size=32, loss=L2),
        ),
        data=imagenet([dict(crop, interpolation="bicubic")], [FLIP]),
        batch_size=4096,
        max_epochs=epochs,
        optim_wrapper=dict(
            optimizer=dict(type="AdamW", lr=2.4e-3, betas=(0.9, 0.95), weight_decay=0.05), paramwise_cfg=PARAMETERS
        ),
        param_scheduler=warmup_cosine(epochs, 40),
        auto_scale_lr=dict(base_batch_size=4096),
        dtype="bfloat16",
        evaluators=dict(reconstruction=dict(type="Reconstruction")),
        evaluation=dict(interval=20),
    )


def tiny() -> ConfigDict:
    """Two stages of a narrow ConvNeXt V2 on real handwritten digits, for a laptop: 32-pixel images in 8x8 patches.

    A patch is one of a digit's original pixels, so targets are not normalised.
    """
    epochs = 20
    return on_digits(
        method=dict(
            type="FCMAE",
            backbone=dict(ENCODER, arch=dict(depths=[1, 2], channels=[32, 64]), stem_patch_size=2),
            neck=dict(type="FCMAEDecoder", decoder_embed_dim=64, patch_size=4),
            head=dict(type="MAEPretrainHead", norm_pix=False, patch_size=4, loss=L2),
        ),
        data=digits([dict(type="RandomResizedCrop", scale=32, crop_ratio_range=(0.6, 1.0))], []),
        max_epochs=epochs,
        optim_wrapper=dict(
            optimizer=dict(type="AdamW", lr=2e-3, betas=(0.9, 0.95), weight_decay=0.05), paramwise_cfg=PARAMETERS
        ),
        param_scheduler=warmup_cosine(epochs, 3),
        evaluators=frozen_feature_scores(reconstruction=dict(type="Reconstruction", num_images=12)),
    )


ARCHS = ("base", "atto", "femto", "pico", "nano", "tiny", "large", "huge")
RECIPES = {
    **{f"convnext-v2-{arch}_fcmae-1600e_in1k": partial(pretrain, arch) for arch in ARCHS},
    "digits": tiny,
}


def get_config(name: str | None = None) -> ConfigDict:
    return pick(RECIPES, name)
