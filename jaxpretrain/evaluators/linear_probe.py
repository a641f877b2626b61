"""A linear classifier on frozen features, with a sweep of its settings trained at once."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Float, Int

from jaxpretrain.build import ConfigError
from jaxpretrain.evaluators.accuracy import hits
from jaxpretrain.evaluators.base import EvalContext, Evaluator, as_tuple, check_counts, extract

_TOPK = (1, 5)
Weights = dict[str, Array]


class LinearProbe(Evaluator):
    """Softmax regression on frozen features of `train`, scored on `val`.

    One run per pair of learning rate and weight decay, all at once by vmap: zero weights at the start, SGD with
    momentum, cosine decay to zero, the same batches for all. The run with the highest accuracy on a random tenth of
    `train`, from which none learns, is the one that is scored on `val`; equal accuracies are decided by the lower loss
    there. `val` has no part in any choice, so the score is a little below what choosing on `val` would report.

    Features are standardised by the mean and variance of `train`: the batch normalisation without scale and bias of MAE
    (He et al., 2022, appendix A.1; eps 1e-6), with the statistics of all data instead of running ones.

    The result is a function of features and `context.seed`. Top-1 and top-5 are in percent:
    {'top1': ..., 'top5': ..., 'lr': the chosen rate}, and 'weight_decay' if there are several.

    Args:
        context: of the run.
        lrs: learning rates, not scaled by the batch size.
        weight_decays: L2 penalties on the kernel, not on the bias.
        epochs: passes over nine tenths of the train split.
        batch_size: samples per step; the rest of each shuffled pass, less than a batch, is left out.
        momentum: of SGD.

    Raises:
        ConfigError: an empty sweep, a value out of range, or fewer than two training images.
    """

    def __init__(
        self,
        context: EvalContext,
        lrs: float | Sequence[float] = (1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0),
        weight_decays: float | Sequence[float] = (0.0,),
        epochs: int = 100,
        batch_size: int = 256,
        momentum: float = 0.9,
    ):
        super().__init__(context)
        (self.epochs,), (self.batch_size,) = (
            check_counts("LinearProbe.epochs", epochs),
            check_counts("LinearProbe.batch_size", batch_size),
        )
        self.lrs, self.weight_decays, self.momentum = as_tuple(lrs), as_tuple(weight_decays), float(momentum)
        if not self.lrs or min(self.lrs) <= 0:
            raise ConfigError(f"LinearProbe.lrs is {lrs!r}; it must be one or more positive learning rates")
        if not self.weight_decays or min(self.weight_decays) < 0:
            raise ConfigError(f"LinearProbe.weight_decays is {weight_decays!r}; it must be numbers from 0 up")

    def run(self, state: Any) -> dict[str, float]:
        return self.probe(extract(self.context, state, "train"), extract(self.context, state, "val"))

    def probe(self, train: tuple[np.ndarray, np.ndarray], val: tuple[np.ndarray, np.ndarray]) -> dict[str, float]:
        """The scores of (features [N, D], labels [N]) of both splits."""
        if len(train[1]) < 2:
            raise ConfigError("LinearProbe needs at least two training images, one to learn from and one to choose by")
        pairs = np.array([(lr, decay) for lr in self.lrs for decay in self.weight_decays], np.float32)
        right, best = jax.device_get(
            _probe(
                *jax.device_put((train, val, pairs[:, 0], pairs[:, 1], np.uint32(self.context.seed))),
                num_classes=self.context.num_classes,
                epochs=self.epochs,
                batch_size=self.batch_size,
                momentum=self.momentum,
            )
        )
        scores = {f"top{k}": 100 * float(count) / len(val[1]) for k, count in zip(_TOPK, right, strict=True)}
        scores["lr"] = float(pairs[best, 0])
        if len(self.weight_decays) > 1:
            scores["weight_decay"] = float(pairs[best, 1])
        return scores


@partial(jax.jit, static_argnames=("num_classes", "epochs", "batch_size", "momentum"))
def _probe(
    train: tuple[Float[Array, "n d"], Int[Array, " n"]],
    val: tuple[Float[Array, "m d"], Int[Array, " m"]],
    rates: Float[Array, " s"],
    decays: Float[Array, " s"],
    seed: Int[Array, ""],
    *,
    num_classes: int,
    epochs: int,
    batch_size: int,
    momentum: float,
) -> tuple[Int[Array, " topk"], Int[Array, ""]]:
    """How many of `val` are right among the first 1 and 5 classes, and which of the s runs was chosen for it."""
    features, labels = train
    mean, scale = features.mean(axis=0), lax.rsqrt(features.var(axis=0) + 1e-6)
    split_key, shuffle_key = jax.random.split(jax.random.key(seed))
    order = jax.random.permutation(split_key, len(labels))
    held, fit = jnp.split(order, [max(1, len(labels) // 10)])

    def predict(weights: Weights, x: Array) -> Array:
        return ((x - mean) * scale) @ weights["kernel"] + weights["bias"]

    def loss(weights: Weights, x: Array, y: Array) -> Array:
        return optax.softmax_cross_entropy_with_integer_labels(predict(weights, x), y).mean()

    batch = min(batch_size, len(fit))
    steps = len(fit) // batch

    def train_step(carry: tuple[Weights, Weights], now: tuple[Array, Array]) -> tuple[tuple[Weights, Weights], None]:
        (weights, velocity), (rows, progress) = carry, now
        gradients = jax.vmap(jax.grad(loss), in_axes=(0, None, None))(weights, features[rows], labels[rows])
        gradients["kernel"] += decays[:, None, None] * weights["kernel"]
        velocity = jax.tree.map(lambda v, g: momentum * v + g, velocity, gradients)
        lr = rates * 0.5 * (1 + jnp.cos(jnp.pi * progress))
        weights = jax.tree.map(lambda w, v: w - lr.reshape(-1, *[1] * (w.ndim - 1)) * v, weights, velocity)
        return (weights, velocity), None

    def epoch(carry: tuple[Weights, Weights], number: Array) -> tuple[tuple[Weights, Weights], None]:
        rows = jax.random.permutation(jax.random.fold_in(shuffle_key, number), fit)[: steps * batch]
        progress = (number * steps + jnp.arange(steps)) / (epochs * steps)
        return lax.scan(train_step, carry, (rows.reshape(steps, batch), progress))

    zeros = {
        "kernel": jnp.zeros((len(rates), features.shape[1], num_classes)),
        "bias": jnp.zeros((len(rates), num_classes)),
    }
    (weights, _), _ = lax.scan(epoch, (zeros, zeros), jnp.arange(epochs))

    def held_out(candidate: Weights) -> tuple[Array, Array]:
        x, y = features[held], labels[held]
        right = jnp.sum(jnp.argmax(predict(candidate, x), axis=-1) == y)
        return right, loss(candidate, x, y)

    # One candidate after the other: their logits together would be the largest array of all. A run that diverged has
    # the accuracy of guessing, and a NaN as its loss, which sorts last.
    right, value = lax.map(held_out, weights)
    best = jnp.lexsort((value, -right))[0]
    chosen = jax.tree.map(lambda w: w[best], weights)
    return jnp.sum(hits(predict(chosen, val[0]), val[1], _TOPK), axis=0), best
