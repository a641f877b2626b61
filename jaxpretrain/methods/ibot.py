"""iBOT: Image BERT Pre-Training with Online Tokenizer (Zhou et al., 2022)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxpretrain.build import ConfigError, nearest
from jaxpretrain.methods.base import Batch, Metrics, draw_key
from jaxpretrain.methods.dino import (
    DINO,
    GLOBAL_VIEWS,
    DINOHead,
    DINONeck,
    WeightNormLinear,
    epoch_of,
    in_groups,
    multi_crop,
    watch,
)
from jaxpretrain.models.layers.position import resize_pos_embed
from jaxpretrain.models.vision_transformer import VisionTransformer

_SHAPES = ("block", "rand")


class IBOTViT(VisionTransformer):
    """A Vision Transformer that can hide patches: a learnt token takes their place, their positions stay.

    Args:
        arch, out_type, kwargs: arguments of `VisionTransformer`; `out_type` is 'raw' by default, as iBOT needs it.
    """

    def __init__(self, arch: Any = "base", out_type: str = "raw", *, rngs: nnx.Rngs, **kwargs: Any):
        super().__init__(arch=arch, out_type=out_type, rngs=rngs, **kwargs)
        self.mask_token = nnx.Param(jnp.zeros((1, self.embed_dims)))

    def __call__(  # type: ignore[override]
        self, x: Float[Array, "b h w c"], mask: Bool[Array, "b n"] | None = None, *, rngs: nnx.Rngs | None = None
    ) -> tuple[Any, ...]:
        """The chosen layers' outputs; patches where `mask` is true are hidden."""
        if mask is None:
            return super().__call__(x, rngs=rngs)
        tokens, grid = self.embed(x)
        first = self.num_positioned_tokens
        positions = resize_pos_embed(self.pos_embed[...], self.patch_resolution, grid, self.interpolate_mode, first)
        hidden = (self.mask_token[...] + positions[:, first:]).astype(tokens.dtype)
        tokens = jnp.where(mask[:, :, None], hidden, tokens)
        x, _ = self._run(self._prepare(tokens, rngs), rngs, (), self._layer_inputs(grid))
        return (self._format(x if self.ln1 is None else self.ln1(x), grid),)


class IBOTNeck(DINONeck):
    """DINO's projector for class tokens and patches; `patches` has prototypes of its own, or the same.

    Args:
        patch_out_channels: prototypes of patches; unused with a shared head.
        shared_head: whether class tokens and patches have the same prototypes.
        kwargs: arguments of `DINONeck`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int = 8192,
        patch_out_channels: int = 8192,
        shared_head: bool = True,
        *,
        rngs: nnx.Rngs,
        **kwargs: Any,
    ):
        super().__init__(in_channels, out_channels, rngs=rngs, **kwargs)
        self.patch_out_channels = out_channels if shared_head else patch_out_channels
        last = self.last_layer
        fixed = not isinstance(last.scale, nnx.Param)
        shape = (last.kernel.shape[0], patch_out_channels)
        self.last_layer2 = None if shared_head else WeightNormLinear(*shape, fixed, rngs=rngs)

    def patches(self, x: Float[Array, "*b d"]) -> Float[Array, "*b k"]:
        """Scores of patches, float32 at least."""
        return (self.last_layer2 or self.last_layer)(self.bottleneck(x))


class IBOTHead(DINOHead):
    """DINO's head, with a centre and temperatures of their own for patches.

    Args:
        out_channels, patch_out_channels: prototypes of class tokens and of patches.
        warmup_teacher_patch_temp, teacher_patch_temp: as `warmup_teacher_temp` and `teacher_temp`, for patches.
        teacher_temp, warmup_teacher_temp_epochs, kwargs: arguments of `DINOHead`.

    Attributes:
        center2: moving average of the teacher's scores of patches, [1, 1, prototypes].
    """

    def __init__(
        self,
        out_channels: int = 8192,
        patch_out_channels: int | None = None,
        warmup_teacher_patch_temp: float = 0.04,
        teacher_patch_temp: float = 0.07,
        teacher_temp: float = 0.07,
        warmup_teacher_temp_epochs: int = 30,
        **kwargs: Any,
    ):
        super().__init__(
            out_channels, teacher_temp=teacher_temp, warmup_teacher_temp_epochs=warmup_teacher_temp_epochs, **kwargs
        )
        self.patch_out_channels = out_channels if patch_out_channels is None else patch_out_channels
        self.patch_temps = (warmup_teacher_patch_temp, teacher_patch_temp)
        self.center2 = nnx.BatchStat(jnp.zeros((1, 1, self.patch_out_channels), jnp.float32))

    def patch_targets(
        self, scores: Float[Array, "*b n k"], epoch: Int[Array, ""], step: Int[Array, ""]
    ) -> Float[Array, "*b n k"]:
        """The teacher's distributions of patches. Their centre then moves towards the mean of these scores."""
        center = self.center2[...].reshape(-1)
        probabilities = jax.nn.softmax((scores - center) / self._warm_up(self.patch_temps, epoch, step), axis=-1)
        self.move(self.center2, scores.reshape(-1, scores.shape[-1]).mean(axis=0))
        return lax.stop_gradient(probabilities)

    def patch_entropy(self, scores: Float[Array, "*b n k"], targets: Float[Array, "*b n k"]) -> Float[Array, "*b n"]:
        """The cross-entropy of each patch."""
        return -jnp.sum(targets * jax.nn.log_softmax(scores / self.student_temp, axis=-1), axis=-1)


