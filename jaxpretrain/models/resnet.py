"""ResNet: Deep Residual Learning for Image Recognition (He et al., 2016, https://arxiv.org/abs/1512.03385).

With the variants of Bag of Tricks for Image Classification (He et al., 2019, https://arxiv.org/abs/1812.01187): V1b
strides in the 3x3 convolution (`style='pytorch'`), V1c has a deep stem, V1d also average-pools in the shortcut.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from jaxpretrain.build import ConfigError
from jaxpretrain.models.layers.base import BaseModule, freeze_stage
from jaxpretrain.models.layers.conv import Conv2d, ConvModule, max_pool2d, relu
from jaxpretrain.models.layers.drop import drop_path
from jaxpretrain.models.layers.intermediates import record
from jaxpretrain.models.layers.norm import BatchNorm, GroupNorm, LayerNorm, build_norm
from jaxpretrain.models.layers.sequence import AvgPool2d
from jaxpretrain.models.layers.stack import apply_block

Norm = BatchNorm | LayerNorm | GroupNorm

_BN = {"type": "BN", "requires_grad": True}
_INIT = (
    {"type": "Kaiming", "layer": ["Conv2d"]},
    {"type": "Constant", "val": 1, "layer": ["_BatchNorm", "GroupNorm"]},
)


class ResidualBlock(BaseModule):
    """relu(branch(x) + shortcut(x)): what the two kinds of blocks share.

    Args:
        in_channels, out_channels: channels of input and output.
        mid_channels: channels inside the branch.
        stride, dilation: of the branch's (first) 3x3 convolution.
        style: where a bottleneck strides: in its 3x3 convolution ('pytorch') or its first 1x1 ('caffe').
        avg_down: whether the shortcut strides by average pooling.
        norm_cfg, norm_eval: the norms, as for `build_norm`.
        drop_path_rate: probability that a sample skips the branch in training.
        groups: of the branch's 3x3 convolutions.
    """

    default_expansion: ClassVar[int]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        mid_channels: int,
        stride: int = 1,
        dilation: int = 1,
        style: str = "pytorch",
        avg_down: bool = False,
        norm_cfg: Mapping[str, Any] = _BN,
        norm_eval: bool = False,
        drop_path_rate: float = 0.0,
        groups: int = 1,
        *,
        rngs: nnx.Rngs,
    ):
        self.drop_path_rate = drop_path_rate
        self.deterministic = False

        def conv(ins: int, outs: int, size: int, stride: int, dilation: int = 1) -> Conv2d:
            padding, parts = dilation * (size // 2), 1 if size == 1 else groups
            return Conv2d(ins, outs, size, stride, padding, dilation, parts, bias=False, rngs=rngs)

        def norm(channels: int) -> Norm:
            return build_norm(norm_cfg, channels, norm_eval=norm_eval, rngs=rngs)

        layout = self.layout(mid_channels, out_channels, stride, dilation, style)
        self.num_convs = len(layout)
        self.build_branch(in_channels, layout, conv, norm, groups, rngs)
        if stride == 1 and in_channels == out_channels:
            self.downsample = None
        else:
            pool = [AvgPool2d(stride, ceil_mode=True, count_include_pad=False)] if avg_down and stride != 1 else []
            project = conv(in_channels, out_channels, 1, 1 if pool else stride)
            self.downsample = nnx.List([*pool, project, norm(out_channels)])

    @staticmethod
    def layout(mid: int, outs: int, stride: int, dilation: int, style: str) -> list[tuple[int, int, int, int]]:
        """The branch's convolutions: (channels, kernel size, stride, dilation) of each."""
        raise NotImplementedError

    def build_branch(
        self,
        in_channels: int,
        layout: Sequence[tuple[int, int, int, int]],
        conv: Callable[..., Conv2d],
        norm: Callable[[int], Norm],
        groups: int,
        rngs: nnx.Rngs,
    ) -> None:
        """Sets what `branch` applies: `conv1`, `bn1`, `conv2`, ...; the scale of the last norm may start as zero.

        Args:
            in_channels: channels of the input.
            layout: what `layout` gives.
            conv: makes a convolution without bias of (channels in, out, kernel size, stride, dilation).
            norm: makes a norm for a number of channels.
            groups: of 3x3 convolutions; those that `conv` makes have them.
            rngs: for other layers.
        """
        for i, (outs, size, stride, dilation) in enumerate(layout, start=1):
            setattr(self, f"conv{i}", conv(in_channels, outs, size, stride, dilation))
            setattr(self, f"bn{i}", norm(outs))
            in_channels = outs

    def __call__(self, x: Float[Array, "b h w in"], *, rngs: nnx.Rngs | None = None) -> Float[Array, "b h2 w2 out"]:
        shortcut = x
        for layer in self.downsample or ():
            shortcut = layer(shortcut)
        y = self.branch(x)
        if not self.deterministic:
            y = drop_path(y, self.drop_path_rate, rngs)
        return relu(y + shortcut)

    def branch(self, x: Float[Array, "b h w in"]) -> Float[Array, "b h2 w2 out"]:
        """The convolutions and norms, with ReLU in between."""
        for i in range(1, self.num_convs + 1):
            x = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(x))
            x = relu(x) if i < self.num_convs else x
        return x


