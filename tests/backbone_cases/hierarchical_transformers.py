"""Vision transformers beyond the plain one: reversible, nested, of several scales, with convolutions beside them."""

from __future__ import annotations

from tests.backbone_cases.base import Backbone

ARCH = dict(embed_dims=16, num_layers=2, num_heads=2, feedforward_channels=32)
TNT = dict(embed_dims_outer=16, embed_dims_inner=8, num_layers=2, num_heads_outer=2, num_heads_inner=2)
TWINS = dict(
    depths=[2, 1],
    embed_dims=[8, 16],
    num_heads=[2, 2],
    patch_sizes=[4, 2],
    strides=[4, 2],
    mlp_ratios=[2, 2],
    sr_ratios=[2, 1],
)
MVIT = dict(embed_dims=8, num_layers=2, num_heads=1, downscale_indices=[1])
CASES = dict(
    RevVisionTransformer=Backbone(
        dict(type="RevVisionTransformer", arch=ARCH, img_size=16, patch_size=4),
        golden=("revvit-small_3rdparty_in1k",),
        size=16,
        other_size=24,
        frozen_stages=1,
    ),
    # Its golden numbers are float64: see test_hierarchical_transformers.py.
    T2T_ViT=Backbone(
        dict(
            type="T2T_ViT",
            img_size=32,
            embed_dims=16,
            num_layers=2,
            t2t_cfg=dict(token_dims=8),
            layer_cfgs=dict(num_heads=2, feedforward_channels=32),
        ),
        other_size=48,
        out_indices=(0, 1),
    ),
    TNT=Backbone(
        dict(type="TNT", arch=TNT, img_size=32, patch_size=8),
        golden=("tnt-small-p16_3rdparty_in1k",),
        other_size=None,  # nor in MMPretrain: positions are not interpolated
    ),
    PCPVT=Backbone(
        dict(type="PCPVT", arch=TWINS, out_indices=(1,), norm_after_stage=[False, True]),
        golden=("twins-pcpvt-small_3rdparty_8xb128_in1k",),
        other_size=48,
        out_indices=(0, 1),
    ),
    SVT=Backbone(
        dict(type="SVT", arch=TWINS | dict(window_sizes=[3, 4]), out_indices=(1,), norm_after_stage=True),
        golden=("twins-svt-small_3rdparty_8xb128_in1k",),
        other_size=48,
        out_indices=(0, 1),
    ),
    MViT=Backbone(dict(type="MViT", arch=MVIT, img_size=32), golden=("mvitv2-tiny_3rdparty_in1k",)),
    Conformer=Backbone(
        dict(
            type="Conformer",
            arch=dict(embed_dims=16, channel_ratio=1, num_heads=2, depths=3),
            base_channels=16,
        ),
        golden=("conformer-tiny-p16_3rdparty_in1k",),
        size=64,
        other_size=80,
        out_indices=(2, 3),
    ),
    DaViT=Backbone(
        dict(
            type="DaViT",
            arch=dict(embed_dims=8, depths=[1, 1], num_heads=[2, 2]),
            window_size=4,
            drop_path_rate=0.0,
            out_indices=(1,),
        ),
        golden=("davit-tiny_3rdparty_in1k",),
        out_indices=(0, 1),
        frozen_stages=0,
    ),
)
