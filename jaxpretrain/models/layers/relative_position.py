"""Biases that depend on where two tokens of a window lie relative to each other (Swin, BEiT)."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

NUM_CLS_ROWS = 3  # of a table for windows with a class token: class to patches, patches to class, class to class


def num_relative_positions(window: tuple[int, int]) -> int:
    """How many offsets (rows, columns) there are between two tokens of a window."""
    return (2 * window[0] - 1) * (2 * window[1] - 1)


def relative_position_index(window: tuple[int, int], with_cls_token: bool = False) -> Int[np.ndarray, "n n"]:
    """The row of the table for each pair (query, key) of tokens of a window, in row-major order; int64.

    A table has a row for each offset from key to query, in row-major order from (1 - h, 1 - w) on. With a class token,
    which comes first, `NUM_CLS_ROWS` rows follow. This is what MMPretrain's checkpoints hold; here, nothing reads it.
    """
    h, w = window
    row, column = np.indices((h, w)).reshape(2, -1)
    index = (row[:, None] - row + h - 1) * (2 * w - 1) + column[:, None] - column + w - 1
    if with_cls_token:
        index = np.pad(index, ((1, 0), (1, 0)))
        index[0, 1:], index[1:, 0], index[0, 0] = np.arange(NUM_CLS_ROWS) + num_relative_positions(window)
    return index


def relative_position_bias(
    table: Float[Array, "rows heads"], window: tuple[int, int], grid: tuple[int, int] | None = None
) -> Float[Array, "heads n n"]:
    """The bias of each pair (query, key) of tokens, by their offset.

    A lookup, written as one contraction with one-hot matrices per axis: its gradient is a contraction too, where that of
    indexing would add up in an order that varies from run to run on a GPU.

    Args:
        table: a row for each offset (see `relative_position_index`); with a class token three rows more.
        window: tokens (down, across) that the table is for.
        grid: the tokens at hand, if others; the table is then resized (`resize_relative_position_bias_table`).
    """
    count, heads = num_relative_positions(window), table.shape[1]
    offsets = table[:count].reshape(2 * window[0] - 1, 2 * window[1] - 1, heads)
    pick_row, pick_column = (_pick(old, new, table.dtype) for old, new in zip(window, grid or window, strict=True))
    bias = jnp.einsum("ijr,klc,rch->hikjl", pick_row, pick_column, offsets, precision="highest")
    n = pick_row.shape[0] * pick_column.shape[0]
    bias = bias.reshape(heads, n, n)
    if table.shape[0] == count:
        return bias
    from_cls, to_cls, cls_to_cls = table[count:, :, None, None]
    first = jnp.concatenate([cls_to_cls, jnp.broadcast_to(from_cls, (heads, 1, n))], axis=2)
    others = jnp.concatenate([jnp.broadcast_to(to_cls, (heads, n, 1)), bias], axis=2)
    return jnp.concatenate([first, others], axis=1)


def _pick(src: int, dst: int, dtype: Any) -> Float[Array, "dst dst 2*src-1"]:
    """For each pair of tokens along an axis, the weights of the offsets in a table: 1 for its own if no resizing is due."""
    offset = np.arange(dst)[:, None] - np.arange(dst)
    pick = jax.nn.one_hot(offset + dst - 1, 2 * dst - 1, dtype=dtype)
    return pick if src == dst else jnp.matmul(pick, jnp.asarray(_resize_matrix(src, dst), dtype), precision="highest")


def resize_relative_position_bias_table(
    table: Float[np.ndarray, "rows heads"], src_window: tuple[int, int], dst_window: tuple[int, int]
) -> Float[np.ndarray, "rows2 heads"]:
    """A table for another window, by BEiT's scheme, as MMPretrain's BEiT and Swin resize weights on loading.

    The offsets of the old table are put at distances that grow geometrically, so that the outermost ones reach those of
    the new table while near ones keep their place; a cubic spline through them gives what is in between. The rows of a
    class token stay. Windows may be any rectangles (MMPretrain: squares).

    Raises:
        ValueError: the number of rows does not fit `src_window`.
    """
    count = num_relative_positions(src_window)
    if table.shape[0] - count not in (0, NUM_CLS_ROWS):
        raise ValueError(
            f"a table for a window of {tuple(src_window)} has {count} rows, or {NUM_CLS_ROWS} more with a "
            f"class token; this one has {table.shape[0]}"
        )
    offsets = table[:count].reshape(2 * src_window[0] - 1, 2 * src_window[1] - 1, -1)
    down, across = (_resize_matrix(old, new) for old, new in zip(src_window, dst_window, strict=True))
    resized = np.einsum("ir,jc,rch->ijh", down, across, offsets, optimize=True)
    return np.concatenate([resized.reshape(-1, table.shape[1]), table[count:]]).astype(table.dtype)


def fit_bias_table(
    table: Float[np.ndarray, "rows heads"], window: tuple[int, int], with_cls_token: bool = False
) -> Float[np.ndarray, "rows2 heads"] | None:
    """A loaded table of any square window, resized for `window`; None if its rows are those of no such window."""
    side = math.isqrt(max(table.shape[0] - NUM_CLS_ROWS * with_cls_token, 0))
    source = ((side + 1) // 2,) * 2
    if num_relative_positions(source) + NUM_CLS_ROWS * with_cls_token != table.shape[0]:
        return None
    return resize_relative_position_bias_table(table, source, window)


@lru_cache(maxsize=64)
def _resize_matrix(src: int, dst: int) -> Float[np.ndarray, "2*dst-1 2*src-1"]:
    """The linear map from the offsets along one axis of a window of `src` tokens to those of one of `dst` tokens."""
    if src == dst:
        return np.eye(2 * src - 1)
    from scipy.interpolate import make_interp_spline  # slow to import, and seldom needed

    # The ratio of 1 + ratio + ... + ratio ** (src - 2) = dst - 1, within BEiT's bounds and to its accuracy.
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        ratio = (low + high) / 2
        low, high = (low, ratio) if sum(ratio ** np.arange(src - 1)) > dst - 1 else (ratio, high)
    distances = np.cumsum(ratio ** np.arange(src - 1))
    nodes = np.concatenate([-distances[::-1], [0], distances])
    wanted = np.clip(np.arange(1 - dst, dst), nodes[0], nodes[-1])  # flat beyond the ends
    return make_interp_spline(nodes, np.eye(len(nodes)), k=min(3, len(nodes) - 1))(wanted)
