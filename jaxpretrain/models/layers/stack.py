"""Running a stack of alike blocks: unrolled, or scanned over parameters stacked on the fly; with or without remat."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
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
    shared: Mapping[str, Any] = {},
) -> tuple[Float[Array, "b ..."], dict[int, Float[Array, "b ..."]]]:
    """Applies `layers` one after the other. All forms give the same values, gradients and random draws.

    A layer is called as `layer(x, rngs=rngs, drop_path_rate=rate, **shared)` and has an attribute `drop_path_rate`; for
    the scanned form and for remat, it may hold `nnx.Param` and `Frozen` variables only (no running statistics).

    Args:
        layers: the blocks; parameters are kept per block.
        x: input of the first.
        rngs: for dropout and drop path; each layer gets a key of its own. Not used where all layers are `deterministic`.
        scan_layers: stacks the parameters of layers that are alike (equal but for values and `drop_path_rate`) and
            scans over them: the program's size and compile time no longer grow with depth. Layers may also take turns,
            as Swin's with and without shift: then each step of the scan does one turn.
        remat: what is recomputed in the backward pass: 'none', 'full' (everything within a block), or 'dots' (all but
            the results of matmuls with weights).
        out_indices: the layers whose outputs are wanted, from 0 (negative ones are not understood).
        shared: further arguments that all layers get, such as a position bias; arrays have gradients too.

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
    apply = partial(_apply_one, remat=remat, shared=shared)
    outputs = {}
    for start, period, turns in _runs(layers, out_indices) if scan_layers else [(i, 1, 1) for i in range(len(layers))]:
        last = start + period * turns - 1
        if turns == 1:
            x = apply(layers[last], x, None if keys is None else keys[last], None if rates is None else rates[last])
        else:
            span = slice(start, last + 1)
            keys_, rates_ = (None if a is None else a[span].reshape(turns, period) for a in (keys, rates))
            x = _scan(apply, layers[span], period, x, keys_, rates_)
        record(layers[last], "out", x)
        if last in out_indices:
            outputs[last] = x
    return x, outputs


def _save_products(primitive: Any, *_: Any, **__: Any) -> bool:
    """The remat policy 'dots' of a convolutional network: keep what convolutions and matmuls gave."""
    return primitive.name in ("conv_general_dilated", "dot_general")


def apply_block(
    block: Any,
    x: Float[Array, "b ..."],
    *,
    rngs: nnx.Rngs | None = None,
    remat: str = "none",
    shared: Mapping[str, Any] = {},
) -> Float[Array, "b ..."]:
    """`block(x, rngs=rngs, **shared)` for a block that may have running statistics, as those of convolutional networks;
    its output is recorded as `out`.

    Args:
        block: the block.
        x: its input; any pytree.
        rngs: for dropout and drop path.
        remat: what is recomputed in the backward pass: 'none', 'full' (everything), or 'dots' (all but the results of
            convolutions and matmuls).
        shared: further arguments, such as a mask.
    """
    if remat not in _POLICIES:
        raise ConfigError(f"remat: unknown policy {remat!r}.{nearest(remat, _POLICIES)}")
    if remat == "none" or capturing():
        x = _call(block, x, rngs, dict(shared))
    else:
        policy = _save_products if remat == "dots" else _POLICIES[remat]
        x = nnx.remat(_call, policy=policy)(block, x, rngs, dict(shared))
    record(block, "out", x)
    return x


def apply_stages(
    stages: Sequence[Any],
    x: Float[Array, "b h w c"],
    out_indices: Collection[int],
    *,
    rngs: nnx.Rngs | None = None,
    remat: str = "none",
) -> tuple[Float[Array, "b h2 w2 c2"], ...]:
    """The outputs of the `stages` in `out_indices`, in order. A stage is a list of blocks (see `apply_block`) or one layer."""
    outs = []
    for i, stage in enumerate(stages):
        if isinstance(stage, nnx.List):
            for block in stage:
                x = apply_block(block, x, rngs=rngs, remat=remat)
        else:
            x = stage(x)
        if i in out_indices:
            outs.append(x)
    return tuple(outs)


