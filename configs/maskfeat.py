"""MaskFeat: Masked Feature Prediction for Self-Supervised Visual Pre-Training (Wei et al., 2021).

Measured here: `digits`, on 2 CPU cores. The other has not been run by us; published by MMPretrain: top-1 on ImageNet-1k
after fine-tuning.

| recipe | command | hardware | wall time | metric |
|---|---|---|---|---|
| digits | `--config=configs/maskfeat.py:digits` | 2 CPU cores | 2.1 CPU min | probe 88.2, trained 92.9; kNN 48.8, 87.9 |
| maskfeat_vit-base-p16_8xb256-amp-coslr-300e_in1k | `--config=configs/maskfeat.py` | 8 GPUs | | 83.4 |
| vit-base-p16_maskfeat-pre_8xb256-coslr-100e_in1k | | 8 GPUs | | 83.4 |

The last recipes start from an encoder of the first: `--config.load_from.path=RUN`.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from jaxpretrain.config import pick
from jaxpretrain.followers import fine_tune_vit, jittered, strong_augmentation
from jaxpretrain.recipes import (
    FLIP,
    digits,
    frozen_feature_scores,
    imagenet,
    on_digits,
    recipe,
    warmup_cosine,
)

NO_DECAY = dict(
    bias_decay_mult=0.0,
    norm_decay_mult=0.0,
    flat_decay_mult=0.0,
    custom_keys=dict(mask_token=dict(decay_mult=0.0)),
)


def neck(width: int) -> dict:
    """A linear layer to the histograms of a patch: 3 channels, 9 bins, 2x2 cells."""
    init = dict(type="TruncNormal", layer="Linear", std=0.02, bias=0)
    return dict(type="LinearNeck", in_channels=width, out_channels=108, norm_cfg=None, init_cfg=init)


HEAD = dict(type="MIMHead", loss=dict(type="PixelReconstructionLoss", criterion="L2"))


def pretrain() -> ConfigDict:
    """The paper's recipe: batch 2,048, AdamW, 30 epochs of warm-up, gradients clipped at 0.02, 40 % of patches hidden."""
    return recipe(
        method=dict(
            type="MaskFeat",
            backbone=dict(type="MaskFeatViT", arch="b", patch_size=16),
            neck=neck(768),
            head=HEAD,
            target_generator=dict(type="HOGGenerator", nbins=9, pool=8, gaussian_window=16),
        ),
        data=imagenet(
            [
                dict(type="RandomResizedCrop", scale=224, crop_ratio_range=(0.5, 1.0), interpolation="bicubic"),
                dict(type="BEiTMaskGenerator", input_size=14, num_masking_patches=78, min_num_patches=15),
            ],
            [FLIP],
        ),
        batch_size=2048,
        max_epochs=300,
        optim_wrapper=dict(
            optimizer=dict(type="AdamW", lr=1.6e-3, betas=(0.9, 0.999), weight_decay=0.05),
            paramwise_cfg=NO_DECAY,
            clip_grad=dict(max_norm=0.02),
        ),
        param_scheduler=warmup_cosine(300, 30, 1e-6, eta_min=1e-6),
        auto_scale_lr=dict(base_batch_size=2048),
        dtype="bfloat16",
        evaluators=dict(reconstruction=dict(type="Reconstruction")),
        evaluation=dict(interval=20),
    )


def tiny() -> ConfigDict:
    """A small MaskFeat on real handwritten digits, for a laptop: 32-pixel images in 8-pixel patches, 3 layers of 64 units.

    A patch is 2x2 of a digit's original pixels, and a cell of gradients one of them; half of the 16 patches are hidden,
    single ones. Steps are many and small: for some hundreds the network learns little more than the mean of each place, and
    its features get worse than at random before they get better.
    """
    epochs = 60
    return on_digits(
        method=dict(
            type="MaskFeat",
            backbone=dict(
                type="MaskFeatViT",
                arch=dict(embed_dims=64, num_layers=3, num_heads=4, feedforward_channels=256),
                img_size=32,
                patch_size=8,
            ),
            neck=neck(64),
            head=HEAD,
            target_generator=dict(type="HOGGenerator", nbins=9, pool=4, gaussian_window=8),
        ),
        data=digits(
            [
                dict(type="RandomResizedCrop", scale=32, crop_ratio_range=(0.6, 1.0)),
                # Not BEiT's blocks, which never reach the last row and column: here half of the image.
                dict(type="SimMIMMaskGenerator", input_size=32, mask_patch_size=8, model_patch_size=8, mask_ratio=0.5),
            ],
            [],
        ),
        batch_size=32,
        max_epochs=epochs,
        optim_wrapper=dict(
            optimizer=dict(type="AdamW", lr=3e-3, betas=(0.9, 0.95), weight_decay=0.05),
            paramwise_cfg=NO_DECAY,
            clip_grad=dict(max_norm=1.0),
        ),
        param_scheduler=warmup_cosine(epochs, 5),
        evaluators=frozen_feature_scores(reconstruction=dict(type="Reconstruction", num_images=12)),
        evaluation=dict(interval=60, at_start=True),
        checkpoint=dict(interval=20),
        log_interval=100,
    )


def fine_tune() -> ConfigDict:
    """Like MAE's; colours change too."""
    data = jittered(strong_augmentation())
    data["val"]["pipeline"][0] = dict(type="ResizeEdge", scale=256, edge="short", backend="pillow")
    init = [dict(type="TruncNormal", layer="Linear", std=2e-5, bias=2e-5)]
    return fine_tune_vit("base", lr=8e-3, warmup=20, per_gpu=256, head=dict(init_cfg=init), data=data)


RECIPES = {
    "maskfeat_vit-base-p16_8xb256-amp-coslr-300e_in1k": pretrain,
    "vit-base-p16_maskfeat-pre_8xb256-coslr-100e_in1k": fine_tune,
    "digits": tiny,
}


def get_config(name: str | None = None) -> ConfigDict:
    return pick(RECIPES, name)
