"""Linear support vector machines on frozen features, from a few images per class and from all of them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from jaxpretrain.build import ConfigError
from jaxpretrain.evaluators.average_precision import mean_average_precision
from jaxpretrain.evaluators.base import EvalContext, Evaluator, as_tuple, check_counts, extract_rows
from jaxpretrain.evaluators.levels import check_pool, level_features, pick_levels

SHOTS = (1, 2, 4, 8, 16, 32, 64, 96)
COSTS = (1.0, 10.0, 100.0, *(0.5**n for n in range(4, 20)))
Split = tuple[Float[np.ndarray, "n d"], Int[np.ndarray, "n c"]]


class LowShotSVM(Evaluator):
    """One linear SVM per class on `train`, one against the rest, scored on `val`: VOC07's protocol of Goyal et al., 2019
    ("Scaling and Benchmarking Self-Supervised Visual Representation Learning", sections 5.1 and 6.1), as in MMSelfSup.

    Features are of unit length. For k shots each class has k positive images and k times (classes - 1) negative ones, drawn
    `draws` times; scores are means over draws, at the one cost that gives the highest mean on `val` (the benchmark's
    rule: it chooses on the test set). With all images, a class's cost is the best of 3-fold cross-validation on `train`.

    Scores are in percent: {'k1_map': ..., 'k1_map_std': ..., ..., 'full_map': ...}, the mean average precision and its
    standard deviation over draws. Data with one label per image also has accuracies, of the class whose SVM scores
    highest: 'k1_top1', 'full_top1'. With `levels`, the scores are those of the best level, and 'level' is its number;
    each level's own is 'stage1_map', of all images or else of the most shots.

    A k that some class has not enough images for is left out. Multi-label data marks difficult objects by -1: they are left
    out of low-shot training and of scores; training on all images counts them as negative, as the benchmark does.

    Args:
        context: of the run.
        k: shots; () for none.
        draws: random draws of the images, a function of `context.seed`.
        full: whether to train on all images too.
        costs: the SVMs' C that are tried.
        levels: True: of all levels of the network (see `extract_levels`); names: of these.
        pool: how maps and tokens become vectors there.
        workers: threads; None: one per processor.

    Raises:
        ConfigError: nothing to do; costs that are not positive; fewer images of a class than the smallest k.
    """

    def __init__(
        self,
        context: EvalContext,
        k: int | Sequence[int] = SHOTS,
        draws: int = 5,
        full: bool = False,
        costs: float | Sequence[float] = COSTS,
        levels: bool | Sequence[str] = False,
        pool: str = "auto",
        workers: int | None = None,
    ):
        super().__init__(context)
        self.k = check_counts("LowShotSVM.k", k) if k != () and k != [] else ()
        (self.draws,) = check_counts("LowShotSVM.draws", draws)
        self.full, self.levels, self.pool = full, levels, check_pool("LowShotSVM.pool", pool)
        self.costs, self.workers = tuple(map(float, as_tuple(costs))), workers
        if not self.costs or min(self.costs) <= 0:
            raise ConfigError(f"LowShotSVM.costs is {costs!r}; it must be one or more positive numbers")
        if not self.k and not full:
            raise ConfigError("LowShotSVM has nothing to do: give it k, or full=True")

    def run(self, state: Any) -> dict[str, float]:
        if not self.levels:
            rows = [extract_rows(self.context, state, split)[:2] for split in ("train", "val")]
            return self.score(*(self._with_targets(*row) for row in rows))
        train, labels = level_features(self.context, state, "train", self.pool)
        val, val_labels = level_features(self.context, state, "val", self.pool)
        names = pick_levels(train, None if self.levels is True else self.levels, "LowShotSVM")
        scores = {}
        for name in names:
            scores[name] = self.score(
                self._with_targets(train[name], labels), self._with_targets(val[name], val_labels)
            )
        key = "full_map" if self.full else [key for key in scores[names[0]] if key.endswith("_map")][-1]
        best = max(names, key=lambda name: scores[name][key])
        return {
            **scores[best],
            "level": float(list(train).index(best) + 1),
            **{f"{name}_map": scores[name][key] for name in names},
        }

    def score(self, train: Split, val: Split) -> dict[str, float]:
        """The scores of (features [N, D], targets [N, classes]) of both splits; targets are 1, 0 or -1."""
        (x, y), (qx, qy) = ((_unit(features), targets) for features, targets in (train, val))
        single = bool((y.sum(axis=1) == 1).all() and (y >= 0).all())
        shots = [k for k in self.k if (y == 1).sum(axis=0).min() >= k]
        if self.k and not shots:
            fewest = int((y == 1).sum(axis=0).min())
            raise ConfigError(f"LowShotSVM: a class has {fewest} training images, fewer than k={min(self.k)}")
        scores: dict[str, float] = {}
        with ThreadPoolExecutor(self.workers or os.cpu_count()) as pool, _quiet():
            for k in shots:
                scores |= self._low_shot(k, x, y, qx, qy, single, pool.map)
            if self.full:
                columns = list(pool.map(partial(self._fit_full, x, qx), y.T))
                scores |= _scores("full", np.stack(columns, axis=1), qy, single)
        return scores

    def _with_targets(self, features: np.ndarray, labels: np.ndarray) -> Split:
        if labels.ndim == 1:
            labels = (labels[:, None] == np.arange(self.context.num_classes or 0)).astype(np.int8)
        return features, labels

    def _low_shot(
        self, k: int, x: np.ndarray, y: np.ndarray, qx: np.ndarray, qy: np.ndarray, single: bool, map_: Callable
    ) -> dict[str, float]:
        values: dict[str, list[list[float]]] = {}  # name -> [draws][costs]
        for draw in range(self.draws):
            picked = draw_shots(y, k, np.random.default_rng((self.context.seed, k, draw)))
            jobs = [(x[rows], y[rows, c] > 0) for c, rows in enumerate(picked)]
            found = map_(lambda job: [_decide(job[0], job[1], cost, qx) for cost in self.costs], jobs)
            per_cost = np.stack(list(found), axis=2)  # [costs, queries, classes]
            results = [_scores(f"k{k}", decision, qy, single) for decision in per_cost]
            for name in results[0]:
                values.setdefault(name, []).append([result[name] for result in results])
        best = int(np.argmax(np.mean(values[f"k{k}_map"], axis=0)))
        scores = {name: float(np.mean(rows, axis=0)[best]) for name, rows in values.items()}
        return {**scores, f"k{k}_map_std": float(np.std(values[f"k{k}_map"], axis=0)[best])}

    def _fit_full(self, x: np.ndarray, qx: np.ndarray, target: np.ndarray) -> np.ndarray:
        """Decisions on the queries for one class, at the cost that cross-validation prefers (the first of equals)."""
        present = target > 0
        folds = min(3, int(present.sum()), int((~present).sum()))
        if len(self.costs) == 1 or folds < 2:
            return _decide(x, present, self.costs[0], qx)
        from sklearn.metrics import average_precision_score
        from sklearn.model_selection import StratifiedKFold

        parts = list(StratifiedKFold(folds).split(x, present))
        means = [
            np.mean([average_precision_score(present[b], _decide(x[a], present[a], cost, x[b])) for a, b in parts])
            for cost in self.costs
        ]
        return _decide(x, present, self.costs[int(np.argmax(means))], qx)


def draw_shots(y: Int[np.ndarray, "n c"], k: int, rng: np.random.Generator) -> list[Int[np.ndarray, " m"]]:
    """For each class the rows of k positive and k (classes - 1) negative images (all, if there are fewer)."""
    rows = []
    for target in y.T:
        present, absent = np.flatnonzero(target == 1), np.flatnonzero(target == 0)
        negatives = min(k * (y.shape[1] - 1), len(absent))
        picked = [rng.choice(present, k, replace=False), rng.choice(absent, negatives, replace=False)]
        rows.append(np.sort(np.concatenate(picked)))
    return rows


def _scores(prefix: str, decisions: np.ndarray, targets: np.ndarray, single: bool) -> dict[str, float]:
    scores = {f"{prefix}_map": 100 * mean_average_precision(decisions, targets)}
    if single:
        right = decisions.argmax(axis=1) == targets.argmax(axis=1)
        scores[f"{prefix}_top1"] = 100 * float(right.mean())
    return scores


def _decide(x: np.ndarray, present: np.ndarray, cost: float, queries: np.ndarray) -> np.ndarray:
    """The distances of `queries` from the plane between the two kinds of rows, of which positive ones count twice."""
    from sklearn.svm import LinearSVC

    svm = LinearSVC(C=cost, class_weight={1: 2, 0: 1}, loss="squared_hinge", max_iter=2000, random_state=0, dual=True)
    return svm.fit(x, present.astype(int)).decision_function(queries)


def _unit(features: np.ndarray) -> np.ndarray:
    features = features.astype(np.float64)
    return features / (np.linalg.norm(features, axis=1, keepdims=True) + 1e-5)


class _quiet(warnings.catch_warnings):
    """No word of SVMs that stop at 2,000 iterations: at the highest costs, that is what the protocol means."""

    def __enter__(self) -> Any:
        entered = super().__enter__()
        from sklearn.exceptions import ConvergenceWarning

        warnings.simplefilter("ignore", ConvergenceWarning)
        return entered
