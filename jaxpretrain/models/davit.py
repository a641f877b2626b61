"""DaViT: Dual Attention Vision Transformers (Ding et al., 2022, https://arxiv.org/abs/2204.03645).

Blocks of two halves: tokens attend to each other within windows, then channels attend to each other over the whole map.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxpretrain.build import ConfigError, build
from jaxpretrain.models.layers.arch import architecture, output_indices
from jaxpretrain.models.layers.attention import MultiheadAttention, scaled_dot_product_attention
from jaxpretrain.models.layers.base import BaseModule, freeze_stage
from jaxpretrain.models.layers.conv import Conv2d
from jaxpretrain.models.layers.drop import drop_path
from jaxpretrain.models.layers.ffn import FFN
from jaxpretrain.models.layers.linear import Linear
from jaxpretrain.models.layers.norm import build_norm
from jaxpretrain.models.layers.patch_embed import ConvPatchEmbed
from jaxpretrain.models.layers.stack import apply_layers
from jaxpretrain.models.layers.window import ShiftWindowMSA

_LN = {"type": "LN"}


class ConvPosEnc(BaseModule):
    """x + a depthwise 3x3 convolution of x: where a token is among its neighbours."""

    def __init__(self, embed_dims: int, *, rngs: nnx.Rngs):
        self.proj = Conv2d(embed_dims, embed_dims, 3, padding=1, groups=embed_dims, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        return x + self.proj(x)


class DaViTWindowMSA(MultiheadAttention):
    """Self-attention of the tokens of a window, without positions. Arguments as of `MultiheadAttention`."""

    def __init__(self, embed_dims: int, window_size: tuple[int, int], num_heads: int, *, rngs: nnx.Rngs, **kwargs: Any):
        super().__init__(embed_dims, num_heads, rngs=rngs, **kwargs)

    def __call__(
        self,
        x: Float[Array, "b n c"],
        regions: Int[np.ndarray, "windows n"] | None = None,
        *,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "b n c"]:
        return super().__call__(x, rngs=rngs)  # windows are not shifted, so there are no regions


class ChannelAttention(BaseModule):
    """Self-attention of the channels of each head, over all tokens: their keys ask, their values answer, and their
    queries are what is averaged.

    Args:
        embed_dims: channels.
        num_heads: groups of channels that attend to each other; must divide `embed_dims`.
        qkv_bias: whether queries, keys and values have a bias.
    """

    def __init__(self, embed_dims: int, num_heads: int = 8, qkv_bias: bool = False, *, rngs: nnx.Rngs):
        if embed_dims % num_heads:
            raise ConfigError(f"DaViT: {embed_dims} channels are not a multiple of {num_heads} heads")
        self.num_heads, self.head_dims = num_heads, embed_dims // num_heads
        self.qkv = Linear(embed_dims, 3 * embed_dims, bias=qkv_bias, rngs=rngs)
        self.proj = Linear(embed_dims, embed_dims, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        b = x.shape[0]
        qkv = self.qkv(x).reshape(b, -1, 3, self.num_heads, self.head_dims)
        q, k, v = (qkv[:, :, i].transpose(0, 3, 2, 1) for i in range(3))  # [b, channels, heads, tokens]
        y = scaled_dot_product_attention(self, k, v, q, scale=self.head_dims**-0.5)
        return self.proj(y.transpose(0, 3, 2, 1).reshape(x.shape))


class _HalfBlock(BaseModule):
    """Positions, attention, positions again and a feed-forward half.

    Args:
        embed_dims: channels.
        attn: the attention: maps to maps.
        ffn_ratio: hidden channels of the feed-forward half, as a multiple.
        ffn_cfgs: further arguments of `FFN`.
        norm_cfg: the norms.
    """

    attn: Any

    def __init__(
        self,
        embed_dims: int,
        attn: Any,
        ffn_ratio: float,
        ffn_cfgs: Mapping[str, Any],
        norm_cfg: Mapping[str, Any],
        *,
        rngs: nnx.Rngs,
    ):
        ffn = {"type": FFN, "embed_dims": embed_dims, "feedforward_channels": int(embed_dims * ffn_ratio)}
        self.cpe1 = ConvPosEnc(embed_dims, rngs=rngs)
        self.norm1 = build_norm(norm_cfg, embed_dims, rngs=rngs)
        self.attn = attn
        self.cpe2 = ConvPosEnc(embed_dims, rngs=rngs)
        self.norm2 = build_norm(norm_cfg, embed_dims, rngs=rngs)
        self.ffn = build({**ffn, **ffn_cfgs}, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b h w c"], rate: float | Array, rngs: nnx.Rngs | None
    ) -> Float[Array, "b h w c"]:
        """`rate` is the probability of dropping a branch of a sample."""
        x = self.cpe1(x)
        x = x + drop_path(self._attend(self.norm1(x), rngs), rate, rngs)
        x = self.cpe2(x)
        return x + drop_path(self.ffn(self.norm2(x), rngs=rngs), rate, rngs)

    def _attend(self, x: Float[Array, "b h w c"], rngs: nnx.Rngs | None) -> Float[Array, "b h w c"]:
        raise NotImplementedError


class SpatialBlock(_HalfBlock):
    """The half with attention within windows."""

    def _attend(self, x: Float[Array, "b h w c"], rngs: nnx.Rngs | None) -> Float[Array, "b h w c"]:
        return self.attn(x, rngs=rngs)


class ChannelBlock(_HalfBlock):
    """The half with attention among channels. (MMPretrain drops only its second branch.)"""

    def _attend(self, x: Float[Array, "b h w c"], rngs: nnx.Rngs | None) -> Float[Array, "b h w c"]:
        return self.attn(x)


class DaViTBlock(BaseModule):
    """A spatial half and a channel half, on a map of tokens.

    Args:
        embed_dims: channels.
        num_heads: heads of both attentions.
        window_size: tokens along a side of a window.
        ffn_ratio: hidden channels of the feed-forward halves, as a multiple.
        qkv_bias: whether queries, keys and values have a bias.
        drop_path: probability of dropping a branch of a sample.
        pad_small_map: see `ShiftWindowMSA`.
        attn_cfgs, ffn_cfgs: further arguments of `ShiftWindowMSA` and of `FFN`.
        norm_cfg: the norms.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        window_size: int = 7,
        ffn_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_path: float = 0.0,
        pad_small_map: bool = False,
        attn_cfgs: Mapping[str, Any] = {},
        ffn_cfgs: Mapping[str, Any] = {},
        norm_cfg: Mapping[str, Any] = _LN,
        init_cfg: Any = None,
        *,
        rngs: nnx.Rngs,
    ):
        self.init_cfg, self.drop_path_rate, self.deterministic = init_cfg, float(drop_path), False
        window: dict[str, Any] = {"embed_dims": embed_dims, "num_heads": num_heads, "window_size": window_size}
        window |= {"qkv_bias": qkv_bias, "pad_small_map": pad_small_map, "window_msa": DaViTWindowMSA}
        spatial = ShiftWindowMSA(**{**window, **attn_cfgs}, rngs=rngs)
        channel = ChannelAttention(embed_dims, num_heads, qkv_bias, rngs=rngs)
        self.spatial_block = SpatialBlock(embed_dims, spatial, ffn_ratio, ffn_cfgs, norm_cfg, rngs=rngs)
        self.channel_block = ChannelBlock(embed_dims, channel, ffn_ratio, ffn_cfgs, norm_cfg, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b h w c"], *, rngs: nnx.Rngs | None = None, drop_path_rate: float | Array | None = None
    ) -> Float[Array, "b h w c"]:
        """`drop_path_rate` replaces the block's own; it may be traced (see `apply_layers`)."""
        rate = self.drop_path_rate if drop_path_rate is None else drop_path_rate
        rate = 0.0 if self.deterministic else rate
        return self.channel_block(self.spatial_block(x, rate, rngs), rate, rngs)


