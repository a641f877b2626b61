"""The base class of all networks: weight initialisation by `init_cfg`, and parameters that must not learn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, TypeVar

import numpy as np
from flax import nnx

from jaxpretrain.build import ConfigError
from jaxpretrain.models.layers.init import apply_init_cfg

T = TypeVar("T", bound=nnx.Module)


class Frozen(nnx.Variable):
    """A weight that no optimizer touches: fixed position tables, frozen stages, momentum encoders.

    It counts as a parameter in weight files and parameter counts, but gets no gradient, no weight decay and no entry in
    the optimizer's state, because those look at `nnx.Param` alone.
    """


def freeze(module: T) -> T:
    """Turns every `nnx.Param` below `module` into a `Frozen` variable, in place. Shared ones stay shared. Returns it."""
    places = [
        (node, name, value)
        for _, node in nnx.iter_modules(module)
        for name, value in vars(node).items()
        if isinstance(value, nnx.Param)
    ]
    frozen = {id(value): Frozen(value.get_value()) for _, _, value in places}
    for node, name, value in places:
        setattr(node, name, frozen[id(value)])
    return module


def freeze_stage(module: T) -> T:
    """Freezes a stage of a backbone in place: its weights, its running statistics, and it drops no paths. Returns it."""
    freeze(module)
    module.set_attributes(norm_eval=True, drop_path_rate=0.0, raise_if_not_found=False)
    return module


def freeze_first(parts: Sequence[nnx.Module], frozen_stages: int, owner: str) -> None:
    """Freezes the stem and the first `frozen_stages` stages of `parts`, which are in this order; nothing if that is -1.

    Raises:
        ConfigError: more stages than the `owner` has.
    """
    if not -1 <= frozen_stages < len(parts):
        raise ConfigError(f"{owner}: frozen_stages is -1 (none) to {len(parts) - 1}, not {frozen_stages}")
    for part in parts[: frozen_stages + 1]:
        freeze_stage(part)


def children(module: Any) -> Iterator[BaseModule]:
    """The nearest `BaseModule`s below `module`, looking through lists, dictionaries and sequentials."""
    if isinstance(module, nnx.List):
        values = list(module)
    elif isinstance(module, nnx.Sequential):
        values = list(module.layers)
    else:
        values = [value for name, value in vars(module).items() if not name.startswith("_pytree")]
    for value in values:
        if isinstance(value, BaseModule):
            yield value
        elif isinstance(value, nnx.List | nnx.Dict | nnx.Sequential):
            yield from children(value)


class BaseModule(nnx.Module):
    """A module that knows how its paper initialises it.

    Layers start from PyTorch's default initialisation. `init_weights` then applies `init_cfg` (MMEngine's dictionaries:
    `dict(type='TruncNormal', layer='Linear', std=0.02)`) from the outermost module inwards, so an inner module has the
    last word, as in MMEngine. Sub-classes with a rule of their own override `init_weights` and call `super()` first.

    Attributes:
        state_names: what attributes are called in MMPretrain's state dict, where that is not their own name.
        aliases: parts that MMPretrain's state dict has a second time: the other name -> the name; both relative.
        local_state: variables of this module that MMPretrain's state dict lacks: left out of exports, zero in imports.
    """

    init_cfg: Any = None
    state_names: ClassVar[dict[str, str]] = {}
    aliases: ClassVar[dict[str, str]] = {}
    local_state: ClassVar[tuple[str, ...]] = ()

    def derived(self) -> dict[str, np.ndarray]:
        """Arrays that MMPretrain keeps in its state dict and that follow from the arguments: index tables and the like.

        They are no state here. Names are MMPretrain's, relative to this module; those of modules below it are theirs.
        """
        return {}

    def adapt(self, name: str, array: np.ndarray) -> np.ndarray | None:
        """The loaded `array` of this module's variable `name`, brought to the shape that the variable has here.

        For tables of positions, which images of another size need in another size. None: there is no way.
        """
        return None

    def init_weights(self, rngs: nnx.Rngs) -> None:
        """Initialises this module and all below it, in place."""
        apply_init_cfg(self, self.init_cfg, rngs)
        for child in children(self):
            child.init_weights(rngs)
