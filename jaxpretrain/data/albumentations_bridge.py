"""Transforms of the package albumentations, for those who have it installed."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxpretrain.build import ConfigError, nearest
from jaxpretrain.data.base import Transform
from jaxpretrain.data.image_ops import Image


class Albumentations(Transform):
    """Transforms of albumentations, one after the other, seeded for each sample by its own generator.

    It gets RGB images, as it expects (MMPretrain hands it BGR), so colours in its arguments are RGB.

    Args:
        transforms: `dict(type=NAME, ...)` with albumentations' names and arguments; `transforms` inside are such lists.
        keymap: accepted where it is MMPretrain's default, {'img': 'image'}: only images are transformed.
    """

    def __init__(self, transforms: Sequence[Mapping[str, Any]], keymap: Mapping[str, str] | None = None):
        if keymap and (set(keymap) - {"img", "image"} or set(keymap.values()) != {"image"}):
            raise ConfigError(f"Albumentations: keymap={dict(keymap)}; only images are transformed: leave it out")
        self.compose = _package().Compose([_build(step) for step in transforms])
        if not hasattr(self.compose, "set_random_seed"):
            raise ConfigError(
                "Albumentations: its version must be 1.4.19 or later; before, it could not be seeded by sample"
            )
        self.lock = threading.Lock()  # the generator is the object's own; the loader's threads share the object

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, lock=threading.Lock())

    def draw(self, rng: np.random.Generator, height: int, width: int) -> int:
        """The seed."""
        return int(rng.integers(2**31))

    def apply(self, image: Image, seed: int) -> Image:
        with self.lock:
            self.compose.set_random_seed(seed)
            result = self.compose(image=np.ascontiguousarray(image))["image"]
        if not isinstance(result, np.ndarray) or result.dtype != np.uint8 or result.ndim != 3 or result.shape[2] != 3:
            raise ConfigError(
                "Albumentations: images must stay uint8 [H,W,3]; remove transforms that normalise or make tensors"
            )
        return result


def _package() -> Any:
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # it would ask the network for a newer version of itself
    try:
        import albumentations
    except ImportError as error:
        raise ConfigError("Albumentations needs the package of that name: pip install albumentations") from error
    return albumentations


def _build(step: Any) -> Any:
    """An object of albumentations from its description."""
    if not isinstance(step, Mapping) and not hasattr(step, "to_dict"):
        return step
    arguments = dict(step)
    kind = arguments.pop("type", None)
    package = _package()
    if isinstance(kind, str) and not hasattr(package, kind):
        raise ConfigError(
            f"albumentations has no {kind!r}.{nearest(kind, [n for n in dir(package) if n[0].isupper()])}"
        )
    if kind is None:
        raise ConfigError(f"Albumentations: a transform needs a 'type'; got only {sorted(arguments)}")
    if "transforms" in arguments:
        arguments["transforms"] = [_build(inner) for inner in arguments["transforms"]]
    return (getattr(package, kind) if isinstance(kind, str) else kind)(**arguments)
