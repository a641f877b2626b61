"""Transforms of torchvision that recipes name as `torchvision/NAME`, on uint8 RGB arrays, with Pillow's pixels.

They stand between NumpyToPIL and PILToNumpy in recipes, and work anywhere. Arguments and defaults are torchvision's;
`interpolation` is a name, or Pillow's number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image as pillow
from PIL import ImageEnhance, ImageOps

from jaxpretrain.build import ConfigError
from jaxpretrain.data.base import Transform
from jaxpretrain.data.image_ops import PILLOW_FILTERS, Box, Image, check_filter, crop, pad, resize
from jaxpretrain.data.transforms import RandomCrop, RandomFlip, RandomResizedCrop


class TorchvisionResize(Transform):
    """Resizes to (height, width), or the shorter edge to a number and the longer one in proportion, rounded down.

    Args:
        size: one number or (height, width).
        interpolation: of Pillow.
        max_size: the longer edge's limit, where `size` is one number.
        antialias: accepted; Pillow always does.
    """

    def __init__(
        self,
        size: int | Sequence[int],
        interpolation: str | int = "bilinear",
        max_size: int | None = None,
        antialias: bool | None = True,
    ):
        self.fixed = (size,) if isinstance(size, int) else tuple(size)
        if len(self.fixed) not in (1, 2) or min(self.fixed) <= 0:
            raise ConfigError(f"torchvision/Resize: size={size!r} must be a positive number or (height, width)")
        if max_size is not None and (len(self.fixed) == 2 or max_size <= self.fixed[0]):
            raise ConfigError(f"torchvision/Resize: max_size={max_size} goes with one number as size, a smaller one")
        self.max_size, self.filter = max_size, pillow_filter("torchvision/Resize", interpolation)

    def size(self, height: int, width: int) -> tuple[int, int]:
        """(width, height) of the result."""
        if len(self.fixed) == 2:
            return self.fixed[1], self.fixed[0]
        short, long = self.fixed[0], int(self.fixed[0] * max(height, width) / min(height, width))
        if self.max_size is not None and long > self.max_size:
            short, long = int(self.max_size * short / long), self.max_size
        return (short, long) if width <= height else (long, short)

    def apply(self, image: Image, parameters: Any) -> Image:
        return resize(image, self.size(*image.shape[:2]), "pillow", self.filter)


class CenterCrop(Transform):
    """The central part; a smaller image is padded with black first, on both sides.

    Args:
        size: edge length or (height, width).
    """

    def __init__(self, size: int | Sequence[int]):
        sizes = (size, size) if isinstance(size, int) else tuple(size) * (3 - len(size))
        if len(sizes) != 2 or min(sizes) <= 0:
            raise ConfigError(f"torchvision/CenterCrop: size={size!r} must be a positive number or (height, width)")
        self.height, self.width = sizes

    def apply(self, image: Image, parameters: Any) -> Image:
        y, x = (max(want - have, 0) for want, have in zip((self.height, self.width), image.shape[:2], strict=True))
        image = pad(image, (y // 2, (y + 1) // 2, x // 2, (x + 1) // 2))
        top, left = round((image.shape[0] - self.height) / 2), round((image.shape[1] - self.width) / 2)
        return crop(image, Box(top, left, self.height, self.width))


class TorchvisionRandomCrop(RandomCrop):
    """RandomCrop with `padding_mode` for `padding` too.

    Args:
        size: edge length or (height, width).
        padding, pad_if_needed, fill, padding_mode: as RandomCrop's, with `fill` for pad_val.
    """

    def __init__(
        self,
        size: int | Sequence[int],
        padding: int | Sequence[int] | None = None,
        pad_if_needed: bool = False,
        fill: int | Sequence[int] = 0,
        padding_mode: str = "constant",
    ):
        super().__init__(size, padding, pad_if_needed, fill, padding_mode)
        self.border_mode = padding_mode


class TorchvisionRandomResizedCrop(RandomResizedCrop):
    """RandomResizedCrop by Pillow.

    Args:
        size: edge length or (height, width).
        scale, ratio: ranges of area and of width / height.
        interpolation: of Pillow.
        antialias: accepted; Pillow always does.
    """

    def __init__(
        self,
        size: int | Sequence[int],
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        interpolation: str | int = "bilinear",
        antialias: bool | None = True,
    ):
        name = pillow_filter("torchvision/RandomResizedCrop", interpolation)
        super().__init__(
            size if isinstance(size, int) else tuple(size)[::-1], scale, ratio, interpolation=name, backend="pillow"
        )


class RandomHorizontalFlip(RandomFlip):
    """Left and right change places with probability `p`."""

    def __init__(self, p: float = 0.5):
        super().__init__(p, "horizontal")


class RandomVerticalFlip(RandomFlip):
    """Top and bottom change places with probability `p`."""

    def __init__(self, p: float = 0.5):
        super().__init__(p, "vertical")


class TrivialAugmentWide(Transform):
    """One of fourteen operations, at a strength drawn evenly (Müller & Hutter, 2021, "TrivialAugment", its wide space).

    Args:
        num_magnitude_bins: how many strengths each has, from none to the widest.
        interpolation: `nearest`, `bilinear` or `bicubic`, of shearing, moving and turning.
        fill: grey level or RGB of what comes in from outside; black by default.
    """

    WIDEST = dict(shear=0.99, translate=32.0, rotate=135.0, enhance=0.99)
    SIGNED = (
        "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color", "Contrast", "Sharpness",
    )  # fmt: skip
    OPERATIONS = ("Identity", *SIGNED, "Posterize", "Solarize", "AutoContrast", "Equalize")

    def __init__(
        self,
        num_magnitude_bins: int = 31,
        interpolation: str | int = "nearest",
        fill: float | Sequence[float] | None = None,
    ):
        if num_magnitude_bins < 2:
            raise ConfigError(f"TrivialAugmentWide: num_magnitude_bins={num_magnitude_bins} must be 2 or more")
        name = pillow_filter("TrivialAugmentWide", interpolation)
        if name not in ("nearest", "bilinear", "bicubic"):
            raise ConfigError(f"TrivialAugmentWide: interpolation={name!r} is neither nearest, bilinear nor bicubic")
        self.bins, self.filter = num_magnitude_bins, pillow.Resampling(PILLOW_FILTERS[name])
        fill = 0 if fill is None else fill
        self.fill = tuple(int(level) for level in ((fill,) * 3 if isinstance(fill, int | float) else fill))

    def strength(self, operation: str, number: int) -> float:
        """That of an operation at strength `number` of 0..num_magnitude_bins - 1, without sign."""
        way = number / (self.bins - 1)
        if operation == "Posterize":  # bits that are kept
            return float(8 - round(6 * way))
        if operation == "Solarize":
            return 255 * (1 - way)
        kind = operation.removesuffix("X").removesuffix("Y").lower()
        return self.WIDEST.get(kind, self.WIDEST["enhance"]) * way if operation in self.SIGNED else 0.0

    def draw(self, rng: np.random.Generator, height: int, width: int) -> tuple[str, float]:
        """An operation and its strength."""
        operation = self.OPERATIONS[rng.integers(len(self.OPERATIONS))]
        strength = self.strength(operation, int(rng.integers(self.bins)))
        return operation, -strength if operation in self.SIGNED and rng.random() < 0.5 else strength

    def apply(self, image: Image, parameters: tuple[str, float]) -> Image:
        operation, strength = parameters
        return np.asarray(self._change(pillow.fromarray(image), operation, strength))

    def _change(self, image: pillow.Image, operation: str, strength: float) -> pillow.Image:
        if operation in ("Brightness", "Color", "Contrast", "Sharpness"):
            return getattr(ImageEnhance, operation)(image).enhance(1 + strength)
        if operation == "Rotate":
            return image.rotate(strength, self.filter, fillcolor=self.fill)
        if operation == "Posterize":
            return ImageOps.posterize(image, int(strength))
        if operation == "Solarize":
            return ImageOps.solarize(image, strength)  # type: ignore[arg-type]  # any number does
        if operation in ("AutoContrast", "Equalize"):
            return (ImageOps.autocontrast if operation == "AutoContrast" else ImageOps.equalize)(image)
        # From new to old x, y: about the upper left corner.
        matrix = {
            "ShearX": (1, strength, 0, 0, 1, 0),
            "ShearY": (1, 0, 0, strength, 1, 0),
            "TranslateX": (1, 0, -math.trunc(strength), 0, 1, 0),
            "TranslateY": (1, 0, 0, 0, 1, -math.trunc(strength)),
        }.get(operation)
        return image if matrix is None else self._warp(image, matrix)

    def _warp(self, image: pillow.Image, matrix: tuple[float, ...]) -> pillow.Image:
        return image.transform(image.size, pillow.Transform.AFFINE, matrix, self.filter, fillcolor=self.fill)


def pillow_filter(what: str, interpolation: str | int) -> str:
    """The name of a filter of Pillow's given by name or number."""
    if isinstance(interpolation, int):
        interpolation = {number: name for name, number in PILLOW_FILTERS.items()}.get(interpolation, str(interpolation))
    return check_filter(what, interpolation, "pillow")[0]
