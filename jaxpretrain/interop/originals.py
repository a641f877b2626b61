"""The names of the papers' own releases.

Names do not tell all settings, and the releases' are not always our defaults. For the same numbers build the model with

    deit (DeiT III)     ffn_norm='ln2'
    dinov2              layer_scale_init_value=1e-5, img_size=518, patch_size=14; the giant also
                        layer_cfgs=dict(ffn_type='swiglu_fused'), those with registers num_registers=4
    mae, fine-tuned     out_type='avg_featmap', final_norm=False
    beit, eva           out_type='avg_featmap' for classifiers; final_norm=True for what is only pre-trained
    eva (EVA-01)        layer_scale_init_value=0.0, use_abs_pos_emb=True, use_rel_pos_bias=False; the large ones also
                        layer_cfgs=dict(bias=True)
    eva (EVA-02)        rope='eva02', norm_cfg=dict(type='LN', eps=1e-6); the base and large ones also sub_ln=True
    clip                pre_norm=True, norm_cfg=dict(type='LN', eps=1e-5), and for OpenAI's weights
                        layer_cfgs=dict(act_cfg=dict(type='QuickGELU')): they were trained with x * sigmoid(1.702 x).
                        OpenCLIP's were too if their name ends in -quickgelu; the others with GELU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxpretrain.interop.mmpretrain import head_rules
from jaxpretrain.interop.rules import (
    InteropError,
    Rule,
    Table,
    Transform,
    also_named,
    leading_axes,
    merged_patches,
    stack,
)


def _block(theirs: str, ours: str) -> list[Rule]:
    """The names of a transformer block in timm, from which most releases come."""
    return [
        Rule(theirs + ".norm1.{p}", ours + ".ln1.{p}"),
        Rule(theirs + ".attn.qkv.{p}", ours + ".attn.qkv.{p}"),
        Rule(theirs + ".attn.proj.{p}", ours + ".attn.proj.{p}"),
        Rule(theirs + ".norm2.{p}", ours + ".ln2.{p}"),
        Rule(theirs + ".mlp.fc1.{p}", ours + ".ffn.layers.0.0.{p}"),
        Rule(theirs + ".mlp.fc2.{p}", ours + ".ffn.layers.1.{p}"),
    ]


def _vit(theirs: str = "", ours: str = "backbone.") -> list[Rule]:
    return [
        Rule(theirs + "cls_token", ours + "cls_token"),
        Rule(theirs + "pos_embed", ours + "pos_embed"),
        Rule(theirs + "patch_embed.proj.{p}", ours + "patch_embed.projection.{p}"),
        *_block(theirs + "blocks.{i}", ours + "layers.{i}"),
        Rule(theirs + "norm.{p}", ours + "ln1.{p}"),
    ]


def _resnet(theirs: str = "", ours: str = "backbone.") -> list[Rule]:
    """torchvision's names, which are ours."""
    stem, block = (
        ("conv1.weight", "bn1.{bn}"),
        ("conv{k}.weight", "bn{k}.{bn}", "downsample.0.weight", "downsample.1.{bn}"),
    )
    names = [*stem, *(f"layer{{i}}.{{j}}.{name}" for name in block)]
    return [Rule(theirs + name, ours + name) for name in names]


def _encoder(backbone: Any) -> Callable[..., list[Rule]]:
    return _resnet if hasattr(backbone, "layer1") else _vit


def deit(backbone: Any, model: Any) -> Table:
    """DeiT, distilled or not, and DeiT III, whose LayerScale has names of its own."""
    rules = [
        *_vit(),
        Rule("dist_token", "backbone.dist_token"),
        Rule("blocks.{i}.gamma_1", "backbone.layers.{i}.attn.gamma1.weight"),
        Rule("blocks.{i}.gamma_2", "backbone.layers.{i}.ffn.gamma2.weight"),
        *head_rules(model, "head"),
        Rule("head_dist.{p}", "head.layers.head_dist.{p}"),
    ]
    return Table(rules, prefixes=("module.",))


def dino(backbone: Any, model: Any) -> Table:
    """DINO: `VisionTransformer` and `ResNet`, from files of weights or of training; the projection head is left out.

    Of a training checkpoint the teacher is taken, which is the better one; key='student' takes the other.
    """
    return Table(_encoder(backbone)(), ignore=[r"^(head|fc)\."], prefixes=("module.", "backbone."))


