"""Rotary positions of image patches (RoFormer: Su et al., 2021; in two dimensions: EVA-02, Fang et al., 2023)."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

Table = tuple[Float[np.ndarray, "n d"], Float[np.ndarray, "n d"]]


def rotary_table(
    grid: tuple[int, int], head_dims: int, *, span: float = 16.0, theta: float = 10000.0, paired: bool = True
) -> Table:
    """Cosines and sines of the angles by which patches, in row-major order, turn queries and keys; float64.

    The first half of the channels turns by the row, the second by the column. Either has head_dims / 4 frequencies
    theta ** (-4 i / head_dims). Rows and columns run from 0 to `span` (exclusive) whatever the grid, so that positions
    of a larger image lie between those that the network was trained with.

    Args:
        grid: patches down and across.
        head_dims: channels of a head; a multiple of 4.
        span: length of an axis; EVA-02 is pre-trained with 16 patches.
        theta: sets the longest wave.
        paired: whether both channels of a pair (2i, 2i + 1) have the frequency i, which makes a rotation. Otherwise
            the frequencies follow each other once and then once more, as MMPretrain has them.
    """
    frequencies = theta ** (-np.arange(0, head_dims // 2, 2) / (head_dims // 2))
    frequencies = np.repeat(frequencies, 2) if paired else np.tile(frequencies, 2)
    down, across = (index.reshape(-1, 1) * (span / size) for index, size in zip(np.indices(grid), grid, strict=True))
    angles = np.concatenate([down * frequencies, across * frequencies], axis=1)
    return np.cos(angles), np.sin(angles)


def rotate(x: Float[Array, "b n h d"], table: Table) -> Float[Array, "b n h d"]:
    """Queries or keys turned by their patch's angles: (a, b) to (a cos - b sin, b cos + a sin) for each pair of channels.

    The table is for the last tokens; those before them (class token, registers) have no place and stay as they are.
    Computed in float32 at least.
    """
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    cos, sin = (jnp.asarray(part, dtype)[:, None] for part in table)
    first = x.shape[1] - len(cos)
    y = x[:, first:].astype(dtype)
    a, b = y[..., ::2], y[..., 1::2]
    y = y * cos + jnp.stack([-b, a], axis=-1).reshape(y.shape) * sin
    return jnp.concatenate([x[:, :first], y.astype(x.dtype)], axis=1)
