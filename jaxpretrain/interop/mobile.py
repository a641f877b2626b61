"""MobileNetV2, V3, ShuffleNetV2, MobileViT, EdgeNeXt, HRNet and CSPNet: timm's names, torchvision's and of releases.

    cvnets      https://github.com/apple/ml-cvnets: MobileViT
    edgenext    https://github.com/mmaaz60/EdgeNeXt
    hrnet       https://github.com/HRNet/HRNet-Image-Classification, whose names timm has kept

Names do not tell all settings. For the same numbers build the model with

    timm          tf_mobilenetv3_*: conv_cfg=dict(type='Conv2dAdaptivePadding'), norm_cfg=dict(type='BN', eps=1e-3);
                  mobilenetv3_*: norm_cfg=dict(type='BN'); edgenext_*: see below
    torchvision   mobilenet_v2, shufflenet_v2_*, mobilenet_v3_*: our defaults

EdgeNeXt's norms have eps=1e-6 there; MMPretrain's, and ours, 1e-5 in blocks with attention and at the end, which changes
features but little. HRNet has biases there in the neck, before norms; they are folded into these when read, and zero when
written. The deep stem of CSPNets is another network there, and is not read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from flax import nnx

from jaxpretrain.interop.mmpretrain import head_rules
from jaxpretrain.interop.rules import Rule, Table, Transform, shape
from jaxpretrain.models.layers.inverted_residual import InvertedResidual

_MODULE = ("module.",)


def _conv(conv: str, norm: str, ours: str) -> list[Rule]:
    """A convolution and its norm, which are `conv` and `bn` of a `ConvModule` here."""
    return [Rule(f"{conv}.{{p}}", f"{ours}.conv.{{p}}"), Rule(f"{norm}.{{bn}}", f"{ours}.bn.{{bn}}")]


def _module(theirs: str, ours: str) -> list[Rule]:
    """The same where theirs has `conv` and `bn` too."""
    return _conv(f"{theirs}.conv", f"{theirs}.bn", ours)


def _pair(theirs: str, ours: str, first: int = 0) -> list[Rule]:
    """The same where theirs are two of a sequence."""
    return _conv(f"{theirs}.{first}", f"{theirs}.{first + 1}", ours)


# MobileNetV2 and V3.


def _blocks(backbone: Any) -> list[tuple[str, list[str], Any]]:
    """Name, names of the convolutions, and the block itself, of every inverted residual in order."""
    layers = vars(backbone)
    found = []
    for name in sorted((name for name in layers if re.fullmatch(r"layer\d+", name)), key=lambda name: int(name[5:])):
        blocks = enumerate(layers[name]) if isinstance(layers[name], nnx.List) else [(None, layers[name])]
        for j, block in blocks:
            if isinstance(block, InvertedResidual):
                path = f"backbone.{name}" if j is None else f"backbone.{name}.{j}"
                convolutions = ("expand_conv", "depthwise_conv", "linear_conv")
                parts = [part for part in convolutions if getattr(block, part) is not None]
                found.append((path, [f"{path}.{block.state_names.get(part, part)}" for part in parts], block))
    return found


# Blocks of timm's stages of MobileNetV3, small and large.
_STAGES = {11: (1, 2, 3, 2, 3), 15: (1, 2, 3, 4, 2, 3)}


def _timm_blocks(blocks: Sequence[tuple[str, list[str], Any]], counts: Sequence[int]) -> Iterator[Rule]:
    """The rules of all blocks, which timm has in stages of `counts`."""
    places = [(i, j) for i, count in enumerate(counts) for j in range(count)]
    for (i, j), (ours, convs, _) in zip(places, blocks, strict=True):
        names = ["conv_dw", "conv_pw"] if len(convs) == 2 else ["conv_pw", "conv_dw", "conv_pwl"]
        for k, (name, conv) in enumerate(zip(names, convs, strict=True), start=1):
            yield from _conv(f"blocks.{i}.{j}.{name}", f"blocks.{i}.{j}.bn{k}", conv)
        yield Rule(f"blocks.{i}.{j}.se.conv_reduce.{{p}}", f"{ours}.se.conv1.conv.{{p}}")
        yield Rule(f"blocks.{i}.{j}.se.conv_expand.{{p}}", f"{ours}.se.conv2.conv.{{p}}")


def timm_mobilenet_v2(backbone: Any, model: Any) -> Table:
    """`MobileNetV2`."""
    ends = [*_conv("conv_stem", "bn1", "backbone.conv1"), *_conv("conv_head", "bn2", "backbone.conv2")]
    counts = [len(getattr(backbone, f"layer{i + 1}")) for i in range(backbone.num_stages)]
    blocks = _timm_blocks(list(_blocks(backbone)), counts)
    return Table([*ends, *blocks, *head_rules(model, "classifier")], prefixes=_MODULE)


def timm_mobilenet_v3(backbone: Any, model: Any) -> Table:
    """`MobileNetV3`; the head's hidden layer is a 1x1 convolution there."""
    blocks = list(_blocks(backbone))
    counts = _STAGES.get(len(blocks), (len(blocks),))
    rules = [
        *_conv("conv_stem", "bn1", "backbone.layer0"),
        *_timm_blocks(blocks, counts),
        *_conv(f"blocks.{len(counts)}.0.conv", f"blocks.{len(counts)}.0.bn1", f"backbone.layer{len(blocks) + 1}"),
        Rule("conv_head.weight", "head.layers.0.fc.weight", shape((*_hidden(model), 1, 1), _hidden(model))),
        Rule("conv_head.bias", "head.layers.0.fc.bias"),
        Rule("classifier.{p}", "head.layers.1.fc.{p}"),
    ]
    return Table(rules, prefixes=_MODULE)


