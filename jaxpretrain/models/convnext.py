"""ConvNeXt: A ConvNet for the 2020s (Liu et al., 2022, https://arxiv.org/abs/2201.03545).

And ConvNeXt V2 (Woo et al., 2023, https://arxiv.org/abs/2301.00808), which has global response normalisation in place of
layer scale: `use_grn=True, layer_scale_init_value=0.0`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from jaxpretrain.build import ConfigError
from jaxpretrain.models.layers.activation import activation
from jaxpretrain.models.layers.arch import architecture, output_indices
from jaxpretrain.models.layers.base import BaseModule, freeze_stage
from jaxpretrain.models.layers.conv import Conv2d, global_avg_pool
from jaxpretrain.models.layers.drop import drop_path
from jaxpretrain.models.layers.grn import GRN
from jaxpretrain.models.layers.linear import Linear
from jaxpretrain.models.layers.norm import build_norm
from jaxpretrain.models.layers.stack import apply_layers

_LN = {"type": "LN2d", "eps": 1e-6}
_INIT = (
    {"type": "TruncNormal", "layer": ["Conv2d", "Linear"], "std": 0.02, "bias": 0.0},
    {"type": "Constant", "layer": ["LayerNorm"], "val": 1.0, "bias": 0.0},
)


class ConvNeXtBlock(BaseModule):
    """x + gamma * pointwise2(grn(act(pointwise1(norm(depthwise(x)))))).

    Args:
        in_channels: channels of input and output.
        dw_conv_cfg: arguments of the depthwise convolution.
        norm_cfg, act_cfg: norm and activation.
        mlp_ratio: channels between the pointwise convolutions, as a multiple of `in_channels`.
        linear_pw_conv: whether pointwise convolutions are kept as linear layers; the numbers are the same.
        drop_path_rate: probability that a sample skips the branch in training.
        layer_scale_init_value: start of `gamma`; 0 for none.
        use_grn: whether there is a `GRN` (ConvNeXt V2).
    """

    def __init__(
        self,
        in_channels: int,
        dw_conv_cfg: Mapping[str, Any] = {"kernel_size": 7, "padding": 3},
        norm_cfg: Mapping[str, Any] = _LN,
        act_cfg: Mapping[str, Any] = {"type": "GELU"},
        mlp_ratio: float = 4.0,
        linear_pw_conv: bool = True,
        drop_path_rate: float = 0.0,
        layer_scale_init_value: float = 1e-6,
        use_grn: bool = False,
        *,
        rngs: nnx.Rngs,
    ):
        self.drop_path_rate, self.deterministic = float(drop_path_rate), False
        pointwise: Any = Linear if linear_pw_conv else partial(Conv2d, kernel_size=1)
        hidden = int(mlp_ratio * in_channels)
        self.depthwise_conv = Conv2d(in_channels, in_channels, groups=in_channels, **dw_conv_cfg, rngs=rngs)
        self.norm = build_norm(norm_cfg, in_channels, rngs=rngs)
        self.pointwise_conv1 = pointwise(in_channels, hidden, rngs=rngs)
        self.act = activation(act_cfg)
        self.grn = GRN(hidden) if use_grn else None
        self.pointwise_conv2 = pointwise(hidden, in_channels, rngs=rngs)
        scaled = layer_scale_init_value > 0
        self.gamma = nnx.Param(jnp.full((in_channels,), layer_scale_init_value, jnp.float32)) if scaled else None

    def __call__(
        self, x: Float[Array, "b h w c"], *, rngs: nnx.Rngs | None = None, drop_path_rate: float | Array | None = None
    ) -> Float[Array, "b h w c"]:
        """`drop_path_rate` replaces the block's own; it may be traced (see `apply_layers`)."""
        rate = self.drop_path_rate if drop_path_rate is None else drop_path_rate
        y = self.act(self.pointwise_conv1(self.norm(self.depthwise_conv(x))))
        y = self.pointwise_conv2(y if self.grn is None else self.grn(y))
        if self.gamma is not None:
            y = y * self.gamma[...].astype(y.dtype)
        return x + drop_path(y, 0.0 if self.deterministic else rate, rngs)


