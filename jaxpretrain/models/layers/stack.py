"""Running a stack of alike blocks: unrolled, or scanned over parameters stacked on the fly; with or without remat."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxpretrain.build import ConfigError, nearest
from jaxpretrain.models.layers.base import Frozen
from jaxpretrain.models.layers.intermediates import capturing, record

# What the backward pass finds saved: everything; only each block's input; that and the results of matmuls with weights.
_POLICIES: dict[str, Any] = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def apply_layers(
    layers: Sequence[Any],
    x: Float[Array, "b ..."],
    *,
    rngs: nnx.Rngs | None = None,
    scan_layers: bool = False,
    remat: str = "none",
    out_indices: Collection[int] = (),
) -> tuple[Float[Array, "b ..."], dict[int, Float[Array, "b ..."]]]:
    """Applies `layers` one after the other. All forms give the same values, gradients and random draws.

    A layer is called as `layer(x, rngs=rngs, drop_path_rate=rate)` and has an attribute `drop_path_rate`; for the
    scanned form and for remat, it may hold `nnx.Param` and `Frozen` variables only (no running statistics).

    Args:
        layers: the blocks; parameters are kept per block.
        x: input of the first.
        rngs: for dropout and drop path; each layer gets a key of its own. Not used where all layers are `deterministic`.
        scan_layers: stacks the parameters of consecutive layers that are alike (equal but for values and
            `drop_path_rate`) and scans over them: the program's size and compile time no longer grow with depth.
        remat: what is recomputed in the backward pass: 'none', 'full' (everything within a block), or 'dots' (all but
            the results of matmuls with weights).
        out_indices: the layers whose outputs are wanted, from 0 (negative ones are not understood).

    Returns:
        The output of the last layer, and {index: output of that layer} for `out_indices`, in order.
    """
    if remat not in _POLICIES:
        raise ConfigError(f"remat: unknown policy {remat!r}.{nearest(remat, _POLICIES)}")
    layers = list(layers)
    if capturing():
        scan_layers, remat = False, "none"
    if all(getattr(layer, "deterministic", False) for layer in layers):
        rngs = None  # nothing is drawn in eval mode
    keys = None if rngs is None else jax.random.split(rngs.dropout(), len(layers))
    own = [layer.drop_path_rate for layer in layers]
    # Arrays in every form, unless all are zero: a layer of rate zero then draws as the others do, scanned or not.
    rates = jnp.asarray(own, jnp.float32) if any(own) else None
    outputs = {}
    for run in _alike_runs(layers, out_indices) if scan_layers else [[i] for i in range(len(layers))]:
        span = slice(run[0], run[-1] + 1) if len(run) > 1 else run[0]
        key, rate = None if keys is None else keys[span], None if rates is None else rates[span]
        x = (_scan if len(run) > 1 else _apply_one)(layers[span], x, key, rate, remat)
        record(layers[run[-1]], "out", x)
        if run[-1] in out_indices:
            outputs[run[-1]] = x
    return x, outputs


def _alike_runs(layers: Sequence[Any], out_indices: Collection[int]) -> list[list[int]]:
    """The indices of the layers in runs that one scan can do: alike, and no output wanted but the last one's."""
    kinds = [_split(layer)[0] for layer in layers]

    def run_of(i: int) -> tuple[Any, int]:
        return kinds[i], sum(j < i for j in out_indices)

    return [list(run) for _, run in itertools.groupby(range(len(layers)), key=run_of)]


def _split(layer: Any) -> tuple[nnx.GraphDef, list[dict]]:
    """A layer's structure, which is equal for alike layers, and its weights."""
    twin = nnx.clone(layer)  # so that the layer itself keeps its rate
    twin.drop_path_rate = 0.0
    graphdef, *states = nnx.split(twin, nnx.Param, Frozen, ...)
    if other := states.pop():
        name = type(layer).__name__
        raise ConfigError(f"{name} has running statistics, so it cannot be scanned or rematerialised: {list(other)}")
    return graphdef, [nnx.to_pure_dict(state) for state in states]


def _call(layer: Any, x: Array, key: Array | None, rate: Array | None) -> Array:
    return layer(x, rngs=None if key is None else nnx.Rngs(dropout=key), drop_path_rate=0.0 if rate is None else rate)


def _apply_one(layer: Any, x: Array, key: Array | None, rate: Array | None, remat: str) -> Array:
    if remat == "none":
        return _call(layer, x, key, rate)
    graphdef, weights = _split(layer)

    def body(weights: list[dict], x: Array, key: Array | None, rate: Array | None) -> Array:
        return _call(nnx.merge(graphdef, *weights), x, key, rate)

    return jax.checkpoint(body, policy=_POLICIES[remat])(weights, x, key, rate)


def _scan(layers: Sequence[Any], x: Array, keys: Array | None, rates: Array | None, remat: str) -> Array:
    graphdef = _split(layers[0])[0]
    weights = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[_split(layer)[1] for layer in layers])

    def body(x: Array, per_layer: tuple) -> tuple[Array, None]:
        weights, key, rate = per_layer
        return _call(nnx.merge(graphdef, *weights), x, key, rate), None

    if remat != "none":  # a scan's iterations cannot be merged by common-subexpression elimination
        body = jax.checkpoint(body, policy=_POLICIES[remat], prevent_cse=False)
    return jax.lax.scan(body, x, (weights, keys, rates))[0]
