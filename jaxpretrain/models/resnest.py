"""ResNeSt: Split-Attention Networks (Zhang et al., 2022, https://arxiv.org/abs/2004.08955)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxpretrain.models.layers.base import BaseModule
from jaxpretrain.models.layers.conv import Conv2d, avg_pool2d, relu
from jaxpretrain.models.resnet import Bottleneck, Norm, ResidualBlock, ResNetV1d


class SplitAttentionConv2d(BaseModule):
    """`radix` 3x3 convolutions side by side, added up with weights that depend on the image and the channel.

    The weights are of a small network on the mean over positions, and sum to 1 over the splits (equation 2); with one split
    it is a gate, the logistic function.

    Args:
        in_channels, channels: channels of input and output.
        stride, dilation: of the convolution.
        groups: number of groups of channels, the paper's cardinality; within each, there are `radix` splits.
        radix: number of splits.
        reduction_factor: how many times fewer channels the small network has inside than all splits have, 32 at least.
        norm: makes a norm for a number of channels.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        radix: int = 2,
        reduction_factor: int = 4,
        *,
        norm: Callable[[int], Norm],
        rngs: nnx.Rngs,
    ):
        self.groups, self.radix = groups, radix
        inside = max(in_channels * radix // reduction_factor, 32)
        splits = channels * radix
        self.conv = Conv2d(
            in_channels, splits, 3, stride, dilation, dilation, groups=groups * radix, bias=False, rngs=rngs
        )
        self.bn0 = norm(splits)
        self.fc1 = Conv2d(channels, inside, 1, groups=groups, rngs=rngs)
        self.bn1 = norm(inside)
        self.fc2 = Conv2d(inside, splits, 1, groups=groups, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w in"]) -> Float[Array, "b h2 w2 out"]:
        x = relu(self.bn0(self.conv(x)))
        splits = x.reshape(*x.shape[:3], self.radix, -1)  # a channel's splits are far apart: radix is the slower axis
        accurate = jnp.promote_types(x.dtype, jnp.float32)
        mean = splits.sum(axis=3, dtype=accurate).mean(axis=(1, 2), keepdims=True).astype(x.dtype)
        logits = self.fc2(relu(self.bn1(self.fc1(mean)))).astype(accurate)
        weights = self._weights(logits[:, 0, 0]).astype(x.dtype)
        return (splits * weights[:, None, None]).sum(axis=3)

    def _weights(self, logits: Float[Array, "b c"]) -> Float[Array, "b r c2"]:
        """From logits in the order group, split, channel, of `fc2`'s groups."""
        if self.radix == 1:
            return jax.nn.sigmoid(logits)[:, None]
        logits = logits.reshape(len(logits), self.groups, self.radix, -1).swapaxes(1, 2)
        return jax.nn.softmax(logits, axis=1).reshape(len(logits), self.radix, -1)


class ResNeStBottleneck(Bottleneck):
    """A bottleneck whose 3x3 convolution is split, with attention; where it strides, it does so by pooling behind that.

    Args:
        radix, reduction_factor: as of `SplitAttentionConv2d`.
        avg_down_stride: whether average pooling, 3x3, strides instead of the convolution.
        kwargs: the other arguments of `ResidualBlock`.
    """

    def __init__(
        self, radix: int = 2, reduction_factor: int = 4, avg_down_stride: bool = True, *, rngs: nnx.Rngs, **kwargs: Any
    ):
        self.radix, self.reduction_factor, self.avg_down_stride = radix, reduction_factor, avg_down_stride
        super().__init__(rngs=rngs, **kwargs)

    def build_branch(
        self,
        in_channels: int,
        layout: Sequence[tuple[int, int, int, int]],
        conv: Callable[..., Conv2d],
        norm: Callable[[int], Norm],
        groups: int,
        rngs: nnx.Rngs,
    ) -> None:
        """Sets `conv1`, `bn1`, `conv2` (with norms of its own), `conv3`, `bn3`."""
        (mid, _, stride1, _), (_, _, stride, dilation), (outs, *_) = layout
        self.pool_stride = stride if self.avg_down_stride else 1
        self.conv1, self.bn1 = conv(in_channels, mid, 1, stride1), norm(mid)
        self.conv2 = SplitAttentionConv2d(
            mid,
            mid,
            stride // self.pool_stride,
            dilation,
            groups,
            self.radix,
            self.reduction_factor,
            norm=norm,
            rngs=rngs,
        )
        self.conv3, self.bn3 = conv(mid, outs, 1, 1), norm(outs)

    def branch(self, x: Float[Array, "b h w in"]) -> Float[Array, "b h2 w2 out"]:
        """The convolutions and norms, with ReLU in between."""
        x = self.conv2(relu(self.bn1(self.conv1(x))))
        if self.pool_stride > 1:
            x = avg_pool2d(x, 3, self.pool_stride, 1)
        return self.bn3(self.conv3(x))


class ResNeSt(ResNetV1d):
    """ResNeSt of depth 50, 101, 152, 200 or 269: [B, H, W, 3] -> a tuple of [B, H/s, W/s, C] feature maps.

    Unlike MMPretrain's, it drops paths where `drop_path_rate` says so.

    Args:
        depth: number of layers with weights.
        groups: number of groups of the 3x3 convolutions.
        width_per_group: channels of a group in the first stage, if `base_channels` is 64. With one group it says nothing.
        radix: number of splits in each group.
        reduction_factor: how many times fewer channels the attentions have inside than all splits.
        avg_down_stride: whether blocks stride by average pooling instead of their 3x3 convolution.
        kwargs: the other arguments of `ResNet`; the published networks from depth 101 on have `stem_channels=128`.
    """

    arch_settings: ClassVar[dict[int, tuple[type[ResidualBlock], tuple[int, ...]]]] = {
        50: (ResNeStBottleneck, (3, 4, 6, 3)),
        101: (ResNeStBottleneck, (3, 4, 23, 3)),
        152: (ResNeStBottleneck, (3, 8, 36, 3)),
        200: (ResNeStBottleneck, (3, 24, 36, 3)),
        269: (ResNeStBottleneck, (3, 30, 48, 8)),
    }

    def __init__(
        self,
        depth: int,
        groups: int = 1,
        width_per_group: int = 4,
        radix: int = 2,
        reduction_factor: int = 4,
        avg_down_stride: bool = True,
        **kwargs: Any,
    ):
        self.groups, self.width_per_group, self.radix = groups, width_per_group, radix
        self.reduction_factor, self.avg_down_stride = reduction_factor, avg_down_stride
        super().__init__(depth=depth, **kwargs)

    def block_args(self, channels: int) -> dict[str, Any]:
        width = channels if self.groups == 1 else self.groups * self.width_per_group * channels // self.base_channels
        return {
            "mid_channels": width,
            "groups": self.groups,
            "radix": self.radix,
            "reduction_factor": self.reduction_factor,
            "avg_down_stride": self.avg_down_stride,
        }
