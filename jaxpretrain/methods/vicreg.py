"""VICReg: Variance-Invariance-Covariance Regularization for Self-Supervised Learning (Bardes, Ponce & LeCun, 2022)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxpretrain.build import build
from jaxpretrain.methods.base import BaseSelfSupervisor, Batch, Metrics, last, pool, spread, views
from jaxpretrain.models.layers import BaseModule


class VICRegLoss(BaseModule):
    """Embeddings of two views shall be near (invariance), and each batch's channels spread and uncorrelated.

    The variance term is the mean of both views', as in the release; in the paper (equation 6), their sum.

    Args:
        sim_coeff, std_coeff, cov_coeff: weights of invariance, variance and covariance (lambda, mu, nu).
        gamma: the standard deviation that each channel shall have at least.
        eps: added to variances.
    """

    def __init__(
        self,
        sim_coeff: float = 25.0,
        std_coeff: float = 25.0,
        cov_coeff: float = 1.0,
        gamma: float = 1.0,
        eps: float = 1e-4,
    ):
        self.sim_coeff, self.std_coeff, self.cov_coeff = sim_coeff, std_coeff, cov_coeff
        self.gamma, self.eps = gamma, eps

    def __call__(self, z1: Float[Array, "b d"], z2: Float[Array, "b d"]) -> dict[str, Float[Array, ""]]:
        """The three weighted terms, `loss_invariance`, `loss_variance` and `loss_covariance`; float32 at least."""
        dtype = jnp.promote_types(z1.dtype, jnp.float32)
        z1, z2 = z1.astype(dtype), z2.astype(dtype)
        return {
            "loss_invariance": self.sim_coeff * jnp.mean(jnp.square(z1 - z2)),
            "loss_variance": self.std_coeff * (self._variance(z1) + self._variance(z2)) / 2,
            "loss_covariance": self.cov_coeff * (_covariance(z1) + _covariance(z2)),
        }

    def _variance(self, z: Float[Array, "b d"]) -> Float[Array, ""]:
        """How far the channels' standard deviations are below gamma, on average (equations 1 and 2)."""
        std = jnp.sqrt(z.var(axis=0, ddof=1) + self.eps)
        return jnp.mean(jnp.maximum(self.gamma - std, 0))


def _covariance(z: Float[Array, "b d"]) -> Float[Array, ""]:
    """The sum of squared covariances of different channels, divided by their number (equations 3 and 4)."""
    count, channels = z.shape
    z = z - z.mean(axis=0)
    covariance = z.T @ z / (count - 1)
    others = 1 - jnp.eye(channels, dtype=z.dtype)
    return jnp.sum(jnp.square(covariance) * others) / channels


class VICRegHead(BaseModule):
    """Hands the embeddings of two views to the loss.

    Args:
        loss: `VICRegLoss`, the default.
        init_cfg: initialisation, MMEngine's dictionaries.
    """

    def __init__(self, loss: Mapping[str, Any] | nnx.Module | None = None, init_cfg: Any = None):
        self.init_cfg = init_cfg
        self.loss_module = VICRegLoss() if loss is None else build(loss)

    def loss(self, input: Float[Array, "b d"], target: Float[Array, "b d"]) -> dict[str, Float[Array, ""]]:
        """The terms of the loss, by name."""
        return self.loss_module(input, target)


class VICReg(BaseSelfSupervisor):
    """Two views' embeddings shall be near, and must not collapse: neither networks nor their parts are asymmetric.

    The backbone gives a tuple of feature maps, the neck is the expander, the head a `VICRegHead`.
    """

    def loss(self, batch: Batch, *, rngs: nnx.Rngs | None = None) -> tuple[Float[Array, ""], Metrics]:
        """The loss over the global batch; `image` is two views [B, H, W, 3]. Logs its terms and `feature_std`."""
        z1, z2 = (last(self.neck(self.backbone(view, rngs=rngs))) for view in views(batch, 2))
        terms = self.head.loss(z1, z2)
        return sum(terms.values(), jnp.zeros(())), {**terms, "feature_std": spread(z1)}

    def features(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b d"]:
        """The backbone's last feature map, averaged over positions."""
        return pool(self.backbone(images))
