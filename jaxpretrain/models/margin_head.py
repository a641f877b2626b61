"""ArcFace: Additive Angular Margin Loss (Deng et al., 2019, https://arxiv.org/abs/1801.07698).

With the sub-centers of Deng et al. (2020, Sub-center ArcFace) and a margin for each class (Ha et al., 2020).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxpretrain.build import ConfigError
from jaxpretrain.models.heads import ClsHead, Features, check_classes
from jaxpretrain.models.layers.linear import Linear

_CROSS_ENTROPY = {"type": "CrossEntropyLoss", "loss_weight": 1.0}


def _unit(x: Array, axis: int) -> Array:
    """Vectors of length 1, along an axis; vectors of zeros stay so."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(axis=axis, keepdims=True), 1e-24))


class NormProduct(Linear):
    """Cosines of the angles between [B, in] features and each class's center, or the nearest of its k: [B, classes].

    Centers are the columns of `kernel` [in, classes * k], those of a class side by side.
    """

    def __init__(self, in_features: int, out_features: int, k: int = 1, *, rngs: nnx.Rngs):
        super().__init__(in_features, out_features * k, bias=False, rngs=rngs)
        self.k = k

    def __call__(self, x: Float[Array, "b in"]) -> Float[Array, "b classes"]:
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        kernel = self.kernel[...].astype(x.dtype)
        cosine = jnp.matmul(_unit(x, 1), _unit(kernel, 0), precision="highest")
        return cosine if self.k == 1 else cosine.reshape(x.shape[0], -1, self.k).max(axis=2)


class ArcFaceClsHead(ClsHead):
    """Logits are cosines times `scale`; in training, the angle to the right class is made larger by a margin first.

    Args:
        num_classes: number of classes.
        in_channels: channels of the features.
        num_subcenters: centers per class, of which the nearest counts.
        scale: factor of the cosines.
        margins: in radians: one for all classes, one for each, or the path of a '.txt' file with one per line.
        easy_margin: whether samples more than 90 degrees off get no margin. Otherwise, where the angle would exceed 180
            degrees, margin * sin(margin) is taken from the cosine instead, so that it always falls.
        loss: the loss, called with logits, labels and `avg_factor`, the number of samples.
        init_cfg: initialisation, MMEngine's dictionaries.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        num_subcenters: int = 1,
        scale: float = 64.0,
        margins: float | Sequence[float] | str = 0.5,
        easy_margin: bool = False,
        loss: Mapping[str, Any] | nnx.Module = _CROSS_ENTROPY,
        init_cfg: Any = None,
        *,
        rngs: nnx.Rngs,
    ):
        super().__init__(loss=loss, init_cfg=init_cfg)
        check_classes(self, num_classes)
        if num_subcenters < 1:
            raise ConfigError(f"ArcFaceClsHead: num_subcenters must be 1 or more, not {num_subcenters}")
        self.num_classes, self.in_channels = num_classes, in_channels
        self.scale, self.easy_margin = scale, easy_margin
        self.norm_product = NormProduct(in_channels, num_classes, num_subcenters, rngs=rngs)
        self.set_margins(_read_margins(margins) if isinstance(margins, str) else margins)

    def set_margins(self, margins: float | Sequence[float]) -> None:
        """Takes other margins, in radians: one for all classes, or one for each."""
        try:
            values = [margins] * self.num_classes if isinstance(margins, int | float) else margins
            self.margins = tuple(float(margin) for margin in values)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"ArcFaceClsHead: margins are numbers, or a '.txt' file, not {margins!r}") from error
        if len(self.margins) != self.num_classes:
            raise ConfigError(f"ArcFaceClsHead: {len(self.margins)} margins for num_classes={self.num_classes}")

    def __call__(
        self, feats: Features, target: Int[Array, " b"] | None = None, *, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "b classes"]:
        """Logits in float32 at least; with the margin, if the labels `target` are given."""
        cosine = self.norm_product(self.pre_logits(feats))
        if target is None:
            return self.scale * cosine
        is_target = target[:, None] == jnp.arange(self.num_classes)
        margin = jnp.where(is_target, jnp.asarray(self.margins, cosine.dtype), 0).sum(axis=1)
        cos = jnp.where(is_target, cosine, 0).sum(axis=1)
        # cos(angle + margin); the sine's gradient is infinite at 0, so it stops short of that.
        sin = jnp.sqrt(jnp.maximum(1 - jnp.square(cos), 1e-12))
        wider = cos * jnp.cos(margin) - sin * jnp.sin(margin)
        if self.easy_margin:
            wider = jnp.where(cos > 0, wider, cos)
        else:
            wider = jnp.where(cos > -jnp.cos(margin), wider, cos - margin * jnp.sin(margin))
        return self.scale * jnp.where(is_target, wider[:, None], cosine)

    def loss(
        self,
        feats: Features,
        label: Int[Array, " b"],
        *,
        weight: Float[Array, " b"] | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """The loss with margins; labels are ints. Raises ConfigError for scores: a mixed image has no one margin."""
        if label.ndim != 1:
            raise ConfigError("ArcFaceClsHead needs int labels: switch off the batch augmentations")
        return self._loss_of(self(feats, label), label, weight)


def _read_margins(path: str) -> list[float]:
    if not path.endswith(".txt"):
        raise ConfigError(f"ArcFaceClsHead: margins are numbers, or a '.txt' file with one per line, not {path!r}")
    try:
        return [float(line) for line in Path(path).read_text().split()]
    except (OSError, ValueError) as error:
        raise ConfigError(f"ArcFaceClsHead: cannot read margins from {path!r}: {error}") from error
