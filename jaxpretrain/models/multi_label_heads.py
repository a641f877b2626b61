"""Heads for images that show several classes at once: each class is a yes or no of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from jaxpretrain.build import ConfigError
from jaxpretrain.models.heads import ClsHead, Features, check_classes
from jaxpretrain.models.layers.base import BaseModule
from jaxpretrain.models.layers.conv import Conv2d
from jaxpretrain.models.layers.linear import Linear

_BCE = {"type": "CrossEntropyLoss", "use_sigmoid": True}


class MultiLabelClsHead(ClsHead):
    """What multi-label heads share: scores by sigmoid, and which of them say yes. By itself it takes features for logits.

    Args:
        loss: called with logits, targets [B, classes] and `avg_factor`, the number of samples.
        thr: scores from this on are positive; 0.5 if neither it nor `topk` is given. It goes before `topk`.
        topk: that many highest scores are positive.
        init_cfg: initialisation, MMEngine's dictionaries.
    """

    topk: Any

    def __init__(
        self,
        loss: Mapping[str, Any] | nnx.Module = _BCE,
        thr: float | None = None,
        topk: int | None = None,
        init_cfg: Any = None,
    ):
        super().__init__(loss=loss, init_cfg=init_cfg)
        self.thr = 0.5 if thr is None and topk is None else thr
        self.topk = topk

    def predict(self, feats: Features) -> Float[Array, "b classes"]:
        """A score from 0 to 1 for each class, in float32 at least."""
        logits = self(feats)
        return jax.nn.sigmoid(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)))

    def positive(self, scores: Float[Array, "b classes"]) -> Bool[Array, "b classes"]:
        """Which classes are in the image, by `thr` or `topk`."""
        if self.thr is not None:
            return scores >= self.thr
        best = jax.lax.top_k(scores, self.topk)[1]
        return (best[:, :, None] == jnp.arange(scores.shape[1])).any(axis=1)


class MultiLabelLinearClsHead(MultiLabelClsHead):
    """One linear layer, `fc`.

    Args:
        num_classes: number of classes.
        in_channels: channels of the features.
        loss, thr, topk: as of `MultiLabelClsHead`.
        init_cfg: initialisation, MMEngine's dictionaries.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        loss: Mapping[str, Any] | nnx.Module = _BCE,
        thr: float | None = None,
        topk: int | None = None,
        init_cfg: Any = {"type": "Normal", "layer": "Linear", "std": 0.01},  # noqa: B006 - read only
        *,
        rngs: nnx.Rngs,
    ):
        super().__init__(loss, thr, topk, init_cfg)
        check_classes(self, num_classes)
        self.num_classes, self.in_channels = num_classes, in_channels
        self.fc = Linear(in_channels, num_classes, rngs=rngs)

    def __call__(self, feats: Features, *, rngs: nnx.Rngs | None = None) -> Float[Array, "b classes"]:
        """Logits, before the sigmoid."""
        return self.fc(self.pre_logits(feats))


_MAX = 99  # the temperature that stands for infinity


class CSRAModule(BaseModule):
    """One residual attention: the mean over positions of each class's score, plus `lam` times its weighted mean.

    Scores are products of features with unit vectors, one for each class; the weights are a softmax of them over
    positions, times T (equations 1 to 5 of the paper). T = 99 takes the highest score alone.
    """

    def __init__(self, num_classes: int, in_channels: int, T: int, lam: float, *, rngs: nnx.Rngs):
        self.T, self.lam = T, lam
        self.head = Conv2d(in_channels, num_classes, 1, bias=False, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b classes"]:
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        kernel = self.head.kernel[...][0, 0].astype(x.dtype)
        scores = x.reshape(x.shape[0], -1, x.shape[-1]) @ (kernel / jnp.linalg.norm(kernel, axis=0))
        if self.T == _MAX:
            return scores.mean(axis=1) + self.lam * scores.max(axis=1)
        attention = jax.nn.softmax(self.T * scores, axis=1)
        return scores.mean(axis=1) + self.lam * (attention * scores).sum(axis=1)


class CSRAClsHead(MultiLabelClsHead):
    """Class-specific residual attention (Zhu & Wu, 2021, https://arxiv.org/abs/2108.02456) on feature maps [B, H, W, C].

    The sum of several attentions, `csra_heads`, that differ in temperature.

    Args:
        num_classes: number of classes.
        in_channels: channels of the features.
        num_heads: number of attentions: 1, 2, 4, 6 or 8.
        lam: weight of the attention beside the plain mean, positive.
        init_cfg: initialisation, MMEngine's dictionaries.
        kwargs: `loss`, `thr` and `topk` of `MultiLabelClsHead`.
    """

    temperatures: ClassVar = {
        1: (1,),
        2: (1, _MAX),
        4: (1, 2, 4, _MAX),
        6: (1, 2, 3, 4, 5, _MAX),
        8: (1, 2, 3, 4, 5, 6, 7, _MAX),
    }

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        num_heads: int,
        lam: float,
        init_cfg: Any = {"type": "Normal", "layer": "Linear", "std": 0.01},  # noqa: B006 - read only
        *,
        rngs: nnx.Rngs,
        **kwargs: Any,
    ):
        super().__init__(init_cfg=init_cfg, **kwargs)
        check_classes(self, num_classes)
        if num_heads not in self.temperatures:
            raise ConfigError(f"CSRAClsHead: num_heads is one of {sorted(self.temperatures)}, not {num_heads}")
        if lam <= 0:
            raise ConfigError(f"CSRAClsHead: lam must be positive, not {lam}")
        self.num_classes, self.in_channels = num_classes, in_channels
        self.csra_heads = nnx.List(
            CSRAModule(num_classes, in_channels, T, lam, rngs=rngs) for T in self.temperatures[num_heads]
        )

    def __call__(self, feats: Features, *, rngs: nnx.Rngs | None = None) -> Float[Array, "b classes"]:
        """Logits, before the sigmoid, in float32 at least."""
        x = self.pre_logits(feats)
        if x.ndim != 4:
            raise ConfigError(f"CSRAClsHead takes feature maps [B, H, W, C], not {x.shape}: use it without a neck")
        return sum(head(x) for head in self.csra_heads)  # type: ignore[return-value]
