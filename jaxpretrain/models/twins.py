"""Twins: Revisiting the Design of Spatial Attention in Vision Transformers (Chu et al., 2021, https://arxiv.org/abs/2104.13840).

PCPVT attends to a subsampled map everywhere; SVT attends within windows and to the subsampled map in turn. Positions come
from a depthwise convolution behind the first layer of each stage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from jaxpretrain.build import ConfigError
from jaxpretrain.models.layers.arch import architecture, output_indices
from jaxpretrain.models.layers.attention import scaled_dot_product_attention
from jaxpretrain.models.layers.base import BaseModule
from jaxpretrain.models.layers.conv import Conv2d
from jaxpretrain.models.layers.drop import Dropout, drop_path
from jaxpretrain.models.layers.ffn import FFN
from jaxpretrain.models.layers.init import normal, trunc_normal
from jaxpretrain.models.layers.linear import Linear
from jaxpretrain.models.layers.norm import BatchNorm, GroupNorm, LayerNorm, build_norm
from jaxpretrain.models.layers.patch_embed import PatchEmbed
from jaxpretrain.models.layers.stack import apply_layers
from jaxpretrain.models.layers.window import window_bias, window_partition, window_reverse

_LN = {"type": "LN"}


class GlobalSubsampledAttention(BaseModule):
    """Every token attends to a map that a convolution of stride `sr_ratio` made smaller (GSA)."""

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        attn_drop: float,
        proj_drop: float,
        qkv_bias: bool,
        norm_cfg: Mapping[str, Any],
        sr_ratio: int,
        *,
        rngs: nnx.Rngs,
    ):
        self.num_heads, self.scale = num_heads, (embed_dims // num_heads) ** -0.5
        self.q = Linear(embed_dims, embed_dims, bias=qkv_bias, rngs=rngs)
        self.kv = Linear(embed_dims, 2 * embed_dims, bias=qkv_bias, rngs=rngs)
        self.proj = Linear(embed_dims, embed_dims, rngs=rngs)
        self.attn_drop, self.proj_drop = Dropout(attn_drop), Dropout(proj_drop)
        smaller = sr_ratio > 1
        self.sr = Conv2d(embed_dims, embed_dims, sr_ratio, sr_ratio, rngs=rngs) if smaller else None
        self.norm = build_norm(norm_cfg, embed_dims, rngs=rngs) if smaller else None

    def __call__(self, x: Float[Array, "b h w c"], *, rngs: nnx.Rngs | None = None) -> Float[Array, "b h w c"]:
        b, c = x.shape[0], x.shape[3]
        q = self.q(x).reshape(b, -1, self.num_heads, c // self.num_heads)
        seen = x if self.sr is None or self.norm is None else self.norm(self.sr(x))
        kv = self.kv(seen).reshape(b, -1, 2, self.num_heads, c // self.num_heads)
        k, v = kv[:, :, 0], kv[:, :, 1]
        y = scaled_dot_product_attention(self, q, k, v, scale=self.scale, dropout=self.attn_drop, rngs=rngs)
        return self.proj_drop(self.proj(y.reshape(x.shape)), rngs=rngs)


class LocallyGroupedSelfAttention(BaseModule):
    """Attention within square windows (LSA). Maps that these do not fill are padded; padding is seen by no token.

    (Where one side alone is padded, the paper's release and MMPretrain let it be seen, by a slip.)
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        attn_drop: float,
        proj_drop: float,
        qkv_bias: bool,
        window_size: int,
        *,
        rngs: nnx.Rngs,
    ):
        self.num_heads, self.scale, self.window_size = num_heads, (embed_dims // num_heads) ** -0.5, window_size
        self.qkv = Linear(embed_dims, 3 * embed_dims, bias=qkv_bias, rngs=rngs)
        self.proj = Linear(embed_dims, embed_dims, rngs=rngs)
        self.attn_drop, self.proj_drop = Dropout(attn_drop), Dropout(proj_drop)

    def __call__(self, x: Float[Array, "b h w c"], *, rngs: nnx.Rngs | None = None) -> Float[Array, "b h w c"]:
        (height, width, c), size = x.shape[1:], self.window_size
        bottom, right = -height % size, -width % size
        bias = None
        if bottom or right:
            x = jnp.pad(x, ((0, 0), (0, bottom), (0, right), (0, 0)))
            outside = np.ones((height + bottom, width + right), int)
            outside[:height, :width] = 0
            of_token = outside.reshape(x.shape[1] // size, size, x.shape[2] // size, size).swapaxes(1, 2)
            regions = of_token.reshape(-1, size**2)
            nothing = jnp.zeros((1, size**2, size**2), jnp.promote_types(x.dtype, jnp.float32))
            bias = window_bias(nothing, regions, len(regions) * x.shape[0])
        windows = window_partition(x, size)
        qkv = self.qkv(windows).reshape(*windows.shape[:2], 3, self.num_heads, c // self.num_heads)
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        y = scaled_dot_product_attention(self, q, k, v, scale=self.scale, bias=bias, dropout=self.attn_drop, rngs=rngs)
        y = window_reverse(y.reshape(windows.shape), x.shape[1], x.shape[2])[:, :height, :width]
        return self.proj_drop(self.proj(y), rngs=rngs)


class EncoderLayer(BaseModule):
    """x + attn(norm1(x)), then x + ffn(norm2(x)), on a map of tokens.

    Args:
        embed_dims: channels.
        attn: the attention.
        feedforward_channels: hidden channels of the feed-forward half.
        drop_rate: dropout in the feed-forward half.
        drop_path_rate: probability of dropping a branch of a sample. (MMPretrain drops most branches twice, so one is
            kept with the probability (1 - rate)^2 there.)
        norm_cfg: the norms.
    """

    def __init__(
        self,
        embed_dims: int,
        attn: GlobalSubsampledAttention | LocallyGroupedSelfAttention,
        feedforward_channels: int,
        drop_rate: float,
        drop_path_rate: float,
        norm_cfg: Mapping[str, Any],
        *,
        rngs: nnx.Rngs,
    ):
        self.drop_path_rate, self.deterministic = float(drop_path_rate), False
        self.norm1 = build_norm(norm_cfg, embed_dims, rngs=rngs)
        self.attn = attn
        self.norm2 = build_norm(norm_cfg, embed_dims, rngs=rngs)
        self.ffn = FFN(embed_dims, feedforward_channels, ffn_drop=drop_rate, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b h w c"], *, rngs: nnx.Rngs | None = None, drop_path_rate: float | Array | None = None
    ) -> Float[Array, "b h w c"]:
        """`drop_path_rate` replaces the layer's own; it may be traced (see `apply_layers`)."""
        rate = self.drop_path_rate if drop_path_rate is None else drop_path_rate
        rate = 0.0 if self.deterministic else rate
        x = x + drop_path(self.attn(self.norm1(x), rngs=rngs), rate, rngs)
        return x + drop_path(self.ffn(self.norm2(x), rngs=rngs), rate, rngs)


class ConditionalPositionEncoding(BaseModule):
    """x + a 3x3 depthwise convolution of x: positions that depend on the neighbourhood (Chu et al., 2021, CPVT)."""

    def __init__(self, embed_dims: int, *, rngs: nnx.Rngs):
        self.proj = Conv2d(embed_dims, embed_dims, 3, padding=1, groups=embed_dims, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        return self.proj(x) + x


def _archs(keys: Sequence[str], *rows: Sequence[Any]) -> dict[tuple[str, str], dict[str, Any]]:
    names = (("s", "small"), ("b", "base"), ("l", "large"))
    shared: dict[str, Any] = dict(patch_sizes=[4, 2, 2, 2], strides=[4, 2, 2, 2], sr_ratios=[8, 4, 2, 1])
    return {name: dict(zip(keys, row, strict=True)) | shared for name, row in zip(names, rows, strict=True)}


class PCPVT(BaseModule):
    """Twins-PCPVT: [B, H, W, in_channels] -> a tuple of maps [B, h, w, C] of the chosen stages.

    Images may have any size whose smallest map is no smaller than the subsampling.

    Args:
        arch: 'small', 'base' or 'large' (s, b, l), or a dict of lists with an entry for each stage: depths, embed_dims,
            patch_sizes, num_heads, strides (the patch sizes again), mlp_ratios, sr_ratios (the subsampling of the
            attention).
        in_channels: channels of the images.
        out_indices: the stages whose maps are returned; negative ones count from the end.
        qkv_bias: whether queries, keys and values have a bias.
        drop_rate: dropout of patches, after the attention's projection and in the feed-forward halves.
        attn_drop_rate: dropout of the attention weights.
        drop_path_rate: stochastic depth of the last layer; grows linearly from 0 at the first.
        norm_cfg: the norms of layers and stages.
        norm_after_stage: whether the output of a stage is normalised, for itself and the next stage; one for all or one
            for each.
        init_cfg: initialisation; by default, that of the paper's release.

    The attributes `scan_layers` and `remat` are those of `apply_layers`.

    Raises:
        ConfigError: an unknown arch, or lists of different lengths.
    """

    archs: ClassVar[Mapping[tuple[str, str], Mapping[str, Any]]] = _archs(
        ("embed_dims", "depths", "num_heads", "mlp_ratios"),
        ([64, 128, 320, 512], [3, 4, 6, 3], [1, 2, 5, 8], [8, 8, 4, 4]),
        ([64, 128, 320, 512], [3, 4, 18, 3], [1, 2, 5, 8], [8, 8, 4, 4]),
        ([64, 128, 320, 512], [3, 8, 27, 3], [1, 2, 5, 8], [8, 8, 4, 4]),
    )

    def __init__(
        self,
        arch: str | Mapping[str, Sequence[int]],
        in_channels: int = 3,
        out_indices: int | Sequence[int] = (3,),
        qkv_bias: bool = False,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_cfg: Mapping[str, Any] = _LN,
        norm_after_stage: bool | Sequence[bool] = False,
        init_cfg: Any = None,
        *,
        rngs: nnx.Rngs,
    ):
        name = type(self).__name__
        size = architecture(arch, self.archs, name)
        depths, widths = size["depths"], size["embed_dims"]
        count = len(depths)
        after = [norm_after_stage] * count if isinstance(norm_after_stage, bool) else list(norm_after_stage)
        for key, values in (*size.items(), ("norm_after_stage", after)):
            if len(values) != count:
                raise ConfigError(f"{name}: {len(values)} {key} for {count} stages")
        self.init_cfg, self.embed_dims = init_cfg, list(widths)
        self.scan_layers, self.remat = False, "none"
        self.out_indices = output_indices(out_indices, count, name)
        ins = [in_channels, *widths[:-1]]
        self.patch_embeds = nnx.List(
            [
                PatchEmbed(ins[i], widths[i], size["patch_sizes"][i], size["strides"][i], norm_cfg=_LN, rngs=rngs)
                for i in range(count)
            ]
        )
        self.position_encoding_drops = nnx.List([Dropout(drop_rate) for _ in range(count)])
        self.position_encodings = nnx.List([ConditionalPositionEncoding(width, rngs=rngs) for width in widths])
        rates = iter(np.linspace(0, drop_path_rate, sum(depths)).tolist())
        args: dict[str, Any] = dict(attn_drop=attn_drop_rate, proj_drop=drop_rate, qkv_bias=qkv_bias, rngs=rngs)
        stages = []
        for i, width in enumerate(widths):
            stage = []
            for j in range(depths[i]):
                attn = self._attention(size, i, j, norm_cfg, **args)
                hidden = size["mlp_ratios"][i] * width
                stage.append(EncoderLayer(width, attn, hidden, drop_rate, next(rates), norm_cfg, rngs=rngs))
            stages.append(nnx.List(stage))
        self.stages = nnx.List(stages)
        for i, width in enumerate(widths):
            norm = build_norm(norm_cfg, width, rngs=rngs) if after[i] and norm_cfg is not None else None
            setattr(self, f"norm_after_stage{i}", norm)

    def _attention(
        self, size: Mapping[str, Any], stage: int, layer: int, norm_cfg: Mapping[str, Any], **args: Any
    ) -> GlobalSubsampledAttention | LocallyGroupedSelfAttention:
        """The attention of a layer; `args` are what every kind of it takes."""
        width, heads = size["embed_dims"][stage], size["num_heads"][stage]
        if width % heads:
            raise ConfigError(f"{type(self).__name__}: {width} channels are not a multiple of {heads} heads")
        return GlobalSubsampledAttention(width, heads, norm_cfg=norm_cfg, sr_ratio=size["sr_ratios"][stage], **args)

    def __call__(
        self, x: Float[Array, "b h w c"], *, rngs: nnx.Rngs | None = None
    ) -> tuple[Float[Array, "b h2 w2 c2"], ...]:
        """The maps of the stages in `out_indices`, in order. `rngs` is for dropout and drop path in training."""
        outs = []
        for i, stage in enumerate(self.stages):
            x, grid = self.patch_embeds[i](x)
            x = self.position_encoding_drops[i](x.reshape(x.shape[0], *grid, -1), rngs=rngs)
            x = self._apply(stage[:1], x, rngs)
            x = self._apply(stage[1:], self.position_encodings[i](x), rngs)
            norm = getattr(self, f"norm_after_stage{i}")
            x = x if norm is None else norm(x)
            if i in self.out_indices:
                outs.append(x)
        return tuple(outs)

    def _apply(self, layers: Sequence[Any], x: Array, rngs: nnx.Rngs | None) -> Array:
        return apply_layers(layers, x, rngs=rngs, scan_layers=self.scan_layers, remat=self.remat)[0]

    def init_weights(self, rngs: nnx.Rngs) -> None:
        """By `init_cfg`, if there is one. Otherwise linear layers from a truncated normal distribution of std 0.02, and
        convolutions from a normal one of variance 2 / (kernel size * output channels / groups); biases 0.
        """
        if self.init_cfg is not None:
            super().init_weights(rngs)
            return
        for _, layer in nnx.iter_modules(self):
            if isinstance(layer, Linear):
                layer.kernel.set_value(trunc_normal(0.02)(rngs.params(), layer.kernel.shape))
            elif isinstance(layer, Conv2d):
                h, w, _, outs = layer.kernel.shape
                std = (2 / (h * w * outs / layer.groups)) ** 0.5
                layer.kernel.set_value(normal(0.0, std)(rngs.params(), layer.kernel.shape))
            elif isinstance(layer, LayerNorm | BatchNorm | GroupNorm) and layer.scale is not None:
                layer.scale.set_value(jnp.ones(layer.scale.shape))
            bias = getattr(layer, "bias", None)
            if isinstance(bias, nnx.Variable):
                bias.set_value(jnp.zeros(bias.shape))


class SVT(PCPVT):
    """Twins-SVT: layers 0, 2, 4, ... of each stage attend within windows, the others to the subsampled map.

    Args:
        arch: as of `PCPVT`; a dict has window_sizes besides: tokens along a side of a window, for each stage.
        args, kwargs: other arguments of `PCPVT`.
    """

    archs: ClassVar = _archs(
        ("embed_dims", "depths", "num_heads", "mlp_ratios", "window_sizes"),
        ([64, 128, 256, 512], [2, 2, 10, 4], [2, 4, 8, 16], [4] * 4, [7] * 4),
        ([96, 192, 384, 768], [2, 2, 18, 2], [3, 6, 12, 24], [4] * 4, [7] * 4),
        ([128, 256, 512, 1024], [2, 2, 18, 2], [4, 8, 16, 32], [4] * 4, [7] * 4),
    )

    def _attention(
        self, size: Mapping[str, Any], stage: int, layer: int, norm_cfg: Mapping[str, Any], **args: Any
    ) -> GlobalSubsampledAttention | LocallyGroupedSelfAttention:
        if layer % 2:
            return super()._attention(size, stage, layer, norm_cfg, **args)
        width, heads, window = (size[key][stage] for key in ("embed_dims", "num_heads", "window_sizes"))
        return LocallyGroupedSelfAttention(width, heads, window_size=window, **args)
