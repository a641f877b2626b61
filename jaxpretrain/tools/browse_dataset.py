"""Draws what training sees: `python -m jaxpretrain.tools.browse_dataset --config=configs/simclr.py:digits [--mode=pipeline]`.

Writes one PNG for each sample, and a contact sheet of all. The pictures are those of a training with the same config, seed
and epoch, sample by sample; only partners of Mixup and its kin are others. Modes: `original`, as the data set has it;
`transformed`, as the method gets it; `concat`, both; `pipeline`, what each transform makes of it.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import UInt8

from jaxpretrain import cli
from jaxpretrain.build import ConfigError, nearest
from jaxpretrain.config import load_config

if TYPE_CHECKING:
    from jaxpretrain.data.stages import Stage, Trace, Tracer

MODES = ("original", "transformed", "concat", "pipeline")
FLAGS = {
    "config": "recipe: configs/simclr.py:digits",
    "split": "train (default), val, or another split of config.data",
    "mode": f"{', '.join(MODES)} (default: transformed)",
    "num": "how many samples (default: 16)",
    "indices": "which samples, such as 0,5,17 (default: the first of the epoch; of val evenly spread ones)",
    "epoch": "of training (default: 0, the first)",
    "output-dir": "folder for the pictures (default: browse)",
    "rescale-factor": "enlarges pictures by this, or makes them smaller (default: to about 224 pixels)",
    "skip-type": "transforms to leave out, such as RandomErasing,Mixup",
    "channel-order": "rgb (default), or bgr where a transform of your own gives that",
    "show-interval": "seconds between two pictures in the window (default: 2)",
    "phase": "as --split",
    "show-number": "as --num",
}
SWITCHES = {"show": "show the pictures in a window too", "not-show": "do not (default)"}


def main(argv: list[str]) -> int:
    parsed = cli.parse(argv, FLAGS, SWITCHES, __doc__ or "")
    flags = parsed.values
    if "config" not in flags:
        raise ConfigError("--config is needed, e.g. --config=configs/simclr.py:digits")
    mode, order = flags.get("mode", "transformed"), flags.get("channel-order", "rgb").lower()
    for name, value, valid in (("mode", mode, MODES), ("channel-order", order, ("rgb", "bgr"))):
        if value not in valid:
            raise ConfigError(f"--{name}={value} does not exist.{nearest(value, valid)}")
    show = bool(flags.get("show")) and not flags.get("not-show")
    if show and not _has_display():
        raise ConfigError("--show: there is no display here; leave it out, the pictures are written in any case")
    from jaxpretrain.data.stages import Tracer
    from jaxpretrain.visualize.reconstructions import save_png
    from jaxpretrain.visualize.stages import contact_sheet, draw_card

    split = flags.get("split", flags.get("phase", "train"))
    skip = tuple(name.strip() for name in flags.get("skip-type", "").split(",") if name.strip())
    tracer = Tracer(load_config(flags["config"], parsed.overrides), split, skip)
    epoch = int(flags.get("epoch", 0)) if split == "train" else 0
    samples = chosen(tracer, flags, epoch)
    factor = float(flags["rescale-factor"]) if "rescale-factor" in flags else None
    traces = tracer(samples, epoch)
    if len(traces) < len(samples):
        missing = sorted({index for index, _ in samples} - {trace.index for trace in traces})
        print(f"cannot be decoded, of {len(samples)} samples: {', '.join(map(str, missing))}", file=sys.stderr)
    if not traces:
        raise ConfigError("none of the samples can be decoded")
    folder, cards = Path(flags.get("output-dir", "browse")), []
    for trace in traces:
        rows = layout(trace, mode)
        if order == "bgr":
            rows = [[p and dataclasses.replace(p, image=p.image[..., ::-1]) for p in row] for row in rows]
        classes = getattr(tracer.source, "classes", None)
        cards.append(draw_card(rows, caption(trace, classes), note(trace, split), factor))
        again = f"_{trace.repeat}" if trace.repeat else ""
        print(save_png(folder / f"{trace.index:06d}{again}.png", cards[-1]))
    print(save_png(folder / "contact_sheet.png", contact_sheet(cards)))
    if show:
        _show(cards, float(flags.get("show-interval", 2)))
    return cli.OK


def chosen(tracer: Tracer, flags: Mapping[str, str], epoch: int) -> list[tuple[int, int]]:
    """(index, repeat) of the samples that the flags ask for."""
    if "indices" in flags:
        length, indices = len(tracer.source), [int(number) for number in flags["indices"].split(",")]
        if min(indices) < 0 or max(indices) >= length:
            raise ConfigError(f"--indices={flags['indices']}: there are {length} samples, 0 to {length - 1}")
        return [(index, 0) for index in indices]
    count = int(flags.get("num", flags.get("show-number", 16)))
    if count < 1 or not len(tracer.source):
        raise ConfigError(f"--num={count} must be at least 1, of a data set that is not empty ({tracer.source!r})")
    return tracer.samples(count, epoch)


def layout(trace: Trace, mode: str) -> list[Stage]:
    """Rows of pictures. Stages of a single view go from left to right, of several from top to bottom, a column for each."""
    original, final = trace.stages[0], trace.final()
    if mode != "pipeline":
        return [[*(original if mode != "transformed" else ()), *(final if mode != "original" else ())]]
    rows = list(trace.stages)
    if final[-1].mask is not None and (rows[-1][0] is None or rows[-1][0].mask is None):
        rows.append([final[-1]])
    if max(map(len, rows)) == 1:
        return [list(itertools.chain(*rows))]
    return rows


def caption(trace: Trace, classes: Sequence[str] | None) -> str:
    """The label in words; the largest shares of a mixed one."""
    if trace.mixed is not None:
        order = np.argsort(-trace.mixed, kind="stable")[:3]
        return ", ".join(f"{trace.mixed[k]:.0%} {_class(k, classes)}" for k in order if trace.mixed[k] >= 0.005)
    return _words(trace.label, classes)


def note(trace: Trace, split: str) -> str:
    """Which sample it is, and when."""
    parts = [trace.name.rpartition("/")[2], f"{split} {trace.index}"]
    parts += [f"epoch {trace.epoch}"] if split == "train" else []
    parts += [f"repeat {trace.repeat}"] if trace.repeat else []
    return ", ".join(parts)


def _words(label: Any, classes: Any) -> str:
    if isinstance(label, Mapping):
        own = classes if isinstance(classes, Mapping) else {}
        return ", ".join(f"{task}: {_words(value, own.get(task))}" for task, value in label.items())
    if np.ndim(label):
        names = [_class(int(k), classes) + ("" if label[k] > 0 else " (difficult)") for k in np.flatnonzero(label)]
        return ", ".join(names) or "no class"
    return _class(int(label), classes) if label >= 0 else "no label"


def _class(label: int, classes: Any) -> str:
    name = classes[label] if classes is not None and label < len(classes) else ""
    return f"{label}: {name}" if name and name != str(label) else f"class {label}"


def _has_display() -> bool:
    return not sys.platform.startswith("linux") or any(map(os.environ.get, ("DISPLAY", "WAYLAND_DISPLAY")))


def _show(cards: Sequence[UInt8[np.ndarray, "h w 3"]], seconds: float) -> None:
    """In the system's viewer, one after the other."""
    from PIL import Image

    for i, card in enumerate(cards):
        if i:
            time.sleep(seconds)
        Image.fromarray(card).show()


if __name__ == "__main__":
    sys.exit(cli.run(main))
