"""ShuffleNet V2: Practical Guidelines for Efficient CNN Design (Ma et al., 2018, https://arxiv.org/abs/1807.11164)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxpretrain.build import ConfigError
from jaxpretrain.models.layers.arch import output_indices
from jaxpretrain.models.layers.base import BaseModule, freeze_first
from jaxpretrain.models.layers.conv import ConvModule, max_pool2d
from jaxpretrain.models.layers.stack import apply_stages
from jaxpretrain.models.shufflenet_v1 import channel_shuffle, init_convolutions

_BN, _RELU = {"type": "BN"}, {"type": "ReLU"}


class ShuffleV2Block(BaseModule):
    """Half of the channels pass, the other half goes through three convolutions; then both are shuffled (figure 3).

    With a stride both halves of the output are made from the whole input.

    Args:
        in_channels, out_channels: channels of input and output; equal without a stride.
        stride: of the depthwise convolutions.
        args: of all convolutions (see `ConvModule`).
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, *, act_cfg: Mapping[str, Any], **args: Any):
        half = out_channels // 2
        ins = in_channels if stride > 1 else half

        def depthwise(channels: int) -> ConvModule:
            return ConvModule(channels, channels, 3, stride, 1, groups=channels, act_cfg=None, **args)

        def pointwise(ins: int) -> ConvModule:
            return ConvModule(ins, half, 1, act_cfg=act_cfg, **args)

        self.branch1 = nnx.List([depthwise(in_channels), pointwise(in_channels)]) if stride > 1 else None
        self.branch2 = nnx.List([pointwise(ins), depthwise(half), pointwise(half)])

    def __call__(self, x: Float[Array, "b h w in"], *, rngs: nnx.Rngs | None = None) -> Float[Array, "b h2 w2 out"]:
        one, other = (x, x) if self.branch1 is not None else jnp.split(x, 2, axis=-1)
        for layer in self.branch1 or ():
            one = layer(one)
        for layer in self.branch2:
            other = layer(other)
        return channel_shuffle(jnp.concatenate([one, other], axis=-1), 2)


class ShuffleNetV2(BaseModule):
    """ShuffleNet V2: [B, H, W, 3] -> a tuple of feature maps; the last is [B, H/32, W/32, 1024] by default.

    Args:
        widen_factor: 0.5, 1.0, 1.5 or 2.0; the widths are the paper's table 5.
        out_indices: the layers whose outputs are returned: 0 to 2 are the stages, 3 the last convolution.
        frozen_stages: how many of those layers do not learn, with the first convolution; 0 is that alone, -1 none.
        conv_cfg, norm_cfg, act_cfg: of all convolutions, as for `ConvModule`.
        norm_eval: whether BatchNorms always use, and never change, their running statistics.
        with_cp: the same as `remat='full'`.
        init_cfg: initialisation, MMEngine's dictionaries, before ShuffleNet's own (see `init_convolutions`).

    Attributes:
        remat: what the backward pass recomputes: 'none', 'full' (all within a block), 'dots' (all but convolutions).

    Raises:
        ConfigError: another width, or layers that do not exist.
    """

    stage_blocks: ClassVar[Sequence[int]] = (4, 8, 4)
    channels_of_width: ClassVar[dict[float, tuple[int, ...]]] = {
        0.5: (48, 96, 192, 1024),
        1.0: (116, 232, 464, 1024),
        1.5: (176, 352, 704, 1024),
        2.0: (244, 488, 976, 2048),
    }

    def __init__(
        self,
        widen_factor: float = 1.0,
        out_indices: int | Sequence[int] = (3,),
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
        if widen_factor not in self.channels_of_width:
            raise ConfigError(
                f"ShuffleNetV2: widen_factor is one of {list(self.channels_of_width)}, not {widen_factor!r}"
            )
        self.init_cfg, self.remat = init_cfg, "full" if with_cp else "none"
        self.out_indices = output_indices(out_indices, len(self.stage_blocks) + 1, "ShuffleNetV2")
        args: dict[str, Any] = {"conv_cfg": conv_cfg, "norm_cfg": norm_cfg, "act_cfg": act_cfg}
        args |= {"norm_eval": norm_eval, "rngs": rngs}

        channels, (*widths, last) = 24, self.channels_of_width[widen_factor]
        self.conv1 = ConvModule(3, channels, 3, 2, 1, **args)
        layers: list[Any] = []
        for width, count in zip(widths, self.stage_blocks, strict=True):
            first = ShuffleV2Block(channels, width, 2, **args)
            layers.append(nnx.List([first, *(ShuffleV2Block(width, width, 1, **args) for _ in range(count - 1))]))
            channels = width
        self.layers = nnx.List([*layers, ConvModule(channels, last, 1, **args)])

        freeze_first([self.conv1, *self.layers], frozen_stages, "ShuffleNetV2")

    def init_weights(self, rngs: nnx.Rngs) -> None:
        """Normal kernels: see `init_convolutions`."""
        super().init_weights(rngs)
        init_convolutions(self, rngs)

    def __call__(
        self, x: Float[Array, "b h w 3"], *, rngs: nnx.Rngs | None = None
    ) -> tuple[Float[Array, "b h2 w2 c"], ...]:
        """The outputs of the layers in `out_indices`, in order."""
        x = max_pool2d(self.conv1(x), 3, 2, 1)
        return apply_stages(self.layers, x, self.out_indices, rngs=rngs, remat=self.remat)
