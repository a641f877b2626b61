"""Images turned by a few degrees: what DeepCluster and ODC do to them in MMSelfSup."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image as PIL

from jaxpretrain.build import ConfigError
from jaxpretrain.data.base import Sample
from jaxpretrain.data.image_ops import Image


class RandomRotation:
    """Turns the image about its centre by an angle drawn evenly; corners that come in are black (torchvision's transform).

    Args:
        degrees: d draws from -d to d; or (low, high). Counter-clockwise.
        interpolation: 'nearest', 'bilinear' or 'bicubic'.
    """

    FILTERS = dict(nearest=PIL.Resampling.NEAREST, bilinear=PIL.Resampling.BILINEAR, bicubic=PIL.Resampling.BICUBIC)

    def __init__(self, degrees: float | Sequence[float], interpolation: str = "nearest"):
        low, high = (-degrees, degrees) if isinstance(degrees, int | float) else degrees
        if not low <= high:
            raise ConfigError(f"RandomRotation: degrees={degrees!r} must be a number from 0 up, or (low, high)")
        if interpolation not in self.FILTERS:
            raise ConfigError(f"RandomRotation: interpolation={interpolation!r} is none of {sorted(self.FILTERS)}")
        self.range, self.filter = (float(low), float(high)), self.FILTERS[interpolation]

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        image = sample["image"]
        if isinstance(image, tuple):
            return {**sample, "image": tuple(self._turn(view, rng) for view in image)}
        return {**sample, "image": self._turn(image, rng)}

    def _turn(self, image: Image, rng: np.random.Generator) -> Image:
        return np.asarray(PIL.fromarray(image).rotate(rng.uniform(*self.range), self.filter))
