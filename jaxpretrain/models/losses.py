"""Losses, as functions of predictions and targets. All compute in float32 at least."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Num

from jaxpretrain.build import ConfigError, nearest
from jaxpretrain.models.layers.base import BaseModule

_REDUCTIONS = ("none", "mean", "sum")


def _at_least_float32(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _check_reduction(reduction: str) -> str:
    if reduction not in _REDUCTIONS:
        raise ConfigError(f"Unknown reduction {reduction!r}.{nearest(reduction, _REDUCTIONS)}")
    return reduction


def reduce_loss(
    loss: Float[Array, "b ..."],
    weight: Float[Array, " b"] | None = None,
    reduction: str = "mean",
    avg_factor: float | Array | None = None,
) -> Array:
    """Weights a loss per sample, and reduces it to a scalar.

    Args:
        loss: one value per sample, or per sample and class.
        weight: of each sample; the mean does not divide by it.
        reduction: 'mean' over all values, 'sum', or 'none'.
        avg_factor: what the sum is divided by for 'mean', in place of the number of values.
    """
    if weight is not None:
        loss = loss * _at_least_float32(weight).reshape(-1, *[1] * (loss.ndim - 1))
    if _check_reduction(reduction) == "none":
        return loss
    if avg_factor is None:
        return loss.mean() if reduction == "mean" else loss.sum()
    if reduction == "sum":
        raise ConfigError("avg_factor cannot be used with reduction='sum'")
    return loss.sum() / avg_factor


class CrossEntropyLoss(BaseModule):
    """Cross entropy of logits [B, classes] with int labels [B], or with a float target per class [B, classes].

    Args:
        use_sigmoid: binary cross entropy of each class, as for multi-label targets and BCE training. A target below 0 does
            not count, here and in the other binary losses.
        use_soft: said by configs whose targets are soft; the form of the target decides in any case.
        reduction: 'mean', 'sum' or 'none'. The mean of binary cross entropy is over samples and classes; heads pass
            `avg_factor`, the number of samples, so that in training it is the sum over classes.
        loss_weight: factor of the result.
        class_weight: factor of each class. The mean divides by the number of samples, not by the sum of weights.
        pos_weight: factor of each class's positive term, with `use_sigmoid`.
    """

    def __init__(
        self,
        use_sigmoid: bool = False,
        use_soft: bool = False,
        reduction: str = "mean",
        loss_weight: float = 1.0,
        class_weight: Sequence[float] | None = None,
        pos_weight: Sequence[float] | None = None,
    ):
        if use_sigmoid and use_soft:
            raise ConfigError("CrossEntropyLoss: use_sigmoid and use_soft exclude each other")
        if pos_weight is not None and not use_sigmoid:
            raise ConfigError("CrossEntropyLoss: pos_weight needs use_sigmoid=True")
        self.use_sigmoid, self.use_soft = use_sigmoid, use_soft
        self.reduction, self.loss_weight = _check_reduction(reduction), loss_weight
        self.class_weight = None if class_weight is None else tuple(class_weight)
        self.pos_weight = None if pos_weight is None else tuple(pos_weight)

    def __call__(
        self,
        cls_score: Float[Array, "b c"],
        label: Num[Array, "b ..."],
        weight: Float[Array, " b"] | None = None,
        avg_factor: float | Array | None = None,
        reduction_override: str | None = None,
    ) -> Array:
        """The loss of `cls_score`, a scalar unless the reduction is 'none'; for the rest see `reduce_loss`."""
        logits, target = _logits_and_target(self, cls_score, label)
        if self.use_sigmoid:
            target, counted = _counted(target)
            # -log sigmoid(x) = softplus(-x), and -log(1 - sigmoid(x)) = x + softplus(-x), which never overflow.
            positive = target if self.pos_weight is None else target * jnp.asarray(self.pos_weight, logits.dtype)
            loss = counted * ((1 - target) * logits + (1 - target + positive) * jax.nn.softplus(-logits))
        else:
            loss = -target * jax.nn.log_softmax(logits)
        if self.class_weight is not None:
            loss = loss * jnp.asarray(self.class_weight, logits.dtype)
        if not self.use_sigmoid:
            loss = loss.sum(axis=-1)
        return self.loss_weight * reduce_loss(loss, weight, reduction_override or self.reduction, avg_factor)


def to_scores(label: Num[Array, "b ..."], num_classes: int) -> Num[Array, "b c"]:
    """Labels [B] as one-hot scores [B, classes] in float32; scores as they are.

    A label out of range becomes NaN, so that the loss does too, and training stops instead of learning nothing from it.
    """
    if label.ndim != 1:
        return label
    valid = (label >= 0) & (label < num_classes)
    return jnp.where(valid[:, None], jax.nn.one_hot(label, num_classes, dtype=jnp.float32), jnp.nan)


def _logits_and_target(loss: BaseModule, cls_score: Array, label: Array) -> tuple[Array, Array]:
    """Both [B, classes] in float32 at least."""
    logits = _at_least_float32(cls_score)
    target = to_scores(label, logits.shape[-1]).astype(logits.dtype)
    if target.shape != logits.shape:
        raise ValueError(f"{type(loss).__name__}: labels {label.shape} do not fit logits {logits.shape}")
    return logits, target


def _counted(target: Array) -> tuple[Array, Array]:
    """The targets with 0 in place of those below, and where they count: 1 or 0."""
    return jnp.where(target < 0, 0, target), jnp.where(target < 0, 0.0, 1.0).astype(target.dtype)


class LabelSmoothLoss(BaseModule):
    """Cross entropy with smoothed targets (Szegedy et al., 2016; Müller et al., 2019).

    Args:
        label_smooth_val: the amount of smoothing, eps, in [0, 1).
        num_classes: number of classes; if None, that of the logits.
        use_sigmoid: binary cross entropy; None is True in mode 'multi_label' and False otherwise.
        mode: 'original': y (1 - eps) + eps / classes. 'classy_vision': (y + eps / classes) / (1 + eps), which is how
            ClassyVision does it. 'multi_label': 1 - eps for positive classes and eps for the others.
        reduction, loss_weight, class_weight, pos_weight: as of `CrossEntropyLoss`.
    """

    def __init__(
        self,
        label_smooth_val: float,
        num_classes: int | None = None,
        use_sigmoid: bool | None = None,
        mode: str = "original",
        reduction: str = "mean",
        loss_weight: float = 1.0,
        class_weight: Sequence[float] | None = None,
        pos_weight: Sequence[float] | None = None,
    ):
        if not 0 <= label_smooth_val < 1:
            raise ConfigError(f"LabelSmoothLoss: label_smooth_val must be in [0, 1), not {label_smooth_val}")
        if mode not in _SMOOTHING:
            raise ConfigError(f"LabelSmoothLoss: unknown mode {mode!r}.{nearest(mode, _SMOOTHING)}")
        self.label_smooth_val, self.num_classes, self.mode = label_smooth_val, num_classes, mode
        use_sigmoid = mode == "multi_label" if use_sigmoid is None else use_sigmoid
        self.ce = CrossEntropyLoss(
            use_sigmoid=use_sigmoid,
            use_soft=not use_sigmoid,
            reduction=reduction,
            loss_weight=loss_weight,
            class_weight=class_weight,
            pos_weight=pos_weight,
        )

    def __call__(
        self,
        cls_score: Float[Array, "b c"],
        label: Num[Array, "b ..."],
        weight: Float[Array, " b"] | None = None,
        avg_factor: float | Array | None = None,
        reduction_override: str | None = None,
    ) -> Array:
        """The loss of logits [B, classes] with labels [B] or scores [B, classes]; see `CrossEntropyLoss`."""
        classes = cls_score.shape[-1]
        if self.num_classes not in (None, classes):
            raise ConfigError(f"LabelSmoothLoss: num_classes={self.num_classes}, but the head has {classes} classes")
        scores = _at_least_float32(to_scores(label, classes))
        target = jnp.where(scores < 0, scores, _SMOOTHING[self.mode](scores, self.label_smooth_val))
        return self.ce(cls_score, target, weight, avg_factor, reduction_override)


def _original(y: Array, eps: float) -> Array:
    return y * (1 - eps) + eps / y.shape[-1]


def _classy_vision(y: Array, eps: float) -> Array:
    return (y + eps / y.shape[-1]) / (1 + eps)


def _multi_label(y: Array, eps: float) -> Array:
    return jnp.where(y > 0, 1 - eps, eps)


_SMOOTHING: dict[str, Callable[[Array, float], Array]] = {
    "original": _original,
    "classy_vision": _classy_vision,
    "multi_label": _multi_label,
}


class FocalLoss(BaseModule):
    """Binary cross entropy in which what is easy counts less (Lin et al., 2017, https://arxiv.org/abs/1708.02002).

    alpha_t (1 - p_t)^gamma times the cross entropy -log p_t, where p_t is the probability given to what is right.

    Args:
        gamma: how much less; 0 is cross entropy.
        alpha: weight of positives; negatives have 1 - alpha.
        reduction, loss_weight: as of `CrossEntropyLoss`.
    """

    def __init__(self, gamma: float = 2.0, alpha: float = 0.25, reduction: str = "mean", loss_weight: float = 1.0):
        self.gamma, self.alpha = gamma, alpha
        self.reduction, self.loss_weight = _check_reduction(reduction), loss_weight

    def __call__(
        self,
        cls_score: Float[Array, "b c"],
        label: Num[Array, "b ..."],
        weight: Float[Array, " b"] | None = None,
        avg_factor: float | Array | None = None,
        reduction_override: str | None = None,
    ) -> Array:
        """The loss of logits [B, classes] with labels [B] or targets [B, classes]; see `CrossEntropyLoss`."""
        logits, target = _logits_and_target(self, cls_score, label)
        target, counted = _counted(target)
        p = jax.nn.sigmoid(logits)
        wrong = target * (1 - p) + (1 - target) * p
        balance = target * self.alpha + (1 - target) * (1 - self.alpha)
        cross_entropy = (1 - target) * logits + jax.nn.softplus(-logits)
        loss = counted * balance * wrong**self.gamma * cross_entropy
        return self.loss_weight * reduce_loss(loss, weight, reduction_override or self.reduction, avg_factor)


class AsymmetricLoss(BaseModule):
    """A focal loss that forgives easy negatives more than positives (Ridnik et al., 2021, arXiv 2009.14119).

    Args:
        gamma_pos, gamma_neg: exponents of 1 - p_t for positives and negatives, as in `FocalLoss`.
        clip: negatives have this much added to p_t, up to 1; None or 0: nothing.
        reduction, loss_weight: as of `CrossEntropyLoss`.
        use_sigmoid: probabilities by sigmoid; False: by softmax.
        eps: the smallest p_t in the logarithm.
    """

    def __init__(
        self,
        gamma_pos: float = 0.0,
        gamma_neg: float = 4.0,
        clip: float | None = 0.05,
        reduction: str = "mean",
        loss_weight: float = 1.0,
        use_sigmoid: bool = True,
        eps: float = 1e-8,
    ):
        self.gamma_pos, self.gamma_neg, self.clip, self.eps = gamma_pos, gamma_neg, clip or 0.0, eps
        self.use_sigmoid = use_sigmoid
        self.reduction, self.loss_weight = _check_reduction(reduction), loss_weight

    def __call__(
        self,
        cls_score: Float[Array, "b c"],
        label: Num[Array, "b ..."],
        weight: Float[Array, " b"] | None = None,
        avg_factor: float | Array | None = None,
        reduction_override: str | None = None,
    ) -> Array:
        """The loss of logits [B, classes] with labels [B] or targets [B, classes]; see `CrossEntropyLoss`."""
        logits, target = _logits_and_target(self, cls_score, label)
        target, counted = _counted(target)
        p = jax.nn.sigmoid(logits) if self.use_sigmoid else jax.nn.softmax(logits)
        right = target * p + (1 - target) * jnp.minimum(1 - p + self.clip, 1)
        gamma = target * self.gamma_pos + (1 - target) * self.gamma_neg
        focus = jnp.where(gamma == 0, 1, 1 - right) ** gamma  # the gradient of 0 ** 0 is NaN
        loss = -counted * focus * jnp.log(jnp.maximum(right, self.eps))
        return self.loss_weight * reduce_loss(loss, weight, reduction_override or self.reduction, avg_factor)


class SeesawLoss(BaseModule):
    """Cross entropy that spares rare classes the pull of frequent ones (Wang et al., 2021, arXiv 2008.10032).

    The term of class j in the softmax of a sample of class i is multiplied by (N_j / N_i)^p, if that is under 1, where
    N counts the samples of each class so far, and by (prob_j / prob_i)^q, if that is over 1.

    Args:
        use_sigmoid: must be False.
        p, q: the exponents; 0 leaves a factor out.
        num_classes: number of classes.
        eps: the smallest prob_i.
        reduction, loss_weight: as of `CrossEntropyLoss`.

    Attributes:
        cum_samples: N, float32 [classes]; each call in training mode counts its labels before it uses it.
    """

    def __init__(
        self,
        use_sigmoid: bool = False,
        p: float = 0.8,
        q: float = 2.0,
        num_classes: int = 1000,
        eps: float = 1e-2,
        reduction: str = "mean",
        loss_weight: float = 1.0,
    ):
        if use_sigmoid:
            raise ConfigError("SeesawLoss has no use_sigmoid=True")
        self.p, self.q, self.num_classes, self.eps = p, q, num_classes, eps
        self.reduction, self.loss_weight = _check_reduction(reduction), loss_weight
        self.deterministic = False
        self.cum_samples = nnx.BatchStat(jnp.zeros((num_classes,), jnp.float32))

    def __call__(
        self,
        cls_score: Float[Array, "b c"],
        label: Int[Array, " b"],
        weight: Float[Array, " b"] | None = None,
        avg_factor: float | Array | None = None,
        reduction_override: str | None = None,
    ) -> Array:
        """The loss of logits [B, classes] with int labels [B]; see `CrossEntropyLoss`."""
        if label.ndim != 1:
            raise ConfigError("SeesawLoss needs int labels: switch off the batch augmentations")
        if cls_score.shape[-1] != self.num_classes:
            raise ConfigError(f"SeesawLoss: num_classes={self.num_classes}, but {cls_score.shape[-1]} logits")
        logits, target = _logits_and_target(self, cls_score, label)
        if not self.deterministic:
            counted = self.cum_samples[...] + jax.lax.stop_gradient(target).sum(axis=0).astype(jnp.float32)
            self.cum_samples.set_value(counted)
        log_count = jnp.log(jnp.maximum(self.cum_samples[...].astype(logits.dtype), 1))
        log_prob = jax.lax.stop_gradient(jax.nn.log_softmax(logits))

        def of_label(values: Array) -> Array:
            return (target * values).sum(axis=-1, keepdims=True)

        rarer = jnp.minimum(log_count - of_label(log_count), 0)
        likelier = jnp.maximum(log_prob - jnp.maximum(of_label(log_prob), math.log(self.eps)), 0)
        logits = logits + (1 - target) * (self.p * rarer + self.q * likelier)
        loss = -(target * jax.nn.log_softmax(logits)).sum(axis=-1)
        return self.loss_weight * reduce_loss(loss, weight, reduction_override or self.reduction, avg_factor)


class PixelReconstructionLoss(BaseModule):
    """L1 or L2 error of reconstructed pixels, over masked positions only if there is a mask (MAE, SimMIM).

    Args:
        criterion: 'L1' or 'L2' (squared error).
        channel: the masked sum is also divided by it: SimMIM's mask has one channel, its error three. None is 1.
    """

    def __init__(self, criterion: str, channel: int | None = None):
        if criterion not in ("L1", "L2"):
            raise ConfigError(f"PixelReconstructionLoss: criterion is 'L1' or 'L2', not {criterion!r}")
        self.criterion, self.channel = criterion, channel or 1

    def __call__(
        self,
        pred: Float[Array, "b ..."],
        target: Float[Array, "b ..."],
        mask: Array | None = None,
    ) -> Float[Array, ""]:
        """The mean error of `pred` against `target`.

        Args:
            pred, target: patches [B, L, P], or images [B, H, W, C].
            mask: 1 where it counts: [B, L] for patches, [B, H, W, 1] for images. None: everywhere.
        """
        difference = _at_least_float32(pred) - _at_least_float32(target)
        loss = jnp.abs(difference) if self.criterion == "L1" else jnp.square(difference)
        if loss.ndim == 3:
            loss = loss.mean(axis=-1)
        if mask is None:
            return loss.mean()
        mask = mask.astype(loss.dtype)
        return (loss * mask).sum() / mask.sum() / self.channel
