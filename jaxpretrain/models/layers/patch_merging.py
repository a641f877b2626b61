"""Downsampling of token maps by merging neighbours (Swin Transformer)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxpretrain.build import ConfigError
from jaxpretrain.models.layers.base import BaseModule
from jaxpretrain.models.layers.linear import Linear
from jaxpretrain.models.layers.norm import build_norm


class PatchMerging(BaseModule):
    """Joins the channels of `kernel_size` x `kernel_size` tokens, and maps them linearly to `out_channels`.

    The joined channels are ordered (channel, row, column), as PyTorch's `unfold` has them and MMPretrain's checkpoints
    need it; Swin's own release has (column, row, channel). Sides that are not multiples get zeros at the bottom and right.

    Args:
        in_channels, out_channels: channels of input and output.
        kernel_size: tokens along each side that become one.
        stride: accepted for MMPretrain's settings; must be None or `kernel_size`.
        bias: whether the linear map has a bias.
        norm_cfg: the norm, of the joined channels; None for none.
        use_post_norm: whether to normalise the output instead (Swin v2).

    Raises:
        ConfigError: a stride that is not `kernel_size`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 2,
        stride: int | None = None,
        bias: bool = False,
        norm_cfg: Mapping[str, Any] | None = {"type": "LN"},
        use_post_norm: bool = False,
        init_cfg: Any = None,
        *,
        rngs: nnx.Rngs,
    ):
        if stride not in (None, kernel_size):
            raise ConfigError(
                f"PatchMerging: stride={stride} must be kernel_size={kernel_size}; tokens are merged once"
            )
        self.init_cfg, self.kernel_size, self.use_post_norm = init_cfg, kernel_size, use_post_norm
        self.out_channels = out_channels
        joined = kernel_size**2 * in_channels
        self.reduction = Linear(joined, out_channels, bias=bias, rngs=rngs)
        width = out_channels if use_post_norm else joined
        self.norm = build_norm(norm_cfg, width, rngs=rngs) if norm_cfg is not None else None

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        b, height, width, c = x.shape
        k = self.kernel_size
        h, w = -(-height // k), -(-width // k)
        if (h * k, w * k) != (height, width):
            x = jnp.pad(x, ((0, 0), (0, h * k - height), (0, w * k - width), (0, 0)))
        x = x.reshape(b, h, k, w, k, c).transpose(0, 1, 3, 5, 2, 4).reshape(b, h, w, c * k * k)
        if self.norm is None:
            return self.reduction(x)
        return self.norm(self.reduction(x)) if self.use_post_norm else self.reduction(self.norm(x))
