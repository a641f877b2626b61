"""HiViT as the encoder of a MAE (Zhang et al., 2022, HiViT, section 4.1): hidden patches are left out from the first layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers
from jaxtyping import Array, Float, Int

from jaxpretrain.build import ConfigError
from jaxpretrain.methods.base import draw_key
from jaxpretrain.models.hivit import HiViT
from jaxpretrain.models.layers import Frozen
from jaxpretrain.models.layers.position import build_2d_sincos_position_embedding


class MAEHiViT(HiViT):
    """The HiViT that encodes visible patches only; positions are a fixed sin-cos table.

    When patches are hidden, MMPretrain 1.2 resamples the table by its scheme for images of other sizes; ours stays as it is.

    Args:
        arch, norm_cfg: as of `HiViT`.
        mask_ratio: part of the patches that is hidden, in [0, 1).
        kwargs: other arguments of `HiViT`. Biases of relative positions (`rpe`) serve whole images only, as in MMPretrain.
    """

    def __init__(
        self,
        arch: str | Mapping[str, Any] = "b",
        norm_cfg: Mapping[str, Any] = {"type": "LN", "eps": 1e-6},
        mask_ratio: float = 0.75,
        *,
        rngs: nnx.Rngs,
        **kwargs: Any,
    ):
        super().__init__(arch=arch, norm_cfg=norm_cfg, rngs=rngs, **kwargs)
        if not 0 <= mask_ratio < 1:
            raise ConfigError(f"{type(self).__name__}: mask_ratio={mask_ratio} must be in [0, 1)")
        self.mask_ratio = mask_ratio
        if self.pos_embed is not None:
            self.pos_embed = Frozen(self._sincos())

    def _sincos(self) -> Float[Array, "1 n c"]:
        return build_2d_sincos_position_embedding(self.patch_resolution, self.embed_dims)

    def init_weights(self, rngs: nnx.Rngs) -> None:
        """As `HiViT`; then the sin-cos table, and the patch embedding as a Glorot-uniform matrix [pixels, channels]."""
        super().init_weights(rngs)
        if self.pos_embed is not None:
            self.pos_embed.set_value(self._sincos())
        kernel = self.patch_embed.proj.kernel
        matrix = (math.prod(kernel.shape[:-1]), kernel.shape[-1])
        kernel.set_value(initializers.xavier_uniform()(rngs.params(), matrix, kernel.dtype).reshape(kernel.shape))

    def __call__(  # type: ignore[override]
        self,
        x: Float[Array, "b height width 3"],
        mask: bool | None = True,
        *,
        noise: Float[Array, "b n"] | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> Any:
        """The visible patches' features, and what was hidden; or, without a mask, features as of `HiViT`.

        Args:
            x: images.
            mask: whether to hide patches; None is False.
            noise: which ones: the patches of each image with the smallest noise stay. Drawn from `rngs.mask` if None.
            rngs: for the noise, dropout and drop path.

        Returns:
            With a mask: latent [B, visible, C]; mask [B, N], 1 where hidden; and ids_restore [B, N], the place of each
            patch when visible ones come first.
        """
        if not mask:
            return super().__call__(x, rngs=rngs)
        stages, hidden, ids_restore = self.encode_visible(x, noise, rngs)
        return stages[-1], hidden, ids_restore

    def encode_visible(
        self, x: Float[Array, "b height width 3"], noise: Float[Array, "b n"] | None, rngs: nnx.Rngs | None
    ) -> tuple[tuple[Array, ...], Float[Array, "b n"], Int[Array, "b n"]]:
        """What each stage makes of the visible patches ([B, visible, i, i, C], the last one [B, visible, C]); and mask and
        ids_restore as above."""
        tokens, grid = self.patch_embed(x)
        b, n = tokens.shape[:2]
        if noise is None:
            noise = jax.random.uniform(draw_key(rngs, "mask"), (b, n))
        order = jnp.argsort(noise, axis=1)
        ids_restore = jnp.argsort(order, axis=1)
        visible = int(n * (1 - self.mask_ratio))
        kept = order[:, :visible]
        tokens = jnp.take_along_axis(tokens, kept[:, :, None, None, None], axis=1)
        tokens, stages = self.run_stem(tokens, rngs=rngs)
        if self.pos_embed is not None:
            tokens = tokens + self.positions(grid, tokens.dtype)[0][kept]
        latent, _ = self.run_main(self.pos_drop(tokens, rngs=rngs), rngs=rngs)
        return (*stages, latent), (ids_restore >= visible).astype(jnp.float32), ids_restore
