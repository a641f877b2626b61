"""Dropout and stochastic depth."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


class Dropout(nnx.Module):
    """Zeroes each value with probability `rate` in training, and scales the rest to keep the mean."""

    def __init__(self, rate: float):
        self.rate = rate
        self.deterministic = False

    def __call__(self, x: Array, *, rngs: nnx.Rngs | None = None) -> Array:
        if self.deterministic or self.rate == 0.0:
            return x
        if rngs is None:
            raise ValueError("Dropout: in training mode a call needs `rngs`; pass them, or call model.eval() first")
        keep = 1.0 - self.rate
        mask = jax.random.bernoulli(rngs.dropout(), keep, x.shape)
        return jnp.where(mask, x / jnp.asarray(keep, x.dtype), jnp.zeros((), x.dtype))


def drop_path(x: Float[Array, "b ..."], rate: float | Array, rngs: nnx.Rngs | None) -> Float[Array, "b ..."]:
    """Stochastic depth (Huang et al., 2016): drops whole samples of a residual branch with probability `rate`.

    The kept ones are scaled by 1 / (1 - rate), as timm and MMPretrain do. `rate` may be a traced scalar, so that a scan
    over layers can give each its own; a Python 0.0 costs nothing. Callers skip it in eval mode.
    """
    if isinstance(rate, float | int) and rate == 0:
        return x
    if rngs is None:
        raise ValueError("drop_path: in training mode a call needs `rngs`; pass them, or call model.eval() first")
    keep = (1.0 - jnp.asarray(rate, jnp.float32)).astype(jnp.float32)
    mask = jax.random.bernoulli(rngs.dropout(), keep, (x.shape[0],) + (1,) * (x.ndim - 1))
    return jnp.where(mask, x / keep.astype(x.dtype), jnp.zeros((), x.dtype))
