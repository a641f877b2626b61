"""Geometry on the host, in uint8: crops, resizes, flips. Names, arguments and results are MMPretrain's.

A transform is called as `transform(sample, rng)`: `sample` is a dict with `image` uint8 [H,W,3] in **RGB**, `rng` the
sample's own NumPy generator. (MMPretrain's images are BGR; colours in arguments are RGB here.) Each separates drawing
from doing: `draw(rng, height, width)` gives the parameters, `apply(image, parameters)` is deterministic. Sizes follow
MMPretrain: (width, height) in `scale` and `CenterCrop.crop_size`, (height, width) in `RandomCrop.crop_size`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxpretrain.build import ConfigError, build
from jaxpretrain.data.base import Sample, Transform
from jaxpretrain.data.host_transforms import host_transform
from jaxpretrain.data.image_ops import (
    PILLOW_FILTERS,
    Box,
    Image,
    check_choice,
    check_filter,
    crop,
    pad,
    pair_of,
    resize,
)
from jaxpretrain.data.mask_transforms import Pictures


class RandomResizedCrop(Transform):
    """A crop of random area and aspect, resized (Szegedy et al., 2015, "Going deeper with convolutions", section 6).

    Up to `max_attempts` times: area = U(crop_ratio_range) of the image's, log aspect = U(log aspect_ratio_range),
    position uniform among those inside the image. If none fits: the largest central crop within the aspect range.

    Args:
        scale: size of the result: edge length or (width, height).
        crop_ratio_range: of area.
        aspect_ratio_range: of width / height.
        interpolation, backend: see `resize`.
    """

    lazy = True

    def __init__(
        self,
        scale: int | Sequence[int],
        crop_ratio_range: tuple[float, float] = (0.08, 1.0),
        aspect_ratio_range: tuple[float, float] = (3 / 4, 4 / 3),
        max_attempts: int = 10,
        interpolation: str = "bilinear",
        backend: str = "cv2",
    ):
        self.scale = pair_of(scale, "RandomResizedCrop: scale")
        for name, (low, high) in (("crop_ratio_range", crop_ratio_range), ("aspect_ratio_range", aspect_ratio_range)):
            if not 0 < low <= high:
                raise ConfigError(f"RandomResizedCrop: {name}=({low}, {high}) must be ascending and positive")
        self.crop_ratio_range, self.aspect_ratio_range = tuple(crop_ratio_range), tuple(aspect_ratio_range)
        self.max_attempts = max_attempts
        self.interpolation, self.backend = check_filter("RandomResizedCrop", interpolation, backend)

    def draw(self, rng: np.random.Generator, height: int, width: int) -> Box:
        smallest, largest = self.crop_ratio_range
        narrowest, widest = self.aspect_ratio_range
        for _ in range(self.max_attempts):
            area = height * width * rng.uniform(smallest, largest)
            aspect = math.exp(rng.uniform(math.log(narrowest), math.log(widest)))
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                return Box(int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w)
        h = min(height, round(width / narrowest))
        w = min(width, round(height * widest))
        return Box((height - h) // 2, (width - w) // 2, h, w)

    def apply(self, image: Image, box: Box) -> Image:
        return resize(crop(image, box, self.scale), self.scale, self.backend, self.interpolation)


class MAERandomResizedCrop(RandomResizedCrop):
    """RandomResizedCrop drawn once: edges longer than the image's are cut to those (BYOL's and MAE's linear probes).

    Args:
        size: edge length or (width, height).
        scale: range of area.
        ratio: range of width / height.
        interpolation: Pillow's name, or its number: 2 is bilinear, 3 bicubic.
        antialias: accepted; Pillow always does.
    """

    def __init__(
        self,
        size: int | Sequence[int],
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        interpolation: str | int = "bilinear",
        antialias: bool | None = True,
    ):
        if isinstance(interpolation, int):
            interpolation = {number: name for name, number in PILLOW_FILTERS.items()}.get(interpolation, "?")
        super().__init__(size, scale, ratio, interpolation=interpolation, backend="pillow")

    def draw(self, rng: np.random.Generator, height: int, width: int) -> Box:
        area = height * width * rng.uniform(self.crop_ratio_range[0], self.crop_ratio_range[1])
        narrowest, widest = self.aspect_ratio_range
        aspect = math.exp(rng.uniform(math.log(narrowest), math.log(widest)))
        w = min(max(1, round(math.sqrt(area * aspect))), width)
        h = min(max(1, round(math.sqrt(area / aspect))), height)
        return Box(int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w)


class Resize(Transform):
    """Resizes to `scale`, or by `scale_factor`.

    Args:
        scale: edge length or (width, height).
        scale_factor: factor, or (of width, of height), where `scale` is None.
        keep_ratio: keep the aspect: the largest size within `scale`, its longer number for the longer edge.
        clip_object_border: ignored, there are no boxes.
        backend, interpolation: see `resize`.
    """

    lazy = True

    def __init__(
        self,
        scale: int | Sequence[int] | None = None,
        scale_factor: float | Sequence[float] | None = None,
        keep_ratio: bool = False,
        clip_object_border: bool = True,
        backend: str = "cv2",
        interpolation: str = "bilinear",
    ):
        if (scale is None) == (scale_factor is None):
            raise ConfigError("Resize: give either scale or scale_factor")
        self.scale = None if scale is None else pair_of(scale, "Resize: scale")
        self.factors = (scale_factor,) * 2 if isinstance(scale_factor, int | float) else tuple(scale_factor or ())
        self.keep_ratio = keep_ratio
        self.interpolation, self.backend = check_filter("Resize", interpolation, backend)

    def size(self, height: int, width: int) -> tuple[int, int]:
        """(width, height) of the result."""
        if self.scale is not None and not self.keep_ratio:
            return self.scale
        if self.scale is None:
            factors = self.factors
        else:
            factors = (min(max(self.scale) / max(height, width), min(self.scale) / min(height, width)),) * 2
        return max(1, int(width * factors[0] + 0.5)), max(1, int(height * factors[1] + 0.5))

    def apply(self, image: Image, parameters: Any) -> Image:
        return resize(image, self.size(*image.shape[:2]), self.backend, self.interpolation)


class RandomResize(Transform):
    """Resizes to a random scale.

    Args:
        scale: (width, height), multiplied by a factor drawn from `ratio_range` and rounded down; or two of them, between
            which, both included, width and height are drawn, each on its own.
        ratio_range: of the factor, drawn evenly.
        resize_type: the transform that resizes: one with an argument `scale` and nothing random.
        kwargs: its further arguments, as `keep_ratio`.
    """

    hands_arguments_on = True

    def __init__(
        self,
        scale: Sequence[int] | Sequence[Sequence[int]],
        ratio_range: tuple[float, float] | None = None,
        resize_type: str = "Resize",
        **kwargs: Any,
    ):
        pairs: Any = scale if isinstance(scale[0], Sequence) else (scale,)
        self.pairs: tuple[tuple[int, int], ...] = tuple(tuple(pair) for pair in pairs)
        if len(self.pairs) not in (1, 2) or any(len(pair) != 2 or min(pair) <= 0 for pair in self.pairs):
            raise ConfigError(f"RandomResize: scale={scale!r} must be (width, height), or two of them")
        if (ratio_range is None) != (len(self.pairs) == 2):
            raise ConfigError("RandomResize: scale=(width, height) goes with ratio_range, two scales without")
        if ratio_range is not None and not 0 < ratio_range[0] <= ratio_range[1]:
            raise ConfigError(f"RandomResize: ratio_range={ratio_range} must be ascending and positive")
        self.ratio_range = ratio_range
        self.arguments = dict(type=host_transform(resize_type), **kwargs)
        self.resizer(self.pairs[0])  # finds mistakes now

    def resizer(self, scale: tuple[int, int]) -> Any:
        """The transform that resizes to `scale`."""
        return build(dict(self.arguments, scale=scale))

    def draw(self, rng: np.random.Generator, height: int, width: int) -> tuple[int, int]:
        """The scale, (width, height)."""
        if self.ratio_range is not None:
            factor = rng.uniform(*self.ratio_range)
            return int(self.pairs[0][0] * factor), int(self.pairs[0][1] * factor)
        (w, h), (other_w, other_h) = self.pairs
        return (
            int(rng.integers(min(w, other_w), max(w, other_w) + 1)),
            int(rng.integers(min(h, other_h), max(h, other_h) + 1)),
        )

    def apply(self, image: Image, scale: tuple[int, int]) -> Image:
        return self.resizer(scale).apply(image, None)


class ResizeEdge(Transform):
    """Resizes one edge to `scale` and the other in proportion (rounded down).

    Args:
        scale: length of the edge.
        edge: `short`, `long`, `width` or `height`.
        backend, interpolation: see `resize`.
    """

    lazy = True

    def __init__(self, scale: int, edge: str = "short", backend: str = "cv2", interpolation: str = "bilinear"):
        check_choice("ResizeEdge: edge", edge, ("short", "long", "width", "height"))
        self.scale, self.edge = scale, edge
        self.interpolation, self.backend = check_filter("ResizeEdge", interpolation, backend)

    def size(self, height: int, width: int) -> tuple[int, int]:
        """(width, height) of the result."""
        edge = self.edge
        if edge in ("short", "long"):
            edge = "width" if (width < height) == (edge == "short") else "height"
        if edge == "width":
            return self.scale, max(1, self.scale * height // width)
        return max(1, self.scale * width // height), self.scale

    def apply(self, image: Image, parameters: Any) -> Image:
        return resize(image, self.size(*image.shape[:2]), self.backend, self.interpolation)


class CenterCrop(Transform):
    """The central part. An offset of half a pixel rounds to even, as Python's `round`.

    Args:
        crop_size: edge length or (width, height).
        auto_pad: pad images that are smaller, at the bottom and right, by `pad_cfg['pad_val']` (grey level or RGB,
            default 0); without it they keep their smaller size.
        clip_object_border: ignored, there are no boxes.
    """

    def __init__(
        self,
        crop_size: int | Sequence[int],
        auto_pad: bool = False,
        pad_cfg: Mapping[str, Any] | None = None,
        clip_object_border: bool = True,
    ):
        self.crop_size = pair_of(crop_size, "CenterCrop: crop_size")
        self.auto_pad = auto_pad
        self.pad_val = (pad_cfg or {}).get("pad_val", 0)
        if isinstance(self.pad_val, Mapping):
            self.pad_val = self.pad_val.get("img", 0)

    def apply(self, image: Image, parameters: Any) -> Image:
        width, height = self.crop_size
        h, w = image.shape[:2]
        if self.auto_pad and (h < height or w < width):
            image = pad(image, (0, max(0, height - h), 0, max(0, width - w)), self.pad_val)
            h, w = image.shape[:2]
        return crop(image, Box(max(0, round((h - height) / 2)), max(0, round((w - width) / 2)), height, width))


class RandomCrop(Transform):
    """A part of fixed size at a random place.

    Args:
        crop_size: edge length or (height, width).
        padding: added first, with `pad_val`, whatever `padding_mode`: on all sides, (left and right, top and bottom),
            or (left, top, right, bottom).
        pad_if_needed: pad images that are smaller, by `padding_mode`, with half of what is missing (rounded up) on both
            sides.
        pad_val: grey level, or RGB.
        padding_mode: `constant`, `edge`, `reflect` (without repeating the edge) or `symmetric` (repeating it).

    Raises:
        ConfigError: (when applied) the image is smaller than `crop_size` and `pad_if_needed` is False.
    """

    def __init__(
        self,
        crop_size: int | Sequence[int],
        padding: int | Sequence[int] | None = None,
        pad_if_needed: bool = False,
        pad_val: int | Sequence[int] = 0,
        padding_mode: str = "constant",
    ):
        self.crop_size = pair_of(crop_size, "RandomCrop: crop_size")
        check_choice("RandomCrop: padding_mode", padding_mode, ("constant", "edge", "reflect", "symmetric"))
        sides = (padding,) * 4 if isinstance(padding, int) else tuple(padding or (0, 0, 0, 0))
        if len(sides) not in (2, 4):
            raise ConfigError(f"RandomCrop: padding={padding!r} must be one, two or four numbers")
        left, top, right, bottom = sides * 2 if len(sides) == 2 else sides
        self.padding = (top, bottom, left, right)
        self.pad_if_needed, self.pad_val, self.padding_mode = pad_if_needed, pad_val, padding_mode
        self.border_mode = "constant"

    def pad(self, image: Image) -> Image:
        """The image that is cropped."""
        image = pad(image, self.padding, self.pad_val, self.border_mode)
        y, x = (max(0, -(-(want - have) // 2)) for want, have in zip(self.crop_size, image.shape[:2], strict=True))
        if (y or x) and not self.pad_if_needed:
            raise ConfigError(
                f"RandomCrop: an image of {image.shape[0]}x{image.shape[1]} (with padding) is smaller than "
                f"crop_size={self.crop_size}; set pad_if_needed=True, or resize first"
            )
        return pad(image, (y, y, x, x), self.pad_val, self.padding_mode)

    def draw(self, rng: np.random.Generator, height: int, width: int) -> Box:
        h, w = self.crop_size
        return Box(int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w)

    def apply(self, image: Image, box: Box) -> Image:
        """`box` lies in the padded image."""
        return crop(image, box)

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        image = sample["image"]
        padded = tuple(map(self.pad, image)) if isinstance(image, tuple) else self.pad(image)
        return super().__call__({**sample, "image": padded}, rng)


class RandomFlip(Transform):
    """Mirrors the image at random; the pictures of one crop (RandomResizedCropAndInterpolationWithTwoPic) alike.

    Args:
        prob: probability of a flip, shared evenly among the directions; or one probability for each direction.
        direction: `horizontal`, `vertical`, `diagonal` (both), or several.
        swap_seg_labels: ignored, there are no segmentations.
    """

    def __init__(
        self,
        prob: float | Sequence[float] | None = None,
        direction: str | Sequence[str] = "horizontal",
        swap_seg_labels: Any = None,
    ):
        self.directions = (direction,) if isinstance(direction, str) else tuple(direction)
        for name in self.directions:
            check_choice("RandomFlip: direction", name, ("horizontal", "vertical", "diagonal"))
        if prob is None:
            raise ConfigError("RandomFlip needs prob, a probability or one for each direction")
        count = len(self.directions)
        self.probs = [prob / count] * count if isinstance(prob, int | float) else list(prob)
        if len(self.probs) != len(self.directions) or min(self.probs) < 0 or sum(self.probs) > 1 + 1e-9:
            raise ConfigError(f"RandomFlip: prob={prob} are not probabilities of the directions {self.directions}")

    def draw(self, rng: np.random.Generator, height: int, width: int) -> str | None:
        chance = rng.random()
        for direction, prob in zip(self.directions, self.probs, strict=True):
            if chance < prob:
                return direction
            chance -= prob
        return None

    def apply(self, image: Image, direction: str | None) -> Image:
        if direction in ("vertical", "diagonal"):
            image = image[::-1]
        return image[:, ::-1] if direction in ("horizontal", "diagonal") else image

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        pictures = sample["image"]
        if not isinstance(pictures, Pictures):
            return super().__call__(sample, rng)
        direction = self.draw(rng, *pictures[0].shape[:2])
        return {**sample, "image": Pictures(self.apply(picture, direction) for picture in pictures)}