def dinov2(backbone: Any, model: Any) -> Table:
    """DINOv2, with registers or without; the mask token and the heads of the training are left out.

    Training numbers the blocks twice, as `blocks.chunk.block.`; both numberings of blocks are the whole network's.
    """
    block, layer = "blocks.{i}", "backbone.layers.{i}"
    rules = [
        *_vit(),
        Rule("register_tokens", "backbone.register_tokens"),
        Rule(f"{block}.ls1.gamma", f"{layer}.attn.gamma1.weight"),
        Rule(f"{block}.ls2.gamma", f"{layer}.ffn.gamma2.weight"),
        Rule(f"{block}.mlp.w12.{{p}}", f"{layer}.ffn.w12.{{p}}"),
        Rule(f"{block}.mlp.w3.{{p}}", f"{layer}.ffn.w3.{{p}}"),
    ]
    rules = also_named(rules, [("blocks.{i}.", "blocks.{k}.{i}.")])
    return Table(rules, ignore=[r"^mask_token$", r"^(dino|ibot)_head\."], prefixes=("module.", "backbone."))


def mae_encoder(backbone: Any, model: Any) -> Table:
    """MAE's encoder, as pre-trained (a decoder is left out) or fine-tuned."""
    rules = [*_vit(), Rule("fc_norm.{p}", "backbone.ln2.{p}"), *head_rules(model, "head")]
    return Table(rules, ignore=[r"^decoder_", r"^mask_token$"])


def mae(backbone: Any, model: Any) -> Table:
    """`MAE`: encoder and decoder, with both tables of positions."""
    same = ("decoder_embed.{p}", "mask_token", "decoder_pos_embed", "decoder_pred.{p}")
    rules = [
        *_vit(),
        *(Rule(name, f"neck.{name}") for name in same),
        *_block("decoder_blocks.{i}", "neck.decoder_blocks.{i}"),
        Rule("decoder_norm.{p}", "neck.ln1.{p}"),
    ]
    return Table(rules)


def moco_encoder(backbone: Any, model: Any) -> Table:
    """MoCo v1 and v2: the encoder of queries; its last layers, the encoder of keys and the queue are left out."""
    ignore = [r"^module\.encoder_q\.fc\.", r"^module\.encoder_k\.", r"^module\.queue"]
    return Table(_resnet("module.encoder_q."), ignore=ignore)


def moco(backbone: Any, model: Any) -> Table:
    """`MoCo`, with both encoders and the queue. The count of steps, which MMPretrain keeps, starts at 0."""
    rules = [Rule("module.queue", "queue"), Rule("module.queue_ptr", "queue_ptr")]
    for theirs, encoder, neck in (
        ("module.encoder_q.", "backbone.", "neck."),
        ("module.encoder_k.", "encoder_k.module.0.", "encoder_k.module.1."),
    ):
        rules += _resnet(theirs, encoder)
        rules += [Rule(theirs + "fc.{p}", neck + "fc.{p}"), Rule(theirs + "fc.{k}.{p}", neck + "mlp.{k}.{p}")]  # v1, v2
    return Table(rules, absent=[r"^encoder_k\.steps$"])


def mocov3_encoder(backbone: Any, model: Any) -> Table:
    """MoCo v3: the online encoder; projector, predictor and momentum encoder are left out."""
    ignore = [r"^module\.base_encoder\.(head|fc)\.", r"^module\.(momentum_encoder|predictor)\."]
    return Table(_encoder(backbone)("module.base_encoder."), ignore=ignore)


def mocov3(backbone: Any, model: Any) -> Table:
    """`MoCoV3`, with all its networks. The count of steps, which MMPretrain keeps, starts at 0."""
    encoder = _encoder(backbone)
    projector = "fc" if encoder is _resnet else "head"
    rules = [
        *encoder("module.base_encoder."),
        *encoder("module.momentum_encoder.", "momentum_encoder.module.0."),
        *_mlp(f"module.base_encoder.{projector}", "neck", 3),
        *_mlp(f"module.momentum_encoder.{projector}", "momentum_encoder.module.1", 3),
        *_mlp("module.predictor", "head.predictor", 3),
    ]
    return Table(rules, absent=[r"^momentum_encoder\.steps$"])


def _mlp(theirs: str, ours: str, layers: int) -> list[Rule]:
    """Up to so many linear layers, a BatchNorm behind each, and a ReLU, which is counted too."""
    linear = [Rule(f"{theirs}.{3 * i}.weight", f"{ours}.fc{i}.weight") for i in range(layers)]
    return linear + [Rule(f"{theirs}.{3 * i + 1}.{{bn}}", f"{ours}.bn{i}.{{bn}}") for i in range(layers)]


def beit(backbone: Any, model: Any) -> Table:
    """`BEiTViT`: BEiT, BEiT v2 and EVA-01; mask token, prediction of visual tokens and BEiT v2's extra layers are left out."""
    bias = ("relative_position_bias_table", "relative_position_index")
    attention = ("q_bias", "v_bias", *bias)
    rules = [
        *_vit(),
        *(Rule(f"blocks.{{i}}.attn.{name}", f"backbone.layers.{{i}}.attn.{name}") for name in attention),
        *(Rule(f"rel_pos_bias.{name}", f"backbone.rel_pos_bias.{name}") for name in bias),
        *(Rule(f"blocks.{{i}}.{name}", f"backbone.layers.{{i}}.{name}") for name in ("gamma_1", "gamma_2")),
        Rule("fc_norm.{p}", "backbone.ln2.{p}"),
        *head_rules(model, "head"),
    ]
    return Table(rules, ignore=[r"^mask_token$", r"^lm_head\.", r"^cls_pt_"], prefixes=("module.",))


