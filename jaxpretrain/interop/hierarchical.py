"""The names of the releases of HiViT, iTPN, MixMIM and Vision GNN.

Settings that names do not tell:

    hivit       norm_cfg=dict(type='LN', eps=1e-6) for what is pre-trained as a MAE; its base has depths [2, 2, 20].
                Classifiers normalise the mean over patches before the last layer, which MMPretrain's HiViT, and ours, does
                not: of them, as of a MAE whose decoder reads all stages, the encoder is read.
    itpn        the large encoder has depths [1, 1, 40] here, for its first stages have 2 MLPs each. The base, which has 3,
                cannot be built: blocks have two (MMPretrain's is another). rpe=False for pixels.
    mixmim      window_size=[16, 16, 24, 12] for img_size=384.
    vig         covers Vig and PyramidVig, as Huawei's repository has them.
"""

from __future__ import annotations

from typing import Any

from jaxpretrain.interop.mmpretrain import head_rules
from jaxpretrain.interop.rules import Rule, Table, merged_patches, shape
from jaxpretrain.models.hivit import HiViT


def _hivit() -> list[Rule]:
    """The encoder: the releases' names are MMPretrain's, but for positions."""
    same = (
        "patch_embed.proj.{p}",
        "patch_embed.norm.{p}",
        "relative_position_index",
        "blocks.{i}.norm{k}.{p}",
        "blocks.{i}.attn.qkv.{p}",
        "blocks.{i}.attn.proj.{p}",
        "blocks.{i}.attn.relative_position_bias_table",
        "blocks.{i}.attn.relative_position_index",
        "blocks.{i}.mlp.fc{k}.{p}",
        "blocks.{i}.gamma_{k}",
        "blocks.{i}.norm.{p}",
        "blocks.{i}.reduction.weight",
    )
    rules = [Rule(name, f"backbone.{name}") for name in same]
    return [*rules, Rule("absolute_pos_embed", "backbone.pos_embed")]


def _decoder_block(theirs: str, ours: str) -> list[Rule]:
    """A transformer block with timm's names."""
    pairs = {"norm1": "ln1", "attn.qkv": "attn.qkv", "attn.proj": "attn.proj", "norm2": "ln2"}
    pairs |= {"mlp.fc1": "ffn.layers.0.0", "mlp.fc2": "ffn.layers.1"}
    return [Rule(f"{theirs}.{one}.{{p}}", f"{ours}.{other}.{{p}}") for one, other in pairs.items()]


def _decoder() -> list[Rule]:
    """A MAE's decoder, but for what it makes of the encoder's features."""
    return [
        Rule("mask_token", "neck.mask_token"),
        Rule("decoder_pos_embed", "neck.decoder_pos_embed"),
        *_decoder_block("decoder_blocks.{i}", "neck.decoder_blocks.{i}"),
        Rule("decoder_norm.{p}", "neck.ln1.{p}"),
        Rule("decoder_pred.{p}", "neck.decoder_pred.{p}"),
    ]


def hivit(backbone: Any, model: Any) -> Table | None:
    """HiViT's encoder, from classifiers and masked autoencoders, of its release and of iTPN's."""
    if not isinstance(backbone, HiViT):
        return None
    pyramid = r"^(align_dim_|split_|block_|fpn_modules\.)"
    return Table(_hivit(), ignore=[r"^(fc_norm|norm|head)\.", r"^decoder_", r"^mask_token$", pyramid])


