"""Weights into models and out of them, whatever form they are in."""

from __future__ import annotations

import importlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxpretrain.build import nearest
from jaxpretrain.interop import files
from jaxpretrain.interop import mmpretrain as hub
from jaxpretrain.interop.rules import InteropError, Rule, State, Table, describe_leftovers, translate

# Layout -> module with its tables: {class of the backbone or method: function of (backbone, model) that gives a Table}.
LAYOUTS = {
    "timm": "jaxpretrain.interop.timm",
    "torchvision": "jaxpretrain.interop.torchvision",
    "hf": "jaxpretrain.interop.huggingface",
    **dict.fromkeys(
        ("deit", "dino", "dinov2", "mae", "moco", "mocov3", "beit", "eva", "clip", "sam", "swin"),
        "jaxpretrain.interop.originals",
    ),
}
_MMPRETRAIN = Table([Rule("{rest}", "{rest}")], prefixes=("module.",))


@dataclass
class Report:
    """What reading weights came to.

    Attributes:
        source: where they come from.
        layout: 'jaxpretrain', 'mmpretrain', 'timm', ...
        arrays: path in the model -> array, in our axes.
        ignored: names in the source that are no part of the model.
        reinitialised: names in the model that the source did not give, on request.
    """

    source: str
    layout: str
    arrays: dict[hub.Path, np.ndarray]
    ignored: list[str] = field(default_factory=list)
    reinitialised: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        text = f"{len(self.arrays)} arrays from {self.source} (layout {self.layout})"
        text += f", {len(self.ignored)} left out" if self.ignored else ""
        return text + (f", initialised anew: {', '.join(self.reinitialised)}" if self.reinitialised else "")


def tables(layout: str, model: nnx.Module) -> Table | None:
    """The table of a layout for a model; None if the layout knows no such model."""
    if layout == "mmpretrain":
        return _MMPRETRAIN
    backbone = getattr(model, "backbone", model)
    known: Mapping[str, Callable] = importlib.import_module(LAYOUTS[layout]).TABLES[layout]
    for kind in (*type(model).__mro__, *type(backbone).__mro__):
        if kind.__name__ in known:
            return known[kind.__name__](backbone, model)
    return None


def read_weights(
    model: nnx.Module,
    src: str | os.PathLike | Mapping[str, Any],
    *,
    layout: str = "auto",
    key: str | None = None,
    part: str | None = None,
    drop: Sequence[str] = (),
    reinit_head: bool = False,
) -> Report:
    """The weights of `src` for `model`, which is not changed and may be abstract.

    Args:
        model: a classifier, a method or a backbone.
        src: a directory that `save_weights` or the trainer wrote; a .pth or .safetensors file; or a state dict.
        layout: whose names the file has; 'auto' recognises it from them.
        key: where the weights are inside a .pth file (see `files.read`); of a trainer's directory a step, or 'best'.
        part: load this part of the model alone: 'backbone' takes a pre-trained encoder out of anything around it.
        drop: regular expressions of names in `src` to leave out.
        reinit_head: leave the head of `src` out, if there is one; the model's is initialised anew.

    Raises:
        InteropError: the file cannot be read, or tensors are left over on either side.
    """
    core = _core(model)
    root = () if core is model else ("model",)
    source = "the given state dict" if isinstance(src, Mapping) else str(src)
    if not isinstance(src, Mapping) and Path(src).is_dir():
        state, layout = _read_directory(core, Path(src), key), "jaxpretrain"  # whatever was asked for
    else:
        state = dict(src) if isinstance(src, Mapping) else files.read(src, key)
        state = {k: np.asarray(v) for k, v in state.items()}
    state = {name: v for name, v in state.items() if not any(re.search(pattern, name) for pattern in drop)}
    attempt = _recognise(core, state, layout, part, reinit_head)
    report = attempt.check(source)
    report.arrays = {root + path: array for path, array in report.arrays.items()}
    return report


def load_weights(model: Any, src: str | os.PathLike | Mapping[str, Any], *, seed: int = 0, **options: Any) -> Report:
    """Fills `model` in place with the weights of `src`. Nothing is left abstract, and nothing is drawn that is not needed.

    Args:
        model: a classifier, a method or a backbone; concrete, or built under `nnx.eval_shape`.
        src, options: as of `read_weights`.
        seed: of what is initialised anew.
    """
    report = read_weights(model, src, **options)
    variables = dict(nnx.state(model).flat_state())
    abstract = [p for p, v in variables.items() if isinstance(v.get_value(), jax.ShapeDtypeStruct)]
    zeros = {
        path: np.zeros(variables[path].shape, variables[path].dtype) for path in abstract if path not in report.arrays
    }
    hub.fill(model, zeros | report.arrays)
    if report.reinitialised:
        _core(model).head.init_weights(nnx.Rngs(seed))
    elif zeros:
        raise InteropError(
            f"{report.source} gives {options['part']} alone; build the model with its other weights first"
        )
    return report


