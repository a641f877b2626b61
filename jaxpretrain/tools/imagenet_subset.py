"""Lists of a part of ImageNet's labels: `python -m jaxpretrain.tools.imagenet_subset DATA_ROOT --fraction=0.01`.

Writes lines of `path label` for `ann_file`: a fraction of each class, drawn by a seed, or the images of SimCLR's published
lists of 1 % and 10 % (`--names=1percent`, `--names=10percent`, a file or a URL with one image per line).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from jaxpretrain import cli
from jaxpretrain.build import ConfigError
from jaxpretrain.data.subset import Subset, labels_of
from jaxpretrain.tools.sweep import open_data

PUBLISHED = {
    name: f"https://raw.githubusercontent.com/google-research/simclr/master/imagenet_subsets/{name}.txt"
    for name in ("1percent", "10percent")
}

FLAGS = {
    "split": "of the data (default: train)",
    "type": "of the data set in DATA_ROOT: ImageNet (default), CustomDataset, ...",
    "fraction": "of each class: 0.01, 0.1, ...",
    "seed": "of the draw (default: 0); of one seed, smaller fractions are parts of larger ones",
    "names": "instead of a fraction: 1percent or 10percent (SimCLR's), or a file or URL that lists the images",
    "out-file": "the list to write (default: DATA_ROOT/meta/SPLIT_<fraction>percent.txt)",
}
SWITCHES = {"rest": "list all other images instead"}


def main(argv: list[str]) -> int:
    given, rest = cli.positional(argv, FLAGS)
    flags = cli.parse(rest, FLAGS, SWITCHES, __doc__ or "")
    flags.values.setdefault("type", "ImageNet")
    if flags.type != "CustomDataset":
        flags.values.setdefault("split", "train")
    config, source = open_data(given, flags)
    names = flags.names
    if names in PUBLISHED or "://" in (names or ""):
        from jaxpretrain.zoo.download import download

        names = str(download(PUBLISHED.get(names, names)))
    fraction = _fraction(flags.fraction)
    part = Subset(source, fraction, int(flags.values.get("seed", 0)), names, bool(flags.rest))
    root = config["data_root"]
    base = getattr(source, "root", root)
    out = Path(flags.values.get("out-file") or Path(root, "meta", f"{flags.split or 'part'}_{_label(flags)}.txt"))
    out.parent.mkdir(parents=True, exist_ok=True)
    labels = np.asarray(labels_of(part))
    with open(out, "w", encoding="utf-8", errors="surrogateescape") as lines:
        for row in range(len(part)):
            lines.write(f"{os.path.relpath(part.name(row), base)} {labels[row]}\n")
    print(f"{out}: {len(part)} of {len(source)} images, {len(np.unique(labels))} classes")
    options: dict[str, Any] = dict(type=config["type"], data_root=root, ann_file=os.path.relpath(out, root))
    if (prefix := os.path.relpath(base, root)) != ".":
        options["data_prefix"] = prefix
    print("dataset = dict(" + ", ".join(f"{name}={value!r}" for name, value in options.items()) + ")")
    return cli.OK


def _fraction(text: str | None) -> float | None:
    try:
        return float(text) if text is not None else None
    except ValueError:
        raise ConfigError(f"--fraction={text} must be a number above 0 and at most 1") from None


def _label(flags: cli.Flags) -> str:
    name = Path(flags.names).stem if flags.names else f"{100 * float(flags.fraction):g}percent"
    return name + ("_rest" if flags.rest else "")


if __name__ == "__main__":
    sys.exit(cli.run(main))
