"""What a data source is, random access to (image, label) by position; and what a transform on the host is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Int, Int8, Integer, Shaped, UInt8

from jaxpretrain.build import ConfigError, nearest

Sample = dict[str, Any]

# Of one sample: an int (-1 where unknown); int8 [classes] of data with several labels each (1: there, 0: not there, -1:
# not counted); or these by the names of tasks, each of which may be missing.
Label = int | Int8[np.ndarray, " c"] | Mapping[str, Any]


class Source:
    """Base of the data sources. Any object with `__len__` and `__getitem__` serves too; what else is here is optional.

    `source[i]` is a dict: `image` (encoded bytes, or uint8 pixels [H,W,3]), `label` (see `Label`), and optionally
    `path`. It must be safe to call from several threads, and the object must pickle, for worker processes.

    The arguments are those that all data sets have. A subclass takes them as `**common` and hands them on at the end of
    its own constructor, when `per_sample` names what it has read: `super().__init__(**common)`.

    Args:
        indices: keep only a part: the first n samples, the last n of a negative number, or those of a sequence, in its
            order.
        pipeline: of MMPretrain's configs; refused unless empty, as it has its place beside the data set here.
        test_mode, lazy_init, serialize_data, max_refetch: of MMPretrain's configs; they mean nothing here.
    """

    in_memory: bool = False  # pixels are at hand: worker processes would only add cost
    classes: tuple[str, ...] | None = None
    labels: Any = None  # of all samples: int [N], int8 [N, classes], or these by task; None if they are not at hand
    per_sample: ClassVar[tuple[str, ...]] = ("labels",)  # the attributes that `indices` makes shorter

    def __init__(
        self,
        indices: int | Sequence[int] | None = None,
        pipeline: Sequence[Any] | None = None,
        test_mode: bool = False,
        lazy_init: bool = False,
        serialize_data: bool = True,
        max_refetch: int = 1000,
    ):
        if pipeline:
            raise ConfigError(
                f"{type(self).__name__}: a pipeline does not belong to the data set but beside it, as "
                "config.data.train.pipeline (or .val, ...) next to config.data.train.dataset"
            )
        if indices is not None:
            kept = positions(indices, len(self))
            for name in self.per_sample:
                setattr(self, name, take(getattr(self, name), kept))

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> Sample:
        raise NotImplementedError

    @property
    def num_classes(self) -> int | None:
        """Number of classes; None for data without labels."""
        return len(self.classes) if self.classes is not None else None

    def name(self, index: int) -> str:
        """What to call sample `index` in a message; found without reading it."""
        return f"{type(self).__name__}[{index}]"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} samples, {self.num_classes} classes)"


class InMemory(Source):
    """Pixels and labels in two arrays: images uint8 [N,H,W] or [N,H,W,3], labels int [N]."""

    in_memory = True
    per_sample = ("images", "labels")

    def __init__(
        self,
        images: Shaped[np.ndarray, "n h w *c"],
        labels: Int[np.ndarray, " n"],
        /,
        classes: Sequence[str] | None = None,
        **common: Any,
    ):
        if len(images) != len(labels):
            raise ConfigError(f"{len(images)} images but {len(labels)} labels")
        self.images = images
        self.labels = np.asarray(labels, np.int32)
        self.classes = tuple(classes) if classes is not None else None
        super().__init__(**common)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Sample:
        return {"image": self.images[index], "label": int(self.labels[index])}


def positions(indices: int | Sequence[int], length: int) -> Int[np.ndarray, " n"]:
    """The samples that `indices` names (see Source), each from 0 to length - 1.

    Raises:
        ConfigError: there are none, or not so many; not integers.
    """
    if isinstance(indices, int | np.integer):
        kept = np.arange(length)[: int(indices)] if indices >= 0 else np.arange(length)[int(indices) :]
    else:
        kept = np.asarray(list(indices))
    if not kept.size:
        raise ConfigError(f"indices={indices!r} leave none of the {length} samples")
    if kept.ndim != 1 or not np.issubdtype(kept.dtype, np.integer):
        raise ConfigError(f"indices must be an integer or a sequence of integers, got {indices!r}")
    if kept.min() < -length or kept.max() >= length:
        raise ConfigError(f"indices {kept.min()}..{kept.max()} do not fit the {length} samples")
    return kept % length


def take(values: Any, rows: Integer[np.ndarray, " n"]) -> Any:
    """Those rows of what a source has of each sample: an array, a list, a mapping of these; None stays None."""
    if isinstance(values, Mapping):
        return {name: take(value, rows) for name, value in values.items()}
    if isinstance(values, list):
        return [values[row] for row in rows]
    return None if values is None else values[rows]


def read_classes(classes: Sequence[str] | str | Path | None) -> tuple[str, ...] | None:
    """Class names given as a sequence, or as the name of a text file with one class per line."""
    if isinstance(classes, str | Path):
        path = Path(classes).expanduser()
        if not path.is_file():
            raise ConfigError(
                f"classes={str(classes)!r}: no such file; give a list of names, or a file with one name per line"
            )
        return tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    return None if classes is None else tuple(classes)


def check_split(name: str, split: str, valid: Sequence[str]) -> None:
    """Raises ConfigError unless `split` is one of `valid`."""
    if split not in valid:
        raise ConfigError(f"{name} has no split {split!r}.{nearest(split, valid)}")


class Transform:
    """Base of the transforms: draws, then applies. Of several views, each gets its own draw."""

    def draw(self, rng: np.random.Generator, height: int, width: int) -> Any:
        """Parameters for an image of this size; None where nothing is random."""
        return None

    def apply(self, image: UInt8[np.ndarray, "h w 3"], parameters: Any) -> UInt8[np.ndarray, "h w 3"]:
        raise NotImplementedError

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        image = sample["image"]
        if isinstance(image, tuple):
            views = tuple(self.apply(view, self.draw(rng, *view.shape[:2])) for view in image)
            return {**sample, "image": views}
        return {**sample, "image": self.apply(image, self.draw(rng, *image.shape[:2]))}
