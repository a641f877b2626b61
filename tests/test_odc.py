"""ODC: its memories against NumPy, written from section 3.2 of the paper; its neck; and what it learns from."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxpretrain.build import ConfigError, build
from jaxpretrain.interop import mmpretrain
from jaxpretrain.methods.base import Progress
from jaxpretrain.methods.odc import ODCMemory, ODCNeck, halve
from jaxpretrain.models.layers import BatchNorm
from tests.method_cases.base import make
from tests.method_cases.clustering import CLUSTERS, ODC, SAMPLES, TINY

N, D, K, SMALLEST = 200, 6, 9, 14
SMALL = ODC | dict(backbone=TINY)


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


class Reference:
    """The memories in float64, one image and one cluster at a time."""

    def __init__(self, features: np.ndarray, labels: np.ndarray):
        self.features, self.labels = unit(features.astype(np.float64)), labels.copy()
        self.centroids = np.zeros((K, features.shape[1]))
        self.update_centroids()

    def mean(self, cluster: int) -> np.ndarray:
        return self.features[self.labels == cluster].mean(axis=0)

    def update_centroids(self) -> None:
        for cluster in set(self.labels.tolist()):
            self.centroids[cluster] = self.mean(cluster)

    def update_samples(self, index: np.ndarray, features: np.ndarray) -> float:
        changed = 0
        moved = unit(0.5 * self.features[index] + 0.5 * unit(features.astype(np.float64)))
        for i, feature in zip(index, moved, strict=True):
            self.features[i] = feature
        labels = (moved @ self.centroids.T).argmax(axis=1)
        changed = np.mean(labels != self.labels[index])
        self.labels[index] = labels
        return changed

    def deal_with_small_clusters(self) -> None:
        sizes = np.bincount(self.labels, minlength=K)
        small = np.flatnonzero(sizes < SMALLEST)
        others = np.setdiff1d(np.arange(K), small)
        for i in np.flatnonzero(np.isin(self.labels, small)):
            self.labels[i] = others[(self.centroids[others] @ self.features[i]).argmax()]
        for cluster in small:
            largest = np.bincount(self.labels, minlength=K).argmax()
            members = np.flatnonzero(self.labels == largest)
            x = self.features[members]
            # 2-means from the member farthest from the mean, and the one farthest from that.
            first = x[np.square(x - x.mean(axis=0)).sum(axis=1).argmax()]
            centres = [first, x[np.square(x - first).sum(axis=1).argmax()]]
            for _ in range(20):
                second = np.square(x - centres[1]).sum(axis=1) < np.square(x - centres[0]).sum(axis=1)
                centres = [x[~second].mean(axis=0), x[second].mean(axis=0)]
            second = np.square(x - centres[1]).sum(axis=1) < np.square(x - centres[0]).sum(axis=1)
            self.labels[members[second]] = cluster
            self.centroids[largest], self.centroids[cluster] = self.mean(largest), self.mean(cluster)


def test_memories_by_hand():
    """Thirty steps of random features, that move the clusters about and empty some."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(N, D)).astype(np.float32)
    labels = (np.arange(N) % K).astype(np.int32)
    reference = Reference(features, labels)
    memory = ODCMemory(N, D, 0.5, K, SMALLEST, rngs=nnx.Rngs(0))
    memory.init_memory(features, labels, np.zeros((K, D), np.float32))
    np.testing.assert_allclose(memory.centroids[...], reference.centroids, atol=1e-6)
    np.testing.assert_allclose(memory.feature_bank[...], reference.features, atol=1e-6)

    @nnx.jit
    def step(memory, index, feature, number):
        changed = memory.update_samples(index, feature)
        memory.update_centroids(number % 3 == 0)
        memory.deal_with_small_clusters(number % 2 == 0)
        return changed

    dissolved = 0
    for number in range(1, 31):
        index = rng.permutation(N)[:32]
        feature = (rng.normal(size=(32, D)) + 4 * np.eye(D)[number % D]).astype(np.float32)
        wanted = reference.update_samples(index, feature)
        if number % 3 == 0:
            reference.update_centroids()
        if number % 2 == 0:
            dissolved += (np.bincount(reference.labels, minlength=K) < SMALLEST).sum()
            reference.deal_with_small_clusters()
        changed = step(memory, index, feature, jnp.int32(number))
        np.testing.assert_array_equal(memory.label_bank[...], reference.labels)
        np.testing.assert_allclose(memory.centroids[...], reference.centroids, atol=1e-5)
        np.testing.assert_allclose(memory.feature_bank[...], reference.features, atol=1e-5)
        assert float(changed) == pytest.approx(wanted)
        if number % 2 == 0:
            assert np.bincount(memory.label_bank[...], minlength=K).min() >= 1
    assert dissolved > 5


