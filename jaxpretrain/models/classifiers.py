"""Image classifiers: a backbone, a neck and a head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flax import nnx
from jaxtyping import Array, Float, Num

from jaxpretrain.build import ConfigError, build, nearest
from jaxpretrain.models.layers.base import BaseModule

_STAGES = ("backbone", "neck", "pre_logits")


def build_chain(cfg: Any, rngs: nnx.Rngs) -> nnx.Module:
    """A module, or the `nnx.List` of modules that a list of configurations describes."""
    if isinstance(cfg, Sequence):
        return nnx.List([build(part, rngs=rngs) for part in cfg])
    return build(cfg, rngs=rngs)


def apply_chain(chain: Any, x: Any) -> Any:
    """`chain(x)`, or its modules one after the other."""
    for part in chain if isinstance(chain, nnx.List) else (chain,):
        x = part(x)
    return x


class ImageClassifier(BaseModule):
    """Images [B, H, W, C], normalised, to logits [B, classes].

    Args:
        backbone: what makes a tuple of feature maps from images; a dictionary with `type`, or a module.
        neck: what makes features from them, or None; a list of necks is applied in order.
        head: what makes logits from features, or None: then calls return the features.
        pretrained: weights to start from, the same as `init_cfg=dict(type='Pretrained', checkpoint=...)`.
        train_cfg: settings of training; `augments` are batch augmentations, which the method applies.
        data_preprocessor: accepted for MMPretrain's configs; normalisation is the data pipeline's.
        init_cfg: initialisation, MMEngine's dictionaries.
    """

    def __init__(
        self,
        backbone: Mapping[str, Any] | nnx.Module,
        neck: Mapping[str, Any] | Sequence[Any] | nnx.Module | None = None,
        head: Mapping[str, Any] | nnx.Module | None = None,
        pretrained: str | None = None,
        train_cfg: Mapping[str, Any] | None = None,
        data_preprocessor: Mapping[str, Any] | None = None,
        init_cfg: Any = None,
        *,
        rngs: nnx.Rngs,
    ):
        self.init_cfg = {"type": "Pretrained", "checkpoint": pretrained} if pretrained else init_cfg
        self.train_cfg = dict(train_cfg or {})
        self.backbone = build(backbone, rngs=rngs)
        self.neck = None if neck is None else build_chain(neck, rngs)
        self.head = None if head is None else build(head, rngs=rngs)

    def extract_feat(
        self, images: Float[Array, "b h w c"], stage: str = "neck", *, rngs: nnx.Rngs | None = None
    ) -> Any:
        """Features after a stage.

        Args:
            images: normalised images.
            stage: 'backbone': a tuple of feature maps [B, H', W', C']; 'neck': a tuple of features [B, C'] after the
                neck, if there is one; 'pre_logits': the input of the head's last linear layer, [B, C'].
            rngs: for drop path and dropout in training.
        """
        if stage not in _STAGES:
            raise ConfigError(f"extract_feat: unknown stage {stage!r}.{nearest(stage, _STAGES)}")
        x = self.backbone(images, rngs=rngs)
        if stage == "backbone":
            return x
        if self.neck is not None:
            x = apply_chain(self.neck, x)
        if stage == "neck":
            return x
        if self.head is None:
            raise ConfigError("extract_feat: stage 'pre_logits' needs a head, and this classifier has none")
        return self.head.pre_logits(x)

    def __call__(self, images: Float[Array, "b h w c"], *, rngs: nnx.Rngs | None = None) -> Float[Array, "b classes"]:
        """Logits, before softmax; features, if there is no head."""
        feats = self.extract_feat(images, rngs=rngs)
        return feats if self.head is None else self.head(feats, rngs=rngs)

    def loss(
        self, images: Float[Array, "b h w c"], label: Num[Array, "b ..."], *, rngs: nnx.Rngs | None = None
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """The head's loss and metrics for int labels [B] or scores [B, classes]."""
        return self._head().loss(self.extract_feat(images, rngs=rngs), label, rngs=rngs)

    def predict(self, images: Float[Array, "b h w c"]) -> Float[Array, "b classes"]:
        """The head's scores: they sum to 1, or each is from 0 to 1 with a multi-label head. Needs eval mode."""
        return self._head().predict(self.extract_feat(images))

    def _head(self) -> Any:
        if self.head is None:
            raise ConfigError("This classifier has no head, so it has neither loss nor scores")
        return self.head
