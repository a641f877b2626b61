"""Masked image modelling by convolutional networks: SparK, FCMAE."""

from __future__ import annotations

from typing import Any

from tests.method_cases.base import SIZE, Case

L2 = dict(type="PixelReconstructionLoss", criterion="L2")
STAGES = dict(num_stages=2, strides=(1, 2), dilations=(1, 1), stem_channels=8, out_indices=(0, 1))
TINY = dict(arch=dict(depths=[1, 1], channels=[8, 16]), out_indices=(0, 1), gap_before_output=False)
V2 = dict(use_grn=True, layer_scale_init_value=0.0)


def spark(backbone: dict[str, Any], ratio: int, width: int, norm: dict[str, Any]) -> dict[str, Any]:
    """Patches of `ratio` pixels; the last map has `width` channels."""
    return dict(
        type="SparK",
        downsample_raito=ratio,
        enc_dec_norm_cfg=norm,
        enc_dec_norm_dim=width,
        backbone=backbone,
        neck=dict(type="SparKLightDecoder", feature_dim=32, upsample_ratio=ratio),
        head=dict(type="SparKPretrainHead", patch_size=ratio, loss=L2),
    )


CONFIGS: dict[str, dict[str, Any]] = dict(
    spark=spark(
        dict(type="SparseResNet", depth=18, base_channels=8, **STAGES), 8, 16, dict(type="SparseSyncBatchNorm2d")
    ),
    spark_convnext=spark(
        dict(type="SparseConvNeXt", stem_patch_size=2, **TINY, **V2), 4, 16, dict(type="SparseLN2d", eps=1e-6)
    ),
    fcmae=dict(
        type="FCMAE",
        backbone=dict(type="SparseConvNeXt", stem_patch_size=2, sparse_grn=True, **TINY | dict(out_indices=(1,)), **V2),
        neck=dict(type="FCMAEDecoder", decoder_embed_dim=16, patch_size=4),
        head=dict(type="MAEPretrainHead", norm_pix=True, patch_size=4, loss=L2),
    ),
)

CASES: dict[str, Case] = dict(
    spark=Case(CONFIGS["spark"], views=SIZE, bfloat16=0.1),
    spark_convnext=Case(CONFIGS["spark_convnext"], views=SIZE, bfloat16=0.1),
    fcmae=Case(CONFIGS["fcmae"], views=SIZE, learning_rate=1e-2, bfloat16=0.05),
)