def test_an_image_drawn_twice_counts_once():
    memory = ODCMemory(N, D, 0.5, K, 1, rngs=nnx.Rngs(0))
    memory.init_memory(*start(), np.zeros((K, D), np.float32))
    before = np.asarray(memory.feature_bank[...])
    feature = np.random.default_rng(1).normal(size=(3, D)).astype(np.float32)
    memory.update_samples(jnp.asarray([7, 3, 7]), feature)
    after = np.asarray(memory.feature_bank[...])
    np.testing.assert_allclose(after[7], unit(before[7] / 2 + unit(feature[2]) / 2), atol=1e-6)
    np.testing.assert_allclose(after[3], unit(before[3] / 2 + unit(feature[1]) / 2), atol=1e-6)
    assert (np.delete(after, [3, 7], axis=0) == np.delete(before, [3, 7], axis=0)).all()


def start() -> tuple[np.ndarray, np.ndarray]:
    features = np.random.default_rng(0).normal(size=(N, D)).astype(np.float32)
    return features, (np.arange(N) % K).astype(np.int32)


def test_init_memory_keeps_centroids_of_empty_clusters():
    memory = ODCMemory(N, D, 0.5, K, 1, rngs=nnx.Rngs(0))
    features, labels = start()
    labels[labels == 4] = 5
    given = np.full((K, D), 7, np.float32)
    memory.init_memory(features, labels, given)
    assert (np.asarray(memory.centroids[...])[4] == 7).all()
    memory.update_centroids()
    assert (np.asarray(memory.centroids[...])[4] == 7).all()
    np.testing.assert_allclose(memory.centroids[...][5], unit(features)[labels == 5].mean(axis=0), atol=1e-6)
    memory.deal_with_small_clusters()
    assert np.bincount(memory.label_bank[...], minlength=K).min() >= 1


def test_halves():
    """Two groups are told apart; what is all the same is cut in two; others stay out."""
    x = np.concatenate([np.eye(D)[[0] * 30 + [1] * 10], np.eye(D)[[2] * 20]]).astype(np.float32)
    member = np.arange(60) < 40
    second = np.asarray(halve(jnp.asarray(x), jnp.asarray(member)))
    assert second.sum() in (10, 30) and not second[40:].any() and len(set(second[:30])) == len(set(second[30:40])) == 1
    assert np.asarray(halve(jnp.ones((60, D)), jnp.asarray(member))).sum() == 20


def test_neck_by_hand():
    neck = ODCNeck(16, 12, 8, rngs=nnx.Rngs(0))
    assert isinstance(neck.bn0, BatchNorm) and neck.bn0.scale is None and neck.bn0.momentum == 0.001
    x = np.random.default_rng(0).normal(size=(64, 2, 2, 16)).astype(np.float32)
    y = x.mean(axis=(1, 2)) @ np.asarray(neck.fc0.kernel[...]) + np.asarray(neck.fc0.bias[...])
    y = np.maximum((y - y.mean(axis=0)) / np.sqrt(y.var(axis=0) + 1e-5), 0)
    fc1 = lambda y: np.maximum(y @ np.asarray(neck.fc1.kernel[...]) + np.asarray(neck.fc1.bias[...]), 0)  # noqa: E731
    neck.dropout.deterministic = True
    np.testing.assert_allclose(neck((x,))[0], fc1(y), atol=1e-5)
    neck.train()
    dropped = np.asarray(neck((x,), rngs=nnx.Rngs(0))[0])
    assert np.abs(dropped - fc1(y)).max() > 0.1
    with pytest.raises(ValueError, match="rngs"):
        neck((x,))


