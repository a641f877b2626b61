"""Names of what was pre-trained on partly hidden images by convolutional networks.

    spark       keyu-tian/SparK: checkpoints of the training. (Its encoders alone have names of timm and of ConvNeXt.)
    convnext    facebookresearch/ConvNeXt-V2: FCMAE, with sparse convolutions of MinkowskiEngine, in an encoder of that kind
                or with its decoder

The former's norms are `enc_dec_norm_cfg=dict(type='SparseLN2d', eps=1e-6)` for ConvNeXt.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxpretrain.interop.rules import Rule, Table, Transform, also_named, shape

_MODULE = ("module.",)
_ROW = shape((1, -1), (-1,))
_CONVNEXT = {
    "dwconv.{p}": "depthwise_conv.{p}",
    "norm.{p}": "norm.{p}",
    "pwconv{k}.{p}": "pointwise_conv{k}.{p}",
    "gamma": "gamma",
}
_RESNET = ("conv{k}.weight", "bn{k}.{bn}", "downsample.{k}.weight", "downsample.{k}.{bn}")


def _square(x: np.ndarray) -> np.ndarray:
    side = round(len(x) ** 0.5)
    return x.reshape(side, side, *x.shape[1:])


# MinkowskiEngine's kernels, [places, in, out] or for depthwise ones [places, channels]: places go down, column by column.
_KERNEL = Transform(
    lambda xs: [_square(xs[0]).transpose(3, 2, 1, 0)],
    lambda xs: [xs[0].transpose(3, 2, 1, 0).reshape(-1, *xs[0].shape[1::-1])],
)
_DEPTHWISE = Transform(
    lambda xs: [_square(xs[0]).transpose(2, 1, 0)[:, None]],
    lambda xs: [xs[0][:, 0].transpose(2, 1, 0).reshape(-1, len(xs[0]))],
)


def _blocks(theirs: str, ours: str, names: dict[str, str]) -> list[Rule]:
    return [Rule(f"{theirs}.{name}", f"{ours}.{other}") for name, other in names.items()]


def _spark_encoder(backbone: Any, theirs: str) -> list[Rule]:
    if hasattr(backbone, "layer1"):
        names = ["conv1.weight", "bn1.{bn}", *(f"layer{{i}}.{{j}}.{name}" for name in _RESNET)]
        return [Rule(theirs + name, f"backbone.{name}") for name in names]
    return [
        Rule(theirs + "downsample_layers.{i}.{k}.{p}", "backbone.downsample_layers.{i}.{k}.{p}"),
        *_blocks(theirs + "stages.{i}.{j}", "backbone.stages.{i}.{j}", _CONVNEXT),
    ]


_UNUSED = [r"^(imn_m|imn_s|norm_black)$", r"^(sparse_encoder\.sp_cnn\.)?(norm|fc|head)\."]


def spark(backbone: Any, model: Any) -> Table:
    """`SparK`: encoder, decoder and what is between them."""
    theirs, ours = "dense_decoder.dec.{i}", "neck.decoder.{i}"
    rules = [
        *_spark_encoder(backbone, "sparse_encoder.sp_cnn."),
        Rule("mask_tokens.{i}", "mask_tokens.{i}"),
        Rule("densify_norms.{i}.{bn}", "enc_dec_norms.{i}.{bn}"),
        Rule("densify_projs.{i}.{p}", "enc_dec_projectors.{i}.{p}"),
        Rule(f"{theirs}.up_sample.{{p}}", f"{ours}.upsample.{{p}}"),
        Rule(f"{theirs}.conv.0.weight", f"{ours}.conv_blocks.0.conv1.weight"),
        Rule(f"{theirs}.conv.1.{{bn}}", f"{ours}.conv_blocks.0.norm1.{{bn}}"),
        Rule(f"{theirs}.conv.3.weight", f"{ours}.conv_blocks.0.conv2.weight"),
        Rule(f"{theirs}.conv.4.{{bn}}", f"{ours}.conv_blocks.0.norm2.{{bn}}"),
        Rule("dense_decoder.proj.{p}", "neck.proj.{p}"),
    ]
    return Table(rules, ignore=_UNUSED, prefixes=_MODULE)


def spark_encoder(backbone: Any, model: Any) -> Table:
    """`SparseResNet`, `SparseConvNeXt`: the encoder, from a checkpoint of the training or a file of its own."""
    rules = _spark_encoder(backbone, "sparse_encoder.sp_cnn.")
    ignore = [*_UNUSED, r"^(dense_decoder|densify_norms|densify_projs|mask_tokens)\."]
    return Table(also_named(rules, [("sparse_encoder.sp_cnn.", "")]), ignore=ignore, prefixes=_MODULE)


def _fcmae_encoder() -> list[Rule]:
    theirs, ours = "encoder.downsample_layers", "backbone.downsample_layers"
    block, names = "encoder.stages.{i}.{j}", "backbone.stages.{i}.{j}"
    return [
        Rule(f"{theirs}.0.{{k}}.{{p}}", f"{ours}.0.{{k}}.{{p}}"),  # the stem is dense
        Rule(f"{theirs}.{{i}}.0.ln.{{p}}", f"{ours}.{{i}}.0.{{p}}"),
        Rule(f"{theirs}.{{i}}.1.kernel", f"{ours}.{{i}}.1.weight", _KERNEL),
        Rule(f"{theirs}.{{i}}.1.bias", f"{ours}.{{i}}.1.bias", _ROW),
        Rule(f"{block}.dwconv.kernel", f"{names}.depthwise_conv.weight", _DEPTHWISE),
        Rule(f"{block}.dwconv.bias", f"{names}.depthwise_conv.bias", _ROW),
        Rule(f"{block}.norm.ln.{{p}}", f"{names}.norm.{{p}}"),
        Rule(f"{block}.pwconv{{k}}.linear.{{p}}", f"{names}.pointwise_conv{{k}}.{{p}}"),
        Rule(f"{block}.grn.gamma", f"{names}.grn.gamma", _ROW),
        Rule(f"{block}.grn.beta", f"{names}.grn.beta", _ROW),
    ]


def fcmae(backbone: Any, model: Any) -> Table:
    """`FCMAE`: a checkpoint of the training."""
    row = shape((1, 1, 1, -1), (-1,))
    block, ours = "decoder.{i}", "neck.decoder.{i}"
    rules = [
        *_fcmae_encoder(),
        Rule("mask_token", "neck.mask_token"),
        Rule("proj.{p}", "neck.proj.{p}"),
        *_blocks(block, ours, {name: other for name, other in _CONVNEXT.items() if name != "gamma"}),
        Rule(f"{block}.grn.gamma", f"{ours}.grn.gamma", row),
        Rule(f"{block}.grn.beta", f"{ours}.grn.beta", row),
        Rule("pred.{p}", "neck.pred.{p}"),
    ]
    return Table(rules, prefixes=_MODULE)


def convnext_encoder(backbone: Any, model: Any) -> Table:
    """`SparseConvNeXt`: the encoder of a checkpoint of the training, or a dense one as ConvNeXt's releases have them."""
    row = shape((1, 1, 1, -1), (-1,))
    block, ours = "stages.{i}.{j}", "backbone.stages.{i}.{j}"
    rules = [
        Rule("downsample_layers.{i}.{k}.{p}", "backbone.downsample_layers.{i}.{k}.{p}"),
        *_blocks(block, ours, _CONVNEXT),
        Rule(f"{block}.grn.gamma", f"{ours}.grn.gamma", row),
        Rule(f"{block}.grn.beta", f"{ours}.grn.beta", row),
        *_fcmae_encoder(),
    ]
    return Table(rules, ignore=[r"^(norm|head|decoder|proj|pred)\.", r"^mask_token$"], prefixes=_MODULE)


TABLES: dict[str, dict[str, Any]] = {
    "spark": {"SparK": spark, "SparseResNet": spark_encoder, "SparseConvNeXt": spark_encoder},
    "convnext": {"FCMAE": fcmae, "SparseConvNeXt": convnext_encoder},
}
