"""What all evaluators share: what they may ask of a run, and one pass over the data for all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, Float, Int, UInt8

from jaxpretrain.build import ConfigError

T = TypeVar("T")
Batch = dict[str, Any]


@dataclass
class EvalContext:
    """What evaluators may ask of a run. Made once; all functions take the state, so one context serves every step.

    Attributes:
        features: (state, batch) -> float32 [B, D], jitted: normalises uint8 images and applies `Method.features`.
        logits: (state, batch) -> float32 [B, classes], jitted, or a dictionary of them by task; None for methods without
            a classifier.
        loader: 'train' or 'val' -> batches on the device: `image` uint8 [B, H, W, 3] after the evaluation pipeline,
            `label` int32 [B] (or of another kind, see data/labels.py), `index` int32 [B], `valid` bool [B] (False: a row
            that only fills up the last batch). One pass, in which every sample is valid once, in batches of one shape.
        num_classes: labels are 0 to num_classes - 1; None for data without labels, which only pictures can be made of, and
            for data with labels of several tasks.
        method: state -> the method with that state, in evaluation mode; may be called inside jit.
        workdir: where pictures go; None writes none.
        seed: of everything random in evaluators.
        preprocess: batch with uint8 images -> batch with normalised ones, an affine map of each channel.
        classes: names of the classes, where they are known.
        images: (split, index) -> uint8 [H, W, 3], one image after the evaluation pipeline; None: `fetch_images` looks
            for it in the batches of `loader`.
    """

    features: Callable[[Any, Batch], Array]
    logits: Callable[[Any, Batch], Array] | None
    loader: Callable[[str], Iterable[Batch]]
    num_classes: int | None
    method: Callable[[Any], Any]
    workdir: Path | None
    seed: int
    preprocess: Callable[[Batch], Batch]
    classes: Sequence[str] | None = None
    images: Callable[[str, int], UInt8[np.ndarray, "h w 3"]] | None = None
    _cache: tuple[list, dict[str, Any]] = field(default_factory=lambda: ([], {}), init=False, repr=False)

    def clear(self) -> None:
        """Forgets the features of the last state, and with them the last reference to it."""
        self._cache = ([], {})


class Evaluator:
    """A protocol that turns a state into scores. Sub-classes take their options as arguments after the context."""

    def __init__(self, context: EvalContext):
        self.context = context

    def run(self, state: Any) -> dict[str, float]:
        """The scores of one state, by names without the evaluator's own."""
        raise NotImplementedError


def run_all(evaluators: Mapping[str, Evaluator], state: Any) -> dict[str, float]:
    """Runs every evaluator on one state; features are computed once for all of them, and dropped at the end.

    Returns:
        scores by `EVALUATOR/SCORE`, such as `knn/top1`.
    """
    scores = {}
    try:
        for name, evaluator in evaluators.items():
            scores.update({f"{name}/{key}": float(value) for key, value in evaluator.run(state).items()})
    finally:
        for evaluator in evaluators.values():
            evaluator.context.clear()
    return scores


def gather(tree: Any) -> Any:
    """The arrays of a tree, whole, as NumPy arrays on every process. All processes must call it together."""

    def whole(x: Array) -> np.ndarray:
        if x.is_fully_addressable or x.is_fully_replicated:
            return jax.device_get(x)
        with jax.transfer_guard("allow"):  # the one transfer that is meant, but not explicit inside
            return np.asarray(multihost_utils.process_allgather(x, tiled=True))

    return jax.tree.map(whole, tree)


def one_behind(outputs: Iterable[T]) -> Iterator[T]:
    """Each item of `outputs`, once the next one has been started: fetching one then overlaps with computing another."""
    iterator = iter(outputs)
    for previous in iterator:
        for current in iterator:
            yield previous
            previous = current
        yield previous


def extract(context: EvalContext, state: Any, split: str) -> tuple[Float[np.ndarray, "n d"], Int[np.ndarray, " n"]]:
    """Features and labels of all valid samples of a split, on the host of every process.

    Rows are sorted by the samples' index, so neither the order of loading nor the number of devices or processes shows.
    The result is kept until another state, or `context.clear()`, comes.

    Raises:
        ConfigError: an empty split; labels outside of 0 to num_classes - 1; several labels per image.
        FloatingPointError: features that are not finite.
    """
    features, labels, _ = extract_rows(context, state, split)
    if labels.ndim > 1:
        raise ConfigError(
            f"evaluators: the {split} split has several labels per image, and this evaluator needs one; score such data "
            "with dict(type='LowShotSVM')"
        )
    return features, labels


