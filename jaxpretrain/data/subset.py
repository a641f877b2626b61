"""A part of a data set: so many of each class, the samples of a list, or those of given positions."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, Integer

from jaxpretrain.build import ConfigError, build
from jaxpretrain.data.base import Sample, Source, take


class View(Source):
    """Samples of another data set, by position: some, in another order, or several times. Names and labels stay theirs.

    Args:
        dataset: the other one.
        rows: the position there of each sample here.
        common: `indices` and others, see Source.
    """

    per_sample = ("rows",)

    def __init__(self, dataset: Mapping[str, Any] | Source, rows: Integer[np.ndarray, " n"], /, **common: Any):
        self.dataset = build(dataset)
        self.in_memory = getattr(self.dataset, "in_memory", False)
        self.classes = getattr(self.dataset, "classes", None)
        self.rows = np.asarray(rows, np.uint32 if len(self.dataset) < 2**32 else np.int64)
        super().__init__(**common)

    @property
    def num_classes(self) -> Any:
        return getattr(self.dataset, "num_classes", None)

    @property
    def labels(self) -> Any:
        """As the other data set's; where it does not keep them, it is read through."""
        return take(labels_of(self.dataset), self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        return self.dataset[int(self.rows[index])]

    def name(self, index: int) -> str:
        return name_of(self.dataset, int(self.rows[index]))


class Subset(View):
    """Part of another data set, in its order: for learning from 1 % or 10 % of the labels.

    Args:
        dataset: the whole one.
        fraction: of each class, at least one image, drawn by `seed`: max(1, round(fraction * count)).
        seed: of the draw; a class's images are drawn in one order, so smaller fractions are parts of larger ones.
        names: instead, a text file with one file name per line, with or without folders, such as the lists that SimCLR
            published (https://github.com/google-research/simclr/tree/master/imagenet_subsets); or MMSelfSup's lines of
            `path label`, whose labels are not looked at.
        rest: take all other samples instead.
        common: `indices` and others, see Source. `indices` may stand alone, and then applies to the whole data set.

    Raises:
        ConfigError: neither or several of fraction, names and indices; a fraction outside (0, 1]; names that are not in
            the data set; data without one label for each image.
    """

    def __init__(
        self,
        dataset: Mapping[str, Any] | Source,
        fraction: float | None = None,
        seed: int = 0,
        names: str | os.PathLike | None = None,
        rest: bool = False,
        **common: Any,
    ):
        dataset = build(dataset)
        if (fraction is not None) + (names is not None) > 1 or (
            fraction is None and names is None and common.get("indices") is None
        ):
            raise ConfigError(
                "Subset needs either fraction (of each class), or names (a file that lists the images), or indices"
            )
        chosen = np.arange(len(dataset))
        if names is not None:
            chosen = _listed(dataset, Path(names))
        elif fraction is not None:
            chosen = _drawn(dataset, float(fraction), seed)
        if rest:
            chosen = np.setdiff1d(np.arange(len(dataset)), chosen)
        super().__init__(dataset, np.sort(chosen), **common)


def _drawn(dataset: Any, fraction: float, seed: int) -> Int[np.ndarray, " n"]:
    if not 0 < fraction <= 1:
        raise ConfigError(f"Subset: fraction={fraction} must be above 0 and at most 1")
    labels = single_labels(dataset, "Subset: fraction")
    if labels.min() < 0:
        raise ConfigError(f"Subset: {dataset!r} has images without labels, so no part of each class can be drawn")
    rng, chosen = np.random.default_rng(seed), []
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        chosen.append(rows[: max(1, round(fraction * len(rows)))])
    return np.concatenate(chosen)


def _listed(dataset: Any, path: Path) -> Int[np.ndarray, " n"]:
    if not path.is_file():
        raise ConfigError(f"Subset: there is no file {path} (names)")
    wanted = {line.split()[0].rsplit("/", 1)[-1] for line in path.read_text().splitlines() if line.strip()}
    here = {os.path.basename(name_of(dataset, i)): i for i in range(len(dataset))}
    if missing := sorted(wanted - here.keys()):
        raise ConfigError(
            f"Subset: {len(missing)} of the {len(wanted)} names in {path} are not in {dataset!r}: "
            f"{', '.join(missing[:5])}"
        )
    return np.array(sorted(here[name] for name in wanted), np.int64)


def name_of(dataset: Any, index: int) -> str:
    """What a data set calls a sample; one that gives no names: its position."""
    name = getattr(dataset, "name", None)
    return name(index) if callable(name) else f"{type(dataset).__name__}[{index}]"


def labels_of(dataset: Any) -> Any:
    """The labels of a data set: ints [N], int8 [N, classes], or a dict of these; one that does not keep them is read."""
    labels = getattr(dataset, "labels", None)
    if labels is None:
        from jaxpretrain.data.labels import canonical, column, put

        found = [canonical(dataset[i].get("label", -1)) for i in range(len(dataset))]
        labels = column(found[0], len(found))
        put(labels, slice(None), found)
    return labels if isinstance(labels, Mapping) else np.asarray(labels)


def single_labels(dataset: Any, purpose: str) -> Int[np.ndarray, " n"]:
    """The labels of a data set that has one for each image, int [N]; ConfigError for others, naming the `purpose`."""
    labels = labels_of(dataset)
    if isinstance(labels, Mapping) or labels.ndim != 1:
        raise ConfigError(f"{purpose} needs one label for each image, and {dataset!r} has several")
    return labels
