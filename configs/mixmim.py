"""MixMIM, or MixMAE: Mixed and Masked Image Modeling (Liu et al., 2022).

Measured here: `digits`, on 2 CPU cores. The others have not been run by us; published by MMPretrain: top-1 on ImageNet-1k
after fine-tuning by the last recipe, which starts from `--config.load_from.path=RUN`.

| recipe | command | hardware | wall time | metric |
|---|---|---|---|---|
| digits | `--config=configs/mixmim.py:digits` | 2 CPU cores | 5.8 CPU min | probe 93.6, trained 97.3; kNN 70.4, 68.0 |
| mixmim_mixmim-base_16xb128-coslr-300e_in1k | `--config=configs/mixmim.py` | 16 GPUs | | 84.6 |
| mixmim-base_mixmim-pre_8xb128-coslr-100e_in1k | `--config=configs/mixmim.py:NAME` | 8 GPUs | | 84.6 |
| mixmim-base_8xb64_in1k | | 8 GPUs | | - |
"""

from __future__ import annotations

from functools import partial

from ml_collections import ConfigDict

from jaxpretrain.config import pick
from jaxpretrain.followers import fine_tune
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

NO_DECAY = {name: dict(decay_mult=0.0) for name in ("ln", "bias")}
L2 = dict(type="PixelReconstructionLoss", criterion="L2")
# Weight decay and step schedule of the recipe without pre-training.
STEPS = [dict(type="MultiStepLR", by_epoch=True, milestones=(30, 60, 90), gamma=0.1)]


def pretrain() -> ConfigDict:
    """The paper's recipe: half of each image is another's, in squares of 32 px; AdamW, 40 epochs of warm-up."""
    epochs = 300
    return recipe(
        method=dict(
            type="MixMIM",
            backbone=dict(
                type="MixMIMPretrainTransformer", arch="B", drop_rate=0.0, drop_path_rate=0.0, mask_ratio=0.5
            ),
            neck=dict(
                type="MixMIMPretrainDecoder",
                num_patches=49,
                encoder_stride=32,
                embed_dim=1024,
                decoder_embed_dim=512,
                decoder_depth=8,
                decoder_num_heads=16,
            ),
            head=dict(type="MixMIMPretrainHead", norm_pix=True, loss=L2),
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
        batch_size=2048,
        max_epochs=epochs,
        optim_wrapper=dict(
            optimizer=dict(type="AdamW", lr=1.2e-3, betas=(0.9, 0.95), weight_decay=0.05),
            paramwise_cfg=dict(custom_keys=NO_DECAY),
        ),
        param_scheduler=warmup_cosine(epochs, 40),
        auto_scale_lr=dict(base_batch_size=2048),
        evaluators=dict(reconstruction=dict(type="Reconstruction")),
        evaluation=dict(interval=20),
    )


def tiny() -> ConfigDict:
    """A tiny MixMIM on real handwritten digits, for a laptop: 32-pixel images in patches of 2 px, two stages of 2 layers.

    Squares of 4 pixels, one of a digit's own, are exchanged between images; windows are of 8x8 patches.
    """
    epochs = 20
    return on_digits(
        method=dict(
            type="MixMIM",
            backbone=dict(
                type="MixMIMPretrainTransformer",
                arch=dict(embed_dims=32, depths=[1, 3], num_heads=[2, 4]),
                img_size=32,
                patch_size=2,
                window_size=[8, 8],
                mask_ratio=0.5,
            ),
            neck=dict(type="MixMIMPretrainDecoder", decoder_embed_dim=64, decoder_depth=1, decoder_num_heads=4),
            head=dict(type="MixMIMPretrainHead", norm_pix=False, loss=L2),
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


BASE = partial(
    fine_tune,
    dict(type="MixMIMTransformer", arch="B", drop_rate=0.0, drop_path_rate=0.1),
    1024,
    epochs=100,
    head=dict(init_cfg=None),
    model=dict(init_cfg=LINEAR_INIT),
)


def fine_tuned() -> ConfigDict:
    """All layers, each at 0.7 times the rate of the next."""
    return BASE(
        lr=2e-3,
        layer_decay=0.7,
        no_decay=dict(custom_keys={"/ln": dict(decay_mult=0.0), "/bias": dict(decay_mult=0.0)}),
        param_scheduler=warmup_cosine(100, 5, 1e-6, eta_min=1e-6),
        auto_scale_lr=dict(base_batch_size=None),
    )


def from_scratch() -> ConfigDict:
    """MMPretrain's recipe without pre-training: SGD, as of ResNet."""
    config = BASE(lr=0.1, per_gpu=64, load_from=None, param_scheduler=STEPS, auto_scale_lr=dict(base_batch_size=256))
    with config.unlocked():
        config.optim_wrapper.optimizer = dict(type="SGD", lr=0.1, momentum=0.9, weight_decay=1e-4)
        config.optim_wrapper.paramwise_cfg = None
    return config


RECIPES = {
    "mixmim_mixmim-base_16xb128-coslr-300e_in1k": pretrain,
    "mixmim-base_mixmim-pre_8xb128-coslr-100e_in1k": fine_tuned,
    "mixmim-base_8xb64_in1k": from_scratch,
    "digits": tiny,
}


def get_config(name: str | None = None) -> ConfigDict:
    return pick(RECIPES, name)
