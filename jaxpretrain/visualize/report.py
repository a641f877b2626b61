"""One page that shows a whole run: report.html, with everything inside it."""

from __future__ import annotations

import base64
import json
import os
import platform
import re
from collections.abc import Iterable
from html import escape
from importlib import metadata
from pathlib import Path
from typing import Any

from jaxpretrain.visualize.curves import (
    Record,
    is_choice,
    is_number,
    is_percent,
    plot_curves,
    read_metrics,
    score_names,
    series,
)

# Names under which a metrics record may hold images per second and seconds of training.
_SPEED = ("images_per_second", "images_per_s", "images_per_sec", "images/s", "img/s")
_SECONDS = ("train_seconds", "train_time", "wall_time", "wall_s", "elapsed", "elapsed_s", "time")

_STYLE = """
:root { color-scheme: light dark; --paper: #fbfbf9; --ink: #22262b; --soft: #69717b; --line: #dcdfe3; --card: #ffffff;
  --good: #2c7a4b; --bad: #b3452f; }
@media (prefers-color-scheme: dark) { :root { --paper: #16191d; --ink: #e4e7ea; --soft: #98a1ab; --line: #333a42;
  --card: #1e2329; --good: #6cc08b; --bad: #e58b76; } }
body { margin: 0 auto; max-width: 62rem; padding: 2rem 1.25rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2.5rem 0 .75rem; }
p.sub, figcaption, dt, th { color: var(--soft); }
p.sub { margin: .25rem 0 0; }
dl.tiles { display: flex; flex-wrap: wrap; gap: .75rem; margin: 1.5rem 0 0; }
dl.tiles div { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .6rem 1rem; }
dt { font-size: .85rem; } dd { margin: 0; } dl.tiles dd { font-size: 1.25rem; }
div.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem 1.5rem .35rem 0; border-bottom: 1px solid var(--line); text-align: right;
  font-weight: normal; }
th:first-child, td:first-child { text-align: left; }
td.up { color: var(--good); } td.down { color: var(--bad); } td.trained { font-weight: 600; }
figure { margin: 0; } div.pictures { display: flex; flex-wrap: wrap; gap: 1.5rem; align-items: flex-start; }
img { max-width: 100%; height: auto; border-radius: 8px; border: 1px solid var(--line); }
figcaption { font-size: .9rem; margin-bottom: .4rem; }
dl.facts { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.5rem; margin: 0; }
details { border: 1px solid var(--line); border-radius: 8px; background: var(--card); padding: .6rem 1rem; }
summary { cursor: pointer; } pre { overflow-x: auto; font-size: .85rem; line-height: 1.4; }
"""


def write_report(workdir: str | Path) -> Path:
    """Writes `workdir/report.html`: scores of the untrained and the trained network, curves, pictures, speed, settings.

    The page needs no other file and no network. It draws the curves anew (`pictures/curves.png`) and takes what else it
    finds: config.json, environment.json (else the present environment), pictures/*.png. What is missing is left out.

    Args:
        workdir: of a run that has logged something.

    Returns:
        the path of the page. Raises ConfigError if there is no metrics.jsonl, or nothing in it.
    """
    workdir = Path(workdir)
    records = read_metrics(workdir)
    curves = plot_curves(workdir)
    config_text, config = _read_config(workdir)
    title, subtitle = _title(workdir, config)
    sections = [
        f"<header><h1>{escape(title)}</h1><p class=sub>{escape(subtitle)}</p></header>",
        _tiles(_summary(records)),
        _section("Scores, untrained and trained", _scores(records)),
        _section("Curves", _figure(curves, "")),
        _section("Pictures", _pictures(workdir / "pictures", skip=curves)),
        _section("Environment", _facts(_environment(workdir))),
        _section("Settings", _details("config.json", config_text)),
    ]
    body = "\n".join(sections)
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )
    # Beside its place first, so that a reader, or a full disk, never meets half a page.
    path, partial = workdir / "report.html", workdir / ".report.html.partial"
    partial.write_text(page, encoding="utf-8")
    os.replace(partial, path)
    return path


def environment() -> dict[str, str]:
    """Versions and devices of this process."""
    import jax

    def version(package: str) -> str:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return "not installed"

    devices, processes = jax.devices(), jax.process_count()
    return {
        "devices": f"{len(devices)} x {devices[0].device_kind}" + (f", {processes} processes" if processes > 1 else ""),
        "jax": version("jax"),
        "flax": version("flax"),
        "jaxpretrain": version("jaxpretrain"),
        "Python": platform.python_version(),
        "system": platform.platform(),
    }


# ------------------------------------------------------------------------------------------------ what is on the page


def _read_config(workdir: Path) -> tuple[str, dict[str, Any]]:
    """(text, fields) of config.json; the text alone where it cannot be parsed, nothing where there is none."""
    path = workdir / "config.json"
    if not path.is_file():
        return "", {}
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        config = json.loads(text)
    except json.JSONDecodeError:
        return text, {}
    return json.dumps(config, indent=2), config if isinstance(config, dict) else {}


