"""HiViT: A Simpler and More Efficient Design of Hierarchical Vision Transformer (Zhang et al., 2022, arXiv:2205.14949).

A hierarchy without windows: in the first stages, small patches are not mixed with others but within their own patch of
16 pixels, by merging; so hidden patches can be left out altogether, and masked pre-training is as cheap as ViT's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from jaxpretrain.build import ConfigError
from jaxpretrain.models.layers.arch import architecture, output_indices
from jaxpretrain.models.layers.attention import MultiheadAttention
from jaxpretrain.models.layers.base import BaseModule, Frozen, freeze_stage
from jaxpretrain.models.layers.conv import Conv2d
from jaxpretrain.models.layers.drop import Dropout, drop_path
from jaxpretrain.models.layers.init import apply_init_cfg, trunc_normal
from jaxpretrain.models.layers.intermediates import record
from jaxpretrain.models.layers.linear import Linear
from jaxpretrain.models.layers.norm import build_norm
from jaxpretrain.models.layers.patch_embed import to_2tuple
from jaxpretrain.models.layers.position import fit_pos_embed, resize_pos_embed
from jaxpretrain.models.layers.relative_position import (
    fit_bias_table,
    num_relative_positions,
    relative_position_bias,
    relative_position_index,
)
from jaxpretrain.models.layers.stack import apply_layers

_LN = {"type": "LN"}
_INIT = (
    {"type": "TruncNormal", "layer": "Linear", "std": 0.02, "bias": 0.0},
    {"type": "Constant", "layer": "LayerNorm", "val": 1.0, "bias": 0.0},
)


class Mlp(BaseModule):
    """fc2(gelu(fc1(x))) on each token, with dropout at the end."""

    def __init__(self, in_features: int, hidden_features: int, drop: float = 0.0, *, rngs: nnx.Rngs):
        self.fc1 = Linear(in_features, hidden_features, rngs=rngs)
        self.fc2 = Linear(hidden_features, in_features, rngs=rngs)
        self.drop = Dropout(drop)

    def __call__(self, x: Float[Array, "*batch c"], *, rngs: nnx.Rngs | None = None) -> Float[Array, "*batch c"]:
        return self.drop(self.fc2(nnx.gelu(self.fc1(x), approximate=False)), rngs=rngs)


class Attention(MultiheadAttention):
    """Self-attention of all patches, with a bias for each relative position if they have a `window`.

    Args:
        dim, num_heads: channels and heads.
        window: patches (down, across) that the table of biases is for; None for no table.
        kwargs: other arguments of `MultiheadAttention`.
    """

    def __init__(
        self, dim: int, num_heads: int, window: tuple[int, int] | None = None, *, rngs: nnx.Rngs, **kwargs: Any
    ):
        super().__init__(dim, num_heads, rngs=rngs, **kwargs)
        self.window = window
        table = None if window is None else nnx.Param(jnp.zeros((num_relative_positions(window), num_heads)))
        self.relative_position_bias_table = table

    def __call__(
        self, x: Float[Array, "b n c"], grid: tuple[int, int] | None = None, *, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "b n c"]:
        """`grid`: the patches (down, across); None if x are not all of them: then there is no bias."""
        bias = None
        if grid is not None and self.window is not None and self.relative_position_bias_table is not None:
            bias = relative_position_bias(self.relative_position_bias_table[...], self.window, grid)
        return self.attend(*self.heads(x), bias=bias, rngs=rngs)

    def derived(self) -> dict[str, np.ndarray]:
        return {} if self.window is None else {"relative_position_index": relative_position_index(self.window)}

    def adapt(self, name: str, array: np.ndarray) -> np.ndarray | None:
        """Biases for another grid of patches are resized by BEiT's scheme."""
        known = name == "relative_position_bias_table" and self.window is not None
        return fit_bias_table(array, self.window) if known and self.window is not None else None

    def init_weights(self, rngs: nnx.Rngs) -> None:
        """Besides `init_cfg`: the biases from a truncated normal distribution of std 0.02."""
        super().init_weights(rngs)
        if (table := self.relative_position_bias_table) is not None:
            table.set_value(trunc_normal(0.02)(rngs.params(), table.shape))


