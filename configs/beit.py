"""BEiT: BERT Pre-Training of Image Transformers (Bao et al., 2021).

Measured here: `digits`, on 2 CPU cores. The other has not been run by us; published by MMPretrain: top-1 on ImageNet-1k after
fine-tuning. It needs the weights of DALL-E's encoder (`config.method.target_generator.init_cfg.checkpoint`).

| recipe | command | hardware | wall time | metric |
|---|---|---|---|---|
| digits | `--config=configs/beit.py:digits` | 2 CPU cores | 2.0 CPU min | probe 91.2, trained 94.3; kNN 75.1, 79.5 |
| beit_beit-base-p16_8xb256-amp-coslr-300e_in1k | `--config=configs/beit.py` | 8 GPUs | | 83.1 |
| beit-base-p16_beit-pre_8xb128-coslr-100e_in1k | | 8 GPUs | | 83.1 |
| beit-base-p16_beit-in21k-pre_3rdparty_in1k | | 8 GPUs | | 85.28 (from ImageNet-21k) |

The last recipes start from an encoder of the first: `--config.load_from.path=RUN`.
"""

from __future__ import annotations

from functools import partial

from ml_collections import ConfigDict

from jaxpretrain.config import pick
from jaxpretrain.followers import BEIT_NO_DECAY, CENTRED, beit_from_in21k, fine_tune_beit
from jaxpretrain.recipes import (
    BEIT_INIT,
    FLIP,
    frozen_feature_scores,
    imagenet,
    masked_digit_pairs,
    on_digits,
    recipe,
    warmup_cosine,
)


def pretrain() -> ConfigDict:
    """The paper's recipe: 75 of 196 patches hidden in blocks; DALL-E sees a picture of half the size.

    Colours are changed after the crop, not before: contrast is then about the crop's mean, not the whole image's.
    """
    epochs = 300
    jitter = dict(type="ColorJitter", brightness=0.4, contrast=0.4, saturation=0.4, hue=0.0)
    return recipe(
        method=dict(
            type="BEiT",
            backbone=dict(
                type="BEiTPretrainViT",
                arch="base",
                patch_size=16,
                drop_path_rate=0.1,
                final_norm=True,
                out_type="raw",
                layer_scale_init_value=0.1,
                init_cfg=BEIT_INIT,
            ),
            neck=None,
            head=dict(type="BEiTV1Head", embed_dims=768, num_embed=8192, loss=dict(type="CrossEntropyLoss")),
            target_generator=dict(
                type="DALL-E",
                init_cfg=dict(
                    type="Pretrained",
                    checkpoint="https://download.openmmlab.com/mmselfsup/1.x/target_generator_ckpt/dalle_encoder.pth",
                ),
            ),
        ),
        data=imagenet(
            [
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
            [dict(type="Pictures", transforms=[jitter, FLIP])],
        ),
        data_preprocessor=dict(second_mean=(-31.875,) * 3, second_std=(318.75,) * 3),
        batch_size=2048,
        max_epochs=epochs,
        optim_wrapper=dict(
            optimizer=dict(type="AdamW", lr=1.5e-3, betas=(0.9, 0.999), weight_decay=0.05),
            clip_grad=dict(max_norm=3.0),
            paramwise_cfg=BEIT_NO_DECAY,
        ),
        param_scheduler=warmup_cosine(epochs, 10, eta_min=1e-5),
        auto_scale_lr=dict(base_batch_size=2048),
        dtype="bfloat16",
    )


def tiny() -> ConfigDict:
    """A small BEiT on real handwritten digits, for a laptop: 24-pixel images in 4-pixel patches, 3 layers of 64 units.

    DALL-E's stand-in is a tokenizer with random weights: 32 tokens of 4x4 pixels, a rough sketch of what is there.
    """
    epochs = 20
    return on_digits(
        method=dict(
            type="BEiT",
            backbone=dict(
                type="BEiTPretrainViT",
                arch=dict(embed_dims=64, num_layers=3, num_heads=4, feedforward_channels=256),
                img_size=24,
                patch_size=4,
                use_abs_pos_emb=True,
                layer_scale_init_value=0.0,
                init_cfg=[dict(type="Xavier", layer="Linear", distribution="uniform")],
            ),
            neck=None,
            head=dict(type="BEiTV1Head", embed_dims=64, num_embed=32, loss=dict(type="CrossEntropyLoss")),
            target_generator=dict(type="RandomProjectionTokenizer", patch_size=4, num_embed=32, embed_dims=4),
        ),
        data=masked_digit_pairs(),
        batch_size=64,
        max_epochs=epochs,
        optim_wrapper=dict(
            optimizer=dict(type="AdamW", lr=2e-3, betas=(0.9, 0.999), weight_decay=0.05),
            clip_grad=dict(max_norm=3.0),
            paramwise_cfg=BEIT_NO_DECAY,
        ),
        param_scheduler=warmup_cosine(epochs, 2),
        evaluators=frozen_feature_scores(reconstruction=dict(type="Reconstruction", num_images=12)),
    )


RECIPES = {
    "beit_beit-base-p16_8xb256-amp-coslr-300e_in1k": pretrain,
    "beit-base-p16_beit-pre_8xb128-coslr-100e_in1k": partial(fine_tune_beit, lr=4e-3, data_preprocessor=CENTRED),
    "beit-base-p16_beit-in21k-pre_3rdparty_in1k": partial(beit_from_in21k, data_preprocessor=CENTRED),
    "digits": tiny,
}


def get_config(name: str | None = None) -> ConfigDict:
    return pick(RECIPES, name)
