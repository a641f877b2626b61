"""The convolutional networks before EfficientNet, and ResNet's relatives with blocks of their own."""

from __future__ import annotations

from jaxpretrain.models.inception_v3 import BLOCKS, InceptionV3
from jaxpretrain.models.res2net import Res2Net
from jaxpretrain.models.resnest import ResNeSt
from tests.backbone_cases.base import Backbone, shallow


class SmallInceptionV3(InceptionV3):
    """One block of each kind."""

    blocks = {name: BLOCKS[name] for name in ("Mixed_5b", "Mixed_6a", "Mixed_6b", "Mixed_7a", "Mixed_7b")}


STAGES = dict(num_stages=2, strides=(1, 2), dilations=(1, 1), stem_channels=8, out_indices=(1,))
SMALL_RESNEST = shallow(ResNeSt, 1, 2)
RESNET = dict(out_indices=(0, 1), frozen_stages=1)
VGG = dict(type="VGG", depth=11, num_stages=2, dilations=(1, 1), norm_cfg=dict(type="BN"))
REGNET = dict(w0=8, wa=4.0, wm=2.0, group_w=4, depth=3, bot_mul=1.0)
CASES = dict(
    AlexNet=Backbone(
        dict(type="AlexNet"), golden=("alexnet",), size=64, other_size=95, drop_path_rate=None, remat=False
    ),
    LeNet5=Backbone(
        dict(type="LeNet5", num_classes=10),
        golden=("lenet5_mnist",),
        other_size=None,
        drop_path_rate=None,
        remat=False,
        channels=1,
    ),
    VGG=Backbone(
        VGG,
        golden=("vgg11_8xb32_in1k", "vgg11bn_8xb32_in1k"),
        out_indices=(0, 1),
        frozen_stages=1,
        drop_path_rate=None,
    ),
    VGGWithoutNorm=Backbone(
        VGG | dict(norm_cfg=None), out_indices=(0, 1), frozen_stages=1, other_size=35, drop_path_rate=None
    ),
    DenseNet=Backbone(
        dict(type="DenseNet", arch=dict(growth_rate=4, depths=[2, 2], init_channels=8)),
        golden=("densenet121_3rdparty_in1k",),
        other_size=45,
        out_indices=(0, 1),
        frozen_stages=1,
        drop_path_rate="drop_rate",
    ),
    InceptionV3=Backbone(
        dict(type=SmallInceptionV3, num_classes=10),
        golden=("inception-v3_3rdparty_8xb32_in1k",),
        size=75,
        other_size=107,
        drop_path_rate="dropout",
    ),
    ResNeSt=Backbone(
        dict(type=SMALL_RESNEST, depth=50, base_channels=4, **STAGES), golden=("resnest50_32xb64_in1k",), **RESNET
    ),
    ResNeStGroups=Backbone(
        dict(type=SMALL_RESNEST, depth=50, groups=2, radix=2, avg_down_stride=False, **STAGES), **RESNET
    ),
    Res2Net=Backbone(
        dict(type=shallow(Res2Net, 1, 2), depth=50, base_channels=8, scales=3, base_width=26, **STAGES),
        golden=("res2net50-w14-s8_3rdparty_8xb32_in1k",),
        **RESNET,
    ),
    RegNet=Backbone(
        dict(type="RegNet", arch=REGNET, stem_channels=8, strides=(2, 2), dilations=(1, 1), out_indices=(1,)),
        golden=("regnetx-400mf_8xb128_in1k",),
        drop_path_rate=None,
        **RESNET,
    ),
)
