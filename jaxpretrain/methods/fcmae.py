"""FCMAE: fully convolutional masked autoencoders (ConvNeXt V2: Woo et al., 2023, https://arxiv.org/abs/2301.00808)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from jaxpretrain.build import ConfigError
from jaxpretrain.methods.base import BaseSelfSupervisor, Batch, Metrics, draw_key, last, pool, spread
from jaxpretrain.methods.masking import pictures
from jaxpretrain.models.convnext import ConvNeXtBlock
from jaxpretrain.models.layers import BaseModule
from jaxpretrain.models.layers.conv import Conv2d
from jaxpretrain.models.layers.sparse import draw_visible, grid_of, visible_mean
from jaxpretrain.models.layers.stack import apply_layers

_INIT = (
    {"type": "TruncNormal", "layer": ["Conv2d", "Linear"], "std": 0.02, "bias": 0.0},
    {"type": "Constant", "layer": ["LayerNorm"], "val": 1.0, "bias": 0.0},
)


class FCMAEDecoder(BaseModule):
    """A projection, ConvNeXt V2 blocks that see a learnt token in the place of each hidden patch, and pixels by a linear layer.

    Args:
        in_channels: channels of the encoder's last map.
        decoder_embed_dim, decoder_depth: channels and number of the blocks.
        patch_size: pixels per patch, down and across; a patch is a position of the map.
        in_chans: channels of the images.
        init_cfg: initialisation, MMEngine's dictionaries.

    Attributes:
        scan_layers, remat: how the blocks are run (see `apply_layers`); False and 'none' unless set.
    """

    def __init__(
        self,
        in_channels: int,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 1,
        patch_size: int = 32,
        in_chans: int = 3,
        init_cfg: Any = _INIT,
        *,
        rngs: nnx.Rngs,
    ):
        self.init_cfg, self.in_channels = init_cfg, in_channels
        self.scan_layers, self.remat = False, "none"
        self.proj = Conv2d(in_channels, decoder_embed_dim, 1, rngs=rngs)
        self.mask_token = nnx.Param(jnp.zeros((1, decoder_embed_dim, 1, 1)))
        self.decoder = nnx.List(
            ConvNeXtBlock(decoder_embed_dim, layer_scale_init_value=0.0, use_grn=True, rngs=rngs)
            for _ in range(decoder_depth)
        )
        self.pred = Conv2d(decoder_embed_dim, patch_size**2 * in_chans, 1, rngs=rngs)

    def init_weights(self, rngs: nnx.Rngs) -> None:
        """Besides `init_cfg`: the mask token from N(0, 0.02)."""
        super().init_weights(rngs)
        self.mask_token.set_value(0.02 * jax.random.normal(rngs.params(), self.mask_token.shape))

    def __call__(
        self, x: Float[Array, "b n m c"], visible: Bool[Array, "b n m"], *, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "b patches pixels"]:
        """The prediction for every patch, hidden or not, in row-major order; pixels in the order (row, column, channel).

        Args:
            x: the encoder's map.
            visible: which patches it saw.
            rngs: unused; there is no drop path here.
        """
        x = self.proj(x)
        x = jnp.where(visible[..., None], x, self.mask_token[...].reshape(-1).astype(x.dtype))
        x, _ = apply_layers(self.decoder, x, rngs=rngs, scan_layers=self.scan_layers, remat=self.remat)
        x = self.pred(x)
        return x.reshape(len(x), -1, x.shape[-1])


class FCMAE(BaseSelfSupervisor):
    """Reconstructs the pixels of hidden patches by a ConvNeXt V2 that does not see them, and a decoder of one block.

    The backbone is a `SparseConvNeXt` with `use_grn`, `sparse_grn` and without layer scale, which gives a map; the neck an
    `FCMAEDecoder`, whose `in_channels` are the backbone's where not given; the head a `MAEPretrainHead`.

    Args:
        mask_ratio: part of the patches that is hidden, in (0, 1).
        parts: `backbone`, `neck`, `head` and other arguments of `BaseSelfSupervisor`.

    Raises:
        ConfigError: parts that do not fit together.
    """

    def __init__(self, mask_ratio: float = 0.6, *, rngs: nnx.Rngs, **parts: Any):
        super().__init__(rngs=rngs, **parts)
        self.mask_ratio = mask_ratio
        stages, channels = self.backbone.out_indices[-1], self.backbone.channels
        if not 0 < mask_ratio < 1:
            raise ConfigError(f"FCMAE: mask_ratio={mask_ratio} must be between 0 and 1")
        if self.backbone.gap_before_final_norm:
            raise ConfigError("FCMAE: the decoder needs a map; give the backbone gap_before_output=False")
        stride = self.backbone.downsample_layers[0][0].stride[0] * 2**stages
        pixels = self.head.patch_size**2 * self.head.in_channels
        for what, ours, name, theirs in (
            ("neck.in_channels", self.neck.in_channels, "the backbone's channels", channels[stages]),
            ("head.patch_size", self.head.patch_size, "the backbone's stride", stride),
            ("neck's prediction", self.neck.pred.kernel.shape[-1], "the head's pixels per patch", pixels),
        ):
            if ours != theirs:
                raise ConfigError(f"FCMAE: {what} {ours} is not {name} {theirs}; make backbone, neck and head agree")

    def neck_defaults(self) -> dict[str, Any]:
        return dict(in_channels=self.backbone.channels[self.backbone.out_indices[-1]])

    def mask(
        self, images: Float[Array, "b h w c"], noise: Array | None = None, rngs: nnx.Rngs | None = None
    ) -> Bool[Array, "b n m"]:
        """Which patches of images are visible: int(N (1 - mask_ratio)), those of the smallest noise.

        Args:
            images: their sides are multiples of the patches'.
            noise: [B, N]; drawn from `rngs.mask` if None.
            rngs: for the noise.
        """
        grid = grid_of(images, self.head.patch_size, "FCMAE")
        places = grid[0] * grid[1]
        if noise is None:
            noise = jax.random.uniform(draw_key(rngs, "mask"), (len(images), places))
        return draw_visible(noise, int(places * (1 - self.mask_ratio)), grid)

    def loss(self, batch: Batch, *, rngs: nnx.Rngs | None = None) -> tuple[Float[Array, ""], Metrics]:
        """The error over hidden patches. Logs `feature_std`, of the mean over visible positions.

        A batch may bring its own masking `noise` [B, N] (see `mask`); otherwise it is drawn from `rngs.mask`.
        """
        images = batch["image"]
        visible = self.mask(images, batch.get("noise"), rngs)
        latent = last(self.backbone(images, visible, rngs=rngs))
        hidden = (~visible).reshape(len(images), -1).astype(jnp.float32)
        loss = self.head.loss(self.neck(latent, visible, rngs=rngs), images, hidden)
        return loss, {"feature_std": spread(visible_mean(latent, visible))}

    def reconstruct(
        self,
        images: Float[Array, "b h w 3"],
        *,
        noise: Float[Array, "b n"] | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> dict[str, Float[Array, "b h w c"]]:
        """What the network makes of images that it sees a part of, in the space of the (normalised) images.

        With `norm_pix` the network predicts patches up to brightness and contrast; the true patches lend theirs.

        Returns:
            see `masking.pictures`.
        """
        visible = self.mask(images, noise, rngs)
        patches = self.head.to_pixels(self.neck(last(self.backbone(images, visible)), visible), images)
        prediction = self.head.unpatchify(patches, *images.shape[1:3])
        return pictures(images, prediction, (~visible).astype(jnp.float32))

    def features(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b d"]:
        """The mean of the last feature map of the whole image."""
        return pool(self.extract_feat(images))
