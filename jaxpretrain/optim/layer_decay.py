"""Layer-wise learning rates: layer k of n learns with rate ** (n - 1 - k) times the rate of the head.

From Clark et al. (2020, ELECTRA) and, for images, Bao et al. (2021, BEiT). Layers are numbered as MMPretrain does, from the
stem at 0 to the head at n - 1, and are known by the parameters' paths below `backbone`, or its `module` if LoRA adapts it:

- `layers/I` (ViT, BEiT): every block is a layer. What is neither block nor stem (final norms) goes with the head.
- `stages/I/blocks/J` (Swin): every block is a layer, counted through the stages; `downsample` belongs to the block before.
- `layers/I/blocks/J` (MixMIM): the same, but final norms and the neck go with the last block.
- `stages/I/J` (ConvNeXt): stages 0, 1 and 3 are a layer each; of the long stage 2, every three blocks are.
- `layer1/J` to `layer4/J` (ResNet): stages 1 and 4 are a layer each; of stages 2 and 3, every few blocks are.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable

from jaxpretrain.build import ConfigError

_STEM = ("patch_embed", "cls_token", "pos_embed", "absolute_pos_embed")


def layer_numbers(paths: Iterable[str]) -> dict[str, tuple[int, int]]:
    """(number of its layer, number of layers) for each path, such as 'backbone/layers/0/ln1/scale'.

    Frozen blocks need not be among the paths: rates depend on the distance from the head alone.

    Raises:
        ConfigError: a backbone without layers that are known.
    """
    paths = list(paths)
    inside = {
        path: parts[-1]
        for path in paths
        if len(parts := re.split(r"(?:^|/)backbone/(?:module/)?", path, maxsplit=1)) == 2
    }
    if not inside:
        return dict.fromkeys(paths, (0, 1))
    for pattern, numbering in _NUMBERINGS:
        if any(re.match(pattern, name) for name in inside.values()):
            number = numbering(inside.values())
            return {path: number(inside.get(path, _after(path))) for path in paths}
    raise ConfigError(
        "paramwise_cfg.layer_decay_rate: the layers of this backbone are not known by their paths, such as "
        f"{next(iter(inside))!r}; known are blocks at layers/I, stages/I/blocks/J, layers/I/blocks/J, stages/I/J, layer1/J"
    )


def _after(path: str) -> str:
    # What is not in the backbone: `neck` or `head`, so that numberings can tell them apart.
    return "/neck" if re.search(r"(^|/)neck/", path) else "/head"


Numbering = Callable[[Iterable[str]], Callable[[str], tuple[int, int]]]


def _blocks(names: Iterable[str]) -> Callable[[str], tuple[int, int]]:
    depth = _length(names, r"layers/(\d+)/")

    def number(name: str) -> tuple[int, int]:
        if name.split("/")[0] in ("patch_embed", "cls_token", "pos_embed"):
            return 0, depth + 2
        block = re.match(r"layers/(\d+)/", name)
        return (int(block[1]) + 1 if block else depth + 1), depth + 2

    return number


def _staged_blocks(stages: str, stem: tuple[str, ...], last_norm_with_head: bool) -> Numbering:
    def numbering(names: Iterable[str]) -> Callable[[str], tuple[int, int]]:
        names = list(names)
        depths = [_length(names, rf"{stages}/{i}/blocks/(\d+)/") for i in range(_length(names, rf"{stages}/(\d+)/"))]
        total = sum(depths)

        def number(name: str) -> tuple[int, int]:
            if name.split("/")[0] in stem:
                return 0, total + 2
            if found := re.match(rf"{stages}/(\d+)/blocks/(\d+)/", name):
                return sum(depths[: int(found[1])]) + int(found[2]) + 1, total + 2
            if found := re.match(rf"{stages}/(\d+)/", name):
                return sum(depths[: int(found[1]) + 1]), total + 2
            return total + (last_norm_with_head or name == "/head"), total + 2

        return number

    return numbering


def _convnext(names: Iterable[str]) -> Callable[[str], tuple[int, int]]:
    last = 12 if _length(names, r"stages/2/(\d+)/") > 9 else 6

    def number(name: str) -> tuple[int, int]:
        if found := re.match(r"downsample_layers/(\d+)/", name):
            return (0, 2, 3, last)[int(found[1])], last + 2
        if found := re.match(r"stages/(\d+)/(\d+)/", name):
            stage, block = int(found[1]), int(found[2])
            return (1, 2, 3 + block // 3, last)[stage], last + 2
        return last + 1, last + 2

    return number


# Blocks of stages 2 and 3 that make one layer, by the depths of both stages.
_RESNET_PIECES = {(4, 6): (2, 3), (4, 23): (2, 3), (8, 36): (4, 4), (24, 36): (4, 4), (30, 48): (5, 6)}


def _resnet(names: Iterable[str]) -> Callable[[str], tuple[int, int]]:
    names = list(names)
    depths = _length(names, r"layer2/(\d+)/"), _length(names, r"layer3/(\d+)/")
    if depths not in _RESNET_PIECES:
        raise ConfigError(
            f"paramwise_cfg.layer_decay_rate: no numbering for a ResNet with {depths} blocks in its middle"
        )
    second, third = _RESNET_PIECES[depths]
    begin3 = 2 + math.ceil(depths[0] / second)
    last = begin3 + math.ceil(depths[1] / third)

    def number(name: str) -> tuple[int, int]:
        if found := re.match(r"layer(\d+)/(\d+)/", name):
            stage, block = int(found[1]), int(found[2])
            return (1, 2 + block // second, begin3 + block // third, last)[stage - 1], last + 2
        return (last + 1 if name.startswith("/") else 0), last + 2

    return number


def _length(names: Iterable[str], pattern: str) -> int:
    return max((int(found[1]) + 1 for name in names if (found := re.match(pattern, name))), default=0)


_NUMBERINGS: tuple[tuple[str, Numbering], ...] = (
    (r"layers/\d+/blocks/\d+/", _staged_blocks("layers", _STEM, last_norm_with_head=False)),
    (r"stages/\d+/blocks/\d+/", _staged_blocks("stages", ("patch_embed",), last_norm_with_head=True)),
    (r"layers/\d+/", _blocks),
    (r"stages/\d+/\d+/", _convnext),
    (r"layer\d+/\d+/", _resnet),
)
