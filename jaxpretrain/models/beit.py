"""The Vision Transformer of BEiT (Bao et al., 2022), BEiT v2 (Peng et al., 2022), CAE and EVA (Fang et al., 2023)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from jaxpretrain.build import ConfigError
from jaxpretrain.models.layers.attention import scaled_dot_product_attention
from jaxpretrain.models.layers.base import BaseModule
from jaxpretrain.models.layers.drop import Dropout, drop_path
from jaxpretrain.models.layers.ffn import FFN
from jaxpretrain.models.layers.init import trunc_normal
from jaxpretrain.models.layers.linear import Linear
from jaxpretrain.models.layers.norm import build_norm
from jaxpretrain.models.layers.relative_position import (
    NUM_CLS_ROWS,
    fit_bias_table,
    num_relative_positions,
    relative_position_bias,
    relative_position_index,
)
from jaxpretrain.models.vision_transformer import TransformerEncoderLayer, VisionTransformer


class RelativePositionBias(BaseModule):
    """A learned bias of the attention logits for each relative position of two patches, and for the class token.

    For another grid of patches than its own, the table is resized as it would be for loading (MMPretrain refuses such
    images).

    Args:
        window_size: patches (down, across) that the table is for.
        num_heads: heads, each with its own biases.
        with_cls_token: whether a class token comes before the patches.
    """

    def __init__(self, window_size: tuple[int, int], num_heads: int, with_cls_token: bool = True):
        self.window_size, self.with_cls_token = window_size, with_cls_token
        self.relative_position_bias_table = _bias_table(window_size, num_heads, with_cls_token)

    def __call__(self, grid: tuple[int, int] | None = None) -> Float[Array, "heads n n"]:
        """The bias of each pair (query, key) of tokens. `grid`: the patches at hand, its own if None."""
        return relative_position_bias(self.relative_position_bias_table[...], self.window_size, grid)

    def derived(self) -> dict[str, np.ndarray]:
        return {"relative_position_index": relative_position_index(self.window_size, self.with_cls_token)}

    def adapt(self, name: str, array: np.ndarray) -> np.ndarray | None:
        """Biases for another window are resized by BEiT's scheme."""
        if name != "relative_position_bias_table":
            return None
        return fit_bias_table(array, self.window_size, self.with_cls_token)


class BEiTAttention(BaseModule):
    """Self-attention, with a learned bias for each relative position (see `RelativePositionBias`) or without.

    Args:
        embed_dims: channels of input and output.
        num_heads: heads; must divide `embed_dims`.
        window_size: patches (down, across) that the biases are for; may be None without.
        use_rel_pos_bias: whether the layer has biases of its own.
        bias: True for a bias of queries, keys and values, 'qv_bias' for one of queries and values, False for none.
        qk_scale: factor of the logits; 1 / sqrt(channels of a head) if None.
        attn_drop_rate, proj_drop_rate: dropout of the attention weights and of the output (which MMPretrain's layers
            lose on the way to its attention).
        with_cls_token: whether a class token comes before the patches.

    Raises:
        ConfigError: arguments that do not fit together.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        window_size: tuple[int, int] | None,
        use_rel_pos_bias: bool,
        bias: bool | str = "qv_bias",
        qk_scale: float | None = None,
        attn_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        with_cls_token: bool = True,
        init_cfg: Any = None,
        *,
        rngs: nnx.Rngs,
    ):
        if embed_dims % num_heads:
            raise ConfigError(f"BEiTAttention: embed_dims={embed_dims} is not a multiple of num_heads={num_heads}")
        if bias not in (True, False, "qv_bias"):
            raise ConfigError(f"BEiTAttention: bias must be True, False or 'qv_bias', not {bias!r}")
        self.init_cfg, self.num_heads, self.with_cls_token = init_cfg, num_heads, with_cls_token
        self.scale = qk_scale or (embed_dims // num_heads) ** -0.5
        self.q_bias = nnx.Param(jnp.zeros((embed_dims,))) if bias == "qv_bias" else None
        self.v_bias = nnx.Param(jnp.zeros((embed_dims,))) if bias == "qv_bias" else None
        if use_rel_pos_bias and window_size is None:
            raise ConfigError("BEiTAttention: use_rel_pos_bias=True needs a window_size")
        window = self.window_size = window_size if use_rel_pos_bias else None
        self.relative_position_bias_table = None if window is None else _bias_table(window, num_heads, with_cls_token)
        self.qkv = Linear(embed_dims, 3 * embed_dims, bias=bias is True, rngs=rngs)
        self.attn_drop = Dropout(attn_drop_rate)
        self.proj = Linear(embed_dims, embed_dims, rngs=rngs)
        self.proj_drop = Dropout(proj_drop_rate)

    def __call__(
        self,
        x: Float[Array, "b n c"],
        *,
        grid: tuple[int, int] | None = None,
        rel_pos_bias: Float[Array, "heads n n"] | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "b n c"]:
        """`grid`: the patches (down, across) at hand, `window_size` if None; `rel_pos_bias`: biases that layers share."""
        b, n, c = x.shape
        qkv = self.qkv(x)
        if self.q_bias is not None and self.v_bias is not None:
            q_bias, v_bias = self.q_bias[...], self.v_bias[...]
            qkv = qkv + jnp.concatenate([q_bias, jnp.zeros_like(q_bias), v_bias]).astype(x.dtype)
        qkv = qkv.reshape(b, n, 3, self.num_heads, c // self.num_heads)
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        bias = rel_pos_bias
        if self.relative_position_bias_table is not None and self.window_size is not None:
            own = relative_position_bias(self.relative_position_bias_table[...], self.window_size, grid)
            bias = own if bias is None else own + bias
        y = scaled_dot_product_attention(self, q, k, v, scale=self.scale, bias=bias, dropout=self.attn_drop, rngs=rngs)
        return self.proj_drop(self.proj(y.reshape(b, n, c)), rngs=rngs)

    def derived(self) -> dict[str, np.ndarray]:
        if self.window_size is None:
            return {}
        return {"relative_position_index": relative_position_index(self.window_size, self.with_cls_token)}

    def adapt(self, name: str, array: np.ndarray) -> np.ndarray | None:
        """Biases for another window are resized by BEiT's scheme."""
        if name != "relative_position_bias_table" or self.window_size is None:
            return None
        return fit_bias_table(array, self.window_size, self.with_cls_token)

    def init_weights(self, rngs: nnx.Rngs) -> None:
        """Besides `init_cfg`: its own biases from a truncated normal distribution of std 0.02."""
        super().init_weights(rngs)
        if (table := self.relative_position_bias_table) is not None:
            table.set_value(trunc_normal(0.02)(rngs.params(), table.shape))


