"""Names of ConvNeXt and its kin: timm's and torchvision's, and those of the papers' own releases.

    convnext    facebookresearch/ConvNeXt and ConvNeXt-V2
    convmixer   locuslab/convmixer
    xcit        facebookresearch/xcit
    hornet      raoyongming/HorNet
    van         Visual-Attention-Network/VAN-Classification

Names do not tell all settings. For the same numbers build the model with

    convmixer_768_32            act_cfg=dict(type='ReLU'), with which it was trained
    mixer_* (timm)              norm_cfg=dict(type='LN', eps=1e-6)
    van's release               norm_cfg=dict(type='LN', eps=1e-6)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxpretrain.interop.mmpretrain import head_rules
from jaxpretrain.interop.rules import Rule, Table, Transform, shape

_MODULE = ("module.",)


def _pairs(theirs: str, ours: str, names: dict[str, str]) -> list[Rule]:
    """Rules for names that begin with `theirs` and `ours`."""
    return [Rule(f"{theirs}.{name}", f"{ours}.{other}") for name, other in names.items()]


# ConvNeXt.


def _pointwise(backbone: Any) -> Transform:
    """Kernels of pointwise convolutions, of a linear layer or a convolution there, in the shape that they have here."""
    axes = len(backbone.stages[0][0].pointwise_conv1.kernel.shape)
    return Transform(lambda xs: [xs[0].reshape(*xs[0].shape[:2], *(1,) * (axes - 2))], list)


def convnext_timm(backbone: Any, model: Any) -> Table:
    """`ConvNeXt` of both versions. (timm's small ones have 1x1 convolutions: those are `linear_pw_conv=False`.)"""
    theirs, ours = "stages.{i}.blocks.{j}", "backbone.stages.{i}.{j}"
    rules = [
        Rule("stem.{k}.{p}", "backbone.downsample_layers.0.{k}.{p}"),
        Rule("stages.{i}.downsample.{k}.{p}", "backbone.downsample_layers.{i}.{k}.{p}"),
        *_pairs(theirs, ours, {"conv_dw.{p}": "depthwise_conv.{p}", "norm.{p}": "norm.{p}", "gamma": "gamma"}),
        Rule(f"{theirs}.mlp.fc{{k}}.weight", f"{ours}.pointwise_conv{{k}}.weight", _pointwise(backbone)),
        *_pairs(theirs, ours, {"mlp.fc{k}.bias": "pointwise_conv{k}.bias"}),
        *_pairs(theirs, ours, {"mlp.grn.weight": "grn.gamma", "mlp.grn.bias": "grn.beta"}),
        Rule("head.norm.{p}", f"backbone.norm{len(backbone.stages) - 1}.{{p}}"),
        *head_rules(model, "head.fc"),
    ]
    return Table(rules, prefixes=_MODULE)


def convnext_torchvision(backbone: Any, model: Any) -> Table:
    """`ConvNeXt`: one list in which downsamplings and stages take turns."""
    rules = []
    for i in range(len(backbone.stages)):
        theirs, ours = f"features.{2 * i + 1}.{{j}}", f"backbone.stages.{i}.{{j}}"
        layers = {
            "block.0": "depthwise_conv",
            "block.2": "norm",
            "block.3": "pointwise_conv1",
            "block.5": "pointwise_conv2",
        }
        rules += [
            Rule(f"features.{2 * i}.{{k}}.{{p}}", f"backbone.downsample_layers.{i}.{{k}}.{{p}}"),
            *_pairs(theirs, ours, {f"{name}.{{p}}": f"{other}.{{p}}" for name, other in layers.items()}),
            Rule(f"{theirs}.layer_scale", f"{ours}.gamma", shape((-1, 1, 1), (-1,))),
        ]
    rules += [
        Rule("classifier.0.{p}", f"backbone.norm{len(backbone.stages) - 1}.{{p}}"),
        *head_rules(model, "classifier.2"),
    ]
    return Table(rules, prefixes=_MODULE)


def convnext(backbone: Any, model: Any) -> Table:
    """The releases of `ConvNeXt` and ConvNeXt V2."""
    theirs, ours = "stages.{i}.{j}", "backbone.stages.{i}.{j}"
    rules = [
        Rule("downsample_layers.{i}.{k}.{p}", "backbone.downsample_layers.{i}.{k}.{p}"),
        *_pairs(theirs, ours, {"dwconv.{p}": "depthwise_conv.{p}", "norm.{p}": "norm.{p}", "gamma": "gamma"}),
        Rule(f"{theirs}.pwconv{{k}}.weight", f"{ours}.pointwise_conv{{k}}.weight", _linear(backbone)),
        *_pairs(theirs, ours, {"pwconv{k}.bias": "pointwise_conv{k}.bias"}),
        Rule(f"{theirs}.grn.gamma", f"{ours}.grn.gamma", shape((1, 1, 1, -1), (-1,))),
        Rule(f"{theirs}.grn.beta", f"{ours}.grn.beta", shape((1, 1, 1, -1), (-1,))),
        Rule("norm.{p}", f"backbone.norm{len(backbone.stages) - 1}.{{p}}"),
        *head_rules(model, "head"),
    ]
    return Table(rules, prefixes=_MODULE)


def _linear(backbone: Any) -> Transform:
    """As `_pointwise`, for a library that has linear layers always."""
    return Transform(_pointwise(backbone).forward, lambda xs: [xs[0].reshape(xs[0].shape[:2])])


# ConvMixer, MLP-Mixer.


def convmixer_timm(backbone: Any, model: Any) -> Table:
    """`ConvMixer`."""
    rules = [
        Rule("stem.{rest}", "backbone.stem.{rest}"),
        Rule("blocks.{i}.{rest}", "backbone.stages.{i}.{rest}"),
        *head_rules(model, "head"),
    ]
    return Table(rules, prefixes=_MODULE)


def convmixer(backbone: Any, model: Any) -> Table:
    """The release of `ConvMixer`: one list of all layers, the pooling and the classifier counted too."""
    last = len(backbone.stages) + 5
    rules = [
        *head_rules(model, f"{last}"),
        *(Rule(f"{i}.{{bn}}", f"backbone.stem.{i}.{{bn}}") for i in (0, 2)),
        Rule("{i+3}.{rest}", "backbone.stages.{i}.{rest}"),
    ]
    return Table(rules, prefixes=_MODULE)


def mixer_timm(backbone: Any, model: Any) -> Table:
    """`MlpMixer`."""
    theirs, ours = "blocks.{i}", "backbone.layers.{i}"
    mixing = {"mlp_tokens": "token_mix", "mlp_channels": "channel_mix"}
    rules = [
        Rule("stem.proj.{p}", "backbone.patch_embed.projection.{p}"),
        Rule(f"{theirs}.norm{{k}}.{{p}}", f"{ours}.ln{{k}}.{{p}}"),
        *_pairs(theirs, ours, {f"{name}.fc1.{{p}}": f"{other}.layers.0.0.{{p}}" for name, other in mixing.items()}),
        *_pairs(theirs, ours, {f"{name}.fc2.{{p}}": f"{other}.layers.1.{{p}}" for name, other in mixing.items()}),
        Rule("norm.{p}", "backbone.ln1.{p}"),
        *head_rules(model, "head"),
    ]
    return Table(rules, prefixes=_MODULE)


# XCiT.


def _split(arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    return np.split(arrays[0], 3)


_QKV = Transform(_split, lambda xs: [np.concatenate(xs)])


def _xcit(backbone: Any, model: Any, positions: str, class_attention: list[Rule]) -> Table:
    rules = [
        Rule("cls_token", "backbone.cls_token"),
        Rule(f"{positions}.token_projection.{{p}}", "backbone.pos_embed.token_projection.conv.{p}"),
    ]
    for i in range(len(backbone.patch_embed.proj)):  # there, activations are counted too
        theirs, ours = f"patch_embed.proj.{2 * i}", f"backbone.patch_embed.proj.{i}"
        rules += _pairs(theirs, ours, {"0.{p}": "conv.{p}", "1.{bn}": "bn.{bn}"})
    names = {"gamma{k}": "gamma{k}", "norm{k}.{p}": "norm{k}.{p}", "attn.proj.{p}": "attn.proj.{p}"}
    names |= {"mlp.fc1.{p}": "ffn.layers.0.0.{p}", "mlp.fc2.{p}": "ffn.layers.1.{p}"}
    local = {"local_mp.conv{k}.{p}": "local_mp.conv{k}.conv.{p}", "local_mp.bn.{bn}": "local_mp.conv1.bn.{bn}"}
    attention = {name: name for name in ("attn.temperature", "attn.qkv.{p}")}
    rules += [
        *_pairs("blocks.{i}", "backbone.xca_layers.{i}", names | attention | local),
        *_pairs("cls_attn_blocks.{i}", "backbone.ca_layers.{i}", names),
        *class_attention,
        Rule("norm.{p}", "backbone.norm.{p}"),
        *head_rules(model, "head"),
    ]
    return Table(rules, prefixes=_MODULE)


def xcit_timm(backbone: Any, model: Any) -> Table:
    """`XCiT`."""
    name = "attn.{}.{{p}}".format
    rules = _pairs("cls_attn_blocks.{i}", "backbone.ca_layers.{i}", {name(part): name(part) for part in "qkv"})
    return _xcit(backbone, model, "pos_embed", rules)


def xcit(backbone: Any, model: Any) -> Table:
    """The release of `XCiT`: one layer for queries, keys and values of the class attention."""
    parts = tuple(f"backbone.ca_layers.{{i}}.attn.{part}.{{p}}" for part in "qkv")
    return _xcit(backbone, model, "pos_embeder", [Rule("cls_attn_blocks.{i}.attn.qkv.{p}", parts, _QKV)])


# HorNet, VAN.


def hornet(backbone: Any, model: Any) -> Table:
    """The release of `HorNet`, with large kernels or global filters."""
    theirs, ours = "stages.{i}.{j}", "backbone.stages.{i}.{j}"
    rules = [
        Rule("downsample_layers.{i}.{k}.{p}", "backbone.downsample_layers.{i}.{k}.{p}"),
        Rule(f"{theirs}.gamma{{k}}", f"{ours}.gamma{{k}}.weight"),
        *_pairs(theirs, ours, {name: name for name in ("norm{k}.{p}", "pwconv{k}.{p}")}),
        Rule(f"{theirs}.gnconv.pws.{{k}}.{{p}}", f"{ours}.gnconv.projs.{{k}}.{{p}}"),
        Rule(f"{theirs}.gnconv.{{rest}}", f"{ours}.gnconv.{{rest}}"),
        Rule("norm.{p}", f"backbone.norm{len(backbone.stages) - 1}.{{p}}"),
        *head_rules(model, "head"),
    ]
    return Table(rules, prefixes=_MODULE)


def van(backbone: Any, model: Any) -> Table:
    """The release of `VAN`."""
    theirs, ours = "block{i}.{j}", "backbone.blocks{i}.{j}"
    gate = "attn.spatial_gating_unit"
    kernels = {"conv0": "DW_conv", "conv_spatial": "DW_D_conv", "conv1": "conv1"}
    same = ("norm{k}.{bn}", "layer_scale_{k}", "attn.proj_{k}.{p}", "mlp.fc{k}.{p}")
    rules = [
        Rule("patch_embed{i}.proj.{p}", "backbone.patch_embed{i}.projection.{p}"),
        Rule("patch_embed{i}.norm.{bn}", "backbone.patch_embed{i}.norm.{bn}"),
        *_pairs(theirs, ours, {name: name for name in same}),
        *_pairs(theirs, ours, {f"{gate}.{name}.{{p}}": f"{gate}.{other}.{{p}}" for name, other in kernels.items()}),
        Rule(f"{theirs}.mlp.dwconv.dwconv.{{p}}", f"{ours}.mlp.dwconv.{{p}}"),
        Rule("norm{i}.{p}", "backbone.norm{i}.{p}"),
        *head_rules(model, "head"),
    ]
    return Table(rules, prefixes=_MODULE)


TABLES: dict[str, dict[str, Any]] = {
    "timm": {"ConvNeXt": convnext_timm, "ConvMixer": convmixer_timm, "MlpMixer": mixer_timm, "XCiT": xcit_timm},
    "torchvision": {"ConvNeXt": convnext_torchvision},
    "convnext": {"ConvNeXt": convnext},
    "convmixer": {"ConvMixer": convmixer},
    "xcit": {"XCiT": xcit},
    "hornet": {"HorNet": hornet},
    "van": {"VAN": van},
}
