"""Backbones with branches that melt into one: timm's names, and those of the papers' own releases, in both forms.

repvgg      https://github.com/DingXiaoH/RepVGG
mobileone   https://github.com/apple/ml-mobileone
replknet    https://github.com/DingXiaoH/RepLKNet-pytorch
repmlp      https://github.com/DingXiaoH/RepMLP
"""

from __future__ import annotations

from typing import Any

from jaxpretrain.interop.mmpretrain import head_rules
from jaxpretrain.interop.rules import Rule, Table

_PREFIXES = ("module.",)

# (a stage's blocks there, in ours): RepVGG's and MobileOne's stages are counted from 1 in ours.
_Places = tuple[tuple[str, str], ...]


def _timm_places(stem: str, stages: str) -> _Places:
    return (("stem", f"backbone.{stem}"), ("stages.{i}.{j}", f"backbone.{stages}{{i+1}}.{{j}}"))


def _branch(theirs: str, ours: str) -> list[Rule]:
    """A convolution and its norm, which is `bn` there."""
    return [Rule(f"{theirs}.conv.weight", f"{ours}.conv.weight"), Rule(f"{theirs}.bn.{{bn}}", f"{ours}.norm.{{bn}}")]


def _repvgg(
    places: _Places, dense: str, point: str, skip: str, one: str, se: tuple[str, str], head: str, model: Any
) -> Table:
    rules = []
    for theirs, ours in places:
        rules += [
            *_branch(f"{theirs}.{dense}", f"{ours}.branch_3x3"),
            *_branch(f"{theirs}.{point}", f"{ours}.branch_1x1"),
            Rule(f"{theirs}.{skip}.{{bn}}", f"{ours}.branch_norm.{{bn}}"),
            Rule(f"{theirs}.{one}.{{p}}", f"{ours}.branch_reparam.{{p}}"),
            *(Rule(f"{theirs}.{name}.{{p}}", f"{ours}.se_layer.conv{i}.conv.{{p}}") for i, name in enumerate(se, 1)),
        ]
    return Table([*rules, *head_rules(model, head)], prefixes=_PREFIXES)


def repvgg_timm(backbone: Any, model: Any) -> Table:
    """`RepVGG`."""
    names = ("conv_kxk", "conv_1x1", "identity", "reparam_conv", ("attn.fc1", "attn.fc2"), "head.fc")
    return _repvgg(_timm_places("stem", "stage_"), *names, model)


def repvgg_original(backbone: Any, model: Any) -> Table:
    """`RepVGG`."""
    places = (("stage0", "backbone.stem"), ("stage{i}.{j}", "backbone.stage_{i}.{j}"))
    names = ("rbr_dense", "rbr_1x1", "rbr_identity", "rbr_reparam", ("se.down", "se.up"), "linear")
    return _repvgg(places, *names, model)


def _mobileone(places: _Places, convs: str, scale: str, skip: str, se: tuple[str, str], head: str, model: Any) -> Table:
    rules = []
    for theirs, ours in places:
        rules += [
            *_branch(f"{theirs}.{convs}.{{k}}", f"{ours}.branch_conv_list.{{k}}"),
            *_branch(f"{theirs}.{scale}", f"{ours}.branch_scale"),
            Rule(f"{theirs}.{skip}.{{bn}}", f"{ours}.branch_norm.{{bn}}"),
            Rule(f"{theirs}.reparam_conv.{{p}}", f"{ours}.branch_reparam.{{p}}"),
            *(Rule(f"{theirs}.{name}.{{p}}", f"{ours}.se.conv{i}.conv.{{p}}") for i, name in enumerate(se, 1)),
        ]
    return Table([*rules, *head_rules(model, head)], prefixes=_PREFIXES)


def mobileone_timm(backbone: Any, model: Any) -> Table:
    """`MobileOne`."""
    names = ("conv_kxk", "conv_scale", "identity", ("attn.fc1", "attn.fc2"), "head.fc")
    return _mobileone(_timm_places("stage0", "stage"), *names, model)


def mobileone_original(backbone: Any, model: Any) -> Table:
    """`MobileOne`."""
    places = (("stage0", "backbone.stage0"), ("stage{i}.{j}", "backbone.stage{i}.{j}"))
    names = ("rbr_conv", "rbr_scale", "rbr_skip", ("se.reduce", "se.expand"), "linear")
    return _mobileone(places, *names, model)


def replknet(backbone: Any, model: Any) -> Table:
    """`RepLKNet`: MMPretrain's names, but for the last norm, which is not the stage's there, and the head."""
    last = len(backbone.stages) - 1
    rules = [
        Rule("norm.{bn}", f"backbone.stages.{last}.norm.{{bn}}"),
        *(Rule(f"{part}.{{rest}}", f"backbone.{part}.{{rest}}") for part in ("stem", "stages", "transitions")),
        *head_rules(model, "head"),
    ]
    return Table(rules, prefixes=_PREFIXES)


def repmlp(backbone: Any, model: Any) -> Table:
    """`RepMLPNet`."""
    theirs, ours = "stages.{i}.{j}", "backbone.stages.{i}.{j}"
    block = "repmlp_block"
    rules = [
        Rule("conv_embedding.conv.weight", "backbone.patch_embed.projection.weight"),
        Rule("conv_embedding.bn.{bn}", "backbone.patch_embed.norm.{bn}"),
        Rule(f"{theirs}.prebn{{k}}.{{bn}}", f"{ours}.norm{{k}}.{{bn}}"),
        Rule(f"{theirs}.{block}.gp.fc{{k}}.{{p}}", f"{ours}.{block}.gp.conv{{k}}.conv.{{p}}"),
        Rule(f"{theirs}.{{rest}}", f"{ours}.{{rest}}"),
        Rule("embeds.{i}.{rest}", "backbone.downsample_layers.{i}.{rest}"),
        Rule("head_norm.{bn}", "backbone.final_norm.{bn}"),
        *head_rules(model, "head"),
    ]
    return Table(rules, prefixes=_PREFIXES)


TABLES: dict[str, dict[str, Any]] = {
    "timm": {"RepVGG": repvgg_timm, "MobileOne": mobileone_timm},
    "repvgg": {"RepVGG": repvgg_original},
    "mobileone": {"MobileOne": mobileone_original},
    "replknet": {"RepLKNet": replknet},
    "repmlp": {"RepMLPNet": repmlp},
}
