"""The image encoder of SAM (Kirillov et al., 2023, Segment Anything; ViTDet: Li et al., 2022)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from jaxpretrain.build import ConfigError
from jaxpretrain.models.layers.attention import MultiheadAttention
from jaxpretrain.models.layers.base import BaseModule, freeze
from jaxpretrain.models.layers.conv import Conv2d, global_avg_pool
from jaxpretrain.models.layers.drop import drop_path
from jaxpretrain.models.layers.ffn import FFN
from jaxpretrain.models.layers.norm import LayerNorm, build_norm
from jaxpretrain.models.layers.position import resize_pos_embed
from jaxpretrain.models.layers.rel_pos_decomposed import decomposed_bias
from jaxpretrain.models.layers.window import window_partition, window_reverse
from jaxpretrain.models.vision_transformer import VisionTransformer

_ARCHS: dict[tuple[str, ...], tuple[int, ...]] = {
    ("b", "base"): (768, 12, 12, 3072),
    ("l", "large"): (1024, 24, 16, 4096),
    ("h", "huge"): (1280, 32, 16, 5120),
}
_GLOBAL_LAYERS = {"b": (2, 5, 8, 11), "l": (5, 11, 17, 23), "h": (7, 15, 23, 31)}  # by the name's first letter


class RelativeAttention(MultiheadAttention):
    """Self-attention on a map, with relative positions that depend on the query, in rows and columns apart.

    Args:
        embed_dims, num_heads, qkv_bias: as of `MultiheadAttention`.
        input_size: size of the maps, (height, width), that the tables are for; on others they are interpolated. None
            for no relative positions.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        qkv_bias: bool = True,
        input_size: tuple[int, int] | None = None,
        *,
        rngs: nnx.Rngs,
    ):
        super().__init__(embed_dims, num_heads, qkv_bias=qkv_bias, rngs=rngs)
        self.rel_pos_h: nnx.Variable | None = self._table(input_size[0]) if input_size else None
        self.rel_pos_w: nnx.Variable | None = self._table(input_size[1]) if input_size else None

    def adapt(self, name: str, array: np.ndarray) -> np.ndarray | None:
        """Vectors for windows of another size are interpolated, linearly."""
        table = getattr(self, name, None)
        if name not in ("rel_pos_h", "rel_pos_w") or table is None or array.ndim != 2:
            return None
        shapes = (1, len(array)), (1, table.shape[0])
        return np.asarray(resize_pos_embed(jnp.asarray(array[None]), *shapes, "bilinear", num_extra_tokens=0)[0])

    def _table(self, size: int) -> nnx.Variable:
        return nnx.Param(jnp.zeros((2 * size - 1, self.head_dims)))

    def __call__(  # type: ignore[override]
        self, x: Float[Array, "b n c"], grid: tuple[int, int], *, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "b n c"]:
        """`x` are the tokens of maps of the size `grid`, in row-major order."""
        q, k, v = self.heads(x)
        bias = None
        if self.rel_pos_h is not None and self.rel_pos_w is not None:
            bias = decomposed_bias(q, grid, self.rel_pos_h[...], self.rel_pos_w[...])
        return self.attend(q, k, v, bias=bias, rngs=rngs)


