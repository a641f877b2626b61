"""Learning from labels: cross entropy of any classifier, with Mixup and CutMix on the device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxpretrain.build import build
from jaxpretrain.data.batch_augments import RandomBatchAugment
from jaxpretrain.methods.base import Batch, Method, Metrics, draw_key, pool
from jaxpretrain.models.losses import to_scores


class Supervised(Method):
    """Trains a classifier with its head's loss.

    Args:
        model: the classifier, such as `dict(type='ImageClassifier', backbone=..., neck=..., head=...)`. Its
            `train_cfg=dict(augments=[dict(type='Mixup', alpha=0.8), ...], probs=[...])` mixes images and labels of a
            batch (Zhang et al., 2018; Yun et al., 2019); label smoothing is a loss of the head.
        init_cfg: initialisation, MMEngine's dictionaries.
    """

    def __init__(self, model: Mapping[str, Any] | nnx.Module, init_cfg: Any = None, *, rngs: nnx.Rngs):
        self.init_cfg = init_cfg
        self.model = build(model, rngs=rngs)
        train_cfg = self.model.train_cfg
        self.augment = RandomBatchAugment(**train_cfg) if train_cfg.get("augments") else None

    def loss(self, batch: Batch, *, rngs: nnx.Rngs | None = None) -> tuple[Float[Array, ""], Metrics]:
        """The head's loss for int labels [B] or scores [B, classes]; for int ones, logs `accuracy_top-1` in percent."""
        images, label = batch["image"], batch["label"]
        if self.augment is not None:
            label = to_scores(label, self.model.head.num_classes)
            images, label = self.augment(images, label, draw_key(rngs, "augment"))
        feats = self.model.extract_feat(images, rngs=rngs)
        value, metrics = self.model.head.loss(feats, label, rngs=rngs)
        if not metrics and label.ndim == 1:
            head = nnx.clone(self.model.head)
            head.eval()  # no dropout, and statistics are not counted twice
            correct = jnp.argmax(head(feats), axis=-1) == label
            metrics = {"accuracy_top-1": 100 * jnp.mean(correct.astype(jnp.float32))}
        return value, metrics

    def features(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b d"]:
        """The input of the head's last linear layer; maps [B, H, W, D] are averaged over positions."""
        return pool(self.model.extract_feat(images, stage="pre_logits"))

    def logits(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b classes"]:
        """The head's output, before softmax."""
        return self.model(images)
