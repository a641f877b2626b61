"""BatchNorm's running statistics taken anew with the weights at rest (Wu & Johnson, 2021, "Rethinking Batch in BatchNorm",
section 3): the plain mean over many batches, instead of one that still remembers earlier weights. MMPretrain's PreciseBNHook.
"""

from __future__ import annotations

import functools
import logging
import operator
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float

from jaxpretrain.build import ConfigError, nearest
from jaxpretrain.models.layers import BatchNorm
from jaxpretrain.train_state import Batch, State, eval_params, make_loss, make_method, split

logger = logging.getLogger("jaxpretrain")

Statistics = dict[tuple, Float[Array, " c"]]  # by path in the model's state
_STREAM = 0xB17  # keeps keys apart from those of steps
_FIELDS = ("num_samples", "interval")


class PreciseBN:
    """`config.precise_bn`: dict(num_samples=8192, interval=1), the images to look at, and after every how many epochs.

    Images, augmented as for training, are those with which the next epoch begins; weights are those that evaluations see.
    Training normalises by its batches, so it goes on as it would have without.

    Args:
        config: of the run.
        steps_per_epoch: of its data.
        shardings: of its state.

    Raises:
        ConfigError: an unknown field, no images; a method without BatchNorm.
    """

    def __init__(self, config: Any, steps_per_epoch: int, shardings: State):
        settings = dict(config.precise_bn or {})
        for name in settings:
            if name not in _FIELDS:
                raise ConfigError(f"config.precise_bn has no field {name!r}.{nearest(name, _FIELDS)}")
        images, interval = settings.get("num_samples", 0), settings.get("interval", 1)
        if settings and (images < 1 or interval < 1):
            raise ConfigError(f"config.precise_bn: num_samples={images} and interval={interval} must be at least 1")
        self.every = interval * steps_per_epoch if settings else 0
        if not settings:
            return
        self.pieces, self.shardings = config.accumulative_counts, shardings
        self.batches = min(max(images // config.batch_size, 1), steps_per_epoch)
        method = make_method(config)
        self.places = []
        for path, module in nnx.iter_modules(method):
            if isinstance(module, BatchNorm):
                module.momentum = 1.0  # a pass leaves behind the statistics of its batch
                self.places += [(*path, "mean"), (*path, "var")]
        self.graphdef = split(method)[0]
        if not self.places:
            raise ConfigError(f"config.precise_bn: {type(method).__name__} has no BatchNorm; leave it out")
        self._compiled: dict[Any, Any] = {}

    def due(self, step: int) -> bool:
        """Whether to run after this step; the first is 1."""
        return self.every > 0 and step % self.every == 0

    def __call__(self, state: State, batches: Iterator[Batch], augment: Callable[[Batch, Array], Batch]) -> State:
        """The state with the mean of the statistics of the first `batches`; `augment` is that of the training step."""
        begin = time.perf_counter()
        if augment not in self._compiled:
            self._compiled[augment] = jax.jit(functools.partial(self._add, make_loss(self.graphdef, augment)))
        known = flatten_dict(state["model_state"], keep_empty_nodes=True)
        means = {place: jnp.zeros_like(known[place]) for place in self.places}
        networks = eval_params(state), state["model_state"]
        for i in range(self.batches):
            means = self._compiled[augment](means, *networks, state["rng"], state["step"], i, next(batches))
        model_state = jax.jit(unflatten_dict, out_shardings=self.shardings["model_state"])(known | means)
        logger.info("statistics of BatchNorm over %d batches in %.1f s", self.batches, time.perf_counter() - begin)
        return dict(state, model_state=model_state)

    def _add(
        self,
        loss: Any,
        means: Statistics,
        params: Any,
        model_state: Any,
        rng: Array,
        step: Array,
        i: Array,
        batch: Batch,
    ) -> Statistics:
        """The sum with those of batch `i`, as its part of the mean; micro-batches are apart, as in training."""
        seed = jax.random.wrap_key_data(rng)
        key = jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(seed, _STREAM), step), i)
        for piece in range(self.pieces):
            micro = jax.tree.map(operator.itemgetter(slice(piece, None, self.pieces)), batch)
            _, (_, after) = loss(params, model_state, micro, seed, jax.random.fold_in(key, piece))
            found = flatten_dict(after, keep_empty_nodes=True)
            means = {place: mean + found[place] / (self.batches * self.pieces) for place, mean in means.items()}
        return means
