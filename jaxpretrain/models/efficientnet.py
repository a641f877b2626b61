"""EfficientNet: Rethinking Model Scaling for CNNs (Tan & Le, 2019, https://arxiv.org/abs/1905.11946).

One small network, and larger ones by making it wider and deeper together. The EdgeTPU variants (es, em, el) are of Gupta &
Akin (2020, https://arxiv.org/abs/2003.02838).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from jaxpretrain.build import ConfigError, nearest
from jaxpretrain.models.layers.base import BaseModule, freeze_stage
from jaxpretrain.models.layers.conv import ConvModule
from jaxpretrain.models.layers.inverted_residual import EdgeResidual, InvertedResidual
from jaxpretrain.models.layers.se import make_divisible
from jaxpretrain.models.layers.stack import apply_stages

_SAME = {"type": "Conv2dAdaptivePadding"}
_BN = {"type": "BN", "eps": 1e-3}
_SWISH = {"type": "Swish"}
_INIT = (
    {"type": "Kaiming", "layer": "Conv2d"},
    {"type": "Constant", "layer": ["_BatchNorm", "GroupNorm"], "val": 1},
)


class Group(NamedTuple):
    """Alike blocks in a row: a line of the paper's table 1. The stride is the first one's."""

    repeats: int
    kernel_size: int
    channels: int
    stride: int
    expansion: int
    fused: bool = False


class Family(NamedTuple):
    """A network before scaling: channels of the first and the last convolution, and the blocks between them.

    `se_ratio` is the squeezed part of a block's *input* channels; 0 for no squeeze and excitation.
    """

    stem: int
    groups: tuple[Group, ...]
    last: int
    se_ratio: float


FAMILIES = {
    "b": Family(
        32,
        (
            Group(1, 3, 16, 1, 1),
            Group(2, 3, 24, 2, 6),
            Group(2, 5, 40, 2, 6),
            Group(3, 3, 80, 2, 6),
            Group(3, 5, 112, 1, 6),
            Group(4, 5, 192, 2, 6),
            Group(1, 3, 320, 1, 6),
        ),
        1280,
        0.25,
    ),
    "e": Family(
        32,
        (
            Group(1, 3, 24, 1, 3, fused=True),
            Group(2, 3, 32, 2, 8, fused=True),
            Group(4, 3, 48, 2, 8, fused=True),
            Group(5, 5, 96, 2, 8),
            Group(4, 5, 144, 1, 8),
            Group(2, 5, 192, 2, 8),
        ),
        1280,
        0.0,
    ),
}


class EfficientNet(BaseModule):
    """EfficientNet: [B, H, W, 3] -> a tuple of feature maps; the last is [B, H/32, W/32, 1280] in b0.

    Args:
        arch: 'b0' to 'b8', 'l2'; 'es', 'em', 'el' for the EdgeTPU; or a dictionary with the fields of `Family`, where each
            of the groups has the values of a `Group`.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0 in the first.
        out_indices: the layers whose outputs are returned: 0 the first convolution, 1 to 5 the stages, 6 the last one.
            (A stage begins with a stride, but for the first; two groups may be in one.)
        frozen_stages: how many layers, from the first, do not learn.
        conv_cfg: by default, images are padded as TensorFlow does; None: by half of the kernel on each side.
        norm_cfg, act_cfg: norms and activations.
        norm_eval: whether BatchNorms always use, and never change, their running statistics.
        with_cp: the same as `remat='full'`.
        init_cfg: initialisation, MMEngine's dictionaries.

    Attributes:
        group_sizes: blocks of each group, of which a stage may have two.
        remat: what the backward pass recomputes: 'none', 'full' (all within a block), 'dots' (all but convolutions).
    """

    arch_settings: ClassVar[dict[str, tuple[float, float]]] = {  # width, depth
        "b0": (1.0, 1.0),
        "b1": (1.0, 1.1),
        "b2": (1.1, 1.2),
        "b3": (1.2, 1.4),
        "b4": (1.4, 1.8),
        "b5": (1.6, 2.2),
        "b6": (1.8, 2.6),
        "b7": (2.0, 3.1),
        "b8": (2.2, 3.6),
        "l2": (4.3, 5.3),
        "es": (1.0, 1.0),
        "em": (1.0, 1.1),
        "el": (1.2, 1.4),
    }

    def __init__(
        self,
        arch: str | Mapping[str, Any] = "b0",
        drop_path_rate: float = 0.0,
        out_indices: Sequence[int] = (6,),
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
        self.init_cfg, self.out_indices = init_cfg, tuple(out_indices)
        self.remat = "full" if with_cp else "none"
        family, width, depth = self._arch(arch)
        common: dict[str, Any] = {"conv_cfg": conv_cfg, "norm_cfg": norm_cfg, "act_cfg": act_cfg}
        common |= {"norm_eval": norm_eval, "rngs": rngs}

        stages = _stages(family.groups, depth)
        self.group_sizes = tuple(math.ceil(depth * group.repeats) for group in family.groups)
        rates = iter(np.linspace(0.0, drop_path_rate, sum(len(stage) for stage in stages)).tolist())
        channels = make_divisible(family.stem * width, 8)
        layers: list[Any] = [ConvModule(3, channels, 3, 2, 1, **common)]
        for i, stage in enumerate(stages):
            blocks = []
            for j, block in enumerate(stage):
                outs = make_divisible(block.channels * width, 8)
                # On the EdgeTPU the first stage starts over in each block, and these widen by 4 rather than 3.
                again = block.fused and i == 0 and j > 0
                mid = channels * (block.expansion + again)
                args = common | {
                    "drop_path_rate": next(rates),
                    "se_cfg": squeeze(channels, mid, family.se_ratio, act_cfg),
                }
                sizes = (channels, outs, mid, block.kernel_size, block.stride)
                blocks.append(
                    EdgeResidual(*sizes, with_residual=not again, **args)
                    if block.fused
                    else InvertedResidual(*sizes, **args)
                )
                channels = outs
            layers.append(nnx.List(blocks))
        layers.append(ConvModule(channels, make_divisible(family.last * width, 8), 1, **common))
        self.layers = nnx.List(layers)
        check_stages(self, frozen_stages)
        for layer in self.layers[:frozen_stages]:
            freeze_stage(layer)

    def _arch(self, arch: str | Mapping[str, Any]) -> tuple[Family, float, float]:
        """The family, and by what to multiply width and depth."""
        if not isinstance(arch, str):
            if set(arch) != set(Family._fields):
                raise ConfigError(f"EfficientNet: arch as a dictionary has {Family._fields}; got {tuple(arch)}")
            groups = tuple(Group(*group) for group in arch["groups"])
            return Family(**{**arch, "groups": groups}), 1.0, 1.0
        if arch not in self.arch_settings:
            raise ConfigError(f"EfficientNet has no arch {arch!r}.{nearest(arch, self.arch_settings)}")
        return FAMILIES["e" if arch[0] == "e" else "b"], *self.arch_settings[arch]

    def __call__(
        self, x: Float[Array, "b h w 3"], *, rngs: nnx.Rngs | None = None
    ) -> tuple[Float[Array, "b h2 w2 c"], ...]:
        """The outputs of the layers in `out_indices`, in order. `rngs` is for drop path in training."""
        return apply_stages(self.layers, x, self.out_indices, rngs=rngs, remat=self.remat)


def _stages(groups: Sequence[Group], depth: float) -> list[list[Group]]:
    """Single blocks, `depth` times as many (rounded up), in stages: each begins with a stride, but for the first."""
    stages: list[list[Group]] = []
    for group in groups:
        blocks = [group, *[group._replace(stride=1)] * (math.ceil(depth * group.repeats) - 1)]
        if stages and group.stride == 1:
            stages[-1] += blocks
        else:
            stages.append(blocks)
    return stages


def squeeze(ins: int, mid: int, ratio: float, act_cfg: Mapping[str, Any]) -> dict[str, Any] | None:
    """The arguments of a block's `SELayer`, whose squeezed channels are a part of the block's input channels."""
    if not ratio:
        return None
    return {"channels": mid, "squeeze_channels": max(1, int(ins * ratio)), "act_cfg": (act_cfg, {"type": "Sigmoid"})}


def check_stages(model: Any, frozen_stages: int) -> None:
    """Raises ConfigError unless `out_indices` and `frozen_stages` are among the layers."""
    name, count = type(model).__name__, len(model.layers)
    if not all(0 <= i < count for i in model.out_indices):
        raise ConfigError(f"{name}: out_indices {model.out_indices} must be in 0 ... {count - 1}")
    if not 0 <= frozen_stages <= count:
        raise ConfigError(f"{name}: frozen_stages is 0 (none) to {count}, not {frozen_stages}")
