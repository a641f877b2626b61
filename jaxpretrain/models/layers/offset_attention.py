"""Attention with a learned bias for how far apart query and key are, down and across, whatever the direction (LeViT)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxpretrain.build import ConfigError
from jaxpretrain.models.layers.attention import scaled_dot_product_attention
from jaxpretrain.models.layers.base import BaseModule
from jaxpretrain.models.layers.linear import Linear


def offset_bias(table: Float[Array, "heads h*w"], grid: tuple[int, int], stride: int = 1) -> Float[Array, "heads q k"]:
    """The bias of each pair (query, key) of tokens of a grid, by their absolute offset (down, across).

    A lookup, written as one contraction with one-hot matrices per axis, so that its gradient is one too (see
    `relative_position_bias`).

    Args:
        table: a column for each offset, in row-major order.
        grid: keys down and across.
        stride: queries are those of every `stride`-th row and column.
    """
    h, w = grid
    down, across = (jax.nn.one_hot(_distance(size, stride), size, dtype=table.dtype) for size in grid)
    offsets = table.reshape(-1, h, w)
    bias = jnp.einsum("ikr,jlc,hrc->hijkl", down, across, offsets, precision="highest")
    return bias.reshape(table.shape[0], -1, h * w)


def offset_index(grid: tuple[int, int], stride: int = 1) -> Int[np.ndarray, "q k"]:
    """The column of the table for each pair (query, key). This is what checkpoints hold; here, nothing reads it."""
    down, across = (_distance(size, stride) for size in grid)
    index = down[:, None, :, None] * grid[1] + across[None, :, None, :]
    return index.reshape(-1, grid[0] * grid[1])


def _distance(size: int, stride: int) -> Int[np.ndarray, "q k"]:
    return np.abs(np.arange(0, size, stride)[:, None] - np.arange(size))


def check_grid(module: nnx.Module, shape: tuple[int, ...], grid: tuple[int, int]) -> None:
    """Raises ConfigError if a map [B, H, W, C] is not of the grid that the biases are for."""
    if tuple(shape[1:3]) != grid:
        raise ConfigError(
            f"{type(module).__name__} has biases for a map of {grid[0]}x{grid[1]}, not of {shape[1]}x{shape[2]}: take images "
            "of the size that the model was built for"
        )


class OffsetAttention(BaseModule):
    """Self-attention with biases by absolute offset; values may be wider than keys.

    Args:
        embed_dims: channels of input and output.
        num_heads: heads.
        key_dim: channels of queries and keys, in each head.
        attn_ratio: channels of values over those of keys.
        grid: tokens down and across.
        rngs: for the weights.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        key_dim: int,
        attn_ratio: float,
        grid: tuple[int, int],
        *,
        rngs: nnx.Rngs,
    ):
        self.num_heads, self.key_dim, self.value_dim = num_heads, key_dim, int(attn_ratio * key_dim)
        self.grid, self.scale = grid, key_dim**-0.5
        self.qkv = Linear(embed_dims, num_heads * (2 * key_dim + self.value_dim), rngs=rngs)
        self.proj = Linear(num_heads * self.value_dim, embed_dims, rngs=rngs)
        self.attention_biases = nnx.Param(jnp.zeros((num_heads, grid[0] * grid[1])))

    def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        parts = self.qkv(x).reshape(*x.shape[:2], self.num_heads, -1)  # of each head: query, key, value
        q, k, v = jnp.split(parts, (self.key_dim, 2 * self.key_dim), axis=-1)
        bias = offset_bias(self.attention_biases[...], self.grid)
        y = scaled_dot_product_attention(self, q, k, v, scale=self.scale, bias=bias)
        return self.proj(y.reshape(*y.shape[:2], -1))
