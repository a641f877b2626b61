"""Vision Transformer (Dosovitskiy et al., 2021; DeiT: Touvron et al., 2021; DINOv2: Oquab et al., 2023)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.nn import initializers
from jaxtyping import Array, Float

from jaxpretrain.build import ConfigError, nearest
from jaxpretrain.models.layers.attention import MultiheadAttention
from jaxpretrain.models.layers.base import BaseModule, Frozen, freeze
from jaxpretrain.models.layers.drop import Dropout, drop_path
from jaxpretrain.models.layers.ffn import FFN, SwiGLUFFNFused
from jaxpretrain.models.layers.init import trunc_normal
from jaxpretrain.models.layers.linear import Linear
from jaxpretrain.models.layers.norm import build_norm
from jaxpretrain.models.layers.patch_embed import PatchEmbed
from jaxpretrain.models.layers.position import resize_pos_embed
from jaxpretrain.models.layers.stack import apply_layers

_SIZE_KEYS = ("embed_dims", "num_layers", "num_heads", "feedforward_channels")
_SIZES: dict[tuple[str, ...], tuple[int, int, int, int]] = {
    ("s", "small"): (768, 8, 8, 2304),
    ("b", "base"): (768, 12, 12, 3072),
    ("l", "large"): (1024, 24, 16, 4096),
    ("h", "huge"): (1280, 32, 16, 5120),
    ("eva-g", "eva-giant"): (1408, 40, 16, 6144),
    ("deit-t", "deit-tiny"): (192, 12, 3, 768),
    ("deit-s", "deit-small", "dinov2-s", "dinov2-small"): (384, 12, 6, 1536),
    ("deit-b", "deit-base"): (768, 12, 12, 3072),
    ("dinov2-g", "dinov2-giant"): (1536, 40, 24, 6144),
    ("mocov3-s", "mocov3-small"): (384, 12, 12, 1536),
}
OUT_TYPES = ("raw", "cls_token", "featmap", "avg_featmap")


class TransformerEncoderLayer(BaseModule):
    """A pre-norm transformer block: x + attn(ln1(x)), then x + ffn(ln2(x)).

    Args:
        embed_dims: channels of the tokens.
        num_heads: heads of the attention.
        feedforward_channels: hidden channels of the feed-forward half.
        layer_scale_init_value: start of the LayerScale of both branches; 0 for none.
        drop_rate: dropout after the attention's projection and in the feed-forward half.
        attn_drop_rate: dropout of the attention weights.
        drop_path_rate: probability of dropping a branch of a sample.
        qkv_bias: whether queries, keys and values have a bias.
        ffn_type: 'origin' (two linear layers) or 'swiglu_fused' (gated).
        act_cfg: activation of the 'origin' feed-forward half.
        norm_cfg: the norms.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        feedforward_channels: int,
        layer_scale_init_value: float = 0.0,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        qkv_bias: bool = True,
        ffn_type: str = "origin",
        act_cfg: Mapping[str, Any] = {"type": "GELU"},
        norm_cfg: Mapping[str, Any] = {"type": "LN"},
        init_cfg: Any = None,
        *,
        rngs: nnx.Rngs,
    ):
        self.init_cfg = init_cfg
        self.drop_path_rate = float(drop_path_rate)
        self.deterministic = False
        self.ln1 = build_norm(norm_cfg, embed_dims, rngs=rngs)
        self.attn = MultiheadAttention(
            embed_dims,
            num_heads,
            attn_drop=attn_drop_rate,
            proj_drop=drop_rate,
            qkv_bias=qkv_bias,
            layer_scale_init_value=layer_scale_init_value,
            rngs=rngs,
        )
        self.ln2 = build_norm(norm_cfg, embed_dims, rngs=rngs)
        self.ffn: FFN | SwiGLUFFNFused
        if ffn_type == "origin":
            self.ffn = FFN(embed_dims, feedforward_channels, act_cfg, drop_rate, layer_scale_init_value, rngs=rngs)
        elif ffn_type == "swiglu_fused":
            self.ffn = SwiGLUFFNFused(embed_dims, feedforward_channels, drop_rate, layer_scale_init_value, rngs=rngs)
        else:
            raise ConfigError(f"ffn_type: unknown type {ffn_type!r}.{nearest(ffn_type, ('origin', 'swiglu_fused'))}")

    def __call__(
        self, x: Float[Array, "b n c"], *, rngs: nnx.Rngs | None = None, drop_path_rate: float | Array | None = None
    ) -> Float[Array, "b n c"]:
        """`drop_path_rate` replaces the layer's own; it may be traced, so that one scanned body serves all layers."""
        rate = self.drop_path_rate if drop_path_rate is None else drop_path_rate
        rate = 0.0 if self.deterministic else rate
        x = x + drop_path(self.attn(self.ln1(x), rngs=rngs), rate, rngs)
        return x + drop_path(self.ffn(self.ln2(x), rngs=rngs), rate, rngs)

    def init_weights(self, rngs: nnx.Rngs) -> None:
        """Besides `init_cfg`: Glorot-uniform kernels and biases of N(0, 1e-6) in the feed-forward half, as in ViT.

        The attention keeps what the outer modules' `init_cfg` or the constructor gave it.
        """
        super().init_weights(rngs)
        for layer in vars(self.ffn).values():
            if isinstance(layer, Linear):
                layer.kernel.set_value(initializers.xavier_uniform()(rngs.params(), layer.kernel.shape))
                if layer.bias is not None:
                    layer.bias.set_value(1e-6 * jax.random.normal(rngs.params(), layer.bias.shape))


