"""SimMIM (Xie et al., 2021, "SimMIM: A Simple Framework for Masked Image Modeling")."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxpretrain.build import ConfigError, build
from jaxpretrain.methods.base import BaseSelfSupervisor, Batch, Metrics, draw_key, pool, spread
from jaxpretrain.methods.masking import batch_mask, check_grid, enlarge, pictures, random_mask
from jaxpretrain.models.layers import BaseModule
from jaxpretrain.models.layers.conv import Conv2d
from jaxpretrain.models.layers.init import apply_init_cfg, trunc_normal
from jaxpretrain.models.swin_transformer import SwinTransformer

_INIT = (
    {"type": "TruncNormal", "layer": "Linear", "std": 0.02},
    {"type": "Constant", "layer": "LayerNorm", "val": 1.0},
)


class SimMIMSwinTransformer(SwinTransformer):
    """The Swin Transformer that reads a learnt token in the place of each hidden patch.

    Args:
        kwargs: those of `SwinTransformer`. Other windows than of 7 tokens: `stage_cfgs=dict(block_cfgs=dict(window_size=6))`.
    """

    def __init__(self, *args: Any, rngs: nnx.Rngs, **kwargs: Any):
        super().__init__(*args, rngs=rngs, **kwargs)
        self.mask_token = nnx.Param(jnp.zeros((1, 1, self.embed_dims)))

    def init_weights(self, rngs: nnx.Rngs) -> None:
        """After `init_cfg`: linear layers and the token from a truncated normal distribution of std 0.02."""
        super().init_weights(rngs)
        self.mask_token.set_value(trunc_normal(0.02)(rngs.params(), self.mask_token.shape))
        apply_init_cfg(self, _INIT, rngs)

    def __call__(
        self,
        x: Float[Array, "b h w c"],
        mask: Int[Array, "b h2 w2"] | None = None,
        *,
        rngs: nnx.Rngs | None = None,
    ) -> tuple[Float[Array, "b h3 w3 d"], ...]:
        """The features of the chosen stages.

        Args:
            x: images.
            mask: 1 for each patch to hide; None hides none.
            rngs: for dropout and drop path.
        """
        tokens = self.embed(x)
        if mask is not None:
            check_grid(mask, tokens.shape[1:3])
            tokens = jnp.where(mask[..., None] > 0, self.mask_token[...].astype(tokens.dtype), tokens)
        tokens = self.drop_after_pos(self.add_positions(tokens), rngs=rngs)
        return self.run_stages(tokens, rngs=rngs)


class SimMIMLinearDecoder(BaseModule):
    """From each vector of the last feature map, linearly, the pixels that it stands for.

    Args:
        in_channels: channels of the feature map.
        encoder_stride: pixels per vector, down and across.
    """

    def __init__(self, in_channels: int, encoder_stride: int, *, rngs: nnx.Rngs):
        self.encoder_stride = encoder_stride
        self.decoder = nnx.List([Conv2d(in_channels, 3 * encoder_stride**2, 1, rngs=rngs)])

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b height width 3"]:
        """Images, `encoder_stride` times larger. Outputs of the linear layer are in the order (channel, row, column)."""
        b, h, w, _ = x.shape
        r = self.encoder_stride
        pixels = self.decoder[0](x).reshape(b, h, w, 3, r, r)
        return pixels.transpose(0, 1, 4, 2, 5, 3).reshape(b, h * r, w * r, 3)


class SimMIMHead(BaseModule):
    """The error of reconstructed images where patches were hidden.

    Args:
        patch_size: pixels per patch of the mask, down and across.
        loss: called with prediction, target and the mask of pixels; `PixelReconstructionLoss(criterion='L1', channel=3)`.
    """

    def __init__(self, patch_size: int, loss: Mapping[str, Any] | nnx.Module):
        self.patch_size, self.loss_module = patch_size, build(loss)

    def loss(
        self, pred: Float[Array, "b h w c"], target: Float[Array, "b h w c"], mask: Int[Array, "b n m"]
    ) -> Float[Array, ""]:
        """The error of `pred` against `target`, where the mask, of patches, is 1."""
        height, width = (n * self.patch_size for n in mask.shape[1:])
        return self.loss_module(pred, target, enlarge(mask, height, width)[..., None])


class SimMIM(BaseSelfSupervisor):
    """Reconstructs the pixels of hidden patches, which the encoder sees as a learnt token, by one linear layer.

    The backbone is a `SimMIMSwinTransformer`, the neck a `SimMIMLinearDecoder`, the head a `SimMIMHead`. Masks come with
    the batch, from `SimMIMMaskGenerator`.

    Raises:
        ConfigError: parts that do not fit together.
    """

    def __init__(self, *, rngs: nnx.Rngs, **parts: Any):
        super().__init__(rngs=rngs, **parts)
        stage = self.backbone.stages[self.backbone.out_indices[-1]]
        patch, stages = self.backbone.patch_embed.patch_size[0], self.backbone.out_indices[-1]
        for what, ours, name, theirs in (
            ("neck.in_channels", self.neck.decoder[0].kernel.shape[2], "the backbone's channels", stage.embed_dims),
            ("neck.encoder_stride", self.neck.encoder_stride, "the backbone's stride", patch * 2**stages),
            ("head.patch_size", self.head.patch_size, "the backbone's", patch),
        ):
            if ours != theirs:
                raise ConfigError(f"SimMIM: {what}={ours} is not {name} {theirs}; make backbone, neck and head agree")

    def loss(self, batch: Batch, *, rngs: nnx.Rngs | None = None) -> tuple[Float[Array, ""], Metrics]:
        """The error over hidden pixels. Logs `feature_std`, of the mean over positions."""
        images, mask = batch["image"], batch_mask(batch, "SimMIMMaskGenerator")
        latent = self.backbone(images, mask, rngs=rngs)
        loss = self.head.loss(self.neck(latent[-1]), images, mask)
        return loss, {"feature_std": spread(pool(latent))}

    def reconstruct(
        self,
        images: Float[Array, "b h w 3"],
        *,
        mask: Int[Array, "b n m"] | None = None,
        mask_ratio: float = 0.6,
        rngs: nnx.Rngs | None = None,
    ) -> dict[str, Float[Array, "b h w c"]]:
        """What the network makes of images of which it sees a part, in the space of the (normalised) images.

        Args:
            images: their sides are multiples of the encoder's stride.
            mask: which patches to hide. By default squares of the encoder's stride, as the paper does, drawn from
                `rngs.mask`.
            mask_ratio: part of the squares that is hidden then.
            rngs: for the mask.

        Returns:
            see `masking.pictures`.
        """
        b, height, width, _ = images.shape
        if mask is None:
            stride, patch = self.neck.encoder_stride, self.head.patch_size
            squares = random_mask(draw_key(rngs, "mask"), b, (height // stride, width // stride), mask_ratio)
            mask = enlarge(squares, height // patch, width // patch)
        return pictures(images, self.neck(self.backbone(images, mask)[-1]), mask)

    def features(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b d"]:
        """The mean of the last feature map of the whole image."""
        return pool(self.extract_feat(images))
