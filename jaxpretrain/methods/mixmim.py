"""MixMIM, or MixMAE: Mixed and Masked Image Modeling (Liu et al., 2022, arXiv:2205.13137)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxpretrain.build import ConfigError
from jaxpretrain.methods.base import BaseSelfSupervisor, Batch, Metrics, draw_key, last, spread
from jaxpretrain.methods.mae import MAEPretrainDecoder, MAEPretrainHead
from jaxpretrain.methods.masking import enlarge, pictures
from jaxpretrain.models.layers.init import apply_init_cfg
from jaxpretrain.models.layers.stack import apply_layers
from jaxpretrain.models.mixmim import MixMIMTransformer

_INIT = (
    {"type": "Xavier", "layer": "Linear", "distribution": "uniform"},
    {"type": "Constant", "layer": "LayerNorm", "val": 1.0, "bias": 0.0},
)


class MixMIMPretrainTransformer(MixMIMTransformer):
    """The encoder that sees two images in one: hidden patches of an image are filled with those of another.

    Image i of a batch of B is mixed with image B - 1 - i. Patches attend to those of their own image only.

    Args:
        args, kwargs: as of `MixMIMTransformer`.
        mask_ratio: part of the patches that is the other image's.
        range_mask_ratio: up to how much more, drawn for each batch.
    """

    def __init__(
        self, *args: Any, mask_ratio: float = 0.5, range_mask_ratio: float = 0.0, rngs: nnx.Rngs, **kwargs: Any
    ):
        super().__init__(*args, rngs=rngs, **kwargs)
        if not 0 < mask_ratio <= mask_ratio + range_mask_ratio < 1:
            raise ConfigError(
                f"MixMIMPretrainTransformer: mask_ratio={mask_ratio}, and with range_mask_ratio={range_mask_ratio} more, "
                "must be between 0 and 1"
            )
        self.mask_ratio, self.range_mask_ratio = mask_ratio, range_mask_ratio

    def init_weights(self, rngs: nnx.Rngs) -> None:
        """After `init_cfg`: Glorot-uniform matrices, as in ViT."""
        super().init_weights(rngs)
        apply_init_cfg(self, _INIT, rngs)

    def __call__(  # type: ignore[override]
        self,
        x: Float[Array, "b height width 3"],
        mask: bool | None = True,
        *,
        noise: Float[Array, "h w"] | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> Any:
        """The features of mixed images, and the mask; or, without a mask, features as of `MixMIMTransformer`.

        Args:
            x: images.
            mask: whether to mix; None is False.
            noise: which positions of the last map are the other image's: those of the smallest noise. Drawn from
                `rngs.mask` if None.
            rngs: for the noise, the mask ratio (if it has a range), dropout and drop path.

        Returns:
            With a mask: the last map [B, h, w, C], and the mask [h, w], 1 where it is of the other image. It is the same for
            all images of the batch.
        """
        if not mask:
            return super().__call__(x, rngs=rngs)
        stride = self.encoder_stride
        if x.shape[1] % stride or x.shape[2] % stride:
            raise ValueError(f"MixMIM: images of {x.shape[1]}x{x.shape[2]} px do not divide into squares of {stride}")
        masks = self.random_masks((x.shape[1] // stride, x.shape[2] // stride), noise, rngs)
        tokens = self.embed(x)
        tokens = jnp.where(masks[0][..., None] > 0, tokens[::-1], tokens)
        tokens = self.drop_after_pos(self.add_positions(tokens), rngs=rngs)
        return self.run_layers(tokens, masks, rngs=rngs), masks[-1]

    def random_masks(
        self, grid: tuple[int, int], noise: Float[Array, "h w"] | None, rngs: nnx.Rngs | None
    ) -> list[Float[Array, "..."]]:
        """The mask of the last map, of this `grid`, and before it the same for the maps of the earlier stages."""
        if noise is None:
            noise = jax.random.uniform(draw_key(rngs, "mask"), grid)
        ratio: float | Array = self.mask_ratio
        if self.range_mask_ratio:
            ratio = ratio + self.range_mask_ratio * jax.random.uniform(draw_key(rngs, "mask"))
        count = jnp.floor(ratio * math.prod(grid)) if self.range_mask_ratio else int(ratio * math.prod(grid))
        rank = noise.reshape(-1).argsort().argsort()
        mask = (rank < count).astype(jnp.float32).reshape(grid)
        sides = [2 ** (len(self.layers) - 1 - i) for i in range(len(self.layers))]
        return [enlarge(mask[None], grid[0] * n, grid[1] * n)[0] for n in sides]


class MixMIMPretrainDecoder(MAEPretrainDecoder):
    """A small transformer that takes the mixture apart: it sees each of both images with mask tokens for the other's part.

    Args:
        num_patches: positions of the encoder's last map, one number if as many down as across, else a pair.
        patch_size, in_chans: accepted for MMPretrain's configs; `encoder_stride` says what is predicted.
        embed_dim: channels of the encoder's last map.
        encoder_stride: pixels per position, down and across.
        decoder_embed_dim, decoder_depth, decoder_num_heads, mlp_ratio, norm_cfg, init_cfg: as of `MAEPretrainDecoder`.
    """

    def __init__(
        self,
        num_patches: int | tuple[int, int] = 196,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 1024,
        encoder_stride: int = 32,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        mlp_ratio: float = 4.0,
        norm_cfg: Mapping[str, Any] = {"type": "LN", "eps": 1e-6},
        init_cfg: Any = None,
        *,
        rngs: nnx.Rngs,
    ):
        super().__init__(
            num_patches,
            encoder_stride,
            3,
            embed_dim,
            decoder_embed_dim,
            decoder_depth,
            decoder_num_heads,
            mlp_ratio,
            norm_cfg,
            init_cfg=init_cfg,
            with_cls_token=False,
            rngs=rngs,
        )
        self.encoder_stride = encoder_stride

    def __call__(  # type: ignore[override]
        self, x: Float[Array, "b h w c"], mask: Float[Array, "h w"], *, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "2*b n p"]:
        """The predicted patches of the images, and then of those that were mixed in.

        Args:
            x: the encoder's last map.
            mask: 1 where it is of the image mixed in.
            rngs: unused; there is no dropout here.
        """
        if x.shape[1:3] != self.grid:
            raise ValueError(
                f"MixMIMPretrainDecoder is for maps of {self.grid[0]}x{self.grid[1]}, and got {x.shape[1]}x{x.shape[2]}: "
                "train at the backbone's img_size, or set neck.num_patches"
            )
        x = self.decoder_embed(x.reshape(len(x), -1, x.shape[-1]))
        other, token = mask.reshape(1, -1, 1) > 0, self.mask_token[...].astype(x.dtype)
        x = jnp.concatenate([jnp.where(other, token, x), jnp.where(other, x, token)])
        x = x + self.decoder_pos_embed[...].astype(x.dtype)
        x, _ = apply_layers(self.decoder_blocks, x, rngs=rngs, scan_layers=self.scan_layers, remat=self.remat)
        return self.decoder_pred(self.ln1(x))


class MixMIMPretrainHead(MAEPretrainHead):
    """Compares the predictions with the images, where each was hidden: with all of all images, in the end.

    Args:
        loss, norm_pix, patch_size: as of `MAEPretrainHead`; `patch_size` is the encoder's stride.
    """

    def __init__(self, loss: Mapping[str, Any] | nnx.Module, norm_pix: bool = False, patch_size: int = 16):
        super().__init__(loss=loss, norm_pix=norm_pix, patch_size=patch_size)

    def loss(
        self, pred: Float[Array, "2*b n p"], target: Float[Array, "b h w c"], mask: Float[Array, "h w"]
    ) -> Float[Array, ""]:
        """The error of the decoder's patches against the images; `mask` as of the decoder."""
        return self.loss_module(self.unmix(pred, mask), self.construct_target(target))

    def unmix(self, pred: Float[Array, "2*b n p"], mask: Float[Array, "h w"]) -> Float[Array, "b n p"]:
        """For each image, what was predicted of its hidden patches: from its own mixture, and from the one it was mixed into."""
        own, mixed_in = jnp.split(pred, 2)
        return jnp.where(mask.reshape(1, -1, 1) > 0, own, mixed_in[::-1])


