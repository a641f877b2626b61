"""WebDataset: images in tar shards, read at random."""

from __future__ import annotations

import logging
import os
import re
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO

import numpy as np

from jaxpretrain.build import ConfigError
from jaxpretrain.data.base import Sample, Source, read_classes
from jaxpretrain.data.decode import BadImage
from jaxpretrain.data.shards import expand_files
from jaxpretrain.data.tar_index import ShardIndex, Wanted, index_shard

IMAGES = ("jpg", "jpeg", "png", "webp", "ppm", "bmp", "tif", "tiff", "gif")
_OPEN = 256  # shards kept open; further ones are opened for each sample

logger = logging.getLogger(__name__)


class WebDataset(Source):
    """Images in uncompressed tar shards, as the webdataset package writes them, with random access.

    Members of a tar file that follow each other with the same name up to the first dot are one sample: `n01/0001.jpg` and
    `n01/0001.cls`. At the first use every shard is walked over once, and where its images lie is kept in a small file beside
    it, `<shard>.<hash>.index`; later starts read that alone, and notice when a shard has changed.

    Args:
        shards: a pattern with braces (`train-{000000..000146}.tar`, `{train,extra}-{00..15}.tar`) or wildcards, a folder
            (all `*.tar` in it and below), or a list of these. Wildcards stand for names in order; nothing else is sorted.
        data_root: folder to which relative `shards` refer.
        label: where the label is: `cls` (a member with an integer), `txt` (an integer or the name of a class), `json:KEY`
            (KEY in a JSON member, `json:annotation.class` for one inside another; an integer or a name), or any other
            extension. None for no labels.
        image: extensions of the image member; the first that a sample has is taken.
        classes: names of the classes, or a text file with one per line.
        num_classes: number of classes where there are no names; the largest label + 1 by default.
        index_folder: where the indices are kept. If neither it nor the shards' own folder can be written to, they are
            built at every start.
        common: `indices` and others, see Source.

    Raises:
        ConfigError: no such shards; compressed, damaged or truncated ones; samples without image or label; a label that is
            no class.
    """

    per_sample = ("labels", "_shard", "_offset", "_size", "_keys")

    def __init__(
        self,
        shards: str | Sequence[str],
        data_root: str = "",
        label: str | None = "cls",
        image: Sequence[str] = IMAGES,
        classes: Sequence[str] | str | None = None,
        num_classes: int | None = None,
        index_folder: str | None = None,
        **common: Any,
    ):
        self.shards = expand_files("WebDataset", shards, data_root, ".tar")
        self.classes = read_classes(classes)
        extension, _, key = (label or "").partition(":")
        if extension.endswith("json") and not key:
            raise ConfigError(f"WebDataset: label={label!r} must say which key of the JSON, such as 'json:label'")
        extensions = tuple(e.lower().lstrip(".") for e in ([image] if isinstance(image, str) else image))
        wanted = Wanted(extensions, extension.lower().lstrip("."), key)
        folder = os.path.expanduser(index_folder) if index_folder else None
        with ThreadPoolExecutor(min(32, len(self.shards))) as pool:  # hides the latency of disks
            found = list(pool.map(lambda shard: index_shard(shard, wanted, folder), self.shards))
        if lost := sum(index.without for index in found):
            logger.warning("%d samples of %s, ... have no image and are left out", lost, self.shards[0])
        self._keys = np.concatenate([index.keys for index in found])
        self._offset = np.concatenate([index.offset for index in found])
        self._size = np.concatenate([index.size for index in found])
        self._shard = np.repeat(np.arange(len(found), dtype=np.int32), [len(index.keys) for index in found])
        self.labels = self._read_labels(found, label) if label else np.full(len(self._keys), -1, np.int32)
        self._num_classes = None
        if label:
            most = int(self.labels.max()) + 1
            self._num_classes = num_classes or (len(self.classes) if self.classes else most)
            if self.labels.min() < 0 or most > self._num_classes:
                raise ConfigError(
                    f"WebDataset: labels {self.labels.min()}..{most - 1} of {self.shards[0]}, ... do not fit "
                    f"{self._num_classes} classes"
                )
        self._open_again()
        super().__init__(**common)

    def _read_labels(self, found: Sequence[ShardIndex], label: str) -> np.ndarray:
        texts = np.concatenate([index.labels for index in found])
        if (missing := np.flatnonzero(texts == b"")).size:
            first = missing[0]
            extensions = {extension for index in found for extension in index.seen}
            raise ConfigError(
                f"WebDataset: {len(missing)} of {len(texts)} samples have no label ({label!r}), the first is "
                f"{os.fsdecode(self._keys[first])} in {self.shards[self._shard[first]]}; members found: "
                f"{', '.join(sorted(extensions)[:20])}. Say where it is with label=..., or label=None for no labels"
            )
        distinct, inverse = np.unique(texts, return_inverse=True)
        return np.array([self._label_of(text.decode(errors="replace")) for text in distinct], np.int32)[inverse]

    def _label_of(self, text: str) -> int:
        if re.fullmatch(r"-?\d{1,9}", text):
            return int(text)
        if self.classes is None:
            raise ConfigError(
                f"WebDataset: the label {text[:60]!r} is no integer; give the names of the classes in order, classes=[...] or "
                "a text file with one per line"
            )
        if text not in self.classes:
            raise ConfigError(f"WebDataset: the label {text[:60]!r} is none of the {len(self.classes)} classes")
        return self.classes.index(text)

    def _open_again(self) -> None:
        self._files: dict[int, BinaryIO] = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_files", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open_again()

    @property
    def num_classes(self) -> int | None:
        return self._num_classes

    def __len__(self) -> int:
        return len(self._offset)

    def name(self, index: int) -> str:
        return f"{os.fsdecode(self._keys[index])} in {self.shards[self._shard[index]]}"

    def __getitem__(self, index: int) -> Sample:
        size = int(self._size[index])
        data = self._read(int(self._shard[index]), size, int(self._offset[index]))
        if len(data) != size:
            raise BadImage(f"{len(data)} of {size} bytes; the shard has changed since it was indexed")
        return {"image": data, "label": int(self.labels[index]), "path": os.fsdecode(self._keys[index])}

    def _read(self, shard: int, size: int, offset: int) -> bytes:
        """Thread-safe: `pread` leaves the position in the file alone, and files stay open."""
        file = self._files.get(shard)
        if file is None:
            file = open(self.shards[shard], "rb", buffering=0)  # noqa: SIM115  (kept, or closed with its last reference)
            with self._lock:
                if len(self._files) < _OPEN:
                    file = self._files.setdefault(shard, file)
        return os.pread(file.fileno(), size, offset)
