"""MILAN: Masked Image Pretraining on Language Assisted Representation (Hou et al., 2022)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxpretrain.build import ConfigError, build
from jaxpretrain.methods.base import BaseSelfSupervisor, Batch, Metrics, draw_key, last, spread
from jaxpretrain.methods.latent import latent_pictures, mean_of_tokens
from jaxpretrain.methods.mae import MAEPretrainDecoder, MAEViT
from jaxpretrain.models.layers import BaseModule, Linear, MultiheadAttention, apply_layers
from jaxpretrain.models.layers.attention import scaled_dot_product_attention
from jaxpretrain.models.vision_transformer import TransformerEncoderLayer


class MILANViT(MAEViT):
    """An encoder of visible patches, which are drawn by importance: the more important, the more likely they are seen.

    Args:
        args, kwargs: as of `MAEViT`.
    """

    def __call__(  # type: ignore[override]
        self,
        x: Float[Array, "b h w c"],
        importance: Float[Array, "b n"] | None = None,
        *,
        noise: Float[Array, "b n"] | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> Any:
        """The visible tokens' features, and which they are; or features as of `VisionTransformer`, without `importance`.

        Args:
            x: images.
            importance: of each patch, 0 or more; how much CLIP's class token looks at it.
            noise: as of `attention_masking`. Drawn from `rngs.mask` if None.
            rngs: for the noise and drop path.

        Returns:
            With `importance`: latent [B, 1 + visible, C], class token first; ids_restore [B, N], the place of each patch
            when visible ones come first; ids_keep [B, visible] and ids_dump [B, hidden], the patches seen and not.
        """
        if importance is None:
            return super().__call__(x, mask=None, rngs=rngs)
        tokens, _ = self.embed(x)
        if noise is None:
            noise = jax.random.gumbel(draw_key(rngs, "mask"), importance.shape)
        tokens, ids_restore, ids_keep, ids_dump = self.attention_masking(tokens, importance, noise)
        tokens = self.drop_after_pos(self.add_cls_token(tokens), rngs=rngs)
        latent = self.run_layers(tokens, rngs=rngs)
        return (latent if self.ln1 is None else self.ln1(latent)), ids_restore, ids_keep, ids_dump

    def attention_masking(
        self, tokens: Float[Array, "b n c"], importance: Float[Array, "b n"], noise: Float[Array, "b n"]
    ) -> tuple[Float[Array, "b v c"], Int[Array, "b n"], Int[Array, "b v"], Int[Array, "b d"]]:
        """The visible tokens, and ids_restore, ids_keep, ids_dump.

        Patches are drawn one after the other without replacement, with probabilities in proportion to their importance:
        sorting log(importance) + Gumbel noise does that. Without noise, the most important ones are seen.
        """
        visible = int(tokens.shape[1] * (1 - self.mask_ratio))
        order = jnp.argsort(-(jnp.log(importance) + noise), axis=1)
        kept = jnp.take_along_axis(tokens, order[:, :visible, None], axis=1)
        return kept, jnp.argsort(order, axis=1), order[:, :visible], order[:, visible:]


class PromptMultiheadAttention(MultiheadAttention):
    """Hidden tokens ask, hidden and visible ones answer.

    Args:
        embed_dims, num_heads: as of `MultiheadAttention`.
    """

    def __init__(self, embed_dims: int, num_heads: int, *, rngs: nnx.Rngs):
        super().__init__(embed_dims, num_heads, rngs=rngs)
        del self.qkv
        self.q = Linear(embed_dims, embed_dims, rngs=rngs)
        self.kv = Linear(embed_dims, 2 * embed_dims, rngs=rngs)

    def __call__(  # type: ignore[override]
        self, x: Float[Array, "b d c"], visible: Float[Array, "b v c"], *, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "b d c"]:
        q = self.q(x).reshape(*x.shape[:2], self.num_heads, self.head_dims)
        kv = self.kv(jnp.concatenate([visible, x], axis=1))
        kv = kv.reshape(*kv.shape[:2], 2, self.num_heads, self.head_dims)
        y = scaled_dot_product_attention(self, q, kv[:, :, 0], kv[:, :, 1], scale=self.scale)
        return self.proj(y.reshape(x.shape))


class PromptTransformerEncoderLayer(TransformerEncoderLayer):
    """A block that changes hidden tokens alone; visible ones prompt it, as they came from the encoder.

    Args:
        embed_dims, num_heads, args: as of `TransformerEncoderLayer`.
    """

    def __init__(self, embed_dims: int, num_heads: int, *args: Any, rngs: nnx.Rngs, **kwargs: Any):
        super().__init__(embed_dims, num_heads, *args, rngs=rngs, **kwargs)
        self.attn: Any = PromptMultiheadAttention(embed_dims, num_heads, rngs=rngs)

    def __call__(  # type: ignore[override]
        self,
        x: Float[Array, "b d c"],
        *,
        visible: Float[Array, "b v c"],
        rngs: nnx.Rngs | None = None,
        drop_path_rate: float | Array | None = None,
    ) -> Float[Array, "b d c"]:
        x = x + self.attn(self.ln1(x), visible)
        return x + self.ffn(self.ln2(x))


class MILANPretrainDecoder(MAEPretrainDecoder):
    """The prompting decoder: visible tokens stay as the encoder made them, so that the encoder has to make them good.

    Args:
        predict_feature_dim: channels of the target features.
        num_patches, ...: as of `MAEPretrainDecoder`.
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
        predict_feature_dim: int = 512,
        mlp_ratio: float = 4,
        norm_cfg: Mapping[str, Any] = {"type": "LN", "eps": 1e-6},
        init_cfg: Any = None,
        *,
        rngs: nnx.Rngs,
    ):
        super().__init__(
            num_patches,
            patch_size,
            in_chans,
            embed_dim,
            decoder_embed_dim,
            decoder_depth=0,
            norm_cfg=norm_cfg,
            predict_feature_dim=predict_feature_dim,
            init_cfg=init_cfg,
            rngs=rngs,
        )
        layer = partial(
            PromptTransformerEncoderLayer,
            decoder_embed_dim,
            decoder_num_heads,
            int(mlp_ratio * decoder_embed_dim),
            norm_cfg=norm_cfg,
        )
        self.decoder_blocks = nnx.List([layer(rngs=rngs) for _ in range(decoder_depth)])

    def __call__(  # type: ignore[override]
        self,
        x: Float[Array, "b m c"],
        ids_restore: Int[Array, "b n"],
        ids_keep: Int[Array, "b v"],
        ids_dump: Int[Array, "b d"],
        *,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "b k p"]:
        """The prediction for the class token and every patch, [B, 1 + N, P].

        Args:
            x: class token and visible patches, as the encoder gives them.
            ids_restore, ids_keep, ids_dump: as of `MILANViT`.
            rngs: unused; there is no dropout here.
        """
        if ids_restore.shape[1] != math.prod(self.grid):
            raise ValueError(
                f"MILANPretrainDecoder is for {self.grid[0]}x{self.grid[1]} patches, and got {ids_restore.shape[1]}: "
                "train at the backbone's img_size, or set neck.num_patches"
            )
        x = self.decoder_embed(x)
        positions = self.decoder_pos_embed[...].astype(x.dtype)

        def at(ids: Int[Array, "b k"]) -> Float[Array, "b k c"]:
            return positions[0, 1:][ids]

        token = x[:, :1] + positions[:, :1]
        visible = x[:, 1:] + at(ids_keep)
        hidden = self.mask_token[...].astype(x.dtype) + at(ids_dump)
        prompt = jnp.concatenate([token, visible], axis=1)
        hidden, _ = apply_layers(
            self.decoder_blocks,
            hidden,
            rngs=rngs,
            scan_layers=self.scan_layers,
            remat=self.remat,
            shared={"visible": prompt},
        )
        patches = jnp.concatenate([visible, hidden], axis=1)
        patches = jnp.take_along_axis(patches, ids_restore[:, :, None], axis=1)
        return self.decoder_pred(self.ln1(jnp.concatenate([token, patches], axis=1)))


