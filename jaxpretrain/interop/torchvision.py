"""torchvision's names (https://github.com/pytorch/vision)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxpretrain.interop import timm
from jaxpretrain.interop.mmpretrain import head_rules
from jaxpretrain.interop.rules import Rule, Table, Transform, merged_patches


def vision_transformer(backbone: Any, model: Any) -> Table:
    """`VisionTransformer`. The feed-forward half had other names in early releases; they are found, but not written."""
    theirs, ours = "encoder.layers.encoder_layer_{i}", "backbone.layers.{i}"
    rules = [
        Rule("class_token", "backbone.cls_token"),
        Rule("encoder.pos_embedding", "backbone.pos_embed"),
        Rule("conv_proj.{p}", "backbone.patch_embed.projection.{p}"),
        Rule(f"{theirs}.ln_{{k}}.{{p}}", f"{ours}.ln{{k}}.{{p}}"),
        Rule(f"{theirs}.self_attention.in_proj_{{p}}", f"{ours}.attn.qkv.{{p}}"),
        Rule(f"{theirs}.self_attention.out_proj.{{p}}", f"{ours}.attn.proj.{{p}}"),
        Rule(f"{theirs}.mlp.0.{{p}}", f"{ours}.ffn.layers.0.0.{{p}}"),
        Rule(f"{theirs}.mlp.3.{{p}}", f"{ours}.ffn.layers.1.{{p}}"),
        Rule(f"{theirs}.mlp.linear_1.{{p}}", f"{ours}.ffn.layers.0.0.{{p}}"),
        Rule(f"{theirs}.mlp.linear_2.{{p}}", f"{ours}.ffn.layers.1.{{p}}"),
        Rule("encoder.ln.{p}", "backbone.ln1.{p}"),
        Rule("heads.pre_logits.{p}", "head.layers.pre_logits.{p}"),
        *head_rules(model, "heads.head"),
    ]
    return Table(rules, prefixes=("module.",))


def _square(arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    side = math.isqrt(arrays[0].size)
    return [arrays[0].reshape(side, side)]


_INDEX = Transform(_square, lambda xs: [xs[0].reshape(-1)])


def _without_key_bias(arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    q_bias, _, v_bias = np.split(arrays[0], 3)
    return [q_bias, v_bias]


# Swin V2's keys have no bias: torchvision keeps one, of zeros, and overwrites it with zeros before each use.
_BIASES = Transform(_without_key_bias, lambda xs: [np.concatenate([xs[0], np.zeros_like(xs[0]), xs[1]])])


def swin(backbone: Any, model: Any) -> Table:
    """`SwinTransformer` and `SwinTransformerV2`: one list of patch embedding, stages, downsamplings between them."""
    v2 = backbone.stage_type.downsamples_first
    order = merged_patches(-1)
    rules = [
        Rule("features.0.0.{p}", "backbone.patch_embed.projection.{p}"),
        Rule("features.0.2.{p}", "backbone.patch_embed.norm.{p}"),
    ]
    for i in range(len(backbone.stages)):
        theirs, ours = f"features.{2 * i + 1}.{{j}}", f"backbone.stages.{i}.blocks.{{j}}"
        attn = ("proj.{p}", "relative_position_bias_table", "logit_scale", "relative_coords_table", "cpb_mlp.{k}.{p}")
        msa = f"{ours}.attn.w_msa"
        if v2:
            rules.append(Rule(f"{theirs}.attn.qkv.bias", (f"{msa}.q_bias", f"{msa}.v_bias"), _BIASES))
        rules += [
            Rule(f"{theirs}.norm{{k}}.{{p}}", f"{ours}.norm{{k}}.{{p}}"),
            Rule(f"{theirs}.attn.qkv.{{p}}", f"{msa}.qkv.{{p}}"),
            *(Rule(f"{theirs}.attn.{name}", f"{msa}.{name}") for name in attn),
            Rule(f"{theirs}.attn.relative_position_index", f"{msa}.relative_position_index", _INDEX),
            Rule(f"{theirs}.mlp.0.{{p}}", f"{ours}.ffn.layers.0.0.{{p}}"),
            Rule(f"{theirs}.mlp.3.{{p}}", f"{ours}.ffn.layers.1.{{p}}"),
        ]
        theirs, ours = f"features.{2 * i + 2}", f"backbone.stages.{i + 1 if v2 else i}.downsample"
        rules += [
            Rule(f"{theirs}.reduction.weight", f"{ours}.reduction.weight", order),
            Rule(f"{theirs}.norm.{{p}}", f"{ours}.norm.{{p}}", *([] if v2 else [order])),
        ]
    rules += [Rule("norm.{p}", f"backbone.norm{len(backbone.stages) - 1}.{{p}}"), *head_rules(model, "head")]
    return Table(rules, prefixes=("module.",))


def nothing(backbone: Any, model: Any) -> None:
    """Classes that are kinds of those in torchvision, which has none of them."""


_OTHER_RESNETS = ("ResNetV1c", "ResNetV1d", "ResNet_CIFAR", "SEResNet")
_OTHER_VITS = ("DistilledVisionTransformer", "DeiT3", "BEiTViT", "ViTEVA02", "ViTSAM")
TABLES: dict[str, dict[str, Any]] = {
    "torchvision": {
        **dict.fromkeys((*_OTHER_RESNETS, *_OTHER_VITS), nothing),
        "ResNet": timm.resnet,
        "VisionTransformer": vision_transformer,
        "SwinTransformer": swin,
    }
}