def itpn(backbone: Any, model: Any) -> Table:
    """`iTPN` for pixels, with pyramid and decoder, and both tables of positions."""
    if backbone.reconstruction_type != "pixel":
        return Table(_hivit())
    same = (
        "align_dim_16tofpn.{p}",
        "align_dim_16to8.weight",
        "align_dim_8to4.weight",
        "split_{i}to{j}.norm.{p}",
        "split_{i}to{j}.reduction.weight",
        "fpn_modules.{i}.norm2.{p}",
        "fpn_modules.{i}.mlp.fc{k}.{p}",
        "block_16to8.{i}.norm2.{p}",
        "block_16to8.{i}.mlp.fc{k}.{p}",
        "block_8to4.{i}.norm2.{p}",
        "block_8to4.{i}.mlp.fc{k}.{p}",
        "decoder_embed.{i}.{j}.{p}",
    )
    return Table([*_hivit(), *_decoder(), *(Rule(name, f"neck.{name}") for name in same)])


def _mixmim() -> list[Rule]:
    theirs, ours, order = "layers.{i}.blocks.{j}", "backbone.layers.{i}.blocks.{j}", merged_patches(-1)
    tables = ("relative_position_bias_table", "relative_position_index")
    return [
        Rule("patch_embed.proj.{p}", "backbone.patch_embed.projection.{p}"),
        Rule("patch_embed.norm.{p}", "backbone.patch_embed.norm.{p}"),
        Rule("absolute_pos_embed", "backbone.absolute_pos_embed"),
        *_decoder_block(theirs, ours),
        *(Rule(f"{theirs}.attn.{name}", f"{ours}.attn.{name}") for name in tables),
        Rule("layers.{i}.downsample.norm.{p}", "backbone.layers.{i}.downsample.norm.{p}", order),
        Rule("layers.{i}.downsample.reduction.weight", "backbone.layers.{i}.downsample.reduction.weight", order),
        Rule("norm.{p}", "backbone.norm.{p}"),
    ]


def mixmim_encoder(backbone: Any, model: Any) -> Table:
    """MixMIM's encoder, as pre-trained (a decoder is left out) or fine-tuned."""
    return Table([*_mixmim(), *head_rules(model, "head")], ignore=[r"^decoder_", r"^mask_token$"])


def mixmim(backbone: Any, model: Any) -> Table:
    """`MixMIM`, encoder and decoder."""
    return Table([*_mixmim(), Rule("decoder_embed.{p}", "neck.decoder_embed.{p}"), *_decoder()])


def _vig(model: Any) -> list[Rule]:
    """Stem, positions and classifier, whose layers are 1x1 convolutions there."""
    rules = [Rule("pos_embed", "backbone.pos_embed"), Rule("stem.convs.{rest}", "backbone.stem.{rest}")]
    rules += [Rule("prediction.1.{bn}", "head.bn.{bn}")]
    head = getattr(model, "head", None)
    for theirs, name in (("prediction.0", "fc1"), ("prediction.4", "fc2")):
        ins = getattr(head, name).in_features if hasattr(head, name) else 1
        rules.append(Rule(f"{theirs}.weight", f"head.{name}.weight", shape((-1, ins, 1, 1), (-1, ins))))
        rules.append(Rule(f"{theirs}.bias", f"head.{name}.bias"))
    return rules


def vig(backbone: Any, model: Any) -> Table:
    """ViG, with blocks of one size."""
    return Table([*_vig(model), Rule("backbone.{i}.{rest}", "backbone.blocks.{i}.{rest}")])


def pyramid_vig(backbone: Any, model: Any) -> Table:
    """Pyramid ViG: there, blocks and the convolutions between stages have one numbering."""
    rules, count = _vig(model), 0
    for i, stage in enumerate(backbone.stages):
        for j in range(len(stage)):
            theirs = f"backbone.{count}.conv" if i > 0 and j == 0 else f"backbone.{count}"
            rules.append(Rule(f"{theirs}.{{rest}}", f"backbone.stages.{i}.{j}.{{rest}}"))
            count += 1
    return Table(rules)


TABLES: dict[str, dict[str, Any]] = {
    "hivit": {"HiViT": hivit},
    "itpn": {"iTPN": itpn},
    "mixmim": {"MixMIMTransformer": mixmim_encoder, "MixMIM": mixmim},
    "vig": {"Vig": vig, "PyramidVig": pyramid_vig},
}
