"""Relative positions in two parts, rows and columns, that depend on the query (MViTv2: Li et al., 2022, section 4.1)."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxpretrain.models.layers.position import resize_pos_embed


def relative_vectors(
    table: Float[Array, "offsets d"], size: int, key_size: int | None = None
) -> Float[Array, "size key_size d"]:
    """The vector of each pair (query, key) of positions on an axis of `size` queries and `key_size` keys, alike by default.

    `table` has a vector per offset from -(n - 1) to n - 1. Where n is not the larger of both sizes, it is interpolated
    linearly; the positions of the fewer ones are as far apart as the others' allow.
    """
    keys = size if key_size is None else key_size
    offsets = (1, 2 * max(size, keys) - 1)
    resized = resize_pos_embed(table[None], (1, len(table)), offsets, mode="bilinear", num_extra_tokens=0)[0]
    query, key = np.arange(size) * max(keys / size, 1.0), np.arange(keys) * max(size / keys, 1.0)
    offset = query[:, None] - key + (keys - 1) * max(size / keys, 1.0)
    return resized[offset.astype(int)]


def decomposed_bias(
    q: Float[Array, "b n heads d"],
    grid: tuple[int, int],
    rel_pos_h: Float[Array, "offsets_h d"],
    rel_pos_w: Float[Array, "offsets_w d"],
    key_grid: tuple[int, int] | None = None,
) -> Float[Array, "b heads n m"]:
    """q_i . (r_h[row of i - row of j] + r_w[column of i - column of j]), to be added to the logits; float32 at least.

    Args:
        q: queries of the patches of a grid, in row-major order, not scaled.
        grid: patches down and across.
        rel_pos_h, rel_pos_w: vectors per offset, as of `relative_vectors`; the same for all heads.
        key_grid: keys down and across, where they are on another grid than the queries.
    """
    (h, w), keys = grid, grid if key_grid is None else key_grid
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    q = q.reshape(q.shape[0], h, w, *q.shape[2:])
    down = relative_vectors(rel_pos_h, h, keys[0]).astype(q.dtype)
    across = relative_vectors(rel_pos_w, w, keys[1]).astype(q.dtype)
    rows = jnp.einsum("bhwnd,hkd->bnhwk", q, down, preferred_element_type=dtype)
    columns = jnp.einsum("bhwnd,wkd->bnhwk", q, across, preferred_element_type=dtype)
    return (rows[..., None] + columns[..., None, :]).reshape(q.shape[0], -1, h * w, keys[0] * keys[1])
