"""Weight initialisation as MMEngine describes it: dictionaries naming a distribution and the layers it applies to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers
from jaxtyping import Array

Initializer = Callable[..., Array]


def torch_uniform(fan_in: int) -> Initializer:
    """PyTorch's default for weights and biases of `Linear` and `Conv2d`: U(-1/sqrt(fan_in), 1/sqrt(fan_in))."""
    bound = fan_in**-0.5 if fan_in > 0 else 0.0

    def init(key: Array, shape: Sequence[int], dtype: Any = jnp.float32) -> Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def trunc_normal(std: float = 0.02, mean: float = 0.0, a: float = -2.0, b: float = 2.0) -> Initializer:
    """PyTorch's `trunc_normal_`: a normal distribution cut at the *absolute* values a and b, not at multiples of std."""

    def init(key: Array, shape: Sequence[int], dtype: Any = jnp.float32) -> Array:
        return mean + std * jax.random.truncated_normal(key, (a - mean) / std, (b - mean) / std, shape, dtype)

    return init


def _distribution(cfg: Mapping[str, Any]) -> Initializer:
    """The initialiser of kernels ([..., in, out]) that an MMEngine dictionary describes."""
    kind = cfg["type"]
    if kind == "Xavier":
        law = {"uniform": initializers.xavier_uniform, "normal": initializers.xavier_normal}
        base = law[cfg.get("distribution", "normal")]()
        gain = cfg.get("gain", 1.0)
        return lambda key, shape, dtype=jnp.float32: gain * base(key, shape, dtype)
    if kind == "Kaiming":
        relu = cfg.get("nonlinearity", "relu") == "relu"
        scale = 2.0 / (1 + cfg.get("a", 0.0) ** 2) if relu else 1.0
        law = {"uniform": "uniform", "normal": "normal"}[cfg.get("distribution", "normal")]
        return initializers.variance_scaling(scale, cfg.get("mode", "fan_out"), law)
    if kind == "Normal":
        mean, std = cfg.get("mean", 0.0), cfg.get("std", 1.0)
        return lambda key, shape, dtype=jnp.float32: mean + std * jax.random.normal(key, shape, dtype)
    if kind == "TruncNormal":
        return trunc_normal(cfg.get("std", 1.0), cfg.get("mean", 0.0), cfg.get("a", -2.0), cfg.get("b", 2.0))
    if kind == "Uniform":
        low, high = cfg.get("a", 0.0), cfg.get("b", 1.0)
        return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, low, high)
    if kind == "Constant":
        return initializers.constant(cfg["val"])
    raise ValueError(
        f"init_cfg: unknown type {kind!r}; known are Xavier, Kaiming, Normal, TruncNormal, Uniform and Constant"
    )


def _layer_names(module: nnx.Module) -> set[str]:
    """The names under which `init_cfg` may mean this layer: PyTorch's class names and those of the base classes."""
    from jaxpretrain.models.layers.conv import Conv2d
    from jaxpretrain.models.layers.linear import Linear
    from jaxpretrain.models.layers.norm import BatchNorm, LayerNorm

    names = {cls.__name__ for cls in type(module).__mro__}
    aliases: dict[type, set[str]] = {
        BatchNorm: {"_BatchNorm", "BatchNorm1d", "BatchNorm2d", "SyncBatchNorm"},
        LayerNorm: {"LayerNorm"},
        Linear: {"Linear"},
        Conv2d: {"Conv2d"},
    }
    for cls, extra in aliases.items():
        if isinstance(module, cls):
            names |= extra
    return names


def apply_init_cfg(module: nnx.Module, init_cfg: Any, rngs: nnx.Rngs) -> None:
    """Applies one MMEngine initialisation dictionary, or a list of them, to the matching layers below `module`.

    Kernels and scales get the distribution, biases the constant `bias` (default 0). Raises ValueError for an unknown
    type, and for `Pretrained`, which is not an initialisation here: load weights with `config.load_from` instead.
    """
    if not init_cfg:
        return
    for cfg in [init_cfg] if isinstance(init_cfg, Mapping) else init_cfg:
        if cfg["type"] == "Pretrained":
            raise ValueError("init_cfg=dict(type='Pretrained') is not supported: load the weights after building instead")
        wanted = cfg.get("layer")
        wanted = {wanted} if isinstance(wanted, str) else set(wanted or ())
        init = _distribution(cfg)
        for _, node in nnx.iter_graph(module):
            if not isinstance(node, nnx.Module) or not (_layer_names(node) & wanted):
                continue
            for name in ("kernel", "scale"):
                variable = getattr(node, name, None)
                if isinstance(variable, nnx.Variable):
                    variable.set_value(init(rngs.params(), variable.shape, variable.dtype))
            bias = getattr(node, "bias", None)
            if isinstance(bias, nnx.Variable):
                bias.set_value(jnp.full(bias.shape, cfg.get("bias", 0.0), bias.dtype))
