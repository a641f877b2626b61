"""A part of a data set: so many of each class, or the samples of a list."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from jaxpretrain.build import ConfigError, build
from jaxpretrain.data.base import Sample, Source


class Subset(Source):
    """Part of another data set, in its order: for learning from 1 % or 10 % of the labels.

    Args:
        dataset: the whole one.
        fraction: of each class, at least one image, drawn by `seed`: max(1, round(fraction * count)).
        seed: of the draw; a class's images are drawn in one order, so smaller fractions are parts of larger ones.
        names: instead, a text file with one file name per line, with or without folders, such as the lists that SimCLR
            published (https://github.com/google-research/simclr/tree/master/imagenet_subsets); or MMSelfSup's lines of
            `path label`, whose labels are not looked at.
        rest: take all other samples instead.

    Raises:
        ConfigError: neither or both of fraction and names; a fraction outside (0, 1]; names that are not in the data set;
            data without labels.
    """

    def __init__(
        self,
        dataset: Mapping[str, Any] | Source,
        fraction: float | None = None,
        seed: int = 0,
        names: str | os.PathLike | None = None,
        rest: bool = False,
    ):
        self.dataset = build(dataset)
        if (fraction is None) == (names is None):
            raise ConfigError("Subset needs either fraction (of each class) or names (a file that lists the images)")
        self.in_memory = getattr(self.dataset, "in_memory", False)
        self.classes = getattr(self.dataset, "classes", None)
        chosen = self._listed(Path(names)) if names is not None else self._drawn(float(fraction or 0), seed)
        if rest:
            chosen = np.setdiff1d(np.arange(len(self.dataset)), chosen)
        self.indices = np.sort(chosen)

    def _drawn(self, fraction: float, seed: int) -> Int[np.ndarray, " n"]:
        if not 0 < fraction <= 1:
            raise ConfigError(f"Subset: fraction={fraction} must be above 0 and at most 1")
        labels = labels_of(self.dataset)
        if labels.min() < 0:
            raise ConfigError(
                f"Subset: {self.dataset!r} has images without labels, so no part of each class can be drawn"
            )
        rng, chosen = np.random.default_rng(seed), []
        for label in np.unique(labels):
            rows = rng.permutation(np.flatnonzero(labels == label))
            chosen.append(rows[: max(1, round(fraction * len(rows)))])
        return np.concatenate(chosen)

    def _listed(self, path: Path) -> Int[np.ndarray, " n"]:
        if not path.is_file():
            raise ConfigError(f"Subset: there is no file {path} (names)")
        wanted = {line.split()[0].rsplit("/", 1)[-1] for line in path.read_text().splitlines() if line.strip()}
        here = {os.path.basename(self.dataset.name(i)): i for i in range(len(self.dataset))}
        if missing := sorted(wanted - here.keys()):
            raise ConfigError(
                f"Subset: {len(missing)} of the {len(wanted)} names in {path} are not in {self.dataset!r}: "
                f"{', '.join(missing[:5])}"
            )
        return np.array(sorted(here[name] for name in wanted), np.int64)

    @property
    def num_classes(self) -> int | None:
        return self.dataset.num_classes

    @property
    def labels(self) -> Int[np.ndarray, " n"]:
        """int [N]."""
        return labels_of(self.dataset)[self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Sample:
        return self.dataset[int(self.indices[index])]

    def name(self, index: int) -> str:
        return self.dataset.name(int(self.indices[index]))


def labels_of(dataset: Any) -> Int[np.ndarray, " n"]:
    """The labels of a data set, int [N]; one that does not keep them is read through."""
    labels = getattr(dataset, "labels", None)
    if labels is None:
        labels = [dataset[i].get("label", -1) for i in range(len(dataset))]
    return np.asarray(labels)
