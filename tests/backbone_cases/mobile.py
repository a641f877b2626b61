"""Mobile networks, HRNet and CSPNet. Where names choose the depth, the small form is a sub-class."""

from __future__ import annotations

from jaxpretrain.models.cspnet import CSPDarkNet, CSPResNet, CSPResNeXt, Stage
from jaxpretrain.models.mobilenet_v2 import MobileNetV2
from jaxpretrain.models.mobilenet_v3 import MobileNetV3, Row
from jaxpretrain.models.shufflenet_v1 import ShuffleNetV1
from jaxpretrain.models.shufflenet_v2 import ShuffleNetV2
from tests.backbone_cases.base import Backbone


class SmallMobileNetV2(MobileNetV2):
    arch_settings = ((1, 16, 1, 1), (6, 24, 2, 2))


class SmallMobileNetV3(MobileNetV3):
    arch_settings = {
        "tiny": (Row(3, 16, 16, True, False, 2), Row(5, 24, 16, True, True, 1), Row(3, 32, 24, False, True, 2))
    }


class SmallShuffleNetV1(ShuffleNetV1):
    stage_blocks = (2, 2)


class SmallShuffleNetV2(ShuffleNetV2):
    stage_blocks = (2, 2)
    channels_of_width = {1.0: (16, 24, 32)}


class SmallCSPDarkNet(CSPDarkNet):
    arch_settings = {2: (Stage(8, 16, 1, 2, 2, True), Stage(16, 24, 1, 1, 1, True))}


class SmallCSPResNet(CSPResNet):
    arch_settings = {2: (Stage(8, 8, 1, 4, 2, None), Stage(8, 16, 1, 4, 2, False))}


class SmallCSPResNeXt(CSPResNeXt):
    arch_settings = {2: (Stage(8, 16, 1, 4, 1, None), Stage(16, 16, 1, 2, 1, False))}
    groups = 4


MOBILEVIT = [["mobilenetv2", 8, 1, 2, 2], ["mobilevit", 8, 2, 16, 32, 2, 2]]
EDGENEXT = dict(
    arch=dict(channels=[8, 16], depths=[2, 2], num_heads=[2, 4]),
    global_blocks=[0, 1],
    global_block_type=["None", "SDTA"],
    use_pos_embd_csa=[False, True],
    d2_scales=[2, 3],
)
HRNET = dict(
    stage1=dict(num_modules=1, num_branches=1, block="BOTTLENECK", num_blocks=(1,), num_channels=(4,)),
    stage2=dict(num_modules=1, num_branches=2, block="BASIC", num_blocks=(1, 1), num_channels=(4, 8)),
    stage3=dict(num_modules=1, num_branches=2, block="BASIC", num_blocks=(1, 1), num_channels=(4, 8)),
    stage4=dict(num_modules=1, num_branches=3, block="BASIC", num_blocks=(1, 1, 1), num_channels=(4, 8, 16)),
)
CONVOLUTIONAL = dict(drop_path_rate=None, frozen_stages=1, other_size=47)
CASES = dict(
    MobileNetV2=Backbone(
        dict(type=SmallMobileNetV2, widen_factor=0.5, out_indices=(2,)),
        golden=("mobilenet-v2_8xb32_in1k",),
        out_indices=(0, 2),
        **CONVOLUTIONAL,
    ),
    MobileNetV3=Backbone(
        dict(type=SmallMobileNetV3, arch="tiny"),
        golden=("mobilenet-v3-small_8xb128_in1k",),
        out_indices=(0, 4),
        **CONVOLUTIONAL,
    ),
    ShuffleNetV1=Backbone(
        dict(type=SmallShuffleNetV1, groups=2, widen_factor=0.25, out_indices=(1,)),
        golden=("shufflenet-v1-1x_16xb64_in1k",),
        out_indices=(0, 1),
        **CONVOLUTIONAL,
    ),
    ShuffleNetV2=Backbone(
        dict(type=SmallShuffleNetV2, out_indices=(2,)),
        golden=("shufflenet-v2-1x_16xb64_in1k",),
        out_indices=(0, 2),
        **CONVOLUTIONAL,
    ),
    MobileViT=Backbone(
        dict(type="MobileViT", arch=MOBILEVIT, out_indices=(1,)),
        golden=("mobilevit-xxsmall_3rdparty_in1k",),
        other_size=35,  # 9 x 9 pixels, which do not make whole windows
        out_indices=(0, 1),
        frozen_stages=1,
        drop_path_rate=None,
    ),
    EdgeNeXt=Backbone(
        dict(type="EdgeNeXt", **EDGENEXT),
        golden=("edgenext-xxsmall_3rdparty_in1k",),
        out_indices=(0, 1),
        frozen_stages=1,
    ),
    HRNet=Backbone(
        dict(type="HRNet", extra=HRNET),
        golden=("hrnet-w18_3rdparty_8xb32_in1k",),
        drop_path_rate=None,
    ),
    CSPDarkNet=Backbone(
        dict(type=SmallCSPDarkNet, depth=2, out_indices=(1,)),
        golden=("cspdarknet50_3rdparty_8xb32_in1k",),
        out_indices=(0, 1),
        drop_path_rate=None,
        frozen_stages=0,
    ),
    CSPResNet=Backbone(
        dict(type=SmallCSPResNet, depth=2, out_indices=(1,)),
        golden=("cspresnet50_3rdparty_8xb32_in1k",),
        out_indices=(0, 1),
        drop_path_rate=None,
        frozen_stages=0,
    ),
    CSPResNeXt=Backbone(
        dict(type=SmallCSPResNeXt, depth=2, out_indices=(1,)),
        golden=("cspresnext50_3rdparty_8xb32_in1k",),
        out_indices=(0, 1),
        drop_path_rate=None,
        frozen_stages=0,
    ),
)
