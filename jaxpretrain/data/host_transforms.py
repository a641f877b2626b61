"""The transforms of `pipeline`, by name, and pipelines made of them. Nothing is imported before it is asked for.

A transform is called as `transform(sample, rng)`: `sample` is a dict with `image` uint8 [H,W,3] in **RGB** (or a tuple of
views), `rng` the sample's own NumPy generator. Names, arguments and results are MMPretrain's. Its images are BGR and ours
RGB, and so are colours in arguments (`pad_val`, `fill_color`): those of a recipe are to be reversed. Only
`RandomGrayscale` and `Lighting` have an argument of their own that says which order their numbers have.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxpretrain.build import ConfigError, build, names, nearest
from jaxpretrain.data.base import Sample
from jaxpretrain.data.lazy_image import LazyImage

Step = Callable[[Sample, np.random.Generator], Sample]

# Module (in jaxpretrain.data) -> its transforms. A class has the same name there, unless one follows a colon.
_MODULES: dict[str, str] = {
    "transforms": "CenterCrop MAERandomResizedCrop RandomCrop RandomFlip RandomResize RandomResizedCrop Resize ResizeEdge",
    "padding": "Pad RandomTranslatePad",
    "efficientnet_crops": "EfficientNetCenterCrop EfficientNetRandomCrop",
    "torchvision_transforms": (
        "torchvision/CenterCrop:CenterCrop torchvision/RandomCrop:TorchvisionRandomCrop "
        "torchvision/RandomHorizontalFlip:RandomHorizontalFlip torchvision/RandomResizedCrop:TorchvisionRandomResizedCrop "
        "torchvision/RandomVerticalFlip:RandomVerticalFlip torchvision/Resize:TorchvisionResize "
        "torchvision/TrivialAugmentWide:TrivialAugmentWide TrivialAugmentWide"
    ),
    "random_rotation": "RandomRotation",
    "colour_transforms": "ColorJitter Lighting RandomGrayscale RandomSolarize",
    "augment_operations": (
        "AutoContrast Brightness ColorTransform Contrast Cutout Equalize GaussianBlur Invert Posterize RandomGaussianBlur "
        "Rotate Sharpness Shear Solarize SolarizeAdd Translate"
    ),
    "auto_augment": "AutoAugment RandAugment",
    "random_erasing": "RandomErasing",
    "albumentations_bridge": "Albumentations Albu:Albumentations",
    "pillow_bridge": "NumpyToPIL PILToNumpy ToPIL:NumpyToPIL ToNumpy:PILToNumpy",
    "composition": "ApplyToList MultiView RandomApply RandomChoice",
    "mask_transforms": "BEiTMaskGenerator RandomResizedCropAndInterpolationWithTwoPic SimMIMMaskGenerator",
    "pretext_transforms": "RandomPatchWithLabels RotationWithLabels",
    "formatting": (
        "CleanCaption Collect ImageToTensor:ToTensor LoadImageFromFile Normalize PackInputs PackMultiTaskInputs "
        "PackSelfSupInputs ToTensor Transpose"
    ),
}
TRANSFORMS: dict[str, str] = {
    entry.partition(":")[0]: f"jaxpretrain.data.{module}:{entry.partition(':')[2] or entry}"
    for module, entries in _MODULES.items()
    for entry in entries.split()
}


def host_transform(name: str) -> type:
    """The class of a transform of `TRANSFORMS`."""
    if name not in TRANSFORMS:
        raise ConfigError(f"No host transform {name!r}.{nearest(name, TRANSFORMS)}")
    module, _, attribute = TRANSFORMS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


class Pipeline:
    """Transforms one after another. Those with `lazy = True` take a `LazyImage` as it is; for the others it is read."""

    def __init__(self, steps: Sequence[Step]):
        self.steps = list(steps)

    @property
    def scaled(self) -> bool:
        """Whether JPEGs may be decoded smaller: the first step is `LoadImageFromFile(scaled=True)`."""
        return bool(self.steps) and getattr(self.steps[0], "scaled", False)

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        for step in self.steps:
            sample = step(sample if getattr(step, "lazy", False) else _read(sample), rng)
        return _read(sample)


def _read(sample: Sample) -> Sample:
    image = sample.get("image")
    return {**sample, "image": image.pixels()} if isinstance(image, LazyImage) else sample


class _Plain:
    """A user's function of the sample alone, in the form of a transform."""

    def __init__(self, function: Callable[[Sample], Sample]):
        self.function = function

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        result = self.function(sample)
        if not isinstance(result, Mapping) or "image" not in result:
            raise ConfigError(
                f"transform {self.function!r} must return the sample, a dict with `image`; it returned "
                f"{type(result).__name__}"
            )
        return dict(result)


def build_pipeline(steps: Sequence[Any]) -> Pipeline:
    """A list of `dict(type=...)`, of names registered by the user, or of callables, as one transform.

    A callable whose second parameter is called `rng` gets the sample's generator; any other is called with the sample
    alone.

    Raises:
        ConfigError: unknown type or argument, naming the nearest.
    """
    return Pipeline([_build_step(step) for step in steps])


def _build_step(step: Any) -> Step:
    if isinstance(step, Mapping) or hasattr(step, "to_dict"):
        step = dict(step)
        kind = step.get("type")
        if kind in TRANSFORMS:
            step["type"] = host_transform(kind)
        elif isinstance(kind, str) and kind not in names() and "." not in kind:
            raise ConfigError(
                f"No host transform {kind!r}.{nearest(kind, TRANSFORMS)} What mixes images of a batch runs on the device: "
                "it belongs in `train_cfg.augments`"
            )
        step = build(step)
    if not callable(step):
        raise ConfigError(f"a pipeline holds dict(type=...) or callables, got {step!r}")
    return step if "rng" in inspect.signature(step).parameters else _Plain(step)
