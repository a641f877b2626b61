"""Masked image modelling on hierarchical transformers: MAE on HiViT, iTPN, MixMIM."""

from __future__ import annotations

from typing import Any

from tests.method_cases.base import ONE_LAYER, SIZE, Case

L2 = dict(type="PixelReconstructionLoss", criterion="L2")
HIVIT = dict(arch=dict(embed_dims=16, depths=[1, 1, 2], num_heads=2), img_size=SIZE, patch_size=4)
DECODER = dict(patch_size=4, decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2)
PYRAMID = dict(fpn_dim=8, fpn_depth=1, decoder_embed_dim=16)

CONFIGS: dict[str, dict[str, Any]] = dict(
    mae_hivit=dict(
        type="MAE",
        backbone=dict(type="MAEHiViT", **HIVIT),
        neck=dict(type="MAEPretrainDecoder", with_cls_token=False, **DECODER),
        head=dict(type="MAEPretrainHead", norm_pix=True, patch_size=4, loss=L2),
    ),
    itpn=dict(
        type="iTPN",
        backbone=dict(type="iTPNHiViT", **HIVIT),
        neck=dict(type="iTPNPretrainDecoder", **DECODER | PYRAMID),
        head=dict(type="MAEPretrainHead", norm_pix=True, patch_size=4, loss=L2),
    ),
    itpn_clip=dict(
        type="iTPN",
        backbone=dict(type="iTPNHiViT", reconstruction_type="clip", rpe=True, layer_scale_init_value=0.1, **HIVIT),
        neck=dict(type="iTPNPretrainDecoder", **PYRAMID),
        head=dict(type="iTPNClipHead", embed_dims=16, num_embed=12, loss=dict(type="CrossEntropyLoss")),
        target_generator=dict(type="CLIPGenerator", stand_in=True, out_dims=12, **ONE_LAYER),
    ),
    mixmim=dict(
        type="MixMIM",
        backbone=dict(
            type="MixMIMPretrainTransformer",
            arch=dict(embed_dims=8, depths=[1, 2], num_heads=[2, 2]),
            img_size=SIZE,
            patch_size=2,
            window_size=[4, 4],
        ),
        neck=dict(type="MixMIMPretrainDecoder", decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2),
        head=dict(type="MixMIMPretrainHead", norm_pix=True, loss=L2),
    ),
)

CASES: dict[str, Case] = dict(
    mae_hivit=Case(CONFIGS["mae_hivit"], views=SIZE, bfloat16=0.02),
    itpn=Case(CONFIGS["itpn"], views=SIZE, learning_rate=1e-2, bfloat16=0.02),
    # Targets that are no probabilities: this loss has no lower bound.
    itpn_clip=Case(CONFIGS["itpn_clip"], mask=(4, 4, 6), bfloat16=0.05),
    mixmim=Case(CONFIGS["mixmim"], views=SIZE, bfloat16=0.02),
)