def extract_rows(context: EvalContext, state: Any, split: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As `extract`, of multi-label data too (labels are then int8 [N, classes]), and the samples' index."""

    def compute() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        arrays, labels, index = run_over(context, split, lambda b: {"features": context.features(state, b)})
        return arrays["features"], labels, index

    return remember(context, state, ("features", split), compute)


def remember(context: EvalContext, state: Any, key: Any, compute: Callable[[], T]) -> T:
    """`compute()`, or what it gave before for this key and state."""
    leaves = jax.tree.leaves(state)
    held, kept = context._cache
    # By identity: arrays never change, and those in the cache stay alive, so an id cannot be taken over.
    if len(held) != len(leaves) or any(a is not b for a, b in zip(held, leaves, strict=True)):
        kept = {}
        context._cache = (leaves, kept)
    if key not in kept:
        kept[key] = compute()
    return kept[key]


def run_over(
    context: EvalContext, split: str, function: Callable[[Batch], dict[str, Array]], labelled: bool = True
) -> tuple[dict[str, Float[np.ndarray, "n d"]], np.ndarray, Int[np.ndarray, " n"]]:
    """({name: [N, D]}, labels, index) of all valid samples of a split, in the order of their index, from one pass over it.

    Args:
        function: batch -> arrays of as many rows.
        labelled: refuse data whose labels are neither classes, int32 [N], nor int8 [N, classes].
    """
    outputs = ((function(batch), batch["label"], batch["index"], batch["valid"]) for batch in context.loader(split))
    parts: dict[str, list[np.ndarray]] = {}
    rows = []
    for arrays, label, index, valid in map(gather, one_behind(outputs)):
        if labelled:
            _check_kind(label, split)
        rows.append((jax.tree.map(lambda part, kept=valid: part[kept], label), index[valid]))
        for name, array in arrays.items():
            parts.setdefault(name, []).append(array[valid])
    if not any(len(index) for _, index in rows):
        raise ConfigError(f"evaluators: the {split} split has no images; check config.data.{split}.dataset")
    labels, index = jax.tree.map(lambda *column: np.concatenate(column), *rows)
    order = np.argsort(index, kind="stable")
    labels, index = jax.tree.map(lambda column: column[order], (labels, index))
    if labelled:
        check_labels(labels, context.num_classes, split)
    found = {}
    for name in list(parts):
        found[name] = np.concatenate(parts.pop(name))[order]  # one after the other: they may be large
        if not np.isfinite(found[name]).all():
            raise FloatingPointError(f"evaluators: the {name} of the {split} split are not finite")
    return found, labels, index


def _check_kind(label: Any, split: str) -> None:
    if isinstance(label, Mapping):
        raise ConfigError(
            f"evaluators: the {split} split has labels of several tasks ({', '.join(label)}), and this evaluator needs "
            "those of one; score them with dict(type='MultiTasksMetric', task_metrics={TASK: [dict(type='Accuracy')]})"
        )


def fetch_images(context: EvalContext, split: str, indices: Sequence[int]) -> UInt8[np.ndarray, "n h w 3"]:
    """Images of a split after the evaluation pipeline, by index."""
    if context.images is not None:
        return np.stack([context.images(split, int(index)) for index in indices])
    wanted, found = {int(index) for index in indices}, {}
    for image, index, valid in map(gather, ((b["image"], b["index"], b["valid"]) for b in context.loader(split))):
        found.update({int(i): image[row] for row, i in enumerate(index) if valid[row] and int(i) in wanted})
        if len(found) == len(wanted):
            break
    return np.stack([found[int(index)] for index in indices])


def check_labels(labels: np.ndarray, num_classes: int | None, split: str) -> None:
    """Raises ConfigError where a label is not a class; says nothing of data with several labels for each image."""
    if labels.ndim > 1:
        return
    if not num_classes or labels.min() < 0:
        raise ConfigError(
            f"evaluators: the {split} split has images without labels, and cannot be scored; evaluate on labelled data "
            "(config.data), or take the evaluator out of config.evaluators"
        )
    if labels.max() >= num_classes:
        raise ConfigError(
            f"evaluators: the {split} split has label {labels.max()}, but the data set has {num_classes} classes "
            f"(0 to {num_classes - 1})"
        )


def as_tuple(value: Any) -> tuple:
    """A scalar or a sequence, as a tuple."""
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def check_counts(name: str, counts: int | Sequence[int]) -> tuple[int, ...]:
    """`counts` as a tuple of whole numbers from 1 up; ConfigError otherwise."""
    values = as_tuple(counts)
    if not values or any(not isinstance(k, int) or isinstance(k, bool) or k < 1 for k in values):
        raise ConfigError(f"{name} is {counts!r}; it must be a whole number from 1 up, or a list of such")
    return values


def completed_steps(state: Any) -> int:
    """The number of optimizer steps behind a state: its attribute or entry `step`."""
    step = state["step"] if isinstance(state, Mapping) else state.step
    return int(gather(step)) if isinstance(step, jax.Array) else int(step)
