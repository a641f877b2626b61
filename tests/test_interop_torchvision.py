"""torchvision's layout: tiny models of all families against golden files, published ones by names and shapes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from jaxpretrain.interop import InteropError, export, load_weights, read_weights
from tests import interop_cases
from tests.interop_cases import GAP, Case, abstract, classifier, named, state

HEAD = "VisionTransformerClsHead"
ARCH = dict(embed_dims=16, depths=[2, 2, 2], num_heads=[1, 2, 4], extra_norm_every_n_blocks=0)
SWIN = dict(patch_size=[4, 4], embed_dim=16, depths=[2, 2, 2], num_heads=[1, 2, 4], window_size=[4, 4], num_classes=10)
V2 = dict(
    block="torchvision.models.swin_transformer.SwinTransformerBlockV2",
    downsample_layer="torchvision.models.swin_transformer.PatchMergingV2",
)


def swin(name: str, kind: str, args: dict[str, Any], **ours: Any) -> Case:
    backbone = dict(type=kind, arch=ARCH, img_size=64, window_size=4, out_indices=(2,), **ours)
    model = classifier(backbone, 64, neck=GAP)
    keys = r"qkv\.bias$" if args else None
    return Case("torchvision.models.SwinTransformer", name, SWIN | args, model, size=64, no_key_bias=keys)


VIT = dict(image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=128, num_classes=10)
OUR_VIT = dict(
    type="VisionTransformer",
    arch=dict(embed_dims=32, num_layers=2, num_heads=2, feedforward_channels=128),
    img_size=32,
    patch_size=8,
)
CASES = [
    Case("torchvision.models.VisionTransformer", "vit", VIT, classifier(OUR_VIT, 32, HEAD)),
    Case(
        "torchvision.models.VisionTransformer",
        "vit_pre_logits",
        VIT | dict(representation_size=24),
        classifier(OUR_VIT, 32, HEAD, hidden_dim=24),
    ),
    swin("swin", "SwinTransformer", {}),
    swin("swinv2", "SwinTransformerV2", V2, pretrained_window_sizes=(0, 0, 0)),
    Case(
        "torchvision.models.resnet18",
        "resnet18",
        dict(num_classes=10),
        classifier(dict(type="ResNet", depth=18), 512, neck=GAP),
        size=64,
        recognised="timm",  # the names are the same
    ),
]
BIG = [
    Case(
        "torchvision.models.resnet50",
        "resnet50",
        dict(num_classes=10),
        classifier(dict(type="ResNet", depth=50), 2048, neck=GAP),
        size=64,
        recognised="timm",
    ),
    Case(
        "torchvision.models.resnext50_32x4d",
        "resnext50_32x4d",
        dict(num_classes=10),
        classifier(dict(type="ResNeXt", depth=50), 2048, neck=GAP),
        size=64,
        recognised="timm",
    ),
    Case(
        "torchvision.models.wide_resnet50_2",
        "wide_resnet50_2",
        dict(num_classes=10),
        classifier(dict(type="ResNet", depth=50, base_channels=128, expansion=2), 2048, neck=GAP),
        size=64,
        recognised="timm",
    ),
]


@pytest.mark.parametrize("case", CASES, ids=repr)
class TestTiny(interop_cases.Tiny):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("case", BIG, ids=repr)
def test_big(case: Case) -> None:
    interop_cases.check_outputs(case)
    interop_cases.check_recognised(case)
    interop_cases.check_export(case)


# Published models, as MMPretrain's settings have them.


def vit(arch: str, channels: int, patch: int) -> dict[str, Any]:
    return named("VisionTransformer", channels, HEAD, arch=arch, img_size=224, patch_size=patch)


def big_swin(kind: str, arch: str, channels: int, size: int) -> dict[str, Any]:
    return named(kind, channels, arch=arch, img_size=size)


NAMED = {
    "resnet18": named("ResNet", 512, depth=18),
    "resnet34": named("ResNet", 512, depth=34),
    "resnet50": named("ResNet", 2048, depth=50),
    "resnet152": named("ResNet", 2048, depth=152),
    "resnext50_32x4d": named("ResNeXt", 2048, depth=50),
    "resnext101_64x4d": named("ResNeXt", 2048, depth=101, groups=64),
    "wide_resnet101_2": named("ResNet", 2048, depth=101, base_channels=128, expansion=2),
    "vit_b_16": vit("base", 768, 16),
    "vit_b_32": vit("base", 768, 32),
    "vit_l_16": vit("large", 1024, 16),
    "vit_h_14": vit("huge", 1280, 14),
    "swin_t": big_swin("SwinTransformer", "tiny", 768, 224),
    "swin_s": big_swin("SwinTransformer", "small", 768, 224),
    "swin_b": big_swin("SwinTransformer", "base", 1024, 224),
    "swin_v2_t": big_swin("SwinTransformerV2", "tiny", 768, 256),
    "swin_v2_b": big_swin("SwinTransformerV2", "base", 1024, 256),
}


@pytest.mark.parametrize("name", NAMED)
def test_named(name: str) -> None:
    interop_cases.check_named("torchvision", name, NAMED[name])


# Details.


def case_of(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


def test_names_of_early_releases() -> None:
    """linear_1 and linear_2 are found; the names of today are written."""
    case = case_of("vit")
    early = {
        name.replace("mlp.0", "mlp.linear_1").replace("mlp.3", "mlp.linear_2"): v for name, v in state(case).items()
    }
    assert early.keys() != state(case).keys()
    model = abstract(case.ours)
    assert load_weights(model, early).layout == "torchvision"
    interop_cases.assert_identical(export(model, "torchvision"), state(case))


def test_tables_are_compared() -> None:
    """An index table that is not that of our windows is an error, as is a scale of relative positions."""
    for name, table in (("swin", "relative_position_index"), ("swinv2", "relative_coords_table")):
        case = case_of(name)
        key = f"features.1.0.attn.{table}"
        wrong = state(case) | {key: state(case)[key][..., ::-1].copy()}
        with pytest.raises(InteropError, match=rf"another table .*stages\.0\.blocks\.0\.attn\.w_msa\.{table}"):
            read_weights(abstract(case.ours), wrong)


def test_key_bias_of_swin_v2() -> None:
    """torchvision never reads it: whatever it is, it comes back as zeros."""
    case = case_of("swinv2")
    key = "features.1.0.attn.qkv.bias"
    model = abstract(case.ours)
    load_weights(model, state(case) | {key: state(case)[key] + np.repeat(np.float32([0, 1, 0]), 16)})
    interop_cases.assert_identical(export(model, "torchvision"), state(case))


@pytest.mark.parametrize("kind", ["BEiTViT", "DeiT3", "ResNetV1d", "SEResNet"])
def test_what_torchvision_has_not(kind: str) -> None:
    args = dict(depth=50) if "ResNet" in kind else dict(arch=OUR_VIT["arch"], img_size=32, patch_size=8)
    model = abstract(dict(type=kind, **args))
    with pytest.raises(InteropError, match=f"'torchvision' has no {kind}; layouts that have: mmpretrain, timm"):
        read_weights(model, {}, layout="torchvision")
