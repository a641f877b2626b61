"""Building a cache of images: its size is told first, it goes on where it was killed, and appears when it is complete."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import shutil
import socket
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from jaxpretrain import __version__
from jaxpretrain.build import ConfigError
from jaxpretrain.cli import ExpectedFailure
from jaxpretrain.data import cache
from jaxpretrain.data.cache import BAD, ENTRY, LABELLED, NAMED
from jaxpretrain.data.cache_formats import FORMATS
from jaxpretrain.data.decode import BadImage, as_rgb
from jaxpretrain.data.image_ops import Image, resize
from jaxpretrain.data.subset import name_of

SECTION = 512  # images after which a killed build can go on
PROBES = 128  # images whose size is measured beforehand
MARGIN = 2**30  # bytes of the disk that are left free

logger = logging.getLogger(__name__)


def build_cache(
    dataset: Any,
    folder: str | os.PathLike,
    format: str = "yuv420",
    short_edge: int | None = 256,
    interpolation: str = "bicubic",
    threads: int | None = None,
    rebuild: bool = False,
) -> None:
    """Makes the cache of a data set in `folder`; does nothing where it is complete already.

    A build that was killed goes on after its last finished section of 512 images. Of several processes that build the same
    cache one works and the others wait for it.

    Args:
        dataset: a source.
        folder: of the cache. While it is built, the files are in `<folder>.building`; `<folder>.lock` stays.
        format, short_edge, interpolation: see CachedDataset.
        threads: that decode; as many as there are cores by default.
        rebuild: delete what is there first, finished or not.

    Raises:
        ConfigError: the folder holds a cache of something else and `rebuild` is False; the data set is empty.
        ExpectedFailure: the disk is too small or full, or images cannot be read for other reasons than their own.
    """
    folder = Path(folder).expanduser().absolute()
    settings = cache.cache_settings(format, short_edge, interpolation)
    if not len(dataset):
        raise ConfigError(f"{dataset!r} is empty: there is nothing to cache")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        if rebuild:
            for old in (folder, cache.building(folder)):
                shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            _check_same(cache.read_header(folder), settings, dataset, folder)
            return
        _Builder(dataset, folder, settings, threads or os.cpu_count() or 1).run()


def _check_same(header: Mapping[str, Any], settings: Mapping[str, Any], dataset: Any, folder: Path) -> None:
    if different := cache.differences(header, settings, dataset):
        raise ConfigError(
            f"{folder} holds a cache of something else: {'; '.join(different)}. Choose another folder, or replace it with "
            "--rebuild"
        )


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Only one process at a time; the system frees the lock when the process ends, in whatever way."""
    with open(folder.with_name(folder.name + ".lock"), "a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            logger.info(
                "the cache %s is being built by %s; waiting for it", folder, lock.read().strip() or "another process"
            )
            fcntl.flock(lock, fcntl.LOCK_EX)
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
        yield


