"""Weights into models and out of them, whatever form they are in."""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxpretrain.build import ConfigError
from jaxpretrain.interop import files
from jaxpretrain.interop import mmpretrain as hub
from jaxpretrain.interop.fitting import Report, adapted, for_export, recognise, table_of, with_root
from jaxpretrain.interop.rules import InteropError, State, translate
from jaxpretrain.models.lora import UPDATES, LoRAModel, first_update, merge_lora

logger = logging.getLogger("jaxpretrain")

OURS = "jaxpretrain"  # the layout of our own directories


def read_weights(
    model: nnx.Module,
    src: str | os.PathLike | Mapping[str, Any],
    *,
    layout: str = "auto",
    key: str | None = None,
    part: str | None = None,
    drop: Sequence[str] = (),
    fresh: Sequence[str] = (),
    reinit_head: bool = False,
    seed: int = 0,
) -> Report:
    """The weights of `src` for `model`, which is not changed and may be abstract.

    Args:
        model: a classifier, a method or a backbone.
        src: a directory that `save_weights` or the trainer wrote; a .pth or .safetensors file; or a state dict.
        layout: whose names the file has; 'auto' recognises it from them.
        key: where the weights are inside a .pth file (see `files.read`); of a trainer's directory a step, or 'best'.
        part: load this part of the model alone: 'backbone' takes a pre-trained encoder out of anything around it.
        drop: regular expressions of names in `src` to leave out.
        fresh: regular expressions of MMPretrain's names in the model that `src` need not have: they stay as they are. Of
            networks that LoRA adapts, the names without it.
        reinit_head: if the head of `src` is not like the model's, leave it out and initialise the model's anew.
        seed: of that.

    Raises:
        InteropError: the file cannot be read, or tensors are left over on either side.
    """
    core = _core(model)
    root = () if core is model else ("model",)
    source = "the given state dict" if isinstance(src, Mapping) else str(src)
    if not isinstance(src, Mapping) and Path(src).is_dir():
        state, layout = _read_directory(core, Path(src), key), OURS
    else:
        state = dict(src) if isinstance(src, Mapping) else files.read(src, key)
        state = {k: np.asarray(v) for k, v in state.items()}
    state = {name: v for name, v in state.items() if not any(re.search(pattern, name) for pattern in drop)}
    fit = recognise(core, state, "mmpretrain" if layout == OURS else layout, part, reinit_head)
    plain = _without_lora(core, fit.shapes)
    fit.shapes = {
        name: shape
        for name, shape in fit.shapes.items()
        if name in fit.state or not any(re.search(pattern, plain[name]) for pattern in fresh)
    }
    fit.check(source)
    paths = with_root(hub.names(core), core)
    arrays = {root + paths[n]: hub.from_torch(paths[n], array) for n, array in fit.state.items() if n in paths}
    if any(name.startswith("head.") for name in fit.reinit):
        arrays |= {(*root, "head", *path): array for path, array in _new_head(core.head, seed).items()}
    return Report(source, OURS if layout == OURS else fit.layout, arrays, fit.ignored, sorted(fit.reinit))


def load_weights(model: Any, src: str | os.PathLike | Mapping[str, Any], **options: Any) -> Report:
    """Fills `model` in place with the weights of `src`. Nothing is left abstract, and nothing is drawn that is not needed.

    Args:
        model: a classifier, a method or a backbone; concrete, or built under `nnx.eval_shape`.
        src, options: as of `read_weights`.

    Raises:
        InteropError: as `read_weights`; or `part` leaves other parts of an abstract model without weights.
    """
    report = read_weights(model, src, **options)
    fill(model, report, options.get("seed", 0))
    return report


def fill(model: nnx.Module, report: Report, seed: int = 0) -> None:
    """Writes the weights of `report`, read for such a model, into it. Updates of LoRA that are abstract start anew.

    Raises:
        InteropError: other parts of an abstract model stay without weights.
    """
    empty = {path: variable.shape for path, variable in _empty(model) if path not in report.arrays}
    updates = _new_updates(empty, seed)
    if names := [".".join(map(str, path)) for path in empty if path not in updates]:
        raise InteropError(
            f"{report.source} leaves {len(names)} arrays of an abstract model empty: {', '.join(names[:5])} ..."
        )
    hub.fill(model, report.arrays | updates)


