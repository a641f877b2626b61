"""DINO: Emerging Properties in Self-Supervised Vision Transformers (Caron et al., 2021).

The student sees all views of an image, the teacher the two large ones, and both give each view a distribution over
prototypes that have no meaning but what they learn. The release differs in two points: it clips the gradient of each
parameter by its own norm (`clip_grad` here: of all together), and interpolates positions for small views with a scale that is
0.1 patches too large.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from jaxpretrain.build import ConfigError
from jaxpretrain.methods.base import Batch, Metrics, Progress, entropy, last, normalize, spread
from jaxpretrain.methods.momentum_encoder import MomentumMethod
from jaxpretrain.models.layers import BaseModule, BatchNorm, Frozen, Linear
from jaxpretrain.models.layers.activation import activation
from jaxpretrain.models.layers.conv import global_avg_pool
from jaxpretrain.models.layers.init import apply_init_cfg, torch_uniform, trunc_normal
from jaxpretrain.models.vision_transformer import VisionTransformer
from jaxpretrain.optim.ema import cosine_ema_momentum

GLOBAL_VIEWS = 2


class WeightNormLinear(nnx.Module):
    """A linear layer without bias whose columns have a direction and a length apart (Salimans & Kingma, 2016).

    Args:
        in_features, out_features: sizes of the last axis of input and output.
        fixed_length: whether all columns keep the length 1, from which they start.

    Attributes:
        kernel: directions, [in, out], of any length.
        scale: lengths, [out, 1] as in PyTorch; `Frozen` if they are fixed.
    """

    state_names: ClassVar = {"kernel": "weight_v", "scale": "weight_g"}

    def __init__(self, in_features: int, out_features: int, fixed_length: bool = True, *, rngs: nnx.Rngs):
        self.kernel = nnx.Param(torch_uniform(in_features)(rngs.params(), (in_features, out_features), jnp.float32))
        self.scale: nnx.Variable = (Frozen if fixed_length else nnx.Param)(jnp.ones((out_features, 1), jnp.float32))

    def __call__(self, x: Float[Array, "*b in"]) -> Float[Array, "*b out"]:
        """Computed in the dtype of x, summed and returned in float32 at least."""
        kernel = self.kernel[...]
        kernel = kernel * (self.scale[...][:, 0] * lax.rsqrt(jnp.sum(jnp.square(kernel), axis=0)))
        return jnp.matmul(x, kernel.astype(x.dtype), preferred_element_type=jnp.promote_types(x.dtype, jnp.float32))


class DINONeck(BaseModule):
    """From features to scores of prototypes: an MLP with GELU, unit length, a weight-normalised layer (appendix C).

    Args:
        in_channels: channels of the features.
        out_channels: prototypes.
        hidden_channels, bottleneck_channels: widths of the MLP's hidden layers and of its output.
        num_layers: linear layers of the MLP.
        norm_last_layer: whether prototypes have length 1; else the length is learnt, which is better with ViT-S and
            unstable with larger ones.
        use_bn: BatchNorm behind each hidden layer.
        init_cfg: initialisation, MMEngine's dictionaries. Kernels of the MLP start from N(0, 0.02), biases from 0.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int = 65536,
        hidden_channels: int = 2048,
        bottleneck_channels: int = 256,
        num_layers: int = 3,
        norm_last_layer: bool = True,
        use_bn: bool = False,
        init_cfg: Any = None,
        *,
        rngs: nnx.Rngs,
    ):
        self.init_cfg, self.in_channels, self.out_channels = init_cfg, in_channels, out_channels
        widths = [in_channels, *[hidden_channels] * (max(num_layers, 1) - 1), bottleneck_channels]
        layers: list[Any] = []
        for i in range(len(widths) - 1):
            if i:
                layers += [BatchNorm(widths[i])] * use_bn + [activation({"type": "GELU"})]
            init: dict[str, Any] = dict(kernel_init=trunc_normal(0.02), bias_init=jax.nn.initializers.zeros)
            layers.append(Linear(widths[i], widths[i + 1], **init, rngs=rngs))
        # One layer alone has no number in the release.
        self.mlp: Any = nnx.List(layers) if len(layers) > 1 else layers[0]
        self.last_layer = WeightNormLinear(bottleneck_channels, out_channels, norm_last_layer, rngs=rngs)

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b k"]:
        """Scores in float32 at least: products of unit vectors, if prototypes have length 1."""
        return self.last_layer(self.bottleneck(x))

    def bottleneck(self, x: Float[Array, "*b d"]) -> Float[Array, "*b e"]:
        """The MLP's output at unit length, in the dtype of x."""
        dtype = x.dtype
        for layer in self.mlp if isinstance(self.mlp, nnx.List) else [self.mlp]:
            x = layer(x)
        return normalize(x).astype(dtype)


