"""A picture of what the network takes for alike: images, and the training images nearest to them."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from jaxpretrain.evaluators.base import (
    EvalContext,
    Evaluator,
    check_counts,
    completed_steps,
    extract_rows,
    fetch_images,
)
from jaxpretrain.visualize.neighbours import neighbour_grid
from jaxpretrain.visualize.reconstructions import save_png


class NearestNeighbours(Evaluator):
    """Draws images of `val`, evenly spread over it, each with its nearest `train` images by the cosine of the features.

    Neighbours of the query's class have a green frame, others a red one; the number under an image is its label. Writes
    `workdir/pictures/nearest_neighbours_STEP.png` and, always the latest, `nearest_neighbours.png`; without a workdir no
    picture. Returns {'same_class': percent of the drawn neighbours that are of their query's class (share one, in
    multi-label data)}.

    Args:
        context: of the run.
        num_images: queries.
        k: neighbours of each.
    """

    def __init__(self, context: EvalContext, num_images: int = 8, k: int = 8):
        super().__init__(context)
        self.num_images, self.k = (
            check_counts(f"NearestNeighbours.{name}", n)[0] for name, n in (("num_images", num_images), ("k", k))
        )

    def run(self, state: Any) -> dict[str, float]:
        bank, bank_labels, bank_index = extract_rows(self.context, state, "train")
        features, labels, index = extract_rows(self.context, state, "val")
        rows = np.unique(np.linspace(0, len(labels) - 1, min(self.num_images, len(labels))).round().astype(int))
        cosine = _unit(features[rows]) @ _unit(bank).T
        nearest = np.argsort(-cosine, axis=1, kind="stable")[:, : self.k]
        agree = np.stack([_agree(labels[row], bank_labels[near]) for row, near in zip(rows, nearest, strict=True)])
        if self.context.workdir is not None:
            self._draw(state, index[rows], labels[rows], bank_index[nearest], bank_labels[nearest], agree)
        return {"same_class": 100 * float(agree.mean())}

    def _draw(self, state: Any, query: Any, labels: Any, neighbours: Any, neighbour_labels: Any, agree: Any) -> None:
        assert self.context.workdir is not None
        queries = fetch_images(self.context, "val", query)  # a pass over the loader takes all processes
        images = fetch_images(self.context, "train", neighbours.ravel())
        if jax.process_index() != 0:
            return
        grid = neighbour_grid(
            queries,
            images.reshape(*neighbours.shape, *images.shape[1:]),
            [_name(label) for label in labels],
            [[_name(label) for label in row] for row in neighbour_labels],
            agree,
        )
        for name in (f"nearest_neighbours_{completed_steps(state)}.png", "nearest_neighbours.png"):
            save_png(self.context.workdir / "pictures" / name, grid)


def _agree(label: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Whether they have the label, or one of the labels."""
    return others == label if others.ndim == 1 else ((others == 1) & (label == 1)).any(axis=1)


def _name(label: np.ndarray) -> str:
    return str(int(label)) if np.ndim(label) == 0 else ", ".join(map(str, np.flatnonzero(label == 1)))


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
