"""SE-ResNet and SE-ResNeXt: Squeeze-and-Excitation Networks (Hu et al., 2018, https://arxiv.org/abs/1709.01507)."""

from __future__ import annotations

from typing import Any, ClassVar

from flax import nnx
from jaxtyping import Array, Float

from jaxpretrain.models.layers.se import SELayer
from jaxpretrain.models.resnet import Bottleneck, ResidualBlock, ResNet
from jaxpretrain.models.resnext import ResNeXt


class SEBottleneck(Bottleneck):
    """A bottleneck whose branch ends in squeeze and excitation, `se_layer`.

    Args:
        out_channels: channels of the output.
        se_ratio: how many times fewer channels the excitation has inside.
        kwargs: the other arguments of `ResidualBlock`.
    """

    def __init__(self, *, out_channels: int, se_ratio: int = 16, rngs: nnx.Rngs, **kwargs: Any):
        super().__init__(out_channels=out_channels, rngs=rngs, **kwargs)
        self.se_layer = SELayer(out_channels, ratio=se_ratio, rngs=rngs)

    def branch(self, x: Float[Array, "b h w in"]) -> Float[Array, "b h2 w2 out"]:
        return self.se_layer(super().branch(x))


class SEResNet(ResNet):
    """ResNet of depth 50, 101 or 152 with squeeze and excitation in every block.

    Unlike MMPretrain's, it drops paths where `drop_path_rate` says so.

    Args:
        depth: number of layers with weights.
        se_ratio: how many times fewer channels the excitations have inside.
        kwargs: the other arguments of `ResNet`.
    """

    arch_settings: ClassVar[dict[int, tuple[type[ResidualBlock], tuple[int, ...]]]] = {
        depth: (SEBottleneck, ResNet.arch_settings[depth][1]) for depth in (50, 101, 152)
    }

    def __init__(self, depth: int, se_ratio: int = 16, **kwargs: Any):
        self.se_ratio = se_ratio
        super().__init__(depth, **kwargs)

    def block_args(self, channels: int) -> dict[str, Any]:
        return {**super().block_args(channels), "se_ratio": self.se_ratio}


class SEResNeXt(SEResNet, ResNeXt):
    """ResNeXt of depth 50, 101 or 152 with squeeze and excitation in every block.

    Unlike MMPretrain's, which always has 16, it heeds `se_ratio`.

    Args:
        depth: number of layers with weights.
        groups, width_per_group: as of `ResNeXt`.
        kwargs: the other arguments of `SEResNet`.
    """

    def __init__(self, depth: int, groups: int = 32, width_per_group: int = 4, **kwargs: Any):
        super().__init__(depth, groups=groups, width_per_group=width_per_group, **kwargs)
