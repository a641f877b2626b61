"""HiViT: a hierarchical vision transformer (Zhang et al., 2022), with labels, and as the encoder of a MAE.

None of these but `digits` has been run by us; published by MMPretrain: top-1 on ImageNet-1k.

| recipe | command | hardware | wall time | metric |
|---|---|---|---|---|
| digits | `--config=configs/hivit.py:digits` | 2 CPU cores | 3.4 CPU min | probe 83.5, trained 86.5; kNN 46.1, 47.1 |
| hivit-tiny-p16_16xb64_in1k | `--config=configs/hivit.py` | 16 GPUs | | 82.1 |
| hivit-small-p16_16xb64_in1k | `--config=configs/hivit.py:NAME` | 16 GPUs | | - |
| hivit-base-p16_16xb64_in1k | | 16 GPUs | | - |
| mae_hivit-base-p16_8xb512-amp-coslr-400e_in1k (and 800e, 1600e) | | 8 GPUs | | - |
| mae_hivit-large-p16_8xb512-amp-coslr-400e_in1k (and 800e, 1600e) | | 8 GPUs | | - |
"""

from __future__ import annotations

from functools import partial

from ml_collections import ConfigDict

from jaxpretrain.config import pick
from jaxpretrain.followers import fine_tune
from jaxpretrain.recipes import (
    FLIP,
    KINDS_NO_DECAY,
    MAE_INIT,
    digits,
    frozen_feature_scores,
    imagenet,
    on_digits,
    recipe,
    warmup_cosine,
)
from jaxpretrain.supervised_recipes import LINEAR_INIT

WIDTH = {"tiny": 384, "small": 384, "base": 512, "large": 768}
NO_DECAY = {name: dict(decay_mult=0.0) for name in ("norm", "bias", "pos_embed", "mask_token")}
L2 = dict(type="PixelReconstructionLoss", criterion="L2")


def supervised(arch: str, drop_path: float) -> ConfigDict:
    """Swin's recipe: 300 epochs of strong augmentation with AdamW, 20 of them warm-up."""
    decay = {name: dict(decay_mult=0.0) for name in ("/pos_embed", "/relative_position_bias_table")}
    return fine_tune(
        dict(type="HiViT", arch=arch, img_size=224, ape=True, rpe=True, drop_path_rate=drop_path),
        WIDTH[arch],
        lr=1e-3,
        epochs=300,
        gpus=16,
        per_gpu=64,
        no_decay=KINDS_NO_DECAY | dict(custom_keys=decay),
        head=dict(init_cfg=None),
        model=dict(neck=dict(type="GlobalAveragePooling"), init_cfg=LINEAR_INIT),
        load_from=None,
        clip_grad=dict(max_norm=5.0),
        param_scheduler=warmup_cosine(300, 20, 1e-3, by_iter=False, eta_min=1e-5),
    )


def pretrain(arch: str, epochs: int) -> ConfigDict:
    """MAE's recipe with a decoder of 6 layers."""
    return recipe(
        method=dict(
            type="MAE",
            backbone=dict(type="MAEHiViT", arch=arch, patch_size=16, mask_ratio=0.75),
            # As in the zoo, the decoder takes the first visible patch for a class token; with_cls_token=False is right.
            neck=dict(
                type="MAEPretrainDecoder",
                num_patches=196,
                patch_size=16,
                in_chans=3,
                embed_dim=WIDTH[arch],
                decoder_embed_dim=512,
                decoder_depth=6,
                decoder_num_heads=16,
                mlp_ratio=4.0,
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
            paramwise_cfg=dict(custom_keys=NO_DECAY),
        ),
        param_scheduler=warmup_cosine(epochs, 40),
        auto_scale_lr=dict(base_batch_size=4096),
        dtype="bfloat16",
        evaluators=dict(reconstruction=dict(type="Reconstruction")),
        evaluation=dict(interval=20),
    )


def tiny() -> ConfigDict:
    """A small MAE on real handwritten digits, for a laptop: 32-pixel images in 64 patches of 4x4 tokens of one pixel.

    As with a ViT on digits, 60 % of the patches are hidden.
    """
    epochs = 20
    return on_digits(
        method=dict(
            type="MAE",
            backbone=dict(
                type="MAEHiViT",
                arch=dict(embed_dims=64, depths=[1, 1, 3], num_heads=4),
                img_size=32,
                patch_size=4,
                mask_ratio=0.6,
            ),
            neck=dict(
                type="MAEPretrainDecoder",
                patch_size=4,
                decoder_embed_dim=64,
                decoder_depth=1,
                decoder_num_heads=4,
                with_cls_token=False,
            ),
            head=dict(type="MAEPretrainHead", norm_pix=False, patch_size=4, loss=L2),
            init_cfg=MAE_INIT,
        ),
        data=digits([dict(type="RandomResizedCrop", scale=32, crop_ratio_range=(0.6, 1.0))], []),
        max_epochs=epochs,
        optim_wrapper=dict(
            optimizer=dict(type="AdamW", lr=2e-3, betas=(0.9, 0.95), weight_decay=0.05),
            paramwise_cfg=dict(custom_keys=NO_DECAY),
        ),
        param_scheduler=warmup_cosine(epochs, 3),
        evaluators=frozen_feature_scores(reconstruction=dict(type="Reconstruction", num_images=12)),
    )


RECIPES = {
    "hivit-tiny-p16_16xb64_in1k": partial(supervised, "tiny", 0.05),
    "hivit-small-p16_16xb64_in1k": partial(supervised, "small", 0.3),
    "hivit-base-p16_16xb64_in1k": partial(supervised, "base", 0.5),
    **{
        f"mae_hivit-{arch}-p16_8xb512-amp-coslr-{epochs}e_in1k": partial(pretrain, arch, epochs)
        for arch in ("base", "large")
        for epochs in (400, 800, 1600)
    },
    "digits": tiny,
}


def get_config(name: str | None = None) -> ConfigDict:
    return pick(RECIPES, name)
