"""BYOL (Grill et al., 2020, Bootstrap Your Own Latent)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from jaxpretrain.build import build
from jaxpretrain.methods.base import Batch, Metrics, Progress, last, normalize, spread, views
from jaxpretrain.methods.momentum_encoder import MomentumMethod
from jaxpretrain.models.layers import BaseModule
from jaxpretrain.optim.ema import cosine_ema_momentum


class CosineSimilarityLoss(BaseModule):
    """shift - scale * cosine of prediction and target, averaged over vectors.

    Args:
        shift_factor, scale_factor: 0 and 1 give the negative cosine, 2 and 2 the squared distance of unit vectors.
    """

    def __init__(self, shift_factor: float = 0.0, scale_factor: float = 1.0):
        self.shift_factor, self.scale_factor = shift_factor, scale_factor

    def __call__(
        self,
        pred: Float[Array, "*batch d"],
        target: Float[Array, "*batch d"],
        mask: Float[Array, "*batch"] | None = None,
    ) -> Float[Array, ""]:
        """The mean over all vectors; with a mask, over those where it is 1."""
        loss = self.shift_factor - self.scale_factor * jnp.sum(normalize(pred) * normalize(target), axis=-1)
        return loss.mean() if mask is None else jnp.sum(loss * mask) / jnp.sum(mask)


class LatentPredictHead(BaseModule):
    """Predicts one view's projection from the other's, by a small network on one side alone (BYOL, SimSiam).

    Args:
        loss: compares prediction and target, `CosineSimilarityLoss`.
        predictor: the network; a dictionary with `type`, or a module.
        init_cfg: initialisation, MMEngine's dictionaries.
    """

    def __init__(
        self,
        loss: Mapping[str, Any] | nnx.Module,
        predictor: Mapping[str, Any] | nnx.Module,
        init_cfg: Any = None,
        *,
        rngs: nnx.Rngs,
    ):
        self.init_cfg = init_cfg
        self.loss_module = build(loss)
        self.predictor = build(predictor, rngs=rngs)

    def loss(self, input: Float[Array, "b d"], target: Float[Array, "b d"]) -> Float[Array, ""]:
        """The loss of a projection against a target, through which no gradient passes."""
        return self.loss_module(last(self.predictor([input])), lax.stop_gradient(target))


class BYOL(MomentumMethod):
    """Predicts the momentum encoder's projection of one view from the online projection of the other (equation 2).

    After optimizer step s of S the momentum encoder moves by base / 2 * (1 + cos(pi s / S)). The backbone gives a tuple of
    feature maps, the neck is the projector, the head a `LatentPredictHead`.

    Args:
        base_momentum: how far the momentum encoder moves at the start (the paper's tau is 1 minus this).
        parts: arguments of `BaseSelfSupervisor`.
    """

    teacher_name: ClassVar = "target_net"

    def __init__(self, base_momentum: float = 0.004, *, rngs: nnx.Rngs, **parts: Any):
        super().__init__(rngs=rngs, **parts)
        self.base_momentum = base_momentum

    def loss(self, batch: Batch, *, rngs: nnx.Rngs | None = None) -> tuple[Float[Array, ""], Metrics]:
        """Twice the sum of both directions' losses; `image` is two views [B, H, W, 3]. Logs `feature_std`."""
        first, second = views(batch, 2)
        online1, online2 = (last(self.neck(self.backbone(view, rngs=rngs))) for view in (first, second))
        target1, target2 = map(last, self.teach(first, second, rngs=rngs))
        loss = 2 * (self.head.loss(online1, target2) + self.head.loss(online2, target1))
        return loss, {"feature_std": spread(online1)}

    def teacher_momentum(self, progress: Progress) -> Float[Array, ""]:
        return cosine_ema_momentum(progress.step, self.base_momentum, 0.0, progress.total_steps)
