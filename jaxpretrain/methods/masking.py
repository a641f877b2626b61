"""Masks of patches: from the batch, or drawn; as pixels; and pictures of what was made of the hidden ones."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxpretrain.build import ConfigError
from jaxpretrain.methods.base import Batch


def batch_mask(batch: Batch, generator: str) -> Int[Array, "b h w"]:
    """The batch's mask of patches, 1 where hidden.

    Raises:
        ConfigError: there is none, so `generator`, the transform that makes it, is missing in the pipeline.
    """
    if batch.get("mask") is None:
        raise ConfigError(
            f"This method learns from masks, and the batch has none: add dict(type='{generator}', ...) to the end of "
            "config.data.train.pipeline"
        )
    return batch["mask"]


def check_grid(mask: Array, grid: tuple[int, ...]) -> None:
    """Raises ValueError unless the mask has one number for each of the grid's patches."""
    if mask.shape[1:] != tuple(grid):
        raise ValueError(
            f"a mask of {'x'.join(map(str, mask.shape[1:]))} patches, for images of {grid[0]}x{grid[1]}: give the mask "
            "generator in config.data.train.pipeline the backbone's number of patches"
        )


def random_mask(key: Array, batch: int, grid: tuple[int, int], ratio: float) -> Int[Array, "b h w"]:
    """For each image, as many ones as `ratio` of the grid's places, rounded, at random places."""
    places = grid[0] * grid[1]
    order = jax.random.uniform(key, (batch, places)).argsort(axis=1).argsort(axis=1)
    return (order < round(ratio * places)).astype(jnp.int32).reshape(batch, *grid)


def enlarge(mask: Float[Array, "b h w"], height: int, width: int) -> Float[Array, "b height width"]:
    """A mask of patches as one of pixels (or of smaller patches)."""
    return mask.repeat(height // mask.shape[1], axis=1).repeat(width // mask.shape[2], axis=2)


def pictures(
    images: Float[Array, "b h w c"], prediction: Float[Array, "b h w c"], mask: Float[Array, "b n m"]
) -> dict[str, Float[Array, "b h w c"]]:
    """What `reconstruct` of a masked method returns, in float32 at least.

    Returns:
        masked: images, zero (the mean colour) where hidden; reconstructed: the prediction for all pixels; pasted: the
        prediction where hidden, the image elsewhere; mask [B, H, W, 1]: 1 where hidden.
    """
    dtype = jnp.promote_types(prediction.dtype, jnp.float32)
    images, prediction = images.astype(dtype), prediction.astype(dtype)
    hidden = enlarge(mask, images.shape[1], images.shape[2])[..., None].astype(dtype)
    pasted = jnp.where(hidden > 0, prediction, images)
    return dict(masked=images * (1 - hidden), reconstructed=prediction, pasted=pasted, mask=hidden)