class DaViTDownSample(BaseModule):
    """A norm, and a convolution that halves the map; an odd last row or column is padded."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 2,
        stride: int = 2,
        padding: int | str = "same",
        bias: bool = True,
        norm_cfg: Mapping[str, Any] = _LN,
        *,
        rngs: nnx.Rngs,
    ):
        self.out_channels = out_channels
        self.norm = build_norm(norm_cfg, in_channels, rngs=rngs)
        self.projection = Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=bias, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        return self.projection(self.norm(x))


class DaViTBlockSequence(BaseModule):
    """A stage: blocks, and a downsampling for the next stage.

    Args:
        embed_dims: channels of the blocks.
        depth: number of blocks.
        num_heads, window_size, ffn_ratio, qkv_bias, pad_small_map: of the blocks (`DaViTBlock`).
        downsample: whether to halve the map at the end, and to double its channels.
        downsample_cfg: further arguments of `DaViTDownSample`.
        drop_paths: the blocks' `drop_path`, one for all or one for each.
        block_cfgs: further arguments of the blocks: one dict for all, or one for each.
        with_cp: MMPretrain's name for `remat='full'`.

    Attributes:
        out_channels: channels behind the downsampling.
        scan_layers, remat: how the blocks are run (see `apply_layers`).
    """

    def __init__(
        self,
        embed_dims: int,
        depth: int,
        num_heads: int,
        window_size: int = 7,
        ffn_ratio: float = 4.0,
        qkv_bias: bool = True,
        downsample: bool = False,
        downsample_cfg: Mapping[str, Any] = {},
        drop_paths: float | Sequence[float] = 0.0,
        block_cfgs: Mapping[str, Any] | Sequence[Mapping[str, Any]] = {},
        with_cp: bool = False,
        pad_small_map: bool = False,
        init_cfg: Any = None,
        *,
        rngs: nnx.Rngs,
    ):
        self.init_cfg, self.scan_layers, self.remat = init_cfg, False, "full" if with_cp else "none"
        rates = list(drop_paths) if isinstance(drop_paths, Sequence) else [drop_paths] * depth
        cfgs = [block_cfgs] * depth if isinstance(block_cfgs, Mapping) else list(block_cfgs)
        if not len(rates) == len(cfgs) == depth:
            raise ConfigError(f"a stage of {depth} blocks got {len(cfgs)} block_cfgs and {len(rates)} drop_paths")
        shared: dict[str, Any] = {"type": DaViTBlock, "embed_dims": embed_dims, "num_heads": num_heads}
        shared |= {"window_size": window_size, "ffn_ratio": ffn_ratio, "qkv_bias": qkv_bias}
        shared |= {"pad_small_map": pad_small_map}
        self.blocks = nnx.List(
            [build({**shared, "drop_path": rate, **cfg}, rngs=rngs) for rate, cfg in zip(rates, cfgs, strict=True)]
        )
        down = {"type": DaViTDownSample, "in_channels": embed_dims, "out_channels": 2 * embed_dims, **downsample_cfg}
        self.downsample = build(down, rngs=rngs) if downsample else None
        self.out_channels = embed_dims if self.downsample is None else self.downsample.out_channels

    def __call__(
        self, x: Float[Array, "b h w c"], *, rngs: nnx.Rngs | None = None
    ) -> tuple[Float[Array, "b h w c"], Float[Array, "b h2 w2 d"]]:
        """The stage's map, and the input of the next stage."""
        x, _ = apply_layers(self.blocks, x, rngs=rngs, scan_layers=self.scan_layers, remat=self.remat)
        return x, x if self.downsample is None else self.downsample(x)


