"""iTPN: Integrally Pre-Trained Transformer Pyramid Networks (Tian et al., 2022).

None of these but `digits` has been run by us, nor has MMPretrain published results of its fine-tuning. Recipes with CLIP need
its weights (`config.method.target_generator.tokenizer_path`).

| recipe | command | hardware | wall time | metric |
|---|---|---|---|---|
| digits | `--config=configs/itpn.py:digits` | 2 CPU cores | 6.2 CPU min | probe 84.8, trained 94.3; kNN 47.1, 68.7 |
| itpn-pixel_hivit-base-p16_8xb512-amp-coslr-800e_in1k | `--config=configs/itpn.py` | 8 GPUs | | - |
| itpn-pixel_hivit-base-p16_8xb512-amp-coslr-400e_in1k (and 1600e) | `--config=configs/itpn.py:NAME` | 8 GPUs | | - |
| itpn-pixel_hivit-large-p16_8xb512-amp-coslr-400e_in1k (and 800e, 1600e) | | 8 GPUs | | - |
| itpn-clip-b_hivit-base-p16_8xb256-amp-coslr-300e_in1k (and 800e) | | 8 GPUs | | - |
"""

from __future__ import annotations

from functools import partial

from ml_collections import ConfigDict

from jaxpretrain.config import pick
from jaxpretrain.recipes import (
    FLIP,
    MAE_INIT,
    digits,
    frozen_feature_scores,
    imagenet,
    on_digits,
    recipe,
    warmup_cosine,
)

WIDTH = {"base": 512, "large": 768}
# The zoo's large recipes have `ln`, which HiViT's norms are not called, so that their scales decay.
NO_DECAY = {
    arch: {name: dict(decay_mult=0.0) for name in (norm, "bias", "pos_embed", "mask_token")}
    for arch, norm in (("base", "norm"), ("large", "ln"))
}
# MMPretrain's names with `/`, for a ConfigDict has no keys with dots.
CLIP_NO_DECAY = {name: dict(decay_mult=0.0) for name in ("/norm", "/pos_embed", "/gamma")}
CLIP_FILE = "https://download.openmmlab.com/mmselfsup/1.x/target_generator_ckpt/clip_vit_base_16.pth.tar"
L2 = dict(type="PixelReconstructionLoss", criterion="L2")


def pixel(arch: str, epochs: int) -> ConfigDict:
    """To pixels: MAE's recipe."""
    return recipe(
        method=dict(
            type="iTPN",
            backbone=dict(type="iTPNHiViT", arch=arch, reconstruction_type="pixel", mask_ratio=0.75),
            neck=dict(
                type="iTPNPretrainDecoder",
                num_patches=196,
                patch_size=16,
                in_chans=3,
                embed_dim=WIDTH[arch],
                decoder_embed_dim=512,
                decoder_depth=6,
                decoder_num_heads=16,
                mlp_ratio=4.0,
                reconstruction_type="pixel",
                fpn_dim=256,
                fpn_depth=2,
                num_outs=3,
            ),
            head=dict(type="MAEPretrainHead", norm_pix=True, patch_size=16, loss=L2),
            init_cfg=MAE_INIT,
        ),
        data=imagenet(
            [
                dict(
                    type="RandomResizedCrop",
                    scale=224,
                    crop_ratio_range=(0.2, 1.0),
                    backend="pillow",
                    interpolation="bicubic",
                )
            ],
            [FLIP],
        ),
        batch_size=4096,
        max_epochs=epochs,
        optim_wrapper=dict(
            optimizer=dict(type="AdamW", lr=2.4e-3, betas=(0.9, 0.95), weight_decay=0.05),
            paramwise_cfg=dict(custom_keys=NO_DECAY[arch]),
        ),
        param_scheduler=warmup_cosine(epochs, 40),
        auto_scale_lr=dict(base_batch_size=4096),
        dtype="bfloat16",
        evaluators=dict(reconstruction=dict(type="Reconstruction")),
        evaluation=dict(interval=20),
    )


COSINE = dict(type="CosineSimilarityLoss", shift_factor=0.0, scale_factor=1.0)


