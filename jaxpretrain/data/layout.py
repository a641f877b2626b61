"""What is wrong with the folder of a data set: what was found there, and what belongs there."""

from __future__ import annotations

import os
from pathlib import Path

from jaxpretrain.build import ConfigError

_SHOWN = 12  # entries of a folder that a message names


def layout_error(
    name: str, root: str | os.PathLike, problem: str, expected: str, inside: str | os.PathLike | None = None
) -> ConfigError:
    """The error to raise for a folder that does not have the layout of the data set.

    Args:
        name: the data set.
        root: its folder, as the user gave it.
        problem: what is missing or wrong, such as 'there is no file images.txt'.
        expected: the layout, one line per folder or file.
        inside: the folder in which to look for what is there; by default `root`.
    """
    place = Path(root if inside is None else inside).expanduser().absolute()
    lines = "".join(f"\n  {line.strip()}" for line in expected.strip().splitlines())
    return ConfigError(f"{name}: {problem}.\n{_found(place)}\nExpected under data_root={os.fspath(root)!r}:{lines}")


def _found(place: Path) -> str:
    """What is in a folder, or in the nearest one above it that exists."""
    above = place
    while not above.is_dir() and above != above.parent:
        above = above.parent
    try:
        entries = sorted(entry.name + "/" * entry.is_dir() for entry in os.scandir(above))
    except OSError as error:
        return f"{above} cannot be listed: {error.strerror}."
    shown = ", ".join(entries[:_SHOWN]) + (f", ... ({len(entries)} in all)" if len(entries) > _SHOWN else "")
    missing = "" if above == place else f"There is no folder {place}. "
    return f"{missing}Found in {above}: {shown or 'nothing'}."