class BEiTTransformerEncoderLayer(TransformerEncoderLayer):
    """A pre-norm transformer block with LayerScale on both branches (`gamma_1`, `gamma_2`) and BEiT's attention.

    Drop path acts once on each branch, as in BEiT; MMPretrain drops the feed-forward branch twice in training.

    Args:
        embed_dims: channels of the tokens.
        num_heads: heads of the attention.
        feedforward_channels: hidden channels of the feed-forward half.
        layer_scale_init_value: start of LayerScale; 0 or None for none.
        window_size, use_rel_pos_bias, with_cls_token: as of `BEiTAttention`.
        drop_rate: dropout after the attention's projection and in the feed-forward half.
        attn_drop_rate: dropout of the attention weights.
        drop_path_rate: probability of dropping a branch of a sample.
        qkv_bias: `bias` of `BEiTAttention`.
        bias: MMPretrain's name for it, which goes first.
        act_cfg: activation of the feed-forward half.
        norm_cfg: the norms.
    """

    attn: Any

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        feedforward_channels: int,
        layer_scale_init_value: float | None,
        window_size: tuple[int, int] | None,
        use_rel_pos_bias: bool,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        qkv_bias: bool | str = "qv_bias",
        bias: bool | str | None = None,
        with_cls_token: bool = True,
        act_cfg: Mapping[str, Any] = {"type": "GELU"},
        norm_cfg: Mapping[str, Any] = {"type": "LN"},
        init_cfg: Any = None,
        *,
        rngs: nnx.Rngs,
    ):
        self.init_cfg, self.drop_path_rate, self.deterministic = init_cfg, float(drop_path_rate), False
        self.ln1 = build_norm(norm_cfg, embed_dims, rngs=rngs)
        self.attn = BEiTAttention(
            embed_dims,
            num_heads,
            window_size,
            use_rel_pos_bias,
            bias=qkv_bias if bias is None else bias,
            attn_drop_rate=attn_drop_rate,
            proj_drop_rate=drop_rate,
            with_cls_token=with_cls_token,
            rngs=rngs,
        )
        self.ln2 = build_norm(norm_cfg, embed_dims, rngs=rngs)
        self.ffn = FFN(embed_dims, feedforward_channels, act_cfg, drop_rate, rngs=rngs)
        self.gamma_1 = nnx.Param(jnp.full((embed_dims,), layer_scale_init_value)) if layer_scale_init_value else None
        self.gamma_2 = nnx.Param(jnp.full((embed_dims,), layer_scale_init_value)) if layer_scale_init_value else None

    def __call__(
        self,
        x: Float[Array, "b n c"],
        *,
        rngs: nnx.Rngs | None = None,
        drop_path_rate: float | Array | None = None,
        grid: tuple[int, int] | None = None,
        rel_pos_bias: Float[Array, "heads n n"] | None = None,
    ) -> Float[Array, "b n c"]:
        """`drop_path_rate` replaces the layer's own; it may be traced. `grid`, `rel_pos_bias`: see `BEiTAttention`."""
        rate = self.drop_path_rate if drop_path_rate is None else drop_path_rate
        rate = 0.0 if self.deterministic else rate
        y = _scaled(self.attn(self.ln1(x), grid=grid, rel_pos_bias=rel_pos_bias, rngs=rngs), self.gamma_1)
        x = x + drop_path(y, rate, rngs)
        return x + drop_path(_scaled(self.ffn(self.ln2(x), rngs=rngs), self.gamma_2), rate, rngs)


