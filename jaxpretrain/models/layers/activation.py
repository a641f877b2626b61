"""Activation functions by MMPretrain's names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from jaxpretrain.build import ConfigError, nearest


def quick_gelu(x: Array) -> Array:
    """x * sigmoid(1.702 x), the approximation of GELU that OpenAI's CLIP was trained with."""
    return x * jax.nn.sigmoid(1.702 * x)


def hard_sigmoid(
    x: Array, bias: float = 3.0, divisor: float = 6.0, min_value: float = 0.0, max_value: float = 1.0
) -> Array:
    """clip((x + bias) / divisor, min_value, max_value): MMCV's, with MobileNetV3's values (Howard et al., 2019)."""
    return jnp.clip((x + bias) / divisor, min_value, max_value)


ACTIVATIONS: dict[str, Callable[..., Array]] = {
    "ELU": jax.nn.elu,
    "GELU": partial(jax.nn.gelu, approximate=False),
    "HSigmoid": hard_sigmoid,
    "HSwish": jax.nn.hard_swish,
    "Hardswish": jax.nn.hard_swish,
    "LeakyReLU": jax.nn.leaky_relu,
    "QuickGELU": quick_gelu,
    "ReLU": jax.nn.relu,
    "ReLU6": jax.nn.relu6,
    "SiLU": jax.nn.silu,
    "Sigmoid": jax.nn.sigmoid,
    "Swish": jax.nn.silu,
    "Tanh": jnp.tanh,
}


def activation(act_cfg: Mapping[str, Any]) -> Callable[[Array], Array]:
    """The function that an MMPretrain `act_cfg` names: `dict(type='LeakyReLU', negative_slope=0.1)`.

    A scope (`mmpretrain.GELU`) and `inplace` are ignored; other keys are arguments.
    """
    args = {name: value for name, value in act_cfg.items() if name not in ("type", "inplace")}
    name = str(act_cfg["type"]).rpartition(".")[2]
    if name not in ACTIVATIONS:
        raise ConfigError(f"act_cfg: unknown type {name!r}.{nearest(name, ACTIVATIONS)}")
    function = ACTIVATIONS[name]
    return partial(function, **args) if args else function


class Activation(nnx.Module):
    """The function that `act_cfg` names, as a layer without parameters: for lists of layers that are called by place."""

    def __init__(self, act_cfg: Mapping[str, Any]):
        self.function = activation(act_cfg)

    def __call__(self, x: Array) -> Array:
        return self.function(x)
