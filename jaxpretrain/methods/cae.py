"""CAE (Chen et al., 2022, Context Autoencoder for Self-Supervised Representation Learning)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Num

from jaxpretrain.build import ConfigError, build
from jaxpretrain.methods.base import BaseSelfSupervisor, Batch, Metrics, draw_key, last, spread, views
from jaxpretrain.methods.masking import batch_mask, random_mask
from jaxpretrain.methods.visual_tokens import (
    accuracy,
    as_tokens,
    check_tokenizer,
    draw_tokens,
    mean_of_patches,
    target_tokens,
    token_entropy,
)
from jaxpretrain.models.beit import BEiTTransformerEncoderLayer, BEiTViT
from jaxpretrain.models.layers import FFN, BaseModule, Frozen, Linear, build_norm, drop_path, freeze
from jaxpretrain.models.layers.cross_attention import CrossMultiheadAttention
from jaxpretrain.models.layers.init import apply_init_cfg, trunc_normal
from jaxpretrain.models.layers.position import build_2d_sincos_position_embedding
from jaxpretrain.models.layers.stack import apply_layers

_INIT = (
    {"type": "Constant", "val": 1, "layer": ["LayerNorm"]},
    {"type": "TruncNormal", "std": 0.02, "layer": ["Conv2d"]},
    {"type": "Xavier", "distribution": "uniform", "layer": ["Linear"]},
)
_NECK_INIT = (
    {"type": "Xavier", "distribution": "uniform", "layer": "Linear"},
    {"type": "Constant", "val": 1.0, "layer": "LayerNorm"},
)


def pick(x: Float[Array, "b n c"], index: Int[Array, "b k"]) -> Float[Array, "b k c"]:
    """The tokens of each row that `index` names, in its order; `x` may have one row for all."""
    x = jnp.broadcast_to(x, (len(index), *x.shape[1:]))
    return jnp.take_along_axis(x, index[:, :, None], axis=1)


class CAEPretrainViT(BEiTViT):
    """CAE's encoder: a Vision Transformer of some of the patches; positions are a fixed sin-cos table.

    Args:
        arch, final_norm, out_type, use_abs_pos_emb, use_rel_pos_bias, layer_scale_init_value, init_cfg: as of `BEiTViT`,
            with the defaults of pre-training. Positions must be absolute ones.
        kwargs: other arguments of `BEiTViT`. There is a class token always.
    """

    def __init__(
        self,
        arch: str | Mapping[str, Any] = "b",
        final_norm: bool = True,
        out_type: str = "raw",
        use_abs_pos_emb: bool = True,
        use_rel_pos_bias: bool = False,
        layer_scale_init_value: float | None = None,
        init_cfg: Any = _INIT,
        *,
        rngs: nnx.Rngs,
        **kwargs: Any,
    ):
        super().__init__(
            arch=arch,
            final_norm=final_norm,
            out_type=out_type,
            use_abs_pos_emb=use_abs_pos_emb,
            use_rel_pos_bias=use_rel_pos_bias,
            layer_scale_init_value=layer_scale_init_value,
            init_cfg=init_cfg,
            rngs=rngs,
            **kwargs,
        )
        if not use_abs_pos_emb or use_rel_pos_bias or self.rel_pos_bias is not None or self.cls_token is None:
            raise ConfigError("CAEPretrainViT: needs a class token and absolute positions alone (use_abs_pos_emb=True)")
        self.pos_embed: nnx.Variable = Frozen(self._positions())

    def _positions(self) -> Float[Array, "1 n c"]:
        return build_2d_sincos_position_embedding(self.patch_resolution, self.embed_dims, cls_token=True)

    def init_weights(self, rngs: nnx.Rngs) -> None:
        """Besides `init_cfg`: the class token from a truncated normal distribution of std 0.02."""
        super().init_weights(rngs)
        self.pos_embed.set_value(self._positions())
        assert self.cls_token is not None
        self.cls_token.set_value(trunc_normal(0.02)(rngs.params(), self.cls_token.shape))

    def __call__(
        self, x: Float[Array, "b h w c"], keep: Int[Array, "b k"] | None = None, *, rngs: nnx.Rngs | None = None
    ) -> Any:
        """Features of whole images, in the form of `out_type`; or of some patches, [B, 1 + K, C], class token first.

        Args:
            x: images.
            keep: which patches of each image the network sees.
            rngs: for dropout and drop path.
        """
        if keep is None:
            return super().__call__(x, rngs=rngs)
        tokens, grid = self.embed(x)
        tokens = self._prepare(pick(tokens, keep), rngs)
        tokens, _ = self._run(tokens, rngs, inputs=self._layer_inputs(grid))
        return tokens if self.ln1 is None else self.ln1(tokens)


class CAETransformerRegressorLayer(BaseModule):
    """A layer in which hidden patches ask visible ones, and each other; visible ones stay as they are.

    Args:
        embed_dims, num_heads, feedforward_channels: sizes, as of a transformer's layer.
        qkv_bias, qk_scale: as of `CrossMultiheadAttention`.
        drop_rate, attn_drop_rate, drop_path_rate: dropout and stochastic depth.
        layer_scale_init_value: start of LayerScale; 0 or None for factors of 1 that do not learn.
        act_cfg, norm_cfg: activation and norms.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        feedforward_channels: int,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        layer_scale_init_value: float | None = 0.0,
        act_cfg: Mapping[str, Any] = {"type": "GELU"},
        norm_cfg: Mapping[str, Any] = {"type": "LN", "eps": 1e-6},
        *,
        rngs: nnx.Rngs,
    ):
        self.drop_path_rate, self.deterministic = float(drop_path_rate), False
        self.norm1_q_cross = build_norm(norm_cfg, embed_dims, rngs=rngs)
        self.norm1_k_cross = build_norm(norm_cfg, embed_dims, rngs=rngs)
        self.norm1_v_cross = build_norm(norm_cfg, embed_dims, rngs=rngs)
        self.norm2_cross = build_norm(norm_cfg, embed_dims, rngs=rngs)
        self.cross_attn = CrossMultiheadAttention(
            embed_dims, num_heads, qkv_bias, qk_scale, attn_drop_rate, drop_rate, rngs=rngs
        )
        self.ffn = FFN(embed_dims, feedforward_channels, act_cfg, drop_rate, rngs=rngs)
        kind, value = (nnx.Param, layer_scale_init_value) if layer_scale_init_value else (Frozen, 1.0)
        self.gamma_1_cross: nnx.Variable = kind(jnp.full((embed_dims,), value))
        self.gamma_2_cross: nnx.Variable = kind(jnp.full((embed_dims,), value))

    def __call__(
        self,
        x: Float[Array, "b n c"],
        *,
        visible: Float[Array, "b v c"],
        pos: Float[Array, "b n c"],
        pos_visible: Float[Array, "b v c"],
        rngs: nnx.Rngs | None = None,
        drop_path_rate: float | Array | None = None,
    ) -> Float[Array, "b n c"]:
        """The new hidden patches.

        Args:
            x: hidden patches.
            visible: visible patches.
            pos, pos_visible: positions of both.
            rngs: for dropout and drop path.
            drop_path_rate: replaces the layer's own.
        """
        rate = self.drop_path_rate if drop_path_rate is None else drop_path_rate
        rate = 0.0 if self.deterministic else rate
        everything = jnp.concatenate([visible, x], axis=1)
        keys = self.norm1_k_cross(everything + jnp.concatenate([pos_visible, pos], axis=1))
        y = self.cross_attn(self.norm1_q_cross(x + pos), keys, self.norm1_v_cross(everything), rngs=rngs)
        x = x + drop_path(y * self.gamma_1_cross[...].astype(x.dtype), rate, rngs)
        x = self.norm2_cross(x)  # on the main path, as in the release
        return x + drop_path(self.ffn(x, rngs=rngs) * self.gamma_2_cross[...].astype(x.dtype), rate, rngs)


