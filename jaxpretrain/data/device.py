"""Image augmentation and normalisation on the device, inside the jitted step.

A transform sees **one** image, float32 [H, W, 3], RGB, 0..255, and a key: `transform(image, key) -> image`, of the same
shape. `DevicePipeline` maps the transforms of a recipe over a batch, and gives each sample its own key, made of the
seed, the epoch and the sample's index. So the pixels of a sample depend on these alone: not on the rest of the batch,
and not on the number of devices.

Names and arguments are MMPretrain's. Its images are BGR and ours RGB: where an argument lists channels
(`RandomGrayscale`), its order is read and mapped.

Grey levels: `ColorJitter` gives Pillow's whole levels, for a reason given at `color_jitter`. Nothing else is rounded;
on whole-numbered input it is within one level of the reference, but for the blur (see `gaussian_blur`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import random
from jaxtyping import Array, Float, Int

from jaxpretrain.build import ConfigError, build, nearest

Key = Array
Image = Float[Array, "h w 3"]
Plane = Float[Array, "h w"]
RGB = tuple[Plane, Plane, Plane]  # planes vectorise: the jitter takes half the time it takes on [H, W, 3]
Transform = Callable[[Image, Key], Image]

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


def _uniform(key: Key, low: float = 0.0, high: float = 1.0) -> Float[Array, ""]:
    return random.uniform(key, (), jnp.float32, low, high)


def _sometimes(prob: float, key: Key, transform: Callable[[Image], Image], image: Image) -> Image:
    """transform(image) with probability `prob`. At 0 and 1 the other branch is not in the program."""
    if prob <= 0:
        return image
    if prob >= 1:
        return transform(image)
    return jnp.where(_uniform(key) < prob, transform(image), image)


def _probability(prob: Any, where: str) -> float:
    if not isinstance(prob, int | float) or not 0 <= prob <= 1:
        raise ConfigError(f"{where} must be a number in 0..1, not {prob!r}")
    return float(prob)


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
            self.probs = [_probability(p, "RandomFlip: each prob") for p in prob]
        else:
            self.probs = [_probability(prob, "RandomFlip: prob") / len(self.directions)] * len(self.directions)
        if len(self.probs) != len(self.directions) or sum(self.probs) > 1 + 1e-6:
            raise ConfigError(f"RandomFlip: prob={prob!r} must be one for each of {self.directions}, 1 at most in sum")

    def __call__(self, image: Image, key: Key) -> Image:
        draw, low = _uniform(key), 0.0
        for direction, prob in zip(self.directions, self.probs, strict=True):
            chosen = (low <= draw) & (draw < low + prob)
            image = jnp.where(chosen, jnp.flip(image, self.AXES[direction]), image)
            low += prob
        return image


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
        self.prob = _probability(prob, "RandomGrayscale: prob")
        if not keep_channels:
            raise ConfigError("RandomGrayscale: on the device images keep their three channels; set keep_channels=True")
        if color_format not in ("bgr", "rgb"):
            raise ConfigError(f"RandomGrayscale: color_format must be 'bgr' or 'rgb', not {color_format!r}")
        if len(channel_weights) != 3 or sum(channel_weights) <= 0:
            raise ConfigError(f"RandomGrayscale: channel_weights must be three numbers, not {channel_weights!r}")
        self.rgb_weights = tuple(channel_weights)[:: -1 if color_format == "bgr" else 1]

    def __call__(self, image: Image, key: Key) -> Image:
        return _sometimes(self.prob, key, lambda x: grayscale(x, self.rgb_weights), image)


class _Drawn:
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
        self.prob = _probability(prob, f"{name}: prob")
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
        return _sometimes(self.prob, gate, lambda x: self.apply(x, self.strength(draw)), image)

    def strength(self, key: Key) -> Float[Array, ""]:
        level = jnp.float32(self.level)
        if self.std == "inf":
            level = _uniform(key, 0.0, self.level)
        elif self.std:
            level = jnp.clip(level + self.std * random.normal(key, (), jnp.float32), 0, self.total)
        return self.low + (self.high - self.low) * level / self.total

    def apply(self, image: Image, strength: Float[Array, ""]) -> Image:
        raise NotImplementedError


class GaussianBlur(_Drawn):
    """Blurs with a Gaussian (see `gaussian_blur`).

    Args:
        radius: standard deviation in pixels, as in Pillow; or None, and `magnitude_range`, (0.1, 2.0) in most recipes.
        prob, kwargs: see `_Drawn`.
    """

    def __init__(self, radius: float | None = None, prob: float = 0.5, **kwargs: Any):
        super().__init__(prob, **kwargs)
        self.low, self.high = self.range("radius", radius)
        if min(self.low, self.high) <= 0:
            raise ConfigError("GaussianBlur: the radius must be positive; prob=0 switches the blur off")
        self.reach = math.ceil(3 * max(self.low, self.high))

    def apply(self, image: Image, strength: Float[Array, ""]) -> Image:
        return gaussian_blur(image, strength, self.reach)


class Solarize(_Drawn):
    """Inverts the levels from a threshold on.

    Args:
        thr: the threshold, in grey levels; or None, and `magnitude_range`.
        prob, kwargs: see `_Drawn`.
    """

    def __init__(self, thr: float | None = None, prob: float = 0.5, **kwargs: Any):
        super().__init__(prob, **kwargs)
        self.low, self.high = self.range("thr", thr)

    def apply(self, image: Image, strength: Float[Array, ""]) -> Image:
        return solarize(image, strength)


class RandomApply:
    """Applies all of `transforms`, one after the other, with probability `prob`; else none."""

    def __init__(self, transforms: Any, prob: float = 0.5):
        self.prob = _probability(prob, "RandomApply: prob")
        self.transforms = _build_all(transforms if isinstance(transforms, Sequence) else [transforms])

    def __call__(self, image: Image, key: Key) -> Image:
        gate, rest = random.split(key)
        return _sometimes(self.prob, gate, lambda x: _apply_all(self.transforms, x, rest), image)


class MultiView:
    """Says which transforms each view gets: the form of the host's MultiView, for views that the host has made.

    Args:
        transforms: lists of transforms.
        num_views: how many views each list is for; one number if there is one list.
    """

    def __init__(self, transforms: Sequence[Sequence[Any]], num_views: int | Sequence[int]):
        counts = [num_views] if isinstance(num_views, int) else list(num_views)
        if len(counts) != len(transforms) or not all(isinstance(t, Sequence) for t in transforms):
            raise ConfigError(
                f"MultiView: num_views={num_views!r} needs as many lists of transforms; there are {len(transforms)}"
            )
        built = [_build_all(t) for t in transforms]
        self.views = [chain for chain, count in zip(built, counts, strict=True) for _ in range(count)]


class Pictures(MultiView):
    """Says that the views are pictures of one crop (BEiT): everything random happens to all of them alike.

    Args:
        transforms: one list, for all pictures.
        num_pictures: how many there are.
    """

    def __init__(self, transforms: Sequence[Any], num_pictures: int = 2):
        super().__init__([transforms], num_pictures)


TRANSFORMS: dict[str, type] = {
    cls.__name__: cls
    for cls in (RandomFlip, ColorJitter, RandomGrayscale, GaussianBlur, Solarize, RandomApply, MultiView, Pictures)
}
_IGNORED = ("PackInputs",)  # ends every pipeline of MMPretrain; batches need no packing here


def _build_one(cfg: Any) -> Any:
    if not isinstance(cfg, Mapping) and not hasattr(cfg, "to_dict"):
        return cfg
    args = dict(cfg.to_dict() if hasattr(cfg, "to_dict") else cfg)
    name = args.get("type")
    if isinstance(name, str) and "." not in name:
        if name not in TRANSFORMS:
            raise ConfigError(
                f"device_pipeline: {name!r} does not run on the device.{nearest(name, TRANSFORMS)} "
                "What loads, crops or resizes images belongs in `pipeline`, on the host."
            )
        args["type"] = TRANSFORMS[name]
    return build(args)


def _build_all(cfgs: Sequence[Any]) -> list[Any]:
    return [_build_one(cfg) for cfg in cfgs if not (isinstance(cfg, Mapping) and cfg.get("type") in _IGNORED)]


def _apply_all(transforms: Sequence[Transform], image: Image, key: Key) -> Image:
    for i, transform in enumerate(transforms):
        image = transform(image, random.fold_in(key, i))
    return image


# ---------------------------------------------------------------------------------------------------------------------


def sample_key(seed_key: Key, epoch: Int[Array, ""], index: Int[Array, ""]) -> Key:
    """The key of one sample in one epoch, from which everything random about it on the device derives."""
    return random.fold_in(random.fold_in(seed_key, epoch), index)


class DevicePipeline:
    """Augments and normalises a batch; to be called inside the jitted step.

    Args:
        pipeline: descriptions `dict(type=...)` of device transforms (`TRANSFORMS`, or a dotted path of one's own), or
            callables `(image, key) -> image`. They apply to every view; `MultiView` gives each its own. May be empty.
        mean, std: of R, G, B, in grey levels 0..255: the result is (image - mean) / std.
        second_mean, second_std: those of the second of two views, where they differ (target pictures of BEiT and CAE).

    Raises:
        ConfigError: unknown transforms or arguments; when called, a number of views that is not the batch's.
    """

    def __init__(
        self,
        pipeline: Sequence[Any],
        mean: Sequence[float],
        std: Sequence[float],
        second_mean: Sequence[float] | None = None,
        second_std: Sequence[float] | None = None,
    ):
        self.transforms = _build_all(pipeline)
        first = np.asarray(mean, np.float32), np.asarray(std, np.float32)
        second = tuple(
            own if other is None else np.asarray(other, np.float32)
            for own, other in zip(first, (second_mean, second_std), strict=True)
        )
        self.mean_std = first, second

    def __call__(self, batch: Mapping[str, Any], seed_key: Key | None = None) -> dict[str, Any]:
        """The batch with float32 images; everything else passes through.

        Args:
            batch: `image` [B, H, W, 3], uint8 or float in 0..255, RGB, or a tuple of such views; and, unless the
                pipeline is empty, `epoch` and `index`, int32 [B].
            seed_key: key of the run's seed. A sample's key is fold_in(fold_in(seed_key, epoch), index), and the key of
                its view v is fold_in(that, v), or fold_in(that, 0) with `Pictures`. Not needed if the pipeline is empty.
        """
        images = batch["image"]
        single = not isinstance(images, tuple | list)
        views = (images,) if single else tuple(images)
        chains = self._chains(len(views))
        if self.transforms:
            if seed_key is None:
                raise TypeError("DevicePipeline: a pipeline with transforms needs seed_key")
            keys = jax.vmap(partial(sample_key, seed_key))(batch["epoch"], batch["index"])
        alike = any(isinstance(transform, Pictures) for transform in self.transforms)
        done = []
        for v, (view, chain) in enumerate(zip(views, chains, strict=True)):
            view = view.astype(jnp.float32)
            if chain:
                view_keys = jax.vmap(random.fold_in, in_axes=(0, None))(keys, 0 if alike else v)
                view = jax.vmap(partial(_apply_all, chain))(view, view_keys)
            mean, std = self.mean_std[v == 1]
            done.append((view - mean) / std)
        return {**batch, "image": done[0] if single else tuple(done)}

    def _chains(self, count: int) -> list[list[Transform]]:
        """The transforms of each of `count` views."""
        chains: list[list[Transform]] = [[] for _ in range(count)]
        for transform in self.transforms:
            if isinstance(transform, MultiView) and len(transform.views) != count:
                raise ConfigError(
                    f"device_pipeline: MultiView is for {len(transform.views)} views, the batch has {count}; "
                    "the MultiView in `pipeline` makes the views and must have the same num_views"
                )
            for view, chain in enumerate(chains):
                chain.extend(transform.views[view] if isinstance(transform, MultiView) else [transform])
        return chains