def export(model: nnx.Module, layout: str = "mmpretrain") -> State:
    """The model's weights as a PyTorch state dict (NumPy arrays) in a layout.

    Raises:
        InteropError: the layout knows no such model, or cannot hold all its weights.
    """
    core = _core(model)
    state = hub.to_state_dict(core)
    table = _table(layout, core)
    if layout == "mmpretrain":
        return state
    bare = not hasattr(core, "backbone")
    result = translate(_with_root(state, bare), _for_export(table, core), inverse=True)
    optional = set(_with_root(hub.derived(core), bare))
    if unused := [name for name in result.unused if name not in optional]:
        lines = "\n  ".join(f"{name} {tuple(_with_root(state, bare)[name].shape)}" for name in unused)
        raise InteropError(f"The layout {layout!r} has no place for\n  {lines}")
    return result.state


def save_weights(
    model: nnx.Module, dst: str | os.PathLike, *, meta: Mapping[str, Any] | None = None, report: Report | None = None
) -> None:
    """Writes the converted form: a directory that `load_weights`, `get_model` and `config.load_from` read.

    Args:
        model: whose weights; abstract, if `report` brings them.
        dst: the directory, new or empty.
        meta: what else to note in `model.json`: the model's configuration and name.
        report: weights read by `read_weights` for this model, written as they are, without a copy in the model.
    """
    from jaxpretrain.checkpoint import Checkpointer
    from jaxpretrain.checkpoint_format import nest

    dst = Path(dst)
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        raise InteropError(f"{dst} exists already; give a new directory, or remove it")
    arrays = {} if report is None else report.arrays
    groups: dict[str, dict] = {"params": {}, "model_state": {}}
    for path, variable in nnx.state(model).flat_state():
        value = arrays[path] if path in arrays else variable.get_value()
        group = groups["params" if isinstance(variable, nnx.Param) else "model_state"]
        group[path] = np.ascontiguousarray(value, variable.dtype).reshape(variable.shape)
    with Checkpointer(dst / "checkpoints") as checkpointer:
        checkpointer.save(0, {name: nest(flat) for name, flat in groups.items()} | {"ema": {}})
    (dst / "model.json").write_text(json.dumps(dict(meta or {}), indent=2, default=str) + "\n")


# Fitting a state dict to a model.


def _core(model: Any) -> Any:
    """The model itself, of the method `Supervised` too."""
    return getattr(model, "model", model)


@dataclass
class _Attempt:
    """What one layout makes of a state dict for a model, by MMPretrain's names with `backbone.` in front."""

    layout: str
    state: State
    shapes: dict[str, tuple[int, ...]]
    paths: dict[str, hub.Path]
    derived: State
    unused: dict[str, tuple[int, ...]]
    ignored: list[str]
    incomplete: list[str]
    reinit: set[str]

    def missing(self) -> dict[str, tuple[int, ...]]:
        return {name: size for name, size in self.shapes.items() if name not in self.state and name not in self.reinit}

    def wrong(self) -> dict[str, tuple[Sequence[int], Sequence[int]]]:
        pairs = {name: (array.shape, self.shapes.get(name)) for name, array in self.state.items()}
        return {name: (a, b) for name, (a, b) in pairs.items() if b is not None and tuple(a) != tuple(b)}

    def different(self) -> list[str]:
        """Derived arrays of the file that are not what follows from our arguments."""
        given = {name: self.state[name] for name in self.derived if name in self.state}
        return [name for name, array in given.items() if not _alike(array, self.derived[name])]

    def leftovers(self) -> int:
        return len(self.unused) + len(self.missing()) + len(self.wrong()) + len(self.incomplete)

    def check(self, source: str) -> Report:
        lines = describe_leftovers(self.unused, self.missing(), self.wrong(), self.incomplete)
        lines += [
            f"another table   {name}: the file's is not the one of this model's settings" for name in self.different()
        ]
        if lines:
            raise InteropError(
                f"{source} does not fit (layout {self.layout!r}):\n  " + "\n  ".join(lines) + "".join(self._advice())
            )
        arrays = {self.paths[name]: array for name, array in self.state.items() if name in self.paths}
        by_path = {path: hub._from_torch(path, array) for path, array in arrays.items()}
        if self.layout == "jaxpretrain":
            by_path = arrays
        return Report(source, self.layout, by_path, self.ignored, sorted(self.reinit))

    def _advice(self) -> list[str]:
        wrong, missing = self.wrong(), self.missing()
        advice = []
        if any(name.startswith("head.") for name in wrong):
            advice.append(
                "\nThe head is for another number of classes: reinit_head=True (--reinit-head) starts a new one."
            )
        elif any(name.startswith("head.") for name in missing):
            advice.append("\nThe file has no such head: reinit_head=True (--reinit-head) starts a new one.")
        if self.unused:
            advice.append("\nWhat is no part of the model can be left out by name: drop=[regular expression] (--drop).")
        return advice


