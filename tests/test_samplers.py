"""Samplers: what an epoch holds, in which order, and that repeats of a sample differ."""

from __future__ import annotations

import pickle

import jax
import numpy as np
import pytest

from jaxpretrain.build import ConfigError
from jaxpretrain.data.base import InMemory
from jaxpretrain.data.device import DevicePipeline, sample_key
from jaxpretrain.data.pipeline import TrainLoader
from jaxpretrain.data.samplers import build_sampler, epoch_of, occurrences, permutation, size_of

N = 60
PIXELS = np.random.default_rng(0).integers(0, 256, (N, 12, 12, 3), dtype=np.uint8)
LABELS = np.repeat([0, 1, 2, 4], [2, 8, 20, 30])


class Plain(InMemory):
    """Noise, in classes of 2, 8, 20 and 30."""

    def __init__(self):
        super().__init__(PIXELS, LABELS)


def order(length=N, batch_size=12, source=None, seed=3, epoch=1, **sampler):
    return build_sampler(sampler, source or Plain(), batch_size)(seed, epoch, length)


def loader(batch_size=12, pipeline=(), device_pipeline=(), seed=3, **sampler):
    split = dict(dataset=Plain(), pipeline=list(pipeline), sampler=sampler or None)
    return TrainLoader(split, batch_size=batch_size, seed=seed)


def take(loader, count):
    batches = [next(loader) for _ in range(count)]
    loader.close()
    return {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}


# ----------------------------------------------------------------------------------------------------------------------
# The orders


@pytest.mark.parametrize("name", ["RandomSampler", "DefaultSampler", "InfiniteSampler"])
def test_the_default_by_every_name(name):
    np.testing.assert_array_equal(order(type=name), permutation(3, 1, N))
    np.testing.assert_array_equal(order(type=name, shuffle=False), np.arange(N))
    assert build_sampler(None, Plain(), 4) is permutation
    np.testing.assert_array_equal(order(type="SequentialSampler"), np.arange(N))


@pytest.mark.parametrize(
    "sampler",
    [
        dict(type="RandomSampler"),
        dict(type="RepeatAugSampler", groups=4),
        dict(type="WeightedSampler", weights=np.arange(N)),
        dict(type="WeightedSampler", weights=np.arange(N) + 1, replacement=False),
        dict(type="ClassBalancedSampler", q=0.5),
    ],
    ids=lambda sampler: sampler["type"],
)
def test_orders_are_pure(sampler):
    bound = build_sampler(sampler, Plain(), 12)
    first = bound(3, 1, N)
    np.testing.assert_array_equal(first, pickle.loads(pickle.dumps(bound))(3, 1, N))
    assert first.shape == (size_of(bound, N),) and first.min() >= 0 and first.max() < N
    assert (first != bound(3, 2, N)).any() and (first != bound(4, 1, N)).any()