def _call(block: Any, x: Any, rngs: nnx.Rngs | None, shared: dict[str, Any]) -> Any:
    return block(x, rngs=rngs, **shared)


def _runs(layers: Sequence[Any], out_indices: Collection[int]) -> list[tuple[int, int, int]]:
    """Cuts the layers into runs (first layer, period, turns): `turns` times the same `period` kinds of layers.

    A wanted output is the last of its run. A run of one turn has one layer.
    """
    graphdefs = [split_layer(layer)[0] for layer in layers]
    kinds = [graphdefs.index(graphdef) for graphdef in graphdefs]
    ends = sorted({i + 1 for i in out_indices if 0 <= i < len(layers)} | {len(layers)})
    runs, start = [], 0
    for end in ends:
        while start < end:
            rest = kinds[start:end]
            periods = range(1, len(rest) // 2 + 1)
            repeats = [(period, turns) for period in periods if (turns := _turns(rest, period)) > 1]
            period, turns = max(repeats, key=math.prod, default=(1, 1))  # the most layers, with the shortest period
            runs.append((start, period, turns))
            start += period * turns
    return runs


def _turns(kinds: list[int], period: int) -> int:
    """How many times the first `period` kinds follow each other at the beginning."""
    turns = 1
    while kinds[turns * period : (turns + 1) * period] == kinds[:period]:
        turns += 1
    return turns


def split_layer(layer: Any) -> tuple[nnx.GraphDef, list[dict]]:
    """A layer's structure, which is equal for alike layers, and its weights."""
    twin = nnx.clone(layer)  # so that the layer itself keeps its rate
    twin.drop_path_rate = 0.0
    graphdef, *states = nnx.split(twin, nnx.Param, Frozen, ...)
    if other := states.pop():
        name = type(layer).__name__
        raise ConfigError(f"{name} has running statistics, so it cannot be scanned or rematerialised: {list(other)}")
    return graphdef, [nnx.to_pure_dict(state) for state in states]


def _apply_one(
    layer: Any,
    x: Array,
    key: Array | None,
    rate: Array | None,
    *,
    remat: str,
    shared: Mapping[str, Any],
    prevent_cse: bool = True,
) -> Array:
    def call(layer: Any, x: Array, key: Array | None, rate: Array | None) -> Array:
        rngs = None if key is None else nnx.Rngs(dropout=key)
        return layer(x, rngs=rngs, drop_path_rate=0.0 if rate is None else rate, **shared)

    if remat == "none":
        return call(layer, x, key, rate)
    graphdef, weights = split_layer(layer)

    def body(weights: list[dict], *args: Any) -> Array:
        return call(nnx.merge(graphdef, *weights), *args)

    return jax.checkpoint(body, policy=_POLICIES[remat], prevent_cse=prevent_cse)(weights, x, key, rate)


def _scan(
    apply: Callable[..., Array],
    layers: Sequence[Any],
    period: int,
    x: Array,
    keys: Array | None,
    rates: Array | None,
) -> Array:
    """`layers` in turns of `period`; `keys` and `rates` are [turns, period]."""
    split = [split_layer(layer) for layer in layers]
    weights = [
        jax.tree.map(lambda *leaves: jnp.stack(leaves), *[weights for _, weights in split[i::period]])
        for i in range(period)
    ]

    def turn(x: Array, per_turn: tuple) -> tuple[Array, None]:
        weights, keys, rates = per_turn
        for i in range(period):
            layer = nnx.merge(split[i][0], *weights[i])
            key, rate = None if keys is None else keys[i], None if rates is None else rates[i]
            x = apply(layer, x, key, rate, prevent_cse=False)  # iterations of a scan cannot be merged by CSE
        return x, None

    return jax.lax.scan(turn, x, (weights, keys, rates))[0]
