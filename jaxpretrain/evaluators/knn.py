"""Weighted k-nearest-neighbour classification of frozen features."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxpretrain.build import ConfigError
from jaxpretrain.evaluators.accuracy import hits
from jaxpretrain.evaluators.base import EvalContext, Evaluator, check_counts, extract

_TOPK = (1, 5)


class KNN(Evaluator):
    """Labels each `val` image by its k nearest `train` images (Wu et al., 2018, "Unsupervised Feature Learning via
    Non-Parametric Instance Discrimination", section 3.4; the settings are those of DINO, Caron et al., 2021).

    Nearness is the cosine of the features; a neighbour at cosine s votes for its class with weight exp(s /
    temperature). Scores are in percent: {'top1': ..., 'top5': ...}, or with several k {'k10_top1': ...,
    'k10_top5': ..., 'k20_top1': ...}.

    Args:
        context: of the run.
        k: the number of neighbours, or several numbers; at most the size of the train split is used.
        temperature: of the votes.
        chunk: how many images are compared with the whole bank at a time; bounds the memory, changes no result.

    Raises:
        ConfigError: k or chunk below 1, or a temperature that is not positive.
    """

    def __init__(self, context: EvalContext, k: int | Sequence[int] = 20, temperature: float = 0.07, chunk: int = 256):
        super().__init__(context)
        self.k = check_counts("KNN.k", k)
        (self.chunk,) = check_counts("KNN.chunk", chunk)
        if not temperature > 0:
            raise ConfigError(f"KNN.temperature is {temperature!r}; it must be positive (the papers use 0.07)")
        self.temperature = float(temperature)

    def run(self, state: Any) -> dict[str, float]:
        bank, bank_labels = extract(self.context, state, "train")
        queries, labels = extract(self.context, state, "val")
        chunk = min(self.chunk, len(labels))
        counts = _count_hits(
            *jax.device_put((bank, bank_labels)),
            *jax.device_put((_chunks(queries, chunk), _chunks(labels, chunk))),
            jax.device_put(_chunks(np.ones(len(labels), bool), chunk)),
            ks=self.k,
            temperature=self.temperature,
            num_classes=self.context.num_classes,
        )
        percent = 100 * jax.device_get(counts) / len(labels)
        prefixes = [f"k{k}_" if len(self.k) > 1 else "" for k in self.k]
        return {
            f"{prefix}top{n}": float(value)
            for prefix, row in zip(prefixes, percent, strict=True)
            for n, value in zip(_TOPK, row, strict=True)
        }


def _chunks(x: np.ndarray, size: int) -> np.ndarray:
    """[N, ...] -> [chunks, size, ...], filled up with zeros."""
    x = np.pad(x, [(0, -len(x) % size)] + [(0, 0)] * (x.ndim - 1))
    return x.reshape(-1, size, *x.shape[1:])


@partial(jax.jit, static_argnames=("ks", "temperature", "num_classes"))
def _count_hits(
    bank: Float[Array, "n d"],
    bank_labels: Int[Array, " n"],
    queries: Float[Array, "chunks b d"],
    labels: Int[Array, "chunks b"],
    valid: Bool[Array, "chunks b"],
    *,
    ks: tuple[int, ...],
    temperature: float,
    num_classes: int,
) -> Int[Array, "ks topk"]:
    """How many queries are right among the first 1 and 5 classes, for each k."""
    bank = _unit(bank)
    ks = tuple(min(k, len(bank)) for k in ks)

    def chunk_hits(chunk: tuple[Array, Array, Array]) -> Array:
        query, label, valid = chunk
        # 'highest': at T = 0.07 the errors of TF32, 1e-3 in the cosine, would show in the votes.
        cosine = jnp.matmul(_unit(query), bank.T, precision="highest")
        cosine, nearest = jax.lax.top_k(cosine, max(ks))
        # Relative to the nearest: the same ranking, and no overflow at low temperatures.
        weight = jnp.exp((cosine - cosine[:, :1]) / temperature)
        row, voted = jnp.arange(len(query))[:, None], bank_labels[nearest]
        none = jnp.zeros((len(query), num_classes))
        right = jnp.stack([hits(none.at[row, voted[:, :k]].add(weight[:, :k]), label, _TOPK) for k in ks])
        return jnp.sum(right & valid[:, None], axis=1)

    return jax.lax.map(chunk_hits, (queries, labels, valid)).sum(axis=0)


def _unit(x: Float[Array, "b d"]) -> Float[Array, "b d"]:
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
