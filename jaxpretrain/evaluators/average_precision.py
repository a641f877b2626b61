"""Average precision of ranked scores."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int


def average_precision(scores: Float[np.ndarray, " n"], targets: Int[np.ndarray, " n"], envelope: bool = True) -> float:
    """The area under the precision-recall curve, from 0 to 1: PASCAL VOC's since 2010.

    Precision at a recall is the highest precision at that or any higher recall. VOC07's own number averages it at 11
    recalls instead; the benchmarks of self-supervised learning on VOC07 use the area.

    Args:
        scores: the higher, the likelier is the class to be there; of equal ones, the later row ranks first.
        targets: 1 where the class is there, 0 where it is not, -1 where the row does not count.
        envelope: False takes precision as it is, without the highest at any higher recall.

    Returns:
        nan if there is no row with the class.
    """
    counted = targets >= 0
    scores, targets = scores[counted], targets[counted] > 0
    if not targets.any():
        return float("nan")
    right = targets[np.argsort(scores, kind="stable")[::-1]]
    precision = np.cumsum(right) / np.arange(1, len(right) + 1)
    if envelope:
        precision = np.maximum.accumulate(precision[::-1])[::-1]
    return float(precision[right].mean())  # each row with the class is one equal step of recall


def mean_average_precision(scores: Float[np.ndarray, "n c"], targets: Int[np.ndarray, "n c"]) -> float:
    """The mean over classes, leaving out those without a row; nan if all are."""
    values = np.array([average_precision(scores[:, c], targets[:, c]) for c in range(targets.shape[1])])
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")
