"""Low-shot and full SVMs against scikit-learn and the definition of average precision."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import average_precision_score
from sklearn.model_selection import cross_val_score
from sklearn.svm import LinearSVC

from jaxpretrain.build import ConfigError, build
from jaxpretrain.evaluators.average_precision import average_precision, mean_average_precision
from jaxpretrain.evaluators.low_shot_svm import COSTS, SHOTS, draw_shots
from tests.test_evaluators import flat, make_context

STATE = {"scale": jnp.ones(()), "step": jnp.asarray(7)}


def area(scores, targets):
    """The area under the curve of the best precision at a recall or above, point by point."""
    pairs = sorted(((s, t) for s, t in zip(scores, targets, strict=True) if t != -1), key=lambda pair: -pair[0])
    total = sum(t == 1 for _, t in pairs)
    points, hits = [], 0
    for rank, (_, t) in enumerate(pairs, 1):
        hits += t == 1
        points.append((hits / total, hits / rank))
    recalls = sorted({r for r, _ in points if r > 0})
    steps = np.diff([0.0, *recalls])
    return sum(step * max(p for r, p in points if r >= recall) for step, recall in zip(steps, recalls, strict=True))


def blobs(seed=0, classes=4, count=40, dims=6, multi=False):
    """Features in noisy directions of their classes, with labels [N], or targets [N, classes] of 1, 0 and -1."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).standard_normal((classes, dims))
    if not multi:
        labels = np.arange(count) % classes
        return (centres[labels] + 0.9 * rng.standard_normal((count, dims))).astype(np.float32), labels
    targets = rng.choice([1, 0, -1], (count, classes), p=[0.3, 0.6, 0.1]).astype(np.int8)
    noise = 0.7 * rng.standard_normal((count, dims))
    return ((targets == 1) @ centres + noise).astype(np.float32), targets


def context_of(train, val, classes, seed=0):
    """A context that hands these features out; multi-label if the labels have two axes."""
    splits = {name: (np.zeros((len(y), 1, 1, 3), np.uint8), y) for name, (_, y) in (("train", train), ("val", val))}
    context = make_context(splits, batch_size=8, num_classes=classes, seed=seed)
    banks = {"train": jnp.asarray(train[0]), "val": jnp.asarray(val[0])}
    loader = context.loader

    def tagged(split):
        for batch in loader(split):
            yield dict(batch, bank=banks[split])

    context.loader = tagged
    context.features = lambda state, batch: batch["bank"][batch["index"]]
    return context


def unit(x):
    return x.astype(np.float64) / (np.linalg.norm(x, axis=1, keepdims=True) + 1e-5)


def svm(cost):
    return LinearSVC(C=cost, class_weight={1: 2, 0: 1}, max_iter=2000, random_state=0, dual=True)


# ------------------------------------------------------------------------------------------------ average precision


def test_average_precision_is_the_area_under_the_curve():
    rng = np.random.default_rng(0)
    for _ in range(20):
        scores, targets = rng.standard_normal(30), rng.choice([1, 0, -1], 30, p=[0.3, 0.5, 0.2])
        assert average_precision(scores, targets) == pytest.approx(area(scores, targets), abs=1e-12)
        counted = targets >= 0  # without the envelope it is scikit-learn's, which is never more
        assert average_precision(scores, targets) >= average_precision_score(targets[counted], scores[counted]) - 1e-12


def test_average_precision_by_hand_and_at_the_edges():
    assert average_precision(np.array([3.0, 2, 1]), np.array([0, 1, 1])) == pytest.approx(2 / 3)
    assert average_precision(np.array([4.0, 3, 2, 1]), np.array([1, 0, 0, 1])) == pytest.approx((1 + 0.5) / 2)
    assert average_precision(np.array([1.0, 2]), np.array([1, -1])) == 1  # what does not count is not in the way
    assert np.isnan(average_precision(np.array([1.0, 2]), np.array([0, -1])))
    scores = np.array([[3.0, 1], [2, 2], [1, 3]])
    targets = np.array([[1, 0], [0, 0], [1, 0]])
    assert mean_average_precision(scores, targets) == pytest.approx(
        (1 + 2 / 3) / 2
    )  # the class without a row is left out


# ------------------------------------------------------------------------------------------------ drawing


def test_draws_have_k_positives_and_the_rest_negatives():
    targets = blobs(multi=True, count=60)[1]
    for k in (1, 4):
        for c, rows in enumerate(draw_shots(targets, k, np.random.default_rng(0))):
            assert len(set(rows)) == len(rows) == 4 * k
            assert (targets[rows, c] == 1).sum() == k and (targets[rows, c] == 0).sum() == 3 * k
    first, again, other = (draw_shots(targets, 4, np.random.default_rng(s)) for s in (0, 0, 1))
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert any((a != b).any() for a, b in zip(first, other, strict=True))


