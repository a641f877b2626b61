"""What a config's optimizer settings are over a run, for each group of parameters; nothing is trained or allocated."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from jaxpretrain.build import build
from jaxpretrain.config import to_plain
from jaxpretrain.optim.build import scale_lr
from jaxpretrain.optim.param_groups import ParamGroup, param_groups
from jaxpretrain.optim.schedules import learning_rates, weight_decays

Table = Float[np.ndarray, " total_steps"]


@dataclass(frozen=True)
class GroupCurves:
    """Settings of some parameters at every step; NaN where they sleep (`ParamGroup.begin`).

    Attributes:
        group: how they depart from the optimizer's settings.
        names: their paths.
        size: how many numbers they are, in all.
        lr, weight_decay, momentum: float64 [total_steps]. The momentum is Adam's first beta; None if there is neither.
    """

    group: ParamGroup
    names: tuple[str, ...]
    size: int
    lr: Table
    weight_decay: Table
    momentum: Table | None


@dataclass(frozen=True)
class Curve:
    """One setting at every step, with the paths and the size of all parameters that it holds for."""

    names: tuple[str, ...]
    size: int
    values: Table


def distinct(groups: Sequence[GroupCurves], parameter: str) -> list[Curve]:
    """The different curves of `lr`, `weight_decay` or `momentum`; groups in which it is the same count as one."""
    shared: dict[bytes, list[GroupCurves]] = defaultdict(list)
    for group in groups:
        if (values := getattr(group, parameter)) is not None:
            shared[values.tobytes()].append(group)
    return [
        Curve(
            tuple(name for group in same for name in group.names),
            sum(group.size for group in same),
            getattr(same[0], parameter),
        )
        for same in shared.values()
    ]


def group_curves(config: Any, steps_per_epoch: int) -> list[GroupCurves]:
    """The curves of a training run, the largest group first. Parameters whose settings never differ are one group.

    Args:
        config: the run's.
        steps_per_epoch: optimizer steps: samples // batch_size.

    Raises:
        ConfigError: mistakes in method, optimizer or schedule.
    """
    from jaxpretrain.train_state import make_method, split

    total = config.max_steps or config.max_epochs * steps_per_epoch
    length: dict[str, Any] = dict(total_steps=total, steps_per_epoch=steps_per_epoch, max_epochs=config.max_epochs)
    wrapper = to_plain(config.optim_wrapper)
    if config.auto_scale_lr.enable:
        wrapper = scale_lr(wrapper, config.batch_size, config.auto_scale_lr.base_batch_size)
    optimizer, schedulers = build(wrapper["optimizer"]), to_plain(config.param_scheduler)
    params = split(make_method(config))[1]
    groups = jax.tree.leaves(param_groups(params, wrapper.get("paramwise_cfg")))
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    members: dict[ParamGroup, list[tuple[str, int]]] = defaultdict(list)
    for (path, leaf), group in zip(leaves, groups, strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        members[replace(group, lars_exclude=False)].append((name, int(np.prod(leaf.shape))))

    own = getattr(optimizer, "momentum", None)
    own = optimizer.betas[0] if own is None and hasattr(optimizer, "betas") else own
    curves = []
    for group, found in members.items():
        awake = np.where(np.arange(total) < group.begin, np.nan, 1.0)
        lr = optimizer.lr * group.lr_mult
        rates = np.full(total, lr) if group.fix_lr else learning_rates(schedulers, lr, **length)
        decays = weight_decays(schedulers, optimizer.weight_decay * group.decay_mult, **length)
        momentum = own if group.momentum is None else group.momentum
        names, sizes = zip(*found, strict=True)
        curves.append(
            GroupCurves(
                group, names, sum(sizes), awake * rates, awake * decays, None if momentum is None else awake * momentum
            )
        )
    return sorted(curves, key=lambda one: -one.size)
