"""Scores of a classifier with several tasks: each task's own evaluators."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxpretrain.build import ConfigError, build
from jaxpretrain.evaluators.base import Batch, EvalContext, Evaluator, gather, one_behind


class MultiTasksMetric(Evaluator):
    """Evaluators of logits (`Accuracy`, `AveragePrecision`, ...) for each task, on `val`: {'TASK_SCORE': ...}.

    Images without a label in a task do not count in it. All tasks are scored from one pass over the data.

    Args:
        context: of the run; its method must have logits by task (a `MultiTaskHead`).
        task_metrics: {task: a list of `dict(type=...)`}.
        collect_device: accepted for MMPretrain's configs.

    Raises:
        ConfigError: the method is no classifier; a task that the head or the data lacks.
    """

    def __init__(
        self, context: EvalContext, task_metrics: Mapping[str, Sequence[Mapping[str, Any]]], collect_device: str = "cpu"
    ):
        super().__init__(context)
        if context.logits is None:
            raise ConfigError("MultiTasksMetric needs a method with logits, a classifier with a MultiTaskHead")
        self._batch: Batch = {}  # all of the split, of one task
        self._inner = dataclasses.replace(
            context, logits=lambda state, batch: batch["logits"], loader=self._one, classes=None
        )
        self.metrics = {
            task: [build(cfg, context=self._inner) for cfg in ([cfgs] if isinstance(cfgs, Mapping) else cfgs)]
            for task, cfgs in task_metrics.items()
        }

    def _one(self, split: str) -> Iterator[Batch]:
        yield self._batch

    def run(self, state: Any) -> dict[str, float]:
        logits = self.context.logits
        assert logits is not None
        outputs = ((logits(state, b), b["label"], b["index"], b["valid"]) for b in self.context.loader("val"))
        parts = []
        for found, label, index, valid in map(gather, one_behind(outputs)):
            parts.append(jax.tree.map(lambda x, kept=valid: x[kept], (found, label, index)))
        if not parts:
            raise ConfigError("MultiTasksMetric: the val split has no images; check config.data.val.dataset")
        found, labels, index = jax.tree.map(lambda *x: np.concatenate(x), *parts)
        scores: dict[str, float] = {}
        for task, metrics in self.metrics.items():
            for what, by_task in (("head", found), ("data", labels)):
                if not isinstance(by_task, Mapping) or task not in by_task:
                    known = ", ".join(by_task) if isinstance(by_task, Mapping) else "one task alone"
                    raise ConfigError(f"MultiTasksMetric: there is no task {task!r} in the {what}; it has {known}")
            label = labels[task]
            kept = (label >= 0).reshape(len(label), -1).any(axis=1)
            if not kept.any():
                raise ConfigError(f"MultiTasksMetric: no image of the val split has a label for {task!r}")
            self._inner.num_classes = found[task].shape[1]
            self._batch = jax.device_put(
                dict(logits=found[task][kept], label=label[kept], index=index[kept], valid=np.ones(kept.sum(), bool))
            )
            for metric in metrics:
                scores.update({f"{task}_{name}": value for name, value in metric.run(state).items()})
        self._batch = {}
        return scores
