"""I-JEPA: Self-Supervised Learning from Images with a Joint-Embedding Predictive Architecture (Assran et al., 2023).

What the encoder sees of an image, one large block with holes, shall tell what its slow copy, which sees the whole image,
makes of the blocks that were cut out. Nothing is predicted in pixels, and images are not augmented but cropped.

The paper's release gives all blocks of a batch one size, and cuts every list of patches to the shortest of the batch, so
that they stack into arrays. Here shapes must not depend on random numbers at all. Each block has a size of its own, as the
paper says, and lists have a fixed number of places: places that are left over are hidden from attention, and have no weight
in the loss. Their number suffices for any target block. Context is cut to `context_ratio` of the patches, by dropping patches
at random: of half the patches, one image in three has more. The release cuts deeper, and always at the bottom of the image.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jaxtyping import Array, Bool, Float, Int

from jaxpretrain.build import ConfigError
from jaxpretrain.methods.base import Batch, Metrics, Progress, draw_key, last, spread
from jaxpretrain.methods.latent import latent_pictures, mean_of_tokens, standardize
from jaxpretrain.methods.momentum_encoder import MomentumMethod
from jaxpretrain.models.layers import BaseModule, Frozen, Linear, apply_layers, build_norm, drop_path
from jaxpretrain.models.layers.init import trunc_normal
from jaxpretrain.models.layers.position import build_2d_sincos_position_embedding
from jaxpretrain.models.vision_transformer import TransformerEncoderLayer, VisionTransformer

_INIT = {"type": "TruncNormal", "layer": ["Linear", "Conv2d"], "std": 0.02, "bias": 0.0}
_HEAD = {"type": "IJEPAHead"}


@struct.dataclass
class Places:
    """Some patches of each image, in a fixed number of places.

    Attributes:
        patch: which patch is in a place; any, where it is empty.
        filled: whether a patch is in it.
    """

    patch: Int[Array, "*b k"]
    filled: Bool[Array, "*b k"]

    def of(self, tokens: Float[Array, "b n c"]) -> Float[Array, "*b k c"]:
        """The tokens in these places."""
        index = self.patch.reshape(tokens.shape[0], -1, 1)
        return jnp.take_along_axis(tokens, index, axis=1).reshape(*self.patch.shape, tokens.shape[-1])


class BlockMasks:
    """Draws what is context and what is to be predicted (section 3 and appendix A.1).

    Args:
        num_targets: target blocks of each image; they may overlap.
        target_scale: their part of the image's area, smallest and largest.
        target_aspect: their height over width, likewise.
        context_scale: part of the area of the context block, which is square; target blocks are cut out of it.
        context_ratio: at most this part of the patches is context.
        min_keep: if fewer patches are left of the context block, others outside the targets join it.

    Raises:
        ConfigError: ranges that are none.
    """

    def __init__(
        self,
        num_targets: int = 4,
        target_scale: tuple[float, float] = (0.15, 0.2),
        target_aspect: tuple[float, float] = (0.75, 1.5),
        context_scale: tuple[float, float] = (0.85, 1.0),
        context_ratio: float = 0.5,
        min_keep: int = 10,
    ):
        for name, (low, high) in dict(target_scale=target_scale, context_scale=context_scale).items():
            if not 0 < low <= high <= 1:
                raise ConfigError(f"BlockMasks: {name}={(low, high)} must be (low, high) within 0 and 1")
        if not 0 < target_aspect[0] <= target_aspect[1]:
            raise ConfigError(f"BlockMasks: target_aspect={target_aspect} must be (low, high)")
        if not 0 < context_ratio <= 1 or num_targets < 1:
            raise ConfigError(
                f"BlockMasks: context_ratio={context_ratio}, num_targets={num_targets} leave nothing to do"
            )
        self.num_targets, self.target_scale, self.target_aspect = num_targets, target_scale, target_aspect
        self.context_scale, self.context_ratio, self.min_keep = context_scale, context_ratio, min_keep

    def sizes(self, grid: tuple[int, int]) -> tuple[int, int]:
        """How many places there are for context, and for one target block, in a grid of patches (down, across)."""
        patches = math.prod(grid)
        area = int(patches * self.target_scale[1])
        # Height and width are rounded, each up by a half at most.
        sides = [(math.sqrt(area * a), math.sqrt(area / a)) for a in self.target_aspect]
        largest = max((h + 0.5) * (w + 0.5) for h, w in sides)
        return max(1, round(patches * self.context_ratio)), min(patches, int(largest))

    def __call__(self, key: Array, batch: int, grid: tuple[int, int]) -> tuple[Places, Places]:
        """Context [B, K] and targets [B, blocks, T]."""
        places, target_places = self.sizes(grid)
        keys = jax.random.split(key, 3)
        blocks = self.blocks(keys[0], (batch, self.num_targets), grid, self.target_scale, self.target_aspect)
        context = self.blocks(keys[1], (batch,), grid, self.context_scale, (1.0, 1.0))
        outside = ~blocks.any(axis=1)
        noise = jax.random.uniform(keys[2], context.shape)
        # First what is left of the block, then the rest of the image, last the targets.
        order = jnp.argsort(noise + jnp.where(context & outside, 0, jnp.where(outside, 1, 2)), axis=1)[:, :places]
        found = jnp.take_along_axis(context & outside, order, axis=1)
        spare = jnp.take_along_axis(outside, order, axis=1) & (jnp.arange(order.shape[1]) < self.min_keep)
        patches = jnp.argsort(~blocks, axis=-1, stable=True)[..., :target_places]
        return Places(order, found | spare), Places(patches, jnp.take_along_axis(blocks, patches, axis=-1))

    @staticmethod
    def blocks(
        key: Array,
        shape: tuple[int, ...],
        grid: tuple[int, int],
        scale: tuple[float, float],
        aspect: tuple[float, float],
    ) -> Bool[Array, "*shape n"]:
        """Random rectangles: area and aspect ratio are uniform, and so is the place among all where they fit."""
        keys = jax.random.split(key, 4)
        area = jnp.floor(math.prod(grid) * jax.random.uniform(keys[0], shape, minval=scale[0], maxval=scale[1]))
        ratio = jax.random.uniform(keys[1], shape, minval=aspect[0], maxval=aspect[1])
        inside = []
        for size, side, k in zip(grid, (jnp.sqrt(area * ratio), jnp.sqrt(area / ratio)), keys[2:], strict=True):
            side = jnp.clip(jnp.round(side), 1, size).astype(jnp.int32)[..., None]
            first = jax.random.randint(k, side.shape, 0, size - side + 1)
            index = jnp.arange(size)
            inside.append((index >= first) & (index < first + side))
        return (inside[0][..., :, None] & inside[1][..., None, :]).reshape(*shape, -1)


def hide(filled: Bool[Array, "b k"]) -> Float[Array, "b 1 1 k"]:
    """What to add to attention's logits so that nobody looks at empty places."""
    return jnp.where(filled, 0.0, -1e9)[:, None, None]


