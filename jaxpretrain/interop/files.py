"""Weight files: .pth, .safetensors and .npz, read without running what they may hold, and written whole or not at all."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from jaxpretrain.interop import torchscript
from jaxpretrain.interop.rules import InteropError, State

# Where training scripts keep the weights inside their checkpoints, in the order of preference.
KEYS = (
    *("state_dict", "model", "teacher", "model_state_dict", "model_state", "module", "net", "params"),
    *("state_dict_ema", "model_ema", "ema_state_dict", "student", "target_encoder"),
)

# What MMEngine's and the papers' scripts put beside the weights. None of it is needed, so it is read as a placeholder that
# does nothing; every other class in a file makes PyTorch refuse it.
_NUMPY = ("multiarray._reconstruct", "multiarray.scalar")
_INERT = (
    "argparse.Namespace",
    "mmengine.logging.history_buffer.HistoryBuffer",
    "numpy.dtype",
    "numpy.ndarray",
    *(f"numpy.{core}.{name}" for core in ("core", "_core") for name in _NUMPY),
    *(f"numpy.dtypes.{kind}DType" for kind in ("Float64", "Float32", "Int64", "Int32", "Bool", "Str")),
)


class _Inert:
    """Stands for an object of a class that we do not need. Making, filling and calling one does nothing."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def read(path: str | os.PathLike, key: str | None = None) -> State:
    """The tensors of a file, by name, as NumPy arrays that are views of the file where possible.

    Args:
        path: a .safetensors or .npz file, or what `torch.save` or `torch.jit.save` wrote.
        key: where the weights are inside a checkpoint, with dots: 'teacher', 'ema_state_dict'. By default the first of
            `KEYS` that is there. '*' takes all state dicts in it, their names before those of the tensors:
            'student.module.backbone.cls_token'.

    Raises:
        InteropError: not such a file, damaged, unsafe, or without weights.
    """
    path = Path(path)
    start = _first_bytes(path)
    if path.suffix == ".safetensors" or _is_safetensors(start, path):
        return _read_safetensors(path)
    if path.suffix == ".npz":
        return _read_npz(path)
    if torchscript.is_archive(path):
        return torchscript.read(path)
    return _arrays(_weights(_read_torch(path), key, path), path)


