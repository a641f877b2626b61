"""Backbones of large convolutions, and others that mix patches without self-attention."""

from __future__ import annotations

from tests.backbone_cases.base import Backbone

CONVNEXT = dict(arch=dict(depths=[1, 1], channels=[8, 16]))
DW, GF = dict(type="DW", kernel_size=3), dict(type="GF", h=2, w=2)
HORNET = dict(base_dim=16, depths=[1, 1, 1, 1], orders=[2, 2, 3, 3], dw_cfg=[DW, DW, GF, GF])
MIXER = dict(embed_dims=16, num_layers=2, tokens_mlp_dims=8, channels_mlp_dims=32)
XCIT = dict(type="XCiT", img_size=32, patch_size=8, embed_dims=16, depth=2, cls_attn_layers=2, num_heads=2)
CASES = dict(
    ConvNeXt=Backbone(
        dict(type="ConvNeXt", **CONVNEXT),
        golden=("convnext-tiny_32xb128_in1k", "convnext-v2-atto_fcmae-pre_3rdparty_in1k"),
        out_indices=(0, 1),
        frozen_stages=1,
    ),
    ConvNeXtV2=Backbone(
        dict(type="ConvNeXt", use_grn=True, layer_scale_init_value=0.0, linear_pw_conv=False, **CONVNEXT),
        out_indices=(0, 1),
        frozen_stages=1,
    ),
    ConvMixer=Backbone(
        dict(type="ConvMixer", arch=dict(embed_dims=16, depth=2, patch_size=4, kernel_size=3)),
        golden=("convmixer-768-32_3rdparty_in1k",),
        out_indices=(0, 1),
        frozen_stages=1,
        drop_path_rate=None,
    ),
    HorNet=Backbone(
        dict(type="HorNet", arch=HORNET),
        golden=("hornet-tiny_3rdparty_in1k", "hornet-tiny-gf_3rdparty_in1k"),
        size=64,
        other_size=96,
        out_indices=(0, 3),
        frozen_stages=1,
    ),
    MlpMixer=Backbone(
        dict(type="MlpMixer", arch=MIXER, img_size=32, patch_size=8),
        golden=("mlp-mixer-base-p16_3rdparty_64xb64_in1k",),
        other_size=None,
        out_indices=(0, 1),
        channels_first=True,
    ),
    VAN=Backbone(
        dict(type="VAN", arch=dict(embed_dims=[8, 16], depths=[1, 1], ffn_ratios=[2, 2]), out_indices=(1,)),
        golden=("van-tiny_3rdparty_in1k",),
        out_indices=(0, 1),
        frozen_stages=0,
    ),
    XCiT=Backbone(XCIT, golden=("xcit-nano-12-p16_3rdparty_in1k",), out_indices=(2, 3), frozen_stages=1),
)
