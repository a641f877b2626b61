"""MFF: Improving Pixel-based MIM by Reducing Wasted Modeling Capability (Liu et al., 2023).

Measured here: `digits`, on 2 CPU cores. The others have not been run by us; published by MMPretrain: top-1 on ImageNet-1k
after fine-tuning / with a linear probe.

| recipe | command | hardware | wall time | metric |
|---|---|---|---|---|
| digits | `--config=configs/mff.py:digits` | 2 CPU cores | 3.7 CPU min | probe 95.3, trained 97.0; kNN 72.4, 87.5 |
| mff_vit-base-p16_8xb512-amp-coslr-300e_in1k | `--config=configs/mff.py` | 8 GPUs | | 83.0 / 64.2 |
| mff_vit-base-p16_8xb512-amp-coslr-800e_in1k | `--config=configs/mff.py:NAME` | 8 GPUs | | 83.7 / 68.3 |
| vit-base-p16_mff-300e-pre_8xb128-coslr-100e_in1k | | 8 GPUs | | 83.0 |
| vit-base-p16_mff-800e-pre_8xb128-coslr-100e_in1k | | 8 GPUs | | 83.7 |
| vit-base-p16_mff-300e-pre_8xb2048-linear-coslr-90e_in1k | | 8 GPUs | | 64.2 (linear probe) |
| vit-base-p16_mff-800e-pre_8xb2048-linear-coslr-90e_in1k | | 8 GPUs | | 68.3 (linear probe) |

The last recipes start from an encoder of the first: `--config.load_from.path=RUN`.
"""

from __future__ import annotations

from functools import partial

from ml_collections import ConfigDict

from jaxpretrain.config import pick
from jaxpretrain.followers import encoder, fine_tune_vit, probe_vit
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


def pretrain(epochs: int, start_factor: float = 1e-4) -> ConfigDict:
    """MAE's recipe, with the weaker crops of the paper: the whole short edge, shifted by up to 4 pixels."""
    return recipe(
        method=dict(
            type="MFF",
            backbone=dict(type="MFFViT", arch="b", patch_size=16, mask_ratio=0.75, out_indices=(0, 2, 4, 6, 8, 11)),
            neck=dict(
                type="MAEPretrainDecoder",
                patch_size=16,
                in_chans=3,
                embed_dim=768,
                decoder_embed_dim=512,
                decoder_depth=8,
                decoder_num_heads=16,
                mlp_ratio=4.0,
            ),
            head=dict(
                type="MAEPretrainHead",
                norm_pix=True,
                patch_size=16,
                loss=dict(type="PixelReconstructionLoss", criterion="L2"),
            ),
            init_cfg=MAE_INIT,
        ),
        data=imagenet(
            [
                dict(type="ResizeEdge", scale=224, edge="short", backend="pillow"),
                dict(type="torchvision/RandomCrop", size=224, padding=4, padding_mode="reflect"),
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
        seed=2,
        evaluators=dict(reconstruction=dict(type="Reconstruction")),
        evaluation=dict(interval=20),
    )


def tiny() -> ConfigDict:
    """A small MFF on real handwritten digits, for a laptop: 32-pixel images in 4-pixel patches, 3 layers of 64 units.

    A digit has 64 patches, of one original pixel each, so 60 % are masked and not 75 %. All 3 layers are fused.
    """
    epochs = 40
    return on_digits(
        method=dict(
            type="MFF",
            backbone=dict(
                type="MFFViT",
                arch=dict(embed_dims=64, num_layers=3, num_heads=4, feedforward_channels=256),
                img_size=32,
                patch_size=4,
                mask_ratio=0.6,
                out_indices=(0, 1, 2),
            ),
            neck=dict(
                type="MAEPretrainDecoder", patch_size=4, decoder_embed_dim=64, decoder_depth=1, decoder_num_heads=4
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
        param_scheduler=warmup_cosine(epochs, 3),
        evaluators=frozen_feature_scores(reconstruction=dict(type="Reconstruction", num_images=12)),
    )


# The fusion of layers stays behind.
FUSION = (r"^backbone\.(mask_token$|proj_)",)


def fine_tune() -> ConfigDict:
    load_from = encoder(drop=[*FUSION, r"^backbone\.ln1\."], fresh=[r"^backbone\.ln2\."])
    return fine_tune_vit("base", lr=2e-3, load_from=load_from)


def probe() -> ConfigDict:
    """MAE's probe, on crops that are drawn once."""
    crop = dict(type="MAERandomResizedCrop", size=224, interpolation=3)
    resize = dict(type="ResizeEdge", scale=256, edge="short", backend="pillow")
    return probe_vit("base", 6.4, 90, load_from=encoder(drop=FUSION), data=imagenet([crop], [FLIP], resize=resize))


RECIPES = {
    "mff_vit-base-p16_8xb512-amp-coslr-300e_in1k": partial(pretrain, 300),
    "mff_vit-base-p16_8xb512-amp-coslr-800e_in1k": partial(pretrain, 800, start_factor=1e-9),
    **{f"vit-base-p16_mff-{n}e-pre_8xb128-coslr-100e_in1k": fine_tune for n in (300, 800)},
    **{f"vit-base-p16_mff-{n}e-pre_8xb2048-linear-coslr-90e_in1k": probe for n in (300, 800)},
    "digits": tiny,
}


def get_config(name: str | None = None) -> ConfigDict:
    return pick(RECIPES, name)