class MIMHead(BaseModule):
    """Compares predicted with target features.

    Args:
        loss: called with prediction, target and mask; `CosineSimilarityLoss`.
    """

    def __init__(self, loss: Mapping[str, Any] | nnx.Module):
        self.loss_module = build(loss)

    def loss(
        self, pred: Float[Array, "b n d"], target: Float[Array, "b n d"], mask: Float[Array, "b n"] | None = None
    ) -> Float[Array, ""]:
        """The loss over all tokens; with a mask, over those where it is 1."""
        return self.loss_module(pred, target, mask)


class CLIPTargets(BaseSelfSupervisor):
    """What MILAN and EVA have in common: a MAE whose targets are CLIP's features of the image (`target_generator`).

    Raises:
        ConfigError: parts that do not fit together.
    """

    def __init__(self, *, rngs: nnx.Rngs, **parts: Any):
        super().__init__(rngs=rngs, **parts)
        name = type(self).__name__
        if not hasattr(self, "target_generator"):
            raise ConfigError(
                f"{name} predicts what another network sees: give target_generator, such as CLIPGenerator"
            )
        predicted, given = self.neck.decoder_pred.out_features, getattr(self.target_generator, "out_dims", None)
        if given is not None and predicted != given:
            raise ConfigError(
                f"{name}: the neck predicts {predicted} channels, and the target has {given}; set neck.predict_feature_dim"
            )

    def neck_defaults(self) -> dict[str, Any]:
        return dict(num_patches=self.backbone.patch_resolution, embed_dim=self.backbone.embed_dims)

    def features(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b d"]:
        """The mean over patches of the whole image's encoding."""
        return mean_of_tokens(last(self.extract_feat(images))[:, self.backbone.num_extra_tokens :])


class MILAN(CLIPTargets):
    """Predicts CLIP's features of all tokens from the patches that CLIP's class token looks at most.

    The backbone is a `MILANViT`, the neck a `MILANPretrainDecoder` (whose `num_patches` and `embed_dim` are the backbone's
    where not given), the head a `MIMHead`, the target generator a `CLIPGenerator`.
    """

    def loss(self, batch: Batch, *, rngs: nnx.Rngs | None = None) -> tuple[Float[Array, ""], Metrics]:
        """The head's loss over all tokens. Logs `feature_std`, of the mean over visible patches.

        A batch may bring its own masking `noise` [B, N] (see `MILANViT.attention_masking`).
        """
        latent, pred, target, _ = self._predict(batch["image"], batch.get("noise"), rngs)
        return self.head.loss(pred, target), {"feature_std": spread(latent[:, 1:].mean(axis=1))}

    def _predict(self, images: Array, noise: Array | None, rngs: nnx.Rngs | None) -> tuple[Array, Array, Array, Array]:
        """Latent, prediction, target, and the patches hidden (1) and not (0)."""
        target, attention = self.target_generator(images)
        latent, ids_restore, ids_keep, ids_dump = self.backbone(images, attention[:, 0, 1:], noise=noise, rngs=rngs)
        pred = self.neck(latent, ids_restore, ids_keep, ids_dump, rngs=rngs)
        return latent, pred, target, (ids_restore >= ids_keep.shape[1]).astype(jnp.float32)

    def reconstruct(
        self,
        images: Float[Array, "b h w 3"],
        *,
        noise: Float[Array, "b n"] | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> dict[str, Float[Array, "b h w c"]]:
        """Images, what is hidden of them, and how well each patch's features are predicted (see `latent_pictures`)."""
        _, pred, target, hidden = self._predict(images, noise, rngs)
        grid = (images.shape[1] // self.backbone.patch_embed.patch_size[0], -1)
        return latent_pictures(images, hidden, pred[:, 1:], target[:, 1:], grid)
