"""Classification heads: from features to logits, losses and scores."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Num

from jaxpretrain.build import ConfigError, build
from jaxpretrain.models.layers.activation import activation
from jaxpretrain.models.layers.base import BaseModule
from jaxpretrain.models.layers.drop import Dropout
from jaxpretrain.models.layers.init import apply_init_cfg
from jaxpretrain.models.layers.linear import Linear
from jaxpretrain.models.layers.norm import build_norm

_CROSS_ENTROPY = {"type": "CrossEntropyLoss", "loss_weight": 1.0}

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

    def __call__(self, feats: Features, *, rngs: nnx.Rngs | None = None) -> Float[Array, "b classes"]:
        """Logits, before softmax. `rngs` is for dropout in training, where a head has it."""
        return self.pre_logits(feats)

    def loss(
        self,
        feats: Features,
        label: Num[Array, "b ..."],
        *,
        weight: Float[Array, " b"] | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """The loss of features, and what to log beside it: 'accuracy_top-k' in percent, if `cal_acc`.

        The sum of the loss is divided by the number of samples, so binary cross entropy is summed over classes.
        (MMPretrain's accuracy misses hits whose logit is below 0; we count them.)

        Args:
            feats: [B, C], or a tuple whose last entry is.
            label: ints [B], or scores [B, classes].
            weight: of each sample; their sum is then the number of samples.
            rngs: for dropout in training.
        """
        return self._loss_of(self(feats, rngs=rngs), label, weight)

    def _loss_of(
        self, logits: Float[Array, "b classes"], label: Num[Array, "b ..."], weight: Float[Array, " b"] | None
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        count: int | Array = logits.shape[0] if weight is None else jnp.maximum(weight.sum(), 1)
        value = self.loss_module(logits, label, avg_factor=count, **({} if weight is None else {"weight": weight}))
        if not self.cal_acc:
            return value, {}
        if label.ndim != 1:
            raise ConfigError("cal_acc=True needs int labels: switch it off, or the batch augmentations")
        best = jax.lax.top_k(logits, max(self.topk))[1] == label[:, None]
        hits = {k: best[:, :k].any(axis=1) * (1 if weight is None else weight) for k in self.topk}
        return value, {f"accuracy_top-{k}": 100.0 * hit.sum() / count for k, hit in hits.items()}

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
        check_classes(self, num_classes)
        self.num_classes, self.in_channels = num_classes, in_channels
        self.fc = Linear(in_channels, num_classes, rngs=rngs)

    def __call__(self, feats: Features, *, rngs: nnx.Rngs | None = None) -> Float[Array, "b classes"]:
        """Logits, before softmax."""
        return self.fc(self.pre_logits(feats))


class LinearBlock(BaseModule):
    """dropout(act(norm(fc(x)))), of which all but `fc` may be missing."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        dropout_rate: float = 0.0,
        norm_cfg: Mapping[str, Any] | None = None,
        act_cfg: Mapping[str, Any] | None = None,
        *,
        rngs: nnx.Rngs,
    ):
        self.fc = Linear(in_channels, out_channels, rngs=rngs)
        self.norm = build_norm(norm_cfg, out_channels, rngs=rngs) if norm_cfg else None
        self.act = activation(act_cfg) if act_cfg else None
        self.dropout = Dropout(dropout_rate)

    def __call__(self, x: Float[Array, "b in"], *, rngs: nnx.Rngs | None = None) -> Float[Array, "b out"]:
        x = self.fc(x)
        x = x if self.norm is None else self.norm(x)
        x = x if self.act is None else self.act(x)
        return self.dropout(x, rngs=rngs)


class StackedLinearClsHead(ClsHead):
    """Several linear layers, `layers`, with norm, activation and dropout in between (MobileNet v3).

    Args:
        num_classes: number of classes.
        in_channels: channels of the features.
        mid_channels: widths of the hidden layers.
        dropout_rate: of the outputs of hidden layers, in training.
        norm_cfg: the norms of the hidden layers, as for `build_norm`; none by default.
        act_cfg: their activation: ReLU, GELU, HSwish, ...; None: none.
        kwargs: `loss`, `topk`, `cal_acc` and `init_cfg` of `ClsHead`.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        mid_channels: Sequence[int],
        dropout_rate: float = 0.0,
        norm_cfg: Mapping[str, Any] | None = None,
        act_cfg: Mapping[str, Any] | None = {"type": "ReLU"},
        *,
        rngs: nnx.Rngs,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        check_classes(self, num_classes)
        if isinstance(mid_channels, int) or not mid_channels:
            raise ConfigError(f"StackedLinearClsHead: mid_channels is a list of widths, not {mid_channels!r}")
        self.num_classes, self.in_channels = num_classes, in_channels
        widths = [in_channels, *mid_channels]
        hidden = [
            LinearBlock(ins, outs, dropout_rate, norm_cfg, act_cfg, rngs=rngs)
            for ins, outs in itertools.pairwise(widths)
        ]
        self.layers = nnx.List([*hidden, LinearBlock(widths[-1], num_classes, rngs=rngs)])

    def pre_logits(self, feats: Features, *, rngs: nnx.Rngs | None = None) -> Float[Array, "b c"]:
        """The input of the last linear layer."""
        x = super().pre_logits(feats)
        for layer in self.layers[:-1]:
            x = layer(x, rngs=rngs)
        return x

    def __call__(self, feats: Features, *, rngs: nnx.Rngs | None = None) -> Float[Array, "b classes"]:
        """Logits, before softmax. `rngs` is for dropout in training."""
        return self.layers[-1](self.pre_logits(feats, rngs=rngs))


class VisionTransformerClsHead(ClsHead):
    """The head of ViT: `layers.head`, after `layers.pre_logits` and an activation if there is a hidden layer.

    Dosovitskiy et al. (2021) use the hidden layer in pre-training and leave it out in fine-tuning.

    Args:
        num_classes: number of classes.
        in_channels: channels of the features.
        hidden_dim: width of the hidden layer; None: no hidden layer.
        act_cfg: its activation: Tanh, ReLU, GELU, ...
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
        check_classes(self, num_classes)
        self.num_classes, self.in_channels, self.hidden_dim = num_classes, in_channels, hidden_dim
        self.act = activation(act_cfg)
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
        return self.act(self.layers.pre_logits(x))

    def __call__(self, feats: Features, *, rngs: nnx.Rngs | None = None) -> Float[Array, "b classes"]:
        """Logits, before softmax."""
        return self.layers.head(self.pre_logits(feats))


