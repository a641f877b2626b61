"""Swin Transformer (Liu et al., 2021), a hierarchy of attention within shifted windows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxpretrain.build import ConfigError, build, nearest
from jaxpretrain.models.layers.attention import scaled_dot_product_attention
from jaxpretrain.models.layers.base import BaseModule, freeze
from jaxpretrain.models.layers.drop import Dropout, drop_path
from jaxpretrain.models.layers.ffn import FFN
from jaxpretrain.models.layers.init import trunc_normal
from jaxpretrain.models.layers.linear import Linear
from jaxpretrain.models.layers.norm import build_norm
from jaxpretrain.models.layers.patch_embed import PatchEmbed
from jaxpretrain.models.layers.patch_merging import PatchMerging
from jaxpretrain.models.layers.position import fit_pos_embed, resize_pos_embed
from jaxpretrain.models.layers.relative_position import (
    fit_bias_table,
    num_relative_positions,
    relative_position_bias,
    relative_position_index,
)
from jaxpretrain.models.layers.stack import apply_layers
from jaxpretrain.models.layers.window import ShiftWindowMSA, window_bias


class WindowMSA(BaseModule):
    """Self-attention of the tokens of a window, with a learned bias for each relative position.

    Args:
        embed_dims: channels of input and output.
        window_size: tokens (down, across).
        num_heads: heads; must divide `embed_dims`.
        qkv_bias: whether queries, keys and values have a bias.
        qk_scale: factor of the logits; 1 / sqrt(channels of a head) if None.
        attn_drop, proj_drop: dropout of the attention weights and of the output.
    """

    def __init__(
        self,
        embed_dims: int,
        window_size: tuple[int, int],
        num_heads: int,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        init_cfg: Any = None,
        *,
        rngs: nnx.Rngs,
    ):
        if embed_dims % num_heads:
            raise ConfigError(f"WindowMSA: embed_dims={embed_dims} is not a multiple of num_heads={num_heads}")
        self.init_cfg, self.window_size, self.num_heads = init_cfg, window_size, num_heads
        self.scale = qk_scale or (embed_dims // num_heads) ** -0.5
        self.relative_position_bias_table = nnx.Param(jnp.zeros((num_relative_positions(window_size), num_heads)))
        self.qkv = Linear(embed_dims, 3 * embed_dims, bias=qkv_bias, rngs=rngs)
        self.attn_drop = Dropout(attn_drop)
        self.proj = Linear(embed_dims, embed_dims, rngs=rngs)
        self.proj_drop = Dropout(proj_drop)

    def __call__(
        self,
        x: Float[Array, "b n c"],
        regions: Int[np.ndarray, "windows n"] | None = None,
        *,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "b n c"]:
        b, n, c = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, c // self.num_heads)
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        bias = window_bias(relative_position_bias(self.relative_position_bias_table[...], self.window_size), regions, b)
        y = scaled_dot_product_attention(self, q, k, v, scale=self.scale, bias=bias, dropout=self.attn_drop, rngs=rngs)
        return self.proj_drop(self.proj(y.reshape(b, n, c)), rngs=rngs)

    def derived(self) -> dict[str, np.ndarray]:
        return {"relative_position_index": relative_position_index(self.window_size)}

    def adapt(self, name: str, array: np.ndarray) -> np.ndarray | None:
        """Biases for another window are resized by BEiT's scheme."""
        return fit_bias_table(array, self.window_size) if name == "relative_position_bias_table" else None

    def init_weights(self, rngs: nnx.Rngs) -> None:
        """Besides `init_cfg`: the biases from a truncated normal distribution of std 0.02."""
        super().init_weights(rngs)
        table = self.relative_position_bias_table
        table.set_value(trunc_normal(0.02)(rngs.params(), table.shape))


