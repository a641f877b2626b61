"""The crops of EfficientNet (Tan & Le, 2019; the preprocessing of their TPU code), with MMPretrain's names and results."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from jaxpretrain.build import ConfigError
from jaxpretrain.data.base import Transform
from jaxpretrain.data.image_ops import Box, Image, check_filter, crop, pair_of, resize
from jaxpretrain.data.transforms import RandomResizedCrop


class EfficientNetCenterCrop(Transform):
    """A central square, then resized: as EfficientNet is tested (Tan & Le, 2019; their TPU code's preprocessing).

    The square's edge is `crop_size / (crop_size + crop_padding)` of the image's shorter edge, rounded down.

    Args:
        crop_size: edge length of the result.
        crop_padding: 32 leaves a margin all around; 0 crops along the longer edge alone.
        interpolation, backend: see `resize`.
    """

    def __init__(self, crop_size: int, crop_padding: int = 32, interpolation: str = "bicubic", backend: str = "cv2"):
        if not isinstance(crop_size, int) or crop_padding < 0:
            raise ConfigError(
                f"EfficientNetCenterCrop: crop_size={crop_size!r} must be one number, and crop_padding={crop_padding} "
                "must not be negative"
            )
        self.crop_size = pair_of(crop_size, "EfficientNetCenterCrop: crop_size")
        self.fraction = crop_size / (crop_size + crop_padding)
        self.interpolation, self.backend = check_filter("EfficientNetCenterCrop", interpolation, backend)

    def box(self, height: int, width: int) -> Box:
        """The square that is cut out. Its position comes from the length before rounding."""
        edge = self.fraction * min(height, width)
        top, left = (max(0, round((length - edge) / 2)) for length in (height, width))
        return Box(top, left, max(1, int(edge)), max(1, int(edge)))

    def apply(self, image: Image, parameters: Any) -> Image:
        return resize(crop(image, self.box(*image.shape[:2])), self.crop_size, self.backend, self.interpolation)


class EfficientNetRandomCrop(RandomResizedCrop):
    """A crop of random aspect and height, resized to a square.

    Up to `max_attempts` times: aspect (width / height) = U(aspect_ratio_range), height even between those at which the
    crop has the smallest and the largest area, cut to what fits the image. A crop outside the areas, or of less than
    `min_covered` of the image, is drawn anew. If none fits: EfficientNetCenterCrop's.

    Args:
        scale: edge length of the result.
        min_covered: smallest part of the image's area.
        crop_padding: of EfficientNetCenterCrop.
        crop_ratio_range, aspect_ratio_range, max_attempts, interpolation, backend: see `RandomResizedCrop`.
    """

    def __init__(
        self,
        scale: int,
        min_covered: float = 0.1,
        crop_padding: int = 32,
        interpolation: str = "bicubic",
        **kwargs: Any,
    ):
        if not isinstance(scale, int):
            raise ConfigError(f"EfficientNetRandomCrop: scale={scale!r} must be one number, the result is a square")
        if min_covered < 0:
            raise ConfigError(f"EfficientNetRandomCrop: min_covered={min_covered} must not be negative")
        super().__init__(scale, interpolation=interpolation, **kwargs)
        self.min_covered = min_covered
        self.central = EfficientNetCenterCrop(scale, crop_padding)

    def draw(self, rng: np.random.Generator, height: int, width: int) -> Box:
        area = height * width
        smallest, largest = (ratio * area for ratio in self.crop_ratio_range)
        narrowest, widest = self.aspect_ratio_range
        for _ in range(self.max_attempts):
            aspect = rng.uniform(narrowest, widest)
            tallest = round(math.sqrt(largest / aspect))
            if tallest * aspect > width:  # the height at which the width, rounded, is the image's
                tallest = int((width + 0.5 - 1e-7) / aspect)
                tallest -= tallest * aspect > width
            tallest = min(tallest, height)
            h = round(rng.uniform(min(round(math.sqrt(smallest / aspect)), tallest), tallest))
            w = round(h * aspect)
            fits = 0 < h <= height and 0 < w <= width
            if fits and max(smallest, self.min_covered * area) <= h * w <= largest:
                return Box(int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w)
        return self.central.box(height, width)
