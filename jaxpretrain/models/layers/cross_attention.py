"""Attention to tokens that come from elsewhere."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxpretrain.build import ConfigError
from jaxpretrain.models.layers.attention import scaled_dot_product_attention
from jaxpretrain.models.layers.base import BaseModule
from jaxpretrain.models.layers.drop import Dropout
from jaxpretrain.models.layers.linear import Linear


class CrossMultiheadAttention(BaseModule):
    """Attention of queries to keys and values that come from elsewhere, each with a matrix of its own.

    Args:
        embed_dims: channels of all.
        num_heads: heads; must divide `embed_dims`.
        qkv_bias: whether queries and values have a bias.
        qk_scale: factor of the logits; 1 / sqrt(channels of a head) if None.
        attn_drop, proj_drop: dropout of the attention weights and of the output.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        *,
        rngs: nnx.Rngs,
    ):
        if embed_dims % num_heads:
            raise ConfigError(
                f"CrossMultiheadAttention: {embed_dims} channels cannot be divided into {num_heads} heads"
            )
        self.num_heads = num_heads
        self.scale = qk_scale or (embed_dims // num_heads) ** -0.5
        self.q = Linear(embed_dims, embed_dims, bias=False, rngs=rngs)
        self.k = Linear(embed_dims, embed_dims, bias=False, rngs=rngs)
        self.v = Linear(embed_dims, embed_dims, bias=False, rngs=rngs)
        self.q_bias = nnx.Param(jnp.zeros((embed_dims,))) if qkv_bias else None
        self.v_bias = nnx.Param(jnp.zeros((embed_dims,))) if qkv_bias else None
        self.attn_drop = Dropout(attn_drop)
        self.proj = Linear(embed_dims, embed_dims, rngs=rngs)
        self.proj_drop = Dropout(proj_drop)

    def __call__(
        self,
        x: Float[Array, "b n c"],
        k: Float[Array, "b m c"],
        v: Float[Array, "b m c"],
        *,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "b n c"]:
        q, k, v = self.q(x), self.k(k), self.v(v)
        if self.q_bias is not None and self.v_bias is not None:
            q, v = q + self.q_bias[...].astype(q.dtype), v + self.v_bias[...].astype(v.dtype)
        q, k, v = (y.reshape(*y.shape[:2], self.num_heads, -1) for y in (q, k, v))
        y = scaled_dot_product_attention(self, q, k, v, scale=self.scale, dropout=self.attn_drop, rngs=rngs)
        return self.proj_drop(self.proj(y.reshape(x.shape)), rngs=rngs)
