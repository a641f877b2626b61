"""k-means on the devices: what DeepCluster and ODC cluster a whole data set with.

Rows are cut into chunks [devices, chunks, chunk, D], the first axis spread over the devices. Each device walks through its own
chunks, so of the [N, K] distances only [chunk, K] exist at a time; sums of members are matrix products, whose order is fixed,
and are added over devices once per iteration. Random draws depend on the key and N alone, not on the devices.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Bool, Float, Int

from jaxpretrain.build import ConfigError, nearest
from jaxpretrain.evaluators.base import gather
from jaxpretrain.sharding import BATCH

_ELEMENTS = 2**24  # distances that a device holds at a time: 64 MiB
_EPSILON = 1 / 1024  # how far the halves of a split cluster are moved apart, as in faiss
_FLAT = 1e-6  # directions with less than this part of the largest variance are noise, and not whitened


class Clusters(NamedTuple):
    """What a clustering gives.

    Attributes:
        labels: the cluster of each row, int32 on the host.
        centroids: the means, float32 on the host.
        inertia: sum of squared distances of the rows to their centroids.
    """

    labels: Int[np.ndarray, " n"]
    centroids: Float[np.ndarray, "k d"]
    inertia: float


class Rows(NamedTuple):
    """Rows on the devices, filled up to whole chunks by rows that are not `valid`."""

    x: Float[Array, "p c m d"]
    valid: Bool[Array, "p c m"]


class Kmeans:
    """Lloyd's algorithm on features that are whitened and brought to unit length first, as in DeepCluster (section 3).

    Args:
        k: number of clusters.
        pca_dim: principal components to keep, each scaled to unit variance; None or -1 keeps the features as they are.
        init: how to pick the first centroids among the rows: 'k-means++' (Arthur & Vassilvitskii, 2007), or 'random'.
        iterations: at most so many; fewer if nothing moves any more. faiss takes 20.
        normalize: whether to bring rows to unit length.
        chunk: rows of a device that are compared with all centroids at a time; None takes what 64 MiB hold.

    Raises:
        ConfigError: an unknown `init`, a number that is not positive; when called, fewer rows than clusters, or fewer
            features than `pca_dim`.
    """

    def __init__(
        self,
        k: int,
        pca_dim: int | None = 256,
        init: str = "k-means++",
        iterations: int = 20,
        normalize: bool = True,
        chunk: int | None = None,
    ):
        valid = ("k-means++", "random")
        if init not in valid:
            raise ConfigError(f"Kmeans: unknown init {init!r}.{nearest(str(init), valid)}")
        if k < 1 or iterations < 1 or (chunk is not None and chunk < 1):
            raise ConfigError(f"Kmeans: k={k}, iterations={iterations} and chunk={chunk} must be positive")
        self.k, self.pca_dim, self.init, self.iterations = k, None if pca_dim == -1 else pca_dim, init, iterations
        self.normalize, self.chunk = normalize, chunk

    def __call__(self, x: Float[np.ndarray, "n d"], key: Array, mesh: Mesh | None = None) -> Clusters:
        """Clusters the rows of `x`, whole on every host; the devices of `mesh` share the work. None: one device."""
        count, width = x.shape
        if count < self.k:
            raise ConfigError(f"Kmeans: {count} rows cannot make k={self.k} clusters")
        if self.pca_dim is not None and not 0 < self.pca_dim <= width:
            raise ConfigError(f"Kmeans: pca_dim={self.pca_dim} of {width} features; give -1 to do without PCA")
        rows = put_rows(x, self.chunk or max(1, _ELEMENTS // self.k), mesh)
        if self.pca_dim is not None:
            rows = whiten(rows, self.pca_dim, self.normalize)
        elif self.normalize:
            rows = _unit(rows)
        centroids = seed(rows, key, self.k, count, self.init)
        centroids, labels, inertia = gather(_run(rows, centroids, self.iterations))
        return Clusters(labels.reshape(-1)[:count], centroids, float(inertia))


def put_rows(x: Float[np.ndarray, "n d"], chunk: int, mesh: Mesh | None = None) -> Rows:
    """Rows of the host on the devices, in chunks of at most `chunk`."""
    devices = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
    share = -(-len(x) // devices)
    chunk = min(chunk, share)
    shape = (devices, -(-share // chunk), chunk)
    sharding = None if mesh is None else NamedSharding(mesh, BATCH)

    def put(array: np.ndarray) -> Array:
        filled = np.zeros((np.prod(shape), *array.shape[1:]), array.dtype)
        filled[: len(array)] = array
        filled = filled.reshape(*shape, *array.shape[1:])
        if sharding is None:
            return jax.device_put(filled)
        return jax.make_array_from_callback(filled.shape, sharding, lambda index: filled[index])

    return Rows(put(np.asarray(x, np.float32)), put(np.ones(len(x), bool)))


# ----------------------------------------------------------------------------------------------------------------------
# Whitening


def whiten(rows: Rows, dim: int, normalize: bool = True) -> Rows:
    """The first `dim` principal components of the rows, scaled to unit variance; then to unit length, if `normalize`."""
    mean, covariance = gather(_moments(rows))
    values, vectors = np.linalg.eigh(covariance.astype(np.float64))
    values, vectors = values[::-1][:dim], vectors[:, ::-1][:, :dim]
    scale = np.where(values > _FLAT * values[0], 1 / np.sqrt(np.maximum(values, 1e-30)), 0)
    rows = _project(rows, mean, (vectors * scale).astype(np.float32))
    return _unit(rows) if normalize else rows


@jax.jit
def _moments(rows: Rows) -> tuple[Float[Array, " d"], Float[Array, "d d"]]:
    """Mean and covariance of all rows."""
    count = rows.valid.sum()
    mean = jnp.sum(rows.x, axis=(0, 1, 2)) / count  # rows that only fill up are zero

    def add(total: Array, chunk: tuple[Array, Array]) -> tuple[Array, None]:
        x = jnp.where(chunk[1][..., None], chunk[0] - mean, 0)
        return total + jnp.einsum("pmd,pme->pde", x, x, precision="highest"), None

    zeros = jnp.zeros((rows.x.shape[0], mean.size, mean.size))
    total, _ = jax.lax.scan(add, zeros, (jnp.moveaxis(rows.x, 1, 0), jnp.moveaxis(rows.valid, 1, 0)))
    return mean, total.sum(axis=0) / count


@jax.jit
def _project(rows: Rows, mean: Float[Array, " d"], matrix: Float[Array, "d e"]) -> Rows:
    return rows._replace(x=jnp.einsum("pcmd,de->pcme", rows.x - mean, matrix, precision="highest"))


@jax.jit
def _unit(rows: Rows) -> Rows:
    """Valid rows of unit length, others zero."""
    x = rows.x / (jnp.linalg.norm(rows.x, axis=-1, keepdims=True) + 1e-10)
    return rows._replace(x=jnp.where(rows.valid[..., None], x, 0))


# ----------------------------------------------------------------------------------------------------------------------
# Seeding


@partial(jax.jit, static_argnames=("k", "count", "init"))
def seed(rows: Rows, key: Array, k: int, count: int, init: str) -> Float[Array, "k d"]:
    """The first centroids: k different rows, evenly drawn ('random'), or each with probability in proportion to its
    squared distance from those before it ('k-means++').
    """
    p, c, m, d = rows.x.shape
    flat = rows.x.reshape(-1, d)
    if init == "random":
        return flat[jax.random.permutation(key, count)[:k]]
    norms = jnp.sum(jnp.square(rows.x), axis=-1)

    def draw(i: Any, weight: Float[Array, "p c m"]) -> Float[Array, " d"]:
        # As categorical does; noise of `count` numbers, so that it does not depend on how rows are filled up.
        noise = jax.random.gumbel(jax.random.fold_in(key, i), (count,))
        noise = jnp.pad(noise, (0, p * c * m - count)).reshape(p, c, m)
        return flat[jnp.argmax(jnp.where(rows.valid, jnp.log(weight) + noise, -jnp.inf))]

    def away(centroid: Float[Array, " d"]) -> Float[Array, "p c m"]:
        product = jnp.einsum("pcmd,d->pcm", rows.x, centroid, precision="highest")
        return jnp.maximum(norms + jnp.sum(centroid * centroid) - 2 * product, 0)

    def one(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        centroids, distance = carry
        new = draw(i, distance)
        return centroids.at[i].set(new), jnp.minimum(distance, away(new))

    first = draw(0, jnp.ones_like(norms))
    return jax.lax.fori_loop(1, k, one, (jnp.zeros((k, d)).at[0].set(first), away(first)))[0]


# ----------------------------------------------------------------------------------------------------------------------
# Lloyd's algorithm


def assign(rows: Rows, centroids: Float[Array, "k d"]) -> tuple[Array, Array, Array, Array]:
    """The nearest centroid of each row, int32 [p, c, m]; per cluster the sum of its rows and their number; inertia."""
    k, d = centroids.shape
    squares = jnp.sum(jnp.square(centroids), axis=1)

    def add(carry: tuple[Array, Array, Array], chunk: tuple[Array, Array]) -> tuple[tuple, Array]:
        sums, counts, inertia = carry
        x, valid = chunk
        distance = squares - 2 * jnp.einsum("pmd,kd->pmk", x, centroids, precision="highest")  # less |x|^2
        label = jnp.argmin(distance, axis=2).astype(jnp.int32)
        member = (jnp.arange(k) == label[..., None]) & valid[..., None]
        shortest = jnp.maximum(jnp.min(distance, axis=2) + jnp.sum(jnp.square(x), axis=2), 0)
        sums = sums + jnp.einsum("pmk,pmd->pkd", member.astype(x.dtype), x, precision="highest")
        return (sums, counts + member.sum(axis=1), inertia + jnp.where(valid, shortest, 0).sum(axis=1)), label

    p = rows.x.shape[0]
    zeros = jnp.zeros((p, k, d)), jnp.zeros((p, k), jnp.int32), jnp.zeros(p)
    chunks = jnp.moveaxis(rows.x, 1, 0), jnp.moveaxis(rows.valid, 1, 0)
    (sums, counts, inertia), labels = jax.lax.scan(add, zeros, chunks)
    return jnp.moveaxis(labels, 0, 1), sums.sum(axis=0), counts.sum(axis=0), inertia.sum()


def split_largest(centroids: Float[Array, "k d"], counts: Int[Array, " k"]) -> Float[Array, "k d"]:
    """Puts each empty cluster beside the largest: both get its centroid, moved apart by a little, and half its members."""
    signs = jnp.where(jnp.arange(centroids.shape[1]) % 2 == 0, _EPSILON, -_EPSILON)

    def one(carry: tuple[Array, Array]) -> tuple[Array, Array]:
        centroids, counts = carry
        empty, largest = jnp.argmin(counts), jnp.argmax(counts)
        centre, size = centroids[largest], counts[largest]
        centroids = centroids.at[empty].set(centre * (1 + signs)).at[largest].set(centre * (1 - signs))
        return centroids, counts.at[empty].set(size // 2).at[largest].set(size - size // 2)

    # A cluster of one cannot be split: then there are no more different rows than clusters.
    wanted = lambda carry: (carry[1].min() == 0) & (carry[1].max() > 1)  # noqa: E731
    return jax.lax.while_loop(wanted, one, (centroids, counts))[0]


def lloyd_step(rows: Rows, centroids: Float[Array, "k d"]) -> Float[Array, "k d"]:
    """The means of the rows nearest to each centroid; empty clusters are put beside the largest."""
    _, sums, counts, _ = assign(rows, centroids)
    means = jnp.where(counts[:, None] > 0, sums / jnp.maximum(counts, 1)[:, None], centroids)
    return split_largest(means, counts)


@partial(jax.jit, static_argnames="iterations")
def _run(rows: Rows, centroids: Float[Array, "k d"], iterations: int) -> tuple[Array, Array, Array]:
    """Centroids, the labels by them, and the inertia."""

    def one(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        i, centroids, _ = carry
        new = lloyd_step(rows, centroids)
        return i + 1, new, (new != centroids).any()

    moving = lambda carry: (carry[0] < iterations) & carry[2]  # noqa: E731
    _, centroids, _ = jax.lax.while_loop(moving, one, (jnp.int32(0), centroids, jnp.asarray(True)))
    labels, _, _, inertia = assign(rows, centroids)
    return centroids, labels, inertia


def normalized_mutual_info(a: Int[np.ndarray, " n"], b: Int[np.ndarray, " n"]) -> float:
    """How much two labellings say about each other: I(a; b) / sqrt(H(a) H(b)), from 0 (nothing) to 1 (the same).

    1 also where both have one cluster only, as in scikit-learn.
    """

    def entropy(labels: np.ndarray) -> float:
        p = np.unique(labels, return_counts=True)[1] / len(labels)
        return float(-(p * np.log(p)).sum())

    one, other, both = entropy(a), entropy(b), entropy(a.astype(np.int64) * (int(b.max()) + 1) + b)
    if one == 0 or other == 0:
        return 1.0 if one == other else 0.0
    return max(one + other - both, 0.0) / (one * other) ** 0.5
