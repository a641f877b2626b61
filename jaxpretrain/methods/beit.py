"""BEiT (Bao et al., 2022) and BEiT v2 (Peng et al., 2022): predicting the visual tokens of hidden patches."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

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
from jaxpretrain.models.layers import BaseModule, Linear, build_norm, resize_pos_embed
from jaxpretrain.models.layers.init import trunc_normal
from jaxpretrain.models.layers.stack import apply_layers
from jaxpretrain.models.vision_transformer import architecture

_INIT = {"type": "TruncNormal", "layer": "Linear", "std": 0.02, "bias": 0}


class BEiTPretrainViT(BEiTViT):
    """BEiT's Vision Transformer with a learnt token in place of hidden patches.

    Args:
        arch, final_norm, out_type, use_rel_pos_bias, use_shared_rel_pos_bias, patch_cfg: as of `BEiTViT`, with the
            defaults of pre-training: all tokens are returned, and all layers share one table of biases.
        kwargs: other arguments of `BEiTViT`. There is a class token always.
    """

    def __init__(
        self,
        arch: str | Mapping[str, Any] = "base",
        final_norm: bool = True,
        out_type: str = "raw",
        use_rel_pos_bias: bool = False,
        use_shared_rel_pos_bias: bool = True,
        patch_cfg: Mapping[str, Any] = {"padding": 0},
        *,
        rngs: nnx.Rngs,
        **kwargs: Any,
    ):
        super().__init__(
            arch=arch,
            final_norm=final_norm,
            out_type=out_type,
            use_rel_pos_bias=use_rel_pos_bias,
            use_shared_rel_pos_bias=use_shared_rel_pos_bias,
            patch_cfg=patch_cfg,
            rngs=rngs,
            **kwargs,
        )
        if self.cls_token is None:
            raise ConfigError("BEiTPretrainViT: with_cls_token=False is not supported; the heads expect a class token")
        self.mask_token = nnx.Param(jnp.zeros((1, 1, self.embed_dims)))

    def init_weights(self, rngs: nnx.Rngs) -> None:
        """Besides `init_cfg`: both tokens from a truncated normal distribution of std 0.02; residual branches rescaled."""
        super().init_weights(rngs)
        for token in (self.cls_token, self.mask_token):
            assert token is not None
            token.set_value(trunc_normal(0.02)(rngs.params(), token.shape))
        rescale_branches(self.layers)

    def __call__(
        self, x: Float[Array, "b h w c"], mask: Num[Array, "b h' w'"] | None = None, *, rngs: nnx.Rngs | None = None
    ) -> tuple[Any, ...]:
        """The chosen layers' outputs: without a mask in the form of `out_type`; with one, all tokens [B, 1 + N, C].

        Args:
            x: images.
            mask: 1 where a patch is hidden.
            rngs: for dropout and drop path.

        Raises:
            ValueError: the mask is not as large as the grid of patches.
        """
        if mask is None:
            return super().__call__(x, rngs=rngs)
        tokens, grid = self.patch_embed(x)
        if mask.shape != (len(x), *grid):
            raise ValueError(f"mask is {mask.shape}, and the images have {grid[0]}x{grid[1]} patches: see input_size")
        hidden = mask.reshape(len(x), -1, 1) > 0
        tokens = jnp.where(hidden, self.mask_token[...].astype(x.dtype), tokens)
        if self.pos_embed is not None:
            first = self.num_positioned_tokens
            table = resize_pos_embed(self.pos_embed[...], self.patch_resolution, grid, self.interpolate_mode, first)
            tokens = tokens + table[:, first:].astype(x.dtype)
        tokens = self._prepare(tokens, rngs)
        tokens, outputs = self._run(tokens, rngs, self.out_indices, self._layer_inputs(grid))
        if self.ln1 is not None and self.num_layers - 1 in outputs:
            outputs[self.num_layers - 1] = self.ln1(tokens)
        return tuple(outputs.values())


def rescale_branches(layers: Any, before: int = 0) -> None:
    """Divides what residual branches end with by sqrt(2 l), in place, for the l-th layer (BEiT, section 2.5).

    Args:
        layers: the blocks.
        before: how many layers come before the first of them.
    """
    for i, layer in enumerate(layers):
        for linear in (layer.attn.proj, layer.ffn.fc2):
            linear.kernel.set_value(linear.kernel[...] / math.sqrt(2 * (before + i + 1)))


class BEiTV2Neck(BaseModule):
    """BEiT v2's patch aggregation: a few layers that get the last class token, and patches of an earlier layer.

    What these layers predict must come by way of the class token, which so learns what is in the whole image.

    Args:
        num_layers: number of layers.
        early_layers: which of the backbone's layers the patches come from, for drop path and initialisation.
        backbone_arch: 'base', 'large', or a dict as of the backbone; the backbone's own by default.
        drop_rate: dropout in the layers.
        drop_path_rate: of the backbone's schedule of stochastic depth, which goes on here.
        layer_scale_init_value: start of LayerScale.
        use_rel_pos_bias: refused if True: MMPretrain, too, gives these layers no window for biases of their own.
        norm_cfg: all norms.
        init_cfg: initialisation, MMEngine's dictionaries. Residual branches are rescaled afterwards, as the paper's
            code does; MMPretrain rescales before, and overwrites it.
    """

    def __init__(
        self,
        num_layers: int = 2,
        early_layers: int = 9,
        backbone_arch: str | Mapping[str, Any] = "base",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        layer_scale_init_value: float = 0.1,
        use_rel_pos_bias: bool = False,
        norm_cfg: Mapping[str, Any] = {"type": "LN", "eps": 1e-6},
        init_cfg: Any = _INIT,
        *,
        rngs: nnx.Rngs,
    ):
        self.init_cfg, self.early_layers = init_cfg, early_layers
        self.scan_layers, self.remat = False, "none"
        size: dict[str, Any] = dict(architecture(backbone_arch, owner="BEiTV2Neck"))
        rates = np.linspace(0, drop_path_rate, max(size.pop("num_layers"), early_layers + num_layers))
        self.patch_aggregation = nnx.List(
            [
                BEiTTransformerEncoderLayer(
                    **size,
                    layer_scale_init_value=layer_scale_init_value,
                    window_size=None,
                    use_rel_pos_bias=use_rel_pos_bias,
                    drop_rate=drop_rate,
                    drop_path_rate=float(rate),
                    norm_cfg=norm_cfg,
                    rngs=rngs,
                )
                for rate in rates[early_layers : early_layers + num_layers]
            ]
        )
        self.norm = build_norm(norm_cfg, size["embed_dims"], rngs=rngs)

    def init_weights(self, rngs: nnx.Rngs) -> None:
        super().init_weights(rngs)
        rescale_branches(self.patch_aggregation, before=self.early_layers)

    def __call__(
        self,
        inputs: tuple[Float[Array, "b m c"], Float[Array, "b m c"]],
        rel_pos_bias: Float[Array, "heads m m"] | None = None,
        *,
        rngs: nnx.Rngs | None = None,
    ) -> tuple[Float[Array, "b n c"], Float[Array, "b n c"]]:
        """Normalised patches: of the backbone's last layer, and of these layers.

        Args:
            inputs: all tokens of the early layer, and of the last.
            rel_pos_bias: the backbone's biases.
            rngs: for dropout and drop path.
        """
        early, final = inputs
        x = jnp.concatenate([final[:, :1], early[:, 1:]], axis=1)
        x, _ = apply_layers(
            self.patch_aggregation,
            x,
            rngs=rngs,
            scan_layers=self.scan_layers,
            remat=self.remat,
            shared={"rel_pos_bias": rel_pos_bias},
        )
        return self.norm(final)[:, 1:], self.norm(x)[:, 1:]


class BEiTV1Head(BaseModule):
    """A linear classifier of visual tokens (`cls_head`), and its loss over hidden patches.

    Args:
        embed_dims: channels of the features.
        num_embed: number of tokens.
        loss: called with logits, tokens, weights and the sum of these; `CrossEntropyLoss`.
        init_cfg: initialisation, MMEngine's dictionaries.
    """

    def __init__(
        self,
        embed_dims: int,
        num_embed: int,
        loss: Mapping[str, Any] | nnx.Module,
        init_cfg: Any = _INIT,
        *,
        rngs: nnx.Rngs,
    ):
        self.init_cfg = init_cfg
        self.cls_head = Linear(embed_dims, num_embed, rngs=rngs)
        self.loss_module = build(loss)

    def loss(
        self, feats: Float[Array, "b m c"], target: Num[Array, "b ..."], mask: Num[Array, "b h w"]
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """The mean over hidden patches of the loss; and how many of their tokens are predicted rightly, in per cent.

        Args:
            feats: features of the class token and all patches.
            target: tokens, or logits of them (see `as_tokens`).
            mask: 1 where a patch is hidden.
        """
        return self.score(feats[:, 1:], as_tokens(target), mask)

    def score(
        self, feats: Float[Array, "b n c"], tokens: Int[Array, "b n"], mask: Num[Array, "b ..."]
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """Loss and accuracy, as of `loss`, for features of patches."""
        logits = self.cls_head(feats)
        hidden = (mask.reshape(-1) > 0).astype(jnp.float32)
        count = jnp.maximum(hidden.sum(), 1)
        flat, tokens = logits.reshape(-1, logits.shape[-1]), tokens.reshape(-1)
        loss = self.loss_module(flat, tokens, weight=hidden, avg_factor=count)
        return loss, accuracy(flat, tokens, hidden)


class BEiTV2Head(BEiTV1Head):
    """The same for BEiT v2's two features of each patch, by one classifier."""

    def loss(  # type: ignore[override]
        self,
        feats: Float[Array, "b n c"],
        feats_cls_pt: Float[Array, "b n c"],
        target: Num[Array, "b ..."],
        mask: Num[Array, "b h w"],
    ) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
        """The losses of patches of the last layer and of the patch aggregation; and the accuracy of the former."""
        tokens = as_tokens(target)
        loss, correct = self.score(feats, tokens, mask)
        return loss, self.score(feats_cls_pt, tokens, mask)[0], correct


