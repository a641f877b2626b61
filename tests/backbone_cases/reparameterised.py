"""Backbones whose branches melt into one layer for inference."""

from __future__ import annotations

from tests.backbone_cases.base import Backbone

REPVGG = dict(num_blocks=[1, 2], width_factor=[0.25, 0.25], group_layer_map={2: 2}, stem_channels=8)
VGG_STAGES = dict(type="RepVGG", base_channels=32, strides=(2, 2), dilations=(1, 1), out_indices=(1,))
SE = dict(ratio=2, divisor=1)
MOBILEONE = dict(
    num_blocks=[1, 2, 1, 1],
    width_factor=[0.125, 0.125, 0.125, 0.0625],
    num_conv_branches=[2, 1, 1, 2],
    num_se_blocks=[0, 1, 0, 1],
)
REPLK = dict(large_kernel_sizes=[9, 7], layers=[1, 1], channels=[8, 16], small_kernel=3, dw_ratio=1.5)
REPMLP = dict(channels=[8, 16], depths=[1, 2], sharesets_nums=[1, 4])
CASES = dict(
    RepVGG=Backbone(
        dict(arch=REPVGG | dict(se_cfg=None), **VGG_STAGES),
        golden=("repvgg-A0_8xb32_in1k",),
        out_indices=(0, 1),
        frozen_stages=1,
        drop_path_rate=None,
    ),
    RepVGGWithAll=Backbone(
        dict(arch=REPVGG | dict(se_cfg=SE), add_ppf=True, **VGG_STAGES | dict(dilations=(1, 2))),
        out_indices=(0, 1),
        frozen_stages=1,
        drop_path_rate=None,
    ),
    MobileOne=Backbone(
        dict(type="MobileOne", arch=MOBILEONE, se_cfg=dict(ratio=2, divisor=2)),
        golden=("mobileone-s0_8xb32_in1k",),
        size=64,
        other_size=96,
        out_indices=(1, 3),
        frozen_stages=1,
        drop_path_rate=None,
    ),
    RepLKNet=Backbone(
        dict(type="RepLKNet", arch=REPLK, strides=(2, 2), dilations=(1, 1), out_indices=(1,), drop_path_rate=0.0),
        golden=("replknet-31B_3rdparty_in1k",),
        out_indices=(0, 1),
        frozen_stages=1,
    ),
    RepMLPNet=Backbone(
        dict(type="RepMLPNet", arch=REPMLP, img_size=32, out_indices=(1,), reparam_conv_kernels=(1, 3)),
        # Its golden numbers are float64: see test_repmlp.py.
        other_size=None,
        out_indices=(0, 1),
        drop_path_rate=None,
    ),
)
