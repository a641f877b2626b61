"""The names of the papers' own releases.

Names do not tell all settings, and the releases' are not always our defaults. For the same numbers build the model with

    deit (DeiT III)     ffn_norm='ln2'
    dinov2              layer_scale_init_value=1e-5, img_size=518, patch_size=14; the giant also
                        layer_cfgs=dict(ffn_type='swiglu_fused'), those with registers num_registers=4
    ibot                for training `IBOTNeck(shared_head=...)` as in the run; the published ones share it
    ijepa               with_cls_token=False, out_type='raw'
    mae, fine-tuned     out_type='avg_featmap', final_norm=False
    beit, eva           out_type='avg_featmap' for classifiers; final_norm=True for what is only pre-trained
    eva (EVA-01)        layer_scale_init_value=0.0, use_abs_pos_emb=True, use_rel_pos_bias=False; the large ones also
                        layer_cfgs=dict(bias=True)
    eva (EVA-02)        rope='eva02', norm_cfg=dict(type='LN', eps=1e-6); the base and large ones also sub_ln=True
    clip                pre_norm=True, norm_cfg=dict(type='LN', eps=1e-5), and for OpenAI's weights
                        layer_cfgs=dict(act_cfg=dict(type='QuickGELU')): they were trained with x * sigmoid(1.702 x).
                        OpenCLIP's were too if their name ends in -quickgelu; the others with GELU.

Training checkpoints of DINO and iBOT hold student, teacher and centres apart: key='*' reads them all, and training goes on from
there. Without it only the teacher is read, and both networks start from it. I-JEPA's hold both encoders and the predictor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
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


def ibot(backbone: Any, model: Any) -> Table:
    """iBOT: `VisionTransformer` and `IBOTViT`; the projection heads are left out."""
    keeps = getattr(backbone, "mask_token", None) is not None
    ignore = [r"^head\."] if keeps else [r"^head\.", r"^masked_embed$"]
    rules = [*_vit(), Rule("masked_embed", "backbone.mask_token")]
    return Table(rules, ignore=ignore, prefixes=("module.", "backbone."), absent=[r"^backbone\.mask_token$"])


Network = Callable[[str, str, str], list[Rule]]


def _student_and_teacher(network: Network, student: str, centres: Sequence[tuple[str, str]]) -> Table:
    """The table of a training checkpoint.

    Args:
        network: (beginning of the release's names, of our backbone's, of our neck's) -> rules of one network.
        student: what the student's names begin with.
        centres: the release's names of the centres, and ours.
    """
    teacher = ("momentum_encoder.module.0.", "momentum_encoder.module.1.")
    rules = [*network(student, "backbone.", "neck."), *network("teacher.", *teacher)]
    rules = also_named(rules, [("student.module.", "student."), ("teacher.", "teacher.module.")])
    rules += [Rule(theirs, ours) for theirs, ours in centres]
    # A teacher alone: the student starts from it too.
    pairs = zip(network("", "backbone.", "neck."), network("", *teacher), strict=True)
    rules += [Rule(one.theirs, (*_names(one.ours), *_names(other.ours)), _twice(one.transform)) for one, other in pairs]
    absent = [r"^momentum_encoder\.steps$", r"^head\.center2?$"]
    return Table(rules, prefixes=("module.",), absent=absent)


def _names(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


def _twice(transform: Transform) -> Transform:
    def back(arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        return transform.inverse(arrays[: len(arrays) // 2])

    return Transform(lambda xs: [*transform.forward(xs), *transform.forward(xs)], back)


def _projector(theirs: str, ours: str) -> list[Rule]:
    """DINO's projection head. Of one layer alone, the release does not count it."""
    names = ("mlp.{k}.{bn}", "mlp.{p}", "last_layer.weight_g", "last_layer.weight_v")
    return [Rule(theirs + name, ours + name) for name in names]


def dino_training(backbone: Any, model: Any) -> Table:
    """`DINO`: student, teacher and centre (key='*'), or a teacher for both."""
    encoder = _encoder(backbone)

    def network(theirs: str, backbone: str, neck: str) -> list[Rule]:
        return [*encoder(theirs + "backbone.", backbone), *_projector(theirs + "head.", neck)]

    return _student_and_teacher(network, "student.module.", [("dino_loss.center", "head.center")])


def _equal(arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    if not np.array_equal(arrays[0], arrays[1]):
        raise InteropError("class tokens and patches have heads of their own: build with IBOTNeck(shared_head=False)")
    return [arrays[0]]


def ibot_training(backbone: Any, model: Any) -> Table:
    """`IBOT`: student, teacher and both centres (key='*'), or a teacher for both. A shared head is in the file twice."""
    shared = model.neck.last_layer2 is None
    both = Transform(_equal, lambda xs: [xs[0], xs[0]])

    def network(theirs: str, backbone: str, neck: str) -> list[Rule]:
        rules = [*_vit(theirs + "backbone.", backbone), Rule(theirs + "backbone.masked_embed", backbone + "mask_token")]
        rules.append(Rule(theirs + "head.mlp.{k}.{bn}", neck + "mlp.{k}.{bn}"))
        for part in ("weight_g", "weight_v"):
            one, two = (f"{theirs}head.{layer}.{part}" for layer in ("last_layer", "last_layer2"))
            if shared:
                rules.append(Rule((one, two), f"{neck}last_layer.{part}", both))
            else:
                rules += [Rule(one, f"{neck}last_layer.{part}"), Rule(two, f"{neck}last_layer2.{part}")]
        return rules

    centres = [("ibot_loss.center", "head.center"), ("ibot_loss.center2", "head.center2")]
    return _student_and_teacher(network, "student.module.", centres)


def dinov2_training(backbone: Any, model: Any) -> Table:
    """`DINOv2`: student, teacher and centres, or a teacher (`teacher_checkpoint.pth`) for both."""
    body = [rule for rule in dinov2(backbone, model).rules if "{k}" not in rule.theirs]

    def network(theirs: str, backbone: str, neck: str) -> list[Rule]:
        rules = [
            *(_moved(rule, theirs + "backbone.", backbone) for rule in body),
            Rule(theirs + "backbone.mask_token", backbone + "mask_token"),
        ]
        rules = also_named(rules, [("blocks.{i}.", "blocks.{k}.{i}.")])
        return [*rules, *(r for name in ("dino_head.", "ibot_head.") for r in _projector(theirs + name, neck + name))]

    centres = [("dino_loss.center", "head.center"), ("ibot_patch_loss.center", "head.center2")]
    return _student_and_teacher(network, "student.", centres)


def _moved(rule: Rule, theirs: str, ours: str) -> Rule:
    """The rule of a backbone for one inside a larger model."""
    assert isinstance(rule.theirs, str) and isinstance(rule.ours, str)
    return Rule(theirs + rule.theirs, ours + rule.ours.removeprefix("backbone."), rule.transform)


def vicreg_encoder(backbone: Any, model: Any) -> Table:
    """VICReg: the encoder, from its own file or one of training; the expander is left out."""
    return Table(_resnet(), ignore=[r"^module\.projector\."], prefixes=("module.backbone.",))


def vicreg(backbone: Any, model: Any) -> Table:
    """`VICReg`, with the expander."""
    ours = "neck"
    layers = range(model.neck.num_layers)
    rules = [*_resnet("module.backbone.")]
    rules += [Rule(f"module.projector.{3 * i}.{{p}}", f"{ours}.fc{i}.{{p}}") for i in layers]
    rules += [Rule(f"module.projector.{3 * i + 1}.{{bn}}", f"{ours}.bn{i}.{{bn}}") for i in layers]
    return Table(rules)


def ijepa_encoder(backbone: Any, model: Any) -> Table:
    """I-JEPA: the target encoder, which the paper evaluates; key='encoder' takes the other."""
    return Table(_vit(), ignore=[r"^(encoder|predictor)\."], prefixes=("target_encoder.", "module."))


def ijepa(backbone: Any, model: Any) -> Table:
    """`IJEPA`: both encoders and the predictor (key='*')."""
    theirs, ours = "predictor.module.", "neck."
    same = ("predictor_embed.{p}", "mask_token", "predictor_pos_embed", "predictor_norm.{p}", "predictor_proj.{p}")
    rules = [
        *_vit("encoder.module."),
        *_vit("target_encoder.module.", "target_encoder.module.0."),
        *(Rule(theirs + name, ours + name) for name in same),
        *_block(theirs + "predictor_blocks.{i}", ours + "predictor_blocks.{i}"),
    ]
    return Table(rules, absent=[r"^target_encoder\.steps$"])


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


def vqkd(tokenizer: Any, model: Any) -> Table:
    """BEiT v2's tokenizer. Its encoder's last norm is called after pooling, which it does not do.

    What the decoder is trained by is left out, and the decoder, unless the model has one.
    """
    rules = []
    for part in ("encoder", "decoder") if hasattr(tokenizer, "decoder") else ("encoder",):
        rules += [Rule(f"{part}.fc_norm.{{p}}", f"backbone.{part}.ln1.{{p}}"), *_vit(f"{part}.", f"backbone.{part}.")]
        for name in ("q_bias", "v_bias"):
            rules.append(Rule(f"{part}.blocks.{{i}}.attn.{name}", f"backbone.{part}.layers.{{i}}.attn.{name}"))
    rules += [Rule(f"{part}.{{rest}}", f"backbone.{part}.{{rest}}") for part in ("quantize", "encode_task_layer")]
    ignore = [
        r"^decode_task_layer\.",
        r"^(loss|teacher|scaling)",
        *([] if hasattr(tokenizer, "decoder") else [r"^decoder\."]),
    ]
    return Table(rules, ignore=ignore)


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


def clip_targets(backbone: Any, model: Any) -> Table:
    """`CLIPGenerator`: all of CLIP, by CLIP's own names."""
    numbers = r"^(input_resolution|context_length|vocab_size)$"
    return Table([Rule("{rest}", "backbone.tokenizer.{rest}")], ignore=[numbers, r"attn_mask$"], prefixes=("module.",))


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


def glip(backbone: Any, model: Any) -> Table:
    """The Swin transformer in GLIP's detector, whose other parts are left out; returned stages have norms of their own."""
    table = swin(backbone, model)
    rules = [Rule("norm{i}.{p}", "backbone.norm{i}.{p}"), *table.rules]
    others = [r"^backbone\.", r"^(rpn|roi_heads|language_backbone|tunable_linear)\."]
    return replace(table, rules=rules, ignore=[*table.ignore, *others], prefixes=("module.", "backbone.body."))


def nothing(backbone: Any, model: Any) -> None:
    """Classes that are kinds of those of a release, and no part of it."""


_OTHER_VITS = dict.fromkeys(("DistilledVisionTransformer", "DeiT3", "BEiTViT", "ViTEVA02", "ViTSAM"), nothing)
_OTHER_RESNETS = dict.fromkeys(("ResNetV1c", "ResNetV1d", "ResNet_CIFAR", "ResNeXt", "SEResNet"), nothing)
_OTHERS = _OTHER_VITS | _OTHER_RESNETS

TABLES: dict[str, dict[str, Any]] = {
    "deit": _OTHER_VITS | dict.fromkeys(("VisionTransformer", "DistilledVisionTransformer", "DeiT3"), deit),
    "dino": _OTHERS
    | {"VisionTransformer": dino, "ResNet": dino, "DINO": dino_training, "IBOT": nothing, "DINOv2": nothing},
    "ibot": _OTHER_VITS | {"VisionTransformer": ibot, "IBOT": ibot_training},
    "dinov2": _OTHER_VITS | {"VisionTransformer": dinov2, "DINOv2": dinov2_training},
    "vicreg": _OTHER_RESNETS | {"ResNet": vicreg_encoder, "VICReg": vicreg},
    "mae": _OTHER_VITS | {"VisionTransformer": mae_encoder, "MAE": mae},
    "moco": _OTHER_RESNETS | {"ResNet": moco_encoder, "MoCo": moco},
    "mocov3": _OTHERS | {"VisionTransformer": mocov3_encoder, "ResNet": mocov3_encoder, "MoCoV3": mocov3},
    "beit": {"BEiTViT": beit, "VQKD": vqkd},
    "eva": {"BEiTViT": beit, "ViTEVA02": eva02},
    "clip": _OTHER_VITS | {"VisionTransformer": clip, "CLIPGenerator": clip_targets},
    "ijepa": _OTHER_VITS | {"VisionTransformer": ijepa_encoder, "IJEPA": ijepa},
    "sam": {"ViTSAM": sam},
    "swin": {"SwinTransformer": swin},
    "glip": {"SwinTransformer": glip},
}
