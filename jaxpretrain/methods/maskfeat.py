"""MaskFeat (Wei et al., 2021, "Masked Feature Prediction for Self-Supervised Visual Pre-Training")."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxpretrain.build import ConfigError
from jaxpretrain.methods.base import BaseSelfSupervisor, Batch, Metrics, draw_key, last, spread
from jaxpretrain.methods.masking import batch_mask, check_grid, enlarge, pictures, random_mask
from jaxpretrain.models.layers import BaseModule
from jaxpretrain.models.layers.init import apply_init_cfg, trunc_normal
from jaxpretrain.models.layers.position import resize_pos_embed
from jaxpretrain.models.vision_transformer import VisionTransformer

_SOBEL = np.asarray([[1, 0, -1], [2, 0, -2], [1, 0, -1]], np.float32)
_LINEAR = {"type": "TruncNormal", "layer": "Linear", "std": 0.02}
_NORMS = {"type": "Constant", "layer": "LayerNorm", "val": 1.0}


class HOGGenerator(BaseModule):
    """Histograms of oriented gradients (Dalal & Triggs, 2005), of each colour channel: MaskFeat's targets.

    In each cell of `pool` x `pool` pixels a histogram of the gradients' orientations, unsigned, weighted by their
    magnitude; divided by its length.

    Args:
        nbins: orientations told apart, of 180 degrees.
        pool: pixels of a cell, down and across.
        gaussian_window: the images are tiled by windows of so many pixels down and across; in each, gradients count
            less the farther they are from its centre, by a normal distribution of half the window's width. 0 for none.
    """

    def __init__(self, nbins: int = 9, pool: int = 8, gaussian_window: int = 16):
        self.nbins, self.pool, self.gaussian_window = nbins, pool, gaussian_window

    def _gaussian(self) -> Float[np.ndarray, "n n"]:
        n = self.gaussian_window
        line = np.exp(-0.5 * ((np.arange(n) - (n - 1) / 2) / (n // 2)) ** 2)
        return (np.outer(line, line) / line.sum() ** 2).astype(np.float32)

    def derived(self) -> dict[str, np.ndarray]:
        sobel = np.tile(_SOBEL, (3, 1, 1, 1))
        arrays = {"weight_x": sobel, "weight_y": sobel.swapaxes(2, 3)}
        return arrays | ({"gaussian_kernel": self._gaussian()} if self.gaussian_window else {})

    def histograms(self, images: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c n"]:
        """The histogram of each cell and channel, in float32 at least.

        Bin k holds orientations from k to k + 1 times 180 / nbins degrees, from vertical gradients on.

        Raises:
            ValueError: cells or windows do not tile the images.
        """
        b, h, w, c = images.shape
        for name, size in (("cells of pool", self.pool), ("windows of gaussian_window", self.gaussian_window or 1)):
            if h % size or w % size:
                raise ValueError(f"HOGGenerator: images of {h}x{w} px do not divide into {name}={size} px")
        x = images.astype(jnp.promote_types(images.dtype, jnp.float32))
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
        smooth_down = x[:, :-2] + 2 * x[:, 1:-1] + x[:, 2:]  # Sobel's filters are separable
        smooth_across = x[:, :, :-2] + 2 * x[:, :, 1:-1] + x[:, :, 2:]
        gx = smooth_down[:, :, :-2] - smooth_down[:, :, 2:]
        gy = smooth_across[:, :-2] - smooth_across[:, 2:]
        magnitude = jnp.sqrt(gx**2 + gy**2)
        if n := self.gaussian_window:
            magnitude = magnitude * np.tile(self._gaussian(), (h // n, w // n))[:, :, None].astype(x.dtype)
        bins = jnp.floor(jnp.atan2(gx, gy) / math.pi * self.nbins).astype(jnp.int32) % self.nbins
        votes = jnp.where(bins[..., None] == jnp.arange(self.nbins), magnitude[..., None], 0)
        p = self.pool
        cells = votes.reshape(b, h // p, p, w // p, p, c, self.nbins).sum(axis=(2, 4))
        length = jnp.sqrt(jnp.sum(cells**2, axis=-1, keepdims=True))
        return cells / jnp.maximum(length, 1e-12)

    def __call__(self, images: Float[Array, "b h w c"], grid: tuple[int, int] = (14, 14)) -> Float[Array, "b l p"]:
        """The histograms of each patch's cells as one vector, in the order (channel, bin, row, column).

        Args:
            images: RGB.
            grid: patches down and across; cells divide among them.
        """
        cells = self.histograms(images)
        b, h, w, c, n = cells.shape
        if h % grid[0] or w % grid[1]:
            raise ValueError(
                f"HOGGenerator: {h}x{w} cells do not divide among {grid[0]}x{grid[1]} patches: set pool to a divisor of "
                "the patches' size"
            )
        u, v = h // grid[0], w // grid[1]
        patches = cells.reshape(b, grid[0], u, grid[1], v, c, n).transpose(0, 1, 3, 5, 6, 2, 4)
        return patches.reshape(b, grid[0] * grid[1], c * n * u * v)

    def to_cells(
        self, patches: Float[Array, "b l p"], grid: tuple[int, int], cells: tuple[int, int]
    ) -> Float[Array, "b h2 w2 c n"]:
        """The inverse of what `__call__` does with histograms, where `cells` are those of a patch, down and across."""
        u, v = cells
        x = patches.reshape(patches.shape[0], *grid, -1, self.nbins, u, v).transpose(0, 1, 5, 2, 6, 3, 4)
        return x.reshape(x.shape[0], grid[0] * u, grid[1] * v, *x.shape[5:])

    def draw(self, cells: Float[Array, "b h2 w2 c n"]) -> Float[Array, "b h w"]:
        """Histograms as a picture from 0 to 1: in each cell a stroke for each orientation, along the edge that has it.

        Brightness is the mean over channels, relative to the image's largest. Cells are drawn in their own size, but no
        smaller than 8 pixels.
        """
        strength = jnp.maximum(cells.mean(axis=3), 0)
        strength = strength / jnp.maximum(strength.max(axis=(1, 2, 3), keepdims=True), 1e-12)
        p = max(self.pool, 8)
        offsets = np.arange(p) - (p - 1) / 2
        angles = (np.arange(self.nbins) + 0.5) * math.pi / self.nbins
        # A bin's gradient is (x, y) = (sin, cos); its edge is perpendicular. Distance from that line, in pixels:
        distance = np.abs(np.sin(angles) * offsets[None, :, None] + np.cos(angles) * offsets[:, None, None])
        strokes = np.clip(1.5 - distance, 0, 1).astype(np.float32)  # two pixels wide
        drawn = jnp.max(strength[:, :, None, :, None, :] * strokes[:, None], axis=-1)
        b, h, _, w, _ = drawn.shape
        return drawn.reshape(b, h * p, w * p)


class MaskFeatViT(VisionTransformer):
    """The Vision Transformer that reads a learnt token in the place of each hidden patch.

    Args:
        arch, out_type, kwargs: as of `VisionTransformer`; it has a class token and learnt positions.
    """

    def __init__(self, arch: Any = "b", out_type: str = "raw", *, rngs: nnx.Rngs, **kwargs: Any):
        if not kwargs.get("with_cls_token", True) or kwargs.get("pre_norm"):
            raise ConfigError("MaskFeatViT: with_cls_token=False and pre_norm=True are not supported")
        super().__init__(arch=arch, out_type=out_type, rngs=rngs, **kwargs)
        self.mask_token = nnx.Param(jnp.zeros((1, 1, self.embed_dims)))

    def init_weights(self, rngs: nnx.Rngs) -> None:
        """After `init_cfg`: linear layers, the patch embedding and the tokens from a truncated normal, std 0.02."""
        super().init_weights(rngs)
        apply_init_cfg(self, (_LINEAR, _NORMS), rngs)
        assert self.cls_token is not None
        for weight in (self.cls_token, self.mask_token, self.patch_embed.projection.kernel):
            weight.set_value(trunc_normal(0.02)(rngs.params(), weight.shape))

    def __call__(  # type: ignore[override]
        self,
        x: Float[Array, "b h w c"],
        mask: Int[Array, "b n m"] | None = None,
        *,
        rngs: nnx.Rngs | None = None,
    ) -> Any:
        """All tokens [B, 1 + N, C], class token first; or, without a mask, features as of `VisionTransformer`.

        Args:
            x: images.
            mask: 1 for each patch to hide; None hides none.
            rngs: for dropout and drop path.
        """
        if mask is None:
            return super().__call__(x, rngs=rngs)
        patches, grid = self.patch_embed(x)
        check_grid(mask, grid)
        hidden = mask.reshape(*patches.shape[:2], 1) > 0
        patches = jnp.where(hidden, self.mask_token[...].astype(x.dtype), patches)
        positions = resize_pos_embed(self.pos_embed[...], self.patch_resolution, grid, self.interpolate_mode)
        tokens = self.add_cls_token(patches + positions[:, 1:].astype(x.dtype))
        tokens = self.run_layers(self.drop_after_pos(tokens, rngs=rngs), rngs=rngs)
        return tokens if self.ln1 is None else self.ln1(tokens)


class MaskFeat(BaseSelfSupervisor):
    """Predicts the histograms of gradients of hidden patches.

    The backbone is a `MaskFeatViT`, the neck a `LinearNeck` from its tokens to a patch's histograms, the head a `MIMHead`,
    the target generator a `HOGGenerator`. Masks come with the batch, from `BEiTMaskGenerator`.

    Raises:
        ConfigError: parts that do not fit together.
    """

    def __init__(self, *, rngs: nnx.Rngs, **parts: Any):
        super().__init__(rngs=rngs, **parts)
        generator, patch = self.target_generator, self.backbone.patch_embed.patch_size
        if any(p % generator.pool for p in patch):
            raise ConfigError(
                f"MaskFeat: target_generator.pool={generator.pool} does not divide the backbone's patch_size={patch}"
            )
        self.cells = (patch[0] // generator.pool, patch[1] // generator.pool)  # of a patch, down and across
        wanted = 3 * generator.nbins * math.prod(self.cells)
        if (width := self.neck.fc.out_features) != wanted:
            raise ConfigError(
                f"MaskFeat: neck.out_channels={width}, but {self.cells[0]}x{self.cells[1]} cells of a patch have {wanted} "
                f"numbers: 3 channels, {generator.nbins} bins each"
            )

    def predict(
        self, images: Float[Array, "b h w 3"], mask: Int[Array, "b n m"], rngs: nnx.Rngs | None = None
    ) -> tuple[Float[Array, "b l p"], Float[Array, "b l c"]]:
        """The histograms of all patches, where those with mask 1 are hidden; and the encoded patches."""
        latent = self.backbone(images, mask, rngs=rngs)[:, self.backbone.num_extra_tokens :]
        b, n, c = latent.shape
        return self.neck((latent.reshape(b * n, c),))[0].reshape(b, n, -1), latent

    def loss(self, batch: Batch, *, rngs: nnx.Rngs | None = None) -> tuple[Float[Array, ""], Metrics]:
        """The error over hidden patches. Logs `feature_std`, of the mean over patches."""
        images, mask = batch["image"], batch_mask(batch, "BEiTMaskGenerator")
        prediction, latent = self.predict(images, mask, rngs)
        target = jax.lax.stop_gradient(self.target_generator(images, mask.shape[1:]))
        loss = self.head.loss(prediction, target, mask.reshape(*prediction.shape[:2]))
        return loss, {"feature_std": spread(latent.mean(axis=1))}

    def reconstruct(
        self,
        images: Float[Array, "b h w 3"],
        *,
        mask: Int[Array, "b n m"] | None = None,
        mask_ratio: float = 0.4,
        rngs: nnx.Rngs | None = None,
    ) -> dict[str, Float[Array, "b h w c"]]:
        """Drawings of the histograms that the network predicts for images of which it sees a part.

        Drawings are grey, as dark and as bright as their image.

        Args:
            images: their sides are multiples of the patches'.
            mask: which patches to hide; by default `mask_ratio` of them, drawn from `rngs.mask`.
            rngs: for the mask.

        Returns:
            masked: images, zero where hidden; reconstructed: the drawing of histograms, predicted where hidden, the images'
            own elsewhere; target: of their own everywhere; mask [B, H, W, 1]: 1 where hidden; hog_mse, a scalar: the mean
            squared error of histograms where hidden.
        """
        b, height, width, _ = images.shape
        p, q = self.backbone.patch_embed.patch_size
        grid = (height // p, width // q)
        if mask is None:
            mask = random_mask(draw_key(rngs, "mask"), b, grid, mask_ratio)
        own = self.target_generator.histograms(images)
        predicted = self.target_generator.to_cells(self.predict(images, mask)[0], grid, self.cells).astype(own.dtype)
        hidden = enlarge(mask, *own.shape[1:3])[..., None, None] > 0
        low, high = (bound(images, axis=(1, 2, 3), keepdims=True).astype(own.dtype) for bound in (jnp.min, jnp.max))

        def drawing(cells: Array) -> Array:
            return low + (high - low) * self.target_generator.draw(cells)[..., None].repeat(3, axis=-1)

        made = pictures(images, images, mask)
        return dict(
            masked=made["masked"],
            reconstructed=drawing(jnp.where(hidden, predicted, own)),
            target=drawing(own),
            mask=made["mask"],
            hog_mse=jnp.mean(jnp.square(predicted - own), where=jnp.broadcast_to(hidden, own.shape)),
        )

    def features(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b d"]:
        """The mean over patches of the whole image's encoding."""
        tokens = last(self.extract_feat(images))[:, self.backbone.num_extra_tokens :]
        return tokens.mean(axis=1, dtype=jnp.promote_types(tokens.dtype, jnp.float32)).astype(tokens.dtype)
