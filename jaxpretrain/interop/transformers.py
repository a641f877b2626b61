"""TNT, Twins, MViTv2, DaViT, Conformer, T2T-ViT and RevViT: timm's names (see `interop.timm`), and those of their releases.

    mvit        https://github.com/facebookresearch/mvit
    twins       https://github.com/Meituan-AutoML/Twins, whose names timm has kept
    davit       https://github.com/dingmyu/davit
    conformer   https://github.com/pengzhiliang/Conformer
    t2t         https://github.com/yitu-opensource/T2T-ViT, the models named t2t_vit_t_*; the others are of performers
    slowfast    https://github.com/facebookresearch/SlowFast, its reversible vision transformers

Settings that names do not tell: Twins and MViTv2 have norm_cfg=dict(type='LN', eps=1e-6); Twins besides qkv_bias=True and
norm_after_stage=[False, False, False, True]. T2T-ViT has attention='paper' and layer_cfgs=dict(qk_scale=embed_dims**-0.5).

DaViT is another network in MMPretrain, and here, than in timm and its release: its first convolution pads images as
TensorFlow does, not by 3 on each side, and classifiers have the last norm before the pooling, not behind it. Weights fit,
numbers differ; the accuracies that MMPretrain measured with them are a little under the paper's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxpretrain.interop.mmpretrain import head_rules
from jaxpretrain.interop.rules import Rule, Table, Transform, stack
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


_MVIT_SAME = (
    *("norm1.{p}", "norm2.{p}", "mlp.fc1.{p}", "mlp.fc2.{p}"),
    *(f"attn.{part}.{{p}}" for part in ("qkv", "proj", "norm_q", "norm_k", "norm_v")),
    *(f"attn.pool_{part}.weight" for part in "qkv"),
    *(f"attn.rel_pos_{part}" for part in "hw"),
)
_MVIT_BLOCK = {name: name for name in _MVIT_SAME}


def _mvit_ends(backbone: Any, model: Any, head: str) -> list[Rule]:
    return [
        Rule("patch_embed.proj.{p}", "backbone.patch_embed.projection.{p}"),
        Rule("pos_embed", "backbone.pos_embed"),
        Rule("norm.{p}", f"backbone.norm{len(backbone.scale_ends) - 1}.{{p}}"),
        *head_rules(model, head),
    ]


def mvit_timm(backbone: Any, model: Any) -> Table:
    """`MViT`. timm counts the blocks of each stage anew."""
    shortcut = "attn" if backbone.blocks[0].dim_mul_in_attention else "mlp"
    names = _MVIT_BLOCK | {f"shortcut_proj_{shortcut}.{{p}}": "proj.{p}"}
    rules, first = _mvit_ends(backbone, model, "head.fc"), 0
    for stage, last in enumerate(backbone.scale_ends):
        for i in range(first, last + 1):
            rules += _renamed(f"stages.{stage}.blocks.{i - first}", f"backbone.blocks.{i}", names)
        first = last + 1
    return Table(rules, prefixes=_MODULE)


def mvit(backbone: Any, model: Any) -> Table:
    """The release of `MViT`."""
    names = _MVIT_BLOCK | {"proj.{p}": "proj.{p}"}
    block = _renamed("blocks.{i}", "backbone.blocks.{i}", names)
    return Table([*_mvit_ends(backbone, model, "head.projection"), *block], prefixes=_MODULE)


def _davit_halves(theirs: str, positions: tuple[str, str]) -> list[Rule]:
    """Both halves of DaViT's blocks. `theirs` is a block's name, `positions` are those of its two encodings."""
    rules = []
    for k, (half, attn) in enumerate((("spatial_block", "attn.w_msa"), ("channel_block", "attn"))):
        names = {f"{name}.proj.{{p}}": f"cpe{i}.proj.{{p}}" for i, name in enumerate(positions, 1)}
        names |= {f"norm{i}.{{p}}": f"norm{i}.{{p}}" for i in (1, 2)}
        names |= {f"attn.{part}.{{p}}": f"{attn}.{part}.{{p}}" for part in ("qkv", "proj")}
        rules += _renamed(f"{theirs}.{k}", f"backbone.stages.{{i}}.blocks.{{j}}.{half}", names | _MLP)
    return rules


def davit_timm(backbone: Any, model: Any) -> Table:
    """`DaViT`. timm's stages begin with the downsampling."""
    conv = {"conv.{p}": "projection.{p}", "norm.{p}": "norm.{p}"}
    rules = [
        *_renamed("stem", "backbone.patch_embed", conv),
        *_renamed("stages.{i+1}.downsample", "backbone.stages.{i}.downsample", conv),
        *_davit_halves("stages.{i}.blocks.{j}", ("cpe1", "cpe2")),
        Rule("head.norm.{p}", f"backbone.norm{len(backbone.stages) - 1}.{{p}}"),
    ]
    return Table([*rules, *head_rules(model, "head.fc")], prefixes=_MODULE)


