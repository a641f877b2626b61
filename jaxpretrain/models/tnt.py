"""Transformer in Transformer (Han et al., 2021, https://arxiv.org/abs/2103.00112).

Each patch is a sentence of words, its pixels: an inner transformer relates the words within each sentence, and hands its
result to an outer one, which relates the sentences.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.nn import initializers
from jaxtyping import Array, Float

from jaxpretrain.build import ConfigError
from jaxpretrain.models.layers.arch import architecture
from jaxpretrain.models.layers.attention import scaled_dot_product_attention
from jaxpretrain.models.layers.base import BaseModule
from jaxpretrain.models.layers.conv import Conv2d
from jaxpretrain.models.layers.drop import Dropout, drop_path
from jaxpretrain.models.layers.ffn import FFN
from jaxpretrain.models.layers.init import trunc_normal
from jaxpretrain.models.layers.linear import Linear
from jaxpretrain.models.layers.norm import build_norm
from jaxpretrain.models.layers.patch_embed import to_2tuple
from jaxpretrain.models.layers.stack import apply_layers

_LN = {"type": "LN"}
_INIT = (
    {"type": "TruncNormal", "layer": "Linear", "std": 0.02},
    {"type": "Constant", "layer": "LayerNorm", "val": 1.0, "bias": 0.0},
)


class PackedAttention(BaseModule):
    """Self-attention with PyTorch's parameters: one matrix [3 C, C] makes queries, keys and values.

    The matrix is no linear layer: an `init_cfg` for those leaves it as it is, Glorot-uniform.
    """

    state_names: ClassVar = {
        "in_proj_weight": "attn.in_proj_weight",
        "in_proj_bias": "attn.in_proj_bias",
        "out_proj": "attn.out_proj",
    }

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        qkv_bias: bool = False,
        *,
        rngs: nnx.Rngs,
    ):
        if embed_dims % num_heads:
            raise ConfigError(f"TNT: {embed_dims} channels are not a multiple of {num_heads} heads")
        self.num_heads, self.scale = num_heads, (embed_dims // num_heads) ** -0.5
        glorot = initializers.xavier_uniform(in_axis=1, out_axis=0)
        self.in_proj_weight = nnx.Param(glorot(rngs.params(), (3 * embed_dims, embed_dims), jnp.float32))
        self.in_proj_bias = nnx.Param(jnp.zeros((3 * embed_dims,))) if qkv_bias else None
        self.out_proj = Linear(embed_dims, embed_dims, bias_init=initializers.zeros, rngs=rngs)
        self.attn_drop, self.proj_drop = Dropout(attn_drop), Dropout(proj_drop)

    def __call__(self, x: Float[Array, "b n c"], *, rngs: nnx.Rngs | None = None) -> Float[Array, "b n c"]:
        b, n, c = x.shape
        qkv = x.reshape(b * n, c) @ self.in_proj_weight[...].astype(x.dtype).T
        if self.in_proj_bias is not None:
            qkv = qkv + self.in_proj_bias[...].astype(x.dtype)
        qkv = qkv.reshape(b, n, 3, self.num_heads, c // self.num_heads)
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        y = scaled_dot_product_attention(self, q, k, v, scale=self.scale, dropout=self.attn_drop, rngs=rngs)
        return self.proj_drop(self.out_proj(y.reshape(b, n, c)), rngs=rngs)


class TransformerBlock(BaseModule):
    """x + attention(norm_attn(x)), then x + ffn(norm_ffn(x)).

    Args:
        embed_dims: channels.
        num_heads: heads of the attention.
        ffn_ratio: hidden channels of the feed-forward half, as a multiple.
        drop_rate: dropout after the attention's projection and in the feed-forward half.
        attn_drop_rate: dropout of the attention weights.
        qkv_bias: whether queries, keys and values have a bias.
        act_cfg, norm_cfg: activation of the feed-forward half; the norms.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        ffn_ratio: int = 4,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        qkv_bias: bool = False,
        act_cfg: Mapping[str, Any] = {"type": "GELU"},
        norm_cfg: Mapping[str, Any] = _LN,
        *,
        rngs: nnx.Rngs,
    ):
        self.norm_attn = build_norm(norm_cfg, embed_dims, rngs=rngs)
        self.attn = PackedAttention(embed_dims, num_heads, attn_drop_rate, drop_rate, qkv_bias, rngs=rngs)
        self.norm_ffn = build_norm(norm_cfg, embed_dims, rngs=rngs)
        self.ffn = FFN(embed_dims, int(embed_dims * ffn_ratio), act_cfg, drop_rate, rngs=rngs)

    def __call__(self, x: Float[Array, "b n c"], rate: float | Array, rngs: nnx.Rngs | None) -> Float[Array, "b n c"]:
        """`rate` is the probability of dropping a branch of a sample."""
        x = x + drop_path(self.attn(self.norm_attn(x), rngs=rngs), rate, rngs)
        return x + drop_path(self.ffn(self.norm_ffn(x), rngs=rngs), rate, rngs)


