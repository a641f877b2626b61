"""MoCo v3 (Chen, Xie & He, 2021, An Empirical Study of Training Self-Supervised Vision Transformers)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.nn import initializers
from jaxtyping import Array, Float

from jaxpretrain.build import build
from jaxpretrain.methods.base import Batch, Metrics, Progress, last, normalize, spread, views
from jaxpretrain.methods.momentum_encoder import MomentumMethod
from jaxpretrain.models.layers import BaseModule, Frozen, Linear, freeze
from jaxpretrain.models.layers.position import build_2d_sincos_position_embedding
from jaxpretrain.models.vision_transformer import VisionTransformer
from jaxpretrain.optim.ema import cosine_ema_momentum


class MoCoV3ViT(VisionTransformer):
    """The Vision Transformer of MoCo v3: fixed sin-cos positions, and a patch embedding that need not learn.

    Args:
        stop_grad_conv1: freezes the patch embedding at its random start, which makes training stable (section 4.2).
        frozen_stages: how many first layers do not learn, with all that is before them; -1 for none.
        norm_eval: accepted for MMPretrain's configs; there is no BatchNorm here.
        init_cfg: initialisation besides the paper's own (see `init_weights`).
        kwargs: arguments of `VisionTransformer`.
    """

    def __init__(
        self,
        stop_grad_conv1: bool = False,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        init_cfg: Any = None,
        *,
        rngs: nnx.Rngs,
        **kwargs: Any,
    ):
        super().__init__(frozen_stages=frozen_stages, init_cfg=init_cfg, rngs=rngs, **kwargs)
        self.pos_embed = Frozen(self._positions())
        if stop_grad_conv1:
            freeze(self.patch_embed)

    def _positions(self) -> Float[Array, "1 n c"]:
        cls_token = self.cls_token is not None
        return build_2d_sincos_position_embedding(self.patch_resolution, self.embed_dims, cls_token=cls_token)

    def init_weights(self, rngs: nnx.Rngs) -> None:
        """Glorot-uniform matrices, where queries, keys and values count as three and the patch embedding as one of
        [pixels, channels]; biases of 0; a class token of N(0, 1e-6)."""
        super().init_weights(rngs)
        self.pos_embed.set_value(self._positions())
        glorot = initializers.xavier_uniform()
        for path, layer in nnx.iter_graph(self):
            if isinstance(layer, Linear):
                n_in, n_out = layer.kernel.shape
                parts = 3 if path[-1] == "qkv" else 1
                keys = jax.random.split(rngs.params(), parts)
                kernels = [glorot(key, (n_in, n_out // parts), layer.kernel.dtype) for key in keys]
                layer.kernel.set_value(jnp.concatenate(kernels, axis=1))
                if layer.bias is not None:
                    layer.bias.set_value(jnp.zeros(layer.bias.shape, layer.bias.dtype))
        projection = self.patch_embed.projection
        shape = projection.kernel.shape
        projection.kernel.set_value(glorot(rngs.params(), (math.prod(shape[:-1]), shape[-1])).reshape(shape))
        if projection.bias is not None:
            projection.bias.set_value(jnp.zeros(projection.bias.shape))
        if self.cls_token is not None:
            self.cls_token.set_value(1e-6 * jax.random.normal(rngs.params(), self.cls_token.shape))


class MoCoV3Head(BaseModule):
    """Predicts the momentum encoder's output for the same image among those for the whole batch.

    Args:
        predictor: the network on top of the online projection; a dictionary with `type`, or a module.
        loss: the classification loss. The paper's factor 2 * temperature is its `loss_weight`, as in MMPretrain.
        temperature: divides the cosines.
    """

    def __init__(
        self,
        predictor: Mapping[str, Any] | nnx.Module,
        loss: Mapping[str, Any] | nnx.Module,
        temperature: float = 1.0,
        *,
        rngs: nnx.Rngs,
    ):
        self.predictor = build(predictor, rngs=rngs)
        self.loss_module, self.temperature = build(loss), temperature

    def loss(self, base_out: Float[Array, "b d"], momentum_out: Float[Array, "b d"]) -> Float[Array, ""]:
        """The loss of online projections against targets, through which no gradient passes."""
        query = normalize(self.predictor(base_out))
        key = lax.stop_gradient(normalize(momentum_out))
        return self.loss_module(query @ key.T / self.temperature, jnp.arange(len(query)))


class MoCoV3(MomentumMethod):
    """Each view's prediction shall find the other view's target in the global batch (algorithm 1 of the paper).

    Targets come from a momentum encoder of backbone and neck. After optimizer step s of S, its weights move towards the
    online ones by the momentum base / 2 * (1 + cos(pi s / S)), which falls from base to 0. Its BatchNorms normalise by
    their own batch; their running statistics start from the online ones in each forward pass, as in MMPretrain.

    The backbone gives a tuple of feature maps or class tokens, the neck is the projector, the head a `MoCoV3Head`.

    Args:
        base_momentum: how far the momentum encoder moves at the start (the paper's m is 1 minus this).
        parts: arguments of `BaseSelfSupervisor`.
    """

    def __init__(self, base_momentum: float = 0.01, *, rngs: nnx.Rngs, **parts: Any):
        super().__init__(rngs=rngs, **parts)
        self.base_momentum = base_momentum

    def loss(self, batch: Batch, *, rngs: nnx.Rngs | None = None) -> tuple[Float[Array, ""], Metrics]:
        """The sum of both directions' losses; `image` is two views [B, H, W, 3]. Logs `feature_std`."""
        first, second = views(batch, 2)
        q1, q2 = (last(self.neck(self.backbone(view, rngs=rngs))) for view in (first, second))
        k1, k2 = map(last, self.teach(first, second, rngs=rngs))
        return self.head.loss(q1, k2) + self.head.loss(q2, k1), {"feature_std": spread(q1)}

    def teacher_momentum(self, progress: Progress) -> Float[Array, ""]:
        return cosine_ema_momentum(progress.step, self.base_momentum, 0.0, progress.total_steps)
