"""DeepCluster: Sobel, weights and labels of the loss, clustering between epochs, and the order of images that follows."""

from __future__ import annotations

import itertools
import math
import pickle
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.signal import correlate2d

from jaxpretrain import sharding
from jaxpretrain.build import ConfigError, abstract, build
from jaxpretrain.checkpoint import load_params
from jaxpretrain.config import load_config
from jaxpretrain.data.chunks import TrainPlan
from jaxpretrain.data.host_transforms import build_pipeline
from jaxpretrain.data.pipeline import TrainLoader
from jaxpretrain.data.prefetch import device_prefetch
from jaxpretrain.data.samplers import ReplacementOrder, UniformOrder, permutation
from jaxpretrain.interop import mmpretrain
from jaxpretrain.methods.deepcluster import Sobel
from jaxpretrain.methods.kmeans import normalized_mutual_info
from jaxpretrain.models.layers import Frozen
from jaxpretrain.trainer import Trainer, train
from tests.method_cases.base import CE, make
from tests.method_cases.clustering import CLUSTERS, DEEPCLUSTER, ODC, SAMPLES, SOBEL, TINY
from tests.tiny import losses, records, tiny_config

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def few_devices(monkeypatch):
    """Meshes are made of the first devices."""
    real = sharding.make_mesh

    def smallest(mesh, devices=None):
        sizes = [mesh.get(axis, 1) for axis in sharding.AXES]
        return real(mesh, jax.devices()[: math.prod(sizes)])

    monkeypatch.setattr("jaxpretrain.trainer.make_mesh", smallest)


# The network


def test_sobel_by_hand():
    image = RNG.normal(size=(6, 7, 3)).astype(np.float32)
    edges = Sobel(rngs=nnx.Rngs(0))(image[None])[0]
    grey = image.mean(axis=-1)
    filters = np.asarray([[1, 0, -1], [2, 0, -2], [1, 0, -1]])
    for channel, weights in enumerate((filters, filters.T)):
        wanted = correlate2d(grey, weights, mode="same")
        np.testing.assert_allclose(edges[..., channel], wanted, atol=1e-5 * np.abs(wanted).max())


def test_sobel_never_learns_and_is_never_drawn():
    backbone = make(SOBEL)  # initialised by a rule for all Conv2d
    assert (backbone.sobel_layer.sobel[0].kernel[...] == np.float32(1 / 3)).all()
    assert not nnx.state(backbone.sobel_layer, nnx.Param).flat_state()
    assert len(nnx.state(backbone.sobel_layer, Frozen).flat_state()) == 4
    assert backbone.conv1.kernel.shape == (7, 7, 2, 8)
    assert backbone(jnp.zeros((1, 16, 16, 3)))[0].shape == (1, 2, 2, 16)
    with pytest.raises(ConfigError, match="ResNetSobel"):
        build(SOBEL | dict(widths=3))


def test_with_sobel_is_the_same_network():
    inside = make(DEEPCLUSTER)
    plain = SOBEL | dict(type="ResNet", in_channels=2)
    outside = make(DEEPCLUSTER | dict(backbone=plain, with_sobel=True))
    images = RNG.normal(size=(2, 16, 16, 3)).astype(np.float32)
    nnx.update(outside.backbone, nnx.state(inside.backbone, lambda path, _: path[0] != "sobel_layer"))
    inside.eval(), outside.eval()
    np.testing.assert_allclose(outside.features(images), inside.features(images), rtol=1e-6)


def test_names_are_mmselfsups():
    """Buffers and layers by their names there; what MMSelfSup keeps outside of the state dict is not exported."""
    state = mmpretrain.to_state_dict(make(DEEPCLUSTER))
    assert {"loss_weight", "backbone.sobel_layer.sobel.0.weight", "backbone.sobel_layer.sobel.1.bias"} <= state.keys()
    assert not {"labels", "sizes"} & state.keys()
    assert state["backbone.sobel_layer.sobel.1.weight"].shape == (2, 1, 3, 3)


# The loss


