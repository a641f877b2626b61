"""EfficientNetV2: Smaller Models and Faster Training (Tan & Le, 2021, https://arxiv.org/abs/2104.00298).

Its early stages have dense convolutions in place of depthwise ones, which accelerators run faster.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from jaxpretrain.build import ConfigError, nearest
from jaxpretrain.models.efficientnet import check_stages, squeeze
from jaxpretrain.models.layers.base import BaseModule, freeze_stage
from jaxpretrain.models.layers.conv import ConvModule
from jaxpretrain.models.layers.drop import drop_path
from jaxpretrain.models.layers.inverted_residual import EdgeResidual, InvertedResidual
from jaxpretrain.models.layers.stack import apply_stages

_SAME = {"type": "Conv2dAdaptivePadding"}
_BN = {"type": "BN", "eps": 1e-3, "momentum": 0.1}
_SWISH = {"type": "Swish"}
_INIT = (
    {"type": "Kaiming", "layer": "Conv2d"},
    {"type": "Constant", "layer": ["_BatchNorm", "GroupNorm"], "val": 1},
)


class EnhancedConvModule(ConvModule):
    """A 3x3 convolution with norm and activation, and a shortcut where input and output have one shape.

    Args:
        drop_path_rate: probability that a sample takes the shortcut alone in training.
        in_channels, out_channels, stride, kwargs: as of `ConvModule`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        drop_path_rate: float = 0.0,
        *,
        rngs: nnx.Rngs,
        **kwargs: Any,
    ):
        super().__init__(in_channels, out_channels, 3, stride, 1, rngs=rngs, **kwargs)
        self.has_shortcut = stride == 1 and in_channels == out_channels
        self.drop_path_rate, self.deterministic = drop_path_rate, False

    def __call__(self, x: Float[Array, "b h w in"], *, rngs: nnx.Rngs | None = None) -> Float[Array, "b h2 w2 out"]:
        y = super().__call__(x)
        if not self.has_shortcut:
            return y
        return x + (y if self.deterministic else drop_path(y, self.drop_path_rate, rngs))


class Stage(NamedTuple):
    """A line of the paper's table 4. `kind`: 'conv', 'fused' (EdgeResidual), or 'mb' (InvertedResidual, squeezed to 1/4)."""

    kind: str
    repeats: int
    stride: int
    expansion: int
    channels: int


# Of all sizes, in order; the small ones have no last stage.
_STAGES = [("conv", 1, 1), ("fused", 2, 4), ("fused", 2, 4), ("mb", 2, 4), ("mb", 1, 6), ("mb", 2, 6), ("mb", 1, 6)]


def _arch(stem: int, last: int, repeats: Sequence[int], channels: Sequence[int]) -> dict[str, Any]:
    stages = [
        Stage(kind, n, stride, expansion, width)
        for (kind, stride, expansion), n, width in zip(_STAGES, repeats, channels, strict=False)
    ]
    return {"stem_channels": stem, "stages": stages, "out_channels": last}


_SMALL = _arch(24, 1280, (2, 4, 4, 6, 9, 15), (24, 48, 64, 128, 160, 256))
_MEDIUM = _arch(24, 1280, (3, 5, 5, 7, 14, 18, 5), (24, 48, 80, 160, 176, 304, 512))
_LARGE = _arch(32, 1280, (4, 7, 7, 10, 19, 25, 7), (32, 64, 96, 192, 224, 384, 640))


