"""Res2Net: A New Multi-scale Backbone Architecture (Gao et al., 2021, https://arxiv.org/abs/1904.01169)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxpretrain.build import ConfigError
from jaxpretrain.models.layers.conv import Conv2d, avg_pool2d, relu
from jaxpretrain.models.layers.sequence import AvgPool2d
from jaxpretrain.models.resnet import Bottleneck, Norm, ResidualBlock, ResNet


class Bottle2neck(Bottleneck):
    """A bottleneck whose 3x3 convolution is a hierarchy: each part of the channels also sees what the part before it gave.

    Args:
        mid_channels: channels of each part.
        scales: number of parts. The last is not convolved.
        stride, avg_down, kwargs: as of `ResidualBlock`.

    Attributes:
        first: whether it is the first of a stage: then parts do not see each other, and the last is average-pooled.
    """

    def __init__(self, scales: int = 4, stride: int = 1, avg_down: bool = False, *, rngs: nnx.Rngs, **kwargs: Any):
        self.scales, self.first = scales, False
        super().__init__(stride=stride, avg_down=avg_down, rngs=rngs, **kwargs)
        if self.downsample is not None and avg_down and stride == 1:
            # Pooling of 1x1 does nothing, but counts in the names of what follows.
            self.downsample = nnx.List([AvgPool2d(1), *self.downsample])

    def build_branch(
        self,
        in_channels: int,
        layout: Sequence[tuple[int, int, int, int]],
        conv: Callable[..., Conv2d],
        norm: Callable[[int], Norm],
        groups: int,
        rngs: nnx.Rngs,
    ) -> None:
        """Sets `conv1`, `bn1`, the lists `convs` and `bns`, `conv3`, `bn3`."""
        (width, _, stride1, _), (_, _, self.stride, dilation), (outs, *_) = layout
        self.conv1, self.bn1 = conv(in_channels, width * self.scales, 1, stride1), norm(width * self.scales)
        convolved = range(self.scales - 1)
        self.convs = nnx.List([conv(width, width, 3, self.stride, dilation) for _ in convolved])
        self.bns = nnx.List([norm(width) for _ in convolved])
        self.conv3, self.bn3 = conv(width * self.scales, outs, 1, 1), norm(outs)

    def branch(self, x: Float[Array, "b h w in"]) -> Float[Array, "b h2 w2 out"]:
        """The convolutions and norms, with ReLU in between."""
        *parts, last = jnp.split(relu(self.bn1(self.conv1(x))), self.scales, axis=-1)
        outs: list[Array] = []
        for part, conv, norm in zip(parts, self.convs, self.bns, strict=True):
            seen = part if self.first or not outs else part + outs[-1]
            outs.append(relu(norm(conv(seen))))
        outs.append(avg_pool2d(last, 3, self.stride, 1) if self.first else last)
        return self.bn3(self.conv3(jnp.concatenate(outs, axis=-1)))


class Res2Net(ResNet):
    """Res2Net of depth 50, 101 or 152: [B, H, W, 3] -> a tuple of [B, H/s, W/s, C] feature maps.

    Unlike MMPretrain's, it drops paths where `drop_path_rate` says so.

    Args:
        scales: number of parts of the channels inside a block, 2 or more.
        base_width: channels of a part in the first stage, if `base_channels` is 64.
        style, deep_stem, avg_down, init_cfg, kwargs: as of `ResNet`. The published networks have neither deep stems nor
            average pooling, the defaults are those of their variant v1b.
    """

    arch_settings: ClassVar[dict[int, tuple[type[ResidualBlock], tuple[int, ...]]]] = {
        50: (Bottle2neck, (3, 4, 6, 3)),
        101: (Bottle2neck, (3, 4, 23, 3)),
        152: (Bottle2neck, (3, 8, 36, 3)),
    }

    def __init__(
        self,
        scales: int = 4,
        base_width: int = 26,
        style: str = "pytorch",
        deep_stem: bool = True,
        avg_down: bool = True,
        init_cfg: Any = None,
        **kwargs: Any,
    ):
        if scales < 2:
            raise ConfigError(f"Res2Net: scales={scales}, but below 2 it is a ResNet")
        self.scales, self.base_width = scales, base_width
        super().__init__(style=style, deep_stem=deep_stem, avg_down=avg_down, init_cfg=init_cfg, **kwargs)
        for i in range(self.num_stages):
            getattr(self, f"layer{i + 1}")[0].first = True

    def block_args(self, channels: int) -> dict[str, Any]:
        return {"mid_channels": channels * self.base_width // self.base_channels, "scales": self.scales}
