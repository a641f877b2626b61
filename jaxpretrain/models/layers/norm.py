"""Normalisation layers. Statistics are computed in float32 at least, the result has the dtype of the input."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from jaxpretrain.models.layers.base import Frozen


class LayerNorm(nnx.Module):
    """Normalises the last axis to zero mean and unit (biased) variance, then scales and shifts (Ba et al., 2016)."""

    def __init__(self, num_features: int, eps: float = 1e-5, affine: bool = True, *, rngs: nnx.Rngs | None = None):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((num_features,))) if affine else None
        self.bias = nnx.Param(jnp.zeros((num_features,))) if affine else None

    def __call__(self, x: Float[Array, "*batch c"]) -> Float[Array, "*batch c"]:
        y = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        mean = jnp.mean(y, axis=-1, keepdims=True)
        y = y - mean
        y = y * lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        if self.scale is not None and self.bias is not None:
            y = y * self.scale[...] + self.bias[...]
        return y.astype(x.dtype)


class BatchNorm(nnx.Module):
    """Batch normalisation over all axes but the last (Ioffe & Szegedy, 2015), with PyTorch's conventions.

    In training, the batch is cut into `groups` equal parts, in order, and each is normalised by its own statistics; this
    is what N unsynchronised GPUs do, but it does not depend on the devices at hand. One group is SyncBN. The running
    statistics move by `momentum` towards the mean over groups of each group's mean and *unbiased* variance: what PyTorch
    holds when each group's buffers are averaged (MMEngine's SyncBuffersHook).

    Args:
        num_features: size of the last axis.
        eps: added to the variance.
        momentum: weight of the new statistics (PyTorch's convention).
        affine: whether to learn scale and bias.
        groups: number of parts of the batch normalised apart; the batch must be divisible by it.
        norm_eval: always use the running statistics, and never change them (MMPretrain's `norm_eval`).
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = True,
        groups: int = 1,
        norm_eval: bool = False,
        *,
        rngs: nnx.Rngs | None = None,
    ):
        self.eps, self.momentum, self.groups, self.norm_eval = eps, momentum, groups, norm_eval
        self.use_running_average = False
        self.scale = nnx.Param(jnp.ones((num_features,))) if affine else None
        self.bias = nnx.Param(jnp.zeros((num_features,))) if affine else None
        self.mean = nnx.BatchStat(jnp.zeros((num_features,)))
        self.var = nnx.BatchStat(jnp.ones((num_features,)))
        self.num_batches_tracked = nnx.BatchStat(jnp.zeros((), jnp.int32))

    def __call__(self, x: Float[Array, "b *spatial c"]) -> Float[Array, "b *spatial c"]:
        y = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        if self.use_running_average or self.norm_eval:
            y = (y - self.mean[...]) * lax.rsqrt(self.var[...] + self.eps)
        else:
            y = self._normalise_by_batch(y)
        if self.scale is not None and self.bias is not None:
            y = y * self.scale[...] + self.bias[...]
        return y.astype(x.dtype)

    def _normalise_by_batch(self, x: Array) -> Array:
        if x.shape[0] % self.groups:
            raise ValueError(
                f"BatchNorm: a batch of {x.shape[0]} cannot be cut into {self.groups} equal groups; "
                "make the batch size (per micro-batch and view) a multiple of norm_cfg.groups, or change norm_cfg.groups"
            )
        y = x.reshape(self.groups, x.shape[0] // self.groups, *x.shape[1:])
        axes = tuple(range(1, y.ndim - 1))
        mean = jnp.mean(y, axis=axes, keepdims=True)
        y = y - mean
        var = jnp.mean(jnp.square(y), axis=axes, keepdims=True)
        count = y.size // (self.groups * y.shape[-1])
        self._update_running(mean.reshape(self.groups, -1), var.reshape(self.groups, -1) * (count / max(count - 1, 1)))
        return (y * lax.rsqrt(var + self.eps)).reshape(x.shape)

    def _update_running(self, mean: Float[Array, "g c"], var: Float[Array, "g c"]) -> None:
        for running, batch in ((self.mean, mean), (self.var, var)):
            new = lax.stop_gradient(batch.mean(axis=0)).astype(running.dtype)
            running[...] = (1 - self.momentum) * running[...] + self.momentum * new
        self.num_batches_tracked[...] += 1


def build_norm(
    cfg: Mapping[str, Any], num_features: int, *, norm_eval: bool = False, rngs: nnx.Rngs
) -> LayerNorm | BatchNorm:
    """The layer that an MMPretrain `norm_cfg` describes.

    Types: `BN`, `SyncBN` (BN with one group), `LN`. Other keys are the layer's arguments; `requires_grad=False` freezes
    scale and bias. BN takes `groups`, the number of parts of the batch that are normalised apart (default 1).
    """
    args = dict(cfg)
    kind, requires_grad = args.pop("type"), args.pop("requires_grad", True)
    layer: LayerNorm | BatchNorm
    if kind == "LN":
        layer = LayerNorm(num_features, **{"eps": 1e-5, **args})
    elif kind in ("BN", "BN1d", "BN2d", "SyncBN"):
        layer = BatchNorm(num_features, norm_eval=norm_eval, **args)
    else:
        raise ValueError(f"norm_cfg: unknown type {kind!r}; known are BN, SyncBN and LN")
    if not requires_grad and layer.scale is not None and layer.bias is not None:
        layer.scale, layer.bias = Frozen(layer.scale.get_value()), Frozen(layer.bias.get_value())
    return layer
