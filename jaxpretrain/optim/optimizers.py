"""Optimizers that agree with PyTorch's (and MMPretrain's LARS and Lamb) step by step.

An optimizer says how one parameter moves; `jaxpretrain.optim.build` makes an optax transformation of it. They are
written out rather than chained from optax's parts for three reasons: optax computes `1 - b2**t` in float32, which is
off by 1e-5 in the first step; its momentum knows no dampening and its trust ratio no weight decay; and so the state is
a plain dictionary, whose layout in checkpoints does not depend on optax.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from jaxpretrain.build import ConfigError

Slots = dict[str, Array]


class Setting(NamedTuple):
    """What holds for one parameter at one step.

    Attributes:
        step: which step this is, a float scalar, 1 for the first.
        lr: learning rate, schedule and multiplier included.
        decay: weight decay, likewise.
        decays: False where the weight decay is 0 throughout.
        lars_exclude: whether LARS leaves out the trust ratio.
        momentum: in place of the optimizer's; None: as there.
    """

    step: Float[Array, ""]
    lr: Float[Array, ""] | float
    decay: Float[Array, ""] | float
    decays: bool
    lars_exclude: bool
    momentum: float | None


@dataclass(frozen=True, kw_only=True)
class Optimizer(ABC):
    """The rule by which one parameter moves. Sub-classes are dataclasses whose fields are the arguments of PyTorch's.

    Args:
        lr: base learning rate.
        weight_decay: base weight decay.
    """

    lr: float
    weight_decay: float = 0.0

    @property
    def slots(self) -> tuple[str, ...]:
        """Names of what is remembered about each parameter, in its shape, starting from zeros."""
        return ()

    def prepare(self, grads: PyTree) -> PyTree:
        """What is done to all gradients together before the step."""
        return grads

    @abstractmethod
    def update(self, p: Array, g: Array, slots: Slots, at: Setting) -> tuple[Array, Slots]:
        """The amount to add to parameter `p` with gradient `g`, and the new slots."""


@dataclass(frozen=True, kw_only=True)
class _WithMomentum(Optimizer):
    """PyTorch's momentum: buffer = momentum * buffer + (1 - dampening) * gradient."""

    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        if self.nesterov and (self.momentum <= 0 or self.dampening != 0):
            raise ConfigError(f"{type(self).__name__}: nesterov needs a momentum and no dampening")

    @property
    def slots(self) -> tuple[str, ...]:
        return ("momentum",) if self.momentum else ()

    def _accumulate(self, g: Array, slots: Slots, at: Setting) -> tuple[Array, Slots]:
        if not self.momentum:
            return g, {}
        momentum = self.momentum if at.momentum is None else at.momentum
        # The first gradient enters undamped.
        weight = jnp.where(at.step == 1, 1.0, 1.0 - self.dampening).astype(g.dtype) if self.dampening else 1.0
        buffer = momentum * slots["momentum"] + weight * g
        return g + momentum * buffer if self.nesterov else buffer, {"momentum": buffer}


@dataclass(frozen=True, kw_only=True)
class SGD(_WithMomentum):
    """Stochastic gradient descent; `torch.optim.SGD`."""

    lr: float = 1e-3

    def update(self, p: Array, g: Array, slots: Slots, at: Setting) -> tuple[Array, Slots]:
        direction, slots = self._accumulate(g + at.decay * p, slots, at)
        return -at.lr * direction, slots


@dataclass(frozen=True, kw_only=True)
class LARS(_WithMomentum):
    """Layer-wise adaptive rates (You et al., 2017, arXiv:1708.03888) in the form of MMPretrain.

    A parameter's trust ratio is eta * |p| / (|g| + decay * |p| + eps), or 1 where it is excluded or a norm is 0. The
    learning rate is multiplied into the momentum buffer, which so remembers the rates of the past.
    """

    eta: float = 1e-3
    eps: float = 1e-8

    def update(self, p: Array, g: Array, slots: Slots, at: Setting) -> tuple[Array, Slots]:
        rate = at.lr
        if not at.lars_exclude:
            p_norm, g_norm = optax.global_norm(p), optax.global_norm(g)
            trust = self.eta * p_norm / (g_norm + at.decay * p_norm + self.eps)
            rate = rate * jnp.where((p_norm > 0) & (g_norm > 0), trust, 1.0)
        direction, slots = self._accumulate(rate * (g + at.decay * p), slots, at)
        return -direction, slots


