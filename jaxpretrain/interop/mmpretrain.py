"""MMPretrain's state dicts: the hub that all other layouts are translated to and from.

Our modules have MMPretrain's attribute names, so this needs no table: layers say what their tensors are called in PyTorch
(`state_names`), and kernels have their axes in another order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxpretrain.interop.rules import Rule
from jaxpretrain.models.layers.base import BaseModule

Path = tuple[Any, ...]


def names(model: nnx.Module) -> dict[str, Path]:
    """MMPretrain's name -> path of every array of `model`. Arrays that several modules share appear once."""
    modules = dict(nnx.iter_modules(model))
    found = {}
    for path, _ in nnx.state(model).flat_state():
        parts = [str(_rename(modules.get(path[:i]), part)) for i, part in enumerate(path)]
        found[".".join(parts)] = path
    return found


def _rename(module: Any, part: Any) -> Any:
    return getattr(module, "state_names", {}).get(part, part)


def derived(model: nnx.Module) -> dict[str, np.ndarray]:
    """The arrays in MMPretrain's state dict that follow from the arguments (see `BaseModule.derived`), by name."""
    found: dict[str, np.ndarray] = {}
    for prefix, module in modules(model):
        found |= {prefix + name: array for name, array in module.derived().items()}
    return found


def aliases(model: nnx.Module) -> dict[str, str]:
    """MMPretrain's second name -> name, of every array that its state dict holds twice (see `BaseModule.aliases`)."""
    known = names(model)
    return {
        prefix + other + name.removeprefix(prefix + part): name
        for prefix, module in modules(model)
        for other, part in module.aliases.items()
        for name in known
        if name.startswith(f"{prefix}{part}.")
    }


def local(model: nnx.Module) -> list[str]:
    """The names of state that MMPretrain's state dict has not (see `BaseModule.local_state`)."""
    known = names(model)
    return [prefix + name for prefix, module in modules(model) for name in module.local_state if prefix + name in known]


def modules(model: nnx.Module) -> Iterator[tuple[str, BaseModule]]:
    """(beginning of the names of its arrays, module), of every `BaseModule`."""
    found = dict(nnx.iter_modules(model))
    for path, module in found.items():
        if isinstance(module, BaseModule):
            yield "".join(f"{_rename(found.get(path[:i]), part)}." for i, part in enumerate(path)), module


def shapes(model: nnx.Module) -> dict[str, tuple[int, ...]]:
    """MMPretrain's name -> shape in PyTorch, of every array that is state; derived ones are not among them."""
    variables = dict(nnx.state(model).flat_state())
    return {
        name: tuple(variables[path].shape[i] for i in _axes(path, len(variables[path].shape)))
        for name, path in names(model).items()
    }


def to_state_dict(model: nnx.Module) -> dict[str, np.ndarray]:
    """The model's weights by MMPretrain's names and in PyTorch's axes; views where possible. Counters are int64."""
    variables, ours = dict(nnx.state(model).flat_state()), local(model)
    state = {
        name: to_torch(path, variables[path].get_value()) for name, path in names(model).items() if name not in ours
    }
    return state | derived(model) | {other: state[name] for other, name in aliases(model).items()}


def from_state_dict(model: nnx.Module, state: Mapping[str, np.ndarray]) -> dict[Path, np.ndarray]:
    """The arrays of `state`, whose names and shapes are the model's, by path, in our axes; views of them."""
    paths, skip = names(model), aliases(model)
    return {paths[name]: from_torch(paths[name], array) for name, array in state.items() if name not in skip}


def fill(model: nnx.Module, arrays: Mapping[Path, np.ndarray]) -> None:
    """Writes arrays into the model, in place, in the dtype of the variables."""
    variables = dict(nnx.state(model).flat_state())
    for path, array in arrays.items():
        variable = variables[path]
        if tuple(variable.shape) != array.shape:
            raise ValueError(f"{'.'.join(map(str, path))}: {array.shape} does not fit {tuple(variable.shape)}")
        variable.set_value(jax.numpy.asarray(np.ascontiguousarray(array).reshape(array.shape), variable.dtype))
    nnx.update(model, nnx.State.from_flat_path(variables))


def head_rules(model: nnx.Module, theirs: str) -> list[Rule]:
    """The rule of the layer that makes the logits, which the foreign layout calls `theirs`.

    A model without gets the rule of a linear head: so the head of a file is known to be no part of the backbone.
    """
    head = getattr(model, "head", None)
    layers = [] if head is None else [f"head.{name.removesuffix('.weight')}" for name in names(head)]
    layers = [name for name in layers if name in ("head.fc", "head.layers.head")]
    return [Rule(f"{theirs}.{{p}}", f"{name}.{{p}}") for name in layers or ["head.fc"]]


def num_parameters(model: nnx.Module) -> int:
    """How many numbers are weights: all state but running statistics and counters."""
    state = nnx.state(model).flat_state()
    return sum(math.prod(v.shape) for _, v in state if not isinstance(v, nnx.BatchStat))


def _axes(path: Path, ndim: int) -> tuple[int, ...]:
    """The order of our axes that makes PyTorch's: a kernel is [*window, in, out] here, [out, in, *window] there."""
    if path[-1] != "kernel" or ndim < 2:
        return tuple(range(ndim))
    return (ndim - 1, ndim - 2, *range(ndim - 2))


def to_torch(path: Path, value: Any) -> np.ndarray:
    """An array of ours with PyTorch's order of axes; a view. Counters become int64."""
    array = np.asarray(value)
    array = array.transpose(_axes(path, array.ndim))
    return array.astype(np.int64) if array.dtype == np.int32 else array


def from_torch(path: Path, array: np.ndarray) -> np.ndarray:
    """An array of PyTorch's with our order of axes; a view."""
    return np.asarray(array).transpose(np.argsort(_axes(path, np.ndim(array))))
