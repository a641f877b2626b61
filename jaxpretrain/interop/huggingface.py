"""Hugging Face transformers' names (https://github.com/huggingface/transformers): those of the files on its hub.

transformers 5 renames most models when it reads them, so `model.state_dict()` has other names than `save_pretrained` writes.
Both are taken; what is exported has the hub's names: write it to `model.safetensors` beside the `config.json`, and
`from_pretrained(directory)` of any version takes it.

Some defaults differ from ours, and with them the numbers:
    ViT, DeiT, BEiT: norm_cfg=dict(type='LN', eps=1e-12)
    CLIP: norm_cfg=dict(type='LN', eps=1e-5), pre_norm=True; layer_cfgs=dict(act_cfg=dict(type='QuickGELU')) unless the
        config says hidden_act='gelu'
    DINOv2: layer_scale_init_value=1.0; the giant also layer_cfgs=dict(ffn_type='swiglu_fused')
"""

from __future__ import annotations

from typing import Any

from jaxpretrain.interop.mmpretrain import head_rules
from jaxpretrain.interop.rules import Rule, Table, also_named, leading_axes, merged_patches, stack

_QKV = ("query", "key", "value")

# The hub's names and those of transformers 5.
_RENAMED = (
    ("encoder.layer.", "layers."),
    *((f".attention.attention.{part}", f".attention.{part[0]}_proj") for part in _QKV),
    *((f".attention.self.{part}", f".attention.{part[0]}_proj") for part in _QKV),
    (".attention.output.dense", ".attention.o_proj"),
    (".intermediate.dense", ".mlp.fc1"),
    (".output.dense", ".mlp.fc2"),
)


def _qkv(theirs: str, ours: str, kind: str = "{p}") -> Rule:
    return Rule(tuple(f"{theirs}.{part}.{kind}" for part in _QKV), f"{ours}.qkv.{kind}", stack(3))


def _layer(theirs: str, ours: str) -> list[Rule]:
    """A layer of ViT, DeiT or ViTMAE."""
    return [
        _qkv(f"{theirs}.attention.attention", f"{ours}.attn"),
        Rule(theirs + ".attention.output.dense.{p}", ours + ".attn.proj.{p}"),
        Rule(theirs + ".layernorm_before.{p}", ours + ".ln1.{p}"),
        Rule(theirs + ".layernorm_after.{p}", ours + ".ln2.{p}"),
        Rule(theirs + ".intermediate.dense.{p}", ours + ".ffn.layers.0.0.{p}"),
        Rule(theirs + ".output.dense.{p}", ours + ".ffn.layers.1.{p}"),
    ]


_PATCHES = Rule("embeddings.patch_embeddings.projection.{p}", "backbone.patch_embed.projection.{p}")
_VIT = [
    Rule("embeddings.cls_token", "backbone.cls_token"),
    Rule("embeddings.position_embeddings", "backbone.pos_embed"),
    _PATCHES,
    *_layer("encoder.layer.{i}", "backbone.layers.{i}"),
    Rule("layernorm.{p}", "backbone.ln1.{p}"),
]


def vision_transformer(backbone: Any, model: Any) -> Table:
    """`VisionTransformer`: CLIP's image tower if it has `pre_norm`, DINOv2 if it has LayerScale, else ViT.

    The pooler of `ViTModel` and the decoder of ViTMAE are left out.
    """
    if backbone.pre_norm is not None:
        return _clip()
    if backbone.layers[0].attn.gamma1 is not None or backbone.register_tokens is not None:
        return _dinov2(backbone, model)
    rules = [*_VIT, *head_rules(model, "classifier")]
    return Table(also_named(rules, _RENAMED), ignore=[r"^pooler\.", r"^decoder\."], prefix="vit.")


def deit(backbone: Any, model: Any) -> Table:
    """`DistilledVisionTransformer`: `DeiTForImageClassificationWithTeacher`; without it, if the head looks at one token."""
    two = "head_dist" in getattr(getattr(model, "head", None), "layers", ())
    rules = [
        *_VIT,
        Rule("embeddings.distillation_token", "backbone.dist_token"),
        *head_rules(model, "cls_classifier" if two else "classifier"),
        Rule("distillation_classifier.{p}", "head.layers.head_dist.{p}"),
    ]
    return Table(also_named(rules, _RENAMED), ignore=[r"^pooler\."], prefix="deit.")


