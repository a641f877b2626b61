"""EVA-02's Vision Transformer (Fang et al., 2023, EVA-02: A Visual Representation for Neon Genesis)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from jaxpretrain.build import ConfigError, nearest
from jaxpretrain.models.layers.attention import MultiheadAttention
from jaxpretrain.models.layers.base import BaseModule
from jaxpretrain.models.layers.drop import drop_path
from jaxpretrain.models.layers.ffn import SwiGLUFFN
from jaxpretrain.models.layers.norm import build_norm
from jaxpretrain.models.layers.rotary import Table, rotary_table, rotate
from jaxpretrain.models.vision_transformer import VisionTransformer

_ARCHS: dict[tuple[str, ...], tuple[int, ...]] = {
    ("t", "ti", "tiny"): (192, 12, 3, 512),
    ("s", "small"): (384, 12, 6, 1024),
    ("b", "base"): (768, 12, 12, 2048),
    ("l", "large"): (1024, 24, 16, 2730),
}
_ROPES = ("mmpretrain", "eva02")


class RotaryAttention(MultiheadAttention):
    """Self-attention whose queries and keys are turned by their places before they meet."""

    def __call__(  # type: ignore[override]
        self, x: Float[Array, "b n c"], *, rotary: Table | None = None, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "b n c"]:
        """`rotary` is the table of the patches, which are the last tokens; None for no rotation."""
        q, k, v = self.heads(x)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        return self.attend(q, k, v, rngs=rngs)


class EVA02EncoderLayer(BaseModule):
    """A pre-norm transformer block with rotary positions and a gated feed-forward half.

    Args:
        embed_dims: channels of the tokens.
        num_heads: heads of the attention.
        feedforward_channels: hidden channels of the feed-forward half, of each of its two parts.
        sub_ln: whether the hidden channels are normalised.
        attn_drop: dropout of the attention weights.
        proj_drop: dropout after the attention's projection.
        drop_rate: dropout after the feed-forward half.
        drop_path_rate: probability of dropping a branch of a sample.
        qkv_bias: whether queries, keys and values have a bias. (EVA-02's release has none for keys; it is zero in
            converted weights, and may learn here, as in MMPretrain.)
        qk_scale: factor of the logits; 1 / sqrt(channels of a head) if None.
        proj_bias: whether the attention's projection has a bias.
        layer_scale_init_value: start of the LayerScale of both branches; 0 for none.
        norm_cfg: the norms.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        feedforward_channels: int,
        sub_ln: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        proj_bias: bool = True,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        layer_scale_init_value: float = 0.0,
        norm_cfg: Mapping[str, Any] = {"type": "LN"},
        init_cfg: Any = None,
        *,
        rngs: nnx.Rngs,
    ):
        self.init_cfg = init_cfg
        self.drop_path_rate = float(drop_path_rate)
        self.deterministic = False
        self.norm1 = build_norm(norm_cfg, embed_dims, rngs=rngs)
        self.attn = RotaryAttention(
            embed_dims,
            num_heads,
            attn_drop,
            proj_drop,
            qkv_bias,
            qk_scale,
            proj_bias,
            layer_scale_init_value,
            rngs=rngs,
        )
        self.norm2 = build_norm(norm_cfg, embed_dims, rngs=rngs)
        sub_norm = norm_cfg if sub_ln else None
        self.mlp = SwiGLUFFN(
            embed_dims, feedforward_channels, drop_rate, layer_scale_init_value, norm_cfg=sub_norm, rngs=rngs
        )

    def __call__(
        self,
        x: Float[Array, "b n c"],
        *,
        rotary: Table | None = None,
        rngs: nnx.Rngs | None = None,
        drop_path_rate: float | Array | None = None,
    ) -> Float[Array, "b n c"]:
        """`rotary` as of `RotaryAttention`; `drop_path_rate` replaces the layer's own."""
        rate = self.drop_path_rate if drop_path_rate is None else drop_path_rate
        rate = 0.0 if self.deterministic else rate
        x = x + drop_path(self.attn(self.norm1(x), rotary=rotary, rngs=rngs), rate, rngs)
        return x + drop_path(self.mlp(self.norm2(x), rngs=rngs), rate, rngs)