class MixMIM(BaseSelfSupervisor):
    """Reconstructs two images from their mixture: each from the patches that are its own.

    The backbone is a `MixMIMPretrainTransformer`, the neck a `MixMIMPretrainDecoder` (whose `num_patches`, `embed_dim` and
    `encoder_stride` are the backbone's where not given), the head a `MixMIMPretrainHead`, whose `patch_size` is the neck's
    stride.

    Raises:
        ConfigError: parts that do not fit together.
    """

    def __init__(self, *, rngs: nnx.Rngs, **parts: Any):
        super().__init__(rngs=rngs, **parts)
        self.head.patch_size = self.neck.encoder_stride
        backbone, (height, width) = self.backbone, self.backbone.patch_resolution
        scale = 2 ** (len(backbone.layers) - 1)
        for what, ours, name, theirs in (
            ("neck.num_patches", tuple(self.neck.grid), "the backbone's last map", (height // scale, width // scale)),
            ("neck.embed_dim", self.neck.decoder_embed.in_features, "the backbone's channels", backbone.num_features),
            ("neck.encoder_stride", self.neck.encoder_stride, "the backbone's", backbone.encoder_stride),
        ):
            if ours != theirs:
                raise ConfigError(f"MixMIM: {what} {ours} is not {name} {theirs}; make backbone and neck agree")

    def neck_defaults(self) -> dict[str, Any]:
        backbone = self.backbone
        scale = 2 ** (len(backbone.layers) - 1)
        return dict(
            num_patches=(backbone.patch_resolution[0] // scale, backbone.patch_resolution[1] // scale),
            embed_dim=backbone.num_features,
            encoder_stride=backbone.encoder_stride,
        )

    def loss(self, batch: Batch, *, rngs: nnx.Rngs | None = None) -> tuple[Float[Array, ""], Metrics]:
        """The error over all patches. Logs `feature_std`, of the mean over those that are the image's own.

        A batch may bring its own masking `noise` [h, w] (see `MixMIMPretrainTransformer`).
        """
        images = batch["image"]
        latent, mask = self.backbone(images, noise=batch.get("noise"), rngs=rngs)
        loss = self.head.loss(self.neck(latent, mask, rngs=rngs), images, mask)
        own = latent.mean(axis=(1, 2), where=mask[None, ..., None] == 0)
        return loss, {"feature_std": spread(own)}

    def reconstruct(
        self,
        images: Float[Array, "b h w 3"],
        *,
        noise: Float[Array, "h w"] | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> dict[str, Float[Array, "b h w c"]]:
        """What the network makes of each image from its own patches in a mixture, in the space of the (normalised) images.

        With `norm_pix` the network predicts patches up to brightness and contrast; the true patches lend theirs.

        Returns:
            see `masking.pictures`; and `mixed`, the mixture that the network saw.
        """
        latent, mask = self.backbone(images, noise=noise, rngs=rngs)
        own = jnp.split(self.neck(latent, mask), 2)[0]
        prediction = self.head.unpatchify(self.head.to_pixels(own, images), *images.shape[1:3])
        made = pictures(images, prediction, jnp.broadcast_to(mask, (len(images), *mask.shape)))
        mixed = jnp.where(made["mask"] > 0, images[::-1].astype(prediction.dtype), made["masked"])
        return made | dict(mixed=mixed)

    def extract_feat(self, images: Float[Array, "b h w c"]) -> tuple[Array, ...]:
        """The backbone's features of whole images, nothing mixed."""
        return self.backbone(images, mask=None)

    def features(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b d"]:
        """The mean of the whole image's last map."""
        return last(self.extract_feat(images))