class BlockWithRPE(BaseModule):
    """x + gamma_1 attn(norm1(x)), in the main stage only; then x + gamma_2 mlp(norm2(x)).

    Args:
        dim: channels.
        num_heads: heads of the attention; 0 for no attention: then positions may be in any number of axes.
        mlp_ratio: hidden channels of the MLP, as a multiple of `dim`.
        qkv_bias, qk_scale: as of `MultiheadAttention`.
        drop, attn_drop: dropout of the branches' outputs and of the attention weights.
        drop_path: probability of dropping a branch of a sample in training.
        window: as of `Attention`.
        layer_scale_init_value: where the factors gamma start; 0 for none.
        norm_cfg: the norms.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 0,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        window: tuple[int, int] | None = None,
        layer_scale_init_value: float = 0.0,
        norm_cfg: Mapping[str, Any] = _LN,
        *,
        rngs: nnx.Rngs,
    ):
        self.drop_path_rate, self.deterministic = float(drop_path), False
        gamma = layer_scale_init_value
        self.norm1 = build_norm(norm_cfg, dim, rngs=rngs) if num_heads else None
        attn: dict[str, Any] = dict(attn_drop=attn_drop, proj_drop=drop, qkv_bias=qkv_bias, qk_scale=qk_scale)
        self.attn = Attention(dim, num_heads, window, rngs=rngs, **attn) if num_heads else None
        self.norm2 = build_norm(norm_cfg, dim, rngs=rngs)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop, rngs=rngs)
        self.gamma_1 = nnx.Param(jnp.full((dim,), gamma)) if gamma > 0 and num_heads else None
        self.gamma_2 = nnx.Param(jnp.full((dim,), gamma)) if gamma > 0 else None

    def __call__(
        self,
        x: Float[Array, "b ... c"],
        *,
        grid: tuple[int, int] | None = None,
        rngs: nnx.Rngs | None = None,
        drop_path_rate: float | Array | None = None,
    ) -> Float[Array, "b ... c"]:
        """`drop_path_rate` replaces the block's own; it may be traced (see `apply_layers`)."""
        rate = self.drop_path_rate if drop_path_rate is None else drop_path_rate
        rate = 0.0 if self.deterministic else rate
        if self.attn is not None and self.norm1 is not None:
            x = x + drop_path(_scaled(self.attn(self.norm1(x), grid, rngs=rngs), self.gamma_1), rate, rngs)
        return x + drop_path(_scaled(self.mlp(self.norm2(x), rngs=rngs), self.gamma_2), rate, rngs)


def _scaled(x: Float[Array, "*batch c"], gamma: nnx.Variable | None) -> Float[Array, "*batch c"]:
    return x if gamma is None else x * gamma[...].astype(x.dtype)


