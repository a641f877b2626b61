"""Crops and resizes on the device, of batches of larger images. See `device.py`.

With antialiasing, as Pillow, a resize is two matrix products: each row of a matrix holds the weights with which the pixels
of one axis make a pixel of the result. Without, as OpenCV, it reads 2 or 4 pixels along each axis. The crop is part of the
weights and places, so boxes of any size run in one program.

Results are not rounded, and within one grey level of the host's, which rounds after each axis or at the end. The exception is
Pillow's bicubic filter: what overshoots 0..255 is clipped between the axes, width first here, while Pillow 13 begins with the
axis that shrinks more. Then up to 2 % of the levels of a detailed photograph differ by more than one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
from jax import random
from jaxtyping import Array, Float

from jaxpretrain.build import ConfigError, nearest
from jaxpretrain.data.device_draws import Image, Key
from jaxpretrain.data.image_ops import PILLOW_FILTERS, check_filter, pair_of


class Box(NamedTuple):
    """A part of an image, in whole pixels; numbers or float32 scalars."""

    top: Array | float
    left: Array | float
    height: Array | float
    width: Array | float


def _triangle(t: Array) -> Array:
    return jnp.maximum(0, 1 - jnp.abs(t))


def _cubic(t: Array, a: float) -> Array:
    """Keys' kernel (1981)."""
    t = jnp.abs(t)
    near, far = ((a + 2) * t - (a + 3)) * t * t + 1, ((a * t - 5 * a) * t + 8 * a) * t - 4 * a
    return jnp.where(t < 1, near, jnp.where(t < 2, far, 0))


# Backend -> filter -> (kernel, its reach in pixels).
KERNELS: dict[str, dict[str, tuple[Callable[[Array], Array], int]]] = dict(
    cv2=dict(bilinear=(_triangle, 1), bicubic=(partial(_cubic, a=-0.75), 2)),
    pillow=dict(bilinear=(_triangle, 1), bicubic=(partial(_cubic, a=-0.5), 2)),
)


def _centers(start: Array | float, length: Array | float, out: int) -> Float[Array, " out"]:
    """The middle of each pixel of the result, in pixels of the image."""
    return start + (jnp.arange(out, dtype=jnp.float32) + 0.5) * (length / out) - 0.5


def antialiasing_weights(
    start: Array | float, length: Array | float, size: int, out: int, interpolation: str
) -> Float[Array, "out size"]:
    """The weights of `size` pixels in each of `out`, for the part of `length` pixels from `start` on. Rows add up to 1.

    As Pillow's: the kernel grows with the part, so that each pixel has its share, and ends at the part's border.
    """
    kernel, _ = KERNELS["pillow"][interpolation]
    pixels = jnp.arange(size, dtype=jnp.float32)
    weights = kernel((pixels - _centers(start, length, out)[:, None]) / jnp.maximum(length / out, 1))
    weights = jnp.where((pixels >= start) & (pixels < start + length), weights, 0)
    return weights / weights.sum(axis=1, keepdims=True)


def interpolate_rows(
    image: Image, start: Array | float, length: Array | float, out: int, interpolation: str
) -> Float[Array, "out w 3"]:
    """`out` rows of the part of `length` rows from `start` on, each made of the 2 or 4 around it.

    As OpenCV's: shrinking skips rows, and the part's first and last go on outside.
    """
    kernel, reach = KERNELS["cv2"][interpolation]
    centers = _centers(start, length, out)
    result = jnp.zeros((out, *image.shape[1:]))
    for tap in range(1 - reach, 1 + reach):
        rows = jnp.floor(centers) + tap
        read = image.at[jnp.clip(rows, start, start + length - 1).astype(jnp.int32)].get(mode="promise_in_bounds")
        result += kernel(centers - rows)[:, None, None] * read
    return result


def crop_and_resize(image: Image, box: Box, size: tuple[int, int], backend: str, interpolation: str) -> Image:
    """The part of `image` [H, W, 3] inside `box`, at `size` = (width, height): float32 [height, width, 3], in 0..255."""
    if backend == "cv2":
        rows = interpolate_rows(image, box.top, box.height, size[1], interpolation)
        columns = interpolate_rows(rows.swapaxes(0, 1), box.left, box.width, size[0], interpolation)
        return jnp.clip(columns.swapaxes(0, 1), 0, 255)
    height, width, _ = image.shape
    across = antialiasing_weights(box.left, box.width, width, size[0], interpolation)
    down = antialiasing_weights(box.top, box.height, height, size[1], interpolation)
    # Width first, and each result clipped, as Pillow does; bicubic weights overshoot.
    rows = jnp.clip(jnp.einsum("hwc,vw->hvc", image, across, precision="highest"), 0, 255)
    return jnp.clip(jnp.einsum("hvc,uh->uvc", rows, down, precision="highest"), 0, 255)


def _check(name: str, interpolation: str, backend: str) -> tuple[str, str]:
    check_filter(name, interpolation, backend)
    if interpolation not in KERNELS[backend]:
        raise ConfigError(
            f"{name}: interpolation={interpolation!r} does not run on the device.{nearest(interpolation, KERNELS[backend])}"
        )
    return interpolation, backend


