"""The backbones of SparK and FCMAE, without a mask: with one, see `test_spark.py` and `test_fcmae.py`."""

from __future__ import annotations

from jaxpretrain.models.sparse_resnet import SparseResNet
from tests.backbone_cases.base import Backbone, shallow

STAGES = dict(num_stages=2, strides=(1, 2), dilations=(1, 1), stem_channels=8, out_indices=(1,))
CASES = dict(
    SparseResNet=Backbone(
        dict(type=shallow(SparseResNet, 1, 2), depth=18, base_channels=8, **STAGES), out_indices=(0, 1), frozen_stages=1
    ),
    SparseConvNeXt=Backbone(
        dict(type="SparseConvNeXt", arch=dict(depths=[1, 1], channels=[8, 16])), out_indices=(0, 1), frozen_stages=1
    ),
    SparseConvNeXtV2=Backbone(
        dict(
            type="SparseConvNeXt",
            arch=dict(depths=[1, 1], channels=[8, 16]),
            use_grn=True,
            layer_scale_init_value=0.0,
            sparse_grn=True,
            gap_before_output=False,
        ),
        out_indices=(0, 1),
        frozen_stages=1,
    ),
)
