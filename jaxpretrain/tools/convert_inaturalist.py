"""iNaturalist's json files as lists: `python -m jaxpretrain.tools.convert_inaturalist data/inaturalist2018`.

Reads `train2018.json` and `val2018.json` (or `<split><year>.json` of another year) from the folder, and writes
`meta/train.txt` and `meta/val.txt`, lines of `path label` for `ann_file`, and `meta/classes.txt`. Paths are as in the json
files, relative to the folder: `train_val2018/Plantae/7477/<hash>.jpg`.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxpretrain import cli
from jaxpretrain.build import ConfigError

FLAGS = {
    "out-folder": "where the lists go (default: FOLDER/meta)",
    "strip": "take this from the beginning of the paths, for images in another place: train_val2018/",
}


def main(argv: list[str]) -> int:
    given, rest = cli.positional(argv, FLAGS)
    flags = cli.parse(rest, FLAGS, usage=__doc__ or "")
    if len(given) != 1 or not os.path.isdir(given[0]):
        raise ConfigError("Give the folder with train2018.json and val2018.json; --help says more")
    root = Path(given[0])
    files = {m[1]: file for file in sorted(root.glob("*.json")) if (m := re.fullmatch(r"(train|val)\d{4}", file.stem))}
    if not files:
        has = ", ".join(sorted(os.listdir(root))[:10]) or "nothing"
        raise ConfigError(f"{root.absolute()} has no train2018.json or val2018.json; it has {has}")
    out, strip = Path(flags.values.get("out-folder") or root / "meta"), flags.strip or ""
    out.mkdir(parents=True, exist_ok=True)
    for split, file in files.items():
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            lines, names = image_list(content, strip)
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"{file} is not a json file of iNaturalist: {type(error).__name__} {error}") from error
        (out / f"{split}.txt").write_text("".join(f"{path} {label}\n" for path, label in lines), encoding="utf-8")
        print(f"{out / split}.txt: {len(lines)} images of {len({label for _, label in lines})} classes")
        if names:
            (out / "classes.txt").write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
        missing = sum(not (root / strip / path).is_file() for path, _ in lines[:100])
        if missing:
            print(f"note: {missing} of its first {min(100, len(lines))} images are not under {root / strip}")
    return cli.OK


def image_list(content: Mapping[str, Any], strip: str = "") -> tuple[list[tuple[str, int]], list[str]]:
    """([(path, label)] in the order of the images, names of the classes) of a json file in COCO's form.

    Labels are the categories' ids where those are 0, 1, 2, ..., as in 2018, else their places in the order of the ids.

    Raises:
        ConfigError: an image without a category, or outside `strip`.
    """
    ids = sorted(category["id"] for category in content.get("categories", ()))
    ids = ids or sorted({annotation["category_id"] for annotation in content["annotations"]})
    if "categories" not in content:  # a split may lack classes, so places among those it has would mean nothing
        ids = list(range(ids[-1] + 1))
    labels = {number: label for label, number in enumerate(ids)}
    by_image = {annotation["image_id"]: labels[annotation["category_id"]] for annotation in content["annotations"]}
    lines = []
    for image in content["images"]:
        path = image["file_name"]
        if image["id"] not in by_image:
            raise ConfigError(f"image {path} has no annotation; the lists of test splits have no labels")
        if not path.startswith(strip):
            raise ConfigError(f"--strip={strip}: the path {path} does not begin with it")
        lines.append((path.removeprefix(strip), by_image[image["id"]]))
    named = {category["id"]: category.get("name", str(category["id"])) for category in content.get("categories", ())}
    return lines, [named[number] for number in ids] if named else []


if __name__ == "__main__":
    sys.exit(cli.run(main))