def starting_weights(method: nnx.Module, load_from: Any = None) -> dict[hub.Path, np.ndarray]:
    """The arrays that training starts from instead of random ones, by path.

    Args:
        method: the network, which may be abstract. Modules in it with `init_cfg=dict(type='Pretrained', checkpoint=...,
            prefix='backbone.')` get those weights; `layout`, `key` and `drop` may be said there too (see `read_weights`).
            Modules with `released_weights`, which says of what file, are of no use without (the tokenizers of BEiT).
        load_from: a path for the method as a whole, or a mapping of it (`path`) and options of `read_weights`.

    Raises:
        InteropError: there is no such file, or it does not fit.
    """
    arrays: dict[hub.Path, np.ndarray] = {}
    if load_from:
        options = dict(load_from) if isinstance(load_from, Mapping) else dict(path=load_from)
        if options.get("path") is None:
            raise ConfigError(
                "This recipe starts from a pre-trained encoder: set --config.load_from.path to the workdir of its run or "
                "to a file of weights, or --config.load_from=None to start from nothing"
            )
        report = read_weights(method, options.pop("path"), **options)
        logger.info("%s", report)
        arrays |= report.arrays
    for path, module in nnx.iter_modules(method):
        cfg = getattr(module, "init_cfg", None)
        cfg = cfg if isinstance(cfg, Mapping) and cfg.get("type") == "Pretrained" else {}
        file, released = cfg.get("checkpoint") or "", getattr(module, "released_weights", None)
        if file and Path(file).exists():
            options = {name: cfg[name] for name in ("layout", "key", "drop") if name in cfg}
            part = cfg["prefix"].rstrip(".") if cfg.get("prefix") else None
            report = read_weights(module, file, part=part, **options)
            logger.info("%s: %s", ".".join(map(str, path)) or type(module).__name__, report)
            arrays |= {path + inner: array for inner, array in report.arrays.items()}
        elif (cfg or released) and any(path + inner not in arrays for inner, _ in nnx.state(module).flat_state()):
            raise _no_file(path, module, file, released)  # and `load_from` has them neither
    return arrays


def _no_file(path: hub.Path, module: nnx.Module, file: str, released: str | None) -> InteropError:
    where = ".".join(map(str, ("config", "method", *path)))
    what = f"{file!r} is no file here" if file else "no file is given"
    source = f" They are published as {released}." if released else ""
    return InteropError(
        f"{type(module).__name__} at {where} needs trained weights, and {what}.{source} Download the file, and name it:\n"
        f"  {where}.init_cfg=dict(type='Pretrained', checkpoint='PATH')"
    )


def export(model: nnx.Module, layout: str = "mmpretrain") -> State:
    """The model's weights as a PyTorch state dict (NumPy arrays) in a layout.

    Raises:
        InteropError: the layout knows no such model, or cannot hold all its weights.
    """
    core = _core(model)
    state = hub.to_state_dict(core)
    if layout == "mmpretrain":
        return state
    full, derived = with_root(state, core), with_root(hub.derived(core), core)
    table = for_export(table_of(layout, core), core)
    result = translate(full, table, inverse=True)
    if unused := [name for name in result.unused if name not in derived and not table.lacks(name)]:
        lines = "\n  ".join(f"{name} {tuple(full[name].shape)}" for name in unused)
        hint = (
            "\nUpdates of LoRA are written after merge_lora(model)" if any(".lora_" in name for name in unused) else ""
        )
        raise InteropError(f"The layout {layout!r} has no place for\n  {lines}{hint}")
    return result.state


