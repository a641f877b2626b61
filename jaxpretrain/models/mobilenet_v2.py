"""MobileNetV2: Inverted Residuals and Linear Bottlenecks (Sandler et al., 2018, https://arxiv.org/abs/1801.04381)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from flax import nnx
from jaxtyping import Array, Float

from jaxpretrain.models.layers import inverted_residual
from jaxpretrain.models.layers.arch import check_frozen_stages, output_indices
from jaxpretrain.models.layers.base import BaseModule, freeze_stage
from jaxpretrain.models.layers.conv import ConvModule
from jaxpretrain.models.layers.se import make_divisible
from jaxpretrain.models.layers.stack import apply_block

_BN, _RELU6 = {"type": "BN"}, {"type": "ReLU6"}
INIT = (
    {"type": "Kaiming", "layer": ["Conv2d"]},
    {"type": "Constant", "val": 1, "layer": ["_BatchNorm", "GroupNorm"]},
)


class InvertedResidual(inverted_residual.InvertedResidual):
    """The inverted residual, which widens by a factor; its convolutions are `conv.0`, `conv.1`, ... in files.

    Args:
        in_channels, out_channels, stride: as of the shared block.
        expand_ratio: channels inside, as a multiple of `in_channels`; for 1, nothing widens.
        kwargs: the other arguments of the shared block.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, expand_ratio: float, **kwargs: Any):
        mid_channels = round(in_channels * expand_ratio)
        super().__init__(in_channels, out_channels, mid_channels, stride=stride, **kwargs)

    @property
    def state_names(self) -> dict[str, str]:  # type: ignore[override]  # without widening, they count from the next
        parts = ("expand_conv", "depthwise_conv", "linear_conv")[self.expand_conv is None :]
        return {part: f"conv.{i}" for i, part in enumerate(parts)}


class MobileNetV2(BaseModule):
    """MobileNetV2: [B, H, W, 3] -> a tuple of feature maps; the last is [B, H/32, W/32, 1280] by default.

    Args:
        widen_factor: multiplies all channels, rounded to multiples of 8; the last 1280 are never fewer.
        out_indices: the layers whose outputs are returned: 0 to 6 are the stages, 7 the last convolution.
        frozen_stages: how many stages do not learn, with the first convolution; 0 is that alone, -1 none.
        conv_cfg, norm_cfg, act_cfg: of all convolutions, as for `ConvModule`.
        norm_eval: whether BatchNorms always use, and never change, their running statistics.
        with_cp: the same as `remat='full'`.
        init_cfg: initialisation, MMEngine's dictionaries.

    Attributes:
        remat: what the backward pass recomputes: 'none', 'full' (all within a block), 'dots' (all but convolutions).

    Raises:
        ConfigError: layers that do not exist.
    """

    # Table 2 of the paper: how much blocks widen, channels, blocks, stride of the first.
    arch_settings: ClassVar[Sequence[tuple[int, int, int, int]]] = (
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    )

    def __init__(
        self,
        widen_factor: float = 1.0,
        out_indices: int | Sequence[int] = (7,),
        frozen_stages: int = -1,
        conv_cfg: Mapping[str, Any] | None = None,
        norm_cfg: Mapping[str, Any] = _BN,
        act_cfg: Mapping[str, Any] = _RELU6,
        norm_eval: bool = False,
        with_cp: bool = False,
        init_cfg: Any = INIT,
        *,
        rngs: nnx.Rngs,
    ):
        self.num_stages, self.init_cfg = len(self.arch_settings), init_cfg
        self.out_indices = output_indices(out_indices, self.num_stages + 1, "MobileNetV2")
        self.remat = "full" if with_cp else "none"
        args: dict[str, Any] = {"conv_cfg": conv_cfg, "norm_cfg": norm_cfg, "act_cfg": act_cfg}
        args |= {"norm_eval": norm_eval, "rngs": rngs}

        channels = make_divisible(32 * widen_factor, 8)
        self.conv1 = ConvModule(3, channels, 3, 2, 1, **args)
        for i, (ratio, width, count, first_stride) in enumerate(self.arch_settings, start=1):
            blocks = []
            for stride in (first_stride, *[1] * (count - 1)):
                outs = make_divisible(width * widen_factor, 8)
                blocks.append(InvertedResidual(channels, outs, stride, ratio, **args))
                channels = outs
            setattr(self, f"layer{i}", nnx.List(blocks))
        self.conv2 = ConvModule(channels, int(1280 * max(widen_factor, 1.0)), 1, **args)

        check_frozen_stages(frozen_stages, -1, self.num_stages, "MobileNetV2")
        if frozen_stages >= 0:
            freeze_stage(self.conv1)
        for i in range(1, frozen_stages + 1):
            freeze_stage(getattr(self, f"layer{i}"))

    def __call__(
        self, x: Float[Array, "b h w 3"], *, rngs: nnx.Rngs | None = None
    ) -> tuple[Float[Array, "b h2 w2 c"], ...]:
        """The outputs of the layers in `out_indices`, in order."""
        x = self.conv1(x)
        outs = []
        for i in range(self.num_stages):
            for block in getattr(self, f"layer{i + 1}"):
                x = apply_block(block, x, rngs=rngs, remat=self.remat)
            if i in self.out_indices:
                outs.append(x)
        if self.num_stages in self.out_indices:
            outs.append(self.conv2(x))
        return tuple(outs)
