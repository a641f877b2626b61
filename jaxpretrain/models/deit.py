"""The distilled model of DeiT (Touvron et al., 2021, Training data-efficient image transformers & distillation)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
from flax import nnx
from jaxtyping import Array, Float, Num

from jaxpretrain.build import ConfigError
from jaxpretrain.models.heads import VisionTransformerClsHead
from jaxpretrain.models.layers.init import trunc_normal
from jaxpretrain.models.layers.linear import Linear
from jaxpretrain.models.vision_transformer import VisionTransformer

Tokens = tuple[Float[Array, "b c"], Float[Array, "b c"]]


class DistilledVisionTransformer(VisionTransformer):
    """A Vision Transformer with a second class token, the distillation token, that learnt to agree with a teacher.

    Both have a position. With `out_type='cls_token'` an output is the pair (class token, distillation token).

    Args:
        arch: as of `VisionTransformer`.
        with_cls_token: must be True.
        kwargs: other arguments of `VisionTransformer`.
    """

    tokens: ClassVar = ("cls_token", "dist_token")
    dist_token: nnx.Variable

    def __init__(
        self,
        arch: str | Mapping[str, Any] = "deit-base",
        with_cls_token: bool = True,
        *,
        rngs: nnx.Rngs,
        **kwargs: Any,
    ):
        if not with_cls_token:
            raise ConfigError("DistilledVisionTransformer: with_cls_token=False, but both tokens belong to the model")
        super().__init__(arch, rngs=rngs, **kwargs)

    def init_weights(self, rngs: nnx.Rngs) -> None:
        """Besides those of `VisionTransformer`: the distillation token from the same distribution as the positions."""
        super().init_weights(rngs)
        self.dist_token.set_value(trunc_normal(0.02)(rngs.params(), self.dist_token.shape))

    def _format(self, x: Float[Array, "b n c"], grid: tuple[int, int]) -> Any:
        return (x[:, 0], x[:, 1]) if self.out_type == "cls_token" else super()._format(x, grid)


class DeiTClsHead(VisionTransformerClsHead):
    """A linear layer for each token, `layers.head` and `layers.head_dist`; the logits are their mean.

    The hidden layer, if there is one, serves both tokens. Arguments as of `VisionTransformerClsHead`.

    As in MMPretrain this is for inference: there is no teacher here. `loss` compares the mean of both with the labels,
    which is fine-tuning without distillation, and warns that it is.
    """

    def __init__(
        self, num_classes: int, in_channels: int, hidden_dim: int | None = None, *, rngs: nnx.Rngs, **kwargs: Any
    ):
        super().__init__(num_classes, in_channels, hidden_dim, rngs=rngs, **kwargs)
        self.layers["head_dist"] = Linear(hidden_dim or in_channels, num_classes, rngs=rngs)

    def pre_logits(self, feats: Tokens | Sequence[Tokens]) -> Tokens:  # type: ignore[override]
        """The inputs of the two last linear layers: of (class token, distillation token) [B, C] of the last scale."""
        pair = feats if isinstance(feats[0], jax.Array) else feats[-1]
        if len(pair) != 2:
            raise ConfigError("DeiTClsHead takes (class token, distillation token): use DistilledVisionTransformer")
        cls_token, dist_token = pair
        return super().pre_logits(cls_token), super().pre_logits(dist_token)

    def __call__(  # type: ignore[override]
        self, feats: Tokens | Sequence[Tokens], *, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "b classes"]:
        """Logits, before softmax."""
        cls_token, dist_token = self.pre_logits(feats)
        return (self.layers["head"](cls_token) + self.layers["head_dist"](dist_token)) / 2

    def loss(  # type: ignore[override]
        self, feats: Tokens | Sequence[Tokens], label: Num[Array, "b ..."], **kwargs: Any
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """The loss of the mean of both heads' logits. Warns that nothing is distilled."""
        warnings.warn(
            "DeiTClsHead: distillation is not supported, as there is no teacher: both tokens learn from the labels",
            stacklevel=2,
        )
        return super().loss(feats, label, **kwargs)  # type: ignore[arg-type]