def test_loss_learns_from_the_old_clusters_and_updates_the_memory():
    method = make(SMALL)
    rng = np.random.default_rng(0)
    labels = rng.integers(0, CLUSTERS, SAMPLES).astype(np.int32)
    method.regroup(rng.normal(size=(SAMPLES, 8)).astype(np.float32), epoch=0, key=jax.random.key(0))
    method.memory_bank.label_bank.set_value(jnp.asarray(labels))
    method.weigh(np.bincount(labels))
    images, index = rng.normal(size=(16, 8, 8, 3)).astype(np.float32), rng.permutation(SAMPLES)[:16]
    x = method.neck(method.backbone(images), rngs=nnx.Rngs(3))[0]  # the same dropout
    value, metrics = method.loss(dict(image=images, index=jnp.asarray(index)), rngs=nnx.Rngs(3))
    logits = np.asarray(method.head(x), np.float64)
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    weight = np.bincount(labels)[labels[index]] ** -0.5
    wanted = -(weight * log_p[np.arange(16), labels[index]]).sum() / weight.sum()
    assert float(value) == pytest.approx(wanted, rel=1e-5)
    memory = method.memory_bank
    new = (np.asarray(memory.feature_bank[...])[index] @ np.asarray(memory.centroids[...]).T).argmax(axis=1)
    np.testing.assert_array_equal(memory.label_bank[...][index], new)
    assert float(metrics["change_ratio"]) == pytest.approx(np.mean(new != labels[index]))
    before = np.asarray(memory.centroids[...])
    for step in (1, 2):  # the interval is 2
        method.after_step(Progress(jnp.int32(step), 10))
        moved = np.abs(np.asarray(memory.centroids[...]) - before).max() > 1e-4
        assert moved == (step == 2)
    sizes = np.bincount(memory.label_bank[...], minlength=CLUSTERS)
    np.testing.assert_allclose(method.loss_weight[...], sizes**-0.5 / (sizes**-0.5).sum(), rtol=1e-5)


def test_regroup_fills_the_memories():
    method = make(SMALL)
    features = np.random.default_rng(0).normal(size=(SAMPLES, 8)).astype(np.float32)
    logged = method.regroup(features, epoch=0, key=jax.random.key(0))
    np.testing.assert_allclose(method.memory_bank.feature_bank[...], unit(features), atol=1e-6)
    labels = np.asarray(method.memory_bank.label_bank[...])
    for cluster in range(CLUSTERS):
        wanted = unit(features)[labels == cluster].mean(axis=0)
        np.testing.assert_allclose(method.memory_bank.centroids[...][cluster], wanted, atol=1e-6)
    assert logged["largest"] == np.bincount(labels).max()
    assert [method.regroups(epoch) for epoch in range(3)] == [True, False, False]


def test_names_are_mmselfsups():
    names = mmpretrain.to_state_dict(make(SMALL)).keys()
    assert {"memory_bank.centroids", "loss_weight", "neck.bn0.running_mean", "neck.fc1.bias"} <= names
    assert not {"memory_bank.feature_bank", "memory_bank.label_bank"} & names


def test_errors():
    memory = SMALL["memory_bank"]
    with pytest.raises(ConfigError, match="length=64 images do not make num_classes=4 clusters of min_cluster=20"):
        build(SMALL | dict(memory_bank=memory | dict(min_cluster=20)), rngs=nnx.Rngs(0))
    with pytest.raises(ConfigError, match="memory_bank.num_classes=5, but head.num_classes=4"):
        build(SMALL | dict(memory_bank=memory | dict(num_classes=5)), rngs=nnx.Rngs(0))
    with pytest.raises(ConfigError, match="at least 1"):
        build(SMALL | dict(centroids_update_interval=0), rngs=nnx.Rngs(0))
