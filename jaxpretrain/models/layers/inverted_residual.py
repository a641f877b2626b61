"""The blocks of mobile networks: wide inside, narrow at their ends (MobileNetV2, V3, EfficientNet and more)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from jaxpretrain.models.layers.base import BaseModule
from jaxpretrain.models.layers.conv import ConvModule
from jaxpretrain.models.layers.drop import drop_path
from jaxpretrain.models.layers.se import SELayer


class InvertedResidual(BaseModule):
    """Widening, depthwise convolution, squeeze-and-excitation, narrowing (Sandler et al., 2018; "MBConv").

    There is a shortcut where input and output have one shape.

    Args:
        in_channels, out_channels: channels of input and output.
        mid_channels: channels in between; where they are `in_channels`, nothing widens.
        kernel_size, stride: of the depthwise convolution.
        se_cfg: arguments of `SELayer`; None for none.
        conv_cfg, norm_cfg, act_cfg: of the convolutions, as for `ConvModule`; the last one has no activation.
        drop_path_rate: probability that a sample skips the block in training, where there is a shortcut.
        norm_eval: whether BatchNorm always uses its running statistics.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        mid_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        se_cfg: Mapping[str, Any] | None = None,
        conv_cfg: Mapping[str, Any] | None = None,
        norm_cfg: Mapping[str, Any] = {"type": "BN"},
        act_cfg: Mapping[str, Any] = {"type": "ReLU"},
        drop_path_rate: float = 0.0,
        norm_eval: bool = False,
        *,
        rngs: nnx.Rngs,
    ):
        self.has_shortcut = stride == 1 and in_channels == out_channels
        self.drop_path_rate, self.deterministic = drop_path_rate, False
        common: dict[str, Any] = {"conv_cfg": conv_cfg, "norm_cfg": norm_cfg, "norm_eval": norm_eval, "rngs": rngs}
        self.expand_conv = (
            None if mid_channels == in_channels else ConvModule(in_channels, mid_channels, 1, act_cfg=act_cfg, **common)
        )
        self.depthwise_conv = ConvModule(
            mid_channels,
            mid_channels,
            kernel_size,
            stride,
            kernel_size // 2,
            groups=mid_channels,
            act_cfg=act_cfg,
            **common,
        )
        self.se = SELayer(**se_cfg, rngs=rngs) if se_cfg else None
        self.linear_conv = ConvModule(mid_channels, out_channels, 1, act_cfg=None, **common)

    def __call__(self, x: Float[Array, "b h w in"], *, rngs: nnx.Rngs | None = None) -> Float[Array, "b h2 w2 out"]:
        y = x if self.expand_conv is None else self.expand_conv(x)
        y = self.depthwise_conv(y)
        y = self.linear_conv(y if self.se is None else self.se(y))
        if not self.has_shortcut:
            return y
        return x + (y if self.deterministic else drop_path(y, self.drop_path_rate, rngs))


class EdgeResidual(BaseModule):
    """An inverted residual whose widening and depthwise convolution are one dense convolution ("Fused-MBConv").

    From EfficientNet-EdgeTPU (Gupta & Akin, 2020). Arguments as of `InvertedResidual`, and

    Args:
        with_residual: whether to have a shortcut where input and output have one shape.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        mid_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        se_cfg: Mapping[str, Any] | None = None,
        with_residual: bool = True,
        conv_cfg: Mapping[str, Any] | None = None,
        norm_cfg: Mapping[str, Any] = {"type": "BN"},
        act_cfg: Mapping[str, Any] = {"type": "ReLU"},
        drop_path_rate: float = 0.0,
        norm_eval: bool = False,
        *,
        rngs: nnx.Rngs,
    ):
        self.has_shortcut = with_residual and stride == 1 and in_channels == out_channels
        self.drop_path_rate, self.deterministic = drop_path_rate, False
        common: dict[str, Any] = {"norm_cfg": norm_cfg, "norm_eval": norm_eval, "rngs": rngs}
        self.conv1 = ConvModule(
            in_channels,
            mid_channels,
            kernel_size,
            stride,
            kernel_size // 2,
            conv_cfg=conv_cfg,
            act_cfg=act_cfg,
            **common,
        )
        self.se = SELayer(**se_cfg, rngs=rngs) if se_cfg else None
        self.conv2 = ConvModule(mid_channels, out_channels, 1, act_cfg=None, **common)

    def __call__(self, x: Float[Array, "b h w in"], *, rngs: nnx.Rngs | None = None) -> Float[Array, "b h2 w2 out"]:
        y = self.conv1(x)
        y = self.conv2(y if self.se is None else self.se(y))
        if not self.has_shortcut:
            return y
        return x + (y if self.deterministic else drop_path(y, self.drop_path_rate, rngs))
