"""Layouts of ConvNeXt, ConvMixer, MLP-Mixer, XCiT, HorNet and VAN: tiny models of theirs against golden files.

Golden files are made by running timm 1.0.31, torchvision 0.28, and the releases at github.com/facebookresearch/ConvNeXt,
ConvNeXt-V2 and xcit, raoyongming/HorNet and Visual-Attention-Network/VAN-Classification.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from jaxpretrain.interop import export, load_weights
from tests import interop_cases
from tests.interop_cases import GAP, Case, abstract, classifier, state

ARCH = dict(depths=[1, 1, 2, 1], channels=[8, 16, 24, 32])
SIZES = dict(depths=(1, 1, 2, 1), dims=(8, 16, 24, 32), num_classes=10)
BLOCKS = [(8, 16, 1), (16, 24, 1), (24, 32, 2), (32, None, 1)]  # the arguments of CNBlockConfig
V2 = dict(use_grn=True, layer_scale_init_value=0.0)
XCIT = dict(img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2, eta=1.0, num_classes=10)
OUR_XCIT = dict(type="XCiT", img_size=32, patch_size=8, embed_dims=16, depth=2, num_heads=2)
HORNET = dict(depths=[1, 1, 1, 2], base_dim=16, num_classes=10)
OUR_HORNET = dict(base_dim=16, depths=[1, 1, 1, 2], orders=[2, 3, 4, 5], dw_cfg=[dict(type="DW", kernel_size=7)] * 4)
FILTERS = [dict(type="GF", h=14, w=8), dict(type="GF", h=7, w=4)]
VAN = dict(embed_dims=[8, 16, 24, 32], depths=[1, 1, 2, 1])


def convnext(layout: str, name: str, args: dict[str, Any], **ours: Any) -> Case:
    return Case(layout, name, args, classifier(dict(type="ConvNeXt", arch=ARCH, **ours), 32), size=64)


def hornet(name: str, args: dict[str, Any], **ours: Any) -> Case:
    model = classifier(dict(type="HorNet", arch=OUR_HORNET | ours), 128)
    return Case("hornet.HorNet", name, HORNET | args, model, size=64)


def xcit(layout: str, **args: Any) -> Case:
    tokens_norm = args.get("tokens_norm", False)
    return Case(layout, "xcit", XCIT | args, classifier(OUR_XCIT | dict(tokens_norm=tokens_norm), 16))


CASES = [
    convnext("timm.models.convnext.ConvNeXt", "convnext", SIZES),
    convnext(
        "timm.models.convnext.ConvNeXt",
        "convnextv2_conv",
        dict(use_grn=True, ls_init_value=None, conv_mlp=True, **SIZES),
        linear_pw_conv=False,
        **V2,
    ),
    convnext("torchvision.models.convnext.ConvNeXt", "convnext", dict(block_setting=BLOCKS, num_classes=10)),
    convnext("convnext.ConvNeXt", "v1", SIZES),
    convnext("convnext.ConvNeXtV2", "v2", SIZES, **V2),
    Case(
        "timm.models.convmixer.ConvMixer",
        "convmixer",
        dict(dim=16, depth=2, kernel_size=5, patch_size=4, num_classes=10),
        classifier(
            dict(type="ConvMixer", arch=dict(embed_dims=16, depth=2, patch_size=4, kernel_size=5)), 16, neck=GAP
        ),
    ),
    Case(
        "timm.models.mlp_mixer.MlpMixer",
        "mixer",
        dict(img_size=32, patch_size=8, embed_dim=16, num_blocks=2, num_classes=10),
        classifier(
            dict(
                type="MlpMixer",
                arch=dict(embed_dims=16, num_layers=2, tokens_mlp_dims=8, channels_mlp_dims=64),
                img_size=32,
                patch_size=8,
                norm_cfg=dict(type="LN", eps=1e-6),
            ),
            16,
            neck=dict(GAP, dim=1),
        ),
    ),
    xcit("timm.models.xcit.Xcit", tokens_norm=True),
    xcit("xcit.XCiT"),
    hornet("large_kernels", {}),
    hornet(
        "global_filters",
        dict(gflayers=True),
        dw_cfg=OUR_HORNET["dw_cfg"][:2] + FILTERS,
    ),
    Case(
        "van.VAN",
        "van",
        VAN | dict(mlp_ratios=[8, 8, 4, 4], num_classes=10),
        classifier(
            dict(type="VAN", arch=VAN | dict(ffn_ratios=[8, 8, 4, 4]), norm_cfg=dict(type="LN", eps=1e-6)),
            32,
            neck=GAP,
        ),
        size=64,
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.layout}-{case.name}")
class TestTiny(interop_cases.Tiny):
    pass


def test_pointwise_convolutions_of_either_kind() -> None:
    """timm's small ConvNeXts have 1x1 convolutions where MMPretrain's settings have linear layers: the same numbers."""
    case = next(case for case in CASES if case.name == "convnextv2_conv")
    cfg = dict(case.ours, backbone=case.ours["backbone"] | dict(linear_pw_conv=True))
    model = abstract(cfg)
    load_weights(model, state(case), layout="timm")
    for name, array in export(model, "timm").items():
        wanted = state(case)[name]
        np.testing.assert_array_equal(array, wanted[..., 0, 0] if ".mlp.fc" in name and wanted.ndim == 4 else wanted)
