"""The operations of AutoAugment and RandAugment, each a transform of its own. Names, arguments and results are MMPretrain's.

Images are RGB uint8, and so are colours in arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from PIL import Image as pillow
from PIL import ImageEnhance, ImageFilter, ImageOps

from jaxpretrain.build import ConfigError, nearest
from jaxpretrain.data.base import Transform
from jaxpretrain.data.image_ops import CV2_FILTERS, Box, Image, crop, opencv

Colour = int | Sequence[int]
_SHARED = ("prob", "random_negative_prob")


class Operation(Transform):
    """One change of an image by a strength, applied with a probability.

    The strength is given (`argument`: `magnitude`, `angle`, `bits`, `thr`, `shape` or `radius`), or drawn: level /
    total_level of the way from the first to the second end of `magnitude_range`, where the level is `magnitude_level`,
    with `magnitude_std` normal around it (clipped to 0 and total_level), and with magnitude_std='inf' uniform from 0 to it.

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
        magnitude_level: float = 10,
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
        assert self.range is not None
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


class Warp(Operation):
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


class Rotate(Warp):
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


class _Along(Warp):
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
    """Fills a rectangle around a random place. Cut off at the bottom and right, it is moved inside at the top and left.

    Args:
        shape: (height, width) or an edge length, in pixels; or drawn, as a strength, by `magnitude_range`.
        pad_val: grey level or RGB.
    """

    argument = "shape"

    def __init__(self, shape: int | Sequence[int] | None = None, pad_val: Colour = 128, **kwargs: Any):
        super().__init__(**(kwargs if shape is None else kwargs | dict(shape=shape)))
        self.pad_val = pad_val

    def draw(self, rng: np.random.Generator, height: int, width: int) -> Any:
        """A Box; None to leave the image as it is."""
        shape = super().draw(rng, height, width)
        if shape is None:
            return None
        h, w = (int(shape),) * 2 if isinstance(shape, int | float) else shape
        y, x = rng.uniform(0, height), rng.uniform(0, width)
        return Box(int(max(y - h / 2, 0)), int(max(x - w / 2, 0)), h, w)

    def change(self, image: Image, strength: Any) -> Image:
        image = image.copy()
        crop(image, strength)[:] = self.pad_val
        return image


class GaussianBlur(Operation):
    """Pillow's Gaussian blur, of standard deviation `radius` in pixels.

    In contrastive pipelines: magnitude_range=(0.1, 2.0) and magnitude_std='inf', even from 0.1 to 2 (SimCLR).
    """

    argument = "radius"

    def change(self, image: Image, strength: float) -> Image:
        return np.asarray(pillow.fromarray(image).filter(ImageFilter.GaussianBlur(strength)))


class RandomGaussianBlur(GaussianBlur):
    """MMSelfSup's form of it.

    Args:
        sigma_min, sigma_max: the standard deviation is drawn evenly between them.
        prob: of applying it.
    """

    def __init__(self, sigma_min: float, sigma_max: float, prob: float = 0.5):
        super().__init__(prob=prob, magnitude_range=(sigma_min, sigma_max), magnitude_std="inf")


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
        GaussianBlur,
    )
}