class CAENeck(BaseModule):
    """CAE's latent contextual regressor, which predicts hidden patches' features, and the decoder of tokens from these.

    Args:
        num_classes: number of tokens; 0 for features in place of logits.
        embed_dims: channels.
        regressor_depth, decoder_depth: layers of both.
        num_heads: heads of both.
        mlp_ratio: hidden channels of the feed-forward halves, in multiples of `embed_dims`.
        qkv_bias, qk_scale: of the regressor's attention.
        drop_rate, attn_drop_rate, drop_path_rate: dropout and stochastic depth.
        norm_cfg: all norms.
        layer_scale_init_value: start of LayerScale; 0 or None for none.
        mask_tokens_num: hidden patches of each image: always as many.
        init_cfg: initialisation, MMEngine's dictionaries.
    """

    def __init__(
        self,
        num_classes: int = 8192,
        embed_dims: int = 768,
        regressor_depth: int = 6,
        decoder_depth: int = 8,
        num_heads: int = 12,
        mlp_ratio: int = 4,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_cfg: Mapping[str, Any] = {"type": "LN", "eps": 1e-6},
        layer_scale_init_value: float | None = None,
        mask_tokens_num: int = 75,
        init_cfg: Any = None,
        *,
        rngs: nnx.Rngs,
    ):
        self.init_cfg, self.mask_tokens_num = init_cfg, mask_tokens_num
        self.scan_layers, self.remat = False, "none"
        shared: dict[str, Any] = dict(
            embed_dims=embed_dims,
            num_heads=num_heads,
            feedforward_channels=int(mlp_ratio * embed_dims),
            drop_rate=drop_rate,
            attn_drop_rate=attn_drop_rate,
            norm_cfg=norm_cfg,
            layer_scale_init_value=layer_scale_init_value,
            rngs=rngs,
        )
        self.regressors = nnx.List(
            [
                CAETransformerRegressorLayer(qkv_bias=qkv_bias, qk_scale=qk_scale, drop_path_rate=rate, **shared)
                for rate in np.linspace(0, drop_path_rate, regressor_depth)
            ]
        )
        self.decoders = nnx.List(
            [
                BEiTTransformerEncoderLayer(
                    window_size=None, use_rel_pos_bias=False, drop_path_rate=float(rate), **shared
                )
                for rate in np.linspace(0, drop_path_rate, decoder_depth)
            ]
        )
        self.norm_regressor = build_norm(norm_cfg, embed_dims, rngs=rngs)
        self.norm_decoder = build_norm(norm_cfg, embed_dims, rngs=rngs)
        self.head = Linear(embed_dims, num_classes, rngs=rngs) if num_classes > 0 else None
        self.mask_token = nnx.Param(jnp.zeros((1, 1, embed_dims)))

    def init_weights(self, rngs: nnx.Rngs) -> None:
        """After `init_cfg`: all linear layers Glorot-uniform; mask token and classifier truncated normal of std 0.02."""
        super().init_weights(rngs)
        apply_init_cfg(self, _NECK_INIT, rngs)
        self.mask_token.set_value(trunc_normal(0.02)(rngs.params(), self.mask_token.shape))
        if self.head is not None:
            self.head.kernel.set_value(trunc_normal(0.02)(rngs.params(), self.head.kernel.shape))

    def __call__(
        self,
        x_unmasked: Float[Array, "b v c"],
        pos_embed_masked: Float[Array, "b n c"],
        pos_embed_unmasked: Float[Array, "b v c"],
        *,
        rngs: nnx.Rngs | None = None,
    ) -> tuple[Float[Array, "b n k"], Float[Array, "b n c"]]:
        """Logits of hidden patches' tokens, and their predicted features.

        Args:
            x_unmasked: features of visible patches.
            pos_embed_masked, pos_embed_unmasked: positions of hidden and of visible patches.
            rngs: for dropout and drop path.
        """
        pos, pos_visible = (p.astype(x_unmasked.dtype) for p in (pos_embed_masked, pos_embed_unmasked))
        x = jnp.broadcast_to(self.mask_token[...].astype(pos.dtype), pos.shape)
        how: dict[str, Any] = dict(rngs=rngs, scan_layers=self.scan_layers, remat=self.remat)
        context = dict(visible=x_unmasked, pos=pos, pos_visible=pos_visible)
        latent = self.norm_regressor(apply_layers(self.regressors, x, shared=context, **how)[0])
        x = self.norm_decoder(apply_layers(self.decoders, latent + pos, **how)[0])
        return (x if self.head is None else self.head(x)), latent


