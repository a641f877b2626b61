"""AutoAugment and RandAugment on the host: operations drawn from tables. Names, arguments and tables are MMPretrain's, in RGB.

Sources: AutoAugment (Cubuk et al., 2019, table 9 of its appendix: the ImageNet policy), RandAugment (Cubuk et al., 2020), and
timm's "increasing" ranges, in which a higher level always changes the image more. The operations: `augment_operations.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxpretrain.build import ConfigError, build, nearest
from jaxpretrain.data.augment_operations import OPERATIONS, Cutout, Operation, Warp
from jaxpretrain.data.base import Sample, Transform
from jaxpretrain.data.views import each_view

Policy = dict[str, Any]


def _policies(lines: str) -> list[list[Policy]]:
    """AutoAugment's table: in each line operations as NAME PROBABILITY [STRENGTH]."""

    def one(text: str) -> Policy:
        name, prob, *strength = text.split()
        key = OPERATIONS[name].argument
        return dict(type=name, prob=float(prob)) | ({str(key): float(strength[0])} if strength else {})

    return [[one(operation) for operation in line.split(",")] for line in lines.strip().splitlines()]


# Strengths are the paper's levels 0 to 9: of Rotate 30 degrees, of Solarize 256, of Shear 0.3 in nine parts.
AUTOAUGMENT: dict[str, list[list[Policy]]] = {
    "imagenet": _policies(f"""
        Posterize 0.4 4, Rotate 0.6 30
        Solarize 0.6 {256 / 9 * 4}, AutoContrast 0.6
        Equalize 0.8, Equalize 0.6
        Posterize 0.6 5, Posterize 0.6 5
        Equalize 0.4, Solarize 0.2 {256 / 9 * 5}
        Equalize 0.4, Rotate 0.8 {30 / 9 * 8}
        Solarize 0.6 {256 / 9 * 6}, Equalize 0.6
        Posterize 0.8 6, Equalize 1.0
        Rotate 0.2 10, Solarize 0.6 {256 / 9}
        Equalize 0.6, Posterize 0.4 5
        Rotate 0.8 {30 / 9 * 8}, ColorTransform 0.4 0
        Rotate 0.4 30, Equalize 0.6
        Equalize 0.0, Equalize 0.8
        Invert 0.6, Equalize 1.0
        ColorTransform 0.6 0.4, Contrast 1.0 0.8
        Rotate 0.8 {30 / 9 * 8}, ColorTransform 1.0 0.2
        ColorTransform 0.8 0.8, Solarize 0.8 {256 / 9 * 2}
        Sharpness 0.4 0.7, Invert 0.6
        Shear 0.6 {0.3 / 9 * 5}, Equalize 1.0
        ColorTransform 0.4 0, Equalize 0.6
        Equalize 0.4, Solarize 0.2 {256 / 9 * 5}
        Solarize 0.6 {256 / 9 * 4}, AutoContrast 0.6
        Invert 0.6, Equalize 1.0
        ColorTransform 0.6 0.4, Contrast 1.0 0.8
        Equalize 0.8, Equalize 0.6
    """),
}


def _ranges(**ranges: Sequence[float] | None) -> list[Policy]:
    """A policy for each name; `Name_horizontal` says the direction too."""
    policies = []
    for name, magnitude_range in ranges.items():
        kind, _, direction = name.partition("_")
        policy: Policy = dict(type=kind)
        policy |= dict(direction=direction) if direction else {}
        policies.append(policy if magnitude_range is None else policy | dict(magnitude_range=magnitude_range))
    return policies


_SHEARS: dict[str, tuple[float, float]] = dict(Shear_horizontal=(0, 0.3), Shear_vertical=(0, 0.3))
RANDAUGMENT: dict[str, list[Policy]] = {
    "timm_increasing": _ranges(
        AutoContrast=None,
        Equalize=None,
        Invert=None,
        Rotate=(0, 30),
        Posterize=(4, 0),
        Solarize=(256, 0),
        SolarizeAdd=(0, 110),
        ColorTransform=(0, 0.9),
        Contrast=(0, 0.9),
        Brightness=(0, 0.9),
        Sharpness=(0, 0.9),
        **_SHEARS,
        Translate_horizontal=(0, 0.45),
        Translate_vertical=(0, 0.45),
    ),
    "simple_increasing": _ranges(AutoContrast=None, Equalize=None, Rotate=(0, 30), **_SHEARS),
}


class AutoAugment(Transform):
    """One of several short chains of operations, drawn for each image.

    Args:
        policies: lists of operations, or the name of a table in `AUTOAUGMENT`.
        hparams: accepted; MMPretrain does not hand it on to the operations of a named table, and neither does this.
    """

    def __init__(self, policies: str | Sequence[Sequence[Policy]], hparams: Mapping[str, Any] | None = None):
        table = _named("AutoAugment", policies, AUTOAUGMENT)
        own = {} if isinstance(policies, str) else dict(hparams or {})
        self.chains = [[_operation(policy, own) for policy in chain] for chain in table]

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        return each_view(self.one, sample, rng)

    def one(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """One image by one chain."""
        for operation in self.chains[int(rng.integers(len(self.chains)))]:
            sample = operation(sample, rng)
        return sample


class RandAugment(Transform):
    """`num_policies` operations drawn with replacement, all at one level.

    Args:
        policies: operations, or the name of a table in `RANDAUGMENT`.
        num_policies: how many are drawn for each image; each is then left out with its own probability.
        magnitude_level: of those that have a `magnitude_range`, from 0 to total_level.
        magnitude_std, total_level: see `Operation`.
        hparams: `pad_val` and `interpolation` for operations that take them and do not say themselves.
    """

    def __init__(
        self,
        policies: str | Sequence[Policy],
        num_policies: int,
        magnitude_level: float,
        magnitude_std: float | str = 0.0,
        total_level: float = 10,
        hparams: Mapping[str, Any] | None = None,
    ):
        level = dict(magnitude_level=magnitude_level, magnitude_std=magnitude_std, total_level=total_level)
        own = dict(pad_val=128) if hparams is None else dict(hparams)
        self.num_policies = num_policies
        self.operations = [
            _operation(policy, own | (level if "magnitude_range" in policy else {}))
            for policy in _named("RandAugment", policies, RANDAUGMENT)
        ]

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        return each_view(self.one, sample, rng)

    def one(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """One image by operations drawn for it."""
        for number in rng.integers(len(self.operations), size=self.num_policies):
            sample = self.operations[int(number)](sample, rng)
        return sample


def _named(what: str, policies: Any, tables: Mapping[str, Any]) -> Any:
    if not isinstance(policies, str):
        return policies
    if policies not in tables:
        raise ConfigError(f"{what}: no policies {policies!r}.{nearest(policies, tables)}")
    return tables[policies]


def _operation(policy: Mapping[str, Any], defaults: Mapping[str, Any]) -> Operation:
    """The operation, with those of `defaults` that it takes and does not set."""
    kind = policy["type"]
    cls = OPERATIONS.get(kind) if isinstance(kind, str) else kind
    if cls is None:
        raise ConfigError(f"No operation {kind!r} to augment with.{nearest(kind, OPERATIONS)}")
    takes_colour = issubclass(cls, Warp | Cutout)
    taken = {
        name: value
        for name, value in defaults.items()
        if not (name == "pad_val" and not takes_colour) and not (name == "interpolation" and not issubclass(cls, Warp))
    }
    return build(taken | dict(policy) | dict(type=cls))