def _without_key_bias(arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    q_bias, k_bias, v_bias = np.split(arrays[0], 3)
    if k_bias.any():
        raise InteropError("EVA-02 has no bias for keys, but this model's is not zero: it has learnt one")
    return [q_bias, v_bias]


_NO_KEY_BIAS = Transform(lambda xs: [np.concatenate([xs[0], np.zeros_like(xs[0]), xs[1]])], _without_key_bias)


def eva02(backbone: Any, model: Any) -> Table:
    """`ViTEVA02`. Those with sub-LN have queries, keys and values apart, and gates and values of the feed-forward half too.

    The rotary tables are compared with ours. Mask token and prediction head of the pre-training are left out.
    """
    block, layer = "blocks.{i}", "backbone.layers.{i}"
    one = [
        Rule(f"{block}.attn.qkv.weight", f"{layer}.attn.qkv.weight"),
        Rule(f"{block}.mlp.w12.{{p}}", f"{layer}.mlp.w12.{{p}}"),
    ]
    apart = [
        Rule(tuple(f"{block}.attn.{part}_proj.weight" for part in "qkv"), f"{layer}.attn.qkv.weight", stack(3)),
        Rule((f"{block}.mlp.w1.{{p}}", f"{block}.mlp.w2.{{p}}"), f"{layer}.mlp.w12.{{p}}", stack(2)),
        Rule(f"{block}.mlp.ffn_ln.{{p}}", f"{layer}.mlp.norm.{{p}}"),
    ]
    rules = [
        *_vit()[:3],
        *(apart + one if backbone.sub_ln else one + apart),
        Rule((f"{block}.attn.q_bias", f"{block}.attn.v_bias"), f"{layer}.attn.qkv.bias", _NO_KEY_BIAS),
        Rule(f"{block}.attn.proj.{{p}}", f"{layer}.attn.proj.{{p}}"),
        Rule(f"{block}.norm1.{{p}}", f"{layer}.norm1.{{p}}"),
        Rule(f"{block}.norm2.{{p}}", f"{layer}.norm2.{{p}}"),
        Rule(f"{block}.mlp.w3.{{p}}", f"{layer}.mlp.w3.{{p}}"),
        Rule("rope.{rest}", "backbone.rope.{rest}"),
        Rule(f"{block}.attn.rope.{{rest}}", f"{layer}.attn.rope.{{rest}}"),
        Rule("norm.{p}", "backbone.ln1.{p}"),
        Rule("fc_norm.{p}", "backbone.ln2.{p}"),
        *head_rules(model, "head"),
    ]
    return Table(rules, ignore=[r"^mask_token$", r"^lm_head\."], prefixes=("module.",))


def clip(backbone: Any, model: Any) -> Table:
    """The image tower of CLIP, OpenAI's or OpenCLIP's; the text tower and both projections are left out.

    `VisionTransformer` has no projection: it gives what comes before. What begins with `text.` is OpenCLIP's custom text.
    """
    theirs, ours = "visual.transformer.resblocks.{i}", "backbone.layers.{i}"
    rules = [
        Rule("visual.class_embedding", "backbone.cls_token", leading_axes(2)),
        Rule("visual.positional_embedding", "backbone.pos_embed", leading_axes(1)),
        Rule("visual.conv1.{p}", "backbone.patch_embed.projection.{p}"),
        Rule("visual.ln_pre.{p}", "backbone.pre_norm.{p}"),
        Rule(f"{theirs}.ln_1.{{p}}", f"{ours}.ln1.{{p}}"),
        Rule(f"{theirs}.attn.in_proj_{{p}}", f"{ours}.attn.qkv.{{p}}"),
        Rule(f"{theirs}.attn.out_proj.{{p}}", f"{ours}.attn.proj.{{p}}"),
        Rule(f"{theirs}.ls_1.gamma", f"{ours}.attn.gamma1.weight"),
        Rule(f"{theirs}.ln_2.{{p}}", f"{ours}.ln2.{{p}}"),
        Rule(f"{theirs}.mlp.c_fc.{{p}}", f"{ours}.ffn.layers.0.0.{{p}}"),
        Rule(f"{theirs}.mlp.c_proj.{{p}}", f"{ours}.ffn.layers.1.{{p}}"),
        Rule(f"{theirs}.ls_2.gamma", f"{ours}.ffn.gamma2.weight"),
        Rule("visual.ln_post.{p}", "backbone.ln1.{p}"),
    ]
    text = r"^(text\.|transformer\.|token_embedding\.|ln_final\.|positional_embedding$|text_projection|cls_emb$|attn_mask$)"
    numbers = r"^(logit_scale|logit_bias|input_resolution|context_length|vocab_size)$"
    return Table(rules, ignore=[text, numbers, r"^visual\.proj$"], prefixes=("module.",))


def sam(backbone: Any, model: Any) -> Table:
    """SAM's image encoder. Prompt encoder and mask decoder are left out."""
    rules = [rule.renamed([("mlp.fc", "mlp.lin")]) for rule in _vit("image_encoder.")]
    attention = ("attn.rel_pos_h", "attn.rel_pos_w")
    rules += [Rule(f"image_encoder.blocks.{{i}}.{name}", f"backbone.layers.{{i}}.{name}") for name in attention]
    rules.append(Rule("image_encoder.neck.{k}.{p}", "backbone.channel_reduction.{k}.{p}"))
    return Table(rules, ignore=[r"^prompt_encoder\.", r"^mask_decoder\.", r"^pixel_(mean|std)$"])


def swin(backbone: Any, model: Any) -> Table:
    """Swin v1 and v2. The masks of shifted windows are left out; the other tables are compared with ours."""
    theirs, ours = "layers.{i}.blocks.{j}", "backbone.stages.{i}.blocks.{j}"
    v2 = backbone.stage_type.downsamples_first
    tables = ("relative_position_index", "relative_coords_table")
    weights = (
        "qkv.{p}",
        "proj.{p}",
        "relative_position_bias_table",
        "q_bias",
        "v_bias",
        "logit_scale",
        "cpb_mlp.{k}.{p}",
    )
    down = "backbone.stages.{i+1}.downsample" if v2 else "backbone.stages.{i}.downsample"
    order = merged_patches(-1)
    rules = [
        Rule("patch_embed.proj.{p}", "backbone.patch_embed.projection.{p}"),
        Rule("patch_embed.norm.{p}", "backbone.patch_embed.norm.{p}"),
        Rule("absolute_pos_embed", "backbone.absolute_pos_embed"),
        *(Rule(f"{theirs}.attn.{name}", f"{ours}.attn.w_msa.{name}") for name in (*weights, *tables)),
        Rule(f"{theirs}.norm{{k}}.{{p}}", f"{ours}.norm{{k}}.{{p}}"),
        Rule(f"{theirs}.mlp.fc1.{{p}}", f"{ours}.ffn.layers.0.0.{{p}}"),
        Rule(f"{theirs}.mlp.fc2.{{p}}", f"{ours}.ffn.layers.1.{{p}}"),
        Rule("layers.{i}.downsample.reduction.weight", f"{down}.reduction.weight", order),
        # V2 normalises what comes out of the reduction, V1 what goes in.
        Rule("layers.{i}.downsample.norm.{p}", f"{down}.norm.{{p}}", *([] if v2 else [order])),
        Rule("norm.{p}", f"backbone.norm{len(backbone.stages) - 1}.{{p}}"),
        *head_rules(model, "head"),
    ]
    return Table(rules, ignore=[r"\.attn_mask$"])


def nothing(backbone: Any, model: Any) -> None:
    """Classes that are kinds of those of a release, and no part of it."""


_OTHER_VITS = dict.fromkeys(("DistilledVisionTransformer", "DeiT3", "BEiTViT", "ViTEVA02", "ViTSAM"), nothing)
_OTHER_RESNETS = dict.fromkeys(("ResNetV1c", "ResNetV1d", "ResNet_CIFAR", "ResNeXt", "SEResNet"), nothing)
_OTHERS = _OTHER_VITS | _OTHER_RESNETS

TABLES: dict[str, dict[str, Any]] = {
    "deit": _OTHER_VITS | dict.fromkeys(("VisionTransformer", "DistilledVisionTransformer", "DeiT3"), deit),
    "dino": _OTHERS | {"VisionTransformer": dino, "ResNet": dino},
    "dinov2": _OTHER_VITS | {"VisionTransformer": dinov2},
    "mae": _OTHER_VITS | {"VisionTransformer": mae_encoder, "MAE": mae},
    "moco": _OTHER_RESNETS | {"ResNet": moco_encoder, "MoCo": moco},
    "mocov3": _OTHERS | {"VisionTransformer": mocov3_encoder, "ResNet": mocov3_encoder, "MoCoV3": mocov3},
    "beit": {"BEiTViT": beit},
    "eva": {"BEiTViT": beit, "ViTEVA02": eva02},
    "clip": _OTHER_VITS | {"VisionTransformer": clip},
    "sam": {"ViTSAM": sam},
    "swin": {"SwinTransformer": swin},
}
