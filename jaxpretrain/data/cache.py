"""A cache of decoded images on local disk, shortened once: what is read each epoch are the pixels of the crops.

    config.data.train.dataset = dict(type='CachedDataset', dataset=dict(type='ImageNet', ...), folder='/local/train')

    python -m jaxpretrain.tools.build_cache --config=configs/mae.py

A cache is a folder of three files: `images`, all images one after another; `index`, a record of `ENTRY` for each; and
`header.json`, which says what of. It is built beside its place and renamed when it is complete (`cache_builder.py`).
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxpretrain import build as registry
from jaxpretrain.build import ConfigError, nearest
from jaxpretrain.data.base import Sample, Source, take
from jaxpretrain.data.cache_formats import FORMATS
from jaxpretrain.data.decode import BadImage
from jaxpretrain.data.image_ops import PILLOW_FILTERS
from jaxpretrain.data.labels import canonical, column, put
from jaxpretrain.data.listing import Paths
from jaxpretrain.data.subset import name_of

VERSION = 1

# Where an image begins in `images`, how many bytes it has, and behind it how many of what else the sample has (JSON; of a
# bad image also the reason, as `bad`); the CRC-32 of all these bytes; its size in pixels; flags.
ENTRY = np.dtype(
    [
        ("start", "<u8"),
        ("bytes", "<u4"),
        ("rest", "<u4"),
        ("crc", "<u4"),
        ("height", "<u4"),
        ("width", "<u4"),
        ("flags", "<u4"),
    ]
)
BAD, NAMED, LABELLED = 1, 2, 4  # flags: cannot be decoded; the data set knows its path, and its label, without reading

SIZES = 64  # samples whose number of bytes is part of what a data set is known by


class CachedDataset(Source):
    """Another data set, its images shortened and decoded in a cache.

    Samples, labels, names and order are the data set's; only `image` comes from the cache, as pixels that are read when a
    crop asks for them (format `jpeg`: as encoded bytes). Labels are read from the data set each time where it has them at
    hand, so they may change; its images may not. Images that could not be decoded stay bad, with their reason.

    Every host needs all of it on a disk of its own, as each epoch's order is over the whole data set.

    Args:
        dataset: the whole one.
        folder: of the cache, on a local disk; one for each data set and split.
        format: `yuv420` (1.5 bytes per pixel, errors of a few grey levels where colours change sharply), `raw` (3 bytes,
            exact) or `jpeg` (least space, decoded each time). 1,281,167 images of ImageNet at 256 pixels: about 165,
            330 and 50 GB.
        short_edge: pixels to which the shorter edge is reduced, never enlarged; None keeps the images as they are.
        interpolation: Pillow's filter for that: antialiased, `bicubic` is the kernel with a = -0.5.
        build: make the cache now if there is none; otherwise that is an error.
        common: `indices` and others, see Source.

    Raises:
        ConfigError: there is no cache and `build` is False; it is one of another data set, of other settings or of
            another version of the format; it is damaged.
    """

    per_sample = ("_rows",)

    def __init__(
        self,
        dataset: Mapping[str, Any] | Source,
        folder: str,
        format: str = "yuv420",
        short_edge: int | None = 256,
        interpolation: str = "bicubic",
        build: bool = False,
        **common: Any,
    ):
        self.dataset = registry.build(dataset)
        self.folder = Path(folder).expanduser().absolute()
        settings = cache_settings(format, short_edge, interpolation)
        if build and not self.folder.exists():
            from jaxpretrain.data.cache_builder import build_cache

            build_cache(self.dataset, self.folder, **settings)
        self.header = read_header(self.folder)
        if different := differences(self.header, settings, self.dataset):
            raise ConfigError(
                f"the cache {self.folder} is not of this data set and settings: {'; '.join(different)}. Choose another "
                "folder, or make this one anew with python -m jaxpretrain.tools.build_cache --rebuild"
            )
        self.classes = getattr(self.dataset, "classes", None)
        self._open()
        self._rows = np.arange(len(self.dataset))
        super().__init__(**common)

    def _open(self) -> None:
        self._index, self._images = open_files(self.folder, self.header)
        self._labels = labels_at_hand(self.dataset)
        if self._labels is None and (self._index["flags"] & LABELLED).any():
            raise ConfigError(
                f"the cache {self.folder} left the labels to a data set that has them at hand, and {self.dataset!r} does not"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_index", "_images", "_labels")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._open()

    @property
    def num_classes(self) -> int | None:
        return getattr(self.dataset, "num_classes", None)

    @property
    def labels(self) -> Any:
        """The data set's, or where it does not have them at hand, those in the cache."""
        if self._labels is None:
            self._labels = self._stored_labels()
        return take(self._labels, self._rows)

    def _stored_labels(self) -> Any:
        found = [self._rest(row).get("label") for row in range(len(self._index))]
        known = [row for row, label in enumerate(found) if label is not None]
        labels = column(canonical(found[known[0]]) if known else -1, len(found))
        put(labels, known, [canonical(found[row]) for row in known])
        return labels

    def __len__(self) -> int:
        return len(self._rows)

    def name(self, index: int) -> str:
        return name_of(self.dataset, int(self._rows[index]))

    def __getitem__(self, index: int) -> Sample:
        row = int(self._rows[index])
        start, length, _, _, height, width, flags = self._index[row].item()
        sample = self._rest(row)
        if flags & BAD:
            raise BadImage(sample["bad"])
        if flags & LABELLED:
            sample["label"] = label_at(self._labels, row)
        elif "label" in sample:
            sample["label"] = canonical(sample["label"])
        if flags & NAMED:
            sample["path"] = name_of(self.dataset, row)
        read = functools.partial(self._read_image, start, length)
        return {**sample, "image": FORMATS[self.header["settings"]["format"]].open(read, height, width)}

    def _rest(self, row: int) -> dict[str, Any]:
        """What is stored of a sample besides its pixels."""
        start, length, rest, *_ = self._index[row].item()
        return json.loads(self._read(start + length, rest)) if rest else {}

    def _read_image(self, start: int, length: int, first: int, count: int) -> bytes:
        return self._read(start + first, length - first if count < 0 else count)

    def _read(self, start: int, count: int) -> bytes:
        """Read by offset, at once by any number of threads; a broken disk is an error of this image alone, which memory
        maps would turn into the end of the program.
        """
        file = self._images.fileno()
        try:
            data = os.pread(file, count, start)
            while len(data) < count and (more := os.pread(file, count - len(data), start + len(data))):
                data += more  # one call reads 2 GiB at most
        except OSError as error:
            raise BadImage(f"the cache {self.folder} cannot be read: {error}") from error
        if len(data) != count:
            raise BadImage(f"the cache {self.folder} ends within this image; make it anew")
        return data

    def damaged(self, rows: Sequence[int] | None = None) -> Iterator[int]:
        """Reads everything, or these rows; yields those whose bytes are not what was written."""
        for row in range(len(self._index)) if rows is None else rows:
            start, length, rest, crc, *_ = self._index[row].item()
            try:
                intact = zlib.crc32(self._read(start, length + rest)) == crc
            except BadImage:
                intact = False
            if not intact:
                yield row

    def bad(self) -> dict[str, str]:
        """Name -> reason of all images that could not be decoded when the cache was made."""
        rows = map(int, np.flatnonzero(self._index["flags"] & BAD))
        return {name_of(self.dataset, row): self._rest(row)["bad"] for row in rows}


