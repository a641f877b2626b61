"""Barlow Twins (Zbontar et al., 2021, Self-Supervised Learning via Redundancy Reduction)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxpretrain.build import build
from jaxpretrain.methods.base import BaseSelfSupervisor, Batch, Metrics, last, pool, spread, views
from jaxpretrain.models.layers import BaseModule, BatchNorm


class CrossCorrelationLoss(BaseModule):
    """How far a correlation matrix is from the identity (equation 1).

    Args:
        lambd: weight of what is off the diagonal.
    """

    def __init__(self, lambd: float = 0.0051):
        self.lambd = lambd

    def __call__(self, cross_correlation_matrix: Float[Array, "d d"]) -> Float[Array, ""]:
        """sum_i (1 - C_ii)^2 + lambda * sum_ij C_ij^2 over i != j."""
        diagonal = jnp.diagonal(cross_correlation_matrix)
        off_diagonal = jnp.sum(jnp.square(cross_correlation_matrix)) - jnp.sum(jnp.square(diagonal))
        return jnp.sum(jnp.square(diagonal - 1)) + self.lambd * off_diagonal


class LatentCrossCorrelationHead(BaseModule):
    """Correlates the channels of two views' projections over the global batch.

    Args:
        in_channels: channels of the projections.
        loss: of the correlation matrix, `CrossCorrelationLoss`.
        init_cfg: initialisation, MMEngine's dictionaries.
    """

    def __init__(self, in_channels: int, loss: Mapping[str, Any] | nnx.Module, init_cfg: Any = None):
        self.init_cfg = init_cfg
        self.bn = BatchNorm(in_channels, affine=False)
        self.loss_module = build(loss)

    def loss(self, input: Float[Array, "b d"], target: Float[Array, "b d"]) -> Float[Array, ""]:
        """The loss of the matrix of correlations, each channel normalised over the batch."""
        dtype = jnp.promote_types(input.dtype, jnp.float32)
        a, b = self.bn(input.astype(dtype)), self.bn(target.astype(dtype))
        return self.loss_module(a.T @ b / len(a))


class BarlowTwins(BaseSelfSupervisor):
    """Two views' projections shall agree in each channel, and their channels be uncorrelated.

    The backbone gives a tuple of feature maps, the neck is the projector, the head a `LatentCrossCorrelationHead`.
    """

    def loss(self, batch: Batch, *, rngs: nnx.Rngs | None = None) -> tuple[Float[Array, ""], Metrics]:
        """The loss over the global batch; `image` is two views [B, H, W, 3]. Logs `feature_std`."""
        z1, z2 = (last(self.neck(self.backbone(view, rngs=rngs))) for view in views(batch, 2))
        return self.head.loss(z1, z2), {"feature_std": spread(z1)}

    def features(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b d"]:
        """The backbone's last feature map, averaged over positions."""
        return pool(self.backbone(images))