@pytest.mark.parametrize("power", [None, 0.5])
def test_loss_by_hand(power):
    """Cross entropy of the clusters, each weighted by n^-power, divided by the sum of weights."""
    method = make(DEEPCLUSTER | dict(backbone=TINY, reweight=power is not None, reweight_pow=power or 0.5))
    labels = RNG.choice(CLUSTERS, SAMPLES, p=[0.6, 0.2, 0.1, 0.1]).astype(np.int32)
    sizes = np.bincount(labels, minlength=CLUSTERS)
    method.labels.set_value(jnp.asarray(labels))
    method.sizes.set_value(jnp.asarray(sizes))
    method.weigh(sizes)
    index = RNG.permutation(SAMPLES)[:16]
    images = RNG.normal(size=(16, 8, 8, 3)).astype(np.float32)
    x = np.asarray(method.neck(method.backbone(images))[-1], np.float64)
    logits = x @ np.asarray(method.head.fc.kernel[...], np.float64) + np.asarray(method.head.fc.bias[...])
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    weight = sizes[labels[index]] ** -(power or 0.0)
    wanted = -(weight * log_p[np.arange(16), labels[index]]).sum() / weight.sum()
    value, metrics = method.loss(dict(image=images, index=jnp.asarray(index)))
    assert float(value) == pytest.approx(wanted, rel=1e-5)
    share = sizes / SAMPLES
    assert float(metrics["assignment_entropy"]) == pytest.approx(-(share * np.log(share)).sum() / np.log(4), rel=1e-5)
    assert metrics.keys() == {"assignment_entropy", "feature_std"}
    wrong = method.loss(dict(image=images, index=jnp.asarray(index) + SAMPLES))[0]
    assert np.isnan(float(wrong))  # the trainer stops at NaN


# Clustering


def test_regroup():
    method = make(DEEPCLUSTER | dict(backbone=TINY, reweight=True))
    blobs = np.repeat(np.eye(16, dtype=np.float32)[:CLUSTERS] * 5, [34, 10, 10, 10], axis=0)
    features = blobs + 0.01 * RNG.normal(size=(SAMPLES, 16)).astype(np.float32)
    before, key = np.asarray(method.head.fc.kernel[...]), jax.random.key(0)
    method.clustering.pca_dim = 3
    first = method.regroup(features, epoch=0, key=key)
    labels = np.asarray(method.labels[...])
    assert "nmi" not in first and first["smallest"] == 10 and first["largest"] == 34 and first["empty"] == 0
    truth = np.repeat(np.arange(CLUSTERS), [34, 10, 10, 10])
    assert normalized_mutual_info(labels, truth) == pytest.approx(1)
    np.testing.assert_array_equal(method.sizes[...], np.bincount(labels))
    weight = np.bincount(labels) ** -0.5
    np.testing.assert_allclose(method.loss_weight[...], weight / weight.sum(), rtol=1e-6)
    assert (np.asarray(method.head.fc.kernel[...]) != before).all()  # starts anew
    again = method.regroup(features, epoch=1, key=jax.random.key(1))
    assert again["nmi"] == pytest.approx(1)
    assert [method.regroups(epoch) for epoch in range(3)] == [True] * 3
    assert [abstract(DEEPCLUSTER | dict(interval=2)).regroups(epoch) for epoch in range(3)] == [True, False, True]


def test_errors():
    with pytest.raises(ConfigError, match="clustering.k=5, but head.num_classes=4"):
        build(DEEPCLUSTER | dict(clustering=dict(type="Kmeans", k=5)), rngs=nnx.Rngs(0))
    with pytest.raises(ConfigError, match="needs a classification head"):
        build(DEEPCLUSTER | dict(head=dict(type="ClsHead")), rngs=nnx.Rngs(0))
    with pytest.raises(ConfigError, match="interval=0"):
        build(DEEPCLUSTER | dict(interval=0), rngs=nnx.Rngs(0))


# The order of images


def test_clusters_are_drawn_evenly():
    """Whatever their size: clusters of 1 to 4000 images come equally often, images of one cluster too."""
    sizes = np.asarray([1, 10, 100, 989, 4000])
    labels = RNG.permutation(np.repeat([0, 2, 3, 5, 9], sizes)).astype(np.int32)  # some clusters are empty
    order = UniformOrder(labels)
    epochs = [order(0, epoch, len(labels)) for epoch in range(20)]
    for indices in epochs:
        assert indices.shape == labels.shape
        drawn = np.bincount(labels[indices])[[0, 2, 3, 5, 9]]
        assert abs(drawn - 1020).max() <= 5  # ceil(5100 / 5), less what does not fill the epoch
        large = indices[labels[indices] == 9]
        assert len(set(large)) == len(large)  # large clusters do without repetition
    times = np.bincount(np.concatenate(epochs), minlength=len(labels))
    for label, size in zip([0, 2, 3, 5, 9], sizes, strict=True):
        mean = 20 * 1020 / size
        assert abs(times[labels == label] / mean - 1).max() < 6 / mean**0.5
    first_half = np.bincount(labels[epochs[0][:2550]])[[0, 2, 3, 5, 9]]
    assert abs(first_half - 510).max() < 100  # shuffled


