"""EdgeNeXt: Efficiently Amalgamated CNN-Transformer Architecture for Mobile Vision Applications.

Maaz et al. (2022, https://arxiv.org/abs/2206.10589). Stages of ConvNeXt's blocks end with attention among channels.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from jaxpretrain.build import ConfigError
from jaxpretrain.models.convnext import ConvNeXtBlock
from jaxpretrain.models.layers.activation import activation
from jaxpretrain.models.layers.arch import architecture, check_frozen_stages, output_indices
from jaxpretrain.models.layers.base import BaseModule, freeze_stage
from jaxpretrain.models.layers.conv import Conv2d, global_avg_pool
from jaxpretrain.models.layers.drop import drop_path
from jaxpretrain.models.layers.linear import Linear
from jaxpretrain.models.layers.norm import build_norm
from jaxpretrain.models.layers.stack import apply_layers
from jaxpretrain.models.xcit import XCA, PositionalEncodingFourier

_LN, _GELU = {"type": "LN"}, {"type": "GELU"}


class ChannelMultiheadAttention(XCA):
    """XCiT's attention of channels to channels; its temperature is called `scale` in files."""

    state_names: ClassVar = {"temperature": "scale"}


class PositionEncodingFourier(PositionalEncodingFourier):
    """XCiT's sines and cosines, mapped to channels by `proj`."""

    state_names: ClassVar = {"token_projection": "proj"}

    def __init__(self, embed_dims: int, *, rngs: nnx.Rngs):
        super().__init__(dim=embed_dims, rngs=rngs)
        self.token_projection = Conv2d(2 * self.hidden_dim, embed_dims, 1, rngs=rngs)


