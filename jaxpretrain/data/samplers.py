"""Which samples make up an epoch, in which order: `config.data.train.sampler = dict(type=...)`.

A sampler is an `Order`: a function of seed, epoch and the length of the data set, so that every host and worker knows the
whole of it, and a run goes on anywhere. It gives the order of all hosts together. Shuffling costs 4 bytes a sample in each
process (8 beyond 2**31 of them; twice that around the border of epochs), and the time to make an order once an epoch: 0.4 GB
and 9 s for a hundred million.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from jaxpretrain.build import ConfigError, build, nearest
from jaxpretrain.data.seeds import ORDER, generator

Indices = Int[np.ndarray, " n"]

# (seed, epoch, length) -> the samples of an epoch, numbers in 0..length-1: a pure function that can be hashed and pickled.
# There are `length` of them, unless it has a method `size(length)`; with `distinct = True` no sample comes twice.
Order = Callable[[int, int, int], Indices]


def permutation(seed: int, epoch: int, length: int) -> Indices:
    """Every sample once, int32 or int64."""
    order = _ascending(length)
    generator(ORDER, seed, epoch, 0).shuffle(order)
    return order


permutation.distinct = True  # type: ignore[attr-defined]


class Sampler:
    """Base of the samplers of recipes."""

    distinct: bool = False

    def bind(self, source: Any, batch_size: int) -> Order:
        """The order over this data set, in global batches of this size. Raises ConfigError if it does not fit."""
        return self

    def size(self, length: int) -> int:
        """Samples of an epoch, over `length` samples; what does not fill a batch is left out."""
        return length

    def __call__(self, seed: int, epoch: int, length: int) -> Indices:
        raise NotImplementedError


@dataclasses.dataclass(eq=False)
class RandomSampler(Sampler):
    """Every sample once, in a new random order each epoch: the default. Also by MMEngine's names, DefaultSampler and
    InfiniteSampler.

    Args:
        shuffle: False keeps the order of the data set.
        seed: must be None, the run's seed counts.
        round_up: accepted; MMEngine fills the last batch with samples of the first, here it is left out.
    """

    shuffle: bool = True
    seed: None = None
    round_up: bool = True
    distinct = True

    def __post_init__(self) -> None:
        _no_seed(self)

    def __call__(self, seed: int, epoch: int, length: int) -> Indices:
        return permutation(seed, epoch, length) if self.shuffle else _ascending(length)


@dataclasses.dataclass(eq=False)
class SequentialSampler(RandomSampler):
    """The data set in its own order, every epoch."""

    shuffle: bool = False


@dataclasses.dataclass(eq=False)
class RepeatAugSampler(Sampler):
    """Repeated augmentation (Hoffer et al., 2020, "Augment your batch"; Berman et al., 2019, "MultiGrain"): each sample
    several times in a row, each time augmented anew.

    An epoch is as long as the data set and so has a part of it alone: samples drawn at random, num_repeats times each.

    Args:
        shuffle: False takes the first samples of the data set, always.
        num_repeats: times that each sample comes.
        seed: must be None, the run's seed counts.
        selected_round: the length of an epoch is rounded down to a multiple of this; DeiT's code has 256, MMPretrain's
            none.
        groups: the samples of a batch are dealt out to so many parts of it, in turn, like cards, as MMPretrain deals them
            to its GPUs: with as many as BatchNorm has groups, the repeats of a sample are normalised apart. 1: they
            are neighbours in the batch.
    """

    shuffle: bool = True
    num_repeats: int = 3
    seed: None = None
    selected_round: int = 1
    groups: int = 1
    _batch_size: int = dataclasses.field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        _no_seed(self)
        for name in ("num_repeats", "selected_round", "groups"):
            if getattr(self, name) < 1:
                raise ConfigError(f"RepeatAugSampler: {name}={getattr(self, name)} must be at least 1")

    def bind(self, source: Any, batch_size: int) -> Order:
        if batch_size % self.groups:
            raise ConfigError(f"RepeatAugSampler: groups={self.groups} do not divide the batch of {batch_size}")
        bound = copy.copy(self)
        bound._batch_size = batch_size
        return bound

    def size(self, length: int) -> int:
        return length // self.selected_round * self.selected_round

    def __call__(self, seed: int, epoch: int, length: int) -> Indices:
        order = permutation(seed, epoch, length) if self.shuffle else _ascending(length)
        order = np.repeat(order[: -(-length // self.num_repeats)], self.num_repeats)[: self.size(length)]
        if self.groups > 1:
            whole = len(order) // self._batch_size * self._batch_size
            hands = order[:whole].reshape(-1, self._batch_size // self.groups, self.groups)
            order = np.concatenate([hands.swapaxes(1, 2).reshape(-1), order[whole:]])
        return order


@dataclasses.dataclass(eq=False)
class WeightedSampler(Sampler):
    """Samples drawn in proportion to their weights.

    Args:
        weights: one for each sample, not negative; or the name of a file: `.npy`, or text with one number per line.
        num_samples: length of an epoch; None is that of the data set.
        replacement: False draws each sample once at most, one after another among those left.
    """

    weights: Sequence[float] | Float[np.ndarray, " n"] | str
    num_samples: int | None = None
    replacement: bool = True

    @property
    def distinct(self) -> bool:  # type: ignore[override]
        return not self.replacement

    def bind(self, source: Any, batch_size: int) -> Order:
        weights = _numbers(self.weights)
        if len(weights) != len(source):
            raise ConfigError(f"WeightedSampler: {len(weights)} weights for the {len(source)} samples of {source!r}")
        if not np.isfinite(weights).all() or weights.min() < 0 or not weights.any():
            raise ConfigError("WeightedSampler: weights must be finite, not negative, and not all zero")
        available = np.count_nonzero(weights)
        if not self.replacement and self.size(len(source)) > available:
            raise ConfigError(
                f"WeightedSampler: {available} samples have a weight above zero, fewer than the "
                f"{self.size(len(source))} of an epoch; lower num_samples, or set replacement=True"
            )
        return dataclasses.replace(self, weights=weights)

    def size(self, length: int) -> int:
        return length if self.num_samples is None else self.num_samples

    def __call__(self, seed: int, epoch: int, length: int) -> Indices:
        rng, size = generator(ORDER, seed, epoch, 0), self.size(length)
        weights = np.asarray(self.weights, np.float64)
        if self.replacement:
            edges = np.cumsum(weights)
            drawn = np.searchsorted(edges, rng.random(size) * edges[-1], side="right")
            return np.minimum(drawn, np.flatnonzero(weights)[-1])  # a product can round up to the last edge
        with np.errstate(divide="ignore"):  # each waits for its turn, at its rate: zero waits for ever
            waits = rng.standard_exponential(length) / weights
        return np.argsort(waits, kind="stable")[:size]


@dataclasses.dataclass(eq=False)
class ClassBalancedSampler(Sampler):
    """Classes drawn in proportion to (their number of samples) ** q (Kang et al., 2020, "Decoupling representation and
    classifier", equation 1), which the data set needs labels for.

    Within a class no sample comes oftener than another, but for one time.

    Args:
        q: 0 has every class as often as every other, 0.5 is square-root sampling, 1 is the data set as it is.
        num_samples: length of an epoch; None is that of the data set.
    """

    q: float = 0.0
    num_samples: int | None = None
    _labels: Any = dataclasses.field(default=None, init=False, repr=False)

    def bind(self, source: Any, batch_size: int) -> Order:
        labels = getattr(source, "labels", None)
        if isinstance(labels, Mapping) or labels is None or np.ndim(labels) != 1 or len(labels) != len(source):
            raise ConfigError(f"ClassBalancedSampler needs data with one label for each sample at hand, not {source!r}")
        bound = copy.copy(self)
        bound._labels = np.asarray(labels)
        return bound

    def size(self, length: int) -> int:
        return length if self.num_samples is None else self.num_samples

    def __call__(self, seed: int, epoch: int, length: int) -> Indices:
        rng = generator(ORDER, seed, epoch, 0)
        members = _members(self._labels)
        shares = _shares(np.asarray([len(m) for m in members], float) ** self.q, self.size(length), rng)
        drawn = []
        for samples, share in zip(members, shares, strict=True):
            rounds, rest = divmod(int(share), len(samples))
            drawn += [samples] * rounds + [rng.choice(samples, rest, replace=False)]
        order = np.concatenate(drawn)
        rng.shuffle(order)
        return order


@dataclasses.dataclass(frozen=True)
class ReplacementOrder:
    """Every sample is drawn from all of them."""

    def __call__(self, seed: int, epoch: int, length: int) -> Indices:
        return generator(ORDER, seed, epoch, 0).integers(length, size=length, dtype=np.int64)


@dataclasses.dataclass(frozen=True, eq=False)
class UniformOrder:
    """Every cluster as often as every other: its samples once at most where it has enough of them, else with repetition
    (DeepCluster, section 3.3).

    Args:
        labels: the cluster of each sample.
    """

    labels: Indices

    def __call__(self, seed: int, epoch: int, length: int) -> Indices:
        rng = generator(ORDER, seed, epoch, 0)
        members = _members(self.labels)
        share = -(-length // len(members))
        drawn = np.concatenate([rng.choice(m, share, replace=len(m) < share) for m in members])
        rng.shuffle(drawn)
        return drawn[:length]


SAMPLERS: dict[str, type[Sampler]] = {
    "ClassBalancedSampler": ClassBalancedSampler,
    "DefaultSampler": RandomSampler,
    "InfiniteSampler": RandomSampler,
    "RandomSampler": RandomSampler,
    "RepeatAugSampler": RepeatAugSampler,
    "SequentialSampler": SequentialSampler,
    "WeightedSampler": WeightedSampler,
}


def build_sampler(config: Any, source: Any, batch_size: int) -> Order:
    """The order that `config` describes: None, dict(type=...), or an `Order` as it is.

    Raises:
        ConfigError: an unknown type or argument, naming the nearest; what does not fit the data set.
    """
    if config is None:
        return permutation
    if isinstance(config, Mapping) or hasattr(config, "to_dict"):
        config = dict(config)
        kind = config.get("type")
        if kind in SAMPLERS:
            config["type"] = SAMPLERS[kind]
        elif isinstance(kind, str) and "." not in kind:
            raise ConfigError(f"No sampler {kind!r}.{nearest(kind, SAMPLERS)}")
        config = build(config)
    if not callable(config):
        raise ConfigError(
            f"data.train.sampler must be dict(type=...) or a function of seed, epoch, length; got {config!r}"
        )
    return config.bind(source, batch_size) if isinstance(config, Sampler) else config


# ----------------------------------------------------------------------------------------------------------------------
# Orders as the loaders use them


class Epoch(NamedTuple):
    """The samples of an epoch, read-only."""

    indices: Indices
    repeats: Int[np.ndarray, " n"] | None  # how often the epoch has had each before; None: never

    def at(self, place: int) -> tuple[int, int]:
        """(index, repeat) at this place."""
        return int(self.indices[place]), 0 if self.repeats is None else int(self.repeats[place])


def size_of(order: Order, length: int) -> int:
    """Samples of an epoch of `order`."""
    size = getattr(order, "size", None)
    return length if size is None else size(length)


_lock = threading.Lock()


def epoch_of(order: Order, seed: int, epoch: int, length: int) -> Epoch:
    """`order(seed, epoch, length)`, kept for the next call."""
    with _lock:  # threads that enter an epoch together compute it once
        return _epoch_of(order, seed, epoch, length)


@functools.lru_cache(maxsize=2)  # around their border two epochs are in use
def _epoch_of(order: Order, seed: int, epoch: int, length: int) -> Epoch:
    indices = order(seed, epoch, length)
    indices.flags.writeable = False
    return Epoch(indices, None if getattr(order, "distinct", False) else occurrences(indices))


def occurrences(indices: Indices) -> Int[np.ndarray, " n"]:
    """How often each number has come before: 5 7 5 5 7 gives 0 0 1 2 1."""
    by_number = np.argsort(indices, kind="stable")
    starts = np.flatnonzero(np.diff(indices[by_number], prepend=-1))
    counts = np.diff(starts, append=len(indices))
    times = np.empty(len(indices), np.int32)
    times[by_number] = np.arange(len(indices)) - np.repeat(starts, counts)
    return times


def _ascending(length: int) -> Indices:
    return np.arange(length, dtype=np.int32 if length < 2**31 else np.int64)


def _members(labels: Indices) -> list[Indices]:
    """The samples of each label that occurs."""
    by_label = np.argsort(labels, kind="stable")
    return np.split(by_label, np.flatnonzero(np.diff(labels[by_label])) + 1)


def _shares(parts: Float[np.ndarray, " c"], size: int, rng: np.random.Generator) -> Int[np.ndarray, " c"]:
    """`size` divided in these proportions; what is left after rounding down is drawn by lot."""
    exact = parts / parts.sum() * size
    shares = np.floor(exact).astype(np.int64)
    rest = size - shares.sum()
    if rest > 0:  # systematic: each gets one more with the probability of its fraction
        edges = np.cumsum(exact - shares)
        edges *= rest / edges[-1]
        shares += np.histogram(np.arange(rest) + rng.random(), np.concatenate([[0], edges]))[0]
    return shares


def _numbers(weights: Any) -> Float[np.ndarray, " n"]:
    if not isinstance(weights, str | Path):
        return np.asarray(weights, np.float64)
    path = os.path.expanduser(weights)
    try:
        return np.asarray(np.load(path) if path.endswith(".npy") else np.loadtxt(path, ndmin=1), np.float64)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"WeightedSampler: cannot read weights={str(weights)!r}: {error}; expected .npy, or one number per line"
        ) from error


def _no_seed(sampler: Any) -> None:
    if sampler.seed is not None:
        raise ConfigError(f"{type(sampler).__name__}: seed={sampler.seed}: the order follows config.seed; leave it out")
