"""ResNeXt: Aggregated Residual Transformations (Xie et al., 2017, https://arxiv.org/abs/1611.05431)."""

from __future__ import annotations

from typing import Any, ClassVar

from jaxpretrain.build import ConfigError
from jaxpretrain.models.resnet import ResidualBlock, ResNet


class ResNeXt(ResNet):
    """ResNet of depth 50, 101 or 152 whose bottlenecks are wider inside, but convolve 3x3 in separate groups.

    Args:
        depth: number of layers with weights.
        groups: number of groups, the paper's cardinality.
        width_per_group: channels of a group in the first stage, if `base_channels` is 64; "32x4d" is
            `groups=32, width_per_group=4`. With one group it says nothing: the network is ResNet.
        kwargs: the other arguments of `ResNet`.
    """

    arch_settings: ClassVar[dict[int, tuple[type[ResidualBlock], tuple[int, ...]]]] = {
        depth: ResNet.arch_settings[depth] for depth in (50, 101, 152)
    }

    def __init__(self, depth: int, groups: int = 32, width_per_group: int = 4, **kwargs: Any):
        if groups < 1 or width_per_group < 1:
            raise ConfigError(
                f"{type(self).__name__}: groups={groups} and width_per_group={width_per_group} must be positive"
            )
        self.groups, self.width_per_group = groups, width_per_group
        super().__init__(depth, **kwargs)

    def block_args(self, channels: int) -> dict[str, Any]:
        args = super().block_args(channels)
        if self.groups == 1:
            return args
        width = self.groups * self.width_per_group * channels // self.base_channels
        return {**args, "mid_channels": width, "groups": self.groups}
