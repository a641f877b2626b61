"""EfficientNet, EfficientFormer, LeViT, TinyViT, PoolFormer: timm's names, torchvision's, and those of their releases.

Names do not tell all settings. For the same numbers build the model with

    timm          tf_efficientnet_b*, tf_efficientnetv2_*: our defaults; tf_efficientnet_e*: act_cfg=dict(type='ReLU');
                  efficientnet_b*: conv_cfg=None, norm_cfg=dict(type='BN')
    torchvision   conv_cfg=None; b0 to b4 besides norm_cfg=dict(type='BN')

timm's classifiers with PoolFormer have the last norm behind the pooling, ours and the release's before it: features are
the same, logits are not quite. timm's levit_conv_* have the weights of levit_* in another shape, which is not read.

The releases are tensorflow/tpu (`tpu`), facebookresearch/LeViT (`levit`), microsoft/Cream (`tinyvit`), sail-sg/poolformer
(`poolformer`) and snap-research/EfficientFormer (`efficientformer`). Fused forms of LeViT have no layout but MMPretrain's.
TensorFlow's checkpoints of EfficientNet are not read themselves, but their variables from an .npz file:

    reader = tf.train.load_checkpoint(path)
    np.savez(file, **{name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()})
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from flax import nnx

from jaxpretrain.interop.mmpretrain import head_rules
from jaxpretrain.interop.rules import Rule, Table, transpose
from jaxpretrain.models.layers.conv import ConvModule
from jaxpretrain.models.layers.inverted_residual import EdgeResidual

_MODULE = ("module.",)
_INDEX = (r"attention_bias_idxs$",)


def _same(theirs: str, ours: str, *names: str) -> list[Rule]:
    """Rules for names that differ in what they begin with alone."""
    return [Rule(f"{theirs}.{name}", f"{ours}.{name}") for name in names]


def _conv(conv: str, norm: str, ours: str, name: str = "conv", norm_name: str = "bn") -> list[Rule]:
    """A convolution, or a linear layer, and its norm."""
    return [Rule(f"{conv}.{{p}}", f"{ours}.{name}.{{p}}"), Rule(f"{norm}.{{bn}}", f"{ours}.{norm_name}.{{bn}}")]


# EfficientNet and EfficientNetV2.


def _convolutions(block: Any) -> list[str]:
    """What a block calls its convolutions, in order; the block itself may be one."""
    if isinstance(block, ConvModule):
        return [""]
    if isinstance(block, EdgeResidual):
        return ["conv1", "conv2"]
    return [*([] if block.expand_conv is None else ["expand_conv"]), "depthwise_conv", "linear_conv"]


def _timm_block(block: Any, theirs: str, ours: str) -> Iterator[Rule]:
    names = _convolutions(block)
    if isinstance(block, ConvModule):
        convs = ["conv"]
    elif isinstance(block, EdgeResidual):
        convs = ["conv_exp", "conv_pwl"]
    else:
        convs = ["conv_dw", "conv_pw"] if len(names) == 2 else ["conv_pw", "conv_dw", "conv_pwl"]
    for i, (conv, name) in enumerate(zip(convs, names, strict=True), start=1):
        yield from _conv(f"{theirs}.{conv}", f"{theirs}.bn{i}", f"{ours}.{name}".rstrip("."))
    yield Rule(f"{theirs}.se.conv_reduce.{{p}}", f"{ours}.se.conv1.conv.{{p}}")
    yield Rule(f"{theirs}.se.conv_expand.{{p}}", f"{ours}.se.conv2.conv.{{p}}")


def _torchvision_block(block: Any, theirs: str, ours: str) -> Iterator[Rule]:
    """Parts are counted; squeeze and excitation is the last but one."""
    names = _convolutions(block)
    if getattr(block, "se", None) is not None:
        names.insert(-1, "se")
    for i, name in enumerate(names):
        if name == "se":
            yield Rule(f"{theirs}.block.{i}.fc{{k}}.{{p}}", f"{ours}.se.conv{{k}}.conv.{{p}}")
        else:
            yield from _conv(f"{theirs}.block.{i}.0", f"{theirs}.block.{i}.1", f"{ours}.{name}".rstrip("."))


def _groups(backbone: Any) -> Iterator[list[tuple[Any, str]]]:
    """The blocks of each line of the papers' tables, with their names; a stage of ours may have two lines."""
    blocks = [
        (block, f"backbone.layers.{i}.{j}")
        for i, layer in enumerate(backbone.layers)
        if isinstance(layer, nnx.List)
        for j, block in enumerate(layer)
    ]
    sizes = [len(layer) for layer in backbone.layers if isinstance(layer, nnx.List)]
    for size in getattr(backbone, "group_sizes", sizes):
        yield blocks[:size]
        del blocks[:size]