def test_the_protocol_is_the_benchmarks():
    assert SHOTS == (1, 2, 4, 8, 16, 32, 64, 96)
    assert COSTS[:3] == (1.0, 10.0, 100.0) and len(COSTS) == 19 and COSTS[3] == 1 / 16 and COSTS[-1] == 2.0**-19
    evaluator = build(dict(type="LowShotSVM"), context=context_of(blobs(), blobs(1), 4))
    assert (evaluator.k, evaluator.draws, evaluator.costs) == (SHOTS, 5, COSTS)


# ------------------------------------------------------------------------------------------------ scores


@pytest.mark.parametrize("multi", [False, True])
def test_low_shot_equals_scikit_learn(multi):
    train, val = blobs(count=80, multi=multi), blobs(1, count=50, multi=multi)
    context = context_of(train, val, 4, seed=3)
    scores = build(dict(type="LowShotSVM", k=(2, 4), draws=3, costs=(0.01, 1.0)), context=context).run(STATE)
    targets, expected = (y if multi else (y[:, None] == np.arange(4)).astype(int) for y in (train[1], val[1]))
    x, queries = unit(train[0]), unit(val[0])
    for k in (2, 4):
        maps, tops = np.zeros((2, 3)), np.zeros((2, 3))
        for draw in range(3):
            picked = draw_shots(targets, k, np.random.default_rng((3, k, draw)))
            for i, cost in enumerate((0.01, 1.0)):
                columns = [
                    svm(cost).fit(x[rows], targets[rows, c] == 1).decision_function(queries)
                    for c, rows in enumerate(picked)
                ]
                maps[i, draw] = 100 * np.mean([area(column, expected[:, c]) for c, column in enumerate(columns)])
                tops[i, draw] = 100 * np.mean(np.argmax(columns, axis=0) == expected.argmax(axis=1))
        best = maps.mean(axis=1).argmax()
        assert scores[f"k{k}_map"] == pytest.approx(maps[best].mean(), abs=1e-9)
        assert scores[f"k{k}_map_std"] == pytest.approx(maps[best].std(), abs=1e-9)
        assert (f"k{k}_top1" in scores) == (not multi)
        if not multi:
            assert scores[f"k{k}_top1"] == pytest.approx(tops[best].mean(), abs=1e-9)
    assert 25 < scores["k2_map"] < 100


@pytest.mark.parametrize("multi", [False, True])
def test_full_svm_chooses_costs_by_cross_validation(multi):
    train, val = blobs(count=60, multi=multi), blobs(1, count=50, multi=multi)
    costs = (0.003, 0.1, 10.0)
    evaluator = build(dict(type="LowShotSVM", k=(), full=True, costs=costs), context=context_of(train, val, 4))
    scores = evaluator.run(STATE)
    x, queries, values, chosen = unit(train[0]), unit(val[0]), [], []
    for c in range(4):
        there = (train[1][:, c] if multi else train[1] == c) == 1  # difficult ones are negative in training
        means = [cross_val_score(svm(cost), x, there, cv=3, scoring="average_precision").mean() for cost in costs]
        chosen.append(costs[int(np.argmax(means))])
        decision = svm(chosen[-1]).fit(x, there).decision_function(queries)
        values.append(area(decision, val[1][:, c] if multi else (val[1] == c).astype(int)))
    assert scores["full_map"] == pytest.approx(100 * np.mean(values), abs=1e-9)
    assert ("full_top1" in scores) == (not multi)
    assert len(set(chosen)) > 1 or multi


def test_more_shots_are_better_on_digits_and_threads_change_nothing():
    from sklearn.datasets import load_digits

    data = load_digits()
    images = np.repeat((data.images * 15).astype(np.uint8)[..., None], 3, axis=-1)
    splits = {"train": (images[:600], data.target[:600]), "val": (images[600:900], data.target[600:900])}
    context = make_context(splits)
    options = dict(type="LowShotSVM", k=(1, 8, 500), draws=2, costs=(0.01, 1.0))
    scores = build(dict(options), context=context).run(STATE)
    assert "k500_map" not in scores  # no class has so many
    assert scores["k1_top1"] + 10 < scores["k8_top1"] and scores["k1_map"] + 10 < scores["k8_map"] < 100
    assert build(dict(options, workers=1), context=context).run(STATE) == scores
    x, y = flat(splits["train"])
    assert len(x) == len(y) == 600


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(k=()), "nothing to do: give it k, or full=True"),
        (dict(costs=(1.0, -1)), "LowShotSVM.costs"),
        (dict(k=0), "LowShotSVM.k is 0"),
        (dict(draws=0), "LowShotSVM.draws"),
        (dict(pool="cls_token"), "LowShotSVM.pool is 'cls_token'"),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        build(dict(type="LowShotSVM", **options), context=context_of(blobs(), blobs(1), 4))


def test_too_few_images_and_evaluators_for_one_label():
    with pytest.raises(ConfigError, match="a class has 10 training images, fewer than k=64"):
        build(dict(type="LowShotSVM", k=64), context=context_of(blobs(), blobs(1), 4)).run(STATE)
    context = context_of(blobs(multi=True), blobs(1, multi=True), 4)
    for kind in ("KNN", "LinearProbe"):
        with pytest.raises(ConfigError, match=r"several labels per image.*LowShotSVM"):
            build(dict(type=kind), context=context).run(STATE)