class _Builder:
    """The work itself, in `<folder>.building`."""

    def __init__(self, dataset: Any, folder: Path, settings: Mapping[str, Any], threads: int):
        self.dataset, self.folder, self.settings, self.threads = dataset, folder, dict(settings), threads
        self.place, self.labels = cache.building(folder), cache.labels_at_hand(dataset)

    def run(self) -> None:
        done, start = self._resume()
        with ThreadPoolExecutor(self.threads) as pool:
            self._announce(pool, done)
            with open(self.place / "images", "ab") as images, open(self.place / "index", "ab") as index:
                try:
                    self._write(pool, images, index, done, start)
                except OSError as error:
                    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                        raise
                    raise ExpectedFailure(
                        f"the disk of {self.folder} is full. What is finished is kept in {self.place}: make room and run the "
                        "same command again, which goes on from there, or delete it"
                    ) from error
        self._finish()

    def _resume(self) -> tuple[int, int]:
        """(images, bytes) that are finished; whatever lies behind them is cut off."""
        header, index_path = self.place / "header.json", self.place / "index"
        if not header.exists() or not index_path.exists() or not index_path.stat().st_size:
            shutil.rmtree(self.place, ignore_errors=True)
            self.place.mkdir()
            for name in ("images", "index"):
                (self.place / name).touch()
            self._write_header({})
        _check_same(cache.read_header(self.place), self.settings, self.dataset, self.place)
        with open(self.place / "images", "r+b") as images, open(index_path, "r+b") as index:
            data = index.read()
            entries = np.frombuffer(data[: len(data) // ENTRY.itemsize * ENTRY.itemsize], ENTRY)
            done = len(entries) if len(entries) == len(self.dataset) else len(entries) // SECTION * SECTION
            while done and not _intact(images, entries[max(0, done - SECTION) : done]):
                done = (done - 1) // SECTION * SECTION
            start = _end(entries[done - 1]) if done else 0
            images.truncate(start)
            index.truncate(done * ENTRY.itemsize)
        if done:
            logger.info("going on after %d of %d images in %s", done, len(self.dataset), self.place)
        return done, start

    def _announce(self, pool: ThreadPoolExecutor, done: int) -> None:
        """Tells the size, by a few images from all over the data set; refuses if it does not fit."""
        count = len(self.dataset)
        rows = np.unique(np.linspace(0, count - 1, min(PROBES, count)).astype(int))
        probes = list(pool.map(self._encode, map(int, rows)))
        sizes = np.array([len(image) + len(rest) for image, rest, *_, flags, _ in probes if not flags & BAD])
        if not len(sizes):
            raise ExpectedFailure(
                f"none of {len(probes)} images from all over {self.dataset!r} can be read; the last: "
                f"{json.loads(probes[-1][1])['bad']}"
            )
        # Of images so different in size as those of a collection from the web, a few tell only about how much.
        doubt = 2 * sizes.std() / np.sqrt(len(sizes)) if len(probes) < count else 0
        left = count - done
        needed, free = int(left * (sizes.mean() + doubt + ENTRY.itemsize)), shutil.disk_usage(self.place).free
        logger.info(
            "cache of %d images as %s%s in %s: about %s%s, %s free",
            count,
            self.settings["format"],
            f" with a short edge of {self.settings['short_edge']}" if self.settings["short_edge"] else "",
            self.folder,
            _gigabytes(count * (sizes.mean() + ENTRY.itemsize)),
            f", of which {left / count:.0%} are missing" if done else "",
            _gigabytes(free),
        )
        if needed + MARGIN > free:
            raise ExpectedFailure(
                f"the cache needs up to {_gigabytes(needed)} in {self.folder.parent}, where {_gigabytes(free)} are free, of "
                f"which {_gigabytes(MARGIN)} are to stay so: choose another disk, a smaller short_edge, or the format "
                f"yuv420 or jpeg instead of {self.settings['format']}"
            )

    def _write(self, pool: ThreadPoolExecutor, images: BinaryIO, index: BinaryIO, done: int, start: int) -> None:
        from tqdm import tqdm

        count = len(self.dataset)
        encoded = _ahead(pool, self._encode, range(done, count), 4 * self.threads)
        section, failures = [], []
        with tqdm(initial=done, total=count, unit=" images", desc=f"cache {self.folder.name}", disable=None) as bar:
            for row, (image, rest, height, width, flags, failure) in enumerate(encoded, done):
                images.write(image)
                images.write(rest)
                crc = zlib.crc32(rest, zlib.crc32(image))
                section.append((start, len(image), len(rest), crc, height, width, flags))
                start += len(image) + len(rest)
                failures += [failure] if failure else []
                bar.update()
                if (row + 1) % SECTION and row + 1 < count:
                    continue
                if len(failures) > max(8, len(section) // 4):
                    raise ExpectedFailure(
                        f"{len(failures)} of {len(section)} files up to {name_of(self.dataset, row)} could not be "
                        f"read ({failures[-1]}): is the data set's disk there? Run the same command again to go on"
                    )
                _sync(images)  # before the index, so that what the index tells of is there
                index.write(np.array(section, ENTRY).tobytes())
                _sync(index)
                section, failures = [], []

    def _encode(self, row: int) -> tuple[bytes, bytes, int, int, int, str]:
        """Image, the rest of the sample, height, width, flags, and why the file could not be read, if it was that."""
        sample, bad, failure, pixels = {}, "", "", None
        try:
            sample = dict(self.dataset[row])
            image = np.asarray(as_rgb(sample.pop("image")))
            pixels = shorten(image, self.settings["short_edge"], self.settings["interpolation"])
        except BadImage as reason:
            bad = str(reason)
        except OSError as error:
            bad = failure = f"{type(error).__name__}: {error.strerror or error}"
        sample, flags = _plain(sample), BAD if bad else 0
        if sample.get("path") == name_of(self.dataset, row):
            flags |= NAMED
            del sample["path"]
        if "label" in sample and sample["label"] == _plain(cache.label_at(self.labels, row)):
            flags |= LABELLED
            del sample["label"]
        sample |= {"bad": bad} if bad else {}
        try:
            rest = json.dumps(sample).encode() if sample else b""
        except TypeError as error:
            raise ConfigError(
                f"{name_of(self.dataset, row)}: a cache holds of a sample what JSON can say besides its image; "
                f"{error} (keys: {', '.join(sample)})"
            ) from error
        if pixels is None:
            return b"", rest, 0, 0, flags, failure
        return FORMATS[self.settings["format"]].encode(pixels), rest, *pixels.shape[:2], flags, ""

    def _finish(self) -> None:
        index = np.fromfile(self.place / "index", ENTRY)
        self._write_header(
            {
                "bytes": {"images": (self.place / "images").stat().st_size, "index": index.nbytes},
                "index_crc": zlib.crc32(index.tobytes()),
            }
        )
        os.rename(self.place, self.folder)
        _sync_folder(self.folder.parent)
        bad = int((index["flags"] & BAD > 0).sum())
        logger.info(
            "cache %s is complete: %s, %d images%s",
            self.folder,
            _gigabytes(_end(index[-1])),
            len(index),
            f", {bad} of them bad" if bad else "",
        )

    def _write_header(self, more: Mapping[str, Any]) -> None:
        header = {
            "version": cache.VERSION,
            "settings": self.settings,
            "dataset": cache.identity(self.dataset),
            "of": repr(self.dataset),
            "by": f"jaxpretrain {__version__}",
            "date": time.strftime("%Y-%m-%d"),
            **more,
        }
        partial = self.place / "header.json.partial"
        with open(partial, "wb") as file:
            file.write(json.dumps(header, indent=2).encode())
            _sync(file)
        os.replace(partial, self.place / "header.json")
        _sync_folder(self.place)


def shorten(image: Image, short_edge: int | None, interpolation: str = "bicubic") -> Image:
    """The image with its shorter edge reduced to `short_edge` pixels by Pillow's antialiased filter; never enlarged.

    The other edge is rounded to the nearest.
    """
    shorter = min(image.shape[:2])
    if short_edge is None or shorter <= short_edge:
        return image
    height, width = (max(1, round(length * short_edge / shorter)) for length in image.shape[:2])
    return resize(image, (width, height), "pillow", interpolation)


def _ahead(pool: ThreadPoolExecutor, function: Callable[[int], Any], rows: Sequence[int], count: int) -> Iterator[Any]:
    """`function` of each row in order, at most `count` of them begun or waiting: large images would fill the memory."""
    waiting: deque[Any] = deque()
    for row in rows:
        waiting.append(pool.submit(function, row))
        if len(waiting) >= count:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _intact(images: BinaryIO, entries: np.ndarray) -> bool:
    """Whether these images lie in the file as they were written."""
    for entry in entries:
        images.seek(int(entry["start"]))
        if zlib.crc32(images.read(int(entry["bytes"]) + int(entry["rest"]))) != entry["crc"]:
            return False
    return True


def _end(entry: np.void) -> int:
    return int(entry["start"]) + int(entry["bytes"]) + int(entry["rest"])


def _plain(value: Any) -> Any:
    """For JSON: arrays as lists."""
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
