"""Transforms made of transforms: of several views, at random, and for each item of a list."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxpretrain.build import ConfigError
from jaxpretrain.data.base import Sample
from jaxpretrain.data.formatting import our_key
from jaxpretrain.data.host_transforms import build_pipeline
from jaxpretrain.data.views import each_view


class MultiView:
    """Several views of one image, decoded once: `image` becomes a tuple.

    Args:
        transforms: one pipeline for each kind of view.
        num_views: how many views each pipeline gives; a number for the only one, or a list.
    """

    lazy = True

    def __init__(self, transforms: Sequence[Sequence[Any]], num_views: int | Sequence[int]):
        counts = [num_views] if isinstance(num_views, int) else list(num_views)
        if len(counts) != len(transforms):
            raise ConfigError(
                f"MultiView: num_views={num_views} are {len(counts)} numbers for {len(transforms)} pipelines"
            )
        self.pipelines = [
            build_pipeline(steps) for steps, count in zip(transforms, counts, strict=True) for _ in range(count)
        ]

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        return {**sample, "image": tuple(pipeline(dict(sample), rng)["image"] for pipeline in self.pipelines)}


class RandomApply:
    """All of `transforms`, one after the other, or none.

    Args:
        transforms: a transform or a list of them.
        prob: of applying them; drawn anew for each view.
    """

    def __init__(self, transforms: Any, prob: float = 0.5):
        if not isinstance(prob, int | float) or not 0 <= prob <= 1:
            raise ConfigError(f"RandomApply: prob={prob!r} is not a probability")
        self.prob = prob
        self.pipeline = build_pipeline(_listed(transforms))

    def draw(self, rng: np.random.Generator) -> bool:
        """Whether to apply them."""
        return rng.random() < self.prob

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        return each_view(lambda one, rng: self.pipeline(one, rng) if self.draw(rng) else one, sample, rng)


class RandomChoice:
    """One of several pipelines.

    Args:
        transforms: transforms, or lists of transforms.
        prob: of each, 1 in sum; even by default. Drawn anew for each view.
    """

    def __init__(self, transforms: Sequence[Any], prob: Sequence[float] | None = None):
        if not transforms:
            raise ConfigError("RandomChoice: transforms is empty")
        prob = [1 / len(transforms)] * len(transforms) if prob is None else list(prob)
        if len(prob) != len(transforms) or min(prob) < 0 or abs(sum(prob) - 1) > 1e-6:
            raise ConfigError(
                f"RandomChoice: prob={prob} must be {len(transforms)} probabilities, one for each of transforms, 1 in sum"
            )
        self.cumulative = np.cumsum(prob) / sum(prob)
        self.pipelines = [build_pipeline(_listed(steps)) for steps in transforms]

    def draw(self, rng: np.random.Generator) -> int:
        """The number of a pipeline."""
        return int(np.searchsorted(self.cumulative, rng.random(), side="right"))

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        return each_view(lambda one, rng: self.pipelines[self.draw(rng)](one, rng), sample, rng)


class ApplyToList:
    """Applies transforms to each item of a list in the sample, with draws of its own.

    Args:
        transforms: what each item goes through.
        scatter_key: the key of the list. A sample that has no list (or tuple) there goes through as it is.
        collate_keys: further keys of which every item's value is kept, as a list; of the rest it is the first item's.
            MMPretrain's `img`, `gt_label`, `img_path` and `sample_idx` mean our `image`, `label`, `path` and `index`.
    """

    def __init__(self, transforms: Sequence[Any], scatter_key: str, collate_keys: Sequence[str]):
        self.pipeline = build_pipeline(transforms)
        self.scatter_key = our_key(scatter_key)
        self.collate_keys = {self.scatter_key, *map(our_key, collate_keys)}

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        items = sample.get(self.scatter_key)
        if not isinstance(items, list | tuple):
            return self.pipeline(sample, rng)
        if not items:
            raise ConfigError(f"ApplyToList: the list in {self.scatter_key!r} is empty")
        done = [self.pipeline({**sample, self.scatter_key: item}, rng) for item in items]
        collated: Sample = {key: [one[key] for one in done] for key in self.collate_keys if key in done[0]}
        if isinstance(collated.get("image"), list):
            collated["image"] = tuple(collated["image"])  # views are tuples
        return {**done[0], **collated}


def _listed(steps: Any) -> list[Any]:
    return list(steps) if isinstance(steps, list | tuple) else [steps]
