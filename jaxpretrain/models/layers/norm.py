"""Normalisation layers. Statistics are computed in float32 at least, the result has the dtype of the input."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float

from jaxpretrain.build import ConfigError, build, nearest
from jaxpretrain.models.layers.base import freeze


class LayerNorm(nnx.Module):
    """Normalises the last axis to zero mean and unit (biased) variance, then scales and shifts (Ba et al., 2016)."""

    state_names: ClassVar = {"scale": "weight"}

    def __init__(self, num_features: int, eps: float = 1e-5, affine: bool = True, *, rngs: nnx.Rngs | None = None):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((num_features,), jnp.float32)) if affine else None
        self.bias = nnx.Param(jnp.zeros((num_features,), jnp.float32)) if affine else None

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

    In training, the batch is cut into `groups` equal parts, in order, and each is normalised by its own statistics;
    this is what N unsynchronised GPUs do, but it does not depend on the devices at hand. One group is SyncBN. The
    running statistics move by `momentum` towards the mean over groups of each group's mean and *unbiased* variance:
    what PyTorch holds when each group's buffers are averaged (MMEngine's SyncBuffersHook).

    Args:
        num_features: size of the last axis.
        eps: added to the variance.
        momentum: weight of the new statistics (PyTorch's convention).
        affine: whether to learn scale and bias.
        groups: number of parts of the batch normalised apart; the batch must be divisible by it.
        norm_eval: always use the running statistics, and never change them (MMPretrain's `norm_eval`).

    Raises:
        ConfigError: in training, when the batch is not divisible, or a group has one value per channel only.
    """

    torch_names: ClassVar = ("_BatchNorm", "BatchNorm1d", "BatchNorm2d", "SyncBatchNorm")  # in `init_cfg`
    state_names: ClassVar = {"scale": "weight", "mean": "running_mean", "var": "running_var"}

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
        if groups < 1:
            raise ConfigError(f"BatchNorm: groups must be 1 or more, not {groups}")
        self.eps, self.momentum, self.groups, self.norm_eval = eps, momentum, groups, norm_eval
        self.use_running_average = False
        self.scale = nnx.Param(jnp.ones((num_features,), jnp.float32)) if affine else None
        self.bias = nnx.Param(jnp.zeros((num_features,), jnp.float32)) if affine else None
        self.mean = nnx.BatchStat(jnp.zeros((num_features,), jnp.float32))
        self.var = nnx.BatchStat(jnp.ones((num_features,), jnp.float32))
        self.num_batches_tracked = nnx.BatchStat(jnp.zeros((), jnp.int32))

    def __call__(
        self, x: Float[Array, "b *spatial c"], visible: Bool[Array, "b *spatial"] | None = None
    ) -> Float[Array, "b *spatial c"]:
        """`x` normalised; with `visible`, only positions where it is true count, and the others become zero."""
        y = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        if self.use_running_average or self.norm_eval:
            y = (y - self.mean[...]) * lax.rsqrt(self.var[...].astype(y.dtype) + self.eps)
        else:
            y = self._normalise_by_batch(y, visible)
        if self.scale is not None and self.bias is not None:
            y = y * self.scale[...] + self.bias[...]
        if visible is not None:
            y = jnp.where(visible[..., None], y, 0)
        return y.astype(x.dtype)

    def _normalise_by_batch(self, x: Array, visible: Array | None) -> Array:
        batch, groups = x.shape[0], self.groups
        if batch % groups:
            raise ConfigError(
                f"BatchNorm: a batch of {batch} cannot be cut into {groups} equal groups; "
                "make the batch size (per micro-batch and view) a multiple of norm_cfg.groups, or change the latter"
            )
        count = batch // groups * math.prod(x.shape[1:-1])
        if count == 1:
            raise ConfigError(
                f"BatchNorm: a batch of {batch} in {groups} groups leaves each one value per channel, which has no "
                "variance; use a larger batch, or fewer norm_cfg.groups"
            )
        # A leading axis of size 1 would make XLA:CPU reduce [batch, channels] along the slow axis (5x slower backward).
        y = x if groups == 1 else x.reshape(groups, batch // groups, *x.shape[1:])
        axes = tuple(range(0 if groups == 1 else 1, y.ndim - 1))
        where = None if visible is None else visible.reshape(*y.shape[:-1], 1)
        unbiased: Any = count / (count - 1)
        if where is not None:
            counts = where.sum(axis=axes).reshape(groups, 1)
            unbiased = counts / jnp.maximum(counts - 1, 1)
        # Two passes: E[x^2] - E[x]^2 in one pass loses all digits where the mean is large against the deviation.
        mean = jnp.mean(y, axis=axes, keepdims=True, where=where)
        y = y - mean
        var = jnp.mean(jnp.square(y), axis=axes, keepdims=True, where=where)
        self._update_running(mean.reshape(groups, -1), var.reshape(groups, -1) * unbiased)
        return (y * lax.rsqrt(var + self.eps)).reshape(x.shape)

    def _update_running(self, mean: Float[Array, "g c"], var: Float[Array, "g c"]) -> None:
        for running, batch in ((self.mean, mean), (self.var, var)):
            new = lax.stop_gradient(batch.mean(axis=0)).astype(running.dtype)
            running.set_value((1 - self.momentum) * running.get_value() + self.momentum * new)
        self.num_batches_tracked.set_value(self.num_batches_tracked.get_value() + 1)


class GroupNorm(nnx.Module):
    """Normalises each image's channels in `num_groups` equal groups, over all positions (Wu & He, 2018), then scales and shifts.

    Args:
        num_features: size of the last axis.
        num_groups: groups of channels.
        eps: added to the (biased) variance.
        affine: whether to learn scale and bias.
    """

    state_names: ClassVar = {"scale": "weight"}

    def __init__(
        self,
        num_features: int,
        num_groups: int,
        eps: float = 1e-5,
        affine: bool = True,
        *,
        rngs: nnx.Rngs | None = None,
    ):
        if num_features % num_groups:
            raise ConfigError(f"GroupNorm: {num_features} channels cannot be cut into {num_groups} equal groups")
        self.num_groups, self.eps = num_groups, eps
        self.scale = nnx.Param(jnp.ones((num_features,), jnp.float32)) if affine else None
        self.bias = nnx.Param(jnp.zeros((num_features,), jnp.float32)) if affine else None

    def __call__(self, x: Float[Array, "b *spatial c"]) -> Float[Array, "b *spatial c"]:
        y = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        y = y.reshape(*x.shape[:-1], self.num_groups, -1)
        axes = (*range(1, x.ndim - 1), x.ndim)
        y = y - jnp.mean(y, axis=axes, keepdims=True)
        y = (y * lax.rsqrt(jnp.mean(jnp.square(y), axis=axes, keepdims=True) + self.eps)).reshape(x.shape)
        if self.scale is not None and self.bias is not None:
            y = y * self.scale[...] + self.bias[...]
        return y.astype(x.dtype)


_NORMS: dict[str, type] = {
    "BN": BatchNorm,
    "BN1d": BatchNorm,
    "BN2d": BatchNorm,
    "SyncBN": BatchNorm,
    "GN": GroupNorm,
    "LN": LayerNorm,
    "LN2d": LayerNorm,  # PyTorch needs another class for NCHW
    # Of images of which a part is hidden: `layers.sparse` tells them which.
    "SparseBatchNorm2d": BatchNorm,
    "SparseSyncBatchNorm2d": BatchNorm,
    "SparseLN2d": LayerNorm,
}


def norm_name(cfg: Mapping[str, Any]) -> str:
    """What MMCV calls a norm inside a module: `bn`, `ln`, `gn`."""
    kinds = {"SyncBN": "bn", "SparseBatchNorm2d": "bn", "SparseSyncBatchNorm2d": "bn", "SparseLN2d": "ln"}
    return kinds.get(cfg["type"], cfg["type"][:2].lower())


def build_norm(
    cfg: Mapping[str, Any], num_features: int, *, norm_eval: bool = False, rngs: nnx.Rngs
) -> LayerNorm | BatchNorm | GroupNorm:
    """The layer that an MMPretrain `norm_cfg` describes.

    Types: `BN`, `SyncBN` (BN with one group), `LN`, `GN` (`num_groups`). Other keys are the layer's arguments;
    `requires_grad=False` freezes scale and bias. BN takes `groups`, the number of parts of the batch that are normalised
    apart (default 1).

    Raises:
        ConfigError: an unknown type or argument, naming the nearest valid one; SyncBN with groups.
    """
    args = dict(cfg)
    kind, requires_grad = args.pop("type", None), args.pop("requires_grad", True)
    if kind not in _NORMS:
        raise ConfigError(f"norm_cfg: unknown type {kind!r}.{nearest(str(kind), _NORMS)}")
    if kind in ("SyncBN", "SparseSyncBatchNorm2d") and args.get("groups", 1) != 1:
        raise ConfigError(f"norm_cfg: {kind} normalises the whole batch at once; use type 'BN' with groups")
    if _NORMS[kind] is BatchNorm:
        args["norm_eval"] = norm_eval
    layer = build({"type": _NORMS[kind], "num_features": num_features, "rngs": rngs, **args})
    if not requires_grad:
        freeze(layer)
    return layer