class ViTEVA02(VisionTransformer):
    """A Vision Transformer with rotary besides learnt positions, and gated feed-forward layers.

    Args:
        arch: tiny, small, base, large (t, s, b, l), or a dict as of `VisionTransformer`. Published models of the base
            and large size have `sub_ln=True`.
        sub_ln: whether the hidden channels of the feed-forward halves are normalised.
        drop_rate: dropout after the positions are added, and after each feed-forward half.
        attn_drop_rate, proj_drop_rate: dropout of the attention weights, and after the attention's projection.
        drop_path_rate: stochastic depth of the last layer; grows linearly from 0 at the first.
        qkv_bias: whether queries, keys and values have a bias.
        norm_cfg: all norms.
        with_cls_token: whether there is a class token; it is not rotated.
        rope: the angles. 'eva02' are the paper's: the 16 patches of the pre-training, at other sizes stretched over the
            grid; channels turn in pairs. 'mmpretrain' are those that MMPretrain's constructor makes: as if of half as
            many patches as a head has channels, and the two channels of a pair turn by different angles, which is no
            rotation. MMPretrain's converter of weights keeps EVA-02's own table, which replaces the constructor's at
            the size that the weights are for: run converted weights with 'eva02'.
        kwargs: other arguments of `VisionTransformer`; `layer_cfgs` are further ones of `EVA02EncoderLayer`.
    """

    archs: ClassVar = _ARCHS
    layer_type: ClassVar = EVA02EncoderLayer

    def __init__(
        self,
        arch: str | Mapping[str, Any] = "tiny",
        sub_ln: bool = False,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        qkv_bias: bool = True,
        norm_cfg: Mapping[str, Any] = {"type": "LN"},
        with_cls_token: bool = True,
        rope: str = "mmpretrain",
        *,
        rngs: nnx.Rngs,
        **kwargs: Any,
    ):
        if rope not in _ROPES:
            raise ConfigError(f"ViTEVA02: unknown rope {rope!r}.{nearest(rope, _ROPES)}")
        self.sub_ln, self.attn_drop_rate, self.proj_drop_rate, self.rope = sub_ln, attn_drop_rate, proj_drop_rate, rope
        super().__init__(
            arch,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            qkv_bias=qkv_bias,
            norm_cfg=norm_cfg,
            with_cls_token=with_cls_token,
            rngs=rngs,
            **kwargs,
        )
        head_dims = self.layers[0].attn.head_dims
        if head_dims % 4:
            raise ConfigError(f"ViTEVA02: rotary positions need heads with a multiple of 4 channels, not {head_dims}")

    def _layer_args(self, index: int) -> dict[str, Any]:
        return {"sub_ln": self.sub_ln, "attn_drop": self.attn_drop_rate, "proj_drop": self.proj_drop_rate}

    def _layer_inputs(self, grid: tuple[int, int]) -> dict[str, Any]:
        return {"rotary": self._table(grid)}

    def _table(self, grid: tuple[int, int]) -> Table:
        head_dims = self.layers[0].attn.head_dims
        if self.rope == "eva02":
            return rotary_table(grid, head_dims)
        return rotary_table(grid, head_dims, span=head_dims / 2, paired=False)

    def derived(self) -> dict[str, np.ndarray]:
        """The rotary tables of images of `img_size`, float32 [patches, channels of a head]: the same for all layers."""
        names = ["rope", *(f"layers.{i}.attn.rope" for i in range(self.num_layers))]
        cos, sin = (table.astype(np.float32) for table in self._table(self.patch_resolution))
        return {f"{name}.freqs_{kind}": table for name in names for kind, table in (("cos", cos), ("sin", sin))}