def _recognise(core: nnx.Module, state: State, layout: str, part: str | None, reinit_head: bool) -> _Attempt:
    """The attempt of the layout asked for, or of the one that leaves least over."""
    if layout != "auto":
        chosen = _MMPRETRAIN if layout == "jaxpretrain" else _table(layout, core)
        return _attempt(core, state, layout, chosen, part, reinit_head)
    best = None
    for name in ("mmpretrain", *LAYOUTS):
        if (table := tables(name, core)) is not None:
            attempt = _attempt(core, state, name, table, part, reinit_head)
            if best is None or attempt.leftovers() < best.leftovers():
                best = attempt
            if not attempt.leftovers():
                break
    assert best is not None
    return best


def _table(layout: str, core: nnx.Module) -> Table:
    """The table of a layout that the user named."""
    if layout not in ("mmpretrain", *LAYOUTS):
        raise InteropError(f"There is no layout {layout!r}.{nearest(layout, ('auto', 'mmpretrain', *LAYOUTS))}")
    table = tables(layout, core)
    if table is None:
        kind = type(getattr(core, "backbone", core)).__name__
        fitting = [name for name in ("mmpretrain", *LAYOUTS) if tables(name, core) is not None]
        raise InteropError(f"The layout {layout!r} has no {kind}; layouts that have: {', '.join(fitting)}")
    return table


def _attempt(
    core: nnx.Module, state: State, layout: str, table: Table, part: str | None, reinit_head: bool
) -> _Attempt:
    bare = not hasattr(core, "backbone")
    shapes = _with_root(hub.shapes(core), bare)
    paths = _with_root(hub.names(core), bare)
    derived = _with_root(hub.derived(core), bare)
    if layout == "jaxpretrain":
        shapes = {name: tuple(v.shape) for name, v in _with_root(_by_name(core), bare).items()}
    stripped = {_strip(name, table): array for name, array in state.items()}
    if bare and layout in ("mmpretrain", "jaxpretrain"):
        stripped = _with_root(stripped, not any(name.startswith("backbone.") for name in stripped))
    result = translate(stripped, table)
    if part is not None:
        keep = f"{part}."
        shapes, result.state = ({k: v for k, v in d.items() if k.startswith(keep)} for d in (shapes, result.state))
    reinit = {name for name in shapes if reinit_head and name.startswith("head.")}
    reinit = {name for name in reinit if name not in result.state or result.state[name].shape != shapes[name]}
    translated = {n: v for n, v in result.state.items() if n not in reinit and not (reinit and _head_only(n, shapes))}
    unused = {name: stripped[name].shape for name in result.unused}
    unused |= {n: v.shape for n, v in translated.items() if n not in shapes and n not in derived}
    translated = {n: v for n, v in translated.items() if n in shapes or n in derived}
    return _Attempt(layout, translated, shapes, paths, derived, unused, result.ignored, result.incomplete, reinit)


def _head_only(name: str, shapes: Mapping[str, Any]) -> bool:
    return name.startswith("head.") and name not in shapes


def _by_name(core: nnx.Module) -> dict[str, Any]:
    variables = dict(nnx.state(core).flat_state())
    return {name: variables[path] for name, path in hub.names(core).items()}


def _with_root(named: Mapping[str, Any], bare: bool) -> dict[str, Any]:
    return {f"backbone.{name}": value for name, value in named.items()} if bare else dict(named)


def _strip(name: str, table: Table) -> str:
    for prefix in (*table.prefixes, *([table.prefix] if table.prefix else [])):
        name = name.removeprefix(prefix)
    return name


def _for_export(table: Table, core: nnx.Module) -> Table:
    """The table with the foreign prefix of backbones put back, where the model has a head."""
    if not table.prefix or getattr(core, "head", None) is None:
        return table

    def prefixed(names: str | tuple[str, ...]) -> Any:
        return table.prefix + names if isinstance(names, str) else tuple(table.prefix + name for name in names)

    def is_backbone(rule: Rule) -> bool:
        return (rule.ours if isinstance(rule.ours, str) else rule.ours[0]).startswith("backbone.")

    rules = [Rule(prefixed(r.theirs), r.ours, r.transform) if is_backbone(r) else r for r in table.rules]
    return Table(rules, table.ignore, table.prefix, table.prefixes)


def _alike(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and bool(np.allclose(a, b, rtol=1e-5, atol=1e-6))


def _read_directory(core: nnx.Module, path: Path, which: str | None) -> State:
    """The weights of a checkpoint directory by MMPretrain's names where the model has them, in our axes."""
    from jaxpretrain.checkpoint import load_params
    from jaxpretrain.checkpoint_format import flatten

    state = load_params(path, which or "latest").state
    learnt = state["ema"] or state["params"]
    flat = flatten(learnt) | flatten(state["model_state"])
    if all(path[0] == "model" for path in flat):
        flat = {path[1:]: array for path, array in flat.items()}
    names = {tuple(map(str, path)): name for name, path in hub.names(core).items()}
    found = {}
    for keys, array in flat.items():
        parts = tuple(map(str, keys))
        inside = parts[1:] if not hasattr(core, "backbone") and parts[0] == "backbone" else parts
        found[names.get(parts) or names.get(inside) or ".".join(parts)] = np.asarray(array)
    return found
