"""ODC (Zhan et al., 2020, Online Deep Clustering for Unsupervised Representation Learning)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from jaxpretrain.build import ConfigError, build
from jaxpretrain.data.samplers import Order, ReplacementOrder
from jaxpretrain.methods.base import Batch, Metrics, Progress, entropy, last, normalize, spread
from jaxpretrain.methods.deepcluster import ClusteringMethod, describe
from jaxpretrain.methods.kmeans import Kmeans
from jaxpretrain.models.layers import BaseModule, Dropout, Linear, build_norm
from jaxpretrain.models.layers.conv import global_avg_pool, relu

_BLOCK = 1024  # images of small clusters that find a new one at a time
_SPLIT = 2**14  # images of the largest cluster that decide where it is split
_SPLIT_STEPS = 20


class ODCNeck(BaseModule):
    """fc-bn-relu-dropout-fc-relu. Takes a tuple of one feature map, and gives one of [B, out_channels].

    Args:
        in_channels, hid_channels, out_channels: widths of input, hidden layer and output.
        with_avg_pool: whether to average over the positions first.
        norm_cfg: the norm, as for `build_norm`; its momentum is 0.001, and it has no scale and bias.
        init_cfg: initialisation, MMEngine's dictionaries.
    """

    def __init__(
        self,
        in_channels: int,
        hid_channels: int,
        out_channels: int,
        with_avg_pool: bool = True,
        norm_cfg: Mapping[str, Any] = {"type": "SyncBN"},
        init_cfg: Any = ({"type": "Constant", "val": 1, "layer": ["_BatchNorm", "GroupNorm"]},),
        *,
        rngs: nnx.Rngs,
    ):
        self.init_cfg, self.with_avg_pool = init_cfg, with_avg_pool
        self.fc0 = Linear(in_channels, hid_channels, rngs=rngs)
        self.bn0 = build_norm({**norm_cfg, "momentum": 0.001, "affine": False}, hid_channels, rngs=rngs)
        self.fc1 = Linear(hid_channels, out_channels, rngs=rngs)
        self.dropout = Dropout(0.5)

    def __call__(self, x: Any, *, rngs: nnx.Rngs | None = None) -> tuple[Float[Array, "b d"]]:
        x = last(x)
        x = global_avg_pool(x) if self.with_avg_pool else x.reshape(len(x), -1)
        x = self.dropout(relu(self.bn0(self.fc0(x))), rngs=rngs)
        return (relu(self.fc1(x)),)


class ODCMemory(BaseModule):
    """Two memories (section 3.2): feature and cluster of every image, and the centroid of every cluster.

    Args:
        length: number of images.
        feat_dim: channels of a feature.
        momentum: weight of a new feature.
        num_classes: number of clusters.
        min_cluster: images that a cluster must have; smaller ones are dissolved.
        kwargs: `debug` of MMPretrain's configs, without effect.

    Attributes:
        feature_bank: unit vectors [length, feat_dim], float32; zero until the first clustering.
        label_bank: the cluster of each image, int32 [length]; image i is in cluster i mod K until then.
        centroids: means of the features in a cluster, float32 [K, feat_dim].

    Raises:
        ConfigError: fewer images than `num_classes` clusters of `min_cluster` need.
    """

    local_state: ClassVar = ("feature_bank", "label_bank")

    def __init__(
        self,
        length: int,
        feat_dim: int,
        momentum: float,
        num_classes: int,
        min_cluster: int,
        debug: bool = False,
        *,
        rngs: nnx.Rngs,
    ):
        if length < num_classes * max(min_cluster, 1):
            raise ConfigError(
                f"ODCMemory: length={length} images do not make num_classes={num_classes} clusters of "
                f"min_cluster={min_cluster}; lower one of the latter two"
            )
        self.length, self.num_classes, self.momentum, self.min_cluster = length, num_classes, momentum, min_cluster
        self.feature_bank = nnx.BatchStat(jnp.zeros((length, feat_dim), jnp.float32))
        self.label_bank = nnx.BatchStat(jnp.arange(length, dtype=jnp.int32) % num_classes)
        self.centroids = nnx.BatchStat(normalize(jax.random.normal(rngs.params(), (num_classes, feat_dim))))

    def init_memory(
        self,
        feature: Float[np.ndarray, "n d"],
        label: Int[np.ndarray, " n"],
        centroids: Float[np.ndarray, "k d"],
    ) -> None:
        """Takes over features and clusters of all images. An empty cluster keeps its one of `centroids`."""
        feature = feature / (np.linalg.norm(feature, axis=1, keepdims=True) + 1e-10)
        sizes = np.bincount(label, minlength=self.num_classes)[:, None]
        sums = np.zeros(centroids.shape, np.float64)
        np.add.at(sums, label, feature)
        self.feature_bank.set_value(jnp.asarray(feature, jnp.float32))
        self.label_bank.set_value(jnp.asarray(label, jnp.int32))
        self.centroids.set_value(jnp.asarray(np.where(sizes > 0, sums / np.maximum(sizes, 1), centroids), jnp.float32))

    def update_samples(self, index: Int[Array, " b"], feature: Float[Array, "b d"]) -> Float[Array, ""]:
        """Moves the features of images towards new ones, and the images into the nearest cluster, in place.

        Returns:
            the part of them that change their cluster, float32.
        """
        bank, labels = self.feature_bank[...], self.label_bank[...]
        new = normalize(lax.stop_gradient(feature)).astype(bank.dtype)
        moved = normalize((1 - self.momentum) * bank[index] + self.momentum * new)
        label = nearest_centroid(moved, self.centroids[...])
        changed = jnp.mean((label != labels[index]).astype(jnp.float32))
        # Of an image that was drawn twice, the last one counts, on any hardware.
        again = jnp.triu(index[:, None] == index, k=1).any(axis=1)
        place = jnp.where(again, self.length, index)
        self.feature_bank.set_value(bank.at[place].set(moved, mode="drop"))
        self.label_bank.set_value(labels.at[place].set(label, mode="drop"))
        return changed

    def update_centroids(self, due: Bool[Array, ""] | bool = True) -> None:
        """Makes centroids the means of their clusters' features, where `due`, in place; empty clusters keep theirs."""

        def means(labels: Array, centroids: Array) -> Array:
            sums = jnp.zeros_like(centroids).at[labels].add(self.feature_bank[...])
            sizes = jnp.bincount(labels, length=self.num_classes)[:, None]
            return jnp.where(sizes > 0, sums / jnp.maximum(sizes, 1), centroids)

        keep = lambda labels, centroids: centroids  # noqa: E731
        self.centroids.set_value(lax.cond(due, means, keep, self.label_bank[...], self.centroids[...]))

    def deal_with_small_clusters(self, due: Bool[Array, ""] | bool = True) -> None:
        """Dissolves clusters of fewer than `min_cluster` images, and gives each half of the largest, in place."""
        labels, centroids, bank = self.label_bank[...], self.centroids[...], self.feature_bank[...]
        small = jnp.bincount(labels, length=self.num_classes) < self.min_cluster

        def deal(labels: Array, centroids: Array) -> tuple[Array, Array]:
            return refill(bank, dissolve(bank, labels, centroids, small), centroids, small)

        keep = lambda labels, centroids: (labels, centroids)  # noqa: E731
        labels, centroids = lax.cond(due & small.any(), deal, keep, labels, centroids)
        self.label_bank.set_value(labels)
        self.centroids.set_value(centroids)

    def sizes(self) -> Int[Array, " k"]:
        """Images in each cluster."""
        return jnp.bincount(self.label_bank[...], length=self.num_classes)


