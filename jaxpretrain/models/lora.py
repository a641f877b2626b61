"""LoRA: Low-Rank Adaptation (Hu et al., 2022, https://arxiv.org/abs/2106.09685), of the linear layers of any network."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxpretrain.build import ConfigError, build
from jaxpretrain.models.layers.base import BaseModule, Frozen, freeze
from jaxpretrain.models.layers.drop import Dropout
from jaxpretrain.models.layers.init import torch_uniform
from jaxpretrain.models.layers.linear import Linear

UPDATES = ("lora_down", "lora_up")  # what the two layers of an update are called

# The key of the running call of a `LoRAModel`, for its layers' dropout: networks hand none to their linear layers.
_KEY: ContextVar[Array | None] = ContextVar("lora_key", default=None)


class LoRALinear(BaseModule, Linear):
    """x @ kernel + bias + alpha / rank * dropout(x) @ lora_down @ lora_up, of which the last two matrices learn.

    At first it is the layer that it replaces, for `lora_up` is zero.

    Args:
        original: the layer, whose variables are taken over; `freeze` it before.
        alpha: factor of the update, divided by `rank`.
        rank: width between the two matrices of the update.
        drop_rate: dropout of the update's input, in training.
        index: of the layer in the network, which sets its mask of dropout apart from the others'.
    """

    state_names: ClassVar = Linear.state_names

    def __init__(
        self, original: Linear, alpha: float, rank: int, drop_rate: float = 0.0, index: int = 0, *, rngs: nnx.Rngs
    ):
        if rank < 1:
            raise ConfigError(f"LoRA: rank={rank} must be 1 or more; set it for all targets, or for each")
        self.in_features, self.out_features = original.in_features, original.out_features
        self.kernel, self.bias = original.kernel, original.bias
        self.scaling = alpha / rank
        self.index = index if drop_rate else 0  # layers without chance are alike, so they can be scanned
        self.lora_dropout = Dropout(drop_rate)
        self.lora_down = Linear(self.in_features, rank, bias=False, rngs=rngs)
        self.lora_up = Linear(rank, self.out_features, bias=False, rngs=rngs)
        self.lora_up.kernel.set_value(first_update("lora_up", (rank, self.out_features), rngs))

    def __call__(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        key = _KEY.get()
        rngs = None if key is None else nnx.Rngs(dropout=jax.random.fold_in(key, self.index))
        update = self.lora_up(self.lora_down(self.lora_dropout(x, rngs=rngs)))
        return Linear.__call__(self, x) + self.scaling * update

    def init_weights(self, rngs: nnx.Rngs) -> None:
        """PyTorch's default for `lora_down`, zeros for `lora_up`, whatever outer modules' `init_cfg` gave them."""
        super().init_weights(rngs)
        for name in UPDATES:
            kernel = getattr(self, name).kernel
            kernel.set_value(first_update(name, kernel.shape, rngs))

    def merged(self) -> Linear:
        """The plain layer with the update in its kernel, which is the same without dropout; of shapes, with shapes."""
        layer = Linear(1, 1, bias=self.bias is not None, rngs=nnx.Rngs(0))
        layer.in_features, layer.out_features, layer.bias = self.in_features, self.out_features, self.bias
        kernel, down, up = (each.kernel.get_value() for each in (self, self.lora_down, self.lora_up))
        if not isinstance(kernel, jax.ShapeDtypeStruct):
            kernel = kernel + self.scaling * jnp.matmul(down, up, precision="highest")
        layer.kernel = Frozen(kernel)  # type: ignore[assignment]
        return layer


def first_update(name: str, shape: tuple[int, ...], rngs: nnx.Rngs) -> Float[Array, "in out"]:
    """What a kernel of an update starts from: `lora_down` from PyTorch's default, `lora_up` from zeros."""
    return torch_uniform(shape[0])(rngs.params(), shape) if name == "lora_down" else jnp.zeros(shape)