# ----------------------------------------------------------------------------------------------------------------------
# What a cache is of


def cache_settings(
    format: str = "yuv420", short_edge: int | None = 256, interpolation: str = "bicubic"
) -> dict[str, Any]:
    """The settings that a header holds. Raises ConfigError for values that do not exist."""
    if format not in FORMATS:
        raise ConfigError(f"CachedDataset: there is no format {format!r}.{nearest(str(format), FORMATS)}")
    if interpolation not in PILLOW_FILTERS:
        raise ConfigError(
            f"CachedDataset: Pillow has no interpolation {interpolation!r}.{nearest(str(interpolation), PILLOW_FILTERS)}"
        )
    if short_edge is not None and (not isinstance(short_edge, int) or short_edge < 1):
        raise ConfigError(f"CachedDataset: short_edge={short_edge!r} must be a positive number of pixels, or None")
    return dict(format=format, short_edge=short_edge, interpolation=interpolation)


def identity(dataset: Any) -> dict[str, Any]:
    """What a data set is known by: how many samples, a checksum of their names, and one of the sizes of `SIZES` of them.

    Names count without the folder of the data set, which may move.
    """
    count = len(dataset)
    names = hashlib.sha256()
    paths = getattr(dataset, "_paths", None)
    if isinstance(paths, Paths):  # all at once; asking for each name takes seconds per million
        names.update(paths.tobytes())
    else:
        for row in range(count):
            names.update("/".join(name_of(dataset, row).split("/")[-2:]).encode(errors="surrogateescape") + b"\0")
    rows = np.unique(np.linspace(0, count - 1, min(SIZES, count)).astype(int))
    sizes = [_size(dataset, int(row)) for row in rows]
    return {
        "samples": count,
        "names": names.hexdigest()[:32],
        "sizes": hashlib.sha256(json.dumps(sizes).encode()).hexdigest()[:32],
    }


