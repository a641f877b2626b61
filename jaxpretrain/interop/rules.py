"""The rule engine: names and layouts of one library <-> MMPretrain's, by one table that is read in both directions.

A rule pairs names of both sides and says how the arrays differ. Names have placeholders:

    Rule("blocks.{i}.attn.qkv.{p}", "backbone.layers.{i}.attn.qkv.{p}")
    Rule(("q.{p}", "k.{p}", "v.{p}"), "qkv.{p}", stack(3))      # three tensors there are one here
    Rule("layers.{i+1}.downsample.norm.{p}", "backbone.stages.{i}.downsample.norm.{p}")   # counted from one there

`{i}`, `{j}`, `{k}` are numbers, `{p}` is weight or bias, `{bn}` any tensor of a BatchNorm. Both directions come from the same
line, so a table cannot import what it would not export.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from jaxpretrain.build import ConfigError

Arrays = Sequence[np.ndarray]
State = dict[str, np.ndarray]

_KINDS = {
    "p": "weight|bias",
    "bn": "weight|bias|running_mean|running_var|num_batches_tracked",
    "rest": r".+",
}
_PLACEHOLDER = re.compile(r"\{(\w+)([+-]\d+)?\}")


class InteropError(ConfigError):
    """Weights that do not fit: the message lists every tensor that is left over, with shapes and what to do."""


@dataclass(frozen=True)
class Transform:
    """How the arrays of a rule's foreign side become those of ours, and back. Both take and give lists of arrays."""

    forward: Callable[[Arrays], list[np.ndarray]]
    inverse: Callable[[Arrays], list[np.ndarray]]


SAME = Transform(list, list)


def stack(parts: int, axis: int = 0) -> Transform:
    """`parts` equal arrays there are one here, one after the other along `axis`."""
    return Transform(lambda xs: [np.concatenate(xs, axis)], lambda xs: np.split(xs[0], parts, axis))


def shape(theirs: Sequence[int], ours: Sequence[int]) -> Transform:
    """The same numbers in the same order in another shape; -1 as in NumPy."""
    return Transform(lambda xs: [xs[0].reshape(ours)], lambda xs: [xs[0].reshape(theirs)])


def transpose(*axes: int) -> Transform:
    """Their array with its axes in the order `axes` is ours."""
    back = tuple(int(i) for i in np.argsort(axes))
    return Transform(lambda xs: [xs[0].transpose(axes)], lambda xs: [xs[0].transpose(back)])


def reorder(index: Sequence[int] | np.ndarray, axis: int) -> Transform:
    """Ours takes theirs in the order `index` along `axis`: a permutation."""
    index = np.asarray(index)
    return Transform(lambda xs: [np.take(xs[0], index, axis)], lambda xs: [np.take(xs[0], np.argsort(index), axis)])


def leading_axes(count: int) -> Transform:
    """Ours has `count` more axes of length 1 in front."""
    return Transform(
        lambda xs: [xs[0].reshape((1,) * count + xs[0].shape)], lambda xs: [xs[0].reshape(xs[0].shape[count:])]
    )


def merged_patches(axis: int) -> Transform:
    """The channels of four joined neighbours, along `axis`: (column, row, channel) there, (channel, row, column) here.

    The former is the order of Swin's release, the latter that of `unfold`, which MMPretrain uses.
    """

    def move(x: np.ndarray, sizes: tuple[int, ...]) -> list[np.ndarray]:
        x = np.moveaxis(x, axis, -1)
        return [np.moveaxis(x.reshape(*x.shape[:-1], *sizes).swapaxes(-3, -1).reshape(x.shape), -1, axis)]

    return Transform(lambda xs: move(xs[0], (2, 2, -1)), lambda xs: move(xs[0], (-1, 2, 2)))


@dataclass(frozen=True)
class Rule:
    """One line of a table.

    Args:
        theirs: name, or several names, with placeholders, in the foreign layout.
        ours: likewise in MMPretrain's.
        transform: how the arrays differ.
    """

    theirs: str | tuple[str, ...]
    ours: str | tuple[str, ...]
    transform: Transform = SAME

    def renamed(self, pairs: Sequence[tuple[str, str]]) -> Rule:
        """The same rule with each (old, new) part of the foreign names replaced, one after the other."""
        names = list(_several(self.theirs))
        for old, new in pairs:
            names = [name.replace(old, new) for name in names]
        return Rule(names[0] if isinstance(self.theirs, str) else tuple(names), self.ours, self.transform)


def also_named(rules: Sequence[Rule], pairs: Sequence[tuple[str, str]]) -> list[Rule]:
    """The rules, and behind them the same by other names (see `Rule.renamed`): found in files, never exported."""
    others = [(rule, rule.renamed(pairs)) for rule in rules]
    return [*rules, *(other for rule, other in others if other != rule)]


