"""The unit of work of the loaders: at most `CHUNK` samples of one batch of one host, a pure function of its number.

So neither the number of workers, nor where a run was interrupted, changes a pixel.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import pickle
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from jaxpretrain.build import ConfigError
from jaxpretrain.data.base import Label
from jaxpretrain.data.decode import BadImage, as_rgb
from jaxpretrain.data.host_transforms import Pipeline
from jaxpretrain.data.labels import canonical
from jaxpretrain.data.samplers import Order, epoch_of, permutation, size_of
from jaxpretrain.data.seeds import SAMPLE, SUBSTITUTE, generator

# Samples: large enough to hide the cost of handing over (about 1 ms between processes), small enough to share out.
CHUNK = 32
SUBSTITUTES = 100  # candidates tried in place of a bad image; all bad means that nearly everything is

ARRAYS = ("image", "mask")  # what a batch has of each sample besides numbers: uint8 [H,W,3] or views, integers [h,w]


@dataclasses.dataclass
class Rows:
    """What a chunk says about its samples: their rows in the batch of this host, and their numbers.

    A dataclass is a leaf to grain: it goes through a pipe, while bare arrays go through shared memory.
    """

    row: list[int] = dataclasses.field(default_factory=list)
    label: list[Label] = dataclasses.field(default_factory=list)
    index: list[int] = dataclasses.field(default_factory=list)
    epoch: list[int] = dataclasses.field(default_factory=list)
    repeat: list[int] = dataclasses.field(default_factory=list)
    bad: list[tuple[int, str]] = dataclasses.field(default_factory=list)  # (index, reason)
    error: Exception | None = None


class Reader:
    """Reads, decodes and transforms single samples: by `transform`, or by the last of `later` whose epoch has come."""

    def __init__(self, source: Any, transform: Pipeline, seed: int, later: Sequence[tuple[int, Pipeline]] = ()):
        self.source, self.transform, self.seed, self.later = source, transform, seed, later

    def read(self, epoch: int, index: int, repeat: int = 0) -> tuple[dict[str, Any], Label]:
        """(arrays, label) of sample `index` as it looks in this epoch, when the epoch has had it `repeat` times before:
        `image`, or its views, and `mask` if a transform made one. Raises BadImage.
        """
        transform = next((other for begin, other in reversed(self.later) if epoch >= begin), self.transform)
        try:
            sample = self.source[index]
        except OSError as error:
            raise BadImage(f"{type(error).__name__}: {error.strerror or error}") from error
        sample = {**sample, "image": as_rgb(sample["image"], transform.scaled), "index": index, "epoch": epoch}
        sample = transform(sample, generator(SAMPLE, self.seed, epoch, index, repeat))
        return {name: sample[name] for name in ARRAYS if name in sample}, canonical(sample.get("label", -1))

    def candidates(self, epoch: int, index: int) -> Iterator[int]:
        """`index`, then what replaces it should it be bad, and so on."""
        yield index
        rng = generator(SUBSTITUTE, self.seed, epoch, index)
        for _ in range(SUBSTITUTES):
            yield int(rng.integers(len(self.source)))


class Place(NamedTuple):
    """A sample in a chunk: its row in the batch of this host, its number, and how often the epoch has had it before."""

    row: int
    epoch: int
    sample: int
    repeat: int = 0


class Chunks:
    """Computes chunk `number`, which has the samples `plan(number)`."""

    def __init__(self, reader: Reader, plan: Callable[[int], list[Place]], replace: bool):
        self.reader, self.plan, self.replace = reader, plan, replace

    def __call__(self, number: int) -> dict[str, Any]:
        """`rows` (Rows), and `arrays`: a dict of them, stacked; None where there are no rows."""
        rows, samples, stacked = Rows(), [], None
        try:
            for row, epoch, index, repeat in self.plan(int(number)):
                for candidate in self.reader.candidates(epoch, index):
                    try:
                        arrays, label = self.reader.read(epoch, candidate, repeat)
                    except BadImage as reason:
                        rows.bad.append((candidate, str(reason)))
                        if self.replace:
                            continue
                        break
                    samples.append(arrays)
                    rows.row.append(row)
                    rows.label.append(label)
                    rows.index.append(candidate)
                    rows.epoch.append(epoch)
                    rows.repeat.append(repeat)
                    break
            stacked = {name: _stack([sample[name] for sample in samples]) for name in samples[0]} if samples else None
        except Exception as error:
            rows.error = _portable(error)
        return {"rows": rows, "arrays": stacked}


@dataclasses.dataclass(frozen=True)
class TrainPlan:
    """Epoch after epoch in its order; host p has rows p*b..(p+1)*b of each global batch."""

    length: int
    seed: int
    batch_size: int
    local: int
    process_index: int
    chunk: int
    order: Order = permutation

    def __call__(self, number: int) -> list[Place]:
        step, part = divmod(number, -(-self.local // self.chunk))
        epoch, step = divmod(step, size_of(self.order, self.length) // self.batch_size)
        rows = range(part * self.chunk, min((part + 1) * self.chunk, self.local))
        start = step * self.batch_size + self.process_index * self.local
        samples = epoch_of(self.order, self.seed, epoch, self.length)
        return [Place(row, epoch, *samples.at(start + row)) for row in rows]


@dataclasses.dataclass(frozen=True)
class EvalPlan:
    """The samples in order, once; host p has rows p*b..(p+1)*b of each global batch, the last may lack some."""

    indices: Int[np.ndarray, " n"]
    batch_size: int
    local: int
    process_index: int
    chunk: int

    def __call__(self, number: int) -> list[Place]:
        step, part = divmod(number, -(-self.local // self.chunk))
        start = step * self.batch_size + self.process_index * self.local
        rows = range(part * self.chunk, min((part + 1) * self.chunk, self.local, len(self.indices) - start))
        return [Place(row, 0, int(self.indices[start + row])) for row in rows]


def _stack(images: list[Any]) -> Any:
    """Images of the same shape as one array; tuples of views as a tuple of arrays."""
    if isinstance(images[0], tuple):
        return tuple(_stack(list(views)) for views in zip(*images, strict=True))
    shapes = {np.shape(image) for image in images}
    if len(shapes) > 1:
        refuse_shapes(*sorted(shapes)[:2])
    return np.stack(images)


def refuse_shapes(one: tuple[int, ...], other: tuple[int, ...]) -> None:
    raise ConfigError(
        f"the images of a batch differ in shape, {list(one)} and {list(other)}: end the pipeline with a transform that "
        "gives one size, such as RandomResizedCrop, CenterCrop or Resize"
    )


def _portable(error: Exception) -> Exception:
    """The exception in a form that crosses from a worker process: its traceback as a note, and able to be pickled."""
    if multiprocessing.parent_process() is None:
        return error
    note = "".join(traceback.format_exception(error))
    try:
        error = pickle.loads(pickle.dumps(error))
    except Exception:  # an exception with its own arguments may pickle badly
        error = RuntimeError(f"{type(error).__name__}: {error}")
    error.add_note(f"In a worker process:\n{note}")
    return error
