"""Colours and blur on the device: what is done to one image, and the transforms that draw how. See `device.py`.

Grey levels: `ColorJitter` gives Pillow's whole levels, for a reason given at `color_jitter`. Nothing else is rounded;
on whole-numbered input it is within one level of the reference, but for the blur (see `gaussian_blur`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import random
from jaxtyping import Array, Float, Int

from jaxpretrain.build import ConfigError
from jaxpretrain.data.device_draws import RGB, Drawn, Image, Key, Plane, probability, sometimes

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # torchvision's numbering
ORDERS = np.array(list(itertools.permutations(range(4))), np.int32)

# ---------------------------------------------------------------------------------------------------------------------
# What is done to one image, as functions of pinned parameters


def luma(rgb: RGB) -> Plane:
    """The grey level of each pixel (ITU-R 601-2), whole, as Pillow's conversion to "L" has it.

    The weights are sixteen-bit fractions, so their products and sums with 8-bit levels are exact in float32.
    """
    r, g, b = rgb
    return jnp.floor(r * (19595 / 65536) + g * (38470 / 65536) + b * (7471 / 65536) + 0.5)


def blend(background: Array, rgb: RGB, factor: Array) -> RGB:
    """background + factor (image - background), clipped to 0..255 and cut to whole levels, as `PIL.Image.blend`."""
    r, g, b = (jnp.floor(jnp.clip(background + factor * (c - background), 0, 255)) for c in rgb)
    return r, g, b


def shift_hue(rgb: RGB, hue: Array | float) -> RGB:
    """Turns the hue by `hue` of the full circle (-0.5..0.5) on Pillow's grid; whole levels in and out.

    Pillow stores hue and saturation in 8 bits, so its result moves in steps of up to 6 grey levels. To be closer to it
    than that, the same steps are taken here.
    """
    value = jnp.maximum(jnp.maximum(rgb[0], rgb[1]), rgb[2])
    chroma = value - jnp.minimum(jnp.minimum(rgb[0], rgb[1]), rgb[2])
    r, g, b = ((value - c) / jnp.maximum(chroma, 1) for c in rgb)
    sector = jnp.where(r == 0, b - g, jnp.where(g == 0, 2 + r - b, 4 + g - r))
    turn = jnp.where(sector < 0, sector / 6 + 1, sector / 6)
    h = jnp.where(chroma > 0, jnp.floor(turn * 255), 0)
    s = jnp.floor(chroma / jnp.maximum(value, 1) * 255) / 255
    h = h + jnp.trunc(hue * 255)
    h = (h - 256 * jnp.floor(h / 256)) * (6 / 255)  # jnp.mod is five times as dear

    def channel(own_sector: float) -> Plane:
        # Full for one sector on both sides of its own hue, it falls over the next to value * (1 - s), and stays there.
        distance = h + own_sector
        distance = jnp.where(distance >= 6, distance - 6, distance)
        return jnp.floor(value * (1 - s * jnp.clip(jnp.minimum(distance, 4 - distance), 0, 1)) + 0.5)

    return channel(5), channel(3), channel(1)


def color_jitter(
    image: Image,
    order: Int[Array, " 4"],
    brightness: Array | float | None = None,
    contrast: Array | float | None = None,
    saturation: Array | float | None = None,
    hue: Array | float | None = None,
) -> Image:
    """Changes brightness, contrast, saturation and hue, in any order, each as Pillow does.

    Hue is a step function of its input (see `shift_hue`). A fraction of a level that an earlier operation left would
    carry pixels over a step, so each operation cuts fractions off, as Pillow does. About 0.1 % of the pixels differ by
    more than one level from Pillow's: those where float32 lands on the other side of a step.

    Args:
        image: cut to whole levels first.
        order: the numbers 0 brightness, 1 contrast, 2 saturation, 3 hue in the order of application.
        brightness, contrast, saturation: factors, 1 changes nothing; None skips the operation.
        hue: share of the full circle, 0 changes nothing up to its grid; None skips it.
    """
    factors = jnp.stack([jnp.float32(1 if f is None else f) for f in (brightness, contrast, saturation, None)])
    rgb: RGB = (jnp.floor(image[..., 0]), jnp.floor(image[..., 1]), jnp.floor(image[..., 2]))
    # `order` differs from sample to sample, so each of four slots computes what any operation needs, and selects. The
    # first three are one formula: a blend with black, with the mean grey, or with grey.
    for slot in range(4):
        operation = order[slot]
        grey = luma(rgb)
        background = jnp.where(operation == CONTRAST, jnp.floor(grey.mean() + 0.5), grey)
        background = jnp.where(operation == BRIGHTNESS, 0, background)
        result = blend(background, rgb, factors[operation])
        if hue is not None:
            result = jax.tree.map(partial(jnp.where, operation == HUE), shift_hue(rgb, hue), result)
        rgb = result
    return jnp.stack(rgb, axis=-1)


def grayscale(image: Image, weights: Sequence[float]) -> Image:
    """The weighted mean of R, G, B, in all three channels."""
    r, g, b = (float(w) / sum(weights) for w in weights)
    grey = image[..., 0] * r + image[..., 1] * g + image[..., 2] * b
    return jnp.broadcast_to(grey[..., None], image.shape)


def solarize(image: Image, thr: Array | float) -> Image:
    """255 - x where x >= thr."""
    return jnp.where(image < thr, image, 255 - image)


def gaussian_blur(image: Image, sigma: Array | float, reach: int) -> Image:
    """Convolves with a Gaussian sampled at the pixels within `reach`; the border pixels go on outside the image.

    Pillow's `GaussianBlur(radius=sigma)` is a stack of three box blurs, each rounded. Measured on photographs of 224
    pixels, for sigma from 0.1 to 2, the mean absolute difference is at most 0.8 grey levels (at sigma 0.3; 0.4 at 2);
    single pixels, at sharp edges and at the border, differ by up to 20.

    Args:
        sigma: standard deviation in pixels, > 0.
        reach: pixels on each side of the centre; 3 sigma hold 99.7 % of the mass.
    """
    padded = jnp.pad(image, ((reach, reach), (reach, reach), (0, 0)), mode="edge")

    def band(size: int) -> Float[Array, "size padded"]:
        distance = jnp.arange(size + 2 * reach) - reach - jnp.arange(size)[:, None]
        kernel = jnp.exp(-0.5 * jnp.square(distance / jnp.float32(sigma))) * (jnp.abs(distance) <= reach)
        return kernel / kernel.sum(axis=1, keepdims=True)

    # Two products with band matrices. Sums of shifted images are as fast on a CPU, but XLA fuses them into what follows
    # and computes them again each time a pixel is read. A convolution is 25 times slower: each sample has its kernel.
    height, width, _ = image.shape
    return jnp.einsum("ij,jwc,vw->ivc", band(height), padded, band(width), precision="highest")


# ---------------------------------------------------------------------------------------------------------------------
# Transforms: what is drawn for one image


class ColorJitter:
    """Changes brightness, contrast, saturation and hue by random factors, in random order (see `color_jitter`).

    Args:
        brightness, contrast, saturation: v draws the factor evenly from max(0, 1 - v)..1 + v; (low, high) from that
            range; 0 skips the operation.
        hue: v draws the turn from -v..v of the full circle, at most 0.5; (low, high) likewise; 0 skips it.
        backend: accepted for MMPretrain's configs; the levels are those of its 'pillow'.
    """

    def __init__(
        self,
        brightness: float | Sequence[float] = 0.0,
        contrast: float | Sequence[float] = 0.0,
        saturation: float | Sequence[float] = 0.0,
        hue: float | Sequence[float] = 0.0,
        backend: str = "pillow",
    ):
        self.brightness = self._range("brightness", brightness, neutral=1, lowest=0, highest=math.inf)
        self.contrast = self._range("contrast", contrast, neutral=1, lowest=0, highest=math.inf)
        self.saturation = self._range("saturation", saturation, neutral=1, lowest=0, highest=math.inf)
        self.hue = self._range("hue", hue, neutral=0, lowest=-0.5, highest=0.5)

    @staticmethod
    def _range(name: str, value: Any, neutral: float, lowest: float, highest: float) -> tuple[float, float] | None:
        """(low, high) of a factor, or None where it would never change anything."""
        if isinstance(value, Sequence) and len(value) == 2:
            low, high = map(float, value)
        elif isinstance(value, int | float) and value >= 0:
            low, high = neutral - float(value), neutral + float(value)
            low = max(low, lowest) if neutral == 1 else low
        else:
            raise ConfigError(f"ColorJitter: {name} must be a number >= 0 or (low, high), not {value!r}")
        if not lowest <= low <= high <= highest:
            raise ConfigError(f"ColorJitter: {name}={value!r} leaves the range {lowest}..{highest}")
        return None if low == high == neutral else (low, high)

    def draw(self, key: Key) -> tuple[Array, *tuple[Array | None, ...]]:
        """The arguments of `color_jitter` for one image: order, and the factors in use."""
        # One call of the generator and a table: five calls and a sort take a second longer to compile.
        order, *draws = random.uniform(key, (5,), jnp.float32)
        ranges = (self.brightness, self.contrast, self.saturation, self.hue)
        factors = (None if r is None else r[0] + (r[1] - r[0]) * d for r, d in zip(ranges, draws, strict=True))
        return jnp.array(ORDERS)[jnp.int32(order * len(ORDERS))], *factors

    def __call__(self, image: Image, key: Key) -> Image:
        return color_jitter(image, *self.draw(key))


class RandomGrayscale:
    """Replaces the three channels by their weighted mean.

    Args:
        prob: probability.
        keep_channels: must be True: one batch cannot hold images of one and of three channels.
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
        self.prob = probability(prob, "RandomGrayscale: prob")
        if not keep_channels:
            raise ConfigError("RandomGrayscale: on the device images keep their three channels; set keep_channels=True")
        if color_format not in ("bgr", "rgb"):
            raise ConfigError(f"RandomGrayscale: color_format must be 'bgr' or 'rgb', not {color_format!r}")
        if len(channel_weights) != 3 or sum(channel_weights) <= 0:
            raise ConfigError(f"RandomGrayscale: channel_weights must be three numbers, not {channel_weights!r}")
        self.rgb_weights = tuple(channel_weights)[:: -1 if color_format == "bgr" else 1]

    def __call__(self, image: Image, key: Key) -> Image:
        return sometimes(self.prob, key, lambda x: grayscale(x, self.rgb_weights), image)


