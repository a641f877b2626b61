"""MoCo (He et al., 2020, Momentum Contrast; v2: Chen et al., 2020, Improved Baselines)."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from jaxpretrain.build import ConfigError
from jaxpretrain.methods.base import Batch, Metrics, Progress, draw_key, last, normalize, spread, views
from jaxpretrain.methods.momentum_encoder import MomentumMethod
from jaxpretrain.models.layers import BaseModule, BatchNorm, Linear
from jaxpretrain.models.layers.conv import global_avg_pool, relu


class MoCoV2Neck(BaseModule):
    """fc-relu-fc, without norms: the projector of MoCo v2. Takes a tuple of one feature map, and gives one of [B, D].

    Args:
        in_channels, hid_channels, out_channels: widths of input, hidden layer and output.
        with_avg_pool: whether to average over the positions first.
        init_cfg: initialisation, MMEngine's dictionaries.
    """

    def __init__(
        self,
        in_channels: int,
        hid_channels: int,
        out_channels: int,
        with_avg_pool: bool = True,
        init_cfg: Any = None,
        *,
        rngs: nnx.Rngs,
    ):
        self.init_cfg, self.with_avg_pool = init_cfg, with_avg_pool
        layers = [Linear(in_channels, hid_channels, rngs=rngs), relu, Linear(hid_channels, out_channels, rngs=rngs)]
        self.mlp: nnx.List[Any] = nnx.List(layers)

    def __call__(self, x: Any) -> tuple[Float[Array, "b d"]]:
        x = last(x)
        x = global_avg_pool(x) if self.with_avg_pool else x
        for layer in self.mlp:
            x = layer(x)
        return (x,)


class MoCo(MomentumMethod):
    """A query shall find its key, the momentum encoder's view of the same image, among a queue of others' (algorithm 1).

    With BatchNorm in groups, the key encoder sees the batch shuffled, so that a query and its key are normalised with
    different images (section 3.3, "shuffling BN"). The backbone gives a tuple of feature maps, the neck is the projector,
    the head a `ContrastiveHead`.

    Args:
        queue_len: keys in the queue; a multiple of the batch size.
        feat_dim: channels of the projections.
        momentum: how far the momentum encoder moves in each step (the paper's m is 1 minus this).
        parts: arguments of `BaseSelfSupervisor`.

    Attributes:
        queue: unit vectors [feat_dim, queue_len], random at first.
        queue_ptr: the column that is written next, int32 [1].
    """

    teacher_name: ClassVar = "encoder_k"

    def __init__(
        self,
        queue_len: int = 65536,
        feat_dim: int = 128,
        momentum: float = 0.001,
        *,
        rngs: nnx.Rngs,
        **parts: Any,
    ):
        super().__init__(rngs=rngs, **parts)
        self.queue_len, self.momentum = queue_len, momentum
        self.queue = nnx.BatchStat(random_queue(rngs, feat_dim, queue_len))
        self.queue_ptr = nnx.BatchStat(jnp.zeros((1,), jnp.int32))

    def loss(self, batch: Batch, *, rngs: nnx.Rngs | None = None) -> tuple[Float[Array, ""], Metrics]:
        """InfoNCE; `image` is query and key views [B, H, W, 3]. Logs `feature_std`."""
        queries, keys = views(batch, 2)
        q = normalize(last(self.neck(self.backbone(queries, rngs=rngs))))
        k = normalize(last(self.shuffled_teach(keys, rngs)))
        negatives = q @ self.queue[...].astype(q.dtype)
        loss = self.head.loss(jnp.sum(q * k, axis=1, keepdims=True), negatives)
        enqueue(self.queue, self.queue_ptr, k)
        return loss, {"feature_std": spread(q)}

    def shuffled_teach(self, images: Float[Array, "b h w 3"], rngs: nnx.Rngs | None) -> Any:
        """The teacher's outputs, in order, computed from the batch in random order if BatchNorm has groups."""
        if not any(isinstance(m, BatchNorm) and m.groups > 1 for _, m in nnx.iter_modules(self.teacher)):
            return self._teach(images, rngs)
        order = jax.random.permutation(draw_key(rngs, "shuffle"), len(images))
        outputs = self._teach(images[order], rngs)
        return jax.tree.map(lambda x: x[jnp.argsort(order)], outputs)

    def _teach(self, images: Float[Array, "b h w 3"], rngs: nnx.Rngs | None) -> Any:
        return self.teach(images, rngs=rngs)[0]

    def teacher_momentum(self, progress: Progress) -> float:
        return self.momentum


def random_queue(rngs: nnx.Rngs, feat_dim: int, queue_len: int) -> Float[Array, "d k"]:
    """Random unit vectors as columns, float32."""
    return normalize(jax.random.normal(rngs.params(), (queue_len, feat_dim))).T


def enqueue(queue: nnx.Variable, pointer: nnx.Variable, keys: Float[Array, "b d"]) -> None:
    """Overwrites the oldest columns of the queue by `keys`, and moves the pointer, in place."""
    length, batch = queue.shape[1], keys.shape[0]
    if length % batch:
        raise ConfigError(
            f"queue_len={length} is not a multiple of the batch of {batch} keys; choose queue_len or batch_size"
        )
    start: Int[Array, ""] = pointer[...][0]
    keys = lax.stop_gradient(keys).T.astype(queue.dtype)
    queue.set_value(lax.dynamic_update_slice(queue[...], keys, (jnp.zeros_like(start), start)))
    pointer.set_value((pointer[...] + batch) % length)
