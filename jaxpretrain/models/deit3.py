"""DeiT III (Touvron et al., 2022, DeiT III: Revenge of the ViT)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from flax import nnx
from jaxtyping import Array, Float

from jaxpretrain.build import ConfigError, nearest
from jaxpretrain.models.vision_transformer import TransformerEncoderLayer, VisionTransformer

_ARCHS: dict[tuple[str, ...], tuple[int, ...]] = {
    ("s", "small"): (384, 12, 6, 1536),
    ("m", "medium"): (512, 12, 8, 2048),
    ("b", "base"): (768, 12, 12, 3072),
    ("l", "large"): (1024, 24, 16, 4096),
    ("h", "huge"): (1280, 32, 16, 5120),
}
_NORMS = ("ln1", "ln2")


class DeiT3TransformerEncoderLayer(TransformerEncoderLayer):
    """A transformer block with LayerScale.

    Args:
        use_layer_scale, ffn_norm: as of `DeiT3`.
        layer_scale_init_value: start of the LayerScale; 1e-5 if 0.
        kwargs: other arguments of `TransformerEncoderLayer`.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        feedforward_channels: int,
        use_layer_scale: bool = True,
        layer_scale_init_value: float = 0.0,
        ffn_norm: str = "ln1",
        **kwargs: Any,
    ):
        if ffn_norm not in _NORMS:
            raise ConfigError(f"DeiT3: unknown ffn_norm {ffn_norm!r}.{nearest(ffn_norm, _NORMS)}")
        start = (layer_scale_init_value or 1e-5) if use_layer_scale else 0.0
        super().__init__(embed_dims, num_heads, feedforward_channels, layer_scale_init_value=start, **kwargs)
        self.ffn_norm = ffn_norm

    def _ffn_norm(self, x: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        return self.ln1(x) if self.ffn_norm == "ln1" else self.ln2(x)


class DeiT3(VisionTransformer):
    """A Vision Transformer with LayerScale, whose class token has no position.

    Args:
        arch: small, medium, base, large, huge (s, m, b, l, h), or a dict as of `VisionTransformer`.
        use_layer_scale: whether both branches of a layer have a LayerScale, which starts at 1e-5.
        ffn_norm: the norm before the feed-forward half of a layer. 'ln2' is the paper's, and what all published weights
            were trained with. MMPretrain normalises by 'ln1' again, since March 2023, and leaves `ln2` unused: by
            mistake, but its networks and ours agree this way.
        kwargs: other arguments of `VisionTransformer`.
    """

    archs: ClassVar = _ARCHS
    layer_type: ClassVar = DeiT3TransformerEncoderLayer
    tokens_have_positions: ClassVar = False

    def __init__(
        self,
        arch: str | Mapping[str, Any] = "base",
        use_layer_scale: bool = True,
        ffn_norm: str = "ln1",
        *,
        rngs: nnx.Rngs,
        **kwargs: Any,
    ):
        self.use_layer_scale, self.ffn_norm = use_layer_scale, ffn_norm
        super().__init__(arch, rngs=rngs, **kwargs)

    def _layer_args(self, index: int) -> dict[str, Any]:
        return {"use_layer_scale": self.use_layer_scale, "ffn_norm": self.ffn_norm}

    def _prepare(self, x: Float[Array, "b n c"], rngs: nnx.Rngs | None) -> Float[Array, "b m c"]:
        x = self.add_cls_token(self.drop_after_pos(x, rngs=rngs))
        return x if self.pre_norm is None else self.pre_norm(x)