def _efficientnet(backbone: Any, block_rules: Callable[..., Iterator[Rule]], groups: str, first: int) -> list[Rule]:
    return [
        rule
        for i, group in enumerate(_groups(backbone), start=first)
        for j, (block, ours) in enumerate(group)
        for rule in block_rules(block, f"{groups}.{i}.{j}", ours)
    ]


def efficientnet_timm(backbone: Any, model: Any) -> Table:
    """`EfficientNet` and `EfficientNetV2`."""
    last = f"backbone.layers.{len(backbone.layers) - 1}"
    rules = [
        *_conv("conv_stem", "bn1", "backbone.layers.0"),
        *_efficientnet(backbone, _timm_block, "blocks", 0),
        *_conv("conv_head", "bn2", last),
        *head_rules(model, "classifier"),
    ]
    return Table(rules, prefixes=_MODULE)


def efficientnet_torchvision(backbone: Any, model: Any) -> Table:
    """`EfficientNet` and `EfficientNetV2`."""
    last, end = f"backbone.layers.{len(backbone.layers) - 1}", len(list(_groups(backbone))) + 1
    rules = [
        *_conv("features.0.0", "features.0.1", "backbone.layers.0"),
        *_efficientnet(backbone, _torchvision_block, "features", 1),
        *_conv(f"features.{end}.0", f"features.{end}.1", last),
        *head_rules(model, "classifier.1"),
    ]
    return Table(rules, prefixes=_MODULE)


_TF_CONV, _TF_DEPTHWISE = transpose(3, 2, 0, 1), transpose(2, 3, 0, 1)


def _tpu_conv(theirs: str, norm: str, ours: str) -> list[Rule]:
    """A convolution, named with its kernel, and its norm, which has no counter."""
    kernel = _TF_DEPTHWISE if theirs.endswith("depthwise_kernel") else _TF_CONV
    leaves = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var"}
    norms = [Rule(f"{norm}/{leaf}", f"{ours}.bn.{name}") for leaf, name in leaves.items()]
    return [Rule(theirs, f"{ours}.conv.weight", kernel), *norms]


def _tpu_block(block: Any, theirs: str, ours: str) -> Iterator[Rule]:
    """Layers of a kind are counted, but for the first, which has no number."""
    convs = iter(("conv2d/kernel", "conv2d_1/kernel"))
    for i, name in enumerate(_convolutions(block)):
        conv = "depthwise_conv2d/depthwise_kernel" if name == "depthwise_conv" else next(convs)
        norm = f"tpu_batch_normalization_{i}" if i else "tpu_batch_normalization"
        yield from _tpu_conv(f"{theirs}/{conv}", f"{theirs}/{norm}", f"{ours}.{name}")
    for k, layer in enumerate(("conv2d", "conv2d_1"), start=1):
        yield Rule(f"{theirs}/se/{layer}/kernel", f"{ours}.se.conv{k}.conv.weight", _TF_CONV)
        yield Rule(f"{theirs}/se/{layer}/bias", f"{ours}.se.conv{k}.conv.bias")


_TPU_NAMES = (*(f"b{i}" for i in range(9)), "l2", *(f"edgetpu-{size}" for size in "SML"))


