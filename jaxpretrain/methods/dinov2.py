"""DINOv2: Learning Robust Visual Features without Supervision (Oquab et al., 2023), its training.

iBOT with untied heads, the teacher's scores balanced by Sinkhorn-Knopp, and KoLeo. Registers (Darcet et al., 2024), LayerScale,
SwiGLU and drop path are arguments of the backbone. (The release also packs views of different lengths into one sequence and
computes only the samples that drop path keeps: speed, with the same results.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxpretrain.build import ConfigError, build, nearest
from jaxpretrain.methods.base import Batch, Metrics, draw_key, normalize
from jaxpretrain.methods.dino import GLOBAL_VIEWS, DINONeck, epoch_of, multi_crop, watch
from jaxpretrain.methods.ibot import IBOTHead, MaskedDINO, block_masks
from jaxpretrain.models.layers import BaseModule

CENTERINGS = ("centering", "sinkhorn_knopp")


class KoLeoLoss(BaseModule):
    """Spreads features: minus the mean log distance of each unit vector to its nearest neighbour (Sablayrolles et al., 2019).

    Args:
        groups: parts of the batch within which neighbours are looked for. (The release looks on each GPU.)
        eps: added to the differences and to the distances.
    """

    def __init__(self, groups: int = 1, eps: float = 1e-8):
        self.groups, self.eps = groups, eps

    def __call__(self, x: Float[Array, "b d"]) -> Float[Array, ""]:
        """The loss, float32 at least. Needs two vectors in each group."""
        x = normalize(x).reshape(self.groups, -1, x.shape[-1])
        count = x.shape[1]
        if count < 2:
            raise ConfigError(
                f"KoLeoLoss: {count} image in each of {self.groups} groups has no neighbour; use fewer groups"
            )
        products = jnp.einsum("gid,gjd->gij", x, x, precision="highest") - 3 * jnp.eye(count, dtype=x.dtype)
        nearest_one = jnp.argmax(products, axis=-1)
        neighbours = jnp.take_along_axis(x, nearest_one[:, :, None], axis=1)
        distance = jnp.sqrt(jnp.sum(jnp.square(x - neighbours + self.eps), axis=-1))
        return -jnp.mean(jnp.log(distance + self.eps))


class DINOv2Neck(BaseModule):
    """Projectors of class tokens and of patches, with nothing in common unless there is one for both.

    Args:
        in_channels: channels of the features.
        dino_head: arguments of the `DINONeck` of class tokens.
        ibot_head: arguments of that of patches; None: class tokens' serves both.
        init_cfg: initialisation, MMEngine's dictionaries.
    """

    def __init__(
        self,
        in_channels: int,
        dino_head: Mapping[str, Any] = {},
        ibot_head: Mapping[str, Any] | None = {},
        init_cfg: Any = None,
        *,
        rngs: nnx.Rngs,
    ):
        def head(cfg: Mapping[str, Any]) -> DINONeck:
            # Lengths of prototypes are learnt, as in the release.
            args: dict[str, Any] = dict(type=DINONeck, in_channels=in_channels, norm_last_layer=False)
            return build({**args, **cfg}, rngs=rngs)

        self.init_cfg, self.in_channels = init_cfg, in_channels
        self.dino_head = head(dino_head)
        self.ibot_head = None if ibot_head is None else head(ibot_head)
        self.out_channels = self.dino_head.out_channels
        self.patch_out_channels = (self.ibot_head or self.dino_head).out_channels

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b k"]:
        """Scores of class tokens, float32 at least."""
        return self.dino_head(x)

    def patches(self, x: Float[Array, "*b d"]) -> Float[Array, "*b k"]:
        """Scores of patches, float32 at least."""
        return (self.ibot_head or self.dino_head)(x)


class DINOv2Head(IBOTHead):
    """Turns the teacher's scores into distributions by centring, or by Sinkhorn-Knopp, and compares the student's.

    Args:
        out_channels, patch_out_channels: prototypes of class tokens and of patches.
        centering: 'centering' subtracts moving averages, 'sinkhorn_knopp' balances each batch.
        iterations: of Sinkhorn-Knopp.
        kwargs: arguments of `IBOTHead`; the temperatures of patches are those of class tokens.
    """

    def __init__(
        self,
        out_channels: int = 65536,
        patch_out_channels: int | None = None,
        centering: str = "centering",
        iterations: int = 3,
        **kwargs: Any,
    ):
        super().__init__(out_channels, patch_out_channels, **kwargs)
        if centering not in CENTERINGS:
            raise ConfigError(f"DINOv2Head: unknown centering {centering!r}.{nearest(centering, CENTERINGS)}")
        self.centering, self.iterations, self.patch_temps = centering, iterations, self.temps

    def targets(
        self, scores: Float[Array, "b q k"], epoch: Int[Array, ""], step: Int[Array, ""]
    ) -> Float[Array, "b q k"]:
        if self.centering == "centering":
            return super().targets(scores, epoch, step)
        logits = scores.reshape(-1, scores.shape[-1]) / self.temperature(epoch, step)
        return sinkhorn_knopp(logits, iterations=self.iterations).reshape(scores.shape)

    def masked_targets(
        self, scores: Float[Array, "g m k"], valid: Bool[Array, "g m"], epoch: Int[Array, ""], step: Int[Array, ""]
    ) -> Float[Array, "g m k"]:
        """The teacher's distributions of hidden patches; those that are not `valid` do not count."""
        temperature = self._warm_up(self.patch_temps, epoch, step)
        if self.centering == "sinkhorn_knopp":
            logits = scores.reshape(-1, scores.shape[-1]) / temperature
            return sinkhorn_knopp(logits, valid.reshape(-1), self.iterations).reshape(scores.shape)
        probabilities = jax.nn.softmax((scores - self.center2[...]) / temperature, axis=-1)
        weight = valid.astype(scores.dtype) / jnp.maximum(valid.sum(), 1)
        self.move(self.center2, jnp.einsum("gm,gmk->k", weight, scores, precision="highest"))
        return lax.stop_gradient(probabilities)


