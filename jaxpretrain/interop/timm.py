"""timm's names (https://github.com/huggingface/pytorch-image-models)."""

from __future__ import annotations

from typing import Any

from jaxpretrain.interop.mmpretrain import head_rules
from jaxpretrain.interop.rules import Rule, Table


def vision_transformer(backbone: Any, model: Any) -> Table:
    """`VisionTransformer`: ViT, DeiT, CLIP's and DINOv2's image towers."""
    rules = [
        Rule("cls_token", "backbone.cls_token"),
        Rule("pos_embed", "backbone.pos_embed"),
        Rule("patch_embed.proj.{p}", "backbone.patch_embed.projection.{p}"),
        Rule("norm_pre.{p}", "backbone.pre_norm.{p}"),
        Rule("blocks.{i}.norm1.{p}", "backbone.layers.{i}.ln1.{p}"),
        Rule("blocks.{i}.attn.qkv.{p}", "backbone.layers.{i}.attn.qkv.{p}"),
        Rule("blocks.{i}.attn.proj.{p}", "backbone.layers.{i}.attn.proj.{p}"),
        Rule("blocks.{i}.ls1.gamma", "backbone.layers.{i}.attn.gamma1.weight"),
        Rule("blocks.{i}.norm2.{p}", "backbone.layers.{i}.ln2.{p}"),
        Rule("blocks.{i}.mlp.fc1.{p}", "backbone.layers.{i}.ffn.layers.0.0.{p}"),
        Rule("blocks.{i}.mlp.fc2.{p}", "backbone.layers.{i}.ffn.layers.1.{p}"),
        Rule("blocks.{i}.ls2.gamma", "backbone.layers.{i}.ffn.gamma2.weight"),
        Rule("norm.{p}", "backbone.ln1.{p}"),
        Rule("fc_norm.{p}", "backbone.ln2.{p}"),
        *head_rules(model, "head"),
    ]
    return Table(rules)


TABLES = {"timm": {"VisionTransformer": vision_transformer}}
