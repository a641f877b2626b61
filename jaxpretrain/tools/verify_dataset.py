"""Finds images that cannot be read: `python -m jaxpretrain.tools.verify_dataset DATA [--fix]`.

Reads and decodes every image of a data set. What is bad is written to a list as it is found, a line `path<TAB>reason` each;
a run that was interrupted goes on where it was. `--fix` moves bad files to a folder beside the data, where they keep their
relative paths; nothing is ever deleted. The exit status is 1 if there are bad images (that are still in their place), else 0.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxpretrain import cli
from jaxpretrain.build import ConfigError
from jaxpretrain.data.decode import BadImage, as_rgb
from jaxpretrain.tools.sweep import DATA_FLAGS, DATA_HELP, Log, fingerprint, number, open_data, progress, sweep

FLAGS = {
    **DATA_FLAGS,
    "out-file": "the list of bad images (default: bad_images.txt); how far it is, is in OUT_FILE.log",
    "bad-folder": "where --fix moves files (default: the folder of the data with _bad added)",
}
SWITCHES = {"fix": "move bad files aside", "restart": "begin anew instead of where the last run ended"}

_KINDS = {  # extension -> the format that it promises
    **dict.fromkeys((".jpg", ".jpeg", ".jpe", ".jfif"), "JPEG"),
    **dict.fromkeys((".tif", ".tiff"), "TIFF"),
    **{f".{kind.lower()}": kind for kind in ("PNG", "GIF", "BMP", "WEBP")},
}
_MAGIC = {b"\xff\xd8\xff": "JPEG", b"\x89PNG": "PNG", b"GIF8": "GIF", b"BM": "BMP", b"II*\0": "TIFF", b"MM\0*": "TIFF"}


class Inspect:
    """Looks at sample `index` of a source: None if all is well; else a dict of `index`, `name`, and `reason` if it is bad,
    or `note` if it is only odd."""

    def __init__(self, source: Any):
        self.source = source

    def __call__(self, index: int) -> dict[str, Any] | None:
        try:
            sample = self.source[index]
            np.asarray(as_rgb(sample["image"]))  # a lazy image is read now
        except Exception as error:  # whatever it is: a tool that looks for what is broken must not break by it
            reason = str(error) if isinstance(error, BadImage) else f"{type(error).__name__}: {error}"
            if isinstance(error, OSError):
                reason = f"{type(error).__name__}: {error.strerror or error}"
            return {"index": index, "name": self._name(index), "reason": reason}
        note = wrong_extension(sample["image"], sample.get("path") or "")
        return {"index": index, "name": self._name(index), "note": note} if note else None

    def _name(self, index: int) -> str:
        return self.source.name(index) if hasattr(self.source, "name") else f"sample {index}"


def wrong_extension(image: Any, path: str) -> str:
    """A remark if an encoded image is of another format than its file name says; empty if all is well."""
    promised = _KINDS.get(os.path.splitext(path)[1].lower())
    if not promised or not isinstance(image, bytes):
        return ""
    kind = "WEBP" if image[:4] == b"RIFF" and image[8:12] == b"WEBP" else None
    kind = next((kind for magic, kind in _MAGIC.items() if image.startswith(magic)), kind)
    return f"the name says {promised}, the contents are {kind}" if kind and kind != promised else ""


def verify(
    config: Mapping[str, Any], source: Any, out: Path, *, workers: int = 0, threads: int = 0, restart: bool = False
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(bad images, odd ones) of a data set, as `Inspect` tells them; goes on where an earlier call ended.

    Args:
        config, source: the data set.
        out: the list of bad images. `<out>.log` holds how far it is.
        workers, threads: see `sweep`.
        restart: begin anew.
    """
    log = open_log(config, source, out, restart)
    if log.finished and not restart:
        log.close()
        log = open_log(config, source, out, True)
    done = max((record["done"] for record in log.records if "done" in record), default=0)
    found = [record for record in log.records if record.get("index", done) < done]
    if done:
        print(f"going on at image {done} of {len(source)}")
    out.parent.mkdir(parents=True, exist_ok=True)
    with (
        open(out, "w", encoding="utf-8", errors="surrogateescape") as lines,
        progress(len(source), "read", done) as bar,
    ):
        lines.writelines(_lines(found))
        for numbers, results in sweep(Inspect(source), range(done, len(source)), workers=workers, threads=threads):
            new = [result for result in results if result]
            for result in new:
                log.write(**result)
            log.write(done=numbers[-1] + 1)
            lines.writelines(_lines(new))
            lines.flush()
            found += new
            bar.update(len(numbers))
            bar.set_postfix(bad=sum("reason" in result for result in found), refresh=False)
    log.write(finished=True)
    log.close()
    return [r for r in found if "reason" in r], [r for r in found if "note" in r]


