"""Biases that depend on where two tokens of a window lie relative to each other (Swin, BEiT)."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int
from scipy.interpolate import make_interp_spline

from jaxpretrain.models.layers.base import BaseModule

NUM_CLS_ROWS = 3  # of a table for windows with a class token: class to patch, patch to class, class to class


def relative_position_index(window: tuple[int, int], with_cls_token: bool = False) -> Int[np.ndarray, "n n"]:
    """For each pair (query, key) of tokens of a window, in row-major order, the row of its bias in the table, int64.

    A table has (2h - 1) (2w - 1) rows, the offsets (row, column) from key to query in row-major order, from
    (1 - h, 1 - w) on. With a class token, which is the first, `NUM_CLS_ROWS` rows follow.
    """
    h, w = window
    row, column = np.indices((h, w)).reshape(2, -1)
    down = row[:, None] - row + h - 1
    right = column[:, None] - column + w - 1
    index = down * (2 * w - 1) + right
    if with_cls_token:
        index = np.pad(index, ((1, 0), (1, 0)))
        index[0, 1:], index[1:, 0], index[0, 0] = np.arange(NUM_CLS_ROWS) + (2 * h - 1) * (2 * w - 1)
    return index


def gather_bias(table: Float[Array, "rows heads"], index: Int[np.ndarray, "n n"]) -> Float[Array, "heads n n"]:
    """The bias of each pair of tokens, for each head."""
    return table[index.reshape(-1)].reshape(*index.shape, -1).transpose(2, 0, 1)


def resize_relative_position_bias_table(
    table: Float[Array, "rows heads"], src_window: tuple[int, int], dst_window: tuple[int, int]
) -> Float[Array, "rows2 heads"]:
    """A table for another window, by BEiT's scheme, which MMPretrain uses for BEiT and Swin when weights are loaded.

    The offsets of the old table are put at distances that grow geometrically, so that its outermost ones reach the new
    table's, while near ones keep their place; a cubic spline through them gives the values in between. Rows beyond the
    offsets (those of a class token) stay. This goes for NumPy and for JAX arrays, which may be traced, and for windows
    that are not square, where MMPretrain has square ones only.

    Args:
        table: float32 or float64.
        src_window: its window, in tokens (down, across).
        dst_window: the wanted one.

    Raises:
        ValueError: the table is too small for `src_window`.
    """
    offsets = (2 * src_window[0] - 1, 2 * src_window[1] - 1)
    count = offsets[0] * offsets[1]
    if table.shape[0] < count:
        raise ValueError(f"a window of {src_window} has {count} relative positions, but the table {table.shape[0]} rows")
    if tuple(src_window) == tuple(dst_window):
        return table
    xp: Any = np if isinstance(table, np.ndarray) else jnp
    grid, extra = table[:count].reshape(*offsets, -1), table[count:]
    down, across = (_spline_matrix(*sizes).astype(table.dtype) for sizes in zip(src_window, dst_window, strict=True))
    grid = xp.tensordot(down, xp.tensordot(across, grid, axes=(1, 1)), axes=(1, 1))
    return xp.concatenate([grid.reshape(-1, table.shape[1]), extra])


def _spline_matrix(src: int, dst: int) -> Float[np.ndarray, "2*dst-1 2*src-1"]:
    """The linear map of the offsets of a window of `src` tokens along one axis to those of `dst` tokens."""
    if src == dst:
        return np.eye(2 * src - 1)
    # The ratio q with 1 + q + ... + q^(src - 2) = dst - 1, by the bisection that defines it (bounds, accuracy) in BEiT.
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        ratio = (low + high) / 2
        low, high = (low, ratio) if (ratio ** (src - 1) - 1) / (ratio - 1) > dst - 1 else (ratio, high)
    distance = np.cumsum(ratio ** np.arange(src - 1))
    nodes = np.concatenate([-distance[::-1], [0], distance])
    wanted = np.clip(np.arange(1 - dst, dst), nodes[0], nodes[-1])
    return make_interp_spline(nodes, np.eye(len(nodes)), k=min(3, len(nodes) - 1))(wanted)


class RelativePositionBias(BaseModule):
    """A learned bias of the attention logits, by relative position, for tokens of one window (BEiT, shared by layers).

    Args:
        window_size: patches (down, across) that the table is for.
        num_heads: heads, each with its own biases.
        with_cls_token: whether a class token comes first.
    """

    def __init__(self, window_size: tuple[int, int], num_heads: int, with_cls_token: bool = True):
        self.window_size, self.with_cls_token = window_size, with_cls_token
        rows = (2 * window_size[0] - 1) * (2 * window_size[1] - 1) + NUM_CLS_ROWS * with_cls_token
        self.relative_position_bias_table = nnx.Param(jnp.zeros((rows, num_heads)))

    def __call__(self, grid: tuple[int, int] | None = None) -> Float[Array, "heads n n"]:
        """The biases of all pairs of tokens. `grid` (the table's window if None) is the number of patches at hand.

        For another grid than its own the table is resized; MMPretrain refuses such images.
        """
        return bias_for_grid(self.relative_position_bias_table[...], self.window_size, grid, self.with_cls_token)

    def derived(self) -> dict[str, np.ndarray]:
        return {"relative_position_index": relative_position_index(self.window_size, self.with_cls_token)}