def test_repeated_augmentation_is_mmpretrains():
    """Of W ranks, rank r has every W-th of the repeated list from the r-th on, and as many as its share of the data set."""
    shuffled = permutation(3, 1, N)
    for repeats, ranks in ((3, 1), (3, 4), (2, 4), (5, 3)):
        repeated = np.repeat(shuffled, repeats)
        of_rank = [repeated[rank::ranks][: -(-N // ranks)] for rank in range(ranks)]
        ours = order(type="RepeatAugSampler", num_repeats=repeats, groups=ranks, batch_size=12)
        for step in range(N // 12):
            parts = ours[step * 12 : (step + 1) * 12].reshape(ranks, -1)
            for rank in range(ranks):
                np.testing.assert_array_equal(parts[rank], of_rank[rank][step * 12 // ranks : (step + 1) * 12 // ranks])


def test_repeated_augmentation_neighbours_length_and_mistakes():
    ours = order(type="RepeatAugSampler")
    assert len(ours) == N and (ours.reshape(-1, 3) == ours[::3, None]).all()
    assert len(set(ours)) == N // 3
    np.testing.assert_array_equal(order(type="RepeatAugSampler", shuffle=False)[:4], [0, 0, 0, 1])
    assert len(order(type="RepeatAugSampler", selected_round=16)) == 48
    assert loader(batch_size=24, type="RepeatAugSampler", selected_round=16).steps_per_epoch == 2
    with pytest.raises(ConfigError, match="groups=5 do not divide the batch of 12"):
        order(type="RepeatAugSampler", groups=5)
    with pytest.raises(ConfigError, match="num_repeats=0"):
        order(type="RepeatAugSampler", num_repeats=0)
    with pytest.raises(ConfigError, match="seed=7: the order follows config.seed"):
        build_sampler(dict(type="RepeatAugSampler", seed=7), Plain(), 12)


def test_weights_are_frequencies(tmp_path):
    weights = np.asarray([0.0, 1.0, 2.0, 5.0])
    source = InMemory(np.zeros((4, 2, 2), np.uint8), np.zeros(4))
    sampler = dict(type="WeightedSampler", weights=weights, num_samples=8000)
    drawn = order(4, source=source, **sampler)
    counts = np.bincount(drawn, minlength=4)
    expected = 1000 * weights
    assert counts[0] == 0 and (abs(counts - expected) < 4 * np.sqrt(expected) + 1).all()
    for name, write in (("w.npy", np.save), ("w.txt", np.savetxt)):
        write(tmp_path / name, weights)
        again = order(4, source=source, **sampler | dict(weights=str(tmp_path / name)))
        np.testing.assert_array_equal(again, drawn)


def test_weights_without_replacement():
    """The first of each epoch is drawn by the weights, the next by those of the rest."""
    source = InMemory(np.zeros((4, 2, 2), np.uint8), np.zeros(4))
    bound = build_sampler(
        dict(type="WeightedSampler", weights=[0, 1, 2, 5], num_samples=2, replacement=False), source, 2
    )
    drawn = np.stack([bound(0, epoch, 4) for epoch in range(4000)])
    assert (drawn[:, 0] != drawn[:, 1]).all() and (drawn > 0).all()
    assert np.bincount(drawn[:, 0])[1:] / 4000 == pytest.approx([1 / 8, 2 / 8, 5 / 8], abs=0.03)
    second = drawn[drawn[:, 0] == 3, 1]
    assert np.bincount(second, minlength=3)[1:] / len(second) == pytest.approx([1 / 3, 2 / 3], abs=0.05)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0] * 5, "5 weights for the 60 samples"),
        ([-1.0] + [1.0] * 59, "not negative"),
        ([0.0] * 60, "not all zero"),
        ([float("nan")] * 60, "finite"),
        ("nowhere.npy", "cannot read weights='nowhere.npy'"),
    ],
)
def test_mistakes_of_weights(weights, message):
    with pytest.raises(ConfigError, match=message):
        order(type="WeightedSampler", weights=weights)


def test_too_few_weights_without_replacement():
    with pytest.raises(ConfigError, match="10 samples have a weight above zero, fewer than the 60 of an epoch"):
        order(type="WeightedSampler", weights=np.arange(N) < 10, replacement=False)


@pytest.mark.parametrize("q", [0.0, 0.5, 1.0])
def test_classes_are_balanced(q):
    sizes = np.asarray([2, 8, 20, 30])
    expected = sizes**q / (sizes**q).sum() * 600
    drawn = order(type="ClassBalancedSampler", q=q, num_samples=600)
    counts = np.bincount(LABELS[drawn])[[0, 1, 2, 4]]
    assert (abs(counts - expected) <= 1).all()
    for label in (0, 1, 2, 4):
        times = np.bincount(drawn, minlength=N)[label == LABELS]
        assert times.max() - times.min() <= 1
    if q == 1:
        assert sorted(order(type="ClassBalancedSampler", q=1)) == list(range(N))
    halves = np.bincount(LABELS[drawn[:300]], minlength=5)[[0, 1, 2, 4]]
    assert (abs(halves - expected / 2) < 40).all(), "shuffled"


def test_shares_are_fair_over_epochs():
    """7 samples of 4 classes: each class has 7/4 in the mean."""
    bound = build_sampler(dict(type="ClassBalancedSampler", num_samples=7), Plain(), 7)
    drawn = np.concatenate([bound(0, epoch, N) for epoch in range(800)])
    assert np.bincount(LABELS[drawn])[[0, 1, 2, 4]] / 800 == pytest.approx([1.75] * 4, abs=0.06)


def test_class_balance_needs_labels():
    source = Plain()
    source.labels = np.zeros((N, 3), np.int8)
    with pytest.raises(ConfigError, match="one label for each sample"):
        order(type="ClassBalancedSampler", source=source)


def test_unknown_samplers():
    with pytest.raises(ConfigError, match="No sampler 'RepeatSampler'.*RepeatAugSampler"):
        order(type="RepeatSampler")
    with pytest.raises(ConfigError, match="num_repeat"):
        order(type="RepeatAugSampler", num_repeat=3)
    with pytest.raises(ConfigError, match="got 3"):
        build_sampler(3, Plain(), 4)


def test_occurrences():
    assert occurrences(np.asarray([5, 7, 5, 5, 7, 0])).tolist() == [0, 0, 1, 2, 1, 0]
    assert epoch_of(permutation, 0, 0, 10).repeats is None
    with pytest.raises(ValueError, match="read-only"):
        epoch_of(permutation, 0, 0, 10).indices[0] = 1


# ----------------------------------------------------------------------------------------------------------------------
# In the loader


def test_repeats_differ_on_the_host_and_on_the_device():
    crop = dict(type="RandomResizedCrop", scale=8)
    batch = take(loader(type="RepeatAugSampler", pipeline=[crop]), 1)
    assert batch["repeat"].tolist() == [0, 1, 2] * 4
    views = batch["image"].reshape(4, 3, -1)
    assert sum(len({view.tobytes() for view in one}) for one in views) == 12

    run = jax.jit(DevicePipeline([dict(type="RandomFlip", prob=0.5)], [0, 0, 0], [1, 1, 1]))
    whole = take(loader(batch_size=60, type="RepeatAugSampler"), 1)
    flipped = np.asarray(run(whole, jax.random.key(0))["image"])
    differ = (flipped.reshape(20, 3, -1) != flipped.reshape(20, 3, -1)[:, :1]).any((1, 2))
    assert 8 < differ.sum() < 20, "repeats are flipped independently: of three, alike with probability 1/4"


def test_the_first_of_repeats_is_as_ever():
    """Neither pixels nor keys of a sample depend on the sampler, unless it comes again."""
    crop = dict(type="RandomResizedCrop", scale=8)
    plain, repeated = take(loader(pipeline=[crop]), 5), take(loader(pipeline=[crop], type="RepeatAugSampler"), 5)
    assert not plain["repeat"].any()
    images = dict(zip(plain["index"].tolist(), plain["image"], strict=True))
    first = repeated["repeat"] == 0
    assert first.sum() == 20
    for index, image in zip(repeated["index"][first].tolist(), repeated["image"][first], strict=True):
        np.testing.assert_array_equal(images[index], image)
    key = jax.random.key(1)
    bare = jax.random.fold_in(jax.random.fold_in(key, 2), 3)
    assert sample_key(key, 2, 3) == bare == sample_key(key, 2, 3, 0) and sample_key(key, 2, 3, 1) != bare


def test_epochs_have_the_samplers_length():
    weighted = loader(type="WeightedSampler", weights=np.ones(N), num_samples=30)
    assert weighted.steps_per_epoch == 2
    batch = take(weighted, 4)
    assert batch["epoch"].tolist() == [0] * 24 + [1] * 24
    bound = build_sampler(dict(type="WeightedSampler", weights=np.ones(N), num_samples=30), Plain(), 12)
    np.testing.assert_array_equal(batch["index"][24:], bound(3, 1, N)[:24])
    with pytest.raises(ConfigError, match="the sampler takes 10 of them, fewer than one batch of batch_size=12"):
        loader(type="WeightedSampler", weights=np.ones(N), num_samples=10)


def test_a_resumed_sampler_goes_on():
    options = dict(type="RepeatAugSampler", pipeline=[dict(type="RandomResizedCrop", scale=8)])
    whole = take(loader(**options), 7)
    later = loader(**options)
    later.set_state(loader(**options).get_state(3))
    rest = take(later, 4)
    assert all((whole[key][36:] == rest[key]).all() for key in whole)


def test_a_methods_order_and_a_sampler_exclude_each_other():
    with pytest.raises(ConfigError, match="remove data.train.sampler"):
        loader(type="RepeatAugSampler").set_order(permutation, 0)
    plain = loader(type="RepeatAugSampler")
    plain.set_order(None, 1)
    assert take(plain, 1)["repeat"].tolist() == [0, 1, 2] * 4, "None is the sampler's own order"