class DINOv2(MaskedDINO):
    """iBOT as DINOv2 trains it: separate projectors, balanced targets, features spread by KoLeo.

    Of a group of large views, a part `mask_sample_probability` has patches hidden, each another part of the patches: the
    range `mask_ratio_min_max` is shared out evenly among them. So a group hides a bounded number of patches, and only that
    many pass the projector: shapes are static, and a group needs nothing from other devices.

    The backbone is an `IBOTViT`, the neck a `DINOv2Neck`, the head a `DINOv2Head`.

    Args:
        dino_loss_weight, ibot_loss_weight, koleo_loss_weight: of the loss's parts.
        mask_sample_probability, mask_ratio_min_max: see above.
        groups: parts of the batch for which masks are shared out, and within which KoLeo looks for neighbours: the release's
            number of GPUs. A multiple of the number of devices saves communication.
        parts: arguments of `DINO`.

    Raises:
        ConfigError: parts that do not fit together.
    """

    def __init__(
        self,
        dino_loss_weight: float = 1.0,
        ibot_loss_weight: float = 1.0,
        koleo_loss_weight: float = 0.1,
        mask_sample_probability: float = 0.5,
        mask_ratio_min_max: tuple[float, float] = (0.1, 0.5),
        groups: int = 1,
        *,
        rngs: nnx.Rngs,
        **parts: Any,
    ):
        super().__init__(rngs=rngs, **parts)
        low, high = mask_ratio_min_max
        if not (0 <= low <= high <= 1 and 0 <= mask_sample_probability <= 1):
            raise ConfigError(
                f"DINOv2: mask_ratio_min_max={mask_ratio_min_max} must ascend within 0 to 1, and "
                f"mask_sample_probability={mask_sample_probability} be there too"
            )
        self.dino_loss_weight, self.ibot_loss_weight = dino_loss_weight, ibot_loss_weight
        self.koleo_loss_weight, self.koleo = koleo_loss_weight, KoLeoLoss(groups)
        self.mask_sample_probability, self.mask_ratio_min_max = mask_sample_probability, (low, high)
        self.groups = groups

    def _init_vit(self, rngs: nnx.Rngs, cls_token_std: float = 1e-6) -> None:
        """As DINO, but for class tokens of N(0, 1e-6)."""
        super()._init_vit(rngs, cls_token_std)

    def loss(self, batch: Batch, *, rngs: nnx.Rngs | None = None) -> tuple[Float[Array, ""], Metrics]:
        """The sum of three losses; `image` is a tuple of views, the two large ones first.

        Logs them, weighted, as `loss_dino`, `loss_ibot` and `loss_koleo`, and what DINO logs.
        """
        crops = multi_crop(batch)
        images, grid = len(crops[0]), self.grid(crops[0])
        if images % self.groups:
            raise ConfigError(f"DINOv2: {images} images do not divide into groups={self.groups}; change one of them")
        epoch, step = epoch_of(batch), self.teacher.steps[...]
        if "mask" in batch:
            mask, bound = batch["mask"] > 0, GLOBAL_VIEWS * images // self.groups * math.prod(grid)
        else:
            mask, bound = self.draw_group_masks(images, grid, rngs)
        mask = mask.reshape(images, GLOBAL_VIEWS, -1)
        student, features = self.student_tokens(crops, mask, rngs)
        teacher = self.teacher_tokens(crops, rngs)

        neck: Any = self.teacher.module[1]
        targets = self.head.targets(neck(teacher[:, :, 0]), epoch, step)
        losses = dict(loss_dino=self.dino_loss_weight * self.head.loss(self.neck(features), targets))
        losses["loss_ibot"] = self.ibot_loss_weight * self._patch_loss(student, teacher, mask, bound, epoch, step)
        koleo = sum((self.koleo(student[:, view, 0]) for view in range(GLOBAL_VIEWS)), jnp.zeros(()))
        losses["loss_koleo"] = self.koleo_loss_weight * koleo
        return sum(losses.values(), jnp.zeros(())), {**losses, **watch(features, targets)}

    def _patch_loss(
        self,
        student: Float[Array, "b q n d"],
        teacher: Float[Array, "b q n d"],
        mask: Bool[Array, "b q p"],
        bound: int,
        epoch: Int[Array, ""],
        step: Int[Array, ""],
    ) -> Float[Array, ""]:
        """The mean over views of the mean over hidden patches; views without any count as 0."""
        if bound == 0:
            return jnp.zeros(())
        extra, patches = self.backbone.num_extra_tokens, mask.shape[2]
        flat = mask.reshape(self.groups, -1)
        where = jax.vmap(lambda row: jnp.nonzero(row, size=bound, fill_value=0)[0])(flat)
        valid = jnp.arange(bound) < flat.sum(axis=1, keepdims=True)

        def hidden(tokens: Float[Array, "b q n d"]) -> Float[Array, "g m d"]:
            rows = tokens[:, :, extra:].reshape(self.groups, -1, tokens.shape[-1])
            return jnp.take_along_axis(rows, where[:, :, None], axis=1)

        neck: Any = self.teacher.module[1]
        targets = self.head.masked_targets(neck.patches(hidden(teacher)), valid, epoch, step)
        each = self.head.patch_entropy(self.neck.patches(hidden(student)), targets)
        counts = mask.sum(axis=2).reshape(self.groups, -1)
        weight = valid / jnp.maximum(jnp.take_along_axis(counts, where // patches, axis=1), 1)
        return jnp.sum(jnp.where(valid, each, 0) * weight) / counts.size

    def draw_group_masks(
        self, images: int, grid: tuple[int, int], rngs: nnx.Rngs | None
    ) -> tuple[Bool[Array, "m h w"], int]:
        """Masks of both large views of all images, and how many patches a group can have hidden at most."""
        patches, views = math.prod(grid), GLOBAL_VIEWS * images // self.groups
        masked = int(views * self.mask_sample_probability)
        ratios = np.linspace(*self.mask_ratio_min_max, masked + 1)
        low, high = np.zeros((2, views), np.float32)
        low[:masked], high[:masked] = ratios[:-1], ratios[1:]
        part, order, draw = jax.random.split(draw_key(rngs, "mask"), 3)
        ratio = low + (high - low) * jax.random.uniform(part, (self.groups, views))
        shuffled = jnp.argsort(jax.random.uniform(order, (self.groups, views)), axis=1)
        counts = jnp.take_along_axis(jnp.floor(ratio * patches).astype(jnp.int32), shuffled, axis=1)
        masks = block_masks(draw, counts.reshape(-1), grid, smallest=4, largest=patches // 2)
        return masks, int(sum(int(patches * ratio) for ratio in ratios[1:])) if masked else 0


def sinkhorn_knopp(
    logits: Float[Array, "m k"], valid: Bool[Array, " m"] | None = None, iterations: int = 3
) -> Float[Array, "m k"]:
    """Distributions exp(logits), balanced: in turns, prototypes get equal weight in the batch, and rows add up to 1.

    Computed in logarithms (in float32 exponentials overflow from 88 on). Rows that are not `valid` take no part, and are
    0. No gradient passes. (Caron et al., 2020, SwAV; Cuturi, 2013.)
    """
    logits = lax.stop_gradient(logits)
    closed = jnp.zeros(len(logits), logits.dtype) if valid is None else jnp.where(valid, 0, -jnp.inf)
    rows = closed[:, None]
    for _ in range(iterations):
        columns = -jax.nn.logsumexp(logits + rows, axis=0)
        rows = closed[:, None] - jax.nn.logsumexp(logits + columns, axis=1, keepdims=True)
    balanced = jnp.exp(logits + columns + rows)
    return balanced if valid is None else jnp.where(valid[:, None], balanced, 0)