class PatchEmbed(BaseModule):
    """Images to patches of `inner_patches` x `inner_patches` tokens each: [B, H, W, 3] -> [B, N, inner, inner, C].

    Args:
        patch_size: pixels of a patch (down, across).
        inner_patches: tokens of a patch, down and across.
        in_chans, embed_dim: channels of images and tokens.
        norm_cfg: the norm of the tokens; None for none.
        kernel_size, pad_size: of the convolution; its stride, the pixels of a token, and 0 by default.
    """

    def __init__(
        self,
        patch_size: tuple[int, int] = (16, 16),
        inner_patches: int = 4,
        in_chans: int = 3,
        embed_dim: int = 128,
        norm_cfg: Mapping[str, Any] | None = None,
        kernel_size: int | tuple[int, int] | None = None,
        pad_size: int | tuple[int, int] | None = None,
        *,
        rngs: nnx.Rngs,
    ):
        if any(size % inner_patches for size in patch_size):
            raise ConfigError(f"HiViT: patch_size={patch_size} is not a multiple of inner_patches={inner_patches}")
        self.patch_size, self.inner_patches = patch_size, inner_patches
        stride = patch_size[0] // inner_patches, patch_size[1] // inner_patches
        self.proj = Conv2d(in_chans, embed_dim, kernel_size or stride, stride, pad_size or 0, rngs=rngs)
        self.norm = None if norm_cfg is None else build_norm(norm_cfg, embed_dim, rngs=rngs)

    def __call__(self, x: Float[Array, "b height width c"]) -> tuple[Float[Array, "b n i i d"], tuple[int, int]]:
        """Patches in row-major order, their tokens too; and the patches down and across."""
        (b, height, width, _), (p, q), inner = x.shape, self.patch_size, self.inner_patches
        if height % p or width % q:
            raise ValueError(f"HiViT: images of {height}x{width} px do not divide into patches of {p}x{q}")
        h, w = height // p, width // q
        tokens = self.proj(x).reshape(b, h, inner, w, inner, -1).transpose(0, 1, 3, 2, 4, 5)
        tokens = tokens.reshape(b, h * w, inner, inner, -1)
        return (tokens if self.norm is None else self.norm(tokens)), (h, w)


class PatchMerge(BaseModule):
    """Each 2x2 tokens within a patch become one of twice the channels. The joined channels are in the order (column, row)."""

    def __init__(self, dim: int, norm_cfg: Mapping[str, Any] = _LN, *, rngs: nnx.Rngs):
        self.norm = build_norm(norm_cfg, 4 * dim, rngs=rngs)
        self.reduction = Linear(4 * dim, 2 * dim, bias=False, rngs=rngs)

    def __call__(self, x: Float[Array, "b n i i c"]) -> Float[Array, "b n j j d"]:
        b, n, inner, _, c = x.shape
        half = inner // 2
        x = x.reshape(b, n, half, 2, half, 2, c).transpose(0, 1, 2, 4, 5, 3, 6).reshape(b, n, half, half, 4 * c)
        x = self.reduction(self.norm(x))
        record(self, "out", x)
        return x


