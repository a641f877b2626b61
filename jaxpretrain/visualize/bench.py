"""The plot of `tools.bench_features`: all checkpoints under all protocols."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

Results = Mapping[str, Mapping[str, Mapping[str, float]]]

_COLOURS = ("#2f6fab", "#d1622b", "#3d8f5f", "#8a5fb0", "#b0892c", "#4a9aa5", "#b5476d", "#6b6b6b")


def plot_bench(results: Results, path: str | Path) -> Path:
    """Draws one panel per kind of protocol, one colour per checkpoint, as PNG: single scores as bars, kNN and low-shot SVM
    over k, levels from the first to the last. Returns the path.

    Args:
        results: {label: {protocol: {score: value}}}, as `tools.bench_features.bench` gives them.
        path: of the picture.
    """
    panels: list[tuple[str, Callable[[Axes, Results], None]]] = []
    if _bars(results):
        panels.append(("accuracy or mAP (%)", _draw_bars))
    for title, protocol, prefix, unit in (
        ("kNN: top-1 (%) over k", "knn", "k", "top1"),
        ("low-shot SVM: mAP (%) over images per class", "lowshot", "k", "map"),
    ):
        if _curve(results, protocol, prefix, unit):
            panels.append((title, partial(_draw_curves, protocol=protocol, prefix=prefix, unit=unit)))
    for title, protocol, unit in (
        ("linear probe: top-1 (%) by level", "levels", "top1"),
        ("SVM: mAP (%) by level", "svm", "map"),
        ("low-shot SVM: mAP (%) by level", "lowshot", "map"),
    ):
        if any(_levels(found.get(protocol, {}), unit) for found in results.values()):
            panels.append((title, partial(_draw_levels, protocol=protocol, unit=unit)))
    columns = min(2, max(1, len(panels)))
    rows = max(1, -(-len(panels) // columns))
    legend_rows = -(-len(results) // columns) if len(results) > 1 else 0
    size = (5.2 * columns + 0.6, 3.4 * rows + 0.28 * legend_rows + 0.2)
    figure = Figure(figsize=size, dpi=120, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12))
    axes = None
    for i, (title, draw) in enumerate(panels):
        axes = figure.add_subplot(rows, columns, i + 1)
        draw(axes, results)
        axes.set_title(title, loc="left", fontsize=11)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25, linewidth=0.6)
        axes.set_axisbelow(True)
    if axes is not None and len(results) > 1:
        handles = [
            figure.axes[0].scatter([], [], color=colour, marker="s", s=36, label=label)
            for label, colour in zip(results, _colours(results), strict=True)
        ]
        figure.legend(handles=handles, loc="outside upper left", ncols=columns, frameon=False, fontsize=9)
    elif axes is not None:
        figure.suptitle(next(iter(results)), x=0.02, ha="left", fontsize=11)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def _colours(results: Results) -> list[str]:
    return [_COLOURS[i % len(_COLOURS)] for i in range(len(results))]


def _bars(results: Results) -> dict[str, dict[str, float]]:
    """{what: {label: value}} of the scores that are one number."""
    wanted = {
        "kNN\nk = 20": ("knn", "k20_top1"),
        "linear\nprobe": ("linear", "top1"),
        "SVM": ("svm", "full_map"),
        "fine-tuned": ("finetune", "top1"),
    }
    parts = {n for found in results.values() for n in found.get("semi", {}) if n.endswith("_top1")}
    wanted |= {
        f"fine-tuned,\n{name.removesuffix('_top1').replace('pct', ' %')}": ("semi", name)
        for name in sorted(parts, key=lambda name: (len(name), name))
    }
    bars = {}
    for title, (protocol, name) in wanted.items():
        values = {label: found[protocol][name] for label, found in results.items() if name in found.get(protocol, {})}
        if values:
            bars[title] = values
    return bars


def _draw_bars(axes: Axes, results: Results) -> None:
    bars, width = _bars(results), 0.8 / len(results)
    for i, (label, colour) in enumerate(zip(results, _colours(results), strict=True)):
        at = [j - 0.4 + (i + 0.5) * width for j, values in enumerate(bars.values()) if label in values]
        heights = [values[label] for values in bars.values() if label in values]
        drawn = axes.bar(at, heights, width * 0.92, color=colour)
        if len(results) * len(bars) <= 16:
            axes.bar_label(drawn, fmt="%.1f", fontsize=7, padding=1)
    axes.set_xticks(range(len(bars)), list(bars))
    axes.set_ylim(0, 108)


def _curve(
    results: Results, protocol: str, prefix: str, unit: str
) -> dict[str, tuple[list[int], list[float], list[float]]]:
    """{label: (k, values, standard deviations)}."""
    curves = {}
    for label, found in results.items():
        scores = found.get(protocol, {})
        ks = sorted(
            int(head[len(prefix) :])
            for head, _, kind in (name.rpartition("_") for name in scores)
            if kind == unit and head.startswith(prefix) and head[len(prefix) :].isdigit()
        )
        if ks:
            names = [f"{prefix}{k}_{unit}" for k in ks]
            curves[label] = (ks, [scores[n] for n in names], [scores.get(f"{n}_std", 0.0) for n in names])
    return curves


def _draw_curves(axes: Axes, results: Results, protocol: str, prefix: str, unit: str) -> None:
    curves = _curve(results, protocol, prefix, unit)
    for label, colour in zip(results, _colours(results), strict=True):
        if label in curves:
            ks, values, spread = curves[label]
            axes.plot(ks, values, color=colour, marker="o", markersize=4, linewidth=1.6)
            low, high = zip(*((v - s, v + s) for v, s in zip(values, spread, strict=True)), strict=True)
            axes.fill_between(ks, low, high, color=colour, alpha=0.15, linewidth=0)
    ticks = sorted({k for ks, _, _ in curves.values() for k in ks})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, list(map(str, ticks)))
    axes.minorticks_off()
    axes.set_xlabel("k", fontsize=9)


def _levels(scores: Mapping[str, float], unit: str) -> dict[str, float]:
    """{level: value}; without what is not of a level."""
    found = {}
    for name, value in scores.items():
        level, _, kind = name.rpartition("_")
        if kind == unit and level and level != "full" and not (level[0] == "k" and level[1:].isdigit()):
            found[level] = value
    return found


def _draw_levels(axes: Axes, results: Results, protocol: str, unit: str) -> None:
    """Over the levels' names, or, where networks have different ones, over the depth."""
    found = [_levels(result.get(protocol, {}), unit) for result in results.values()]
    kinds = list(dict.fromkeys(tuple(levels) for levels in found if levels))
    for levels, colour in zip(found, _colours(results), strict=True):
        last = len(levels) - 1 if len(kinds) > 1 and len(levels) > 1 else 1
        at = [i / last for i in range(len(levels))]
        axes.plot(at, list(levels.values()), color=colour, marker="o", markersize=4, linewidth=1.6)
    if len(kinds) > 1:
        axes.set_xticks([0, 1], ["first level", "features"])
        axes.set_xlabel("depth", fontsize=9)
    else:
        axes.set_xticks(range(len(kinds[0])), kinds[0], rotation=45 if len(kinds[0]) > 6 else 0)