def _hidden(model: Any) -> tuple[int, int]:
    """(outputs, inputs) of the hidden layer of a `StackedLinearClsHead`."""
    layers = getattr(getattr(model, "head", None), "layers", None)
    return (1, 1) if layers is None else tuple(layers[0].fc.kernel.shape[::-1])  # type: ignore[return-value]


def torchvision_mobilenet_v2(backbone: Any, model: Any) -> Table:
    """`MobileNetV2`: a list of all; the last norm of a block is not in a pair with its convolution."""
    rules = _pair("features.0", "backbone.conv1")
    count = 1
    for _, convs, _ in _blocks(backbone):
        theirs, last = f"features.{count}.conv", len(convs) - 1
        for i, conv in enumerate(convs[:-1]):
            rules += _pair(f"{theirs}.{i}", conv)
        rules += _pair(theirs, convs[-1], last)
        count += 1
    rules += _pair(f"features.{count}", "backbone.conv2")
    return Table([*rules, *head_rules(model, "classifier.1")], prefixes=_MODULE)


def torchvision_mobilenet_v3(backbone: Any, model: Any) -> Table:
    """`MobileNetV3`: a list of all; in a block squeeze and excitation is counted too, before the last convolution."""
    rules = _pair("features.0", "backbone.layer0")
    count = 1
    for ours, convs, block in _blocks(backbone):
        theirs, places = f"features.{count}.block", list(range(len(convs)))
        if block.se is not None:
            for k in (1, 2):
                rules.append(Rule(f"{theirs}.{places[-1]}.fc{k}.{{p}}", f"{ours}.se.conv{k}.conv.{{p}}"))
            places[-1] += 1
        for place, conv in zip(places, convs, strict=True):
            rules += _pair(f"{theirs}.{place}", conv)
        count += 1
    rules += _pair(f"features.{count}", f"backbone.layer{backbone.num_layers - 1}")
    head = [Rule("classifier.0.{p}", "head.layers.0.fc.{p}"), Rule("classifier.3.{p}", "head.layers.1.fc.{p}")]
    return Table([*rules, *head], prefixes=_MODULE)


def torchvision_shufflenet_v2(backbone: Any, model: Any) -> Table:
    """`ShuffleNetV2`: branches are lists of layers, activations counted."""
    rules = [*_pair("conv1", "backbone.conv1"), *_pair("conv5", f"backbone.layers.{len(backbone.layers) - 1}")]
    places = {"branch1": (0, 2), "branch2": (0, 3, 5)}
    for i in range(len(backbone.layers) - 1):
        for branch, firsts in places.items():
            for k, first in enumerate(firsts):
                rules += _pair(f"stage{i + 2}.{{j}}.{branch}", f"backbone.layers.{i}.{{j}}.{branch}.{k}", first)
    return Table([*rules, *head_rules(model, "fc")], prefixes=_MODULE)


