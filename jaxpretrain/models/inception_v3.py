"""Inception v3: Rethinking the Inception Architecture for Computer Vision (Szegedy et al., 2016,
https://arxiv.org/abs/1512.00567)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxpretrain.models.layers.base import BaseModule
from jaxpretrain.models.layers.conv import ConvModule, avg_pool2d, global_avg_pool, max_pool2d
from jaxpretrain.models.layers.drop import Dropout
from jaxpretrain.models.layers.linear import Linear
from jaxpretrain.models.layers.stack import apply_block

_BN = {"type": "BN", "eps": 1e-3}
_INIT = (
    {"type": "TruncNormal", "layer": ["Conv2d", "Linear"], "std": 0.1},
    {"type": "Constant", "layer": "BatchNorm2d", "val": 1},
)
_AUX_INIT = (
    {"type": "TruncNormal", "layer": "Conv2d", "std": 0.01},
    {"type": "TruncNormal", "layer": "Linear", "std": 0.001},
)


class Conv(NamedTuple):
    """A convolution of a branch: its channels, kernel (height, width), and stride. It is padded unless it strides."""

    channels: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1


# What a branch does, one after the other; a pair of convolutions is a fork, whose two outputs are joined.
Branch = Sequence[Conv | tuple[Conv, Conv]]
_1X7, _7X1, _1X3, _3X1, _3X3 = (1, 7), (7, 1), (1, 3), (3, 1), (3, 3)


def narrow(pooled: int) -> dict[str, Branch]:
    """The blocks on 35x35 (the paper's figure 5), with `pooled` channels from the pooling branch."""
    return {
        "branch1x1": [Conv(64)],
        "branch5x5": [Conv(48), Conv(64, (5, 5))],
        "branch3x3dbl": [Conv(64), Conv(96, _3X3), Conv(96, _3X3)],
        "branch_pool": [Conv(pooled)],
    }


def factorised(channels: int) -> dict[str, Branch]:
    """The blocks on 17x17 (figure 6): 7x7 as 1x7 and 7x1, of `channels` inside."""
    inner = [Conv(channels, _7X1), Conv(channels, _1X7), Conv(channels, _7X1)]
    return {
        "branch1x1": [Conv(192)],
        "branch7x7": [Conv(channels), Conv(channels, _1X7), Conv(192, _7X1)],
        "branch7x7dbl": [Conv(channels), *inner, Conv(192, _1X7)],
        "branch_pool": [Conv(192)],
    }


# From 35x35 to 17x17, from there to 8x8 (figure 10), and the blocks on 8x8 (figure 7).
TO_17: dict[str, Branch] = {
    "branch3x3": [Conv(384, _3X3, 2)],
    "branch3x3dbl": [Conv(64), Conv(96, _3X3), Conv(96, _3X3, 2)],
}
TO_8: dict[str, Branch] = {
    "branch3x3": [Conv(192), Conv(320, _3X3, 2)],
    "branch7x7x3": [Conv(192), Conv(192, _1X7), Conv(192, _7X1), Conv(192, _3X3, 2)],
}
FORKED: dict[str, Branch] = {
    "branch1x1": [Conv(320)],
    "branch3x3": [Conv(384), (Conv(384, _1X3), Conv(384, _3X1))],
    "branch3x3dbl": [Conv(448), Conv(384, _3X3), (Conv(384, _1X3), Conv(384, _3X1))],
    "branch_pool": [Conv(192)],
}
BLOCKS: dict[str, dict[str, Branch]] = {
    "Mixed_5b": narrow(32),
    "Mixed_5c": narrow(64),
    "Mixed_5d": narrow(64),
    "Mixed_6a": TO_17,
    "Mixed_6b": factorised(128),
    "Mixed_6c": factorised(160),
    "Mixed_6d": factorised(160),
    "Mixed_6e": factorised(192),
    "Mixed_7a": TO_8,
    "Mixed_7b": FORKED,
    "Mixed_7c": FORKED,
}


def convolution(in_channels: int, spec: Conv, rngs: nnx.Rngs) -> ConvModule:
    """The convolution with its norm and ReLU."""
    padding = (spec.kernel[0] // 2, spec.kernel[1] // 2) if spec.stride == 1 else 0
    return ConvModule(in_channels, spec.channels, spec.kernel, spec.stride, padding, norm_cfg=_BN, rngs=rngs)


class Inception(BaseModule):
    """Branches of convolutions side by side, their outputs joined.

    The branch `branch_pool` begins with average pooling, 3x3 of stride 1. A block without it halves the image: one more
    branch is max pooling, 3x3 of stride 2. The convolutions of a branch are attributes `NAME_1`, `NAME_2`, ... (`NAME_2a` and
    `NAME_2b` in a fork), or `NAME` if there is one only.

    Args:
        in_channels: channels of the input.
        branches: the convolutions of each branch.

    Attributes:
        out_channels: channels of the output.
    """

    def __init__(self, in_channels: int, branches: Mapping[str, Branch], *, rngs: nnx.Rngs):
        self.halves = "branch_pool" not in branches
        self.out_channels = in_channels if self.halves else 0
        names: list[list[tuple[str, ...]]] = []  # of each step of each branch
        for branch, steps in branches.items():
            names.append([])
            channels = in_channels
            for i, step in enumerate(steps, start=1):
                name = branch if len(steps) == 1 else f"{branch}_{i}"
                specs = [(name, step)] if isinstance(step, Conv) else [(name + "a", step[0]), (name + "b", step[1])]
                for attribute, spec in specs:
                    setattr(self, attribute, convolution(channels, spec, rngs))
                names[-1].append(tuple(attribute for attribute, _ in specs))
                channels = sum(spec.channels for _, spec in specs)
            self.out_channels += channels
        self.names = tuple(map(tuple, names))

    def __call__(self, x: Float[Array, "b h w in"], *, rngs: nnx.Rngs | None = None) -> Float[Array, "b h2 w2 out"]:
        outs = []
        for steps in self.names:
            y = avg_pool2d(x, 3, 1, 1) if steps[0] == ("branch_pool",) else x
            for fork in steps:
                y = jnp.concatenate([getattr(self, name)(y) for name in fork], axis=-1)
            outs.append(y)
        if self.halves:
            outs.append(max_pool2d(x, 3, 2))
        return jnp.concatenate(outs, axis=-1)


class InceptionAux(BaseModule):
    """The auxiliary classifier on maps of 17x17: pooling, two convolutions, and a linear layer.

    Args:
        in_channels: channels of the maps.
        num_classes: number of classes.
        init_cfg: initialisation, MMEngine's dictionaries.
    """

    def __init__(self, in_channels: int, num_classes: int, init_cfg: Any = _AUX_INIT, *, rngs: nnx.Rngs):
        self.init_cfg = init_cfg
        self.conv0 = ConvModule(in_channels, 128, 1, norm_cfg=_BN, rngs=rngs)
        self.conv1 = ConvModule(128, 768, 5, norm_cfg=_BN, rngs=rngs)
        self.fc = Linear(768, num_classes, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b classes"]:
        x = self.conv1(self.conv0(avg_pool2d(x, 5, 3)))
        return self.fc(global_avg_pool(x))


class InceptionV3(BaseModule):
    """Inception v3: [B, H, W, 3] -> (auxiliary logits or None, logits [B, num_classes]). It was made for 299x299 pixels.

    A `ClsHead` takes the second of the two, as MMPretrain's does: the auxiliary logits then have no loss, and what makes
    them does not learn. Losses on both are up to a head of one's own, which gets the pair.

    Args:
        num_classes: number of classes.
        aux_logits: whether there is an auxiliary classifier, `AuxLogits`; its logits are given in training only.
            Images then have 299 pixels or more; otherwise 75 are enough.
        dropout: probability of dropout before the last layer, in training.
        init_cfg: initialisation, MMEngine's dictionaries.

    Attributes:
        remat: what the backward pass recomputes: 'none', 'full' (all within a block), 'dots' (all but convolutions).
    """

    blocks: ClassVar[Mapping[str, Mapping[str, Branch]]] = BLOCKS

    def __init__(
        self,
        num_classes: int = 1000,
        aux_logits: bool = False,
        dropout: float = 0.5,
        init_cfg: Any = _INIT,
        *,
        rngs: nnx.Rngs,
    ):
        self.init_cfg, self.aux_logits, self.remat = init_cfg, aux_logits, "none"
        self.deterministic = False
        self.Conv2d_1a_3x3 = ConvModule(3, 32, 3, 2, norm_cfg=_BN, rngs=rngs)
        self.Conv2d_2a_3x3 = ConvModule(32, 32, 3, norm_cfg=_BN, rngs=rngs)
        self.Conv2d_2b_3x3 = ConvModule(32, 64, 3, padding=1, norm_cfg=_BN, rngs=rngs)
        self.Conv2d_3b_1x1 = ConvModule(64, 80, 1, norm_cfg=_BN, rngs=rngs)
        self.Conv2d_4a_3x3 = ConvModule(80, 192, 3, norm_cfg=_BN, rngs=rngs)
        channels = 192
        for name, branches in self.blocks.items():
            block = Inception(channels, branches, rngs=rngs)
            setattr(self, name, block)
            channels = block.out_channels
            if name == "Mixed_6e" and aux_logits:
                self.AuxLogits = InceptionAux(channels, num_classes, rngs=rngs)
        self.dropout = Dropout(dropout)
        self.fc = Linear(channels, num_classes, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b h w 3"], *, rngs: nnx.Rngs | None = None
    ) -> tuple[Float[Array, "b classes"] | None, Float[Array, "b classes"]]:
        """(auxiliary logits or None, logits). `rngs` is for dropout in training."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = max_pool2d(x, 3, 2)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = max_pool2d(x, 3, 2)
        aux = None
        for name in self.blocks:
            x = apply_block(getattr(self, name), x, rngs=rngs, remat=self.remat)
            if name == "Mixed_6e" and self.aux_logits and not self.deterministic:
                aux = self.AuxLogits(x)
        return aux, self.fc(self.dropout(global_avg_pool(x), rngs=rngs))
