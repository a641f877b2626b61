"""MixMIM, or MixMAE (Liu et al., 2022, arXiv:2205.13137): a hierarchy of attention within windows that are not shifted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from jaxpretrain.build import ConfigError
from jaxpretrain.models.layers.arch import architecture
from jaxpretrain.models.layers.attention import scaled_dot_product_attention
from jaxpretrain.models.layers.base import BaseModule, Frozen
from jaxpretrain.models.layers.conv import global_avg_pool
from jaxpretrain.models.layers.drop import Dropout, drop_path
from jaxpretrain.models.layers.norm import build_norm
from jaxpretrain.models.layers.patch_embed import PatchEmbed
from jaxpretrain.models.layers.patch_merging import PatchMerging
from jaxpretrain.models.layers.position import (
    build_2d_sincos_position_embedding,
    fit_pos_embed,
    resize_pos_embed,
)
from jaxpretrain.models.layers.relative_position import relative_position_bias
from jaxpretrain.models.layers.stack import apply_layers
from jaxpretrain.models.layers.window import window_partition, window_reverse
from jaxpretrain.models.swin_transformer import WindowMSA
from jaxpretrain.models.vision_transformer import TransformerEncoderLayer

_LN = {"type": "LN"}
_APART = -1e30  # added to the logits of pairs of different images: nothing is left of them after softmax


class MixMIMWindowAttention(WindowMSA):
    """Self-attention of the tokens of a window; in a mixture of two images, only with those of the same image."""

    def __call__(  # type: ignore[override]
        self, x: Float[Array, "b n c"], mask: Float[Array, "windows n"] | None = None, *, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "b n c"]:
        """`mask`: which image (0 or 1) each token is of, in the windows of one map; the same for all maps of x."""
        b, n, c = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, c // self.num_heads)
        bias = relative_position_bias(self.relative_position_bias_table[...], self.window_size)
        if mask is not None:
            together = mask[:, None, :, None] == mask[:, None, None, :]
            bias = jnp.where(together, bias, _APART)
            bias = jnp.broadcast_to(bias, (b // len(mask), *bias.shape)).reshape(b, *bias.shape[1:])
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        y = scaled_dot_product_attention(self, q, k, v, scale=self.scale, bias=bias, dropout=self.attn_drop, rngs=rngs)
        return self.proj_drop(self.proj(y.reshape(b, n, c)), rngs=rngs)


class MixMIMBlock(TransformerEncoderLayer):
    """x + attention(ln1(x)) within windows, then x + ffn(ln2(x)), on a map of tokens.

    Args:
        embed_dims, num_heads: channels and heads.
        window_size: tokens along a side of a window.
        mlp_ratio: hidden channels of the feed-forward half, as a multiple of `embed_dims`.
        qkv_bias: whether queries, keys and values have a bias.
        proj_drop_rate, attn_drop_rate: dropout of both halves, and of the attention weights.
        drop_path_rate: probability of dropping a branch of a sample in training.
        norm_cfg: the norms.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        window_size: int = 7,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_cfg: Mapping[str, Any] = _LN,
        *,
        rngs: nnx.Rngs,
    ):
        super().__init__(
            embed_dims,
            num_heads,
            int(mlp_ratio * embed_dims),
            drop_rate=proj_drop_rate,
            drop_path_rate=drop_path_rate,
            norm_cfg=norm_cfg,
            rngs=rngs,
        )
        self.window_size = window_size
        window = (window_size, window_size)
        self.attn: Any = MixMIMWindowAttention(
            embed_dims, window, num_heads, qkv_bias, attn_drop=attn_drop_rate, proj_drop=proj_drop_rate, rngs=rngs
        )

    def __call__(  # type: ignore[override]
        self,
        x: Float[Array, "b h w c"],
        *,
        mask: Float[Array, "h w"] | None = None,
        rngs: nnx.Rngs | None = None,
        drop_path_rate: float | Array | None = None,
    ) -> Float[Array, "b h w c"]:
        """`mask`: which image each token is of; `drop_path_rate` replaces the block's own (see `apply_layers`)."""
        rate = self.drop_path_rate if drop_path_rate is None else drop_path_rate
        rate = 0.0 if self.deterministic else rate
        height, width, s = x.shape[1], x.shape[2], self.window_size
        if height % s or width % s:
            raise ValueError(f"a map of {height}x{width} tokens does not divide into windows of {s}: take other images")
        windows = window_partition(self.ln1(x), s)
        of_image = None if mask is None else window_partition(mask[None, ..., None], s)[..., 0]
        y = window_reverse(self.attn(windows, of_image, rngs=rngs), height, width)
        x = x + drop_path(y, rate, rngs)
        return x + drop_path(self.ffn(self.ln2(x), rngs=rngs), rate, rngs)


