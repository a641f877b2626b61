"""RegNet: Designing Network Design Spaces (Radosavovic et al., 2020, https://arxiv.org/abs/2003.13678)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from jaxpretrain.build import ConfigError
from jaxpretrain.models.layers.arch import architecture
from jaxpretrain.models.layers.conv import Conv2d, relu
from jaxpretrain.models.layers.intermediates import record
from jaxpretrain.models.layers.norm import build_norm
from jaxpretrain.models.resnet import Bottleneck, ResNet

_BN = {"type": "BN", "requires_grad": True}


class Stage(NamedTuple):
    """Alike blocks: how many, the channels they give, and inside them, the channels of a group and all channels."""

    blocks: int
    width: int
    group_width: int
    mid: int


def stages_of(w0: int, wa: float, wm: float, depth: int, group_w: int, bot_mul: float) -> list[Stage]:
    """The stages of a RegNet: widths of blocks that grow linearly (equation 2), brought to powers (3, 4), counted.

    Args:
        w0: width of the first block, a multiple of 8.
        wa: by how much each block is wider than the one before.
        wm: neighbouring stages' ratio of widths, above 1.
        depth: number of blocks.
        group_w: channels of a group of the 3x3 convolutions; widths are made multiples of it.
        bot_mul: channels inside a block over those that it gives.
    """
    if w0 <= 0 or w0 % 8 or wa < 0 or wm <= 1:
        raise ConfigError(f"RegNet: w0={w0} must be a multiple of 8, wa={wa} at least 0, wm={wm} above 1")
    linear = w0 + wa * np.arange(depth)
    powers = np.round(np.log(linear / w0) / np.log(wm))
    widths, counts = np.unique(np.round(w0 * wm**powers / 8) * 8, return_counts=True)
    stages = []
    for width, blocks in zip(widths.tolist(), counts.tolist(), strict=True):
        mid = int(width * bot_mul)
        group = min(group_w, mid)
        mid = round(mid / group) * group
        stages.append(Stage(blocks, int(mid / bot_mul), group, mid))
    return stages


class RegNet(ResNet):
    """RegNet: [B, H, W, in_channels] -> a tuple of [B, H/s, W/s, C] feature maps; the last has s = 32.

    Bottlenecks whose widths a few numbers give, behind a 3x3 convolution of stride 2; there is no max pooling.

    Args:
        arch: 'regnetx_400mf', 'regnetx_800mf', 'regnetx_1.6gf', 'regnetx_3.2gf', 'regnetx_4.0gf', 'regnetx_6.4gf',
            'regnetx_8.0gf', 'regnetx_12gf', or a dictionary with the arguments of `stages_of`.
        in_channels: channels of the images.
        stem_channels: channels after the stem.
        base_channels: accepted for MMPretrain's configs; it says nothing there either.
        strides, dilations: of each stage.
        out_indices, style, avg_down, frozen_stages, conv_cfg, norm_cfg, norm_eval, with_cp, zero_init_residual, init_cfg:
            as of `ResNet`.
        deep_stem: must be False.

    Attributes:
        remat: what the backward pass recomputes: 'none', 'full' (all within a block), 'dots' (all but convolutions).

    Raises:
        ConfigError: an arch, stage or style that does not exist.
    """

    archs: ClassVar[dict[tuple[str, ...], dict[str, Any]]] = {
        ("regnetx_400mf",): {"w0": 24, "wa": 24.48, "wm": 2.54, "group_w": 16, "depth": 22, "bot_mul": 1.0},
        ("regnetx_800mf",): {"w0": 56, "wa": 35.73, "wm": 2.28, "group_w": 16, "depth": 16, "bot_mul": 1.0},
        ("regnetx_1.6gf",): {"w0": 80, "wa": 34.01, "wm": 2.25, "group_w": 24, "depth": 18, "bot_mul": 1.0},
        ("regnetx_3.2gf",): {"w0": 88, "wa": 26.31, "wm": 2.25, "group_w": 48, "depth": 25, "bot_mul": 1.0},
        ("regnetx_4.0gf",): {"w0": 96, "wa": 38.65, "wm": 2.43, "group_w": 40, "depth": 23, "bot_mul": 1.0},
        ("regnetx_6.4gf",): {"w0": 184, "wa": 60.83, "wm": 2.07, "group_w": 56, "depth": 17, "bot_mul": 1.0},
        ("regnetx_8.0gf",): {"w0": 80, "wa": 49.56, "wm": 2.88, "group_w": 120, "depth": 23, "bot_mul": 1.0},
        ("regnetx_12gf",): {"w0": 168, "wa": 73.36, "wm": 2.37, "group_w": 112, "depth": 19, "bot_mul": 1.0},
    }

    def __init__(
        self,
        arch: str | Mapping[str, Any],
        in_channels: int = 3,
        stem_channels: int = 32,
        base_channels: int = 32,
        strides: Sequence[int] = (2, 2, 2, 2),
        dilations: Sequence[int] = (1, 1, 1, 1),
        out_indices: Sequence[int] = (3,),
        style: str = "pytorch",
        deep_stem: bool = False,
        avg_down: bool = False,
        frozen_stages: int = -1,
        conv_cfg: Mapping[str, Any] | None = None,
        norm_cfg: Mapping[str, Any] = _BN,
        norm_eval: bool = False,
        with_cp: bool = False,
        zero_init_residual: bool = True,
        init_cfg: Any = None,
        *,
        rngs: nnx.Rngs,
    ):
        if deep_stem:
            raise ConfigError("RegNet has no deep stem; leave deep_stem=False")
        self.init_cfg, self.out_indices = init_cfg, tuple(out_indices)
        self.deep_stem, self.zero_init_residual = False, zero_init_residual
        self.remat = "full" if with_cp else "none"
        stages = stages_of(**architecture(arch, self.archs, "RegNet"))
        self.num_stages, self.depth = len(stages), sum(stage.blocks for stage in stages)
        self._check(strides, dilations, style, frozen_stages)

        self._build_stem(in_channels, stem_channels, norm_cfg, norm_eval, rngs)
        ins = stem_channels
        for i, stage in enumerate(stages):
            blocks = []
            for j in range(stage.blocks):
                blocks.append(
                    Bottleneck(
                        in_channels=ins,
                        out_channels=stage.width,
                        mid_channels=stage.mid,
                        stride=strides[i] if j == 0 else 1,
                        dilation=dilations[i],
                        style=style,
                        avg_down=avg_down,
                        norm_cfg=norm_cfg,
                        norm_eval=norm_eval,
                        groups=stage.mid // stage.group_width,
                        rngs=rngs,
                    )
                )
                ins = stage.width
            setattr(self, f"layer{i + 1}", nnx.List(blocks))
        self._freeze(frozen_stages)

    def _build_stem(
        self, in_channels: int, channels: int, norm_cfg: Mapping[str, Any], norm_eval: bool, rngs: nnx.Rngs
    ) -> None:
        self.conv1 = Conv2d(in_channels, channels, 3, 2, 1, bias=False, rngs=rngs)
        self.bn1 = build_norm(norm_cfg, channels, norm_eval=norm_eval, rngs=rngs)

    def _apply_stem(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        x = relu(self.bn1(self.conv1(x)))
        record(self, "stem", x)
        return x
