"""What a learning method is: networks, and how they learn from a batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct
from jaxtyping import Array, Float, Int

from jaxpretrain.build import ConfigError, build
from jaxpretrain.models.layers import BaseModule, freeze
from jaxpretrain.models.layers.conv import global_avg_pool

if TYPE_CHECKING:
    from jaxpretrain.data.samplers import Order

Batch = Mapping[str, Any]
Metrics = dict[str, Array]


@struct.dataclass
class Progress:
    """Where training stands.

    Attributes:
        step: optimizer steps completed, int32; 1 after the first. An array, so that a new value compiles nothing anew.
        total_steps: length of the whole run in optimizer steps; a Python number.
    """

    step: Int[Array, ""]
    total_steps: int = struct.field(pytree_node=False)


class Method(BaseModule):
    """A learning method owns its networks and says how they learn.

    The trainer calls `loss` inside its jitted step, once per micro-batch, differentiates it with respect to the
    `nnx.Param`s alone, applies the optimizer, and calls `after_step` once. Whatever else the networks hold (running
    statistics, momentum encoders, queues) is ordinary NNX state: changed in place in either call, sharded and
    checkpointed with the rest.

    A batch is a dictionary with `image` [B, H, W, 3], augmented and normalised, or a tuple of such views; `label` int32
    [B] where the data has labels (or of another kind, see data/labels.py);
    `index` and `epoch` int32 [B]. The dtype of the images is that of the computation.
    """

    def loss(self, batch: Batch, *, rngs: nnx.Rngs | None = None) -> tuple[Float[Array, ""], Metrics]:
        """The scalar to minimise over the global batch, float32 at least, and scalars to log beside it.

        Needs training mode. `rngs` feeds masks, dropout and batch augmentation.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no loss")

    def after_step(self, progress: Progress) -> None:
        """Runs after each optimizer step: momentum encoders move here. Does nothing by default."""

    def features(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b d"]:
        """The representation that evaluators look at. Needs eval mode (`method.eval()`)."""
        raise NotImplementedError(f"{type(self).__name__} defines no features")

    def logits(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b classes"]:
        """Scores per class, where `has_logits`. Needs eval mode."""
        raise NotImplementedError(
            f"{type(self).__name__} learns without labels and has no logits; evaluate its features (KNN, LinearProbe)"
        )

    @property
    def has_logits(self) -> bool:
        """Whether `logits` is defined: true for classifiers."""
        return type(self).logits is not Method.logits

    # Methods that keep something about each image of the data set, and may want to see all of them between epochs.

    @property
    def num_samples(self) -> int | None:
        """How many images the method has a memory for, which must be those of the data set; None: it has none."""
        return None

    def regroups(self, epoch: int) -> bool:
        """Whether `regroup` shall run before epoch `epoch`, from 0."""
        return False

    def embed(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b d"]:
        """The features that `regroup` gets. Needs eval mode."""
        return self.features(images)

    def regroup(
        self, features: Float[np.ndarray, "n d"], *, epoch: int, key: Array, mesh: jax.sharding.Mesh | None = None
    ) -> dict[str, float]:
        """Changes weights and state, in place, in view of `embed` of the whole training set; returns what to log.

        Runs outside of jit, the same on every host, and writes whole arrays.

        Args:
            features: float32, in the order of the images' index, seen through the evaluation pipeline.
            epoch: the one that begins, from 0.
            key: for what is random, of this epoch.
            mesh: the devices to compute on.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no regroup")

    def order(self) -> Order | None:
        """The order in which epochs take images, from the present state; None: each image once, at random."""
        return None


class BaseSelfSupervisor(Method):
    """A self-supervised method of three parts, MMPretrain's base class; most methods differ in their loss alone.

    Args:
        backbone: the network to be trained for later use; a dictionary with `type`, or a module.
        neck: what comes on top of it, such as a projector or a decoder.
        head: what the loss needs besides.
        target_generator: a frozen network or function that makes the targets; None if the method needs none.
        pretrained, data_preprocessor: accepted for MMPretrain's configs, and not used.
        init_cfg: initialisation, MMEngine's dictionaries.
    """

    def __init__(
        self,
        backbone: Mapping[str, Any] | nnx.Module,
        neck: Mapping[str, Any] | nnx.Module | None,
        head: Mapping[str, Any] | nnx.Module | None,
        target_generator: Mapping[str, Any] | nnx.Module | None = None,
        pretrained: None = None,
        data_preprocessor: Any = None,
        init_cfg: Any = None,
        *,
        rngs: nnx.Rngs,
    ):
        self.init_cfg = init_cfg
        self.backbone = build(backbone, rngs=rngs)
        self.neck = build(neck, rngs=rngs, **self.neck_defaults())
        self.head = build(head, rngs=rngs)
        if target_generator is not None:
            self.target_generator = freeze(build(target_generator, rngs=rngs))

    def neck_defaults(self) -> dict[str, Any]:
        """Arguments of the neck that follow from the backbone, where the config does not give them."""
        return {}

    def extract_feat(self, images: Float[Array, "b h w c"]) -> Any:
        """The backbone's features of whole images, a tuple: of maps [B, H', W', C'], or what its `out_type` says."""
        return self.backbone(images)

    def __call__(self, images: Float[Array, "b h w c"]) -> Any:
        """The same as `extract_feat`."""
        return self.extract_feat(images)


# What several methods do.


def views(batch: Batch, count: int) -> tuple[Float[Array, "b h w 3"], ...]:
    """The `count` views of each image. Raises ConfigError if the batch has another number of them."""
    images = batch["image"]
    found = len(images) if isinstance(images, tuple | list) else 1
    if found != count:
        raise ConfigError(
            f"This method learns from {count} views of each image, and the batch has {found}: give config.data.train's "
            f"pipeline or device_pipeline a dict(type='MultiView', num_views=..., transforms=...) that makes {count}"
        )
    return tuple(images)


def last(outputs: Any) -> Array:
    """The last of a tuple of outputs; an array as it is."""
    return outputs[-1] if isinstance(outputs, tuple | list) else outputs


def pool(outputs: Any) -> Float[Array, "b d"]:
    """A backbone's last output as one vector per image: feature maps [B, H, W, D] are averaged over positions."""
    x = last(outputs)
    return global_avg_pool(x) if x.ndim == 4 else x


def normalize(x: Float[Array, "b d"]) -> Float[Array, "b d"]:
    """Rows of unit length, in float32 at least; rows of zeros stay so."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=-1, keepdims=True), 1e-24))


def spread(x: Float[Array, "b d"]) -> Float[Array, ""]:
    """How widely representations spread: the standard deviation over the batch of unit vectors' entries, times sqrt(D).

    1 where directions are evenly spread, 0 where all are the same: collapse (Chen & He, 2021, section 4.1).
    """
    x = normalize(jax.lax.stop_gradient(x))
    return jnp.std(x, axis=0).mean() * x.shape[-1] ** 0.5


def entropy(assignments: Float[Array, "*b k"]) -> Float[Array, ""]:
    """How evenly K clusters are used: the entropy of the mean of `assignments` (rows add up to 1), divided by log K.

    1 where all are used alike, 0 where one takes all: collapse.
    """
    p = jax.lax.stop_gradient(assignments).astype(jnp.float32).reshape(-1, assignments.shape[-1]).mean(axis=0)
    return -jnp.sum(p * jnp.log(jnp.maximum(p, 1e-12))) / jnp.log(p.size)


def draw_key(rngs: nnx.Rngs | None, stream: str) -> Array:
    """A key for something random. Raises ValueError without `rngs`."""
    if rngs is None:
        raise ValueError(f"This loss draws random numbers ({stream}): call it with rngs=nnx.Rngs(key)")
    return getattr(rngs, stream)()
