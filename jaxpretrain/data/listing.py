"""Lists of a million files: found in seconds, kept in little memory."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

THREADS = 8  # a folder on a network's disk answers late: several are asked at once


class Paths(Sequence[str]):
    """File names in one array of bytes, as the file system has them, which any number of threads or processes can read.

    A Python string takes 50 bytes more than its characters, and arrays of fixed width as much for each as for the
    longest.

    Args:
        paths: any iterable, which is run through once.
    """

    def __init__(self, paths: Iterable[str] = ()):
        text, ends = bytearray(), [np.zeros(1, np.int64)]
        for block in _blocks(paths):
            encoded = [os.fsencode(path) for path in block]
            ends.append(np.cumsum([len(path) for path in encoded]) + len(text))
            text += b"".join(encoded)
        self._set(np.frombuffer(text, np.uint8), np.concatenate(ends))

    def _set(self, text: UInt8[np.ndarray, " bytes"], bounds: Int[np.ndarray, " n+1"]) -> None:
        self._text, self._bounds = text, bounds

    @staticmethod
    def join(parts: Sequence[Paths]) -> Paths:
        """One after another."""
        paths, start, bounds = Paths(), 0, [np.zeros(1, np.int64)]
        for part in parts:
            bounds.append(part._bounds[1:] + start)
            start += len(part._text)
        paths._set(np.concatenate([paths._text, *(part._text for part in parts)]), np.concatenate(bounds))
        return paths

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def __getitem__(self, index: Any) -> Any:
        """A name; of an array of positions, or a slice, `Paths`."""
        if isinstance(index, int | np.integer):
            if not -len(self) <= index < len(self):
                raise IndexError(f"{index} of {len(self)} paths")
            index = int(index) % len(self)
            return os.fsdecode(self._text[self._bounds[index] : self._bounds[index + 1]].tobytes())
        return Paths(self[i] for i in np.arange(len(self))[index])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Paths) and self.tobytes() == other.tobytes()

    __hash__ = None  # type: ignore[assignment]

    def tobytes(self) -> bytes:
        """All of it, for a checksum."""
        return self._bounds.tobytes() + self._text.tobytes()

    @property
    def nbytes(self) -> int:
        return self._text.nbytes + self._bounds.nbytes


def list_images(root: str, folders: Sequence[str], extensions: tuple[str, ...]) -> list[Paths]:
    """The files with one of `extensions` (lower case) in each of `folders`, at any depth, relative to `root`, sorted.

    A folder that does not exist is empty.
    """
    find = lambda folder: Paths(sorted(_images_in(root, folder, extensions)))  # noqa: E731
    if len(folders) == 1:
        return [find(folders[0])]
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(find, folders))


def _images_in(root: str, folder: str, extensions: tuple[str, ...]) -> Iterator[str]:
    """`scandir` knows files from folders without asking for each."""
    inner, prefix = [], os.path.join(folder, "")
    try:
        with os.scandir(os.path.join(root, folder)) as entries:
            for entry in entries:
                if entry.name.lower().endswith(extensions):
                    yield prefix + entry.name
                elif entry.is_dir():
                    inner.append(prefix + entry.name)
    except FileNotFoundError:
        return
    for name in inner:
        yield from _images_in(root, name, extensions)


def _blocks(paths: Iterable[str], size: int = 4096) -> Iterator[list[str]]:
    block = []
    for path in paths:
        block.append(path)
        if len(block) == size:
            yield block
            block = []
    if block:
        yield block
