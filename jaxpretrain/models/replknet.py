"""RepLKNet: Scaling Up Your Kernels to 31x31 (Ding et al., 2022, https://arxiv.org/abs/2203.06717).

Depthwise convolutions of up to 31x31, each with a 5x5 one beside it in training that melts into it for inference
(`switch_to_deploy`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from jaxpretrain.build import ConfigError
from jaxpretrain.models.layers.activation import activation
from jaxpretrain.models.layers.arch import architecture, output_indices
from jaxpretrain.models.layers.base import BaseModule, freeze_first
from jaxpretrain.models.layers.conv import Conv2d, ConvModule
from jaxpretrain.models.layers.drop import drop_path
from jaxpretrain.models.layers.norm import build_norm
from jaxpretrain.models.layers.reparam import centred, fuse_norm, set_weights
from jaxpretrain.models.layers.stack import apply_block

_BN = {"type": "BN"}
_RELU = {"type": "ReLU"}
_INIT = (
    {"type": "Kaiming", "layer": ["Conv2d"]},
    {"type": "Constant", "val": 1, "layer": ["_BatchNorm", "GroupNorm"]},
)


class ReparamLargeKernelConv(BaseModule):
    """A large depthwise convolution with norm, `lkb_origin`, plus a small one with norm, `small_conv`.

    Deployed, the one convolution `lkb_reparam`.

    Args:
        channels: of input and output.
        kernel_size: of the large one; odd.
        small_kernel: of the small one; None for none.
        small_kernel_merged: whether to build the deployed form.
        norm_cfg, norm_eval: the norms, as for `build_norm`.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        small_kernel: int | None,
        small_kernel_merged: bool = False,
        norm_cfg: Mapping[str, Any] = _BN,
        *,
        norm_eval: bool = False,
        rngs: nnx.Rngs,
    ):
        if small_kernel is not None and (small_kernel > kernel_size or (kernel_size - small_kernel) % 2):
            raise ConfigError(
                f"RepLKNet: small_kernel={small_kernel} has no place in the middle of {kernel_size} pixels"
            )

        def conv(size: int) -> ConvModule:
            shape = (channels, channels, size, 1, size // 2, 1, channels)
            return ConvModule(*shape, norm_cfg=norm_cfg, act_cfg=None, norm_eval=norm_eval, rngs=rngs)

        self.kernel_size, self.small_kernel_merged = kernel_size, small_kernel_merged
        if small_kernel_merged:
            shape = (channels, channels, kernel_size, 1, kernel_size // 2, 1, channels)
            self.lkb_reparam: Any = Conv2d(*shape, rngs=rngs)
        else:
            self.lkb_origin: Any = conv(kernel_size)
            self.small_conv: Any = None if small_kernel is None else conv(small_kernel)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        if self.small_kernel_merged:
            return self.lkb_reparam(x)
        y = self.lkb_origin(x)
        return y if self.small_conv is None else y + self.small_conv(x)

    def switch_to_deploy(self) -> None:
        """Makes both one convolution, in place. Eval mode gives the same; training is over."""
        if self.small_kernel_merged:
            return
        large = self.lkb_origin.conv
        kernel, bias = fuse_norm(large, getattr(self.lkb_origin, self.lkb_origin.norm_name))
        if (small := self.small_conv) is not None:
            small_kernel, small_bias = fuse_norm(small.conv, getattr(small, small.norm_name))
            kernel, bias = kernel + centred(small_kernel, self.kernel_size), bias + small_bias
        set_weights(large, kernel, bias)
        del self.lkb_origin, self.small_conv
        self.lkb_reparam = large
        self.small_kernel_merged = True


class ConvFFN(BaseModule):
    """x + pw2(gelu(pw1(norm(x)))): the MLP of a transformer as 1x1 convolutions with norms.

    Args:
        channels, hidden: channels of input and output, and in between.
        drop_path_rate: probability that a sample skips the branch in training.
        norm_cfg, norm_eval: the norms, as for `build_norm`.
    """

    def __init__(
        self,
        channels: int,
        hidden: int,
        drop_path_rate: float = 0.0,
        norm_cfg: Mapping[str, Any] = _BN,
        *,
        norm_eval: bool = False,
        rngs: nnx.Rngs,
    ):
        args: dict[str, Any] = dict(norm_cfg=norm_cfg, norm_eval=norm_eval, rngs=rngs)
        self.preffn_bn = build_norm(norm_cfg, channels, norm_eval=norm_eval, rngs=rngs)
        self.pw1 = ConvModule(channels, hidden, 1, act_cfg={"type": "GELU"}, **args)
        self.pw2 = ConvModule(hidden, channels, 1, act_cfg=None, **args)
        self.drop_path_rate, self.deterministic = drop_path_rate, False

    def __call__(self, x: Float[Array, "b h w c"], *, rngs: nnx.Rngs | None = None) -> Float[Array, "b h w c"]:
        y = self.pw2(self.pw1(self.preffn_bn(x)))
        return x + (y if self.deterministic else drop_path(y, self.drop_path_rate, rngs))


class RepLKBlock(BaseModule):
    """x + pw2(act(large(relu(pw1(norm(x)))))): a large depthwise convolution between 1x1 ones.

    Args:
        channels, hidden: channels of input and output, and of the large convolution.
        kernel_size, small_kernel, small_kernel_merged: see `ReparamLargeKernelConv`.
        drop_path_rate: probability that a sample skips the branch in training.
        norm_cfg, norm_eval: the norms, as for `build_norm`.
        act_cfg: the activation after the large convolution.
    """

    def __init__(
        self,
        channels: int,
        hidden: int,
        kernel_size: int,
        small_kernel: int | None,
        drop_path_rate: float = 0.0,
        small_kernel_merged: bool = False,
        norm_cfg: Mapping[str, Any] = _BN,
        act_cfg: Mapping[str, Any] = _RELU,
        *,
        norm_eval: bool = False,
        rngs: nnx.Rngs,
    ):
        args: dict[str, Any] = dict(norm_cfg=norm_cfg, norm_eval=norm_eval, rngs=rngs)
        self.prelkb_bn = build_norm(norm_cfg, channels, norm_eval=norm_eval, rngs=rngs)
        self.pw1 = ConvModule(channels, hidden, 1, **args)
        self.large_kernel = ReparamLargeKernelConv(hidden, kernel_size, small_kernel, small_kernel_merged, **args)
        self.act = activation(act_cfg)
        self.pw2 = ConvModule(hidden, channels, 1, act_cfg=None, **args)
        self.drop_path_rate, self.deterministic = drop_path_rate, False

    def __call__(self, x: Float[Array, "b h w c"], *, rngs: nnx.Rngs | None = None) -> Float[Array, "b h w c"]:
        y = self.pw2(self.act(self.large_kernel(self.pw1(self.prelkb_bn(x)))))
        return x + (y if self.deterministic else drop_path(y, self.drop_path_rate, rngs))


class RepLKNetStage(BaseModule):
    """`RepLKBlock` and `ConvFFN` in turn, as `blocks`; and `norm`, of the stage's output where that is wanted."""

    def __init__(self, blocks: Sequence[nnx.Module], norm: nnx.Module | None):
        self.blocks, self.norm = nnx.List(blocks), norm


class RepLKNet(BaseModule):
    """RepLKNet: [B, H, W, in_channels] -> a tuple of [B, H/s, W/s, C] maps; s = 4, 8, 16, 32 for the four stages.

    Args:
        arch: '31B', '31L', 'XL'; or a dictionary: large_kernel_sizes, layers and channels (a number for each stage: pixels,
            pairs of blocks, channels), small_kernel (pixels; None for none), dw_ratio (channels of the large convolutions
            over those of the stage).
        in_channels: channels of the images.
        ffn_ratio: hidden channels of a `ConvFFN`, as a multiple.
        out_indices: the stages whose outputs are returned, normalised; negative ones count from the end.
        strides, dilations: accepted for MMPretrain's configs, of a length with the stages; no effect there either.
        frozen_stages: how many stages do not learn: weights and running statistics stay; 0 is the stem alone, -1 none.
        conv_cfg: accepted for MMPretrain's configs; there is one kind of convolution.
        norm_cfg: the norms, as for `build_norm`.
        act_cfg: the activation after the large convolutions.
        with_cp: the same as `remat='full'`.
        drop_path_rate: stochastic depth of the last blocks; it grows linearly from 0 in the first.
        small_kernel_merged: whether to build the form for inference (see `switch_to_deploy`); `deploy` of other backbones.
        norm_intermediate_features: accepted for MMPretrain's configs: what is returned is always normalised.
        norm_eval: whether BatchNorms always use, and never change, their running statistics.
        init_cfg: initialisation, MMEngine's dictionaries.

    Attributes:
        small_kernel_merged: whether it has this form.
        remat: what the backward pass recomputes: 'none', 'full' (all within a block), 'dots' (all but convolutions).

    Raises:
        ConfigError: an unknown architecture or stage; lists of different lengths.
    """

    arch_settings: ClassVar[dict[tuple[str, ...], dict[str, Any]]] = {
        ("31b",): dict(
            large_kernel_sizes=(31, 29, 27, 13),
            layers=(2, 2, 18, 2),
            channels=(128, 256, 512, 1024),
            small_kernel=5,
            dw_ratio=1,
        ),
        ("31l",): dict(
            large_kernel_sizes=(31, 29, 27, 13),
            layers=(2, 2, 18, 2),
            channels=(192, 384, 768, 1536),
            small_kernel=5,
            dw_ratio=1,
        ),
        ("xl",): dict(
            large_kernel_sizes=(27, 27, 27, 13),
            layers=(2, 2, 18, 2),
            channels=(256, 512, 1024, 2048),
            small_kernel=None,
            dw_ratio=1.5,
        ),
    }

    def __init__(
        self,
        arch: str | Mapping[str, Any],
        in_channels: int = 3,
        ffn_ratio: float = 4,
        out_indices: int | Sequence[int] = (3,),
        strides: Sequence[int] = (2, 2, 2, 2),
        dilations: Sequence[int] = (1, 1, 1, 1),
        frozen_stages: int = -1,
        conv_cfg: Mapping[str, Any] | None = None,
        norm_cfg: Mapping[str, Any] = _BN,
        act_cfg: Mapping[str, Any] = _RELU,
        with_cp: bool = False,
        drop_path_rate: float = 0.3,
        small_kernel_merged: bool = False,
        norm_intermediate_features: bool = False,
        norm_eval: bool = False,
        init_cfg: Any = _INIT,
        *,
        rngs: nnx.Rngs,
    ):
        numbers = architecture(arch, self.arch_settings, "RepLKNet")
        layers, widths, sizes = (numbers[name] for name in ("layers", "channels", "large_kernel_sizes"))
        if not len(layers) == len(widths) == len(sizes) == len(strides) == len(dilations):
            raise ConfigError(
                f"RepLKNet: layers {layers}, channels {widths}, large_kernel_sizes {sizes}, strides {strides} and "
                f"dilations {dilations} need a number for each stage"
            )
        self.init_cfg, self.remat = init_cfg, "full" if with_cp else "none"
        self.small_kernel_merged = small_kernel_merged
        self.out_indices = output_indices(out_indices, len(layers), "RepLKNet")

        args: dict[str, Any] = dict(norm_cfg=norm_cfg, norm_eval=norm_eval, rngs=rngs)

        def depthwise(channels: int, stride: int) -> ConvModule:
            return ConvModule(channels, channels, 3, stride, 1, groups=channels, **args)

        first = widths[0]
        self.stem = nnx.List(
            [
                ConvModule(in_channels, first, 3, 2, 1, **args),
                depthwise(first, 1),
                ConvModule(first, first, 1, **args),
                depthwise(first, 2),
            ]
        )
        rates = iter(np.linspace(0.0, drop_path_rate, sum(layers)).tolist())
        stages, transitions = [], []
        for i, (layer_count, width) in enumerate(zip(layers, widths, strict=True)):
            blocks: list[nnx.Module] = []
            for _ in range(layer_count):
                rate, hidden = next(rates), int(width * numbers["dw_ratio"])
                kernels = (sizes[i], numbers["small_kernel"])
                blocks.append(RepLKBlock(width, hidden, *kernels, rate, small_kernel_merged, act_cfg=act_cfg, **args))
                blocks.append(ConvFFN(width, int(width * ffn_ratio), rate, **args))
            wanted = i in self.out_indices
            norm = build_norm(norm_cfg, width, norm_eval=norm_eval, rngs=rngs) if wanted else None
            stages.append(RepLKNetStage(blocks, norm))
            if i < len(layers) - 1:
                transitions.append(nnx.List([ConvModule(width, widths[i + 1], 1, **args), depthwise(widths[i + 1], 2)]))
        self.stages, self.transitions = nnx.List(stages), nnx.List(transitions)
        freeze_first([self.stem, *self.stages], frozen_stages, "RepLKNet")

    def switch_to_deploy(self) -> None:
        """Melts the small kernels into the large ones, in place. Eval mode gives the same; training is over."""
        for stage in self.stages:
            for block in stage.blocks:
                if isinstance(block, RepLKBlock):
                    block.large_kernel.switch_to_deploy()
        self.small_kernel_merged = True

    def __call__(
        self, x: Float[Array, "b h w c"], *, rngs: nnx.Rngs | None = None
    ) -> tuple[Float[Array, "b h2 w2 c2"], ...]:
        """The maps of the stages in `out_indices`, in order. `rngs` is for drop path in training."""
        for layer in self.stem:
            x = layer(x)
        outs = []
        for i, stage in enumerate(self.stages):
            for block in stage.blocks:
                x = apply_block(block, x, rngs=rngs, remat=self.remat)
            if stage.norm is not None:
                outs.append(stage.norm(x))
            if i < len(self.transitions):
                for layer in self.transitions[i]:
                    x = layer(x)
        return tuple(outs)