class BEiT(BaseSelfSupervisor):
    """Predicts the visual tokens of hidden patches: of DALL-E (BEiT) or VQ-KD (BEiT v2, which has a neck).

    The backbone is a `BEiTPretrainViT`, the neck None or a `BEiTV2Neck`, the head `BEiTV1Head` or `BEiTV2Head`, the target
    generator a tokenizer. Its released weights are needed, or training does not begin; or use `RandomProjectionTokenizer`.
    """

    def __init__(self, neck: Mapping[str, Any] | nnx.Module | None = None, *, rngs: nnx.Rngs, **parts: Any):
        super().__init__(neck=neck, rngs=rngs, **parts)
        check_tokenizer(self)

    def neck_defaults(self) -> dict[str, Any]:
        layer = self.backbone.layers[0]
        return dict(
            backbone_arch=dict(
                embed_dims=self.backbone.embed_dims,
                num_layers=self.backbone.num_layers,
                num_heads=layer.attn.num_heads,
                feedforward_channels=layer.ffn.fc1.out_features,
            )
        )

    def loss(self, batch: Batch, *, rngs: nnx.Rngs | None = None) -> tuple[Float[Array, ""], Metrics]:
        """The cross entropy of hidden patches' tokens; with a neck the sum of two, logged as `loss_1` and `loss_2`.

        The batch has two pictures of each crop, for the network and for the tokenizer, and a `mask` [B, h, w], 1 where a
        patch is hidden. Logs `accuracy` over hidden patches in per cent, `assignment_entropy` of the target tokens, and
        `feature_std` of the mean over patches.
        """
        images, pictures = views(batch, 2)
        mask = batch_mask(batch, "BEiTMaskGenerator")
        outputs = self.backbone(images, mask, rngs=rngs)
        tokens = target_tokens(self.target_generator, pictures, mask.shape[1:])
        metrics = {
            "assignment_entropy": token_entropy(tokens, self.target_generator.num_embed),
            "feature_std": spread(mean_of_patches(outputs[-1])),
        }
        if self.neck is None:
            loss, metrics["accuracy"] = self.head.loss(outputs[-1], tokens, mask)
            return loss, metrics
        bias = self.backbone.rel_pos_bias
        bias = None if bias is None else bias(mask.shape[1:])
        feats = self.neck(outputs, bias, rngs=rngs)
        metrics["loss_1"], metrics["loss_2"], metrics["accuracy"] = self.head.loss(*feats, tokens, mask)
        return metrics["loss_1"] + metrics["loss_2"], metrics

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
        grid = self.backbone.patch_embed(images)[1]
        mask = random_mask(draw_key(rngs, "mask"), len(images), grid, 0.4) if mask is None else mask
        outputs = self.backbone(images, mask)
        feats = outputs[-1][:, 1:] if self.neck is None else self.neck.norm(outputs[-1])[:, 1:]
        predicted = self.head.cls_head(feats).argmax(axis=-1)
        return draw_tokens(self.target_generator, images, pictures, mask, predicted)
