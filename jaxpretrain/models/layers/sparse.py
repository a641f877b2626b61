"""Convolutional networks of images of which a part is hidden, as dense ones: what is hidden is made zero again and again.

A convolution carries what it sees into its surroundings. So that hidden parts stay unseen, and the edges of what is
visible stay where they are, positions of hidden parts are zero behind every layer, and norms do not count them (Tian et
al., 2023, https://arxiv.org/abs/2301.03580, section 3.1). The results are those of sparse convolutions, at the price of
dense ones.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxpretrain.models.layers.norm import BatchNorm

Visible = Bool[Array, "b n m"] | None  # for each patch, whether it is seen; None: all are


def visible_at(visible: Bool[Array, "b n m"], height: int, width: int) -> Bool[Array, "b height width"]:
    """Which positions of a map belong to visible patches. Raises ValueError where patches have no whole number of them."""
    rows, columns = visible.shape[1:]
    if height % rows or width % columns:
        raise ValueError(f"{rows}x{columns} patches do not divide a map of {height}x{width} positions")
    return visible.repeat(height // rows, axis=1).repeat(width // columns, axis=2)


def hide(x: Float[Array, "b h w c"], visible: Visible) -> Float[Array, "b h w c"]:
    """`x`, zero where it is hidden."""
    return x if visible is None else jnp.where(visible_at(visible, *x.shape[1:3])[..., None], x, 0)


def sparsely(layer: Any, x: Float[Array, "b h w c"], visible: Visible) -> Float[Array, "b h2 w2 d"]:
    """What `layer` makes of `x`, zero where it is hidden. The statistics of a BatchNorm are of visible positions."""
    if isinstance(layer, BatchNorm) and visible is not None:
        return layer(x, visible_at(visible, *x.shape[1:3]))
    return hide(layer(x), visible)


def draw_visible(noise: Float[Array, "b places"], keep: int, grid: tuple[int, int]) -> Bool[Array, "b n m"]:
    """For each image, the `keep` patches of the smallest noise are visible."""
    rank = jnp.argsort(jnp.argsort(noise, axis=1), axis=1)
    return (rank < keep).reshape(-1, *grid)


def visible_mean(x: Float[Array, "b h w c"], visible: Bool[Array, "b n m"]) -> Float[Array, "b c"]:
    """The mean over visible positions, in float32 at least."""
    where = visible_at(visible, *x.shape[1:3])[..., None]
    return jnp.mean(x, axis=(1, 2), where=where, dtype=jnp.promote_types(x.dtype, jnp.float32))


def grid_of(images: Array | jax.ShapeDtypeStruct, patch: int, owner: str) -> tuple[int, int]:
    """How many patches of `patch` pixels images have, down and across. Raises ValueError if that is no whole number."""
    height, width = images.shape[1:3]
    if height % patch or width % patch:
        raise ValueError(f"{owner}: images of {height}x{width} px do not divide into patches of {patch}")
    return height // patch, width // patch
