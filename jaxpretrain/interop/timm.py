"""timm's names, those of its releases since 0.9 (https://github.com/huggingface/pytorch-image-models).

Names do not tell all settings, and timm's are not always our defaults. For the same numbers build the model with

    vit_*_clip_*            norm_cfg=dict(type='LN', eps=1e-5)
    vit_*_clip_quickgelu_*  besides, layer_cfgs=dict(act_cfg=dict(type='QuickGELU')): the weights of OpenAI and those
                            trained like them. (timm fine-tunes them with GELU; that is what MMPretrain's zoo has.)
    deit3_*                 ffn_norm='ln2'
    eva02_*                 rope='eva02', norm_cfg=dict(type='LN', eps=1e-6)
    samvit_*                norm_cfg=dict(type='LN', eps=1e-5); SAM's own release has 1e-6
    where timm has fc_norm  out_type='avg_featmap', final_norm=False
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxpretrain.interop.mmpretrain import head_rules
from jaxpretrain.interop.rules import InteropError, Rule, Table, Transform, merged_patches, stack

_MODULE = ("module.",)


def resnet(backbone: Any, model: Any) -> Table:
    """`ResNet` in all its variants: V1c, V1d, wide, ResNeXt, SE."""
    rules = [
        *(_deep_stem() if backbone.deep_stem else _same("", "backbone", "conv1.weight", "bn1.{bn}")),
        *_shortcuts(backbone),
        *_same("layer{i}.{j}", "backbone.layer{i}.{j}", "conv{k}.weight", "bn{k}.{bn}"),
        Rule("layer{i}.{j}.se.fc{k}.{p}", "backbone.layer{i}.{j}.se_layer.conv{k}.conv.{p}"),
        *head_rules(model, "fc"),
    ]
    return Table(rules, prefixes=_MODULE)


def _deep_stem() -> list[Rule]:
    """Three convolutions, each with its norm and ReLU; timm gives the last norm a name apart."""
    convs = [Rule(f"conv1.{3 * i}.weight", f"backbone.stem.{i}.conv.weight") for i in range(3)]
    norms = [
        Rule(f"{norm}.{{bn}}", f"backbone.stem.{i}.bn.{{bn}}") for i, norm in enumerate(("conv1.1", "conv1.4", "bn1"))
    ]
    return convs + norms


def _shortcuts(backbone: Any) -> list[Rule]:
    """timm's V1d counts a pooling layer in each shortcut; ours, and MMPretrain's, only where it strides."""
    blocks = {
        f"layer{i}.{j}.downsample": block.downsample
        for i in range(1, backbone.num_stages + 1)
        for j, block in enumerate(getattr(backbone, f"layer{i}"))
        if block.downsample is not None
    }
    conv = max((len(layers) for layers in blocks.values()), default=2) - 2
    rules = []
    for name, layers in blocks.items():
        ours = len(layers) - 2
        rules += [
            Rule(f"{name}.{conv}.weight", f"backbone.{name}.{ours}.weight"),
            Rule(f"{name}.{conv + 1}.{{bn}}", f"backbone.{name}.{ours + 1}.{{bn}}"),
        ]
    return rules


# Transformers.


def _same(theirs: str, ours: str, *names: str) -> list[Rule]:
    """Rules for names that differ in what they begin with alone."""
    return [Rule(f"{theirs}.{name}".lstrip("."), f"{ours}.{name}") for name in names]


def _block(norm: str = "ln", ffn: str = "ffn", fc1: str = "layers.0.0", fc2: str = "layers.1") -> list[Rule]:
    """What the blocks of all vision transformers have; the arguments are names of ours."""
    theirs, ours = "blocks.{i}", "backbone.layers.{i}"
    return [
        Rule("patch_embed.proj.{p}", "backbone.patch_embed.projection.{p}"),
        Rule(f"{theirs}.norm{{k}}.{{p}}", f"{ours}.{norm}{{k}}.{{p}}"),
        *_same(f"{theirs}.attn", f"{ours}.attn", "qkv.{p}", "proj.{p}"),
        Rule(f"{theirs}.mlp.fc1.{{p}}", f"{ours}.{ffn}.{fc1}.{{p}}"),
        Rule(f"{theirs}.mlp.fc2.{{p}}", f"{ours}.{ffn}.{fc2}.{{p}}"),
    ]


_TOKENS = _same("", "backbone", "cls_token", "pos_embed")
_FINAL_NORMS = [Rule("norm.{p}", "backbone.ln1.{p}"), Rule("fc_norm.{p}", "backbone.ln2.{p}")]


def _add_position_of_class(arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    cls_token, positions = arrays
    return [cls_token, np.concatenate([np.full_like(cls_token, -0.0), positions], axis=1)]  # x + -0.0 is x, for 0.0 too


def _merge_position_of_class(arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    cls_token, positions = arrays
    return [cls_token + positions[:, :1], positions[:, 1:]]


_POSITION_OF_CLASS = Transform(_add_position_of_class, _merge_position_of_class)


def vision_transformer(backbone: Any, model: Any) -> Table:
    """`VisionTransformer` (ViT, DeiT, CLIP, DINOv2, the encoders of MAE and MoCo v3), `DeiT3`, and DeiT distilled.

    With registers, timm's class token has its position added already.
    """
    tokens = ("cls_token", "pos_embed")
    ours = ("backbone.cls_token", "backbone.pos_embed")
    merged = backbone.register_tokens is not None and backbone.num_positioned_tokens == 1
    gated = {"fc1": "w12", "fc2": "w3"} if hasattr(backbone.layers[0].ffn, "w12") else {}
    rules = [
        *([Rule(tokens, ours, _POSITION_OF_CLASS)] if merged else _TOKENS),
        Rule("reg_token", "backbone.register_tokens"),
        Rule("dist_token", "backbone.dist_token"),
        Rule("norm_pre.{p}", "backbone.pre_norm.{p}"),
        *_block(**gated),
        Rule("blocks.{i}.ls1.gamma", "backbone.layers.{i}.attn.gamma1.weight"),
        Rule("blocks.{i}.ls2.gamma", "backbone.layers.{i}.ffn.gamma2.weight"),
        *_FINAL_NORMS,
        *head_rules(model, "head"),
        Rule("head_dist.{p}", "head.layers.head_dist.{p}"),
    ]
    return Table(rules, prefixes=_MODULE)


def beit(backbone: Any, model: Any) -> Table:
    """`BEiTViT`: BEiT, BEiT v2, EVA."""
    layer = "backbone.layers.{i}"
    rules = [
        *_TOKENS,
        Rule("rel_pos_bias.relative_position_bias_table", "backbone.rel_pos_bias.relative_position_bias_table"),
        *_same("blocks.{i}.attn", f"{layer}.attn", "q_bias", "v_bias", "relative_position_bias_table"),
        *_same("blocks.{i}", layer, "gamma_1", "gamma_2"),
        *_block(),
        *_FINAL_NORMS,
        *head_rules(model, "head"),
    ]
    return Table(rules, ignore=(r"relative_position_index$",), prefixes=_MODULE)


def _add_key_bias(arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    q_bias, v_bias = arrays
    return [np.concatenate([q_bias, np.zeros_like(q_bias), v_bias])]


def _drop_key_bias(arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    q_bias, k_bias, v_bias = np.split(arrays[0], 3)
    if k_bias.any():
        raise InteropError("timm's EVA-02 has no bias for keys, but this model's is not zero: it has learnt one")
    return [q_bias, v_bias]


def eva02(backbone: Any, model: Any) -> Table:
    """`ViTEVA02`. Where there is no sub-LN, queries, keys and values are one matrix, and gates and values another."""
    attn, mlp, layer = "blocks.{i}.attn", "blocks.{i}.mlp", "backbone.layers.{i}"
    no_key_bias = Transform(_add_key_bias, _drop_key_bias)
    one = [Rule((f"{attn}.q_bias", f"{attn}.v_bias"), f"{layer}.attn.qkv.bias", no_key_bias)]
    several = [
        Rule(tuple(f"{attn}.{part}_proj.weight" for part in "qkv"), f"{layer}.attn.qkv.weight", stack(3)),
        Rule((f"{attn}.q_proj.bias", f"{attn}.v_proj.bias"), f"{layer}.attn.qkv.bias", no_key_bias),
        Rule((f"{mlp}.fc1_g.{{p}}", f"{mlp}.fc1_x.{{p}}"), f"{layer}.mlp.w12.{{p}}", stack(2)),
        Rule(f"{mlp}.norm.{{p}}", f"{layer}.mlp.norm.{{p}}"),
    ]
    rules = [
        *_TOKENS,
        *(several if backbone.sub_ln else one),
        *_block("norm", "mlp", "w12", "w3"),
        *_FINAL_NORMS,
        *head_rules(model, "head"),
    ]
    return Table(rules, ignore=(r"^rope\.",), prefixes=_MODULE)


def sam(backbone: Any, model: Any) -> Table:
    """`ViTSAM`."""
    rules = [
        *_TOKENS,
        *_same("blocks.{i}.attn", "backbone.layers.{i}.attn", "rel_pos_h", "rel_pos_w"),
        *_block(),
        Rule("neck.{k}.{p}", "backbone.channel_reduction.{k}.{p}"),
        *head_rules(model, "head.fc"),
    ]
    return Table(rules, prefixes=_MODULE)


def swin(backbone: Any, model: Any) -> Table:
    """`SwinTransformer` and `SwinTransformerV2`. timm's stages of either begin with the downsampling."""
    theirs, ours = "layers.{i}.blocks.{j}", "backbone.stages.{i}.blocks.{j}"
    v2 = backbone.stage_type.downsamples_first
    attn = ["qkv.{p}", "proj.{p}", "relative_position_bias_table", "q_bias", "v_bias", "logit_scale", "cpb_mlp.{k}.{p}"]
    down = "layers.{i}.downsample" if v2 else "layers.{i+1}.downsample"
    order = merged_patches(-1)
    rules = [
        Rule("patch_embed.proj.{p}", "backbone.patch_embed.projection.{p}"),
        Rule("patch_embed.norm.{p}", "backbone.patch_embed.norm.{p}"),
        *_same(f"{theirs}.attn", f"{ours}.attn.w_msa", *attn),
        *_same(theirs, ours, "norm{k}.{p}"),
        Rule(f"{theirs}.mlp.fc1.{{p}}", f"{ours}.ffn.layers.0.0.{{p}}"),
        Rule(f"{theirs}.mlp.fc2.{{p}}", f"{ours}.ffn.layers.1.{{p}}"),
        Rule(f"{down}.reduction.weight", "backbone.stages.{i}.downsample.reduction.weight", order),
        # V2 normalises what comes out of the reduction, V1 what goes in.
        Rule(f"{down}.norm.{{p}}", "backbone.stages.{i}.downsample.norm.{p}", *([] if v2 else [order])),
        Rule("norm.{p}", f"backbone.norm{len(backbone.stages) - 1}.{{p}}"),
        *head_rules(model, "head.fc"),
    ]
    return Table(
        rules, ignore=(r"relative_position_index$", r"relative_coords_table$", r"attn_mask$"), prefixes=_MODULE
    )


def nothing(backbone: Any, model: Any) -> None:
    """Classes that are kinds of those in timm, which has none of them."""


TABLES: dict[str, dict[str, Any]] = {
    "timm": {
        "ResNet_CIFAR": nothing,
        "ResNet": resnet,
        "VisionTransformer": vision_transformer,
        "BEiTViT": beit,
        "ViTEVA02": eva02,
        "ViTSAM": sam,
        "SwinTransformer": swin,
    }
}
