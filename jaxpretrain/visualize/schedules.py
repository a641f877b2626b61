"""Learning rate, weight decay and momentum of every group of parameters over a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from operator import mul
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from jaxpretrain.optim.curves import Curve, GroupCurves, distinct
from jaxpretrain.visualize.curves import _COLOURS

TITLES = {"lr": "learning rate", "weight_decay": "weight decay", "momentum": "momentum"}
_STYLES = ("-", "--", "-.", ":")  # one for each config
_NAMED = 8  # curves up to this number have names and colours of their own
_POINTS = 4000  # drawn of a curve, at most


def plot_schedules(
    curves: Mapping[str, Sequence[GroupCurves]],
    steps_per_epoch: Mapping[str, int],
    parameters: Sequence[str],
    path: str | Path,
    title: str = "",
    size: tuple[float, float] | None = None,
) -> Path:
    """One panel for each parameter, as PNG (or another format by the ending); returns the path.

    Args:
        curves: of each config, by name.
        steps_per_epoch: of each config; the axis above counts epochs where all agree.
        parameters: keys of `TITLES`.
        path: of the picture.
        title: above the panels.
        size: inches, width and height; None: by the number of panels.
    """
    size = size or (9.6, 3.6 * len(parameters))
    figure = Figure(figsize=size, dpi=120, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12))
    figure.suptitle(title, fontsize=12)
    for i, parameter in enumerate(parameters):
        axes = figure.add_subplot(len(parameters), 1, i + 1)
        _panel(axes, {name: distinct(groups, parameter) for name, groups in curves.items()}, parameter)
        if i == len(parameters) - 1:
            axes.set_xlabel("step", fontsize=9)
        if i == 0 and len(set(steps_per_epoch.values())) == 1:
            n = next(iter(steps_per_epoch.values()))
            above = axes.secondary_xaxis("top", functions=(partial(mul, 1 / n), partial(mul, n)))
            above.set_xlabel("epoch", fontsize=9)
            above.tick_params(labelsize=8)
            above.spines["top"].set_visible(False)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def _label(curve: Curve, lines: Sequence[Curve]) -> str:
    if len(lines) == 1:
        return "all parameters"
    more = f" and {len(curve.names) - 1} more" if len(curve.names) > 1 else ""
    return f"{curve.size / sum(line.size for line in lines):.1%} of parameters: {curve.names[0]}{more}"


def _panel(axes: Axes, curves: Mapping[str, list[Curve]], parameter: str) -> None:
    total = sum(map(len, curves.values()))
    drawn = 0
    for c, (name, lines) in enumerate(curves.items()):
        lines = sorted(lines, key=lambda line: np.nanmax(line.values, initial=0)) if total > _NAMED else lines
        for i, line in enumerate(lines):
            values = line.values
            colour: Any
            steps = np.unique(np.linspace(0, len(values) - 1, min(len(values), _POINTS)).round().astype(int))
            if total <= _NAMED:
                colour = _COLOURS[drawn % len(_COLOURS)]
            else:
                colour = colormaps["viridis"](0.92 * i / max(1, len(lines) - 1))
            text = f"{name}: {_label(line, lines)}" if len(curves) > 1 else _label(line, lines)
            axes.plot(
                steps, values[steps], color=colour, linestyle=_STYLES[c % len(_STYLES)], linewidth=1.6, label=text
            )
            drawn += 1
    axes.set_title(TITLES[parameter], loc="left", fontsize=11)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.6g}")
    highest = max((np.nanmax(line.values, initial=0) for lines in curves.values() for line in lines), default=0)
    axes.set_ylim(-0.03 * (highest or 1), 1.12 * (highest or 1))
    if not total:
        axes.text(0.5, 0.5, "this optimizer has none", transform=axes.transAxes, ha="center", va="center", color="0.5")
    elif total <= _NAMED:
        axes.legend(frameon=False, fontsize=8)
    else:
        axes.text(
            0.99,
            0.96,
            f"{total} curves, named in the table",
            transform=axes.transAxes,
            ha="right",
            va="top",
            fontsize=8,
        )