def clip(epochs: int, drop_path_rate: float, beta2: float, loss: dict) -> ConfigDict:
    """To CLIP's features: BEiT's recipe, 75 of 196 patches hidden in blocks; CLIP sees the picture in its own colours.

    The zoo's longer recipe has the cross entropy for a loss, which has no minimum (see `iTPNClipHead`).

    Colours are changed after the crop, not before: contrast is then about the crop's mean, not the whole image's.
    """
    jitter = dict(type="ColorJitter", brightness=0.4, contrast=0.4, saturation=0.4, hue=0.0)
    return recipe(
        method=dict(
            type="iTPN",
            backbone=dict(
                type="iTPNHiViT",
                arch="base",
                drop_path_rate=drop_path_rate,
                rpe=True,
                layer_scale_init_value=0.1,
                reconstruction_type="clip",
            ),
            neck=dict(
                type="iTPNPretrainDecoder",
                num_patches=196,
                patch_size=16,
                in_chans=3,
                embed_dim=512,
                mlp_ratio=4.0,
                reconstruction_type="clip",
                fpn_dim=256,
                fpn_depth=2,
                num_outs=3,
            ),
            head=dict(type="iTPNClipHead", embed_dims=512, num_embed=512, loss=loss),
            target_generator=dict(type="CLIPGenerator", tokenizer_path=CLIP_FILE),
        ),
        data=imagenet(
            [
                dict(
                    type="RandomResizedCropAndInterpolationWithTwoPic",
                    size=224,
                    second_size=224,
                    interpolation="bicubic",
                    second_interpolation="bicubic",
                    scale=(0.2, 1.0),
                ),
                dict(
                    type="BEiTMaskGenerator",
                    input_size=(14, 14),
                    num_masking_patches=75,
                    max_num_patches=75,
                    min_num_patches=16,
                ),
            ],
            [dict(type="Pictures", transforms=[jitter, FLIP])],
        ),
        data_preprocessor=dict(
            second_mean=(122.7709383, 116.7460125, 104.09373615000001),
            second_std=(68.5005327, 66.6321579, 70.32316304999999),
        ),
        batch_size=2048,
        max_epochs=epochs,
        optim_wrapper=dict(
            optimizer=dict(type="AdamW", lr=1.5e-3, betas=(0.9, beta2), weight_decay=0.05),
            clip_grad=dict(max_norm=3.0),
            paramwise_cfg=dict(custom_keys=CLIP_NO_DECAY),
        ),
        param_scheduler=warmup_cosine(epochs, 10, eta_min=1e-5),
        auto_scale_lr=dict(base_batch_size=2048),
        dtype="bfloat16",
    )


def tiny() -> ConfigDict:
    """A small iTPN on real handwritten digits, for a laptop: 32-pixel images in 64 patches of 4x4 tokens of one pixel.

    As with MAE on digits, 60 % of the patches are hidden.
    """
    epochs = 20
    return on_digits(
        method=dict(
            type="iTPN",
            backbone=dict(
                type="iTPNHiViT",
                arch=dict(embed_dims=64, depths=[1, 1, 3], num_heads=4),
                img_size=32,
                patch_size=4,
                mask_ratio=0.6,
            ),
            neck=dict(
                type="iTPNPretrainDecoder",
                patch_size=4,
                decoder_embed_dim=64,
                decoder_depth=1,
                decoder_num_heads=4,
                fpn_dim=32,
                fpn_depth=1,
            ),
            head=dict(type="MAEPretrainHead", norm_pix=False, patch_size=4, loss=L2),
            init_cfg=MAE_INIT,
        ),
        data=digits([dict(type="RandomResizedCrop", scale=32, crop_ratio_range=(0.6, 1.0))], []),
        max_epochs=epochs,
        optim_wrapper=dict(
            optimizer=dict(type="AdamW", lr=2e-3, betas=(0.9, 0.95), weight_decay=0.05),
            paramwise_cfg=dict(custom_keys=NO_DECAY["base"]),
        ),
        param_scheduler=warmup_cosine(epochs, 3),
        evaluators=frozen_feature_scores(reconstruction=dict(type="Reconstruction", num_images=12)),
    )


RECIPES = {
    "itpn-pixel_hivit-base-p16_8xb512-amp-coslr-800e_in1k": partial(pixel, "base", 800),
    "itpn-pixel_hivit-base-p16_8xb512-amp-coslr-400e_in1k": partial(pixel, "base", 400),
    "itpn-pixel_hivit-base-p16_8xb512-amp-coslr-1600e_in1k": partial(pixel, "base", 1600),
    "itpn-pixel_hivit-large-p16_8xb512-amp-coslr-400e_in1k": partial(pixel, "large", 400),
    "itpn-pixel_hivit-large-p16_8xb512-amp-coslr-800e_in1k": partial(pixel, "large", 800),
    "itpn-pixel_hivit-large-p16_8xb512-amp-coslr-1600e_in1k": partial(pixel, "large", 1600),
    "itpn-clip-b_hivit-base-p16_8xb256-amp-coslr-300e_in1k": partial(clip, 300, 0.0, 0.98, COSINE),
    "itpn-clip-b_hivit-base-p16_8xb256-amp-coslr-800e_in1k": partial(
        clip, 800, 0.1, 0.999, dict(type="CrossEntropyLoss")
    ),
    "digits": tiny,
}


def get_config(name: str | None = None) -> ConfigDict:
    return pick(RECIPES, name)
