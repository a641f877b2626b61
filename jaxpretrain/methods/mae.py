"""MAE (He et al., 2022, Masked Autoencoders Are Scalable Vision Learners)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers
from jaxtyping import Array, Float, Int

from jaxpretrain.build import ConfigError, build
from jaxpretrain.methods.base import BaseSelfSupervisor, Batch, Metrics, draw_key, last, spread
from jaxpretrain.models.layers import BaseModule, Frozen, Linear, build_norm
from jaxpretrain.models.layers.position import build_2d_sincos_position_embedding
from jaxpretrain.models.layers.stack import apply_layers
from jaxpretrain.models.vision_transformer import TransformerEncoderLayer, VisionTransformer

# What all of MMPretrain's recipes say, and the paper (appendix A.1) does.
_INIT = (
    {"type": "Xavier", "layer": "Linear", "distribution": "uniform"},
    {"type": "Constant", "layer": "LayerNorm", "val": 1.0, "bias": 0.0},
)


class MAEViT(VisionTransformer):
    """The Vision Transformer that encodes visible patches only; positions are a fixed sin-cos table.

    Args:
        arch: as of `VisionTransformer`.
        out_type: what a call without a mask returns; `MAE.features` needs 'raw'.
        mask_ratio: part of the patches that is hidden, in [0, 1).
        kwargs: other arguments of `VisionTransformer`.
    """

    def __init__(
        self,
        arch: str | Mapping[str, int] = "b",
        out_type: str = "raw",
        mask_ratio: float = 0.75,
        *,
        rngs: nnx.Rngs,
        **kwargs: Any,
    ):
        super().__init__(arch=arch, out_type=out_type, rngs=rngs, **kwargs)
        if not 0 <= mask_ratio < 1:
            raise ConfigError(f"MAEViT: mask_ratio={mask_ratio} must be in [0, 1)")
        if self.cls_token is None:
            raise ConfigError("MAEViT: with_cls_token=False is not supported; the decoder expects a class token")
        if self.register_tokens is not None:
            raise ConfigError("MAEViT: num_registers is not supported; the decoder would take registers for patches")
        self.mask_ratio = mask_ratio
        self.pos_embed = Frozen(self._positions())

    def _positions(self) -> Float[Array, "1 n c"]:
        return build_2d_sincos_position_embedding(self.patch_resolution, self.embed_dims, cls_token=True)

    def init_weights(self, rngs: nnx.Rngs) -> None:
        """Besides `init_cfg`: the patch embedding as a Glorot-uniform matrix [pixels, channels]; token N(0, 0.02)."""
        super().init_weights(rngs)
        self.pos_embed.set_value(self._positions())
        kernel = self.patch_embed.projection.kernel
        matrix = (math.prod(kernel.shape[:-1]), kernel.shape[-1])
        kernel.set_value(initializers.xavier_uniform()(rngs.params(), matrix, kernel.dtype).reshape(kernel.shape))
        assert self.cls_token is not None
        self.cls_token.set_value(0.02 * jax.random.normal(rngs.params(), self.cls_token.shape))

    def __call__(  # type: ignore[override]
        self,
        x: Float[Array, "b h w c"],
        mask: bool | None = True,
        *,
        noise: Float[Array, "b n"] | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> Any:
        """The visible tokens' features, and what was hidden; or, without a mask, features as of `VisionTransformer`.

        Args:
            x: images.
            mask: whether to hide patches; None is False.
            noise: which ones: the patches of each image with the smallest noise stay. Drawn from `rngs.mask` if None.
            rngs: for the noise and drop path.

        Returns:
            With a mask: latent [B, 1 + visible, C], class token first; mask [B, N], 1 where hidden; and ids_restore
            [B, N], the place of each patch when visible patches come first.
        """
        if not mask:
            return super().__call__(x, rngs=rngs)
        tokens, _ = self.embed(x)
        if noise is None:
            noise = jax.random.uniform(draw_key(rngs, "mask"), tokens.shape[:2])
        tokens, hidden, ids_restore = self.random_masking(tokens, noise)
        tokens = self.drop_after_pos(self.add_cls_token(tokens), rngs=rngs)
        latent = self.run_layers(tokens, rngs=rngs)
        return (latent if self.ln1 is None else self.ln1(latent)), hidden, ids_restore

    def random_masking(
        self, tokens: Float[Array, "b n c"], noise: Float[Array, "b n"]
    ) -> tuple[Float[Array, "b v c"], Float[Array, "b n"], Int[Array, "b n"]]:
        """The int(n (1 - mask_ratio)) tokens of the smallest noise, in its order; mask and ids_restore as above."""
        visible = int(tokens.shape[1] * (1 - self.mask_ratio))
        order = jnp.argsort(noise, axis=1)
        ids_restore = jnp.argsort(order, axis=1)
        kept = jnp.take_along_axis(tokens, order[:, :visible, None], axis=1)
        return kept, (ids_restore >= visible).astype(jnp.float32), ids_restore


class MAEPretrainDecoder(BaseModule):
    """A small transformer that sees all patches: encoded ones, and a learnt mask token for the rest.

    Args:
        num_patches: patches of an image, one number if as many down as across, else a pair.
        patch_size: pixels per patch, down and across.
        in_chans: channels of the images.
        embed_dim: channels of the encoder.
        decoder_embed_dim, decoder_depth, decoder_num_heads: width, layers and heads of the decoder.
        mlp_ratio: hidden channels of the feed-forward halves, in multiples of the width.
        norm_cfg: all norms.
        predict_feature_dim: channels to predict; by default the pixels of a patch.
        init_cfg: initialisation, MMEngine's dictionaries.
        with_cls_token: whether a class token comes first. MMPretrain always takes the first token for one, also a HiViT's,
            which has none: its first visible patch. Its other visible patches then get the place of the one before them.
            Its recipes and weights are so.

    Attributes:
        scan_layers, remat: how the layers are run (see `apply_layers`); False and 'none' unless set.
    """

    def __init__(
        self,
        num_patches: int | tuple[int, int] = 196,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 1024,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        mlp_ratio: float = 4.0,
        norm_cfg: Mapping[str, Any] = {"type": "LN", "eps": 1e-6},
        predict_feature_dim: int | None = None,
        init_cfg: Any = None,
        with_cls_token: bool = True,
        *,
        rngs: nnx.Rngs,
    ):
        side = math.isqrt(num_patches) if isinstance(num_patches, int) else 0
        grid: tuple[int, int] = (side, side) if isinstance(num_patches, int) else (num_patches[0], num_patches[1])
        if isinstance(num_patches, int) and math.prod(grid) != num_patches:
            raise ConfigError(f"MAEPretrainDecoder: num_patches={num_patches} is no square; give (down, across)")
        self.grid, self.init_cfg, self.num_extra_tokens = grid, init_cfg, int(with_cls_token)
        self.scan_layers, self.remat = False, "none"
        self.decoder_embed = Linear(embed_dim, decoder_embed_dim, rngs=rngs)
        self.mask_token = nnx.Param(jnp.zeros((1, 1, decoder_embed_dim)))
        self.decoder_pos_embed = Frozen(self._positions())
        self.decoder_blocks = nnx.List(
            [
                TransformerEncoderLayer(
                    decoder_embed_dim,
                    decoder_num_heads,
                    int(mlp_ratio * decoder_embed_dim),
                    norm_cfg=norm_cfg,
                    rngs=rngs,
                )
                for _ in range(decoder_depth)
            ]
        )
        self.ln1 = build_norm(norm_cfg, decoder_embed_dim, rngs=rngs)
        self.decoder_pred = Linear(decoder_embed_dim, predict_feature_dim or patch_size**2 * in_chans, rngs=rngs)

    def _positions(self) -> Float[Array, "1 n c"]:
        width, first = self.decoder_embed.out_features, bool(self.num_extra_tokens)
        return build_2d_sincos_position_embedding(self.grid, width, cls_token=first)

    def init_weights(self, rngs: nnx.Rngs) -> None:
        """Besides `init_cfg`: the mask token from N(0, 0.02)."""
        super().init_weights(rngs)
        self.decoder_pos_embed.set_value(self._positions())
        self.mask_token.set_value(0.02 * jax.random.normal(rngs.params(), self.mask_token.shape))

    def __call__(
        self, x: Float[Array, "b v c"], ids_restore: Int[Array, "b n"], *, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "b n p"]:
        """The prediction for every patch, hidden or not.

        Args:
            x: class token and visible patches, as the encoder gives them.
            ids_restore: the place of each patch when visible ones come first.
            rngs: unused; there is no dropout here.
        """
        if ids_restore.shape[1] != math.prod(self.grid):
            raise ValueError(
                f"MAEPretrainDecoder is for {self.grid[0]}x{self.grid[1]} patches, and got {ids_restore.shape[1]}: "
                "train at the backbone's img_size, or set neck.num_patches"
            )
        x = self.decoder_embed(x)
        b, n, c = *ids_restore.shape, x.shape[2]
        first = self.num_extra_tokens
        cls_token, visible = x[:, :first], x[:, first:]
        mask_tokens = jnp.broadcast_to(self.mask_token[...].astype(x.dtype), (b, n - visible.shape[1], c))
        patches = jnp.concatenate([visible, mask_tokens], axis=1)
        patches = jnp.take_along_axis(patches, ids_restore[:, :, None], axis=1)
        x = jnp.concatenate([cls_token, patches], axis=1) + self.decoder_pos_embed[...].astype(x.dtype)
        x, _ = apply_layers(self.decoder_blocks, x, rngs=rngs, scan_layers=self.scan_layers, remat=self.remat)
        return self.decoder_pred(self.ln1(x))[:, first:]


class MAEPretrainHead(BaseModule):
    """Compares predicted with true pixels, patch by patch.

    Args:
        loss: called with prediction, target and mask; `PixelReconstructionLoss`.
        norm_pix: whether a target patch is normalised by its own mean and variance (unbiased, as PyTorch's `var`).
        patch_size: pixels per patch, down and across.
        in_channels: channels of the images.
    """

    def __init__(
        self, loss: Mapping[str, Any] | nnx.Module, norm_pix: bool = False, patch_size: int = 16, in_channels: int = 3
    ):
        self.loss_module = build(loss)
        self.norm_pix, self.patch_size, self.in_channels = norm_pix, patch_size, in_channels

    def patchify(self, images: Float[Array, "b h w c"]) -> Float[Array, "b n p"]:
        """Patches in row-major order, the values of each in the order (row, column, channel)."""
        b, height, width, c = images.shape
        p = self.patch_size
        if height % p or width % p:
            raise ValueError(f"MAEPretrainHead: images of {height}x{width} px do not divide into patches of {p}")
        grid = images.reshape(b, height // p, p, width // p, p, c)
        return grid.transpose(0, 1, 3, 2, 4, 5).reshape(b, -1, p * p * c)

    def unpatchify(self, patches: Float[Array, "b n p"], height: int, width: int) -> Float[Array, "b h w c"]:
        """The inverse of `patchify`, for images of the given size."""
        b, p = patches.shape[0], self.patch_size
        grid = patches.reshape(b, height // p, width // p, p, p, self.in_channels)
        return grid.transpose(0, 1, 3, 2, 4, 5).reshape(b, height, width, self.in_channels)

    def construct_target(self, images: Float[Array, "b h w c"]) -> Float[Array, "b n p"]:
        """What the decoder shall predict, in float32 at least."""
        patches, mean, std = self._statistics(images)
        return (patches - mean) / std if self.norm_pix else patches

    def loss(
        self, pred: Float[Array, "b n p"], target: Float[Array, "b h w c"], mask: Float[Array, "b n"]
    ) -> Float[Array, ""]:
        """The error of predicted patches against images, where the mask is 1."""
        return self.loss_module(pred, self.construct_target(target), mask)

    def to_pixels(self, pred: Float[Array, "b n p"], images: Float[Array, "b h w c"]) -> Float[Array, "b n p"]:
        """Predicted patches as pixels: with `norm_pix`, scaled and shifted as the images' own patches are."""
        _, mean, std = self._statistics(images)
        pred = pred.astype(mean.dtype)
        return pred * std + mean if self.norm_pix else pred

    def _statistics(self, images: Array) -> tuple[Array, Array, Array]:
        """Patches, their means, and their standard deviations with the paper's epsilon; [B, N, P], [B, N, 1] twice."""
        patches = self.patchify(images.astype(jnp.promote_types(images.dtype, jnp.float32)))
        mean = patches.mean(axis=-1, keepdims=True)
        return patches, mean, jnp.sqrt(patches.var(axis=-1, keepdims=True, ddof=1) + 1e-6)


class MAE(BaseSelfSupervisor):
    """Reconstructs the pixels of hidden patches from visible ones, by an encoder, and a decoder that is dropped later.

    The backbone is a `MAEViT` or a `MAEHiViT`; the neck the decoder, whose `num_patches` and `embed_dim` are the backbone's
    where not given; the head makes targets and loss. `init_cfg` is by default the paper's, as in MMPretrain's recipes.

    Raises:
        ConfigError: parts that do not fit together.
    """

    def __init__(self, init_cfg: Any = _INIT, *, rngs: nnx.Rngs, **parts: Any):
        super().__init__(init_cfg=init_cfg, rngs=rngs, **parts)
        self._check_shapes()

    def neck_defaults(self) -> dict[str, Any]:
        return dict(num_patches=self.backbone.patch_resolution, embed_dim=self.backbone.embed_dims)

    def _check_shapes(self) -> None:
        p, c = self.head.patch_size, self.head.in_channels
        for what, ours, name, theirs in (
            ("neck.num_patches", tuple(self.neck.grid), "the backbone's patches", self.backbone.patch_resolution),
            ("neck.embed_dim", self.neck.decoder_embed.in_features, "the backbone's width", self.backbone.embed_dims),
            ("neck's prediction", self.neck.decoder_pred.out_features, "the head's pixels per patch", p * p * c),
            ("head.patch_size", (p, p), "the backbone's", self.backbone.patch_embed.patch_size),
        ):
            if ours != theirs:
                raise ConfigError(f"MAE: {what} {ours} is not {name} {theirs}; make backbone, neck and head agree")

    def loss(self, batch: Batch, *, rngs: nnx.Rngs | None = None) -> tuple[Float[Array, ""], Metrics]:
        """The error over hidden patches. Logs `feature_std`, of the mean over visible patches.

        A batch may bring its own masking `noise` [B, N] (see `MAEViT`); otherwise it is drawn from `rngs.mask`.
        """
        images = batch["image"]
        latent, mask, ids_restore = self.backbone(images, noise=batch.get("noise"), rngs=rngs)
        loss = self.head.loss(self.neck(latent, ids_restore, rngs=rngs), images, mask)
        return loss, {"feature_std": spread(latent[:, self.backbone.num_extra_tokens :].mean(axis=1))}

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
            `masked`: the images, 0 (the mean colour) where hidden. `reconstructed`: the prediction everywhere.
            `pasted`: the prediction where hidden, else the images. `mask`: [B, H, W, 1], 1 where hidden. All are
            float32 at least.
        """
        latent, mask, ids_restore = self.backbone(images, noise=noise, rngs=rngs)
        patches = self.head.to_pixels(self.neck(latent, ids_restore), images)
        height, width = images.shape[1:3]
        prediction = self.head.unpatchify(patches, height, width)
        images = images.astype(prediction.dtype)
        hidden = self.head.unpatchify(jnp.broadcast_to(mask[:, :, None], patches.shape), height, width)
        hidden = hidden.astype(prediction.dtype)
        return dict(
            masked=images * (1 - hidden),
            reconstructed=prediction,
            pasted=jnp.where(hidden > 0, prediction, images),
            mask=hidden[..., :1],
        )

    def extract_feat(self, images: Float[Array, "b h w c"]) -> Any:
        """The backbone's features of whole images, nothing hidden."""
        return self.backbone(images, mask=None)

    def features(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b d"]:
        """The mean over patches of the whole image's encoding.

        MMPretrain probes the class token, and fine-tunes the mean; in small encoders the mean says more.
        """
        tokens = last(self.extract_feat(images))  # HiViT's are a map
        tokens = tokens.reshape(len(tokens), -1, tokens.shape[-1])[:, self.backbone.num_extra_tokens :]
        return tokens.mean(axis=1, dtype=jnp.promote_types(tokens.dtype, jnp.float32)).astype(tokens.dtype)
