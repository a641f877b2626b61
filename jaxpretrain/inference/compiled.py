"""A model's calls, compiled."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, UInt8

from jaxpretrain.data.device import in_order
from jaxpretrain.zoo.index import Preprocessing


def jit(model: nnx.Module, preprocessing: Preprocessing | None = None) -> Compiled:
    """The model with its calls compiled; see `Compiled`.

    Example:
        >>> model = get_model("resnet18_8xb16_cifar10")
        >>> fast = jit(model)
        >>> fast(jnp.zeros((2, 32, 32, 3))).shape
        (2, 10)
        >>> fast.extract_feat(jnp.zeros((2, 32, 32, 3)), stage="neck")[0].shape
        (2, 512)
    """
    return Compiled(model, preprocessing)


class Compiled:
    """A model whose calls are compiled, once for each shape of the images; several times as fast as the model itself.

    It follows the model: weights are read anew at each call, and a change of mode or structure compiles again.

    Args:
        model: a classifier or a method.
        preprocessing: if given, images are uint8 [B, H, W, 3], RGB, and are normalised on the device first.
    """

    def __init__(self, model: nnx.Module, preprocessing: Preprocessing | None = None):
        self.model, self.preprocessing = model, preprocessing
        self._functions: dict[Any, tuple[Any, Any]] = {}

    def __call__(self, images: Any) -> Any:
        """`model(images)`."""
        return self.run("__call__", images)

    def extract_feat(self, images: Any, **options: Any) -> Any:
        """`model.extract_feat(images, **options)`."""
        return self.run("extract_feat", images, **options)

    def predict(self, images: Any) -> Any:
        """`model.predict(images)`."""
        return self.run("predict", images)

    def run(self, method: str, images: Any, **options: Any) -> Any:
        """Any method of the model that takes images; `options` are compiled in, so they must be hashable."""
        graphdef, state = nnx.split(self.model)
        key = (method, tuple(sorted(options.items())))
        compiled_for, function = self._functions.get(key, (None, None))
        if compiled_for != graphdef:

            @jax.jit
            def function(state: nnx.State, images: Array) -> Any:
                if self.preprocessing is not None:
                    images = normalize(images, self.preprocessing)
                return getattr(nnx.merge(graphdef, state), method)(images, **options)

            self._functions[key] = graphdef, function
        return function(state, images)


def normalize(images: UInt8[Array, "b h w 3"], preprocessing: Preprocessing) -> Float[Array, "b h w c"]:
    """(image - mean) / std in float32, in the model's order of channels."""
    mean, std = np.asarray(preprocessing.mean, np.float32), np.asarray(preprocessing.std, np.float32)
    images = (images.astype(jnp.float32) - mean) / std
    return in_order(images, preprocessing.channel_order)