class IJEPALayer(TransformerEncoderLayer):
    """A pre-norm block that can be told which tokens not to look at."""

    def __call__(
        self,
        x: Float[Array, "b n c"],
        *,
        bias: Float[Array, "b 1 1 n"] | None = None,
        rngs: nnx.Rngs | None = None,
        drop_path_rate: float | Array | None = None,
    ) -> Float[Array, "b n c"]:
        rate = self.drop_path_rate if drop_path_rate is None else drop_path_rate
        rate = 0.0 if self.deterministic else rate
        x = x + drop_path(self.attn.attend(*self.attn.heads(self.ln1(x)), bias=bias, rngs=rngs), rate, rngs)
        return x + drop_path(self.ffn(self.ln2(x), rngs=rngs), rate, rngs)

    def init_weights(self, rngs: nnx.Rngs) -> None:
        """As the outer modules' `init_cfg` says."""
        BaseModule.init_weights(self, rngs)


class IJEPAViT(VisionTransformer):
    """The encoder: a Vision Transformer without class token; positions are a fixed sin-cos table.

    Args:
        arch: as of `VisionTransformer`.
        out_type: what a call with whole images returns; `IJEPA` needs 'raw', which here are the patches.
        init_cfg: initialisation; the paper's by default.
        kwargs: other arguments of `VisionTransformer`.
    """

    layer_type: ClassVar[type] = IJEPALayer

    def __init__(
        self,
        arch: str | Mapping[str, int] = "b",
        out_type: str = "raw",
        init_cfg: Any = _INIT,
        *,
        rngs: nnx.Rngs,
        **kwargs: Any,
    ):
        super().__init__(arch=arch, out_type=out_type, with_cls_token=False, init_cfg=init_cfg, rngs=rngs, **kwargs)
        self.pos_embed = Frozen(self._positions())

    def _positions(self) -> Float[Array, "1 n c"]:
        return build_2d_sincos_position_embedding(self.patch_resolution, self.embed_dims)

    def init_weights(self, rngs: nnx.Rngs) -> None:
        """Besides `init_cfg`: nothing; positions are fixed."""
        super().init_weights(rngs)
        self.pos_embed.set_value(self._positions())

    def __call__(  # type: ignore[override]
        self, x: Float[Array, "b h w c"], context: Places | None = None, *, rngs: nnx.Rngs | None = None
    ) -> Any:
        """Features of the patches in `context`, [B, K, C]; or, without, of whole images, as of `VisionTransformer`."""
        if context is None:
            return super().__call__(x, rngs=rngs)
        tokens, _ = self.embed(x)
        tokens = self.drop_after_pos(context.of(tokens), rngs=rngs)
        tokens, _ = self._run(tokens, rngs, inputs={"bias": hide(context.filled)})
        return tokens if self.ln1 is None else self.ln1(tokens)