class HiViT(BaseModule):
    """HiViT: [B, H, W, 3] -> a tuple of maps [B, H/16, W/16, C].

    Args:
        arch: 'tiny', 'small', 'base', 'large' (t, s, b, l), or a dictionary with embed_dims (of the main stage), depths of
            all stages, and num_heads of the main stage, the last. Blocks of the other stages count for two.
        img_size: size of the images that positions are for, one number or (height, width).
        patch_size: pixels of a patch, down and across.
        inner_patches: tokens of a patch at first, down and across; halved after each stage, to 1 in the main stage.
        in_chans: channels of the images.
        stem_mlp_ratio, mlp_ratio: hidden channels of the MLPs, as multiples, before the main stage and in it.
        qkv_bias, qk_scale: as of `MultiheadAttention`.
        drop_rate: dropout after positions, and of the branches' outputs.
        attn_drop_rate: dropout of the attention weights.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0 in the first.
        norm_cfg: all norms. There is none at the end.
        out_indices: blocks of the main stage whose outputs are returned. As in MMPretrain, the last of them means the
            last block, whatever it is. (MMPretrain also returns blocks before the main stage of the same numbers.)
        ape: whether absolute positions are added to the patches, before the main stage; for images of another size
            they are interpolated. (MMPretrain's are at places that are off by up to a tenth of a patch.)
        rpe: whether attention has biases for relative positions.
        patch_norm: whether tokens are normalised before the first block.
        frozen_stages: how many first entries of `blocks` (blocks and mergings) do not learn; the patch embedding and
            positions do not either. 0 or less: all learn.
        kernel_size, pad_size: of the patch embedding (see `PatchEmbed`).
        layer_scale_init_value: start of LayerScale; 0 for none.
        init_cfg: initialisation, MMEngine's dictionaries.

    Attributes:
        patch_resolution: patches (down, across) that positions are for.
        num_extra_tokens: 0; there is no class token.
        scan_layers, remat: how the blocks are run (see `apply_layers`).
    """

    archs: ClassVar[dict[tuple[str, ...], dict[str, Any]]] = {
        ("t", "tiny"): dict(embed_dims=384, depths=[1, 1, 10], num_heads=6),
        ("s", "small"): dict(embed_dims=384, depths=[2, 2, 20], num_heads=6),
        ("b", "base"): dict(embed_dims=512, depths=[2, 2, 24], num_heads=8),
        ("l", "large"): dict(embed_dims=768, depths=[2, 2, 40], num_heads=12),
    }
    num_extra_tokens: ClassVar = 0

    def __init__(
        self,
        arch: str | Mapping[str, Any] = "base",
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        inner_patches: int = 4,
        in_chans: int = 3,
        stem_mlp_ratio: float = 3.0,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_cfg: Mapping[str, Any] = _LN,
        out_indices: int | Sequence[int] = (23,),
        ape: bool = True,
        rpe: bool = False,
        patch_norm: bool = True,
        frozen_stages: int = -1,
        kernel_size: int | tuple[int, int] | None = None,
        pad_size: int | tuple[int, int] | None = None,
        layer_scale_init_value: float = 0.0,
        init_cfg: Any = None,
        *,
        rngs: nnx.Rngs,
    ):
        name = type(self).__name__
        size = architecture(arch, self.archs, name)
        depths, self.embed_dims = list(size["depths"]), size["embed_dims"]
        if inner_patches != 2 ** (len(depths) - 1):
            raise ConfigError(
                f"{name}: {len(depths)} stages merge {2 ** (len(depths) - 1)} inner patches into one, not {inner_patches}"
            )
        self.init_cfg, self.scan_layers, self.remat = init_cfg, False, "none"
        self.num_main_blocks = depths[-1]
        wanted = [out_indices] if isinstance(out_indices, int) else list(out_indices)
        self.out_indices = output_indices([*wanted[:-1], depths[-1] - 1], depths[-1], name)

        width = self.embed_dims // inner_patches
        patch = to_2tuple(patch_size)
        (height, width_px), norm = to_2tuple(img_size), norm_cfg if patch_norm else None
        self.patch_embed = PatchEmbed(patch, inner_patches, in_chans, width, norm, kernel_size, pad_size, rngs=rngs)
        self.patch_resolution = height // patch[0], width_px // patch[1]
        self.rpe = rpe
        shape = (1, math.prod(self.patch_resolution), self.embed_dims)
        self.pos_embed: nnx.Variable | None = nnx.Param(jnp.zeros(shape)) if ape else None
        self.pos_drop = Dropout(drop_rate)

        counts = [2 * depth for depth in depths[:-1]] + depths[-1:]
        rates = iter(np.linspace(0, drop_path_rate, sum(counts)).tolist())
        cfg: dict[str, Any] = dict(
            qkv_bias=qkv_bias, qk_scale=qk_scale, drop=drop_rate, attn_drop=attn_drop_rate, norm_cfg=norm_cfg
        )
        cfg |= dict(layer_scale_init_value=layer_scale_init_value, window=self.patch_resolution if rpe else None)
        blocks: list[BlockWithRPE | PatchMerge] = []
        for i, count in enumerate(counts):
            main = i == len(counts) - 1
            heads, ratio = (size["num_heads"], mlp_ratio) if main else (0, stem_mlp_ratio)
            blocks += [BlockWithRPE(width, heads, ratio, drop_path=next(rates), rngs=rngs, **cfg) for _ in range(count)]
            if not main:
                blocks.append(PatchMerge(width, norm_cfg, rngs=rngs))
                width *= 2
        self.blocks: nnx.List[Any] = nnx.List(blocks)
        self._freeze_stages(frozen_stages)

    def __call__(
        self, x: Float[Array, "b height width 3"], *, rngs: nnx.Rngs | None = None
    ) -> tuple[Float[Array, "b h w c"], ...]:
        """The maps at `out_indices`, in order. `rngs` is for dropout and drop path in training."""
        x, grid = self.patch_embed(x)
        x, _ = self.run_stem(x, rngs=rngs)
        x = self.pos_drop(x + self.positions(grid, x.dtype), rngs=rngs)
        _, outputs = self.run_main(x, grid, self.out_indices, rngs=rngs)
        return tuple(out.reshape(out.shape[0], *grid, -1) for out in outputs.values())

    # The steps of the forward pass, for methods that put something in between.

    def run_stem(
        self, x: Float[Array, "b n i i c"], *, rngs: nnx.Rngs | None = None
    ) -> tuple[Float[Array, "b n d"], tuple[Array, ...]]:
        """All before the main stage: the patches' vectors, and the tokens [B, N, i, i, C] of each stage before it."""
        stages: list[Array] = []
        blocks: list[Any] = []
        for block in self.blocks[: -self.num_main_blocks]:
            if isinstance(block, PatchMerge):
                x = self._apply(blocks, x, rngs)[0]
                stages.append(x)
                x, blocks = block(x), []
            else:
                blocks.append(block)
        return x[:, :, 0, 0], tuple(stages)

    def positions(self, grid: tuple[int, int], dtype: Any) -> Float[Array, "1 n c"]:
        """The absolute positions of a grid of patches (down, across); zeros if there are none."""
        if self.pos_embed is None:
            return jnp.zeros((1, 1, self.embed_dims), dtype)
        table = resize_pos_embed(self.pos_embed[...], self.patch_resolution, grid, num_extra_tokens=0)
        return table.astype(dtype)

    def run_main(
        self,
        x: Float[Array, "b n c"],
        grid: tuple[int, int] | None = None,
        out_indices: Sequence[int] = (),
        *,
        rngs: nnx.Rngs | None = None,
    ) -> tuple[Float[Array, "b n c"], dict[int, Float[Array, "b n c"]]]:
        """The main stage, and the outputs of some of its blocks; `grid` is None if patches are missing."""
        return self._apply(self.blocks[-self.num_main_blocks :], x, rngs, out_indices, grid)

    def _apply(
        self,
        blocks: Sequence[Any],
        x: Array,
        rngs: nnx.Rngs | None,
        out_indices: Sequence[int] = (),
        grid: tuple[int, int] | None = None,
    ) -> tuple[Array, dict[int, Array]]:
        return apply_layers(
            blocks,
            x,
            rngs=rngs,
            scan_layers=self.scan_layers,
            remat=self.remat,
            out_indices=out_indices,
            shared={"grid": grid},
        )

    def init_weights(self, rngs: nnx.Rngs) -> None:
        """Linear layers and positions from truncated normal distributions of std 0.02, then `init_cfg`."""
        apply_init_cfg(self, _INIT, rngs)
        super().init_weights(rngs)
        if self.pos_embed is not None:
            self.pos_embed.set_value(trunc_normal(0.02)(rngs.params(), self.pos_embed.shape))

    def derived(self) -> dict[str, np.ndarray]:
        return {"relative_position_index": relative_position_index(self.patch_resolution)} if self.rpe else {}

    def adapt(self, name: str, array: np.ndarray) -> np.ndarray | None:
        """Positions for images of another size are interpolated."""
        if name != "pos_embed":
            return None
        return fit_pos_embed(array, self.patch_resolution, num_extra_tokens=0)

    def _freeze_stages(self, frozen_stages: int) -> None:
        if frozen_stages <= 0:
            return
        if frozen_stages > len(self.blocks):
            raise ConfigError(
                f"HiViT: frozen_stages={frozen_stages}, but it has {len(self.blocks)} blocks and mergings"
            )
        if self.pos_embed is not None:
            self.pos_embed = Frozen(self.pos_embed.get_value())
        self.pos_drop = Dropout(0.0)
        for part in [self.patch_embed, *self.blocks[:frozen_stages]]:
            freeze_stage(part)
            part.set_attributes(rate=0.0, raise_if_not_found=False)
