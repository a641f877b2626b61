"""Any network as a method: to be looked at by evaluators, or fine-tuned with a new linear head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxpretrain.build import ConfigError, build
from jaxpretrain.data.device import check_order, in_order
from jaxpretrain.methods.base import Batch, Method, Metrics, last
from jaxpretrain.models.layers import Linear


class Encoder(Method):
    """The features of any network: those of a method are its own; of a classifier, the input of its last linear layer.

    Without a head, they are the neck's last output or the backbone's; of that, maps are averaged over positions, and tokens
    over the patches.

    Args:
        model: a method, a classifier or a backbone; weights are loaded into it (`config.load_from`).
        channel_order: of the network's images, see `in_order`; those given are RGB.
        init_cfg: initialisation, MMEngine's dictionaries.
    """

    def __init__(
        self,
        model: Mapping[str, Any] | nnx.Module,
        channel_order: str = "rgb",
        init_cfg: Any = None,
        *,
        rngs: nnx.Rngs,
    ):
        check_order(channel_order)
        self.init_cfg, self.channel_order = init_cfg, channel_order
        built: Any = build(model, rngs=rngs)
        self.model: Any = getattr(built, "model", built)  # of `Supervised`, its classifier

    def features(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b d"]:
        model = self.model
        images = in_order(images, self.channel_order)
        if isinstance(model, Method):
            return model.features(images)
        if getattr(model, "head", None) is not None:
            return self._pool(model.extract_feat(images, stage="pre_logits"))
        return self._pool(model.extract_feat(images) if hasattr(model, "extract_feat") else model(images))

    def _pool(self, outputs: Any) -> Float[Array, "b d"]:
        x = last(outputs)
        if isinstance(x, tuple | list):  # of networks with class and distillation token, or patches beside it
            x = x[-1]
        if x.ndim == 3:
            x = x[:, getattr(getattr(self.model, "backbone", self.model), "num_extra_tokens", 0) :]
        if x.ndim > 2:
            x = x.mean(axis=tuple(range(1, x.ndim - 1)), dtype=jnp.promote_types(x.dtype, jnp.float32)).astype(x.dtype)
        return x


class FineTuned(Encoder):
    """All of a network is trained from labels, under a new linear head: MMSelfSup's semi-supervised protocol.

    The network is in training mode, so BatchNorm takes the statistics of the batch; dropout and drop path are off.

    Args:
        num_classes: of the head, whose kernel starts from N(0, 0.01) and whose bias from 0.
        feature_dims: what the features are, D.
        model, channel_order, init_cfg: as of `Encoder`.
    """

    def __init__(
        self,
        model: Mapping[str, Any] | nnx.Module,
        num_classes: int,
        feature_dims: int,
        channel_order: str = "rgb",
        init_cfg: Any = None,
        *,
        rngs: nnx.Rngs,
    ):
        super().__init__(model, channel_order, init_cfg, rngs=rngs)
        if num_classes < 2:
            raise ConfigError(f"FineTuned: num_classes={num_classes}; there must be at least two")
        self.num_classes = num_classes
        self.new_head = Linear(feature_dims, num_classes, rngs=rngs)

    def init_weights(self, rngs: nnx.Rngs) -> None:
        super().init_weights(rngs)
        self.new_head.kernel.set_value(0.01 * jax.random.normal(rngs.params(), self.new_head.kernel.shape))
        assert self.new_head.bias is not None
        self.new_head.bias.set_value(jnp.zeros(self.new_head.bias.shape))

    def loss(self, batch: Batch, *, rngs: nnx.Rngs | None = None) -> tuple[Float[Array, ""], Metrics]:
        """Cross entropy; logs `accuracy_top-1` in percent."""
        self.model.set_attributes(deterministic=True, raise_if_not_found=False)
        logits, label = self.logits(batch["image"]).astype(jnp.float32), batch["label"]
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), label[:, None], axis=1)
        correct = jnp.argmax(logits, axis=-1) == label
        return -picked.mean(), {"accuracy_top-1": 100 * jnp.mean(correct.astype(jnp.float32))}

    def logits(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b classes"]:
        return self.new_head(self.features(images))
