"""SparK: Designing BERT for Convolutional Networks: Sparse and Hierarchical Masked Modeling (Tian et al., 2023).

`digits` is not measured yet; it is meant for 2 CPU cores. The others have not been run by us; published by MMPretrain: top-1
on ImageNet-1k after fine-tuning for 300 epochs.

| recipe | command | hardware | wall time | metric |
|---|---|---|---|---|
| digits | `--config=configs/spark.py:digits` | 2 CPU cores | | not measured yet |
| spark_sparse-resnet50_800e_in1k | `--config=configs/spark.py` | 8 GPUs | | 80.1 |
| spark_sparse-resnet50_8xb512-amp-coslr-1600e_in1k | `--config=configs/spark.py:NAME` | 8 GPUs | | - |
| spark_sparse-convnext-small_16xb256-amp-coslr-800e_in1k | | 16 GPUs | | - |
| spark_sparse-convnextv2-tiny_800e_in1k | | 16 GPUs | | 82.8 |
"""

from __future__ import annotations

from functools import partial
from typing import Any

from ml_collections import ConfigDict

from jaxpretrain.config import pick
from jaxpretrain.recipes import (
    FLIP,
    NO_DECAY,
    digits,
    frozen_feature_scores,
    imagenet,
    on_digits,
    recipe,
    warmup_cosine,
)

L2 = dict(type="PixelReconstructionLoss", criterion="L2")
SYNC_BN = dict(type="SparseSyncBatchNorm2d")
LAYER_NORM = dict(type="SparseLN2d", eps=1e-6)
RESNET50 = dict(type="SparseResNet", depth=50, out_indices=(0, 1, 2, 3), drop_path_rate=0.05)
CONVNEXT = dict(type="SparseConvNeXt", drop_path_rate=0.2, out_indices=(0, 1, 2, 3), gap_before_output=False)
V2 = dict(layer_scale_init_value=0.0, use_grn=True)
# Weight decay is for kernels only.
PARAMETERS = dict(bias_decay_mult=0.0, flat_decay_mult=0.0, custom_keys={"mask_token": NO_DECAY})


def pretrain(backbone: dict[str, Any], norm: dict[str, Any], width: int, epochs: int, warmup: int = 40) -> ConfigDict:
    """The paper's recipe: batch 4,096, LAMB, crops and flips only, a weight decay that grows from 0.04 to 0.2.

    Args:
        backbone: the encoder.
        norm: of the maps that go to the decoder.
        width: channels of the last map.
        epochs, warmup: how long.
    """
    decay = dict(type="CosineAnnealingWeightDecay", eta_min=0.2, T_max=epochs, by_epoch=True, begin=0, end=epochs)
    crop = dict(type="RandomResizedCrop", scale=224, crop_ratio_range=(0.2, 1.0), backend="pillow")
    return recipe(
        method=dict(
            type="SparK",
            input_size=224,
            downsample_raito=32,
            mask_ratio=0.6,
            enc_dec_norm_cfg=norm,
            enc_dec_norm_dim=width,
            backbone=backbone,
            neck=dict(type="SparKLightDecoder", feature_dim=512, upsample_ratio=32, mid_channels=0, last_act=False),
            head=dict(type="SparKPretrainHead", loss=L2),
        ),
        data=imagenet([dict(crop, interpolation="bicubic")], [FLIP]),
        batch_size=4096,
        max_epochs=epochs,
        optim_wrapper=dict(
            optimizer=dict(type="Lamb", lr=1.6e-3, betas=(0.9, 0.95), weight_decay=0.04),
            clip_grad=dict(max_norm=5.0),
            paramwise_cfg=PARAMETERS,
        ),
        param_scheduler=[*warmup_cosine(epochs, warmup), dict(decay, convert_to_iter_based=True)],
        dtype="bfloat16",
        evaluators=dict(reconstruction=dict(type="Reconstruction")),
        evaluation=dict(interval=20),
    )


def tiny() -> ConfigDict:
    """Two stages of a narrow ResNet-18 on real handwritten digits, for a laptop: 32-pixel images in 4x4 patches.

    A patch is 2x2 of a digit's original pixels. Many are blank, so targets are not normalised.
    """
    epochs = 20
    return on_digits(
        method=dict(
            type="SparK",
            downsample_raito=8,
            enc_dec_norm_cfg=SYNC_BN,
            enc_dec_norm_dim=64,
            backbone=dict(
                type="SparseResNet",
                depth=18,
                num_stages=2,
                strides=(1, 2),
                dilations=(1, 1),
                out_indices=(0, 1),
                stem_channels=32,
                base_channels=32,
            ),
            neck=dict(type="SparKLightDecoder", feature_dim=64, upsample_ratio=8),
            head=dict(type="SparKPretrainHead", norm_pix=False, patch_size=8, loss=L2),
        ),
        data=digits([dict(type="RandomResizedCrop", scale=32, crop_ratio_range=(0.6, 1.0))], []),
        max_epochs=epochs,
        optim_wrapper=dict(
            optimizer=dict(type="AdamW", lr=2e-3, betas=(0.9, 0.95), weight_decay=0.05), paramwise_cfg=PARAMETERS
        ),
        param_scheduler=warmup_cosine(epochs, 3),
        evaluators=frozen_feature_scores(reconstruction=dict(type="Reconstruction", num_images=12)),
    )


RECIPES = {
    "spark_sparse-resnet50_800e_in1k": partial(pretrain, RESNET50, SYNC_BN, 2048, 800),
    "spark_sparse-resnet50_8xb512-amp-coslr-1600e_in1k": partial(pretrain, RESNET50, SYNC_BN, 2048, 1600),
    "spark_sparse-convnext-small_16xb256-amp-coslr-800e_in1k": partial(
        pretrain, CONVNEXT | dict(arch="small"), LAYER_NORM, 768, 800
    ),
    "spark_sparse-convnextv2-tiny_800e_in1k": partial(
        pretrain, CONVNEXT | dict(arch="tiny") | V2, LAYER_NORM, 768, 800, warmup=20
    ),
    "digits": tiny,
}


def get_config(name: str | None = None) -> ConfigDict:
    return pick(RECIPES, name)
