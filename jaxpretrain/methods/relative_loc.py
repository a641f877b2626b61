"""Relative location (Doersch et al., 2015, Unsupervised Visual Representation Learning by Context Prediction)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxpretrain.methods.base import BaseSelfSupervisor, Batch, Metrics, last, pool, spread, views
from jaxpretrain.models.layers import BaseModule, Dropout, Linear, build_norm
from jaxpretrain.models.layers.conv import global_avg_pool, relu

NEIGHBOURS = 8

_INIT = (
    {"type": "Normal", "std": 0.01, "layer": "Linear"},
    {"type": "Constant", "val": 1, "layer": ["_BatchNorm", "GroupNorm"]},
)


class RelativeLocNeck(BaseModule):
    """fc-bn-relu-dropout of the features of two patches, side by side.

    Args:
        in_channels: channels of one patch's features.
        out_channels: width of the output.
        with_avg_pool: whether to average over positions first.
        norm_cfg: the norm, as for `build_norm`; its momentum is 0.003.
        init_cfg: initialisation, MMEngine's dictionaries.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        with_avg_pool: bool = True,
        norm_cfg: Mapping[str, Any] = {"type": "BN1d"},
        init_cfg: Any = _INIT,
        *,
        rngs: nnx.Rngs,
    ):
        self.init_cfg, self.with_avg_pool = init_cfg, with_avg_pool
        self.fc = Linear(2 * in_channels, out_channels, rngs=rngs)
        self.bn = build_norm({**norm_cfg, "momentum": 0.003}, out_channels, rngs=rngs)
        self.dropout = Dropout(0.5)

    def __call__(self, x: Any, *, rngs: nnx.Rngs | None = None) -> tuple[Float[Array, "b d"]]:
        """[B, H, W, 2 * in_channels], or a tuple of which the last is that -> ([B, out_channels],)."""
        x = last(x)
        x = global_avg_pool(x) if self.with_avg_pool else x
        x = relu(self.bn(self.fc(x.reshape(len(x), -1))))
        return (self.dropout(x, rngs=rngs),)


class RelativeLoc(BaseSelfSupervisor):
    """Where does a patch lie, seen from the centre: one of eight places around it.

    The host's `RandomPatchWithLabels` cuts the patches. The backbone gives a tuple of feature maps, the neck is a
    `RelativeLocNeck`, the head classifies into 8 places: row by row from the upper left, without the centre.
    """

    def loss(self, batch: Batch, *, rngs: nnx.Rngs | None = None) -> tuple[Float[Array, ""], Metrics]:
        """Cross entropy; `image` is 9 patches [B, H, W, 3], the centre first.

        Logs `feature_std` of the neighbours' features, and what the head does.
        """
        centre, *around = views(batch, 1 + NEIGHBOURS)
        # BatchNorm sees centres and neighbours apart, as in MMSelfSup.
        inner = last(self.backbone(centre, rngs=rngs))
        patches = jnp.stack(around, axis=1).reshape(-1, *centre.shape[1:])
        outer = last(self.backbone(patches, rngs=rngs))
        pairs = jnp.concatenate([outer, jnp.repeat(inner, NEIGHBOURS, axis=0)], axis=-1)
        places = jnp.tile(jnp.arange(NEIGHBOURS), len(centre))
        loss, metrics = self.head.loss(self.neck((pairs,), rngs=rngs), places, rngs=rngs)
        return loss, {"feature_std": spread(pool(outer)), **metrics}

    def features(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b d"]:
        """The backbone's last feature map, averaged over positions."""
        return pool(self.backbone(images))