class IJEPAPredictor(BaseModule):
    """A narrow Vision Transformer that is given context and the places of a block, and tells what is there.

    Args:
        num_patches: patches in an image, down and across, or their number in a square one.
        embed_dim: channels of the encoder.
        predictor_embed_dim: channels here.
        depth, num_heads: of the transformer; the paper has 6 layers for ViT-B, and 12 for larger encoders.
        mlp_ratio: hidden channels of the feed-forward halves, in multiples of the width.
        norm_cfg: all norms.
        init_cfg: initialisation; the paper's by default.

    Attributes:
        scan_layers, remat: how the layers are run (see `apply_layers`); False and 'none' unless set.
    """

    def __init__(
        self,
        num_patches: int | tuple[int, int] = 196,
        embed_dim: int = 768,
        predictor_embed_dim: int = 384,
        depth: int = 6,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        norm_cfg: Mapping[str, Any] = {"type": "LN", "eps": 1e-6},
        init_cfg: Any = _INIT,
        *,
        rngs: nnx.Rngs,
    ):
        side = math.isqrt(num_patches) if isinstance(num_patches, int) else 0
        self.grid: tuple[int, int] = (side, side) if isinstance(num_patches, int) else (num_patches[0], num_patches[1])
        if isinstance(num_patches, int) and side * side != num_patches:
            raise ConfigError(f"IJEPAPredictor: num_patches={num_patches} is no square; give (down, across)")
        self.init_cfg, self.scan_layers, self.remat = init_cfg, False, "none"
        width = predictor_embed_dim
        self.predictor_embed = Linear(embed_dim, width, rngs=rngs)
        self.mask_token = nnx.Param(jnp.zeros((1, 1, width)))
        self.predictor_pos_embed = Frozen(build_2d_sincos_position_embedding(self.grid, width))
        self.predictor_blocks = nnx.List(
            [IJEPALayer(width, num_heads, int(mlp_ratio * width), norm_cfg=norm_cfg, rngs=rngs) for _ in range(depth)]
        )
        self.predictor_norm = build_norm(norm_cfg, width, rngs=rngs)
        self.predictor_proj = Linear(width, embed_dim, rngs=rngs)

    def init_weights(self, rngs: nnx.Rngs) -> None:
        """Besides `init_cfg`: the mask token from a truncated normal distribution of std 0.02."""
        super().init_weights(rngs)
        self.mask_token.set_value(trunc_normal(0.02)(rngs.params(), self.mask_token.shape))

    def __call__(
        self, x: Float[Array, "b k c"], context: Places, targets: Places, *, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "b m t c"]:
        """The prediction for each target block, made without the others: in the places of `targets`, [B, blocks, T, C].

        Args:
            x: the encoder's features of the patches in `context`.
            context: their places.
            targets: those of the blocks.
            rngs: unused; there is no dropout here.
        """
        x = self.predictor_embed(x)
        b, m, t = targets.patch.shape
        positions = jnp.broadcast_to(
            self.predictor_pos_embed[...].astype(x.dtype), (b, math.prod(self.grid), x.shape[2])
        )
        x = jnp.repeat(x + context.of(positions), m, axis=0)
        asked = (self.mask_token[...].astype(x.dtype) + targets.of(positions)).reshape(b * m, t, -1)
        filled = [jnp.repeat(context.filled, m, axis=0), targets.filled.reshape(b * m, t)]
        x, _ = apply_layers(
            self.predictor_blocks,
            jnp.concatenate([x, asked], axis=1),
            rngs=rngs,
            scan_layers=self.scan_layers,
            remat=self.remat,
            shared={"bias": hide(jnp.concatenate(filled, axis=1))},
        )
        return self.predictor_proj(self.predictor_norm(x[:, -t:])).reshape(b, m, t, -1)


class IJEPAHead(BaseModule):
    """Compares predictions with standardised features by the smooth L1 distance.

    Args:
        beta: up to this difference the distance is quadratic, beyond linear.
    """

    def __init__(self, beta: float = 1.0):
        self.beta = beta

    def loss(
        self, pred: Float[Array, "*b c"], target: Float[Array, "*b c"], filled: Bool[Array, "*b"]
    ) -> Float[Array, ""]:
        """The mean over channels and filled places. `target` is standardised already (see `standardize`)."""
        error = jnp.abs(pred.astype(target.dtype) - target)
        distance = jnp.where(error < self.beta, 0.5 * jnp.square(error) / self.beta, error - 0.5 * self.beta)
        return jnp.sum(distance.mean(axis=-1) * filled) / jnp.maximum(filled.sum(), 1)


