"""How much arithmetic a function does, by walking its jaxpr; and how much a device could do."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr

# Dense bfloat16 (float16 before Ampere) multiply-adds with float32 sums, two operations each, per second and per device as
# JAX counts devices (half a chip for TPU v2 and v3), from the makers' data sheets. The first match counts.
PEAK_FLOPS: tuple[tuple[str, float], ...] = (
    (r"B200", 2250e12),
    (r"H100 PCIe", 756e12),
    (r"(H100|H200) NVL", 835e12),
    (r"H100|H200|H800", 989e12),
    (r"A100|A800", 312e12),
    (r"A30\b", 165e12),
    (r"A10G", 70e12),
    (r"A10\b", 125e12),
    (r"A40\b", 150e12),
    (r"A6000", 155e12),
    (r"L40S", 362e12),
    (r"L40\b", 181e12),
    (r"L4\b", 121e12),
    (r"RTX 5090", 209e12),
    (r"RTX 4090", 165e12),
    (r"RTX 3090", 71e12),
    (r"V100", 125e12),
    (r"\bT4\b", 65e12),
    (r"TPU v6", 918e12),
    (r"TPU v5 ?(lite|e)", 197e12),
    (r"TPU v5", 459e12),
    (r"TPU v4 ?(lite|i)", 137e12),
    (r"TPU v4", 275e12),
    (r"TPU v3", 61.5e12),
    (r"TPU v2", 22.5e12),
)


def peak_flops(device_kind: str) -> float | None:
    """Peak operations per second of a device (`jax.Device.device_kind`) in bfloat16; None if it is not in the table."""
    return next((peak for pattern, peak in PEAK_FLOPS if re.search(pattern, device_kind, re.IGNORECASE)), None)


def count_flops(function: Callable, *args: Any, **kwargs: Any) -> int:
    """Operations in matrix products and convolutions of `function(*args)`; arrays may be `jax.ShapeDtypeStruct`.

    See `count_jaxpr` for what counts.
    """
    return count_jaxpr(jax.make_jaxpr(function)(*args, **kwargs))


def count_jaxpr(jaxpr: ClosedJaxpr | Jaxpr) -> int:
    """Operations in the matrix products and convolutions of a jaxpr, two for each multiply-add.

    Of all devices together. A scan counts its length, a `cond` its dearest branch, or the one for any platform
    if there is one, a `while` one turn, for its number of turns is unknown. Padding counts as input. What remat
    computes again is counted again.
    """
    body = jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr
    return sum(_count_equation(eqn) for eqn in body.eqns)


def _count_equation(eqn: Any) -> int:
    name, params = eqn.primitive.name, eqn.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        lhs = eqn.invars[0].aval.shape
        return 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(lhs[axis] for axis in contracted)
    if name == "conv_general_dilated":
        kernel = eqn.invars[1].aval.shape
        per_output = math.prod(kernel) // kernel[params["dimension_numbers"].rhs_spec[0]]
        # Of an input with holes (the gradient of a strided convolution), only the part that is not zero counts.
        return 2 * math.prod(eqn.outvars[0].aval.shape) * per_output // math.prod(params["lhs_dilation"])
    if name.startswith("dot_product_attention_"):  # cuDNN's fused attention
        query, key = eqn.invars[0].aval.shape, eqn.invars[1].aval.shape
        length = 2 if params["layout"] else 1  # axis: [b, t, heads, c] or [b, heads, t, c]
        product = 2 * math.prod(query) * key[length]
        return product * (4 if "bwd" in name else 2)
    if name == "cond":
        platforms = params.get("branches_platforms") or [True]
        branches = params["branches"] if None not in platforms else [params["branches"][platforms.index(None)]]
        return max(count_jaxpr(branch) for branch in branches)
    inner = sum(count_jaxpr(jaxpr) for jaxpr in _jaxprs(params))
    if name == "scan":
        return inner * params["length"]
    if name == "shard_map":  # the body is one device's part
        axes = params.get("newly_manual_axes", params.get("manual_axes", params["mesh"].axis_names))
        return inner * math.prod(params["mesh"].shape[axis] for axis in axes)
    return inner


def _jaxprs(params: dict[str, Any]) -> Iterator[ClosedJaxpr | Jaxpr]:
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, ClosedJaxpr | Jaxpr):
                yield item
