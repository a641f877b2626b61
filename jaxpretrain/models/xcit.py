"""XCiT: Cross-Covariance Image Transformers (El-Nouby et al., 2021, https://arxiv.org/abs/2106.09681)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from jaxpretrain.build import ConfigError, nearest
from jaxpretrain.models.layers.arch import output_indices
from jaxpretrain.models.layers.attention import scaled_dot_product_attention
from jaxpretrain.models.layers.base import BaseModule, Frozen, freeze_stage
from jaxpretrain.models.layers.conv import ConvModule
from jaxpretrain.models.layers.drop import Dropout, drop_path
from jaxpretrain.models.layers.ffn import FFN
from jaxpretrain.models.layers.init import trunc_normal
from jaxpretrain.models.layers.intermediates import record
from jaxpretrain.models.layers.linear import Linear
from jaxpretrain.models.layers.norm import build_norm
from jaxpretrain.models.layers.patch_embed import to_2tuple
from jaxpretrain.models.layers.stack import apply_block

_BN, _LN, _GELU = {"type": "BN"}, {"type": "LN", "eps": 1e-6}, {"type": "GELU"}
_INIT = {"type": "TruncNormal", "layer": "Linear"}


class PositionalEncodingFourier(BaseModule):
    """Sines and cosines of rows and columns, [H, W, 2 * hidden_dim], mapped to `dim` channels.

    Places are counted from 1 and scaled to end at 2 pi, whatever the size of the map, and have the wavelengths of Vaswani et
    al. (2017), sine and cosine in turn; rows come first.
    """

    def __init__(self, hidden_dim: int = 32, dim: int = 768, temperature: float = 10000.0, *, rngs: nnx.Rngs):
        self.token_projection: ConvModule | Conv2d = ConvModule(2 * hidden_dim, dim, 1, act_cfg=None, rngs=rngs)
        self.hidden_dim, self.temperature = hidden_dim, temperature

    def __call__(self, h: int, w: int, dtype: Any) -> Float[Array, "1 h w c"]:
        wavelengths = self.temperature ** (2 * np.arange(self.hidden_dim // 2) / self.hidden_dim)

        def waves(count: int) -> Float[np.ndarray, "n d"]:
            phase = 2 * math.pi * np.arange(1, count + 1)[:, None] / (count + 1e-6) / wavelengths
            return np.stack([np.sin(phase), np.cos(phase)], axis=-1).reshape(count, -1)

        rows = np.broadcast_to(waves(h)[:, None], (h, w, self.hidden_dim))
        columns = np.broadcast_to(waves(w)[None], (h, w, self.hidden_dim))
        return self.token_projection(jnp.asarray(np.concatenate([rows, columns], axis=-1)[None], dtype))


class ConvPatchEmbed(BaseModule):
    """Patches of 16 or 8 pixels by as many 3x3 convolutions of stride 2 as that takes, each doubling the channels."""

    def __init__(
        self,
        patch_size: int,
        in_channels: int,
        embed_dims: int,
        norm_cfg: Mapping[str, Any] = _BN,
        act_cfg: Mapping[str, Any] = _GELU,
        *,
        rngs: nnx.Rngs,
    ):
        if patch_size not in (8, 16):
            raise ConfigError(f"XCiT: patch_size is 16 or 8, not {patch_size}")
        halvings = int(math.log2(patch_size))
        widths = [in_channels, *(embed_dims // 2**i for i in reversed(range(halvings)))]
        acts = [act_cfg] * (halvings - 1) + [None]
        self.proj = nnx.List(
            ConvModule(ins, outs, 3, 2, 1, norm_cfg=norm_cfg, act_cfg=act, rngs=rngs)
            for ins, outs, act in zip(widths[:-1], widths[1:], acts, strict=True)
        )

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        for layer in self.proj:
            x = layer(x)
        return x


class XCA(BaseModule):
    """Cross-covariance attention: channels attend to channels (section 3.2), so the cost is linear in the tokens.

    Args:
        dim: channels of input and output.
        num_heads: groups of channels that attend to each other; must divide `dim`.
        qkv_bias: whether queries, keys and values have a bias.
        attn_drop, proj_drop: dropout of the attention weights and of the output.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        *,
        rngs: nnx.Rngs,
    ):
        self.num_heads = num_heads
        self.temperature = nnx.Param(jnp.ones((num_heads, 1, 1)))
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias, rngs=rngs)
        self.attn_drop = Dropout(attn_drop)
        self.proj = Linear(dim, dim, rngs=rngs)
        self.proj_drop = Dropout(proj_drop)

    def __call__(self, x: Float[Array, "b h w c"], *, rngs: nnx.Rngs | None = None) -> Float[Array, "b h w c"]:
        """Softmaxed weights [B, heads, C / heads, C / heads] are the intermediate "weights"."""
        qkv = self.qkv(x).reshape(x.shape[0], -1, 3, self.num_heads, x.shape[-1] // self.num_heads)
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        wide = jnp.promote_types(x.dtype, jnp.float32)

        def norm(y: Float[Array, "b n heads c"]) -> Float[Array, "b heads c"]:
            """The length of each channel over all tokens."""
            return jnp.sqrt(jnp.maximum(jnp.sum(jnp.square(y.astype(wide)), axis=1), 1e-24))

        # Lengths divide the small matrix of products, not queries and keys themselves: the same in fewer divisions.
        products = jnp.einsum("bnhc,bnhd->bhcd", q, k, preferred_element_type=wide)
        cosines = products / (norm(q)[..., :, None] * norm(k)[..., None, :])
        weights = jax.nn.softmax(cosines * self.temperature[...].astype(wide), axis=-1).astype(x.dtype)
        record(self, "weights", weights)
        y = jnp.einsum("bhcd,bnhd->bnhc", self.attn_drop(weights, rngs=rngs), v)
        return self.proj_drop(self.proj(y.reshape(x.shape)), rngs=rngs)


class LPI(BaseModule):
    """Local patch interaction: two depthwise convolutions, with activation and then norm in between."""

    def __init__(
        self,
        in_features: int,
        kernel_size: int = 3,
        norm_cfg: Mapping[str, Any] = _BN,
        act_cfg: Mapping[str, Any] = _GELU,
        *,
        rngs: nnx.Rngs,
    ):
        args: dict[str, Any] = {"padding": kernel_size // 2, "groups": in_features, "bias": True, "rngs": rngs}
        self.conv1 = ConvModule(in_features, in_features, kernel_size, norm_cfg=norm_cfg, act_cfg=act_cfg, **args)
        self.conv2 = ConvModule(in_features, in_features, kernel_size, act_cfg=None, **args)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        first = self.conv1
        assert first.act is not None
        return self.conv2(getattr(first, first.norm_name)(first.act(first.conv(x))))


class XCABlock(BaseModule):
    """x + gamma1 * attn(norm1(x)), then x + gamma3 * local_mp(norm3(x)), then x + gamma2 * ffn(norm2(x)), on a map of tokens.

    Args:
        dim: channels of input and output.
        num_heads, qkv_bias, attn_drop: of the attention.
        mlp_ratio: hidden channels of the feed-forward half, as a multiple of `dim`.
        drop: dropout after the attention and in the feed-forward half.
        drop_path: probability of dropping a branch of a sample.
        layer_scale_init_value: start of the gains of all branches.
        bn_norm_cfg: norm of the local interaction.
        norm_cfg, act_cfg: other norms, activations.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        layer_scale_init_value: float = 1.0,
        bn_norm_cfg: Mapping[str, Any] = _BN,
        norm_cfg: Mapping[str, Any] = _LN,
        act_cfg: Mapping[str, Any] = _GELU,
        *,
        rngs: nnx.Rngs,
    ):
        self.drop_path_rate, self.deterministic = float(drop_path), False
        self.norm1, self.norm2, self.norm3 = (build_norm(norm_cfg, dim, rngs=rngs) for _ in range(3))
        self.attn = XCA(dim, num_heads, qkv_bias, attn_drop, drop, rngs=rngs)
        self.local_mp = LPI(dim, norm_cfg=bn_norm_cfg, act_cfg=act_cfg, rngs=rngs)
        self.ffn = FFN(dim, int(dim * mlp_ratio), act_cfg, drop, rngs=rngs)
        self.gamma1, self.gamma2, self.gamma3 = (
            nnx.Param(jnp.full((dim,), layer_scale_init_value, jnp.float32)) for _ in range(3)
        )

    def __call__(self, x: Float[Array, "b h w c"], *, rngs: nnx.Rngs | None = None) -> Float[Array, "b h w c"]:
        rate = 0.0 if self.deterministic else self.drop_path_rate
        x = x + drop_path(self.gamma1[...].astype(x.dtype) * self.attn(self.norm1(x), rngs=rngs), rate, rngs)
        x = x + drop_path(self.gamma3[...].astype(x.dtype) * self.local_mp(self.norm3(x)), rate, rngs)
        return x + drop_path(self.gamma2[...].astype(x.dtype) * self.ffn(self.norm2(x), rngs=rngs), rate, rngs)


class ClassAttention(BaseModule):
    """What the class token, the first one, takes from all tokens (CaiT: Touvron et al., 2021).

    Args: as of `XCA`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        *,
        rngs: nnx.Rngs,
    ):
        self.num_heads, self.scale = num_heads, (dim // num_heads) ** -0.5
        self.q, self.k, self.v = (Linear(dim, dim, bias=qkv_bias, rngs=rngs) for _ in range(3))
        self.attn_drop = Dropout(attn_drop)
        self.proj = Linear(dim, dim, rngs=rngs)
        self.proj_drop = Dropout(proj_drop)

    def __call__(self, x: Float[Array, "b n c"], *, rngs: nnx.Rngs | None = None) -> Float[Array, "b 1 c"]:
        q, k, v = (y.reshape(*y.shape[:2], self.num_heads, -1) for y in (self.q(x[:, :1]), self.k(x), self.v(x)))
        y = scaled_dot_product_attention(self, q, k, v, scale=self.scale, dropout=self.attn_drop, rngs=rngs)
        return self.proj_drop(self.proj(y.reshape(x.shape[0], 1, -1)), rngs=rngs)


class ClassAttentionBlock(BaseModule):
    """The class token gathers from all tokens, then passes its feed-forward half.

    Patches are changed too, though nothing is computed for them: they add their normalised selves, and themselves once more.
    That is how the published weights were trained.

    Args: as of `XCABlock`, but for
        layer_scale_init_value: 0 is without gains.
        tokens_norm: whether the second norm is for all tokens, or for the class token alone.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        layer_scale_init_value: float = 1.0,
        tokens_norm: bool = False,
        norm_cfg: Mapping[str, Any] = _LN,
        act_cfg: Mapping[str, Any] = _GELU,
        *,
        rngs: nnx.Rngs,
    ):
        self.drop_path_rate, self.deterministic, self.tokens_norm = float(drop_path), False, tokens_norm
        self.norm1, self.norm2 = (build_norm(norm_cfg, dim, rngs=rngs) for _ in range(2))
        self.attn = ClassAttention(dim, num_heads, qkv_bias, attn_drop, drop, rngs=rngs)
        self.ffn = FFN(dim, int(dim * mlp_ratio), act_cfg, drop, rngs=rngs)
        scaled = layer_scale_init_value > 0
        self.gamma1, self.gamma2 = (
            nnx.Param(jnp.full((dim,), layer_scale_init_value, jnp.float32)) if scaled else None for _ in range(2)
        )

    def __call__(self, x: Float[Array, "b n c"], *, rngs: nnx.Rngs | None = None) -> Float[Array, "b n c"]:
        rate = 0.0 if self.deterministic else self.drop_path_rate
        gamma1, gamma2 = (1 if g is None else g[...].astype(x.dtype) for g in (self.gamma1, self.gamma2))
        normed = self.norm1(x)
        gathered = jnp.concatenate([self.attn(normed, rngs=rngs), normed[:, 1:]], axis=1)
        x = x + drop_path(gamma1 * gathered, rate, rngs)
        x = self.norm2(x) if self.tokens_norm else jnp.concatenate([self.norm2(x[:, :1]), x[:, 1:]], axis=1)
        y = jnp.concatenate([gamma2 * self.ffn(x[:, :1], rngs=rngs), x[:, 1:]], axis=1)
        return x + drop_path(y, rate, rngs)


class XCiT(BaseModule):
    """XCiT, for images of any size.

    Args:
        img_size: size of the images, one number or (height, width); a multiple of `patch_size`.
        patch_size: pixels per token: 16 or 8.
        in_channels: channels of the images.
        embed_dims: channels of the tokens.
        depth: layers with cross-covariance attention.
        cls_attn_layers: layers with class attention, behind these.
        num_heads, mlp_ratio, qkv_bias, attn_drop_rate: of all layers.
        drop_rate: dropout after the positions are added, and in each layer.
        drop_path_rate: stochastic depth of all `depth` layers alike; those with class attention have none.
        use_pos_embed: whether positions are added to the tokens.
        layer_scale_init_value: start of the gains in each layer.
        tokens_norm: see `ClassAttentionBlock`.
        out_type: what is returned of each output: 'cls_token' ([B, C]), 'raw' (all tokens [B, N, C]), 'featmap' (patches
            [B, h, w, C]) or 'avg_featmap' (their mean, [B, C]).
        out_indices: the layers whose outputs are returned, from 0; negative ones count from the end. Before the layers with
            class attention there is no class token.
        final_norm: whether the last layer's output is normalised.
        frozen_stages: how many first layers do not learn, with the patch embedding and the positions; -1 for none. The class
            token is frozen with the first layer that has it, the final norm if all layers are.
        bn_norm_cfg: norms of the patch embedding and the local interactions.
        norm_cfg, act_cfg: other norms, activations.
        init_cfg: initialisation (see `BaseModule`). The class token is drawn from a truncated normal distribution besides.

    Attributes:
        remat: what the backward pass recomputes: 'none', 'full' (all within a layer), 'dots' (all but matmuls and
            convolutions).

    Raises:
        ConfigError: arguments that do not fit together.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_channels: int = 3,
        embed_dims: int = 768,
        depth: int = 12,
        cls_attn_layers: int = 2,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        use_pos_embed: bool = True,
        layer_scale_init_value: float = 1.0,
        tokens_norm: bool = False,
        out_type: str = "cls_token",
        out_indices: int | Sequence[int] = (-1,),
        final_norm: bool = True,
        frozen_stages: int = -1,
        bn_norm_cfg: Mapping[str, Any] = _BN,
        norm_cfg: Mapping[str, Any] = _LN,
        act_cfg: Mapping[str, Any] = _GELU,
        init_cfg: Any = _INIT,
        *,
        rngs: nnx.Rngs,
    ):
        out_types = ("raw", "featmap", "avg_featmap", "cls_token")
        if out_type not in out_types:
            raise ConfigError(f"XCiT: unknown out_type {out_type!r}.{nearest(out_type, out_types)}")
        if any(size % patch_size for size in to_2tuple(img_size)):
            raise ConfigError(f"XCiT: img_size={img_size} is not a multiple of patch_size={patch_size}")
        if embed_dims % num_heads:
            raise ConfigError(f"XCiT: embed_dims={embed_dims} is not a multiple of num_heads={num_heads}")
        self.num_layers, self.out_type, self.init_cfg, self.remat = depth + cls_attn_layers, out_type, init_cfg, "none"
        self.out_indices = output_indices(out_indices, self.num_layers, "XCiT")
        if out_type == "cls_token" and self.out_indices[0] < depth:
            raise ConfigError(f"XCiT: layer {self.out_indices[0]} has no class token; those from {depth} on have")

        self.patch_embed = ConvPatchEmbed(patch_size, in_channels, embed_dims, bn_norm_cfg, act_cfg, rngs=rngs)
        self.cls_token: nnx.Variable = nnx.Param(jnp.zeros((1, 1, embed_dims)))
        self.pos_embed = PositionalEncodingFourier(dim=embed_dims, rngs=rngs) if use_pos_embed else None
        self.pos_drop = Dropout(drop_rate)
        shared: dict[str, Any] = {"num_heads": num_heads, "mlp_ratio": mlp_ratio, "qkv_bias": qkv_bias}
        shared |= {"drop": drop_rate, "attn_drop": attn_drop_rate, "layer_scale_init_value": layer_scale_init_value}
        shared |= {"norm_cfg": norm_cfg, "act_cfg": act_cfg, "rngs": rngs}
        self.xca_layers = nnx.List(
            XCABlock(embed_dims, drop_path=drop_path_rate, bn_norm_cfg=bn_norm_cfg, **shared) for _ in range(depth)
        )
        self.ca_layers = nnx.List(
            ClassAttentionBlock(embed_dims, tokens_norm=tokens_norm, **shared) for _ in range(cls_attn_layers)
        )
        self.norm = build_norm(norm_cfg, embed_dims, rngs=rngs) if final_norm else None
        self._freeze_stages(frozen_stages)

    def __call__(self, x: Float[Array, "b h w c"], *, rngs: nnx.Rngs | None = None) -> tuple[Array, ...]:
        """The chosen layers' outputs in the form of `out_type`; `rngs` is for dropout and drop path in training."""
        x = self.patch_embed(x)
        grid = (x.shape[1], x.shape[2])
        if self.pos_embed is not None:
            x = x + self.pos_embed(*grid, x.dtype)
        x = self.pos_drop(x, rngs=rngs)
        outputs = []
        for i, layer in enumerate(self.xca_layers):
            x = apply_block(layer, x, rngs=rngs, remat=self.remat)
            if i in self.out_indices:
                outputs.append(self._format(x.reshape(x.shape[0], -1, x.shape[-1]), grid, num_extra_tokens=0))
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        token = jnp.broadcast_to(self.cls_token[...].astype(x.dtype), (x.shape[0], 1, x.shape[-1]))
        x = jnp.concatenate([token, x], axis=1)
        for i, block in enumerate(self.ca_layers, start=len(self.xca_layers)):
            x = apply_block(block, x, rngs=rngs, remat=self.remat)
            if i == self.num_layers - 1 and self.norm is not None:
                x = self.norm(x)
            if i in self.out_indices:
                outputs.append(self._format(x, grid, num_extra_tokens=1))
        return tuple(outputs)

    def _format(self, x: Float[Array, "b n c"], grid: tuple[int, int], num_extra_tokens: int) -> Array:
        if self.out_type == "raw":
            return x
        if self.out_type == "cls_token":
            return x[:, 0]
        patches = x[:, num_extra_tokens:]
        if self.out_type == "featmap":
            return patches.reshape(x.shape[0], *grid, x.shape[-1])
        return patches.mean(axis=1, dtype=jnp.promote_types(x.dtype, jnp.float32)).astype(x.dtype)

    def init_weights(self, rngs: nnx.Rngs) -> None:
        """Besides `init_cfg`: the class token from a truncated normal distribution of std 0.02."""
        super().init_weights(rngs)
        self.cls_token.set_value(trunc_normal(0.02)(rngs.params(), self.cls_token.shape))

    def _freeze_stages(self, frozen_stages: int) -> None:
        if frozen_stages < 0:
            return
        if frozen_stages > self.num_layers:
            raise ConfigError(f"XCiT: frozen_stages={frozen_stages}, but it has {self.num_layers} layers")
        parts: list[nnx.Module | None] = [self.patch_embed, self.pos_embed, self.pos_drop]
        parts += [*self.xca_layers, *self.ca_layers][:frozen_stages]
        if frozen_stages == self.num_layers:
            parts.append(self.norm)
        for part in parts:
            if part is not None:
                freeze_stage(part).set_attributes(rate=0.0, raise_if_not_found=False)
        if frozen_stages > len(self.xca_layers):
            self.cls_token = Frozen(self.cls_token.get_value())
