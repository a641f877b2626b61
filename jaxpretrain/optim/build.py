"""`optim_wrapper` -> one optax transformation: clip, look the rates up, move each parameter by its optimizer's rule."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PyTree

from jaxpretrain.build import ConfigError, build, nearest
from jaxpretrain.optim.optimizers import Optimizer, Setting
from jaxpretrain.optim.param_groups import ParamGroup, param_groups

# What a setting is over a run: a value for each step, or for each base value (lr times lr_mult) a table of them.
Schedule = Float[np.ndarray, " total_steps"] | Callable[[float], Float[np.ndarray, " total_steps"]]

_OPTIONS = ("optimizer", "paramwise_cfg", "clip_grad", "type", "constructor", "loss_scale")
_CLIP_OPTIONS = ("type", "max_norm", "norm_type", "clip_value", "error_if_nonfinite")


def build_optimizer(
    optim_wrapper: Mapping[str, Any],
    learning_rates: Schedule,
    params: PyTree,
    weight_decays: Schedule | None = None,
) -> optax.GradientTransformation:
    """The transformation that an MMEngine `optim_wrapper` describes.

    Its state is a dictionary of `step` (int32, completed steps) and the optimizer's slots (`mu`, `nu`, `momentum`),
    each a pytree like the parameters, so sharding rules by path fit. Steps beyond the tables keep the last value.

    Args:
        optim_wrapper: dict(optimizer=dict(type='AdamW', lr=..., ...), paramwise_cfg=..., clip_grad=...). clip_grad is
            dict(max_norm=..., norm_type=2) or dict(type='value', clip_value=...).
        learning_rates: the learning rate of each step, float64 [total_steps]; parameters with an lr_mult take it times
            that. Or a function from base rate to such a table,
            `functools.partial(learning_rates, param_scheduler, total_steps=..., steps_per_epoch=...)`: exact also where
            a scheduler goes down to a fixed `eta_min`, which multipliers do not scale.
        params: the parameters, or ShapeDtypeStructs; only paths and shapes are used.
        weight_decays: as `learning_rates`, where a scheduler drives the weight decay; constant by default.

    Raises:
        ConfigError: unknown optimizer, argument or option, naming the nearest valid one.
    """
    cfg = _plain(optim_wrapper)
    optimizer = _build_rule(cfg)
    groups = param_groups(params, cfg.get("paramwise_cfg"))
    _check_momenta(optimizer, groups)
    clip = _build_clip(cfg.get("clip_grad"))
    leaves = jax.tree.leaves(groups)
    lr_curves = {
        (mult, fixed): _Curve(None if fixed else learning_rates, optimizer.lr, mult)
        for mult, fixed in {(group.lr_mult, group.fix_lr) for group in leaves}
    }
    decay_curves = {
        mult: _Curve(weight_decays, optimizer.weight_decay, mult) for mult in {group.decay_mult for group in leaves}
    }

    def init(params: PyTree) -> dict[str, Any]:
        slots = {name: jax.tree.map(jnp.zeros_like, params) for name in optimizer.slots}
        return {"step": jnp.zeros((), jnp.int32), **slots}

    def update(grads: PyTree, state: dict[str, Any], params: PyTree | None = None) -> tuple[PyTree, dict[str, Any]]:
        if params is None:
            raise ValueError("The optimizer needs the parameters: update(grads, state, params)")
        step = state["step"]
        lrs = {key: curve(step) for key, curve in lr_curves.items()}
        decays = {mult: curve(step) for mult, curve in decay_curves.items()}

        def awake(g: Array, group: ParamGroup) -> Array:
            return jnp.where(step >= group.begin, g, 0) if group.begin else g

        def move(p: Array, g: Array, group: ParamGroup, *slots: Array) -> Any:
            own_step = jnp.maximum(step + 1 - group.begin, 1)
            at = Setting(
                step=own_step.astype(jnp.promote_types(p.dtype, jnp.float32)),
                lr=lrs[group.lr_mult, group.fix_lr],
                decay=decays[group.decay_mult],
                decays=not decay_curves[group.decay_mult].is_zero,
                lars_exclude=group.lars_exclude,
                momentum=group.momentum,
            )
            old = dict(zip(optimizer.slots, slots, strict=True))
            change, new = optimizer.update(p, g.astype(p.dtype), old, at)
            if group.begin:
                change, new = awake(change, group), {k: jnp.where(step >= group.begin, new[k], old[k]) for k in new}
            return change.astype(p.dtype), new

        grads = optimizer.prepare(clip(jax.tree.map(awake, grads, groups)))
        moves = jax.tree.map(move, params, grads, groups, *(state[name] for name in optimizer.slots))
        one_move = jax.tree.structure((0, dict.fromkeys(optimizer.slots, 0)))
        updates, slots = jax.tree.transpose(jax.tree.structure(params), one_move, moves)
        return updates, {"step": step + 1, **slots}

    return optax.GradientTransformation(init, update)


def base_lr(optim_wrapper: Mapping[str, Any]) -> float:
    """The optimizer's learning rate: the given one, or its default."""
    return _build_rule(_plain(optim_wrapper)).lr


