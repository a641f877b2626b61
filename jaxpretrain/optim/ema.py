"""Moving averages of weights, as MMEngine's EMAHook and MMPretrain's CosineEMA."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree


def ema_update(
    ema: PyTree,
    params: PyTree,
    step: Int[Array, ""] | int,
    momentum: Float[Array, ""] | float = 0.0002,
    begin_iter: int = 0,
) -> PyTree:
    """The average after one more step: `ema + momentum * (params - ema)`.

    Until `step + 1 >= begin_iter` the average follows the weights, and its first update is a copy too; so it is a copy
    up to and including step `max(begin_iter, 1) - 1`. Leaves that are not floating point (counters) keep their copy.

    Args:
        ema: the average so far, a pytree like `params`; overwritten at step 0.
        params: the weights after the optimizer's step.
        step: which step that was, counted from 0.
        momentum: weight of the new value; may be an array that changes from step to step.
        begin_iter: when to start averaging.
    """
    copying = jnp.asarray(step) + 1 <= max(begin_iter, 1)

    def average(old: Array, new: Array) -> Array:
        moved = old
        if jnp.issubdtype(new.dtype, jnp.floating):
            moved = old + (jnp.asarray(momentum, old.dtype) * (new - old)).astype(old.dtype)
        return jnp.where(copying, new, moved)

    return jax.tree.map(average, ema, params)


def cosine_ema_momentum(step: Any, base: float, end: float, total: int) -> Float[Array, ""]:
    """Momentum of a teacher at update `step` (0 to total): from `base` to `end` on half a cosine (BYOL, MoCo v3)."""
    return end - (end - base) * (jnp.cos(jnp.pi * jnp.asarray(step) / total) + 1) / 2
