"""ResNet and its variants."""

from __future__ import annotations

from tests.backbone_cases.base import Backbone

STAGES = dict(num_stages=2, strides=(1, 2), dilations=(1, 1), stem_channels=8, out_indices=(1,))
RESNET = dict(out_indices=(0, 1), frozen_stages=1)
CASES = dict(
    ResNet=Backbone(dict(type="ResNet", depth=18, base_channels=8, **STAGES), **RESNET),
    ResNetV1c=Backbone(dict(type="ResNetV1c", depth=50, base_channels=4, **STAGES), **RESNET),
    ResNetV1d=Backbone(dict(type="ResNetV1d", depth=18, base_channels=8, **STAGES), **RESNET),
    ResNet_CIFAR=Backbone(dict(type="ResNet_CIFAR", depth=18, base_channels=8, **STAGES), **RESNET),
    ResNeXt=Backbone(dict(type="ResNeXt", depth=50, groups=2, width_per_group=4, **STAGES), **RESNET),
    SEResNet=Backbone(dict(type="SEResNet", depth=50, base_channels=4, se_ratio=2, **STAGES), **RESNET),
    SEResNeXt=Backbone(dict(type="SEResNeXt", depth=50, groups=2, width_per_group=4, se_ratio=2, **STAGES), **RESNET),
)
