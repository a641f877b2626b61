"""What a case of test_backbones.py is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


def shallow(network: type, *blocks: int) -> type:
    """A network like ResNet with so many blocks in its stages, whatever its depth."""
    settings = {depth: (block, blocks) for depth, (block, _) in network.arch_settings.items()}
    return type(f"Small{network.__name__}", (network,), {"arch_settings": settings})


@dataclass(frozen=True)
class Backbone:
    """A backbone in a small form, and what the tests must know of it.

    Attributes:
        config: dict(type=...), as small as the architecture allows.
        golden: files in tests/golden of classifiers with this backbone.
        size: edge of the images in pixels.
        other_size: an edge for which the same weights work, at another number of positions; None where there is none.
        out_indices: stages whose outputs the backbone gives together, in ascending order; None where only the last is to be
            had.
        frozen_stages: a value that freezes a part of the weights, not all; None where MMPretrain has no such argument.
        drop_path_rate: name of the argument for stochastic depth; None where there is none.
        untouched: regular expression of parameters that get no gradient, with good reason; none by default.
        bfloat16: tolerance in bfloat16, of the largest magnitude.
        tolerance: of the golden numbers, of the largest magnitude; a larger one needs its reason beside it.
        remat: whether the backbone has an attribute `remat`.
        channels: of the images.
        channels_first: whether golden tokens are [B, C, N], which are [B, N, C] here.
    """

    config: dict[str, Any]
    golden: tuple[str, ...] = ()
    size: int = 32
    other_size: int | None = 64
    out_indices: tuple[int, ...] | None = None
    frozen_stages: int | None = None
    drop_path_rate: str | None = "drop_path_rate"
    untouched: str | None = None
    bfloat16: float = 0.15
    tolerance: float = 1e-5
    remat: bool = True
    channels: int = 3
    channels_first: bool = False
