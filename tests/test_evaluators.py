"""Evaluators on a context of their own: a linear map or raw pixels as features, scikit-learn as the reference."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from jaxpretrain.build import ConfigError, abstract, build
from jaxpretrain.evaluators import EvalContext, extract, run_all
from jaxpretrain.evaluators.base import completed_steps, one_behind
from tests.tiny import xla_flags

MEAN, STD = np.float32([10, 20, 30]), np.float32([50, 60, 70])


def data_mesh():
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


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
            label, index = labels[rows].astype(np.int32), rows.astype(np.int32)
            yield jax.device_put(dict(image=images[rows], label=label, index=index, valid=valid), sharding)

    return loader


def make_context(
    splits, *, batch_size=64, num_classes=10, workdir=None, seed=0, sharding=None, passes=None, method=None
):
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
    mesh = data_mesh()
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
    with pytest.raises(ConfigError, match=r"config\.data\.val\.dataset"):
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
            ("statistics", "FeatureStatistics", {}),
            ("neighbours", "NearestNeighbours", {}),
        )
    }
    context.num_classes = 192  # the raw logits of this context
    with jax.transfer_guard("disallow"):
        assert len(run_all(evaluators, state)) == 12


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
    sharded = NamedSharding(data_mesh(), P("data"))
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
    # Two neighbours of class 0 at cosine 0.8, one of class 1 at cosine 1: the warm vote follows the majority.
    angle = np.arccos(0.8)
    bank = np.array([[1, 0], [np.cos(angle), np.sin(angle)], [np.cos(angle), -np.sin(angle)]], np.float32)
    images = np.zeros((3, 1, 1, 3), np.uint8)
    splits = {"train": (images, np.array([1, 0, 0])), "val": (images[:1], np.array([1]))}
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
    contexts = [make_context(digits, seed=seed, batch_size=size) for seed, size in ((0, 64), (0, 50), (1, 64))]
    runs = [build(probe, context=context).run(state) for context in contexts]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_linear_probe_chooses_without_looking_at_val(digits, state):
    # With the labels of val moved by one, a choice made on val would be another one, and find some accuracy by it.
    images, labels = digits["val"]
    options = dict(type="LinearProbe", lrs=[1e-7, 0.1], epochs=5)
    plain = build(options, context=make_context(digits)).run(state)
    moved = build(options, context=make_context({**digits, "val": (images, (labels + 1) % 10)})).run(state)
    assert plain["lr"] == moved["lr"] == pytest.approx(0.1)
    assert plain["top1"] > 90 > 10 > moved["top1"]


def test_linear_probe_passes_over_runs_that_diverge(digits, state):
    options = dict(type="LinearProbe", lrs=[0.1], weight_decays=[1e4, 0.0], epochs=5)
    scores = build(options, context=make_context(digits)).run(state)
    assert scores["weight_decay"] == 0
    assert scores["top1"] > 90


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


# ------------------------------------------------------------------------------------------------ reconstruction


class Painter:
    """Stands in for MAE: hides the right half, or what a random number says, and paints it 0.5 brighter than it is."""

    def __init__(self, random=False):
        self.random = random

    def reconstruct(self, images, *, rngs):
        half = jnp.arange(images.shape[2])[None, None, :, None] >= images.shape[2] // 2
        if self.random:
            half = jax.random.bernoulli(rngs.params(), shape=(1, 1, images.shape[2], 1))
        mask = jnp.broadcast_to(half, (*images.shape[:3], 1)).astype(images.dtype)
        return dict(masked=images * (1 - mask), pasted=images + 0.5 * mask, mask=mask)


def test_reconstruction_writes_pictures_and_scores_hidden_pixels(digits, state, tmp_path):
    context = make_context(digits, workdir=tmp_path, method=lambda state: Painter())
    with jax.transfer_guard("disallow"):
        scores = build(dict(type="Reconstruction", num_images=3), context=context).run(state)
    assert scores == {"masked_mse": pytest.approx(0.25)}
    picture = np.asarray(Image.open(tmp_path / "pictures" / "reconstruction_7.png"))
    np.testing.assert_array_equal(picture, np.asarray(Image.open(tmp_path / "pictures" / "reconstruction.png")))
    # The last row: 14 px per pixel, the colours of the data, hidden halves in the mean colour, then 0.5 std brighter.
    image = next(iter(context.loader("val")))["image"][2]
    row = picture[-8 - 112 : -8][7::14]
    np.testing.assert_array_equal(row[:, 8:120][:, 7::14], image)
    np.testing.assert_array_equal(row[:, 128:240][:, 7::14][:, 4:], np.broadcast_to(MEAN, (8, 4, 3)))
    brighter = np.asarray(image, np.float32) + 0.5 * STD * (np.arange(8) >= 4)[:, None]
    np.testing.assert_array_equal(row[:, 248:360][:, 7::14], np.clip(brighter, 0, 255))


def test_reconstruction_masks_do_not_change_between_steps(digits, state, tmp_path):
    for step, seed in enumerate((0, 0, 1)):
        context = make_context(digits, workdir=tmp_path, seed=seed, method=lambda state: Painter(random=True))
        build(dict(type="Reconstruction"), context=context).run(dict(state, step=jnp.asarray(step)))
    pictures = [np.asarray(Image.open(path)) for path in sorted(tmp_path.rglob("reconstruction_*.png"))]
    assert len(pictures) == 3
    np.testing.assert_array_equal(pictures[0], pictures[1])
    assert (pictures[0] != pictures[2]).any()


def test_reconstruction_without_workdir_and_with_few_images(digits, state):
    images, labels = digits["val"]
    context = make_context({"val": (images[:2], labels[:2])}, method=lambda state: Painter())
    assert build(dict(type="Reconstruction"), context=context).run(state) == {"masked_mse": pytest.approx(0.25)}


def test_reconstruction_of_mae_depends_on_its_weights(digits, state, tmp_path):
    arch = dict(embed_dims=16, num_layers=1, num_heads=2, feedforward_channels=32)
    cfg = dict(
        type="MAE",
        backbone=dict(type="MAEViT", arch=arch, img_size=8, patch_size=2),
        neck=dict(type="MAEPretrainDecoder", patch_size=2, decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2),
        head=dict(type="MAEPretrainHead", patch_size=2, loss=dict(type="PixelReconstructionLoss", criterion="L2")),
    )
    method = abstract(cfg)
    method.eval()
    graphdef, *weights = nnx.split(method, nnx.Param, ...)
    rng = np.random.default_rng(0)
    params, rest = jax.tree.map(lambda x: jnp.asarray(0.1 * rng.standard_normal(x.shape), x.dtype), weights)
    context = make_context(digits, workdir=tmp_path, method=lambda state: nnx.merge(graphdef, state["params"], rest))
    evaluator = build(dict(type="Reconstruction", num_images=4), context=context)
    zeros = jax.tree.map(jnp.zeros_like, params)
    errors = [
        evaluator.run({"params": p, "step": step})["masked_mse"] for step, p in enumerate((params, params, zeros))
    ]
    assert errors[0] == errors[1] != errors[2]
    pictures = [np.asarray(Image.open(tmp_path / "pictures" / f"reconstruction_{step}.png")) for step in (0, 2)]
    left, right = (picture[:, : 2 * (112 + 8)] for picture in pictures)
    np.testing.assert_array_equal(left, right)  # the same images and masks; only the last column differs
    assert (pictures[0] != pictures[1]).any()


def test_reconstruction_needs_a_method_that_can(digits, state):
    with pytest.raises(ConfigError, match="needs a method with `reconstruct`, such as MAE; NoneType has none"):
        build(dict(type="Reconstruction"), context=make_context(digits)).run(state)
    images, labels = digits["val"]
    context = make_context({"val": (images[:0], labels[:0])}, method=lambda state: Painter())
    with pytest.raises(ConfigError, match="no images"):
        build(dict(type="Reconstruction"), context=context).run(state)


class TokenPainter:
    """Stands in for a method that predicts no pixels: maps of its own, and a score."""

    def reconstruct(self, images, *, rngs):
        grey = jnp.full((*images.shape[:3], 1), 200, jnp.uint8)
        picture = {"masked": 0 * images, "tokens_told": grey, "mask": images[..., :1], "codes": images[:, 0, 0]}
        return dict(picture, accuracy=jnp.float32(12.5))


def test_reconstruction_draws_what_other_methods_have(digits, state, tmp_path):
    context = make_context(digits, workdir=tmp_path, method=lambda state: TokenPainter())
    scores = build(dict(type="Reconstruction", num_images=2), context=context).run(state)
    assert scores == {"accuracy": 12.5}
    picture = np.asarray(Image.open(tmp_path / "pictures" / "reconstruction.png"))
    assert picture.shape[1] == 3 * 120 + 8  # original, masked, tokens told
    assert (picture[-120:-8, 128:240] == MEAN).all() and (picture[-120:-8, 248:360] == 200).all()


# ------------------------------------------------------------------------------------------------ statistics


def test_statistics_of_known_features(state):
    def statistics(features, labels, **options):
        images = np.zeros((len(labels), 1, 1, 3), np.uint8)
        context = make_context({"val": (images, labels)}, batch_size=len(labels), num_classes=8)
        context.features = lambda state, batch: jnp.asarray(features, jnp.float32)[batch["index"]]
        return build(dict(type="FeatureStatistics", **options), context=context).run(state)

    labels = np.arange(40) % 4
    x = np.random.default_rng(0).standard_normal((40, 6)) @ np.diag([5, 4, 3, 2, 1, 0.5]) + 1
    found = statistics(x, labels)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    s = np.linalg.svd(x - x.mean(axis=0), compute_uv=False)
    p = s / s.sum()
    distance = np.square(unit[:, None] - unit[None]).sum(axis=2)
    apart = ~np.eye(40, dtype=bool)
    assert found == pytest.approx(
        {
            "std": unit.std(axis=0).mean() * 6**0.5,
            "effective_rank": np.exp(-(p * np.log(p)).sum()),
            "uniformity": np.log(np.exp(-2 * distance[apart]).mean()),
            "alignment": distance[apart & (labels[:, None] == labels)].mean(),
        },
        rel=1e-4,
    )
    few = statistics(x[:5], labels[:5])  # fewer images than dimensions
    s = np.linalg.svd(x[:5] - x[:5].mean(axis=0), compute_uv=False)[:4]
    assert few["effective_rank"] == pytest.approx(np.exp(-(s / s.sum() * np.log(s / s.sum())).sum()), rel=1e-3)
    collapsed = statistics(np.ones((40, 6)), labels)
    assert collapsed == pytest.approx(dict(std=0, effective_rank=1, uniformity=0, alignment=0), abs=1e-5)
    even = statistics(np.random.default_rng(0).standard_normal((2000, 8)), np.arange(2000) % 8)
    assert even["std"] == pytest.approx(1, abs=0.02) and even["effective_rank"] == pytest.approx(8, abs=0.05)
    assert even["uniformity"] < -2.5
    assert "alignment" not in statistics(x[:4], labels[:4])  # no two of a class
    assert statistics(x, labels, max_images=20) == statistics(x, labels, max_images=20) != found


# ------------------------------------------------------------------------------------------------ neighbours


def test_nearest_neighbours_are_drawn_with_their_labels(digits, state, tmp_path):
    context = make_context(digits, workdir=tmp_path)
    scores = build(dict(type="NearestNeighbours", num_images=4, k=3), context=context).run(state)
    (x, y), (qx, qy) = flat(digits["train"]), flat(digits["val"])
    rows = np.linspace(0, len(qy) - 1, 4).round().astype(int)
    reference = KNeighborsClassifier(3, metric="cosine").fit(x, y)
    nearest = reference.kneighbors(qx[rows], return_distance=False)
    assert scores == {"same_class": pytest.approx(100 * (y[nearest] == qy[rows][:, None]).mean())}
    picture = np.asarray(Image.open(tmp_path / "pictures" / "nearest_neighbours_7.png"))
    np.testing.assert_array_equal(picture, np.asarray(Image.open(tmp_path / "pictures" / "nearest_neighbours.png")))
    # Each image is enlarged by 8, with a frame of 4 px in green or red.
    cell, top, left = 64 + 8 + 6, 13 + 18, 18
    for i, row in enumerate(rows):
        y0 = top + i * (cell + 17)
        corner = picture[y0 + 4 : y0 + 68, 6 + 4 : 6 + 68]
        np.testing.assert_array_equal(corner[4::8, 4::8], digits["val"][0][row])
        for j, near in enumerate(nearest[i]):
            x0 = left + (j + 1) * cell
            np.testing.assert_array_equal(picture[y0 + 8 : y0 + 68 : 8, x0 + 8 : x0 + 68 : 8], digits["train"][0][near])
            red, green, _ = picture[y0 + 1, x0 + 1].astype(int)
            assert (green > red) == (y[near] == qy[row])


def test_nearest_neighbours_without_workdir_and_by_random_access(digits, state, tmp_path):
    context = make_context(digits)
    plain = build(dict(type="NearestNeighbours"), context=context).run(state)
    asked = []
    context = make_context(digits, workdir=tmp_path)
    context.images = lambda split, index: asked.append((split, index)) or digits[split][0][index]
    assert build(dict(type="NearestNeighbours"), context=context).run(state) == plain
    assert len(asked) == 8 + 64 and (tmp_path / "pictures" / "nearest_neighbours.png").exists()
    passed = make_context(digits, workdir=tmp_path / "b")
    build(dict(type="NearestNeighbours"), context=passed).run(state)
    pictures = [np.asarray(Image.open(path)) for path in tmp_path.rglob("nearest_neighbours.png")]
    np.testing.assert_array_equal(*pictures)


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
        (dict(type="FeatureStatistics", max_images=0), "FeatureStatistics.max_images"),
        (dict(type="NearestNeighbours", k=0), "NearestNeighbours.k"),
    ],
)
def test_mistakes_are_named(digits, options, message):
    with pytest.raises(ConfigError, match=message):
        build(options, context=make_context(digits))


def test_accuracy_needs_logits(digits):
    context = make_context(digits)
    context.logits = None
    with pytest.raises(ConfigError, match=r"needs a method with logits.*KNN"):
        build(dict(type="Accuracy"), context=context)


# ------------------------------------------------------------------------------------------------ several processes

EVALUATORS = {
    "knn": dict(type="KNN", k=[5, 20]),
    "linear": dict(type="LinearProbe", epochs=3),
    "accuracy": dict(type="Accuracy"),
    "picture": dict(type="Reconstruction", num_images=5),
    "statistics": dict(type="FeatureStatistics"),
    "neighbours": dict(type="NearestNeighbours", num_images=3, k=2),
    "svm": dict(type="LowShotSVM", k=2, draws=1, costs=1.0),
}


def small_splits():
    """Logits and features of 12 classes, in numbers that no batch divides."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 12, 150)
    images = rng.integers(0, 200, (150, 2, 2, 3))
    images.reshape(150, 12)[np.arange(150), labels] += 50
    images = images.astype(np.uint8)
    return {"train": (images[:100], labels[:100]), "val": (images[100:], labels[100:])}


