"""AutoAugment, RandAugment and their operations, on the host. Names, arguments and results are MMPretrain's, in RGB.

Sources: AutoAugment (Cubuk et al., 2019, table 9 of its appendix: the ImageNet policy), RandAugment (Cubuk et al., 2020), and
timm's "increasing" ranges, in which a higher level always changes the image more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from PIL import Image as pillow
from PIL import ImageEnhance, ImageOps

from jaxpretrain.build import ConfigError, build, nearest
from jaxpretrain.data.base import Sample, Transform
from jaxpretrain.data.image_ops import CV2_FILTERS, Image, opencv

Colour = int | Sequence[int]
_SHARED = ("prob", "random_negative_prob")


class Operation(Transform):
    """One change of an image by a strength, applied with a probability.

    The strength is given (`argument`: `magnitude`, `angle`, `bits` or `thr`), or drawn: level / total_level of the way from
    the first to the second end of `magnitude_range`, where the level is `magnitude_level`, with `magnitude_std` normal
    around it (clipped to 0 and total_level), and with magnitude_std='inf' uniform from 0 to it.

    Args:
        prob: of applying it.
        random_negative_prob: of the opposite sign, for strengths that have one.
        magnitude_level, magnitude_range, magnitude_std, total_level: how the strength is drawn; RandAugment sets them.
        magnitude_key: not used; policies may carry it.
    """

    hands_arguments_on: ClassVar = True  # `argument` has another name in each
    argument: ClassVar[str | None] = "magnitude"
    signed: ClassVar[bool] = False

    def __init__(
        self,
        prob: float = 0.5,
        random_negative_prob: float | None = None,
        magnitude_level: float | None = None,
        magnitude_range: Sequence[float] | None = None,
        magnitude_std: float | str = 0.0,
        total_level: float = 10,
        magnitude_key: str | None = None,
        **strength: float | None,
    ):
        name = type(self).__name__
        for given in strength:
            if given != self.argument:
                raise ConfigError(f"{name} has no argument {given!r}.{nearest(given, [self.argument or '', *_SHARED])}")
        self.fixed = strength.get(self.argument or "")
        self.range, self.level, self.total = magnitude_range, magnitude_level, total_level
        if self.argument and (self.fixed is None) == (magnitude_range is None):
            raise ConfigError(f"{name} needs either {self.argument} or magnitude_range")
        if self.argument and self.fixed is None and magnitude_level is None:
            raise ConfigError(f"{name}: magnitude_range={magnitude_range} needs magnitude_level")
        if magnitude_std != "inf" and not isinstance(magnitude_std, int | float):
            raise ConfigError(f"{name}: magnitude_std={magnitude_std!r} is neither a number nor 'inf'")
        self.std = magnitude_std
        self.prob = float(prob)
        self.random_negative_prob = (
            (0.5 if self.signed else 0.0) if random_negative_prob is None else random_negative_prob
        )

    def draw(self, rng: np.random.Generator, height: int, width: int) -> float | None:
        """The strength; None to leave the image as it is."""
        if rng.random() >= self.prob:
            return None
        strength = 0.0 if self.argument is None else self.strength(rng)
        return -strength if self.signed and rng.random() < self.random_negative_prob else strength

    def strength(self, rng: np.random.Generator) -> float:
        """Without its sign."""
        if self.fixed is not None:
            return self.fixed
        assert self.range is not None and self.level is not None
        level = self.level
        if self.std == "inf":
            level = rng.uniform(0, level)
        elif self.std:
            level = float(np.clip(rng.normal(level, float(self.std)), 0, self.total))
        first, last = self.range
        return first + level / self.total * (last - first)

    def apply(self, image: Image, strength: float | None) -> Image:
        return image if strength is None else self.change(np.ascontiguousarray(image), strength)

    def change(self, image: Image, strength: float) -> Image:
        """The image after a change by this strength."""
        raise NotImplementedError


class AutoContrast(Operation):
    """Stretches each channel to the full range."""

    argument = None

    def change(self, image: Image, strength: float) -> Image:
        return np.asarray(ImageOps.autocontrast(pillow.fromarray(image)))


class Equalize(Operation):
    """Makes the histogram of each channel even."""

    argument = None

    def change(self, image: Image, strength: float) -> Image:
        return np.asarray(ImageOps.equalize(pillow.fromarray(image)))


class Invert(Operation):
    """255 - value."""

    argument = None

    def change(self, image: Image, strength: float) -> Image:
        return 255 - image


class Posterize(Operation):
    """Keeps the upper `bits` of each value, rounded up to a whole number."""

    argument = "bits"

    def change(self, image: Image, strength: float) -> Image:
        low = 8 - int(np.ceil(strength))
        return (image >> low << low) if low < 8 else np.zeros_like(image)


class Solarize(Operation):
    """Inverts values from `thr` up."""

    argument = "thr"

    def change(self, image: Image, strength: float) -> Image:
        return np.where(image < strength, image, 255 - image)


class SolarizeAdd(Operation):
    """Adds `magnitude` to values below `thr`.

    Args:
        thr: from this value up nothing changes.
    """

    def __init__(self, thr: float = 128, **kwargs: Any):
        super().__init__(**kwargs)
        self.thr = thr

    def change(self, image: Image, strength: float) -> Image:
        return np.where(image < self.thr, np.minimum(image + strength, 255), image).astype(np.uint8)


class _Enhancement(Operation):
    """Away from a duller picture, by the factor 1 + magnitude."""

    signed = True


class Brightness(_Enhancement):
    """Black is the duller picture."""

    def change(self, image: Image, strength: float) -> Image:
        return np.asarray(ImageEnhance.Brightness(pillow.fromarray(image)).enhance(1 + strength))


class Contrast(_Enhancement):
    """The mean grey level is the duller picture."""

    def change(self, image: Image, strength: float) -> Image:
        return np.asarray(ImageEnhance.Contrast(pillow.fromarray(image)).enhance(1 + strength))


class ColorTransform(_Enhancement):
    """The picture without colours is the duller one."""

    def change(self, image: Image, strength: float) -> Image:
        cv2 = opencv()
        grey = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
        return cv2.addWeighted(image, 1 + strength, grey, -strength, 0)


class Sharpness(_Enhancement):
    """A slightly blurred picture is the duller one."""

    _BLUR: ClassVar = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]]) / 13

    def change(self, image: Image, strength: float) -> Image:
        cv2 = opencv()
        return cv2.addWeighted(image, 1 + strength, cv2.filter2D(image, -1, self._BLUR), -strength, 0)


class _Warp(Operation):
    """An affine map of the plane.

    Args:
        pad_val: grey level or RGB of what comes in from outside.
        interpolation: `nearest`, `bilinear` or `bicubic`.
    """

    signed = True
    default_interpolation: ClassVar = "nearest"

    def __init__(self, pad_val: Colour = 128, interpolation: str | None = None, **kwargs: Any):
        super().__init__(**kwargs)
        interpolation = interpolation or self.default_interpolation
        if interpolation not in CV2_FILTERS:
            raise ConfigError(
                f"{type(self).__name__}: interpolation={interpolation!r}.{nearest(interpolation, CV2_FILTERS)}"
            )
        self.filter = CV2_FILTERS[interpolation]
        self.pad_val = (pad_val,) * 3 if isinstance(pad_val, int) else tuple(pad_val)

    def matrix(self, strength: float, height: int, width: int) -> np.ndarray:
        """[2, 3], from old to new (x, y, 1)."""
        raise NotImplementedError

    def change(self, image: Image, strength: float) -> Image:
        height, width = image.shape[:2]
        matrix = np.asarray(self.matrix(strength, height, width), np.float32)
        return opencv().warpAffine(image, matrix, (width, height), flags=self.filter, borderValue=self.pad_val)


class Rotate(_Warp):
    """Turns clockwise by `angle` degrees.

    A `pad_val` of one number fills with that much blue and no red or green, as the reference does (which hands the number to
    OpenCV as the first of three); its AutoAugment was trained so. RandAugment's recipes give all three.

    Args:
        center: (x, y) in pixels; the middle by default.
        scale: of the result.
    """

    argument = "angle"

    def __init__(self, center: Sequence[float] | None = None, scale: float = 1.0, **kwargs: Any):
        super().__init__(**kwargs)
        if isinstance(kwargs.get("pad_val", 128), int):
            self.pad_val = (0, 0, self.pad_val[2])
        self.center, self.scale = center, scale

    def matrix(self, strength: float, height: int, width: int) -> np.ndarray:
        center = self.center or ((width - 1) * 0.5, (height - 1) * 0.5)
        return opencv().getRotationMatrix2D(tuple(center), -strength, self.scale)


class _Along(_Warp):
    """Along one axis.

    Args:
        direction: `horizontal` or `vertical`.
    """

    def __init__(self, direction: str = "horizontal", **kwargs: Any):
        super().__init__(**kwargs)
        if direction not in ("horizontal", "vertical"):
            raise ConfigError(f"{type(self).__name__}: direction={direction!r} is neither horizontal nor vertical")
        self.horizontal = direction == "horizontal"


class Shear(_Along):
    """Moves each row (column) in proportion to its number."""

    default_interpolation = "bicubic"

    def matrix(self, strength: float, height: int, width: int) -> np.ndarray:
        return np.array([[1, strength, 0], [0, 1, 0]] if self.horizontal else [[1, 0, 0], [strength, 1, 0]])


class Translate(_Along):
    """Moves by `magnitude` times the width (height)."""

    def matrix(self, strength: float, height: int, width: int) -> np.ndarray:
        return np.array(
            [[1, 0, strength * width], [0, 1, 0]] if self.horizontal else [[1, 0, 0], [0, 1, strength * height]]
        )


class Cutout(Operation):
    """Fills a rectangle around a random place, cut off at the border.

    Args:
        shape: (height, width) or an edge length, in pixels; or drawn, as a strength, by `magnitude_range`.
        pad_val: grey level or RGB.
    """

    argument = "shape"

    def __init__(self, shape: int | Sequence[int] | None = None, pad_val: Colour = 128, **kwargs: Any):
        super().__init__(**(kwargs if shape is None else kwargs | dict(shape=shape)))
        self.pad_val = pad_val

    def draw(self, rng: np.random.Generator, height: int, width: int) -> Any:
        shape = super().draw(rng, height, width)
        if shape is None:
            return None
        h, w = (int(shape),) * 2 if isinstance(shape, int | float) else shape
        y, x = rng.integers(height), rng.integers(width)
        return (
            max(int(y) - h // 2, 0),
            max(int(x) - w // 2, 0),
            min(int(y) + h - h // 2, height),
            min(int(x) + w - w // 2, width),
        )

    def change(self, image: Image, strength: Any) -> Image:
        top, left, bottom, right = strength
        image = image.copy()
        image[top:bottom, left:right] = self.pad_val
        return image


OPERATIONS: dict[str, type[Operation]] = {
    cls.__name__: cls
    for cls in (
        AutoContrast,
        Equalize,
        Invert,
        Rotate,
        Posterize,
        Solarize,
        SolarizeAdd,
        ColorTransform,
        Contrast,
        Brightness,
        Sharpness,
        Shear,
        Translate,
        Cutout,
    )
}

Policy = dict[str, Any]


def _policies(lines: str) -> list[list[Policy]]:
    """AutoAugment's table: in each line operations as NAME PROBABILITY [STRENGTH]."""

    def one(text: str) -> Policy:
        name, prob, *strength = text.split()
        key = OPERATIONS[name].argument
        return dict(type=name, prob=float(prob)) | ({str(key): float(strength[0])} if strength else {})

    return [[one(operation) for operation in line.split(",")] for line in lines.strip().splitlines()]