@dataclass(frozen=True)
class Table:
    """All rules between one foreign layout and one model.

    Attributes:
        rules: tried in order; the first that matches a name counts.
        ignore: regular expressions of foreign names that are no part of the model (index tables, text towers).
        prefix: what foreign names of the backbone begin with where the file holds a head too (`vit.`).
        prefixes: other beginnings that files are found with; dropped when importing.
        absent: regular expressions of MMPretrain's names that the layout has not: zero when imported, left out when exported.
    """

    rules: Sequence[Rule]
    ignore: Sequence[str] = ()
    prefix: str = ""
    prefixes: Sequence[str] = ()
    absent: Sequence[str] = ()

    def lacks(self, name: str) -> bool:
        """Whether the layout has nothing for the name of MMPretrain's."""
        return any(re.search(pattern, name) for pattern in self.absent)


@dataclass
class Translation:
    """What a table made of a state dict.

    Attributes:
        state: the translated arrays.
        origins: name of each -> what it was made of.
        unused: names that no rule knows.
        ignored: names that the table leaves out.
        incomplete: messages about rules of which only some names are there.
    """

    state: State = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    incomplete: list[str] = field(default_factory=list)


def translate(state: Mapping[str, np.ndarray], table: Table, *, inverse: bool = False) -> Translation:
    """Names and arrays of a foreign state dict in MMPretrain's form; with `inverse`, the other way."""
    result, left = Translation(), dict.fromkeys(state)
    if not inverse:
        for name in state:
            if any(re.search(pattern, name) for pattern in table.ignore):
                result.ignored.append(name)
                del left[name]
    for rule in table.rules:
        source, target = (rule.ours, rule.theirs) if inverse else (rule.theirs, rule.ours)
        convert = rule.transform.inverse if inverse else rule.transform.forward
        first, *others = _several(source)
        pattern = _regex(first)
        for name in [name for name in left if pattern.fullmatch(name)]:
            values = _values(first, name)
            names = [name, *(_fill(template, values) for template in others)]
            if missing := [other for other in names if other not in left]:
                result.incomplete.append(f"{name} needs {', '.join(missing)} beside it")
                continue
            arrays = convert([np.asarray(state[n]) for n in names])
            targets = [_fill(template, values) for template in _several(target)]
            result.state |= dict(zip(targets, arrays, strict=True))
            result.origins |= dict.fromkeys(targets, " and ".join(names))
            for n in names:
                del left[n]
    result.unused = list(left)
    return result


def _several(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


@lru_cache(maxsize=4096)
def _regex(template: str) -> re.Pattern:
    """The names that a template stands for; its groups are the placeholders, each by its first occurrence."""
    pattern, end, seen = "", 0, set()
    for match in _PLACEHOLDER.finditer(template):
        name = match[1]
        pattern += re.escape(template[end : match.start()])
        pattern += f"(?P={name})" if name in seen else f"(?P<{name}>{_KINDS.get(name, '[0-9]+')})"
        seen.add(name)
        end = match.end()
    return re.compile(pattern + re.escape(template[end:]))


def _values(template: str, name: str) -> dict[str, Any]:
    match = _regex(template).fullmatch(name)
    assert match is not None
    values: dict[str, Any] = match.groupdict()
    for placeholder in _PLACEHOLDER.finditer(template):
        if placeholder[2] and isinstance(values[placeholder[1]], str):
            values[placeholder[1]] = int(values[placeholder[1]]) - int(placeholder[2])
    return values


def _fill(template: str, values: Mapping[str, Any]) -> str:
    def one(match: re.Match) -> str:
        value = values[match[1]]
        return str(int(value) + int(match[2])) if match[2] else str(value)

    return _PLACEHOLDER.sub(one, template)


def describe_leftovers(
    unused: Mapping[str, Sequence[int]],
    missing: Mapping[str, Sequence[int]],
    wrong: Mapping[str, tuple[Sequence[int], Sequence[int]]],
    incomplete: Iterable[str] = (),
) -> list[str]:
    """One line for each tensor that has no place, each place without a tensor, and each pair of different shapes."""

    def like(name: str, other: Mapping[str, Any]) -> str:
        close = difflib.get_close_matches(name, list(other), n=1, cutoff=0.6)
        return f"   (nearest: {close[0]} {tuple(other[close[0]])})" if close else ""

    return [
        *(f"no place for    {name} {tuple(size)}{like(name, missing)}" for name, size in unused.items()),
        *(f"nothing for     {name} {tuple(size)}{like(name, unused)}" for name, size in missing.items()),
        *(f"another shape   {name}: {tuple(a)} in the file, {tuple(b)} in the model" for name, (a, b) in wrong.items()),
        *(f"incomplete      {line}" for line in incomplete),
    ]