class SAMEncoderLayer(BaseModule):
    """A pre-norm transformer block on a map, with attention within windows or everywhere.

    A map whose sides are not multiples of the window is filled up with zeros after the norm; these take part in the
    attention.

    Args:
        embed_dims: channels of the map.
        num_heads: heads of the attention.
        feedforward_channels: hidden channels of the feed-forward half.
        drop_rate: dropout in the feed-forward half.
        drop_path_rate: probability of dropping the feed-forward branch of a sample; the attention's stays, as in
            MMPretrain.
        layer_scale_init_value: start of the LayerScale of the feed-forward branch; 0 for none.
        qkv_bias: whether queries, keys and values have a bias.
        act_cfg: activation of the feed-forward half.
        norm_cfg: the norms.
        use_rel_pos: whether attention has relative positions.
        window_size: tokens along a side of a window; 0 for attention everywhere.
        input_size: size of the maps, (height, width), that the relative positions of attention everywhere are for.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        feedforward_channels: int,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        layer_scale_init_value: float = 0.0,
        qkv_bias: bool = True,
        act_cfg: Mapping[str, Any] = {"type": "GELU"},
        norm_cfg: Mapping[str, Any] = {"type": "LN"},
        use_rel_pos: bool = False,
        window_size: int = 0,
        input_size: tuple[int, int] | None = None,
        init_cfg: Any = None,
        *,
        rngs: nnx.Rngs,
    ):
        if use_rel_pos and not window_size and input_size is None:
            raise ConfigError("SAMEncoderLayer: use_rel_pos=True needs input_size where there is no window")
        self.init_cfg, self.window_size = init_cfg, window_size
        self.drop_path_rate = float(drop_path_rate)
        self.deterministic = False
        table_size = ((window_size, window_size) if window_size else input_size) if use_rel_pos else None
        self.ln1 = build_norm(norm_cfg, embed_dims, rngs=rngs)
        self.attn = RelativeAttention(embed_dims, num_heads, qkv_bias, table_size, rngs=rngs)
        self.ln2 = build_norm(norm_cfg, embed_dims, rngs=rngs)
        self.ffn = FFN(embed_dims, feedforward_channels, act_cfg, drop_rate, layer_scale_init_value, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b h w c"], *, rngs: nnx.Rngs | None = None, drop_path_rate: float | Array | None = None
    ) -> Float[Array, "b h w c"]:
        """`drop_path_rate` replaces the layer's own."""
        rate = self.drop_path_rate if drop_path_rate is None else drop_path_rate
        rate = 0.0 if self.deterministic else rate
        x = x + self._attend(self.ln1(x), rngs)
        return x + drop_path(self.ffn(self.ln2(x), rngs=rngs), rate, rngs)

    def _attend(self, x: Float[Array, "b h w c"], rngs: nnx.Rngs | None) -> Float[Array, "b h w c"]:
        b, height, width, c = x.shape
        if not (size := self.window_size):
            return self.attn(x.reshape(b, -1, c), (height, width), rngs=rngs).reshape(x.shape)
        bottom, right = -height % size, -width % size
        x = jnp.pad(x, ((0, 0), (0, bottom), (0, right), (0, 0)))
        windows = self.attn(window_partition(x, size), (size, size), rngs=rngs)
        return window_reverse(windows, height + bottom, width + right)[:, :height, :width]


