"""timm's names of TNT, Twins, MViTv2 and DaViT (see `interop.timm`).

Settings that names do not tell: Twins and MViTv2 have norm_cfg=dict(type='LN', eps=1e-6); Twins besides qkv_bias=True and
norm_after_stage=[False, False, False, True].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxpretrain.interop.mmpretrain import head_rules
from jaxpretrain.interop.rules import Rule, Table, Transform
from jaxpretrain.interop.timm import nothing

_MODULE = ("module.",)


def _renamed(theirs: str, ours: str, names: dict[str, str]) -> list[Rule]:
    """Rules for the parts of a layer: their names -> ours."""
    return [Rule(f"{theirs}.{one}".lstrip("."), f"{ours}.{other}") for one, other in names.items()]


_MLP = {"mlp.fc1.{p}": "ffn.layers.0.0.{p}", "mlp.fc2.{p}": "ffn.layers.1.{p}"}


def _split_values(arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    width = arrays[0].shape[1]
    return [arrays[0][: 2 * width], arrays[0][2 * width :]]


_PACKED = Transform(lambda arrays: [np.concatenate(arrays)], _split_values)


def tnt(backbone: Any, model: Any) -> Table:
    """`TNT`, of timm's legacy form; queries and keys are one matrix there, values another."""
    rules = [Rule(name, f"backbone.{name}") for name in ("cls_token", "patch_pos", "pixel_pos")]
    top = {name: name for name in ("pixel_embed.proj.{p}", "norm1_proj.{p}", "norm2_proj.{p}", "norm.{p}")}
    rules += _renamed("", "backbone", top | {"proj.{p}": "projection.{p}"})
    theirs, ours = "blocks.{i}", "backbone.layers.{i}"
    rules += _renamed(theirs, ours, {"norm1_proj.{p}": "norm_proj.{p}", "proj.{p}": "projection.{p}"})
    for block, attn, norm1, norm2, mlp in (
        ("inner_block", "attn_in", "norm_in", "norm_mlp_in", "mlp_in"),
        ("outer_block", "attn_out", "norm_out", "norm_mlp", "mlp"),
    ):
        packed = (f"{theirs}.{attn}.qk.weight", f"{theirs}.{attn}.v.weight")
        rules.append(Rule(packed, f"{ours}.{block}.attn.attn.in_proj_weight", _PACKED))
        names = {f"{attn}.proj.{{p}}": "attn.attn.out_proj.{p}", f"{norm1}.{{p}}": "norm_attn.{p}"}
        names |= {f"{norm2}.{{p}}": "norm_ffn.{p}", f"{mlp}.fc1.{{p}}": "ffn.layers.0.0.{p}"}
        rules += _renamed(theirs, f"{ours}.{block}", names | {f"{mlp}.fc2.{{p}}": "ffn.layers.1.{p}"})
    return Table([*rules, *head_rules(model, "head")], prefixes=_MODULE)


def twins(backbone: Any, model: Any) -> Table:
    """`PCPVT` and `SVT`."""
    attention = {f"attn.{part}.{{p}}": f"attn.{part}.{{p}}" for part in ("q", "kv", "qkv", "sr", "norm", "proj")}
    norms = {f"norm{k}.{{p}}": f"norm{k}.{{p}}" for k in (1, 2)}
    patches = {"proj.{p}": "projection.{p}", "norm.{p}": "norm.{p}"}
    rules = [
        *_renamed("patch_embeds.{i}", "backbone.patch_embeds.{i}", patches),
        Rule("pos_block.{i}.proj.0.{p}", "backbone.position_encodings.{i}.proj.{p}"),
        *_renamed("blocks.{i}.{j}", "backbone.stages.{i}.{j}", norms | attention | _MLP),
        Rule("norm.{p}", f"backbone.norm_after_stage{len(backbone.stages) - 1}.{{p}}"),
        *head_rules(model, "head"),
    ]
    return Table(rules, prefixes=_MODULE)


def mvit(backbone: Any, model: Any) -> Table:
    """`MViT`. timm counts the blocks of each stage anew."""
    names = {f"norm{k}.{{p}}": f"norm{k}.{{p}}" for k in (1, 2)}
    names |= {f"mlp.fc{k}.{{p}}": f"mlp.fc{k}.{{p}}" for k in (1, 2)}
    names |= {f"attn.{part}.{{p}}": f"attn.{part}.{{p}}" for part in ("qkv", "proj", "norm_q", "norm_k", "norm_v")}
    names |= {f"attn.pool_{part}.weight": f"attn.pool_{part}.weight" for part in "qkv"}
    names |= {f"attn.rel_pos_{part}": f"attn.rel_pos_{part}" for part in "hw"}
    shortcut = "attn" if backbone.blocks[0].dim_mul_in_attention else "mlp"
    names |= {f"shortcut_proj_{shortcut}.{{p}}": "proj.{p}"}
    rules = [Rule("patch_embed.proj.{p}", "backbone.patch_embed.projection.{p}")]
    first = 0
    for stage, last in enumerate(backbone.scale_ends):
        for i in range(first, last + 1):
            rules += _renamed(f"stages.{stage}.blocks.{i - first}", f"backbone.blocks.{i}", names)
        first = last + 1
    norm = f"backbone.norm{len(backbone.scale_ends) - 1}.{{p}}"
    return Table([*rules, Rule("norm.{p}", norm), *head_rules(model, "head.fc")], prefixes=_MODULE)


def davit(backbone: Any, model: Any) -> Table:
    """`DaViT`. timm's stages begin with the downsampling."""
    conv = {"conv.{p}": "projection.{p}", "norm.{p}": "norm.{p}"}
    rules = [*_renamed("stem", "backbone.patch_embed", conv)]
    rules += _renamed("stages.{i+1}.downsample", "backbone.stages.{i}.downsample", conv)
    names = {f"{part}.{{p}}": f"{part}.{{p}}" for part in ("cpe1.proj", "norm1", "cpe2.proj", "norm2")}
    for k, (half, attn) in enumerate((("spatial_block", "attn.w_msa"), ("channel_block", "attn"))):
        attention = {f"attn.{part}.{{p}}": f"{attn}.{part}.{{p}}" for part in ("qkv", "proj")}
        ours = f"backbone.stages.{{i}}.blocks.{{j}}.{half}"
        rules += _renamed(f"stages.{{i}}.blocks.{{j}}.{k}", ours, names | attention | _MLP)
    rules.append(Rule("head.norm.{p}", f"backbone.norm{len(backbone.stages) - 1}.{{p}}"))
    return Table([*rules, *head_rules(model, "head.fc")], prefixes=_MODULE)


# A kind of VisionTransformer, but of its own names.
_REVERSIBLE = {"RevVisionTransformer": nothing}
TABLES: dict[str, dict[str, Any]] = {
    "timm": {"TNT": tnt, "PCPVT": twins, "MViT": mvit, "DaViT": davit} | _REVERSIBLE,
    **dict.fromkeys(
        ("torchvision", "hf", "deit", "dino", "ibot", "dinov2", "mae", "mocov3", "clip", "ijepa"), _REVERSIBLE
    ),
}
