"""ShuffleNet: An Extremely Efficient CNN for Mobile Devices (Zhang et al., 2018, https://arxiv.org/abs/1707.01083)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxpretrain.build import ConfigError
from jaxpretrain.models.layers.activation import activation
from jaxpretrain.models.layers.arch import output_indices
from jaxpretrain.models.layers.base import BaseModule, freeze_first
from jaxpretrain.models.layers.conv import Conv2d, ConvModule, avg_pool2d, max_pool2d
from jaxpretrain.models.layers.init import normal
from jaxpretrain.models.layers.norm import BatchNorm, GroupNorm
from jaxpretrain.models.layers.se import make_divisible
from jaxpretrain.models.layers.stack import apply_stages

_BN, _RELU = {"type": "BN"}, {"type": "ReLU"}


def channel_shuffle(x: Float[Array, "*batch c"], groups: int) -> Float[Array, "*batch c"]:
    """Deals the channels out anew: the first of each group, the second of each group, ... (figure 1 of the paper)."""
    return x.reshape(*x.shape[:-1], groups, -1).swapaxes(-1, -2).reshape(x.shape)


def init_convolutions(model: nnx.Module, rngs: nnx.Rngs) -> None:
    """Normal kernels: std 0.01 in `conv1`, else 1 / (channels that an output sees); in place."""
    for path, layer in nnx.iter_modules(model):
        if isinstance(layer, Conv2d):
            shape, dtype = layer.kernel.shape, layer.kernel.dtype
            std = 0.01 if "conv1" in path else 1.0 / shape[2]
            layer.kernel.set_value(normal(std=std)(rngs.params(), shape, dtype))


class ShuffleUnit(BaseModule):
    """1x1 convolution in groups, shuffle, depthwise 3x3, and 1x1 in groups; added to the input or put beside it.

    Args:
        in_channels, out_channels: channels of input and output.
        groups: groups of the 1x1 convolutions.
        first_block: whether the first 1x1 convolution has one group, for an input of few channels.
        combine: 'add' for a shortcut; 'concat' to halve the image, with the pooled input beside the branch's output.
        conv_cfg, norm_cfg, act_cfg, norm_eval: of the convolutions, as for `ConvModule`.

    Raises:
        ConfigError: channels that the groups do not divide.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        groups: int = 3,
        first_block: bool = True,
        combine: str = "add",
        conv_cfg: Mapping[str, Any] | None = None,
        norm_cfg: Mapping[str, Any] = _BN,
        act_cfg: Mapping[str, Any] = _RELU,
        norm_eval: bool = False,
        *,
        rngs: nnx.Rngs,
    ):
        self.groups, self.halves, self.act = groups, combine == "concat", activation(act_cfg)
        mid, outs = out_channels // 4, out_channels - in_channels if self.halves else out_channels
        if in_channels % (1 if first_block else groups) or mid % groups or outs % groups:
            raise ConfigError(
                f"ShuffleUnit: {in_channels} to {out_channels} channels cannot be cut into {groups} equal groups"
            )
        args: dict[str, Any] = {"conv_cfg": conv_cfg, "norm_cfg": norm_cfg, "norm_eval": norm_eval, "rngs": rngs}
        self.g_conv_1x1_compress = ConvModule(
            in_channels, mid, 1, groups=1 if first_block else groups, act_cfg=act_cfg, **args
        )
        stride = 2 if self.halves else 1
        self.depthwise_conv3x3_bn = ConvModule(mid, mid, 3, stride, 1, groups=mid, act_cfg=None, **args)
        self.g_conv_1x1_expand = ConvModule(mid, outs, 1, groups=groups, act_cfg=None, **args)

    def __call__(self, x: Float[Array, "b h w in"], *, rngs: nnx.Rngs | None = None) -> Float[Array, "b h2 w2 out"]:
        # The paper shuffles before the depthwise convolution, MMPretrain after: a matter of its filters' order.
        y = channel_shuffle(self.depthwise_conv3x3_bn(self.g_conv_1x1_compress(x)), self.groups)
        y = self.g_conv_1x1_expand(y)
        return self.act(jnp.concatenate([avg_pool2d(x, 3, 2, 1), y], axis=-1) if self.halves else x + y)


