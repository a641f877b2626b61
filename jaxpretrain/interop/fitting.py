"""Fitting a state dict to a model: which layout it has, what of it goes where, and what is left over."""

from __future__ import annotations

import functools
import importlib
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from flax import nnx

from jaxpretrain.build import nearest
from jaxpretrain.interop import mmpretrain as hub
from jaxpretrain.interop.rules import InteropError, Rule, State, Table, Translation, describe_leftovers, translate
from jaxpretrain.models.layers.base import BaseModule
from jaxpretrain.models.lora import LoRAModel

logger = logging.getLogger("jaxpretrain")

# Modules with tables, TABLES: {layout: {class of the backbone or method: function of (backbone, model) that gives a Table}}.
_MODULES = (
    "timm",
    "torchvision",
    "huggingface",
    "originals",
    "reparam",
    "efficient",
    "convnext",
    "classic",
    "hierarchical",
    "mobile",
    "sparse",
    "transformers",
    "google",
)
LAYOUTS = (
    "timm",
    "torchvision",
    "hf",
    "deit",
    "dino",
    "ibot",
    "dinov2",
    "vicreg",
    "mae",
    "moco",
    "mocov3",
    "beit",
    "eva",
    "clip",
    "ijepa",
    "sam",
    "swin",
    "levit",
    "tinyvit",
    "poolformer",
    "efficientformer",
    "convnext",
    "xcit",
    "hornet",
    "van",
    "hivit",
    "itpn",
    "mixmim",
    "vig",
    "repvgg",
    "mobileone",
    "replknet",
    "repmlp",
    "spark",
    "mvit",
    "twins",
    "davit",
    "conformer",
    "t2t",
    "slowfast",
    "edgenext",
    "cvnets",
    "hrnet",
    "convmixer",
    "pycls",
    "glip",
    "vit_jax",
    "tpu",
)


@functools.cache
def _known(layout: str) -> dict[str, Callable]:
    """The tables of a layout, of all modules: class -> function."""
    modules = (importlib.import_module(f"jaxpretrain.interop.{name}") for name in _MODULES)
    return {kind: table for module in modules for kind, table in module.TABLES.get(layout, {}).items()}


# `steps` and `module.` are of the averaged weights that MMEngine keeps beside the others.
_MMPRETRAIN = Table([Rule("{rest}", "{rest}")], ignore=("^steps$",), prefixes=("module.",))


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
        return replace(_MMPRETRAIN, absent=[f"^{re.escape(name)}$" for name in hub.local(model)])
    model = _inside(model)
    backbone = _inside(getattr(model, "backbone", model))
    known = _known(layout)
    for kind in (*type(model).__mro__, *type(backbone).__mro__):
        if kind.__name__ in known:
            return known[kind.__name__](backbone, model)
    return None


def _inside(module: Any) -> Any:
    """The network that a `LoRAModel` is around; others as they are."""
    return module.module if isinstance(module, LoRAModel) else module


