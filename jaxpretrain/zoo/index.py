"""The index of MMPretrain's models: name, architecture, weights, preprocessing, published results, licence.

`models.jsonl` holds one model per line and is read when it is first asked for; `README.md` says how it came about.
"""

from __future__ import annotations

import fnmatch
import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxpretrain.build import ConfigError, names, nearest

_FOLDER = Path(__file__).parent
# Keys of a model's config below which a `type` names no network: initialisation, norms, training.
_NO_COMPONENTS = ("init_cfg", "train_cfg", "prototype")
_INTERPOLATION = {"Resize": "bilinear", "ResizeEdge": "bilinear", "EfficientNetCenterCrop": "bicubic"}


@dataclass(frozen=True)
class Preprocessing:
    """What happens to an image before a model sees it: geometry on uint8 pixels, then (x - mean) / std.

    Attributes:
        pipeline: host transforms, `dict(type=...)` as in `jaxpretrain.data.host_transforms`.
        mean, std: of R, G, B, in grey levels 0 to 255.
        channel_order: 'rgb', or 'bgr' for the few networks (RegNetX, MobileViT, GLIP's Swin) that want blue first; 'grey' for
            one channel.
        source: where the pipeline is from: 'recipe', the model's own test pipeline; 'downstream', that of a model
            fine-tuned or probed from this one, where it has none itself; 'convention', the usual one for its input
            size, where neither has one.
    """

    pipeline: Sequence[Mapping[str, Any]]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    channel_order: str = "rgb"
    source: str = "recipe"

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the network's input, in pixels."""
        last = self.pipeline[-1]
        value = last.get("crop_size", last.get("scale"))
        width, height = (value, value) if isinstance(value, int) else value
        return height, width

    @property
    def resize_edge(self) -> int | None:
        """Length of the edge to which the image is resized before it is cropped; None if it is cropped first."""
        return next((_edge(step["scale"]) for step in self.pipeline if "scale" in step), None)

    @property
    def crop_ratio(self) -> float:
        """Part of the resized image's (shorter) edge that the network sees: 224 / 256 = 0.875; 1 without a crop."""
        last = self.pipeline[-1]
        if last["type"] == "EfficientNetCenterCrop":
            return last["crop_size"] / (last["crop_size"] + last.get("crop_padding", 32))
        return min(1.0, min(self.size) / (self.resize_edge or min(self.size)))

    @property
    def interpolation(self) -> str:
        """'bilinear' or 'bicubic'."""
        return self._resize().get("interpolation", _INTERPOLATION[self._resize()["type"]])

    @property
    def backend(self) -> str:
        """'cv2', which does not antialias, or 'pillow', which does."""
        return self._resize().get("backend", "cv2")

    def _resize(self) -> Mapping[str, Any]:
        return next(step for step in self.pipeline if step["type"] in _INTERPOLATION)


def _edge(scale: int | Sequence[int]) -> int:
    return scale if isinstance(scale, int) else min(scale)


@dataclass(frozen=True, eq=False)
class ModelInfo:
    """One model of the zoo. (Of a model that is built from a configuration, name and collection are empty.)

    Attributes:
        name: as MMPretrain writes it; names are found without regard to case.
        collection: the algorithm, by MMPretrain's name.
        model: the configuration, `dict(type='ImageClassifier', backbone=..., neck=..., head=...)`.
        preprocessing: what its images go through; None if a configuration does not say.
        classes: the data set whose class names its labels have (see `jaxpretrain.data.class_names`), or None.
        weights: URL of MMPretrain's weights, or None.
        converted_from: `Weights` and `Code` of the original release, if they are not MMPretrain's own.
        license: of the weights: an SPDX name where we know it, 'see URL' where the origin has to be asked.
        results: as published: dicts with `task`, `dataset`, `metrics`. Not measured here.
        metadata: as published: FLOPs, parameters, training data. Some figures are wrong; `built` is right.
        downstream: names of models fine-tuned or probed from this one.
        built: what MMPretrain 1.2 has when it builds the model: `params`, `trainable`, `keys` of the state dict.
        note: what to know before using it, or None.
        released: changes to `model` that its published weights need, where MMPretrain builds it otherwise than they were
            trained; `get_model(pretrained=True)` makes them.
    """

    name: str
    collection: str
    model: dict[str, Any]
    preprocessing: Preprocessing | None
    classes: str | None = None
    weights: str | None = None
    converted_from: Mapping[str, str] | None = None
    license: str | None = None
    results: Sequence[Mapping[str, Any]] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)
    downstream: Sequence[str] = ()
    built: Mapping[str, int] = field(default_factory=dict)
    note: str | None = None
    released: Mapping[str, Any] = field(default_factory=dict)

    @property
    def missing(self) -> tuple[str, ...]:
        """The parts of this model that do not exist in this version, by name; sorted."""
        return missing_components(self.model)

    @property
    def available(self) -> bool:
        """Whether all parts of this model exist in this version, so that `get_model` can build it."""
        return not self.missing

    @property
    def tasks(self) -> tuple[str, ...]:
        """What its published results are for: 'Image Classification', 'Image Caption', ...; empty for pre-training."""
        return tuple(dict.fromkeys(result["task"] for result in self.results))

    @property
    def paper(self) -> str | None:
        """Title of the paper."""
        return _collections().get(self.collection, {}).get("paper")

    @property
    def paper_url(self) -> str | None:
        return _collections().get(self.collection, {}).get("url")

    @property
    def hash(self) -> str | None:
        """The first eight hexadecimal digits of the SHA-256 of the weights, which end their file name."""
        return weights_hash(self.weights) if self.weights else None