def _title(workdir: Path, config: dict[str, Any]) -> tuple[str, str]:
    method = config.get("method")
    method = method.get("type") if isinstance(method, dict) else method
    recipe = config.get("recipe")
    title = ": ".join(str(part) for part in (method, recipe) if part) or workdir.resolve().name
    return title, str(workdir)


def _summary(records: list[Record]) -> dict[str, str]:
    """The figures at the head of the page."""
    train = [r for r in records if r.get("phase", "train") == "train"]
    facts = {}
    if train:
        facts["steps"] = f"{train[-1]['step']:,}"
        if is_number(train[-1].get("epoch")):
            facts["epochs"] = f"{train[-1]['epoch']:.4g}"
    loss = series(records, "loss", "train")[1]
    if len(loss):
        facts["loss, first to last"] = f"{loss[0]:.4g} → {loss[-1]:.4g}"
    seconds = _first_series(records, _SECONDS)
    if len(seconds):
        facts["training time"] = _duration(seconds[-1])
    speed = _first_series(records, _SPEED)
    if len(speed):
        # The median: the first records hold the compilation.
        facts["images per second"] = f"{sorted(speed)[len(speed) // 2]:,.0f}"
    return facts


def _first_series(records: list[Record], names: Iterable[str]) -> list[float]:
    return next((list(values) for name in names if len(values := series(records, name, "train")[1])), [])


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


def _scores(records: list[Record]) -> str:
    """Each score before training (step 0) and at the last evaluation."""
    rows = []
    for name in score_names(records):
        steps, values = series(records, name, "eval")
        before = values[0] if steps[0] == 0 else None
        after = values[-1] if steps[-1] > 0 else None
        change, side = "", ""
        if before is not None and after is not None and is_percent(name):
            change, side = f"{after - before:+.1f}", "up" if after >= before else "down"
        unit = " (%)" if is_percent(name) else " (chosen)" if is_choice(name) else ""
        rows.append(
            f"<tr><td>{escape(name)}{unit}</td><td>{_number(before, name)}</td>"
            f"<td class=trained>{_number(after, name)}</td><td class='{side}'>{change}</td></tr>"
        )
    if not rows:
        return ""
    head = "<tr><th>score</th><th>untrained</th><th>trained</th><th>change</th></tr>"
    return f"<div class=scroll><table>{head}{''.join(rows)}</table></div>"


def _number(value: float | None, name: str) -> str:
    return "–" if value is None else f"{value:.1f}" if is_percent(name) else f"{value:.4g}"


def _pictures(folder: Path, skip: Path) -> str:
    """Of pictures NAME_STEP.png the first and the last step; NAME.png, the latest, only where there are no steps."""
    series_of: dict[str, dict[int, Path]] = {}
    for path in sorted(folder.glob("*.png")):
        if path == skip:
            continue
        match = re.fullmatch(r"(.+)_(\d+)", path.stem)
        name, step = (match[1], int(match[2])) if match else (path.stem, -1)
        series_of.setdefault(name, {})[step] = path
    figures = []
    for name, by_step in sorted(series_of.items()):
        steps = sorted(step for step in by_step if step >= 0)
        if not steps:
            figures.append(_figure(by_step[-1], name.replace("_", " ")))
        for step in dict.fromkeys(steps[:1] + steps[-1:]):
            label = "untrained" if step == 0 else f"step {step:,}"
            figures.append(_figure(by_step[step], f"{name.replace('_', ' ')}, {label}"))
    return f"<div class=pictures>{''.join(figures)}</div>" if figures else ""


def _environment(workdir: Path) -> dict[str, str]:
    path = workdir / "environment.json"
    try:
        return {str(key): str(value) for key, value in json.loads(path.read_text()).items()}
    except (OSError, ValueError, AttributeError):
        return environment()


# ------------------------------------------------------------------------------------------------ HTML


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>" if body else ""


def _tiles(facts: dict[str, str]) -> str:
    tiles = "".join(f"<div><dt>{escape(key)}</dt><dd>{escape(value)}</dd></div>" for key, value in facts.items())
    return f"<dl class=tiles>{tiles}</dl>" if facts else ""


def _facts(facts: dict[str, str]) -> str:
    rows = "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in facts.items())
    return f"<dl class=facts>{rows}</dl>" if facts else ""


def _details(title: str, text: str) -> str:
    return f"<details><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>" if text else ""


def _figure(path: Path, caption: str) -> str:
    """The picture, inlined; nothing if it is not there."""
    if not path.is_file():
        return ""
    data = base64.b64encode(path.read_bytes()).decode()
    head = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f'<figure>{head}<img alt="{escape(caption or path.stem)}" src="data:image/png;base64,{data}"></figure>'
