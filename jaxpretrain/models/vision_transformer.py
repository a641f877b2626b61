"""Vision Transformer (Dosovitskiy et al., 2021; DeiT: Touvron et al., 2021; DINOv2: Oquab et al., 2023).

Registers are those of Darcet et al. (2024). `VisionTransformer` is also the frame of DeiT's distilled model, DeiT III,
EVA-02 and SAM's encoder: they replace its layers, tokens and steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.nn import initializers
from jaxtyping import Array, Float

from jaxpretrain.build import ConfigError, build, nearest
from jaxpretrain.models.layers.attention import MultiheadAttention
from jaxpretrain.models.layers.base import BaseModule, Frozen, freeze
from jaxpretrain.models.layers.drop import Dropout, drop_path
from jaxpretrain.models.layers.ffn import FFN, SwiGLUFFNFused
from jaxpretrain.models.layers.init import trunc_normal
from jaxpretrain.models.layers.linear import Linear
from jaxpretrain.models.layers.norm import build_norm
from jaxpretrain.models.layers.patch_embed import PatchEmbed
from jaxpretrain.models.layers.position import fit_pos_embed, resize_pos_embed
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
        return x + drop_path(self.ffn(self._ffn_norm(x), rngs=rngs), rate, rngs)

    def _ffn_norm(self, x: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        return self.ln2(x)

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
        num_registers: learnt tokens without a position between class token and patches, which give attention a place
            to keep what is about the whole image (DINOv2 with registers has 4). 'raw' returns them too.

    Attributes:
        patch_resolution: patches (down, across) that the position table is for.
        num_extra_tokens: tokens before the patches.
        scan_layers, remat: how the layers are run (see `apply_layers`); False and 'none' unless set.

    Raises:
        ConfigError: an unknown name, or arguments that do not fit together.
    """

    # What sub-classes may have otherwise.
    archs: ClassVar[Mapping[tuple[str, ...], tuple[int, ...]]] = _SIZES
    layer_type: ClassVar[type] = TransformerEncoderLayer
    out_types: ClassVar[tuple[str, ...]] = OUT_TYPES
    tokens: ClassVar[tuple[str, ...]] = ("cls_token",)  # before the patches, if `with_cls_token`
    tokens_have_positions: ClassVar[bool] = True
    cls_token: nnx.Variable | None

    def __init__(
        self,
        arch: str | Mapping[str, Any] = "base",
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
        num_registers: int = 0,
        *,
        rngs: nnx.Rngs,
    ):
        name = type(self).__name__
        if out_type not in self.out_types:
            raise ConfigError(f"{name}: unknown out_type {out_type!r}.{nearest(out_type, self.out_types)}")
        if out_type == "cls_token" and not with_cls_token:
            raise ConfigError(f"{name}: out_type='cls_token' needs with_cls_token=True, or choose another")
        size = architecture(arch, self.archs, name)
        self.embed_dims, self.num_layers = size["embed_dims"], size["num_layers"]
        self.out_indices = layer_indices(out_indices, self.num_layers, name)
        self.out_type, self.interpolate_mode, self.init_cfg = out_type, interpolate_mode, init_cfg
        self.scan_layers, self.remat = False, "none"

        patches: dict[str, Any] = {"in_channels": in_channels, "embed_dims": self.embed_dims, "bias": not pre_norm}
        patches |= {"kernel_size": patch_size, "input_size": img_size, **patch_cfg}
        self.patch_embed = PatchEmbed(**patches, rngs=rngs)
        self.patch_resolution = self.patch_embed.init_out_size
        for token in self.tokens:
            setattr(self, token, nnx.Param(jnp.zeros((1, 1, self.embed_dims))) if with_cls_token else None)
        num_tokens = len(self.tokens) * with_cls_token
        self.num_extra_tokens = num_tokens + num_registers
        self.num_positioned_tokens = num_tokens * self.tokens_have_positions
        num_positions = self.patch_resolution[0] * self.patch_resolution[1] + self.num_positioned_tokens
        self.pos_embed: nnx.Variable = nnx.Param(jnp.zeros((1, num_positions, self.embed_dims)))
        shape = (1, num_registers, self.embed_dims)
        # Not zeros: registers that start equal would stay equal.
        registers = nnx.Param(1e-6 * jax.random.normal(rngs.params(), shape)) if num_registers else None
        self.register_tokens: nnx.Variable | None = registers
        self.drop_after_pos = Dropout(drop_rate)
        self.pre_norm = build_norm(norm_cfg, self.embed_dims, rngs=rngs) if pre_norm else None

        shared: dict[str, Any] = {key: size[key] for key in ("embed_dims", "num_heads", "feedforward_channels")}
        shared |= {"layer_scale_init_value": layer_scale_init_value, "drop_rate": drop_rate}
        shared |= {"qkv_bias": qkv_bias, "norm_cfg": norm_cfg, "type": self.layer_type}
        cfgs = [layer_cfgs] * self.num_layers if isinstance(layer_cfgs, Mapping) else list(layer_cfgs)
        if len(cfgs) != self.num_layers:
            raise ConfigError(f"{name}: {len(cfgs)} layer_cfgs for {self.num_layers} layers")
        rates = np.linspace(0, drop_path_rate, self.num_layers)
        self.layers = nnx.List(
            [
                build({**shared, "drop_path_rate": float(rates[i]), **self._layer_args(i), **cfgs[i]}, rngs=rngs)
                for i in range(self.num_layers)
            ]
        )
        self.ln1 = build_norm(norm_cfg, self.embed_dims, rngs=rngs) if final_norm else None
        self.ln2 = build_norm(norm_cfg, self.embed_dims, rngs=rngs) if out_type == "avg_featmap" else None
        if frozen_stages > 0:
            self._freeze_stages(frozen_stages)

    def _layer_args(self, index: int) -> dict[str, Any]:
        """What sub-classes give the constructor of layer `index` besides the usual arguments."""
        return {}

    def __call__(self, x: Float[Array, "b h w c"], *, rngs: nnx.Rngs | None = None) -> tuple[Any, ...]:
        """The chosen layers' outputs in the form of `out_type`, first layer first."""
        x, grid = self.embed(x)
        x = self._prepare(x, rngs)
        x, outputs = self._run(x, rngs, self.out_indices, self._layer_inputs(grid))
        if self.ln1 is not None and self.num_layers - 1 in outputs:
            outputs[self.num_layers - 1] = self.ln1(x)
        return tuple(self._format(output, grid) for output in outputs.values())

    # The steps of the forward pass, for methods that put something in between.

    def embed(self, x: Float[Array, "b h w c"]) -> tuple[Float[Array, "b n c"], tuple[int, int]]:
        """Patch tokens with their positions, without the extra tokens; and the patches down and across."""
        x, grid = self.patch_embed(x)
        first = self.num_positioned_tokens
        positions = resize_pos_embed(self.pos_embed[...], self.patch_resolution, grid, self.interpolate_mode, first)
        return x + positions[:, first:].astype(x.dtype), grid

    def add_cls_token(self, x: Float[Array, "b n c"]) -> Float[Array, "b m c"]:
        """Puts the extra tokens first: class token with its position, then registers. Without any, x as it is."""
        tokens = [getattr(self, name)[...] for name in self.tokens if getattr(self, name) is not None]
        if self.num_positioned_tokens:
            tokens = [jnp.concatenate(tokens, axis=1) + self.pos_embed[:, : self.num_positioned_tokens]]
        if self.register_tokens is not None:
            tokens.append(self.register_tokens[...])
        tokens = [jnp.broadcast_to(token.astype(x.dtype), (x.shape[0], *token.shape[1:])) for token in tokens]
        return jnp.concatenate([*tokens, x], axis=1)

    def run_layers(self, x: Float[Array, "b n c"], *, rngs: nnx.Rngs | None = None) -> Float[Array, "b n c"]:
        """All layers, without the final norm (`ln1`)."""
        return self._run(x, rngs)[0]

    def _prepare(self, x: Float[Array, "b n c"], rngs: nnx.Rngs | None) -> Float[Array, "b m c"]:
        """From positioned patches to the input of the first layer."""
        x = self.drop_after_pos(self.add_cls_token(x), rngs=rngs)
        return x if self.pre_norm is None else self.pre_norm(x)

    def _layer_inputs(self, grid: tuple[int, int]) -> dict[str, Any]:
        """What each layer gets besides the tokens."""
        return {}

    def _run(
        self, x: Array, rngs: nnx.Rngs | None, out_indices: Sequence[int] = (), inputs: Mapping[str, Any] = {}
    ) -> tuple[Array, dict[int, Array]]:
        return apply_layers(
            self.layers,
            x,
            rngs=rngs,
            scan_layers=self.scan_layers,
            remat=self.remat,
            out_indices=out_indices,
            shared=inputs,
        )

    def _format(self, x: Float[Array, "b n c"], grid: tuple[int, int]) -> Any:
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

    def adapt(self, name: str, array: np.ndarray) -> np.ndarray | None:
        """Positions for images of another size are interpolated, as MMPretrain does on loading."""
        if name != "pos_embed":
            return None
        return fit_pos_embed(array, self.patch_resolution, self.interpolate_mode, self.num_positioned_tokens)

    def _freeze_stages(self, frozen_stages: int) -> None:
        if frozen_stages > self.num_layers:
            name = type(self).__name__
            raise ConfigError(f"{name}: frozen_stages={frozen_stages}, but it has {self.num_layers} layers")
        parts = [self.patch_embed, self.drop_after_pos, self.pre_norm, *self.layers[:frozen_stages]]
        if frozen_stages == self.num_layers:
            parts += [self.ln1, self.ln2]
        for part in parts:
            if part is not None:
                freeze(part)
                part.set_attributes(rate=0.0, drop_path_rate=0.0, raise_if_not_found=False)
        for name, value in list(vars(self).items()):  # tokens and positions
            if isinstance(value, nnx.Param):
                setattr(self, name, Frozen(value.get_value()))


