"""Data sets made of other data sets: several in one, repeated, balanced by class, or split into folds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from jaxpretrain.build import ConfigError, build
from jaxpretrain.data.base import Sample, Source
from jaxpretrain.data.subset import View, labels_of, name_of


class ConcatDataset(Source):
    """Several data sets, one after another.

    Args:
        datasets: each a dictionary with `type`, or a data set.
        ignore_keys: `classes`, or a list with it: the data sets may name different classes, and those of the first count.
        common: `indices` and others, see Source.

    Raises:
        ConfigError: no data set; other classes in one than in another; labels of several kinds.
    """

    per_sample = ("_rows",)

    def __init__(
        self,
        datasets: Sequence[Mapping[str, Any] | Source],
        ignore_keys: str | Sequence[str] | None = None,
        **common: Any,
    ):
        self.datasets = [build(dataset) for dataset in datasets]
        if not self.datasets:
            raise ConfigError("ConcatDataset: datasets is empty")
        ignored = [ignore_keys] if isinstance(ignore_keys, str) else list(ignore_keys or ())
        first = self.datasets[0]
        self.classes = getattr(first, "classes", None)
        for number, other in enumerate(self.datasets):
            if "classes" not in ignored and getattr(other, "classes", None) != self.classes:
                raise ConfigError(
                    f"ConcatDataset: {other!r} (number {number}) has other classes than {first!r}: {_few(other)}, and "
                    f"{_few(first)}. Give both the same classes=[...], or set ignore_keys='classes' if the numbers of "
                    "the labels mean the same"
                )
            if None not in (kinds := (_kind(first), _kind(other))) and kinds[0] != kinds[1]:
                raise ConfigError(
                    f"ConcatDataset: {first!r} and {other!r} (number {number}) have labels of several kinds"
                )
        self.in_memory = all(getattr(dataset, "in_memory", False) for dataset in self.datasets)
        self._starts = np.cumsum([0, *map(len, self.datasets)])
        self._rows = np.arange(self._starts[-1])
        super().__init__(**common)

    def _find(self, index: int) -> tuple[Any, int]:
        """(data set, position there)."""
        row = self._rows[index]
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self.datasets[number], int(row - self._starts[number])

    @property
    def num_classes(self) -> Any:
        counts = [getattr(dataset, "num_classes", None) for dataset in self.datasets]
        return counts[0] if isinstance(counts[0], Mapping) else max((c for c in counts if c), default=None)

    @property
    def labels(self) -> Any:
        """As the data sets'; of those that do not keep them, each sample is read."""
        return _join([labels_of(dataset) for dataset in self.datasets], self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Sample:
        dataset, row = self._find(index)
        return dataset[row]

    def name(self, index: int) -> str:
        return name_of(*self._find(index))


class RepeatDataset(View):
    """A data set several times over: an epoch is that much longer, and starts and ends less often.

    Args:
        dataset: a dictionary with `type`, or a data set.
        times: how often.
        common: `indices` and others, see Source.
    """

    def __init__(self, dataset: Mapping[str, Any] | Source, times: int, **common: Any):
        if not isinstance(times, int) or times < 1:
            raise ConfigError(f"RepeatDataset: times={times!r} must be a whole number from 1 up")
        dataset = build(dataset)
        super().__init__(dataset, np.tile(np.arange(len(dataset)), times), **common)


class ClassBalancedDataset(View):
    """Repeats the images of rare classes (Gupta et al., 2019, LVIS, section 5.2, https://arxiv.org/abs/1908.03195).

    A class c that a share f(c) of the images have is due r(c) = max(1, sqrt(oversample_thr / f(c))) times. An image is there
    as often as the most demanding of its classes is due, rounded up; one without a label once.

    Args:
        dataset: a dictionary with `type`, or a data set; with one label or several for each image.
        oversample_thr: the share from which a class is frequent enough.
        common: `indices` and others, see Source.
    """

    def __init__(self, dataset: Mapping[str, Any] | Source, oversample_thr: float, **common: Any):
        dataset = build(dataset)
        times = np.ceil(repeat_factors(labels_of(dataset), oversample_thr)).astype(np.int64)
        super().__init__(dataset, np.repeat(np.arange(len(dataset)), times), **common)


def repeat_factors(labels: Any, oversample_thr: float) -> Float[np.ndarray, " n"]:
    """How often each image is due, at least once; see ClassBalancedDataset.

    Args:
        labels: int [N], or [N, classes] with 1 where the class is there.
        oversample_thr: the share from which a class is frequent enough.
    """
    if isinstance(labels, Mapping):
        raise ConfigError("ClassBalancedDataset: the images have labels of several tasks, which cannot all be balanced")
    if not 0 < oversample_thr <= 1:
        raise ConfigError(f"ClassBalancedDataset: oversample_thr={oversample_thr} must be above 0 and at most 1")
    single = labels.ndim == 1
    count = np.bincount(labels[labels >= 0], minlength=1) if single else (labels == 1).sum(axis=0)
    due = np.maximum(1.0, np.sqrt(oversample_thr / (np.maximum(count, 1) / len(labels))))
    return (
        np.where(labels >= 0, due[labels], 1.0) if single else np.where(labels == 1, due, 1.0).max(axis=1, initial=1.0)
    )


class KFoldDataset(View):
    """One fold of a k-fold cross-validation, or all others: the folds of scikit-learn's KFold.

    Args:
        dataset: a dictionary with `type`, or a data set.
        fold: which of the folds, from 0, is held out.
        num_splits: how many folds there are.
        test_mode: the held-out fold itself, instead of the others.
        seed: shuffles before splitting, as `KFold(num_splits, shuffle=True, random_state=seed)`; None: folds are
            consecutive samples. (MMPretrain shuffles by another generator, so its folds have other members.)
        common: `indices` and others, see Source.
    """

    def __init__(
        self,
        dataset: Mapping[str, Any] | Source,
        fold: int = 0,
        num_splits: int = 5,
        test_mode: bool = False,
        seed: int | None = None,
        **common: Any,
    ):
        dataset = build(dataset)
        held_out = held_out_fold(len(dataset), fold, num_splits, seed)
        self.fold, self.num_splits, self.test_mode, self.seed = fold, num_splits, test_mode, seed
        rest = np.setdiff1d(np.arange(len(dataset)), held_out)
        super().__init__(dataset, held_out if test_mode else rest, **common)


def held_out_fold(length: int, fold: int, num_splits: int, seed: int | None) -> Int[np.ndarray, " n"]:
    """The samples of a fold, ascending; the first `length % num_splits` folds have one more than the others."""
    if not 2 <= num_splits <= length:
        raise ConfigError(f"KFoldDataset: num_splits={num_splits} must be from 2 to the {length} samples")
    if not 0 <= fold < num_splits:
        raise ConfigError(f"KFoldDataset: fold={fold} must be from 0 to {num_splits - 1}")
    order = np.arange(length)
    if seed is not None:
        np.random.RandomState(seed).shuffle(order)  # scikit-learn's generator, frozen for good
    return np.sort(np.array_split(order, num_splits)[fold])


def _kind(dataset: Any) -> Any:
    """What tells labels of one kind from those of another, if it is known without reading."""
    labels = getattr(dataset, "labels", None) if not isinstance(dataset, View | ConcatDataset) else None
    if isinstance(labels, Mapping):
        return sorted(labels)
    return None if labels is None else np.shape(labels)[1:]


def _few(dataset: Any) -> str:
    classes = getattr(dataset, "classes", None)
    if classes is None:
        return "no names"
    return ", ".join(classes[:5]) + (f", ... ({len(classes)})" if len(classes) > 5 else "")


def _join(labels: Sequence[Any], rows: Int[np.ndarray, " n"]) -> Any:
    if isinstance(labels[0], Mapping):
        return {task: _join([part[task] for part in labels], rows) for task in labels[0]}
    return np.concatenate(labels)[rows]