def mae(backbone: Any, model: Any) -> Table:
    """`MAE`: `ViTMAEForPreTraining`, with its decoder and both tables of positions."""
    rules = [
        *_VIT,
        Rule("decoder.decoder_embed.{p}", "neck.decoder_embed.{p}"),
        Rule("decoder.mask_token", "neck.mask_token"),
        Rule("decoder.decoder_pos_embed", "neck.decoder_pos_embed"),
        *_layer("decoder.decoder_layers.{i}", "neck.decoder_blocks.{i}"),
        Rule("decoder.decoder_norm.{p}", "neck.ln1.{p}"),
        Rule("decoder.decoder_pred.{p}", "neck.decoder_pred.{p}"),
    ]
    # transformers 5.23 takes `layers.` in `decoder_layers.` for the encoder's when it saves.
    saved = also_named(also_named(rules, _RENAMED), [("decoder.decoder_layers.", "decoder.decoder_encoder.layer.")])
    return Table(saved, prefix="vit.")


def _dinov2(backbone: Any, model: Any) -> Table:
    """`Dinov2Model` and `Dinov2WithRegistersModel`.

    The mask token is left out. Their classifier sees class token and mean patch in one: it takes 2 C channels.
    """
    theirs, ours = "encoder.layer.{i}", "backbone.layers.{i}"
    rules = [
        *_VIT[:3],
        Rule("embeddings.register_tokens", "backbone.register_tokens"),
        *_layer(theirs, ours)[:2],
        Rule(f"{theirs}.norm1.{{p}}", f"{ours}.ln1.{{p}}"),
        Rule(f"{theirs}.norm2.{{p}}", f"{ours}.ln2.{{p}}"),
        Rule(f"{theirs}.layer_scale1.lambda1", f"{ours}.attn.gamma1.weight"),
        Rule(f"{theirs}.layer_scale2.lambda1", f"{ours}.ffn.gamma2.weight"),
        Rule(f"{theirs}.mlp.fc1.{{p}}", f"{ours}.ffn.layers.0.0.{{p}}"),
        Rule(f"{theirs}.mlp.fc2.{{p}}", f"{ours}.ffn.layers.1.{{p}}"),
        Rule(f"{theirs}.mlp.weights_in.{{p}}", f"{ours}.ffn.w12.{{p}}"),
        Rule(f"{theirs}.mlp.weights_out.{{p}}", f"{ours}.ffn.w3.{{p}}"),
        _VIT[-1],
        *head_rules(model, "classifier"),
    ]
    halves = (f"{theirs}.mlp.gate_proj.{{p}}", f"{theirs}.mlp.up_proj.{{p}}")
    new = [*_RENAMED[1:], (".mlp.weights_out", ".mlp.down_proj")]
    prefix = "dinov2." if backbone.register_tokens is None else "dinov2_with_registers."
    rules = [*also_named(rules, new), Rule(halves, f"{ours}.ffn.w12.{{p}}", stack(2))]
    return Table(rules, ignore=[r"^embeddings\.mask_token$"], prefix=prefix)


def _clip() -> Table:
    """`CLIPVisionModel`, and the image half of `CLIPModel`: the text tower and both projections are left out."""
    theirs, ours = "vision_model.encoder.layers.{i}", "backbone.layers.{i}"
    heads = tuple(f"{theirs}.self_attn.{part}_proj.{{p}}" for part in "qkv")
    rules = [
        Rule("vision_model.embeddings.class_embedding", "backbone.cls_token", leading_axes(2)),
        Rule("vision_model.embeddings.patch_embedding.{p}", "backbone.patch_embed.projection.{p}"),
        Rule("vision_model.embeddings.position_embedding.weight", "backbone.pos_embed", leading_axes(1)),
        Rule("vision_model.pre_layrnorm.{p}", "backbone.pre_norm.{p}"),
        Rule(heads, f"{ours}.attn.qkv.{{p}}", stack(3)),
        Rule(f"{theirs}.self_attn.out_proj.{{p}}", f"{ours}.attn.proj.{{p}}"),
        Rule(f"{theirs}.layer_norm1.{{p}}", f"{ours}.ln1.{{p}}"),
        Rule(f"{theirs}.layer_norm2.{{p}}", f"{ours}.ln2.{{p}}"),
        Rule(f"{theirs}.mlp.fc1.{{p}}", f"{ours}.ffn.layers.0.0.{{p}}"),
        Rule(f"{theirs}.mlp.fc2.{{p}}", f"{ours}.ffn.layers.1.{{p}}"),
        Rule("vision_model.post_layernorm.{p}", "backbone.ln1.{p}"),
    ]
    ignore = [r"^text_model\.", r"^(visual|text)_projection\.", r"^logit_scale$", r"\.position_ids$"]
    return Table(also_named(rules, [("vision_model.", "")]), ignore=ignore)


