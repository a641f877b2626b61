"""The tokenizer of BEiT v2 (Peng et al., 2022): vector-quantized knowledge distillation, VQ-KD."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxpretrain.build import ConfigError, build
from jaxpretrain.models.layers.base import BaseModule, Frozen
from jaxpretrain.models.layers.init import normal
from jaxpretrain.models.layers.linear import Linear


def unit_rows(x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
    """Vectors of length 1, in float32 at least; zeros stay so."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=-1, keepdims=True), 1e-24))


def nearest_code(x: Float[Array, "*b d"], codes: Float[Array, "k d"]) -> Int[Array, "*b"]:
    """The index of the code at the smallest distance from each vector, the first of equally near ones; int32.

    Products are computed exactly: in the reduced precision of accelerators, near codes would be confused.
    """
    codes = codes.astype(x.dtype)
    products = jnp.matmul(x, codes.T, precision="highest")
    return jnp.argmin(jnp.sum(jnp.square(codes), axis=1) - 2 * products, axis=-1).astype(jnp.int32)


class Codebook(BaseModule):
    """`weight` [K, D], and whether it has been initialised (`initted`, 0 or 1), as MMPretrain's checkpoints have them.

    Args:
        num_tokens, codebook_dim: K and D.
        kmeans_init: whether training would begin from k-means of the first batch: zeros until then. Else random codes.
    """

    def __init__(self, num_tokens: int, codebook_dim: int, kmeans_init: bool = True, *, rngs: nnx.Rngs):
        shape = (num_tokens, codebook_dim)
        self.weight = Frozen(jnp.zeros(shape) if kmeans_init else unit_rows(normal()(rngs.params(), shape)))
        self.initted = nnx.BatchStat(jnp.full((1,), float(not kmeans_init)))


class NormEMAVectorQuantizer(BaseModule):
    """Replaces vectors by the nearest of K codes, all of unit length; codes are moving averages of their vectors.

    A call changes nothing. Whoever trains a tokenizer calls `update` after it.

    Args:
        num_embed, embed_dims: number and size of the codes.
        beta: weight of the commitment loss.
        decay: of the moving averages.
        kmeans_init: as of `Codebook`.

    Attributes:
        embedding: the `Codebook`.
        cluster_size: moving average of how many vectors of a batch take each code.
    """

    def __init__(
        self,
        num_embed: int,
        embed_dims: int,
        beta: float,
        decay: float = 0.99,
        kmeans_init: bool = True,
        *,
        rngs: nnx.Rngs,
    ):
        self.beta, self.decay = beta, decay
        self.embedding = Codebook(num_embed, embed_dims, kmeans_init, rngs=rngs)
        self.cluster_size = nnx.BatchStat(jnp.zeros((num_embed,)))

    def __call__(self, z: Float[Array, "*b d"]) -> tuple[Float[Array, "*b d"], Float[Array, ""], Int[Array, "*b"]]:
        """The codes, with the gradient of unit vectors (straight through); the commitment loss; the codes' indices."""
        z = unit_rows(z)
        index = nearest_code(z, self.embedding.weight[...])
        codes = self.embedding.weight[...][index].astype(z.dtype)
        loss = self.beta * jnp.mean(jnp.square(jax.lax.stop_gradient(codes) - z))
        return z + jax.lax.stop_gradient(codes - z), loss, index

    def update(self, z: Float[Array, "*b d"], index: Int[Array, "*b"]) -> None:
        """Moves each code that vectors took towards their mean, in place (van den Oord et al., 2017, appendix A.1).

        Args:
            z: what was quantized.
            index: which codes it took.
        """
        weight = self.embedding.weight
        z = unit_rows(jax.lax.stop_gradient(z)).reshape(-1, weight.shape[1])
        taken = jax.nn.one_hot(index.reshape(-1), weight.shape[0], dtype=z.dtype)
        count = taken.sum(axis=0)
        mean = unit_rows(jnp.matmul(taken.T, z, precision="highest"))
        target = jnp.where(count[:, None] > 0, mean, weight[...])
        weight.set_value(unit_rows(self.decay * weight[...] + (1 - self.decay) * target).astype(weight.dtype))
        size = self.cluster_size
        size.set_value((self.decay * size[...] + (1 - self.decay) * count).astype(size.dtype))