def _mobilevit(
    backbone: Any, conv: Callable[[str, str], list[Rule]], place: str, parts: dict[str, str], layer: dict[str, str]
) -> list[Rule]:
    """The blocks of both kinds.

    Args:
        conv: (their name of a convolution and its norm, ours) -> rules.
        place: their name of a block, of its stage {i} and its number {j} there.
        parts: our names of what is in a block -> theirs.
        layer: their names of what is in a layer of its transformer -> ours.
    """
    rules = []
    for i, stage in enumerate(backbone.layers):
        for j, block in enumerate(stage):
            theirs, ours = place.format(i=i, j=j, next=i + 1), f"backbone.layers.{i}.{j}"
            for name in ("expand_conv", "depthwise_conv", "linear_conv"):
                if getattr(block, name, None) is not None:
                    rules += conv(f"{theirs}.{parts[name]}", f"{ours}.{block.state_names[name]}")
            if not hasattr(block, "global_rep"):
                continue
            norm, inside = f"global_rep.{len(block.global_rep) - 1}", f"{theirs}.{parts['layers']}.{{k}}"
            for name in ("local_rep.0", "local_rep.1", "conv_proj", "conv_fusion"):
                rules += conv(f"{theirs}.{parts[name]}", f"{ours}.{name}")
            rules.append(Rule(f"{theirs}.{parts.get('norm', norm)}.{{p}}", f"{ours}.{norm}.{{p}}"))
            rules += [
                Rule(f"{inside}.{one}.{{p}}", f"{ours}.global_rep.{{k}}.{two}.{{p}}") for one, two in layer.items()
            ]
    return rules


def timm_mobilevit(backbone: Any, model: Any) -> Table:
    """`MobileViT`."""
    parts = {"expand_conv": "conv1_1x1", "depthwise_conv": "conv2_kxk", "linear_conv": "conv3_1x1"}
    parts |= {"local_rep.0": "conv_kxk", "local_rep.1": "conv_1x1", "layers": "transformer", "norm": "norm"}
    parts |= {"conv_proj": "conv_proj", "conv_fusion": "conv_fusion"}
    layer = {"norm1": "ln1", "attn.qkv": "attn.qkv", "attn.proj": "attn.proj", "norm2": "ln2"}
    layer |= {"mlp.fc1": "ffn.layers.0.0", "mlp.fc2": "ffn.layers.1"}

    def conv(theirs: str, ours: str) -> list[Rule]:
        bare = [Rule(f"{theirs}.weight", f"{ours}.conv.weight")]
        return bare if ours.endswith("local_rep.1") else _module(theirs, ours)

    rules = [
        *_module("stem", "backbone.stem"),
        *_module("final_conv", "backbone.conv_1x1_exp"),
        *_mobilevit(backbone, conv, "stages.{i}.{j}", parts, layer),
    ]
    return Table([*rules, *head_rules(model, "head.fc")], prefixes=_MODULE)


def cvnets_mobilevit(backbone: Any, model: Any) -> Table:
    """The release of `MobileViT`, which counts stages from 1."""
    parts = {"expand_conv": "block.exp_1x1", "depthwise_conv": "block.conv_3x3", "linear_conv": "block.red_1x1"}
    parts |= {"local_rep.0": "local_rep.conv_3x3", "local_rep.1": "local_rep.conv_1x1", "layers": "global_rep"}
    parts |= {"conv_proj": "conv_proj", "conv_fusion": "fusion"}
    layer = {"pre_norm_mha.0": "ln1", "pre_norm_mha.1.qkv_proj": "attn.qkv", "pre_norm_mha.1.out_proj": "attn.proj"}
    layer |= {"pre_norm_ffn.0": "ln2", "pre_norm_ffn.1": "ffn.layers.0.0", "pre_norm_ffn.4": "ffn.layers.1"}

    def conv(theirs: str, ours: str) -> list[Rule]:
        return _conv(f"{theirs}.block.conv", f"{theirs}.block.norm", ours)

    rules = [
        *conv("conv_1", "backbone.stem"),
        *conv("conv_1x1_exp", "backbone.conv_1x1_exp"),
        *_mobilevit(backbone, conv, "layer_{next}.{j}", parts, layer),
    ]
    return Table([*rules, *head_rules(model, "classifier.fc")], prefixes=_MODULE)


_EDGENEXT = {
    "norm.{p}": "norm.{p}",
    "gamma": "gamma",
    "convs.{k}.{p}": "conv_modules.{k}.{p}",
    "pos_embd.token_projection.{p}": "pos_embed.proj.{p}",
    "norm_xca.{p}": "norm_csa.{p}",
    "gamma_xca": "gamma_csa",
    "xca.temperature": "csa.scale",
    "xca.qkv.{p}": "csa.qkv.{p}",
    "xca.proj.{p}": "csa.proj.{p}",
}