class VisionTransformer(BaseModule):
    """Vision Transformer, for images of any size: positions are interpolated where the grid of patches is another.

    Args:
        arch: a name, or a dict with embed_dims, num_layers, num_heads and feedforward_channels. Names: small
            (MMPretrain's own, 8 layers of 768), base, large, huge, eva-giant, deit-tiny, deit-small, deit-base,
            dinov2-small, dinov2-giant (use it with `layer_cfgs=dict(ffn_type='swiglu_fused')`), mocov3-small;
            s, b, l, h, eva-g, deit-t, ... for short.
        img_size: size of the images that the position table is for, one number or (height, width).
        patch_size: pixels per patch, one number or (height, width).
        in_channels: channels of the images.
        out_indices: the layers whose output is returned; -1 is the last.
        drop_rate: dropout after the positions are added, and in each layer.
        drop_path_rate: stochastic depth of the last layer; grows linearly from 0 at the first.
        qkv_bias: whether queries, keys and values have a bias.
        norm_cfg: all norms.
        final_norm: whether the last layer's output is normalised (`ln1`).
        out_type: what is returned of each output: 'raw' (all tokens [B, N, C]), 'cls_token' ([B, C]), 'featmap'
            (patches [B, h, w, C]) or 'avg_featmap' (their normalised mean, [B, C]; the norm is `ln2`).
        with_cls_token: whether there is a class token; 'cls_token' needs it.
        frozen_stages: how many first layers do not learn, with all that is before them; -1 for none. If all layers are
            frozen, so are the final norms. Frozen parts have no dropout (MMPretrain's wake up in training mode).
        interpolate_mode: 'bicubic' or 'bilinear', for positions.
        layer_scale_init_value: start of LayerScale in each layer; 0 for none.
        patch_cfg: further arguments of `PatchEmbed`.
        layer_cfgs: further arguments of `TransformerEncoderLayer`: one dict for all, or one for each layer.
        pre_norm: whether tokens are normalised before the first layer, as in CLIP; patches then have no bias.
        init_cfg: initialisation (see `BaseModule`). Positions are drawn from a truncated normal distribution besides.

    Attributes:
        scan_layers, remat: how the layers are run (see `apply_layers`); False and 'none' unless set.

    Raises:
        ConfigError: an unknown name, or arguments that do not fit together.
    """

    def __init__(
        self,
        arch: str | Mapping[str, int] = "base",
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_channels: int = 3,
        out_indices: int | Sequence[int] = -1,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        qkv_bias: bool = True,
        norm_cfg: Mapping[str, Any] = {"type": "LN", "eps": 1e-6},
        final_norm: bool = True,
        out_type: str = "cls_token",
        with_cls_token: bool = True,
        frozen_stages: int = -1,
        interpolate_mode: str = "bicubic",
        layer_scale_init_value: float = 0.0,
        patch_cfg: Mapping[str, Any] = {},
        layer_cfgs: Mapping[str, Any] | Sequence[Mapping[str, Any]] = {},
        pre_norm: bool = False,
        init_cfg: Any = None,
        *,
        rngs: nnx.Rngs,
    ):
        if out_type not in OUT_TYPES:
            raise ConfigError(f"VisionTransformer: unknown out_type {out_type!r}.{nearest(out_type, OUT_TYPES)}")
        if out_type == "cls_token" and not with_cls_token:
            raise ConfigError("VisionTransformer: out_type='cls_token' needs with_cls_token=True, or choose another")
        size = _size(arch)
        self.embed_dims, self.num_layers = size["embed_dims"], size["num_layers"]
        self.out_indices = _layer_indices(out_indices, self.num_layers)
        self.out_type, self.interpolate_mode, self.init_cfg = out_type, interpolate_mode, init_cfg
        self.scan_layers, self.remat = False, "none"

        patches: dict[str, Any] = {"in_channels": in_channels, "embed_dims": self.embed_dims, "bias": not pre_norm}
        patches |= {"kernel_size": patch_size, "input_size": img_size, **patch_cfg}
        self.patch_embed = PatchEmbed(**patches, rngs=rngs)
        self.patch_resolution = self.patch_embed.init_out_size
        self.num_extra_tokens = int(with_cls_token)
        num_tokens = self.patch_resolution[0] * self.patch_resolution[1] + self.num_extra_tokens
        cls_token = nnx.Param(jnp.zeros((1, 1, self.embed_dims))) if with_cls_token else None
        self.cls_token: nnx.Variable | None = cls_token
        self.pos_embed: nnx.Variable = nnx.Param(jnp.zeros((1, num_tokens, self.embed_dims)))
        self.drop_after_pos = Dropout(drop_rate)
        self.pre_norm = build_norm(norm_cfg, self.embed_dims, rngs=rngs) if pre_norm else None

        layer_cfgs = [layer_cfgs] * self.num_layers if isinstance(layer_cfgs, Mapping) else list(layer_cfgs)
        if len(layer_cfgs) != self.num_layers:
            raise ConfigError(f"VisionTransformer: {len(layer_cfgs)} layer_cfgs for {self.num_layers} layers")
        shared: dict[str, Any] = {key: size[key] for key in ("embed_dims", "num_heads", "feedforward_channels")}
        shared |= {"layer_scale_init_value": layer_scale_init_value, "drop_rate": drop_rate}
        shared |= {"qkv_bias": qkv_bias, "norm_cfg": norm_cfg}
        rates = np.linspace(0, drop_path_rate, self.num_layers)
        self.layers = nnx.List(
            [
                TransformerEncoderLayer(**{**shared, "drop_path_rate": float(rate), **cfg}, rngs=rngs)
                for rate, cfg in zip(rates, layer_cfgs, strict=True)
            ]
        )
        self.ln1 = build_norm(norm_cfg, self.embed_dims, rngs=rngs) if final_norm else None
        self.ln2 = build_norm(norm_cfg, self.embed_dims, rngs=rngs) if out_type == "avg_featmap" else None
        if frozen_stages > 0:
            self._freeze_stages(frozen_stages)

    def __call__(self, x: Float[Array, "b h w c"], *, rngs: nnx.Rngs | None = None) -> tuple[Array, ...]:
        """The chosen layers' outputs in the form of `out_type`, first layer first."""
        x, grid = self.embed(x)
        x = self.drop_after_pos(self.add_cls_token(x), rngs=rngs)
        if self.pre_norm is not None:
            x = self.pre_norm(x)
        x, outputs = self._run(x, rngs, self.out_indices)
        if self.ln1 is not None and self.num_layers - 1 in outputs:
            outputs[self.num_layers - 1] = self.ln1(x)
        return tuple(self._format(output, grid) for output in outputs.values())

    # The steps of the forward pass, for methods that put something in between.

    def embed(self, x: Float[Array, "b h w c"]) -> tuple[Float[Array, "b n c"], tuple[int, int]]:
        """Patch tokens with their positions, without the class token; and the patches down and across."""
        x, grid = self.patch_embed(x)
        positions = resize_pos_embed(
            self.pos_embed[...], self.patch_resolution, grid, self.interpolate_mode, self.num_extra_tokens
        )
        return x + positions[:, self.num_extra_tokens :].astype(x.dtype), grid

    def add_cls_token(self, x: Float[Array, "b n c"]) -> Float[Array, "b m c"]:
        """Puts the class token, with its position, first; without a class token, x as it is."""
        if self.cls_token is None:
            return x
        token = (self.cls_token[...] + self.pos_embed[:, :1]).astype(x.dtype)
        return jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], 1, x.shape[2])), x], axis=1)

    def run_layers(self, x: Float[Array, "b n c"], *, rngs: nnx.Rngs | None = None) -> Float[Array, "b n c"]:
        """All layers, without the final norm (`ln1`)."""
        return self._run(x, rngs)[0]

    def _run(self, x: Array, rngs: nnx.Rngs | None, out_indices: Sequence[int] = ()) -> tuple[Array, dict[int, Array]]:
        return apply_layers(
            self.layers, x, rngs=rngs, scan_layers=self.scan_layers, remat=self.remat, out_indices=out_indices
        )

    def _format(self, x: Float[Array, "b n c"], grid: tuple[int, int]) -> Array:
        if self.out_type == "raw":
            return x
        if self.out_type == "cls_token":
            return x[:, 0]
        patches = x[:, self.num_extra_tokens :]
        if self.out_type == "featmap":
            return patches.reshape(x.shape[0], *grid, x.shape[2])
        mean = patches.mean(axis=1, dtype=jnp.promote_types(x.dtype, jnp.float32)).astype(x.dtype)
        return mean if self.ln2 is None else self.ln2(mean)

    def init_weights(self, rngs: nnx.Rngs) -> None:
        """Besides `init_cfg` and the layers' own rules: positions from a truncated normal distribution of std 0.02."""
        super().init_weights(rngs)
        self.pos_embed.set_value(trunc_normal(0.02)(rngs.params(), self.pos_embed.shape))

    def _freeze_stages(self, frozen_stages: int) -> None:
        if frozen_stages > self.num_layers:
            raise ConfigError(f"VisionTransformer: frozen_stages={frozen_stages}, but it has {self.num_layers} layers")
        parts = [self.patch_embed, self.drop_after_pos, self.pre_norm, *self.layers[:frozen_stages]]
        if frozen_stages == self.num_layers:
            parts += [self.ln1, self.ln2]
        for part in parts:
            if part is not None:
                freeze(part)
                part.set_attributes(rate=0.0, drop_path_rate=0.0, raise_if_not_found=False)
        self.pos_embed = Frozen(self.pos_embed.get_value())
        if self.cls_token is not None:
            self.cls_token = Frozen(self.cls_token.get_value())


def _size(arch: str | Mapping[str, int]) -> dict[str, int]:
    """The four numbers that make an architecture."""
    if isinstance(arch, str):
        for names, numbers in _SIZES.items():
            if arch.lower() in names:
                return dict(zip(_SIZE_KEYS, numbers, strict=True))
        raise ConfigError(f"VisionTransformer: unknown arch {arch!r}.{nearest(arch, [n for ns in _SIZES for n in ns])}")
    missing = [key for key in _SIZE_KEYS if key not in arch]
    if missing:
        raise ConfigError(f"VisionTransformer: arch needs {', '.join(_SIZE_KEYS)}; missing: {', '.join(missing)}")
    return {key: int(arch[key]) for key in _SIZE_KEYS}


def _layer_indices(out_indices: int | Sequence[int], num_layers: int) -> tuple[int, ...]:
    """Sorted indices from 0 of the layers that `out_indices` (negative ones count from the end) mean."""
    indices = [out_indices] if isinstance(out_indices, int) else list(out_indices)
    for index in indices:
        if not -num_layers <= index < num_layers:
            raise ConfigError(f"VisionTransformer: out_indices has {index}, but there are {num_layers} layers")
    return tuple(sorted({index % num_layers for index in indices}))
