"""Convolutional networks in timm's and torchvision's layouts: outputs of small ones, names and shapes of published ones.

`python -m tests.test_interop_classic` (where these are installed) writes the golden files.
"""

from __future__ import annotations

from typing import Any

import pytest

from jaxpretrain.interop import InteropError, export, load_weights, read_weights
from tests import interop_cases
from tests.interop_cases import GAP, Case, abstract, classifier, state

TEN = dict(num_classes=10)


def dense(depths: list[int], growth_rate: int, init_channels: int) -> dict[str, Any]:
    return dict(type="DenseNet", arch=dict(growth_rate=growth_rate, depths=depths, init_channels=init_channels))


DENSENET = classifier(dense([2, 3], 8, 16), 40, neck=GAP)
REGNET = classifier(dict(type="RegNet", arch="regnetx_400mf"), 384, neck=GAP)
# torchvision rounds to groups in another way, which matters for this one alone: its last stage is 400 wide, not 384.
WIDER = dict(w0=24, wa=24.8, wm=2.55, group_w=16, depth=22, bot_mul=1.0)
TORCHVISION_REGNET = classifier(dict(type="RegNet", arch=WIDER), 400, neck=GAP)
TINY_DENSENET = TEN | dict(growth_rate=8, block_config=(2, 3))  # timm: twice as many channels behind the stem
# In groups, and without what timm's fast variants have: pooling before the convolution.
TIMM_RESNEST = dict(
    block="timm.models.resnest.ResNestBottleneck",
    layers=[3, 4, 6, 3],
    stem_type="deep",
    stem_width=32,
    avg_down=True,
    base_width=40,
    cardinality=2,
    block_args=dict(radix=4, avd=True, avd_first=False),
)
RESNEST = classifier(dict(type="ResNeSt", depth=50, radix=4, groups=2, width_per_group=40), 2048, neck=GAP)
CASES = [
    Case("timm.models.densenet.DenseNet", "densenet", TINY_DENSENET, DENSENET, size=40),
    Case(
        "torchvision.models.DenseNet",
        "densenet",
        TINY_DENSENET | dict(num_init_features=16),
        DENSENET,
        size=40,
        recognised="timm",  # the names are the same
    ),
    Case("timm.models.regnetx_004", "regnetx_004", TEN, REGNET, size=64),
    Case("torchvision.models.regnet_x_400mf", "regnet_x_400mf", TEN, TORCHVISION_REGNET, size=64),
]
BIG = [
    Case(
        "timm.models.inception_v3",
        "inception_v3",
        TEN,
        dict(type="ImageClassifier", backbone=dict(type="InceptionV3", **TEN), head=dict(type="ClsHead")),
        size=75,
    ),
    Case("timm.models.resnet.ResNet", "resnest_4s2x40d", TEN | TIMM_RESNEST, RESNEST, size=64),
    Case(
        "timm.models.res2net50d", "res2net50d", TEN, classifier(dict(type="Res2Net", depth=50), 2048, neck=GAP), size=64
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.layout}-{case}")
class TestTiny(interop_cases.Tiny):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("case", BIG, ids=repr)
def test_big(case: Case) -> None:
    interop_cases.check_outputs(case)
    interop_cases.check_recognised(case)
    interop_cases.check_export(case)


# Published models, as MMPretrain's settings have them.


def whole(kind: str, **args: Any) -> dict[str, Any]:
    """A classifier whose backbone gives logits."""
    backbone = dict(type=kind, num_classes=1000, **args)
    return dict(type="ImageClassifier", backbone=backbone, head=dict(type="ClsHead"))


def pooled(kind: str, channels: int, **args: Any) -> dict[str, Any]:
    return classifier(dict(type=kind, **args), channels, neck=GAP, num_classes=1000)


BN = dict(norm_cfg=dict(type="BN"))
PLAIN = dict(deep_stem=False, avg_down=False)
NAMED = {
    "timm": {
        "densenet121": pooled("DenseNet", 1024),
        "inception_v3": whole("InceptionV3"),
        "regnetx_016": pooled("RegNet", 912, arch="regnetx_1.6gf"),
        "regnetx_120": pooled("RegNet", 2240, arch="regnetx_12gf"),
        "res2net50_14w_8s": pooled("Res2Net", 2048, depth=50, scales=8, base_width=14, **PLAIN),
        "res2net101_26w_4s": pooled("Res2Net", 2048, depth=101, **PLAIN),
        "resnest50d": pooled("ResNeSt", 2048, depth=50),
        "resnest101e": pooled("ResNeSt", 2048, depth=101, stem_channels=128),
        "vgg11": whole("VGG", depth=11),
        "vgg16_bn": whole("VGG", depth=16, **BN),
    },
    "torchvision": {
        "alexnet": whole("AlexNet"),
        "densenet161": pooled("DenseNet", 2208, arch="161"),
        "inception_v3": whole("InceptionV3", aux_logits=True),
        "vgg13": whole("VGG", depth=13),
        "vgg19_bn": whole("VGG", depth=19, **BN),
    },
}


@pytest.mark.parametrize(("layout", "name"), [(layout, name) for layout in NAMED for name in NAMED[layout]])
def test_named(layout: str, name: str) -> None:
    keys = interop_cases.load(f"{layout}_classic_models")["models"][name]
    interop_cases.check_state(layout, keys, NAMED[layout][name])


# Details.


def test_names_in_densenets_files() -> None:
    """Those that torchvision publishes have `norm.1` and `conv.1`; the names of today are written."""
    case = CASES[1]
    early = {
        name.replace("norm1.", "norm.1.")
        .replace("norm2.", "norm.2.")
        .replace("conv1.", "conv.1.")
        .replace("conv2.", "conv.2.")
        if "denselayer" in name
        else name: array
        for name, array in state(case).items()
    }
    assert early.keys() != state(case).keys()
    model = abstract(case.ours)
    load_weights(model, early, layout="torchvision")
    interop_cases.assert_identical(export(model, "torchvision"), state(case))


def test_parts_that_the_model_has_not() -> None:
    """The auxiliary classifier, and the layers behind the last map, stay in the file where the model is without."""
    for layout, name, kind, part in [
        ("torchvision", "inception_v3", "InceptionV3", "AuxLogits."),
        ("torchvision", "alexnet", "AlexNet", "classifier."),
        ("timm", "vgg11", "VGG", ("pre_logits.", "head.")),
    ]:
        shapes = interop_cases.load(f"{layout}_classic_models")["models"][name]
        args = dict(depth=11) if kind == "VGG" else {}
        report = read_weights(abstract(dict(type=kind, **args)), interop_cases._zeros(shapes), layout=layout)
        assert report.ignored and all(key.startswith(part) for key in report.ignored)


@pytest.mark.parametrize("kind", ["ResNeSt", "Res2Net"])
def test_what_torchvision_has_not(kind: str) -> None:
    with pytest.raises(InteropError, match=f"'torchvision' has no {kind}; layouts that have: mmpretrain, timm"):
        read_weights(abstract(dict(type=kind, depth=50)), {}, layout="torchvision")


if __name__ == "__main__":
    for case in (*CASES, *BIG):
        print(case)
        interop_cases._make(case)
    for layout, models in NAMED.items():
        interop_cases._make_named(layout, models, file=f"{layout}_classic_models")
