"""data2vec 2.0 for images (Baevski et al., 2022, Efficient Self-supervised Learning with Contextualized Target
Representations for Vision, Speech and Language).

From a fifth of an image's patches, the network predicts what its slow copy makes of the whole image, in all its upper blocks.
The copy's work is shared by 16 masks of each image, and a light convolutional decoder does the rest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers
from jaxtyping import Array, Bool, Float, Int

from jaxpretrain.build import ConfigError
from jaxpretrain.methods.base import Batch, Metrics, Progress, draw_key, last, spread
from jaxpretrain.methods.latent import latent_pictures, mean_of_tokens, standardize
from jaxpretrain.methods.momentum_encoder import MomentumMethod
from jaxpretrain.models.layers import BaseModule, Conv2d, Frozen, LayerNorm, Linear, drop_path
from jaxpretrain.models.layers.position import build_2d_sincos_position_embedding
from jaxpretrain.models.vision_transformer import TransformerEncoderLayer, VisionTransformer

_INIT = {"type": "Normal", "layer": "Linear", "std": 0.02, "bias": 0.0}
_HEAD = {"type": "Data2VecHead"}


class PostNormLayer(TransformerEncoderLayer):
    """A transformer block with norms behind the sums, as in the first Transformer."""

    def __call__(
        self, x: Float[Array, "b n c"], *, rngs: nnx.Rngs | None = None, drop_path_rate: float | Array | None = None
    ) -> Float[Array, "b n c"]:
        return self.halves(x, rngs=rngs, drop_path_rate=drop_path_rate)[0]

    def halves(
        self, x: Float[Array, "b n c"], *, rngs: nnx.Rngs | None = None, drop_path_rate: float | Array | None = None
    ) -> tuple[Float[Array, "b n c"], Float[Array, "b n c"]]:
        """The block's output, and that of its feed-forward half alone, which targets are made of."""
        rate = self.drop_path_rate if drop_path_rate is None else drop_path_rate
        rate = 0.0 if self.deterministic else rate
        x = self.ln1(x + drop_path(self.attn(x, rngs=rngs), rate, rngs))
        y = self.ffn(x, rngs=rngs)
        return self.ln2(x + drop_path(y, rate, rngs)), y

    def init_weights(self, rngs: nnx.Rngs) -> None:
        """As the outer modules' `init_cfg` says."""
        BaseModule.init_weights(self, rngs)


