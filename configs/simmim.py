"""SimMIM: A Simple Framework for Masked Image Modeling (Xie et al., 2021).

Measured here: `digits`, on 2 CPU cores. The others have not been run by us; published by MMPretrain: top-1 on ImageNet-1k
after fine-tuning, at 192 / 224 px.

| recipe | command | hardware | wall time | metric |
|---|---|---|---|---|
| digits | `--config=configs/simmim.py:digits` | 2 CPU cores | 2.6 CPU min | probe 78.8, trained 86.5; kNN 55.2, 67.0 |
| simmim_swin-base-w6_8xb256-amp-coslr-100e_in1k-192px | `--config=configs/simmim.py` | 8 GPUs | | 82.7 / 83.5 |
| simmim_swin-base-w6_16xb128-amp-coslr-100e_in1k-192px | `--config=configs/simmim.py:NAME` | 16 GPUs | | 82.7 / 83.5 |
| simmim_swin-base-w6_16xb128-amp-coslr-800e_in1k-192px | | 16 GPUs | | 83.8 / - |
| simmim_swin-large-w12_16xb128-amp-coslr-800e_in1k-192px | | 16 GPUs | | - / 84.8 |
| swin-base-w6_simmim-100e-pre_8xb256-coslr-100e_in1k-192px | | 8 GPUs | | 82.7 |
| swin-base-w7_simmim-100e-pre_8xb256-coslr-100e_in1k | | 8 GPUs | | 83.5 |
| swin-base-w6_simmim-800e-pre_8xb256-coslr-100e_in1k-192px | | 8 GPUs | | 83.8 |
| swin-large-w14_simmim-800e-pre_8xb256-coslr-100e_in1k | | 8 GPUs | | 84.8 |

The last recipes start from an encoder of the first: `--config.load_from.path=RUN`.
"""

from __future__ import annotations

from functools import partial

from ml_collections import ConfigDict

from jaxpretrain.config import pick
from jaxpretrain.followers import MASKED_ENCODER, SWIN_NO_DECAY, fine_tune, strong_augmentation
from jaxpretrain.recipes import (
    FLIP,
    digits,
    frozen_feature_scores,
    imagenet,
    on_digits,
    recipe,
    warmup_cosine,
)
from jaxpretrain.supervised_recipes import LINEAR_INIT

NO_DECAY = {
    name: dict(decay_mult=0.0) for name in ("norm", "bias", "absolute_pos_embed", "relative_position_bias_table")
}
L1 = dict(type="PixelReconstructionLoss", criterion="L1", channel=3)


def pretrain(arch: str, window_size: int, epochs: int) -> ConfigDict:
    """The paper's recipe: 192 px, squares of 32 px hidden, AdamW, 10 epochs of warm-up.

    100 epochs decay by a cosine, to 4e-5. 800 epochs have half the rate, keep it, and divide it by 10 at epoch 700.
    (MMPretrain's files for these say 256 images per GPU, their names 16 GPUs of 128: the batch is 2,048 throughout.)
    """
    long = epochs == 800
    schedule = warmup_cosine(epochs, 10, 5e-3, eta_min=4e-5)
    if long:
        steps = dict(type="MultiStepLR", milestones=[700], by_epoch=True, begin=10, end=800)
        schedule[1] = dict(steps, convert_to_iter_based=True)
    large = dict(pad_small_map=True) if arch == "large" else {}
    return recipe(
        method=dict(
            type="SimMIM",
            backbone=dict(
                type="SimMIMSwinTransformer",
                arch=arch,
                img_size=192,
                stage_cfgs=dict(block_cfgs=dict(window_size=window_size)),
                **large,
            ),
            neck=dict(type="SimMIMLinearDecoder", in_channels=1536 if arch == "large" else 1024, encoder_stride=32),
            head=dict(type="SimMIMHead", patch_size=4, loss=L1),
        ),
        data=imagenet(
            [
                dict(type="RandomResizedCrop", scale=192, crop_ratio_range=(0.67, 1.0)),
                dict(
                    type="SimMIMMaskGenerator", input_size=192, mask_patch_size=32, model_patch_size=4, mask_ratio=0.6
                ),
            ],
            [FLIP],
            resize=dict(type="ResizeEdge", scale=219, edge="short", backend="pillow", interpolation="bicubic"),
            crop=192,
        ),
        batch_size=2048,
        max_epochs=epochs,
        optim_wrapper=dict(
            optimizer=dict(type="AdamW", lr=4e-4 if long else 8e-4, betas=(0.9, 0.999), weight_decay=0.05),
            clip_grad=dict(max_norm=5.0),
            paramwise_cfg=dict(custom_keys=NO_DECAY),
        ),
        param_scheduler=schedule,
        auto_scale_lr=dict(base_batch_size=2048),
        dtype="bfloat16",
        evaluators=dict(reconstruction=dict(type="Reconstruction")),
        evaluation=dict(interval=20),
    )


