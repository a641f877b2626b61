"""What all inferencers share: a model, and batches of images of one shape for it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jaxtyping import UInt8

from jaxpretrain.build import ConfigError, build
from jaxpretrain.data.host_transforms import build_pipeline
from jaxpretrain.data.image_ops import Image
from jaxpretrain.inference.compiled import jit
from jaxpretrain.inference.images import ImageError, describe, list_images, load_image
from jaxpretrain.zoo.factory import find_device, get_model, place
from jaxpretrain.zoo.index import ModelName, Preprocessing, list_models


class Batch(NamedTuple):
    """Images for the network.

    Attributes:
        pixels: uint8 [batch_size, H, W, 3]; rows after the images are zero.
        originals: the images before preprocessing.
        sources: what they were loaded from.
    """

    pixels: UInt8[np.ndarray, "b h w 3"]
    originals: list[Image]
    sources: list[Any]


class BaseInferencer:
    """Holds a model in eval mode, compiled, and prepares images as the model was tested.

    Args:
        model: a name or configuration, as of `get_model`; or a model.
        pretrained: as of `get_model`; None means True. With a model, a path or URL of weights to load into it; True and
            False leave it as it is.
        device: as of `get_model`; None: JAX's default, or where the model is.
        preprocessing: what images go through, where the model does not know it (`model.info.preprocessing`).
        overrides: changes to the configuration.
    """

    def __init__(
        self,
        model: Any,
        pretrained: bool | str | os.PathLike | None = True,
        device: Any = None,
        *,
        preprocessing: Preprocessing | Mapping[str, Any] | None = None,
        **overrides: Any,
    ):
        if not isinstance(model, nnx.Module):
            model = get_model(model, True if pretrained is None else pretrained, device, **overrides)
        else:
            if overrides:
                raise ConfigError(f"{', '.join(overrides)}: a model that is built cannot be changed; give its name")
            if isinstance(pretrained, str | os.PathLike):
                from jaxpretrain.interop import load_weights
                from jaxpretrain.zoo.weights import local_file

                load_weights(model, local_file(pretrained))
            place(model, find_device(device))
            model.eval()
        self.model = model
        self.preprocessing = self._preprocessing(preprocessing)
        self.compiled = jit(model, self.preprocessing)
        self._geometry = build_pipeline(self.preprocessing.pipeline)

    def _preprocessing(self, given: Preprocessing | Mapping[str, Any] | None) -> Preprocessing:
        if isinstance(given, Preprocessing):
            return given
        if given is not None:
            return build({**given, "type": Preprocessing})
        info = getattr(self.model, "info", None)
        if info is None or info.preprocessing is None:
            raise ConfigError(
                f"{type(self).__name__} does not know how images are prepared for this model: give preprocessing="
                "dict(pipeline=[...], mean=(r, g, b), std=(r, g, b))"
            )
        return info.preprocessing

    def prepare(self, image: Image) -> Image:
        """What the network sees of an image, uint8, before normalisation."""
        return self._geometry({"image": image}, np.random.default_rng(0))["image"]

    def batches(self, inputs: Any, batch_size: int) -> Iterator[Batch]:
        """The images of `inputs` in batches, all of one shape, read when they are asked for.

        Raises:
            ImageError: an image cannot be read, naming it.
        """
        if batch_size < 1:
            raise ConfigError(f"batch_size={batch_size} must be at least 1")
        sources = list_images(inputs)
        for start in range(0, len(sources), batch_size):
            part = sources[start : start + batch_size]
            originals, prepared = [], []
            for number, source in enumerate(part, start + 1):
                try:
                    originals.append(load_image(source))
                    prepared.append(self.prepare(originals[-1]))
                    if prepared[-1].shape != prepared[0].shape:
                        raise ImageError(
                            f"it is {prepared[-1].shape[:2]} after preprocessing, others are {prepared[0].shape[:2]}; "
                            "use batch_size=1"
                        )
                except ImageError as error:
                    which = f"Image {number} of {len(sources)}" if len(sources) > 1 else "The image"
                    raise ImageError(f"{which} cannot be used ({describe(source)}): {error}") from error
            pixels = np.zeros((batch_size, *prepared[0].shape), np.uint8)
            pixels[: len(part)] = prepared
            yield Batch(pixels, originals, part)

    @staticmethod
    def list_models(pattern: str | None = None) -> list[ModelName]:
        """Names of the models that this inferencer is for; see `jaxpretrain.list_models`."""
        return list_models(pattern)


def rows(outputs: Any, count: int) -> list[Any]:
    """The outputs of each of the first `count` images: arrays of a tuple, without their first axis, on the host."""
    outputs = jax.tree.map(np.asarray, outputs)
    return [jax.tree.map(lambda array, i=i: array[i], outputs) for i in range(count)]
