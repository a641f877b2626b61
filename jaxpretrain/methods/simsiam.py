"""SimSiam (Chen & He, 2021, Exploring Simple Siamese Representation Learning)."""

from __future__ import annotations

from flax import nnx
from jaxtyping import Array, Float

from jaxpretrain.methods.base import BaseSelfSupervisor, Batch, Metrics, last, pool, spread, views


class SimSiam(BaseSelfSupervisor):
    """Predicts each view's projection from the other's; only that no gradient passes the target prevents collapse.

    The backbone gives a tuple of feature maps, the neck is the projector, the head a `LatentPredictHead`, whose predictor
    keeps its learning rate in the paper (`param_groups`: `fix_lr`).
    """

    def loss(self, batch: Batch, *, rngs: nnx.Rngs | None = None) -> tuple[Float[Array, ""], Metrics]:
        """The mean of both directions' losses (algorithm 1); `image` is two views [B, H, W, 3]. Logs `feature_std`."""
        z1, z2 = (last(self.neck(self.backbone(view, rngs=rngs))) for view in views(batch, 2))
        return (self.head.loss(z1, z2) + self.head.loss(z2, z1)) / 2, {"feature_std": spread(z1)}

    def features(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b d"]:
        """The backbone's last feature map, averaged over positions."""
        return pool(self.backbone(images))