class DINOHead(BaseModule):
    """Compares the student's scores with the teacher's, which are centred and sharpened (equation 1, algorithm 1).

    Args:
        out_channels: prototypes.
        num_crops: accepted for MMPretrain's configs; the batch says how many views there are.
        student_temp: temperature of the student's softmax.
        center_momentum: part of the centre that each batch leaves in place.
        warmup_teacher_temp, teacher_temp: temperature of the teacher's softmax in the first epoch, and after the warm-up.
        warmup_teacher_temp_epochs: epochs in which it goes from one to the other, on a line.
        warmup_teacher_temp_steps: optimizer steps in which it does so, in place of epochs.
        init_cfg: accepted for MMPretrain's configs.

    Attributes:
        center: moving average of the teacher's scores over the global batch, [1, prototypes], from 0.
    """

    def __init__(
        self,
        out_channels: int = 65536,
        num_crops: int | None = None,
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
        warmup_teacher_temp: float = 0.04,
        teacher_temp: float = 0.04,
        warmup_teacher_temp_epochs: int = 0,
        warmup_teacher_temp_steps: int | None = None,
        init_cfg: Any = None,
    ):
        self.out_channels, self.student_temp, self.center_momentum = out_channels, student_temp, center_momentum
        self.temps = (warmup_teacher_temp, teacher_temp)
        self.warmup_epochs, self.warmup_steps = warmup_teacher_temp_epochs, warmup_teacher_temp_steps
        self.center = nnx.BatchStat(jnp.zeros((1, out_channels), jnp.float32))

    def temperature(self, epoch: Int[Array, ""], step: Int[Array, ""]) -> Float[Array, ""]:
        """The teacher's temperature in this epoch, or after so many steps, both counted from 0."""
        return self._warm_up(self.temps, epoch, step)

    def _warm_up(self, temps: tuple[float, float], epoch: Array, step: Array) -> Float[Array, ""]:
        now, length = (epoch, self.warmup_epochs) if self.warmup_steps is None else (step, self.warmup_steps)
        start, end = temps
        if length <= 1:
            return jnp.where(jnp.asarray(now) < length, start, end)
        return start + (end - start) * jnp.clip(now / (length - 1), 0, 1)

    def targets(
        self, scores: Float[Array, "b q k"], epoch: Int[Array, ""], step: Int[Array, ""]
    ) -> Float[Array, "b q k"]:
        """The teacher's distributions, of scores less the centre. The centre then moves towards these scores' mean."""
        probabilities = jax.nn.softmax((scores - self.center[...]) / self.temperature(epoch, step), axis=-1)
        self.move(self.center, scores.mean(axis=(0, 1)))
        return lax.stop_gradient(probabilities)

    def move(self, center: nnx.Variable, mean: Float[Array, " k"]) -> None:
        """Moves a centre towards the mean of a batch, in place."""
        m = self.center_momentum
        center.set_value((m * center[...] + (1 - m) * lax.stop_gradient(mean)).astype(center.dtype))

    def loss(self, scores: Float[Array, "b v k"], targets: Float[Array, "b q k"]) -> Float[Array, ""]:
        """The mean cross-entropy of all pairs of a student's view v and a teacher's q, but for the same views."""
        log_p = jax.nn.log_softmax(scores / self.student_temp, axis=-1)
        pairs = -jnp.einsum("bqk,bvk->qv", targets, log_p, precision="highest") / len(scores)
        others = 1 - jnp.eye(targets.shape[1], scores.shape[1], dtype=pairs.dtype)
        return jnp.sum(pairs * others) / others.sum()