class TnTLayer(BaseModule):
    """The inner block on the words, what it adds to the sentences, and the outer block on these.

    Args:
        num_pixel: words of a sentence.
        embed_dims_inner, embed_dims_outer: channels of words and of sentences.
        num_heads_inner, num_heads_outer: heads of the two blocks.
        drop_path_rate: probability of dropping a branch: of a patch in the inner block, of an image in the outer one.
        block_cfg: further arguments of both blocks (`TransformerBlock`).
        norm_cfg: the norm before the projection.
    """

    def __init__(
        self,
        num_pixel: int,
        embed_dims_inner: int,
        embed_dims_outer: int,
        num_heads_inner: int,
        num_heads_outer: int,
        drop_path_rate: float = 0.0,
        block_cfg: Mapping[str, Any] = {},
        norm_cfg: Mapping[str, Any] = _LN,
        *,
        rngs: nnx.Rngs,
    ):
        self.drop_path_rate, self.deterministic = float(drop_path_rate), False
        self.inner_block = TransformerBlock(embed_dims_inner, num_heads_inner, **block_cfg, rngs=rngs)
        self.norm_proj = build_norm(norm_cfg, embed_dims_inner, rngs=rngs)
        self.projection = Linear(embed_dims_inner * num_pixel, embed_dims_outer, rngs=rngs)
        self.outer_block = TransformerBlock(embed_dims_outer, num_heads_outer, **block_cfg, rngs=rngs)

    def __call__(
        self,
        tokens: tuple[Float[Array, "b*n pixels c"], Float[Array, "b n+1 d"]],
        *,
        rngs: nnx.Rngs | None = None,
        drop_path_rate: float | Array | None = None,
    ) -> tuple[Float[Array, "b*n pixels c"], Float[Array, "b n+1 d"]]:
        """Words and sentences; the first sentence of each image is the class token, which has no words."""
        rate = self.drop_path_rate if drop_path_rate is None else drop_path_rate
        rate = 0.0 if self.deterministic else rate
        words, sentences = tokens
        words = self.inner_block(words, rate, rngs)
        b, n = sentences.shape[0], sentences.shape[1] - 1
        summary = self.projection(self.norm_proj(words).reshape(b, n, -1))
        sentences = sentences + jnp.pad(summary, ((0, 0), (1, 0), (0, 0)))
        return words, self.outer_block(sentences, rate, rngs)