class Resize:
    """Resizes to `scale`, an edge length or (width, height); `backend` and `interpolation` as `RandomResizedCrop`."""

    def __init__(self, scale: int | Sequence[int], interpolation: str = "bilinear", backend: str = "cv2"):
        self.scale = pair_of(scale, "Resize: scale")
        self.interpolation, self.backend = _check("Resize", interpolation, backend)

    def __call__(self, image: Image, key: Key) -> Image:
        return crop_and_resize(image, Box(0, 0, *image.shape[:2]), self.scale, self.backend, self.interpolation)


class CenterCrop:
    """The central part, of `crop_size`: an edge length or (width, height). Half a pixel rounds to even, as on the host."""

    def __init__(self, crop_size: int | Sequence[int]):
        self.crop_size = pair_of(crop_size, "CenterCrop: crop_size")

    def __call__(self, image: Image, key: Key) -> Image:
        (width, height), (h, w) = self.crop_size, image.shape[:2]
        if h < height or w < width:
            raise ConfigError(
                f"CenterCrop: crop_size={self.crop_size} is larger than images of {w}x{h} (width, height)"
            )
        top, left = round((h - height) / 2), round((w - width) / 2)
        return image[top : top + height, left : left + width]


class RandomResizedCrop:
    """A crop of random area and aspect, resized: the host's transform of this name, for images of one size.

    Args:
        scale: size of the result: edge length or (width, height).
        crop_ratio_range: of area.
        aspect_ratio_range: of width / height, in the image as it arrives: after `Resize(scale=(256, 256))` on the host, say,
            the aspect of the photograph is lost; `ResizeEdge` and `CenterCrop` keep it, and lose margins.
        max_attempts: to find a box that fits; then it is the largest central one within the range of aspects.
        interpolation: 'bilinear' or 'bicubic'.
        backend: 'pillow' antialiases, 'cv2' does not.
    """

    def __init__(
        self,
        scale: int | Sequence[int],
        crop_ratio_range: Sequence[float] = (0.08, 1.0),
        aspect_ratio_range: Sequence[float] = (3 / 4, 4 / 3),
        max_attempts: int = 10,
        interpolation: str = "bilinear",
        backend: str = "cv2",
    ):
        name = type(self).__name__
        self.scale = pair_of(scale, f"{name}: scale")
        for argument, (low, high) in (
            ("crop_ratio_range", crop_ratio_range),
            ("aspect_ratio_range", aspect_ratio_range),
        ):
            if not 0 < low <= high:
                raise ConfigError(f"{name}: {argument}=({low}, {high}) must be ascending and positive")
        self.areas, self.aspects = tuple(crop_ratio_range), tuple(aspect_ratio_range)
        self.max_attempts = max_attempts
        self.interpolation, self.backend = _check(name, interpolation, backend)

    def draw(self, key: Key, height: int, width: int) -> Box:
        """The box for an image of this size."""
        sides, place = random.split(key)
        h, w = self.draw_sides(sides, height, width)
        fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
        first = jnp.argmax(fits)
        top, left = jnp.floor(random.uniform(place, (2,)) * (jnp.stack([height - h[first], width - w[first]]) + 1))
        narrowest, widest = self.aspects
        least_h, least_w = min(height, round(width / narrowest)), min(width, round(height * widest))
        central = Box((height - least_h) // 2, (width - least_w) // 2, least_h, least_w)
        drawn = Box(top, left, h[first], w[first])
        return Box(*(jnp.where(fits[first], a, jnp.float32(b)) for a, b in zip(drawn, central, strict=True)))

    def draw_sides(self, key: Key, height: int, width: int) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
        """Heights and widths of `max_attempts` boxes."""
        area, aspect = random.uniform(key, (2, self.max_attempts))
        area = height * width * (self.areas[0] + (self.areas[1] - self.areas[0]) * area)
        low, high = map(math.log, self.aspects)
        aspect = jnp.exp(low + (high - low) * aspect)
        return jnp.round(jnp.sqrt(area / aspect)), jnp.round(jnp.sqrt(area * aspect))

    def __call__(self, image: Image, key: Key) -> Image:
        box = self.draw(key, *image.shape[:2])
        return crop_and_resize(image, box, self.scale, self.backend, self.interpolation)


class MAERandomResizedCrop(RandomResizedCrop):
    """RandomResizedCrop drawn once: edges longer than the image's are cut to those.

    Args:
        size: edge length or (width, height).
        scale: range of area.
        ratio: range of width / height.
        interpolation: Pillow's name, or its number: 2 is bilinear, 3 bicubic.
        antialias: accepted; as Pillow always does, so does this.
    """

    def __init__(
        self,
        size: int | Sequence[int],
        scale: Sequence[float] = (0.08, 1.0),
        ratio: Sequence[float] = (3 / 4, 4 / 3),
        interpolation: str | int = "bilinear",
        antialias: bool | None = True,
    ):
        if isinstance(interpolation, int):
            interpolation = {number: name for name, number in PILLOW_FILTERS.items()}.get(interpolation, "?")
        super().__init__(size, scale, ratio, max_attempts=1, interpolation=interpolation, backend="pillow")

    def draw_sides(self, key: Key, height: int, width: int) -> tuple[Array, Array]:
        h, w = super().draw_sides(key, height, width)
        return jnp.clip(h, 1, height), jnp.clip(w, 1, width)
