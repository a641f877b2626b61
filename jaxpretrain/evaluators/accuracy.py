"""Top-k accuracy of a classifier on the validation split."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxpretrain.build import ConfigError
from jaxpretrain.evaluators.base import EvalContext, Evaluator, check_counts, gather


class Accuracy(Evaluator):
    """How often the label is among the k highest logits, on `val`, in percent: {'top1': ..., 'top5': ...}.

    Images without a label (below 0) are left out.

    Args:
        context: of the run; its method must have logits.
        topk: the values of k. A k above the number of classes counts as that number.

    Raises:
        ConfigError: the method is no classifier, or a k below 1.
    """

    def __init__(self, context: EvalContext, topk: int | Sequence[int] = (1, 5)):
        super().__init__(context)
        self.topk = check_counts("Accuracy.topk", topk)
        if context.logits is None:
            raise ConfigError(
                "Accuracy needs a method with logits, a classifier; score self-supervised methods with "
                "dict(type='KNN') or dict(type='LinearProbe')"
            )

    def run(self, state: Any) -> dict[str, float]:
        assert self.context.logits is not None
        counts = []
        for batch in self.context.loader("val"):
            if isinstance(batch["label"], dict) or batch["label"].ndim > 1:
                raise ConfigError(
                    "Accuracy: the val split has several labels for each image; score them with AveragePrecision or "
                    "MultiLabelMetric, and those of several tasks with MultiTasksMetric"
                )
            counts.append(_count(self.context.logits(state, batch), batch["label"], batch["valid"], self.topk))
        *right, total = np.sum(gather(counts), axis=0) if counts else [0]
        if not total:
            raise ConfigError("Accuracy: the val split has no labelled images; check config.data.val.dataset")
        return {f"top{k}": 100 * float(count) / int(total) for k, count in zip(self.topk, right, strict=True)}


@partial(jax.jit, static_argnames="topk")
def _count(
    logits: Float[Array, "b c"], label: Int[Array, " b"], valid: Bool[Array, " b"], topk: tuple[int, ...]
) -> Int[Array, " topk+1"]:
    """How many labels are among the first k, for each k; last, how many there are."""
    valid = valid & (label >= 0)
    right = jnp.sum(hits(logits, label, topk) & valid[:, None], axis=0)
    return jnp.append(right, valid.sum())


def hits(scores: Float[Array, "b c"], label: Int[Array, " b"], topk: tuple[int, ...]) -> Bool[Array, "b k"]:
    """Whether the label is among the k highest scores, for each k; of equal scores the lower class comes first."""
    best = jax.lax.top_k(scores, min(max(topk), scores.shape[-1]))[1]
    found = best == label[:, None]
    return jnp.stack([found[:, :k].any(axis=1) for k in topk], axis=1)
