"""Squeeze and excitation: channels weighted by what the whole image shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from jaxpretrain.models.layers.base import BaseModule
from jaxpretrain.models.layers.conv import ConvModule, global_avg_pool
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
        bias: whether the convolutions have one; 'auto' is yes.
        conv_cfg: accepted for MMPretrain's configs.
        act_cfg: the activations after the first and the second, or one for both.
        return_weight: give the factors [b, 1, 1, c] alone.
    """

    def __init__(
        self,
        channels: int,
        squeeze_channels: int | None = None,
        ratio: int = 16,
        divisor: int = 8,
        bias: bool | str = "auto",
        conv_cfg: Mapping[str, Any] | None = None,
        act_cfg: Mapping[str, Any] | Sequence[Mapping[str, Any]] = ({"type": "ReLU"}, {"type": "Sigmoid"}),
        return_weight: bool = False,
        *,
        rngs: nnx.Rngs,
    ):
        squeezed = make_divisible(channels // ratio, divisor) if squeeze_channels is None else squeeze_channels
        acts = (act_cfg, act_cfg) if isinstance(act_cfg, Mapping) else act_cfg
        self.conv1 = ConvModule(channels, squeezed, 1, bias=bool(bias), act_cfg=acts[0], rngs=rngs)
        self.conv2 = ConvModule(squeezed, channels, 1, bias=bool(bias), act_cfg=acts[1], rngs=rngs)
        self.return_weight = return_weight

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        weights = self.conv2(self.conv1(global_avg_pool(x)[:, None, None]))
        record(self, "weights", weights)
        return weights if self.return_weight else x * weights
