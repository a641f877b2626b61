"""k-means against scikit-learn and against its definition, on one device and on eight."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.metrics import normalized_mutual_info_score

from jaxpretrain.build import ConfigError, build
from jaxpretrain.methods.kmeans import (
    Kmeans,
    assign,
    lloyd_step,
    normalized_mutual_info,
    put_rows,
    seed,
    split_largest,
    whiten,
)
from jaxpretrain.sharding import make_mesh

KEY = jax.random.key(0)
PLAIN = dict(pca_dim=None, normalize=False)


@pytest.fixture(scope="module")
def digits() -> np.ndarray:
    return load_digits().data[:601].astype(np.float32)  # divides by nothing


@pytest.fixture(scope="module")
def mesh() -> jax.sharding.Mesh:
    return make_mesh(ConfigDict(dict(data=4, fsdp=2, tensor=1)), jax.devices())


def numpy_lloyd(x: np.ndarray, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """One step in float64: new means, labels by the old ones, inertia by the old ones. No cluster may be empty."""
    x, centroids = x.astype(np.float64), centroids.astype(np.float64)
    distance = np.square(x[:, None] - centroids).sum(axis=2)
    label = distance.argmin(axis=1)
    return np.stack([x[label == c].mean(axis=0) for c in range(len(centroids))]), label, distance.min(axis=1).sum()


@pytest.mark.parametrize("chunk", [7, 1000])
def test_a_step_by_hand(digits, chunk):
    rows, start = put_rows(digits, chunk), digits[:5]
    means, label, inertia = numpy_lloyd(digits, start)
    np.testing.assert_allclose(lloyd_step(rows, start), means, rtol=1e-5, atol=1e-4)
    ours, _, counts, total = assign(rows, start)
    np.testing.assert_array_equal(ours.reshape(-1)[: len(digits)], label)
    np.testing.assert_array_equal(counts, np.bincount(label))
    assert float(total) == pytest.approx(inertia, rel=1e-5)


def test_inertia_as_scikit_learn(digits):
    """From the same centroids as many steps lead to the same place; from our own as good a one."""
    rows = put_rows(digits, 100)
    start = np.asarray(seed(rows, KEY, 10, len(digits), "random"))
    wanted = KMeans(10, init=start, n_init=1, max_iter=20, tol=0, algorithm="lloyd").fit(digits)
    centroids = start
    step = jax.jit(lloyd_step)
    for _ in range(wanted.n_iter_):
        centroids = step(rows, centroids)
    assert float(assign(rows, centroids)[3]) == pytest.approx(wanted.inertia_, rel=1e-5)
    found = [Kmeans(10, **PLAIN, iterations=100)(digits, jax.random.key(i)).inertia for i in range(5)]
    assert np.mean(found) < 1.03 * KMeans(10, n_init=5, random_state=0).fit(digits).inertia_


@pytest.mark.parametrize("init", ["k-means++", "random"])
def test_the_same_on_eight_devices(digits, mesh, init):
    one = Kmeans(10, pca_dim=16, init=init, chunk=32)(digits, KEY)
    eight = Kmeans(10, pca_dim=16, init=init, chunk=32)(digits, KEY, mesh)
    np.testing.assert_array_equal(one.labels, eight.labels)
    np.testing.assert_allclose(one.centroids, eight.centroids, atol=1e-5)
    assert one.inertia == pytest.approx(eight.inertia, rel=1e-5)
    assert one.labels.dtype == np.int32 and one.labels.shape == (601,) and set(one.labels) == set(range(10))
    other = Kmeans(10, pca_dim=16, init=init, chunk=32)(digits, jax.random.key(1))
    assert (other.labels != one.labels).any()


def test_rows_stay_where_they_are(digits, mesh):
    """Devices exchange sums, not rows, and no device ever has all distances."""
    rows = put_rows(digits, 16, mesh)
    assert {shard.data.shape for shard in rows.x.addressable_shards} == {(1, 5, 16, 64)}
    hlo = jax.jit(lloyd_step).lower(rows, digits[:10]).compile().as_text()
    assert "all-reduce" in hlo and "all-gather" not in hlo
    sizes = [
        v.aval.size for eqn in _equations(jax.make_jaxpr(lloyd_step)(rows, digits[:100]).jaxpr) for v in eqn.outvars
    ]
    assert max(sizes) <= max(8 * 16 * 100, 8 * 100 * 64, rows.x.size)  # distances of a chunk, sums, the rows themselves


def _equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _equations(inner)


def test_whitening(digits, mesh):
    """faiss's PCA with eigen_power -1/2, then unit length: what scikit-learn calls whitening."""
    white = PCA(16, whiten=True, svd_solver="full").fit_transform(digits.astype(np.float64))
    white /= np.linalg.norm(white, axis=1, keepdims=True)
    ours = np.asarray(whiten(put_rows(digits, 32, mesh), 16).x).reshape(-1, 16)
    assert not ours[len(digits) :].any()
    # Signs of components are free; where two have almost the same variance, float32 turns them by 1e-4.
    np.testing.assert_allclose(ours[:601] @ ours[:601].T, white @ white.T, atol=5e-4)
    np.testing.assert_allclose(np.abs(ours[:601]), np.abs(white), atol=5e-4)