def weights_hash(url: str) -> str | None:
    """The digits of the SHA-256 in a file name that ends in `-xxxxxxxx.pth`; None if there are none."""
    found = re.search(r"-([0-9a-f]{8})\.\w+$", url)
    return found.group(1) if found else None


class ModelName(str):
    """A name in the zoo: a string, of which `available` says whether this version can build the model."""

    __slots__ = ()

    @property
    def available(self) -> bool:
        return model_info(self).available


def model_info(name: str) -> ModelInfo:
    """The entry of a model, fresh: changing it changes nothing.

    Example:
        >>> info = model_info("resnet50_8xb32_in1k")
        >>> info.preprocessing.size, info.preprocessing.crop_ratio, info.license
        ((224, 224), 0.875, 'Apache-2.0')

    Raises:
        ConfigError: there is no such name; naming the nearest.
    """
    lines = _lines()
    key = str(name).lower()
    if key not in lines:
        raise ConfigError(f"There is no model {str(name)!r} in the zoo.{nearest(key, lines)}")
    entry = json.loads(lines[key])
    spec = entry.pop("preprocessing")
    spec |= {"mean": tuple(spec["mean"]), "std": tuple(spec["std"])}
    return ModelInfo(preprocessing=Preprocessing(**spec), **entry)


def is_model_name(name: str) -> bool:
    """Whether the zoo has a model of this name."""
    return name.lower() in _lines()


def list_models(
    pattern: str | None = None,
    exclude_patterns: str | Iterable[str] | None = None,
    task: str | None = None,
    available_only: bool = False,
) -> list[ModelName]:
    """Names of the zoo's models, in lower case, sorted.

    All of MMPretrain's 548 names are listed. Those whose model does not exist yet in this version have
    `name.available == False`, and `get_model` says what is missing.

    Args:
        pattern: shell wildcards `*`, `?`, `[...]`; a trailing `*` is implied, case does not matter.
        exclude_patterns: names to leave out, likewise.
        task: only models with published results for it ('Image Classification', 'Image Caption', ...); 'null': only
            models without published results, which are mostly pre-trained backbones.
        available_only: leave out what cannot be built yet.

    Example:
        >>> list_models("*convnext-b*21k")
        ['convnext-base_3rdparty_in21k', 'convnext-base_in21k-pre-3rdparty_in1k-384px', 'convnext-base_in21k-pre_3rdparty_in1k']

    Raises:
        ConfigError: there is no such task.
    """
    found = fnmatch.filter(_lines(), (pattern or "").lower() + "*")
    excluded = [exclude_patterns] if isinstance(exclude_patterns, str) else exclude_patterns or ()
    for other in excluded:
        found = [name for name in found if not fnmatch.fnmatchcase(name, other.lower() + "*")]
    if task is not None:
        by_name = _tasks()
        known = {t.lower(): t for tasks in by_name.values() for t in tasks} | {"null": "null"}
        if task.lower() not in known:
            raise ConfigError(f"No model has the task {task!r}.{nearest(task, known.values())}")
        wanted = known[task.lower()]
        found = [name for name in found if wanted in (by_name[name] or ("null",))]
    if available_only:
        found = [name for name in found if model_info(name).available]
    return [ModelName(name) for name in sorted(found)]


@functools.cache
def _lines() -> dict[str, str]:
    """Name in lower case -> line of the index."""
    text = (_FOLDER / "models.jsonl").read_text(encoding="utf-8")
    return {json.loads(line[8 : line.index(",")]).lower(): line for line in text.splitlines()}


@functools.cache
def _tasks() -> dict[str, tuple[str, ...]]:
    return {name: model_info(name).tasks for name in _lines()}


@functools.cache
def _collections() -> dict[str, dict[str, str]]:
    return json.loads((_FOLDER / "collections.json").read_text(encoding="utf-8"))


def missing_components(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The `type`s in a model's config that do not exist in this version, sorted. Dotted paths are the user's own."""
    return tuple(sorted({kind for kind in _components(config) if "." not in kind}.difference(names())))


def _components(config: Any) -> Iterable[str]:
    """The `type`s of all networks, heads and losses in a model's config."""
    if isinstance(config, Mapping):
        if isinstance(config.get("type"), str):
            yield config["type"]
        for key, value in config.items():
            if key not in _NO_COMPONENTS and not key.endswith("_cfg"):
                yield from _components(value)
    elif isinstance(config, list | tuple):
        for value in config:
            yield from _components(value)