def tiny() -> ConfigDict:
    """A tiny Swin on real handwritten digits, for a laptop: 32-pixel images in 4-pixel patches, two stages of 2 layers.

    Windows are of 4x4 patches. Hidden squares are of 8 pixels, the encoder's stride: 2x2 of a digit's original pixels.
    """
    epochs = 20
    return on_digits(
        method=dict(
            type="SimMIM",
            backbone=dict(
                type="SimMIMSwinTransformer",
                arch=dict(embed_dims=48, depths=[2, 2], num_heads=[3, 6]),
                img_size=32,
                drop_path_rate=0.0,
                out_indices=(1,),
                stage_cfgs=dict(block_cfgs=dict(window_size=4)),
            ),
            neck=dict(type="SimMIMLinearDecoder", in_channels=96, encoder_stride=8),
            head=dict(type="SimMIMHead", patch_size=4, loss=L1),
        ),
        data=digits(
            [
                dict(type="RandomResizedCrop", scale=32, crop_ratio_range=(0.67, 1.0)),
                dict(type="SimMIMMaskGenerator", input_size=32, mask_patch_size=8, model_patch_size=4, mask_ratio=0.6),
            ],
            [],
        ),
        max_epochs=epochs,
        optim_wrapper=dict(
            optimizer=dict(type="AdamW", lr=2e-3, betas=(0.9, 0.999), weight_decay=0.05),
            clip_grad=dict(max_norm=5.0),
            paramwise_cfg=dict(custom_keys=NO_DECAY),
        ),
        param_scheduler=warmup_cosine(epochs, 3),
        evaluators=frozen_feature_scores(reconstruction=dict(type="Reconstruction", num_images=12)),
    )


def fine_tune_swin(
    arch: str, size: int, window: int, *, layer_decay: float = 0.9, drop_path: float = 0.1, T_max: int = 80
) -> ConfigDict:
    """All layers, each at `layer_decay` times the rate of the next; at 224 px, biases of the small windows are resized."""
    backbone = dict(
        type="SwinTransformer",
        arch=arch,
        img_size=size,
        drop_path_rate=drop_path,
        stage_cfgs=dict(block_cfgs=dict(window_size=window)),
    )
    if arch == "large":
        backbone["pad_small_map"] = True
    keys = {"/norm": dict(decay_mult=0.0), "/bias": dict(decay_mult=0.0)} | SWIN_NO_DECAY
    return fine_tune(
        backbone,
        1536 if arch == "large" else 1024,
        lr=5e-3,
        epochs=100,
        per_gpu=256,
        layer_decay=layer_decay,
        no_decay=dict(custom_keys=keys),
        head=dict(init_cfg=None),
        model=dict(neck=dict(type="GlobalAveragePooling"), init_cfg=LINEAR_INIT),
        load_from=MASKED_ENCODER,
        clip_grad=dict(max_norm=5.0),
        data=strong_augmentation(size),
        param_scheduler=warmup_cosine(100, 20, 2e-4, eta_min=1e-6, T_max=T_max),
        auto_scale_lr=dict(base_batch_size=None),
        dtype="bfloat16",
    )


RECIPES = {
    "simmim_swin-base-w6_8xb256-amp-coslr-100e_in1k-192px": partial(pretrain, "base", 6, 100),
    "simmim_swin-base-w6_16xb128-amp-coslr-100e_in1k-192px": partial(pretrain, "base", 6, 100),
    "simmim_swin-base-w6_16xb128-amp-coslr-800e_in1k-192px": partial(pretrain, "base", 6, 800),
    "simmim_swin-large-w12_16xb128-amp-coslr-800e_in1k-192px": partial(pretrain, "large", 12, 800),
    "swin-base-w6_simmim-100e-pre_8xb256-coslr-100e_in1k-192px": partial(fine_tune_swin, "base", 192, 6),
    "swin-base-w7_simmim-100e-pre_8xb256-coslr-100e_in1k": partial(fine_tune_swin, "base", 224, 7),
    # Its name says 192 px; the zoo made it by the recipe for 224.
    "swin-base-w6_simmim-800e-pre_8xb256-coslr-100e_in1k-192px": partial(fine_tune_swin, "base", 224, 7),
    "swin-large-w14_simmim-800e-pre_8xb256-coslr-100e_in1k": partial(
        fine_tune_swin, "large", 224, 14, layer_decay=0.7, drop_path=0.2, T_max=100
    ),
    "digits": tiny,
}


def get_config(name: str | None = None) -> ConfigDict:
    return pick(RECIPES, name)
