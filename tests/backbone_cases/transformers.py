"""Vision transformers and Swin."""

from __future__ import annotations

from tests.backbone_cases.base import Backbone

ARCH = dict(embed_dims=16, num_layers=2, num_heads=2, feedforward_channels=32)
VIT = dict(arch=ARCH, img_size=16, patch_size=4)
PLAIN = dict(size=16, other_size=24, out_indices=(0, 1), frozen_stages=1)
WINDOWS = dict(arch=dict(embed_dims=8, depths=[2, 1], num_heads=[2, 2]), img_size=32, out_indices=(1,))
SWIN_V2 = dict(
    type="SwinTransformerV2",
    arch=WINDOWS["arch"] | dict(extra_norm_every_n_blocks=0),
    window_size=4,
    pretrained_window_sizes=[0, 0],
    img_size=32,
    out_indices=(1,),
)
CASES = dict(
    VisionTransformer=Backbone(dict(type="VisionTransformer", **VIT), **PLAIN),
    DeiT3=Backbone(dict(type="DeiT3", **VIT), untouched="ln2", **PLAIN),  # unused by default, as in MMPretrain
    DistilledVisionTransformer=Backbone(dict(type="DistilledVisionTransformer", **VIT), **PLAIN),
    BEiTViT=Backbone(dict(type="BEiTViT", **VIT), **PLAIN),
    ViTEVA02=Backbone(dict(type="ViTEVA02", **VIT), **PLAIN),
    SwinTransformer=Backbone(
        dict(type="SwinTransformer", window_size=4, **WINDOWS), size=32, out_indices=(0, 1), frozen_stages=0
    ),
    SwinTransformerV2=Backbone(SWIN_V2, out_indices=(0, 1), frozen_stages=0),
)
