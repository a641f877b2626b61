"""EVA: Exploring the Limits of Masked Visual Representation Learning at Scale (Fang et al., 2022), in the form of an MAE.

Measured here: `digits`, on 2 CPU cores. The other has not been run by us; published by MMPretrain: top-1 on ImageNet-1k after
fine-tuning / with a linear probe. It needs CLIP's weights (`config.method.target_generator.tokenizer_path`).

| recipe | command | hardware | wall time | metric |
|---|---|---|---|---|
| digits | `--config=configs/eva.py:digits` | 2 CPU cores | 4.7 CPU min | probe 94.3, trained 97.6; kNN 70.0, 87.2 |
| eva-mae-style_vit-base-p16_16xb256-coslr-400e_in1k | `--config=configs/eva.py` | 16 GPUs | | 83.7 / 69.0 |
| vit-base-p16_eva-mae-style-pre_8xb128-coslr-100e_in1k | | 8 GPUs | | 83.7 |
| vit-base-p16_eva-mae-style-pre_8xb2048-linear-coslr-100e_in1k | | 8 GPUs | | 69.0 (linear probe) |

The last recipes start from an encoder of the first: `--config.load_from.path=RUN`.
"""

from __future__ import annotations

from functools import partial

from ml_collections import ConfigDict

from jaxpretrain.config import pick
from jaxpretrain.followers import fine_tune_vit, probe_vit
from jaxpretrain.models.clip_generator import WEIGHTS
from jaxpretrain.recipes import (
    FLIP,
    MAE_INIT,
    digits,
    imagenet,
    on_digits,
    recipe,
    warmup_cosine,
)

COSINE = dict(type="MIMHead", loss=dict(type="CosineSimilarityLoss", shift_factor=2.0, scale_factor=2.0))
NO_DECAY = {name: dict(decay_mult=0.0) for name in ("ln", "bias", "pos_embed", "mask_token", "cls_token")}


def pretrain() -> ConfigDict:
    """MAE's recipe with CLIP ViT-B/16 as the target."""
    epochs = 400
    crop = dict(
        type="RandomResizedCrop", scale=224, crop_ratio_range=(0.2, 1.0), backend="pillow", interpolation="bicubic"
    )
    return recipe(
        method=dict(
            type="EVA",
            backbone=dict(type="MAEViT", arch="b", patch_size=16, mask_ratio=0.75, init_cfg=MAE_INIT),
            neck=dict(
                type="MAEPretrainDecoder",
                patch_size=16,
                in_chans=3,
                embed_dim=768,
                decoder_embed_dim=512,
                decoder_depth=8,
                decoder_num_heads=16,
                mlp_ratio=4.0,
                predict_feature_dim=512,
                init_cfg=MAE_INIT,
            ),
            head=COSINE,
            target_generator=dict(type="CLIPGenerator", tokenizer_path=WEIGHTS),
            init_cfg=None,
        ),
        data=imagenet([crop], [FLIP]),
        batch_size=4096,
        max_epochs=epochs,
        optim_wrapper=dict(
            optimizer=dict(type="AdamW", lr=2.4e-3, betas=(0.9, 0.95), weight_decay=0.05),
            paramwise_cfg=dict(custom_keys=NO_DECAY),
        ),
        param_scheduler=warmup_cosine(epochs, 40),
        auto_scale_lr=dict(base_batch_size=4096),
    )


def tiny() -> ConfigDict:
    """On real handwritten digits, for a laptop. CLIP's stand-in is a small network with random weights.

    It knows nothing, but what it makes of a patch depends on the whole image: to predict it, the encoder must learn what
    digits look like.
    """
    epochs = 40
    arch = dict(embed_dims=64, num_layers=3, num_heads=4, feedforward_channels=256)
    size = dict(img_size=32, patch_size=4)
    return on_digits(
        method=dict(
            type="EVA",
            backbone=dict(type="MAEViT", arch=arch, mask_ratio=0.6, init_cfg=MAE_INIT, **size),
            neck=dict(
                type="MAEPretrainDecoder",
                patch_size=4,
                decoder_embed_dim=64,
                decoder_depth=1,
                decoder_num_heads=4,
                predict_feature_dim=32,
                init_cfg=MAE_INIT,
            ),
            head=COSINE,
            target_generator=dict(
                type="CLIPGenerator", arch=arch | dict(num_layers=2), out_dims=32, stand_in=True, **size
            ),
        ),
        data=digits([dict(type="RandomResizedCrop", scale=32, crop_ratio_range=(0.6, 1.0))], []),
        max_epochs=epochs,
        optim_wrapper=dict(
            optimizer=dict(type="AdamW", lr=2e-3, betas=(0.9, 0.95), weight_decay=0.05),
            paramwise_cfg=dict(custom_keys=NO_DECAY),
        ),
        param_scheduler=warmup_cosine(epochs, 3),
    )


RECIPES = {
    "eva-mae-style_vit-base-p16_16xb256-coslr-400e_in1k": pretrain,
    "vit-base-p16_eva-mae-style-pre_8xb128-coslr-100e_in1k": partial(fine_tune_vit, "base", lr=4e-4, head_std=0.02),
    "vit-base-p16_eva-mae-style-pre_8xb2048-linear-coslr-100e_in1k": partial(probe_vit, "base", 3.2, 100),
    "digits": tiny,
}


def get_config(name: str | None = None) -> ConfigDict:
    return pick(RECIPES, name)
