"""DenseNet: Densely Connected Convolutional Networks (Huang et al., 2017, https://arxiv.org/abs/1608.06993)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxpretrain.build import ConfigError
from jaxpretrain.models.layers.activation import activation
from jaxpretrain.models.layers.arch import architecture, output_indices
from jaxpretrain.models.layers.base import BaseModule, freeze_stage
from jaxpretrain.models.layers.conv import Conv2d, avg_pool2d, max_pool2d
from jaxpretrain.models.layers.drop import Dropout
from jaxpretrain.models.layers.intermediates import record
from jaxpretrain.models.layers.norm import build_norm
from jaxpretrain.models.layers.stack import apply_block

_BN = {"type": "BN"}
_RELU = {"type": "ReLU"}


class DenseLayer(BaseModule):
    """`growth_rate` new channels from all that came before: norm, activation, 1x1 convolution; the same with 3x3.

    Args:
        in_channels: channels of the input.
        growth_rate: channels of the output.
        bn_size: how many times more channels there are between the convolutions.
        drop_rate: dropout of the output in training.
        norm_cfg, act_cfg: norms and activations.
    """

    def __init__(
        self,
        in_channels: int,
        growth_rate: int,
        bn_size: int = 4,
        drop_rate: float = 0.0,
        norm_cfg: Mapping[str, Any] = _BN,
        act_cfg: Mapping[str, Any] = _RELU,
        *,
        rngs: nnx.Rngs,
    ):
        mid = bn_size * growth_rate
        self.norm1 = build_norm(norm_cfg, in_channels, rngs=rngs)
        self.conv1 = Conv2d(in_channels, mid, 1, bias=False, rngs=rngs)
        self.norm2 = build_norm(norm_cfg, mid, rngs=rngs)
        self.conv2 = Conv2d(mid, growth_rate, 3, padding=1, bias=False, rngs=rngs)
        self.act = activation(act_cfg)
        self.dropout = Dropout(drop_rate)

    def __call__(self, x: Float[Array, "b h w in"], *, rngs: nnx.Rngs | None = None) -> Float[Array, "b h w growth"]:
        x = self.conv1(self.act(self.norm1(x)))
        x = self.conv2(self.act(self.norm2(x)))
        return self.dropout(x, rngs=rngs)


class DenseBlock(BaseModule):
    """`block`, layers of which each sees the outputs of all before it; what comes out is the input and all of them.

    Args:
        num_layers: number of layers.
        in_channels: channels of the input.
        growth_rate: channels that each layer adds.
        kwargs: the other arguments of `DenseLayer`.
    """

    def __init__(self, num_layers: int, in_channels: int, growth_rate: int, **kwargs: Any):
        channels = range(in_channels, in_channels + num_layers * growth_rate, growth_rate)
        self.block = nnx.List([DenseLayer(ins, growth_rate, **kwargs) for ins in channels])

    def __call__(
        self, x: Float[Array, "b h w in"], *, rngs: nnx.Rngs | None = None, remat: str = "none"
    ) -> Float[Array, "b h w out"]:
        for layer in self.block:
            x = jnp.concatenate([x, apply_block(layer, x, rngs=rngs, remat=remat)], axis=-1)
        return x


class Transition(BaseModule):
    """Between two dense blocks: norm, activation, a 1x1 convolution to fewer channels, and pooling 2x2."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        norm_cfg: Mapping[str, Any] = _BN,
        act_cfg: Mapping[str, Any] = _RELU,
        *,
        rngs: nnx.Rngs,
    ):
        self.norm = build_norm(norm_cfg, in_channels, rngs=rngs)
        self.act = activation(act_cfg)
        self.conv = Conv2d(in_channels, out_channels, 1, bias=False, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w in"]) -> Float[Array, "b h2 w2 out"]:
        return avg_pool2d(self.conv(self.act(self.norm(x))), 2)


class DenseNet(BaseModule):
    """DenseNet: [B, H, W, in_channels] -> a tuple of maps; the last is [B, H/32, W/32, 1024] for arch '121'.

    Args:
        arch: '121', '169', '201', '161', or a dictionary with `growth_rate`, `depths` (layers of each block) and
            `init_channels` (channels after the stem).
        in_channels: channels of the images.
        bn_size: how many times more channels there are between a layer's convolutions than it adds.
        drop_rate: dropout of each layer's output in training.
        compression_factor: the part of the channels that transitions keep.
        memory_efficient: the same as `remat='full'`.
        norm_cfg, act_cfg: norms and activations.
        out_indices: the stages whose outputs are returned, each a dense block and the transition behind it; one index or
            several, negative ones count from the end.
        frozen_stages: how many stages do not learn. The stem before them does.
        init_cfg: initialisation, MMEngine's dictionaries.

    Attributes:
        remat: what the backward pass recomputes: 'none', 'full' (all within a layer), 'dots' (all but convolutions).

    Raises:
        ConfigError: an arch or stage that does not exist.
    """

    arch_settings: ClassVar[dict[tuple[str, ...], dict[str, Any]]] = {
        ("121",): {"growth_rate": 32, "depths": (6, 12, 24, 16), "init_channels": 64},
        ("169",): {"growth_rate": 32, "depths": (6, 12, 32, 32), "init_channels": 64},
        ("201",): {"growth_rate": 32, "depths": (6, 12, 48, 32), "init_channels": 64},
        ("161",): {"growth_rate": 48, "depths": (6, 12, 36, 24), "init_channels": 96},
    }

    def __init__(
        self,
        arch: str | Mapping[str, Any] = "121",
        in_channels: int = 3,
        bn_size: int = 4,
        drop_rate: float = 0,
        compression_factor: float = 0.5,
        memory_efficient: bool = False,
        norm_cfg: Mapping[str, Any] = _BN,
        act_cfg: Mapping[str, Any] = _RELU,
        out_indices: int | Sequence[int] = -1,
        frozen_stages: int = 0,
        init_cfg: Any = None,
        *,
        rngs: nnx.Rngs,
    ):
        self.init_cfg = init_cfg
        self.remat = "full" if memory_efficient else "none"
        numbers = architecture(arch, self.arch_settings, "DenseNet")
        growth, depths, channels = numbers["growth_rate"], numbers["depths"], numbers["init_channels"]
        self.out_indices = output_indices(out_indices, len(depths), "DenseNet")
        if not 0 <= frozen_stages <= len(depths):
            raise ConfigError(f"DenseNet: frozen_stages is 0 (none) to {len(depths)}, not {frozen_stages}")
        self.act = activation(act_cfg)

        common: dict[str, Any] = {"norm_cfg": norm_cfg, "act_cfg": act_cfg, "rngs": rngs}
        stem = Conv2d(in_channels, channels, 7, 2, 3, bias=False, rngs=rngs)
        self.stem = nnx.List([stem, build_norm(norm_cfg, channels, rngs=rngs)])
        stages: list[DenseBlock] = []
        transitions: list[Any] = []
        for i, depth in enumerate(depths):
            stages.append(DenseBlock(depth, channels, growth, bn_size=bn_size, drop_rate=drop_rate, **common))
            channels += depth * growth
            if i < len(depths) - 1:
                kept = math.floor(channels * compression_factor)
                transitions.append(Transition(channels, kept, **common))
                channels = kept
            else:  # the last is the norm before the classifier
                transitions.append(nnx.List([build_norm(norm_cfg, channels, rngs=rngs)]))
        self.stages, self.transitions = nnx.List(stages), nnx.List(transitions)
        for part in (*self.stages[:frozen_stages], *self.transitions[:frozen_stages]):
            freeze_stage(part).set_attributes(Dropout, rate=0.0, raise_if_not_found=False)

    def __call__(
        self, x: Float[Array, "b h w c"], *, rngs: nnx.Rngs | None = None
    ) -> tuple[Float[Array, "b h2 w2 c2"], ...]:
        """Maps of the stages in `out_indices`, in order. `rngs` is for dropout in training."""
        conv, norm = self.stem
        x = self.act(norm(conv(x)))
        record(self, "stem", x)
        x = max_pool2d(x, 3, 2, 1)
        outs = []
        for i, (stage, transition) in enumerate(zip(self.stages, self.transitions, strict=True)):
            x = stage(x, rngs=rngs, remat=self.remat)
            x = transition(x) if isinstance(transition, Transition) else self.act(transition[0](x))
            if i in self.out_indices:
                outs.append(x)
        return tuple(outs)
