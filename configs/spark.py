"""SparK: Designing BERT for Convolutional Networks: Sparse and Hierarchical Masked Modeling (Tian et al., 2023).

Measured here: `digits`, on 2 CPU cores. The others have not been run by us; published by MMPretrain: top-1 on ImageNet-1k
after fine-tuning for 300 epochs.

| recipe | command | hardware | wall time | metric |
|---|---|---|---|---|
| digits | `--config=configs/spark.py:digits` | 2 CPU cores | 6.0 CPU min | probe 96.0, trained 93.3; kNN 92.6, 91.9 |
| spark_sparse-resnet50_800e_in1k | `--config=configs/spark.py` | 8 GPUs | | 80.1 |
| spark_sparse-resnet50_8xb512-amp-coslr-1600e_in1k | `--config=configs/spark.py:NAME` | 8 GPUs | | - |
| spark_sparse-convnext-small_16xb256-amp-coslr-800e_in1k | | 16 GPUs | | - |
| spark_sparse-convnextv2-tiny_800e_in1k | | 16 GPUs | | 82.8 |

and, on its encoders (`--config.load_from.path=RUN`): resnet50_spark-pre_300e_in1k, convnextv2-tiny_spark-pre_300e_in1k.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from ml_collections import ConfigDict

from jaxpretrain.config import pick
from jaxpretrain.followers import ENCODER, encoder, fine_tune
from jaxpretrain.recipes import (
    FLIP,
    KINDS_NO_DECAY,
    NO_DECAY,
    digits,
    frozen_feature_scores,
    imagenet,
    on_digits,
    recipe,
    warmup_cosine,
)
from jaxpretrain.supervised_recipes import classic, resized, smoothing

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


def trivially_augmented(edge: int) -> dict[str, Any]:
    """`data` of fine-tuning, with TrivialAugment; evaluation on the middle of images whose short edge is `edge`."""
    data = resized(edge)
    pipeline = data["train"]["pipeline"]
    place = [step["type"] for step in pipeline].index("RandAugment")
    pipeline[place] = dict(type="torchvision/TrivialAugmentWide", num_magnitude_bins=31, interpolation="bicubic")
    return data


def fine_tune_resnet() -> ConfigDict:
    """300 epochs of LAMB at a batch of 2,048, with a binary loss of each class."""
    return classic(
        dict(
            type="ResNet",
            depth=50,
            num_stages=4,
            out_indices=(3,),
            style="pytorch",
            norm_cfg=dict(type="SyncBN", requires_grad=True),
            drop_path_rate=0.05,
        ),
        2048,
        per_gpu=256,
        epochs=300,
        optimizer=dict(type="Lamb", lr=0.016, weight_decay=0.02),
        schedule=warmup_cosine(300, 5, by_iter=False, eta_min=1e-6),
        no_decay=KINDS_NO_DECAY | dict(layer_decay_rate=0.7),
        loss=smoothing(loss_weight=1.0, use_sigmoid=True),
        augments=[dict(type="Mixup", alpha=0.1), dict(type="CutMix", alpha=1.0)],
        data=trivially_augmented(236),
        load_from=ENCODER,
    )


def fine_tune_convnext() -> ConfigDict:
    """300 epochs of AdamW at a batch of 2,048, with averaged weights; each image three times in an epoch of a third of them."""
    data = trivially_augmented(256)
    data["train"]["sampler"] = dict(type="RepeatAugSampler")
    return fine_tune(
        dict(type="ConvNeXt", arch="tiny", drop_path_rate=0.1, **V2),
        768,
        lr=3.2e-3,
        epochs=300,
        per_gpu=256,
        layer_decay=0.7,
        no_decay=KINDS_NO_DECAY,
        head=dict(init_cfg=dict(type="TruncNormal", layer="Linear", std=0.02, bias=0.0)),
        load_from=encoder(fresh=[r"^backbone\.norm3\."]),  # SparK's norms are outside the encoder
        data=data,
        ema=dict(momentum=1e-4),
        param_scheduler=warmup_cosine(300, 20, by_iter=False, eta_min=1e-5),
        auto_scale_lr=dict(base_batch_size=2048),
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
    "resnet50_spark-pre_300e_in1k": fine_tune_resnet,
    "convnextv2-tiny_spark-pre_300e_in1k": fine_tune_convnext,
    "digits": tiny,
}


def get_config(name: str | None = None) -> ConfigDict:
    return pick(RECIPES, name)
