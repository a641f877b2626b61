"""MAE: Masked Autoencoders Are Scalable Vision Learners (He et al., 2021).

Measured here: `digits`, on 2 CPU cores. The others have not been run by us; published by MMPretrain: top-1 on ImageNet-1k
after fine-tuning / with a linear probe, by the recipes at the end, whose names say on which encoder; they start from
`--config.load_from.path=RUN`. `ds` and `fsdp` shard weights and optimizer over all devices.

| recipe | command | hardware | wall time | metric |
|---|---|---|---|---|
| digits | `make quickstart` | 2 CPU cores | 2.3 min | linear probe 94.6, trained 96.3; kNN 74.7, 87.2 |
| mae_vit-base-p16_8xb512-amp-coslr-300e_in1k | `--config=configs/mae.py` | 8 GPUs | | 83.1 / 60.8 |
| mae_vit-base-p16_8xb512-amp-coslr-400e_in1k | `--config=configs/mae.py:NAME` | 8 GPUs | | 83.3 / 62.5 |
| mae_vit-base-p16_8xb512-amp-coslr-800e_in1k | | 8 GPUs | | 83.3 / 65.1 |
| mae_vit-base-p16_8xb512-amp-coslr-1600e_in1k | | 8 GPUs | | 83.5 / 67.1 |
| mae_vit-large-p16_8xb512-amp-coslr-400e_in1k | | 8 GPUs | | 85.2 / 70.7 |
| mae_vit-large-p16_8xb512-amp-coslr-800e_in1k | | 8 GPUs | | 85.4 / 73.7 |
| mae_vit-large-p16_8xb512-amp-coslr-1600e_in1k | | 8 GPUs | | 85.7 / 75.5 |
| mae_vit-huge-p14_8xb512-amp-coslr-1600e_in1k | | 8 GPUs | | 86.9 / - |
| vit-base-p16_mae-300e-pre_8xb128-coslr-100e_in1k (and 400e, 800e, 1600e) | | 8 GPUs | | as above |
| vit-base-p16_mae-300e-pre_8xb2048-linear-coslr-90e_in1k (and 400e, 800e, 1600e) | | 8 GPUs | | as above |
| vit-large-p16_mae-400e-pre_8xb128-coslr-50e_in1k (and 800e, 1600e) | | 8 GPUs | | as above |
| vit-large-p16_mae-400e-pre_8xb2048-linear-coslr-90e_in1k (and 800e, 1600e) | | 8 GPUs | | as above |
| vit-huge-p14_mae-1600e-pre_8xb128-coslr-50e_in1k | | 8 GPUs | | 86.9 |
| vit-huge-p14_mae-1600e-pre_32xb8-coslr-50e_in1k-448px | | 32 GPUs | | 87.3 |
"""

from __future__ import annotations

from functools import partial

from ml_collections import ConfigDict

from jaxpretrain.config import pick
from jaxpretrain.followers import fine_tune_vit, probe_vit
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

NO_DECAY = {name: dict(decay_mult=0.0) for name in ("ln", "bias", "pos_embed", "mask_token", "cls_token")}
WIDTH = {"b": 768, "l": 1024, "h": 1280}


