"""What is done to one image on the host: resize, crop, pad. Pure functions of uint8 pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from jaxpretrain.build import ConfigError, nearest

Image = UInt8[np.ndarray, "h w 3"]

CV2_FILTERS = {"nearest": 0, "bilinear": 1, "bicubic": 2, "area": 3, "lanczos": 4}  # cv2.INTER_*
PILLOW_FILTERS = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}  # Image.Resampling


class Box(NamedTuple):
    """A part of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


def resize(image: Image, size: tuple[int, int], backend: str = "cv2", interpolation: str = "bilinear") -> Image:
    """`image` at `size` = (width, height).

    `cv2` does not antialias when it shrinks (but for `area`), `pillow` does, and is two to three times slower. Their
    bicubic kernels differ too: a = -0.75 and -0.5.
    """
    if size == (image.shape[1], image.shape[0]):
        return image
    if backend == "pillow":
        from PIL import Image as pillow

        return np.asarray(pillow.fromarray(image).resize(size, PILLOW_FILTERS[interpolation]))
    return opencv().resize(np.ascontiguousarray(image), size, interpolation=CV2_FILTERS[interpolation])


def crop(image: Image, box: Box) -> Image:
    """The part of `image` inside `box`, a view; what lies outside the image is cut off."""
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
    filters = {"cv2": CV2_FILTERS, "pillow": PILLOW_FILTERS}
    if backend not in filters:
        raise ConfigError(f"{name}: no backend {backend!r}.{nearest(str(backend), filters)}")
    if interpolation not in filters[backend]:
        raise ConfigError(
            f"{name}: {backend} has no interpolation {interpolation!r}.{nearest(str(interpolation), filters[backend])}"
        )
    return interpolation, backend


def opencv() -> Any:
    """OpenCV, without threads of its own. Raises ConfigError where it is not installed."""
    try:
        import cv2
    except ImportError as error:  # pragma: no cover
        raise ConfigError("backend='cv2' needs opencv-python-headless; install it, or use backend='pillow'") from error
    if cv2.getNumThreads() != 1:
        cv2.setNumThreads(1)  # the loader runs many images at once; OpenCV's own threads would only fight for the cores
    return cv2