class SwinBlock(BaseModule):
    """x + attention(norm1(x)), then x + ffn(norm2(x)), on a map of tokens.

    Args:
        embed_dims: channels.
        num_heads: heads of the attention.
        window_size: tokens along a side of a window.
        shift: whether windows are shifted, by half their size.
        ffn_ratio: hidden channels of the feed-forward half, as a multiple of `embed_dims`.
        drop_path: probability of dropping a branch of a sample.
        pad_small_map: see `ShiftWindowMSA`.
        attn_cfgs, ffn_cfgs: further arguments of `ShiftWindowMSA` (and `WindowMSA`), and of `FFN`.
        norm_cfg: the norms.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        window_size: int = 7,
        shift: bool = False,
        ffn_ratio: float = 4.0,
        drop_path: float = 0.0,
        pad_small_map: bool = False,
        attn_cfgs: Mapping[str, Any] = {},
        ffn_cfgs: Mapping[str, Any] = {},
        norm_cfg: Mapping[str, Any] = {"type": "LN"},
        init_cfg: Any = None,
        *,
        rngs: nnx.Rngs,
    ):
        self.init_cfg, self.drop_path_rate, self.deterministic = init_cfg, float(drop_path), False
        attn: dict[str, Any] = {"window_msa": WindowMSA, "window_size": window_size}
        attn |= {"embed_dims": embed_dims, "num_heads": num_heads, "shift_size": window_size // 2 if shift else 0}
        ffn = {"type": FFN, "embed_dims": embed_dims, "feedforward_channels": int(embed_dims * ffn_ratio)}
        self.norm1 = build_norm(norm_cfg, embed_dims, rngs=rngs)
        self.attn = ShiftWindowMSA(**{**attn, "pad_small_map": pad_small_map, **attn_cfgs}, rngs=rngs)
        self.norm2 = build_norm(norm_cfg, embed_dims, rngs=rngs)
        self.ffn = build({**ffn, **ffn_cfgs}, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b h w c"], *, rngs: nnx.Rngs | None = None, drop_path_rate: float | Array | None = None
    ) -> Float[Array, "b h w c"]:
        """`drop_path_rate` replaces the block's own; it may be traced (see `apply_layers`)."""
        rate = self.drop_path_rate if drop_path_rate is None else drop_path_rate
        rate = 0.0 if self.deterministic else rate
        x = x + drop_path(self.attn(self.norm1(x), rngs=rngs), rate, rngs)
        return x + drop_path(self.ffn(self.norm2(x), rngs=rngs), rate, rngs)


