"""Labels of every kind, and the columns of a batch that hold them.

A sample's label is an int, or an array with a number for each class, or a dictionary of these by task (`base.Label`). In
a batch they are int32 [B], int8 [B, classes] (float32 for scores), and a dictionary of such columns. What is unknown is
-1, or a row of -1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxpretrain.build import ConfigError
from jaxpretrain.data.base import Label


def canonical(label: Any) -> Label:
    """What a source or a transform gives as `label`, as an int, an int8 or float32 array [classes], or a dict of these.

    Raises:
        ConfigError: an array of more than one axis, or of other integers than 1, 0 and -1.
    """
    if isinstance(label, Mapping):
        return {str(name): canonical(part) for name, part in label.items()}
    if np.ndim(label) == 0:
        return int(label)
    array = np.asarray(label)
    if array.ndim > 1 or array.dtype.kind not in "biuf":
        kind = f"{array.dtype} {list(array.shape)}"
        raise ConfigError(f"a label must be an integer, or a number for each class, not {kind}")
    if array.dtype.kind == "f":
        return array.astype(np.float32)
    if array.size and (array.min() < -1 or array.max() > 1):
        raise ConfigError(
            "a label that is an array has 1, 0 or -1 (not counted) for each class; "
            f"got {array.tolist() if array.size <= 20 else [*array[:20].tolist(), '...']}"
        )
    return array.astype(np.int8)


def column(label: Label, size: int) -> Any:
    """The column of `size` unknown labels, of the kind of `label`."""
    if isinstance(label, Mapping):
        return {name: column(part, size) for name, part in label.items()}
    if isinstance(label, np.ndarray):
        return np.full((size, *label.shape), -1, label.dtype)
    return np.full(size, -1, np.int32)


def put(labels: Any, where: slice | Sequence[int], new: Sequence[Label]) -> None:
    """Writes the labels of some samples into the rows `where` of a column; tasks that a sample lacks stay unknown.

    Raises:
        ConfigError: labels of another kind, or another number of classes, or a task that the column lacks.
    """
    if isinstance(labels, dict):
        names = {name for label in new for name in (label if isinstance(label, Mapping) else ["(no task)"])}
        if unknown := sorted(names - labels.keys()):
            raise ConfigError(
                f"a sample has a label for {', '.join(unknown)}, but the first sample has labels for "
                f"{', '.join(labels)}: all tasks must be in the first one, with -1 where the label is unknown"
            )
        for name, part in labels.items():
            put(part, where, [label.get(name, _unknown(part)) for label in new])  # type: ignore[union-attr]
        return
    for label in new:
        if isinstance(label, Mapping) or np.shape(label) != labels.shape[1:]:
            raise ConfigError(f"the labels of the data differ in kind: {_kind(label)}, and {_kind(labels[0])} before")
    labels[where] = new


def _unknown(labels: Any) -> Label:
    return {} if isinstance(labels, dict) else np.full(labels.shape[1:], -1, labels.dtype)


def _kind(label: Any) -> str:
    if isinstance(label, Mapping):
        return f"one for each of {', '.join(label)}"
    return f"a number for each of {len(label)} classes" if np.ndim(label) else "one integer"
