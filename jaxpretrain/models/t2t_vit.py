"""Tokens-to-Token ViT (Yuan et al., 2021, https://arxiv.org/abs/2101.11986).

Overlapping patches become tokens in three steps, with a thin transformer layer after each of the first two.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from jaxpretrain.build import ConfigError, build, nearest
from jaxpretrain.models.layers.arch import output_indices
from jaxpretrain.models.layers.attention import scaled_dot_product_attention
from jaxpretrain.models.layers.base import BaseModule
from jaxpretrain.models.layers.drop import Dropout, drop_path
from jaxpretrain.models.layers.ffn import FFN
from jaxpretrain.models.layers.init import trunc_normal
from jaxpretrain.models.layers.linear import Linear
from jaxpretrain.models.layers.norm import build_norm
from jaxpretrain.models.layers.position import resize_pos_embed
from jaxpretrain.models.layers.stack import apply_layers
from jaxpretrain.models.vision_transformer import OUT_TYPES

_LN = {"type": "LN"}
_ATTENTIONS = ("mmpretrain", "paper")


class T2TAttention(BaseModule):
    """Self-attention that may change the number of channels; the projection's input is then its shortcut too.

    Args:
        input_dims: channels of the input.
        embed_dims: channels of the output.
        num_heads: heads; must divide `embed_dims`.
        qkv_bias: whether queries, keys and values have a bias.
        qk_scale: the paper's factor of the logits; (input_dims // num_heads) ** -0.5 if None, as in its release.
        attention: 'paper', or 'mmpretrain': see `T2T_ViT`.
        attn_drop, proj_drop: dropout of the attention weights and of the output.
    """

    def __init__(
        self,
        input_dims: int,
        embed_dims: int,
        num_heads: int,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        attention: str = "mmpretrain",
        *,
        rngs: nnx.Rngs,
    ):
        if embed_dims % num_heads:
            raise ConfigError(f"T2T_ViT: embed_dims={embed_dims} is not a multiple of num_heads={num_heads}")
        self.num_heads, self.head_dims = num_heads, embed_dims // num_heads
        if attention not in _ATTENTIONS:
            raise ConfigError(f"T2T_ViT: unknown attention {attention!r}.{nearest(attention, _ATTENTIONS)}")
        paper = qk_scale or (input_dims // num_heads) ** -0.5
        self.scale = paper if attention == "paper" else self.head_dims**0.5
        self.qkv = Linear(input_dims, 3 * embed_dims, bias=qkv_bias, rngs=rngs)
        self.attn_drop = Dropout(attn_drop)
        self.proj = Linear(embed_dims, embed_dims, rngs=rngs)
        self.proj_drop = Dropout(proj_drop)

    def __call__(
        self, x: Float[Array, "b n in"], *, rngs: nnx.Rngs | None = None
    ) -> tuple[Float[Array, "b n out"], Float[Array, "b n out"]]:
        """The attention's output, and the values of all heads."""
        qkv = self.qkv(x).reshape(*x.shape[:2], 3, self.num_heads, self.head_dims)
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        y = scaled_dot_product_attention(self, q, k, v, scale=self.scale, dropout=self.attn_drop, rngs=rngs)
        y = self.proj_drop(self.proj(y.reshape(*x.shape[:2], -1)), rngs=rngs)
        return y, v.reshape(y.shape)


