"""What the transforms on the device share: types, gates, and strengths that are drawn. See `device.py`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import random
from jaxtyping import Array, Float

from jaxpretrain.build import ConfigError

Key = Array
Image = Float[Array, "h w 3"]
Plane = Float[Array, "h w"]
RGB = tuple[Plane, Plane, Plane]  # planes vectorise: the jitter takes half the time it takes on [H, W, 3]
Transform = Callable[[Image, Key], Image]


def uniform(key: Key, low: float = 0.0, high: float = 1.0) -> Float[Array, ""]:
    return random.uniform(key, (), jnp.float32, low, high)


def sometimes(prob: float, key: Key, transform: Callable[[Image], Image], image: Image) -> Image:
    """transform(image) with probability `prob`. At 0 and 1 the other branch is not in the program."""
    if prob <= 0:
        return image
    if prob >= 1:
        return transform(image)
    return jnp.where(uniform(key) < prob, transform(image), image)


def probability(prob: Any, where: str) -> float:
    if not isinstance(prob, int | float) or not 0 <= prob <= 1:
        raise ConfigError(f"{where} must be a number in 0..1, not {prob!r}")
    return float(prob)


class Drawn:
    """A transform of random strength, between `low` and `high`.

    Args:
        prob: probability that the transform is applied.
        magnitude_range: (low, high), between which the strength lies: low + (high - low) * level / total_level.
        magnitude_std: 'inf' draws the level evenly from 0..magnitude_level; a number s > 0 from a normal distribution
            around magnitude_level with standard deviation s, clipped to 0..total_level; 0 takes magnitude_level.
        magnitude_level, total_level: see above.
        random_negative_prob: accepted for MMPretrain's configs; these strengths have no sign.
    """

    low: float
    high: float

    def __init__(
        self,
        prob: float = 0.5,
        magnitude_level: float = 10,
        magnitude_range: Sequence[float] | None = None,
        magnitude_std: float | str = 0.0,
        total_level: float = 10,
        random_negative_prob: float = 0.0,
    ):
        name = type(self).__name__
        self.prob = probability(prob, f"{name}: prob")
        if magnitude_std != "inf" and not (isinstance(magnitude_std, int | float) and magnitude_std >= 0):
            raise ConfigError(f"{name}: magnitude_std must be 'inf' or a number >= 0, not {magnitude_std!r}")
        self.drawn, self.level, self.std, self.total = magnitude_range, magnitude_level, magnitude_std, total_level

    def range(self, argument: str, given: float | None) -> tuple[float, float]:
        """(low, high) of the strength: magnitude_range, or the value of `argument` twice, if that is given instead."""
        if (given is None) == (self.drawn is None):
            raise ConfigError(f"{type(self).__name__} needs either {argument} or magnitude_range=(low, high)")
        if given is not None:
            return given, given
        low, high = self.drawn or ()
        return low, high

    def __call__(self, image: Image, key: Key) -> Image:
        gate, draw = random.split(key)
        return sometimes(self.prob, gate, lambda x: self.apply(x, self.strength(draw)), image)

    def strength(self, key: Key) -> Float[Array, ""]:
        level = jnp.float32(self.level)
        if self.std == "inf":
            level = uniform(key, 0.0, self.level)
        elif self.std:
            level = jnp.clip(level + self.std * random.normal(key, (), jnp.float32), 0, self.total)
        return self.low + (self.high - self.low) * level / self.total

    def apply(self, image: Image, strength: Float[Array, ""]) -> Image:
        raise NotImplementedError