class Data2VecViT(VisionTransformer):
    """The encoder: a post-norm Vision Transformer of visible patches; positions are a fixed sin-cos table.

    Its tokens are normalised before the first block, not after the last, and the class token has no position.

    Args:
        arch: as of `VisionTransformer`.
        out_type: what a call without a mask returns; `Data2Vec2` needs 'raw'.
        mask_ratio: part of the patches that is hidden, in (0, 1).
        mask_adjust: how much more than the rest the blocks that stay visible would cover if they did not overlap.
        block_size: side of these blocks in patches.
        num_masks: masks of each image.
        init_cfg: initialisation; the release's by default.
        kwargs: other arguments of `VisionTransformer`.

    Raises:
        ConfigError: a mask_ratio that leaves nothing to see or to predict.
    """

    layer_type: ClassVar[type] = PostNormLayer
    tokens_have_positions: ClassVar[bool] = False

    def __init__(
        self,
        arch: str | Mapping[str, int] = "b",
        out_type: str = "raw",
        mask_ratio: float = 0.8,
        mask_adjust: float = 0.07,
        block_size: int = 3,
        num_masks: int = 16,
        init_cfg: Any = _INIT,
        *,
        rngs: nnx.Rngs,
        **kwargs: Any,
    ):
        fixed: dict[str, Any] = dict(pre_norm=True, final_norm=False, init_cfg=init_cfg)
        patch_cfg = {"bias": True, **kwargs.pop("patch_cfg", {})}
        super().__init__(arch=arch, out_type=out_type, patch_cfg=patch_cfg, rngs=rngs, **fixed, **kwargs)
        if not 0 < mask_ratio < 1:
            raise ConfigError(f"Data2VecViT: mask_ratio={mask_ratio} must be between 0 and 1")
        self.mask_ratio, self.mask_adjust = mask_ratio, mask_adjust
        self.block_size, self.num_masks = block_size, num_masks
        self.pos_embed = Frozen(self._positions())

    def _positions(self) -> Float[Array, "1 n c"]:
        return build_2d_sincos_position_embedding(self.patch_resolution, self.embed_dims)

    def init_weights(self, rngs: nnx.Rngs) -> None:
        """Besides `init_cfg`: the patch embedding as a Glorot-uniform matrix [pixels, channels]; class token N(0, 1)."""
        super().init_weights(rngs)
        self.pos_embed.set_value(self._positions())
        kernel = self.patch_embed.projection.kernel
        matrix = (math.prod(kernel.shape[:-1]), kernel.shape[-1])
        kernel.set_value(initializers.xavier_uniform()(rngs.params(), matrix, kernel.dtype).reshape(kernel.shape))
        if self.cls_token is not None:
            self.cls_token.set_value(jax.random.normal(rngs.params(), self.cls_token.shape))

    def __call__(  # type: ignore[override]
        self, x: Float[Array, "b h w c"], mask: bool | None = True, *, rngs: nnx.Rngs | None = None
    ) -> Any:
        """The visible tokens' features under each mask, and the masks; or features as of `VisionTransformer`.

        Args:
            x: images.
            mask: whether to hide patches; None is False.
            rngs: for the masks (`rngs.mask`) and drop path.

        Returns:
            With a mask: latent [B * masks, 1 + visible, C], class token first, the masks of one image together; which
            patches are hidden [B * masks, N]; and ids_restore, the place of each patch when visible ones come first.
        """
        if not mask:
            return super().__call__(x, rngs=rngs)
        tokens, grid = self.embed(x)
        tokens = jnp.repeat(tokens, self.num_masks, axis=0)
        hidden = self.block_masks(draw_key(rngs, "mask"), tokens.shape[0], grid)
        order = jnp.argsort(hidden, axis=1, stable=True)
        visible = order[:, : self.num_visible(grid), None]
        tokens = self._prepare(jnp.take_along_axis(tokens, visible, axis=1), rngs)
        return self.run_layers(tokens, rngs=rngs), hidden, jnp.argsort(order, axis=1)

    def num_visible(self, grid: tuple[int, int]) -> int:
        """How many patches of a grid (down, across) stay visible."""
        return max(1, int(math.prod(grid) * (1 - self.mask_ratio)))

    def block_masks(self, key: Array, count: int, grid: tuple[int, int]) -> Bool[Array, "count n"]:
        """Which patches are hidden: all but random blocks (section 3.4, "inverse block masking").

        Centres of blocks are drawn, whole ones or parts at the edge; where they cover too much, patches at random are hidden
        again, where too little, patches at random are seen besides, until exactly `num_visible` are.
        """
        height, width = grid
        patches, visible = height * width, self.num_visible(grid)
        centres = max(1, int(patches * (1 - self.mask_ratio + self.mask_adjust) / self.block_size**2))
        at_centre, at_rest = jax.random.split(key)
        centre = jax.random.randint(at_centre, (count, centres, 1), 0, patches)
        offset = self.block_size // 2
        sides = []
        for place, size in ((centre // width, height), (centre % width, width)):
            distance = jnp.arange(size) - place + offset
            sides.append((distance >= 0) & (distance < self.block_size))
        covered = (sides[0][..., :, None] & sides[1][..., None, :]).any(axis=1).reshape(count, patches)
        rank = jnp.argsort(jnp.argsort(jax.random.uniform(at_rest, covered.shape) - covered, axis=1), axis=1)
        return rank >= visible

    def feed_forward_outputs(self, x: Float[Array, "b h w c"], count: int) -> list[Float[Array, "b m c"]]:
        """What the feed-forward halves of the last `count` blocks make of whole images, all tokens."""
        tokens = self._prepare(self.embed(x)[0], None)
        outputs = []
        for layer in self.layers:
            tokens, output = layer.halves(tokens, drop_path_rate=0.0)
            outputs.append(output)
        return outputs[-count:]


class Data2VecDecoder(BaseModule):
    """A few convolutions over the grid of patches, where noise fills what was hidden.

    Args:
        num_patches: patches in an image, down and across, or their number in a square one.
        embed_dim: channels of the encoder, and of the prediction.
        decoder_dim, decoder_kernel, decoder_layers, decoder_groups: channels, size, number and groups of the convolutions.
        mask_noise_std: standard deviation of the noise.
        init_cfg: initialisation; PyTorch's defaults unless said.
    """

    def __init__(
        self,
        num_patches: int | tuple[int, int] = 196,
        embed_dim: int = 768,
        decoder_dim: int = 768,
        decoder_kernel: int = 3,
        decoder_layers: int = 6,
        decoder_groups: int = 16,
        mask_noise_std: float = 0.01,
        init_cfg: Any = None,
        *,
        rngs: nnx.Rngs,
    ):
        side = math.isqrt(num_patches) if isinstance(num_patches, int) else 0
        self.grid: tuple[int, int] = (side, side) if isinstance(num_patches, int) else (num_patches[0], num_patches[1])
        if isinstance(num_patches, int) and side * side != num_patches:
            raise ConfigError(f"Data2VecDecoder: num_patches={num_patches} is no square; give (down, across)")
        if decoder_kernel % 2 == 0:
            raise ConfigError(f"Data2VecDecoder: decoder_kernel={decoder_kernel} must be odd")
        if embed_dim % decoder_groups or decoder_dim % decoder_groups:
            raise ConfigError(
                f"Data2VecDecoder: decoder_groups={decoder_groups} must divide embed_dim={embed_dim} and "
                f"decoder_dim={decoder_dim}"
            )
        self.init_cfg, self.mask_noise_std = init_cfg, mask_noise_std
        self.blocks = nnx.List(
            [
                Conv2d(
                    decoder_dim if i else embed_dim,
                    decoder_dim,
                    decoder_kernel,
                    padding=decoder_kernel // 2,
                    groups=decoder_groups,
                    rngs=rngs,
                )
                for i in range(decoder_layers)
            ]
        )
        self.norm = LayerNorm(decoder_dim, affine=False)
        self.proj = Linear(decoder_dim, embed_dim, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b m c"], ids_restore: Int[Array, "b n"], *, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "b n c"]:
        """The prediction for every patch.

        Args:
            x: class token, which is left out, and visible patches, as the encoder gives them.
            ids_restore: the place of each patch when visible ones come first.
            rngs: for the noise (`rngs.noise`).
        """
        if ids_restore.shape[1] != math.prod(self.grid):
            raise ValueError(
                f"Data2VecDecoder is for {self.grid[0]}x{self.grid[1]} patches, and got {ids_restore.shape[1]}: "
                "train at the backbone's img_size, or set neck.num_patches"
            )
        visible = x[:, 1:]
        b, v, c = visible.shape
        noise = self.mask_noise_std * jax.random.normal(draw_key(rngs, "noise"), (b, ids_restore.shape[1] - v, c))
        x = jnp.concatenate([visible, noise.astype(x.dtype)], axis=1)
        x = jnp.take_along_axis(x, ids_restore[:, :, None], axis=1).reshape(b, *self.grid, c)
        for conv in self.blocks:
            y = jax.nn.gelu(self.norm(conv(x)), approximate=False)
            x = y + x if x.shape == y.shape else y
        return self.proj(x).reshape(b, -1, c)


class Data2VecHead(BaseModule):
    """Makes targets, and compares predictions with them by the squared distance, divided by the root of the channels.

    Args:
        top_k: how many blocks, from the last, the targets are averaged over.
    """

    def __init__(self, top_k: int = 10):
        self.top_k = top_k

    def targets(self, outputs: list[Float[Array, "b n c"]]) -> Float[Array, "b n c"]:
        """The blocks' outputs, each channel of an image standardised over patches; averaged; then each patch standardised.

        In float32 at least.
        """
        mean = jnp.mean(jnp.stack([standardize(x, axis=1) for x in outputs]), axis=0)
        return standardize(mean, axis=-1)

    def distance(self, pred: Float[Array, "*b c"], target: Float[Array, "*b c"]) -> Float[Array, "*b"]:
        return jnp.sum(jnp.square(pred.astype(target.dtype) - target), axis=-1) / pred.shape[-1] ** 0.5

    def loss(
        self,
        pred: Float[Array, "k n c"],
        pred_cls: Float[Array, "k c"],
        target: Float[Array, "b n c"],
        hidden: Bool[Array, "k n"],
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """The mean distance over hidden patches, and that of class tokens and the mean over patches of targets.

        Each image has k / b masks in a row, which share its target.
        """
        b, n, c = target.shape
        error = self.distance(pred.reshape(b, -1, n, c), target[:, None]).reshape(-1, n)
        error_cls = self.distance(pred_cls.reshape(b, -1, c), target.mean(axis=1)[:, None])
        return jnp.sum(error * hidden) / hidden.sum(), error_cls.mean()


class Data2Vec2(MomentumMethod):
    """Predicts the mean of a slow copy's upper blocks at hidden patches, and of the whole image from the class token.

    The backbone is a `Data2VecViT`; the neck a `Data2VecDecoder`, whose `num_patches` and `embed_dim` are the backbone's where
    not given. After step s the copy keeps m of its weights, and takes 1 - m from the encoder; m grows on a straight line from
    `ema_decay` to `ema_end_decay` in `ema_anneal_steps` steps, and stays.

    Args:
        cls_loss: weight of the class token's loss, a mean over images and masks. The release's 0.01 is the weight of a sum
            over those of one GPU: 16 images with 16 masks make 2.56 of it.
        ema_decay, ema_end_decay, ema_anneal_steps: of the slow copy.
        head: makes targets and losses.
        parts: arguments of `BaseSelfSupervisor`.

    Raises:
        ConfigError: parts that do not fit together.
    """

    teacher_name: ClassVar = "ema"

    def __init__(
        self,
        cls_loss: float = 2.56,
        ema_decay: float = 0.9998,
        ema_end_decay: float = 0.99999,
        ema_anneal_steps: int = 100_000,
        head: Mapping[str, Any] | nnx.Module = _HEAD,
        *,
        rngs: nnx.Rngs,
        **parts: Any,
    ):
        super().__init__(head=head, rngs=rngs, **parts)
        self.cls_loss = cls_loss
        self.ema_decay, self.ema_end_decay, self.ema_anneal_steps = ema_decay, ema_end_decay, ema_anneal_steps
        self.teacher.set_attributes(rate=0.0, drop_path_rate=0.0, raise_if_not_found=False)  # targets are not noisy
        if self.backbone.cls_token is None or self.backbone.num_extra_tokens != 1 or self.backbone.out_type != "raw":
            raise ConfigError("Data2Vec2: the backbone needs a class token, no registers, and out_type='raw'")
        if not 1 <= self.head.top_k <= self.backbone.num_layers:
            raise ConfigError(f"Data2Vec2: head.top_k={self.head.top_k}, of {self.backbone.num_layers} blocks")
        if self.neck.grid != tuple(self.backbone.patch_resolution):
            raise ConfigError(
                f"Data2Vec2: neck.num_patches {self.neck.grid} is not the backbone's {self.backbone.patch_resolution}"
            )

    def neck_defaults(self) -> dict[str, Any]:
        return dict(num_patches=self.backbone.patch_resolution, embed_dim=self.backbone.embed_dims)

    @property
    def students(self) -> tuple[nnx.Module, ...]:
        """The encoder alone: the decoder has no copy."""
        return (self.backbone,)

    def loss(self, batch: Batch, *, rngs: nnx.Rngs | None = None) -> tuple[Float[Array, ""], Metrics]:
        """The sum of both losses, which are logged as `loss_regression` and, weighted, `loss_cls`.

        Also logs `feature_std`, of the mean over visible patches. Masks are drawn from `rngs.mask`, noise from `rngs.noise`.
        """
        latent, pred, target, hidden = self._predict(batch["image"], rngs)
        regression, cls = self.head.loss(pred, latent[:, 0], target, hidden)
        metrics = dict(loss_regression=regression, loss_cls=self.cls_loss * cls)
        return sum(metrics.values()), metrics | {"feature_std": spread(latent[:, 1:].mean(axis=1))}

    def _predict(self, images: Array, rngs: nnx.Rngs | None) -> tuple[Array, Array, Array, Array]:
        """Latent, prediction, target (one for all masks of an image) and which patches are hidden."""
        latent, hidden, ids_restore = self.backbone(images, rngs=rngs)
        teacher: Any = self.teacher.module[0]
        outputs = teacher.feed_forward_outputs(images, self.head.top_k)
        target = jax.lax.stop_gradient(self.head.targets([x[:, 1:] for x in outputs]))
        return latent, self.neck(latent, ids_restore, rngs=rngs), target, hidden

    def teacher_momentum(self, progress: Progress) -> Float[Array, ""]:
        done = jnp.minimum(progress.step / self.ema_anneal_steps, 1.0)
        return 1 - (self.ema_decay + (self.ema_end_decay - self.ema_decay) * done)

    def extract_feat(self, images: Float[Array, "b h w c"]) -> tuple[Array, ...]:
        """The backbone's features of whole images, nothing hidden."""
        return self.backbone(images, mask=None)

    def features(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b d"]:
        """The encoder's mean over patches."""
        return mean_of_tokens(last(self.extract_feat(images))[:, 1:])

    def reconstruct(
        self, images: Float[Array, "b h w 3"], *, rngs: nnx.Rngs | None = None
    ) -> dict[str, Float[Array, "b h w c"]]:
        """Images, what the first mask hides of them, and how well each patch is predicted (see `latent_pictures`)."""
        _, pred, target, hidden = self._predict(images, rngs)
        first = slice(None, None, self.backbone.num_masks)
        return latent_pictures(images, hidden[first], pred[first], target, self.neck.grid)
