"""SwAV (Caron et al., 2020, Unsupervised Learning of Visual Features by Contrasting Cluster Assignments)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float

from jaxpretrain.build import ConfigError, build
from jaxpretrain.methods.base import (
    BaseSelfSupervisor,
    Batch,
    Metrics,
    Progress,
    entropy,
    last,
    normalize,
    pool,
    spread,
    views,
)
from jaxpretrain.models.layers import BaseModule, Linear, build_norm
from jaxpretrain.models.layers.conv import global_avg_pool, relu

_SYNC_BN = {"type": "SyncBN"}
_INIT = ({"type": "Constant", "val": 1, "layer": ["_BatchNorm", "GroupNorm"]},)


def sinkhorn(scores: Float[Array, "b k"], iterations: int = 3, epsilon: float = 0.05) -> Float[Array, "b k"]:
    """Soft assignments of samples to prototypes that use all prototypes alike (equation 3, Sinkhorn-Knopp).

    exp(scores / epsilon), with the columns and then the rows scaled to equal sums in each iteration; rows add up to 1. By
    logarithms, so that nothing overflows and no column is zero.
    """
    log_q = scores / epsilon
    for _ in range(iterations):
        log_q = jax.nn.log_softmax(log_q, axis=0)
        log_q = jax.nn.log_softmax(log_q, axis=1)
    return jnp.exp(log_q)


class SwAVNeck(BaseModule):
    """fc-bn-relu-fc, and unit length: the projector. Crops of all sizes pass it as one batch.

    Args:
        in_channels, hid_channels, out_channels: widths of input, hidden layer and output. hid_channels=0: one linear layer;
            out_channels=0: none.
        with_avg_pool: whether to average over positions first.
        with_l2norm: whether outputs have unit length, in float32 at least.
        norm_cfg: the norm, as for `build_norm`.
        init_cfg: initialisation, MMEngine's dictionaries.
    """

    # MMPretrain's norm is in its state dict twice: as an attribute, and as a member of the sequence.
    aliases: ClassVar = {"projection_neck.1": "norm"}

    def __init__(
        self,
        in_channels: int,
        hid_channels: int,
        out_channels: int,
        with_avg_pool: bool = True,
        with_l2norm: bool = True,
        norm_cfg: Mapping[str, Any] = _SYNC_BN,
        init_cfg: Any = _INIT,
        *,
        rngs: nnx.Rngs,
    ):
        self.init_cfg, self.with_avg_pool, self.with_l2norm = init_cfg, with_avg_pool, with_l2norm
        self.projection_neck: Any
        if out_channels == 0:
            self.projection_neck = nnx.List([])
        elif hid_channels == 0:
            self.projection_neck = Linear(in_channels, out_channels, rngs=rngs)
        else:
            self.norm = build_norm(norm_cfg, hid_channels, rngs=rngs)
            fc1, fc2 = Linear(in_channels, hid_channels, rngs=rngs), Linear(hid_channels, out_channels, rngs=rngs)
            self.projection_neck = nnx.List([fc1, self.norm, relu, fc2])

    def __call__(self, x: Any) -> Float[Array, "n d"]:
        """Projections, one below the other.

        Args:
            x: a list of what the backbone gives for the crops of each size: feature maps [N_i, H_i, W_i, C], or tuples of
                which the last is one.
        """
        maps = [last(one) for one in x]
        y = jnp.concatenate([global_avg_pool(one) if self.with_avg_pool else one for one in maps])
        y = y.reshape(len(y), -1)
        layers = self.projection_neck if isinstance(self.projection_neck, nnx.List) else [self.projection_neck]
        for layer in layers:
            y = layer(y)
        return normalize(y) if self.with_l2norm else y


class MultiPrototypes(BaseModule):
    """Several sets of prototypes, `prototypes0`, `prototypes1`, ...: linear layers without bias.

    Args:
        feat_dim: length of a prototype.
        num_prototypes: how many there are in each set.
    """

    def __init__(self, feat_dim: int, num_prototypes: Sequence[int], *, rngs: nnx.Rngs):
        for i, count in enumerate(num_prototypes):
            setattr(self, f"prototypes{i}", Linear(feat_dim, count, bias=False, rngs=rngs))


class SwAVLoss(BaseModule):
    """Predicts from each crop the code of another crop of the same image (equation 1): its assignment to prototypes.

    Prototypes have unit length, though what is learnt does not know: gradients are those by the unit vectors, and after
    each step the weights are brought back to unit length (`normalize_prototypes`).

    Args:
        feat_dim: length of a prototype.
        sinkhorn_iterations, epsilon: of the codes, see `sinkhorn`.
        temperature: of the predictions.
        crops_for_assign: which crops have codes, by number.
        num_crops: crops of each size; their sum is the number of views.
        num_prototypes: how many; or several numbers, for as many sets of prototypes, over which losses are averaged.
        init_cfg: initialisation, MMEngine's dictionaries.
    """

    def __init__(
        self,
        feat_dim: int,
        sinkhorn_iterations: int = 3,
        epsilon: float = 0.05,
        temperature: float = 0.1,
        crops_for_assign: Sequence[int] = (0, 1),
        num_crops: Sequence[int] = (2,),
        num_prototypes: int | Sequence[int] = 3000,
        init_cfg: Any = None,
        *,
        rngs: nnx.Rngs,
    ):
        self.init_cfg, self.feat_dim = init_cfg, feat_dim
        self.sinkhorn_iterations, self.epsilon, self.temperature = sinkhorn_iterations, epsilon, temperature
        self.crops_for_assign, self.num_crops = tuple(crops_for_assign), tuple(num_crops)
        self.num_views = sum(self.num_crops)
        if self.num_views < 2 or not set(self.crops_for_assign) <= set(range(self.num_views)):
            raise ConfigError(
                f"SwAVLoss: crops_for_assign={crops_for_assign} must be among the {self.num_views} crops that "
                f"num_crops={num_crops} makes, and these must be two or more"
            )
        counts = (num_prototypes,) if isinstance(num_prototypes, int) else tuple(num_prototypes)
        if not counts or min(counts) < 2:
            raise ConfigError(f"SwAVLoss: num_prototypes={num_prototypes} must be 2 or more")
        self.prototypes: Any
        if isinstance(num_prototypes, int):
            self.prototypes = Linear(feat_dim, num_prototypes, bias=False, rngs=rngs)
        else:
            self.prototypes = MultiPrototypes(feat_dim, counts, rngs=rngs)

    def _kernels(self) -> list[nnx.Variable]:
        """The prototypes [D, K] of each set, as columns."""
        if isinstance(self.prototypes, Linear):
            return [self.prototypes.kernel]
        return [layer.kernel for name, layer in sorted(vars(self.prototypes).items()) if isinstance(layer, Linear)]

    def normalize_prototypes(self) -> None:
        """Brings the prototypes to unit length, in place."""
        for kernel in self._kernels():
            kernel.set_value(normalize(kernel[...].T).T)

    def __call__(
        self, x: Float[Array, "n d"], queue: Float[Array, "codes length d"] | None = None
    ) -> tuple[Float[Array, ""], Metrics]:
        """The loss, and `assignment_entropy` to be logged.

        Args:
            x: embeddings of unit length: those of all images' first crops, then those of their second crops, and so on.
            queue: earlier embeddings of the crops in crops_for_assign. They take part in the codes as soon as the queue
                is full (its last row is not zero).
        """
        results = [self._loss(x, queue, kernel[...]) for kernel in self._kernels()]
        loss, evenness = (sum(values) / len(results) for values in zip(*results, strict=True))
        return loss, {"assignment_entropy": evenness}

    def _loss(self, x: Array, queue: Array | None, kernel: Float[Array, "d k"]) -> tuple[Array, Array]:
        unit = normalize(lax.stop_gradient(kernel).T).T
        prototypes = (unit + (kernel - lax.stop_gradient(kernel))).astype(x.dtype)
        scores = (x @ prototypes).reshape(self.num_views, -1, kernel.shape[1])
        log_p = jax.nn.log_softmax(scores / self.temperature, axis=-1)
        losses, codes = [], []
        for i, crop in enumerate(self.crops_for_assign):
            earlier = None if queue is None else queue[i].astype(x.dtype)
            code = self.codes(lax.stop_gradient(scores[crop]), earlier, lax.stop_gradient(prototypes))
            cross_entropies = -jnp.sum(code * log_p, axis=-1).mean(axis=1)  # of each crop's predictions
            losses.append(jnp.delete(cross_entropies, crop).mean())
            codes.append(code)
        return jnp.stack(losses).mean(), entropy(jnp.stack(codes))

    def codes(
        self, scores: Float[Array, "b k"], queue: Float[Array, "length d"] | None, prototypes: Float[Array, "d k"]
    ) -> Float[Array, "b k"]:
        """The assignments of a batch, balanced over the batch and the queue, if that is full."""
        if queue is None:
            return sinkhorn(scores, self.sinkhorn_iterations, self.epsilon)
        full: Bool[Array, ""] = jnp.any(queue[-1] != 0)
        together = jnp.concatenate([queue @ prototypes, scores])
        return lax.cond(
            full,
            lambda: sinkhorn(together, self.sinkhorn_iterations, self.epsilon)[len(queue) :],
            lambda: sinkhorn(scores, self.sinkhorn_iterations, self.epsilon),
        )


class SwAVHead(BaseModule):
    """Holds the loss.

    Args:
        loss: `SwAVLoss`.
    """

    def __init__(self, loss: Mapping[str, Any] | nnx.Module, *, rngs: nnx.Rngs):
        self.loss_module = build(loss, rngs=rngs)

    def loss(
        self, pred: Float[Array, "n d"], queue: Float[Array, "codes length d"] | None = None
    ) -> tuple[Float[Array, ""], Metrics]:
        """See `SwAVLoss`."""
        return self.loss_module(pred, queue)


class SwAV(BaseSelfSupervisor):
    """Crops of one image, large and small, shall predict each other's codes, which Sinkhorn balances over the batch.

    The backbone gives a tuple of feature maps, the neck is a `SwAVNeck`, the head a `SwAVHead`. The paper lets prototypes
    stand still in the first epoch: `custom_keys={"prototypes": dict(begin=steps)}`.

    Args:
        queue_length: earlier embeddings that take part in the codes, for small batches (section 4.3 and appendix); of it as
            many whole batches are used as fit. 0: no queue.
        epoch_queue_starts: the epoch, from 0, in which the queue begins to fill.
        crops_for_assign: as of the loss, which decides; accepted since MMPretrain's `SwAVHook` says it too.
        parts: arguments of `BaseSelfSupervisor`.

    Attributes:
        queue: [codes, queue_length, feat_dim], the newest first; zeros at first. MMPretrain keeps it beside its checkpoints.
    """

    local_state: ClassVar = ("queue",)

    def __init__(
        self,
        queue_length: int = 0,
        epoch_queue_starts: int = 15,
        crops_for_assign: Sequence[int] | None = None,
        *,
        rngs: nnx.Rngs,
        **parts: Any,
    ):
        super().__init__(rngs=rngs, **parts)
        loss = self.head.loss_module
        if crops_for_assign is not None and tuple(crops_for_assign) != loss.crops_for_assign:
            raise ConfigError(
                f"SwAV: crops_for_assign={tuple(crops_for_assign)}, but its loss has {loss.crops_for_assign}: "
                "set head.loss.crops_for_assign, or leave it out here"
            )
        self.queue_length, self.epoch_queue_starts = queue_length, epoch_queue_starts
        if queue_length:
            self.queue = nnx.BatchStat(jnp.zeros((len(loss.crops_for_assign), queue_length, loss.feat_dim)))

    def init_weights(self, rngs: nnx.Rngs) -> None:
        """Initialises all parts; prototypes get unit length."""
        super().init_weights(rngs)
        self.head.loss_module.normalize_prototypes()

    def loss(self, batch: Batch, *, rngs: nnx.Rngs | None = None) -> tuple[Float[Array, ""], Metrics]:
        """The swapped prediction; `image` is all crops [B, H_i, W_i, 3], sizes one after the other.

        Logs `feature_std` of embeddings and `assignment_entropy` of codes.
        """
        z = self._project(views(batch, self.head.loss_module.num_views), rngs)
        queue = self._use_queue(z, batch) if self.queue_length else None
        loss, metrics = self.head.loss(z.reshape(-1, z.shape[-1]), queue)
        return loss, {"feature_std": spread(z[0]), **metrics}

    def _project(self, crops: Sequence[Float[Array, "b h w 3"]], rngs: nnx.Rngs | None) -> Float[Array, "crops b d"]:
        """Embeddings. Crops of one size pass the backbone as one batch, those of an image side by side.

        So groups of BatchNorm hold whole images, and rows stay on their devices.
        """
        maps, counts = [], []
        for _, alike in itertools.groupby(crops, key=lambda crop: crop.shape):
            same = list(alike)
            counts.append(len(same))
            images = jnp.stack(same, axis=1).reshape(-1, *same[0].shape[1:])
            maps.append(last(self.backbone(images, rngs=rngs)))
        z, batch = self.neck(maps), len(crops[0])
        ends = list(itertools.accumulate(count * batch for count in counts))
        parts = [part.reshape(batch, -1, z.shape[-1]) for part in jnp.split(z, ends[:-1])]
        return jnp.concatenate(parts, axis=1).swapaxes(0, 1)

    def _use_queue(self, z: Float[Array, "crops b d"], batch: Batch) -> Float[Array, "codes length d"]:
        """The queue as it was, of as many whole batches as fit; afterwards this batch is its first."""
        size = z.shape[1]
        length = self.queue_length - self.queue_length % size
        if not length:
            raise ConfigError(f"SwAV: queue_length={self.queue_length} is less than the batch of {size}")
        before = self.queue[...]
        new = lax.stop_gradient(z[jnp.asarray(self.head.loss_module.crops_for_assign)]).astype(before.dtype)
        after = jnp.concatenate([new, before[:, : length - size], before[:, length:]], axis=1)
        started = jnp.max(batch.get("epoch", 0)) >= self.epoch_queue_starts
        self.queue.set_value(jnp.where(started, after, before))
        return before[:, :length]

    def after_step(self, progress: Progress) -> None:
        """Brings the prototypes back to unit length."""
        self.head.loss_module.normalize_prototypes()

    def features(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b d"]:
        """The backbone's last feature map, averaged over positions."""
        return pool(self.backbone(images))