def _scaled(x: Float[Array, "b n c"], gamma: nnx.Variable | None) -> Float[Array, "b n c"]:
    return x if gamma is None else x * gamma[...].astype(x.dtype)


def _bias_table(window: tuple[int, int], num_heads: int, with_cls_token: bool) -> nnx.Param:
    rows = num_relative_positions(window) + NUM_CLS_ROWS * with_cls_token
    return nnx.Param(jnp.zeros((rows, num_heads)))


class BEiTViT(VisionTransformer):
    """BEiT's Vision Transformer: positions by biases of the attention, instead of a table added to the patches or besides.

    Images may have any size: the tables of biases, like the table of positions, are resized for another grid of patches.
    (MMPretrain takes images of other sizes without biases only.)

    Args:
        bias: True for a bias of queries, keys and values, 'qv_bias' for one of queries and values, False for none.
        use_abs_pos_emb: whether a table of positions is added to the patches and the class token.
        use_rel_pos_bias: whether each layer has biases for relative positions.
        use_shared_rel_pos_bias: whether all layers share one table of biases (`rel_pos_bias`); not with the former.
        layer_scale_init_value: start of LayerScale in each layer; 0 or None for none.
        layer_cfgs: further arguments of `BEiTTransformerEncoderLayer`: one dict for all, or one for each layer.
        others: as of `VisionTransformer`, with its archs.

    Raises:
        ConfigError: an unknown name, or arguments that do not fit together.
    """

    layer_type: ClassVar[type] = BEiTTransformerEncoderLayer

    def __init__(
        self,
        arch: str | Mapping[str, Any] = "base",
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_channels: int = 3,
        out_indices: int | Sequence[int] = -1,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        bias: bool | str = "qv_bias",
        norm_cfg: Mapping[str, Any] = {"type": "LN", "eps": 1e-6},
        final_norm: bool = False,
        out_type: str = "avg_featmap",
        with_cls_token: bool = True,
        frozen_stages: int = -1,
        use_abs_pos_emb: bool = False,
        use_rel_pos_bias: bool = True,
        use_shared_rel_pos_bias: bool = False,
        interpolate_mode: str = "bicubic",
        layer_scale_init_value: float | None = 0.1,
        patch_cfg: Mapping[str, Any] = {},
        layer_cfgs: Mapping[str, Any] | Sequence[Mapping[str, Any]] = {},
        init_cfg: Any = None,
        *,
        rngs: nnx.Rngs,
    ):
        if use_rel_pos_bias and use_shared_rel_pos_bias:
            raise ConfigError("BEiTViT: choose one of use_rel_pos_bias and use_shared_rel_pos_bias")
        self.use_rel_pos_bias = use_rel_pos_bias
        super().__init__(
            arch=arch,
            img_size=img_size,
            patch_size=patch_size,
            in_channels=in_channels,
            out_indices=out_indices,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            qkv_bias=bias,  # type: ignore[arg-type]  # these layers know 'qv_bias' too
            norm_cfg=norm_cfg,
            final_norm=final_norm,
            out_type=out_type,
            with_cls_token=with_cls_token,
            frozen_stages=frozen_stages,
            interpolate_mode=interpolate_mode,
            layer_scale_init_value=layer_scale_init_value or 0.0,
            patch_cfg=patch_cfg,
            layer_cfgs=layer_cfgs,
            init_cfg=init_cfg,
            rngs=rngs,
        )
        if not use_abs_pos_emb:
            self.pos_embed, self.num_positioned_tokens = None, 0  # type: ignore[assignment]
        window, heads = self.patch_resolution, self.layers[0].attn.num_heads
        self.rel_pos_bias = RelativePositionBias(window, heads, with_cls_token) if use_shared_rel_pos_bias else None

    def embed(self, x: Float[Array, "b h w c"]) -> tuple[Float[Array, "b n c"], tuple[int, int]]:
        """Patch tokens, with their positions if there is a table; and the patches down and across."""
        return self.patch_embed(x) if self.pos_embed is None else super().embed(x)

    def run_layers(
        self, x: Float[Array, "b n c"], grid: tuple[int, int] | None = None, *, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "b n c"]:
        """All layers, without the final norm (`ln1`). `grid`: the patches at hand, those of `img_size` if None."""
        return self._run(x, rngs, inputs=self._layer_inputs(grid or self.patch_resolution))[0]

    def _layer_args(self, index: int) -> dict[str, Any]:
        window = {"window_size": self.patch_resolution, "use_rel_pos_bias": self.use_rel_pos_bias}
        return {**window, "with_cls_token": self.num_extra_tokens > 0}

    def _layer_inputs(self, grid: tuple[int, int]) -> dict[str, Any]:
        return {"grid": grid, "rel_pos_bias": None if self.rel_pos_bias is None else self.rel_pos_bias(grid)}

    def init_weights(self, rngs: nnx.Rngs) -> None:
        """Besides `init_cfg` and the layers' own rules: positions from a truncated normal distribution of std 0.02."""
        if self.pos_embed is not None:
            super().init_weights(rngs)
        else:
            BaseModule.init_weights(self, rngs)