class TaskLayer(BaseModule):
    """fc2(tanh(fc1(x))): from the encoder's features to the codes' space."""

    state_names: ClassVar = {"fc1": "0", "fc2": "2"}

    def __init__(self, in_features: int, out_features: int, *, rngs: nnx.Rngs):
        self.fc1 = Linear(in_features, in_features, rngs=rngs)
        self.fc2 = Linear(in_features, out_features, rngs=rngs)

    def __call__(self, x: Float[Array, "*b in"]) -> Float[Array, "*b out"]:
        return self.fc2(jnp.tanh(self.fc1(x)))


class VQKD(BaseModule):
    """BEiT v2's tokenizer: a Vision Transformer, and a codebook that quantizes what it says of each patch.

    Its pictures have their pixels x from 0 to 255 mapped to x / 127.5 - 1: `second_mean` and `second_std` of the recipes.

    Args:
        encoder_config: arguments of `BEiTViT`, with `out_type='featmap'`.
        decoder_config: likewise, of the decoder that a tokenizer is trained with. It is built to hold weights, and never
            called; None for none.
        num_embed, embed_dims: number and size of the codes.
        decay, beta: as of `NormEMAVectorQuantizer`.
        quantize_kmeans_init: as `kmeans_init` of `Codebook`.
        init_cfg: `dict(type='Pretrained', checkpoint=...)` names the file of the released weights.

    Attributes:
        patch_size: pixels per token, down and across.
        released_weights: which file training needs (see `interop.starting_weights`).

    Raises:
        ConfigError: an encoder that gives no feature maps.
    """

    released_weights = (
        "vqkd_encoder.pth, the tokenizer of BEiT v2, from "
        "https://download.openmmlab.com/mmselfsup/1.x/target_generator_ckpt/vqkd_encoder.pth, or the paper's own "
        "vqkd_encoder_base_decoder_3x768x12_clip from https://github.com/microsoft/unilm/tree/master/beit2"
    )

    def __init__(
        self,
        encoder_config: Mapping[str, Any],
        decoder_config: Mapping[str, Any] | None = None,
        num_embed: int = 8192,
        embed_dims: int = 32,
        decay: float = 0.99,
        beta: float = 1.0,
        quantize_kmeans_init: bool = True,
        init_cfg: Any = None,
        *,
        rngs: nnx.Rngs,
    ):
        if (out_type := encoder_config.get("out_type", "avg_featmap")) != "featmap":
            raise ConfigError(f"VQKD: encoder_config.out_type is {out_type!r}, and must be 'featmap'")
        self.init_cfg, self.num_embed = init_cfg, num_embed
        self.encoder = build({"type": "BEiTViT", **encoder_config}, rngs=rngs)
        if decoder_config is not None:
            self.decoder = build({"type": "BEiTViT", **decoder_config}, rngs=rngs)
        self.quantize = NormEMAVectorQuantizer(num_embed, embed_dims, beta, decay, quantize_kmeans_init, rngs=rngs)
        self.encode_task_layer = TaskLayer(self.encoder.embed_dims, embed_dims, rngs=rngs)

    @property
    def patch_size(self) -> int:
        return self.encoder.patch_embed.patch_size[0]

    def encode(
        self, x: Float[Array, "b h w c"], *, rngs: nnx.Rngs | None = None
    ) -> tuple[Float[Array, "b h' w' d"], Int[Array, "b h' w'"], Float[Array, ""]]:
        """The codes of each patch, their indices, and the commitment loss."""
        features = self.encoder(x, rngs=rngs)[-1]
        # In float32 at least: rounding would confuse near codes.
        features = features.astype(jnp.promote_types(features.dtype, jnp.float32))
        codes, loss, index = self.quantize(self.encode_task_layer(features))
        return codes, index, loss

    def get_tokens(self, x: Float[Array, "b h w c"], *, rngs: nnx.Rngs | None = None) -> dict[str, Array]:
        """`token`: the index of each patch's code, int32 [B, N], in row-major order; `input_img`: the images."""
        return dict(token=self.encode(x, rngs=rngs)[1].reshape(len(x), -1), input_img=x)

    def __call__(self, x: Float[Array, "b h w c"], *, rngs: nnx.Rngs | None = None) -> Int[Array, "b n"]:
        """The tokens alone."""
        return self.get_tokens(x, rngs=rngs)["token"]