class ViTSAM(VisionTransformer):
    """A Vision Transformer on maps: most layers attend within windows, every third or so everywhere.

    It takes images of any size: positions, absolute and relative, are interpolated. There is no class token. An output
    goes through the neck `channel_reduction`: 1x1 convolution, norm, 3x3 convolution, norm.

    Args:
        arch: base, large, huge (b, l, h), or a dict as of `VisionTransformer`, with `global_attn_indexes`, the indices
            of the layers without windows.
        img_size: size of the images that the positions are for, one number or (height, width).
        patch_size: pixels per patch.
        in_channels: channels of the images.
        out_channels: channels after the neck; 0 for no neck.
        out_indices: the layers whose output is returned; -1 is the last.
        out_type: 'raw' and 'featmap': maps [B, h, w, C]; 'avg_featmap': their mean, [B, C].
        drop_rate: dropout after the absolute positions are added, and in the feed-forward halves.
        drop_path_rate: stochastic depth of the last layer's feed-forward half; grows linearly from 0 at the first.
        qkv_bias: whether queries, keys and values have a bias.
        use_abs_pos: whether patches have a learnt position each.
        use_rel_pos: whether attention has relative positions.
        window_size: tokens along a side of a window.
        norm_cfg: the norms of the layers.
        frozen_stages: how many first layers do not learn, with all that is before them; -1 for none. If all layers are
            frozen, so is the neck.
        interpolate_mode: 'bicubic' or 'bilinear', for absolute positions; relative ones are interpolated linearly.
        patch_cfg: further arguments of `PatchEmbed`.
        layer_cfgs: further arguments of `SAMEncoderLayer`: one dict for all, or one for each layer.
        init_cfg: initialisation (see `BaseModule`). Absolute positions are drawn from a truncated normal distribution.

    Raises:
        ConfigError: an unknown name, or arguments that do not fit together.
    """

    archs: ClassVar = _ARCHS
    layer_type: ClassVar = SAMEncoderLayer
    out_types: ClassVar = ("raw", "featmap", "avg_featmap")
    tokens: ClassVar = ()

    def __init__(
        self,
        arch: str | Mapping[str, Any] = "base",
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_channels: int = 3,
        out_channels: int = 256,
        out_indices: int | Sequence[int] = -1,
        out_type: str = "raw",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        qkv_bias: bool = True,
        use_abs_pos: bool = True,
        use_rel_pos: bool = True,
        window_size: int = 14,
        norm_cfg: Mapping[str, Any] = {"type": "LN", "eps": 1e-6},
        frozen_stages: int = -1,
        interpolate_mode: str = "bicubic",
        patch_cfg: Mapping[str, Any] = {},
        layer_cfgs: Mapping[str, Any] | Sequence[Mapping[str, Any]] = {},
        init_cfg: Any = None,
        *,
        rngs: nnx.Rngs,
    ):
        if isinstance(arch, str):
            self.global_attn_indexes = _GLOBAL_LAYERS.get(arch[:1].lower(), ())
        elif "global_attn_indexes" in arch:
            self.global_attn_indexes = tuple(arch["global_attn_indexes"])
        else:
            raise ConfigError("ViTSAM: arch needs global_attn_indexes, the indices of the layers without windows")
        self.window_size, self.use_rel_pos = window_size, use_rel_pos
        super().__init__(
            arch,
            img_size,
            patch_size,
            in_channels,
            out_indices,
            drop_rate if use_abs_pos else 0.0,
            drop_path_rate,
            qkv_bias,
            norm_cfg,
            final_norm=False,
            out_type="raw" if out_type == "avg_featmap" else out_type,  # no norm after the mean
            with_cls_token=False,
            interpolate_mode=interpolate_mode,
            patch_cfg=patch_cfg,
            layer_cfgs=layer_cfgs,
            init_cfg=init_cfg,
            rngs=rngs,
        )
        self.out_type = out_type
        shape = (1, *self.patch_resolution, self.embed_dims)
        self.pos_embed = nnx.Param(jnp.zeros(shape)) if use_abs_pos else None  # type: ignore[assignment]
        self.channel_reduction = self._neck(out_channels, rngs) if out_channels else None
        if frozen_stages > 0:
            self._freeze_stages(frozen_stages)

    def _layer_args(self, index: int) -> dict[str, Any]:
        window_size = 0 if index in self.global_attn_indexes else self.window_size
        return {"use_rel_pos": self.use_rel_pos, "window_size": window_size, "input_size": self.patch_resolution}

    def _neck(self, channels: int, rngs: nnx.Rngs) -> nnx.List:
        return nnx.List(
            [
                Conv2d(self.embed_dims, channels, 1, bias=False, rngs=rngs),
                LayerNorm(channels, eps=1e-6),
                Conv2d(channels, channels, 3, padding=1, bias=False, rngs=rngs),
                LayerNorm(channels, eps=1e-6),
            ]
        )

    def embed(self, x: Float[Array, "b h w c"]) -> tuple[Float[Array, "b h2 w2 d"], tuple[int, int]]:
        """The map of patches with their positions; and the patches down and across."""
        x, grid = self.patch_embed(x)
        if self.pos_embed is not None:
            table = self.pos_embed[...].reshape(1, -1, self.embed_dims)
            table = resize_pos_embed(table, self.patch_resolution, grid, self.interpolate_mode, num_extra_tokens=0)
            x = x + table.astype(x.dtype)
        return x.reshape(-1, *grid, self.embed_dims), grid

    def _format(self, x: Float[Array, "b h w c"], grid: tuple[int, int]) -> Array:
        for layer in self.channel_reduction or ():
            x = layer(x)
        return global_avg_pool(x) if self.out_type == "avg_featmap" else x

    def init_weights(self, rngs: nnx.Rngs) -> None:
        """Besides `init_cfg`: absolute positions from a truncated normal distribution of std 0.02."""
        if self.pos_embed is None:
            BaseModule.init_weights(self, rngs)
        else:
            super().init_weights(rngs)

    def adapt(self, name: str, array: np.ndarray) -> np.ndarray | None:
        """Positions for images of another size are interpolated."""
        if name != "pos_embed" or array.ndim != 4:
            return None
        table = jnp.asarray(array.reshape(1, -1, array.shape[3]))
        table = resize_pos_embed(table, array.shape[1:3], self.patch_resolution, self.interpolate_mode, 0)
        return np.asarray(table).reshape(1, *self.patch_resolution, -1)

    def _freeze_stages(self, frozen_stages: int) -> None:
        super()._freeze_stages(frozen_stages)
        if frozen_stages == self.num_layers and self.channel_reduction is not None:
            freeze(self.channel_reduction)