class MaskedDINO(DINO):
    """DINO whose student sees large views with patches hidden: what iBOT and DINOv2 have in common.

    The backbone is an `IBOTViT`. The neck's `patches` gives scores of patches.
    """

    def outputs(self) -> Sequence[tuple[int, int]]:
        return [*super().outputs(), (self.neck.patch_out_channels, self.head.patch_out_channels)]

    def student_tokens(
        self, crops: Sequence[Array], mask: Bool[Array, "b q n"], rngs: nnx.Rngs | None
    ) -> tuple[Float[Array, "b q n d"], Float[Array, "b v d"]]:
        """All tokens of the large views, with patches hidden; and the class tokens of all views."""
        large = crops[:GLOBAL_VIEWS]
        tokens = in_groups(large, lambda x: self.backbone(x, mask.reshape(len(x), -1), rngs=rngs)[-1])
        features = [tokens[:, :, 0]]
        if small := crops[GLOBAL_VIEWS:]:
            features.append(in_groups(small, lambda x: self.backbone(x, rngs=rngs)[-1][:, 0]))
        return tokens, jnp.concatenate(features, axis=1)

    def teacher_tokens(self, crops: Sequence[Array], rngs: nnx.Rngs | None) -> Float[Array, "b q n d"]:
        """All tokens of the large views, as the teacher sees them."""
        return in_groups(crops[:GLOBAL_VIEWS], lambda x: self.teacher.module[0](x, rngs=rngs)[-1])

    def grid(self, images: Float[Array, "b h w c"]) -> tuple[int, int]:
        """Patches down and across."""
        down, across = self.backbone.patch_embed.patch_size
        return images.shape[1] // down, images.shape[2] // across


