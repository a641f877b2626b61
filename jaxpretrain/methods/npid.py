"""NPID (Wu et al., 2018, Unsupervised Feature Learning via Non-Parametric Instance Discrimination)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from jaxpretrain.build import ConfigError, build
from jaxpretrain.methods.base import BaseSelfSupervisor, Batch, Metrics, draw_key, last, normalize, pool, spread
from jaxpretrain.models.layers import BaseModule


class SimpleMemory(BaseModule):
    """A running average of the unit-length features of every image of the training set.

    Args:
        length: number of images.
        feat_dim: channels of a feature.
        momentum: weight of a new feature.

    Attributes:
        feature_bank: unit vectors [length, feat_dim], float32, random at first.
    """

    def __init__(self, length: int, feat_dim: int, momentum: float, *, rngs: nnx.Rngs):
        if length < 2:
            raise ConfigError(f"SimpleMemory: length={length} must be the number of training images")
        self.length, self.momentum = length, momentum
        self.feature_bank = nnx.BatchStat(normalize(jax.random.normal(rngs.params(), (length, feat_dim))))

    def read(self, index: Int[Array, " b"]) -> Float[Array, "b d"]:
        """Features of images. An index out of range gives NaN, so that the loss does, and training stops."""
        return self.feature_bank[...].at[index].get(mode="fill", fill_value=jnp.nan)

    def update(self, index: Int[Array, " b"], feature: Float[Array, "b d"]) -> None:
        """Moves the features of images towards new ones, and back to unit length, in place."""
        bank = self.feature_bank[...]
        new = normalize(lax.stop_gradient(feature)).astype(bank.dtype)
        moved = normalize((1 - self.momentum) * self.read(index) + self.momentum * new)
        self.feature_bank.set_value(bank.at[index].set(moved.astype(bank.dtype), mode="drop"))


class NPID(BaseSelfSupervisor):
    """An image shall find its own earlier feature among those of random others (section 3.2, with a softmax over them).

    The backbone gives a tuple of feature maps, the neck is the projector, the head a `ContrastiveHead`. Batches need
    `index`, and the memory as many rows as the training set has images.

    Args:
        memory_bank: a `SimpleMemory`.
        neg_num: negatives for each image, drawn with replacement.
        ensure_neg: whether an image is never its own negative.
        parts: arguments of `BaseSelfSupervisor`.
    """

    def __init__(
        self,
        memory_bank: Mapping[str, Any] | nnx.Module,
        neg_num: int = 65536,
        ensure_neg: bool = False,
        *,
        rngs: nnx.Rngs,
        **parts: Any,
    ):
        super().__init__(rngs=rngs, **parts)
        self.memory_bank = build(memory_bank, rngs=rngs)
        self.neg_num, self.ensure_neg = neg_num, ensure_neg

    @property
    def num_samples(self) -> int:
        return self.memory_bank.length

    def loss(self, batch: Batch, *, rngs: nnx.Rngs | None = None) -> tuple[Float[Array, ""], Metrics]:
        """InfoNCE against the memory, which then takes up the features; `image` is [B, H, W, 3]. Logs `feature_std`."""
        index, memory = batch["index"], self.memory_bank
        feature = normalize(last(self.neck(self.backbone(batch["image"], rngs=rngs))))
        negatives = self.draw_negatives(index, draw_key(rngs, "negatives"))
        # One product with the whole bank, of which some are picked: features of all negatives would be feat_dim times as many
        # numbers as their similarities.
        bank = memory.feature_bank[...].astype(feature.dtype)
        neg = jnp.take_along_axis(feature @ bank.T, negatives, axis=1)
        pos = jnp.sum(feature * memory.read(index).astype(feature.dtype), axis=1, keepdims=True)
        loss = self.head.loss(pos, neg)
        memory.update(index, feature)
        return loss, {"feature_std": spread(feature)}

    def draw_negatives(self, index: Int[Array, " b"], key: Array) -> Int[Array, "b n"]:
        """Random images for each."""
        length, shape = self.memory_bank.length, (len(index), self.neg_num)
        if not self.ensure_neg:
            return jax.random.randint(key, shape, 0, length)
        drawn = jax.random.randint(key, shape, 0, length - 1)
        return drawn + (drawn >= index[:, None])  # leaves out the image itself, and is even over all others

    def features(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b d"]:
        """The backbone's last feature map, averaged over positions."""
        return pool(self.backbone(images))