class SDTAEncoder(BaseModule):
    """Split depth-wise transpose attention (section 3.1): what is near at several scales, and channels of the whole image.

    The channels are split; each part but the last has a depthwise 3x3 convolution, which also sees the result of the part
    before. Then come attention and a feed-forward layer, of which the latter's output alone is added to the block's input.

    Args:
        in_channel: channels of input and output.
        drop_path_rate: probability that a sample skips a branch in training.
        layer_scale_init_value: start of the gains of both branches; 0 for none.
        mlp_ratio: channels inside the feed-forward layer, as a multiple of `in_channel`.
        use_pos_emb: whether positions are added before the attention.
        num_heads, qkv_bias, attn_drop, proj_drop: of the attention.
        norm_cfg, act_cfg: norms and activation.
        scales: number of parts.
    """

    def __init__(
        self,
        in_channel: int,
        drop_path_rate: float = 0.0,
        layer_scale_init_value: float = 1e-6,
        mlp_ratio: int = 4,
        use_pos_emb: bool = True,
        num_heads: int = 8,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        norm_cfg: Mapping[str, Any] = _LN,
        act_cfg: Mapping[str, Any] = _GELU,
        scales: int = 1,
        *,
        rngs: nnx.Rngs,
    ):
        def gain() -> nnx.Param | None:
            value = jnp.full((in_channel,), layer_scale_init_value, jnp.float32)
            return nnx.Param(value) if layer_scale_init_value > 0 else None

        self.drop_path_rate, self.deterministic = float(drop_path_rate), False
        self.part = math.ceil(
            in_channel / scales
        )  # channels; the last part has fewer where that does not come out even
        self.conv_modules = nnx.List(
            Conv2d(self.part, self.part, 3, padding=1, groups=self.part, rngs=rngs) for _ in range(max(scales - 1, 1))
        )
        self.pos_embed = PositionEncodingFourier(in_channel, rngs=rngs) if use_pos_emb else None
        self.norm_csa = build_norm(norm_cfg, in_channel, rngs=rngs)
        self.gamma_csa = gain()
        self.csa = ChannelMultiheadAttention(in_channel, num_heads, qkv_bias, attn_drop, proj_drop, rngs=rngs)
        self.norm = build_norm(norm_cfg, in_channel, rngs=rngs)
        self.pointwise_conv1 = Linear(in_channel, mlp_ratio * in_channel, rngs=rngs)
        self.act = activation(act_cfg)
        self.pointwise_conv2 = Linear(mlp_ratio * in_channel, in_channel, rngs=rngs)
        self.gamma = gain()

    def __call__(
        self, x: Float[Array, "b h w c"], *, rngs: nnx.Rngs | None = None, drop_path_rate: float | Array | None = None
    ) -> Float[Array, "b h w c"]:
        """`drop_path_rate` replaces the block's own; it may be traced (see `apply_layers`)."""
        rate = self.drop_path_rate if drop_path_rate is None else drop_path_rate
        rate = 0.0 if self.deterministic else rate
        y = self._convolve(x)
        if self.pos_embed is not None:
            y = y + self.pos_embed(y.shape[1], y.shape[2], y.dtype)
        y = y + drop_path(_scaled(self.csa(self.norm_csa(y), rngs=rngs), self.gamma_csa), rate, rngs)
        y = self.pointwise_conv2(self.act(self.pointwise_conv1(self.norm(y))))
        return x + drop_path(_scaled(y, self.gamma), rate, rngs)

    def _convolve(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        parts = jnp.split(x, list(range(self.part, x.shape[-1], self.part)), axis=-1)
        seen: list[Array] = []
        for part, conv in zip(parts, self.conv_modules, strict=False):  # the last part, if there are several, stays
            seen.append(conv(part + seen[-1] if seen else part))
        return jnp.concatenate([*seen, *parts[len(seen) :]], axis=-1)


def _scaled(x: Float[Array, "*batch c"], gain: nnx.Param | None) -> Float[Array, "*batch c"]:
    return x if gain is None else x * gain[...].astype(x.dtype)


class EdgeNeXt(BaseModule):
    """EdgeNeXt, for images of any size: [B, H, W, in_channels] -> a tuple of features, [B, C] each by default.

    Args:
        arch: xxsmall, xsmall, small or base; or a dict with the `channels`, `depths` and `num_heads` of the stages.
        in_channels: channels of the images.
        global_blocks: how many blocks at the end of each stage have attention.
        global_block_type: 'SDTA' or 'None', for each stage: there is one kind.
        drop_path_rate: stochastic depth of the last block; grows linearly from 0 at the first.
        layer_scale_init_value: start of the gain of ConvNeXt's blocks; 0 for none.
        linear_pw_conv: whether their pointwise convolutions are kept as linear layers; the numbers are the same.
        mlp_ratio: channels inside the attention blocks' feed-forward layers, as a multiple.
        conv_kernel_sizes: of the depthwise convolutions of each stage's ConvNeXt blocks.
        use_pos_embd_csa: whether each stage's attention blocks add positions.
        use_pos_embd_global: whether positions are added after the first stage.
        d2_scales: into how many parts each stage's attention blocks split the channels.
        norm_cfg, act_cfg: norms between stages and in ConvNeXt's blocks, and their activation.
        out_indices: the stages whose features are returned, from 0; negative ones count from the end.
        frozen_stages: how many first stages do not learn, with the stem; 0 for none.
        gap_before_final_norm: whether features are averaged over the image, before their norm; else they are maps.
        init_cfg: initialisation (see `BaseModule`).

    Attributes:
        scan_layers, remat: how the blocks are run (see `apply_layers`); False and 'none' unless set.

    Raises:
        ConfigError: an unknown name or kind of block, or stages that do not exist.
    """

    archs: ClassVar[dict[tuple[str, ...], dict[str, Any]]] = {
        ("xxsmall",): dict(channels=[24, 48, 88, 168], depths=[2, 2, 6, 2], num_heads=[4, 4, 4, 4]),
        ("xsmall",): dict(channels=[32, 64, 100, 192], depths=[3, 3, 9, 3], num_heads=[4, 4, 4, 4]),
        ("small",): dict(channels=[48, 96, 160, 304], depths=[3, 3, 9, 3], num_heads=[8, 8, 8, 8]),
        ("base",): dict(channels=[80, 160, 288, 584], depths=[3, 3, 9, 3], num_heads=[8, 8, 8, 8]),
    }

    def __init__(
        self,
        arch: str | Mapping[str, Any] = "xxsmall",
        in_channels: int = 3,
        global_blocks: Sequence[int] = (0, 1, 1, 1),
        global_block_type: Sequence[str] = ("None", "SDTA", "SDTA", "SDTA"),
        drop_path_rate: float = 0.0,
        layer_scale_init_value: float = 1e-6,
        linear_pw_conv: bool = True,
        mlp_ratio: int = 4,
        conv_kernel_sizes: Sequence[int] = (3, 5, 7, 9),
        use_pos_embd_csa: Sequence[bool] = (False, True, False, False),
        use_pos_embd_global: bool = False,
        d2_scales: Sequence[int] = (2, 2, 3, 4),
        norm_cfg: Mapping[str, Any] = {"type": "LN2d", "eps": 1e-6},
        out_indices: int | Sequence[int] = -1,
        frozen_stages: int = 0,
        gap_before_final_norm: bool = True,
        act_cfg: Mapping[str, Any] = _GELU,
        init_cfg: Any = None,
        *,
        rngs: nnx.Rngs,
    ):
        size = architecture(arch, self.archs, "EdgeNeXt")
        channels, depths, num_heads = size["channels"], size["depths"], size["num_heads"]
        if unknown := [kind for kind in global_block_type if kind not in ("None", "SDTA")]:
            raise ConfigError(f"EdgeNeXt: global_block_type has 'SDTA' and 'None' only, not {unknown[0]!r}")
        self.init_cfg, self.gap_before_final_norm = init_cfg, gap_before_final_norm
        self.out_indices = output_indices(out_indices, len(depths), "EdgeNeXt")
        self.scan_layers, self.remat = False, "none"

        self.pos_embed = PositionEncodingFourier(channels[0], rngs=rngs) if use_pos_embd_global else None
        stem = Conv2d(in_channels, channels[0], 4, 4, rngs=rngs)
        self.downsample_layers = nnx.List([nnx.List([stem, build_norm(norm_cfg, channels[0], rngs=rngs)])])
        for ins, outs in itertools.pairwise(channels):
            halve = Conv2d(ins, outs, 2, 2, rngs=rngs)
            self.downsample_layers.append(nnx.List([build_norm(norm_cfg, ins, rngs=rngs), halve]))

        rates = iter(np.linspace(0, drop_path_rate, sum(depths)).tolist())
        stages = []
        for i, (depth, width) in enumerate(zip(depths, channels, strict=True)):
            kernel = {"kernel_size": conv_kernel_sizes[i], "padding": conv_kernel_sizes[i] // 2}
            blocks: list[Any] = [
                ConvNeXtBlock(
                    width,
                    kernel,
                    norm_cfg,
                    act_cfg,
                    linear_pw_conv=linear_pw_conv,
                    drop_path_rate=next(rates),
                    layer_scale_init_value=layer_scale_init_value,
                    rngs=rngs,
                )
                for _ in range(depth - global_blocks[i])
            ]
            blocks += [
                SDTAEncoder(
                    width,
                    next(rates),
                    mlp_ratio=mlp_ratio,
                    use_pos_emb=use_pos_embd_csa[i],
                    num_heads=num_heads[i],
                    scales=d2_scales[i],
                    rngs=rngs,
                )
                for _ in range(global_blocks[i])
            ]
            stages.append(nnx.List(blocks))
        self.stages = nnx.List(stages)
        for i in self.out_indices:
            setattr(self, f"norm{i}", build_norm(_LN if gap_before_final_norm else norm_cfg, channels[i], rngs=rngs))

        check_frozen_stages(frozen_stages, 0, len(depths), "EdgeNeXt")
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
            if i == 0 and self.pos_embed is not None:
                x = x + self.pos_embed(x.shape[1], x.shape[2], x.dtype)
            if i in self.out_indices:
                norm = getattr(self, f"norm{i}")
                outputs.append(norm(global_avg_pool(x) if self.gap_before_final_norm else x))
        return tuple(outputs)