@dataclass(frozen=True, kw_only=True)
class Adam(Optimizer):
    """Adam (Kingma & Ba, 2015) whose weight decay is part of the gradient; `torch.optim.Adam`."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    amsgrad: bool = False

    decoupled: ClassVar[bool] = False

    @property
    def slots(self) -> tuple[str, ...]:
        return ("mu", "nu", "nu_max") if self.amsgrad else ("mu", "nu")

    def update(self, p: Array, g: Array, slots: Slots, at: Setting) -> tuple[Array, Slots]:
        if not self.decoupled:
            g = g + at.decay * p
        new = _moments(g, slots, self.betas)
        nu = new["nu"]
        if self.amsgrad:
            nu = new["nu_max"] = jnp.maximum(slots["nu_max"], nu)
        direction = _adam_direction(new["mu"], nu, self.betas, self.eps, at.step)
        if self.decoupled:
            direction = direction + at.decay * p
        return -at.lr * direction, new


@dataclass(frozen=True, kw_only=True)
class AdamW(Adam):
    """Adam with weight decay apart from the gradient (Loshchilov & Hutter, 2019); `torch.optim.AdamW`."""

    weight_decay: float = 1e-2

    decoupled: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class RMSprop(Optimizer):
    """Gradients over the root of their running mean square (Tieleman & Hinton, 2012); `torch.optim.RMSprop`.

    Args:
        alpha: how much of the mean square is kept at each step.
        eps: added to the root.
        centered: whether the running mean of the gradient is taken off, so that its variance is left.
        momentum: of the scaled gradients, which enter the buffer whole.
    """

    lr: float = 1e-2
    alpha: float = 0.99
    eps: float = 1e-8
    momentum: float = 0.0
    centered: bool = False

    @property
    def slots(self) -> tuple[str, ...]:
        return ("nu",) + ("mu",) * self.centered + ("momentum",) * bool(self.momentum)

    def update(self, p: Array, g: Array, slots: Slots, at: Setting) -> tuple[Array, Slots]:
        g = g + at.decay * p
        kept, weight = self.alpha, 1 - self.alpha
        variance = kept * slots["nu"] + weight * jnp.square(g)
        new = {"nu": variance}
        if self.centered:
            new["mu"] = kept * slots["mu"] + weight * g
            variance = variance - jnp.square(new["mu"])
        direction = g / (jnp.sqrt(variance) + self.eps)
        if self.momentum:
            momentum = self.momentum if at.momentum is None else at.momentum
            direction = new["momentum"] = momentum * slots["momentum"] + direction
        return -at.lr * direction, new


@dataclass(frozen=True, kw_only=True)
class Lamb(Optimizer):
    """Adam's direction scaled layer by layer to the weights (You et al., 2020, arXiv:1904.00962), as in MMPretrain.

    Args:
        bias_correction: whether to correct the moments for starting from zero.
        grad_averaging: whether a gradient enters the first moment with weight 1 - betas[0] rather than 1.
        max_grad_norm: all gradients together are clipped to this norm; None: not.
        trust_clip: whether the trust ratio is at most 1.
        always_adapt: whether parameters without weight decay have a trust ratio too.
    """

    lr: float = 1e-3
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6
    bias_correction: bool = True
    grad_averaging: bool = True
    max_grad_norm: float | None = 1.0
    trust_clip: bool = False
    always_adapt: bool = False

    @property
    def slots(self) -> tuple[str, ...]:
        return ("mu", "nu")

    def prepare(self, grads: PyTree) -> PyTree:
        if self.max_grad_norm is None:
            return grads
        excess = jnp.maximum(optax.global_norm(grads) / self.max_grad_norm, 1.0)
        return jax.tree.map(lambda g: g / excess.astype(g.dtype), grads)

    def update(self, p: Array, g: Array, slots: Slots, at: Setting) -> tuple[Array, Slots]:
        new = _moments(g, slots, self.betas, self.grad_averaging)
        step = at.step if self.bias_correction else None
        direction = _adam_direction(new["mu"], new["nu"], self.betas, self.eps, step) + at.decay * p
        rate = at.lr
        if at.decays or self.always_adapt:
            p_norm, d_norm = optax.global_norm(p), optax.global_norm(direction)
            trust = jnp.where((p_norm > 0) & (d_norm > 0), p_norm / d_norm, 1.0)
            rate = rate * (jnp.minimum(trust, 1.0) if self.trust_clip else trust)
        return -rate * direction, new


def _moments(g: Array, slots: Slots, betas: tuple[float, float], averaging: bool = True) -> Slots:
    """Running means of the gradient and of its square."""
    b1, b2 = betas
    return {
        "mu": b1 * slots["mu"] + (1 - b1 if averaging else 1.0) * g,
        "nu": b2 * slots["nu"] + (1 - b2) * jnp.square(g),
    }


def _adam_direction(mu: Array, nu: Array, betas: tuple[float, float], eps: float, step: Array | None) -> Array:
    """mu / (sqrt(nu) + eps), both corrected for having started from zero if `step` is given."""
    if step is not None:
        mu, nu = mu / _weight_seen(betas[0], step), nu / _weight_seen(betas[1], step)
    return mu / (jnp.sqrt(nu) + eps)


def _weight_seen(beta: float, step: Float[Array, ""]) -> Float[Array, ""]:
    """1 - beta**step, without the cancellation that leaves float32 five digits at beta = 0.999."""
    return -jnp.expm1(step * (math.log(beta) if beta > 0 else -math.inf))