def beit(backbone: Any, model: Any) -> Table:
    """`BEiTViT`: BEiT and BEiT v2, whose keys have no bias.

    The mask token, and the prediction of visual tokens, are left out. EVA's keys have a bias; transformers has no EVA.
    """
    theirs, ours = "encoder.layer.{i}", "backbone.layers.{i}"
    table = "relative_position_bias.relative_position_bias_table"
    rules = [
        *_VIT[:3],
        _qkv(f"{theirs}.attention.attention", f"{ours}.attn", "weight"),
        Rule(f"{theirs}.attention.attention.query.bias", f"{ours}.attn.q_bias"),
        Rule(f"{theirs}.attention.attention.value.bias", f"{ours}.attn.v_bias"),
        Rule(f"{theirs}.attention.attention.{table}", f"{ours}.attn.relative_position_bias_table"),
        Rule(f"encoder.{table}", "backbone.rel_pos_bias.relative_position_bias_table"),
        Rule(f"{theirs}.lambda_1", f"{ours}.gamma_1"),
        Rule(f"{theirs}.lambda_2", f"{ours}.gamma_2"),
        *_layer(theirs, ours)[1:],
        Rule("pooler.layernorm.{p}", "backbone.ln2.{p}"),
        _VIT[-1],
        *head_rules(model, "classifier"),
    ]
    new = [
        (f".attention.attention.{table}", f".{table}"),
        (f"encoder.{table}", "shared_position_bias.relative_position_bias_table"),
        *_RENAMED,
    ]
    ignore = [r"relative_position_index$", r"^embeddings\.mask_token$", r"^lm_head\."]
    return Table(also_named(rules, new), ignore=ignore, prefix="beit.")


def swin(backbone: Any, model: Any) -> Table:
    """`SwinTransformer`. The index tables are left out."""
    table = "relative_position_bias_table"
    theirs = "encoder.layers.{i}.blocks.{j}"
    attention, ours = f"{theirs}.attention.self", "backbone.stages.{i}.blocks.{j}.attn.w_msa"
    rules = [
        _qkv(attention, ours),
        Rule(f"{attention}.{table}", f"{ours}.{table}"),
        *_swin(backbone, model),
        Rule("encoder.layers.{i}.downsample.norm.{p}", "backbone.stages.{i}.downsample.norm.{p}", merged_patches(0)),
        Rule("encoder.layers.{i}.downsample.reduction.weight", _reduction("{i}"), merged_patches(1)),
    ]
    new = [(f".attention.self.{table}", f".attention.relative_position_bias.{table}"), *_RENAMED]
    return Table(also_named(rules, new), ignore=[r"relative_position_index$"], prefix="swin.")


def swinv2(backbone: Any, model: Any) -> Table:
    """`SwinTransformerV2`: its stages begin with the downsampling, theirs end with it. The index tables are left out."""
    theirs, ours = "encoder.layers.{i}.blocks.{j}.attention.self", "backbone.stages.{i}.blocks.{j}.attn.w_msa"
    rules = [
        _qkv(theirs, ours, "weight"),
        Rule(f"{theirs}.query.bias", f"{ours}.q_bias"),
        Rule(f"{theirs}.value.bias", f"{ours}.v_bias"),
        Rule(f"{theirs}.logit_scale", f"{ours}.logit_scale"),
        Rule(f"{theirs}.continuous_position_bias_mlp.{{k}}.{{p}}", f"{ours}.cpb_mlp.{{k}}.{{p}}"),
        *_swin(backbone, model),
        Rule("encoder.layers.{i}.downsample.norm.{p}", "backbone.stages.{i+1}.downsample.norm.{p}"),
        Rule("encoder.layers.{i}.downsample.reduction.weight", _reduction("{i+1}"), merged_patches(1)),
    ]
    ignore = [r"relative_(position_index|coords_table)$"]
    return Table(also_named(rules, _RENAMED), ignore=ignore, prefix="swinv2.")


def _reduction(stage: str) -> str:
    return f"backbone.stages.{stage}.downsample.reduction.weight"


