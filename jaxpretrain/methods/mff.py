"""MFF (Liu et al., 2023, "Improving Pixel-based MIM by Reducing Wasted Modeling Capability")."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxpretrain.methods.base import Batch, Metrics
from jaxpretrain.methods.mae import MAE, MAEViT
from jaxpretrain.models.layers import Frozen, Linear


class MFFViT(MAEViT):
    """MAE's encoder, whose shallow layers speak to the decoder too, so that the last need not carry pixels along.

    While patches are hidden, its output is a weighted mean of the layers in `out_indices`: the last as it is, the others
    after a linear layer of their own; the weights are a softmax of learnt numbers. Whole images are encoded as by MAE's
    encoder: the last layer alone.

    Args:
        out_indices: the layers to be fused; the paper's choice for 12 layers is (0, 2, 4, 6, 8, 11).
        kwargs: other arguments of `MAEViT`.
    """

    def __init__(self, *args: Any, rngs: nnx.Rngs, **kwargs: Any):
        super().__init__(*args, rngs=rngs, **kwargs)
        count = len(self.out_indices)
        self.proj_layers = nnx.List([Linear(self.embed_dims, self.embed_dims, rngs=rngs) for _ in range(count - 1)])
        # A softmax of one number is 1: there is nothing to learn.
        self.proj_weights = (nnx.Param if count > 1 else Frozen)(jnp.ones((count, 1, 1, 1)))

    def fusion_weights(self) -> Float[Array, " layers"]:
        """The weight of each layer in `out_indices`, first layer first; they add up to 1."""
        return jax.nn.softmax(self.proj_weights[:, 0, 0, 0])

    def run_layers(self, x: Float[Array, "b n c"], *, rngs: nnx.Rngs | None = None) -> Float[Array, "b n c"]:
        """The fused output of all layers, without the final norm (`ln1`)."""
        outputs = list(self._run(x, rngs, self.out_indices)[1].values())
        outputs = [layer(out) for layer, out in zip(self.proj_layers, outputs[:-1], strict=True)] + outputs[-1:]
        weights = self.fusion_weights().astype(x.dtype)
        return sum(weight * out for weight, out in zip(weights, outputs, strict=True))


class MFF(MAE):
    """MAE with multi-level feature fusion: the backbone is an `MFFViT`, everything else is MAE's."""

    def loss(self, batch: Batch, *, rngs: nnx.Rngs | None = None) -> tuple[Float[Array, ""], Metrics]:
        """MAE's loss. Logs also `weight_0`, ...: how much each of the fused layers counts."""
        loss, metrics = super().loss(batch, rngs=rngs)
        weights = jax.lax.stop_gradient(self.backbone.fusion_weights())
        return loss, metrics | {f"weight_{i}": weight for i, weight in enumerate(weights)}
