"""What the trainer does between epochs for methods that look at the whole data set then (DeepCluster, ODC).

The new targets are part of the state, so checkpoints have them. A run that goes on from the end of an epoch regroups before
the next one, as the uninterrupted run did.
"""

from __future__ import annotations

import functools
import logging
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array

from jaxpretrain.build import ConfigError
from jaxpretrain.data.samplers import Order
from jaxpretrain.evaluators.base import EvalContext, run_over
from jaxpretrain.train_state import Batch, State, make_method, split

logger = logging.getLogger("jaxpretrain")

_STREAM = 0xC105  # keeps keys apart from those of steps


class Regrouping:
    """`Method.regroup` on the state of a run.

    Args:
        config: of the run.
        mesh: its devices.
        length: images of its data set.

    Raises:
        ConfigError: the method's memory is for another number of images.
    """

    def __init__(self, config: Any, mesh: Mesh, length: int):
        self.config, self.mesh, self.length = config, mesh, length
        self.method = make_method(config)
        self.graphdef = split(self.method)[0]
        if self.method.num_samples not in (None, length):
            raise ConfigError(
                f"{type(self.method).__name__} has a memory of {self.method.num_samples} images (num_samples, or "
                f"memory_bank.length, in config.method), but config.data.train.dataset has {length}"
            )

    def due(self, epoch: int) -> bool:
        """Whether there is something to do before this epoch, from 0."""
        return self.method.regroups(epoch)

    def order(self, state: State) -> Order | None:
        """The order of images that follows from the state."""
        return nnx.merge(self.graphdef, state["params"], state["model_state"]).order()

    def __call__(self, state: State, epoch: int, context: EvalContext) -> tuple[State, dict[str, float]]:
        """The state with what the method makes of all features, and what to log. Arrays stay where they were."""
        begin = time.perf_counter()
        features = self._features(state, context)
        extracted = time.perf_counter()
        method = nnx.merge(self.graphdef, state["params"], state["model_state"])
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(self.config.seed), _STREAM), epoch)
        logged = method.regroup(features, epoch=epoch, key=key, mesh=self.mesh)
        _, params, model_state = split(method)
        state = dict(
            state,
            params=jax.tree.map(_in_place_of, params, state["params"]),
            model_state=jax.tree.map(_in_place_of, model_state, state["model_state"]),
        )
        seconds = (extracted - begin, time.perf_counter() - extracted)
        logger.info("epoch %d: features of all images in %.1f s, clustered in %.1f s", epoch, *seconds)
        return state, logged

    @functools.cached_property
    def _embed(self) -> Any:
        method = make_method(self.config)
        method.eval()
        graphdef = split(method)[0]

        @functools.partial(jax.jit, static_argnums=0)
        def embed(preprocess: Any, params: Any, model_state: Any, batch: Batch) -> dict[str, Array]:
            images = preprocess(batch)["image"]
            return {"features": nnx.merge(graphdef, params, model_state).embed(images).astype(jnp.float32)}

        return embed

    def _features(self, state: State, context: EvalContext) -> np.ndarray:
        """`embed` of all images, float32 [N, D]; an image that cannot be read has the features of the one after it."""
        networks = state["params"], state["model_state"]
        embed = lambda batch: self._embed(context.preprocess, *networks, batch)  # noqa: E731
        found, _, index = run_over(context, "train", embed, labelled=False)
        if len(index) == self.length:
            return found["features"]
        rows = np.searchsorted(index, np.arange(self.length))
        return found["features"][np.minimum(rows, len(index) - 1)]


def _in_place_of(new: Any, old: jax.Array) -> jax.Array:
    """`new` on the devices as `old` is."""
    if new is old:
        return old
    array = np.asarray(new, old.dtype)
    assert array.shape == old.shape, f"{array.shape} in place of {old.shape}"
    return jax.make_array_from_callback(old.shape, old.sharding, lambda index: array[index])
