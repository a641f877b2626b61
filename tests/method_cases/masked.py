"""Masked image modelling on pixels and on gradients: SimMIM, MaskFeat, MFF."""

from __future__ import annotations

from typing import Any

from tests.method_cases.base import ONE_LAYER, SIZE, VIT, Case

L1, L2 = (dict(type="PixelReconstructionLoss", criterion=criterion) for criterion in ("L1", "L2"))

CONFIGS: dict[str, dict[str, Any]] = dict(
    simmim=dict(
        type="SimMIM",
        backbone=dict(
            type="SimMIMSwinTransformer",
            arch=dict(embed_dims=8, depths=[1, 2], num_heads=[2, 2]),
            img_size=SIZE,
            drop_path_rate=0.0,
            out_indices=(1,),
            stage_cfgs=dict(block_cfgs=dict(window_size=2)),
            patch_cfg=dict(kernel_size=2, stride=2),
        ),
        neck=dict(type="SimMIMLinearDecoder", in_channels=16, encoder_stride=4),
        head=dict(type="SimMIMHead", patch_size=2, loss=L1 | dict(channel=3)),
    ),
    maskfeat=dict(
        type="MaskFeat",
        backbone=dict(type="MaskFeatViT", **ONE_LAYER),
        neck=dict(type="LinearNeck", in_channels=16, out_channels=108, norm_cfg=None),
        head=dict(type="MIMHead", loss=L2),
        target_generator=dict(type="HOGGenerator", pool=2, gaussian_window=4),
    ),
    mff=dict(
        type="MFF",
        backbone=dict(type="MFFViT", **VIT, out_indices=(0, 1)),
        neck=dict(type="MAEPretrainDecoder", patch_size=4, decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2),
        head=dict(type="MAEPretrainHead", norm_pix=True, patch_size=4, loss=L2),
    ),
)

CASES: dict[str, Case] = dict(
    simmim=Case(CONFIGS["simmim"], views=SIZE, mask=(8, 8, 38), learning_rate=1e-2, bfloat16=0.02),
    maskfeat=Case(CONFIGS["maskfeat"], views=SIZE, mask=(4, 4, 6), bfloat16=0.02),
    mff=Case(CONFIGS["mff"], views=SIZE, logged={"feature_std", "weight_0", "weight_1"}, bfloat16=0.02),
)