class ConvNeXt(BaseModule):
    """ConvNeXt, for images of any size: [B, H, W, in_channels] -> a tuple of features, [B, C] each by default.

    Args:
        arch: atto, femto, pico, nano, tiny, small, base, large, xlarge or huge; or a dict with the `depths` and the
            `channels` of the stages.
        in_channels: channels of the images.
        stem_patch_size: size and stride of the first convolution.
        norm_cfg, act_cfg: norms and activation.
        linear_pw_conv: whether pointwise convolutions are kept as linear layers: a matter of names and shapes in files.
        use_grn: whether blocks have global response normalisation (ConvNeXt V2).
        drop_path_rate: stochastic depth of the last block; grows linearly from 0 at the first.
        layer_scale_init_value: start of the gain of each branch; 0 for none (ConvNeXt V2).
        out_indices: the stages whose features are returned, from 0; negative ones count from the end.
        frozen_stages: how many first stages do not learn, with the stem; 0 for none.
        gap_before_final_norm: whether features are averaged over the image, before their norm; else they are maps.
        with_cp: MMPretrain's name for `remat='full'`.
        init_cfg: initialisation (see `BaseModule`).

    Attributes:
        scan_layers, remat: how the blocks are run (see `apply_layers`); False and 'none' unless set.

    Raises:
        ConfigError: an unknown name, or stages that do not exist.
    """

    archs: ClassVar[dict[tuple[str, ...], dict[str, Any]]] = {
        ("atto",): dict(depths=[2, 2, 6, 2], channels=[40, 80, 160, 320]),
        ("femto",): dict(depths=[2, 2, 6, 2], channels=[48, 96, 192, 384]),
        ("pico",): dict(depths=[2, 2, 6, 2], channels=[64, 128, 256, 512]),
        ("nano",): dict(depths=[2, 2, 8, 2], channels=[80, 160, 320, 640]),
        ("tiny",): dict(depths=[3, 3, 9, 3], channels=[96, 192, 384, 768]),
        ("small",): dict(depths=[3, 3, 27, 3], channels=[96, 192, 384, 768]),
        ("base",): dict(depths=[3, 3, 27, 3], channels=[128, 256, 512, 1024]),
        ("large",): dict(depths=[3, 3, 27, 3], channels=[192, 384, 768, 1536]),
        ("xlarge",): dict(depths=[3, 3, 27, 3], channels=[256, 512, 1024, 2048]),
        ("huge",): dict(depths=[3, 3, 27, 3], channels=[352, 704, 1408, 2816]),
    }

    block_type: ClassVar[type[ConvNeXtBlock]] = ConvNeXtBlock
    norms_outputs: ClassVar[bool] = True

    def __init__(
        self,
        arch: str | Mapping[str, Any] = "tiny",
        in_channels: int = 3,
        stem_patch_size: int = 4,
        norm_cfg: Mapping[str, Any] = _LN,
        act_cfg: Mapping[str, Any] = {"type": "GELU"},
        linear_pw_conv: bool = True,
        use_grn: bool = False,
        drop_path_rate: float = 0.0,
        layer_scale_init_value: float = 1e-6,
        out_indices: int | Sequence[int] = -1,
        frozen_stages: int = 0,
        gap_before_final_norm: bool = True,
        with_cp: bool = False,
        init_cfg: Any = _INIT,
        *,
        rngs: nnx.Rngs,
    ):
        size = architecture(arch, self.archs, "ConvNeXt")
        depths, channels = list(size["depths"]), list(size["channels"])
        if len(depths) != len(channels):
            raise ConfigError(f"ConvNeXt: arch has {len(depths)} depths, {len(channels)} channels")
        self.depths, self.channels, self.init_cfg = tuple(depths), tuple(channels), init_cfg
        self.out_indices = output_indices(out_indices, len(depths), "ConvNeXt")
        self.gap_before_final_norm = gap_before_final_norm
        self.scan_layers, self.remat = False, "full" if with_cp else "none"

        stem = Conv2d(in_channels, channels[0], stem_patch_size, stem_patch_size, rngs=rngs)
        self.downsample_layers = nnx.List([nnx.List([stem, build_norm(norm_cfg, channels[0], rngs=rngs)])])
        for ins, outs in pairwise(channels):
            halve = Conv2d(ins, outs, 2, 2, rngs=rngs)
            self.downsample_layers.append(nnx.List([build_norm(norm_cfg, ins, rngs=rngs), halve]))
        rates = iter(np.linspace(0, drop_path_rate, sum(depths)).tolist())
        self.stages = nnx.List(
            nnx.List(
                self.block_type(
                    width,
                    norm_cfg=norm_cfg,
                    act_cfg=act_cfg,
                    linear_pw_conv=linear_pw_conv,
                    drop_path_rate=next(rates),
                    layer_scale_init_value=layer_scale_init_value,
                    use_grn=use_grn,
                    rngs=rngs,
                )
                for _ in range(depth)
            )
            for depth, width in zip(depths, channels, strict=True)
        )
        for i in self.out_indices if self.norms_outputs else ():
            setattr(self, f"norm{i}", build_norm(norm_cfg, channels[i], rngs=rngs))

        if not 0 <= frozen_stages <= len(depths):
            raise ConfigError(f"ConvNeXt: frozen_stages is 0 (none) to {len(depths)}, not {frozen_stages}")
        for i in range(frozen_stages):
            freeze_stage(self.downsample_layers[i])
            freeze_stage(self.stages[i])

    def __call__(
        self, x: Float[Array, "b h w c"], *, rngs: nnx.Rngs | None = None
    ) -> tuple[Float[Array, "b *grid c2"], ...]:
        """The features of the chosen stages, normalised; `rngs` is for drop path in training."""
        outputs = []
        for i, (downsample, blocks) in enumerate(zip(self.downsample_layers, self.stages, strict=True)):
            for layer in downsample:
                x = layer(x)
            x, _ = apply_layers(blocks, x, rngs=rngs, scan_layers=self.scan_layers, remat=self.remat)
            if i in self.out_indices:
                norm = getattr(self, f"norm{i}")
                outputs.append(norm(global_avg_pool(x) if self.gap_before_final_norm else x))
        return tuple(outputs)