def _swin(backbone: Any, model: Any) -> list[Rule]:
    """What both versions share."""
    theirs, ours = "encoder.layers.{i}.blocks.{j}", "backbone.stages.{i}.blocks.{j}"
    return [
        _PATCHES,
        Rule("embeddings.norm.{p}", "backbone.patch_embed.norm.{p}"),
        Rule("embeddings.position_embeddings", "backbone.absolute_pos_embed"),
        Rule(f"{theirs}.attention.output.dense.{{p}}", f"{ours}.attn.w_msa.proj.{{p}}"),
        Rule(f"{theirs}.layernorm_before.{{p}}", f"{ours}.norm1.{{p}}"),
        Rule(f"{theirs}.layernorm_after.{{p}}", f"{ours}.norm2.{{p}}"),
        Rule(f"{theirs}.intermediate.dense.{{p}}", f"{ours}.ffn.layers.0.0.{{p}}"),
        Rule(f"{theirs}.output.dense.{{p}}", f"{ours}.ffn.layers.1.{{p}}"),
        Rule("layernorm.{p}", f"backbone.norm{len(backbone.stages) - 1}.{{p}}"),
        *head_rules(model, "classifier"),
    ]


def resnet(backbone: Any, model: Any) -> Table:
    """`ResNet`. `style='caffe'` is their `downsample_in_bottleneck=True`."""
    theirs, ours = "encoder.stages.{i}.layers.{j}", "backbone.layer{i+1}.{j}"
    rules = [
        Rule("embedder.embedder.convolution.weight", "backbone.conv1.weight"),
        Rule("embedder.embedder.normalization.{bn}", "backbone.bn1.{bn}"),
        Rule(f"{theirs}.layer.{{k}}.convolution.weight", f"{ours}.conv{{k+1}}.weight"),
        Rule(f"{theirs}.layer.{{k}}.normalization.{{bn}}", f"{ours}.bn{{k+1}}.{{bn}}"),
        Rule(f"{theirs}.shortcut.convolution.weight", f"{ours}.downsample.0.weight"),
        Rule(f"{theirs}.shortcut.normalization.{{bn}}", f"{ours}.downsample.1.{{bn}}"),
        *head_rules(model, "classifier.1"),
    ]
    return Table(rules, prefix="resnet.")


def sam(backbone: Any, model: Any) -> Table:
    """`ViTSAM`: the image encoder of `SamModel`. Prompt encoder and mask decoder are left out."""
    theirs, ours = "vision_encoder.layers.{i}", "backbone.layers.{i}"
    rules = [
        Rule("vision_encoder.pos_embed", "backbone.pos_embed"),
        Rule("vision_encoder.patch_embed.projection.{p}", "backbone.patch_embed.projection.{p}"),
        Rule(f"{theirs}.layer_norm1.{{p}}", f"{ours}.ln1.{{p}}"),
        Rule(f"{theirs}.layer_norm2.{{p}}", f"{ours}.ln2.{{p}}"),
        Rule(f"{theirs}.attn.rel_pos_h", f"{ours}.attn.rel_pos_h"),
        Rule(f"{theirs}.attn.rel_pos_w", f"{ours}.attn.rel_pos_w"),
        Rule(f"{theirs}.attn.qkv.{{p}}", f"{ours}.attn.qkv.{{p}}"),
        Rule(f"{theirs}.attn.proj.{{p}}", f"{ours}.attn.proj.{{p}}"),
        Rule(f"{theirs}.mlp.lin1.{{p}}", f"{ours}.ffn.layers.0.0.{{p}}"),
        Rule(f"{theirs}.mlp.lin2.{{p}}", f"{ours}.ffn.layers.1.{{p}}"),
        Rule("vision_encoder.neck.conv1.weight", "backbone.channel_reduction.0.weight"),
        Rule("vision_encoder.neck.layer_norm1.{p}", "backbone.channel_reduction.1.{p}"),
        Rule("vision_encoder.neck.conv2.weight", "backbone.channel_reduction.2.weight"),
        Rule("vision_encoder.neck.layer_norm2.{p}", "backbone.channel_reduction.3.{p}"),
    ]
    return Table(rules, ignore=[r"^shared_image_embedding\.", r"^prompt_encoder\.", r"^mask_decoder\."])


def nothing(backbone: Any, model: Any) -> None:
    """Classes that transformers has no model for, though they are kinds of those that it has."""


TABLES: dict[str, dict[str, Any]] = {
    "hf": {
        "VisionTransformer": vision_transformer,
        "DistilledVisionTransformer": deit,
        "MAE": mae,
        "BEiTViT": beit,
        "SwinTransformer": swin,
        "SwinTransformerV2": swinv2,
        "ResNet": resnet,
        "ViTSAM": sam,
        **dict.fromkeys(
            ("DeiT3", "ViTEVA02", "ResNetV1c", "ResNetV1d", "ResNet_CIFAR", "ResNeXt", "SEResNet"), nothing
        ),
    }
}
