"""HRNet: Deep High-Resolution Representation Learning for Visual Recognition.

Wang et al. (2019, https://arxiv.org/abs/1908.07919): branches of several resolutions run side by side and exchange what they
see. `HRFuseScales` makes of them the one map that a classifier wants.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxpretrain.build import ConfigError, nearest
from jaxpretrain.models.layers.activation import Activation
from jaxpretrain.models.layers.base import BaseModule
from jaxpretrain.models.layers.conv import Conv2d, ConvModule, relu
from jaxpretrain.models.layers.norm import build_norm
from jaxpretrain.models.layers.stack import apply_block
from jaxpretrain.models.resnet import BasicBlock, Bottleneck, ResidualBlock

_BN = {"type": "BN"}
_INIT = (
    {"type": "Kaiming", "layer": "Conv2d"},
    {"type": "Constant", "val": 1, "layer": ["_BatchNorm", "GroupNorm"]},
)
_BLOCKS: dict[str, type[ResidualBlock]] = {"BASIC": BasicBlock, "BOTTLENECK": Bottleneck}
Maps = tuple[Float[Array, "b h w c"], ...]


class Upsample(nnx.Module):
    """Repeats each pixel `factor` times in both directions."""

    def __init__(self, factor: int):
        self.factor = factor

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
        return jnp.repeat(jnp.repeat(x, self.factor, axis=1), self.factor, axis=2)


class Stage(NamedTuple):
    """`modules` in a row, each with as many branches as `blocks` and `channels` (inside the blocks) have entries."""

    modules: int
    block: type[ResidualBlock]
    blocks: tuple[int, ...]
    channels: tuple[int, ...]

    @property
    def widths(self) -> list[int]:
        """Channels of the branches' outputs."""
        return [self.block.default_expansion * channels for channels in self.channels]


def _stages(width: int) -> list[Stage]:
    """The paper's network with branches of `width`, 2 * `width`, ... channels."""
    return [
        Stage(1, Bottleneck, (4,), (64,)),
        *(
            Stage(modules, BasicBlock, (4,) * branches, tuple(width * 2**i for i in range(branches)))
            for branches, modules in ((2, 1), (3, 4), (4, 3))
        ),
    ]