class SwinBlockSequence(BaseModule):
    """A stage: blocks without and with shift in turn, then a downsampling for the next stage.

    Args:
        embed_dims: channels of the blocks.
        depth: number of blocks.
        num_heads: heads of their attention.
        window_size: tokens along a side of a window.
        downsample: whether to halve the map at the end, and to double its channels.
        downsample_cfg: further arguments of `PatchMerging`.
        drop_paths: the blocks' `drop_path`, one for all or one for each.
        block_cfgs: further arguments of the blocks: one dict for all, or one for each.
        with_cp: MMPretrain's name for `remat='full'`.
        pad_small_map: see `ShiftWindowMSA`.

    Attributes:
        out_channels: channels behind the downsampling.
        scan_layers, remat: how the blocks are run (see `apply_layers`).
    """

    downsamples_first: ClassVar = False

    def __init__(
        self,
        embed_dims: int,
        depth: int,
        num_heads: int,
        window_size: int = 7,
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
        self.init_cfg, self.embed_dims = init_cfg, embed_dims
        self.scan_layers, self.remat = False, "full" if with_cp else "none"
        cfg = {"type": SwinBlock, "embed_dims": embed_dims, "num_heads": num_heads}
        cfg |= {"window_size": window_size, "pad_small_map": pad_small_map}
        self.blocks = alternating_blocks(cfg, depth, drop_paths, block_cfgs, rngs)
        merging = {"type": PatchMerging, "in_channels": embed_dims, "out_channels": 2 * embed_dims, **downsample_cfg}
        self.downsample = build(merging, rngs=rngs) if downsample else None
        self.out_channels = embed_dims if self.downsample is None else self.downsample.out_channels

    def __call__(
        self, x: Float[Array, "b h w c"], *, rngs: nnx.Rngs | None = None
    ) -> tuple[Float[Array, "b h w c"], Float[Array, "b h2 w2 d"]]:
        """The stage's features, and the input of the next stage."""
        x, _ = apply_layers(self.blocks, x, rngs=rngs, scan_layers=self.scan_layers, remat=self.remat)
        return x, x if self.downsample is None else self.downsample(x)


def alternating_blocks(
    cfg: Mapping[str, Any],
    depth: int,
    drop_paths: float | Sequence[float],
    block_cfgs: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    rngs: nnx.Rngs,
) -> nnx.List:
    """`depth` blocks of the configuration `cfg`, every second one with shift."""
    drop_paths = list(drop_paths) if isinstance(drop_paths, Sequence) else [drop_paths] * depth
    block_cfgs = [block_cfgs] * depth if isinstance(block_cfgs, Mapping) else list(block_cfgs)
    if not len(drop_paths) == len(block_cfgs) == depth:
        raise ConfigError(
            f"a stage of {depth} blocks got {len(block_cfgs)} block_cfgs and {len(drop_paths)} drop_paths"
        )
    return nnx.List(
        [
            build({**cfg, "shift": i % 2 == 1, "drop_path": rate, **block_cfg}, rngs=rngs)
            for i, (rate, block_cfg) in enumerate(zip(drop_paths, block_cfgs, strict=True))
        ]
    )


class SwinTransformer(BaseModule):
    """Swin Transformer, for images of any size whose feature maps are not smaller than the windows.

    Args:
        arch: 'tiny', 'small', 'base' or 'large' (t, s, b, l), or a dict with embed_dims, depths and num_heads, the latter
            two with a number for each stage.
        img_size: size of the images that absolute positions are for, one number or (height, width).
        patch_size: pixels per token, one number or (height, width).
        in_channels: channels of the images.
        window_size: tokens along a side of a window.
        drop_rate: dropout before the first stage.
        drop_path_rate: stochastic depth of the last block; grows linearly from 0 at the first.
        out_indices: the stages whose features are returned, from 0; negative ones count from the end.
        out_after_downsample: whether features are taken behind the downsampling that ends a stage.
        use_abs_pos_embed: whether positions are added to the first tokens; they are interpolated for other sizes.
        interpolate_mode: 'bicubic' or 'bilinear', for these.
        with_cp: MMPretrain's name for `remat='full'`.
        frozen_stages: the last stage that does not learn; the patch embedding, all stages before and their norms do not
            either, and have no dropout. -1 for none.
        norm_eval: whether BatchNorm, if it is the norm, always uses its running statistics.
        pad_small_map: whether feature maps smaller than a window are padded (see `ShiftWindowMSA`).
        norm_cfg: the norm of each stage's features (`norm0`, ...), None for none; norms within blocks are not affected.
        stage_cfgs: further arguments of the stages (`SwinBlockSequence`): one dict for all, or one for each.
        patch_cfg: further arguments of `PatchEmbed`.
        init_cfg: initialisation (see `BaseModule`). Positions are drawn from a truncated normal distribution besides.

    The attributes `scan_layers` and `remat` (see `apply_layers`) are those of the stages: `model.set_attributes` sets all.

    Raises:
        ConfigError: an unknown name, or arguments that do not fit together.
    """

    stage_type: ClassVar[Any] = SwinBlockSequence
    archs: ClassVar[dict[tuple[str, ...], dict[str, Any]]] = {
        ("t", "tiny"): dict(embed_dims=96, depths=[2, 2, 6, 2], num_heads=[3, 6, 12, 24]),
        ("s", "small"): dict(embed_dims=96, depths=[2, 2, 18, 2], num_heads=[3, 6, 12, 24]),
        ("b", "base"): dict(embed_dims=128, depths=[2, 2, 18, 2], num_heads=[4, 8, 16, 32]),
        ("l", "large"): dict(embed_dims=192, depths=[2, 2, 18, 2], num_heads=[6, 12, 24, 48]),
    }

    def __init__(
        self,
        arch: str | Mapping[str, Any] = "tiny",
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 4,
        in_channels: int = 3,
        window_size: int = 7,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        out_indices: int | Sequence[int] = (3,),
        out_after_downsample: bool = False,
        use_abs_pos_embed: bool = False,
        interpolate_mode: str = "bicubic",
        with_cp: bool = False,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        pad_small_map: bool = False,
        norm_cfg: Mapping[str, Any] | None = {"type": "LN"},
        stage_cfgs: Mapping[str, Any] | Sequence[Mapping[str, Any]] = {},
        patch_cfg: Mapping[str, Any] = {},
        init_cfg: Any = None,
        *,
        rngs: nnx.Rngs,
    ):
        size = self.size(arch)
        depths, num_stages = size["depths"], len(size["depths"])
        self.embed_dims, self.init_cfg = size["embed_dims"], init_cfg
        self.out_after_downsample, self.interpolate_mode = out_after_downsample, interpolate_mode
        self.out_indices = self._stage_indices(out_indices, num_stages)

        patches: dict[str, Any] = {
            "in_channels": in_channels,
            "embed_dims": self.embed_dims,
            "norm_cfg": {"type": "LN"},
        }
        patches |= {"kernel_size": patch_size, "input_size": img_size, **patch_cfg}
        self.patch_embed = PatchEmbed(**patches, rngs=rngs)
        self.patch_resolution = self.patch_embed.init_out_size
        shape = (1, self.patch_resolution[0] * self.patch_resolution[1], self.embed_dims)
        self.absolute_pos_embed = nnx.Param(jnp.zeros(shape)) if use_abs_pos_embed else None
        self.drop_after_pos = Dropout(drop_rate)

        stage_cfgs = [stage_cfgs] * num_stages if isinstance(stage_cfgs, Mapping) else list(stage_cfgs)
        if len(stage_cfgs) != num_stages:
            raise ConfigError(f"{type(self).__name__}: {len(stage_cfgs)} stage_cfgs for {num_stages} stages")
        rates = np.split(np.linspace(0, drop_path_rate, sum(depths)), np.cumsum(depths)[:-1])
        first = self.stage_type.downsamples_first
        self.stages: nnx.List[Any] = nnx.List()
        channels = self.embed_dims
        for i, stage_cfg in enumerate(stage_cfgs):
            cfg = {
                "type": self.stage_type,
                "embed_dims": channels,
                "depth": depths[i],
                "num_heads": size["num_heads"][i],
            }
            cfg |= {"downsample": i > 0 if first else i < num_stages - 1, "drop_paths": rates[i].tolist()}
            cfg |= {"window_size": window_size, "with_cp": with_cp, "pad_small_map": pad_small_map}
            self.stages.append(build({**cfg, **stage_cfg}, rngs=rngs))
            channels = self.stages[i].out_channels
        for i in self.out_indices:
            width = self.stages[i].out_channels if out_after_downsample else self.stages[i].embed_dims
            norm = None if norm_cfg is None else build_norm(norm_cfg, width, norm_eval=norm_eval, rngs=rngs)
            setattr(self, f"norm{i}", norm)
        self._freeze_stages(frozen_stages)

    def __call__(self, x: Float[Array, "b h w c"], *, rngs: nnx.Rngs | None = None) -> tuple[Array, ...]:
        """The features of the chosen stages, [B, h, w, C] each, normalised."""
        x = self.add_positions(self.embed(x))
        return self.run_stages(self.drop_after_pos(x, rngs=rngs), rngs=rngs)

    # The steps of the forward pass, for methods that put something in between.

    def embed(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        """The map of patch tokens, without positions."""
        x, grid = self.patch_embed(x)
        return x.reshape(x.shape[0], *grid, -1)

    def add_positions(self, x: Float[Array, "b h w d"]) -> Float[Array, "b h w d"]:
        """The tokens with their absolute positions; without a table, x as it is."""
        if self.absolute_pos_embed is None:
            return x
        table, grid = self.absolute_pos_embed[...], (x.shape[1], x.shape[2])
        positions = resize_pos_embed(table, self.patch_resolution, grid, self.interpolate_mode, num_extra_tokens=0)
        return x + positions.reshape(1, *grid, -1).astype(x.dtype)

    def run_stages(self, x: Float[Array, "b h w d"], *, rngs: nnx.Rngs | None = None) -> tuple[Array, ...]:
        """All stages; the features of the chosen ones, normalised."""
        outputs = []
        for i, stage in enumerate(self.stages):
            features, x = stage(x, rngs=rngs)
            if i in self.out_indices:
                norm = getattr(self, f"norm{i}")
                out = x if self.out_after_downsample else features
                outputs.append(out if norm is None else norm(out))
        return tuple(outputs)

    def init_weights(self, rngs: nnx.Rngs) -> None:
        """Besides `init_cfg` and the blocks' own rules: positions from a truncated normal distribution of std 0.02."""
        super().init_weights(rngs)
        if self.absolute_pos_embed is not None:
            self.absolute_pos_embed.set_value(trunc_normal(0.02)(rngs.params(), self.absolute_pos_embed.shape))

    def adapt(self, name: str, array: np.ndarray) -> np.ndarray | None:
        """Absolute positions for images of another size are interpolated."""
        if name != "absolute_pos_embed":
            return None
        return fit_pos_embed(array, self.patch_resolution, self.interpolate_mode, num_extra_tokens=0)

    def _freeze_stages(self, frozen_stages: int) -> None:
        if frozen_stages < 0:
            return
        if frozen_stages >= len(self.stages):
            name, count = type(self).__name__, len(self.stages)
            raise ConfigError(f"{name}: frozen_stages={frozen_stages}, but its {count} stages are 0 to {count - 1}")
        norms = [getattr(self, f"norm{i}") for i in self.out_indices if i <= frozen_stages]
        for part in [self.patch_embed, *self.stages[: frozen_stages + 1], *norms]:
            if part is not None:
                freeze(part)
                part.set_attributes(rate=0.0, drop_path_rate=0.0, raise_if_not_found=False)

    @classmethod
    def size(cls, arch: str | Mapping[str, Any]) -> dict[str, Any]:
        """The numbers that make an architecture.

        Raises:
            ConfigError: an unknown name, or a number that is missing or given for too few stages.
        """
        if isinstance(arch, str):
            for names, size in cls.archs.items():
                if arch.lower() in names:
                    return size
            raise ConfigError(
                f"{cls.__name__}: unknown arch {arch!r}.{nearest(arch, [n for ns in cls.archs for n in ns])}"
            )
        keys = next(iter(cls.archs.values())).keys()
        if missing := [key for key in keys if key not in arch]:
            raise ConfigError(f"{cls.__name__}: arch needs {', '.join(keys)}; missing: {', '.join(missing)}")
        if len(arch["depths"]) != len(arch["num_heads"]):
            raise ConfigError(
                f"{cls.__name__}: arch has {len(arch['depths'])} depths, {len(arch['num_heads'])} num_heads"
            )
        return dict(arch)

    @classmethod
    def _stage_indices(cls, out_indices: int | Sequence[int], num_stages: int) -> tuple[int, ...]:
        """Sorted indices from 0 of the stages that `out_indices` mean."""
        indices = [out_indices] if isinstance(out_indices, int) else list(out_indices)
        for index in indices:
            if not -num_stages <= index < num_stages:
                raise ConfigError(f"{cls.__name__}: out_indices has {index}, but there are {num_stages} stages")
        return tuple(sorted({index % num_stages for index in indices}))
