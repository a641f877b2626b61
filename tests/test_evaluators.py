"""Evaluators on a context of their own: a linear map or raw pixels as features, scikit-learn as the reference."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from jaxpretrain.build import ConfigError, build
from jaxpretrain.evaluators import EvalContext, extract, run_all
from jaxpretrain.evaluators.base import completed_steps, gather, one_behind

MEAN, STD = np.float32([10, 20, 30]), np.float32([50, 60, 70])


def make_loader(splits, batch_size, sharding=None, passes=None):
    """Batches of static shape from {split: (images, labels)}, in a fixed shuffled order; the last one is filled up."""

    def loader(split):
        if passes is not None:
            passes.append(split)
        images, labels = splits[split]
        order = np.random.default_rng(1).permutation(len(labels))
        for start in range(0, len(labels), batch_size):
            rows = np.resize(order[start : start + batch_size], batch_size)
            valid = np.arange(batch_size) < len(labels) - start
            batch = dict(image=images[rows], label=labels[rows].astype(np.int32), index=rows.astype(np.int32), valid=valid)
            yield jax.device_put(batch, sharding)

    return loader


def make_context(splits, *, batch_size=64, num_classes=10, workdir=None, seed=0, sharding=None, passes=None, method=None):
    """A context whose features are normalised pixels times state['scale'], and whose logits are those features."""

    def preprocess(batch):
        return {**batch, "image": (batch["image"].astype(jnp.float32) - MEAN) / STD}

    @jax.jit
    def features(state, batch):
        return preprocess(batch)["image"].reshape(len(batch["image"]), -1) * state["scale"]

    return EvalContext(
        features=features,
        logits=features,
        loader=make_loader(splits, batch_size, sharding, passes),
        num_classes=num_classes,
        method=method or (lambda state: None),
        workdir=workdir,
        seed=seed,
        preprocess=preprocess,
    )


@pytest.fixture(scope="module")
def digits():
    """{split: (uint8 [N, 8, 8, 3], labels)}: 1,437 to learn from, 360 to score."""
    data = load_digits()
    images = np.repeat((data.images * 15).astype(np.uint8)[..., None], 3, axis=-1)
    order = np.random.default_rng(0).permutation(len(images))
    train, val = order[:1437], order[1437:]
    return {"train": (images[train], data.target[train]), "val": (images[val], data.target[val])}


@pytest.fixture
def state():
    return {"scale": jnp.ones(()), "step": jnp.asarray(7)}


def flat(split):
    images, labels = split
    return ((images.astype(np.float32) - MEAN) / STD).reshape(len(labels), -1), labels


# ------------------------------------------------------------------------------------------------ extract


def test_extract_gives_every_valid_row_once_in_order_of_index(digits, state):
    features, labels = extract(make_context(digits), state, "val")
    expected, expected_labels = flat(digits["val"])
    np.testing.assert_array_equal(labels, expected_labels)
    np.testing.assert_allclose(features, expected, rtol=1e-6)


def test_extract_does_not_depend_on_batches_or_devices(digits, state):
    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    one = extract(make_context(digits, batch_size=50), state, "val")
    many = extract(make_context(digits, batch_size=64, sharding=NamedSharding(mesh, P("data"))), state, "val")
    for a, b in zip(one, many, strict=True):
        np.testing.assert_array_equal(a, b)


def test_one_pass_per_state_is_shared_and_then_dropped(digits, state):
    passes: list[str] = []
    context = make_context(digits, passes=passes)
    evaluators = {
        "knn": build(dict(type="KNN", k=5), context=context),
        "linear": build(dict(type="LinearProbe", epochs=1), context=context),
    }
    scores = run_all(evaluators, state)
    assert passes == ["train", "val"]
    assert set(scores) == {"knn/top1", "knn/top5", "linear/top1", "linear/top5", "linear/lr"}
    assert all(type(value) is float for value in scores.values())
    run_all(evaluators, state)
    assert len(passes) == 4  # nothing is kept between rounds, as the same buffers may come back with other contents
    extract(context, state, "val")
    extract(context, dict(state), "val")  # another dict, the same arrays
    assert len(passes) == 5
    features, _ = extract(context, dict(state, scale=jnp.full((), 2.0)), "val")
    assert len(passes) == 6
    np.testing.assert_allclose(features, 2 * flat(digits["val"])[0], rtol=1e-6)


def test_one_behind_starts_the_next_before_it_hands_out_the_last():
    started = []
    seen = [(x, len(started)) for x in one_behind(started.append(i) or i for i in range(3))]
    assert seen == [(0, 2), (1, 3), (2, 3)]
    assert list(one_behind([])) == []


def test_extract_refuses_unlabelled_empty_and_broken_data(digits, state):
    images, labels = digits["val"]
    with pytest.raises(ConfigError, match="val split has images without labels"):
        extract(make_context({"val": (images, labels - 1)}), state, "val")
    with pytest.raises(ConfigError, match="without labels"):
        extract(make_context(digits, num_classes=None), state, "val")
    with pytest.raises(ConfigError, match="has label 9, but the data set has 5 classes"):
        extract(make_context(digits, num_classes=5), state, "val")
    with pytest.raises(ConfigError, match="config.data.val.dataset"):
        extract(make_context({"val": (images[:0], labels[:0])}), state, "val")
    with pytest.raises(FloatingPointError, match="val split are not finite"):
        extract(make_context(digits), dict(state, scale=jnp.full((), jnp.nan)), "val")


def test_evaluators_make_no_hidden_transfers(digits, state):
    context = make_context(digits)
    evaluators = {
        name: build(dict(type=kind, **options), context=context)
        for name, kind, options in (
            ("knn", "KNN", {}),
            ("linear", "LinearProbe", dict(epochs=1)),
            ("accuracy", "Accuracy", {}),
        )
    }
    context.num_classes = 192  # the raw logits of this context
    with jax.transfer_guard("disallow"):
        assert len(run_all(evaluators, state)) == 7


def test_completed_steps():
    assert completed_steps({"step": jnp.asarray(3)}) == 3
    assert completed_steps(type("State", (), {"step": 4})()) == 4


# ------------------------------------------------------------------------------------------------ accuracy


def test_accuracy_counts_valid_rows_by_rank(state):
    rng = np.random.default_rng(0)
    images = rng.permuted(np.tile(np.arange(12, dtype=np.uint8) * 20, (70, 1)), axis=1).reshape(70, 2, 2, 3)
    labels = rng.integers(0, 12, 70)
    context = make_context({"val": (images, labels)}, batch_size=16, num_classes=12)
    logits = flat((images, labels))[0]
    rank = (logits > logits[np.arange(70), labels][:, None]).sum(1)
    scores = build(dict(type="Accuracy", topk=[1, 3, 50]), context=context).run(state)
    assert scores == pytest.approx({"top1": 100 * (rank < 1).mean(), "top3": 100 * (rank < 3).mean(), "top50": 100.0})
    assert 0 < scores["top1"] < scores["top3"] < 100
    sharded = NamedSharding(jax.make_mesh((jax.device_count(),), ("data",)), P("data"))
    context.loader = make_loader({"val": (images, labels)}, 16, sharded)
    assert build(dict(type="Accuracy", topk=(1, 3, 50)), context=context).run(state) == scores


def test_accuracy_leaves_out_unlabelled_images_and_needs_some(state):
    images, labels = np.zeros((4, 2, 2, 3), np.uint8), np.array([0, -1, 5, -1])
    context = make_context({"val": (images, labels)}, batch_size=4, num_classes=12)
    context.logits = jax.jit(lambda state, batch: jnp.zeros((4, 12)))  # ties: class 0 first
    assert build(dict(type="Accuracy", topk=1), context=context).run(state) == {"top1": 50.0}
    context.loader = make_loader({"val": (images, labels * 0 - 1)}, 4)
    with pytest.raises(ConfigError, match="no labelled images"):
        build(dict(type="Accuracy"), context=context).run(state)


# ------------------------------------------------------------------------------------------------ kNN


@pytest.mark.parametrize("k, temperature", [(1, 0.07), (20, 0.07), (50, 1.0)])
def test_knn_equals_scikit_learn(digits, state, k, temperature):
    evaluator = build(dict(type="KNN", k=k, temperature=temperature, chunk=100), context=make_context(digits))
    scores = evaluator.run(state)
    reference = KNeighborsClassifier(k, weights=lambda d: np.exp((1 - d) / temperature), metric="cosine")
    (x, y), (qx, qy) = flat(digits["train"]), flat(digits["val"])
    reference.fit(x, y)
    assert scores["top1"] == pytest.approx(100 * reference.score(qx, qy), abs=0.3)  # one image of 360, for near ties
    top5 = np.argsort(-reference.predict_proba(qx), axis=1, kind="stable")[:, :5]
    assert scores["top5"] == pytest.approx(100 * (top5 == qy[:, None]).any(1).mean(), abs=0.3)
    assert scores["top1"] > 90


def test_knn_weights_votes_by_temperature(state):
    # Two neighbours of class 1 at cosine 0.8, one of class 0 at cosine 1: the warm vote follows the majority.
    angle = np.arccos(0.8)
    bank = np.array([[1, 0], [np.cos(angle), np.sin(angle)], [np.cos(angle), -np.sin(angle)]], np.float32)
    splits = {"train": (np.zeros((3, 1, 1, 3), np.uint8), np.array([0, 1, 1])), "val": (np.zeros((1, 1, 1, 3), np.uint8), [0])}
    splits["val"] = (splits["val"][0], np.array([0]))
    context = make_context(splits, batch_size=3, num_classes=2)
    context.features = jax.jit(lambda state, batch: jnp.asarray(bank)[batch["index"]])
    assert build(dict(type="KNN", k=3, temperature=0.07), context=context).run(state)["top1"] == 100
    assert build(dict(type="KNN", k=3, temperature=10.0), context=context).run(state)["top1"] == 0
    # At a temperature at which exp(1 / T) overflows float32, and with k far above the size of the bank:
    assert build(dict(type="KNN", k=200, temperature=0.005), context=context).run(state)["top1"] == 100


def test_knn_with_several_k_agrees_with_one_at_a_time(digits, state):
    context = make_context(digits)
    several = build(dict(type="KNN", k=[10, 20, 10_000]), context=context).run(state)
    assert list(several) == [f"k{k}_top{n}" for k in (10, 20, 10_000) for n in (1, 5)]
    for k in (10, 20, 10_000):
        alone = build(dict(type="KNN", k=k, chunk=1000), context=context).run(state)
        assert alone == {"top1": several[f"k{k}_top1"], "top5": several[f"k{k}_top5"]}


# ------------------------------------------------------------------------------------------------ linear probe


def test_linear_probe_is_as_good_as_scikit_learn(digits, state):
    scores = build(dict(type="LinearProbe"), context=make_context(digits)).run(state)
    (x, y), (qx, qy) = flat(digits["train"]), flat(digits["val"])
    scaler = StandardScaler().fit(x)
    reference = 100 * LogisticRegression(max_iter=500).fit(scaler.transform(x), y).score(scaler.transform(qx), qy)
    assert reference > 94
    assert scores["top1"] == pytest.approx(reference, abs=1.5)
    assert scores["top5"] > 99


def test_linear_probe_is_deterministic_by_seed(digits, state):
    probe = dict(type="LinearProbe", epochs=2)
    runs = [build(probe, context=make_context(digits, seed=seed, batch_size=b)).run(state) for seed, b in ((0, 64), (0, 50), (1, 64))]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_linear_probe_chooses_without_looking_at_val(digits, state):
    # Labels of val are moved by one: whoever chose on val would choose another rate, and find some accuracy by it.
    images, labels = digits["val"]
    options = dict(type="LinearProbe", lrs=[1e-6, 0.1, 1e4], weight_decays=[0.0, 1e-4], epochs=5)
    plain = build(options, context=make_context(digits)).run(state)
    moved = build(options, context=make_context({**digits, "val": (images, (labels + 1) % 10)})).run(state)
    assert plain["lr"] == moved["lr"] == pytest.approx(0.1)
    assert plain["weight_decay"] == moved["weight_decay"]
    assert plain["top1"] > 90 > 10 > moved["top1"]


def test_linear_probe_standardises(digits, state):
    probe = dict(type="LinearProbe", epochs=3)
    plain = build(probe, context=make_context(digits)).run(state)
    scaled = build(probe, context=make_context(digits)).run(dict(state, scale=jnp.full((), 1024.0)))
    assert scaled["top1"] == pytest.approx(plain["top1"], abs=0.6)


def test_linear_probe_survives_tiny_splits(state):
    images = np.arange(3 * 12, dtype=np.uint8).reshape(3, 2, 2, 3)
    context = make_context({"train": (images, np.array([0, 1, 1])), "val": (images, np.array([0, 1, 1]))}, batch_size=4)
    assert set(build(dict(type="LinearProbe", epochs=2), context=context).run(state)) == {"top1", "top5", "lr"}
    context = make_context({"train": (images[:1], np.array([0])), "val": (images, np.array([0, 1, 1]))}, batch_size=4)
    with pytest.raises(ConfigError, match="at least two training images"):
        build(dict(type="LinearProbe"), context=context).run(state)


# ------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(type="KNN", k=0), "KNN.k is 0; it must be a whole number from 1 up"),
        (dict(type="KNN", k=[]), r"KNN.k is \[\]"),
        (dict(type="KNN", temperature=0), "KNN.temperature is 0; it must be positive"),
        (dict(type="KNN", temperatur=0.1), "no argument 'temperatur'. Did you mean 'temperature'"),
        (dict(type="LinearProbe", lrs=()), "LinearProbe.lrs"),
        (dict(type="LinearProbe", lrs=[0.1, -1]), "positive learning rates"),
        (dict(type="LinearProbe", weight_decays=[-1]), "LinearProbe.weight_decays"),
        (dict(type="LinearProbe", epochs=0), "LinearProbe.epochs"),
        (dict(type="Accuracy", topk=[1, 2.5]), "Accuracy.topk"),
    ],
)
def test_mistakes_are_named(digits, options, message):
    with pytest.raises(ConfigError, match=message):
        build(options, context=make_context(digits))


def test_accuracy_needs_logits(digits):
    context = make_context(digits)
    context.logits = None
    with pytest.raises(ConfigError, match="needs a method with logits.*KNN"):
        build(dict(type="Accuracy"), context=context)