class PixelEmbed(BaseModule):
    """Images to words: a 7x7 convolution, and its output cut into patches."""

    def __init__(self, patch_size: tuple[int, int], in_channels: int, embed_dims: int, stride: int, *, rngs: nnx.Rngs):
        self.proj = Conv2d(in_channels, embed_dims, 7, stride, 3, rngs=rngs)
        self.new_patch_size = (-(-patch_size[0] // stride), -(-patch_size[1] // stride))

    def __call__(self, x: Float[Array, "b h w in"]) -> Float[Array, "b*n p q c"]:
        x = self.proj(x)
        b, height, width, c = x.shape
        p, q = self.new_patch_size
        h, w = height // p, width // q
        x = x[:, : h * p, : w * q].reshape(b, h, p, w, q, c).transpose(0, 1, 3, 2, 4, 5)
        return x.reshape(b * h * w, p, q, c)


class TNT(BaseModule):
    """Transformer in Transformer: images [B, img_size, img_size, in_channels] -> ([B, C],), the class token.

    Args:
        arch: 'small' or 'base' (s, b), or a dict with embed_dims_outer, embed_dims_inner, num_layers, num_heads_outer and
            num_heads_inner.
        img_size: size of the images, one number or (height, width); no other is taken.
        patch_size: pixels of a patch, one number or (height, width).
        in_channels: channels of the images.
        ffn_ratio: hidden channels of the feed-forward halves, as a multiple.
        qkv_bias: whether queries, keys and values have a bias.
        drop_rate: dropout after the positions are added, and in each block.
        attn_drop_rate: dropout of the attention weights.
        drop_path_rate: stochastic depth of the last layer; grows linearly from 0 at the first.
        act_cfg, norm_cfg: activations of the feed-forward halves; all norms.
        first_stride: stride of the first convolution: pixels per word.
        num_fcs: accepted for MMPretrain's settings; must be 2.
        init_cfg: initialisation. Token and positions are drawn from a truncated normal distribution besides.

    The attributes `scan_layers` and `remat` are those of `apply_layers`.
    """

    archs: ClassVar = {
        ("s", "small"): dict(
            embed_dims_outer=384, embed_dims_inner=24, num_layers=12, num_heads_outer=6, num_heads_inner=4
        ),
        ("b", "base"): dict(
            embed_dims_outer=640, embed_dims_inner=40, num_layers=12, num_heads_outer=10, num_heads_inner=4
        ),
    }

    def __init__(
        self,
        arch: str | Mapping[str, int] = "b",
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_channels: int = 3,
        ffn_ratio: int = 4,
        qkv_bias: bool = False,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        act_cfg: Mapping[str, Any] = {"type": "GELU"},
        norm_cfg: Mapping[str, Any] = _LN,
        first_stride: int = 4,
        num_fcs: int = 2,
        init_cfg: Any = _INIT,
        *,
        rngs: nnx.Rngs,
    ):
        if num_fcs != 2:
            raise ConfigError(f"TNT: num_fcs={num_fcs}, but there are two linear layers")
        size = architecture(arch, self.archs, "TNT")
        inner, outer = size["embed_dims_inner"], size["embed_dims_outer"]
        self.init_cfg, self.embed_dims, self.num_layers = init_cfg, outer, size["num_layers"]
        self.scan_layers, self.remat = False, "none"
        self.img_size, patch = to_2tuple(img_size), to_2tuple(patch_size)
        num_patches = (self.img_size[0] // patch[0]) * (self.img_size[1] // patch[1])
        self.pixel_embed = PixelEmbed(patch, in_channels, inner, first_stride, rngs=rngs)
        words = self.pixel_embed.new_patch_size
        num_pixel = words[0] * words[1]
        self.norm1_proj = build_norm(norm_cfg, num_pixel * inner, rngs=rngs)
        self.projection = Linear(num_pixel * inner, outer, rngs=rngs)
        self.norm2_proj = build_norm(norm_cfg, outer, rngs=rngs)
        self.cls_token = nnx.Param(jnp.zeros((1, 1, outer)))
        self.patch_pos = nnx.Param(jnp.zeros((1, num_patches + 1, outer)))
        self.pixel_pos = nnx.Param(jnp.zeros((1, inner, *words)))  # channels first, as in files
        self.drop_after_pos = Dropout(drop_rate)
        block: dict[str, Any] = {"ffn_ratio": ffn_ratio, "drop_rate": drop_rate, "attn_drop_rate": attn_drop_rate}
        block |= {"qkv_bias": qkv_bias, "act_cfg": act_cfg, "norm_cfg": norm_cfg}
        heads = (size["num_heads_inner"], size["num_heads_outer"])
        rates = np.linspace(0, drop_path_rate, self.num_layers).tolist()
        self.layers = nnx.List(
            [TnTLayer(num_pixel, inner, outer, *heads, rate, block, norm_cfg, rngs=rngs) for rate in rates]
        )
        self.norm = build_norm(norm_cfg, outer, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w in"], *, rngs: nnx.Rngs | None = None) -> tuple[Float[Array, "b c"]]:
        """The class token behind the last layer, normalised. `rngs` is for dropout and drop path in training."""
        if tuple(x.shape[1:3]) != self.img_size:
            height, width = self.img_size
            raise ConfigError(
                f"TNT: images of {x.shape[1]}x{x.shape[2]}, but its positions are for {height}x{width}: set img_size"
            )
        b = x.shape[0]
        words = self.pixel_embed(x)
        words = words + self.pixel_pos[...].transpose(0, 2, 3, 1).astype(x.dtype)
        words = words.reshape(words.shape[0], -1, words.shape[3])
        sentences = self.norm2_proj(self.projection(self.norm1_proj(words.reshape(b, words.shape[0] // b, -1))))
        token = jnp.broadcast_to(self.cls_token[...].astype(x.dtype), (b, 1, self.embed_dims))
        sentences = jnp.concatenate([token, sentences], axis=1) + self.patch_pos[...].astype(x.dtype)
        tokens: Any = (words, self.drop_after_pos(sentences, rngs=rngs))
        (_, sentences), _ = apply_layers(self.layers, tokens, rngs=rngs, scan_layers=self.scan_layers, remat=self.remat)
        return (self.norm(sentences)[:, 0],)

    def init_weights(self, rngs: nnx.Rngs) -> None:
        """Besides `init_cfg`: token and positions from a truncated normal distribution of std 0.02."""
        super().init_weights(rngs)
        for table in (self.cls_token, self.patch_pos, self.pixel_pos):
            table.set_value(trunc_normal(0.02)(rngs.params(), table.shape))