class CAELoss(BaseModule):
    """Cross entropy of tokens, and `lambd` times the mean squared error of features; both in float32 at least."""

    def __init__(self, lambd: float):
        self.lambd = lambd
        self.cross_entropy = build({"type": "CrossEntropyLoss"})

    def __call__(
        self,
        logits: Float[Array, "n k"],
        target: Int[Array, " n"],
        latent_pred: Float[Array, "b m c"],
        latent_target: Float[Array, "b m c"],
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        dtype = jnp.promote_types(latent_pred.dtype, jnp.float32)
        error = latent_pred.astype(dtype) - jax.lax.stop_gradient(latent_target).astype(dtype)
        return self.cross_entropy(logits, target), self.lambd * jnp.mean(jnp.square(error))


class CAEHead(BaseModule):
    """The two losses of CAE.

    Args:
        loss: `CAELoss`.
        init_cfg: unused; there are no weights.
    """

    def __init__(self, loss: Mapping[str, Any] | nnx.Module, init_cfg: Any = None):
        self.loss_module = build(loss)

    def loss(
        self,
        logits: Float[Array, "b n k"],
        logits_target: Num[Array, "b ..."],
        latent_pred: Float[Array, "b n c"],
        latent_target: Float[Array, "b n c"],
        hidden: Int[Array, "b n"],
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """`main` (tokens) and `align` (features). `logits_target`: tokens of all patches, or their logits; `hidden`: which
        patches are hidden.
        """
        tokens = jnp.take_along_axis(as_tokens(logits_target), hidden, axis=1)
        return self.loss_module(logits.reshape(-1, logits.shape[-1]), tokens.reshape(-1), latent_pred, latent_target)


class CAE(BaseSelfSupervisor):
    """Predicts hidden patches' features from visible ones, and their DALL-E tokens from these features.

    The backbone is a `CAEPretrainViT`, the neck `CAENeck`, the head `CAEHead`, the target generator a tokenizer. The
    features' targets are what the teacher makes of the hidden patches alone.

    Args:
        base_momentum: how much of itself the teacher keeps at each step. 0: it is the backbone of one step before.
        parts: `backbone`, `neck`, `head`, `target_generator`, `init_cfg`.
    """

    teacher_name = "teacher"

    def __init__(self, base_momentum: float = 0.0, *, rngs: nnx.Rngs, **parts: Any):
        super().__init__(rngs=rngs, **parts)
        check_tokenizer(self)
        patches = int(np.prod(self.backbone.patch_resolution))
        if not 0 < self.neck.mask_tokens_num < patches:
            hidden = self.neck.mask_tokens_num
            raise ConfigError(f"CAE: neck.mask_tokens_num={hidden} must be in 1..{patches - 1}, the backbone's patches")
        self.momentum = base_momentum
        self.teacher = freeze(nnx.clone(self.backbone))
        self.teacher.set_attributes(rate=0.0, drop_path_rate=0.0, raise_if_not_found=False)

    def neck_defaults(self) -> dict[str, Any]:
        return dict(embed_dims=self.backbone.embed_dims)

    def init_weights(self, rngs: nnx.Rngs) -> None:
        """Initialises all; the teacher starts as the backbone's copy."""
        super().init_weights(rngs)
        self.reset_teacher()

    def reset_teacher(self) -> None:
        """Makes the teacher a copy of the backbone: after its weights were loaded from elsewhere."""
        self._update_teacher(0.0)

    def _update_teacher(self, momentum: float) -> None:
        weights = nnx.state(self.backbone, (nnx.Param, Frozen)).flat_state()
        source = {path: jax.lax.stop_gradient(variable[...]) for path, variable in weights}
        for path, ours in nnx.state(self.teacher, Frozen).flat_state():
            ours.set_value(momentum * ours[...] + (1 - momentum) * source[path] if momentum else source[path])

    def split(self, mask: Num[Array, "b h w"]) -> tuple[Int[Array, "b n"], Int[Array, "b v"]]:
        """Indices of hidden and of visible patches, in row-major order.

        Every mask must hide `neck.mask_tokens_num` patches: of one that hides fewer, the last visible ones are hidden too,
        of one that hides more, the first hidden ones count as visible.
        """
        order = jnp.argsort(mask.reshape(len(mask), -1) > 0, axis=1, stable=True)
        visible = order.shape[1] - self.neck.mask_tokens_num
        return order[:, visible:], order[:, :visible]

    def loss(self, batch: Batch, *, rngs: nnx.Rngs | None = None) -> tuple[Float[Array, ""], Metrics]:
        """The sum of `main`, the cross entropy of hidden patches' tokens, and `align`, of their features.

        The batch has two pictures of each crop, for the network and for the tokenizer, and a `mask` [B, h, w], 1 where a
        patch is hidden. Besides these two parts, logs `accuracy` over hidden patches in per cent, `assignment_entropy` of
        the target tokens, and `feature_std` of the mean over visible patches. Moves the teacher afterwards, in place.
        """
        images, pictures = views(batch, 2)
        mask = batch_mask(batch, "BEiTMaskGenerator")
        tokens = target_tokens(self.target_generator, pictures, mask.shape[1:])
        hidden, visible = self.split(mask)
        latent_target = jax.lax.stop_gradient(self.teacher(images, hidden)[:, 1:])
        self._update_teacher(self.momentum)  # when MMPretrain does: after its use, before the optimizer's step
        encoded, logits, latent = self.predict(images, hidden, visible, rngs=rngs)
        main, align = self.head.loss(logits, tokens, latent, latent_target, hidden)
        hidden_tokens = jnp.take_along_axis(tokens, hidden, axis=1).reshape(-1)
        return main + align, {
            "main": main,
            "align": align,
            "accuracy": accuracy(logits.reshape(-1, logits.shape[-1]), hidden_tokens, jnp.ones(hidden_tokens.shape)),
            "assignment_entropy": token_entropy(tokens, self.target_generator.num_embed),
            "feature_std": spread(mean_of_patches(encoded)),
        }

    def predict(
        self,
        images: Float[Array, "b h w 3"],
        hidden: Int[Array, "b n"],
        visible: Int[Array, "b v"],
        *,
        rngs: nnx.Rngs | None = None,
    ) -> tuple[Float[Array, "b m c"], Float[Array, "b n k"], Float[Array, "b n c"]]:
        """The encoded class token and visible patches; logits and features of hidden patches."""
        encoded = self.backbone(images, visible, rngs=rngs)
        positions = self.backbone.pos_embed[:, 1:]
        logits, latent = self.neck(encoded[:, 1:], pick(positions, hidden), pick(positions, visible), rngs=rngs)
        return encoded, logits, latent

    def features(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b d"]:
        """The mean over patches of the whole image's encoding."""
        return mean_of_patches(last(self.backbone(images)))

    def reconstruct(
        self,
        images: Float[Array, "b h w 3"],
        *,
        mask: Num[Array, "b h' w'"] | None = None,
        pictures: Float[Array, "b h2 w2 3"] | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> dict[str, Array]:
        """Which hidden patches' tokens the network predicts rightly; see `draw_tokens`."""
        if mask is None:
            grid = self.backbone.patch_resolution
            ratio = self.neck.mask_tokens_num / math.prod(grid)
            mask = random_mask(draw_key(rngs, "mask"), len(images), grid, ratio)
        hidden, visible = self.split(mask)
        predicted = self.predict(images, hidden, visible)[1].argmax(axis=-1)
        nothing = jnp.full((len(images), hidden.shape[1] + visible.shape[1]), -1, predicted.dtype)
        predicted = jnp.put_along_axis(nothing, hidden, predicted, axis=1, inplace=False)
        return draw_tokens(self.target_generator, images, pictures, mask, predicted)
