"""Positions of patches: fixed sin-cos tables, and tables resized to another grid."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxpretrain.build import ConfigError, nearest


def build_2d_sincos_position_embedding(
    patches_resolution: int | tuple[int, int], embed_dims: int, temperature: float = 10000.0, cls_token: bool = False
) -> Float[Array, "1 n c"]:
    """Fixed positions of a grid of patches, float32, in row-major order, as MoCo v3 and MMPretrain's MAE have them.

    A quarter of the channels each hold sin(row f), cos(row f), sin(column f), cos(column f) with the frequencies
    f = temperature ** (-i / quarter). For grids that are not square the reference swaps height and width by mistake;
    here rows are rows always. (MAE's own release has columns before rows: another order of the same channels.)

    Args:
        patches_resolution: patches down and across.
        embed_dims: channels; a multiple of 4.
        temperature: sets the longest wave.
        cls_token: whether to put a row of zeros first, for a class token.

    Raises:
        ConfigError: `embed_dims` is not a multiple of 4.
    """
    if embed_dims % 4:
        raise ConfigError(f"2-D sin-cos positions need channels in multiples of 4; got embed_dims={embed_dims}")
    h, w = (patches_resolution,) * 2 if isinstance(patches_resolution, int) else patches_resolution
    frequency = temperature ** -(np.arange(embed_dims // 4) / (embed_dims // 4))
    row, column = (index.reshape(-1, 1) * frequency for index in np.indices((h, w)))
    table = np.concatenate([np.sin(row), np.cos(row), np.sin(column), np.cos(column)], axis=1)
    if cls_token:
        table = np.concatenate([np.zeros((1, embed_dims)), table])
    return jnp.asarray(table[None], jnp.float32)


def _bilinear(t: np.ndarray) -> np.ndarray:
    return np.maximum(1 - t, 0)


def _bicubic(t: np.ndarray, a: float = -0.75) -> np.ndarray:
    """The cubic convolution kernel at distance t (Keys, 1981), with PyTorch's `a` (Keys' own, and JAX's, is -0.5)."""
    near = (a + 2) * t**3 - (a + 3) * t**2 + 1
    far = a * (t**3 - 5 * t**2 + 8 * t - 4)
    return np.where(t <= 1, near, np.where(t < 2, far, 0))


_KERNELS = {"bilinear": _bilinear, "bicubic": _bicubic}


def _interpolation_matrix(source: int, target: int, mode: str) -> Float[np.ndarray, "target source"]:
    """The linear map that resamples `source` values to `target`: PyTorch's `F.interpolate` with align_corners=False.

    Pixel centres are at half integers, samples beyond the edge repeat it, and nothing is smoothed when shrinking.
    """
    position = (np.arange(target)[:, None] + 0.5) * (source / target) - 0.5
    taps = np.floor(position) + np.arange(-1, 3)
    matrix = np.zeros((target, source))
    index = np.clip(taps, 0, source - 1).astype(int)
    np.add.at(matrix, (np.arange(target)[:, None], index), _KERNELS[mode](np.abs(position - taps)))
    return matrix


def fit_pos_embed(
    pos_embed: Float[np.ndarray, "1 n c"], dst_shape: tuple[int, int], mode: str = "bicubic", num_extra_tokens: int = 1
) -> Float[np.ndarray, "1 m c"] | None:
    """A loaded position table of any square grid, resized to `dst_shape`; None if its tokens make no such grid."""
    if pos_embed.ndim != 3 or pos_embed.shape[1] < num_extra_tokens:
        return None
    side = math.isqrt(pos_embed.shape[1] - num_extra_tokens)
    if side**2 + num_extra_tokens != pos_embed.shape[1]:
        return None
    return np.asarray(resize_pos_embed(jnp.asarray(pos_embed), (side, side), dst_shape, mode, num_extra_tokens))


def resize_pos_embed(
    pos_embed: Float[Array, "1 n c"],
    src_shape: tuple[int, int],
    dst_shape: tuple[int, int],
    mode: str = "bicubic",
    num_extra_tokens: int = 1,
) -> Float[Array, "1 m c"]:
    """A position table resampled to another grid of patches, as PyTorch's `F.interpolate(align_corners=False)` does.

    Args:
        pos_embed: extra tokens first, then the patches in row-major order; interpolated in its own dtype.
        src_shape: its patches down and across.
        dst_shape: the wanted ones.
        mode: 'bicubic' or 'bilinear'.
        num_extra_tokens: how many first tokens stay as they are.

    Raises:
        ConfigError: unknown mode.
        ValueError: `pos_embed` does not have the stated number of tokens.
    """
    if mode not in _KERNELS:
        raise ConfigError(f"interpolate_mode: unknown mode {mode!r}.{nearest(mode, _KERNELS)}")
    (h, w), c = src_shape, pos_embed.shape[-1]
    if pos_embed.shape[1] != h * w + num_extra_tokens:
        raise ValueError(
            f"resize_pos_embed: {pos_embed.shape[1]} tokens are not {h}x{w} patches and {num_extra_tokens} extra tokens"
        )
    if tuple(src_shape) == tuple(dst_shape):
        return pos_embed
    extra, grid = pos_embed[:, :num_extra_tokens], pos_embed[:, num_extra_tokens:].reshape(h, w, c)
    down = jnp.asarray(_interpolation_matrix(h, dst_shape[0], mode), grid.dtype)
    across = jnp.asarray(_interpolation_matrix(w, dst_shape[1], mode), grid.dtype)
    grid = jnp.einsum("ih,hwc,jw->ijc", down, grid, across, precision="highest")
    return jnp.concatenate([extra, grid.reshape(1, -1, c)], axis=1)