@dataclass
class Fit:
    """What one layout makes of a state dict for a model. Names are MMPretrain's, with `backbone.` for bare backbones too.

    Attributes:
        layout: its name.
        state: the arrays that have a place, by name; those of another shape among them.
        shapes: the model's arrays to be filled: name -> shape in PyTorch.
        derived: arrays that follow from the model's arguments.
        unused: names without a place -> shape.
        ignored: names that the layout leaves out.
        incomplete: messages about rules of which only some names are there.
        reinit: names in the model that are to be initialised anew.
    """

    layout: str
    state: State
    shapes: dict[str, tuple[int, ...]]
    derived: State
    unused: dict[str, tuple[int, ...]]
    ignored: list[str]
    incomplete: list[str]
    reinit: set[str]

    def missing(self) -> dict[str, tuple[int, ...]]:
        """What of the model got nothing."""
        return {name: size for name, size in self.shapes.items() if name not in self.state and name not in self.reinit}

    def wrong(self) -> dict[str, tuple[Sequence[int], Sequence[int]]]:
        """What has another shape: name -> (the file's, the model's)."""
        pairs = {name: (self.state[name].shape, size) for name, size in self.shapes.items() if name in self.state}
        return {name: (a, b) for name, (a, b) in pairs.items() if a != b}

    def leftovers(self) -> int:
        """How badly it fits: 0 is perfect."""
        return len(self.unused) + len(self.missing()) + len(self.wrong()) + len(self.incomplete)

    def check(self, source: str) -> None:
        """Raises InteropError with a line for everything that does not fit."""
        lines = describe_leftovers(self.unused, self.missing(), self.wrong(), self.incomplete)
        lines += [
            f"another table   {name}: the file's is not what follows from this model's settings"
            for name, array in self.derived.items()
            if name in self.state and array.shape == self.state[name].shape
            if not np.allclose(array, self.state[name], rtol=1e-5, atol=1e-6)
        ]
        if lines:
            lines = [f"{source} does not fit (layout {self.layout!r}):", *(f"  {line}" for line in lines)]
            raise InteropError("\n".join([*lines, *self._advice()]))

    def _advice(self) -> list[str]:
        advice = []
        if any(name.startswith("head.") for name in self.wrong()):
            advice.append(
                "The head is for another number of classes: reinit_head=True (--reinit-head) starts a new one."
            )
        elif any(name.startswith("head.") for name in self.missing()):
            advice.append("The file has no such head: reinit_head=True (--reinit-head) starts a new one.")
        if self.unused:
            advice.append("What is no part of the model can be left out by name: drop=[regular expression] (--drop).")
            advice.append("To take only the encoder out of a larger file: part='backbone' (--part=backbone).")
        return advice


def recognise(model: nnx.Module, state: State, layout: str, part: str | None, reinit_head: bool) -> Fit:
    """The fit of the layout asked for, or with 'auto' of the one that leaves least over; not yet checked."""
    shapes, derived = with_root(hub.shapes(model), model), with_root(hub.derived(model), model)

    def fit(layout: str, table: Table) -> Fit:
        return _fit(model, shapes, derived, state, layout, table, part, reinit_head)

    if layout != "auto":
        return fit(layout, table_of(layout, model))
    fits = []
    for name in ("mmpretrain", *LAYOUTS):
        if (table := tables(name, model)) is not None:
            fits.append(fit(name, table))
            if not fits[-1].leftovers():
                break
    return min(fits, key=Fit.leftovers)


def table_of(layout: str, model: nnx.Module) -> Table:
    """The table of a layout that the user named. Raises InteropError if there is none."""
    if layout not in ("mmpretrain", *LAYOUTS):
        raise InteropError(f"There is no layout {layout!r}.{nearest(layout, ('auto', 'mmpretrain', *LAYOUTS))}")
    table = tables(layout, model)
    if table is None:
        kind = type(getattr(model, "backbone", model)).__name__
        fitting = [name for name in ("mmpretrain", *LAYOUTS) if tables(name, model) is not None]
        raise InteropError(f"The layout {layout!r} has no {kind}; layouts that have: {', '.join(fitting)}")
    return table


def with_root(named: Mapping[str, Any], model: nnx.Module) -> dict[str, Any]:
    """The same by names that begin with `backbone.`, if the model is a bare backbone."""
    return dict(named) if hasattr(model, "backbone") else {f"backbone.{name}": value for name, value in named.items()}


def _fit(
    model: nnx.Module,
    shapes: dict[str, tuple[int, ...]],
    derived: State,
    state: State,
    layout: str,
    table: Table,
    part: str | None,
    reinit_head: bool,
) -> Fit:
    state = {_strip(name, table): array for name, array in state.items()}
    if layout == "mmpretrain" and not any(name.startswith("backbone.") for name in state):
        state = with_root(state, model)
    result = translate(state, table)
    _into_lora(model, result)
    _merge_aliases(model, result)
    _share_out(result.state, shapes)
    if part is not None:
        shapes = {name: size for name, size in shapes.items() if name.startswith(f"{part}.")}
        result.state = {name: array for name, array in result.state.items() if name.startswith(f"{part}.")}
    reinit = {
        name
        for name, size in shapes.items()
        if reinit_head and name.startswith("head.") and (name not in result.state or result.state[name].shape != size)
    }
    translated = {n: v for n, v in result.state.items() if not (reinit and n.startswith("head."))}
    if reinit:  # a new head is all new
        reinit = {name for name in shapes if name.startswith("head.")}
    updates = {name for name in shapes if ".lora_" in name}
    if not updates & translated.keys():  # the file is of the network that LoRA adapts
        reinit |= updates
    known = shapes.keys() | derived.keys()
    unused = {name: state[name].shape for name in result.unused}
    unused |= {result.origins[name]: array.shape for name, array in translated.items() if name not in known}
    kept = {name: array for name, array in translated.items() if name in known}
    kept |= {name: np.zeros(shapes[name], np.int64) for name in shapes.keys() - kept.keys() if table.lacks(name)}
    fit = Fit(layout, kept, shapes, derived, unused, result.ignored, result.incomplete, reinit)
    _adapt(model, fit)
    return fit


