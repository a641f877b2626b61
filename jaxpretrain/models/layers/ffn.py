"""The feed-forward halves of transformer blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import jax
from flax import nnx
from jaxtyping import Array, Float

from jaxpretrain.models.layers.activation import activation
from jaxpretrain.models.layers.base import BaseModule
from jaxpretrain.models.layers.drop import Dropout
from jaxpretrain.models.layers.layer_scale import LayerScale
from jaxpretrain.models.layers.linear import Linear
from jaxpretrain.models.layers.norm import build_norm


class FFN(BaseModule):
    """fc2(act(fc1(x))) on each token, with dropout after both. The residual is the caller's.

    Args:
        embed_dims: channels of input and output.
        feedforward_channels: channels in between.
        act_cfg: the activation; exact GELU by default.
        ffn_drop: dropout rate in training.
        layer_scale_init_value: start of a LayerScale on the output (`gamma2`); 0 for none.
    """

    state_names: ClassVar = {"fc1": "layers.0.0", "fc2": "layers.1"}

    def __init__(
        self,
        embed_dims: int,
        feedforward_channels: int,
        act_cfg: Mapping[str, Any] = {"type": "GELU"},
        ffn_drop: float = 0.0,
        layer_scale_init_value: float = 0.0,
        *,
        rngs: nnx.Rngs,
    ):
        self.act = activation(act_cfg)
        self.fc1 = Linear(embed_dims, feedforward_channels, rngs=rngs)
        self.fc2 = Linear(feedforward_channels, embed_dims, rngs=rngs)
        self.drop = Dropout(ffn_drop)
        self.gamma2 = LayerScale(embed_dims, layer_scale_init_value) if layer_scale_init_value else None

    def __call__(self, x: Float[Array, "*batch c"], *, rngs: nnx.Rngs | None = None) -> Float[Array, "*batch c"]:
        x = self.drop(self.act(self.fc1(x)), rngs=rngs)
        x = self.drop(self.fc2(x), rngs=rngs)
        return x if self.gamma2 is None else self.gamma2(x)


class SwiGLUFFN(BaseModule):
    """w3(norm(silu(a) * b)) with (a, b) = w12(x): the gated feed-forward layer (Shazeer, 2020).

    Args:
        embed_dims: channels of input and output.
        feedforward_channels: channels in between, of a and of b.
        ffn_drop: dropout rate of the output, in training.
        layer_scale_init_value: start of a LayerScale on the output (`gamma2`); 0 for none.
        norm_cfg: a norm before the last layer (`norm`, the "sub-LN" of EVA-02); none by default.
    """

    def __init__(
        self,
        embed_dims: int,
        feedforward_channels: int,
        ffn_drop: float = 0.0,
        layer_scale_init_value: float = 0.0,
        norm_cfg: Mapping[str, Any] | None = None,
        *,
        rngs: nnx.Rngs,
    ):
        self.w12 = Linear(embed_dims, 2 * feedforward_channels, rngs=rngs)
        self.norm = build_norm(norm_cfg, feedforward_channels, rngs=rngs) if norm_cfg else None
        self.w3 = Linear(feedforward_channels, embed_dims, rngs=rngs)
        self.drop = Dropout(ffn_drop)
        self.gamma2 = LayerScale(embed_dims, layer_scale_init_value) if layer_scale_init_value else None

    def __call__(self, x: Float[Array, "*batch c"], *, rngs: nnx.Rngs | None = None) -> Float[Array, "*batch c"]:
        hidden = self.w12(x)
        gate, value = hidden[..., : self.w3.in_features], hidden[..., self.w3.in_features :]
        hidden = jax.nn.silu(gate) * value
        x = self.drop(self.w3(hidden if self.norm is None else self.norm(hidden)), rngs=rngs)
        return x if self.gamma2 is None else self.gamma2(x)


class SwiGLUFFNFused(SwiGLUFFN):
    """The gated feed-forward layer of DINOv2's giant, as wide as makes it about as large as an `FFN`.

    A gated layer has three matrices for two, so the hidden width is 2/3 of `feedforward_channels`, rounded up to a
    multiple of 8. Arguments as for `FFN`; it has no activation to choose.
    """

    def __init__(
        self,
        embed_dims: int,
        feedforward_channels: int,
        ffn_drop: float = 0.0,
        layer_scale_init_value: float = 0.0,
        *,
        rngs: nnx.Rngs,
    ):
        hidden = -(-int(feedforward_channels * 2 / 3) // 8) * 8
        super().__init__(embed_dims, hidden, ffn_drop, layer_scale_init_value, rngs=rngs)