def _edgenext(backbone: Any, theirs: str, depthwise: str, pointwise: str, norm: str) -> list[Rule]:
    """All but downsampling and head. The names are theirs: of a block and its convolutions, and the last norm."""
    ours = "backbone.stages.{i}.{j}"
    names = {f"{depthwise}.{{p}}": "depthwise_conv.{p}", f"{pointwise}{{k}}.{{p}}": "pointwise_conv{k}.{p}"} | _EDGENEXT
    return [
        Rule("pos_embd.token_projection.{p}", "backbone.pos_embed.proj.{p}"),
        *(Rule(f"{theirs}.{other}", f"{ours}.{name}") for other, name in names.items()),
        Rule(f"{norm}.{{p}}", f"backbone.norm{backbone.out_indices[-1]}.{{p}}"),
    ]


def timm_edgenext(backbone: Any, model: Any) -> Table:
    """`EdgeNeXt`."""
    rules = [
        Rule("stem.{k}.{p}", "backbone.downsample_layers.0.{k}.{p}"),
        Rule("stages.{i}.downsample.{k}.{p}", "backbone.downsample_layers.{i}.{k}.{p}"),
        *_edgenext(backbone, "stages.{i}.blocks.{j}", "conv_dw", "mlp.fc", "head.norm"),
    ]
    return Table([*rules, *head_rules(model, "head.fc")], prefixes=_MODULE)


def edgenext(backbone: Any, model: Any) -> Table:
    """The release of `EdgeNeXt`."""
    rules = [
        Rule("downsample_layers.{i}.{k}.{p}", "backbone.downsample_layers.{i}.{k}.{p}"),
        *_edgenext(backbone, "stages.{i}.{j}", "dwconv", "pwconv", "norm"),
    ]
    return Table([*rules, *head_rules(model, "head")], prefixes=_MODULE)


# A bias before a norm does what a lower running mean does.
_FOLDED = Transform(lambda xs: [xs[1] - xs[0]], lambda xs: [np.zeros_like(xs[0]), xs[0]])


def timm_hrnet(backbone: Any, model: Any) -> Table:
    """`HRNet`: the backbone's names are the same, those of the neck are not; its convolutions have biases there."""
    rules = [
        *head_rules(model, "classifier"),
        Rule("incre_modules.{rest}", "neck.0.increase_layers.{rest}"),
    ]
    for name, other in (
        ("downsamp_modules.{i}", "neck.0.downsample_layers.{i}"),
        ("final_layer", "neck.0.final_layer"),
    ):
        rules += [
            Rule((f"{name}.0.bias", f"{name}.1.running_mean"), f"{other}.bn.running_mean", _FOLDED),
            *_pair(name, other),
        ]
    return Table([*rules, Rule("{rest}", "backbone.{rest}")], prefixes=_MODULE)


def timm_cspnet(backbone: Any, model: Any) -> Table:
    """`CSPDarkNet`, `CSPResNet` and `CSPResNeXt`."""
    names = {
        "conv_down": "downsample_conv",
        "conv_exp": "expand_conv",
        "conv_transition_b": "atfer_blocks_conv",
        "conv_transition": "final_conv",
    }
    darknet = backbone.expand_act
    rules = _module("stem.conv1", "backbone.stem" if darknet else "backbone.stem.0")
    for other, name in names.items():
        rules += _module(f"stages.{{i}}.{other}", f"backbone.stages.{{i}}.{name}")
    block, ours = "stages.{i}.blocks.{j}.conv", "backbone.stages.{i}.blocks.{j}"
    if darknet:
        rules += _module(f"{block}{{k}}", f"{ours}.conv{{k}}")
    else:
        rules += [
            Rule(f"{block}{{k}}.conv.weight", f"{ours}.conv{{k}}.weight"),
            Rule(f"{block}{{k}}.bn.{{bn}}", f"{ours}.bn{{k}}.{{bn}}"),
        ]
    return Table([*rules, *head_rules(model, "head.fc")], prefixes=_MODULE)


TABLES = {
    "timm": {
        "MobileNetV2": timm_mobilenet_v2,
        "MobileNetV3": timm_mobilenet_v3,
        "MobileViT": timm_mobilevit,
        "EdgeNeXt": timm_edgenext,
        "HRNet": timm_hrnet,
        "CSPNet": timm_cspnet,
    },
    "torchvision": {
        "MobileNetV2": torchvision_mobilenet_v2,
        "MobileNetV3": torchvision_mobilenet_v3,
        "ShuffleNetV2": torchvision_shufflenet_v2,
    },
    "cvnets": {"MobileViT": cvnets_mobilevit},
    "edgenext": {"EdgeNeXt": edgenext},
    "hrnet": {"HRNet": timm_hrnet},
}
