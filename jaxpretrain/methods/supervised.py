"""Learning from labels: cross entropy of any classifier, with Mixup and CutMix on the device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxpretrain.build import ConfigError, build
from jaxpretrain.data.batch_augments import RandomBatchAugment
from jaxpretrain.methods.base import Batch, Method, Metrics, draw_key, pool
from jaxpretrain.models.heads import MultiTaskHead
from jaxpretrain.models.losses import CrossEntropyLoss, to_scores


class Supervised(Method):
    """Trains a classifier with its head's loss.

    Args:
        model: the classifier, such as `dict(type='ImageClassifier', backbone=..., neck=..., head=...)`. Its
            `train_cfg=dict(augments=[dict(type='Mixup', alpha=0.8), ...], probs=[...])` mixes images and labels of a
            batch (Zhang et al., 2018; Yun et al., 2019); label smoothing is a loss of the head. Of data with several labels
            for each image (int8 [B, classes]) the head must be a binary one, such as `MultiLabelLinearClsHead`; with
            labels of several tasks, a dictionary, a `MultiTaskHead`.
        init_cfg: initialisation, MMEngine's dictionaries.
    """

    def __init__(self, model: Mapping[str, Any] | nnx.Module, init_cfg: Any = None, *, rngs: nnx.Rngs):
        self.init_cfg = init_cfg
        self.model = build(model, rngs=rngs)
        train_cfg = self.model.train_cfg
        self.augment = RandomBatchAugment(**train_cfg) if train_cfg.get("augments") else None

    def loss(self, batch: Batch, *, rngs: nnx.Rngs | None = None) -> tuple[Float[Array, ""], Metrics]:
        """The head's loss for int labels [B], scores [B, classes], or a dictionary of them by task.

        For int ones, logs `accuracy_top-1` in percent.
        """
        images, label = batch["image"], batch["label"]
        self._check_kind(label)
        if self.augment is not None:
            images, label = self._mix(images, label, draw_key(rngs, "augment"))
        feats = self.model.extract_feat(images, rngs=rngs)
        value, metrics = self.model.head.loss(feats, label, rngs=rngs)
        if not metrics and not isinstance(label, Mapping) and label.ndim == 1:
            head = nnx.clone(self.model.head)
            head.eval()  # no dropout, and statistics are not counted twice
            correct = jnp.argmax(head(feats), axis=-1) == label
            metrics = {"accuracy_top-1": 100 * jnp.mean(correct.astype(jnp.float32))}
        return value, metrics

    def _mix(self, images: Array, label: Array, key: Array) -> tuple[Array, Array]:
        """Both mixed; a class that does not count (-1) in one of two images does not count in their mixture."""
        assert self.augment is not None
        several = label.ndim > 1
        if several:
            scores = jnp.where(label < 0, jnp.nan, label.astype(jnp.float32))
        else:
            scores = to_scores(label, self.model.head.num_classes)
        images, scores = self.augment(images, scores, key)
        return images, jnp.where(jnp.isnan(scores), -1, scores) if several else scores

    def _check_kind(self, label: Any) -> None:
        """Raises ConfigError for labels that the head cannot learn from."""
        head = self.model.head
        if isinstance(label, Mapping) != isinstance(head, MultiTaskHead):
            raise ConfigError(
                f"labels of several tasks ({', '.join(label)}) need a MultiTaskHead, not {type(head).__name__}"
                if isinstance(label, Mapping)
                else "MultiTaskHead needs labels of several tasks, as MultiTaskDataset has them"
            )
        if isinstance(label, Mapping):
            if self.augment is not None:
                raise ConfigError("train_cfg.augments mix the labels of one task; take them out with a MultiTaskHead")
            return
        loss = getattr(head, "loss_module", None)
        loss = getattr(loss, "ce", loss)  # of LabelSmoothLoss
        if label.dtype == jnp.int8 and label.ndim > 1 and isinstance(loss, CrossEntropyLoss) and not loss.use_sigmoid:
            raise ConfigError(
                f"the data has several labels for each image, and {type(head).__name__} has a loss for one: take a head "
                "such as MultiLabelLinearClsHead, or loss=dict(type='CrossEntropyLoss', use_sigmoid=True)"
            )

    def features(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b d"]:
        """The input of the head's last linear layer; maps [B, H, W, D] are averaged over positions."""
        return pool(self.model.extract_feat(images, stage="pre_logits"))

    def logits(self, images: Float[Array, "b h w 3"]) -> Any:
        """The head's output [B, classes], before softmax; of a `MultiTaskHead`, a dictionary of them by task."""
        return self.model(images)
