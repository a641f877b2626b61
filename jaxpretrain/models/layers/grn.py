"""Global response normalisation."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


class GRN(nnx.Module):
    """Lets channels compete: x + gamma * (x * n) + beta, n being the channel's norm over that of the average channel.

    Norms are Euclidean, over all positions of an image. It starts as the identity, and so do blocks that have it need no
    layer scale (ConvNeXt V2: Woo et al., 2023, https://arxiv.org/abs/2301.00808, section 4).

    Args:
        in_channels: channels.
        eps: added to the mean norm.
    """

    def __init__(self, in_channels: int, eps: float = 1e-6):
        self.eps = eps
        self.gamma = nnx.Param(jnp.zeros((in_channels,), jnp.float32))
        self.beta = nnx.Param(jnp.zeros((in_channels,), jnp.float32))

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        y = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        squares = jnp.sum(jnp.square(y), axis=(1, 2), keepdims=True)
        # A channel of zeros has the norm 0, and the gradient 0 like PyTorch's: that of the root is infinite.
        norm = jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1)), 0)
        response = norm / (norm.mean(axis=-1, keepdims=True) + self.eps)
        return (y * (1 + self.gamma[...] * response) + self.beta[...]).astype(x.dtype)