def save_weights(
    model: nnx.Module,
    dst: str | os.PathLike,
    *,
    meta: Mapping[str, Any] | None = None,
    report: Report | None = None,
    progress: bool = False,
) -> None:
    """Writes the converted form: a directory that `load_weights`, `get_model` and `config.load_from` read.

    Args:
        model: whose weights; abstract, if `report` brings them.
        dst: the directory, new or empty.
        meta: what else to note in `model.json`: the model's configuration and name.
        report: weights read by `read_weights` for this model; its arrays are handed over, so that a file that is mapped
            into memory is let go of before anything is written.
        progress: whether to show a progress bar.
    """
    from tqdm import tqdm

    from jaxpretrain.checkpoint import Checkpointer
    from jaxpretrain.checkpoint_format import nest

    dst = Path(dst)
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        raise InteropError(f"{dst} exists already; give a new directory, or remove it")
    arrays = {} if report is None else report.arrays
    groups: dict[str, dict] = {"params": {}, "model_state": {}}
    if report is not None:
        arrays |= _new_updates({path: v.shape for path, v in _empty(model) if path not in arrays}, seed=0)
    variables = nnx.state(model).flat_state()
    total = sum(math.prod(variable.shape) * variable.dtype.itemsize for _, variable in variables)
    with tqdm(total=total, unit="B", unit_scale=True, desc=dst.name, disable=not progress) as bar:
        for path, variable in variables:
            value = arrays.pop(path) if path in arrays else variable.get_value()
            array = _copy(value, variable.dtype)  # or the file stays mapped
            groups["params" if isinstance(variable, nnx.Param) else "model_state"][path] = array
            bar.update(array.nbytes)
    del value, array
    with Checkpointer(dst / "checkpoints") as checkpointer:
        checkpointer.save(0, {name: nest(flat) for name, flat in groups.items()} | {"ema": {}})
    (dst / "model.json").write_text(json.dumps(dict(meta or {}), indent=2, default=str) + "\n")


def _copy(value: Any, dtype: Any) -> jax.Array:
    """A copy on the device. The CPU takes NumPy's memory over where it begins at a multiple of 64 bytes: no second copy."""
    size = np.dtype(dtype).itemsize * math.prod(np.shape(value))
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    array = memory[start : start + size].view(dtype).reshape(np.shape(value))
    array[...] = value
    return jnp.asarray(array, dtype)


def _new_head(head: Any, seed: int) -> dict[hub.Path, np.ndarray]:
    """The arrays of a head like this one, as its `init_cfg` initialises them."""
    graphdef, state = nnx.split(head)
    head = nnx.merge(graphdef, nnx.to_pure_dict(state))  # a copy: the caller's stays as it is
    hub.fill(head, {path: np.zeros(v.shape, v.dtype) for path, v in nnx.state(head).flat_state()})
    head.init_weights(nnx.Rngs(seed))
    return {path: np.asarray(v.get_value()) for path, v in nnx.state(head).flat_state()}


def _without_lora(core: nnx.Module, names: Iterable[str]) -> dict[str, str]:
    """Name -> what the array would be called without `LoRAModel`s around parts of the model."""
    plain = {name: name for name in names}
    for outer, inner in adapted(core):
        plain = {name: re.sub(f"^{re.escape(inner)}", outer, other) for name, other in plain.items()}
    return plain


def _empty(model: nnx.Module) -> list[tuple[hub.Path, Any]]:
    """(path, variable) of all that has a shape and no value."""
    return [(p, v) for p, v in nnx.state(model).flat_state() if isinstance(v.get_value(), jax.ShapeDtypeStruct)]


def _new_updates(shapes: Mapping[hub.Path, tuple[int, ...]], seed: int) -> dict[hub.Path, np.ndarray]:
    """What LoRA's updates start from, those among `shapes`."""
    rngs = nnx.Rngs(seed)
    return {
        path: np.asarray(first_update(path[-2], shape, rngs))
        for path, shape in shapes.items()
        if len(path) > 1 and path[-2] in UPDATES
    }


def _core(model: Any) -> Any:
    """The model itself, of the method `Supervised` too."""
    return getattr(model, "model", model)


def _read_directory(core: nnx.Module, path: Path, which: str | None) -> State:
    """The weights of a checkpoint directory, by MMPretrain's names where the model has them, in PyTorch's axes."""
    from jaxpretrain.checkpoint import load_params
    from jaxpretrain.checkpoint_format import flatten, strings
    from jaxpretrain.train_state import eval_params, eval_state

    state = load_params(path, which or "latest").state
    flat = flatten(eval_params(state)) | flatten(eval_state(state))
    names = {strings(path): name for name, path in hub.names(core).items()}
    if any(
        isinstance(module, LoRAModel) for _, module in nnx.iter_modules(core)
    ):  # around a network that was trained before
        plain = merge_lora(nnx.merge(*nnx.split(core)))
        names = {strings(path): name for name, path in hub.names(plain).items()} | names
    found = {}
    for keys, array in flat.items():
        keys = keys[1:] if keys[0] == "model" else keys  # of the method `Supervised`
        bare = keys[1:] if keys[0] == "backbone" and not hasattr(core, "backbone") else keys
        found[names.get(strings(keys)) or names.get(strings(bare)) or ".".join(strings(keys))] = hub.to_torch(
            keys, array
        )
    return found