class IJEPA(MomentumMethod):
    """Predicts the features that a slow copy of the encoder makes of blocks of the image, from the rest of it.

    The backbone is an `IJEPAViT`; the neck an `IJEPAPredictor`, whose `num_patches` and `embed_dim` are the backbone's
    where not given. After step s of S (counted from 1) the copy keeps m of its weights, and takes 1 - m from the encoder;
    m grows on a straight line from `base_momentum`, at the first step, to `end_momentum`, just after the last.

    Args:
        base_momentum, end_momentum: the first and last m.
        masks: arguments of `BlockMasks`.
        head: makes the loss.
        parts: arguments of `BaseSelfSupervisor`.

    Raises:
        ConfigError: parts that do not fit together.
    """

    teacher_name: ClassVar = "target_encoder"

    def __init__(
        self,
        base_momentum: float = 0.996,
        end_momentum: float = 1.0,
        masks: Mapping[str, Any] = {},
        head: Mapping[str, Any] | nnx.Module = _HEAD,
        *,
        rngs: nnx.Rngs,
        **parts: Any,
    ):
        super().__init__(head=head, rngs=rngs, **parts)
        self.base_momentum, self.end_momentum = base_momentum, end_momentum
        self.masks = BlockMasks(**masks)
        self.teacher.set_attributes(rate=0.0, drop_path_rate=0.0, raise_if_not_found=False)  # targets are not noisy
        if self.backbone.out_type != "raw":
            raise ConfigError(f"IJEPA: backbone.out_type={self.backbone.out_type!r} must be 'raw'")
        if self.neck.grid != tuple(self.backbone.patch_resolution):
            raise ConfigError(
                f"IJEPA: neck.num_patches {self.neck.grid} is not the backbone's patches {self.backbone.patch_resolution}"
            )

    def neck_defaults(self) -> dict[str, Any]:
        return dict(num_patches=self.backbone.patch_resolution, embed_dim=self.backbone.embed_dims)

    @property
    def students(self) -> tuple[nnx.Module, ...]:
        """The encoder alone: the predictor has no copy."""
        return (self.backbone,)

    def loss(self, batch: Batch, *, rngs: nnx.Rngs | None = None) -> tuple[Float[Array, ""], Metrics]:
        """The head's loss over all target blocks; masks are drawn from `rngs.mask`.

        Logs `feature_std`, of the slow copy's mean over patches.
        """
        pred, tokens, _, targets = self._predict(batch["image"], rngs)
        loss = self.head.loss(pred, targets.of(standardize(tokens, -1)), targets.filled)
        return loss, {"feature_std": spread(tokens.mean(axis=1))}

    def _predict(self, images: Array, rngs: nnx.Rngs | None) -> tuple[Array, Array, Places, Places]:
        """Predictions for the target blocks, the slow copy's tokens of the whole image, context and targets."""
        grid = self.neck.grid
        context, targets = self.masks(draw_key(rngs, "mask"), images.shape[0], grid)
        tokens = jax.lax.stop_gradient(last(self.teacher(images)))
        if tokens.shape[1] != math.prod(grid):
            raise ValueError(
                f"IJEPA's predictor is for {grid[0]}x{grid[1]} patches, and got {tokens.shape[1]}: train at the "
                "backbone's img_size"
            )
        return self.neck(self.backbone(images, context, rngs=rngs), context, targets), tokens, context, targets

    def teacher_momentum(self, progress: Progress) -> Float[Array, ""]:
        done = (progress.step - 1) / progress.total_steps
        return 1 - (self.base_momentum + (self.end_momentum - self.base_momentum) * done)

    def features(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b d"]:
        """The slow copy's mean over patches: the paper evaluates that one (appendix A.1)."""
        return mean_of_tokens(last(self.teacher(images)))

    def reconstruct(
        self, images: Float[Array, "b h w 3"], *, rngs: nnx.Rngs | None = None
    ) -> dict[str, Float[Array, "b h w c"]]:
        """Images, what the encoder does not see of them, and how well the target blocks are predicted.

        See `latent_pictures`; what is neither context nor target is as a prediction that says nothing.
        """
        pred, tokens, context, targets = self._predict(images, rngs)
        b, n, c = tokens.shape
        rows = jnp.arange(b)[:, None]
        seen = jnp.zeros((b, n)).at[rows, context.patch].max(context.filled)
        # Blocks overlap: the mean of what is said about a patch.
        patch, filled = targets.patch.reshape(b, -1), targets.filled.reshape(b, -1, 1)
        said = jnp.zeros((b, n, c)).at[rows, patch].add(pred.reshape(b, -1, c) * filled)
        said = said / jnp.maximum(jnp.zeros((b, n, 1)).at[rows, patch].add(filled), 1)
        return latent_pictures(images, 1 - seen, said, standardize(tokens, -1), self.neck.grid)