class DINO(MomentumMethod):
    """Each view's distribution over prototypes shall be that which the teacher gives the image's large views.

    A batch has two large views and any number of small ones, large ones first; views of equal size pass the network
    together. The teacher follows student and projector by a momentum that falls from `base_momentum` to 0 on half a cosine;
    it has no dropout and no drop path. It is the better network, and what evaluators look at.

    The backbone is a ViT or gives feature maps, which are averaged; the neck is a `DINONeck`, the head a `DINOHead`.

    Args:
        base_momentum: how far the teacher moves at the start (the paper's lambda is 1 minus this).
        parts: arguments of `BaseSelfSupervisor`.

    Raises:
        ConfigError: parts that do not fit together.
    """

    def __init__(self, base_momentum: float = 0.004, *, rngs: nnx.Rngs, **parts: Any):
        super().__init__(rngs=rngs, **parts)
        self.base_momentum = base_momentum
        self.teacher.set_attributes(drop_path_rate=0.0, rate=0.0, raise_if_not_found=False)
        for ours, theirs in self.outputs():
            if ours != theirs:
                name = type(self).__name__
                raise ConfigError(
                    f"{name}: the neck scores {ours} prototypes, the head expects {theirs}; make them agree"
                )

    def outputs(self) -> Sequence[tuple[int, int]]:
        """Pairs of numbers of prototypes in neck and head, which are to be equal."""
        return [(self.neck.out_channels, self.head.out_channels)]

    def neck_defaults(self) -> dict[str, Any]:
        width = getattr(self.backbone, "embed_dims", None)
        return {} if width is None else dict(in_channels=width)

    def init_weights(self, rngs: nnx.Rngs) -> None:
        """All matrices and tokens of a ViT from N(0, 0.02), biases of 0, unless it has an `init_cfg`. The teacher is a copy."""
        super().init_weights(rngs)
        if isinstance(self.backbone, VisionTransformer) and self.backbone.init_cfg is None:
            self._init_vit(rngs)
        self.reset_teacher()

    def _init_vit(self, rngs: nnx.Rngs, cls_token_std: float = 0.02) -> None:
        apply_init_cfg(self.backbone, [dict(type="TruncNormal", layer="Linear", std=0.02, bias=0.0)], rngs)
        if isinstance(token := self.backbone.cls_token, nnx.Param):
            token.set_value(trunc_normal(cls_token_std)(rngs.params(), token.shape))

    def loss(self, batch: Batch, *, rngs: nnx.Rngs | None = None) -> tuple[Float[Array, ""], Metrics]:
        """The cross-entropy over all pairs of views; `image` is a tuple of views, the two large ones first.

        Logs `feature_std` of the student's features of the first view, and of the teacher's distributions the
        `assignment_entropy` of their mean (1: all prototypes are used alike) and `teacher_entropy`, the mean of theirs
        (1: they say nothing; 0: one prototype each), both as parts of log K.
        """
        crops = multi_crop(batch)
        features = in_groups(crops, lambda x: class_token(self.backbone(x, rngs=rngs)))
        seen = in_groups(crops[:GLOBAL_VIEWS], lambda x: class_token(self.teacher.module[0](x, rngs=rngs)))
        targets = self.head.targets(self.teacher.module[1](seen), epoch_of(batch), self.teacher.steps[...])
        return self.head.loss(self.neck(features), targets), watch(features, targets)

    def teacher_momentum(self, progress: Progress) -> Float[Array, ""]:
        return cosine_ema_momentum(progress.step - 1, self.base_momentum, 0.0, progress.total_steps)

    def extract_feat(self, images: Float[Array, "b h w c"]) -> Any:
        """The features of the teacher's backbone, a tuple."""
        return self.teacher.module[0](images)

    def features(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b d"]:
        """The teacher's class token (ViT), or last feature map averaged over positions (ResNet)."""
        return class_token(self.extract_feat(images))


# What iBOT and DINOv2 do too.


def multi_crop(batch: Batch) -> tuple[Float[Array, "b h w 3"], ...]:
    """The views of a batch. Raises ConfigError unless there are two or more, and the first two of one size."""
    crops = batch["image"]
    if not isinstance(crops, tuple | list) or len(crops) < GLOBAL_VIEWS or crops[0].shape != crops[1].shape:
        sizes = [x.shape[1:3] for x in crops] if isinstance(crops, tuple | list) else "one"
        raise ConfigError(
            f"This method learns from two large views of each image and any number of small ones, and the batch has {sizes}: "
            "give config.data.train's pipeline a dict(type='MultiView', num_views=(2, 8), transforms=[large, small])"
        )
    return tuple(crops)


def in_groups(crops: Sequence[Array], encode: Callable[[Array], Array]) -> Float[Array, "b v ..."]:
    """What `encode` makes of each view; those of equal size that follow each other pass it as one batch.

    The batch is kept image by image, so that shards of it keep all views of their images.
    """
    outputs = []
    for _, group in groupby(crops, key=jnp.shape):
        views = jnp.stack(list(group), axis=1)
        encoded = encode(views.reshape(-1, *views.shape[2:]))
        outputs.append(encoded.reshape(*views.shape[:2], *encoded.shape[1:]))
    return jnp.concatenate(outputs, axis=1)


def class_token(outputs: Any) -> Float[Array, "b d"]:
    """One vector for each image: the first of tokens [B, N, D], the mean of a map [B, H, W, D]; else what there is."""
    x = last(outputs)
    return x[:, 0] if x.ndim == 3 else global_avg_pool(x) if x.ndim == 4 else x


def epoch_of(batch: Batch) -> Int[Array, ""]:
    """The epoch of a batch, from 0."""
    return jnp.max(batch["epoch"]) if "epoch" in batch else jnp.zeros((), jnp.int32)


def watch(features: Float[Array, "b v d"], targets: Float[Array, "b q k"]) -> Metrics:
    """Signs of collapse (see `DINO.loss`), float32."""
    targets = targets.astype(jnp.float32)
    each = -jnp.sum(targets * jnp.log(jnp.maximum(targets, 1e-12)), axis=-1) / jnp.log(targets.shape[-1])
    return {
        "feature_std": spread(features[:, 0]).astype(jnp.float32),
        "assignment_entropy": entropy(targets),
        "teacher_entropy": each.mean(),
    }
