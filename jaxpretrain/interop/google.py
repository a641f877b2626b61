"""The names of google-research/vision_transformer, whose weights are .npz files: ViT (AugReg's too) and MLP-Mixer.

Its kernels are [*window, in, out], those of queries, keys and values [in, heads, channels]. It has GELU by its approximation
with tanh; timm and MMPretrain, whose numbers ours are, read the same weights with the exact one. For the same numbers build
MLP-Mixer with norm_cfg=dict(type='LN', eps=1e-6).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxpretrain.interop.mmpretrain import head_rules
from jaxpretrain.interop.rules import Rule, Table, Transform, also_named, transpose
from jaxpretrain.interop.timm import nothing

_NEWER = [
    ("LayerNorm_2/", "LayerNorm_1/"),
    ("MlpBlock_3/", "MlpBlock_0/"),
    ("MultiHeadDotProductAttention_1/", "MultiHeadDotProductAttention_0/"),
]
_LINEAR, _CONV = transpose(1, 0), transpose(3, 2, 0, 1)


def _layer(theirs: str, ours: str, kernel: Transform = _LINEAR) -> list[Rule]:
    """A linear layer or, with another transform of its kernel, a convolution."""
    return [Rule(f"{theirs}/kernel", f"{ours}.weight", kernel), Rule(f"{theirs}/bias", f"{ours}.bias")]


def _norm(theirs: str, ours: str) -> list[Rule]:
    return [Rule(f"{theirs}/scale", f"{ours}.weight"), Rule(f"{theirs}/bias", f"{ours}.bias")]


def _head(model: Any) -> list[Rule]:
    names = (rule.ours for rule in head_rules(model, "head"))
    return [part for name in names if isinstance(name, str) for part in _layer("head", name.removesuffix(".{p}"))]


def _attention(theirs: str, ours: str, heads: int) -> list[Rule]:
    parts = [f"{theirs}/{name}" for name in ("query", "key", "value")]

    def apart(array: np.ndarray) -> list[np.ndarray]:
        return [part.T.reshape(len(part.T), heads, -1) for part in np.split(array, 3)]

    kernel = Transform(lambda xs: [np.concatenate([x.reshape(len(x), -1).T for x in xs])], lambda xs: apart(xs[0]))
    bias = Transform(
        lambda xs: [np.concatenate([x.reshape(-1) for x in xs])],
        lambda xs: [part.reshape(heads, -1) for part in np.split(xs[0], 3)],
    )
    out = Transform(
        lambda xs: [xs[0].reshape(-1, xs[0].shape[-1]).T], lambda xs: [xs[0].T.reshape(heads, -1, len(xs[0]))]
    )
    return [
        Rule(tuple(f"{name}/kernel" for name in parts), f"{ours}.qkv.weight", kernel),
        Rule(tuple(f"{name}/bias" for name in parts), f"{ours}.qkv.bias", bias),
        *_layer(f"{theirs}/out", f"{ours}.proj", out),
    ]


def vision_transformer(backbone: Any, model: Any) -> Table:
    """`VisionTransformer`. The code calls some layers otherwise than the published files, which are older; both are found."""
    theirs, ours = "Transformer/encoderblock_{i}", "backbone.layers.{i}"
    rules = [
        Rule("cls", "backbone.cls_token"),
        Rule("Transformer/posembed_input/pos_embedding", "backbone.pos_embed"),
        *_layer("embedding", "backbone.patch_embed.projection", _CONV),
        *_norm(f"{theirs}/LayerNorm_0", f"{ours}.ln1"),
        *_attention(f"{theirs}/MultiHeadDotProductAttention_1", f"{ours}.attn", backbone.layers[0].attn.num_heads),
        *_norm(f"{theirs}/LayerNorm_2", f"{ours}.ln2"),
        *_layer(f"{theirs}/MlpBlock_3/Dense_0", f"{ours}.ffn.layers.0.0"),
        *_layer(f"{theirs}/MlpBlock_3/Dense_1", f"{ours}.ffn.layers.1"),
        *_norm("Transformer/encoder_norm", "backbone.ln1"),
        *_layer("pre_logits", "head.layers.pre_logits"),
        *_head(model),
    ]
    return Table(also_named(rules, _NEWER))


def mlp_mixer(backbone: Any, model: Any) -> Table:
    """`MlpMixer`."""
    theirs, ours = "MixerBlock_{i}", "backbone.layers.{i}"
    rules = [*_layer("stem", "backbone.patch_embed.projection", _CONV), *_norm("pre_head_layer_norm", "backbone.ln1")]
    for k, part in enumerate(("token", "channel")):
        rules += _norm(f"{theirs}/LayerNorm_{k}", f"{ours}.ln{k + 1}")
        rules += _layer(f"{theirs}/{part}_mixing/Dense_0", f"{ours}.{part}_mix.layers.0.0")
        rules += _layer(f"{theirs}/{part}_mixing/Dense_1", f"{ours}.{part}_mix.layers.1")
    return Table([*rules, *_head(model)])


_OTHERS = ("DistilledVisionTransformer", "DeiT3", "BEiTViT", "ViTEVA02", "ViTSAM", "RevVisionTransformer")
TABLES: dict[str, dict[str, Any]] = {
    "vit_jax": dict.fromkeys(_OTHERS, nothing) | {"VisionTransformer": vision_transformer, "MlpMixer": mlp_mixer}
}
