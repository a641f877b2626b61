"""Learning rate schedules with MMEngine's semantics, computed for a whole run at once.

A scheduler acts on the value that is there, not on the base value: at its k-th turn it maps `value` to
`a[k] * value + b[k]`. So several of them chain: a warmup that ends hands its value to the cosine that begins, and two
that overlap both apply. A scheduler has its turns at steps `begin <= step < end`, or, counting epochs, at the first
step of epochs `begin <= epoch < end`; the result is then a staircase. `convert_to_iter_based` turns one that is written
in epochs into one that acts at every step.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float

from jaxpretrain.build import ConfigError, build

Map = tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]


@dataclass(frozen=True, kw_only=True)
class Scheduler(ABC):
    """One entry of `param_scheduler`.

    Args:
        begin: first epoch (or step, without `by_epoch`) at which it acts.
        end: first one at which it no longer does; the end of the run by default.
        by_epoch: whether it counts and acts in epochs.
        convert_to_iter_based: given in epochs, but acting at every step.
    """

    begin: int = 0
    end: int | None = None
    by_epoch: bool = True
    convert_to_iter_based: bool = False

    param_name: ClassVar[str] = "lr"  # what it drives

    def __post_init__(self) -> None:
        if self.convert_to_iter_based and not self.by_epoch:
            self._fail("convert_to_iter_based is for schedulers that count epochs; drop it or set by_epoch=True")
        if self.begin < 0 or (self.end is not None and self.end <= self.begin):
            self._fail(f"begin={self.begin} must be at least 0 and smaller than end={self.end}")

    def _fail(self, problem: str) -> None:
        raise ConfigError(f"{type(self).__name__}: {problem}")

    @property
    def length(self) -> int:
        """Number of turns; `end` is known by now."""
        assert self.end is not None
        return self.end - self.begin

    def in_steps(self, steps_per_epoch: int) -> Scheduler:
        """The same schedule counting steps instead of epochs."""
        return dataclasses.replace(self, by_epoch=False, convert_to_iter_based=False, **self._scaled(steps_per_epoch))

    def _scaled(self, n: int) -> dict[str, Any]:
        """The fields that count epochs, times `n`."""
        return dict(begin=self.begin * n, end=None if self.end is None else self.end * n)

    @abstractmethod
    def maps(self, base: float, n: int) -> Map:
        """(a, b), float64 [n]: turn k maps value to a[k] * value + b[k]. `base` is the value the run starts from."""


def _scale(factors: Any) -> Map:
    a = np.asarray(factors, np.float64)
    return a, np.zeros_like(a)


@dataclass(frozen=True, kw_only=True)
class LinearLR(Scheduler):
    """From `start_factor` to `end_factor` times the value, on a line. The last of its turns has the full value."""

    start_factor: float = 1.0 / 3
    end_factor: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (0 < self.start_factor <= 1 and 0 <= self.end_factor <= 1):
            self._fail(f"start_factor={self.start_factor} must be in (0, 1], end_factor={self.end_factor} in [0, 1]")

    def maps(self, base: float, n: int) -> Map:
        rise, k = self.end_factor - self.start_factor, np.arange(1, n)
        growth = 1 + rise / ((self.length - 1) * self.start_factor + (k - 1) * rise)
        return _scale([self.start_factor, *growth])


@dataclass(frozen=True, kw_only=True)
class ConstantLR(Scheduler):
    """`factor` times the value, until the last of its turns takes the factor back."""

    factor: float = 1.0 / 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.factor <= 1:
            self._fail(f"factor={self.factor} must be in (0, 1]")

    def maps(self, base: float, n: int) -> Map:
        a = np.ones(n)
        a[0] = self.factor
        a[self.length - 1 :] *= 1 / self.factor if self.length > 1 else 1
        return _scale(a)


@dataclass(frozen=True, kw_only=True)
class MultiStepLR(Scheduler):
    """Times `gamma` at each of the `milestones`, which count from `begin`."""

    milestones: Sequence[int]
    gamma: float = 0.1

    def _scaled(self, n: int) -> dict[str, Any]:
        return dict(super()._scaled(n), milestones=[m * n for m in self.milestones])

    def maps(self, base: float, n: int) -> Map:
        a = np.ones(n)
        for milestone in self.milestones:
            if 0 <= milestone < n:
                a[milestone] *= self.gamma
        return _scale(a)


@dataclass(frozen=True, kw_only=True)
class StepLR(Scheduler):
    """Times `gamma` at every `step_size`-th turn."""

    step_size: int
    gamma: float = 0.1

    def _scaled(self, n: int) -> dict[str, Any]:
        return dict(super()._scaled(n), step_size=self.step_size * n)

    def maps(self, base: float, n: int) -> Map:
        k = np.arange(n)
        return _scale(np.where((k > 0) & (k % self.step_size == 0), self.gamma, 1.0))


@dataclass(frozen=True, kw_only=True)
class ExponentialLR(Scheduler):
    """Times `gamma` at every turn but the first."""

    gamma: float

    def _scaled(self, n: int) -> dict[str, Any]:
        return dict(super()._scaled(n), gamma=self.gamma ** (1 / n))

    def maps(self, base: float, n: int) -> Map:
        return _scale(np.where(np.arange(n) > 0, self.gamma, 1.0))


@dataclass(frozen=True, kw_only=True)
class PolyLR(Scheduler):
    """From the value to `eta_min` as (remaining part of the turns) to the `power`."""

    eta_min: float = 0.0
    power: float = 1.0

    def maps(self, base: float, n: int) -> Map:
        a, k = np.ones(n), np.arange(1, n)
        a[1:] = (1 - 1 / (self.length - k)) ** self.power
        return a, (1 - a) * self.eta_min


@dataclass(frozen=True, kw_only=True)
class CosineAnnealingLR(Scheduler):
    """Half a cosine from the value to `eta_min` (or `eta_min_ratio` times the base value) in `T_max` turns.

    `T_max` is the number of turns by default. With fewer turns than `T_max` it stops early, with more it rises again.
    """

    T_max: int | None = None
    eta_min: float | None = None
    eta_min_ratio: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eta_min is not None and self.eta_min_ratio is not None:
            self._fail("give eta_min or eta_min_ratio, not both")

    def _scaled(self, n: int) -> dict[str, Any]:
        return dict(super()._scaled(n), T_max=None if self.T_max is None else self.T_max * n)

    def maps(self, base: float, n: int) -> Map:
        period = self.T_max or self.length
        low = base * self.eta_min_ratio if self.eta_min_ratio is not None else self.eta_min or 0.0
        height = 1 + np.cos(np.pi * np.arange(n) / period)
        a, b = np.ones(n), np.zeros(n)
        # From the very bottom there is no ratio to climb by: there it goes up by a fixed amount.
        bottom = (np.arange(n - 1) - period) % (2 * period) == 0
        a[1:][~bottom] = height[1:][~bottom] / height[:-1][~bottom]
        b[1:] = np.where(bottom, (base - low) * (1 - math.cos(math.pi / period)) / 2, (1 - a[1:]) * low)
        return a, b


@dataclass(frozen=True, kw_only=True)
class CosineAnnealingParamScheduler(CosineAnnealingLR):
    """`CosineAnnealingLR` for the setting of the optimizer called `param_name`: 'lr' or 'weight_decay'."""

    param_name: str  # type: ignore[misc]  # here an argument

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.param_name not in ("lr", "weight_decay"):
            self._fail(f"param_name={self.param_name!r}; it can be 'lr' or 'weight_decay'")


@dataclass(frozen=True, kw_only=True)
class CosineAnnealingWeightDecay(CosineAnnealingLR):
    """`CosineAnnealingLR` for the weight decay; parameters without any keep none."""

    param_name: ClassVar[str] = "weight_decay"

    def maps(self, base: float, n: int) -> Map:
        return super().maps(base, n) if base else _scale(np.ones(n))


def learning_rates(
    param_scheduler: Any, base_lr: float, total_steps: int, steps_per_epoch: int, max_epochs: int | None = None
) -> Float[np.ndarray, " total_steps"]:
    """The learning rate of every optimizer step of a run.

    Args:
        param_scheduler: a scheduler's description or a list of them, `[dict(type='LinearLR', ...), ...]`; may be empty.
        base_lr: the optimizer's learning rate times the parameter's multiplier. A schedule that goes down to a fixed
            `eta_min` is not proportional to it.
        total_steps: length of the run; what lies beyond is cut off.
        steps_per_epoch: optimizer steps of one epoch.
        max_epochs: where schedulers end that count epochs and do not say it; by default as many as the steps fill.

    Returns:
        float64 [total_steps]. Every step has its own value: look it up, never compute it anew.

    Raises:
        ConfigError: unknown scheduler or argument, or values that make no schedule.
    """
    return _table("lr", param_scheduler, base_lr, total_steps, steps_per_epoch, max_epochs)


def weight_decays(
    param_scheduler: Any, base_decay: float, total_steps: int, steps_per_epoch: int, max_epochs: int | None = None
) -> Float[np.ndarray, " total_steps"]:
    """The weight decay of every step, as `learning_rates`; constant where no scheduler drives it."""
    return _table("weight_decay", param_scheduler, base_decay, total_steps, steps_per_epoch, max_epochs)


def _table(
    param: str, param_scheduler: Any, base: float, total_steps: int, steps_per_epoch: int, max_epochs: int | None
) -> Float[np.ndarray, " total_steps"]:
    epochs = max_epochs or math.ceil(total_steps / steps_per_epoch)
    slope, shift = np.ones(total_steps), np.zeros(total_steps)
    schedulers = [s for s in _build_all(param_scheduler, total_steps, steps_per_epoch, epochs) if s.param_name == param]
    # At the first step of an epoch those that count steps act before those that count epochs.
    for scheduler in sorted(schedulers, key=lambda s: s.by_epoch):
        stride = steps_per_epoch if scheduler.by_epoch else 1
        turns = range(total_steps)[scheduler.begin * stride : scheduler.end * stride : stride]  # type: ignore[operator]
        if turns:
            where = slice(turns.start, turns.stop, turns.step)
            a, b = scheduler.maps(base, len(turns))
            slope[where] *= a
            shift[where] = a * shift[where] + b
    table, value = [], float(base)
    for factor, term in zip(slope.tolist(), shift.tolist(), strict=True):
        value = factor * value + term
        table.append(value)
    return np.asarray(table, np.float64)


def _build_all(param_scheduler: Any, total_steps: int, steps_per_epoch: int, max_epochs: int) -> list[Scheduler]:
    """The schedulers with their ends known, those to be converted counting steps."""
    if param_scheduler is None:
        return []
    if isinstance(param_scheduler, Mapping | Scheduler) or hasattr(param_scheduler, "to_dict"):
        param_scheduler = [param_scheduler]
    schedulers = []
    for cfg in param_scheduler:
        scheduler = build(cfg)
        if not isinstance(scheduler, Scheduler):
            raise ConfigError(f"param_scheduler: {type(scheduler).__name__} is not a scheduler")
        if scheduler.end is None:
            # One that would begin after the end has no turns, so that a run can be cut short for a trial.
            end = max(max_epochs if scheduler.by_epoch else total_steps, scheduler.begin + 1)
            scheduler = dataclasses.replace(scheduler, end=end)
        if scheduler.convert_to_iter_based:
            scheduler = scheduler.in_steps(steps_per_epoch)
        schedulers.append(scheduler)
    return schedulers
