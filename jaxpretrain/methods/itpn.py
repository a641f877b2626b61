"""iTPN: Integrally Pre-Trained Transformer Pyramid Networks (Tian et al., 2022, arXiv:2211.12735).

The feature pyramid, which detectors put on the encoder, is pre-trained with it: its levels reconstruct together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Num

from jaxpretrain.build import ConfigError, build, nearest
from jaxpretrain.methods.base import BaseSelfSupervisor, Batch, Metrics, draw_key, pool, spread, views
from jaxpretrain.methods.byol import CosineSimilarityLoss
from jaxpretrain.methods.latent import latent_pictures
from jaxpretrain.methods.mae_hivit import MAEHiViT
from jaxpretrain.methods.masking import batch_mask, check_grid, pictures, random_mask
from jaxpretrain.models.hivit import BlockWithRPE
from jaxpretrain.models.layers import BaseModule, Frozen, LayerNorm, Linear, build_norm
from jaxpretrain.models.layers.init import trunc_normal
from jaxpretrain.models.layers.position import build_2d_sincos_position_embedding
from jaxpretrain.models.layers.stack import apply_layers
from jaxpretrain.models.vision_transformer import TransformerEncoderLayer

_LN = {"type": "LN", "eps": 1e-6}
_TYPES = ("pixel", "clip")


def _check_type(owner: str, reconstruction_type: str) -> str:
    if reconstruction_type not in _TYPES:
        raise ConfigError(
            f"{owner}: unknown reconstruction_type {reconstruction_type!r}.{nearest(reconstruction_type, _TYPES)}"
        )
    return reconstruction_type


def _rescale(blocks: Any) -> None:
    """Divides the last matrices of the branches of block i by sqrt(2 i), i from 1, as BEiT does."""
    for i, block in enumerate(blocks, start=1):
        if isinstance(block, BlockWithRPE):
            for layer in [block.mlp.fc2] + ([block.attn.proj] if block.attn is not None else []):
                layer.kernel.set_value(layer.kernel.get_value() / math.sqrt(2.0 * i))


class iTPNHiViT(MAEHiViT):
    """The HiViT that also gives what its stages made, for a pyramid. Positions are fixed.

    Args:
        arch: as of `HiViT`.
        reconstruction_type: 'pixel': it encodes visible patches only, as `MAEHiViT`. 'clip': it encodes all, with a learnt
            token in the place of what the first stages made of hidden ones.
        mask_ratio: part of the patches that is hidden, for 'pixel'.
        kwargs: other arguments of `MAEHiViT`.
    """

    def __init__(
        self,
        arch: str | Mapping[str, Any] = "base",
        reconstruction_type: str = "pixel",
        mask_ratio: float = 0.75,
        *,
        rngs: nnx.Rngs,
        **kwargs: Any,
    ):
        super().__init__(arch=arch, mask_ratio=mask_ratio, rngs=rngs, **kwargs)
        self.reconstruction_type = _check_type("iTPNHiViT", reconstruction_type)
        clip = reconstruction_type == "clip"
        self.mask_token = nnx.Param(jnp.zeros((1, 1, self.embed_dims))) if clip else None

    def init_weights(self, rngs: nnx.Rngs) -> None:
        """'pixel': as `MAEHiViT`. 'clip': as `HiViT`, its positions too; the last matrices of the branches are scaled down."""
        super().init_weights(rngs)
        if self.mask_token is not None:
            draw = trunc_normal(0.02)
            for variable in (self.mask_token, self.pos_embed):
                if variable is not None:
                    variable.set_value(draw(rngs.params(), variable.shape))
            kernel = self.patch_embed.proj.kernel  # PyTorch's own
            bound = math.prod(kernel.shape[:-1]) ** -0.5
            kernel.set_value(jax.random.uniform(rngs.params(), kernel.shape, kernel.dtype, -bound, bound))
            _rescale(self.blocks)

    def __call__(  # type: ignore[override]
        self,
        x: Float[Array, "b height width 3"],
        mask: bool | Num[Array, "b h w"] | None = True,
        *,
        noise: Float[Array, "b n"] | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> Any:
        """Features of images with hidden patches; or, without a mask, as of `HiViT`.

        Args:
            x: images.
            mask: 'pixel': whether to hide patches. 'clip': 1 for each patch to hide. None: nothing is hidden.
            noise: as of `MAEHiViT`, for 'pixel'.
            rngs: for the noise, dropout and drop path.

        Returns:
            What each stage made: [B, N, 4, 4, C/4], [B, N, 2, 2, C/2], [B, N, C] of N patches. 'pixel': of visible ones, and
            with mask and ids_restore (see `MAEHiViT`).
        """
        if mask is None or mask is False:
            return super().__call__(x, mask=None, rngs=rngs)
        if self.mask_token is None:
            return self.encode_visible(x, noise, rngs)
        tokens, grid = self.patch_embed(x)
        if isinstance(mask, bool):
            raise ValueError("iTPNHiViT: reconstruction_type='clip' needs a mask of patches [B, h, w]")
        check_grid(mask, grid)
        tokens, stages = self.run_stem(tokens, rngs=rngs)
        hidden = mask.reshape(len(mask), -1, 1) > 0
        tokens = jnp.where(hidden, self.mask_token[...].astype(tokens.dtype), tokens)
        tokens = self.pos_drop(tokens + self.positions(grid, tokens.dtype), rngs=rngs)
        return (*stages, self.run_main(tokens, grid, rngs=rngs)[0])


class PatchSplit(BaseModule):
    """The opposite of merging: each token becomes 2x2."""

    def __init__(self, dim: int, fpn_dim: int, norm_cfg: Mapping[str, Any] = _LN, *, rngs: nnx.Rngs):
        self.norm = build_norm(norm_cfg, dim, rngs=rngs)
        self.reduction = Linear(dim, 4 * fpn_dim, bias=False, rngs=rngs)

    def __call__(self, x: Float[Array, "b n h w c"]) -> Float[Array, "b n 2*h 2*w d"]:
        b, n, h, w, _ = x.shape
        x = self.reduction(self.norm(x)).reshape(b, n, h, w, 2, 2, -1)
        return x.transpose(0, 1, 2, 4, 3, 5, 6).reshape(b, n, 2 * h, 2 * w, -1)


class iTPNPretrainDecoder(BaseModule):
    """The pyramid: coarse levels are split and added to what earlier stages made; a linear map of each level goes into one
    vector for each patch.

    Args:
        num_patches: patches of an image, one number if as many down as across, else a pair; for 'pixel'.
        patch_size: pixels per patch, down and across.
        in_chans: channels of the images.
        embed_dim: channels of the encoder.
        fpn_dim, fpn_depth: width of the pyramid, and blocks for each level that is made by splitting.
        decoder_embed_dim: channels of a patch's vector.
        decoder_depth, decoder_num_heads: of the transformer that makes pixels of it, for 'pixel'.
        mlp_ratio: hidden channels of MLPs, as a multiple.
        norm_cfg: the norms, but those of the maps of levels, which have PyTorch's epsilon.
        reconstruction_type: 'pixel': to pixels of all patches, with a mask token in the place of hidden ones. 'clip': to
            normalised vectors.
        num_outs: levels, 2 or 3.
        qkv_bias, qk_scale, attn_drop_rate: accepted; there is no attention in the pyramid.
        drop_rate: dropout of the pyramid's blocks.
        predict_feature_dim: channels to predict, for 'pixel'; by default the pixels of a patch.
        init_cfg: initialisation, MMEngine's dictionaries.

    Attributes:
        scan_layers, remat: how the transformer's layers are run (see `apply_layers`).
    """

    def __init__(
        self,
        num_patches: int | tuple[int, int] = 196,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 512,
        fpn_dim: int = 256,
        fpn_depth: int = 2,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 6,
        decoder_num_heads: int = 16,
        mlp_ratio: float = 4.0,
        norm_cfg: Mapping[str, Any] = _LN,
        reconstruction_type: str = "pixel",
        num_outs: int = 3,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        predict_feature_dim: int | None = None,
        init_cfg: Any = None,
        *,
        rngs: nnx.Rngs,
    ):
        self.reconstruction_type = _check_type("iTPNPretrainDecoder", reconstruction_type)
        if num_outs not in (2, 3):
            raise ConfigError(f"iTPNPretrainDecoder: num_outs={num_outs}, but the pyramid has 2 or 3 levels")
        side = math.isqrt(num_patches) if isinstance(num_patches, int) else 0
        grid: tuple[int, int] = (side, side) if isinstance(num_patches, int) else (num_patches[0], num_patches[1])
        if isinstance(num_patches, int) and math.prod(grid) != num_patches:
            raise ConfigError(f"iTPNPretrainDecoder: num_patches={num_patches} is no square; give (down, across)")
        self.grid, self.embed_dim, self.num_outs, self.init_cfg = grid, embed_dim, num_outs, init_cfg
        self.scan_layers, self.remat = False, "none"

        def block() -> BlockWithRPE:
            return BlockWithRPE(fpn_dim, 0, mlp_ratio, drop=drop_rate, norm_cfg=norm_cfg, rngs=rngs)

        self.align_dim_16tofpn = Linear(embed_dim, fpn_dim, rngs=rngs) if embed_dim != fpn_dim else None
        self.fpn_modules = nnx.List([block() for _ in range(num_outs)])
        self.align_dim_16to8 = Linear(embed_dim // 2, fpn_dim, bias=False, rngs=rngs)
        self.split_16to8 = PatchSplit(embed_dim, fpn_dim, norm_cfg, rngs=rngs)
        self.block_16to8 = nnx.List([block() for _ in range(fpn_depth)])
        if num_outs == 3:
            self.align_dim_8to4 = Linear(embed_dim // 4, fpn_dim, bias=False, rngs=rngs)
            self.split_8to4 = PatchSplit(fpn_dim, fpn_dim, norm_cfg, rngs=rngs)
            self.block_8to4 = nnx.List([block() for _ in range(fpn_depth)])
        self.decoder_embed = nnx.List(
            [
                nnx.List([LayerNorm(fpn_dim, rngs=rngs), Linear(fpn_dim, decoder_embed_dim // 4**i, rngs=rngs)])
                for i in range(num_outs)
            ]
        )
        if reconstruction_type == "clip":
            self.norm = build_norm(norm_cfg, decoder_embed_dim, rngs=rngs)
            return
        self.mask_token = nnx.Param(jnp.zeros((1, 1, decoder_embed_dim)))
        self.decoder_pos_embed = Frozen(build_2d_sincos_position_embedding(grid, decoder_embed_dim))
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

    def init_weights(self, rngs: nnx.Rngs) -> None:
        """Besides `init_cfg`: 'pixel': positions, and the mask token from N(0, 0.02); 'clip': the pyramid's last blocks'
        last matrices are scaled down."""
        super().init_weights(rngs)
        if self.reconstruction_type == "clip":
            _rescale(self.fpn_modules)
            return
        table = build_2d_sincos_position_embedding(self.grid, self.decoder_pos_embed.shape[-1])
        self.decoder_pos_embed.set_value(table)
        self.mask_token.set_value(0.02 * jax.random.normal(rngs.params(), self.mask_token.shape))

    def __call__(
        self,
        x: tuple[Float[Array, "b v 4 4 c1"], Float[Array, "b v 2 2 c2"], Float[Array, "b v c"]],
        ids_restore: Int[Array, "b n"] | None = None,
        *,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "b n p"]:
        """The prediction for every patch, hidden or not; for 'clip', the vectors of the patches at hand.

        Args:
            x: what the encoder's stages made of the patches; for 'pixel', of visible ones.
            ids_restore: for 'pixel', the place of each patch when visible ones come first.
            rngs: for dropout, if there is any.
        """
        levels = self.pyramid(x, rngs)
        if self.reconstruction_type == "clip":
            return self.norm(sum(levels[1:], levels[0]))
        if ids_restore is None or ids_restore.shape[1] != math.prod(self.grid):
            found = "none" if ids_restore is None else ids_restore.shape[1]
            raise ValueError(
                f"iTPNPretrainDecoder is for {self.grid[0]}x{self.grid[1]} patches, and got {found}: train at the "
                "backbone's img_size, or set neck.num_patches"
            )
        b, n = ids_restore.shape
        hidden = n - levels[0].shape[1]
        # Each level has a mask token in the place of a hidden patch: so their sum has one for each level.
        token = self.num_outs * self.mask_token[...].astype(levels[0].dtype)
        tokens = jnp.broadcast_to(token, (b, hidden, token.shape[-1]))
        patches = jnp.concatenate([sum(levels[1:], levels[0]), tokens], axis=1)
        patches = jnp.take_along_axis(patches, ids_restore[:, :, None], axis=1)
        patches = patches + self.decoder_pos_embed[...].astype(patches.dtype)
        patches, _ = apply_layers(
            self.decoder_blocks, patches, rngs=rngs, scan_layers=self.scan_layers, remat=self.remat
        )
        return self.decoder_pred(self.ln1(patches))

    def pyramid(self, x: tuple[Array, Array, Array], rngs: nnx.Rngs | None) -> list[Float[Array, "b v d"]]:
        """What each level, the coarsest first, says of the patches."""

        def run(blocks: Any, x: Array) -> Array:
            return apply_layers(blocks, x, rngs=rngs, scan_layers=self.scan_layers, remat=self.remat)[0]

        fine, middle, coarse = x
        coarse = coarse[:, :, None, None]
        levels = [coarse if self.align_dim_16tofpn is None else self.align_dim_16tofpn(coarse)]
        levels.append(run(self.block_16to8, self.split_16to8(coarse) + self.align_dim_16to8(middle)))
        if self.num_outs == 3:
            levels.append(run(self.block_8to4, self.split_8to4(levels[1]) + self.align_dim_8to4(fine)))
        said = []
        for level, block, (norm, linear) in zip(levels, self.fpn_modules, self.decoder_embed, strict=True):
            level = linear(norm(run([block], level)))
            said.append(level.reshape(*level.shape[:2], -1))
        return said


class iTPNClipHead(BaseModule):
    """A linear map of features to those of CLIP (`cls_head`), and its loss over hidden patches.

    Args:
        embed_dims, num_embed: channels of the features and of CLIP's.
        loss: `CosineSimilarityLoss`, as in the paper; or `CrossEntropyLoss`, as in MMPretrain's longer recipe, with CLIP's
            features for probabilities, which they are not: it has no minimum.
        init_cfg: initialisation, MMEngine's dictionaries.
    """

    def __init__(
        self,
        embed_dims: int,
        num_embed: int,
        loss: Mapping[str, Any] | nnx.Module,
        init_cfg: Any = {"type": "TruncNormal", "layer": "Linear", "std": 0.02, "bias": 0.0},  # noqa: B006 - read only
        *,
        rngs: nnx.Rngs,
    ):
        self.init_cfg = init_cfg
        self.cls_head = Linear(embed_dims, num_embed, rngs=rngs)
        self.loss_module = build(loss)

    def loss(
        self, feats: Float[Array, "b n c"], target: Float[Array, "b n d"], mask: Num[Array, "b h w"]
    ) -> Float[Array, ""]:
        """The mean over hidden patches of the loss of features of all patches."""
        logits, hidden = self.cls_head(feats), (mask.reshape(-1) > 0).astype(jnp.float32)
        if isinstance(self.loss_module, CosineSimilarityLoss):
            return self.loss_module(logits, target, hidden.reshape(logits.shape[:2]))
        flat = logits.reshape(-1, logits.shape[-1])
        count = jnp.maximum(hidden.sum(), 1)
        return self.loss_module(flat, target.reshape(flat.shape), weight=hidden, avg_factor=count)


class iTPN(BaseSelfSupervisor):
    """Reconstructs hidden patches by a pyramid on the encoder: their pixels, or CLIP's features of them.

    The backbone is an `iTPNHiViT`, the neck an `iTPNPretrainDecoder` (whose `num_patches`, `embed_dim` and
    `reconstruction_type` are the backbone's where not given). For 'pixel', the head is a `MAEPretrainHead`, and patches are
    hidden at random. For 'clip', it is an `iTPNClipHead`, the target generator a `CLIPGenerator`; a batch has two pictures of
    each image, the second for CLIP, and masks, from `BEiTMaskGenerator`.

    Raises:
        ConfigError: parts that do not fit together.
    """

    def __init__(self, *, rngs: nnx.Rngs, **parts: Any):
        super().__init__(rngs=rngs, **parts)
        ours, theirs = self.neck.reconstruction_type, self.backbone.reconstruction_type
        if ours != theirs:
            raise ConfigError(f"iTPN: neck.reconstruction_type={ours!r} is not the backbone's, {theirs!r}")
        if (width := self.neck.embed_dim) != self.backbone.embed_dims:
            raise ConfigError(f"iTPN: neck.embed_dim={width} is not the backbone's width {self.backbone.embed_dims}")
        if self.is_clip and not hasattr(self, "target_generator"):
            raise ConfigError("iTPN: reconstruction_type='clip' needs target_generator=dict(type='CLIPGenerator', ...)")

    def neck_defaults(self) -> dict[str, Any]:
        backbone = self.backbone
        return dict(
            num_patches=backbone.patch_resolution,
            embed_dim=backbone.embed_dims,
            reconstruction_type=backbone.reconstruction_type,
        )

    @property
    def is_clip(self) -> bool:
        return self.backbone.reconstruction_type == "clip"

    def loss(self, batch: Batch, *, rngs: nnx.Rngs | None = None) -> tuple[Float[Array, ""], Metrics]:
        """The error over hidden patches. Logs `feature_std`, of the mean over the patches that the encoder saw.

        For 'pixel', a batch may bring its own masking `noise` [B, N] (see `MAEHiViT`).
        """
        if not self.is_clip:
            images = batch["image"]
            latent, mask, ids_restore = self.backbone(images, noise=batch.get("noise"), rngs=rngs)
            loss = self.head.loss(self.neck(latent, ids_restore, rngs=rngs), images, mask)
        else:
            mask = batch_mask(batch, "BEiTMaskGenerator")
            images, seen_by_clip = views(batch, 2)
            latent = self.backbone(images, mask, rngs=rngs)
            target = jax.lax.stop_gradient(self.target_generator(seen_by_clip)[0])
            loss = self.head.loss(self.neck(latent, rngs=rngs), target[:, 1:], mask)
        return loss, {"feature_std": spread(latent[-1].mean(axis=1))}

    def reconstruct(
        self,
        images: Float[Array, "b h w 3"],
        *,
        mask: Int[Array, "b n m"] | None = None,
        noise: Float[Array, "b n"] | None = None,
        mask_ratio: float = 0.4,
        rngs: nnx.Rngs | None = None,
    ) -> dict[str, Array]:
        """What the network makes of images of which it sees a part, in the space of the (normalised) images.

        Args:
            images: whole images. For 'clip' they are also what CLIP sees, in the encoder's colours.
            mask: which patches to hide, for 'clip'; by default `mask_ratio` of them, drawn from `rngs.mask`.
            noise: for 'pixel', as of `MAEHiViT`.
            rngs: for mask or noise.

        Returns:
            For 'pixel' see `masking.pictures`, for 'clip' `latent_pictures`.
        """
        b, height, width, _ = images.shape
        p, q = self.backbone.patch_embed.patch_size
        grid = (height // p, width // q)
        if not self.is_clip:
            latent, hidden, ids_restore = self.backbone(images, noise=noise, rngs=rngs)
            patches = self.head.to_pixels(self.neck(latent, ids_restore), images)
            return pictures(images, self.head.unpatchify(patches, height, width), hidden.reshape(b, *grid))
        if mask is None:
            mask = random_mask(draw_key(rngs, "mask"), b, grid, mask_ratio)
        pred = self.head.cls_head(self.neck(self.backbone(images, mask)))
        target = self.target_generator(images)[0][:, 1:]
        return latent_pictures(images, mask.reshape(b, -1).astype(jnp.float32), pred, target, grid)

    def extract_feat(self, images: Float[Array, "b h w c"]) -> tuple[Array, ...]:
        """The backbone's map of whole images, nothing hidden."""
        return self.backbone(images, mask=None)

    def features(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b d"]:
        """The mean over patches of the whole image's encoding."""
        return pool(self.extract_feat(images))