def write(path: str | os.PathLike, state: Mapping[str, np.ndarray], meta: Mapping[str, Any] | None = None) -> None:
    """Writes tensors to a .pth, .safetensors or .npz file, which appears only when it is complete.

    A .pth file holds the state dict itself, or `dict(meta=..., state_dict=...)`, as MMPretrain has it, if there is `meta`.
    """
    path = Path(path)
    if path.suffix not in (".pth", ".pt", ".bin", ".safetensors", ".npz"):
        raise InteropError(f"{path}: give a file name that ends in .pth, .safetensors or .npz")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if path.suffix == ".safetensors":
            from safetensors.numpy import save_file

            save_file(
                {k: np.ascontiguousarray(v).reshape(v.shape) for k, v in state.items()}, temporary, {"format": "pt"}
            )
        elif path.suffix == ".npz":
            with open(temporary, "wb") as file:
                np.savez(file, **dict[str, Any](state))
        else:
            torch = import_torch(path)
            tensors = {k: _to_tensor(v, torch) for k, v in state.items()}
            torch.save(dict(meta=dict(meta), state_dict=tensors) if meta else tensors, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def import_torch(path: str | os.PathLike) -> Any:
    """PyTorch, or an error that says how to do without."""
    try:
        import torch
    except ImportError as error:
        raise InteropError(
            f"{path}: reading and writing .pth files needs PyTorch (pip install jaxpretrain[torch]); "
            ".safetensors files do without"
        ) from error
    return torch


def _first_bytes(path: Path) -> bytes:
    if path.is_dir():
        inside = sorted(p.name for p in path.iterdir() if p.suffix in (".pth", ".pt", ".bin", ".safetensors"))
        hint = f"give one of the files in it: {', '.join(inside[:5])}" if inside else "there are no weight files in it"
        raise InteropError(f"{path} is a directory; {hint}")
    if not path.exists():
        raise InteropError(f"There is no file {path}")
    with open(path, "rb") as file:
        start = file.read(512)
    text = start.lstrip().lower()
    if not start:
        raise InteropError(f"{path} is empty: the download or copy failed")
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise InteropError(
            f"{path} is an HTML page, not weights: the link leads to a web page or an error; download again"
        )
    if text.startswith(b"version https://git-lfs"):
        raise InteropError(f"{path} is a Git LFS pointer, not the weights themselves: run `git lfs pull`")
    return start


def _is_safetensors(start: bytes, path: Path) -> bool:
    """Its first eight bytes are the length of a JSON header."""
    return len(start) > 9 and start[8:9] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size


def _read_safetensors(path: Path) -> State:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    except SafetensorError as error:
        raise InteropError(f"{path} is damaged or cut short ({error}); get it again") from error


def _read_npz(path: Path) -> State:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise InteropError(f"{path} is damaged or cut short, or holds more than arrays ({error})") from error


def _read_torch(path: Path) -> Any:
    torch = import_torch(path)
    with _inert_globals(torch):
        try:
            try:
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError as error:
                if "mmap" not in str(error):
                    raise
                return torch.load(path, map_location="cpu", weights_only=True)  # the format before PyTorch 1.6
        except pickle.UnpicklingError as error:
            reason = str(error).split("WeightsUnpickler error: ")[-1].strip().splitlines()[0]
            if "unsupported" not in reason.lower() and "not an allowed" not in reason.lower():
                raise InteropError(f"{path} is not a file of PyTorch, or is damaged ({reason})") from error
            raise InteropError(
                f"{path} is refused: reading it would run code that it names ({reason}). Weights need no code. "
                "If you trust its source, load it in PyTorch yourself and save the state dict alone"
            ) from error
        except (RuntimeError, EOFError, ValueError, OSError, KeyError) as error:
            raise InteropError(
                f"{path} is damaged or cut short ({str(error).splitlines()[0]}); get it again"
            ) from error


@contextmanager
def _inert_globals(torch: Any) -> Any:
    with torch.serialization.safe_globals([(_Inert, name) for name in _INERT]):
        yield


def _weights(checkpoint: Any, key: str | None, path: Path) -> Mapping[str, Any]:
    """The state dict inside a checkpoint."""
    torch = import_torch(path)

    def holds_tensors(value: Any) -> bool:
        return isinstance(value, Mapping) and any(isinstance(v, torch.Tensor) for v in value.values())

    if key == "*" and isinstance(checkpoint, Mapping):
        parts = {name: value for name, value in checkpoint.items() if holds_tensors(value)}
        checkpoint = {f"{name}.{inner}": v for name, value in parts.items() for inner, v in value.items()}
        key = None
    found = checkpoint
    for part in key.split(".") if key else ():
        if not isinstance(found, Mapping) or part not in found:
            there = ", ".join(map(str, found)) if isinstance(found, Mapping) else type(found).__name__
            raise InteropError(f"{path} has nothing at {key!r}; there is {there[:300]}")
        found = found[part]
    if not key and not holds_tensors(found) and isinstance(found, Mapping):
        found = next((found[name] for name in KEYS if holds_tensors(found.get(name))), found)
    if not holds_tensors(found):
        there = ", ".join(map(str, found)) if isinstance(found, Mapping) else type(found).__name__
        raise InteropError(
            f"{path} holds no weights that we can find, but {there[:300]}; say where they are with key=..."
        )
    return found


def _arrays(weights: Mapping[str, Any], path: Path) -> State:
    torch = import_torch(path)
    return {str(k): _to_numpy(v, torch) for k, v in weights.items() if isinstance(v, torch.Tensor)}


def _to_numpy(tensor: Any, torch: Any) -> np.ndarray:
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        import ml_dtypes

        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def _to_tensor(array: np.ndarray, torch: Any) -> Any:
    array = np.ascontiguousarray(array).reshape(array.shape)
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array if array.flags.writeable else array.copy())