def _into_lora(model: nnx.Module, result: Translation) -> None:
    """Names of a network become those within the `LoRAModel` around it, which has the network as `module`."""
    for outer, inner in adapted(model):
        for name in [n for n in result.state if n.startswith(outer) and not n.startswith(inner)]:
            new = inner + name.removeprefix(outer)
            result.state[new], result.origins[new] = result.state.pop(name), result.origins.pop(name)


def adapted(model: nnx.Module) -> list[tuple[str, str]]:
    """How the names of each network that LoRA adapts begin: (without LoRA, in `model`); `backbone.` is before all."""
    root = "" if hasattr(model, "backbone") else "backbone."
    found = [root + prefix for prefix, module in hub.modules(model) if isinstance(module, LoRAModel)]
    return [(prefix, f"{prefix}module.") for prefix in found]


def _merge_aliases(model: nnx.Module, result: Translation) -> None:
    """Leaves one of two names of the same array (see `BaseModule.aliases`)."""
    root = "" if hasattr(model, "backbone") else "backbone."
    for pair in hub.aliases(model).items():
        other, name = (root + part for part in pair)
        if (array := result.state.pop(other, None)) is None:
            continue
        result.origins.setdefault(name, result.origins[other])
        if not np.array_equal(result.state.setdefault(name, array), array):
            result.incomplete.append(f"{other} and {name} are one array in the model, but differ")


def _share_out(state: State, shapes: Mapping[str, Any]) -> None:
    """Gives each layer the biases for relative positions that all shared: so BEiT is pre-trained, and so fine-tuned."""
    name = "relative_position_bias_table"
    own = [other for other in shapes if re.fullmatch(rf"backbone\.layers\.\d+\.attn\.{name}", other)]
    if own and f"backbone.rel_pos_bias.{name}" not in shapes and not any(other in state for other in own):
        table = state.pop(f"backbone.rel_pos_bias.{name}", None)
        if table is not None:
            state.update(dict.fromkeys(own, table))


def _adapt(model: nnx.Module, fit: Fit) -> None:
    """Lets modules bring tables of positions for another size of images to their own (see `BaseModule.adapt`)."""
    if not (wrong := fit.wrong()):
        return
    paths, modules = with_root(hub.names(model), model), dict(nnx.iter_modules(model))
    for name in wrong:
        *owner, leaf = paths[name]
        module = modules.get(tuple(owner))
        if isinstance(module, BaseModule):
            adapted = module.adapt(leaf, hub.from_torch(paths[name], fit.state[name]))
            if adapted is not None:
                logger.info("%s: resized from %s to %s", name, fit.state[name].shape, adapted.shape)
                fit.state[name] = hub.to_torch(paths[name], adapted)


def _strip(name: str, table: Table) -> str:
    for prefix in (*table.prefixes, table.prefix):
        name = name.removeprefix(prefix)
    return name


def for_export(table: Table, model: nnx.Module) -> Table:
    """The table with the foreign prefix of backbones put back, where the model has a head."""
    if not table.prefix or getattr(model, "head", None) is None:
        return table

    def prefixed(names: str | tuple[str, ...]) -> Any:
        return table.prefix + names if isinstance(names, str) else tuple(table.prefix + name for name in names)

    def is_backbone(rule: Rule) -> bool:
        return (rule.ours if isinstance(rule.ours, str) else rule.ours[0]).startswith("backbone.")

    rules = [Rule(prefixed(r.theirs), r.ours, r.transform) if is_backbone(r) else r for r in table.rules]
    return replace(table, rules=rules)
