"""What a sample looks like between one transform and the next, from the data set's picture to the one that is trained on.

Host transforms run in the loader's own `Reader`, device transforms in a `DevicePipeline` with its keys. So these are the
pictures that a training with the same seed sees, for the same epoch and index.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import random
from jaxtyping import Array, Float, Int, UInt8

from jaxpretrain.build import ConfigError, build, nearest
from jaxpretrain.data import formatting, pillow_bridge
from jaxpretrain.data.base import Sample
from jaxpretrain.data.batch_augments import RandomBatchAugment
from jaxpretrain.data.chunks import Reader, refuse_shapes
from jaxpretrain.data.composition import MultiView
from jaxpretrain.data.decode import BadImage
from jaxpretrain.data.device import DevicePipeline
from jaxpretrain.data.host_transforms import Pipeline, build_pipeline
from jaxpretrain.data.phases import Phase, phase_at, phases_of
from jaxpretrain.data.samplers import build_sampler, epoch_of, size_of

Image = UInt8[np.ndarray, "h w 3"]
_BOOKKEEPING = (formatting.__name__, pillow_bridge.__name__)  # steps that hardly ever change pixels


@dataclasses.dataclass(frozen=True)
class Picture:
    """One view: the transform that it comes from, RGB pixels, and where it is to be drawn the mask of its patches."""

    title: str
    image: Image
    mask: Int[np.ndarray, "rows columns"] | None = None


Stage = list[Picture | None]  # one for each view; None where a view has fewer transforms than others


@dataclasses.dataclass
class Trace:
    """A sample on its way.

    Attributes:
        index, repeat, epoch, name: which sample, when, and what its data set calls it.
        label: the data set's.
        stages: the first has the data set's picture, each other one what a transform gives.
        mask: of the first view's patches, from a mask generator.
        mixed: scores [classes], after a batch augmentation.
    """

    index: int
    repeat: int
    epoch: int
    name: str
    label: Any
    stages: list[Stage]
    mask: Int[np.ndarray, "rows columns"] | None = None
    mixed: Float[np.ndarray, " classes"] | None = None

    def final(self) -> list[Picture]:
        """What the method gets, but for normalisation: each view and, where there is a mask, the first one masked."""
        pictures, count = [], len(self.stages[-1])
        for view in range(count):
            last = next(p for stage in reversed(self.stages) if view < len(stage) and (p := stage[view]) is not None)
            pictures.append(Picture(f"view {view + 1}" if count > 1 else "transformed", last.image))
        if self.mask is not None:
            pictures.append(Picture("masked", pictures[0].image, self.mask))
        return pictures


class Tracer:
    """Follows samples of one split of a config.

    Args:
        config: of a training run.
        split: `train`, or another key of `config.data` that has a data set.
        skip: types of transforms that are left out. What those behind them draw is not training's then.

    Raises:
        ConfigError: no such split, or mistakes in it.
    """

    def __init__(self, config: Any, split: str = "train", skip: Sequence[str] = ()):
        splits = [name for name, part in config.data.items() if hasattr(part, "get") and part.get("dataset")]
        if split not in splits:
            raise ConfigError(f"config.data has no data set for the split {split!r}.{nearest(split, splits)}")
        part = _plain(config.data[split])
        self.train = split == "train"
        self.seed = int(config.seed) if self.train else 0  # evaluation draws the same in every run
        self.source = build(part["dataset"])
        self.order = build_sampler(part.get("sampler"), self.source, config.batch_size) if self.train else None
        self.phases = phases_of(part) if self.train else [Phase(0, part.get("pipeline") or (), ())]
        self.recorders = [Recorder(build_pipeline(_without(phase.pipeline, skip)).steps) for phase in self.phases]
        self.readers = [Reader(self.source, recorder, self.seed) for recorder in self.recorders]
        self.device = [_without(phase.device_pipeline, skip) for phase in self.phases]
        self.mean_std = DevicePipeline([], **config.data_preprocessor).mean_std[0]
        self.augment = _batch_augment(_plain(config.method), skip) if self.train else None
        self._stages: dict[int, Any] = {}

    def samples(self, count: int, epoch: int = 0) -> list[tuple[int, int]]:
        """(index, repeat) of the samples with which this epoch of training begins; of evaluation, evenly spread ones."""
        length = len(self.source)
        if self.order is None:
            count = min(count, length)
            return [(i * length // count, 0) for i in range(count)]
        order = epoch_of(self.order, self.seed, epoch, length)
        return [order.at(place) for place in range(min(count, size_of(self.order, length)))]

    def __call__(self, samples: Sequence[tuple[int, int]], epoch: int = 0) -> list[Trace]:
        """Samples, each as (index, repeat), as they look in this epoch; images that cannot be decoded are left out.

        A batch augmentation mixes the samples that are given here. In training their partners are the others of a batch.
        """
        traces, images, phase = [], [], phase_at(self.phases, epoch)
        for index, repeat in samples:
            try:
                arrays, label = self.readers[phase].read(epoch, index, repeat)
            except BadImage:
                continue
            name = self.source.name(index) if hasattr(self.source, "name") else str(index)
            traces.append(Trace(index, repeat, epoch, name, label, self.recorders[phase].stages, arrays.get("mask")))
            images.append(arrays["image"])
        if traces and (self.device[phase] or self.augment):
            self._run_device(traces, images, phase)
        return traces

    def _run_device(self, traces: list[Trace], images: list[Any], phase: int) -> None:
        """Adds the stages of the device and of the batch augmentation."""
        batch: dict[str, Any] = {
            name: jnp.array([getattr(trace, name) for trace in traces]) for name in ("epoch", "index", "repeat")
        }
        views = tuple(_stack(*view) for view in zip(*map(_views, images), strict=True))
        batch["image"] = views if isinstance(images[0], tuple) else views[0]
        if phase not in self._stages:
            self._stages[phase] = self._make_stages(batch, self.device[phase])
        run, chains = self._stages[phase]
        stages = run(batch)
        names = [list(map(title, chain)) for chain in chains]
        for i, trace in enumerate(traces):
            for step, views in enumerate(stages[: max(map(len, names))]):
                trace.stages.append(
                    [
                        Picture(chain[step], _whole(view[i])) if step < len(chain) else None
                        for view, chain in zip(views, names, strict=True)
                    ]
                )
        if self.augment is not None:
            self._mix(self.augment, traces, stages[-1][0], random.fold_in(random.key(self.seed), traces[0].epoch))

    def _make_stages(
        self, batch: Mapping[str, Any], device: Sequence[Any]
    ) -> tuple[Callable[[Any], list[Any]], list[list[Any]]]:
        """(function from a batch to its views after each number of transforms, the transforms of each view)."""
        key, count = random.key(self.seed), 1
        pipelines: list[_Beginning] = []
        while len(pipelines) < count:
            pipelines.append(_Beginning(device, len(pipelines) + 1))
            count = pipelines[-1].longest(batch)
        run = jax.jit(lambda batch: [_views(pipeline(batch, key)["image"]) for pipeline in pipelines])
        return run, pipelines[-1].chains

    def _mix(
        self, augment: RandomBatchAugment, traces: list[Trace], images: Float[Array, "b h w 3"], key: Array
    ) -> None:
        mean, std = self.mean_std
        labels = np.stack([_scores(trace.label, int(self.source.num_classes)) for trace in traces])
        mixed, scores = jax.jit(augment)((images - mean) / std, labels, key)
        name = " or ".join(title(one) for one in augment.augments if not title(one).startswith("_"))
        for trace, image, score in zip(traces, mixed * std + mean, np.asarray(scores), strict=True):
            trace.stages.append([Picture(name, _whole(image))])
            trace.mixed = score


class Recorder(Pipeline):
    """A pipeline that remembers what each of its steps gave, those inside MultiView included."""

    def __init__(self, steps: Sequence[Any]):
        self._given: Sample = {}
        self._log: list[tuple[Any, Sample, Sample]] = []  # step, sample before and after it
        super().__init__([_Noted(_recording(step), self._log) for step in steps])

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        self._given = sample
        self._log.clear()
        return super().__call__(sample, rng)

    @property
    def stages(self) -> list[Stage]:
        """Of the last sample. To be asked for when all is done: reading pixels before could change what crops give."""
        return [_stage("original", self._given, None), *self._later()]

    def _later(self) -> list[Stage]:
        stages: list[Stage] = []
        for step, before, after in self._log:
            if isinstance(step, MultiView):
                recorders: Any = step.pipelines  # see _recording
                stages += _rows([[stage[0] for stage in view._later()] for view in recorders])
            elif before["image"] is not after["image"] or type(step).__module__ not in _BOOKKEEPING:
                mask = after.get("mask")
                stages.append(_stage(title(step), after, None if mask is before.get("mask") else mask))
        return stages


class _Noted:
    """A step that writes into a log; otherwise as it was."""

    def __init__(self, step: Any, log: list[tuple[Any, Sample, Sample]]):
        self._step, self._log = step, log

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._step, name)

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        after = self._step(sample, rng)
        self._log.append((self._step, sample, after))
        return after


class _Beginning(DevicePipeline):
    """The first transforms of each view alone, without normalisation."""

    def __init__(self, pipeline: Sequence[Any], steps: int):
        super().__init__(pipeline, (0, 0, 0), (1, 1, 1))
        self.steps = steps
        self.chains: list[list[Any]] = []

    def _chains(self, count: int) -> list[list[Any]]:
        self.chains = super()._chains(count)
        return [chain[: self.steps] for chain in self.chains]

    def longest(self, batch: Mapping[str, Any]) -> int:
        """How many transforms the view with the most of them has; 1 if there are none."""
        jax.eval_shape(lambda: self(batch, random.key(0))["image"])
        return max(1, *map(len, self.chains))


def title(transform: Any) -> str:
    """What to call a transform: its type, or the function that it stands for; of RandomApply those inside."""
    function = getattr(transform, "function", transform)
    name = getattr(function, "__name__", None) or type(function).__name__
    if name != "RandomApply":
        return name
    inside = transform.pipeline.steps if hasattr(transform, "pipeline") else transform.transforms
    return " + ".join(map(title, inside))


def _recording(step: Any) -> Any:
    if isinstance(step, MultiView):
        step = copy.copy(step)
        step.pipelines = [Recorder(pipeline.steps) for pipeline in step.pipelines]
    return step


def _stage(name: str, sample: Mapping[str, Any], mask: Any) -> Stage:
    return [Picture(name, np.asarray(view), mask if v == 0 else None) for v, view in enumerate(_views(sample["image"]))]


def _rows(columns: Sequence[Sequence[Picture | None]]) -> list[Stage]:
    """Stages from what each view goes through."""
    count = max(map(len, columns), default=0)
    return [[column[i] if i < len(column) else None for column in columns] for i in range(count)]


def _views(image: Any) -> tuple[Any, ...]:
    return tuple(image) if isinstance(image, tuple) else (image,)


def _stack(*images: Image) -> Array:
    for image in images[1:]:
        if image.shape != images[0].shape:
            refuse_shapes(images[0].shape, image.shape)
    return jnp.stack(images)


def _whole(image: Float[Array, "h w 3"]) -> Image:
    return np.round(np.clip(np.asarray(image), 0, 255)).astype(np.uint8)


def _scores(label: Any, classes: int) -> Float[np.ndarray, " classes"]:
    if np.ndim(label):
        return (np.asarray(label) > 0).astype(np.float32)
    return np.eye(classes, dtype=np.float32)[label]


def _batch_augment(method: Mapping[str, Any], skip: Sequence[str]) -> RandomBatchAugment | None:
    """What the method's classifier says about mixing: `model.train_cfg.augments`."""
    train_cfg = dict((method.get("model") or {}).get("train_cfg") or {})
    augments, probs = train_cfg.get("augments") or [], train_cfg.get("probs")
    augments = [augments] if isinstance(augments, Mapping) else augments
    kept = [i for i, augment in enumerate(augments) if augment["type"] not in skip]
    if isinstance(probs, Sequence):
        probs = [probs[i] for i in kept]
    return RandomBatchAugment([augments[i] for i in kept], probs) if kept else None


def _without(steps: Any, skip: Sequence[str]) -> Any:
    """A pipeline, and those inside it, without the types in `skip`."""
    if isinstance(steps, Mapping):
        return {key: _without(value, skip) for key, value in steps.items()}
    if isinstance(steps, list | tuple):
        kept = [step for step in steps if not (isinstance(step, Mapping) and step.get("type") in skip)]
        return type(steps)(_without(step, skip) for step in kept)
    return steps


def _plain(config: Any) -> Any:
    return config.to_dict() if hasattr(config, "to_dict") else config