def _conv_norm(
    ins: int, outs: int, size: int, stride: int, act: bool, norm: Mapping[str, Any], rngs: nnx.Rngs
) -> nnx.List:
    conv = Conv2d(ins, outs, size, stride, size // 2, bias=False, rngs=rngs)
    return nnx.List([conv, build_norm(**norm, num_features=outs, rngs=rngs), *([Activation({"type": "ReLU"})] * act)])


def _through(layers: nnx.List, x: Array) -> Array:
    """The layers, and lists of layers, one after the other; none give their input."""
    for layer in layers:
        x = _through(layer, x) if isinstance(layer, nnx.List) else layer(x)
    return x


def _row(
    block: type[ResidualBlock], ins: int, outs: int, count: int, norm: Mapping[str, Any], rngs: nnx.Rngs
) -> nnx.List:
    """`count` residual blocks."""
    mid, args = outs // block.default_expansion, {"norm_cfg": norm["cfg"], "norm_eval": norm["norm_eval"], "rngs": rngs}
    return nnx.List(block(ins if i == 0 else outs, outs, mid, **args) for i in range(count))


class HRModule(BaseModule):
    """Residual blocks on each resolution, and then each resolution gets the sum of what all have (figure 3 of the paper).

    Args:
        stage: block, number of blocks and channels of the branches.
        multiscale_output: whether all resolutions are given; else the highest alone.
        norm: arguments of `build_norm`.
    """

    def __init__(self, stage: Stage, multiscale_output: bool, norm: Mapping[str, Any], rngs: nnx.Rngs):
        widths = stage.widths
        self.branches = nnx.List(
            _row(stage.block, width, width, count, norm, rngs)
            for width, count in zip(widths, stage.blocks, strict=True)
        )

        def bring(source: int, target: int) -> nnx.List:
            """What takes a branch to another's resolution and channels: one upsampling, or several strides of 2."""
            if source > target:
                layers = _conv_norm(widths[source], widths[target], 1, 1, False, norm, rngs)
                return nnx.List([*layers, Upsample(2 ** (source - target))])
            steps = target - source
            outs = [widths[source]] * (steps - 1) + [widths[target]]
            return nnx.List(_conv_norm(widths[source], outs[i], 3, 2, i < steps - 1, norm, rngs) for i in range(steps))

        targets = range(len(widths) if multiscale_output else 1)
        self.fuse_layers = nnx.List(nnx.List(bring(j, i) for j in range(len(widths))) for i in targets)

    def __call__(self, maps: Maps, *, rngs: nnx.Rngs | None = None, remat: str = "none") -> Maps:
        outs = []
        for x, blocks in zip(maps, self.branches, strict=True):
            for block in blocks:
                x = apply_block(block, x, rngs=rngs, remat=remat)
            outs.append(x)
        return tuple(
            relu(jnp.asarray(sum(_through(path, x) for path, x in zip(paths, outs, strict=True))))
            for paths in self.fuse_layers
        )


class HRNet(BaseModule):
    """HRNet: [B, H, W, in_channels] -> a tuple of maps [B, H/4, W/4, C], [B, H/8, W/8, 2 C], ..., [B, H/32, W/32, 8 C].

    Height and width are multiples of 32, so that all resolutions fit together.

    Args:
        arch: 'w18', 'w30', 'w32', 'w40', 'w44', 'w48' or 'w64': C, the channels of the highest resolution.
        extra: instead of `arch`, dictionaries `stage1` to `stage4`, each with `num_modules`, `num_branches`, `block` ('BASIC'
            or 'BOTTLENECK'), and the branches' `num_blocks` and `num_channels` (inside the blocks).
        in_channels: channels of the images.
        conv_cfg: accepted for MMPretrain's configs; there is one kind of convolution.
        norm_cfg: the norms, as for `build_norm`.
        norm_eval: whether BatchNorms always use, and never change, their running statistics.
        with_cp: the same as `remat='full'`.
        zero_init_residual: whether `init_weights` makes every block of stages 2 to 4 start as its shortcut.
        multiscale_output: whether all resolutions are given; else the highest alone.
        init_cfg: initialisation, MMEngine's dictionaries.

    Attributes:
        remat: what the backward pass recomputes: 'none', 'full' (all within a block), 'dots' (all but convolutions).

    Raises:
        ConfigError: an unknown name, or stages that are incomplete.
    """

    archs = tuple(f"w{width}" for width in (18, 30, 32, 40, 44, 48, 64))

    def __init__(
        self,
        arch: str = "w32",
        extra: Mapping[str, Mapping[str, Any]] | None = None,
        in_channels: int = 3,
        conv_cfg: Mapping[str, Any] | None = None,
        norm_cfg: Mapping[str, Any] = _BN,
        norm_eval: bool = False,
        with_cp: bool = False,
        zero_init_residual: bool = False,
        multiscale_output: bool = True,
        init_cfg: Any = _INIT,
        *,
        rngs: nnx.Rngs,
    ):
        stages = self._stages(arch, extra)
        self.init_cfg, self.zero_init_residual = init_cfg, zero_init_residual
        self.remat = "full" if with_cp else "none"
        norm: dict[str, Any] = {"cfg": norm_cfg, "norm_eval": norm_eval}

        self.conv1 = Conv2d(in_channels, 64, 3, 2, 1, bias=False, rngs=rngs)
        self.bn1 = build_norm(**norm, num_features=64, rngs=rngs)
        self.conv2 = Conv2d(64, 64, 3, 2, 1, bias=False, rngs=rngs)
        self.bn2 = build_norm(**norm, num_features=64, rngs=rngs)
        widths = stages[0].widths
        self.layer1 = _row(stages[0].block, 64, widths[0], stages[0].blocks[0], norm, rngs)
        for i, stage in enumerate(stages[1:], start=2):
            setattr(self, f"transition{i - 1}", _transition(widths, stage.widths, norm, rngs))
            alone = i == 4 and not multiscale_output
            modules = [
                HRModule(stage, not (alone and j == stage.modules - 1), norm, rngs) for j in range(stage.modules)
            ]
            setattr(self, f"stage{i}", nnx.List(modules))
            widths = stage.widths
        self.num_branches = len(widths)

    def _stages(self, arch: str, extra: Mapping[str, Mapping[str, Any]] | None) -> list[Stage]:
        if extra is None:
            if arch not in self.archs:
                raise ConfigError(f"HRNet: unknown arch {arch!r}.{nearest(str(arch), self.archs)}")
            return _stages(int(arch[1:]))
        stages = []
        for name in (f"stage{i}" for i in range(1, 5)):
            keys = ("num_modules", "num_branches", "block", "num_blocks", "num_channels")
            if missing := [key for key in keys if key not in extra.get(name, {})]:
                raise ConfigError(
                    f"HRNet: extra needs stage1 to stage4, each with {', '.join(keys)}; {name} lacks {missing[0]}"
                )
            modules, branches, block, blocks, channels = (extra[name][key] for key in keys)
            if block not in _BLOCKS or not branches == len(blocks) == len(channels):
                raise ConfigError(
                    f"HRNet: {name} of extra needs block 'BASIC' or 'BOTTLENECK', and num_branches={branches} entries of "
                    f"num_blocks and num_channels; got {block!r}, {blocks}, {channels}"
                )
            stages.append(Stage(modules, _BLOCKS[block], tuple(blocks), tuple(channels)))
        return stages

    def init_weights(self, rngs: nnx.Rngs) -> None:
        """Kaiming-normal kernels (fan out); with `zero_init_residual`, blocks that start as their shortcut."""
        super().init_weights(rngs)
        if not self.zero_init_residual:
            return
        for path, block in nnx.iter_modules(self):
            if isinstance(block, ResidualBlock) and "layer1" not in path:
                scale = getattr(block, f"bn{block.num_convs}").scale
                scale.set_value(jnp.zeros(scale.shape, scale.dtype))

    def __call__(self, x: Float[Array, "b h w c"], *, rngs: nnx.Rngs | None = None) -> Maps:
        """The maps of all resolutions, the highest first."""
        x = relu(self.bn1(self.conv1(x)))
        x = relu(self.bn2(self.conv2(x)))
        if any(size % 2 ** (self.num_branches - 1) for size in x.shape[1:3]):
            raise ValueError("HRNet: height and width of images must be multiples of 32, for its resolutions to fit")
        for block in self.layer1:
            x = apply_block(block, x, rngs=rngs, remat=self.remat)
        maps: Maps = (x,)
        for i in range(2, 5):
            paths = getattr(self, f"transition{i - 1}")
            maps = tuple(_through(path, maps[min(j, len(maps) - 1)]) for j, path in enumerate(paths))
            for module in getattr(self, f"stage{i}"):
                maps = module(maps, rngs=rngs, remat=self.remat)
        return maps


def _transition(ins: Sequence[int], outs: Sequence[int], norm: Mapping[str, Any], rngs: nnx.Rngs) -> nnx.List:
    """What each branch of the next stage is made by: from its own resolution, or by strides from the lowest there is."""
    paths = []
    for i, width in enumerate(outs):
        if i < len(ins):
            same = width == ins[i]
            paths.append(nnx.List() if same else _conv_norm(ins[i], width, 3, 1, True, norm, rngs))
        else:
            steps = i + 1 - len(ins)
            widths = [ins[-1]] * (steps - 1) + [width]
            paths.append(nnx.List(_conv_norm(ins[-1], widths[j], 3, 2, True, norm, rngs) for j in range(steps)))
    return nnx.List(paths)


class HRFuseScales(BaseModule):
    """One map for the classifier, of four: each is widened, and from the highest resolution down added to the next.

    A tuple of [B, H/4, W/4, C1] to [B, H/32, W/32, C4] -> a tuple of one [B, H/32, W/32, out_channels].

    Args:
        in_channels: channels of the four maps.
        out_channels: channels of the result.
        norm_cfg: the norms after strides and at the end, as for `build_norm`.
        init_cfg: initialisation, MMEngine's dictionaries.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int = 2048,
        norm_cfg: Mapping[str, Any] = {"type": "BN", "momentum": 0.1},
        init_cfg: Any = {"type": "Normal", "layer": "Linear", "std": 0.01},  # noqa: B006 - read only
        *,
        rngs: nnx.Rngs,
    ):
        self.init_cfg = init_cfg
        widths, norm = (128, 256, 512, 1024)[: len(in_channels)], {"cfg": _BN, "norm_eval": False}
        self.increase_layers = nnx.List(
            _row(Bottleneck, ins, outs, 1, norm, rngs) for ins, outs in zip(in_channels, widths, strict=True)
        )
        self.downsample_layers = nnx.List(
            ConvModule(ins, outs, 3, 2, 1, norm_cfg=norm_cfg, rngs=rngs) for ins, outs in itertools.pairwise(widths)
        )
        self.final_layer = ConvModule(widths[-1], out_channels, 1, norm_cfg=norm_cfg, rngs=rngs)

    def __call__(self, maps: Maps) -> Maps:
        if len(maps) != len(self.increase_layers):
            raise ValueError(f"HRFuseScales: {len(maps)} maps for in_channels of {len(self.increase_layers)}")
        first, *others = (_through(layers, x) for layers, x in zip(self.increase_layers, maps, strict=True))
        for halve, other in zip(self.downsample_layers, others, strict=True):
            first = halve(first) + other
        return (self.final_layer(first),)