# Strengths are the paper's levels 0 to 9: of Rotate 30 degrees, of Solarize 256, of Shear 0.3 in nine parts.
AUTOAUGMENT: dict[str, list[list[Policy]]] = {
    "imagenet": _policies(f"""
        Posterize 0.4 4, Rotate 0.6 30
        Solarize 0.6 {256 / 9 * 4}, AutoContrast 0.6
        Equalize 0.8, Equalize 0.6
        Posterize 0.6 5, Posterize 0.6 5
        Equalize 0.4, Solarize 0.2 {256 / 9 * 5}
        Equalize 0.4, Rotate 0.8 {30 / 9 * 8}
        Solarize 0.6 {256 / 9 * 6}, Equalize 0.6
        Posterize 0.8 6, Equalize 1.0
        Rotate 0.2 10, Solarize 0.6 {256 / 9}
        Equalize 0.6, Posterize 0.4 5
        Rotate 0.8 {30 / 9 * 8}, ColorTransform 0.4 0
        Rotate 0.4 30, Equalize 0.6
        Equalize 0.0, Equalize 0.8
        Invert 0.6, Equalize 1.0
        ColorTransform 0.6 0.4, Contrast 1.0 0.8
        Rotate 0.8 {30 / 9 * 8}, ColorTransform 1.0 0.2
        ColorTransform 0.8 0.8, Solarize 0.8 {256 / 9 * 2}
        Sharpness 0.4 0.7, Invert 0.6
        Shear 0.6 {0.3 / 9 * 5}, Equalize 1.0
        ColorTransform 0.4 0, Equalize 0.6
        Equalize 0.4, Solarize 0.2 {256 / 9 * 5}
        Solarize 0.6 {256 / 9 * 4}, AutoContrast 0.6
        Invert 0.6, Equalize 1.0
        ColorTransform 0.6 0.4, Contrast 1.0 0.8
        Equalize 0.8, Equalize 0.6
    """),
}