class BasicBlock(ResidualBlock):
    """Two 3x3 convolutions (ResNet-18 and 34)."""

    default_expansion = 1

    @staticmethod
    def layout(mid: int, outs: int, stride: int, dilation: int, style: str) -> list[tuple[int, int, int, int]]:
        return [(mid, 3, stride, dilation), (outs, 3, 1, 1)]


class Bottleneck(ResidualBlock):
    """1x1, 3x3 and 1x1 convolutions, the first of which narrows and the last widens (ResNet-50 and deeper)."""

    default_expansion = 4

    @staticmethod
    def layout(mid: int, outs: int, stride: int, dilation: int, style: str) -> list[tuple[int, int, int, int]]:
        stride1, stride2 = (stride, 1) if style == "caffe" else (1, stride)
        return [(mid, 1, stride1, 1), (mid, 3, stride2, dilation), (outs, 1, 1, 1)]


class ResNet(BaseModule):
    """ResNet of depth 18, 34, 50, 101 or 152: [B, H, W, in_channels] -> a tuple of [B, H/s, W/s, C] feature maps.

    The last map has s = 32 and, with the default widths, C = 512 (depths 18 and 34) or 2048.

    Args:
        depth: number of layers with weights.
        in_channels: channels of the images.
        stem_channels: channels after the stem.
        base_channels: channels inside the blocks of the first stage; each further stage doubles them.
        expansion: output channels of a block over those inside it; None is 1 for basic blocks, 4 for bottlenecks.
        num_stages: number of stages, 1 to 4.
        strides, dilations: of each stage.
        out_indices: the stages whose outputs are returned, from 0.
        style: 'pytorch' puts a bottleneck's stride into its 3x3 convolution, 'caffe' into its first 1x1.
        deep_stem: whether the stem is three 3x3 convolutions instead of one 7x7.
        avg_down: whether shortcuts stride by average pooling before their 1x1 convolution.
        frozen_stages: how many stages do not learn: weights and running statistics stay; 0 is the stem alone, -1 none.
        conv_cfg: accepted for MMPretrain's configs; there is one kind of convolution.
        norm_cfg: the norms, as for `build_norm`.
        norm_eval: whether BatchNorms always use, and never change, their running statistics.
        with_cp: the same as `remat='full'`.
        zero_init_residual: whether `init_weights` makes every block start as its shortcut.
        init_cfg: initialisation, MMEngine's dictionaries.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0 in the first.

    Attributes:
        remat: what the backward pass recomputes: 'none', 'full' (all within a block), 'dots' (all but convolutions).

    Raises:
        ConfigError: a depth, stage, style or list of another length that does not exist.
    """

    arch_settings: ClassVar[dict[int, tuple[type[ResidualBlock], tuple[int, ...]]]] = {
        18: (BasicBlock, (2, 2, 2, 2)),
        34: (BasicBlock, (3, 4, 6, 3)),
        50: (Bottleneck, (3, 4, 6, 3)),
        101: (Bottleneck, (3, 4, 23, 3)),
        152: (Bottleneck, (3, 8, 36, 3)),
    }

    def __init__(
        self,
        depth: int,
        in_channels: int = 3,
        stem_channels: int = 64,
        base_channels: int = 64,
        expansion: int | None = None,
        num_stages: int = 4,
        strides: Sequence[int] = (1, 2, 2, 2),
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
        init_cfg: Any = _INIT,
        drop_path_rate: float = 0.0,
        *,
        rngs: nnx.Rngs,
    ):
        self.init_cfg = init_cfg
        self.depth, self.num_stages, self.out_indices = depth, num_stages, tuple(out_indices)
        self.base_channels, self.deep_stem, self.zero_init_residual = base_channels, deep_stem, zero_init_residual
        self.remat = "full" if with_cp else "none"
        if depth not in self.arch_settings:
            name = type(self).__name__
            raise ConfigError(f"{name} has no depth {depth!r}; its depths are {sorted(self.arch_settings)}")
        self._check(strides, dilations, style, frozen_stages)

        self._build_stem(in_channels, stem_channels, norm_cfg, norm_eval, rngs)
        block, sizes = self.arch_settings[depth]
        sizes = sizes[:num_stages]
        expansion = expansion or block.default_expansion
        rates = iter(np.linspace(0.0, drop_path_rate, sum(sizes)).tolist())
        ins, channels = stem_channels, base_channels
        for i, size in enumerate(sizes):
            stage = []
            for j in range(size):
                stage.append(
                    block(
                        in_channels=ins,
                        out_channels=channels * expansion,
                        stride=strides[i] if j == 0 else 1,
                        dilation=dilations[i],
                        style=style,
                        avg_down=avg_down,
                        norm_cfg=norm_cfg,
                        norm_eval=norm_eval,
                        drop_path_rate=next(rates),
                        rngs=rngs,
                        **self.block_args(channels),
                    )
                )
                ins = channels * expansion
            setattr(self, f"layer{i + 1}", nnx.List(stage))
            channels *= 2
        self._freeze(frozen_stages)

    def block_args(self, channels: int) -> dict[str, Any]:
        """What sets the variants' blocks apart, in a stage of `channels`: `base_channels`, doubled from stage to stage."""
        return {"mid_channels": channels}

    def _check(self, strides: Sequence[int], dilations: Sequence[int], style: str, frozen_stages: int) -> None:
        name, stages = type(self).__name__, self.num_stages
        if not 1 <= stages <= 4:
            raise ConfigError(f"{name}: num_stages is 1 to 4, not {stages}")
        if len(strides) != stages or len(dilations) != stages:
            raise ConfigError(f"{name}: strides {strides} and dilations {dilations} need num_stages={stages} entries")
        if not all(0 <= i < stages for i in self.out_indices):
            raise ConfigError(f"{name}: out_indices {self.out_indices} must be in 0 ... {stages - 1}")
        if not -1 <= frozen_stages <= stages:
            raise ConfigError(f"{name}: frozen_stages is -1 (none) to {stages}, not {frozen_stages}")
        if style not in ("pytorch", "caffe"):
            raise ConfigError(f"{name}: style is 'pytorch' or 'caffe', not {style!r}")

    def _build_stem(
        self, in_channels: int, channels: int, norm_cfg: Mapping[str, Any], norm_eval: bool, rngs: nnx.Rngs
    ) -> None:
        if self.deep_stem:
            widths, strides = (in_channels, channels // 2, channels // 2, channels), (2, 1, 1)
            self.stem = nnx.List(
                ConvModule(widths[i], widths[i + 1], 3, stride, 1, norm_cfg=norm_cfg, norm_eval=norm_eval, rngs=rngs)
                for i, stride in enumerate(strides)
            )
        else:
            self.conv1 = Conv2d(in_channels, channels, 7, 2, 3, bias=False, rngs=rngs)
            self.bn1 = build_norm(norm_cfg, channels, norm_eval=norm_eval, rngs=rngs)

    def _apply_stem(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        if self.deep_stem:
            for layer in self.stem:
                x = layer(x)
        else:
            x = relu(self.bn1(self.conv1(x)))
        record(self, "stem", x)
        return max_pool2d(x, 3, 2, 1)

    def _freeze(self, frozen_stages: int) -> None:
        if frozen_stages < 0:
            return
        parts = [self.stem] if self.deep_stem else [self.conv1, self.bn1]
        parts += [getattr(self, f"layer{i + 1}") for i in range(frozen_stages)]
        for part in parts:
            freeze_stage(part)

    def init_weights(self, rngs: nnx.Rngs) -> None:
        """Kaiming-normal kernels (fan out), and blocks that start as their shortcut if `zero_init_residual`."""
        super().init_weights(rngs)
        if self.zero_init_residual:
            for i in range(self.num_stages):
                for block in getattr(self, f"layer{i + 1}"):
                    scale = getattr(block, f"bn{block.num_convs}").scale
                    scale.set_value(jnp.zeros(scale.shape, scale.dtype))

    def __call__(
        self, x: Float[Array, "b h w c"], *, rngs: nnx.Rngs | None = None
    ) -> tuple[Float[Array, "b h2 w2 c2"], ...]:
        """Feature maps of the stages in `out_indices`, in order. `rngs` is for drop path in training."""
        x = self._apply_stem(x)
        outs = []
        for i in range(self.num_stages):
            for block in getattr(self, f"layer{i + 1}"):
                x = apply_block(block, x, rngs=rngs, remat=self.remat)
            if i in self.out_indices:
                outs.append(x)
        return tuple(outs)


class ResNetV1c(ResNet):
    """ResNet with a deep stem: `deep_stem=True, avg_down=False`."""

    def __init__(self, **kwargs: Any):
        super().__init__(deep_stem=True, avg_down=False, **kwargs)


class ResNetV1d(ResNet):
    """ResNet with a deep stem and average pooling in the shortcuts: `deep_stem=True, avg_down=True`."""

    def __init__(self, **kwargs: Any):
        super().__init__(deep_stem=True, avg_down=True, **kwargs)
