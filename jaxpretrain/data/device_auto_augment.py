"""AutoAugment and RandAugment on the device, from the host's tables. See `device.py`.

Under `vmap` each image needs another operation, so a program does all of them and selects. They are made to cost few passes:
whatever maps levels to levels is one look-up in a table of 256 entries, colour and sharpness are one blend, and turns,
shears and shifts are one affine map. Where images are processed one at a time, a `switch` does what was drawn alone.

Levels are whole, before and after each operation, and within one of the host's with OpenCV 5, but for the blur (see
`device_colour.gaussian_blur`). OpenCV 4 rounded the places that its maps read to 1/32 pixel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, random
from jaxtyping import Array, Float, Int

from jaxpretrain.build import ConfigError, nearest
from jaxpretrain.data import auto_augment
from jaxpretrain.data.augment_operations import Operation, Rotate, SolarizeAdd
from jaxpretrain.data.auto_augment import Policy
from jaxpretrain.data.device_colour import gaussian_blur, luma
from jaxpretrain.data.device_crop import Box
from jaxpretrain.data.device_draws import Image, Key
from jaxpretrain.data.device_erasing import erase
from jaxpretrain.data.device_geometry import BICUBIC, BILINEAR, NEAREST, affine, rotation

Strength = Float[Array, ""]
Levels = Float[Array, "#3 256"]  # what each level of R, G, B becomes

# ---------------------------------------------------------------------------------------------------------------------
# Tones: tables of levels

levels = np.arange(256, dtype=np.float32)[None]


class Row(NamedTuple):
    """What sets one operation of a table apart. Arrays in a table; scalars once an operation is drawn."""

    family: Any  # its place in `_FAMILIES`, from 1 on
    kind: Any  # its place in the family
    prob: Any
    negative_prob: Any
    first: Any  # the strength at level 0 and at the highest; both are the strength where it is given
    last: Any
    level: Any  # divided by the highest
    std: Any  # of the level, likewise
    even: Any  # 1: the level is drawn evenly from 0 to `level`
    extra: Any  # SolarizeAdd: its threshold. Cutout: its width, if it differs from its height. Rotate: its scale
    center: Any  # [2], of Rotate; nan is the middle
    fill: Any  # [3]
    kernel: Any  # of an affine map
    vertical: Any  # 1: it moves along y


def _counts(image: Image) -> Int[Array, "3 256"]:
    """How many pixels have each level, of R, G and B."""
    places = image.astype(jnp.int32) + 256 * jnp.arange(3)
    return jnp.zeros(768, jnp.int32).at[places].add(1, mode="promise_in_bounds").reshape(3, 256)


def _autocontrast(image: Image, strength: Strength, row: Row) -> Levels:
    seen = _counts(image) > 0
    low, high = jnp.argmax(seen, axis=1)[:, None], 255 - jnp.argmax(seen[:, ::-1], axis=1)[:, None]
    stretched = jnp.clip(jnp.floor((levels - low) * 255 / jnp.maximum(high - low, 1)), 0, 255)
    return jnp.where(high > low, stretched, levels)


def _equalize(image: Image, strength: Strength, row: Row) -> Levels:
    """Pillow's: level i becomes the share of pixels below it, in steps of a 255th of all but the brightest pixels."""
    counts = _counts(image)
    brightest = 255 - jnp.argmax(counts[:, ::-1] > 0, axis=1)
    step = (counts.sum(axis=1) - counts[jnp.arange(3), brightest])[:, None] // 255
    below = jnp.cumsum(counts, axis=1) - counts
    return jnp.where(step > 0, jnp.minimum((step // 2 + below) // jnp.maximum(step, 1), 255), levels)


def _posterize(image: Image, strength: Strength, row: Row) -> Levels:
    step = jnp.exp2(8 - jnp.ceil(strength))
    return jnp.floor(levels / step) * step


def _brightness(image: Image, strength: Strength, row: Row) -> Levels:
    return jnp.floor(jnp.clip(levels * (1 + strength), 0, 255))


def _contrast(image: Image, strength: Strength, row: Row) -> Levels:
    mean = jnp.floor(luma((image[..., 0], image[..., 1], image[..., 2])).mean() + 0.5)
    return jnp.floor(jnp.clip(mean + (1 + strength) * (levels - mean), 0, 255))


TONES: dict[str, Callable[[Image, Strength, Row], Levels]] = dict(
    AutoContrast=_autocontrast,
    Equalize=_equalize,
    Invert=lambda image, strength, row: jnp.asarray(255 - levels),
    Posterize=_posterize,
    Solarize=lambda image, strength, row: jnp.where(levels < strength, levels, 255 - levels),
    SolarizeAdd=lambda image, strength, row: jnp.where(
        levels < row.extra, jnp.floor(jnp.minimum(levels + strength, 255)), levels
    ),
    Brightness=_brightness,
    Contrast=_contrast,
)

# ---------------------------------------------------------------------------------------------------------------------
# Blends: duller pictures


def _grey(image: Image) -> Image:
    """OpenCV's, of 14-bit weights: up to one level from Pillow's."""
    r, g, b = image[..., 0], image[..., 1], image[..., 2]
    return jnp.floor(r * (4899 / 16384) + g * (9617 / 16384) + b * (1868 / 16384) + 0.5)[..., None]


def _smooth(image: Image) -> Image:
    """The mean of 3 x 3 pixels, in which the one in the middle counts five times."""
    height, width, _ = image.shape
    padded = jnp.pad(image, ((1, 1), (1, 1), (0, 0)), mode="reflect" if min(height, width) > 1 else "edge")
    rows = padded[:-2] + padded[1:-1] + padded[2:]
    return jnp.round((rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:] + 4 * image) / 13)


BLENDS: dict[str, Callable[[Image], Image]] = dict(ColorTransform=_grey, Sharpness=_smooth)

# ---------------------------------------------------------------------------------------------------------------------
# Maps: [2, 3], from new to old (x, y, 1)


def _turn(strength: Strength, row: Row, height: int, width: int) -> Array:
    middle = np.array([(width - 1) / 2, (height - 1) / 2], np.float32)
    center = jnp.where(jnp.isnan(row.center), middle, row.center)
    return rotation(strength, (center[0], center[1]), row.extra)


def _shear(strength: Strength, row: Row, height: int, width: int) -> Array:
    return jnp.eye(2, 3) - strength * jnp.where(row.vertical, jnp.eye(2, 3, -1), jnp.eye(2, 3, 1).at[1].set(0))


def _shift(strength: Strength, row: Row, height: int, width: int) -> Array:
    x, y = jnp.where(row.vertical, 0, strength * width), jnp.where(row.vertical, strength * height, 0)
    return jnp.eye(2, 3).at[:, 2].set(-jnp.stack([x, y]))


MAPS: dict[str, Callable[[Strength, Row, int, int], Array]] = dict(Rotate=_turn, Shear=_shear, Translate=_shift)

_FAMILIES: tuple[tuple[str, ...], ...] = (tuple(TONES), tuple(BLENDS), tuple(MAPS), ("Cutout",), ("GaussianBlur",))

# ---------------------------------------------------------------------------------------------------------------------


class Table:
    """Operations of the host as rows of constants, so that one program does any of them.

    Args:
        operations: each must be of a class that `_FAMILIES` names.
    """

    def __init__(self, operations: Sequence[Operation]):
        names = [type(operation).__name__ for operation in operations]
        known = [name for family in _FAMILIES for name in family]
        for name in names:
            if name not in known:
                raise ConfigError(
                    f"device_pipeline: operation {name!r} does not run on the device.{nearest(name, known)}"
                )
        # What no operation needs is not in the program.
        self.families = [tuple(n for n in family if n in names) for family in _FAMILIES]
        self.families = [family for family in self.families if family]
        columns = zip(*map(self._row, operations), strict=True)
        self.rows = Row(*(np.asarray(c, np.int32 if isinstance(c[0], int) else np.float32) for c in columns))
        wide = {NEAREST: 1, BILINEAR: 2, BICUBIC: 4}
        widths = dict.fromkeys(MAPS, 1)
        for name, kernel in zip(names, self.rows.kernel.tolist(), strict=True):
            if kernel not in wide:
                raise ConfigError(
                    f"device_pipeline: {name}: interpolation is nearest, bilinear or bicubic on the device"
                )
            widths[name] = max(widths.get(name, 1), wide[kernel])
        self.taps = max(widths.values()), widths["Rotate"]  # shears and shifts leave one coordinate whole
        blurs = [n == "GaussianBlur" for n in names]
        self.blur_reach = int(np.ceil(3 * np.maximum(self.rows.first, self.rows.last).max(where=blurs, initial=0)))
        self.noisy = bool((self.rows.std > 0).any())

    def _row(self, op: Operation) -> Row:
        name = type(op).__name__
        family = next(i for i, family in enumerate(self.families) if name in family)
        fixed: Any = op.fixed
        first, last = op.range or (fixed or 0, fixed or 0)
        extra = -1.0
        if isinstance(fixed, Sequence):  # of Cutout: (height, width)
            first, last, extra = fixed[0], fixed[0], fixed[1]
        if isinstance(op, SolarizeAdd):
            extra = op.thr
        elif isinstance(op, Rotate):
            extra = op.scale
        drawn = op.level is not None and op.range is not None
        return Row(
            family=family + 1,
            kind=self.families[family].index(name),
            prob=op.prob,
            negative_prob=float(op.random_negative_prob if op.signed else 0),
            first=float(first),
            last=float(last),
            level=float(op.level or 0) / op.total if drawn else 0.0,
            std=float(op.std) / op.total if drawn and op.std != "inf" else 0.0,
            even=int(drawn and op.std == "inf"),
            extra=float(extra),
            center=getattr(op, "center", None) or (np.nan, np.nan),
            fill=np.trunc(np.broadcast_to(getattr(op, "pad_val", 0), 3)).tolist(),
            kernel=int(getattr(op, "filter", NEAREST)),
            vertical=int(not getattr(op, "horizontal", True)),
        )

    def row(self, number: Int[Array, ""] | int) -> Row:
        return jax.tree.map(lambda column: jnp.asarray(column)[number], self.rows)

    def draw(self, row: Row, key: Key) -> tuple[Array, Strength, Float[Array, " 2"]]:
        """Whether the operation is done, its strength, and a place in 0..1 (y, x), where Cutout cuts."""
        draws, noise = random.split(key)
        gate, sign, level, y, x = random.uniform(draws, (5,))
        drawn = jnp.where(row.even, level * row.level, row.level)
        if self.noisy:
            noisy = jnp.clip(row.level + row.std * random.normal(noise), 0, 1)
            drawn = jnp.where(row.std > 0, noisy, drawn)
        strength = row.first + drawn * (row.last - row.first)
        return gate < row.prob, jnp.where(sign < row.negative_prob, -strength, strength), jnp.stack([y, x])

    def change(self, image: Image, row: Row, strength: Strength, place: Float[Array, " 2"], do: Array | bool) -> Image:
        """The image, of whole levels, after the operation of `row` by `strength`, if `do`."""
        makers: dict[str, Callable[[Sequence[str]], Callable[..., Image]]] = {
            **dict.fromkeys(TONES, self._tone),
            **dict.fromkeys(BLENDS, self._blend),
            **dict.fromkeys(MAPS, self._move),
            "Cutout": lambda names: _cutout,
            "GaussianBlur": lambda names: self._blur,
        }
        branches = [lambda image, *_: image, *(makers[family[0]](family) for family in self.families)]
        return lax.switch(jnp.where(do, row.family, 0), branches, image, row, strength, place)

    def __call__(self, image: Image, numbers: Int[Array, " n"], key: Key) -> Image:
        """The image after the operations of these numbers, one after the other, each with its probability; -1 is none."""

        def step(image: Image, drawn: tuple[Array, Key]) -> tuple[Image, None]:
            row = self.row(drawn[0])
            do, strength, place = self.draw(row, drawn[1])
            return self.change(image, row, strength, place, do & (drawn[0] >= 0)), None

        # A scan: the program is as long for two operations as for one.
        return lax.scan(step, jnp.floor(image), (numbers, random.split(key, len(numbers))))[0]

    @staticmethod
    def _tone(names: Sequence[str]) -> Callable[..., Image]:
        tables = [
            lambda *args, t=TONES[name]: jnp.broadcast_to(t(*args), (3, 256)).astype(jnp.float32) for name in names
        ]

        def tone(image: Image, row: Row, strength: Strength, place: Array) -> Image:
            table = lax.switch(row.kind, tables, image, strength, row).reshape(-1)
            return table.at[image.astype(jnp.int32) + 256 * jnp.arange(3)].get(mode="promise_in_bounds")

        return tone

    @staticmethod
    def _blend(names: Sequence[str]) -> Callable[..., Image]:
        duller = [lambda image, b=BLENDS[name]: jnp.broadcast_to(b(image), image.shape) for name in names]

        def blend(image: Image, row: Row, strength: Strength, place: Array) -> Image:
            away = image - lax.switch(row.kind, duller, image)
            return jnp.round(jnp.clip(image + strength * away, 0, 255))

        return blend

    def _move(self, names: Sequence[str]) -> Callable[..., Image]:
        maps = [MAPS[name] for name in names]

        def move(image: Image, row: Row, strength: Strength, place: Array) -> Image:
            height, width, _ = image.shape
            matrix = lax.switch(row.kind, [lambda s, r, m=m: m(s, r, height, width) for m in maps], strength, row)
            return affine(image, matrix, row.fill, row.kernel, row.vertical, self.taps)

        return move

    def _blur(self, image: Image, row: Row, strength: Strength, place: Array) -> Image:
        return jnp.round(gaussian_blur(image, jnp.maximum(strength, 1e-3), self.blur_reach))


def _cutout(image: Image, row: Row, strength: Strength, place: Float[Array, " 2"]) -> Image:
    """A rectangle around `place`. Cut off at the bottom and right, it is moved inside at the top and left."""
    height = jnp.floor(strength)
    width = jnp.where(row.extra < 0, height, row.extra)
    y, x = place * np.array(image.shape[:2], np.float32)
    top, left = (jnp.floor(jnp.maximum(middle - size / 2, 0)) for middle, size in ((y, height), (x, width)))
    return erase(image, Box(top, left, height, width), row.fill)


class RandAugment:
    """`num_policies` operations drawn with replacement, all at one level: the host's transform, and its arguments.

    Args:
        policies: operations, or the name of a table in `auto_augment.RANDAUGMENT`. Colours are RGB.
        num_policies: how many are drawn for each image; each is then left out with its own probability.
        magnitude_level: of those that have a `magnitude_range`, from 0 to total_level.
        magnitude_std, total_level: see `augment_operations.Operation`.
        hparams: `pad_val` and `interpolation` for operations that take them and do not say themselves.
    """

    def __init__(
        self,
        policies: str | Sequence[Policy],
        num_policies: int,
        magnitude_level: float,
        magnitude_std: float | str = 0.0,
        total_level: float = 10,
        hparams: Mapping[str, Any] | None = None,
    ):
        host = auto_augment.RandAugment(policies, num_policies, magnitude_level, magnitude_std, total_level, hparams)
        self.table, self.num_policies = Table(host.operations), num_policies

    def draw(self, key: Key) -> Int[Array, " num_policies"]:
        """Numbers of operations in the table."""
        return random.randint(key, (self.num_policies,), 0, len(self.table.rows.prob))

    def __call__(self, image: Image, key: Key) -> Image:
        drawn, done = random.split(key)
        return self.table(image, self.draw(drawn), done)


class AutoAugment:
    """One of several short chains of operations, drawn for each image: the host's transform, and its arguments.

    Args:
        policies: lists of operations, or the name of a table in `auto_augment.AUTOAUGMENT`.
        hparams: see the host's.
    """

    def __init__(self, policies: str | Sequence[Sequence[Policy]], hparams: Mapping[str, Any] | None = None):
        chains = auto_augment.AutoAugment(policies, hparams).chains
        self.table = Table([operation for chain in chains for operation in chain])
        numbers = iter(range(len(self.table.rows.prob)))
        longest = max(map(len, chains))
        # Shorter chains end with an operation that is left out.
        self.chains = np.full((len(chains), longest), -1, np.int32)
        for chain, row in zip(chains, self.chains, strict=True):
            row[: len(chain)] = [next(numbers) for _ in chain]

    def draw(self, key: Key) -> Int[Array, " longest"]:
        """Numbers of operations in the table; -1 for none."""
        return jnp.asarray(self.chains)[random.randint(key, (), 0, len(self.chains))]

    def __call__(self, image: Image, key: Key) -> Image:
        drawn, done = random.split(key)
        return self.table(image, self.draw(drawn), done)