class MixMIMLayer(BaseModule):
    """A stage: blocks, then a downsampling for the next stage, if there is one (`downsample`)."""

    def __init__(
        self,
        embed_dims: int,
        drop_path_rates: Sequence[float],
        downsample: bool,
        norm_cfg: Mapping[str, Any] = _LN,
        *,
        rngs: nnx.Rngs,
        **block: Any,
    ):
        self.scan_layers, self.remat = False, "none"
        self.blocks = nnx.List(
            [
                MixMIMBlock(embed_dims, drop_path_rate=rate, norm_cfg=norm_cfg, rngs=rngs, **block)
                for rate in drop_path_rates
            ]
        )
        self.downsample = PatchMerging(embed_dims, 2 * embed_dims, norm_cfg=norm_cfg, rngs=rngs) if downsample else None

    def __call__(
        self, x: Float[Array, "b h w c"], mask: Float[Array, "h w"] | None = None, *, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "b h2 w2 d"]:
        """`mask`: which image each token is of, where two are mixed."""
        x, _ = apply_layers(
            self.blocks, x, rngs=rngs, scan_layers=self.scan_layers, remat=self.remat, shared={"mask": mask}
        )
        return x if self.downsample is None else self.downsample(x)


class MixMIMTransformer(BaseModule):
    """The encoder of MixMIM: [B, H, W, 3] -> ([B, C],), the mean over positions of the last map.

    Args:
        arch: 'base', 'large', 'huge' (b, l, h), or a dictionary with embed_dims (of the first stage), depths and num_heads.
        mlp_ratio: hidden channels of the feed-forward halves, as a multiple.
        img_size: size of the images that positions and windows are for, one number or (height, width). Others may be taken
            if all maps divide into windows; positions are then interpolated. (MMPretrain takes this size only.)
        patch_size: pixels of a token, down and across.
        in_channels: channels of the images.
        window_size: tokens along a side of a window, for each stage; smaller where the map of `img_size` is.
        qkv_bias: whether queries, keys and values have a bias.
        patch_cfg: further arguments of `PatchEmbed`.
        norm_cfg: all norms but that of the patch embedding.
        drop_rate: dropout after positions, and of both halves of the blocks.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0 in the first.
        attn_drop_rate: dropout of the attention weights.
        use_checkpoint: MMPretrain's name for `remat='full'`.
        init_cfg: initialisation, MMEngine's dictionaries.

    Positions are a sin-cos table that does not learn. (MMPretrain has zeros until a pre-trained encoder is loaded.)

    Attributes:
        patch_resolution: tokens (down, across) in an image of `img_size`.
        num_features: channels of the output.
        encoder_stride: pixels per position of the last map, down and across.
        scan_layers, remat: how blocks are run, of the stages: `model.set_attributes` sets all (see `apply_layers`).
    """

    archs: ClassVar[dict[tuple[str, ...], dict[str, Any]]] = {
        ("b", "base"): dict(embed_dims=128, depths=[2, 2, 18, 2], num_heads=[4, 8, 16, 32]),
        ("l", "large"): dict(embed_dims=192, depths=[2, 2, 18, 2], num_heads=[6, 12, 24, 48]),
        ("h", "huge"): dict(embed_dims=352, depths=[2, 2, 18, 2], num_heads=[11, 22, 44, 88]),
    }

    def __init__(
        self,
        arch: str | Mapping[str, Any] = "base",
        mlp_ratio: float = 4.0,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 4,
        in_channels: int = 3,
        window_size: Sequence[int] = (14, 14, 14, 7),
        qkv_bias: bool = True,
        patch_cfg: Mapping[str, Any] = {},
        norm_cfg: Mapping[str, Any] = _LN,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        use_checkpoint: bool = False,
        init_cfg: Any = None,
        *,
        rngs: nnx.Rngs,
    ):
        name = type(self).__name__
        size = architecture(arch, self.archs, name)
        depths, heads, self.embed_dims = list(size["depths"]), size["num_heads"], size["embed_dims"]
        stages = len(depths)
        if not stages == len(heads) <= len(window_size):
            raise ConfigError(
                f"{name}: {stages} depths, {len(heads)} num_heads and {len(window_size)} window_sizes; give one for each stage"
            )
        self.init_cfg = init_cfg
        patches: dict[str, Any] = dict(in_channels=in_channels, embed_dims=self.embed_dims, kernel_size=patch_size)
        patches |= dict(input_size=img_size, norm_cfg=_LN, **patch_cfg)
        self.patch_embed = PatchEmbed(**patches, rngs=rngs)
        self.patch_resolution = self.patch_embed.init_out_size
        self.absolute_pos_embed = Frozen(self._positions())
        self.drop_after_pos = Dropout(drop_rate)

        rates = np.split(np.linspace(0, drop_path_rate, sum(depths)), np.cumsum(depths)[:-1])
        self.layers = nnx.List(
            [
                MixMIMLayer(
                    self.embed_dims * 2**i,
                    rates[i].tolist(),
                    downsample=i < stages - 1,
                    norm_cfg=norm_cfg,
                    num_heads=heads[i],
                    window_size=min(window_size[i], *(side // 2**i for side in self.patch_resolution)),
                    mlp_ratio=mlp_ratio,
                    qkv_bias=qkv_bias,
                    proj_drop_rate=drop_rate,
                    attn_drop_rate=attn_drop_rate,
                    rngs=rngs,
                )
                for i in range(stages)
            ]
        )
        if use_checkpoint:
            self.set_attributes(remat="full", raise_if_not_found=False)
        self.num_features = self.embed_dims * 2 ** (stages - 1)
        self.encoder_stride = self.patch_embed.patch_size[0] * 2 ** (stages - 1)
        self.norm = build_norm(norm_cfg, self.num_features, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b height width 3"], *, rngs: nnx.Rngs | None = None
    ) -> tuple[Float[Array, "b c"], ...]:
        """The mean of the last map's vectors, normalised. `rngs` is for dropout and drop path in training."""
        x = self.drop_after_pos(self.add_positions(self.embed(x)), rngs=rngs)
        return (global_avg_pool(self.run_layers(x, rngs=rngs)),)

    # The steps of the forward pass, for methods that put something in between.

    def embed(self, x: Float[Array, "b height width 3"]) -> Float[Array, "b h w c"]:
        """The map of tokens, without positions."""
        tokens, grid = self.patch_embed(x)
        return tokens.reshape(len(tokens), *grid, -1)

    def add_positions(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        grid = (x.shape[1], x.shape[2])
        table = resize_pos_embed(self.absolute_pos_embed[...], self.patch_resolution, grid, num_extra_tokens=0)
        return x + table.reshape(1, *grid, -1).astype(x.dtype)

    def run_layers(
        self,
        x: Float[Array, "b h w c"],
        masks: Sequence[Float[Array, "h w"]] | None = None,
        *,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "b h2 w2 d"]:
        """All stages and the norm. `masks`: for each stage, which image each token is of, where two are mixed."""
        for i, layer in enumerate(self.layers):
            x = layer(x, None if masks is None else masks[i], rngs=rngs)
        return self.norm(x)

    def init_weights(self, rngs: nnx.Rngs) -> None:
        """`init_cfg`, the blocks' own rules, and the table of positions."""
        super().init_weights(rngs)
        self.absolute_pos_embed.set_value(self._positions())

    def adapt(self, name: str, array: np.ndarray) -> np.ndarray | None:
        """Positions for images of another size are interpolated."""
        if name != "absolute_pos_embed":
            return None
        return fit_pos_embed(array, self.patch_resolution, num_extra_tokens=0)

    def _positions(self) -> Float[Array, "1 n c"]:
        return build_2d_sincos_position_embedding(self.patch_resolution, self.embed_dims)
