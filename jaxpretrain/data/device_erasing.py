"""Random erasing on the device (Zhong et al., 2020). See `device.py`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import random
from jaxtyping import Array, Float

from jaxpretrain.data import random_erasing
from jaxpretrain.data.device_crop import Box
from jaxpretrain.data.device_draws import Image, Key, sometimes


def erase(image: Image, box: Box, paint: Float[Array, "*#hw 3"]) -> Image:
    """The image with `paint`, of its size or a colour, inside `box`."""
    height, width, _ = image.shape
    rows, columns = jnp.arange(height)[:, None], jnp.arange(width)
    inside = (
        (rows >= box.top) & (rows < box.top + box.height) & (columns >= box.left) & (columns < box.left + box.width)
    )
    return jnp.where(inside[..., None], paint, image)


class RandomErasing:
    """Paints one rectangle of random area, aspect and place with a colour or with noise: the host's transform.

    Args: as of `random_erasing.RandomErasing`.
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
        host = random_erasing.RandomErasing(
            erase_prob, min_area_ratio, max_area_ratio, aspect_range, mode, fill_color, fill_std
        )  # it knows what is wrong
        self.erase_prob, self.areas, self.aspects = host.erase_prob, host.areas, host.aspects
        self.noise, self.mean = host.noise, np.broadcast_to(np.asarray(fill_color, np.float32), 3)
        self.std = None if fill_std is None else np.broadcast_to(np.asarray(fill_std, np.float32), 3)

    def draw(self, key: Key, height: int, width: int) -> Box:
        area, aspect, y, x = random.uniform(key, (4,))
        area = height * width * (self.areas[0] + (self.areas[1] - self.areas[0]) * area)
        low, high = map(math.log, self.aspects)
        aspect = jnp.exp(low + (high - low) * aspect)
        h, w = jnp.minimum(jnp.round(jnp.sqrt(area * aspect)), height), jnp.round(jnp.sqrt(area / aspect))
        w = jnp.minimum(w, width)
        # As the reference: the last place is never drawn.
        return Box(jnp.floor(y * jnp.maximum(height - h, 1)), jnp.floor(x * jnp.maximum(width - w, 1)), h, w)

    def paint(self, key: Key, height: int, width: int) -> Float[Array, "*#hw 3"]:
        """The colour, or noise of [height, width, 3], in whole levels."""
        shape = (height, width, 3)
        if not self.noise:
            return jnp.array(np.trunc(self.mean))
        if self.std is None:
            return jnp.floor(random.uniform(key, shape, jnp.float32, 0, 256))
        return jnp.clip(jnp.trunc(random.normal(key, shape) * self.std + self.mean), 0, 255)

    def __call__(self, image: Image, key: Key) -> Image:
        gate, place, noise = random.split(key, 3)
        size = image.shape[:2]
        return sometimes(
            self.erase_prob, gate, lambda x: erase(x, self.draw(place, *size), self.paint(noise, *size)), image
        )
