"""Attention within windows, and within shifted windows (Liu et al., 2021: Swin Transformer)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxpretrain.build import ConfigError, build
from jaxpretrain.models.layers.base import BaseModule

MASKED = -100.0  # added to the logits of pairs that must not see each other; Swin's own number


def window_partition(x: Float[Array, "b h w c"], window_size: int) -> Float[Array, "b*windows n c"]:
    """Maps cut into square windows, each of `window_size`^2 tokens: image by image, row-major within each.

    Height and width must be multiples of `window_size`.
    """
    b, h, w, c = x.shape
    s = window_size
    return x.reshape(b, h // s, s, w // s, s, c).transpose(0, 1, 3, 2, 4, 5).reshape(-1, s * s, c)


def window_reverse(windows: Float[Array, "b*windows n c"], height: int, width: int) -> Float[Array, "b h w c"]:
    """The maps of which `window_partition` made the windows."""
    s, c = round(windows.shape[1] ** 0.5), windows.shape[2]
    x = windows.reshape(-1, height // s, width // s, s, s, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(-1, height, width, c)


def shifted_regions(height: int, width: int, window_size: int, shift: int) -> Int[np.ndarray, "windows n"]:
    """For each token of each window of a map that was shifted cyclically, which of 9 regions it comes from.

    Tokens of different regions were no neighbours before the shift, and must not see each other.
    """
    row, column = (
        np.digitize(np.arange(size), [size - window_size, size - shift]).reshape(-1, window_size)
        for size in (height, width)
    )
    return (3 * row[:, None, :, None] + column[None, :, None, :]).reshape(-1, window_size**2)


def window_bias(
    bias: Float[Array, "heads n n"], regions: Int[np.ndarray, "windows n"] | None, batch: int
) -> Float[Array, "#batch heads n n"]:
    """A position bias, with `MASKED` added for pairs of different regions, for a batch of several images' windows.

    The comparison is left to the program: as a constant, the mask of Swin V2's largest windows has 21 MB in each block.
    """
    if regions is None:
        return bias[None]
    of_token = jnp.asarray(regions, jnp.int32)
    together = of_token[:, None, :, None] == of_token[:, None, None, :]
    masked = jnp.where(together, bias, bias + MASKED)
    return jnp.broadcast_to(masked, (batch // len(regions), *masked.shape)).reshape(batch, *bias.shape)


class ShiftWindowMSA(BaseModule):
    """Self-attention within windows of a map, which may be shifted to the right and down by some tokens.

    Maps whose sides are not multiples of the window get zeros at the bottom and the right. These take part: they are
    tokens like others, as in MMPretrain. A map just as small as the window is not shifted.

    Args:
        embed_dims: channels.
        num_heads: heads of the attention.
        window_size: tokens along a side of a window.
        shift_size: tokens of the shift, less than `window_size`; 0 for none.
        pad_small_map: whether to pad maps that are smaller than the window, and to shift those that are as small; for
            detection and segmentation. Smaller maps are an error otherwise.
        window_msa: the attention within the windows (`w_msa`). It gets tokens [B * windows, n, C], their `regions` (see
            `window_bias`) and `rngs`.
        kwargs: further arguments of `window_msa`.

    Raises:
        ConfigError: a shift that is too large.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        window_size: int,
        shift_size: int = 0,
        pad_small_map: bool = False,
        *,
        window_msa: Callable[..., Any],
        rngs: nnx.Rngs,
        **kwargs: Any,
    ):
        if not 0 <= shift_size < window_size:
            raise ConfigError(
                f"ShiftWindowMSA: shift_size={shift_size} must be from 0 to window_size={window_size}, less 1"
            )
        self.window_size, self.shift_size, self.pad_small_map = window_size, shift_size, pad_small_map
        window = (window_size, window_size)
        cfg = {"type": window_msa, "embed_dims": embed_dims, "num_heads": num_heads, "window_size": window, **kwargs}
        self.w_msa = build(cfg, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"], *, rngs: nnx.Rngs | None = None) -> Float[Array, "b h w c"]:
        height, width = x.shape[1:3]
        size, shift = self.window_size, self.shift_size
        if min(height, width) <= size and not self.pad_small_map:
            if min(height, width) < size:
                raise ConfigError(
                    f"a feature map of {height}x{width} is smaller than its window of {size}: take larger images, a smaller "
                    "window_size, or pad_small_map=True"
                )
            shift = 0
        bottom, right = -height % size, -width % size
        h, w = height + bottom, width + right
        if bottom or right:
            x = jnp.pad(x, ((0, 0), (0, bottom), (0, right), (0, 0)))
        if shift:
            x = jnp.roll(x, (-shift, -shift), axis=(1, 2))
        windows = window_partition(x, size)
        windows = self.w_msa(windows, regions=shifted_regions(h, w, size, shift) if shift else None, rngs=rngs)
        x = window_reverse(windows, h, w)
        if shift:
            x = jnp.roll(x, (shift, shift), axis=(1, 2))
        return x[:, :height, :width]
