"""Images turned by a few degrees: what DeepCluster and ODC do to them in MMSelfSup."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image as PIL

from jaxpretrain.build import ConfigError
from jaxpretrain.data.base import Transform
from jaxpretrain.data.image_ops import Image


class RandomRotation(Transform):
    """Turns the image by an angle drawn evenly (torchvision's transform).

    Args:
        degrees: d draws from -d to d; or (low, high). Counter-clockwise.
        interpolation: 'nearest', 'bilinear' or 'bicubic'.
        expand: make the result as large as the turned image, so that nothing is cut off; sizes then differ.
        center: (x, y) in pixels, about which it turns; the middle by default.
        fill: grey level or RGB of the corners that come in.
    """

    FILTERS = dict(nearest=PIL.Resampling.NEAREST, bilinear=PIL.Resampling.BILINEAR, bicubic=PIL.Resampling.BICUBIC)

    def __init__(
        self,
        degrees: float | Sequence[float],
        interpolation: str = "nearest",
        expand: bool = False,
        center: Sequence[float] | None = None,
        fill: int | Sequence[int] = 0,
    ):
        low, high = (-degrees, degrees) if isinstance(degrees, int | float) else degrees
        if not low <= high:
            raise ConfigError(f"RandomRotation: degrees={degrees!r} must be a number from 0 up, or (low, high)")
        if interpolation not in self.FILTERS:
            raise ConfigError(f"RandomRotation: interpolation={interpolation!r} is none of {sorted(self.FILTERS)}")
        self.range, self.filter = (float(low), float(high)), self.FILTERS[interpolation]
        self.expand, self.center = expand, None if center is None else (center[0], center[1])
        self.fill = (fill,) * 3 if isinstance(fill, int) else tuple(fill)

    def draw(self, rng: np.random.Generator, height: int, width: int) -> float:
        """The angle, in degrees."""
        return rng.uniform(*self.range)

    def apply(self, image: Image, angle: float) -> Image:
        turned = PIL.fromarray(image).rotate(angle, self.filter, self.expand, self.center, fillcolor=self.fill)
        return np.asarray(turned)
