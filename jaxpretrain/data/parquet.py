"""Parquet files of images, as Hugging Face's `datasets` writes them."""

from __future__ import annotations

import json
import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int32

from jaxpretrain.build import ConfigError, nearest
from jaxpretrain.data.base import Sample, Source, read_classes
from jaxpretrain.data.decode import BadImage
from jaxpretrain.data.shards import expand_files

SLOW = 32 << 20  # bytes of a row group from which on reading at random is a waste worth a word

logger = logging.getLogger(__name__)


class ParquetDataset(Source):
    """Encoded images in Parquet files, with random access.

    An image is a struct `{bytes, path}`, Hugging Face's feature `Image`, or plain binary. Class names come from the
    schema's `huggingface` metadata.

    Parquet is read a row group at a time: for one image at random all its row group is read and decompressed. Of images of
    110 KB that takes 0.3, 1.4, 9 and 43 ms of a core in row groups of 1, 10, 100 and 1000 rows, and as much from the disk;
    0.1 ms from ArrayRecord, and decoding takes 3. So `python -m jaxpretrain.tools.folder_to_array_record` is worth its while
    before training for long on large row groups. The last few groups are kept, and reading in order reads each once.

    Args:
        paths: a file, a pattern with wildcards or braces, a folder (all `*.parquet` in it and below), or a list of these.
        data_root: folder to which relative `paths` refer.
        split: of several splits take this: files `<split>-00000-of-00004.parquet`, or those in a folder `<split>`.
        image_key, label_key: columns; `label_key=None` for data without labels.
        classes: names of the classes, or a text file with one per line; by default what the files say.
        num_classes: number of classes where there are no names; the largest label + 1 by default.
        cached_groups: row groups kept in memory, by all threads together.
        common: `indices` and others, see Source.

    Raises:
        ConfigError: pyarrow is missing; no such files, columns or split; files that differ, or are damaged; a label that is
            no class.
    """

    per_sample = ("labels", "_rows")

    def __init__(
        self,
        paths: str | Sequence[str],
        data_root: str = "",
        split: str = "",
        image_key: str = "image",
        label_key: str | None = "label",
        classes: Sequence[str] | str | None = None,
        num_classes: int | None = None,
        cached_groups: int = 4,
        **common: Any,
    ):
        parquet = _pyarrow_parquet()
        self.files = expand_files("ParquetDataset", paths, data_root, ".parquet", split)
        self._image_key = image_key
        names: Sequence[str] | None = None
        starts, where, labels, largest = [0], [], [], 0
        for number, path in enumerate(self.files):
            try:
                file = parquet.ParquetFile(path)
            except Exception as error:  # pyarrow has a dozen kinds
                raise ConfigError(f"ParquetDataset: cannot read {os.path.abspath(path)}: {error}") from error
            with file:
                schema = file.schema_arrow
                for key, option in ((image_key, "image_key"), (label_key, "label_key")):
                    if key is not None and key not in schema.names:
                        raise ConfigError(
                            f"ParquetDataset: {path} has no column {key!r} ({option}).{nearest(key, schema.names)}"
                        )
                self._check_image(schema.field(image_key).type, path)
                names = names or (class_names(schema.metadata, label_key) if label_key else None)
                for group in range(file.num_row_groups):
                    about = file.metadata.row_group(group)
                    starts.append(starts[-1] + about.num_rows)
                    where.append((number, group))
                    largest = max(largest, about.total_byte_size)
                if label_key is not None:
                    labels.append(self._labels(file, label_key, path))
        self._starts, self._where = np.array(starts), np.array(where, np.int32).reshape(-1, 2)
        self.classes = read_classes(names if classes is None else classes)
        total = starts[-1]
        if not total:
            raise ConfigError(f"ParquetDataset: {self.files[0]} (of {len(self.files)} files) has no rows")
        self.labels = np.concatenate(labels) if labels else np.full(total, -1, np.int32)
        self._num_classes = None
        if label_key is not None and self.labels.max() >= 0:
            most = int(self.labels.max()) + 1
            self._num_classes = num_classes or (len(self.classes) if self.classes else most)
            if most > self._num_classes:
                raise ConfigError(
                    f"ParquetDataset: labels up to {most - 1} in {self.files[0]}, ... do not fit {self._num_classes} classes"
                )
        if largest > SLOW:
            logger.warning(
                "%s, ... has row groups of up to %d MiB, and reading one image at random reads all of its group; for training, "
                "convert once with python -m jaxpretrain.tools.folder_to_array_record",
                self.files[0],
                largest >> 20,
            )
        self._cached_groups = max(1, cached_groups)
        self._rows = np.arange(total)
        self._start_cache()
        super().__init__(**common)

    @staticmethod
    def _check_image(kind: Any, path: str) -> None:
        import pyarrow as pa

        if pa.types.is_struct(kind):
            if kind.get_field_index("bytes") >= 0:
                return
        elif pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
            return
        raise ConfigError(
            f"ParquetDataset: the images of {path} are {kind}; expected a struct with `bytes`, or binary (image_key)"
        )

    @staticmethod
    def _labels(file: Any, key: str, path: str) -> Int32[np.ndarray, " n"]:
        """-1 where there is none, as in test splits."""
        import pyarrow as pa

        column = file.read(columns=[key]).column(key)
        if not pa.types.is_integer(column.type):
            raise ConfigError(
                f"ParquetDataset: the labels of {path} are {column.type}, not integers (label_key={key!r}); label_key=None "
                "for no labels"
            )
        return column.fill_null(-1).to_numpy().astype(np.int32)

    def _start_cache(self) -> None:
        self._cache: OrderedDict[int, _Group] = OrderedDict()
        self._metadata: dict[int, Any] = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_cache", "_metadata", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start_cache()

    @property
    def num_classes(self) -> int | None:
        return self._num_classes

    def __len__(self) -> int:
        return len(self._rows)

    def name(self, index: int) -> str:
        row = int(self._rows[index])
        group = int(np.searchsorted(self._starts, row, side="right")) - 1
        file, part = self._where[group]
        return f"row {row - self._starts[group]} of row group {part} of {self.files[file]}"

    def __getitem__(self, index: int) -> Sample:
        row = int(self._rows[index])
        group = int(np.searchsorted(self._starts, row, side="right")) - 1
        value = self._group(group)[row - int(self._starts[group])].as_py()
        path = None
        if isinstance(value, dict):
            path, value = value.get("path"), value["bytes"]
        if value is None:
            about = f", only the path {path!r}: write it with the images embedded" if path else ""
            raise BadImage(f"{self.name(index)} has no bytes{about}")
        sample = {"image": value, "label": int(self.labels[index])}
        return {**sample, "path": path} if path else sample

    def _group(self, number: int) -> Any:
        """The image column of a row group. Threads that want the same one read it once; nobody else waits for them."""
        with self._lock:
            group = self._cache.setdefault(number, _Group())
            self._cache.move_to_end(number)
            while len(self._cache) > self._cached_groups:
                self._cache.popitem(last=False)
        with group.lock:
            if group.column is None:
                group.column = self._read(*map(int, self._where[number]))
            return group.column

    def _read(self, file: int, group: int) -> Any:
        parquet = _pyarrow_parquet()
        try:
            about = self._metadata.get(file)  # to read it takes longer than an image, where there are many row groups
            if about is None:
                about = self._metadata[file] = parquet.read_metadata(self.files[file])
            with parquet.ParquetFile(self.files[file], metadata=about) as opened:
                return opened.read_row_group(group, columns=[self._image_key], use_threads=False).column(0)
        except Exception as error:  # pyarrow has a dozen kinds
            raise BadImage(f"{self.files[file]}, row group {group}: {error}") from error


class _Group:
    """A row group in memory, or on its way there."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.column: Any = None


def class_names(metadata: dict[bytes, bytes] | None, key: str) -> tuple[str, ...] | None:
    """The names of the `ClassLabel` called `key` in the metadata of a schema."""
    try:
        about = json.loads((metadata or {})[b"huggingface"])
        names = about["info"]["features"][key]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    if isinstance(names, dict):  # as dataset cards have it: {"0": "cat", "1": "dog"}
        names = [names[i] for i in sorted(names, key=int)]
    return tuple(map(str, names)) if names else None


def _pyarrow_parquet() -> Any:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise ConfigError("ParquetDataset needs pyarrow: pip install 'jaxpretrain[parquet]'") from error
    return parquet