def _ranges(**ranges: Sequence[float] | None) -> list[Policy]:
    """A policy for each name; `Name_horizontal` says the direction too."""
    policies = []
    for name, magnitude_range in ranges.items():
        kind, _, direction = name.partition("_")
        policy: Policy = dict(type=kind)
        policy |= dict(direction=direction) if direction else {}
        policies.append(policy if magnitude_range is None else policy | dict(magnitude_range=magnitude_range))
    return policies


_SHEARS: dict[str, tuple[float, float]] = dict(Shear_horizontal=(0, 0.3), Shear_vertical=(0, 0.3))
RANDAUGMENT: dict[str, list[Policy]] = {
    "timm_increasing": _ranges(
        AutoContrast=None,
        Equalize=None,
        Invert=None,
        Rotate=(0, 30),
        Posterize=(4, 0),
        Solarize=(256, 0),
        SolarizeAdd=(0, 110),
        ColorTransform=(0, 0.9),
        Contrast=(0, 0.9),
        Brightness=(0, 0.9),
        Sharpness=(0, 0.9),
        **_SHEARS,
        Translate_horizontal=(0, 0.45),
        Translate_vertical=(0, 0.45),
    ),
    "simple_increasing": _ranges(AutoContrast=None, Equalize=None, Rotate=(0, 30), **_SHEARS),
}