def all_scores(workdir, sharding=None, local=None):
    """One round of all evaluators; with a sharding, on global arrays of which `local` cuts out this process's rows."""
    method = lambda state: Painter()  # noqa: E731
    context = make_context(small_splits(), batch_size=32, num_classes=12, workdir=workdir, method=method)
    batches = context.loader

    def loader(split):
        for batch in batches(split):
            if sharding:
                place = lambda x: jax.make_array_from_process_local_data(sharding, local(x))  # noqa: E731
                batch = jax.tree.map(place, jax.device_get(batch))
            yield batch

    context.loader = loader
    state = {"scale": jnp.ones(()), "step": jnp.asarray(7)}
    if sharding:
        state = jax.device_put(jax.device_get(state), NamedSharding(sharding.mesh, P()))
    evaluators = {name: build(dict(options), context=context) for name, options in EVALUATORS.items()}
    return run_all(evaluators, state)


CHILD = """
import json, sys, jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
port, index, workdir = sys.argv[1], int(sys.argv[2]), sys.argv[3]
jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=index)
from pathlib import Path
from jax.sharding import NamedSharding, PartitionSpec
from tests.test_evaluators import all_scores, data_mesh
mesh = data_mesh()
half = lambda x: x[index * 16 : index * 16 + 16]
print(json.dumps(all_scores(Path(workdir), NamedSharding(mesh, PartitionSpec("data")), half)))
"""


@pytest.mark.slow
def test_two_processes_give_the_scores_of_one(tmp_path):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "XLA_FLAGS": xla_flags(2), "JAX_PLATFORMS": "cpu"}
    children = [
        subprocess.Popen(
            [sys.executable, "-c", CHILD, str(port), str(index), str(tmp_path / str(index))],
            cwd=Path(__file__).parents[1],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    try:
        outputs = [child.communicate(timeout=240) for child in children]
    finally:
        for child in children:
            child.kill()
    assert all(child.returncode == 0 for child in children), "\n".join(error[-3000:] for _, error in outputs)
    scores = [json.loads(out.splitlines()[-1]) for out, _ in outputs]
    assert scores[0] == scores[1]
    alone = all_scores(tmp_path / "alone")
    assert scores[0] == pytest.approx(alone, rel=1e-5)
    assert 20 < alone["accuracy/top1"] < 100
    assert not (tmp_path / "1").exists()  # only the first process writes
    pictures = [tmp_path / name / "pictures" / "reconstruction_7.png" for name in ("0", "alone")]
    np.testing.assert_array_equal(*(np.asarray(Image.open(path)) for path in pictures))