class ShuffleNetV1(BaseModule):
    """ShuffleNet: [B, H, W, 3] -> a tuple of feature maps; the last is [B, H/32, W/32, 960] by default.

    Args:
        groups: groups of the 1x1 convolutions: 1, 2, 3, 4 or 8; the more, the wider at equal cost.
        widen_factor: multiplies all channels.
        out_indices: the stages whose outputs are returned, 0 to 2.
        frozen_stages: how many stages do not learn, with the first convolution; 0 is that alone, -1 none.
        conv_cfg, norm_cfg, act_cfg: of all convolutions, as for `ConvModule`.
        norm_eval: whether BatchNorms always use, and never change, their running statistics.
        with_cp: the same as `remat='full'`.
        init_cfg: initialisation, MMEngine's dictionaries, before ShuffleNet's own (see `init_weights`).

    Attributes:
        remat: what the backward pass recomputes: 'none', 'full' (all within a unit), 'dots' (all but convolutions).

    Raises:
        ConfigError: another number of groups, or stages that do not exist.
    """

    stage_blocks: ClassVar[Sequence[int]] = (4, 8, 4)
    channels_of_groups: ClassVar[dict[int, int]] = {1: 144, 2: 200, 3: 240, 4: 272, 8: 384}  # of the first stage

    def __init__(
        self,
        groups: int = 3,
        widen_factor: float = 1.0,
        out_indices: int | Sequence[int] = (2,),
        frozen_stages: int = -1,
        conv_cfg: Mapping[str, Any] | None = None,
        norm_cfg: Mapping[str, Any] = _BN,
        act_cfg: Mapping[str, Any] = _RELU,
        norm_eval: bool = False,
        with_cp: bool = False,
        init_cfg: Any = None,
        *,
        rngs: nnx.Rngs,
    ):
        if groups not in self.channels_of_groups:
            raise ConfigError(f"ShuffleNetV1: groups is one of {list(self.channels_of_groups)}, not {groups!r}")
        self.init_cfg, self.remat = init_cfg, "full" if with_cp else "none"
        self.out_indices = output_indices(out_indices, len(self.stage_blocks), "ShuffleNetV1")
        args: dict[str, Any] = {"conv_cfg": conv_cfg, "norm_cfg": norm_cfg, "act_cfg": act_cfg}
        args |= {"norm_eval": norm_eval, "rngs": rngs}

        channels = int(24 * widen_factor)
        self.conv1 = ConvModule(3, channels, 3, 2, 1, **args)
        stages = []
        for i, count in enumerate(self.stage_blocks):
            outs, units = make_divisible(2**i * self.channels_of_groups[groups] * widen_factor, 8), []
            for j in range(count):
                combine = "add" if j else "concat"
                units.append(ShuffleUnit(channels, outs, groups, i == j == 0, combine, **args))
                channels = outs
            stages.append(nnx.List(units))
        self.layers = nnx.List(stages)

        freeze_first([self.conv1, *self.layers], frozen_stages, "ShuffleNetV1")

    def init_weights(self, rngs: nnx.Rngs) -> None:
        """Normal kernels (see `init_convolutions`); norms start with scales of 1 and biases of 0.0001."""
        super().init_weights(rngs)
        init_convolutions(self, rngs)
        for _, layer in nnx.iter_modules(self):
            if isinstance(layer, BatchNorm | GroupNorm) and layer.scale is not None and layer.bias is not None:
                layer.scale.set_value(jnp.ones_like(layer.scale[...]))
                layer.bias.set_value(jnp.full_like(layer.bias[...], 1e-4))

    def __call__(
        self, x: Float[Array, "b h w 3"], *, rngs: nnx.Rngs | None = None
    ) -> tuple[Float[Array, "b h2 w2 c"], ...]:
        """The outputs of the stages in `out_indices`, in order."""
        x = max_pool2d(self.conv1(x), 3, 2, 1)
        return apply_stages(self.layers, x, self.out_indices, rngs=rngs, remat=self.remat)