def efficientnet_tpu(backbone: Any, model: Any) -> Table:
    """`EfficientNet`, the variables of TensorFlow's checkpoints. Where there are averaged ones too, they are taken."""
    blocks = [block for group in _groups(backbone) for block in group]
    last = f"backbone.layers.{len(backbone.layers) - 1}"
    rules = [
        *_tpu_conv("stem/conv2d/kernel", "stem/tpu_batch_normalization", "backbone.layers.0"),
        *(rule for i, (block, ours) in enumerate(blocks) for rule in _tpu_block(block, f"blocks_{i}", ours)),
        *_tpu_conv("head/conv2d/kernel", "head/tpu_batch_normalization", last),
        Rule("head/dense/kernel", "head.fc.weight", transpose(1, 0)),
        Rule("head/dense/bias", "head.fc.bias"),
    ]
    averaged = [Rule(f"{rule.theirs}/ExponentialMovingAverage", rule.ours, rule.transform) for rule in rules]
    return Table(
        [*rules, *averaged],
        ignore=(r"^global_step$", r"/(RMSProp|Momentum)(_\d)?$"),
        prefixes=[f"efficientnet-{name}/" for name in _TPU_NAMES],
        absent=(r"\.num_batches_tracked$",),
    )


# EfficientFormer.


def _meta_blocks(theirs: str, ours: str, scale: str) -> list[Rule]:
    attention = ("qkv.{p}", "proj.{p}", "attention_biases", "attention_bias_idxs")
    return [
        *_same(theirs, ours, "mlp.fc{k}.{p}", "mlp.norm{k}.{bn}", "norm{k}.{p}"),
        *_same(f"{theirs}.token_mixer", f"{ours}.token_mixer", *attention),
        Rule(f"{theirs}.{scale}", f"{ours}.ls{{k}}.weight"),
    ]


def _stages(backbone: Any) -> list[tuple[int, int]]:
    """(stage, 1 if it begins with a downsampling): then its blocks are counted from there."""
    return [(i, int(isinstance(stage[0], ConvModule))) for i, stage in enumerate(backbone.network)]


def efficientformer_timm(backbone: Any, model: Any) -> Table:
    """`EfficientFormer`."""
    rules = []
    for i, down in _stages(backbone):
        ours = f"backbone.network.{i}"
        rules += _meta_blocks(f"stages.{i}.blocks.{{j}}", f"{ours}.{{j+{down}}}", "ls{k}.gamma")
        if down:
            rules += _conv(f"stages.{i}.downsample.conv", f"stages.{i}.downsample.norm", f"{ours}.0")
    rules += _conv("stem.conv{i+1}", "stem.norm{i+1}", "backbone.patch_embed.{i}")
    rules += _efficientformer_head(backbone, "head_dist")
    return Table(rules, prefixes=_MODULE)


def efficientformer(backbone: Any, model: Any) -> Table:
    """`EfficientFormer`, whose stages and downsamplings take turns in one list."""
    rules, place = [], 0
    for i, down in _stages(backbone):
        if down:
            rules += _conv(f"network.{place}.proj", f"network.{place}.norm", f"backbone.network.{i}.0")
        place += down
        ours = f"backbone.network.{i}.{{j+{down}}}"
        rules += _meta_blocks(f"network.{place}.{{j}}", ours, "layer_scale_{k}")
        place += 1
    for i in range(2):
        rules += _conv(f"patch_embed.{3 * i}", f"patch_embed.{3 * i + 1}", f"backbone.patch_embed.{i}")
    rules += _efficientformer_head(backbone, "dist_head")
    return Table(rules, prefixes=_MODULE)


def _efficientformer_head(backbone: Any, second: str) -> list[Rule]:
    return [
        Rule("norm.{p}", f"backbone.norm{len(backbone.network) - 1}.{{p}}"),
        Rule("head.{p}", "head.head.{p}"),
        Rule(f"{second}.{{p}}", "head.dist_head.{p}"),
    ]


# LeViT.