class T2TTransformerLayer(BaseModule):
    """A pre-norm transformer layer. With `input_dims`, its attention changes the width and has its values for shortcut.

    Args:
        embed_dims: channels of the output.
        num_heads: heads of the attention.
        feedforward_channels: hidden channels of the feed-forward half.
        input_dims: channels of the input; None: `embed_dims`, and an ordinary residual.
        drop_rate: dropout after the attention's projection and in the feed-forward half.
        attn_drop_rate: dropout of the attention weights.
        drop_path_rate: probability of dropping a branch of a sample.
        num_fcs: accepted for MMPretrain's settings; must be 2.
        qkv_bias, qk_scale, attention: as of `T2TAttention`.
        act_cfg, norm_cfg: activation of the feed-forward half; the norms.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        feedforward_channels: int,
        input_dims: int | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        num_fcs: int = 2,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        act_cfg: Mapping[str, Any] = {"type": "GELU"},
        norm_cfg: Mapping[str, Any] = _LN,
        attention: str = "mmpretrain",
        init_cfg: Any = None,
        *,
        rngs: nnx.Rngs,
    ):
        if num_fcs != 2:
            raise ConfigError(f"T2TTransformerLayer: num_fcs={num_fcs}, but there are two linear layers")
        self.init_cfg, self.drop_path_rate, self.deterministic = init_cfg, float(drop_path_rate), False
        self.v_shortcut = input_dims is not None
        width = input_dims or embed_dims
        self.ln1 = build_norm(norm_cfg, width, rngs=rngs)
        sizes = (width, embed_dims, num_heads, qkv_bias, qk_scale)
        self.attn = T2TAttention(*sizes, attn_drop=attn_drop_rate, proj_drop=drop_rate, attention=attention, rngs=rngs)
        self.ln2 = build_norm(norm_cfg, embed_dims, rngs=rngs)
        self.ffn = FFN(embed_dims, feedforward_channels, act_cfg, drop_rate, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b n in"], *, rngs: nnx.Rngs | None = None, drop_path_rate: float | Array | None = None
    ) -> Float[Array, "b n out"]:
        """`drop_path_rate` replaces the layer's own; it may be traced (see `apply_layers`)."""
        rate = self.drop_path_rate if drop_path_rate is None else drop_path_rate
        rate = 0.0 if self.deterministic else rate
        y, values = self.attn(self.ln1(x), rngs=rngs)
        x = (values if self.v_shortcut else x) + drop_path(y, rate, rngs)
        return x + drop_path(self.ffn(self.ln2(x), rngs=rngs), rate, rngs)