def nearest_centroid(features: Float[Array, "n d"], centroids: Float[Array, "k d"], barred: Any = False) -> Array:
    """The centroid of the largest inner product with each feature, that is not `barred`; int32 [n]."""
    similarity = jnp.matmul(features, centroids.T, precision="highest")
    return jnp.argmax(jnp.where(barred, -jnp.inf, similarity), axis=1).astype(jnp.int32)


def dissolve(
    bank: Float[Array, "n d"], labels: Int[Array, " n"], centroids: Float[Array, "k d"], small: Bool[Array, " k"]
) -> Int[Array, " n"]:
    """The labels after all images of `small` clusters have gone to the nearest other one; not all may be small."""
    count = len(labels)

    def block(labels: Array) -> Array:
        index = jnp.nonzero(small[labels], size=min(_BLOCK, count), fill_value=count)[0]
        found = nearest_centroid(bank.at[index].get(mode="fill", fill_value=0), centroids, small)
        return labels.at[index].set(found, mode="drop")

    return lax.while_loop(lambda labels: small[labels].any(), block, labels)


def refill(
    bank: Float[Array, "n d"], labels: Int[Array, " n"], centroids: Float[Array, "k d"], empty: Bool[Array, " k"]
) -> tuple[Int[Array, " n"], Float[Array, "k d"]]:
    """Labels and centroids after each `empty` cluster, in order, has got half of the one that is the largest then."""

    def split(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        labels, centroids, empty = carry
        target = jnp.argmax(empty).astype(jnp.int32)
        largest = jnp.argmax(jnp.bincount(labels, length=len(empty)))
        labels = jnp.where(halve(bank, labels == largest), target, labels)
        for cluster in (largest, target):
            member = (labels == cluster).astype(bank.dtype)
            mean = jnp.matmul(member, bank, precision="highest") / member.sum()
            centroids = centroids.at[cluster].set(mean)
        return labels, centroids, empty.at[target].set(False)

    return lax.while_loop(lambda carry: carry[2].any(), split, (labels, centroids, empty))[:2]


def halve(bank: Float[Array, "n d"], member: Bool[Array, " n"]) -> Bool[Array, " n"]:
    """The second part of the members, by 2-means that starts from two that are far apart; both have one at least.

    There must be two members at least. Of more than 16,384, the first as many decide.
    """
    count = len(member)
    index = jnp.nonzero(member, size=min(_SPLIT, count), fill_value=count)[0]
    x = bank.at[index].get(mode="fill", fill_value=0)
    inside = (index < count).astype(x.dtype)

    def distance(x: Array, centre: Array) -> Array:
        return jnp.sum(jnp.square(x - centre), axis=-1)

    def farthest(centre: Array) -> Array:
        return x[jnp.argmax(jnp.where(inside > 0, distance(x, centre), -1))]

    def step(_: Any, centres: Array) -> Array:
        second = (distance(x, centres[1]) < distance(x, centres[0])).astype(x.dtype)
        parts = jnp.stack([(1 - second) * inside, second * inside])
        sizes = parts.sum(axis=1, keepdims=True)
        means = jnp.matmul(parts, x, precision="highest") / jnp.maximum(sizes, 1)
        return jnp.where(sizes > 0, means, centres)

    first = farthest(x.sum(axis=0) / inside.sum())
    centres = lax.fori_loop(0, _SPLIT_STEPS, step, jnp.stack([first, farthest(first)]))
    second = member & (distance(bank, centres[1]) < distance(bank, centres[0]))
    alternate = member & (jnp.cumsum(member) % 2 == 0)  # all the same: any half will do
    return jnp.where(second.any() & (second != member).any(), second, alternate)


class ODC(ClusteringMethod):
    """Clusters that evolve with the network: an image's cluster is the nearest by a running average of its features, which
    is updated whenever the image comes by; centroids follow every few steps (algorithm 1).

    Clusters that have become too small are dissolved, and get half of the largest. One k-means of all features comes before
    the first epoch. The backbone gives a tuple of feature maps, the neck is an `ODCNeck`, the head a `LinearClsHead`.

    Args:
        memory_bank: an `ODCMemory`; its `num_classes` follows from the head if it is not given.
        clustering: the one at the start; its k follows from the head if it is not given.
        reweight, reweight_pow: as of `ClusteringMethod`; weights are set anew after every step.
        centroids_update_interval: steps from one update of the centroids to the next.
        deal_with_small_clusters_interval: likewise, of small clusters.
        replace: whether the images of an epoch are drawn with replacement.
        parts: arguments of `BaseSelfSupervisor`.
    """

    def __init__(
        self,
        memory_bank: Mapping[str, Any] | ODCMemory,
        clustering: Mapping[str, Any] | Kmeans = {"type": "Kmeans", "pca_dim": -1},  # noqa: B006 - read only
        reweight: bool = True,
        reweight_pow: float = 0.5,
        centroids_update_interval: int = 10,
        deal_with_small_clusters_interval: int = 1,
        replace: bool = True,
        *,
        rngs: nnx.Rngs,
        **parts: Any,
    ):
        super().__init__(clustering, reweight, reweight_pow, rngs=rngs, **parts)
        self.memory_bank = build(memory_bank, rngs=rngs, num_classes=self.num_classes)
        if self.memory_bank.num_classes != self.num_classes:
            raise ConfigError(
                f"ODC: memory_bank.num_classes={self.memory_bank.num_classes}, but head.num_classes={self.num_classes}"
            )
        if centroids_update_interval < 1 or deal_with_small_clusters_interval < 1:
            raise ConfigError("ODC: intervals of steps must be at least 1")
        self.centroids_update_interval = centroids_update_interval
        self.deal_with_small_clusters_interval = deal_with_small_clusters_interval
        self.replace = replace

    @property
    def num_samples(self) -> int:
        return self.memory_bank.length

    def loss(self, batch: Batch, *, rngs: nnx.Rngs | None = None) -> tuple[Float[Array, ""], Metrics]:
        """Cross entropy of the clusters that the memory holds, which is updated after; `image` is [B, H, W, 3].

        Logs `feature_std` of the neck's output, `assignment_entropy` of the clusters that all images are in, and
        `change_ratio`, the part of the batch that changes its cluster.
        """
        memory, index = self.memory_bank, batch["index"]
        x = last(self.neck(self.backbone(batch["image"], rngs=rngs), rngs=rngs))
        label = memory.label_bank[...].at[index].get(mode="fill", fill_value=self.num_classes)
        loss = self.classify(x, label)
        metrics = {
            "change_ratio": memory.update_samples(index, x),
            "feature_std": spread(x),
            "assignment_entropy": entropy(memory.sizes() / memory.length),
        }
        return loss, metrics

    def after_step(self, progress: Progress) -> None:
        """Centroids, small clusters and weights, in this order."""
        self.memory_bank.update_centroids(progress.step % self.centroids_update_interval == 0)
        self.memory_bank.deal_with_small_clusters(progress.step % self.deal_with_small_clusters_interval == 0)
        self.weigh(self.memory_bank.sizes())

    def regroups(self, epoch: int) -> bool:
        return epoch == 0

    def regroup(
        self, features: Float[np.ndarray, "n d"], *, epoch: int, key: Array, mesh: Mesh | None = None
    ) -> dict[str, float]:
        """The first clustering fills the memories. Logs sizes."""
        found = self.cluster(features, key, mesh)
        if found.centroids.shape[1] == features.shape[1]:
            centroids = found.centroids / (np.linalg.norm(found.centroids, axis=1, keepdims=True) + 1e-10)
        else:  # of principal components
            centroids = np.zeros((self.num_classes, features.shape[1]), np.float32)
        self.memory_bank.init_memory(features, found.labels, centroids)
        self.weigh(np.bincount(found.labels, minlength=self.num_classes))
        return describe(found, self.num_classes)

    def order(self) -> Order | None:
        return ReplacementOrder() if self.replace else None
