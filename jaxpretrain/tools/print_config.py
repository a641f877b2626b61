"""Prints a resolved config: `python -m jaxpretrain.tools.print_config --config=configs/mae.py:digits [--config.a.b=v ...]`.

As Python it is a recipe file of its own: redirect it to `mine.py`, change it, and train with `--config=mine.py`. With
`--diff=OTHER` only what differs is printed; OTHER is a recipe, or a run's folder or `config.json`.
"""

from __future__ import annotations

import json
import keyword
import math
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxpretrain import cli
from jaxpretrain.build import ConfigError, nearest
from jaxpretrain.config import load_config, to_plain

FORMATS = ("python", "json", "yaml")
FLAGS = {
    "config": "recipe: configs/mae.py:digits; or a run's folder or config.json",
    "diff": "another one of these: print only what differs from it",
    "format": f"{', '.join(FORMATS)} (default: python)",
}
WIDTH = 120
# A ConfigDict has its fields by the alphabet; these go first.
_FIRST = ("type", "recipe", "seed", "method", "batch_size", "data", "train", "val", "dataset", "pipeline")
_MISSING = object()


def main(argv: list[str]) -> int:
    given, rest = cli.positional(argv, FLAGS)
    parsed = cli.parse(rest, FLAGS, usage=__doc__ or "")
    flags = parsed.values
    given += [flags["config"]] if "config" in flags else []
    if len(given) != 1:
        raise ConfigError("--config is needed, once, e.g. --config=configs/mae.py:digits")
    style = flags.get("format", "python")
    if style not in FORMATS:
        raise ConfigError(f"--format={style} does not exist.{nearest(style, FORMATS)}")
    config = read(given[0], parsed.overrides)
    if "diff" in flags:
        text = as_diff(differences(to_plain(read(flags["diff"])), to_plain(config)), style)
    else:
        text = as_python(config) if style == "python" else _dump(to_plain(config), style)
    try:
        print(text, flush=True)
    except BrokenPipeError:  # of `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return cli.OK


def read(spec: str, overrides: list[str] | None = None) -> Any:
    """The config of a recipe, or the one that a run has left in its folder."""
    path = Path(spec)
    path = path / "config.json" if path.is_dir() else path
    if path.suffix != ".json":
        return load_config(spec, overrides or ())
    if not path.is_file():
        raise ConfigError(f"{path} does not exist: {spec} is not the folder of a run, nor a recipe")
    if overrides:
        raise ConfigError(f"{spec} is what a run has used; overrides are for recipes: {overrides[0]}")
    return json.loads(path.read_text(encoding="utf-8"))


def differences(old: Any, new: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(path, old, new) of every value that differs; a field that one side lacks is `_MISSING` there.

    Items of lists of the same length are compared one by one, other lists as wholes.
    """
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        pairs = [(key, old.get(key, _MISSING), new.get(key, _MISSING)) for key in dict.fromkeys([*old, *new])]
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = [(i, *both) for i, both in enumerate(zip(old, new, strict=True))]
    else:
        if old is _MISSING or new is _MISSING or old != new or isinstance(old, bool) != isinstance(new, bool):
            yield path, old, new
        return
    for key, one, other in pairs:
        yield from differences(one, other, f"{path}.{key}" if path else str(key))


def as_diff(found: Iterator[tuple[str, Any, Any]], style: str = "python") -> str:
    """Three lines for each difference: the path, `-` what it is there, `+` what it is here; or a mapping of these."""
    if style != "python":
        sides = ("there", "here")
        table = {
            path: {side: value for side, value in zip(sides, both, strict=True) if value is not _MISSING}
            for path, *both in found
        }
        return _dump(table, style)
    lines = []
    for path, *both in found:
        lines.append(path)
        for sign, value in zip("-+", both, strict=True):
            if value is not _MISSING:
                lines += [f"  {sign} {line}" for line in _literal(value, 4, 0).splitlines()]
    return "\n".join(lines) or "no difference"


def as_python(config: Any) -> str:
    """A recipe file that gives this very config. Classes and functions become the dotted paths that `build` reads."""
    lines = [
        "from __future__ import annotations",
        "",
        "from ml_collections import ConfigDict",
        "",
        "",
        "def get_config(recipe: str | None = None) -> ConfigDict:",
        "    return ConfigDict(",
        f"        {_literal(config, 8, 2)}",
        "    )",
    ]
    return "\n".join(lines)


def _literal(value: Any, column: int, depth: int) -> str:
    """`value` as an expression that starts at `column`, on one line where it fits, else an item on each line."""
    flat = _flat(value)
    if column + len(flat) + 1 <= WIDTH:
        return flat
    inner = "    " * (depth + 1)
    if _is_mapping(value):
        opening, closing = ("dict(", ")") if _identifiers(value) else ("{", "}")
        heads, values = _heads(value)
    elif isinstance(value, list | tuple):
        opening, closing = "[]" if isinstance(value, list) else "()"
        heads, values = [""] * len(value), list(value)
    else:
        return flat
    lines = [
        f"{inner}{head}{_literal(item, len(inner) + len(head), depth + 1)},"
        for head, item in zip(heads, values, strict=True)
    ]
    return "\n".join([opening, *lines, "    " * depth + closing])


def _flat(value: Any) -> str:
    if _is_mapping(value):
        opening, closing = ("dict(", ")") if _identifiers(value) else ("{", "}")
        return opening + ", ".join(head + _flat(item) for head, item in zip(*_heads(value), strict=True)) + closing
    if isinstance(value, list):
        return "[" + ", ".join(map(_flat, value)) + "]"
    if isinstance(value, tuple):
        return "(" + ", ".join(map(_flat, value)) + ("," if len(value) == 1 else "") + ")"
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    return repr(to_plain(value))


def _heads(value: Any) -> tuple[list[str], list[Any]]:
    """`key=` or `"key": ` of each item, and the items."""
    named = _identifiers(value)
    order = sorted(value, key=lambda key: _FIRST.index(key) if key in _FIRST else len(_FIRST))
    return [f"{key}=" if named else f"{_flat(key)}: " for key in order], [value[key] for key in order]


def _is_mapping(value: Any) -> bool:
    return isinstance(value, Mapping) or hasattr(value, "to_dict")


def _identifiers(value: Any) -> bool:
    return all(isinstance(key, str) and key.isidentifier() and not keyword.iskeyword(key) for key in value)


def _dump(plain: Any, style: str) -> str:
    if style == "json":
        return json.dumps(plain, indent=2, ensure_ascii=False)
    try:
        import yaml
    except ImportError as error:
        raise ConfigError("--format=yaml needs PyYAML: pip install pyyaml, or take --format=json") from error
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=WIDTH).rstrip("\n")


if __name__ == "__main__":
    sys.exit(cli.run(main))