class DaViT(BaseModule):
    """DaViT: [B, H, W, in_channels] -> a tuple of maps [B, h, w, C] of the chosen stages, normalised.

    Images may have any size whose feature maps are not smaller than the windows.

    Args:
        arch: 'tiny', 'small', 'base', 'large', 'huge' or 'giant' (t, s, b, l, h, g), or a dict with embed_dims, depths and
            num_heads, the latter two with a number for each stage.
        patch_size: stride of the first convolution, 7x7.
        in_channels: channels of the images.
        window_size: tokens along a side of a window.
        ffn_ratio: hidden channels of the feed-forward halves, as a multiple.
        qkv_bias: whether queries, keys and values have a bias.
        drop_path_rate: stochastic depth of the last block; grows linearly from 0 at the first.
        out_after_downsample: whether maps are taken behind the downsampling that ends a stage.
        pad_small_map: whether maps smaller than a window are padded (see `ShiftWindowMSA`).
        norm_cfg: the norm of each returned map (`norm0`, ...), None for none; norms within blocks are not affected.
        stage_cfgs: further arguments of the stages (`DaViTBlockSequence`): one dict for all, or one for each.
        frozen_stages: the last stage that does not learn, with all before it; -1 for none.
        norm_eval: whether BatchNorm, if it is the norm, always uses its running statistics.
        out_indices: the stages whose maps are returned; negative ones count from the end.
        with_cp: the same as `remat='full'`.
        init_cfg: initialisation, MMEngine's dictionaries.

    The attributes `scan_layers` and `remat` (see `apply_layers`) are those of the stages: `model.set_attributes` sets all.
    """

    archs: ClassVar = {
        ("t", "tiny"): dict(embed_dims=96, depths=[1, 1, 3, 1], num_heads=[3, 6, 12, 24]),
        ("s", "small"): dict(embed_dims=96, depths=[1, 1, 9, 1], num_heads=[3, 6, 12, 24]),
        ("b", "base"): dict(embed_dims=128, depths=[1, 1, 9, 1], num_heads=[4, 8, 16, 32]),
        ("l", "large"): dict(embed_dims=192, depths=[1, 1, 9, 1], num_heads=[6, 12, 24, 48]),
        ("h", "huge"): dict(embed_dims=256, depths=[1, 1, 9, 1], num_heads=[8, 16, 32, 64]),
        ("g", "giant"): dict(embed_dims=384, depths=[1, 1, 12, 3], num_heads=[12, 24, 48, 96]),
    }

    def __init__(
        self,
        arch: str | Mapping[str, Any] = "t",
        patch_size: int = 4,
        in_channels: int = 3,
        window_size: int = 7,
        ffn_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_path_rate: float = 0.1,
        out_after_downsample: bool = False,
        pad_small_map: bool = False,
        norm_cfg: Mapping[str, Any] | None = _LN,
        stage_cfgs: Mapping[str, Any] | Sequence[Mapping[str, Any]] = {},
        frozen_stages: int = -1,
        norm_eval: bool = False,
        out_indices: int | Sequence[int] = (3,),
        with_cp: bool = False,
        init_cfg: Any = None,
        *,
        rngs: nnx.Rngs,
    ):
        size = architecture(arch, self.archs, "DaViT")
        depths, heads, count = size["depths"], size["num_heads"], len(size["depths"])
        cfgs = [stage_cfgs] * count if isinstance(stage_cfgs, Mapping) else list(stage_cfgs)
        if not len(heads) == len(cfgs) == count:
            raise ConfigError(f"DaViT: {count} stages got {len(heads)} num_heads and {len(cfgs)} stage_cfgs")
        self.init_cfg, self.embed_dims, self.out_after_downsample = init_cfg, size["embed_dims"], out_after_downsample
        self.out_indices = output_indices(out_indices, count, "DaViT")
        self.patch_embed = ConvPatchEmbed(in_channels, self.embed_dims, 7, patch_size, norm_cfg=_LN, rngs=rngs)
        shared: dict[str, Any] = {"type": DaViTBlockSequence, "window_size": window_size, "ffn_ratio": ffn_ratio}
        shared |= {"qkv_bias": qkv_bias, "with_cp": with_cp, "pad_small_map": pad_small_map}
        rates = np.split(np.linspace(0, drop_path_rate, sum(depths)), np.cumsum(depths)[:-1])
        stages: list[Any] = []
        width = self.embed_dims
        for i, cfg in enumerate(cfgs):
            own = {"embed_dims": width, "depth": depths[i], "num_heads": heads[i], "drop_paths": rates[i].tolist()}
            stages.append(build({**shared, **own, "downsample": i < count - 1, **cfg}, rngs=rngs))
            if i in self.out_indices:
                out = stages[i].out_channels if out_after_downsample else width
                norm = None if norm_cfg is None else build_norm(norm_cfg, out, norm_eval=norm_eval, rngs=rngs)
                setattr(self, f"norm{i}", norm)
            width = stages[i].out_channels
        self.stages = nnx.List(stages)
        self._freeze_stages(frozen_stages)

    def __call__(
        self, x: Float[Array, "b h w c"], *, rngs: nnx.Rngs | None = None
    ) -> tuple[Float[Array, "b h2 w2 c2"], ...]:
        """The maps of the stages in `out_indices`, in order. `rngs` is for drop path in training."""
        x = self.patch_embed(x)
        outs = []
        for i, stage in enumerate(self.stages):
            features, x = stage(x, rngs=rngs)
            if i in self.out_indices:
                norm, out = getattr(self, f"norm{i}"), x if self.out_after_downsample else features
                outs.append(out if norm is None else norm(out))
        return tuple(outs)

    def _freeze_stages(self, frozen_stages: int) -> None:
        if frozen_stages >= len(self.stages):
            last = len(self.stages) - 1
            raise ConfigError(f"DaViT: frozen_stages={frozen_stages}, but its stages are 0 to {last}")
        if frozen_stages >= 0:
            norms = [getattr(self, f"norm{i}") for i in self.out_indices if i <= frozen_stages]
            for part in (self.patch_embed, *self.stages[: frozen_stages + 1], *norms):
                if part is not None:
                    freeze_stage(part)
