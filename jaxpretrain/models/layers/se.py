"""Squeeze and excitation: channels weighted by what the whole image shows."""

from __future__ import annotations

import jax
from flax import nnx
from jaxtyping import Array, Float

from jaxpretrain.models.layers.base import BaseModule
from jaxpretrain.models.layers.conv import Conv2d, global_avg_pool, relu
from jaxpretrain.models.layers.intermediates import record


def make_divisible(value: float, divisor: int) -> int:
    """The multiple of `divisor` nearest to `value`, but at least one and not under 0.9 of it (MobileNet's widths)."""
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded if rounded >= 0.9 * value else rounded + divisor


class SELayer(BaseModule):
    """x * sigmoid(conv2(relu(conv1(mean of x)))), a factor for each image and channel (Hu et al., 2018, section 3).

    Args:
        channels: channels of input and output.
        squeeze_channels: channels in between; None: `channels // ratio`, rounded to a multiple of `divisor`.
        ratio, divisor: see `squeeze_channels`.
    """

    def __init__(
        self,
        channels: int,
        squeeze_channels: int | None = None,
        ratio: int = 16,
        divisor: int = 8,
        *,
        rngs: nnx.Rngs,
    ):
        squeezed = make_divisible(channels // ratio, divisor) if squeeze_channels is None else squeeze_channels
        self.conv1 = nnx.Dict(conv=Conv2d(channels, squeezed, 1, rngs=rngs))
        self.conv2 = nnx.Dict(conv=Conv2d(squeezed, channels, 1, rngs=rngs))

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        mean = global_avg_pool(x)[:, None, None]
        weights = jax.nn.sigmoid(self.conv2["conv"](relu(self.conv1["conv"](mean))))
        record(self, "weights", weights)
        return x * weights