def _size(dataset: Any, row: int) -> int:
    """Bytes of an encoded image, -1 if it cannot be read."""
    try:
        return os.stat(name_of(dataset, row)).st_size
    except (OSError, ValueError):
        pass
    try:
        image = dataset[row]["image"]
        return int(np.prod(image.shape)) if hasattr(image, "shape") else len(image)
    except (BadImage, OSError):
        return -1


def differences(header: Mapping[str, Any], settings: Mapping[str, Any], dataset: Any) -> list[str]:
    """In words, what a cache differs in from one of these settings and this data set."""
    own = {**settings, **identity(dataset)}
    return [
        f"{name}: {there} there, {own[name]} here"
        for name, there in {**header["settings"], **header["dataset"]}.items()
        if there != own.get(name)
    ]


# ----------------------------------------------------------------------------------------------------------------------
# Its files


def read_header(folder: Path) -> dict[str, Any]:
    """The header of a cache. Raises ConfigError: there is none, or of another version."""
    if not folder.exists():
        partial = " (one is being built, or was interrupted)" if building(folder).exists() else ""
        raise ConfigError(
            f"there is no cache at {folder}{partial}: make it with python -m jaxpretrain.tools.build_cache "
            "--config=RECIPE, which says first how large it will be; or set build=True in the data set"
        )
    try:
        header = json.loads((folder / "header.json").read_text())
        version = header["version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{folder} is not a cache: its header.json cannot be read ({error})") from error
    if version != VERSION:
        raise ConfigError(
            f"the cache {folder} has version {version} of the format, and this library reads version {VERSION}: make it "
            "anew with python -m jaxpretrain.tools.build_cache --rebuild"
        )
    return header


def open_files(folder: Path, header: Mapping[str, Any]) -> tuple[np.ndarray, Any]:
    """(index, file of images). Raises ConfigError where their lengths or the index's checksum are not the header's."""
    index_path, images_path = folder / "index", folder / "images"
    try:
        found = {path.name: path.stat().st_size for path in (index_path, images_path)}
    except OSError as error:
        raise ConfigError(f"the cache {folder} is damaged: {error}; make it anew with --rebuild") from error
    wrong = [
        f"`{name}` has {found[name]} bytes instead of {size}"
        for name, size in header["bytes"].items()
        if found[name] != size
    ]
    # Processes share a memory map; as a plain array it is faster to look things up in.
    index = np.zeros(0, ENTRY) if wrong else np.memmap(index_path, ENTRY, mode="r").view(np.ndarray)
    if not wrong and zlib.crc32(index.tobytes()) != header["index_crc"]:
        wrong = ["the checksum of `index` is wrong"]
    if wrong:
        raise ConfigError(
            f"the cache {folder} is damaged: {', '.join(wrong)}. Make it anew with python -m "
            "jaxpretrain.tools.build_cache --rebuild"
        )
    return index, open(images_path, "rb", buffering=0)


def building(folder: Path) -> Path:
    """Where a cache is built before it is renamed to `folder`."""
    return folder.with_name(folder.name + ".building")


# ----------------------------------------------------------------------------------------------------------------------
# What a data set says of a sample without reading it


def labels_at_hand(dataset: Any) -> Any:
    """The labels of all samples; None where they are to be had by reading the samples alone, as of records."""
    parts = [dataset.dataset] if hasattr(dataset, "dataset") else getattr(dataset, "datasets", [])
    if any(labels_at_hand(part) is None for part in parts):
        return None
    return getattr(dataset, "labels", None)


def label_at(labels: Any, row: int) -> Any:
    """One of `labels_at_hand`; None of None."""
    if isinstance(labels, Mapping):
        return {name: label_at(part, row) for name, part in labels.items()}
    return None if labels is None else canonical(labels[row])
