"""What a data source is, random access to (image, label) by position; and what a transform on the host is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, Shaped, UInt8

from jaxpretrain.build import ConfigError, nearest

Sample = dict[str, Any]


class Source:
    """Base of the data sources. Any object with `__len__` and `__getitem__` serves too; what else is here is optional.

    `source[i]` is a dict: `image` (encoded bytes, or uint8 pixels [H,W,3]), `label` (int, -1 where unknown), and
    optionally `path`. It must be safe to call from several threads, and the object must pickle, for worker processes.
    """

    in_memory: bool = False  # pixels are at hand: worker processes would only add cost
    classes: tuple[str, ...] | None = None

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

    def __init__(
        self,
        images: Shaped[np.ndarray, "n h w *c"],
        labels: Int[np.ndarray, " n"],
        classes: Sequence[str] | None = None,
    ):
        if len(images) != len(labels):
            raise ConfigError(f"{len(images)} images but {len(labels)} labels")
        self.images = images
        self.labels = np.asarray(labels, np.int32)
        self.classes = tuple(classes) if classes is not None else None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Sample:
        return {"image": self.images[index], "label": int(self.labels[index])}


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
