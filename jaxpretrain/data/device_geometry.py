"""Flips, turns and affine maps on the device. See `device.py`."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jax import random
from jaxtyping import Array, Float, Int

from jaxpretrain.build import ConfigError, nearest
from jaxpretrain.data.device_draws import Image, Key, Plane, probability, sometimes, uniform

NEAREST, BILINEAR, BICUBIC = range(3)  # OpenCV's numbering


def quarter_turns(image: Float[Array, "n n 3"], turns: Array | int) -> Float[Array, "n n 3"]:
    """The square image turned clockwise by `turns` right angles, 0..3; of a batch: `jax.vmap(quarter_turns)`.

    `turns` may be traced: all four forms are made of one transposition and one flip, and selected.
    """
    image = jnp.where(jnp.mod(turns, 2) == 1, jnp.rot90(image, -1), image)
    return jnp.where(jnp.mod(turns, 4) >= 2, image[::-1, ::-1], image)


def rotation(angle: Array | float, center: tuple[Array | float, Array | float], scale: Array | float = 1.0) -> Array:
    """[2, 3], from new to old (x, y, 1), of a turn clockwise by `angle` degrees about `center`, and of an enlargement."""
    x, y = center
    radians = jnp.deg2rad(jnp.float32(angle))
    c, s = jnp.cos(radians) / scale, jnp.sin(radians) / scale
    return jnp.stack([jnp.stack([c, s, x - c * x - s * y]), jnp.stack([-s, c, y + s * x - c * y])])


def affine(
    image: Image,
    matrix: Float[Array, "2 3"],
    fill: Float[Array, " 3"],
    kernel: Int[Array, ""] | int,
    vertical: Array | bool = False,
    taps: tuple[int, int] = (4, 4),
) -> Image:
    """The image moved by an affine map, as OpenCV's `warpAffine` with a constant border; whole levels.

    Pixels are read as one word of three bytes, which takes a third of the time.

    Args:
        image: whole levels 0..255.
        matrix: gives the place (x, y) in the image that pixel (x, y) of the result shows.
        fill: whole levels of R, G, B: what is seen outside of the image.
        kernel: 0 nearest, 1 bilinear, 2 bicubic (a = -0.75); may be traced.
        vertical: the axis meant by the first number of `taps` is y, not x; may be traced.
        taps: pixels read along one axis and along the other: 1 serves `nearest`, and maps under which the coordinate stays
            whole; 2 bilinear; 4 all.
    """
    height, width, _ = image.shape
    columns, rows = jnp.arange(width, dtype=jnp.float32), jnp.arange(height, dtype=jnp.float32)[:, None]
    x, y = (m[0] * columns + m[1] * rows + m[2] for m in matrix)
    along, across = jnp.where(vertical, y, x), jnp.where(vertical, x, y)

    bytes_ = jnp.array([1, 256, 65536], jnp.int32)
    words = jnp.pad(
        (image.astype(jnp.int32) * bytes_).sum(axis=-1), 1, constant_values=(fill.astype(jnp.int32) * bytes_).sum()
    ).reshape(-1)

    def read(i: Int[Array, "h w"], j: Int[Array, "h w"]) -> Int[Array, "h w"]:
        """The pixels at `i` along and `j` across; the border stands for all that is outside."""
        column = jnp.clip(jnp.where(vertical, j, i) + 1, 0, width + 1)
        row = jnp.clip(jnp.where(vertical, i, j) + 1, 0, height + 1)
        return words.at[row * (width + 2) + column].get(mode="promise_in_bounds")

    first, weights = _taps(along, kernel, taps[0])
    second, other_weights = _taps(across, kernel, taps[1])
    planes: list[Plane] = [jnp.zeros((height, width))] * 3
    for i, weight in enumerate(weights):
        for j, other in enumerate(other_weights):
            word = read(first + i, second + j)
            planes = [plane + (word >> 8 * c & 255) * (weight * other) for c, plane in enumerate(planes)]
    return jnp.stack([jnp.round(jnp.clip(plane, 0, 255)) for plane in planes], axis=-1)


def _taps(place: Plane, kernel: Array | int, count: int) -> tuple[Int[Array, "h w"], list[Plane]]:
    """The first of `count` pixels in a row around `place`, and their weights."""
    place = jnp.where(jnp.equal(kernel, NEAREST), jnp.round(place), place)  # halves to even, as OpenCV
    whole = jnp.floor(place)
    part = place - whole
    if count == 1:
        weights = [jnp.ones_like(part)]
    elif count == 2:
        weights = [1 - part, part]
    else:
        bicubic = jnp.equal(kernel, BICUBIC)
        linear = (jnp.zeros_like(part), 1 - part, part, jnp.zeros_like(part))
        weights = [jnp.where(bicubic, c, w) for c, w in zip(_cubic(part), linear, strict=True)]
    # Far outside, where float32 may exceed int32, all places are alike.
    return jnp.clip(whole, -1e6, 1e6).astype(jnp.int32) - (count == 4), weights


def _cubic(t: Plane, a: float = -0.75) -> tuple[Plane, Plane, Plane, Plane]:
    """Weights of the pixels at -1, 0, 1 and 2 for a place `t` between 0 and 1 (Keys, 1981)."""
    outer = [((a * d - 5 * a) * d + 8 * a) * d - 4 * a for d in (1 + t, 2 - t)]
    inner = [((a + 2) * d - (a + 3)) * d * d + 1 for d in (t, 1 - t)]
    return outer[0], inner[0], inner[1], outer[1]


class RandomFlip:
    """Mirrors the image.

    Args:
        prob: probability to flip; or one for each direction.
        direction: 'horizontal' (left and right change places), 'vertical' or 'diagonal' (both); or a list, of which one
            is drawn, evenly if `prob` is one number.
    """

    AXES: dict[str, int | tuple[int, int]] = {"horizontal": 1, "vertical": 0, "diagonal": (0, 1)}

    def __init__(self, prob: float | Sequence[float] | None = None, direction: str | Sequence[str] = "horizontal"):
        self.directions = [direction] if isinstance(direction, str) else list(direction)
        for name in self.directions:
            if name not in self.AXES:
                raise ConfigError(f"RandomFlip: unknown direction {name!r}.{nearest(name, self.AXES)}")
        if isinstance(prob, Sequence):
            self.probs = [probability(p, "RandomFlip: each prob") for p in prob]
        else:
            self.probs = [probability(prob, "RandomFlip: prob") / len(self.directions)] * len(self.directions)
        if len(self.probs) != len(self.directions) or sum(self.probs) > 1 + 1e-6:
            raise ConfigError(f"RandomFlip: prob={prob!r} must be one for each of {self.directions}, 1 at most in sum")

    def __call__(self, image: Image, key: Key) -> Image:
        draw, low = uniform(key), 0.0
        for direction, prob in zip(self.directions, self.probs, strict=True):
            chosen = (low <= draw) & (draw < low + prob)
            image = jnp.where(chosen, jnp.flip(image, self.AXES[direction]), image)
            low += prob
        return image


class RandomRotate90:
    """Turns square images by a random number of right angles, clockwise.

    Args:
        prob: of turning at all.
        turns: the numbers of right angles of which one is drawn, evenly.
    """

    def __init__(self, prob: float = 1.0, turns: Sequence[int] = (0, 1, 2, 3)):
        self.prob, self.turns = probability(prob, "RandomRotate90: prob"), tuple(turns)
        if not self.turns or set(self.turns) - set(range(4)):
            raise ConfigError(f"RandomRotate90: turns={turns!r} must be some of 0, 1, 2, 3")

    def __call__(self, image: Image, key: Key) -> Image:
        _square("RandomRotate90", image)
        gate, draw = random.split(key)
        turns = random.choice(draw, jnp.array(self.turns))
        return sometimes(self.prob, gate, lambda x: quarter_turns(x, turns), image)


class Rotate90:
    """Turns square images by `turns` right angles, clockwise."""

    def __init__(self, turns: int):
        self.turns = turns

    def __call__(self, image: Image, key: Key) -> Image:
        _square("RotationWithLabels", image)
        return quarter_turns(image, self.turns)


class RandomRotation:
    """Turns the image about its centre by an angle drawn evenly; corners that come in are black. Cuts to whole levels.

    Args:
        degrees: d draws from -d to d; or (low, high). Counter-clockwise.
        interpolation: 'nearest' is the only one on the device.
    """

    def __init__(self, degrees: float | Sequence[float], interpolation: str = "nearest"):
        low, high = (-degrees, degrees) if isinstance(degrees, int | float) else degrees
        if not low <= high:
            raise ConfigError(f"RandomRotation: degrees={degrees!r} must be a number from 0 up, or (low, high)")
        if interpolation != "nearest":
            raise ConfigError(
                f"RandomRotation: on the device interpolation must be 'nearest', not {interpolation!r}; the host has others"
            )
        self.low, self.high = float(low), float(high)

    def __call__(self, image: Image, key: Key) -> Image:
        return self.apply(image, uniform(key, self.low, self.high))

    def apply(self, image: Image, angle: Array | float) -> Image:
        height, width, _ = image.shape
        matrix = rotation(-angle, ((width - 1) / 2, (height - 1) / 2))
        return affine(jnp.floor(image), matrix, jnp.zeros(3), NEAREST, taps=(1, 1))


def _square(name: str, image: Image) -> None:
    if image.shape[0] != image.shape[1]:
        raise ConfigError(
            f"{name} takes square images, not of {image.shape[0]}x{image.shape[1]} pixels: crop or resize them first"
        )
