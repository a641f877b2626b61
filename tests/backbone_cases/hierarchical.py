"""HiViT, MixMIM's encoder, and Vision GNN."""

from __future__ import annotations

from tests.backbone_cases.base import Backbone

HIVIT = dict(arch=dict(embed_dims=16, depths=[1, 1, 2], num_heads=2), img_size=32)
MIXMIM = dict(arch=dict(embed_dims=8, depths=[1, 1], num_heads=[2, 2]), window_size=[4, 4], img_size=32)
NEIGHBOURS = 1.0  # rounding makes others the nearest
CASES = dict(
    HiViT=Backbone(
        dict(type="HiViT", rpe=True, layer_scale_init_value=0.5, **HIVIT),
        golden=("hivit-tiny-p16_16xb64_in1k",),
        out_indices=(0, 2),
        frozen_stages=3,
    ),
    MixMIMTransformer=Backbone(
        dict(type="MixMIMTransformer", **MIXMIM),
        golden=("mixmim-base_mixmim-pre_8xb128-coslr-100e_in1k",),
        remat=False,  # its stages have it
    ),
    # Their golden files, in float64, are in test_vig.py.
    Vig=Backbone(
        dict(type="Vig", arch=dict(num_blocks=2, channels=16), k=4, relative_pos=True),
        size=64,
        other_size=80,
        out_indices=(0, 1),
        frozen_stages=1,
        drop_path_rate="drop_path",
        bfloat16=NEIGHBOURS,
    ),
    PyramidVig=Backbone(
        dict(type="PyramidVig", arch=dict(blocks=[1, 1], channels=[8, 16]), k=3),
        out_indices=(0, 1),
        frozen_stages=1,
        drop_path_rate="drop_path",
        bfloat16=NEIGHBOURS,
    ),
)
