"""BEiT v2: Masked Image Modeling with Vector-Quantized Visual Tokenizers (Peng et al., 2022).

Measured here: `digits`, on 2 CPU cores. The others have not been run by us; published by MMPretrain: top-1 on ImageNet-1k
after fine-tuning. They need the tokenizer's weights (`config.method.target_generator.init_cfg.checkpoint`).

| recipe | command | hardware | wall time | metric |
|---|---|---|---|---|
| digits | `--config=configs/beitv2.py:digits` | 2 CPU cores | 3.4 CPU min | probe 92.3, trained 92.6; kNN 75.1, 75.8 |
| beitv2_beit-base-p16_8xb256-amp-coslr-300e_in1k | `--config=configs/beitv2.py` | 8 GPUs | | 85.0 |
| beitv2_beit-base-p16_8xb256-amp-coslr-1600e_in1k | `--config=configs/beitv2.py:NAME` | 8 GPUs | | - |
| beit-base-p16_beitv2-pre_8xb128-coslr-100e_in1k | | 8 GPUs | | 85.0 |
| beit-base-p16_beitv2-in21k-pre_3rdparty_in1k | | 8 GPUs | | 86.47 (from ImageNet-21k) |

The last recipes start from an encoder of the first: `--config.load_from.path=RUN`.
"""

from __future__ import annotations

from functools import partial

from ml_collections import ConfigDict

from jaxpretrain.config import pick
from jaxpretrain.followers import BEIT_NO_DECAY, beit_from_in21k, fine_tune_beit
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


def pretrain(epochs: int, drop_path_rate: float, beta2: float) -> ConfigDict:
    """The paper's recipe: 75 of 196 patches hidden in blocks; both pictures have the same size.

    Colours are changed after the crop, not before: contrast is then about the crop's mean, not the whole image's.
    """
    jitter = dict(type="ColorJitter", brightness=0.4, contrast=0.4, saturation=0.4, hue=0.0)
    return recipe(
        method=dict(
            type="BEiT",
            backbone=dict(
                type="BEiTPretrainViT",
                arch="base",
                patch_size=16,
                out_indices=(-4, -1),
                drop_path_rate=drop_path_rate,
                final_norm=False,
                out_type="raw",
                layer_scale_init_value=0.1,
                init_cfg=BEIT_INIT,
            ),
            neck=dict(
                type="BEiTV2Neck",
                num_layers=2,
                early_layers=9,
                backbone_arch="base",
                drop_path_rate=drop_path_rate,
                layer_scale_init_value=0.1,
            ),
            head=dict(type="BEiTV2Head", embed_dims=768, num_embed=8192, loss=dict(type="CrossEntropyLoss")),
            target_generator=dict(
                type="VQKD",
                encoder_config=dict(
                    arch="base",
                    img_size=224,
                    patch_size=16,
                    in_channels=3,
                    out_indices=-1,
                    drop_rate=0.0,
                    drop_path_rate=0.0,
                    norm_cfg=dict(type="LN", eps=1e-6),
                    final_norm=True,
                    out_type="featmap",
                    with_cls_token=True,
                    frozen_stages=-1,
                    use_abs_pos_emb=True,
                    use_rel_pos_bias=False,
                    use_shared_rel_pos_bias=False,
                    layer_scale_init_value=0.0,
                    interpolate_mode="bicubic",
                    patch_cfg=dict(),
                    layer_cfgs=dict(),
                    init_cfg=None,
                ),
                init_cfg=dict(
                    type="Pretrained",
                    checkpoint="https://download.openmmlab.com/mmselfsup/1.x/target_generator_ckpt/vqkd_encoder.pth",
                ),
            ),
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
        data_preprocessor=dict(second_mean=(127.5,) * 3, second_std=(127.5,) * 3),
        batch_size=2048,
        max_epochs=epochs,
        optim_wrapper=dict(
            optimizer=dict(type="AdamW", lr=1.5e-3, betas=(0.9, beta2), weight_decay=0.05),
            clip_grad=dict(max_norm=3.0),
            paramwise_cfg=BEIT_NO_DECAY,
        ),
        param_scheduler=warmup_cosine(epochs, 10, eta_min=1e-5),
        auto_scale_lr=dict(base_batch_size=2048),
        dtype="bfloat16",
    )


def tiny() -> ConfigDict:
    """A small BEiT v2 on real handwritten digits, for a laptop: 24-pixel images in 4-pixel patches, 3 layers of 64 units.

    VQ-KD's stand-in is a tokenizer with random weights: 32 tokens of 4x4 pixels, a rough sketch of what is there.
    """
    epochs = 40
    return on_digits(
        method=dict(
            type="BEiT",
            backbone=dict(
                type="BEiTPretrainViT",
                arch=dict(embed_dims=64, num_layers=3, num_heads=4, feedforward_channels=256),
                img_size=24,
                patch_size=4,
                out_indices=(1, 2),
                final_norm=False,
                use_abs_pos_emb=True,
                layer_scale_init_value=0.0,
                init_cfg=[dict(type="Xavier", layer="Linear", distribution="uniform")],
            ),
            neck=dict(type="BEiTV2Neck", num_layers=1, early_layers=2, layer_scale_init_value=0.0),
            head=dict(type="BEiTV2Head", embed_dims=64, num_embed=32, loss=dict(type="CrossEntropyLoss")),
            target_generator=dict(type="RandomProjectionTokenizer", patch_size=4, num_embed=32, embed_dims=4),
        ),
        data=masked_digit_pairs(),
        batch_size=64,
        max_epochs=epochs,
        optim_wrapper=dict(
            optimizer=dict(type="AdamW", lr=2e-3, betas=(0.9, 0.98), weight_decay=0.05),
            clip_grad=dict(max_norm=3.0),
            paramwise_cfg=BEIT_NO_DECAY,
        ),
        param_scheduler=warmup_cosine(epochs, 2),
        evaluators=frozen_feature_scores(reconstruction=dict(type="Reconstruction", num_images=12)),
    )


RECIPES = {
    "beitv2_beit-base-p16_8xb256-amp-coslr-300e_in1k": partial(pretrain, 300, 0.0, 0.98),
    "beitv2_beit-base-p16_8xb256-amp-coslr-1600e_in1k": partial(pretrain, 1600, 0.1, 0.999),
    "beit-base-p16_beitv2-pre_8xb128-coslr-100e_in1k": partial(fine_tune_beit, lr=5e-4),
    "beit-base-p16_beitv2-in21k-pre_3rdparty_in1k": beit_from_in21k,
    "digits": tiny,
}


def get_config(name: str | None = None) -> ConfigDict:
    return pick(RECIPES, name)
