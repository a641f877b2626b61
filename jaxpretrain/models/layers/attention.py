"""Multi-head self-attention."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxpretrain.build import ConfigError
from jaxpretrain.models.layers.base import BaseModule
from jaxpretrain.models.layers.drop import Dropout
from jaxpretrain.models.layers.intermediates import record, wanted
from jaxpretrain.models.layers.layer_scale import LayerScale
from jaxpretrain.models.layers.linear import Linear


def scaled_dot_product_attention(
    module: nnx.Module,
    q: Float[Array, "b n h d"],
    k: Float[Array, "b m h d"],
    v: Float[Array, "b m h e"],
    *,
    scale: float,
    bias: Float[Array, "..."] | None = None,
    dropout: Dropout | None = None,
    rngs: nnx.Rngs | None = None,
) -> Float[Array, "b n h e"]:
    """softmax(scale * q k^T + bias) v for each head, in the dtype of q; the softmax is taken in float32 at least.

    Args:
        module: whose attention this is: the softmaxed weights [B, heads, N, M] are its intermediate "weights".
        q, k, v: queries, keys and values.
        scale: factor of the products of queries and keys.
        bias: added to the logits; broadcastable to [B, heads, N, M].
        dropout: dropout of the weights, with `rngs` in training.
    """
    dropping = dropout is not None and dropout.rate and not dropout.deterministic
    alike = q.shape[-1] == v.shape[-1]
    if alike and q.dtype != jnp.float64 and not dropping and not wanted(module, "weights"):
        if bias is not None:
            bias = bias.reshape((1,) * (4 - bias.ndim) + bias.shape)
        # cuDNN's kernel learns a bias for even numbers of tokens only; 14x14 patches with a class token are odd, as are
        # Swin's windows of 7x7.
        cudnn = bias is None and _has_cudnn_kernel(q)
        return jax.nn.dot_product_attention(q, k, v, bias, scale=scale, implementation="cudnn" if cudnn else "xla")
    # By hand: JAX's function has no dropout, shows no weights, takes the softmax in float32 even of float64 logits, and
    # wants values to have as many channels as keys.
    logits = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.promote_types(q.dtype, jnp.float32))
    logits = logits * scale if bias is None else (logits * scale + bias).astype(logits.dtype)
    weights = jax.nn.softmax(logits, axis=-1).astype(q.dtype)
    record(module, "weights", weights)
    return jnp.einsum("bhqk,bkhd->bqhd", weights if dropout is None else dropout(weights, rngs=rngs), v)


class MultiheadAttention(BaseModule):
    """Self-attention with `num_heads` heads of `embed_dims / num_heads` channels each (Vaswani et al., 2017).

    One matmul makes queries, keys and values; its outputs are ordered (q k v, head, channel).

    Args:
        embed_dims: channels of input and output.
        num_heads: number of heads; must divide `embed_dims`.
        attn_drop: dropout of the attention weights, in training.
        proj_drop: dropout of the output, in training.
        qkv_bias: whether queries, keys and values have a bias.
        qk_scale: factor of the logits; 1 / sqrt(channels of a head) if None.
        proj_bias: whether the output projection has a bias.
        layer_scale_init_value: start of a LayerScale on the output (`gamma1`); 0 for none.

    Raises:
        ConfigError: `num_heads` does not divide `embed_dims`.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        proj_bias: bool = True,
        layer_scale_init_value: float = 0.0,
        *,
        rngs: nnx.Rngs,
    ):
        if embed_dims % num_heads:
            raise ConfigError(f"MultiheadAttention: embed_dims={embed_dims} is not a multiple of num_heads={num_heads}")
        self.num_heads, self.head_dims = num_heads, embed_dims // num_heads
        self.scale = self.head_dims**-0.5 if qk_scale is None else qk_scale
        self.qkv = Linear(embed_dims, 3 * embed_dims, bias=qkv_bias, rngs=rngs)
        self.attn_drop = Dropout(attn_drop)
        self.proj = Linear(embed_dims, embed_dims, bias=proj_bias, rngs=rngs)
        self.proj_drop = Dropout(proj_drop)
        self.gamma1 = LayerScale(embed_dims, layer_scale_init_value) if layer_scale_init_value else None

    def __call__(self, x: Float[Array, "b n c"], *, rngs: nnx.Rngs | None = None) -> Float[Array, "b n c"]:
        return self.attend(*self.heads(x), rngs=rngs)

    # The two halves of the call, for attention that does something with queries and keys in between.

    def heads(self, x: Float[Array, "b n c"]) -> tuple[Float[Array, "b n h d"], ...]:
        """Queries, keys and values."""
        qkv = self.qkv(x).reshape(*x.shape[:2], 3, self.num_heads, self.head_dims)
        return qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]

    def attend(
        self,
        q: Float[Array, "b n h d"],
        k: Float[Array, "b n h d"],
        v: Float[Array, "b n h d"],
        *,
        bias: Float[Array, "..."] | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "b n c"]:
        """The projected mean of values. `bias` is added to the logits; broadcastable to [B, heads, N, N]."""
        y = scaled_dot_product_attention(self, q, k, v, scale=self.scale, bias=bias, dropout=self.attn_drop, rngs=rngs)
        y = self.proj_drop(self.proj(y.reshape(*y.shape[:2], -1)), rngs=rngs)
        return y if self.gamma1 is None else self.gamma1(y)


def _has_cudnn_kernel(q: Float[Array, "b n h d"]) -> bool:
    """Whether cuDNN's fused attention takes these queries: half precision, heads of 8, 16, ... 128, on NVIDIA."""
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    return half and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128 and "NVIDIA" in jax.devices()[0].device_kind
