"""The weights in a TorchScript archive, such as OpenAI's CLIP, without running the program that is in it.

An archive is a zip file: `data.pkl` is a pickle of the module tree, `data/0`, `data/1`, ... are the raw tensors, and the rest is
code. PyTorch reads it whole or not at all. Here the pickle may name modules, which become mere holders of attributes, and
tensors, which become views of the file; anything else is refused.
"""

from __future__ import annotations

import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxpretrain.interop.rules import InteropError, State

_DTYPES: dict[str, Any] = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}


def is_archive(path: str | os.PathLike) -> bool:
    """Whether a file is a TorchScript archive: a zip file with constants, which `torch.save` does not write."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except zipfile.BadZipFile:
        return False


def read(path: str | os.PathLike) -> State:
    """All tensors of the module tree by their names in PyTorch's state dict, as read-only views of the file.

    Tensors that are no parameters or buffers but plain attributes are among them, by the same kind of name.

    Raises:
        InteropError: the archive names anything but modules and tensors, or is damaged.
    """
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            entries = {info.filename.partition("/")[2]: info for info in archive.infolist()}
            with archive.open(entries["data.pkl"]) as file:
                return dict(_tensors(_Unpickler(file, path, entries).load()))
    except InteropError:
        raise
    except Exception as error:  # what a damaged pickle raises is not documented
        raise InteropError(f"{path} is a damaged TorchScript archive ({error!r}); get it again") from error


def _tensors(value: Any, prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
    if isinstance(value, np.ndarray):
        yield prefix, value
    for name, part in getattr(value, "attributes", {}).items():
        yield from _tensors(part, f"{prefix}.{name}" if prefix else name)


class _Unpickler(pickle.Unpickler):
    """A pickle machine that knows modules, tensors and nothing else."""

    def __init__(self, file: Any, path: Path, entries: Mapping[str, zipfile.ZipInfo]):
        super().__init__(file)
        self.path, self.entries = path, entries

        # Made anew for each file: whatever a pickle may do to them is gone with it.
        class Module:
            attributes: Mapping[str, Any] = {}

            def __setstate__(self, state: Any) -> None:
                self.attributes = dict(state)

        def tensor(storage: np.ndarray, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: Any) -> Any:
            return _view(storage, offset, shape, strides)

        def parameter(value: Any, *_: Any) -> Any:
            return value

        self.module: type = Module
        self.known: dict[str, Callable[..., Any]] = {
            "torch._utils._rebuild_tensor_v2": tensor,
            "torch._utils._rebuild_parameter": parameter,
            "collections.OrderedDict": lambda: OrderedDict(),  # hooks, of which there are none
        }

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "__torch__":
            return self.module
        if module == "torch" and name in _DTYPES:
            return name
        if (known := self.known.get(f"{module}.{name}")) is None:
            raise InteropError(
                f"{self.path} is refused: it names {module}.{name}, which is neither a module nor a tensor. If you trust its "
                "source, load it with torch.jit.load yourself and save its state_dict()"
            )
        return known

    def persistent_load(self, pid: Any) -> np.ndarray:
        """The numbers of the storage (kind, dtype, key, device, how many), mapped from the file."""
        _, kind, key, _, count = pid
        info = self.entries[f"data/{key}"]
        dtype = np.dtype(_DTYPES[kind])
        if info.compress_type != zipfile.ZIP_STORED or info.file_size < count * dtype.itemsize:
            raise ValueError(f"data/{key} has not {count} numbers")
        if not count:
            return np.zeros(0, dtype)
        with open(self.path, "rb") as file:  # where the data begins is said in front of them, not in the zip's index
            file.seek(info.header_offset)
            name_size, extra_size = struct.unpack("<26x2H", file.read(30))
        start = info.header_offset + 30 + name_size + extra_size
        return np.memmap(self.path, dtype, "r", start, (count,))


def _view(storage: np.ndarray, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> np.ndarray:
    """Part of a storage as an array. Raises ValueError if it reached out of it."""
    size = int(np.prod(shape))
    last = offset + sum((count - 1) * stride for count, stride in zip(shape, strides, strict=True))
    if min((offset, *shape, *strides)) < 0 or (size and last >= storage.size):
        raise ValueError(f"a tensor {shape} at {offset} with strides {strides} reaches out of {storage.size} numbers")
    part = storage[offset : last + 1] if size else storage[:0]
    byte_strides = [stride * storage.itemsize for stride in strides]
    return np.lib.stride_tricks.as_strided(part, shape, byte_strides, writeable=False)
