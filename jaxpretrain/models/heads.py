"""Classification heads: from features to logits, losses and scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Num

from jaxpretrain.build import ConfigError, build
from jaxpretrain.models.layers.base import BaseModule
from jaxpretrain.models.layers.init import apply_init_cfg
from jaxpretrain.models.layers.linear import Linear

_CROSS_ENTROPY = {"type": "CrossEntropyLoss", "loss_weight": 1.0}
_ACTIVATIONS = {"Tanh": jnp.tanh, "ReLU": jax.nn.relu, "GELU": lambda x: jax.nn.gelu(x, approximate=False)}

Features = Float[Array, "b c"] | Sequence[Float[Array, "b c"]]


class ClsHead(BaseModule):
    """What all classification heads share: loss, accuracy and scores. By itself it takes features for logits.

    Features are [B, C], or a tuple of them, one per scale, of which the last counts.

    Args:
        loss: the loss, called with logits, labels and `avg_factor`, the number of samples.
        topk: the k of the accuracies to report in training.
        cal_acc: whether to report accuracies in training; needs int labels, so no Mixup or CutMix.
        init_cfg: initialisation, MMEngine's dictionaries.
    """

    def __init__(
        self,
        loss: Mapping[str, Any] | nnx.Module = _CROSS_ENTROPY,
        topk: int | Sequence[int] = (1,),
        cal_acc: bool = False,
        init_cfg: Any = None,
    ):
        self.init_cfg, self.cal_acc = init_cfg, cal_acc
        self.topk = (topk,) if isinstance(topk, int) else tuple(topk)
        self.loss_module = build(loss)

    def pre_logits(self, feats: Features) -> Float[Array, "b c"]:
        """The input of the last linear layer."""
        return feats[-1] if isinstance(feats, Sequence) else feats

    def __call__(self, feats: Features) -> Float[Array, "b classes"]:
        """Logits, before softmax."""
        return self.pre_logits(feats)

    def loss(self, feats: Features, label: Num[Array, "b ..."]) -> tuple[Float[Array, ""], dict[str, Array]]:
        """The loss of features with int labels [B] or scores [B, classes], and what to log beside it.

        The sum of the loss is divided by the number of samples, so binary cross entropy is summed over classes. To log:
        'accuracy_top-k' in percent, if `cal_acc`. (MMPretrain misses hits whose logit is below 0 there; we count them.)
        """
        logits = self(feats)
        value = self.loss_module(logits, label, avg_factor=logits.shape[0])
        if not self.cal_acc:
            return value, {}
        if label.ndim != 1:
            raise ConfigError("cal_acc=True needs int labels: switch it off, or the batch augmentations")
        best = jax.lax.top_k(logits, max(self.topk))[1] == label[:, None]
        return value, {f"accuracy_top-{k}": 100.0 * best[:, :k].any(axis=1).mean() for k in self.topk}

    def predict(self, feats: Features) -> Float[Array, "b classes"]:
        """Scores per class that sum to 1, in float32 at least."""
        logits = self(feats)
        return jax.nn.softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)))


class LinearClsHead(ClsHead):
    """One linear layer, `fc`.

    Args:
        num_classes: number of classes.
        in_channels: channels of the features.
        init_cfg: initialisation, MMEngine's dictionaries.
        kwargs: `loss`, `topk` and `cal_acc` of `ClsHead`.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        init_cfg: Any = {"type": "Normal", "layer": "Linear", "std": 0.01},  # noqa: B006 - read only
        *,
        rngs: nnx.Rngs,
        **kwargs: Any,
    ):
        super().__init__(init_cfg=init_cfg, **kwargs)
        _check_classes(self, num_classes)
        self.num_classes, self.in_channels = num_classes, in_channels
        self.fc = Linear(in_channels, num_classes, rngs=rngs)

    def __call__(self, feats: Features) -> Float[Array, "b classes"]:
        """Logits, before softmax."""
        return self.fc(self.pre_logits(feats))


class VisionTransformerClsHead(ClsHead):
    """The head of ViT: `layers.head`, after `layers.pre_logits` and an activation if there is a hidden layer.

    Dosovitskiy et al. (2021) use the hidden layer in pre-training and leave it out in fine-tuning.

    Args:
        num_classes: number of classes.
        in_channels: channels of the features.
        hidden_dim: width of the hidden layer; None: no hidden layer.
        act_cfg: its activation: Tanh, ReLU or GELU.
        init_cfg: initialisation, MMEngine's dictionaries. By default all logits start at zero.
        kwargs: `loss`, `topk` and `cal_acc` of `ClsHead`.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        hidden_dim: int | None = None,
        act_cfg: Mapping[str, Any] = {"type": "Tanh"},
        init_cfg: Any = {"type": "Constant", "layer": "Linear", "val": 0},  # noqa: B006 - read only
        *,
        rngs: nnx.Rngs,
        **kwargs: Any,
    ):
        super().__init__(init_cfg=init_cfg, **kwargs)
        _check_classes(self, num_classes)
        if act_cfg["type"] not in _ACTIVATIONS:
            raise ConfigError(f"act_cfg: unknown type {act_cfg['type']!r}; known are {', '.join(_ACTIVATIONS)}")
        self.num_classes, self.in_channels, self.hidden_dim = num_classes, in_channels, hidden_dim
        self.activation = act_cfg["type"]
        layers = {} if hidden_dim is None else {"pre_logits": Linear(in_channels, hidden_dim, rngs=rngs)}
        self.layers = nnx.Dict(**layers, head=Linear(hidden_dim or in_channels, num_classes, rngs=rngs))

    def init_weights(self, rngs: nnx.Rngs) -> None:
        """Besides `init_cfg`: the hidden layer from a truncated normal distribution of variance 1 / fan-in."""
        super().init_weights(rngs)
        if self.hidden_dim is not None:
            rule = {"type": "TruncNormal", "layer": "Linear", "std": self.in_channels**-0.5}
            apply_init_cfg(self.layers.pre_logits, rule, rngs)

    def pre_logits(self, feats: Features) -> Float[Array, "b c"]:
        """The input of the last linear layer."""
        x = super().pre_logits(feats)
        if self.hidden_dim is None:
            return x
        return _ACTIVATIONS[self.activation](self.layers.pre_logits(x))

    def __call__(self, feats: Features) -> Float[Array, "b classes"]:
        """Logits, before softmax."""
        return self.layers.head(self.pre_logits(feats))


def _check_classes(head: ClsHead, num_classes: int) -> None:
    if num_classes <= 0:
        raise ConfigError(f"{type(head).__name__}: num_classes={num_classes} must be positive")
