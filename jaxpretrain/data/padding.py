"""Images made larger by a border. Names, arguments and results are MMCV's and MMPretrain's, with colours in RGB."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxpretrain.build import ConfigError
from jaxpretrain.data.base import Sample, Transform
from jaxpretrain.data.image_ops import Image, check_choice, pad


class Pad(Transform):
    """Pads at the bottom and right; an image that is large enough stays as it is.

    Args:
        size: (width, height) of the result.
        size_divisor: instead of `size`: to the next multiples of it.
        pad_to_square: instead of `size`: to a square, whose edge may be a multiple of `size_divisor`.
        pad_val: grey level or RGB; or a dict with it as `img`.
        padding_mode: `constant`, `edge`, `reflect` (without repeating the edge) or `symmetric` (repeating it).
    """

    def __init__(
        self,
        size: Sequence[int] | None = None,
        size_divisor: int | None = None,
        pad_to_square: bool = False,
        pad_val: int | Sequence[int] | Mapping[str, Any] = 0,
        padding_mode: str = "constant",
    ):
        if (size is None) == (size_divisor is None and not pad_to_square):
            raise ConfigError(
                "Pad: give either size, or size_divisor, or pad_to_square=True (with size_divisor or without)"
            )
        if size is not None and (isinstance(size, int) or len(size) != 2 or min(size) <= 0):
            raise ConfigError(f"Pad: size={size!r} must be (width, height)")
        if size_divisor is not None and size_divisor <= 0:
            raise ConfigError(f"Pad: size_divisor={size_divisor} must be positive")
        check_choice("Pad: padding_mode", padding_mode, ("constant", "edge", "reflect", "symmetric"))
        self.fixed, self.divisor, self.square = size, size_divisor, pad_to_square
        self.value = pad_val.get("img", 0) if isinstance(pad_val, Mapping) else pad_val
        self.mode = padding_mode

    def size(self, height: int, width: int) -> tuple[int, int]:
        """(width, height) of the result, where the image is not larger."""
        if self.fixed is not None:
            return self.fixed[0], self.fixed[1]
        if self.square:
            height = width = max(height, width)
        divisor = self.divisor or 1
        return -(-width // divisor) * divisor, -(-height // divisor) * divisor

    def apply(self, image: Image, parameters: Any) -> Image:
        height, width = image.shape[:2]
        right, bottom = self.size(height, width)
        return pad(image, (0, max(bottom - height, 0), 0, max(right - width, 0)), self.value, self.mode)


class RandomTranslatePad(Transform):
    """Puts the image on a black square; `gt_bboxes` of the sample (left, top, right, bottom) move along.

    Args:
        size: edge length of the square, at least the image's longer edge.
        aug_translate: at a random place, evenly; otherwise in the middle.

    Raises:
        ConfigError: (when applied) the image is larger than the square.
    """

    def __init__(self, size: int = 640, aug_translate: bool = False):
        self.size, self.aug_translate = size, aug_translate

    def draw(self, rng: np.random.Generator, height: int, width: int) -> tuple[int, int]:
        """(top, left). As in the reference, the last place is never drawn."""
        y, x = self.size - height, self.size - width
        if min(y, x) < 0:
            raise ConfigError(
                f"RandomTranslatePad: an image of {height}x{width} exceeds size={self.size}; resize it first"
            )
        if self.aug_translate:
            return int(rng.integers(max(y, 1))), int(rng.integers(max(x, 1)))
        return max(round(y / 2 - 0.1), 0), max(round(x / 2 - 0.1), 0)

    def apply(self, image: Image, place: tuple[int, int]) -> Image:
        (top, left), (height, width) = place, image.shape[:2]
        return pad(image, (top, self.size - height - top, left, self.size - width - left))

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        image, boxes = sample["image"], sample.get("gt_bboxes")
        if boxes is None:
            return super().__call__(sample, rng)
        if isinstance(image, tuple):
            raise ConfigError("RandomTranslatePad: boxes belong to one image, but here there are several views")
        top, left = self.draw(rng, *image.shape[:2])
        moved = np.add(boxes, [left, top, left, top])
        return {**sample, "image": self.apply(image, (top, left)), "gt_bboxes": moved}
