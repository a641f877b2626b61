"""Swin Transformer V2 (Liu et al., 2022): cosine attention, continuous position biases, norms after the branches."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from jaxpretrain.build import ConfigError, build
from jaxpretrain.models.layers.attention import scaled_dot_product_attention
from jaxpretrain.models.layers.base import BaseModule
from jaxpretrain.models.layers.drop import Dropout, drop_path
from jaxpretrain.models.layers.ffn import FFN
from jaxpretrain.models.layers.linear import Linear
from jaxpretrain.models.layers.norm import build_norm
from jaxpretrain.models.layers.patch_merging import PatchMerging
from jaxpretrain.models.layers.relative_position import relative_position_bias, relative_position_index
from jaxpretrain.models.layers.stack import apply_layers
from jaxpretrain.models.layers.window import ShiftWindowMSA, window_bias
from jaxpretrain.models.swin_transformer import SwinTransformer, alternating_blocks


def _unit(x: Float[Array, "... d"]) -> Float[Array, "... d"]:
    """x / |x|, in float32 at least; vectors shorter than 1e-12 are divided by that."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return x * lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-24))


def relative_coords_table(window: tuple[int, int], pretrained: tuple[int, int]) -> Float[np.ndarray, "1 h2 w2 2"]:
    """Offsets (down, across) of the tokens of a window on a logarithmic scale (eq. 4), float32.

    The largest offset of the `pretrained` window, or of the window itself where that is (0, 0), is log2(9) / 3 = 1.06.
    """
    largest = [max((old or new) - 1, 1) for old, new in zip(pretrained, window, strict=True)]
    # In the precision and order of PyTorch's versions, so that files with this table come back bit by bit.
    sides = (np.arange(1 - size, size, dtype=np.float32) for size in window)
    axes = [side / most * 8 for side, most in zip(sides, largest, strict=True)]
    offsets = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)
    return (np.sign(offsets) * np.log2(np.abs(offsets) + 1) / 3)[None]


