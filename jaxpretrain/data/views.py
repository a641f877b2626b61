"""What a sample with several views gets from a transform that is written for one image."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from jaxpretrain.data.base import Sample
from jaxpretrain.data.mask_transforms import Pictures


def each_view(
    step: Callable[[Sample, np.random.Generator], Sample], sample: Sample, rng: np.random.Generator
) -> Sample:
    """step(sample, rng), for each view on its own, so that each gets its own draws.

    Other keys of the result are those of the last view. `Pictures` of one crop are handed to `step` together.
    """
    views = sample["image"]
    if not isinstance(views, tuple) or isinstance(views, Pictures):
        return step(sample, rng)
    done = []
    for view in views:
        sample = step({**sample, "image": view}, rng)
        done.append(sample["image"])
    return {**sample, "image": tuple(done)}
