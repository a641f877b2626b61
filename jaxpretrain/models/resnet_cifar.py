"""ResNet for 32x32 images (CIFAR): a 3x3 stem of stride 1, and no max-pooling."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from jaxpretrain.build import ConfigError
from jaxpretrain.models.layers.conv import Conv2d, relu
from jaxpretrain.models.layers.intermediates import record
from jaxpretrain.models.layers.norm import build_norm
from jaxpretrain.models.resnet import ResNet


class ResNet_CIFAR(ResNet):
    """ResNet with a 3x3 stem of stride 1 and no max-pooling, so that the last map has a stride of 8.

    Args:
        depth: 18, 34, 50, 101 or 152.
        deep_stem: must be False.
        kwargs: the other arguments of `ResNet`.
    """

    def __init__(self, depth: int, deep_stem: bool = False, **kwargs: Any):
        if deep_stem:
            raise ConfigError("ResNet_CIFAR has no deep stem; leave deep_stem=False, or use ResNet")
        super().__init__(depth, deep_stem=False, **kwargs)

    def _build_stem(
        self, in_channels: int, channels: int, norm_cfg: Mapping[str, Any], norm_eval: bool, rngs: nnx.Rngs
    ) -> None:
        self.conv1 = Conv2d(in_channels, channels, 3, 1, 1, bias=False, rngs=rngs)
        self.bn1 = build_norm(norm_cfg, channels, norm_eval=norm_eval, rngs=rngs)

    def _apply_stem(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c2"]:
        x = relu(self.bn1(self.conv1(x)))
        record(self, "stem", x)
        return x
