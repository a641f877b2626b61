"""Image augmentation and normalisation on the device, inside the jitted step.

A transform sees **one** image, float32 [H, W, 3], RGB, 0..255, and a key: `transform(image, key) -> image`, with the shape kept.
`DevicePipeline` maps the transforms of a recipe over a batch and gives each sample the key
fold_in(fold_in(key, epoch), index). So the pixels of a sample depend on the seed, the epoch and the sample alone: not on
the rest of the batch, nor on the number of devices.

Names and arguments are MMPretrain's. Images here are RGB while its transforms see BGR; where an argument lists channels
(`RandomGrayscale`), MMPretrain's order is read and mapped.

Numbers: `ColorJitter` gives Pillow's whole grey levels (see `color_jitter`). The others do not round, and are within one
level of the reference for whole-numbered input. `GaussianBlur` is a true Gaussian, and differs a little more from Pillow's
stack of box blurs (see `gaussian_blur`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import random
from jaxtyping import Array, Float, Int, UInt8

from jaxpretrain import build
from jaxpretrain.build import ConfigError

Image = Float[Array, "h w 3"]
Key = Array
Transform = Callable[[Image, Key], Image]

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # torchvision's numbering
DIRECTIONS = ("horizontal", "vertical", "diagonal")

# ---------------------------------------------------------------------------------------------------------------------
# Functions of pinned parameters


def luma(image: Image) -> Float[Array, "h w 1"]:
    """Brightness of each pixel in whole grey levels, ITU-R 601-2, as Pillow's conversion to "L" computes it.

    Pillow's weights are sixteen-bit fractions; their products with 8-bit levels are exact in float32.
    """
    weights = np.array([19595, 38470, 7471], np.float32) / 65536
    r, g, b = (image[..., c] * weights[c] for c in range(3))
    return jnp.floor(r + g + b + 0.5)[..., None]


def blend(background: Array | float, image: Image, factor: Array | float) -> Image:
    """background + factor (image - background), clipped to 0..255, fractions cut off: Pillow's `Image.blend`."""
    return jnp.floor(jnp.clip(background + factor * (image - background), 0, 255))


def shift_hue(image: Image, hue: Array | float) -> Image:
    """Turns the hue by `hue` of the full circle, -0.5..0.5, on Pillow's grid.

    Pillow stores hue and saturation in 8 bits, so hue moves in steps of 1/255 of the circle: up to 6 grey levels. The same
    steps are taken here, else the result would be off by half of that.
    """
    value, low = image.max(axis=-1), image.min(axis=-1)
    chroma = value - low
    r, g, b = ((value - image[..., c]) / jnp.maximum(chroma, 1) for c in range(3))
    sector = jnp.where(r == 0, b - g, jnp.where(g == 0, 2 + r - b, 4 + g - r))
    turn = jnp.where(sector < 0, sector / 6 + 1, sector / 6)
    h = jnp.where(chroma > 0, jnp.floor(turn * 255), 0)
    s = jnp.floor(chroma / jnp.maximum(value, 1) * 255)
    h = jnp.mod(h + jnp.trunc(hue * 255), 256)
    # A channel falls from `value` to `value (1 - s)` with its distance from its own hue on the circle of six sectors.
    distance = jnp.mod(h[..., None] * (6 / 255) + jnp.array([5.0, 3.0, 1.0]), 6)
    fall = jnp.clip(jnp.minimum(distance, 4 - distance), 0, 1)
    return jnp.floor(value[..., None] * (1 - s[..., None] / 255 * fall) + 0.5)


def color_jitter(image: Image, order: Int[Array, "4"], factors: Float[Array, "4"], hue: bool = True) -> Image:
    """Brightness, contrast, saturation and hue, in any order.

    Pillow works on whole levels, and hue is a step function of its input. So every operation here cuts off fractions as
    Pillow does; the result is Pillow's, up to single levels where float32 rounds differently.

    Args:
        image: fractions are cut off first.
        order: the numbers 0 brightness, 1 contrast, 2 saturation, 3 hue, in the order of application.
        factors: of brightness, contrast and saturation, where 1 changes nothing, and the turn of hue, where 0 changes nothing.
        hue: False leaves hue out of the program.
    """
    # The first three are one formula, a blend with black, mean grey or grey, and cheap. Hue is not: it is computed once,
    # and the three blends are there before it and after it, each active (factor 1 is identity) on one side of it.
    image = jnp.floor(image)
    position = jnp.argmax(order == HUE)

    def blends(image: Image, active: Callable[[int], Array]) -> Image:
        for slot in range(3):
            operation = order[slot + (slot >= position)]
            grey = luma(image)
            background = jnp.where(operation == CONTRAST, jnp.floor(grey.mean() + 0.5), grey)
            background = jnp.where(operation == BRIGHTNESS, 0, background)
            image = blend(background, image, jnp.where(active(slot), factors[operation], 1))
        return image

    if not hue:
        return blends(image, lambda slot: jnp.bool_(True))
    image = blends(image, lambda slot: slot < position)
    image = shift_hue(image, factors[HUE])
    return blends(image, lambda slot: slot >= position)
