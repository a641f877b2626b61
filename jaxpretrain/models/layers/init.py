"""Weight initialisation as MMEngine describes it: dictionaries naming a distribution and the layers it applies to."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.nn import initializers
from jaxtyping import Array

from jaxpretrain.build import ConfigError, build, nearest

Initializer = Callable[..., Array]

_HOST: ContextVar[np.random.Generator | None] = ContextVar("_HOST", default=None)


@contextmanager
def draw_on_host(seed: int) -> Iterator[None]:
    """Inside, `uniform`, `normal` and `trunc_normal` draw by NumPy, from `seed` and in order, whatever their keys.

    jax.random is compiled for each shape anew: 15 s of CPU time for a ResNet-50 that is built outside of `jit`, of which
    1.5 s are left like this. The distributions are the same, the numbers are others.
    """
    token = _HOST.set(np.random.default_rng(seed))
    try:
        yield
    finally:
        _HOST.reset(token)


def torch_uniform(fan_in: int) -> Initializer:
    """PyTorch's default for weights and biases of `Linear` and `Conv2d`: U(-1/sqrt(fan_in), 1/sqrt(fan_in))."""
    bound = fan_in**-0.5 if fan_in > 0 else 0.0
    return uniform(-bound, bound)


def uniform(a: float = 0.0, b: float = 1.0) -> Initializer:
    """The uniform distribution on [a, b)."""

    def init(key: Array, shape: Sequence[int], dtype: Any = jnp.float32) -> Array:
        if (host := _HOST.get()) is not None:
            return jnp.asarray(a + (b - a) * host.random(shape, np.float32), dtype)
        return jax.random.uniform(key, shape, dtype, a, b)

    return init


def normal(mean: float = 0.0, std: float = 1.0) -> Initializer:
    """The normal distribution."""

    def init(key: Array, shape: Sequence[int], dtype: Any = jnp.float32) -> Array:
        if (host := _HOST.get()) is not None:
            return jnp.asarray(mean + std * host.standard_normal(shape, np.float32), dtype)
        return mean + std * jax.random.normal(key, shape, dtype)

    return init


def trunc_normal(std: float = 1.0, mean: float = 0.0, a: float = -2.0, b: float = 2.0) -> Initializer:
    """PyTorch's `trunc_normal_`: a normal distribution cut at the *absolute* values a and b, not multiples of std."""

    def init(key: Array, shape: Sequence[int], dtype: Any = jnp.float32) -> Array:
        low, high = (a - mean) / std, (b - mean) / std
        if (host := _HOST.get()) is not None:
            from scipy.special import ndtr, ndtri  # the normal distribution function, and its inverse

            share = ndtr(low) + (ndtr(high) - ndtr(low)) * host.random(shape)
            return jnp.asarray(mean + std * np.clip(ndtri(share), low, high), dtype)
        return mean + std * jax.random.truncated_normal(key, low, high, shape, dtype)

    return init


def xavier(gain: float = 1.0, distribution: str = "normal") -> Initializer:
    """Glorot & Bengio (2010): variance gain^2 * 2 / (fan_in + fan_out). `distribution`: 'normal' or 'uniform'."""
    return _variance_scaling(gain**2, "fan_avg", distribution)


def kaiming(
    a: float = 0.0, mode: str = "fan_out", nonlinearity: str = "relu", distribution: str = "normal"
) -> Initializer:
    """He et al. (2015): variance gain^2 / fan, with PyTorch's gains; `a` is the slope of a leaky ReLU.

    `mode`: 'fan_out' or 'fan_in'; `distribution`: 'normal' or 'uniform'.
    """
    squared_gains = {"relu": 2.0, "leaky_relu": 2 / (1 + a**2), "tanh": 25 / 9, "selu": 9 / 16}
    squared_gains |= dict.fromkeys(("linear", "conv1d", "conv2d", "conv3d", "sigmoid"), 1.0)
    if nonlinearity not in squared_gains:
        raise ConfigError(f"init_cfg: unknown nonlinearity {nonlinearity!r}.{nearest(nonlinearity, squared_gains)}")
    if mode not in ("fan_in", "fan_out"):
        raise ConfigError(f"init_cfg: mode is 'fan_in' or 'fan_out', not {mode!r}")
    return _variance_scaling(squared_gains[nonlinearity], mode, distribution)


