"""Mobile networks, HRNet and CSPNet: names and shapes of published models in both directions, and every bit there and back."""

from __future__ import annotations

import gzip
import json
from functools import cache
from typing import Any

import numpy as np
import pytest

from jaxpretrain.build import abstract
from jaxpretrain.interop import InteropError, export, load_weights
from tests.backbone_cases.mobile import CASES
from tests.interop_cases import FOLDER, GAP, check_state, classifier
from tests.test_resnet import random


def model(kind: str, channels: int, **args: Any) -> dict[str, Any]:
    return classifier(dict(type=kind, **args), channels, neck=GAP, num_classes=1000)


def mobilenet_v3(arch: str, channels: int, hidden: int) -> dict[str, Any]:
    head = dict(mid_channels=[hidden], dropout_rate=0.2, act_cfg=dict(type="HSwish"))
    return classifier(
        dict(type="MobileNetV3", arch=arch), channels, "StackedLinearClsHead", GAP, num_classes=1000, **head
    )


def hrnet(channels: list[int], outs: int, **args: Any) -> dict[str, Any]:
    neck = [dict(type="HRFuseScales", in_channels=channels, out_channels=outs), GAP]
    return classifier(dict(type="HRNet", **args), outs, neck=neck, num_classes=1000)


MODELS = {
    ("timm", "mobilenetv2_100"): model("MobileNetV2", 1280),
    ("timm", "mobilenetv3_small_100"): mobilenet_v3("small", 576, 1024),
    ("timm", "mobilenetv3_large_100"): mobilenet_v3("large", 960, 1280),
    ("timm", "mobilevit_xxs"): model("MobileViT", 320, arch="xx_small"),
    ("timm", "edgenext_xx_small"): classifier(dict(type="EdgeNeXt", arch="xxsmall"), 168, num_classes=1000),
    ("timm", "hrnet_w18"): hrnet([18, 36, 72, 144], 2048, arch="w18"),
    ("timm", "cspdarknet53"): model("CSPDarkNet", 1024, depth=53),
    ("timm", "cspresnet50"): model("CSPResNet", 1024, depth=50),
    ("timm", "cspresnext50"): model("CSPResNeXt", 2048, depth=50),
    ("torchvision", "mobilenet_v2"): model("MobileNetV2", 1280),
    ("torchvision", "mobilenet_v3_small"): mobilenet_v3("small", 576, 1024),
    ("torchvision", "mobilenet_v3_large"): mobilenet_v3("large", 960, 1280),
    ("torchvision", "shufflenet_v2_x1_0"): model("ShuffleNetV2", 1024),
}


@cache
def recorded() -> dict[str, dict[str, dict[str, tuple[int, ...]]]]:
    """Layout -> model -> name -> shape: timm 1.0.31, torchvision 0.28."""
    return json.loads(gzip.decompress((FOLDER / "mobile_models.json.gz").read_bytes()))


@pytest.mark.parametrize(("layout", "name"), MODELS, ids="-".join)
def test_published(layout: str, name: str) -> None:
    check_state(layout, recorded()[layout][name], MODELS[layout, name])


STACKED = dict(kind="StackedLinearClsHead", mid_channels=[12])
SMALL = {
    ("MobileNetV2", "timm"): (1280, GAP, {}),
    ("MobileNetV2", "torchvision"): (1280, GAP, {}),
    ("MobileNetV3", "timm"): (32, GAP, STACKED),
    ("MobileNetV3", "torchvision"): (32, GAP, STACKED),
    ("ShuffleNetV2", "torchvision"): (32, GAP, {}),
    ("MobileViT", "timm"): (32, GAP, {}),
    ("EdgeNeXt", "timm"): (16, None, {}),
    ("CSPDarkNet", "timm"): (24, GAP, {}),
    ("CSPResNet", "timm"): (16, GAP, {}),
    ("CSPResNeXt", "timm"): (16, GAP, {}),
}


@pytest.mark.parametrize(("name", "layout"), SMALL, ids="-".join)
def test_there_and_back(name: str, layout: str) -> None:
    """The layout is found from the names, and every bit is the same."""
    channels, neck, args = SMALL[name, layout]
    args = dict(args)
    cfg = classifier(CASES[name].config, channels, args.pop("kind", "LinearClsHead"), neck, **args)
    again = abstract(cfg)
    full = random(cfg)
    report = load_weights(again, export(full, layout))
    assert report.layout == layout and not report.reinitialised
    ours, wanted = export(again), export(full)
    assert set(ours) == set(wanted)
    for key, array in wanted.items():
        assert ours[key].tobytes() == array.tobytes(), key


def test_biases_of_hrnets_neck_are_folded() -> None:
    """A bias before a norm becomes a lower running mean; exported, it is zero."""
    cfg = classifier(CASES["HRNet"].config | dict(multiscale_output=True), 8, neck=NECK)
    foreign = export(random(cfg), "timm")
    means, biases = foreign["final_layer.1.running_mean"], foreign["final_layer.0.bias"]
    assert not biases.any()
    again = abstract(cfg)
    load_weights(again, foreign | {"final_layer.0.bias": np.full_like(biases, 0.25)}, layout="timm")
    np.testing.assert_array_equal(export(again)["neck.0.final_layer.bn.running_mean"], means - np.float32(0.25))


NECK = [dict(type="HRFuseScales", in_channels=[4, 8, 16], out_channels=8), GAP]


def test_what_nobody_else_has() -> None:
    """ShuffleNet has no other layout."""
    with pytest.raises(InteropError, match="'timm' has no SmallShuffleNetV1; layouts that have: mmpretrain"):
        export(abstract(CASES["ShuffleNetV1"].config), "timm")
