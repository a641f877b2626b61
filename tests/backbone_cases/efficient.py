"""EfficientNet and its like, and the transformers made for speed."""

from __future__ import annotations

from tests.backbone_cases.base import Backbone

SMALL = dict(layers=[1, 2], embed_dims=[8, 16], mlp_ratios=[2, 2], layer_scale_init_value=1.0)
V1 = dict(stem=8, groups=[(1, 3, 8, 1, 1), (2, 3, 16, 2, 2), (1, 5, 16, 1, 2)], last=16, se_ratio=0.25)
V2 = dict(
    stem_channels=8,
    stages=[("conv", 2, 1, 1, 8), ("fused", 2, 2, 2, 8), ("mb", 2, 2, 2, 8)],
    out_channels=16,
)
EFFICIENTFORMER = dict(layers=[1, 2], embed_dims=[16, 16], downsamples=[False, True], vit_num=1)
LEVIT = dict(embed_dims=[32, 48], num_heads=[2, 3], depths=[1, 1], key_dims=[8, 8])
TINYVIT = dict(channels=[8, 16, 16], num_heads=[1, 2, 2], depths=[1, 1, 1])
CASES = dict(
    EfficientNet=Backbone(
        dict(type="EfficientNet", arch=V1, out_indices=(3,)),
        golden=("efficientnet-b0_3rdparty_8xb32_in1k",),
        out_indices=(1, 3),
        frozen_stages=2,
        other_size=47,
    ),
    EfficientNetV2=Backbone(
        dict(type="EfficientNetV2", arch=V2),
        golden=("efficientnetv2-b0_3rdparty_in1k",),
        out_indices=(1, 4),
        frozen_stages=2,
        other_size=47,
    ),
    EfficientFormer=Backbone(
        dict(type="EfficientFormer", arch=EFFICIENTFORMER),
        golden=("efficientformer-l1_3rdparty_8xb128_in1k",),
        size=56,
        other_size=None,
        out_indices=(0, 1),
        frozen_stages=1,
        channels_first=True,
    ),
    LeViT=Backbone(
        dict(type="LeViT", arch=LEVIT, img_size=64),
        golden=("levit-128s_3rdparty_in1k",),
        size=64,
        other_size=None,
        out_indices=(0, 1),
    ),
    TinyViT=Backbone(
        dict(type="TinyViT", arch=TINYVIT, img_size=(32, 32), window_size=[4, 4, 2], drop_path_rate=0.0),
        golden=("tinyvit-5m_3rdparty_in1k",),
        other_size=36,
        out_indices=(0, 2),
        frozen_stages=1,
    ),
    PoolFormer=Backbone(
        dict(type="PoolFormer", arch=SMALL, frozen_stages=-1),
        golden=("poolformer-s12_3rdparty_32xb128_in1k",),
        out_indices=(0, 2),
        frozen_stages=1,
    ),
    RIFormer=Backbone(
        dict(type="RIFormer", arch=SMALL),
        golden=("riformer-s12_in1k",),
        out_indices=(0, 2),
        frozen_stages=1,
    ),
)
