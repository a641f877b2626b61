"""Random erasing (Zhong et al., 2020): a rectangle of an image is painted over."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from jaxpretrain.build import ConfigError
from jaxpretrain.data.base import Transform
from jaxpretrain.data.image_ops import Box, Image


class RandomErasing(Transform):
    """Paints one rectangle of random area, aspect and place with a colour or with noise.

    Area and log of height / width are uniform; sides longer than the image's are cut to those.

    Args:
        erase_prob: of painting anything.
        min_area_ratio, max_area_ratio: range of the rectangle's part of the area.
        aspect_range: of height / width; a number above 1 means it and its inverse.
        mode: `const`, or `rand` for noise.
        fill_color: grey level or RGB: the colour, or the mean of the noise.
        fill_std: standard deviation of normal noise; None for uniform noise of all grey levels.
    """

    def __init__(
        self,
        erase_prob: float = 0.5,
        min_area_ratio: float = 0.02,
        max_area_ratio: float = 0.4,
        aspect_range: float | Sequence[float] = (3 / 10, 10 / 3),
        mode: str = "const",
        fill_color: float | Sequence[float] = (128, 128, 128),
        fill_std: float | Sequence[float] | None = None,
    ):
        if isinstance(aspect_range, int | float):
            aspect_range = (min(aspect_range, 1 / aspect_range), max(aspect_range, 1 / aspect_range))
        if not 0 <= erase_prob <= 1 or not 0 < min_area_ratio <= max_area_ratio < 1:
            raise ConfigError(
                f"RandomErasing: erase_prob={erase_prob} is a probability, and min_area_ratio={min_area_ratio}, "
                f"max_area_ratio={max_area_ratio} ascend between 0 and 1"
            )
        if len(aspect_range) != 2 or not 0 < aspect_range[0] <= aspect_range[1]:
            raise ConfigError(f"RandomErasing: aspect_range={aspect_range} must be ascending and positive")
        if mode not in ("const", "rand"):
            raise ConfigError(f"RandomErasing: mode={mode!r} is neither 'const' nor 'rand'")
        self.erase_prob, self.areas, self.aspects = erase_prob, (min_area_ratio, max_area_ratio), tuple(aspect_range)
        self.noise, self.fill_color, self.fill_std = mode == "rand", fill_color, fill_std

    def draw(self, rng: np.random.Generator, height: int, width: int) -> tuple[Box, np.ndarray] | None:
        """Where, and what; None for nothing."""
        if rng.random() >= self.erase_prob:
            return None
        area = height * width * rng.uniform(*self.areas)
        aspect = math.exp(rng.uniform(math.log(self.aspects[0]), math.log(self.aspects[1])))
        h, w = min(round(math.sqrt(area * aspect)), height), min(round(math.sqrt(area / aspect)), width)
        # As the reference: the last place is never drawn.
        box = Box(int(rng.integers(max(height - h, 1))), int(rng.integers(max(width - w, 1))), h, w)
        return box, self.fill(rng, h, w)

    def fill(self, rng: np.random.Generator, height: int, width: int) -> np.ndarray:
        """The paint, uint8 [height, width, 3]."""
        shape = (height, width, 3)
        if not self.noise:
            return np.broadcast_to(np.asarray(self.fill_color).astype(np.uint8), shape)
        if self.fill_std is None:
            return rng.integers(0, 256, shape, dtype=np.uint8)
        noise = rng.standard_normal(shape) * self.fill_std + self.fill_color
        return np.clip(noise.astype(np.int32), 0, 255).astype(np.uint8)

    def apply(self, image: Image, parameters: tuple[Box, np.ndarray] | None) -> Image:
        if parameters is None:
            return image
        box, fill = parameters
        image = image.copy()
        image[box.top : box.top + box.height, box.left : box.left + box.width] = fill
        return image
