"""Colour on the host: jitter, grayscale, PCA noise, solarisation. Names, arguments and results are MMPretrain's, on RGB.

The same transforms run on the device (`device.py`), where most recipes put them; here are their pixels to the last level.
Blur and the operations of RandAugment are in `augment_operations.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image as pillow
from PIL import ImageEnhance

from jaxpretrain.build import ConfigError
from jaxpretrain.data.base import Transform
from jaxpretrain.data.image_ops import Image, check_choice, opencv


class Jitter(NamedTuple):
    """What ColorJitter drew: the order (0 brightness, 1 contrast, 2 saturation, 3 hue), and factors; None skips one."""

    order: tuple[int, ...]
    brightness: float | None = None
    contrast: float | None = None
    saturation: float | None = None
    hue: float | None = None


class ColorJitter(Transform):
    """Changes brightness, contrast, saturation and hue by random factors, in random order.

    Args:
        brightness, contrast, saturation: v draws the factor evenly from max(0, 1 - v)..1 + v; (low, high) from that
            range; 0 skips the operation.
        hue: v draws the turn from -v..v of the full circle, at most 0.5; (low, high) likewise; 0 skips it.
        backend: `pillow` or `cv2`, which differ by few levels: in rounding, and in the hue's steps.
    """

    def __init__(
        self,
        brightness: float | Sequence[float] = 0.0,
        contrast: float | Sequence[float] = 0.0,
        saturation: float | Sequence[float] = 0.0,
        hue: float | Sequence[float] = 0.0,
        backend: str = "pillow",
    ):
        check_choice("ColorJitter: backend", backend, ("pillow", "cv2"))
        self.ranges = (
            _range("brightness", brightness, neutral=1, lowest=0, highest=math.inf),
            _range("contrast", contrast, neutral=1, lowest=0, highest=math.inf),
            _range("saturation", saturation, neutral=1, lowest=0, highest=math.inf),
            _range("hue", hue, neutral=0, lowest=-0.5, highest=0.5),
        )
        self.change = _jitter_by_pillow if backend == "pillow" else _jitter_by_opencv

    def draw(self, rng: np.random.Generator, height: int, width: int) -> Jitter:
        order = tuple(int(number) for number in rng.permutation(4))
        return Jitter(order, *(None if r is None else rng.uniform(*r) for r in self.ranges))

    def apply(self, image: Image, jitter: Jitter) -> Image:
        _, *factors = jitter
        for number in jitter.order:
            factor = factors[number]
            if factor is not None:
                image = self.change(np.ascontiguousarray(image), number, factor)
        return image


def _range(name: str, value: Any, neutral: float, lowest: float, highest: float) -> tuple[float, float] | None:
    """(low, high) of a factor, or None where it would never change anything."""
    if isinstance(value, int | float) and value >= 0:
        low, high = neutral - float(value), neutral + float(value)
        low = max(low, lowest) if neutral == 1 else low
    elif isinstance(value, Sequence) and len(value) == 2:
        low, high = map(float, value)
    else:
        raise ConfigError(f"ColorJitter: {name} must be a number >= 0 or (low, high), not {value!r}")
    if not lowest <= low <= high <= highest:
        raise ConfigError(f"ColorJitter: {name}={value!r} leaves the range {lowest}..{highest}")
    return None if low == high == neutral else (low, high)


def _jitter_by_pillow(image: Image, number: int, factor: float) -> Image:
    """Operation `number` of `Jitter.order`."""
    picture = pillow.fromarray(image)
    if number < 3:
        kind = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[number]
        return np.asarray(kind(picture).enhance(factor))
    hsv = np.array(picture.convert("HSV"))
    hsv[..., 0] += np.uint8(int(factor * 255) % 256)  # wraps around, as a hue does
    return np.asarray(pillow.fromarray(hsv, "HSV").convert("RGB"))


def _jitter_by_opencv(image: Image, number: int, factor: float) -> Image:
    cv2 = opencv()
    if number == 3:
        hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)
        hsv[..., 0] += np.uint8(int(factor * 255) % 256)
        return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)
    if number == 0:
        duller = 0
    else:
        grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
        if number == 2:  # rounded, the others cut off: as the reference
            return cv2.addWeighted(image, factor, cv2.cvtColor(grey, cv2.COLOR_GRAY2RGB), 1 - factor, 0)
        duller = round(grey.sum() / grey.size)
    # In float64, and float32 before it is cut off: whole results of whole levels stay so, as with the reference's OpenCV.
    mixed = (image * factor + duller * (1 - factor)).astype(np.float32)
    return np.clip(mixed, 0, 255).astype(np.uint8)


class RandomGrayscale(Transform):
    """Replaces the three channels by their weighted mean, rounded down.

    Args:
        prob: probability.
        keep_channels: must be True: a batch cannot hold images of one and of three channels.
        channel_weights: weight of each channel, divided by their sum, **in the order of `color_format`**. Our images
            are RGB; recipes of MMPretrain list B, G, R and run unchanged.
        color_format: 'bgr' or 'rgb'.
    """

    def __init__(
        self,
        prob: float = 0.1,
        keep_channels: bool = False,
        channel_weights: Sequence[float] = (1.0, 1.0, 1.0),
        color_format: str = "bgr",
    ):
        if not 0 <= prob <= 1:
            raise ConfigError(f"RandomGrayscale: prob={prob} is not a probability")
        if not keep_channels:
            raise ConfigError("RandomGrayscale: images keep their three channels; set keep_channels=True")
        check_choice("RandomGrayscale: color_format", color_format, ("bgr", "rgb"))
        if len(channel_weights) != 3 or sum(channel_weights) <= 0:
            raise ConfigError(f"RandomGrayscale: channel_weights must be three numbers, not {channel_weights!r}")
        self.prob = prob
        red, green, blue = np.array(channel_weights)[:: -1 if color_format == "bgr" else 1] / sum(channel_weights)
        self.weights = (red, green, blue)

    def draw(self, rng: np.random.Generator, height: int, width: int) -> bool:
        return rng.random() < self.prob

    def apply(self, image: Image, chosen: bool) -> Image:
        if not chosen:
            return image
        # Blue first, as the reference: whole results are cut down a level by some orders of the sum and not by others.
        grey = sum(image[..., channel] * self.weights[channel] for channel in (2, 1, 0))
        return np.repeat(np.asarray(grey).astype(np.uint8)[..., None], 3, axis=2)


class Lighting(Transform):
    """Noise along the principal components of colours (Krizhevsky et al., 2012, section 4.1): one shift for all pixels.

    shift = eigvec (alpha * eigval) with alpha normal. The sum is cut off to whole levels and clipped to 0..255 (the
    reference's wraps around).

    Args:
        eigval: three eigenvalues, in grey levels.
        eigvec: three rows, one for each channel, of components: **rows B, G, R, unless `to_rgb`**, so that recipes run
            unchanged.
        alphastd: standard deviation of alpha.
        to_rgb: rows are R, G, B. (MMPretrain's images become RGB by it; ours are.)
    """

    def __init__(
        self, eigval: Sequence[float], eigvec: Sequence[Sequence[float]], alphastd: float = 0.1, to_rgb: bool = False
    ):
        self.eigval, rows = np.asarray(eigval, float), np.asarray(eigvec, float)
        if self.eigval.ndim != 1 or rows.shape != (3, len(self.eigval)):
            raise ConfigError(
                f"Lighting: eigvec must be a row of {len(np.atleast_1d(eigval))} numbers, as many as eigval, for each of "
                f"the three channels; its shape is {rows.shape}"
            )
        self.eigvec = rows if to_rgb else rows[::-1]
        self.alphastd = alphastd

    def draw(self, rng: np.random.Generator, height: int, width: int) -> np.ndarray:
        """alpha."""
        return rng.normal(0, self.alphastd, len(self.eigval))

    def apply(self, image: Image, alpha: np.ndarray) -> Image:
        shift = self.eigvec @ (np.asarray(alpha) * self.eigval)
        return np.clip(np.trunc(image + shift), 0, 255).astype(np.uint8)


class RandomSolarize(Transform):
    """Inverts the levels from `threshold` up: MMSelfSup's `Solarize`.

    Args:
        threshold: in grey levels.
        prob: probability.
    """

    def __init__(self, threshold: float = 128, prob: float = 0.5):
        if not 0 <= prob <= 1:
            raise ConfigError(f"RandomSolarize: prob={prob} is not a probability")
        self.threshold, self.prob = threshold, prob

    def draw(self, rng: np.random.Generator, height: int, width: int) -> bool:
        return rng.random() < self.prob

    def apply(self, image: Image, chosen: bool) -> Image:
        return np.where(image < self.threshold, image, 255 - image) if chosen else image
