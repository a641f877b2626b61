"""What methods have in common that predict features and not pixels (MILAN, EVA, I-JEPA, data2vec)."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxpretrain.methods.base import normalize


def mean_of_tokens(tokens: Float[Array, "b n d"]) -> Float[Array, "b d"]:
    """The mean over tokens, taken in float32 at least, in the dtype of the tokens."""
    return tokens.mean(axis=1, dtype=jnp.promote_types(tokens.dtype, jnp.float32)).astype(tokens.dtype)


def standardize(x: Float[Array, "*batch"], axis: int, eps: float = 1e-5) -> Float[Array, "*batch"]:
    """`x` with zero mean and unit variance along `axis`, in float32 at least: a norm that has learnt nothing."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    x = x - x.mean(axis=axis, keepdims=True)
    return x * lax.rsqrt(jnp.mean(jnp.square(x), axis=axis, keepdims=True) + eps)


def latent_pictures(
    images: Float[Array, "b h w c"],
    hidden: Float[Array, "b n"],
    pred: Float[Array, "b n d"],
    target: Float[Array, "b n d"],
    grid: tuple[int, int],
) -> dict[str, Float[Array, "b h w c"]]:
    """Images, and maps of how well the features of each patch are predicted, in the space of the (normalised) images.

    Args:
        images: whole images.
        hidden: 1 where a patch is hidden, in row-major order.
        pred, target: features of each patch, predicted and true.
        grid: patches down and across; one may be -1.

    Returns:
        `masked`: the images, 0 (the mean colour) where hidden. `reconstructed`: the cosine similarity of prediction and
        target, times 2, in grey: bright where they agree, dark where they do not. `pasted`: that where hidden, else the
        images. `mask`: [B, H, W, 1], 1 where hidden. All are float32 at least. `agreement`: the mean cosine similarity where
        hidden, a scalar.
    """

    def paint(values: Float[Array, "b n"]) -> Float[Array, "b h w 1"]:
        values = values.reshape(values.shape[0], *grid)
        for axis in (1, 2):
            values = jnp.repeat(values, images.shape[axis] // values.shape[axis], axis=axis)
        return values[..., None]

    images = images.astype(jnp.promote_types(images.dtype, jnp.float32))
    mask = paint(hidden.astype(images.dtype))
    cosine = jnp.sum(normalize(pred) * normalize(target), axis=-1).astype(images.dtype)
    picture = jnp.broadcast_to(paint(2 * cosine), images.shape)
    return dict(
        masked=images * (1 - mask),
        reconstructed=picture,
        pasted=jnp.where(mask > 0, picture, images),
        mask=mask,
        agreement=jnp.sum(cosine * hidden) / jnp.maximum(jnp.sum(hidden), 1),
    )