class AutoAugment(Transform):
    """One of several short chains of operations, drawn for each image.

    Args:
        policies: lists of operations, or the name of a table in `AUTOAUGMENT`.
        hparams: accepted; MMPretrain does not hand it on to the operations of a named table, and neither does this.
    """

    def __init__(self, policies: str | Sequence[Sequence[Policy]], hparams: Mapping[str, Any] | None = None):
        table = _named("AutoAugment", policies, AUTOAUGMENT)
        own = {} if isinstance(policies, str) else dict(hparams or {})
        self.chains = [[_operation(policy, own) for policy in chain] for chain in table]

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        for operation in self.chains[int(rng.integers(len(self.chains)))]:
            sample = operation(sample, rng)
        return sample


class RandAugment(Transform):
    """`num_policies` operations drawn with replacement, all at one level.

    Args:
        policies: operations, or the name of a table in `RANDAUGMENT`.
        num_policies: how many are drawn for each image; each is then left out with its own probability.
        magnitude_level: of those that have a `magnitude_range`, from 0 to total_level.
        magnitude_std, total_level: see `Operation`.
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
        level = dict(magnitude_level=magnitude_level, magnitude_std=magnitude_std, total_level=total_level)
        own = dict(pad_val=128) if hparams is None else dict(hparams)
        self.num_policies = num_policies
        self.operations = [
            _operation(policy, own | (level if "magnitude_range" in policy else {}))
            for policy in _named("RandAugment", policies, RANDAUGMENT)
        ]

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        for number in rng.integers(len(self.operations), size=self.num_policies):
            sample = self.operations[int(number)](sample, rng)
        return sample


def _named(what: str, policies: Any, tables: Mapping[str, Any]) -> Any:
    if not isinstance(policies, str):
        return policies
    if policies not in tables:
        raise ConfigError(f"{what}: no policies {policies!r}.{nearest(policies, tables)}")
    return tables[policies]


def _operation(policy: Mapping[str, Any], defaults: Mapping[str, Any]) -> Operation:
    """The operation, with those of `defaults` that it takes and does not set."""
    kind = policy["type"]
    cls = OPERATIONS.get(kind) if isinstance(kind, str) else kind
    if cls is None:
        raise ConfigError(f"No operation {kind!r} to augment with.{nearest(kind, OPERATIONS)}")
    takes_colour = issubclass(cls, _Warp | Cutout)
    taken = {
        name: value
        for name, value in defaults.items()
        if not (name == "pad_val" and not takes_colour) and not (name == "interpolation" and not issubclass(cls, _Warp))
    }
    return build(taken | dict(policy) | dict(type=cls))