class WindowMSAV2(BaseModule):
    """Self-attention of the tokens of a window: logits are scaled cosines, plus biases that a small network computes.

    The network (`cpb_mlp`) sees the offset of two tokens on a logarithmic scale, so that it carries over to other windows.

    Args:
        embed_dims: channels of input and output.
        window_size: tokens (down, across).
        num_heads: heads; must divide `embed_dims`.
        qkv_bias: whether queries and values have a bias; keys have none.
        attn_drop, proj_drop: dropout of the attention weights and of the output.
        cpb_mlp_hidden_dims: hidden channels of the network.
        pretrained_window_size: the window that the weights were trained with, if it was another; (0, 0) if not.
    """

    def __init__(
        self,
        embed_dims: int,
        window_size: tuple[int, int],
        num_heads: int,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        cpb_mlp_hidden_dims: int = 512,
        pretrained_window_size: tuple[int, int] = (0, 0),
        init_cfg: Any = None,
        *,
        rngs: nnx.Rngs,
    ):
        if embed_dims % num_heads:
            raise ConfigError(f"WindowMSAV2: embed_dims={embed_dims} is not a multiple of num_heads={num_heads}")
        self.init_cfg, self.window_size, self.num_heads = init_cfg, window_size, num_heads
        self.pretrained_window_size = pretrained_window_size
        hidden = cpb_mlp_hidden_dims
        self.cpb_mlp: nnx.List[Any] = nnx.List(
            [Linear(2, hidden, rngs=rngs), jax.nn.relu, Linear(hidden, num_heads, False, rngs=rngs)]
        )
        self.logit_scale = nnx.Param(jnp.full((num_heads, 1, 1), math.log(10)))
        self.qkv = Linear(embed_dims, 3 * embed_dims, bias=False, rngs=rngs)
        self.q_bias = nnx.Param(jnp.zeros((embed_dims,))) if qkv_bias else None
        self.v_bias = nnx.Param(jnp.zeros((embed_dims,))) if qkv_bias else None
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
        qkv = self.qkv(x)
        if self.q_bias is not None and self.v_bias is not None:
            q_bias, v_bias = self.q_bias[...], self.v_bias[...]
            qkv = qkv + jnp.concatenate([q_bias, jnp.zeros_like(v_bias), v_bias]).astype(x.dtype)
        qkv = qkv.reshape(b, n, 3, self.num_heads, c // self.num_heads)
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        scale = jnp.exp(jnp.minimum(self.logit_scale[..., 0], math.log(100)))
        q, k = (_unit(q) * scale).astype(x.dtype), _unit(k).astype(x.dtype)
        bias = window_bias(self._bias(jnp.promote_types(x.dtype, jnp.float32)), regions, b)
        y = scaled_dot_product_attention(self, q, k, v, scale=1.0, bias=bias, dropout=self.attn_drop, rngs=rngs)
        return self.proj_drop(self.proj(y.reshape(b, n, c)), rngs=rngs)

    def _bias(self, dtype: Any) -> Float[Array, "heads n n"]:
        table = jnp.asarray(relative_coords_table(self.window_size, self.pretrained_window_size), dtype).reshape(-1, 2)
        for layer in self.cpb_mlp:
            table = layer(table)
        return relative_position_bias(16 * jax.nn.sigmoid(table), self.window_size)

    def derived(self) -> dict[str, np.ndarray]:
        return {
            "relative_coords_table": relative_coords_table(self.window_size, self.pretrained_window_size),
            "relative_position_index": relative_position_index(self.window_size),
        }


class SwinBlockV2(BaseModule):
    """x + norm1(attention(x)), then x + norm2(ffn(x)), on a map of tokens.

    Drop path acts on the normalised branches, as in the paper's code; MMPretrain drops them before the norm, which gives
    a dropped sample the norm's bias and undoes the scaling of the others. In evaluation there is no difference.

    Args:
        extra_norm: whether to normalise the sum (`norm3`).
        pretrained_window_size: tokens along a side of the windows that the weights were trained with; 0 if the same.
        others: as of `SwinBlock`.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        window_size: int = 8,
        shift: bool = False,
        extra_norm: bool = False,
        ffn_ratio: float = 4.0,
        drop_path: float = 0.0,
        pad_small_map: bool = False,
        attn_cfgs: Mapping[str, Any] = {},
        ffn_cfgs: Mapping[str, Any] = {},
        norm_cfg: Mapping[str, Any] = {"type": "LN"},
        pretrained_window_size: int = 0,
        init_cfg: Any = None,
        *,
        rngs: nnx.Rngs,
    ):
        self.init_cfg, self.drop_path_rate, self.deterministic = init_cfg, float(drop_path), False
        attn: dict[str, Any] = {"window_msa": WindowMSAV2, "window_size": window_size}
        attn |= {"embed_dims": embed_dims, "num_heads": num_heads, "shift_size": window_size // 2 if shift else 0}
        attn |= {"pad_small_map": pad_small_map, "pretrained_window_size": (pretrained_window_size,) * 2}
        ffn = {"type": FFN, "embed_dims": embed_dims, "feedforward_channels": int(embed_dims * ffn_ratio)}
        self.attn = ShiftWindowMSA(**{**attn, **attn_cfgs}, rngs=rngs)
        self.norm1 = build_norm(norm_cfg, embed_dims, rngs=rngs)
        self.ffn = build({**ffn, **ffn_cfgs}, rngs=rngs)
        self.norm2 = build_norm(norm_cfg, embed_dims, rngs=rngs)
        self.norm3 = build_norm(norm_cfg, embed_dims, rngs=rngs) if extra_norm else None

    def __call__(
        self, x: Float[Array, "b h w c"], *, rngs: nnx.Rngs | None = None, drop_path_rate: float | Array | None = None
    ) -> Float[Array, "b h w c"]:
        """`drop_path_rate` replaces the block's own; it may be traced (see `apply_layers`)."""
        rate = self.drop_path_rate if drop_path_rate is None else drop_path_rate
        rate = 0.0 if self.deterministic else rate
        x = x + drop_path(self.norm1(self.attn(x, rngs=rngs)), rate, rngs)
        x = x + drop_path(self.norm2(self.ffn(x, rngs=rngs)), rate, rngs)
        return x if self.norm3 is None else self.norm3(x)


class SwinBlockV2Sequence(BaseModule):
    """A stage: a downsampling, then blocks without and with shift in turn.

    Args:
        embed_dims: channels of the input; the blocks have twice as many behind a downsampling.
        downsample: whether to halve the map at the beginning.
        extra_norm_every_n_blocks: of so many blocks the last one normalises its sum; 0 for none.
        pretrained_window_size: as of `SwinBlockV2`.
        others: as of `SwinBlockSequence`.
    """

    downsamples_first: ClassVar = True

    def __init__(
        self,
        embed_dims: int,
        depth: int,
        num_heads: int,
        window_size: int = 8,
        downsample: bool = False,
        downsample_cfg: Mapping[str, Any] = {},
        drop_paths: float | Sequence[float] = 0.0,
        block_cfgs: Mapping[str, Any] | Sequence[Mapping[str, Any]] = {},
        with_cp: bool = False,
        pad_small_map: bool = False,
        extra_norm_every_n_blocks: int = 0,
        pretrained_window_size: int = 0,
        init_cfg: Any = None,
        *,
        rngs: nnx.Rngs,
    ):
        self.init_cfg = init_cfg
        self.scan_layers, self.remat = False, "full" if with_cp else "none"
        merging = {"type": PatchMerging, "in_channels": embed_dims, "out_channels": 2 * embed_dims, **downsample_cfg}
        self.downsample = build(merging, rngs=rngs) if downsample else None
        self.embed_dims = self.out_channels = embed_dims if self.downsample is None else self.downsample.out_channels
        cfg = {"type": SwinBlockV2, "embed_dims": self.embed_dims, "num_heads": num_heads, "window_size": window_size}
        cfg |= {"pad_small_map": pad_small_map, "pretrained_window_size": pretrained_window_size}
        every = extra_norm_every_n_blocks or depth + 1
        block_cfgs = [block_cfgs] * depth if isinstance(block_cfgs, Mapping) else block_cfgs
        block_cfgs = [{"extra_norm": i % every == 0, **block_cfg} for i, block_cfg in enumerate(block_cfgs, start=1)]
        self.blocks = alternating_blocks(cfg, depth, drop_paths, block_cfgs, rngs)

    def __call__(
        self, x: Float[Array, "b h w c"], *, rngs: nnx.Rngs | None = None
    ) -> tuple[Float[Array, "b h2 w2 d"], Float[Array, "b h2 w2 d"]]:
        """The stage's features, which are the input of the next stage too."""
        x = x if self.downsample is None else self.downsample(x)
        x, _ = apply_layers(self.blocks, x, rngs=rngs, scan_layers=self.scan_layers, remat=self.remat)
        return x, x


class SwinTransformerV2(SwinTransformer):
    """Swin Transformer V2, for images of any size whose feature maps are not smaller than the windows.

    Args:
        arch: 'tiny', 'small', 'base', 'large', 'huge' or 'giant' (t, s, b, l, h, g), or a dict with embed_dims, depths,
            num_heads and extra_norm_every_n_blocks.
        window_size: tokens along a side of a window, one number or one for each stage.
        pretrained_window_sizes: for each stage, the windows that the weights were trained with, if they were others; 0s
            if not.
        others: as of `SwinTransformer`; `stage_cfgs` are arguments of `SwinBlockV2Sequence`.

    Raises:
        ConfigError: as `SwinTransformer`; a list that does not have a number for each stage.
    """

    stage_type: ClassVar[Any] = SwinBlockV2Sequence
    archs: ClassVar[dict[tuple[str, ...], dict[str, Any]]] = {
        **{names: {**size, "extra_norm_every_n_blocks": 0} for names, size in SwinTransformer.archs.items()},
        ("h", "huge"): dict(
            embed_dims=352, depths=[2, 2, 18, 2], num_heads=[8, 16, 32, 64], extra_norm_every_n_blocks=6
        ),
        ("g", "giant"): dict(
            embed_dims=512, depths=[2, 2, 42, 4], num_heads=[16, 32, 64, 128], extra_norm_every_n_blocks=6
        ),
    }

    def __init__(
        self,
        arch: str | Mapping[str, Any] = "tiny",
        img_size: int | tuple[int, int] = 256,
        patch_size: int | tuple[int, int] = 4,
        in_channels: int = 3,
        window_size: int | Sequence[int] = 8,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        out_indices: int | Sequence[int] = (3,),
        use_abs_pos_embed: bool = False,
        interpolate_mode: str = "bicubic",
        with_cp: bool = False,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        pad_small_map: bool = False,
        norm_cfg: Mapping[str, Any] | None = {"type": "LN"},
        stage_cfgs: Mapping[str, Any] | Sequence[Mapping[str, Any]] = {},
        patch_cfg: Mapping[str, Any] = {},
        pretrained_window_sizes: Sequence[int] = (0, 0, 0, 0),
        init_cfg: Any = None,
        *,
        rngs: nnx.Rngs,
    ):
        size = self.size(arch)
        num_stages = len(size["depths"])
        windows = [window_size] * num_stages if isinstance(window_size, int) else list(window_size)
        stage_cfgs = [stage_cfgs] * num_stages if isinstance(stage_cfgs, Mapping) else list(stage_cfgs)
        for name, values in (
            ("window_size", windows),
            ("pretrained_window_sizes", pretrained_window_sizes),
            ("stage_cfgs", stage_cfgs),
        ):
            if len(values) != num_stages:
                raise ConfigError(f"SwinTransformerV2: {name} has {len(values)} entries for {num_stages} stages")
        every = size["extra_norm_every_n_blocks"]
        of_stages = [
            {
                "window_size": window,
                "pretrained_window_size": pretrained,
                "extra_norm_every_n_blocks": every,
                "downsample_cfg": {"use_post_norm": True},
                **stage_cfg,
            }
            for window, pretrained, stage_cfg in zip(windows, pretrained_window_sizes, stage_cfgs, strict=True)
        ]
        super().__init__(
            arch=arch,
            img_size=img_size,
            patch_size=patch_size,
            in_channels=in_channels,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            out_indices=out_indices,
            use_abs_pos_embed=use_abs_pos_embed,
            interpolate_mode=interpolate_mode,
            with_cp=with_cp,
            frozen_stages=frozen_stages,
            norm_eval=norm_eval,
            pad_small_map=pad_small_map,
            norm_cfg=norm_cfg,
            stage_cfgs=of_stages,
            patch_cfg=patch_cfg,
            init_cfg=init_cfg,
            rngs=rngs,
        )