def open_log(config: Mapping[str, Any], source: Any, out: Path, restart: bool = False) -> Log:
    """The log that belongs to a list of bad images; one of work that is finished gives way to new work."""
    path = out.with_name(out.name + ".log")
    work = {"tool": "verify_dataset", **fingerprint(config, source)}
    return Log(path, work, restart or Log.is_finished(path, but=work))


def _lines(found: list[dict[str, Any]]) -> Iterator[str]:
    for result in found:
        if "reason" in result:
            yield f"{result['name']}\t{' '.join(result['reason'].split())}\n"


def move_aside(found: list[dict[str, Any]], source: Any, root: str, folder: str) -> list[dict[str, Any]]:
    """Moves the files of bad images from `root` to `folder`, where they keep their relative paths; each is looked at again
    before. The bad images that stay: they are no files, but parts of one, or cannot be moved.

    `<folder>/moved.txt` lists where each was and is. Raises ConfigError if `folder` lies inside `root`.
    """
    root, folder = os.path.realpath(root), os.path.realpath(folder)
    if f"{folder}/".startswith(f"{root}/"):
        raise ConfigError(f"--bad-folder={folder} lies inside the data, {root}, and would be read as a part of it")
    stay, inspect = [], Inspect(source)
    for result in found:
        again = inspect(result["index"])
        if again is None or "reason" not in again:
            continue  # repaired in the meantime
        path = os.path.abspath(result["name"])
        if not os.path.isfile(path):
            stay.append(result)
            continue
        # By the folder's real path, but not the file's own: a link is moved, not what it points to.
        path = os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
        inside = f"{path}".startswith(f"{root}/")
        target = os.path.join(folder, os.path.relpath(path, root) if inside else path.lstrip("/"))
        copy, target_free = 0, target
        while os.path.lexists(target_free):  # of an earlier time; never written over
            copy += 1
            target_free = f"{target}.{copy}"
        try:
            os.makedirs(os.path.dirname(target_free), exist_ok=True)
            shutil.move(path, target_free)
        except OSError as error:
            stay.append({**result, "reason": f"{result['reason']}; cannot be moved: {error.strerror or error}"})
            continue
        with open(os.path.join(folder, "moved.txt"), "a", encoding="utf-8", errors="surrogateescape") as moved:
            moved.write(f"{path}\t{target_free}\n")
    return stay


def data_root(config: Any) -> str | None:
    """The first data_root in the configuration of a data set, also inside others."""
    if isinstance(config, Mapping):
        if isinstance(config.get("data_root"), str):
            return os.path.expanduser(config["data_root"]) or "."
        config = list(config.values())
    roots = (data_root(value) for value in config) if isinstance(config, list | tuple) else ()
    return next((root for root in roots if root), None)


def main(argv: list[str]) -> int:
    given, rest = cli.positional(argv, FLAGS)
    flags = cli.parse(rest, FLAGS, SWITCHES, f"{__doc__}\n{DATA_HELP}\n")
    config, source = open_data(given, flags)
    out = Path(flags.values.get("out-file", "bad_images.txt"))
    workers, threads = number(flags, "num-workers", 0), number(flags, "num-threads", 0)
    if flags.fix and not flags.restart and (log := open_log(config, source, out)).finished:
        log.close()
        bad, odd = [r for r in log.records if "reason" in r], [r for r in log.records if "note" in r]
        print(f"{out}.log says what is bad; nothing else is read again")
    else:
        bad, odd = verify(config, source, out, workers=workers, threads=threads, restart=bool(flags.restart))
    for result in odd[:10]:
        print(f"note: {result['name']}: {result['note']}")
    if len(odd) > 10:
        print(f"note: {len(odd) - 10} more like these are in {out}.log")
    print(f"{len(source)} images, {len(bad)} bad ({len(bad) / len(source):.3%}){f'; see {out}' if bad else ''}")
    if bad and flags.fix:
        root = data_root(config) or os.path.dirname(os.path.abspath(bad[0]["name"]))
        folder = flags.values.get("bad-folder") or os.path.realpath(root) + "_bad"
        stay = move_aside(bad, source, root, folder)
        print(f"{len(bad) - len(stay)} moved to {folder} or good by now")
        os.replace(f"{out}.log", f"{out}.log.fixed")  # of a data set that is no more
        for result in stay[:10]:
            print(f"stays: {result['name']}: {result['reason']}")
        if "ann_file" in str(config) and len(stay) < len(bad):
            print("note: the list of images (ann_file) still names the files that were moved")
        bad = stay
    return cli.FAILED if bad else cli.OK


if __name__ == "__main__":
    sys.exit(cli.run(main))
