"""What backbones have in common before a layer is built: architectures by name, and which outputs are wanted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxpretrain.build import ConfigError, nearest


def architecture(arch: str | Mapping[str, Any], archs: Mapping[Any, Mapping[str, Any]], owner: str) -> dict[str, Any]:
    """The numbers that make an architecture, by name (in any case) or from a dictionary that has them all.

    Args:
        arch: the name, or the dictionary.
        archs: the names of each architecture -> its numbers.
        owner: the backbone's name, for messages.

    Raises:
        ConfigError: an unknown name; a number that is missing, or that the backbone does not know.
    """
    if isinstance(arch, str):
        for names, numbers in archs.items():
            if arch.lower() in names:
                return dict(numbers)
        raise ConfigError(
            f"{owner}: unknown arch {arch!r}.{nearest(arch, [name for names in archs for name in names])}"
        )
    keys = next(iter(archs.values())).keys()
    if missing := [key for key in keys if key not in arch]:
        raise ConfigError(f"{owner}: arch needs {', '.join(keys)}; missing: {', '.join(missing)}")
    if unknown := [key for key in arch if key not in keys]:
        raise ConfigError(f"{owner}: arch has {', '.join(keys)} only, not {', '.join(unknown)}")
    return dict(arch)


def output_indices(out_indices: int | Sequence[int], count: int, owner: str) -> tuple[int, ...]:
    """Sorted indices from 0 of the stages (or layers) that `out_indices` mean; negative ones count from the end.

    Raises:
        ConfigError: an index beyond the `count` stages of `owner`.
    """
    indices = [out_indices] if isinstance(out_indices, int) else list(out_indices)
    for index in indices:
        if not -count <= index < count:
            raise ConfigError(f"{owner}: out_indices has {index}, but its outputs are 0 to {count - 1}")
    return tuple(sorted({index % count for index in indices}))


def check_frozen_stages(frozen_stages: int, least: int, most: int, owner: str) -> None:
    """Raises ConfigError unless `frozen_stages` of `owner` is from `least` (which freezes nothing) to `most`."""
    if not least <= frozen_stages <= most:
        raise ConfigError(f"{owner}: frozen_stages is {least} (none) to {most}, not {frozen_stages}")