def soft_split(
    x: Float[Array, "b h w c"], kernel_size: int, stride: int, padding: int
) -> Float[Array, "b h2 w2 c*kernel*kernel"]:
    """Overlapping windows of a map, padded by zeros, as tokens; their numbers are ordered (channel, row, column)."""
    x = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    h, w = ((size - kernel_size) // stride + 1 for size in x.shape[1:3])
    shifted = [
        x[:, i : i + stride * (h - 1) + 1 : stride, j : j + stride * (w - 1) + 1 : stride]
        for i in range(kernel_size)
        for j in range(kernel_size)
    ]
    return jnp.stack(shifted, axis=-1).reshape(x.shape[0], h, w, -1)


class T2TModule(BaseModule):
    """Images to tokens of 16x16 pixels each (more, as they overlap).

    Args:
        img_size: size of the images that `init_out_size` is for.
        in_channels: channels of the images.
        embed_dims: channels of the tokens.
        token_dims: channels between the steps.
        use_performer: must be False; MMPretrain has no performer either.
        attention: see `T2T_ViT`.
    """

    def __init__(
        self,
        img_size: int = 224,
        in_channels: int = 3,
        embed_dims: int = 384,
        token_dims: int = 64,
        use_performer: bool = False,
        attention: str = "mmpretrain",
        init_cfg: Any = None,
        *,
        rngs: nnx.Rngs,
    ):
        if use_performer:
            raise ConfigError("T2TModule: use_performer=True, but there is the attention of transformers only")
        self.init_cfg = init_cfg
        sizes: dict[str, Any] = dict(
            embed_dims=token_dims, num_heads=1, feedforward_channels=token_dims, attention=attention
        )
        self.attention1 = T2TTransformerLayer(input_dims=in_channels * 49, **sizes, rngs=rngs)
        self.attention2 = T2TTransformerLayer(input_dims=token_dims * 9, **sizes, rngs=rngs)
        self.project = Linear(token_dims * 9, embed_dims, rngs=rngs)
        self.init_out_size = (img_size // 16, img_size // 16)

    def __call__(
        self, x: Float[Array, "b h w c"], *, rngs: nnx.Rngs | None = None
    ) -> tuple[Float[Array, "b n d"], tuple[int, int]]:
        """Tokens in row-major order, and how many there are down and across."""
        x = soft_split(x, 7, 4, 2)
        for attention in (self.attention1, self.attention2):
            b, h, w, c = x.shape
            x = attention(x.reshape(b, h * w, c), rngs=rngs).reshape(b, h, w, -1)
            x = soft_split(x, 3, 2, 1)
        b, h, w, c = x.shape
        return self.project(x.reshape(b, h * w, c)), (h, w)


def sinusoid_encoding(num_positions: int, embed_dims: int) -> Float[np.ndarray, "1 n c"]:
    """The fixed positions of Vaswani et al. (2017), float32: sines at even channels, cosines at odd ones."""
    channel = np.arange(embed_dims)
    angle = np.arange(num_positions)[:, None] / 10000 ** (2 * (channel // 2) / embed_dims)
    return np.where(channel % 2 == 0, np.sin(angle), np.cos(angle)).astype(np.float32)[None]


class T2T_ViT(BaseModule):
    """T2T-ViT, for images of any size: positions are interpolated where the grid of tokens is another.

    Args:
        img_size: size of the images that the positions are for.
        in_channels: channels of the images.
        embed_dims: channels of the tokens.
        num_layers: layers of the transformer.
        out_indices: the layers whose output is returned; -1 is the last.
        drop_rate: dropout after the positions are added.
        drop_path_rate: stochastic depth of the last layer; grows linearly from 0 at the first.
        norm_cfg: the norms of the transformer.
        final_norm: whether the last layer's output is normalised (`norm`).
        out_type: 'raw' (all tokens [B, N, C]), 'cls_token' ([B, C]), 'featmap' ([B, h, w, C]) or 'avg_featmap' ([B, C]).
        with_cls_token: whether there is a class token; 'cls_token' needs it.
        interpolate_mode: 'bicubic' or 'bilinear', for positions.
        t2t_cfg: further arguments of `T2TModule`.
        layer_cfgs: further arguments of `T2TTransformerLayer`: one dict for all, or one for each layer.
        attention: 'paper' multiplies logits by the factor of the paper's release; 'mmpretrain', the default, does as
            MMPretrain 1.2, which multiplies by the root of the heads' channels where it means to divide. Weights trained
            before it did so need 'paper'; its zoo's, which are older, should be among them.
        init_cfg: initialisation (see `BaseModule`). The class token is drawn from a truncated normal distribution besides.

    The attributes `scan_layers` and `remat` are those of `apply_layers`.

    Raises:
        ConfigError: an unknown name, or arguments that do not fit together.
    """

    def __init__(
        self,
        img_size: int = 224,
        in_channels: int = 3,
        embed_dims: int = 384,
        num_layers: int = 14,
        out_indices: int | Sequence[int] = -1,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_cfg: Mapping[str, Any] = _LN,
        final_norm: bool = True,
        out_type: str = "cls_token",
        with_cls_token: bool = True,
        interpolate_mode: str = "bicubic",
        t2t_cfg: Mapping[str, Any] = {},
        layer_cfgs: Mapping[str, Any] | Sequence[Mapping[str, Any]] = {},
        attention: str = "mmpretrain",
        init_cfg: Any = None,
        *,
        rngs: nnx.Rngs,
    ):
        if out_type not in OUT_TYPES:
            raise ConfigError(f"T2T_ViT: unknown out_type {out_type!r}.{nearest(out_type, OUT_TYPES)}")
        if out_type == "cls_token" and not with_cls_token:
            raise ConfigError("T2T_ViT: out_type='cls_token' needs with_cls_token=True, or choose another")
        self.init_cfg, self.out_type, self.interpolate_mode = init_cfg, out_type, interpolate_mode
        self.embed_dims, self.num_layers = embed_dims, num_layers
        self.scan_layers, self.remat = False, "none"
        self.out_indices = output_indices(out_indices, num_layers, "T2T_ViT")
        t2t = {"type": T2TModule, "img_size": img_size, "in_channels": in_channels, "embed_dims": embed_dims}
        t2t["attention"] = attention
        self.tokens_to_token = build({**t2t, **t2t_cfg}, rngs=rngs)
        self.patch_resolution = self.tokens_to_token.init_out_size
        self.num_extra_tokens = int(with_cls_token)
        self.cls_token = nnx.Param(jnp.zeros((1, 1, embed_dims))) if with_cls_token else None
        self.drop_after_pos = Dropout(drop_rate)

        cfgs = [layer_cfgs] * num_layers if isinstance(layer_cfgs, Mapping) else list(layer_cfgs)
        if len(cfgs) != num_layers:
            raise ConfigError(f"T2T_ViT: {len(cfgs)} layer_cfgs for {num_layers} layers")
        shared = {"type": T2TTransformerLayer, "embed_dims": embed_dims, "num_heads": 6, "norm_cfg": norm_cfg}
        shared |= {"feedforward_channels": 3 * embed_dims, "qkv_bias": False, "attention": attention}
        rates = np.linspace(0, drop_path_rate, num_layers).tolist()
        layers = [
            build({**shared, "drop_path_rate": rate, **cfg}, rngs=rngs) for rate, cfg in zip(rates, cfgs, strict=True)
        ]
        self.encoder = nnx.List(layers)
        self.norm = build_norm(norm_cfg, embed_dims, rngs=rngs) if final_norm else None

    def __call__(self, x: Float[Array, "b h w c"], *, rngs: nnx.Rngs | None = None) -> tuple[Array, ...]:
        """The chosen layers' outputs in the form of `out_type`, first layer first."""
        x, grid = self.tokens_to_token(x, rngs=rngs)
        if self.cls_token is not None:
            token = self.cls_token[...].astype(x.dtype)
            x = jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], 1, x.shape[2])), x], axis=1)
        table, first = jnp.asarray(self._positions()), self.num_extra_tokens
        x = x + resize_pos_embed(table, self.patch_resolution, grid, self.interpolate_mode, first).astype(x.dtype)
        x, outputs = apply_layers(
            self.encoder,
            self.drop_after_pos(x, rngs=rngs),
            rngs=rngs,
            scan_layers=self.scan_layers,
            remat=self.remat,
            out_indices=self.out_indices,
        )
        if self.norm is not None and self.num_layers - 1 in outputs:
            outputs[self.num_layers - 1] = self.norm(x)
        return tuple(self._format(output, grid) for output in outputs.values())

    def _positions(self) -> Float[np.ndarray, "1 n c"]:
        down, across = self.patch_resolution
        return sinusoid_encoding(down * across + self.num_extra_tokens, self.embed_dims)

    def _format(self, x: Float[Array, "b n c"], grid: tuple[int, int]) -> Array:
        if self.out_type == "raw":
            return x
        if self.out_type == "cls_token":
            return x[:, 0]
        patches = x[:, self.num_extra_tokens :]
        if self.out_type == "featmap":
            return patches.reshape(x.shape[0], *grid, x.shape[2])
        return patches.mean(axis=1, dtype=jnp.promote_types(x.dtype, jnp.float32)).astype(x.dtype)

    def derived(self) -> dict[str, np.ndarray]:
        return {"pos_embed": self._positions()}

    def init_weights(self, rngs: nnx.Rngs) -> None:
        """Besides `init_cfg`: the class token from a truncated normal distribution of std 0.02."""
        super().init_weights(rngs)
        if self.cls_token is not None:
            self.cls_token.set_value(trunc_normal(0.02)(rngs.params(), self.cls_token.shape))