def architecture(
    arch: str | Mapping[str, Any],
    archs: Mapping[tuple[str, ...], tuple[int, ...]] = _SIZES,
    owner: str = "VisionTransformer",
) -> dict[str, int]:
    """The four numbers that make an architecture, by name or from a dictionary."""
    if isinstance(arch, str):
        for names, numbers in archs.items():
            if arch.lower() in names:
                return dict(zip(_SIZE_KEYS, numbers, strict=True))
        raise ConfigError(f"{owner}: unknown arch {arch!r}.{nearest(arch, [n for names in archs for n in names])}")
    missing = [key for key in _SIZE_KEYS if key not in arch]
    if missing:
        raise ConfigError(f"{owner}: arch needs {', '.join(_SIZE_KEYS)}; missing: {', '.join(missing)}")
    return {key: int(arch[key]) for key in _SIZE_KEYS}


def layer_indices(
    out_indices: int | Sequence[int], num_layers: int, owner: str = "VisionTransformer"
) -> tuple[int, ...]:
    """Sorted indices from 0 of the layers that `out_indices` (negative ones count from the end) mean."""
    indices = [out_indices] if isinstance(out_indices, int) else list(out_indices)
    for index in indices:
        if not -num_layers <= index < num_layers:
            raise ConfigError(f"{owner}: out_indices has {index}, but there are {num_layers} layers")
    return tuple(sorted({index % num_layers for index in indices}))