def pretrain(arch: str, patch_size: int, epochs: int, start_factor: float = 1e-4) -> ConfigDict:
    """The paper's recipe: batch 4,096, AdamW, 40 epochs of warm-up, crops and flips only."""
    return recipe(
        method=dict(
            type="MAE",
            backbone=dict(type="MAEViT", arch=arch, patch_size=patch_size, mask_ratio=0.75),
            neck=dict(
                type="MAEPretrainDecoder",
                num_patches=(224 // patch_size) ** 2,
                patch_size=patch_size,
                in_chans=3,
                embed_dim=WIDTH[arch],
                decoder_embed_dim=512,
                decoder_depth=8,
                decoder_num_heads=16,
                mlp_ratio=4.0,
            ),
            head=dict(
                type="MAEPretrainHead",
                norm_pix=True,
                patch_size=patch_size,
                loss=dict(type="PixelReconstructionLoss", criterion="L2"),
            ),
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
            paramwise_cfg=dict(custom_keys=NO_DECAY),
        ),
        param_scheduler=warmup_cosine(epochs, 40, start_factor),
        auto_scale_lr=dict(base_batch_size=4096),
        dtype="bfloat16",
        evaluators=dict(reconstruction=dict(type="Reconstruction")),
        evaluation=dict(interval=20),
    )


def tiny() -> ConfigDict:
    """A small MAE on real handwritten digits, for a laptop: 32-pixel images in 4-pixel patches, 3 layers of 64 units.

    A digit has 64 patches, of one original pixel each, so 60 % are masked and not 75 %.
    """
    epochs = 40
    return on_digits(
        method=dict(
            type="MAE",
            backbone=dict(
                type="MAEViT",
                arch=dict(embed_dims=64, num_layers=3, num_heads=4, feedforward_channels=256),
                img_size=32,
                patch_size=4,
                mask_ratio=0.6,
            ),
            neck=dict(
                type="MAEPretrainDecoder",
                num_patches=64,
                patch_size=4,
                embed_dim=64,
                decoder_embed_dim=64,
                decoder_depth=1,
                decoder_num_heads=4,
            ),
            head=dict(
                type="MAEPretrainHead",
                norm_pix=False,
                patch_size=4,
                loss=dict(type="PixelReconstructionLoss", criterion="L2"),
            ),
            init_cfg=[dict(type="Xavier", layer="Linear", distribution="uniform")],
        ),
        data=digits([dict(type="RandomResizedCrop", scale=32, crop_ratio_range=(0.6, 1.0))], []),
        max_epochs=epochs,
        optim_wrapper=dict(
            optimizer=dict(type="AdamW", lr=2e-3, betas=(0.9, 0.95), weight_decay=0.05),
            paramwise_cfg=dict(custom_keys=NO_DECAY),
        ),
        param_scheduler=warmup_cosine(epochs, 5),
        evaluators=frozen_feature_scores(reconstruction=dict(type="Reconstruction", num_images=12)),
    )


BASE = partial(fine_tune_vit, "base", lr=2e-3)
LARGE = partial(fine_tune_vit, "large", lr=4e-3, epochs=50, layer_decay=0.75, drop_path=0.2)
HUGE = partial(fine_tune_vit, "huge", lr=4e-3, epochs=50, layer_decay=0.75, drop_path=0.3, patch_size=14)
SHARDED = dict(mesh=dict(data=1, fsdp=-1))

RECIPES = {
    "mae_vit-base-p16_8xb512-amp-coslr-300e_in1k": partial(pretrain, "b", 16, 300),
    "mae_vit-base-p16_8xb512-amp-coslr-400e_in1k": partial(pretrain, "b", 16, 400),
    "mae_vit-base-p16_8xb512-amp-coslr-800e_in1k": partial(pretrain, "b", 16, 800, start_factor=1e-9),
    "mae_vit-base-p16_8xb512-amp-coslr-1600e_in1k": partial(pretrain, "b", 16, 1600),
    "mae_vit-large-p16_8xb512-amp-coslr-300e_in1k": partial(pretrain, "l", 16, 300),
    "mae_vit-large-p16_8xb512-amp-coslr-400e_in1k": partial(pretrain, "l", 16, 400),
    "mae_vit-large-p16_8xb512-amp-coslr-800e_in1k": partial(pretrain, "l", 16, 800, start_factor=1e-9),
    "mae_vit-large-p16_8xb512-amp-coslr-1600e_in1k": partial(pretrain, "l", 16, 1600),
    # The zoo says p16 for the weights that this recipe, with patches of 14, made; both names are in use.
    "mae_vit-huge-p14_8xb512-amp-coslr-1600e_in1k": partial(pretrain, "h", 14, 1600),
    "mae_vit-huge-p16_8xb512-amp-coslr-1600e_in1k": partial(pretrain, "h", 14, 1600),
    **{f"vit-base-p16_mae-{n}e-pre_8xb128-coslr-100e_in1k": BASE for n in (300, 400, 800, 1600)},
    **{f"vit-large-p16_mae-{n}e-pre_8xb128-coslr-50e_in1k": LARGE for n in (400, 800, 1600)},
    "vit-large-p16_8xb128-ds-coslr-50e_in1k": partial(LARGE, **SHARDED),
    "vit-large-p16_8xb128-fsdp-coslr-50e_in1k": partial(LARGE, dtype="bfloat16", **SHARDED),
    "vit-huge-p14_mae-1600e-pre_8xb128-coslr-50e_in1k": HUGE,
    "vit-huge-p14_mae-1600e-pre_32xb8-coslr-50e_in1k-448px": partial(
        HUGE, size=448, gpus=32, per_gpu=8, auto_scale_lr=dict(enable=True, base_batch_size=1024)
    ),
    "vit-huge-p14_8xb128-ds-coslr-50e_in1k": partial(HUGE, **SHARDED),
    "vit-huge-p14_8xb128-fsdp-coslr-50e_in1k": partial(HUGE, dtype="bfloat16", **SHARDED),
    **{
        f"vit-base-p16_mae-{n}e-pre_8xb2048-linear-coslr-90e_in1k": partial(probe_vit, "base", 6.4, 90)
        for n in (300, 400, 800, 1600)
    },
    **{
        f"vit-large-p16_mae-{n}e-pre_8xb2048-linear-coslr-90e_in1k": partial(probe_vit, "large", 6.4, 90)
        for n in (400, 800, 1600)
    },
    "digits": tiny,
}


def get_config(name: str | None = None) -> ConfigDict:
    return pick(RECIPES, name)
