"""Values from inside a network, by name: block outputs and attention maps. Nothing is computed unless it is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from flax import nnx
from jaxtyping import Array


@dataclass
class _Capture:
    paths: dict[int, str]
    patterns: tuple[str, ...]
    found: dict[str, Array] = field(default_factory=dict)


_ACTIVE: ContextVar[_Capture | None] = ContextVar("capture", default=None)


@contextmanager
def capture(module: nnx.Module, *patterns: str) -> Iterator[dict[str, Array]]:
    """Within the context, calls of `module` fill the dictionary that it gives: {path: value}, in order of computation.

    Under `jax.jit`, open it inside the traced function and return the dictionary; what is not used costs nothing. Layers
    then run one by one, whatever `scan_layers` and `remat` say.

    Args:
        module: the network; paths are relative to it.
        patterns: Unix wildcards of the paths wanted, all if none is given: `layers.*.out` (what a block gives),
            `layers.11.attn.weights` (attention after softmax, [B, heads, N, N]).
    """
    paths = {id(part): ".".join(map(str, path)) for path, part in nnx.iter_modules(module)}
    token = _ACTIVE.set(active := _Capture(paths, patterns))
    try:
        yield active.found
    finally:
        _ACTIVE.reset(token)


def capturing() -> bool:
    """Whether values are being collected."""
    return _ACTIVE.get() is not None


def wanted(module: nnx.Module, name: str) -> bool:
    """Whether someone wants the value `name` of `module`, for values that are computed only to be looked at."""
    active = _ACTIVE.get()
    if active is None or id(module) not in active.paths:
        return False
    path = _path(active, module, name)
    return not active.patterns or any(fnmatchcase(path, pattern) for pattern in active.patterns)


def record(module: nnx.Module, name: str, value: Array) -> None:
    """Hands the value `name` of `module` out, if it is wanted. A module that is called twice gives a second `name.1`."""
    if not wanted(module, name):
        return
    active = _ACTIVE.get()
    assert active is not None
    path = base = _path(active, module, name)
    count = 0
    while path in active.found:
        count += 1
        path = f"{base}.{count}"
    active.found[path] = value


def _path(active: _Capture, module: nnx.Module, name: str) -> str:
    prefix = active.paths[id(module)]
    return f"{prefix}.{name}" if prefix else name


def intermediates(
    module: Any, *args: Any, names: str | tuple[str, ...] = (), **kwargs: Any
) -> tuple[Any, dict[str, Array]]:
    """`module(*args, **kwargs)`, and what it computed on the way. `names` are the patterns of `capture`."""
    with capture(module, *([names] if isinstance(names, str) else names)) as found:
        return module(*args, **kwargs), found
