"""Visual tokens as targets: a tokenizer without weights, and what BEiT and CAE do with tokens and masks."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Num

from jaxpretrain.build import ConfigError
from jaxpretrain.methods.base import BaseSelfSupervisor, entropy
from jaxpretrain.models.layers import BaseModule, Frozen
from jaxpretrain.models.layers.init import normal
from jaxpretrain.models.vqkd import nearest_code, unit_rows


class RandomProjectionTokenizer(BaseModule):
    """A stand-in for a learnt tokenizer: patches are projected at random, and the nearest of some random codes is taken.

    BEST-RQ's quantizer (Chiu et al., 2022, Self-supervised learning with random-projection quantizer for speech
    recognition), on patches of pixels. It never learns and needs no file, so that small recipes run as they are; their
    tokens are a rough sketch of pixels, where those of DALL-E and VQ-KD stand for content.

    Args:
        patch_size: pixels per token, down and across.
        num_embed: number of codes.
        embed_dims: size of the codes.
        in_channels: channels of the images.
    """

    def __init__(
        self, patch_size: int = 16, num_embed: int = 64, embed_dims: int = 16, in_channels: int = 3, *, rngs: nnx.Rngs
    ):
        self.patch_size, self.num_embed = patch_size, num_embed
        pixels = patch_size**2 * in_channels
        self.projection = Frozen(normal(std=pixels**-0.5)(rngs.params(), (pixels, embed_dims)))
        # Directions alone would not tell how bright an even patch is.
        self.offset = Frozen(normal()(rngs.params(), (embed_dims,)))
        self.codes = Frozen(unit_rows(normal()(rngs.params(), (num_embed, embed_dims))))

    def __call__(self, x: Float[Array, "b h w c"]) -> Int[Array, "b n"]:
        """The tokens of patches in row-major order."""
        b, height, width, c = x.shape
        p = self.patch_size
        patches = x[:, : height // p * p, : width // p * p].reshape(b, height // p, p, width // p, p, c)
        patches = patches.transpose(0, 1, 3, 2, 4, 5).reshape(b, -1, p * p * c)
        patches = patches.astype(jnp.promote_types(x.dtype, jnp.float32))
        z = jnp.matmul(patches, self.projection[...], precision="highest") + self.offset[...]
        return nearest_code(unit_rows(z), self.codes[...])


def check_tokenizer(method: BaseSelfSupervisor) -> None:
    """Raises ConfigError if there is no target generator. Takes dropout out of what there is, for targets are fixed."""
    if not hasattr(method, "target_generator"):
        name = type(method).__name__
        raise ConfigError(f"{name} needs a target_generator: 'DALL-E', 'VQKD' or 'RandomProjectionTokenizer'")
    method.target_generator.set_attributes(rate=0.0, drop_path_rate=0.0, raise_if_not_found=False)


def as_tokens(target: Num[Array, "b ..."]) -> Int[Array, "b n"]:
    """Tokens as they are; of logits [B, h, w, K] the likeliest ones."""
    if jnp.issubdtype(target.dtype, jnp.integer):
        return target.reshape(len(target), -1)
    return target.argmax(axis=-1).reshape(len(target), -1)


def target_tokens(tokenizer: nnx.Module, pictures: Float[Array, "b h w 3"], grid: tuple[int, ...]) -> Int[Array, "b n"]:
    """The tokens of pictures, without gradient. Raises ValueError if there is not one for each patch of `grid`."""
    tokens = jax.lax.stop_gradient(as_tokens(tokenizer(pictures)))
    if tokens.shape[1] != math.prod(grid):
        raise ValueError(
            f"The tokenizer makes {tokens.shape[1]} tokens of pictures of {pictures.shape[1]}x{pictures.shape[2]} px, "
            f"and there are {grid[0]}x{grid[1]} patches: set second_size of RandomResizedCropAndInterpolationWithTwoPic"
        )
    return tokens


def token_entropy(tokens: Int[Array, "b n"], num_embed: int) -> Float[Array, ""]:
    """How evenly the tokens are used (see `entropy`)."""
    counts = jnp.zeros((num_embed,), jnp.int32).at[tokens.reshape(-1)].add(1)
    return entropy((counts / tokens.size)[None])


def accuracy(logits: Float[Array, "n k"], tokens: Int[Array, " n"], weight: Num[Array, " n"]) -> Float[Array, ""]:
    """How many tokens the largest logits hit, in per cent of those with weight 1; float32."""
    right = (logits.argmax(axis=-1) == tokens).astype(jnp.float32)
    return 100 * jnp.sum(right * weight) / jnp.maximum(weight.sum(), 1)


def mean_of_patches(tokens: Float[Array, "b m c"]) -> Float[Array, "b c"]:
    """The mean of all tokens but the first."""
    return tokens[:, 1:].mean(axis=1, dtype=jnp.promote_types(tokens.dtype, jnp.float32)).astype(tokens.dtype)


def draw_tokens(
    tokenizer: Any,
    images: Float[Array, "b h w 3"],
    pictures: Float[Array, "b h2 w2 3"] | None,
    mask: Num[Array, "b h' w'"],
    predicted: Int[Array, "b n"],
) -> dict[str, Array]:
    """What can be drawn of predicted tokens: hidden patches whose token is right are uncovered, others stay hidden.

    Args:
        tokenizer: the target generator.
        images: what the network saw a part of.
        pictures: the same for the tokenizer. By default the images, resized to one token per patch: right if both
            pictures are normalised alike, as in the recipes for digits.
        mask: 1 where a patch is hidden.
        predicted: a token for each patch.

    Returns:
        `masked`: the images, 0 (the mean colour) where hidden. `right_tokens`: 0 where hidden and not predicted rightly.
        `mask`: [B, H, W, 1], 1 where hidden. `accuracy`: of hidden patches, in per cent. All are float32 at least.
    """
    b, h, w = mask.shape
    height, width = images.shape[1:3]
    if pictures is None:
        size = (b, h * tokenizer.patch_size, w * tokenizer.patch_size, images.shape[3])
        pictures = images if images.shape == size else jax.image.resize(images, size, "linear")
    right = predicted == target_tokens(tokenizer, pictures, (h, w))

    def enlarge(x: Array) -> Float[Array, "b height width 1"]:
        x = x.reshape(b, h, w).astype(jnp.promote_types(images.dtype, jnp.float32))
        return x.repeat(height // h, axis=1).repeat(width // w, axis=2)[..., None]

    hidden, shown = enlarge(mask > 0), enlarge(right)
    images = images.astype(hidden.dtype)
    return dict(
        masked=images * (1 - hidden),
        right_tokens=images * (1 - hidden * (1 - shown)),
        mask=hidden,
        accuracy=100 * jnp.sum(hidden * shown) / jnp.maximum(hidden.sum(), 1),
    )
