"""Loss, learning rate and scores over a run, from its metrics.jsonl."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from jaxpretrain.build import ConfigError

Record = dict[str, Any]

_COLOURS = ("#2f6fab", "#d1622b", "#3d8f5f", "#8a5fb0", "#b0892c", "#4a9aa5", "#b5476d", "#6b6b6b")


def read_metrics(workdir: str | Path) -> list[Record]:
    """The records of `workdir/metrics.jsonl`, in order of step; those of training and evaluation apart by `phase`.

    A run that was killed has logged some steps that it repeats later: of two records of a phase and step that share a
    key, the later one holds. A line cut short by the kill is passed over.

    Raises:
        ConfigError: no such file, or nothing in it.
    """
    path = Path(workdir) / "metrics.jsonl"
    if not path.is_file():
        raise ConfigError(
            f"{path} does not exist, so {workdir} is not the folder of a run that has started; "
            "give the folder that was given to the training as --workdir"
        )
    merged: dict[tuple[str, int], Record] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            merged.setdefault((record.get("phase", "train"), record["step"]), {}).update(record)
    if not merged:
        raise ConfigError(f"{path} holds no records yet: the run has not logged its first steps")
    return [merged[key] for key in sorted(merged, key=lambda key: (key[1], key[0] != "train"))]


def series(records: Iterable[Record], key: str, phase: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of a finite number that records of a phase hold under `key`."""
    pairs = [(r["step"], r[key]) for r in records if r.get("phase", "train") == phase and is_number(r.get(key))]
    steps, values = zip(*pairs, strict=True) if pairs else ((), ())
    return np.asarray(steps, np.int64), np.asarray(values, np.float64)


def score_names(records: Iterable[Record]) -> list[str]:
    """The evaluators' values, `EVALUATOR/SCORE`, in order of first appearance."""
    names = (key for r in records if r.get("phase") == "eval" for key in r if "/" in key and is_number(r[key]))
    return list(dict.fromkeys(names))


def is_number(value: Any) -> bool:
    """Whether a value of a record can be plotted."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_percent(name: str) -> bool:
    """Whether a score is an accuracy or average precision in percent: `knn/top1`, `knn/k20_top5`, `svm/k8_map`."""
    kind = name.rsplit("/", 1)[-1].rsplit("_", 1)[-1]
    return kind.startswith("top") or kind == "map"


def is_choice(name: str) -> bool:
    """Whether a score is none, but what a probe chose, or how its scores vary: `linear/lr`, `svm/k8_map_std`."""
    score = name.rsplit("/", 1)[-1]
    return score in ("lr", "weight_decay", "best", "level") or score.endswith("_map_std")


def plot_curves(workdir: str | Path, path: str | Path | None = None) -> Path:
    """Draws loss, learning rate and, where there are any, the evaluators' scores over optimizer steps, as one PNG.

    Args:
        workdir: of the run, with its metrics.jsonl.
        path: of the picture; `workdir/pictures/curves.png` if None.

    Returns:
        the path. Raises ConfigError as `read_metrics` does.
    """
    records = read_metrics(workdir)
    scores = [name for name in score_names(records) if not is_choice(name)]
    percents = [name for name in scores if is_percent(name)]
    panels: list[tuple[str, list[str], str]] = [("loss", ["loss"], "train"), ("learning rate", ["lr"], "train")]
    panels += [("accuracy (%)", percents, "eval")] if percents else []
    panels += [(name.replace("/", ": "), [name], "eval") for name in scores if name not in percents]

    rows = -(-len(panels) // 2)
    figure = Figure(figsize=(9.6, 3.4 * rows), dpi=120, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12))
    for i, (title, names, phase) in enumerate(panels):
        axes = figure.add_subplot(rows, 2, i + 1)
        for name, colour in zip(names, _COLOURS * len(names), strict=False):
            _line(axes, *series(records, name, phase), colour=colour, label=name, points=phase == "eval")
        _dress(axes, title)
        if title == "loss" and _spans_decades(series(records, "loss", "train")[1]):
            axes.set_yscale("log")
        if len(names) > 1:
            axes.legend(frameon=False, fontsize=8)
    path = Path(path) if path else Path(workdir) / "pictures" / "curves.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def _line(axes: Axes, steps: np.ndarray, values: np.ndarray, *, colour: str, label: str, points: bool) -> None:
    if points or len(steps) < 3:
        axes.plot(steps, values, color=colour, label=label, marker="o", markersize=4, linewidth=1.6)
        return
    width = len(values) // 25
    if label == "lr" or width < 3:
        axes.plot(steps, values, color=colour, label=label, linewidth=1.6)
        return
    # Many noisy points: their running mean, with the points themselves behind it.
    axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
    axes.plot(steps, _running_mean(values, width), color=colour, label=label, linewidth=1.8)


def _running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Mean over a centred window that shrinks at both ends."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    low, high = np.maximum(at - width // 2, 0), np.minimum(at + width // 2 + 1, len(values))
    return (total[high] - total[low]) / (high - low)


def _spans_decades(values: np.ndarray) -> bool:
    """Whether a logarithmic axis reads better: all positive, and more than a factor of 30 from end to end."""
    return bool(len(values) and values.min() > 0 and values.max() > 30 * values.min())


def _dress(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel("step", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    if not axes.lines:
        axes.text(0.5, 0.5, "nothing logged yet", transform=axes.transAxes, ha="center", va="center", color="0.5")
