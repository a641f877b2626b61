"""Augmentations that mix the images and labels of a batch with each other: Mixup, CutMix, ResizeMix.

They run inside the jitted step, on augmented and normalised images: `augment(images, labels, key) -> (images, labels)`.
As in MMPretrain, one lambda, one box and one permutation are drawn per batch, and image i is mixed with image
permutation[i]. The batch is the global one and all is drawn from one key, so the number of devices changes nothing.

Each class separates what is drawn from what is done: `mix(images, labels, permutation, ...)` takes pinned parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax, random
from jaxtyping import Array, Bool, Float, Int

from jaxpretrain.build import ConfigError, build

Key = Array
Images = Float[Array, "b h w c"]
Labels = Float[Array, "b classes"]
BatchAugment = Callable[[Images, Labels, Key], tuple[Images, Labels]]


class Box(NamedTuple):
    """Rows top..bottom-1 and columns left..right-1, int32, inside the image; may be empty."""

    top: Int[Array, ""]
    bottom: Int[Array, ""]
    left: Int[Array, ""]
    right: Int[Array, ""]

    def area(self) -> Int[Array, ""]:
        return (self.bottom - self.top) * (self.right - self.left)

    def mask(self, height: int, width: int) -> Bool[Array, "h w"]:
        rows, columns = jnp.arange(height)[:, None], jnp.arange(width)
        return (rows >= self.top) & (rows < self.bottom) & (columns >= self.left) & (columns < self.right)


def clipped_box(lam: Array | float, y: Array | int, x: Array | int, height: int, width: int) -> Box:
    """The box of share 1 - lam of the image around (y, x), of the image's shape, cut off at the border (CutMix, eq. 2).

    An odd side is one pixel shorter, as in the published code.
    """
    side = jnp.sqrt(1 - jnp.float32(lam))
    half_height = (height * side).astype(jnp.int32) // 2
    half_width = (width * side).astype(jnp.int32) // 2
    return Box(
        jnp.clip(y - half_height, 0, height),
        jnp.clip(y + half_height, 0, height),
        jnp.clip(x - half_width, 0, width),
        jnp.clip(x + half_width, 0, width),
    )


def draw_clipped_box(key: Key, lam: Array | float, height: int, width: int) -> Box:
    """`clipped_box` around a pixel drawn evenly."""
    row, column = random.split(key)
    return clipped_box(lam, random.randint(row, (), 0, height), random.randint(column, (), 0, width), height, width)


def _blend(a: Array, b: Array, lam: Array | float) -> Array:
    """lam a + (1 - lam) b in float32, in the dtype of `a`."""
    return (lam * a.astype(jnp.float32) + (1 - lam) * b.astype(jnp.float32)).astype(a.dtype)


class _Mix:
    """Draws lambda from Beta(alpha, alpha) and the permutation; subclasses draw the rest and mix."""

    def __init__(self, alpha: float):
        if not isinstance(alpha, int | float) or alpha <= 0:
            raise ConfigError(f"{type(self).__name__}: alpha must be a number > 0, not {alpha!r}")
        self.alpha = float(alpha)

    def draw_lam(self, key: Key) -> Float[Array, ""]:
        return random.beta(key, self.alpha, self.alpha, (), jnp.float32)

    def __call__(self, images: Images, labels: Labels, key: Key) -> tuple[Images, Labels]:
        """Mixed images and labels.

        Args:
            images: [B, H, W, C].
            labels: [B, classes], one-hot or soft.
            key: of this batch.
        """
        permutation, lam, rest = random.split(key, 3)
        return self.draw_and_mix(images, labels, random.permutation(permutation, len(images)), self.draw_lam(lam), rest)

    def draw_and_mix(
        self, images: Images, labels: Labels, permutation: Int[Array, " b"], lam: Float[Array, ""], key: Key
    ) -> tuple[Images, Labels]:
        raise NotImplementedError


class Mixup(_Mix):
    """x = lam x_i + (1 - lam) x_j, and the same for the labels (Zhang et al., 2018, eq. 1).

    Args:
        alpha: lam is drawn from Beta(alpha, alpha), once per batch.
    """

    def draw_and_mix(self, images, labels, permutation, lam, key):
        return self.mix(images, labels, permutation, lam)

    @staticmethod
    def mix(images: Images, labels: Labels, permutation: Int[Array, " b"], lam: Array | float) -> tuple[Images, Labels]:
        return _blend(images, images[permutation], lam), _blend(labels, labels[permutation], lam)


class CutMix(_Mix):
    """Pastes a box of x_j into x_i; the labels are mixed by area (Yun et al., 2019, eq. 1 and 2).

    Args:
        alpha: lam, the share of x_i, is drawn from Beta(alpha, alpha), once per batch.
        cutmix_minmax: (low, high): draw the sides of the box evenly from these shares of the image instead, and its
            place evenly such that it lies inside. alpha then has no effect.
        correct_lam: mix the labels by the area of the box that was cut off at the border, not by lam.
    """

    def __init__(self, alpha: float, cutmix_minmax: Sequence[float] | None = None, correct_lam: bool = True):
        super().__init__(alpha)
        if cutmix_minmax is not None and not (
            len(cutmix_minmax) == 2 and 0 <= cutmix_minmax[0] <= cutmix_minmax[1] <= 1
        ):
            raise ConfigError(
                f"{type(self).__name__}: cutmix_minmax must be (low, high) in 0..1, not {cutmix_minmax!r}"
            )
        self.cutmix_minmax, self.correct_lam = cutmix_minmax, correct_lam

    def draw_box(self, key: Key, lam: Array | float, height: int, width: int) -> Box:
        if self.cutmix_minmax is None:
            return draw_clipped_box(key, lam, height, width)
        keys = random.split(key, 4)
        low, high = self.cutmix_minmax
        cut_height = random.randint(keys[0], (), int(height * low), int(height * high))
        cut_width = random.randint(keys[1], (), int(width * low), int(width * high))
        top = random.randint(keys[2], (), 0, height - cut_height)
        left = random.randint(keys[3], (), 0, width - cut_width)
        return Box(top, top + cut_height, left, left + cut_width)

    def draw_and_mix(self, images, labels, permutation, lam, key):
        return self.mix(images, labels, permutation, lam, self.draw_box(key, lam, *images.shape[1:3]))

    def mix(
        self, images: Images, labels: Labels, permutation: Int[Array, " b"], lam: Array | float, box: Box
    ) -> tuple[Images, Labels]:
        height, width = images.shape[1:3]
        if self.correct_lam or self.cutmix_minmax is not None:
            lam = 1 - box.area() / jnp.float32(height * width)
        inside = box.mask(height, width)[..., None]
        return (
            jnp.where(inside, self.patch(images[permutation], box), images),
            _blend(labels, labels[permutation], lam),
        )

    def patch(self, images: Images, box: Box) -> Images:
        """What is seen inside `box`, in place."""
        return images


class ResizeMix(CutMix):
    """CutMix whose box shows the whole of x_j, made smaller (Qin et al., 2020).

    Args:
        alpha, cutmix_minmax, correct_lam: see CutMix.
        lam_min, lam_max: lam is lam_min + (lam_max - lam_min) times a draw from Beta(alpha, alpha).
        interpolation: 'bilinear' (PyTorch's, without antialiasing) is the only one here.
    """

    def __init__(
        self,
        alpha: float,
        lam_min: float = 0.1,
        lam_max: float = 0.8,
        interpolation: str = "bilinear",
        cutmix_minmax: Sequence[float] | None = None,
        correct_lam: bool = True,
    ):
        super().__init__(alpha, cutmix_minmax, correct_lam)
        if interpolation != "bilinear":
            raise ConfigError(f"ResizeMix: interpolation must be 'bilinear', not {interpolation!r}")
        if not 0 <= lam_min <= lam_max <= 1:
            raise ConfigError(f"ResizeMix: needs 0 <= lam_min <= lam_max <= 1, not {lam_min!r}, {lam_max!r}")
        self.lam_min, self.lam_max = lam_min, lam_max

    def draw_lam(self, key: Key) -> Float[Array, ""]:
        return self.lam_min + (self.lam_max - self.lam_min) * super().draw_lam(key)

    def patch(self, images: Images, box: Box) -> Images:
        corner = jnp.stack([box.top, box.left]).astype(jnp.float32)
        size = jnp.stack([box.bottom - box.top, box.right - box.left]).astype(jnp.float32)
        scale = jnp.maximum(size, 1) / jnp.array(images.shape[1:3], jnp.float32)
        return jax.image.scale_and_translate(
            images, images.shape, (1, 2), scale, corner, "linear", antialias=False, precision=lax.Precision.HIGHEST
        ).astype(images.dtype)


class RandomBatchAugment:
    """Draws one of several batch augmentations for each batch.

    Args:
        augments: one, or a list, of descriptions `dict(type='Mixup', alpha=0.8)` or callables
            `(images, labels, key) -> (images, labels)`.
        probs: probability of each; what is missing to 1 leaves the batch as it is. By default all are equally likely.

    Raises:
        ConfigError: unknown augmentation or argument; probs that do not fit.
    """

    def __init__(self, augments: Any, probs: float | Sequence[float] | None = None):
        if isinstance(augments, Mapping) or hasattr(augments, "to_dict") or callable(augments):
            augments = [augments]
        self.augments: list[BatchAugment] = [build(augment) for augment in augments]
        if not self.augments:
            raise ConfigError("RandomBatchAugment: no augmentation given; leave `augments` out to mix nothing")
        if probs is None:
            probs = [1 / len(self.augments)] * len(self.augments)
        self.probs = [probs] if isinstance(probs, int | float) else list(probs)
        count, total = len(self.augments), math.fsum(self.probs)
        if len(self.probs) != count or min(self.probs) < 0 or total > 1 + 1e-6:
            raise ConfigError(
                f"RandomBatchAugment: probs must be {count} numbers >= 0, at most 1 in sum, not {self.probs!r}"
            )
        if total < 1 - 1e-6:
            self.augments.append(_identity)
            self.probs.append(1 - total)

    def __call__(self, images: Images, labels: Labels, key: Key) -> tuple[Images, Labels]:
        """Mixed images and labels; see `Mixup.__call__`. Only the augmentation drawn is computed."""
        draw, rest = random.split(key)
        chosen = random.choice(draw, len(self.augments), p=jnp.array(self.probs, jnp.float32))
        return lax.switch(chosen, self.augments, images, labels, rest)


def _identity(images: Images, labels: Labels, key: Key) -> tuple[Images, Labels]:
    return images, labels