def levit_timm(backbone: Any, model: Any) -> Table | None:
    """`LeViT`."""
    if backbone.deploy:
        return None
    rules = [
        rule for i in range(4) for rule in _levit_layer(f"stem.conv{i + 1}", f"patch_embed.patch_embed.{2 * i}", "conv")
    ]
    for i, stage in enumerate(backbone.stages):
        block = -1
        for j, layer in enumerate(stage):
            ours = f"stages.{i}.{j}"
            if hasattr(layer, "kv"):
                theirs, mixer = f"stages.{i}.downsample", "attn_downsample"
            elif hasattr(layer.block, "qkv"):
                block += 1
                theirs, mixer, ours = f"stages.{i}.blocks.{block}", "attn", f"{ours}.block"
            else:
                for k in (1, 2):
                    rules += _levit_layer(f"{theirs}.mlp.ln{k}", f"{ours}.block.linear{k}")
                continue
            for name, part in (("qkv", "qkv"), ("kv", "kv"), ("q.ln", "q.1"), ("proj.ln", "proj.1")):
                rules += _levit_layer(f"{theirs}.{mixer}.{name}", f"{ours}.{part}")
            rules += _same(f"{theirs}.{mixer}", f"backbone.{ours}", "attention_biases")
    rules += _same("head", "head.head", "bn.{bn}", "linear.{p}")
    rules += _same("head_dist", "head.head_dist", "bn.{bn}", "linear.{p}")
    return Table(rules, ignore=_INDEX, prefixes=_MODULE)


def levit(backbone: Any, model: Any) -> Table | None:
    """`LeViT`, whose blocks are counted through all stages."""
    if backbone.deploy:
        return None
    rules = [
        rule
        for i in range(4)
        for rule in _release_layer(f"patch_embed.{2 * i}", f"patch_embed.patch_embed.{2 * i}", "conv")
    ]
    layers = [(f"stages.{i}.{j}", layer) for i, stage in enumerate(backbone.stages) for j, layer in enumerate(stage)]
    for count, (ours, layer) in enumerate(layers):
        theirs = f"blocks.{count}"
        if not hasattr(layer, "kv"):
            theirs, ours, layer = f"{theirs}.m", f"{ours}.block", layer.block
        if hasattr(layer, "linear1"):
            rules += _release_layer(f"{theirs}.0", f"{ours}.linear1") + _release_layer(f"{theirs}.2", f"{ours}.linear2")
            continue
        for name in ("qkv", "kv", "q.1", "proj.1"):
            rules += _release_layer(f"{theirs}.{name}", f"{ours}.{name}")
        rules += _same(theirs, f"backbone.{ours}", "attention_biases", "attention_bias_idxs")
    for head in ("head", "head_dist"):
        rules += [
            Rule(f"{head}.bn.{{bn}}", f"head.{head}.bn.{{bn}}"),
            Rule(f"{head}.l.{{p}}", f"head.{head}.linear.{{p}}"),
        ]
    return Table(rules, prefixes=_MODULE)


def _levit_layer(theirs: str, ours: str, name: str = "linear") -> list[Rule]:
    return _conv(f"{theirs}.linear", f"{theirs}.bn", f"backbone.{ours}", name)


def _release_layer(theirs: str, ours: str, name: str = "linear") -> list[Rule]:
    return _conv(f"{theirs}.c", f"{theirs}.bn", f"backbone.{ours}", name)


# TinyViT.


def _tinyvit(backbone: Any, names: dict[str, str], conv: str, shift: str) -> list[Rule]:
    """`names`: of the stages, the norm and the stem's two convolutions. `shift`: where a stage's downsampling is."""

    def layer(theirs: str, ours: str) -> list[Rule]:
        return _conv(f"{theirs}.{conv}", f"{theirs}.bn", f"backbone.{ours}", "conv2d", "bn2d")

    stages, block = names["stages"], "stages.{i}.blocks.{j}"
    theirs = f"{stages}.{{i}}.blocks.{{j}}"
    attention = ("attn.norm.{p}", "attn.qkv.{p}", "attn.proj.{p}", "attn.attention_biases")
    return [
        *layer(f"patch_embed.{names['first']}", "patch_embed.seq.0"),
        *layer(f"patch_embed.{names['second']}", "patch_embed.seq.2"),
        *layer(f"{theirs}.conv{{k}}", f"{block}.conv{{k}}"),
        *layer(f"{theirs}.local_conv", f"{block}.local_conv"),
        *layer(f"{stages}.{{i{shift}}}.downsample.conv{{k}}", "stages.{i}.downsample.conv{k}"),
        *_same(theirs, f"backbone.{block}", *attention, "mlp.norm.{p}", "mlp.fc{k}.{p}"),
        Rule(f"{names['norm']}.{{p}}", f"backbone.norm{len(backbone.stages) - 1}.{{p}}"),
    ]


