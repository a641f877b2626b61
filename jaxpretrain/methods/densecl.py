"""DenseCL (Wang et al., 2021, Dense Contrastive Learning for Self-Supervised Visual Pre-Training)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from jaxpretrain.build import ConfigError
from jaxpretrain.methods.base import Batch, Metrics, last, normalize, spread, views
from jaxpretrain.methods.moco import MoCo, enqueue, random_queue
from jaxpretrain.models.layers import BaseModule, Conv2d, Linear
from jaxpretrain.models.layers.conv import global_avg_pool, relu


class DenseCLNeck(BaseModule):
    """Two projectors: fc-relu-fc of the mean over positions, and the same as 1x1 convolutions at each position.

    Args:
        in_channels, hid_channels, out_channels: widths of input, hidden layers and outputs.
        num_grid: side of the grid that positions are averaged to before the second; None keeps the map.
        init_cfg: initialisation, MMEngine's dictionaries.
    """

    def __init__(
        self,
        in_channels: int,
        hid_channels: int,
        out_channels: int,
        num_grid: int | None = None,
        init_cfg: Any = None,
        *,
        rngs: nnx.Rngs,
    ):
        self.init_cfg, self.num_grid = init_cfg, num_grid
        fc1, fc2 = Linear(in_channels, hid_channels, rngs=rngs), Linear(hid_channels, out_channels, rngs=rngs)
        conv1, conv2 = Conv2d(in_channels, hid_channels, 1, rngs=rngs), Conv2d(hid_channels, out_channels, 1, rngs=rngs)
        self.mlp: nnx.List[Any] = nnx.List([fc1, relu, fc2])
        self.mlp2: nnx.List[Any] = nnx.List([conv1, relu, conv2])

    def __call__(self, x: Any) -> tuple[Float[Array, "b d"], Float[Array, "b n d"], Float[Array, "b d"]]:
        """The projected mean, the projected positions in row-major order, and the mean of the latter."""
        x = last(x)
        pooled = global_avg_pool(x)
        for layer in self.mlp:
            pooled = layer(pooled)
        if self.num_grid is not None:
            x = _pool_to(x, self.num_grid)
        for layer in self.mlp2:
            x = layer(x)
        return pooled, x.reshape(x.shape[0], -1, x.shape[-1]), global_avg_pool(x)


class DenseCL(MoCo):
    """MoCo for whole images, and for positions: each position of the query finds its own in the key view, by the backbone's
    features, among a second queue of other images' means (equations 1 to 3).

    The neck is a `DenseCLNeck`, the head a `ContrastiveHead`.

    Args:
        queue_len, feat_dim, momentum: as of `MoCo`.
        loss_lambda: weight of the dense loss; the other has 1 minus this.
        start_iters: steps with a weight of 0 at first (MMPretrain's `DenseCLHook`; its recipes say 1000).
        parts: arguments of `BaseSelfSupervisor`.
    """

    def __init__(
        self,
        queue_len: int = 65536,
        feat_dim: int = 128,
        momentum: float = 0.001,
        loss_lambda: float = 0.5,
        start_iters: int = 0,
        *,
        rngs: nnx.Rngs,
        **parts: Any,
    ):
        super().__init__(queue_len, feat_dim, momentum, rngs=rngs, **parts)
        self.loss_lambda, self.start_iters = loss_lambda, start_iters
        self.queue2 = nnx.BatchStat(random_queue(rngs, feat_dim, queue_len))
        self.queue2_ptr = nnx.BatchStat(jnp.zeros((1,), jnp.int32))

    def loss(self, batch: Batch, *, rngs: nnx.Rngs | None = None) -> tuple[Float[Array, ""], Metrics]:
        """The weighted sum of both losses, which are logged with `feature_std`; `image` is query and key views [B, H, W, 3]."""
        queries, keys = views(batch, 2)
        q_map = last(self.backbone(queries, rngs=rngs))
        q, q_grid, _ = map(normalize, self.neck(q_map))
        k_map, (k, k_grid, k_mean) = self.shuffled_teach(keys, rngs)
        k, k_grid, k_mean = map(normalize, (k, k_grid, k_mean))

        single = self.head.loss(jnp.sum(q * k, axis=1, keepdims=True), q @ self.queue[...].astype(q.dtype))
        own = jnp.take_along_axis(k_grid, match(q_map, k_map)[..., None], axis=1)
        q_dense = q_grid.reshape(-1, q_grid.shape[-1])
        pos = jnp.sum(q_dense * own.reshape(q_dense.shape), axis=1, keepdims=True)
        dense = self.head.loss(pos, q_dense @ self.queue2[...].astype(q.dtype))
        enqueue(self.queue, self.queue_ptr, k)
        enqueue(self.queue2, self.queue2_ptr, k_mean)
        weight = jnp.where(self.teacher.steps[...] >= self.start_iters, self.loss_lambda, 0.0)
        single, dense = (1 - weight) * single, weight * dense
        return single + dense, {"loss_single": single, "loss_dense": dense, "feature_std": spread(q)}

    def _teach(self, images: Float[Array, "b h w 3"], rngs: nnx.Rngs | None) -> Any:
        """The momentum backbone's map beside the neck's outputs."""
        self.teacher.copy_statistics(self.backbone, self.neck)
        backbone, neck = self.teacher.module
        features = last(backbone(images, rngs=rngs))
        return features, neck(features)


def match(q_map: Float[Array, "b h w c"], k_map: Float[Array, "b h w c"]) -> Any:
    """For each position of the one map the most similar position of the other, int [B, H*W]."""
    if q_map.shape != k_map.shape:
        raise ConfigError(
            f"DenseCL: both views must give maps of one size, not {q_map.shape[1:3]} and {k_map.shape[1:3]}"
        )
    q, k = (normalize(lax.stop_gradient(x).reshape(x.shape[0], -1, x.shape[-1])) for x in (q_map, k_map))
    return jnp.argmax(jnp.einsum("bqc,bkc->bqk", q, k), axis=2)


def _pool_to(x: Float[Array, "b h w c"], side: int) -> Float[Array, "b side side c"]:
    """PyTorch's adaptive average pooling: cell i averages rows floor(i h / side) to ceil((i + 1) h / side)."""
    weights = []
    for size in x.shape[1:3]:
        rows = jnp.arange(size)
        first, end = (jnp.arange(side) * size) // side, -((-(jnp.arange(side) + 1) * size) // side)
        inside = (rows >= first[:, None]) & (rows < end[:, None])
        weights.append((inside / inside.sum(axis=1, keepdims=True)).astype(x.dtype))
    return jnp.einsum("ih,bhwc,jw->bijc", weights[0], x, weights[1], precision=jax.lax.Precision.HIGHEST)
