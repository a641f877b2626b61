"""CAE: Context Autoencoder for Self-Supervised Representation Learning (Chen et al., 2022).

Measured here: `digits`, on 2 CPU cores. The other has not been run by us; published by MMPretrain: top-1 on ImageNet-1k after
fine-tuning. It needs the weights of DALL-E's encoder (`config.method.target_generator.init_cfg.checkpoint`).

| recipe | command | hardware | wall time | metric |
|---|---|---|---|---|
| digits | `--config=configs/cae.py:digits` | 2 CPU cores | 3.1 CPU min | probe 95.3, trained 94.6; kNN 87.5, 79.1 |
| cae_beit-base-p16_8xb256-amp-coslr-300e_in1k | `--config=configs/cae.py` | 8 GPUs | | 83.2 |
| beit-base-p16_cae-pre_8xb128-coslr-100e_in1k | | 8 GPUs | | 83.3 |

The last recipes start from an encoder of the first: `--config.load_from.path=RUN`.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from jaxpretrain.config import pick
from jaxpretrain.followers import CENTRED, MASKING, encoder, fine_tune_beit, strong_augmentation
from jaxpretrain.recipes import (
    FLIP,
    frozen_feature_scores,
    imagenet,
    masked_digit_pairs,
    on_digits,
    recipe,
    warmup_cosine,
)

NO_DECAY = dict(bias_decay_mult=0.0, norm_decay_mult=0.0, flat_decay_mult=0.0)


def pretrain() -> ConfigDict:
    """The paper's recipe: 75 of 196 patches hidden in blocks; DALL-E sees a picture of half the size."""
    epochs = 300
    return recipe(
        method=dict(
            type="CAE",
            backbone=dict(type="CAEPretrainViT", arch="b", patch_size=16, layer_scale_init_value=0.1, bias="qv_bias"),
            neck=dict(
                type="CAENeck",
                embed_dims=768,
                num_heads=12,
                regressor_depth=4,
                decoder_depth=4,
                mlp_ratio=4,
                layer_scale_init_value=0.1,
            ),
            head=dict(type="CAEHead", loss=dict(type="CAELoss", lambd=2)),
            target_generator=dict(
                type="DALL-E",
                init_cfg=dict(
                    type="Pretrained",
                    checkpoint="https://download.openmmlab.com/mmselfsup/1.x/target_generator_ckpt/dalle_encoder.pth",
                ),
            ),
            base_momentum=0.0,
        ),
        data=imagenet(
            [
                FLIP,
                dict(
                    type="RandomResizedCropAndInterpolationWithTwoPic",
                    size=224,
                    second_size=112,
                    interpolation="bicubic",
                    second_interpolation="lanczos",
                    scale=(0.08, 1.0),
                ),
                dict(
                    type="BEiTMaskGenerator",
                    input_size=(14, 14),
                    num_masking_patches=75,
                    max_num_patches=None,
                    min_num_patches=16,
                ),
            ],
            [],
        ),
        data_preprocessor=dict(second_mean=(-31.875,) * 3, second_std=(318.75,) * 3),
        batch_size=2048,
        max_epochs=epochs,
        optim_wrapper=dict(
            optimizer=dict(type="AdamW", lr=1.5e-3, betas=(0.9, 0.999), weight_decay=0.05),
            clip_grad=dict(max_norm=3.0),
            paramwise_cfg=NO_DECAY,
        ),
        param_scheduler=warmup_cosine(epochs, 10, eta_min=1e-5),
        auto_scale_lr=dict(base_batch_size=2048),
        checkpoint=dict(interval=10),
        dtype="bfloat16",
    )


def tiny() -> ConfigDict:
    """A small CAE on real handwritten digits, for a laptop: 24-pixel images in 4-pixel patches, 3 layers of 64 units.

    DALL-E's stand-in is a tokenizer with random weights: 32 tokens of 4x4 pixels, a rough sketch of what is there.
    """
    epochs = 40
    return on_digits(
        method=dict(
            type="CAE",
            backbone=dict(
                type="CAEPretrainViT",
                arch=dict(embed_dims=64, num_layers=3, num_heads=4, feedforward_channels=256),
                img_size=24,
                patch_size=4,
                layer_scale_init_value=0.0,
            ),
            neck=dict(
                type="CAENeck",
                num_classes=32,
                embed_dims=64,
                num_heads=4,
                regressor_depth=1,
                decoder_depth=1,
                layer_scale_init_value=0.0,
                mask_tokens_num=14,
            ),
            head=dict(type="CAEHead", loss=dict(type="CAELoss", lambd=2)),
            target_generator=dict(type="RandomProjectionTokenizer", patch_size=4, num_embed=32, embed_dims=4),
        ),
        data=masked_digit_pairs(),
        batch_size=64,
        max_epochs=epochs,
        optim_wrapper=dict(
            optimizer=dict(type="AdamW", lr=2e-3, betas=(0.9, 0.999), weight_decay=0.05),
            clip_grad=dict(max_norm=3.0),
            paramwise_cfg=NO_DECAY,
        ),
        param_scheduler=warmup_cosine(epochs, 2),
        evaluators=frozen_feature_scores(reconstruction=dict(type="Reconstruction", num_images=12)),
    )


def fine_tune() -> ConfigDict:
    """With biases for relative positions, which start from nothing."""
    return fine_tune_beit(
        lr=8e-3,
        warmup=5,
        backbone=dict(final_norm=False, layer_scale_init_value=0.1, use_abs_pos_emb=True),
        no_decay=None,
        head=dict(init_cfg=dict(type="TruncNormal", layer="Linear", std=2e-5)),
        load_from=encoder(
            drop=[*MASKING, r"^backbone\.ln1\."], fresh=[r"^backbone\.ln2\.", r"relative_position_bias_table$"]
        ),
        data=strong_augmentation(fill=(127.5,) * 3, fill_std=(127.5,) * 3, pad=(128, 128, 128)),
        data_preprocessor=CENTRED,
    )


RECIPES = {
    "cae_beit-base-p16_8xb256-amp-coslr-300e_in1k": pretrain,
    "beit-base-p16_cae-pre_8xb128-coslr-100e_in1k": fine_tune,
    "digits": tiny,
}


def get_config(name: str | None = None) -> ConfigDict:
    return pick(RECIPES, name)