class IBOT(MaskedDINO):
    """DINO, and what hides under masks: the teacher, who sees the whole view, says what each hidden patch shall look like.

    The student sees each large view with some patches hidden. Each view draws one of `pred_ratio` (r, with its v of
    `pred_ratio_var`) and hides a part U(r - v, r + v) of its patches. A batch may bring its own `mask` [B, 2, h, w].

    The backbone is an `IBOTViT`, the neck an `IBOTNeck`, the head an `IBOTHead`.

    Args:
        pred_ratio, pred_ratio_var: see above; equally long.
        pred_shape: 'block' hides rectangles as BEiT does, 'rand' single patches.
        pred_start_epoch: the first epoch in which patches are hidden.
        lambda1, lambda2: weights of the losses of class tokens and of patches.
        parts: arguments of `DINO`.

    Raises:
        ConfigError: parts or ratios that do not fit together.
    """

    def __init__(
        self,
        pred_ratio: Sequence[float] = (0.0, 0.3),
        pred_ratio_var: Sequence[float] = (0.0, 0.2),
        pred_shape: str = "block",
        pred_start_epoch: int = 0,
        lambda1: float = 1.0,
        lambda2: float = 1.0,
        *,
        rngs: nnx.Rngs,
        **parts: Any,
    ):
        super().__init__(rngs=rngs, **parts)
        self.pred_ratio, self.pred_ratio_var = tuple(pred_ratio), tuple(pred_ratio_var)
        if len(self.pred_ratio) != len(self.pred_ratio_var) or not self.pred_ratio:
            raise ConfigError(f"IBOT: pred_ratio={pred_ratio} and pred_ratio_var={pred_ratio_var} must be equally long")
        if any(not 0 <= v <= r <= 1 - v for r, v in zip(self.pred_ratio, self.pred_ratio_var, strict=True)):
            raise ConfigError(f"IBOT: pred_ratio={pred_ratio} -+ pred_ratio_var={pred_ratio_var} must be within 0 to 1")
        if pred_shape not in _SHAPES:
            raise ConfigError(f"IBOT: unknown pred_shape {pred_shape!r}.{nearest(pred_shape, _SHAPES)}")
        self.pred_shape, self.pred_start_epoch = pred_shape, pred_start_epoch
        self.lambda1, self.lambda2 = lambda1, lambda2

    def loss(self, batch: Batch, *, rngs: nnx.Rngs | None = None) -> tuple[Float[Array, ""], Metrics]:
        """The weighted sum of both losses; `image` is a tuple of views, the two large ones first.

        Logs `loss_cls` and `loss_patch`, weighted, and what DINO logs.
        """
        crops = multi_crop(batch)
        epoch, step = epoch_of(batch), self.teacher.steps[...]
        grid = self.grid(crops[0])
        mask = batch["mask"] > 0 if "mask" in batch else self.draw_masks(len(crops[0]), grid, epoch, rngs)
        mask = mask.reshape(len(crops[0]), GLOBAL_VIEWS, -1)
        student, features = self.student_tokens(crops, mask, rngs)
        teacher = self.teacher_tokens(crops, rngs)

        neck: Any = self.teacher.module[1]
        targets = self.head.targets(neck(teacher[:, :, 0]), epoch, step)
        loss_cls = self.lambda1 * self.head.loss(self.neck(features), targets)
        extra = self.backbone.num_extra_tokens
        patch_targets = self.head.patch_targets(neck.patches(teacher[:, :, extra:]), epoch, step)
        each = self.head.patch_entropy(self.neck.patches(student[:, :, extra:]), patch_targets)
        loss_patch = self.lambda2 * jnp.mean(jnp.sum(each * mask, axis=-1) / jnp.maximum(mask.sum(axis=-1), 1))
        return loss_cls + loss_patch, dict(loss_cls=loss_cls, loss_patch=loss_patch, **watch(features, targets))

    def draw_masks(
        self, count: int, grid: tuple[int, int], epoch: Int[Array, ""], rngs: nnx.Rngs | None
    ) -> Bool[Array, "m h w"]:
        """Masks for both large views of `count` images, m of them, view after view of each image."""
        choose, ratio, draw = jax.random.split(draw_key(rngs, "mask"), 3)
        masks, patches = GLOBAL_VIEWS * count, math.prod(grid)
        which = jax.random.randint(choose, (masks,), 0, len(self.pred_ratio))
        mean, half = jnp.asarray(self.pred_ratio)[which], jnp.asarray(self.pred_ratio_var)[which]
        part = mean + half * jax.random.uniform(ratio, (masks,), minval=-1.0)
        counts = jnp.where(epoch >= self.pred_start_epoch, jnp.floor(part * patches), 0).astype(jnp.int32)
        if self.pred_shape == "rand":
            rank = jax.random.uniform(draw, (masks, patches)).argsort(axis=1).argsort(axis=1)
            return (rank < counts[:, None]).reshape(masks, *grid)
        return block_masks(draw, counts, grid, (min(grid) // 3) ** 2)


def block_masks(
    key: Array,
    counts: Int[Array, " m"],
    grid: tuple[int, int],
    smallest: float,
    largest: float = math.inf,
    min_aspect: float = 0.3,
    attempts: int = 48,
) -> Bool[Array, "m h w"]:
    """Masks that are unions of rectangles, drawn on the device (Bao et al., 2021, BEiT, algorithm 1).

    A rectangle's area is U(smallest, what may still be hidden) and its log aspect U(log min_aspect, -log min_aspect). One
    that does not fit, adds nothing or adds too much is drawn anew; after ten in a row a mask is left as it is.

    Args:
        key: of everything random.
        counts: how many patches each mask hides at most; most masks hide nearly as many.
        grid: patches down and across.
        smallest, largest: area of a rectangle, in patches.
        min_aspect: of height / width.
        attempts: rectangles drawn for each mask; few masks need half as many.
    """
    height, width = grid
    bound = -math.log(min_aspect)

    def attempt(carry: tuple, draws: Float[Array, "4 m"]) -> tuple[tuple, None]:
        mask, left, failures = carry
        limit = jnp.minimum(left, largest)
        area, aspect = smallest + draws[0] * (limit - smallest), jnp.exp(bound * (2 * draws[1] - 1))
        h, w = jnp.round(jnp.sqrt(area * aspect)), jnp.round(jnp.sqrt(area / aspect))
        rows = _within(height, jnp.floor(draws[2] * (height - h + 1)), h)
        columns = _within(width, jnp.floor(draws[3] * (width - w + 1)), w)
        block = rows[:, :, None] & columns[:, None, :]
        added = jnp.sum(block & ~mask, axis=(1, 2))
        good = (h < height) & (w < width) & (added > 0) & (added <= limit) & (failures < 10)
        mask = mask | (block & good[:, None, None])
        return (mask, left - added * good, jnp.where(good, 0, failures + 1)), None

    draws = jax.random.uniform(key, (len(counts), attempts, 4)).transpose(1, 2, 0)
    start = (jnp.zeros((len(counts), height, width), bool), counts, jnp.zeros_like(counts))
    return lax.scan(attempt, start, draws)[0][0]


def _within(size: int, start: Float[Array, " m"], length: Float[Array, " m"]) -> Bool[Array, "m size"]:
    """For each of 0 to size - 1, whether it is in [start, start + length)."""
    index = jnp.arange(size)
    return (index >= start[:, None]) & (index < (start + length)[:, None])