@pytest.mark.parametrize("order", [permutation, ReplacementOrder(), UniformOrder(np.arange(50, dtype=np.int32) % 7)])
def test_orders_are_pure(order):
    first = order(3, 1, 50)
    np.testing.assert_array_equal(first, pickle.loads(pickle.dumps(order))(3, 1, 50))
    assert first.shape == (50,) and first.min() >= 0 and first.max() < 50
    assert (first != order(3, 2, 50)).any() and (first != order(4, 1, 50)).any()
    plan = TrainPlan(length=50, seed=3, batch_size=8, local=4, process_index=1, chunk=2, order=order)
    rows = plan(2 * (6 + 2) + 1)  # second epoch, third batch, second chunk of two
    assert [place[:3] for place in rows] == [(2, 1, first[2 * 8 + 4 + 2]), (3, 1, first[2 * 8 + 4 + 3])]


def split_cfg() -> dict[str, Any]:
    return dict(dataset=dict(type="Digits", split="train"), pipeline=[dict(type="Resize", scale=(8, 8))])


def test_the_loader_changes_its_order():
    """In the middle of an epoch, under a prefetching thread; and hosts see parts of the same batches."""
    order = UniformOrder(RNG.integers(0, 3, 1500, dtype=np.int32))
    loader = TrainLoader(split_cfg(), batch_size=100, seed=5)
    batches = device_prefetch(loader, jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    before = [np.asarray(next(batches)["index"]) for _ in range(3)]
    with batches.interrupted():
        loader.set_order(order, 3)
    after = [np.asarray(next(batches)["index"]) for _ in range(14)]
    batches.close()
    np.testing.assert_array_equal(np.concatenate(before), permutation(5, 0, 1500)[:300])
    np.testing.assert_array_equal(np.concatenate(after[:12]), order(5, 0, 1500)[300:])
    np.testing.assert_array_equal(np.concatenate(after[12:]), order(5, 1, 1500)[:200])
    hosts = [TrainLoader(split_cfg(), batch_size=100, seed=5, process_index=i, process_count=2) for i in range(2)]
    for host in hosts:
        host.set_order(order, 3)
    np.testing.assert_array_equal(np.concatenate([next(host)["index"] for host in hosts]), after[0])
    for one in (loader, *hosts):
        one.close()


# Whole runs

HEAD = dict(type="LinearClsHead", num_classes=30, in_channels=16, loss=CE)


def config(kind: str, **fields: Any) -> Any:
    if kind == "odc":
        memory = ODC["memory_bank"] | dict(length=1500, min_cluster=5)
        method = ODC | dict(backbone=TINY, head=HEAD | dict(in_channels=8), memory_bank=memory)
    else:
        method = DEEPCLUSTER | dict(backbone=TINY, head=HEAD, num_samples=1500)
    defaults = dict(batch_size=72, max_steps=40, optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.05, momentum=0.9)))
    return tiny_config(method=method, **{**defaults, **fields})  # 20 steps in an epoch


def labels_of(state: dict[str, Any], kind: str) -> np.ndarray:
    part = state["model_state"]
    return np.asarray(part["memory_bank"]["label_bank"] if kind == "odc" else part["labels"])