class EfficientFormerClsHead(ClsHead):
    """A linear layer, `head`, and with distillation a second one, `dist_head`; the logits are their mean.

    Args:
        num_classes: number of classes.
        in_channels: channels of the features.
        distillation: whether there is a second layer, which learnt from a teacher. Then it is for inference only.
        init_cfg: initialisation, MMEngine's dictionaries.
        kwargs: `loss`, `topk` and `cal_acc` of `ClsHead`.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        distillation: bool = True,
        init_cfg: Any = {"type": "Normal", "layer": "Linear", "std": 0.01},  # noqa: B006 - read only
        *,
        rngs: nnx.Rngs,
        **kwargs: Any,
    ):
        super().__init__(init_cfg=init_cfg, **kwargs)
        check_classes(self, num_classes)
        self.num_classes, self.in_channels = num_classes, in_channels
        self.head = Linear(in_channels, num_classes, rngs=rngs)
        self.dist_head = Linear(in_channels, num_classes, rngs=rngs) if distillation else None

    def __call__(self, feats: Features, *, rngs: nnx.Rngs | None = None) -> Float[Array, "b classes"]:
        """Logits, before softmax."""
        x = self.pre_logits(feats)
        return self.head(x) if self.dist_head is None else (self.head(x) + self.dist_head(x)) / 2

    def loss(self, *args: Any, **kwargs: Any) -> tuple[Float[Array, ""], dict[str, Array]]:
        """As of `ClsHead`; raises ConfigError with distillation, for want of a teacher."""
        if self.dist_head is not None:
            raise ConfigError("EfficientFormerClsHead cannot train with a teacher: set distillation=False")
        return super().loss(*args, **kwargs)


class MultiTaskHead(BaseModule):
    """Several heads on the same features, by name.

    Args:
        task_heads: the head of each task: {name: `dict(type=...)` or module}. It may be a `MultiTaskHead` again.
        init_cfg: initialisation, MMEngine's dictionaries.
        kwargs: arguments of the heads that take them and do not have them.
    """

    hands_arguments_on: ClassVar = True

    def __init__(self, task_heads: Mapping[str, Any], init_cfg: Any = None, *, rngs: nnx.Rngs, **kwargs: Any):
        if not isinstance(task_heads, Mapping) and not hasattr(task_heads, "items"):
            raise ConfigError(f"MultiTaskHead: task_heads is a dictionary of heads by name, not {task_heads!r}")
        self.init_cfg = init_cfg
        self.task_heads = nnx.Dict({name: build(head, rngs=rngs, **kwargs) for name, head in task_heads.items()})

    def pre_logits(self, feats: Features) -> dict[str, Any]:
        """The input of each head's last linear layer."""
        return {name: head.pre_logits(feats) for name, head in self.task_heads.items()}

    def __call__(self, feats: Features, *, rngs: nnx.Rngs | None = None) -> dict[str, Any]:
        """The logits of each task."""
        return {name: head(feats, rngs=rngs) for name, head in self.task_heads.items()}

    def loss(
        self, feats: Features, label: Mapping[str, Any], *, rngs: nnx.Rngs | None = None
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """The sum of the tasks' losses; to log: each one, 'NAME_loss', and what its head logs, as 'NAME_...'.

        Args:
            feats: as of `ClsHead`.
            label: labels of each task: ints [B], or scores [B, classes]. Samples without a label in a task have -1
                there (a row of -1), and do not count in it; 'NAME_mask_size' logs how many do. A -1 beside others is
                one class that does not count, in binary losses.
            rngs: for dropout in training.
        """
        if missing := self.task_heads.keys() - label.keys():
            raise ConfigError(f"MultiTaskHead: no labels for {sorted(missing)}; there are some for {sorted(label)}")
        total = jnp.zeros(())
        metrics: dict[str, Array] = {}
        for name, head in self.task_heads.items():
            if isinstance(head, MultiTaskHead):
                value, logs = head.loss(feats, label[name], rngs=rngs)
            else:
                flat = label[name].reshape(label[name].shape[0], -1)
                present = (flat >= 0).any(axis=1)
                known = jnp.where(present[:, None], flat, 0).reshape(label[name].shape)
                value, logs = head.loss(feats, known, weight=present.astype(jnp.float32), rngs=rngs)
                logs = {**logs, "mask_size": present.sum()}
            total = total + value
            metrics |= {f"{name}_{key}": log for key, log in {"loss": value, **logs}.items()}
        return total, metrics

    def predict(self, feats: Features) -> dict[str, Any]:
        """The scores of each task."""
        return {name: head.predict(feats) for name, head in self.task_heads.items()}


def check_classes(head: ClsHead, num_classes: int) -> None:
    """Raises ConfigError unless `num_classes` is positive."""
    if num_classes <= 0:
        raise ConfigError(f"{type(head).__name__}: num_classes={num_classes} must be positive")
