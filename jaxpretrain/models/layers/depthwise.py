"""Depthwise convolution for XLA:CPU: as a sum over the kernel's taps.

XLA:CPU has no kernel of its own for it. On maps of 56x56 pixels and 96 channels its convolution took 20 to 30 times as much CPU
time as a sum over taps, its gradients 4 to 5 times (7x7 and 3x3 kernels).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

_UNROLLED = 49  # taps; with more, the rows of the kernel are a loop, for the sake of compile time
_TOGETHER = 9  # the same for the kernel's gradient


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def depthwise_by_taps(
    x: Float[Array, "b h w c"],
    kernel: Float[Array, "kh kw 1 c"],
    stride: tuple[int, int],
    padding: tuple[tuple[int, int], tuple[int, int]],
    dilation: tuple[int, int],
) -> Float[Array, "b h2 w2 c"]:
    """The convolution; sums are in float32 at least.

    Args:
        x, kernel: images, and one filter for each channel.
        stride, dilation: (vertical, horizontal).
        padding: pixels (above, below), (left, right); negative ones are cut off.
    """
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return _sum_over_taps(_pad(x, padding).astype(wide), kernel.astype(wide), stride, dilation).astype(x.dtype)


def _pad(x: Array, padding: tuple[tuple[int, int], tuple[int, int]], holes: tuple[int, int] = (0, 0)) -> Array:
    config = [(0, 0, 0), *((*pads, hole) for pads, hole in zip(padding, holes, strict=True)), (0, 0, 0)]
    return lax.pad(x, jnp.zeros((), x.dtype), config)


def _size(length: int, taps: int, stride: int, dilation: int) -> int:
    return (length - (taps - 1) * dilation - 1) // stride + 1


def _shifted(x: Array, j: int, width: int, stride: int, dilation: int) -> Array:
    """What tap `j` of a row sees: [b, h, width, c]."""
    return lax.slice_in_dim(x, j * dilation, j * dilation + stride * (width - 1) + 1, stride, axis=2)


def _row(x: Array, i: int | Array, height: int, stride: int, dilation: int) -> Array:
    """What row `i` of the kernel sees: [b, height, w, c]. `i` may be a loop's counter."""
    rows = lax.dynamic_slice_in_dim(x, i * dilation, stride * (height - 1) + 1, axis=1)
    return rows[:, ::stride]


def _sum_over_taps(x: Array, kernel: Array, stride: tuple[int, int], dilation: tuple[int, int]) -> Array:
    kh, kw = kernel.shape[:2]
    height, width = (_size(x.shape[axis + 1], (kh, kw)[axis], stride[axis], dilation[axis]) for axis in (0, 1))

    def add_row(y: Array, i: int | Array) -> Array:
        rows, taps = _row(x, i, height, stride[0], dilation[0]), lax.dynamic_index_in_dim(kernel, i, keepdims=False)
        for j in range(kw):
            y = y + _shifted(rows, j, width, stride[1], dilation[1]) * taps[j, 0]
        return y

    y = jnp.zeros((x.shape[0], height, width, x.shape[-1]), x.dtype)
    if kh * kw > _UNROLLED:
        return lax.scan(lambda y, i: (add_row(y, i), None), y, jnp.arange(kh))[0]
    for i in range(kh):
        y = add_row(y, i)
    return y


def _forward(x: Array, kernel: Array, stride, padding, dilation) -> tuple[Array, tuple[Array, Array]]:
    return depthwise_by_taps(x, kernel, stride, padding, dilation), (x, kernel)


def _backward(stride, padding, dilation, saved: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, kernel = saved
    wide = jnp.promote_types(x.dtype, jnp.float32)
    gradient = gradient.astype(wide)
    kh, kw = kernel.shape[:2]
    # Of the images: the gradient with its holes of the stride, convolved with the kernel upside down.
    sides = []
    for axis, taps in ((0, kh), (1, kw)):
        reach = (taps - 1) * dilation[axis]
        covered = (gradient.shape[axis + 1] - 1) * stride[axis] + 1
        before = reach - padding[axis][0]
        sides.append((before, x.shape[axis + 1] + reach - before - covered))
    spread = _pad(gradient, (sides[0], sides[1]), (stride[0] - 1, stride[1] - 1))
    of_x = _sum_over_taps(spread, kernel[::-1, ::-1].astype(wide), (1, 1), dilation)

    # Of the kernel: line by line of the images, the products of each tap are added up where they lie, and summed at the end.
    # Sums over several lines at once XLA:CPU does not vectorise; they took up to three times as long.
    padded = _pad(x, padding).astype(wide)
    height, width = gradient.shape[1:3]

    def of_rows(rows: Sequence[int | Array]) -> Array:
        def add_line(sums: tuple[Array, ...], r: Array) -> tuple[tuple[Array, ...], None]:
            line_of_gradient = lax.dynamic_slice_in_dim(gradient, r, 1, axis=1)
            lines = [lax.dynamic_slice_in_dim(padded, r * stride[0] + i * dilation[0], 1, axis=1) for i in rows]
            seen = (_shifted(line, j, width, stride[1], dilation[1]) for line in lines for j in range(kw))
            return tuple(total + pixels * line_of_gradient for total, pixels in zip(sums, seen, strict=True)), None

        zeros = jnp.zeros((x.shape[0], 1, width, x.shape[-1]), wide)
        sums = lax.scan(add_line, (zeros,) * (len(rows) * kw), jnp.arange(height))[0]
        return jnp.stack([total.sum((0, 1, 2)) for total in sums]).reshape(len(rows), kw, -1)

    if kh * kw > _TOGETHER:
        of_kernel = lax.scan(lambda _, i: (None, of_rows([i])[0]), None, jnp.arange(kh))[1]
    else:
        of_kernel = of_rows(range(kh))
    return of_x.astype(x.dtype), of_kernel[:, :, None].astype(kernel.dtype)


depthwise_by_taps.defvjp(_forward, _backward)
