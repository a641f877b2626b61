"""What a case is, and the small networks that many share: images of 16 pixels, batches of 8, features of 16 channels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from sklearn.datasets import load_digits

from jaxpretrain.build import build
from jaxpretrain.methods.base import Method
from jaxpretrain.train_state import split

BATCH, SIZE = 8, 16
VIT = dict(arch=dict(embed_dims=16, num_layers=2, num_heads=2, feedforward_channels=32), img_size=SIZE, patch_size=4)
# Compiling is what the tests' time goes to, and it grows with the layers: enough for what does not ask for more.
ONE_LAYER = VIT | dict(arch=dict(VIT["arch"], num_layers=1))
STAGE = dict(num_stages=1, strides=(2,), dilations=(1,), out_indices=(0,), stem_channels=8, base_channels=16)
RESNET = dict(type="ResNet_CIFAR", depth=18, **STAGE)  # gives 16 channels
CE = dict(type="CrossEntropyLoss")


@dataclass(frozen=True)
class Case:
    """A small method, and what the tests must know of it.

    Attributes:
        config: dict(type=...) of the method.
        views: sizes of the views in pixels; one number for a single image.
        mask: (h, w, ones) of the mask in the batch, ones at random places; None for no mask.
        logged: names of the metrics.
        floor: what the loss cannot fall below on fixed images.
        falls_to: part of the loss above the floor that must remain at most after 200 steps.
        learning_rate: of Adam in these steps.
        bfloat16: relative tolerance of the loss in bfloat16. Untrained networks give almost the same features for all
            images, and BatchNorm makes rounding visible that way.
        untouched: regular expression of parameters that get no gradient, with good reason; none by default.
        epoch: what the batch says.
    """

    config: dict[str, Any]
    views: int | tuple[int, ...] = (SIZE, SIZE)
    mask: tuple[int, int, int] | None = None
    logged: frozenset[str] | set[str] = frozenset({"feature_std"})
    floor: float = 0.0
    falls_to: float = 0.5
    learning_rate: float = 3e-3
    bfloat16: float = 0.5
    untouched: str | None = None
    epoch: int = 0

    def batch(self, dtype: Any = jnp.float32, rows: int = BATCH) -> dict[str, Any]:
        """Fixed images (handwritten digits, with some noise that differs between views), labels and masks."""
        sizes = (self.views,) if isinstance(self.views, int) else self.views
        keys = jax.random.split(jax.random.key(5), len(sizes))
        digits = jnp.repeat((load_digits().images[:rows, ..., None] - 4.9) / 6.0, 3, axis=-1)
        views = tuple(
            (jax.image.resize(digits, (rows, n, n, 3), "linear") + 0.3 * jax.random.normal(k, (rows, n, n, 3))).astype(
                dtype
            )
            for k, n in zip(keys, sizes, strict=True)
        )
        index = jnp.arange(rows, dtype=jnp.int32)
        batch = dict(image=views[0] if isinstance(self.views, int) else views, label=index % 4, index=index)
        batch["epoch"] = jnp.full((rows,), self.epoch, jnp.int32)
        if self.mask is not None:
            height, width, ones = self.mask
            order = jax.random.uniform(jax.random.key(6), (rows, height * width)).argsort(axis=1).argsort(axis=1)
            batch["mask"] = (order < ones).astype(jnp.int32).reshape(rows, height, width)
        return batch

    def make(self) -> Method:
        """The method with initialised weights, in training mode."""
        return make(self.config)


def make(config: dict[str, Any]) -> Method:
    """The method that a config describes, with initialised weights, in training mode; asked again, another like it."""
    key = repr(config)
    if key not in _MADE:
        # Not jitted: cases share most of their operations, each of which is compiled once.
        method = build(config, rngs=nnx.Rngs(0))
        method.init_weights(nnx.Rngs(1))
        _MADE[key] = split(method)
    return nnx.merge(*_MADE[key])


_MADE: dict[str, tuple[Any, ...]] = {}