def caffe2_xavier() -> Initializer:
    """Caffe2's XavierFill: U with variance 1 / fan_in."""
    return kaiming(a=1.0, mode="fan_in", nonlinearity="leaky_relu", distribution="uniform")


def constant(val: float) -> Initializer:
    """`val` everywhere."""
    return initializers.constant(val)


def _variance_scaling(scale: float, mode: Any, distribution: Any) -> Initializer:
    if distribution not in ("normal", "uniform"):
        raise ConfigError(f"init_cfg: distribution is 'normal' or 'uniform', not {distribution!r}")
    return initializers.variance_scaling(scale, mode, distribution)


_INITIALIZERS: dict[str, Callable[..., Initializer]] = {
    "Caffe2Xavier": caffe2_xavier,
    "Constant": constant,
    "Kaiming": kaiming,
    "Normal": normal,
    "TruncNormal": trunc_normal,
    "Uniform": uniform,
    "Xavier": xavier,
}


def apply_init_cfg(module: nnx.Module, init_cfg: Any, rngs: nnx.Rngs) -> None:
    """Applies one MMEngine initialisation dictionary, or a list of them, to the matching layers below `module`.

    Keys of a dictionary: `type` (Constant, Normal, TruncNormal, Uniform, Xavier, Kaiming, Caffe2Xavier) and its own
    arguments; `layer`, the class names it is meant for (none: no layer); `bias` (default 0) or `bias_prob` for biases;
    `override`, one or several dictionaries with the `name` of an attribute below which every layer is initialised anew,
    by their own `type` or by the same one. Kernels and scales get the distribution, biases the constant. `Pretrained` does
    nothing here: whoever builds the network loads those weights (`interop.starting_weights`).

    Raises:
        ConfigError: an unknown type, argument or name.
    """
    if not init_cfg:
        return
    for cfg in _as_list(init_cfg):
        rule = dict(cfg)
        overrides = _as_list(rule.pop("override", None) or [])
        layers = {rule["layer"]} if isinstance(rule.get("layer"), str) else set(rule.get("layer") or ())
        _fill((node for node in _modules(module) if _names(node) & layers), rule, rngs)
        for override in map(dict, overrides):
            name = override.pop("name", None)
            part = getattr(module, name, None) if isinstance(name, str) else None
            if part is None:
                raise ConfigError(f"init_cfg: override names no part of {type(module).__name__}: {name!r}")
            _fill(_modules(part), override or rule, rngs)


def _as_list(cfg: Any) -> list:
    return list(cfg) if isinstance(cfg, list | tuple) else [cfg]


def _modules(module: nnx.Module) -> list[nnx.Module]:
    return [node for _, node in nnx.iter_modules(module)]


def _names(module: nnx.Module) -> set[str]:
    """The names under which `init_cfg` may mean this layer: its classes' and PyTorch's (`torch_names`)."""
    return {cls.__name__ for cls in type(module).__mro__} | set(getattr(module, "torch_names", ()))


def _fill(modules: Any, rule: Mapping[str, Any], rngs: nnx.Rngs) -> None:
    """Writes kernels, scales and biases of `modules` by a rule without `override`."""
    args = {key: value for key, value in rule.items() if key not in ("type", "layer", "bias", "bias_prob")}
    kind = rule.get("type")
    if kind == "Pretrained":
        return
    if kind not in _INITIALIZERS:
        raise ConfigError(f"init_cfg: unknown type {kind!r}.{nearest(str(kind), _INITIALIZERS)}")
    init = build({"type": _INITIALIZERS[kind], **args})
    bias_value = rule.get("bias", 0.0)
    if rule.get("bias_prob") is not None:  # the logit of a prior probability (focal loss)
        bias_value = -math.log((1 - rule["bias_prob"]) / rule["bias_prob"])
    for node in modules:
        for name in ("kernel", "scale", "weight"):
            variable = getattr(node, name, None)
            if isinstance(variable, nnx.Variable):
                variable.set_value(init(rngs.params(), variable.shape, variable.dtype))
        bias = getattr(node, "bias", None)
        if isinstance(bias, nnx.Variable):
            bias.set_value(jnp.full(bias.shape, bias_value, bias.dtype))
