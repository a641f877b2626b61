"""Rotation prediction (Gidaris et al., 2018, Unsupervised Representation Learning by Predicting Image Rotations)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxpretrain.methods.base import BaseSelfSupervisor, Batch, Metrics, pool, spread, views

ROTATIONS = 4


class RotationPred(BaseSelfSupervisor):
    """By how much was an image turned: 0, 90, 180 or 270 degrees.

    The host's `RotationWithLabels` turns it. The backbone gives a tuple of feature maps, the head classifies into 4.

    Args:
        backbone: the network to be trained for later use.
        neck: what comes between backbone and head, such as `GlobalAveragePooling`; None: nothing.
        head: the classifier.
        parts: arguments of `BaseSelfSupervisor`.
    """

    def __init__(
        self,
        backbone: Mapping[str, Any] | nnx.Module,
        neck: Mapping[str, Any] | nnx.Module | None = None,
        head: Mapping[str, Any] | nnx.Module | None = None,
        *,
        rngs: nnx.Rngs,
        **parts: Any,
    ):
        super().__init__(backbone, neck, head, rngs=rngs, **parts)

    def loss(self, batch: Batch, *, rngs: nnx.Rngs | None = None) -> tuple[Float[Array, ""], Metrics]:
        """Cross entropy; `image` is the image at all four angles [B, H, W, 3].

        All pass the network as one batch. Logs `feature_std`, and what the head does.
        """
        turned = views(batch, ROTATIONS)
        images = jnp.stack(turned, axis=1).reshape(-1, *turned[0].shape[1:])
        outputs = self.backbone(images, rngs=rngs)
        angles = jnp.tile(jnp.arange(ROTATIONS), len(turned[0]))
        loss, metrics = self.head.loss(outputs if self.neck is None else self.neck(outputs), angles, rngs=rngs)
        return loss, {"feature_std": spread(pool(outputs)), **metrics}

    def features(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b d"]:
        """The backbone's last feature map, averaged over positions."""
        return pool(self.backbone(images))
