"""Scores of images that have several labels each: precision, recall and F1, and average precision. MMPretrain's numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxpretrain.build import ConfigError, nearest
from jaxpretrain.evaluators.average_precision import average_precision
from jaxpretrain.evaluators.base import EvalContext, Evaluator, run_over

ITEMS = ("precision", "recall", "f1-score", "support")
_AVERAGES = ("macro", "micro", None)


class _MultiLabel(Evaluator):
    """What they share: logits and labels of `val`. Where a label is -1, the class does not count for that image.

    Args:
        context: of the run; its method must have logits.
        average: 'macro': the mean over classes, of which those without an image count as 0; 'micro': all classes as one;
            None: a score for each class, `NAME_classwise/CLASS`.
        collect_device, prefix: accepted for MMPretrain's configs; scores have the name of the evaluator before them.
    """

    def __init__(
        self,
        context: EvalContext,
        average: str | None = "macro",
        collect_device: str = "cpu",
        prefix: str | None = None,
    ):
        super().__init__(context)
        self.average = average
        if context.logits is None:
            raise ConfigError(f"{type(self).__name__} needs a method with logits, a classifier")

    def run(self, state: Any) -> dict[str, float]:
        logits = self.context.logits
        assert logits is not None
        found, labels, _ = run_over(self.context, "val", lambda batch: {"logits": logits(state, batch)})
        if labels.ndim == 1:  # a set of one class
            labels = (labels[:, None] == np.arange(found["logits"].shape[1])).astype(np.int8)
        if labels.shape != found["logits"].shape:
            raise ConfigError(
                f"{type(self).__name__}: the labels have {labels.shape[1]} classes, the logits {found['logits'].shape[1]}"
            )
        return self.score(found["logits"], labels)

    def score(self, logits: Float[np.ndarray, "n c"], labels: Int[np.ndarray, "n c"]) -> dict[str, float]:
        """The scores, in percent."""
        raise NotImplementedError

    def _named(self, name: str, values: np.ndarray) -> dict[str, float]:
        """One score, or one for each class."""
        if self.average is not None:
            return {name: float(values)}
        classes = self.context.classes or range(len(values))
        return {f"{name}_classwise/{c}": float(value) for c, value in zip(classes, values, strict=True)}


class MultiLabelMetric(_MultiLabel):
    """Precision, recall, F1 and support of the classes that an image is said to have, on `val`, in percent.

    The literature's CP, CR and CF1 are the macro averages, OP, OR and OF1 the micro ones. (The macro F1 here is the mean of
    the classes' F1; CF1 is often that of CP and CR.)

    Args:
        context: of the run.
        thr: a class is said to be there from this score (sigmoid of the logit) on; 0.5 if neither it nor `topk` is given.
        topk: the classes with the highest scores are. `thr` goes before it.
        items: of precision, recall, f1-score and support (how many labels there are, no percentage).
        average, collect_device, prefix: see _MultiLabel.

    Scores have the suffixes of MMPretrain: `precision_thr-0.30`, `precision_top2`, and `_micro` or `_classwise`.
    """

    def __init__(
        self,
        context: EvalContext,
        thr: float | None = None,
        topk: int | None = None,
        items: Sequence[str] = ITEMS[:3],
        average: str | None = "macro",
        collect_device: str = "cpu",
        prefix: str | None = None,
    ):
        super().__init__(context, average)
        if average not in _AVERAGES:
            raise ConfigError(f"{type(self).__name__}: average={average!r} must be 'macro', 'micro' or None")
        self.items = (items,) if isinstance(items, str) else tuple(items)
        for item in self.items:
            if item not in ITEMS:
                raise ConfigError(f"{type(self).__name__}: unknown item {item!r}.{nearest(item, ITEMS)}")
        if topk is not None and topk < 1:
            raise ConfigError(f"{type(self).__name__}: topk={topk} must be 1 at least")
        self.suffix = f"_thr-{thr:.2f}" if thr is not None else f"_top{topk}" if topk is not None else ""
        self.suffix += "_micro" if average == "micro" else ""
        self.thr, self.topk = 0.5 if thr is None and topk is None else thr, topk

    def score(self, logits: Float[np.ndarray, "n c"], labels: Int[np.ndarray, "n c"]) -> dict[str, float]:
        values = precision_recall_f1(said(logits, self.thr, self.topk), labels, self.average)
        return {
            name: value for item in self.items for name, value in self._named(item + self.suffix, values[item]).items()
        }


class AveragePrecision(_MultiLabel):
    """The area under each class's precision-recall curve, `mAP` its mean over classes, on `val`, in percent.

    Precision is taken at each image that has the class, as it is: not, as VOC's own evaluation does, the highest at that
    or any higher recall (that is `LowShotSVM`'s).

    Args:
        context, average, collect_device, prefix: see _MultiLabel; `average` is 'macro' or None.
    """

    def __init__(
        self,
        context: EvalContext,
        average: str | None = "macro",
        collect_device: str = "cpu",
        prefix: str | None = None,
    ):
        super().__init__(context, average)
        if average not in ("macro", None):
            raise ConfigError(f"{type(self).__name__}: average={average!r} must be 'macro' or None")

    def score(self, logits: Float[np.ndarray, "n c"], labels: Int[np.ndarray, "n c"]) -> dict[str, float]:
        columns = zip(logits.T, labels.T, strict=True)
        values = 100 * np.nan_to_num([average_precision(one, label, envelope=False) for one, label in columns])
        return self._named("AP", values) if self.average is None else {"mAP": float(values.mean())}


class VOCMultiLabelMetric(MultiLabelMetric):
    """MultiLabelMetric for PASCAL VOC.

    Args:
        context: of the run.
        difficult_as_positive: what a class is of which all objects are difficult: there, not there, or (None) not counted.
        options: see MultiLabelMetric.
    """

    def __init__(self, context: EvalContext, difficult_as_positive: bool | None = None, **options: Any):
        super().__init__(context, **options)
        self.difficult_as_positive = difficult_as_positive

    def score(self, logits: Float[np.ndarray, "n c"], labels: Int[np.ndarray, "n c"]) -> dict[str, float]:
        return super().score(logits, _decided(labels, self.difficult_as_positive))


class VOCAveragePrecision(AveragePrecision):
    """AveragePrecision for PASCAL VOC.

    Args:
        context: of the run.
        difficult_as_positive: see VOCMultiLabelMetric.
        options: see AveragePrecision.
    """

    def __init__(self, context: EvalContext, difficult_as_positive: bool | None = None, **options: Any):
        super().__init__(context, **options)
        self.difficult_as_positive = difficult_as_positive

    def score(self, logits: Float[np.ndarray, "n c"], labels: Int[np.ndarray, "n c"]) -> dict[str, float]:
        return super().score(logits, _decided(labels, self.difficult_as_positive))


def said(logits: Float[np.ndarray, "n c"], thr: float | None, topk: int | None) -> Bool[np.ndarray, "n c"]:
    """Which classes the scores say are there: by threshold, or the k highest; of equal ones the lower class first."""
    if thr is not None:
        return 1 / (1 + np.exp(-logits.astype(np.float64))) >= thr
    found = np.zeros(logits.shape, bool)
    best = np.argsort(-logits, axis=1, kind="stable")[:, :topk]
    np.put_along_axis(found, best, True, axis=1)
    return found


def precision_recall_f1(
    positive: Bool[np.ndarray, "n c"], labels: Int[np.ndarray, "n c"], average: str | None
) -> dict[str, np.ndarray]:
    """precision, recall, f1-score (percent) and support: scalars, or [c] without an average.

    Args:
        positive: which classes are said to be there.
        labels: 1 where they are, 0 where not, -1 where that does not count.
        average: 'macro', 'micro' or None.
    """
    positive, there = positive & (labels >= 0), labels == 1
    sums = [x.sum(axis=0, dtype=np.float64) for x in (positive & there, positive, there)]
    right, claimed, support = [x.sum() for x in sums] if average == "micro" else sums
    precision, recall = 100 * right / np.maximum(claimed, 1), 100 * right / np.maximum(support, 1)
    f1 = 2 * precision * recall / np.maximum(precision + recall, np.finfo(np.float64).tiny)
    if average == "macro":
        precision, recall, f1, support = precision.mean(), recall.mean(), f1.mean(), support.sum()
    return dict(zip(ITEMS, (precision, recall, f1, support), strict=True))


def _decided(labels: Int[np.ndarray, "n c"], difficult_as_positive: bool | None) -> Int[np.ndarray, "n c"]:
    return labels if difficult_as_positive is None else np.where(labels < 0, int(difficult_as_positive), labels)
