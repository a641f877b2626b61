"""What a training step carries, and the step itself: pure functions over plain nested dictionaries.

The state is a dict: `params` (what learns), `model_state` (running statistics, teachers, queues), `opt_state`, `ema` (an average
of the parameters, or an empty dict), `step` (completed optimizer steps, int32) and `rng` (the seed's key data); with
`ema.update_buffers` also `ema_state`, an average of `model_state`. Modules are taken apart once; inside the traced step they
are merged again, so that NNX costs nothing while training.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float

from jaxpretrain.build import abstract, build
from jaxpretrain.methods.base import Method, Progress
from jaxpretrain.optim.ema import ema_update

State = dict[str, Any]
Batch = dict[str, Any]


def split(method: nnx.Module) -> tuple[nnx.GraphDef, Any, Any]:
    """(structure, parameters that learn, all other state), the last two as nested dicts."""
    graphdef, *states = nnx.split(method, nnx.Param, ...)
    params, rest = map(nnx.to_pure_dict, states)
    return graphdef, params, rest


def make_method(config: Any, rngs: nnx.Rngs | None = None) -> Method:
    """The method that the config describes, in training mode. Without `rngs` it is abstract: shapes, no arrays."""
    method_config = config.method.to_dict() if hasattr(config.method, "to_dict") else config.method
    method = abstract(method_config) if rngs is None else build(method_config, rngs=rngs)
    method.set_attributes(scan_layers=config.scan_layers, remat=config.remat, raise_if_not_found=False)
    return method


def init_state(config: Any, optimizer: optax.GradientTransformation) -> State:
    """A fresh state. Call it under `jax.jit` with out_shardings, or `jax.eval_shape`."""
    rng = jax.random.key(config.seed)
    build_key, init_key = jax.random.split(jax.random.fold_in(rng, 0x1217))
    method = make_method(config, nnx.Rngs(build_key))
    method.init_weights(nnx.Rngs(init_key))
    _, params, model_state = split(method)
    state = dict(
        params=params,
        model_state=model_state,
        opt_state=optimizer.init(params),
        ema=jax.tree.map(jnp.copy, params) if config.ema else {},
        step=jnp.zeros((), jnp.int32),
        rng=jax.random.key_data(rng),
    )
    if config.ema and config.ema.get("update_buffers"):
        state["ema_state"] = jax.tree.map(jnp.copy, model_state)
    return state


def make_loss(graphdef: nnx.GraphDef, augment: Callable[[Batch, Array], Batch]) -> Callable[..., Any]:
    """loss(params, model_state, batch, rng, key) -> (loss, (metrics, model_state)); `augment` maps uint8 to normalised."""

    def loss(params: Any, model_state: Any, batch: Batch, rng: Array, key: Array) -> Any:
        method = nnx.merge(graphdef, params, model_state)
        value, metrics = method.loss(augment(batch, rng), rngs=nnx.Rngs(key))
        return value.astype(jnp.promote_types(value.dtype, jnp.float32)), (metrics, split(method)[2])

    return loss


def make_train_step(
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    learning_rates: Float[np.ndarray, " total_steps"],
    augment: Callable[[Batch, Array], Batch],
    accumulative_counts: int = 1,
    ema: dict[str, Any] | None = None,
) -> Callable[[State, Batch], tuple[State, dict[str, Array]]]:
    """One optimizer step: gradients (over micro-batches), update, the method's `after_step`, the average of weights.

    The returned function is pure and not yet jitted. Metrics are `loss`, the method's own, `grad_norm` (before clipping) and
    `lr`. With `accumulative_counts` = n, micro-batch i takes every n-th row from row i, so each device keeps its rows; gradients
    and metrics are averaged over micro-batches, other state passes through them in turn.
    """
    gradient = jax.value_and_grad(make_loss(graphdef, augment), has_aux=True)
    pieces, total_steps = accumulative_counts, len(learning_rates)
    averaging = {name: value for name, value in (ema or {}).items() if name != "update_buffers"}

    def accumulated(state: State, batch: Batch, rng: Array, key: Array) -> Any:
        if pieces == 1:
            return gradient(state["params"], state["model_state"], batch, rng, key)
        micro = jax.tree.map(lambda x: jnp.swapaxes(x.reshape(-1, pieces, *x.shape[1:]), 0, 1), batch)

        def one(carry: Any, xs: Any) -> Any:
            model_state, total = carry
            index, piece = xs
            (loss, (metrics, model_state)), grads = gradient(
                state["params"], model_state, piece, rng, jax.random.fold_in(key, index)
            )
            return (model_state, jax.tree.map(jnp.add, total, grads)), (loss, metrics)

        zeros = jax.tree.map(jnp.zeros_like, state["params"])
        (model_state, grads), scalars = jax.lax.scan(one, (state["model_state"], zeros), (jnp.arange(pieces), micro))
        loss, metrics = jax.tree.map(lambda x: x.mean(axis=0), scalars)
        return (loss, (metrics, model_state)), jax.tree.map(lambda g: g / pieces, grads)

    def train_step(state: State, batch: Batch) -> tuple[State, dict[str, Array]]:
        rng = jax.random.wrap_key_data(state["rng"])
        key = jax.random.fold_in(rng, state["step"])
        (loss, (metrics, model_state)), grads = accumulated(state, batch, rng, key)
        updates, opt_state = optimizer.update(grads, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        method = nnx.merge(graphdef, params, model_state)
        method.after_step(Progress(step=state["step"] + 1, total_steps=total_steps))
        _, params, model_state = split(method)
        metrics = dict(
            loss=loss, **metrics, grad_norm=optax.global_norm(grads), lr=jnp.asarray(learning_rates)[state["step"]]
        )
        new = dict(state, params=params, model_state=model_state, opt_state=opt_state, step=state["step"] + 1)
        if ema:
            new["ema"] = ema_update(state["ema"], params, state["step"], **averaging)
        if "ema_state" in state:
            new["ema_state"] = ema_update(state["ema_state"], model_state, state["step"], **averaging)
        return new, metrics

    return train_step


def eval_params(state: State) -> Any:
    """The parameters to evaluate: the averaged ones where there are any."""
    return state["ema"] or state["params"]


def eval_state(state: State) -> Any:
    """The other state to evaluate with: the averaged one where there is any."""
    return state.get("ema_state") or state["model_state"]
