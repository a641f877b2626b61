"""Names of shards: braces, wildcards, folders and lists of these -> files."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence

from jaxpretrain.build import ConfigError, nearest


def expand_files(
    name: str, patterns: str | Sequence[str], data_root: str = "", extension: str = ".tar", split: str = ""
) -> list[str]:
    """The files that `patterns` mean.

    Args:
        name: of the data set, for messages.
        patterns: one or several: a file, `train-{000000..000146}.tar`, `{train,extra}*.tar`, or a folder, which stands for all
            files of `extension` in it and below. Wildcards and folders give names in order; nothing else is sorted.
        data_root: folder to which relative patterns refer.
        extension: of the files in folders, such as `.tar`.
        split: only files of this split, by `split_of`; empty for all.

    Raises:
        ConfigError: there are no such files.
    """
    files = []
    for given in [patterns] if isinstance(patterns, str) else patterns:
        if "://" in given or given.startswith("pipe:"):
            raise ConfigError(f"{name} reads local files; download {given} first")
        whole = os.path.join(os.path.expanduser(data_root), os.path.expanduser(given))
        for pattern in [whole] if os.path.exists(whole) else expand_braces(whole):
            if os.path.isdir(pattern):
                pattern = os.path.join(glob.escape(pattern), "**", f"*{extension}")
            elif os.path.isfile(pattern):
                pattern = glob.escape(pattern)
            found = [path for path in sorted(glob.glob(pattern, recursive=True)) if os.path.isfile(path)]
            if not found:
                raise ConfigError(f"{name}: no file {os.path.abspath(pattern)}{_beside(pattern)}")
            files += found
    if not split:
        return files
    splits = [split_of(file) for file in files]
    if split not in splits:
        raise ConfigError(f"{name} has no split {split!r} among {files[0]}, ...{nearest(split, set(splits))}")
    return [file for file, of in zip(files, splits, strict=True) if of == split]


def split_of(file: str) -> str:
    """The split that a file name tells: `data/train-00000-of-00004.parquet`, `train.parquet` and `train/0000.parquet`."""
    stem = os.path.basename(file).partition(".")[0]
    name, dash, number = stem.rpartition("-of-")[0].rpartition("-") if "-of-" in stem else stem.rpartition("-")
    if dash and number.isdigit():
        return name
    return os.path.basename(os.path.dirname(file)) if stem.isdigit() else stem


def expand_braces(pattern: str) -> list[str]:
    """As a shell does it: `a{00..02}` is a00, a01, a02; `{x,y}` is x, y."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    span = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    if span:
        first, last = int(span[1]), int(span[2])
        width = max(map(len, span.groups())) if any(end.startswith("0") and end != "0" for end in span.groups()) else 0
        step = 1 if first <= last else -1
        parts = [f"{i:0{width}d}" for i in range(first, last + step, step)]
    elif "," in match[1] and "{" not in pattern[: match.start()]:  # which would be braces in braces
        parts = match[1].split(",")
    else:
        raise ConfigError(f"{pattern!r}: braces hold a range, {{000..146}}, or names, {{train,val}}")
    before, after = pattern[: match.start()], pattern[match.end() :]
    return [whole for part in parts for whole in expand_braces(before + part + after)]


def _beside(pattern: str) -> str:
    """What the folder has instead, for a message."""
    folder = os.path.dirname(os.path.abspath(pattern)).removesuffix("/**")
    if not os.path.isdir(folder):
        return f"; there is no folder {folder}"
    names = sorted(os.listdir(folder))
    return f"; {folder} has {', '.join(names[:8]) or 'nothing'}{', ...' if len(names) > 8 else ''}"