@pytest.mark.parametrize("kind", ["deepcluster", "odc"])
def test_runs_on_one_and_eight_devices(tmp_path, kind):
    fields = dict(checkpoint=dict(interval=20, by_epoch=False, max_to_keep=3))
    for count in (1, 8):
        train(config(kind, mesh=dict(data=max(1, count // 2), fsdp=min(2, count)), **fields), tmp_path / str(count))
    one, eight = (losses(tmp_path / str(count)) for count in (1, 8))
    assert [step for step, _ in one] == list(range(1, 41))
    # Of 1500 images, some lie between two clusters, and rounding decides.
    np.testing.assert_allclose([loss for _, loss in one], [loss for _, loss in eight], rtol=0.02)
    grouped = records(tmp_path / "1", "clusters")
    assert [record["step"] for record in grouped] == ([1, 21] if kind == "deepcluster" else [1])
    if kind == "deepcluster":
        assert "nmi" not in grouped[0] and 0.2 < grouped[1]["nmi"] < 1
        assert one[19][1] < one[0][1] - 0.1 and one[39][1] < one[20][1] - 0.1  # in each of the epochs
    last = records(tmp_path / "1")[-1]
    assert last["assignment_entropy"] > 0.5 and last["feature_std"] > 0.1
    state = load_params(tmp_path / "1").state
    sizes = np.bincount(labels_of(state, kind), minlength=30)
    assert sizes.sum() == 1500 and sizes.min() >= (5 if kind == "odc" else 0)


def clusterings(workdir: Path) -> list[list[float]]:
    return [[r.get(name) for name in ("step", "nmi", "inertia", "smallest")] for r in records(workdir, "clusters")]


@pytest.mark.parametrize("kind", ["deepcluster", "odc"])
def test_going_on_is_exact(tmp_path, kind):
    """From the middle of the first epoch, from its end (where the clusters of the next are not made yet), from the next."""
    fields = config(kind, checkpoint=dict(interval=10, by_epoch=False, max_to_keep=9))
    train(fields, tmp_path / "whole")
    wanted = {step: load_params(tmp_path / "whole", step).state for step in (30, 40)}
    for start in (10, 20, 30):
        workdir = tmp_path / str(start)
        shutil.copytree(tmp_path / "whole", workdir)
        for later in range(start + 10, 41, 10):
            shutil.rmtree(workdir / "checkpoints" / str(later))
        train(fields, workdir)
        found = load_params(workdir, 40).state
        jax.tree.map(np.testing.assert_array_equal, found, wanted[40])
        assert losses(workdir) == losses(tmp_path / "whole")
        assert clusterings(workdir) == clusterings(tmp_path / "whole")
    if kind == "deepcluster":
        before = load_params(tmp_path / "whole", 20).state
        assert (labels_of(before, kind) != labels_of(wanted[30], kind)).any()


def test_batches_follow_the_clusters(tmp_path, monkeypatch):
    """The images that the step gets are those that the labels in the state say."""
    seen: list[np.ndarray] = []
    compile_step = Trainer.compile

    def spy(self, state, batch, phase):
        compiled = compile_step(self, state, batch, phase)

        def step(state, batch):
            seen.append(np.asarray(jax.device_get(batch["index"])))
            return compiled(state, batch)

        return step

    monkeypatch.setattr(Trainer, "compile", spy)
    train(config("deepcluster", checkpoint=dict(interval=20, by_epoch=False, max_to_keep=9)), tmp_path)
    for epoch, step in itertools.product(range(2), [0, 19]):
        labels = labels_of(load_params(tmp_path, 20 * (epoch + 1)).state, "deepcluster")
        wanted = UniformOrder(labels)(0, epoch, 1500)[72 * step : 72 * (step + 1)]
        np.testing.assert_array_equal(seen[20 * epoch + step], wanted)


def test_a_memory_that_does_not_fit_the_data():
    for kind, fix in (("deepcluster", "num_samples"), ("odc", "memory_bank.length")):
        wrong = config(kind)
        if kind == "odc":
            wrong.method.memory_bank.length = 1400
        else:
            wrong.method.num_samples = 1400
        with pytest.raises(ConfigError, match=f"memory of 1400 images.*{fix}.*has 1500"):
            Trainer(wrong, Path("unused"))


# Recipes


@pytest.mark.parametrize(
    ("name", "method", "lr", "epochs", "gamma"),
    [("deepcluster", "DeepCluster", 0.1, 200, 0.1), ("odc", "ODC", 0.06, 440, 0.4)],
)
def test_recipes_are_mmselfsups(name, method, lr, epochs, gamma):
    """Against its configuration files, version 1.0."""
    recipe = load_config(f"configs/{name}.py")
    assert recipe.method.type == method and recipe.method.head.num_classes == recipe.method.clustering.k == 10000
    assert (recipe.batch_size, recipe.max_epochs) == (512, epochs)
    assert recipe.optim_wrapper.optimizer.to_dict() == dict(type="SGD", lr=lr, momentum=0.9, weight_decay=1e-5)
    assert recipe.optim_wrapper.paramwise_cfg.custom_keys.to_dict() == {"head": dict(momentum=0.0)}
    assert [s["gamma"] for s in recipe.param_scheduler] == [gamma]
    images = recipe.method.num_samples if name == "deepcluster" else recipe.method.memory_bank.length
    assert images == 1281167
    assert [step["type"] for step in recipe.data.train.pipeline] == ["RandomResizedCrop", "RandomRotation"]
    small = abstract(load_config(f"configs/{name}.py:digits").method.to_dict())
    assert small.num_samples == 1500 and small.num_classes == 30
    whole = abstract(recipe.method.to_dict())
    assert whole.head.fc.kernel.shape == ((2048, 10000) if name == "deepcluster" else (256, 10000))


def test_rotation():
    image = RNG.integers(0, 256, (9, 9, 3), np.uint8)
    turn = lambda degrees: build_pipeline([dict(type="RandomRotation", degrees=degrees)])  # noqa: E731
    rng = np.random.default_rng(0)
    np.testing.assert_array_equal(turn((90, 90))(dict(image=image), rng)["image"], np.rot90(image))
    np.testing.assert_array_equal(turn(0)(dict(image=(image, image)), rng)["image"][1], image)
    turned = [turn(45)(dict(image=np.full((9, 9, 3), 255, np.uint8)), rng)["image"] for _ in range(20)]
    assert len({one.tobytes() for one in turned}) > 3  # and black corners come in
    assert all(one.shape == (9, 9, 3) and (one[4, 4] == 255).all() for one in turned)
    assert min(one[0, 0, 0] for one in turned) == 0
    with pytest.raises(ConfigError, match="number from 0 up"):
        turn((2, 1))
