"""EfficientNet and its like: names and shapes of published models in both directions, and every bit there and back."""

from __future__ import annotations

import gzip
import json
from functools import cache
from typing import Any

import numpy as np
import pytest

from jaxpretrain.build import abstract
from jaxpretrain.interop import InteropError, export, load_weights, read_weights
from tests.backbone_cases.efficient import CASES
from tests.interop_cases import FOLDER, GAP, check_state, classifier
from tests.test_resnet import random

MEAN_OF_TOKENS = dict(type="GlobalAveragePooling", dim=1)


def efficientnet(channels: int = 1280, kind: str = "EfficientNet", **args: Any) -> dict[str, Any]:
    return classifier(dict(type=kind, **args), channels, neck=GAP, num_classes=1000)


def efficientformer(arch: str, channels: int) -> dict[str, Any]:
    backbone = dict(type="EfficientFormer", arch=arch)
    return classifier(backbone, channels, "EfficientFormerClsHead", MEAN_OF_TOKENS, num_classes=1000)


LEVIT = classifier(dict(type="LeViT", arch="128s"), 384, "LeViTClsHead", GAP, num_classes=1000)
POOLFORMER = efficientnet(512, "PoolFormer", arch="s12")


def tinyvit(classes: int) -> dict[str, Any]:
    return classifier(dict(type="TinyViT", arch="5m"), 320, num_classes=classes)


MODELS = {
    ("timm", "tf_efficientnet_b1"): efficientnet(arch="b1"),
    ("timm", "tf_efficientnet_em"): efficientnet(arch="em"),
    ("timm", "tf_efficientnetv2_s"): efficientnet(kind="EfficientNetV2", arch="s"),
    ("timm", "efficientformer_l3"): efficientformer("l3", 512),
    ("timm", "levit_128s"): LEVIT,
    ("timm", "tiny_vit_5m_224"): tinyvit(21841),
    ("timm", "poolformer_s12"): POOLFORMER,
    ("torchvision", "efficientnet_b1"): efficientnet(arch="b1"),
    ("torchvision", "efficientnet_v2_s"): efficientnet(kind="EfficientNetV2", arch="s"),
    ("levit", "LeViT_128S"): LEVIT,
    ("tinyvit", "tiny_vit_5m_224"): tinyvit(1000),
    ("poolformer", "poolformer_s12"): POOLFORMER,
    ("efficientformer", "efficientformer_l1"): efficientformer("l1", 448),
}


@cache
def recorded() -> dict[str, dict[str, dict[str, tuple[int, ...]]]]:
    """Layout -> model -> name -> shape: timm 1.0.31, torchvision 0.26, and the releases' code."""
    return json.loads(gzip.decompress((FOLDER / "efficient_models.json.gz").read_bytes()))


@pytest.mark.parametrize(("layout", "name"), MODELS, ids="-".join)
def test_published(layout: str, name: str) -> None:
    check_state(layout, recorded()[layout][name], MODELS[layout, name])


HEADS = dict(
    EfficientNet=("LinearClsHead", 16, GAP, ("timm", "torchvision")),
    EfficientNetV2=("LinearClsHead", 16, GAP, ("timm", "torchvision")),
    EfficientFormer=("EfficientFormerClsHead", 16, MEAN_OF_TOKENS, ("timm", "efficientformer")),
    LeViT=("LeViTClsHead", 48, GAP, ("timm", "levit")),
    TinyViT=("LinearClsHead", 16, None, ("timm", "tinyvit")),
    PoolFormer=("LinearClsHead", 16, GAP, ("timm", "poolformer")),
)


@pytest.mark.parametrize(
    ("name", "layout"), [(name, layout) for name, (*_, layouts) in HEADS.items() for layout in layouts]
)
def test_there_and_back(name: str, layout: str) -> None:
    """The layout is found from the names, and every bit is the same."""
    head, channels, neck, _ = HEADS[name]
    cfg = classifier(CASES[name].config, channels, head, neck)
    model = random(cfg)
    foreign, again = export(model, layout), abstract(cfg)
    report = load_weights(again, foreign)
    assert report.layout == layout and not report.reinitialised
    ours, wanted = export(again), export(model)
    assert set(ours) == set(wanted)
    for key, array in wanted.items():
        assert ours[key].tobytes() == array.tobytes(), key
    renamed = {(f"{key}x" if key.startswith("head") else key): array for key, array in foreign.items()}
    if renamed.keys() != foreign.keys():
        with pytest.raises(InteropError, match="no place for"):
            read_weights(abstract(cfg), renamed, layout=layout)


@pytest.mark.parametrize(("name", "layout"), [("RIFormer", "timm"), ("RIFormer", "poolformer"), ("LeViT", "timm")])
def test_what_nobody_else_has(name: str, layout: str) -> None:
    """RIFormer is no PoolFormer to others; fused LeViT has MMPretrain's names alone."""
    model = abstract(CASES[name].config | (dict(deploy=True) if name == "LeViT" else {}))
    with pytest.raises(InteropError, match=f"'{layout}' has no {name}; layouts that have: mmpretrain"):
        export(model, layout)


def test_tables_of_early_files() -> None:
    """Index tables of LeViT and TinyViT are left out where the layout has none."""
    model = abstract(CASES["TinyViT"].config)
    foreign = export(random(CASES["TinyViT"].config), "tinyvit")
    buffer = {"layers.1.blocks.0.attn.attention_bias_idxs": np.zeros((16, 16), np.int64)}
    assert read_weights(model, foreign | buffer, layout="tinyvit").ignored == list(buffer)