class LoRAModel(BaseModule):
    """A network of which only low-rank updates of some linear layers learn. It is called like the network itself.

    What else the network has (`module`), attributes and methods, is to be had from here too. Files of the network's
    weights fit as they are: the updates then start anew.

    Args:
        module: the network: `dict(type=...)` or a module.
        alpha: factor of the updates, divided by `rank`.
        rank: width between the two matrices of each update.
        drop_rate: dropout of the updates' inputs, in training. Layers with dropout are not scanned (`scan_layers`).
        targets: which linear layers: dictionaries with `type`, a regular expression of the whole name or an ending of it
            ('.*qkv', 'proj'), and perhaps `alpha`, `rank` and `drop_rate` of their own. Names are MMPretrain's or ours
            (`layers.0.ffn.layers.1` or `layers.0.ffn.fc2`). The first that matches counts.

    Raises:
        ConfigError: no targets, or none that matches a linear layer.
    """

    def __init__(
        self,
        module: Mapping[str, Any] | nnx.Module,
        alpha: float = 1,
        rank: int = 0,
        drop_rate: float = 0.0,
        targets: Sequence[Mapping[str, Any]] = (),
        *,
        rngs: nnx.Rngs,
    ):
        if not targets:
            raise ConfigError("LoRAModel: no targets; name linear layers, as targets=[dict(type='qkv')]")
        self.module = freeze(build(module, rngs=rngs))
        found = False
        for index, (path, names, layer) in enumerate(list(_linear_layers(self.module))):
            for target in targets:
                if any(re.fullmatch(target["type"], name) or name.endswith(target["type"]) for name in names):
                    cfg = {"alpha": alpha, "rank": rank, "drop_rate": drop_rate, **target}
                    del cfg["type"]
                    _replace(self.module, path, LoRALinear(layer, index=index, **cfg, rngs=rngs))
                    found = True
                    break
        if not found:
            wanted = ", ".join(repr(target["type"]) for target in targets)
            known = [names[0] for _, names, _ in _linear_layers(self.module)]
            raise ConfigError(f"LoRAModel: no linear layer is called {wanted}; there are {', '.join(known[:8])}, ...")

    def __call__(self, *args: Any, rngs: nnx.Rngs | None = None, **kwargs: Any) -> Any:
        """What the network gives. `rngs` is for its chance in training, and for the updates' dropout."""
        token = _KEY.set(None if rngs is None else rngs.dropout())
        try:
            return self.module(*args, rngs=rngs, **kwargs)
        finally:
            _KEY.reset(token)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "module":
            raise AttributeError(name)
        return getattr(self.module, name)


def merge_lora(model: Any) -> Any:
    """`model` with all its `LoRALinear` layers made plain ones and each `LoRAModel` its network; in place.

    For inference, and for files that others read: it computes the same, and its weights remain those that do not learn.
    Returns it; of a `LoRAModel`, its network.
    """
    for path, part in list(nnx.iter_modules(model)):
        if isinstance(part, LoRALinear):
            _replace(model, path, part.merged())
    for path, part in list(nnx.iter_modules(model)):
        if isinstance(part, LoRAModel) and path:
            _replace(model, path, part.module)
    return model.module if isinstance(model, LoRAModel) else model


def _linear_layers(model: nnx.Module) -> Iterator[tuple[tuple[Any, ...], tuple[str, str], Linear]]:
    """(path, names here and in MMPretrain, layer) of all linear layers, but for those of updates."""
    modules = dict(nnx.iter_modules(model))
    for path, layer in sorted(modules.items(), key=lambda item: list(map(_sort_key, item[0]))):
        if type(layer) is Linear and not (path and path[-1] in UPDATES):
            theirs = (getattr(modules.get(path[:i]), "state_names", {}).get(part, part) for i, part in enumerate(path))
            yield path, (".".join(map(str, path)), ".".join(map(str, theirs))), layer


def _sort_key(part: Any) -> tuple[bool, Any]:
    return isinstance(part, str), part


def _replace(model: Any, path: tuple[Any, ...], part: nnx.Module) -> None:
    """Puts `part` at `path`."""
    for step in path[:-1]:
        model = model[step] if isinstance(model, nnx.List | nnx.Dict) else getattr(model, step)
    if isinstance(model, nnx.List | nnx.Dict):
        model[path[-1]] = part
    else:
        setattr(model, path[-1], part)
