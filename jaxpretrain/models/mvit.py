"""MViTv2: Improved Multiscale Vision Transformers (Li et al., 2022, https://arxiv.org/abs/2112.01526).

Queries, keys and values are pooled by depthwise convolutions; where those of the queries have stride 2, the map gets
smaller and wider. Relative positions are added to the logits, and pooled queries to the output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from jaxpretrain.build import ConfigError
from jaxpretrain.models.layers.activation import activation
from jaxpretrain.models.layers.arch import architecture, output_indices
from jaxpretrain.models.layers.attention import scaled_dot_product_attention
from jaxpretrain.models.layers.base import BaseModule
from jaxpretrain.models.layers.conv import Conv2d, max_pool2d
from jaxpretrain.models.layers.drop import drop_path
from jaxpretrain.models.layers.init import trunc_normal
from jaxpretrain.models.layers.linear import Linear
from jaxpretrain.models.layers.norm import build_norm
from jaxpretrain.models.layers.patch_embed import ConvPatchEmbed, to_2tuple
from jaxpretrain.models.layers.position import fit_pos_embed, resize_pos_embed
from jaxpretrain.models.layers.rel_pos_decomposed import decomposed_bias
from jaxpretrain.models.layers.stack import apply_layers

_LN = {"type": "LN", "eps": 1e-6}


class MLP(BaseModule):
    """fc2(act(fc1(x))) on each token, which may change the width."""

    def __init__(self, ins: int, hidden: int, outs: int, act_cfg: Mapping[str, Any], *, rngs: nnx.Rngs):
        self.act = activation(act_cfg)
        self.fc1 = Linear(ins, hidden, rngs=rngs)
        self.fc2 = Linear(hidden, outs, rngs=rngs)

    def __call__(self, x: Float[Array, "*b in"]) -> Float[Array, "*b out"]:
        return self.fc2(self.act(self.fc1(x)))


class MultiScaleAttention(BaseModule):
    """Attention of pooled queries to pooled keys and values; all heads share the pooling.

    Args:
        in_dims, out_dims: channels of input and output.
        num_heads: heads; must divide `out_dims`.
        qkv_bias: whether queries, keys and values have a bias.
        norm_cfg: the norms behind the pooling.
        pool_kernel: size of the pooling (down, across).
        stride_q, stride_kv: strides of the pooling of queries, and of keys and values.
        rel_pos_spatial: whether relative positions are added to the logits.
        residual_pooling: whether the pooled queries are added to the output.
        input_size: tokens (down, across) that the tables of relative positions are for; interpolated for others.
        rel_pos_zero_init: whether these tables start at zero.
    """

    def __init__(
        self,
        in_dims: int,
        out_dims: int,
        num_heads: int,
        qkv_bias: bool = True,
        norm_cfg: Mapping[str, Any] = _LN,
        pool_kernel: Sequence[int] = (3, 3),
        stride_q: int = 1,
        stride_kv: int = 1,
        rel_pos_spatial: bool = True,
        residual_pooling: bool = True,
        input_size: tuple[int, int] = (56, 56),
        rel_pos_zero_init: bool = False,
        *,
        rngs: nnx.Rngs,
    ):
        if out_dims % num_heads:
            raise ConfigError(f"MViT: {out_dims} channels are not a multiple of {num_heads} heads")
        self.num_heads, self.residual_pooling, self.rel_pos_zero_init = num_heads, residual_pooling, rel_pos_zero_init
        width = out_dims // num_heads
        self.scale = width**-0.5
        self.qkv = Linear(in_dims, 3 * out_dims, bias=qkv_bias, rngs=rngs)
        self.proj = Linear(out_dims, out_dims, rngs=rngs)
        kernel = (int(pool_kernel[0]), int(pool_kernel[1]))
        padding = (kernel[0] // 2, kernel[1] // 2)
        for part, stride in (("q", stride_q), ("k", stride_kv), ("v", stride_kv)):
            pool = Conv2d(width, width, kernel, stride, padding, groups=width, bias=False, rngs=rngs)
            setattr(self, f"pool_{part}", pool)
            setattr(self, f"norm_{part}", build_norm(norm_cfg, width, rngs=rngs))
        tables: list[nnx.Param | None] = [None, None]
        if rel_pos_spatial:
            offsets = (2 * max(size // stride_q, size // stride_kv) - 1 for size in input_size)
            tables = [nnx.Param(jnp.zeros((count, width))) for count in offsets]
        self.rel_pos_h, self.rel_pos_w = tables

    def __call__(self, x: Float[Array, "b h w in"]) -> Float[Array, "b h2 w2 out"]:
        b, height, width, _ = x.shape
        qkv = self.qkv(x).reshape(b, height, width, 3, self.num_heads, -1)
        q, k, v = (
            self._pool(getattr(self, f"pool_{part}"), getattr(self, f"norm_{part}"), qkv[:, :, :, i])
            for i, part in enumerate("qkv")
        )
        grid, keys = (q.shape[1], q.shape[2]), (k.shape[1], k.shape[2])
        q, k, v = (a.reshape(b, -1, *a.shape[3:]) for a in (q, k, v))
        bias = None
        if self.rel_pos_h is not None and self.rel_pos_w is not None:
            bias = decomposed_bias(q, grid, self.rel_pos_h[...], self.rel_pos_w[...], keys)
        y = scaled_dot_product_attention(self, q, k, v, scale=self.scale, bias=bias)
        y = y + q if self.residual_pooling else y
        return self.proj(y.reshape(b, *grid, -1))

    def _pool(self, pool: Conv2d, norm: Any, x: Float[Array, "b h w heads d"]) -> Float[Array, "b h2 w2 heads d"]:
        b, h, w, heads, d = x.shape
        y = norm(pool(x.transpose(0, 3, 1, 2, 4).reshape(b * heads, h, w, d)))
        return y.reshape(b, heads, *y.shape[1:]).transpose(0, 2, 3, 1, 4)

    def init_weights(self, rngs: nnx.Rngs) -> None:
        """Besides `init_cfg`: relative positions from a truncated normal distribution of std 0.02."""
        super().init_weights(rngs)
        for table in (self.rel_pos_h, self.rel_pos_w):
            if table is not None and not self.rel_pos_zero_init:
                table.set_value(trunc_normal(0.02)(rngs.params(), table.shape))

    def adapt(self, name: str, array: np.ndarray) -> np.ndarray | None:
        """Relative positions for images of another size are interpolated linearly."""
        if name not in ("rel_pos_h", "rel_pos_w") or array.ndim != 2:
            return None
        table, size = jnp.asarray(array)[None], (1, getattr(self, name).shape[0])
        return np.asarray(resize_pos_embed(table, (1, len(array)), size, "bilinear", num_extra_tokens=0)[0])


class MultiScaleBlock(BaseModule):
    """skip(x) + attn(norm1(x)), then x + mlp(norm2(x)). Where the width changes, `proj` of the norm is the shortcut.

    Args:
        in_dims, out_dims: channels of input and output.
        num_heads: heads of the attention.
        mlp_ratio: hidden channels of the MLP, as a multiple.
        drop_path: probability of dropping a branch of a sample.
        norm_cfg, act_cfg: the norms; the MLP's activation.
        dim_mul_in_attention: whether the width changes in the attention, not in the MLP.
        stride_q: stride of the queries' pooling, and of a max pooling in the shortcut.
        attn_cfg: further arguments of `MultiScaleAttention`.
    """

    def __init__(
        self,
        in_dims: int,
        out_dims: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        norm_cfg: Mapping[str, Any] = _LN,
        act_cfg: Mapping[str, Any] = {"type": "GELU"},
        dim_mul_in_attention: bool = True,
        stride_q: int = 1,
        attn_cfg: Mapping[str, Any] = {},
        *,
        rngs: nnx.Rngs,
    ):
        self.drop_path_rate, self.deterministic = float(drop_path), False
        self.dim_mul_in_attention, self.stride_q = dim_mul_in_attention, stride_q
        width = out_dims if dim_mul_in_attention else in_dims
        self.norm1 = build_norm(norm_cfg, in_dims, rngs=rngs)
        self.attn = MultiScaleAttention(
            in_dims, width, num_heads, norm_cfg=norm_cfg, stride_q=stride_q, **attn_cfg, rngs=rngs
        )
        self.norm2 = build_norm(norm_cfg, width, rngs=rngs)
        self.mlp = MLP(width, int(width * mlp_ratio), out_dims, act_cfg, rngs=rngs)
        self.proj = Linear(in_dims, out_dims, rngs=rngs) if in_dims != out_dims else None

    def __call__(
        self, x: Float[Array, "b h w c"], *, rngs: nnx.Rngs | None = None, drop_path_rate: float | Array | None = None
    ) -> Float[Array, "b h2 w2 c2"]:
        """`drop_path_rate` replaces the block's own; it may be traced (see `apply_layers`)."""
        rate = self.drop_path_rate if drop_path_rate is None else drop_path_rate
        rate = 0.0 if self.deterministic else rate
        normed = self.norm1(x)
        skip = self.proj(normed) if self.proj is not None and self.dim_mul_in_attention else x
        if self.stride_q > 1:
            skip = max_pool2d(skip, self.stride_q + 1, self.stride_q, (self.stride_q + 1) // 2)
        x = skip + drop_path(self.attn(normed), rate, rngs)
        normed = self.norm2(x)
        skip = self.proj(normed) if self.proj is not None and not self.dim_mul_in_attention else x
        return skip + drop_path(self.mlp(normed), rate, rngs)


class MViT(BaseModule):
    """MViTv2: [B, H, W, in_channels] -> a tuple of maps [B, h, w, C] of the chosen scales, normalised.

    (The maps of earlier scales are normalised for the output alone; in MMPretrain, the next block gets them so too.)

    Args:
        arch: 'tiny', 'small', 'base' or 'large', or a dict with embed_dims, num_layers, num_heads (of the first scale)
            and downscale_indices (the layers that halve the map).
        img_size: size of the images that positions are for, one number or (height, width); interpolated for others.
        in_channels: channels of the images.
        out_scales: the scales whose maps are returned; negative ones count from the end.
        drop_path_rate: stochastic depth of the last block; grows linearly from 0 at the first.
        use_abs_pos_embed: whether positions are added to the first tokens.
        interpolate_mode: 'bicubic' or 'bilinear', for these.
        pool_kernel: size of the pooling of queries, keys and values.
        dim_mul, head_mul: what the width and the number of heads are multiplied by at each new scale.
        adaptive_kv_stride: stride of the pooling of keys and values in the first scale; half of it in each next one.
        rel_pos_spatial, residual_pooling, rel_pos_zero_init, qkv_bias: see `MultiScaleAttention`.
        dim_mul_in_attention: see `MultiScaleBlock`.
        mlp_ratio: hidden channels of the MLPs, as a multiple.
        norm_cfg: all norms.
        patch_cfg: further arguments of the first convolution (`ConvPatchEmbed`).
        init_cfg: initialisation (see `BaseModule`). Positions are drawn from a truncated normal distribution besides.

    The attributes `scan_layers` and `remat` are those of `apply_layers`.
    """

    archs: ClassVar = {
        ("tiny",): dict(embed_dims=96, num_layers=10, num_heads=1, downscale_indices=[1, 3, 8]),
        ("small",): dict(embed_dims=96, num_layers=16, num_heads=1, downscale_indices=[1, 3, 14]),
        ("base",): dict(embed_dims=96, num_layers=24, num_heads=1, downscale_indices=[2, 5, 21]),
        ("large",): dict(embed_dims=144, num_layers=48, num_heads=2, downscale_indices=[2, 8, 44]),
    }

    def __init__(
        self,
        arch: str | Mapping[str, Any] = "base",
        img_size: int | tuple[int, int] = 224,
        in_channels: int = 3,
        out_scales: int | Sequence[int] = -1,
        drop_path_rate: float = 0.0,
        use_abs_pos_embed: bool = False,
        interpolate_mode: str = "bicubic",
        pool_kernel: Sequence[int] = (3, 3),
        dim_mul: int = 2,
        head_mul: int = 2,
        adaptive_kv_stride: int = 4,
        rel_pos_spatial: bool = True,
        residual_pooling: bool = True,
        dim_mul_in_attention: bool = True,
        rel_pos_zero_init: bool = False,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        norm_cfg: Mapping[str, Any] = _LN,
        patch_cfg: Mapping[str, Any] = {"kernel_size": 7, "stride": 4, "padding": 3},
        init_cfg: Any = None,
        *,
        rngs: nnx.Rngs,
    ):
        size = architecture(arch, self.archs, "MViT")
        self.embed_dims, self.num_layers = size["embed_dims"], size["num_layers"]
        downscale = list(size["downscale_indices"])
        self.init_cfg, self.interpolate_mode = init_cfg, interpolate_mode
        self.scan_layers, self.remat = False, "none"
        self.out_scales = output_indices(out_scales, len(downscale) + 1, "MViT")
        patch: dict[str, Any] = {"in_channels": in_channels, "embed_dims": self.embed_dims, "padding": 3, "stride": 4}
        self.patch_embed = ConvPatchEmbed(**{**patch, **patch_cfg}, rngs=rngs)
        self.patch_resolution = self._grid(to_2tuple(img_size))
        shape = (1, self.patch_resolution[0] * self.patch_resolution[1], self.embed_dims)
        self.pos_embed = nnx.Param(jnp.zeros(shape)) if use_abs_pos_embed else None

        shared: dict[str, Any] = {"pool_kernel": tuple(pool_kernel), "qkv_bias": qkv_bias}
        shared |= {"rel_pos_spatial": rel_pos_spatial, "residual_pooling": residual_pooling}
        shared |= {"rel_pos_zero_init": rel_pos_zero_init}
        width, heads, stride_kv, grid = self.embed_dims, size["num_heads"], adaptive_kv_stride, self.patch_resolution
        blocks, widths = [], []
        for i, rate in enumerate(np.linspace(0, drop_path_rate, self.num_layers).tolist()):
            starts = i in downscale
            if starts:
                heads, stride_kv = heads * head_mul, max(stride_kv // 2, 1)
            widens = starts if dim_mul_in_attention else i + 1 in downscale
            outs = width * dim_mul if widens else width
            blocks.append(
                MultiScaleBlock(
                    width,
                    outs,
                    heads,
                    mlp_ratio,
                    rate,
                    norm_cfg,
                    dim_mul_in_attention=dim_mul_in_attention,
                    stride_q=2 if starts else 1,
                    attn_cfg={**shared, "stride_kv": stride_kv, "input_size": grid},
                    rngs=rngs,
                )
            )
            grid = (grid[0] // 2, grid[1] // 2) if starts else grid
            width = outs
            widths.append(width)
        self.blocks = nnx.List(blocks)
        self.scale_ends = tuple(index - 1 for index in [*downscale, self.num_layers])
        for scale in self.out_scales:
            setattr(self, f"norm{scale}", build_norm(norm_cfg, widths[self.scale_ends[scale]], rngs=rngs))

    def _grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Tokens down and across of an image of this size."""
        conv = self.patch_embed.projection
        pads = conv._pads(size)
        h, w = (
            (n + sum(pad) - k) // s + 1 for n, pad, k, s in zip(size, pads, conv.kernel_size, conv.stride, strict=True)
        )
        return h, w

    def __call__(
        self, x: Float[Array, "b h w c"], *, rngs: nnx.Rngs | None = None
    ) -> tuple[Float[Array, "b h2 w2 c2"], ...]:
        """The maps of the scales in `out_scales`, in order. `rngs` is for drop path in training."""
        x = self.patch_embed(x)
        if self.pos_embed is not None:
            grid, mode = (x.shape[1], x.shape[2]), self.interpolate_mode
            table = resize_pos_embed(self.pos_embed[...], self.patch_resolution, grid, mode, num_extra_tokens=0)
            x = x + table.reshape(1, *grid, -1).astype(x.dtype)
        ends = {self.scale_ends[scale]: scale for scale in self.out_scales}
        _, outputs = apply_layers(
            self.blocks, x, rngs=rngs, scan_layers=self.scan_layers, remat=self.remat, out_indices=ends
        )
        return tuple(getattr(self, f"norm{ends[i]}")(out) for i, out in outputs.items())

    def init_weights(self, rngs: nnx.Rngs) -> None:
        """Besides `init_cfg` and the blocks' own rules: absolute positions from a truncated normal distribution."""
        super().init_weights(rngs)
        if self.pos_embed is not None:
            self.pos_embed.set_value(trunc_normal(0.02)(rngs.params(), self.pos_embed.shape))

    def adapt(self, name: str, array: np.ndarray) -> np.ndarray | None:
        """Absolute positions for images of another size are interpolated."""
        if name != "pos_embed":
            return None
        return fit_pos_embed(array, self.patch_resolution, self.interpolate_mode, num_extra_tokens=0)
