"""CSPNet: A New Backbone that can Enhance Learning Capability of CNN (Wang et al., 2020, https://arxiv.org/abs/1911.11929).

Half of a stage's channels go through its blocks, the other half past them. So are made Darknet-53, ResNet-50 and ResNeXt-50.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxpretrain.build import ConfigError
from jaxpretrain.models.layers.activation import activation
from jaxpretrain.models.layers.arch import check_frozen_stages, output_indices
from jaxpretrain.models.layers.base import BaseModule, freeze_stage
from jaxpretrain.models.layers.conv import Conv2d, ConvModule, max_pool2d
from jaxpretrain.models.layers.norm import build_norm
from jaxpretrain.models.layers.stack import apply_block

_BN, _LEAKY = {"type": "BN", "eps": 1e-5}, {"type": "LeakyReLU", "inplace": True}
_KAIMING = {"type": "Kaiming", "layer": "Conv2d"}
_TORCH = {  # PyTorch's own
    "type": "Kaiming",
    "layer": "Conv2d",
    "a": math.sqrt(5),
    "distribution": "uniform",
    "mode": "fan_in",
    "nonlinearity": "leaky_relu",
}


class DarknetBottleneck(BaseModule):
    """x + conv2(conv1(x)): 1x1 to `mid` channels and 3x3 back, each with norm and activation (YOLOv3's block)."""

    def __init__(self, channels: int, mid: int, groups: int, act_cfg: Mapping[str, Any], **args: Any):
        self.conv1 = ConvModule(channels, mid, 1, act_cfg=act_cfg, **args)
        self.conv2 = ConvModule(mid, channels, 3, padding=1, groups=groups, act_cfg=act_cfg, **args)

    def __call__(self, x: Float[Array, "b h w c"], *, rngs: nnx.Rngs | None = None) -> Float[Array, "b h w c"]:
        return x + self.conv2(self.conv1(x))


class Bottleneck(BaseModule):
    """act(x + branch(x)): ResNet's bottleneck with 3x3 convolution of `mid` channels in `groups`, and any activation."""

    def __init__(
        self,
        channels: int,
        mid: int,
        groups: int,
        act_cfg: Mapping[str, Any],
        norm_cfg: Mapping[str, Any] = _BN,
        norm_eval: bool = False,
        *,
        rngs: nnx.Rngs,
    ):
        self.act = activation(act_cfg)
        self.conv1 = Conv2d(channels, mid, 1, bias=False, rngs=rngs)
        self.conv2 = Conv2d(mid, mid, 3, padding=1, groups=groups, bias=False, rngs=rngs)
        self.conv3 = Conv2d(mid, channels, 1, bias=False, rngs=rngs)
        self.bn1, self.bn2, self.bn3 = (
            build_norm(norm_cfg, width, norm_eval=norm_eval, rngs=rngs) for width in (mid, mid, channels)
        )

    def __call__(self, x: Float[Array, "b h w c"], *, rngs: nnx.Rngs | None = None) -> Float[Array, "b h w c"]:
        y = self.act(self.bn1(self.conv1(x)))
        y = self.act(self.bn2(self.conv2(y)))
        return self.act(x + self.bn3(self.conv3(y)))


class Stage(NamedTuple):
    """A stage's numbers.

    `expand` is the factor of channels before they are split, `bottle` that of a half over those inside its blocks. The stride
    is a convolution of its own, which gives all channels that come out (`grows`), or as many as come in; None: no stride.
    """

    ins: int
    outs: int
    blocks: int
    expand: float
    bottle: float
    grows: bool | None


class CSPStage(BaseModule):
    """Stride, widening, and a split: one half through the blocks, the other past them; then both are mixed (figure 2).

    Args:
        stage: its numbers.
        block: the blocks' class.
        groups: of the blocks' 3x3 convolutions and of the stride's.
        expand_act: whether the widening has an activation.
        act_cfg, args: of all convolutions (see `ConvModule`).
    """

    state_names: ClassVar = {"after_blocks_conv": "atfer_blocks_conv"}  # as MMPretrain spells it

    def __init__(
        self,
        stage: Stage,
        block: type[DarknetBottleneck | Bottleneck],
        groups: int,
        expand_act: bool,
        act_cfg: Mapping[str, Any],
        **args: Any,
    ):
        channels = stage.outs if stage.grows else stage.ins
        wide = int(channels * stage.expand)
        half = wide // 2
        self.downsample_conv = (
            None
            if stage.grows is None
            else ConvModule(stage.ins, channels, 3, 2, 1, groups=groups, act_cfg=act_cfg, **args)
        )
        self.expand_conv = ConvModule(channels, wide, 1, act_cfg=act_cfg if expand_act else None, **args)
        mid = int(half / stage.bottle)
        self.blocks = nnx.List(block(half, mid, groups, act_cfg, **args) for _ in range(stage.blocks))
        self.after_blocks_conv = ConvModule(half, half, 1, act_cfg=act_cfg, **args)
        self.final_conv = ConvModule(2 * half, stage.outs, 1, act_cfg=act_cfg, **args)

    def __call__(
        self, x: Float[Array, "b h w in"], *, rngs: nnx.Rngs | None = None, remat: str = "none"
    ) -> Float[Array, "b h2 w2 out"]:
        if self.downsample_conv is not None:
            x = self.downsample_conv(x)
        past, through = jnp.split(self.expand_conv(x), 2, axis=-1)
        for block in self.blocks:
            through = apply_block(block, through, rngs=rngs, remat=remat)
        return self.final_conv(jnp.concatenate([past, self.after_blocks_conv(through)], axis=-1))


class CSPNet(BaseModule):
    """What the three networks share; sub-classes say what blocks they have, in which stages, after which stem.

    Args:
        depth: number of layers of the network whose blocks these are; each has one.
        in_channels: channels of the images.
        out_indices: the stages whose outputs are returned, from 0; negative ones count from the end.
        frozen_stages: the last of the first stages that do not learn, with the stem; -1 none.
        conv_cfg: accepted for MMPretrain's configs; there is one kind of convolution.
        norm_cfg, act_cfg: norms and activations.
        norm_eval: whether BatchNorms always use, and never change, their running statistics.
        init_cfg: initialisation, MMEngine's dictionaries.

    Attributes:
        remat: what the backward pass recomputes: 'none', 'full' (all within a block), 'dots' (all but convolutions).

    Raises:
        ConfigError: a depth, or stages that do not exist.
    """

    arch_settings: ClassVar[Mapping[int, Sequence[Stage]]]
    block: ClassVar[type[DarknetBottleneck | Bottleneck]] = Bottleneck
    groups: ClassVar[int] = 1
    expand_act: ClassVar[bool] = False

    def __init__(
        self,
        depth: int,
        in_channels: int = 3,
        out_indices: int | Sequence[int] = -1,
        frozen_stages: int = -1,
        conv_cfg: Mapping[str, Any] | None = None,
        norm_cfg: Mapping[str, Any] = _BN,
        act_cfg: Mapping[str, Any] = _LEAKY,
        norm_eval: bool = False,
        init_cfg: Any = _KAIMING,
        *,
        rngs: nnx.Rngs,
    ):
        name = type(self).__name__
        if depth not in self.arch_settings:
            raise ConfigError(f"{name} has no depth {depth!r}; its depths are {sorted(self.arch_settings)}")
        stages = self.arch_settings[depth]
        self.init_cfg, self.remat = init_cfg, "none"
        self.out_indices = output_indices(out_indices, len(stages), name)
        args: dict[str, Any] = {"norm_cfg": norm_cfg, "act_cfg": act_cfg, "norm_eval": norm_eval, "rngs": rngs}
        self.stem = self.build_stem(in_channels, stages[0].ins, **args)
        self.stages = nnx.List(CSPStage(stage, self.block, self.groups, self.expand_act, **args) for stage in stages)

        check_frozen_stages(frozen_stages, -1, len(stages) - 1, name)
        if frozen_stages >= 0:
            freeze_stage(self.stem)
        for i in range(frozen_stages + 1):
            freeze_stage(self.stages[i])

    def build_stem(self, ins: int, outs: int, **args: Any) -> Any:
        """The layers before the first stage."""
        raise NotImplementedError

    def apply_stem(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        """What the first stage gets."""
        raise NotImplementedError

    def __call__(
        self, x: Float[Array, "b h w c"], *, rngs: nnx.Rngs | None = None
    ) -> tuple[Float[Array, "b h2 w2 c2"], ...]:
        """Feature maps of the stages in `out_indices`, in order."""
        x = self.apply_stem(x)
        outs = []
        for i, stage in enumerate(self.stages):
            x = stage(x, rngs=rngs, remat=self.remat)
            if i in self.out_indices:
                outs.append(x)
        return tuple(outs)


class CSPDarkNet(CSPNet):
    """CSP-Darknet-53, the backbone of YOLOv4: [B, H, W, in_channels] -> maps; the last is [B, H/32, W/32, 1024].

    Arguments as of `CSPNet`; by default, kernels start as PyTorch's do.
    """

    arch_settings: ClassVar[Mapping[int, Sequence[Stage]]] = {
        53: (
            Stage(32, 64, 1, 2, 2, True),
            Stage(64, 128, 2, 1, 1, True),
            Stage(128, 256, 8, 1, 1, True),
            Stage(256, 512, 8, 1, 1, True),
            Stage(512, 1024, 4, 1, 1, True),
        ),
    }
    block = DarknetBottleneck
    expand_act = True

    def __init__(self, depth: int = 53, init_cfg: Any = _TORCH, **kwargs: Any):
        super().__init__(depth, init_cfg=init_cfg, **kwargs)

    def build_stem(self, ins: int, outs: int, **args: Any) -> Any:
        return ConvModule(ins, outs, 3, padding=1, **args)

    def apply_stem(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c2"]:
        return self.stem(x)


class CSPResNet(CSPNet):
    """CSP-ResNet-50: [B, H, W, in_channels] -> a tuple of feature maps; the last is [B, H/32, W/32, 1024].

    Arguments as of `CSPNet`, and

    Args:
        deep_stem: whether the stem is three 3x3 convolutions, which halve the image, instead of one 7x7 and a pooling, which
            quarter it.
    """

    arch_settings: ClassVar[Mapping[int, Sequence[Stage]]] = {
        50: (
            Stage(64, 128, 3, 4, 2, None),
            Stage(128, 256, 3, 4, 2, False),
            Stage(256, 512, 5, 4, 2, False),
            Stage(512, 1024, 2, 4, 2, False),
        ),
    }

    def __init__(self, depth: int = 50, deep_stem: bool = False, **kwargs: Any):
        self.deep_stem = deep_stem
        super().__init__(depth, **kwargs)

    def build_stem(self, ins: int, outs: int, **args: Any) -> Any:
        if not self.deep_stem:
            return nnx.List([ConvModule(ins, outs, 7, 2, 3, **args)])
        widths = (ins, outs // 2, outs // 2, outs)
        return nnx.List(
            ConvModule(widths[i], widths[i + 1], 3, stride, 1, **args) for i, stride in enumerate((2, 1, 1))
        )

    def apply_stem(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        for layer in self.stem:
            x = layer(x)
        return x if self.deep_stem else max_pool2d(x, 3, 2, 1)


class CSPResNeXt(CSPResNet):
    """CSP-ResNeXt-50 (32x4d): [B, H, W, in_channels] -> a tuple of maps; the last is [B, H/32, W/32, 2048].

    Arguments as of `CSPResNet`.
    """

    arch_settings: ClassVar[Mapping[int, Sequence[Stage]]] = {
        50: (
            Stage(64, 256, 3, 4, 1, None),
            Stage(256, 512, 3, 2, 1, False),
            Stage(512, 1024, 5, 2, 1, False),
            Stage(1024, 2048, 2, 2, 1, False),
        ),
    }
    groups = 32
