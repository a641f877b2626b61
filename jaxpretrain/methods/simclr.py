"""SimCLR (Chen et al., 2020, A Simple Framework for Contrastive Learning of Visual Representations)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from jaxpretrain.build import build
from jaxpretrain.methods.base import BaseSelfSupervisor, Batch, Metrics, last, normalize, pool, spread, views
from jaxpretrain.models.layers import BaseModule

# A similarity that no cosine reaches: e^(_NEVER / temperature) is exactly 0 for temperatures up to 10, also in float64.
# (-inf would do too, but a loss with one-hot labels multiplies it by 0.)
_NEVER = -1e4


class ContrastiveHead(BaseModule):
    """Cross entropy that picks the positive among negatives by similarity / temperature (InfoNCE).

    Args:
        loss: the classification loss, called with logits and labels.
        temperature: divides the similarities.
    """

    def __init__(self, loss: Mapping[str, Any] | nnx.Module, temperature: float = 0.1, init_cfg: Any = None):
        self.loss_module, self.temperature, self.init_cfg = build(loss), temperature, init_cfg

    def loss(
        self, pos: Float[Array, "n 1"], neg: Float[Array, "n k"], excluded: Bool[Array, "n k"] | None = None
    ) -> Float[Array, ""]:
        """The loss of positive and negative similarities; those that are `excluded` do not count."""
        if excluded is not None:
            neg = jnp.where(excluded, jnp.asarray(_NEVER, neg.dtype), neg)
        logits = jnp.concatenate([pos, neg], axis=1) / self.temperature
        return self.loss_module(logits, jnp.zeros(logits.shape[0], jnp.int32))


class SimCLR(BaseSelfSupervisor):
    """Two views of an image shall be more alike than views of different images (NT-Xent, section 2.1).

    Negatives are all other images of the global batch. Both views pass the network as one batch of 2B, the views of an
    image side by side, so BatchNorm sees both and its groups keep them together.

    The backbone gives a tuple of feature maps, the neck is the projector, the head a `ContrastiveHead`.
    """

    def loss(self, batch: Batch, *, rngs: nnx.Rngs | None = None) -> tuple[Float[Array, ""], Metrics]:
        """NT-Xent over the global batch; `image` is two views [B, H, W, 3]. Logs `feature_std`."""
        first, second = views(batch, 2)
        images = jnp.stack([first, second], axis=1).reshape(-1, *first.shape[1:])
        z = normalize(last(self.neck(self.backbone(images, rngs=rngs))))
        similarity = z @ z.T
        image = jnp.arange(len(z)) // 2  # which image a row is a view of
        pos = jnp.sum(z * z.reshape(-1, 2, z.shape[1])[:, ::-1].reshape(z.shape), axis=1, keepdims=True)
        loss = self.head.loss(pos, similarity, excluded=image[:, None] == image)
        return loss, {"feature_std": spread(z)}

    def features(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b d"]:
        """The backbone's last feature map, averaged over positions: what comes before the projector."""
        return pool(self.backbone(images))
