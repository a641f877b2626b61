"""Training images that change on the way: `config.data.train.later`, a list of what holds from an epoch on.

    later=[dict(begin=36, pipeline=[...]), dict(begin=111, pipeline=[...], device_pipeline=[...])]

After `begin` epochs images go through other transforms, which may give another size; what an entry lacks stays as it was. What
a sample looks like still follows from (seed, epoch, index) alone, so that a run can stop and go on anywhere. MMPretrain has
this as `SwitchRecipeHook`, whose `action_epoch` is one more: epochs count from 1 there.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxpretrain.build import ConfigError, nearest


class Phase(NamedTuple):
    """The transforms from epoch `begin` on, counted from 0."""

    begin: int
    pipeline: Sequence[Any]
    device_pipeline: Sequence[Any]


def phases_of(split: Mapping[str, Any]) -> list[Phase]:
    """The phases of a split of a config, in their order: one, and those that come later.

    Raises:
        ConfigError: an entry of `later` has no `begin`, another field, or begins before one that stands before it.
    """
    found = [Phase(0, split.get("pipeline") or (), split.get("device_pipeline") or ())]
    for i, entry in enumerate(split.get("later") or ()):
        where, entry = f"data.train.later[{i}]", dict(entry)
        for name in entry:
            if name not in Phase._fields:
                raise ConfigError(f"{where} has no field {name!r}.{nearest(name, Phase._fields)}")
        begin = entry.get("begin")
        if not isinstance(begin, int) or begin <= found[-1].begin:
            raise ConfigError(f"{where}.begin={begin!r} must be a number of epochs, more than {found[-1].begin}")
        found.append(found[-1]._replace(**entry))
    return found


def phase_at(phases: Sequence[Phase], epoch: int) -> int:
    """The number of the phase that has this epoch, from 0."""
    return bisect.bisect_right([phase.begin for phase in phases], epoch) - 1