def davit(backbone: Any, model: Any) -> Table:
    """The release of `DaViT`: the classifier, or where several stages are returned, the detector's backbone."""
    conv = {"proj.{p}": "projection.{p}", "norm.{p}": "norm.{p}"}
    norms = Rule("norms.{p}", f"backbone.norm{len(backbone.stages) - 1}.{{p}}")
    rules = [
        *_renamed("patch_embeds.0", "backbone.patch_embed", conv),
        *_renamed("patch_embeds.{i+1}", "backbone.stages.{i}.downsample", conv),
        *_davit_halves("main_blocks.{i}.{j}", ("cpe.0", "cpe.1")),
        norms if len(backbone.out_indices) == 1 else Rule("norm{i}.{p}", "backbone.norm{i}.{p}"),
    ]
    return Table([*rules, *head_rules(model, "head")], prefixes=_MODULE)


_LAYER = {f"norm{k}.{{p}}": f"ln{k}.{{p}}" for k in (1, 2)}
_LAYER |= {f"attn.{part}.{{p}}": f"attn.{part}.{{p}}" for part in ("qkv", "proj")} | _MLP


def conformer(backbone: Any, model: Any) -> Table:
    """The release of `Conformer`, with both classifiers of a `ConformerHead`."""
    blocks = ("conv_1", "conv_trans_{i}")
    rules = [
        Rule("cls_token", "backbone.cls_token"),
        *(Rule(f"{name}.{{p}}", f"backbone.{name}.{{p}}") for name in ("conv1", "trans_patch_conv", "trans_norm")),
        Rule("bn1.{bn}", "backbone.bn1.{bn}"),
        *(rule for i in ("trans_1", "conv_trans_{i}.trans_block") for rule in _renamed(i, f"backbone.{i}", _LAYER)),
        *(Rule(f"{name}.{{rest}}", f"backbone.{name}.{{rest}}") for name in blocks),
        *(Rule(f"{name}.{{p}}", f"head.{name}.{{p}}") for name in ("conv_cls_head", "trans_cls_head")),
    ]
    return Table(rules, prefixes=_MODULE)


def t2t(backbone: Any, model: Any) -> Table:
    """The release of `T2T_ViT`, those with transformers between the tokens. The table of positions is compared with ours."""
    step = "tokens_to_token.attention{i}"
    rules = [
        *(Rule(name, f"backbone.{name}") for name in ("cls_token", "pos_embed", "tokens_to_token.project.{p}")),
        *_renamed(step, f"backbone.{step}", _LAYER),
        *_renamed("blocks.{i}", "backbone.encoder.{i}", _LAYER),
        Rule("norm.{p}", "backbone.norm.{p}"),
    ]
    return Table([*rules, *head_rules(model, "head")], prefixes=_MODULE)


def revvit(backbone: Any, model: Any) -> Table:
    """The release of `RevVisionTransformer`: F is the attention, G the feed-forward half."""
    theirs, ours = "rev_backbone.layers.{i}", "backbone.layers.{i}"
    parts = tuple(f"{theirs}.F.attn.{part}.{{p}}" for part in "qkv")
    names = {"F.norm.{p}": "ln1.{p}", "F.attn.proj.{p}": "attn.proj.{p}", "G.norm.{p}": "ln2.{p}"}
    rules = [
        *(Rule(name, f"backbone.{name}") for name in ("cls_token", "pos_embed")),
        Rule("patch_embed.proj.{p}", "backbone.patch_embed.projection.{p}"),
        Rule(parts, f"{ours}.attn.qkv.{{p}}", stack(3)),
        *_renamed(theirs, ours, names | {f"G.{name}": other for name, other in _MLP.items()}),
        Rule("norm.{p}", "backbone.ln1.{p}"),
    ]
    return Table([*rules, *head_rules(model, "head.projection")], prefixes=_MODULE)


# A kind of VisionTransformer, but of its own names.
_REVERSIBLE = {"RevVisionTransformer": nothing}
TABLES: dict[str, dict[str, Any]] = {
    "timm": {"TNT": tnt, "PCPVT": twins, "MViT": mvit_timm, "DaViT": davit_timm} | _REVERSIBLE,
    "mvit": {"MViT": mvit},
    "twins": {"PCPVT": twins},
    "davit": {"DaViT": davit},
    "conformer": {"Conformer": conformer},
    "t2t": {"T2T_ViT": t2t},
    "slowfast": {"RevVisionTransformer": revvit},
    **dict.fromkeys(
        ("torchvision", "hf", "deit", "dino", "ibot", "dinov2", "mae", "mocov3", "clip", "ijepa"), _REVERSIBLE
    ),
}
