"""Has the representation collapsed? Numbers that need no training, from the features alone."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxpretrain.evaluators.base import EvalContext, Evaluator, check_counts, extract_rows


class FeatureStatistics(Evaluator):
    """How widely the features of `val` spread.

    - `std`: the standard deviation of unit-length features, averaged over dimensions, times the square root of their
      number: 1 if directions are evenly spread, 0 if all are the same (Chen & He, 2021, SimSiam, section 4.1).
    - `effective_rank`: the exponential of the entropy of the centred features' singular values, scaled to sum 1: in how
      many dimensions they live (Roy & Vetterli, 2007; as a measure of representations Garrido et al., 2023, RankMe).
    - `uniformity`: log of the mean of exp(-2 d^2) over pairs, d being the distance of unit-length features; the lower, the
      more evenly they cover the sphere (Wang & Isola, 2020). 0 if all are the same.
    - `alignment`: the mean of d^2 over pairs of one class (the paper's pairs are two views of an image); the lower, the
      better classes hold together, and 0 in collapse too: read it beside `uniformity`. Left out for multi-label data,
      and where no class has two images.

    Args:
        context: of the run.
        max_images: at most this many images are looked at, drawn by `context.seed`; the cost is its square.
    """

    def __init__(self, context: EvalContext, max_images: int = 2048):
        super().__init__(context)
        (self.max_images,) = check_counts("FeatureStatistics.max_images", max_images)

    def run(self, state: Any) -> dict[str, float]:
        features, labels, _ = extract_rows(self.context, state, "val")
        if len(features) > self.max_images:
            rng = np.random.default_rng(self.context.seed)
            rows = np.sort(rng.choice(len(features), self.max_images, replace=False))
            features, labels = features[rows], labels[rows]
        classes = labels if labels.ndim == 1 else np.arange(len(labels))
        scores = jax.device_get(_statistics(*jax.device_put((features, classes.astype(np.int32)))))
        return {name: float(value) for name, value in scores.items() if np.isfinite(value)}


@jax.jit
def _statistics(x: Float[Array, "n d"], classes: Int[Array, " n"]) -> dict[str, Float[Array, ""]]:
    unit = x / jnp.maximum(jnp.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    # Of the smaller of the two Gram matrices; eigenvalues are squared singular values.
    centred = x - x.mean(axis=0)
    gram = jnp.matmul(*((centred.T, centred) if x.shape[0] > x.shape[1] else (centred, centred.T)), precision="highest")
    singular = jnp.sqrt(jnp.maximum(jnp.linalg.eigvalsh(gram), 0))
    # Rounding leaves eigenvalues of about this size where there are none.
    singular = jnp.where(singular > 3e-4 * singular.max(), singular, 0)
    p = singular / jnp.maximum(singular.sum(), 1e-12)
    entropy = -jnp.sum(p * jnp.log(jnp.where(p > 0, p, 1)))
    distance = jnp.maximum(2 - 2 * jnp.matmul(unit, unit.T, precision="highest"), 0)
    apart = ~jnp.eye(len(x), dtype=bool)
    same = apart & (classes[:, None] == classes)
    return {
        "std": jnp.std(unit, axis=0).mean() * x.shape[1] ** 0.5,
        "effective_rank": jnp.exp(entropy),
        "uniformity": jnp.log(jnp.mean(jnp.exp(-2 * distance), where=apart)),
        "alignment": jnp.mean(distance, where=same),
    }