def scale_lr(optim_wrapper: Mapping[str, Any], batch_size: int, base_batch_size: int) -> dict[str, Any]:
    """A copy of `optim_wrapper` with lr times batch_size / base_batch_size (Goyal et al., 2017; `auto_scale_lr`)."""
    if not base_batch_size or base_batch_size < 0:
        raise ConfigError(
            f"auto_scale_lr.base_batch_size={base_batch_size}: set it to the batch size for which lr is meant"
        )
    cfg = copy.deepcopy(_plain(optim_wrapper))
    cfg["optimizer"]["lr"] = base_lr(cfg) * batch_size / base_batch_size
    return cfg


class _Curve:
    """A setting over the run for one multiplier: a number where it is constant, else a table to look up."""

    def __init__(self, schedule: Schedule | None, base: float, mult: float):
        if schedule is None:
            table = np.array([base * mult])
        elif callable(schedule):
            table = np.asarray(schedule(base * mult), np.float64)
        else:
            table = mult * np.asarray(schedule, np.float64)
        self.table = table[:1] if (table == table[0]).all() else table

    @property
    def is_zero(self) -> bool:
        return len(self.table) == 1 and self.table[0] == 0

    def __call__(self, step: Int[Array, ""]) -> Float[Array, ""] | float:
        return float(self.table[0]) if len(self.table) == 1 else jnp.asarray(self.table)[step]


def _build_rule(cfg: Mapping[str, Any]) -> Optimizer:
    for option in cfg:
        if option in ("dtype", "accumulative_counts"):
            raise ConfigError(f"optim_wrapper.{option}: it is a field of the config itself, set config.{option}")
        if option not in _OPTIONS:
            raise ConfigError(f"optim_wrapper has no option {option!r}.{nearest(option, _OPTIONS)}")
    # Precision is config.dtype, bfloat16 needs no loss scale; and paramwise_cfg says whether layers' rates decay.
    for option, kinds in (
        ("type", ("OptimWrapper", "AmpOptimWrapper")),
        ("constructor", ("DefaultOptimWrapperConstructor", "LearningRateDecayOptimWrapperConstructor")),
    ):
        if cfg.get(option) not in (None, *kinds):
            raise ConfigError(f"optim_wrapper.{option}={cfg[option]!r}.{nearest(cfg[option], kinds)}")
    if not cfg.get("optimizer"):
        raise ConfigError("optim_wrapper.optimizer is not set; give for example dict(type='AdamW', lr=1e-3)")
    optimizer = build(cfg["optimizer"])
    if not isinstance(optimizer, Optimizer):
        raise ConfigError(f"optim_wrapper.optimizer: {type(optimizer).__name__} is not an optimizer")
    return optimizer


def _check_momenta(optimizer: Optimizer, groups: PyTree) -> None:
    given = [group.momentum for group in jax.tree.leaves(groups) if group.momentum is not None]
    if given and "momentum" not in optimizer.slots:
        raise ConfigError(
            f"paramwise_cfg.custom_keys gives some parameters momentum={given[0]}, but {type(optimizer).__name__} has "
            "none to replace: take SGD, RMSprop or LARS, with a momentum"
        )


def _build_clip(clip_grad: Mapping[str, Any] | None) -> Callable[[PyTree], PyTree]:
    """PyTorch's clip_grad_norm_ or clip_grad_value_, over all gradients together."""
    cfg = dict(clip_grad or {})
    for option in cfg:
        if option not in _CLIP_OPTIONS:
            raise ConfigError(f"clip_grad has no option {option!r}.{nearest(option, _CLIP_OPTIONS)}")
    if not cfg:
        return lambda grads: grads
    kind = cfg.get("type", "norm")
    needed = {"norm": "max_norm", "value": "clip_value"}
    if kind not in needed or cfg.get(needed[kind]) is None or cfg.get("norm_type", 2) != 2:
        raise ConfigError(
            f"clip_grad={cfg}: give dict(max_norm=...) or dict(type='value', clip_value=...); norm_type is 2"
        )
    limit = float(cfg[needed[kind]])
    if kind == "value":
        return lambda grads: jax.tree.map(lambda g: jnp.clip(g, -limit, limit), grads)

    def clip_by_norm(grads: PyTree) -> PyTree:
        factor = jnp.minimum(1.0, limit / (optax.global_norm(grads) + 1e-6))
        return jax.tree.map(lambda g: g * factor.astype(g.dtype), grads)

    return clip_by_norm


def _plain(cfg: Any) -> dict[str, Any]:
    return cfg.to_dict() if hasattr(cfg, "to_dict") else dict(cfg)
