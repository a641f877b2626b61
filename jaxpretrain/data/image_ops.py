"""What is done to one image on the host: resize, crop, pad. Pure functions of uint8 pixels."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from jaxpretrain.build import ConfigError, nearest
from jaxpretrain.data.lazy_image import LazyImage

Image = UInt8[np.ndarray, "h w 3"]

CV2_FILTERS = {"nearest": 0, "bilinear": 1, "bicubic": 2, "area": 3, "lanczos": 4}  # cv2.INTER_*
CV2_RESIZE_FILTERS = CV2_FILTERS | {"antialias": 1}  # bilinear after smoothing
PILLOW_FILTERS = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}  # Image.Resampling


class Box(NamedTuple):
    """A part of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


def resize(
    image: Image | LazyImage, size: tuple[int, int], backend: str = "cv2", interpolation: str = "bilinear"
) -> Image:
    """`image` at `size` = (width, height).

    `cv2` does not antialias when it shrinks (but for `area` and `antialias`), `pillow` does, and is several times slower.
    Their bicubic kernels differ too: a = -0.75 and -0.5. `antialias` is the fast way to what is nearly Pillow's bilinear
    (on photographs 0.7 grey levels away in the mean, where cv2's bilinear is 2).
    """
    if isinstance(image, LazyImage):
        image = image.crop(Box(0, 0, *image.shape[:2]), size)
    if size == (image.shape[1], image.shape[0]):
        return image
    if backend == "pillow":
        return np.asarray(pillow().fromarray(image).resize(size, PILLOW_FILTERS[interpolation]))
    if interpolation == "antialias":
        image = _smooth(image, size)
    return opencv().resize(image, size, interpolation=CV2_RESIZE_FILTERS[interpolation])


def _smooth(image: Image, size: tuple[int, int]) -> Image:
    """`image` blurred for linear interpolation at `size`, so that both together are the filter of Pillow's bilinear: a
    triangle s pixels high and low of its centre, where s is by how much the image shrinks.

    Linear interpolation is the triangle of s = 1. Of weights on whole pixels that form a triangle of a whole number n it
    makes the triangle of s = n; between n and n + 1, weights are mixed so that the filter has the variance of the
    triangle, s**2 / 6.
    """
    taps = [_triangle(max(1.0, have / want)) for have, want in zip(image.shape[1::-1], size, strict=True)]
    if max(map(len, taps)) == 1:
        return image
    cv2 = opencv()
    return cv2.sepFilter2D(image, -1, *taps, borderType=cv2.BORDER_REPLICATE)


@functools.lru_cache(maxsize=4096)
def _triangle(shrink: float) -> Float[np.ndarray, " taps"]:
    n = int(shrink)
    share = (shrink**2 - n**2) / (2 * n + 1)  # of the triangle of n + 1
    distance = np.abs(np.arange(-n, n + 1))
    taps = (1 - share) * np.maximum(n - distance, 0) / n**2 + share * (n + 1 - distance) / (n + 1) ** 2
    return taps if share else taps[1:-1]


def crop(image: Image | LazyImage, box: Box, size: tuple[int, int] | None = None) -> Image:
    """The part of `image` inside `box`, a view; what lies outside the image is cut off. `size`: see LazyImage."""
    if isinstance(image, LazyImage):
        return image.crop(box, size)
    return image[max(box.top, 0) : box.top + box.height, max(box.left, 0) : box.left + box.width]


def pad(
    image: Image, sides: tuple[int, int, int, int], value: int | Sequence[int] = 0, mode: str = "constant"
) -> Image:
    """`image` with (top, bottom, left, right) more pixels; `value` is a grey level or RGB; modes as in `numpy.pad`."""
    if not any(sides):
        return image
    top, bottom, left, right = sides
    if mode != "constant":
        return np.pad(image, ((top, bottom), (left, right), (0, 0)), mode=mode)  # type: ignore[call-overload]
    height, width = image.shape[:2]
    padded = np.empty((height + top + bottom, width + left + right, 3), np.uint8)
    padded[:] = value
    padded[top : top + height, left : left + width] = image
    return padded


def check_filter(name: str, interpolation: str, backend: str) -> tuple[str, str]:
    filters = {"cv2": CV2_RESIZE_FILTERS, "pillow": PILLOW_FILTERS}
    if backend not in filters:
        raise ConfigError(f"{name}: no backend {backend!r}.{nearest(str(backend), filters)}")
    if interpolation not in filters[backend]:
        raise ConfigError(
            f"{name}: {backend} has no interpolation {interpolation!r}.{nearest(str(interpolation), filters[backend])}"
        )
    return interpolation, backend


def check_choice(what: str, value: str, valid: Sequence[str]) -> None:
    if value not in valid:
        raise ConfigError(f"{what}={value!r} does not exist.{nearest(str(value), valid)}")


def pair_of(value: int | Sequence[int], what: str) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or min(pair) <= 0:
        raise ConfigError(f"{what}={value!r} must be a positive number or a pair of them")
    return pair[0], pair[1]


@functools.cache
def pillow() -> Any:
    """Pillow's `Image` module, which keeps the memory of images for the next: to have it from the system each time costs
    a quarter of a resize.
    """
    from PIL import Image

    Image.core.set_blocks_max(16)
    return Image


def opencv() -> Any:
    """OpenCV, without threads of its own. Raises ConfigError where it is not installed."""
    try:
        import cv2
    except ImportError as error:  # pragma: no cover
        raise ConfigError("backend='cv2' needs opencv-python-headless; install it, or use backend='pillow'") from error
    if cv2.getNumThreads() != 1:
        cv2.setNumThreads(1)  # the loader runs many images at once; OpenCV's own threads would only fight for the cores
    return cv2
