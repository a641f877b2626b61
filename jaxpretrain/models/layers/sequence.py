"""Layers that networks call by place, one after the other: their numbers are parts of names, so pooling counts as well."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from jaxpretrain.models.layers.conv import avg_pool2d, max_pool2d
from jaxpretrain.models.layers.drop import Dropout
from jaxpretrain.models.layers.intermediates import record


class MaxPool2d(nnx.Module):
    """`max_pool2d` as a layer without parameters; the same arguments."""

    def __init__(self, kernel_size: int, stride: int | None = None, padding: int = 0, ceil_mode: bool = False):
        self.kernel_size, self.stride, self.padding, self.ceil_mode = kernel_size, stride, padding, ceil_mode

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
        return max_pool2d(x, self.kernel_size, self.stride, self.padding, self.ceil_mode)


class AvgPool2d(nnx.Module):
    """`avg_pool2d` as a layer without parameters; the same arguments."""

    def __init__(
        self,
        kernel_size: int,
        stride: int | None = None,
        padding: int = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
    ):
        self.kernel_size, self.stride, self.padding = kernel_size, stride, padding
        self.ceil_mode, self.count_include_pad = ceil_mode, count_include_pad

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
        return avg_pool2d(x, self.kernel_size, self.stride, self.padding, self.ceil_mode, self.count_include_pad)


def apply_sequence(layers: Iterable[Any], x: Array, *, rngs: nnx.Rngs | None = None) -> Array:
    """`layers` one after the other; the output of each is recorded as `out`. `rngs` is for those that drop."""
    for layer in layers:
        x = layer(x, rngs=rngs) if isinstance(layer, Dropout) else layer(x)
        record(layer, "out", x)
    return x


def flatten(x: Float[Array, "b h w c"]) -> Float[Array, "b chw"]:
    """Maps as vectors, in PyTorch's order: channel, row, column. Linear layers on them have weights in that order."""
    return x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1)