def test_directions_without_variance_are_left_out():
    x = np.zeros((40, 4), np.float32)
    x[:, 0] = np.repeat([-1, 1], 20)
    found = Kmeans(2, pca_dim=4)(x, KEY)
    assert np.isfinite(found.centroids).all() and found.inertia == pytest.approx(0, abs=1e-5)
    assert len(set(found.labels[:20])) == 1 and found.labels[0] != found.labels[20]


def test_empty_clusters_split_the_largest():
    centroids = jnp.asarray([[0.0, 0.0], [4.0, 8.0], [1.0, 1.0], [5.0, 5.0]])
    new = np.asarray(split_largest(centroids, jnp.asarray([0, 12, 0, 5])))
    e = 1 / 1024
    # Cluster 1 is split into 6 and 6, then its first half (the first of the largest) into 3 and 3.
    np.testing.assert_allclose(new[3], [5, 5])
    np.testing.assert_allclose(new[1], [4 * (1 - e), 8 * (1 + e)], rtol=1e-6)
    halves = new[[0, 2]]
    np.testing.assert_allclose(halves[1], halves[0] * [1 + e, 1 - e], rtol=2e-3)
    np.testing.assert_array_equal(split_largest(centroids, jnp.asarray([1, 1, 1, 1])), centroids)
    assert np.isfinite(split_largest(centroids, jnp.asarray([1, 1, 0, 0]))).all()  # fewer rows than clusters: it ends


def test_no_cluster_stays_empty(digits):
    """From centroids that nobody is near to, and that are all the same."""
    rows, centroids = put_rows(digits, 64), np.full((8, 64), 1e3, np.float32)
    for _ in range(10):
        centroids = lloyd_step(rows, centroids)
    assert assign(rows, centroids)[2].min() > 0


def test_random_seeds_are_different_rows(digits):
    start = np.asarray(seed(put_rows(digits, 64), KEY, 20, len(digits), "random"))
    assert len({row.tobytes() for row in start}) == 20
    assert {row.tobytes() for row in start} <= {row.tobytes() for row in digits}


def test_plusplus_draws_by_squared_distance():
    """The second centroid is a point at distance r with probability r^2 / sum; the first is drawn evenly."""
    x = np.asarray([[0.0], [1.0], [3.0]], np.float32)
    rows = put_rows(x, 2)
    pairs = np.asarray(jax.vmap(lambda key: seed(rows, key, 2, 3, "k-means++"))(jax.random.split(KEY, 3000)))[..., 0]
    for first, others in {0: {1: 0.1, 3: 0.9}, 1: {0: 0.2, 3: 0.8}, 3: {0: 9 / 13, 1: 4 / 13}}.items():
        second = pairs[pairs[:, 0] == first, 1]
        assert len(second) / 3000 == pytest.approx(1 / 3, abs=0.03)
        for value, probability in others.items():
            assert (second == value).mean() == pytest.approx(probability, abs=0.05)


def test_normalized_mutual_info():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 7, (2, 500), dtype=np.int32)
    b[:250] = a[:250]
    wanted = normalized_mutual_info_score(a, b, average_method="geometric")
    assert normalized_mutual_info(a, b) == pytest.approx(wanted, abs=1e-9)
    assert normalized_mutual_info(a, 6 - a) == pytest.approx(1)
    assert normalized_mutual_info(a, np.zeros_like(a)) == 0


def test_errors(digits):
    with pytest.raises(ConfigError, match="unknown init 'kmeans'. Did you mean 'k-means"):
        build(dict(type="Kmeans", k=3, init="kmeans"))
    with pytest.raises(ConfigError, match="must be positive"):
        Kmeans(0)
    with pytest.raises(ConfigError, match="2 rows cannot make k=3 clusters"):
        Kmeans(3)(digits[:2], KEY)
    with pytest.raises(ConfigError, match="pca_dim=65 of 64 features"):
        Kmeans(3, pca_dim=65)(digits, KEY)
