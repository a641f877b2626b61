"""Plots schedules: `python -m jaxpretrain.tools.vis_scheduler --config=configs/mae.py:digits [--config.a.b=v ...]`.

Draws learning rate, weight decay and momentum of every group of parameters over all steps of a run, and prints what each
group has at the start, at its highest and at the end. Several recipes, given one after the other or separated by commas, go
into one plot. Nothing is trained; with --dataset-size or --steps-per-epoch no data set is needed.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxpretrain import cli
from jaxpretrain.build import ConfigError, build, nearest
from jaxpretrain.config import load_config, to_plain
from jaxpretrain.data.samplers import build_sampler, size_of
from jaxpretrain.optim.curves import GroupCurves, distinct, group_curves

NAMES = {"lr": "lr", "wd": "weight_decay", "weight_decay": "weight_decay", "momentum": "momentum"}
FLAGS = {
    "config": "recipe, or several: configs/mae.py,configs/simclr.py:digits",
    "parameter": "lr, wd, momentum, or several: lr,wd (default: all)",
    "dataset-size": "samples of one epoch (default: looks at the data set)",
    "steps-per-epoch": "optimizer steps of one epoch, in place of --dataset-size",
    "output": "the picture to write, .png, .pdf or .svg (default: schedule.png)",
    "title": "above the plot (default: the recipes)",
    "window-size": "width*height of the picture in inches, such as 12*7",
    "save-path": "as --output",
}


def main(argv: list[str]) -> int:
    specs, rest = cli.positional(argv, FLAGS)
    parsed = cli.parse(rest, FLAGS, usage=__doc__ or "")
    flags = parsed.values
    specs += [spec for spec in flags.get("config", "").split(",") if spec]
    if not specs:
        raise ConfigError("--config is needed, e.g. --config=configs/mae.py:digits")
    wanted = [name.strip() for name in flags.get("parameter", "lr,wd,momentum").split(",")]
    for name in wanted:
        if name not in NAMES:
            raise ConfigError(f"--parameter={name} does not exist.{nearest(name, NAMES)}")
    parameters = list(dict.fromkeys(NAMES[name] for name in wanted))
    from jaxpretrain.visualize.schedules import plot_schedules

    curves, steps = {}, {}
    for spec in specs:
        config, name = load_config(spec, parsed.overrides), spec.removeprefix("configs/").replace(".py:", ":")
        steps[name] = steps_per_epoch(config, flags)
        curves[name] = group_curves(config, steps[name])
        print(f"{name}: {len(curves[name][0].lr)} steps, {steps[name]} each epoch\n{table(curves[name], parameters)}")
    path = plot_schedules(
        curves,
        steps,
        parameters,
        flags.get("output", flags.get("save-path", "schedule.png")),
        flags.get("title", ", ".join(curves)),
        _size(flags.get("window-size")),
    )
    print(path)
    return cli.OK


def steps_per_epoch(config: Any, flags: Mapping[str, str]) -> int:
    """As the flags say, or by the size of the training set."""
    if "steps-per-epoch" in flags:
        steps = int(flags["steps-per-epoch"])
    elif "dataset-size" in flags:
        steps = int(flags["dataset-size"]) // config.batch_size
    else:
        train = to_plain(config.data.train)
        source = build(train["dataset"])
        order = build_sampler(train.get("sampler"), source, config.batch_size)
        steps = size_of(order, len(source)) // config.batch_size
    if steps < 1:
        raise ConfigError(f"an epoch has no step: it has fewer samples than batch_size={config.batch_size}")
    return steps


def table(groups: Sequence[GroupCurves], parameters: Sequence[str]) -> str:
    """A line for each curve: how many tensors and numbers it is for, the values at the start, highest, end."""
    lines = [f"  {'':<14}{'tensors':>8}{'numbers':>14}{'start':>12}{'highest':>12}{'end':>12}  the first of them"]
    for parameter in parameters:
        for curve in distinct(groups, parameter):
            values = curve.values[~np.isnan(curve.values)]
            asleep = len(curve.values) - len(values)
            values = values if len(values) else curve.values  # it sleeps to the end
            shown = "".join(f"{value:>12.4g}" for value in (values[0], values.max(), values[-1]))
            note = f", from step {asleep}" if asleep else ""
            lines.append(f"  {parameter:<14}{len(curve.names):>8}{curve.size:>14,}{shown}  {curve.names[0]}{note}")
    return "\n".join(lines)


def _size(text: str | None) -> tuple[float, float] | None:
    if text is None:
        return None
    try:
        width, height = map(float, text.split("*"))
    except ValueError:
        raise ConfigError(f"--window-size={text}: give width*height in inches, such as 12*7") from None
    return width, height


if __name__ == "__main__":
    sys.exit(cli.run(main))