class GaussianBlur(Drawn):
    """Blurs with a Gaussian (see `gaussian_blur`).

    Args:
        radius: standard deviation in pixels, as in Pillow; or None, and `magnitude_range`, (0.1, 2.0) in most recipes.
        prob, kwargs: see `Drawn`.
    """

    def __init__(self, radius: float | None = None, prob: float = 0.5, **kwargs: Any):
        super().__init__(prob, **kwargs)
        self.low, self.high = self.range("radius", radius)
        if min(self.low, self.high) <= 0:
            raise ConfigError("GaussianBlur: the radius must be positive; prob=0 switches the blur off")
        self.reach = math.ceil(3 * max(self.low, self.high))

    def apply(self, image: Image, strength: Float[Array, ""]) -> Image:
        return gaussian_blur(image, strength, self.reach)


class Solarize(Drawn):
    """Inverts the levels from a threshold on.

    Args:
        thr: the threshold, in grey levels; or None, and `magnitude_range`.
        prob, kwargs: see `Drawn`.
    """

    def __init__(self, thr: float | None = None, prob: float = 0.5, **kwargs: Any):
        super().__init__(prob, **kwargs)
        self.low, self.high = self.range("thr", thr)

    def apply(self, image: Image, strength: Float[Array, ""]) -> Image:
        return solarize(image, strength)