class EfficientNetV2(BaseModule):
    """EfficientNetV2: [B, H, W, in_channels] -> a tuple of feature maps; the last is [B, H/32, W/32, 1280] in s to xl.

    Args:
        arch: 's', 'm', 'l' ('small', 'medium', 'large'), 'xl', 'b0' to 'b3'; or a dictionary with `stem_channels`,
            `stages` (a list of `Stage`, or of their five values), and `out_channels`.
        in_channels: channels of the images.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0 in the first.
        out_indices: the layers whose outputs are returned: 0 is the first convolution, -1 the last one.
        frozen_stages: how many layers, from the first, do not learn.
        conv_cfg: by default, images are padded as TensorFlow does; None: by one pixel on each side. (MMPretrain then does
            not pad for the first convolution.)
        norm_cfg, act_cfg: norms and activations.
        norm_eval: whether BatchNorms always use, and never change, their running statistics.
        with_cp: the same as `remat='full'`.
        init_cfg: initialisation, MMEngine's dictionaries.

    Attributes:
        remat: what the backward pass recomputes: 'none', 'full' (all within a block), 'dots' (all but convolutions).
    """

    arch_settings: ClassVar[dict[str, dict[str, Any]]] = {
        **dict.fromkeys(("s", "small"), _SMALL),
        **dict.fromkeys(("m", "medium"), _MEDIUM),
        **dict.fromkeys(("l", "large"), _LARGE),
        "xl": _arch(32, 1280, (4, 8, 8, 16, 24, 32, 8), (32, 64, 96, 192, 256, 512, 640)),
        "b0": _arch(32, 1280, (1, 2, 2, 3, 5, 8), (16, 32, 48, 96, 112, 192)),
        "b1": _arch(32, 1280, (2, 3, 3, 4, 6, 9), (16, 32, 48, 96, 112, 192)),
        "b2": _arch(32, 1408, (2, 3, 3, 4, 6, 10), (16, 32, 56, 104, 120, 208)),
        "b3": _arch(40, 1536, (2, 3, 3, 5, 7, 12), (16, 40, 56, 112, 136, 232)),
    }

    def __init__(
        self,
        arch: str | Mapping[str, Any] = "s",
        in_channels: int = 3,
        drop_path_rate: float = 0.0,
        out_indices: int | Sequence[int] = (-1,),
        frozen_stages: int = 0,
        conv_cfg: Mapping[str, Any] | None = _SAME,
        norm_cfg: Mapping[str, Any] = _BN,
        act_cfg: Mapping[str, Any] = _SWISH,
        norm_eval: bool = False,
        with_cp: bool = False,
        init_cfg: Any = _INIT,
        *,
        rngs: nnx.Rngs,
    ):
        self.init_cfg, self.remat = init_cfg, "full" if with_cp else "none"
        if isinstance(arch, str):
            if arch not in self.arch_settings:
                raise ConfigError(f"EfficientNetV2 has no arch {arch!r}.{nearest(arch, self.arch_settings)}")
            arch = self.arch_settings[arch]
        if missing := {"stem_channels", "stages", "out_channels"} - set(arch):
            raise ConfigError(f"EfficientNetV2: arch lacks {sorted(missing)}")
        common: dict[str, Any] = {"norm_cfg": norm_cfg, "act_cfg": act_cfg, "norm_eval": norm_eval, "rngs": rngs}

        stages = [Stage(*stage) for stage in arch["stages"]]
        rates = iter(np.linspace(0.0, drop_path_rate, sum(stage.repeats for stage in stages)).tolist())
        channels = arch["stem_channels"]
        layers: list[Any] = [ConvModule(in_channels, channels, 3, 2, 1, conv_cfg=conv_cfg, **common)]
        for stage in stages:
            blocks = []
            for i in range(stage.repeats):
                stride = stage.stride if i == 0 else 1
                args = common | {"drop_path_rate": next(rates)}
                args |= {"conv_cfg": conv_cfg if stride == 2 else None}  # without a stride, both pad alike
                blocks.append(_block(stage, channels, stride, args))
                channels = stage.channels
            layers.append(nnx.List(blocks))
        layers.append(ConvModule(channels, arch["out_channels"], 1, conv_cfg=conv_cfg, **common))
        self.layers = nnx.List(layers)

        indices = (out_indices,) if isinstance(out_indices, int) else out_indices
        self.out_indices = tuple(i + len(layers) if i < 0 else i for i in indices)
        check_stages(self, frozen_stages)
        for layer in self.layers[:frozen_stages]:
            freeze_stage(layer)

    def __call__(
        self, x: Float[Array, "b h w c"], *, rngs: nnx.Rngs | None = None
    ) -> tuple[Float[Array, "b h2 w2 c2"], ...]:
        """The outputs of the layers in `out_indices`, in order. `rngs` is for drop path in training."""
        return apply_stages(self.layers, x, self.out_indices, rngs=rngs, remat=self.remat)


def _block(stage: Stage, ins: int, stride: int, args: dict[str, Any]) -> Any:
    if stage.kind == "conv":
        return EnhancedConvModule(ins, stage.channels, stride, **args)
    mid = ins * stage.expansion
    if stage.kind == "fused":
        return EdgeResidual(ins, stage.channels, mid, stride=stride, **args)
    if stage.kind != "mb":
        raise ConfigError(f"EfficientNetV2: a stage is 'conv', 'fused' or 'mb', not {stage.kind!r}")
    return InvertedResidual(
        ins, stage.channels, mid, stride=stride, se_cfg=squeeze(ins, mid, 0.25, args["act_cfg"]), **args
    )
