"""What a checkpoint's JSON says and how it is compared: names of leaves, digests, configurations, messages."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

KeyPath = tuple[str | int, ...]

# Fields that may change when a run goes on: they leave the trained weights alone, up to the order of float sums.
NEUTRAL = (
    *("checkpoint", "evaluation", "evaluators", "log_interval", "peak_flops", "profile", "recipe", "tensorboard"),
    *("transfer_guard", "wandb", "mesh", "sharding_rules", "remat", "scan_layers"),
    *("data.num_workers", "data.num_threads", "data.prefetch", "data.max_bad", "data.val", "data.eval_batch_size"),
)
_ABSENT = "(absent)"


# ----------------------------------------------------------------------------------------------------------------------
# Trees


def flatten(tree: Any) -> dict[KeyPath, Any]:
    """Path -> leaf. Named tuples count by field name, sequences by index; `None` and empty containers have no leaves.

    Raises ValueError if two leaves have one name, as in `{0: a, '0': b}`.
    """
    flat = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        keys = [next(getattr(key, attr) for attr in ("key", "idx", "name") if hasattr(key, attr)) for key in path]
        flat[tuple(key if isinstance(key, int) else str(key) for key in keys)] = leaf
    names = [name(path) for path in flat]
    if len(set(names)) < len(names):
        raise ValueError(f"Leaves of the state share names: {join(sorted({n for n in names if names.count(n) > 1}))}")
    return flat


def nest(flat: Mapping[Any, Any]) -> dict:
    """Nested dictionaries from path -> leaf."""
    nested: dict = {}
    for path, leaf in flat.items():
        node = nested
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    return nested


def look_up(nested: Any, path: KeyPath) -> Any:
    """The leaf at `path`, None if there is no such path."""
    for key in path:
        if not isinstance(nested, Mapping) or key not in nested:
            return None
        nested = nested[key]
    return nested


def strings(path: KeyPath) -> tuple[str, ...]:
    """The path as Orbax gets it: with string keys only."""
    return tuple(map(str, path))


def name(path: KeyPath) -> str:
    """`params/backbone/layers/0/qkv/kernel`."""
    return "/".join(strings(path))


def leaf_differences(saved: Mapping[str, Mapping[str, Any]], wanted: Mapping[KeyPath, Any]) -> list[str]:
    """One line for each leaf that is missing, left over, or of another shape or dtype.

    Args:
        saved: name -> dictionary with `dtype` and `shape`, as in a checkpoint's JSON.
        wanted: path -> array or ShapeDtypeStruct.
    """
    have = {n: f"{leaf['dtype']} {tuple(leaf['shape'])}" for n, leaf in saved.items()}
    want = {name(path): f"{x.dtype} {tuple(x.shape)}" for path, x in wanted.items()}
    lines = [f"missing in the checkpoint: {n}: {want[n]}" for n in want if n not in have]
    lines += [f"only in the checkpoint: {n}: {have[n]}" for n in have if n not in want]
    return lines + [
        f"{n}: {have[n]} in the checkpoint, {want[n]} here" for n in want if have.get(n, want[n]) != want[n]
    ]


# ----------------------------------------------------------------------------------------------------------------------
# JSON


def to_json(value: Any) -> Any:
    """`value` as JSON can hold it: tuples and arrays become lists, bytes base64, classes and functions dotted names."""
    if hasattr(value, "to_dict"):
        value = value.to_dict()
    if isinstance(value, Mapping):
        return {str(k): to_json(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(v) for v in value]
    if isinstance(value, bytes):
        return {"__bytes__": base64.b64encode(value).decode()}
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return jax.device_get(value).tolist()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if callable(value):
        return f"{value.__module__}.{value.__qualname__}"
    return value


def from_json(value: Any) -> Any:
    """Undoes what `to_json` did to bytes; tuples stay lists."""
    if isinstance(value, dict):
        if value.keys() == {"__bytes__"}:
            return base64.b64decode(value["__bytes__"])
        return {k: from_json(v) for k, v in value.items()}
    return [from_json(v) for v in value] if isinstance(value, list) else value


def digest(payload: Any) -> str:
    """SHA-256 of what the JSON says, whatever its spaces and the order of its keys."""
    return hashlib.sha256(json.dumps(payload, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


# ----------------------------------------------------------------------------------------------------------------------
# Configurations


def _fields(value: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted path -> value. Lists that hold dictionaries are entered (`param_scheduler[0].end`), others are values."""
    if isinstance(value, dict) and (value or not prefix):
        parts = [(f"{prefix}.{key}" if prefix else key, part) for key, part in value.items()]
    elif isinstance(value, list) and any(isinstance(part, dict) for part in value):
        parts = [(f"{prefix}[{index}]", part) for index, part in enumerate(value)]
    else:
        return {prefix: value}
    return {path: field for where, part in parts for path, field in _fields(part, where).items()}


def config_difference(old: Any, new: Any, neutral: Iterable[str] = NEUTRAL) -> list[str]:
    """Lines such as `method.backbone.arch: base -> large`, one for every field that differs.

    Args:
        old, new: configurations: ConfigDict, dict, or what was read from JSON. Tuples equal lists.
        neutral: dotted paths whose differences do not count, with all below them.
    """
    before, after = _fields(to_json(old)), _fields(to_json(new))
    lines = []
    for path in {**before, **after}:
        a, b = before.get(path, _ABSENT), after.get(path, _ABSENT)
        if a != b and not any(re.match(rf"{re.escape(field)}($|[.\[])", path) for field in neutral):
            lines.append(f"{path}: {a} -> {b}")
    return lines


# ----------------------------------------------------------------------------------------------------------------------
# Messages


def reason(error: BaseException) -> str:
    """Why a file operation failed, in one line: the operating system's words where there are any."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno:
            return os.strerror(cause.errno)
        if number := re.search(r"os_error_code='(\d+)'", str(cause)):  # tensorstore's way
            return os.strerror(int(number[1]))
        cause = cause.__cause__ or cause.__context__
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def join(items: Sequence[Any], limit: int = 8) -> str:
    """'a, b, c and 5 more'."""
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(map(str, items[:limit])) + more