def tinyvit_timm(backbone: Any, model: Any) -> Table:
    """`TinyViT`. timm's stages begin with the downsampling."""
    names = {"stages": "stages", "norm": "head.norm", "first": "conv1", "second": "conv2"}
    rules = [*_tinyvit(backbone, names, "conv", "+1"), *head_rules(model, "head.fc")]
    return Table(rules, ignore=_INDEX, prefixes=_MODULE)


def tinyvit(backbone: Any, model: Any) -> Table:
    """`TinyViT`."""
    names = {"stages": "layers", "norm": "norm_head", "first": "seq.0", "second": "seq.2"}
    rules = [*_tinyvit(backbone, names, "c", ""), *head_rules(model, "head")]
    return Table(rules, ignore=_INDEX, prefixes=_MODULE)


# PoolFormer.


def poolformer_timm(backbone: Any, model: Any) -> Table:
    """`PoolFormer`."""
    rules = [Rule("stem.conv.{p}", "backbone.patch_embed.proj.{p}")]
    stage = -1
    for place, layer in enumerate(backbone.network):
        ours = f"backbone.network.{place}"
        if isinstance(layer, nnx.List):
            stage += 1
            theirs = f"stages.{stage}.blocks.{{j}}"
            rules += _same(theirs, f"{ours}.{{j}}", "norm{k}.{p}", "mlp.fc{k}.{p}")
            rules.append(Rule(f"{theirs}.layer_scale{{k}}.scale", f"{ours}.{{j}}.layer_scale_{{k}}"))
        else:
            rules.append(Rule(f"stages.{stage + 1}.downsample.conv.{{p}}", f"{ours}.proj.{{p}}"))
    rules.append(Rule("head.norm.{p}", f"backbone.norm{len(backbone.network) - 1}.{{p}}"))
    return Table([*rules, *head_rules(model, "head.fc")], prefixes=_MODULE)


def poolformer(backbone: Any, model: Any) -> Table:
    """`PoolFormer`: the release's names are MMPretrain's, but for the last norm and the head."""
    block = ("norm{k}.{p}", "mlp.fc{k}.{p}", "layer_scale_{k}")
    rules = [
        Rule("patch_embed.proj.{p}", "backbone.patch_embed.proj.{p}"),
        Rule("network.{i}.proj.{p}", "backbone.network.{i}.proj.{p}"),
        *_same("network.{i}.{j}", "backbone.network.{i}.{j}", *block),
        Rule("norm.{p}", f"backbone.norm{len(backbone.network) - 1}.{{p}}"),
        *head_rules(model, "head"),
    ]
    return Table(rules, prefixes=_MODULE)


def nothing(backbone: Any, model: Any) -> None:
    """RIFormer, a kind of PoolFormer here, which nobody else has."""


TABLES: dict[str, dict[str, Any]] = {
    "timm": {
        "EfficientNet": efficientnet_timm,
        "EfficientNetV2": efficientnet_timm,
        "EfficientFormer": efficientformer_timm,
        "LeViT": levit_timm,
        "TinyViT": tinyvit_timm,
        "PoolFormer": poolformer_timm,
        "RIFormer": nothing,
    },
    "torchvision": {"EfficientNet": efficientnet_torchvision, "EfficientNetV2": efficientnet_torchvision},
    "tpu": {"EfficientNet": efficientnet_tpu},
    "levit": {"LeViT": levit},
    "tinyvit": {"TinyViT": tinyvit},
    "poolformer": {"PoolFormer": poolformer, "RIFormer": nothing},
    "efficientformer": {"EfficientFormer": efficientformer},
}
