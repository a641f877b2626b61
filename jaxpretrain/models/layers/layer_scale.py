"""LayerScale, a learned gain per channel on a residual branch."""

from __future__ import annotations

from typing import ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


class LayerScale(nnx.Module):
    """y = x * scale, with `scale` [dim] starting at a small constant (Touvron et al., 2021, eq. 4)."""

    state_names: ClassVar = {"scale": "weight"}

    def __init__(self, dim: int, layer_scale_init_value: float = 1e-5):
        self.scale = nnx.Param(jnp.full((dim,), layer_scale_init_value))

    def __call__(self, x: Float[Array, "*batch c"]) -> Float[Array, "*batch c"]:
        return x * self.scale[...].astype(x.dtype)
