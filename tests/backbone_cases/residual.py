"""ResNet and its variants."""

from __future__ import annotations

from jaxpretrain.models.resnet import ResNet, ResNetV1c, ResNetV1d
from jaxpretrain.models.resnet_cifar import ResNet_CIFAR
from jaxpretrain.models.resnext import ResNeXt
from jaxpretrain.models.seresnet import SEResNet, SEResNeXt
from tests.backbone_cases.base import Backbone, shallow

STAGES = dict(num_stages=2, strides=(1, 2), dilations=(1, 1), stem_channels=8, out_indices=(1,))
RESNET = dict(out_indices=(0, 1), frozen_stages=1)
CASES = dict(
    ResNet=Backbone(dict(type=shallow(ResNet, 1, 2), depth=18, base_channels=8, **STAGES), **RESNET),
    ResNetV1c=Backbone(dict(type=shallow(ResNetV1c, 1, 2), depth=50, base_channels=4, **STAGES), **RESNET),
    ResNetV1d=Backbone(dict(type=shallow(ResNetV1d, 1, 2), depth=18, base_channels=8, **STAGES), **RESNET),
    ResNet_CIFAR=Backbone(dict(type=shallow(ResNet_CIFAR, 1, 2), depth=18, base_channels=8, **STAGES), **RESNET),
    ResNeXt=Backbone(dict(type=shallow(ResNeXt, 1, 2), depth=50, groups=2, width_per_group=4, **STAGES), **RESNET),
    SEResNet=Backbone(dict(type=shallow(SEResNet, 1, 2), depth=50, base_channels=4, se_ratio=2, **STAGES), **RESNET),
    SEResNeXt=Backbone(
        dict(type=shallow(SEResNeXt, 1, 2), depth=50, groups=2, width_per_group=4, se_ratio=2, **STAGES), **RESNET
    ),
)
