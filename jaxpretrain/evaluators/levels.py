"""How good is each level of a network? Features of all of them from one pass, and a linear probe of each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxpretrain.build import ConfigError, nearest
from jaxpretrain.evaluators.base import EvalContext, remember, run_over
from jaxpretrain.evaluators.linear_probe import LinearProbe
from jaxpretrain.models.layers.intermediates import capture

POOLS = ("auto", "grid", "mean", "cls")
MAP_DIMS = 9216  # at most, of a pooled map: the 12x12x64, 6x6x256, 4x4x512, 3x3x1024, 2x2x2048 of ResNet-50

# (size of the map, of the pooled map) -> window, stride, padding: the benchmark's pooling of ResNet-50 at 224 pixels.
_WINDOWS = {(112, 12): (10, 10, 4), (56, 6): (16, 8, 0), (28, 4): (13, 5, 0), (14, 3): (8, 3, 0), (7, 2): (6, 1, 0)}


class LevelProbe(LinearProbe):
    """A linear probe of the features at each level: the benchmark of Goyal et al., 2019 ("Scaling and Benchmarking
    Self-Supervised Visual Representation Learning", section 6.2), which MMSelfSup calls multi-head linear evaluation.

    All levels come from one pass over the data. Scores are in percent: {'stem_top1': ..., 'stage1_top1': ...,
    'features_top1': ..., 'best': the number of the best level, from 1}.

    Args:
        context: of the run.
        levels: the names of those wanted, as `extract_levels` gives them; None takes all.
        pool: how maps and tokens become vectors; see `extract_levels`.
        options: of `LinearProbe`.

    Raises:
        ConfigError: as LinearProbe; an unknown level or way of pooling.
    """

    def __init__(self, context: EvalContext, levels: Sequence[str] | None = None, pool: str = "auto", **options: Any):
        super().__init__(context, **options)
        self.levels, self.pool = levels, check_pool("LevelProbe.pool", pool)

    def run(self, state: Any) -> dict[str, float]:
        train, labels = level_features(self.context, state, "train", self.pool)
        val, val_labels = level_features(self.context, state, "val", self.pool)
        if labels.ndim > 1:
            raise ConfigError("LevelProbe needs one label per image; use dict(type='LowShotSVM', levels=True)")
        names = pick_levels(train, self.levels, "LevelProbe")
        top1 = [self.probe((train[name], labels), (val[name], val_labels))["top1"] for name in names]
        scores = {f"{name}_top1": value for name, value in zip(names, top1, strict=True)}
        return {**scores, "best": float(list(train).index(names[int(np.argmax(top1))]) + 1)}


def pick_levels(found: dict[str, Any], wanted: Sequence[str] | None, owner: str) -> list[str]:
    """The levels wanted, in order. Raises ConfigError for one that is not there."""
    for name in wanted or ():
        if name not in found:
            raise ConfigError(f"{owner}.levels: there is no level {name!r}.{nearest(name, found)}")
    return [name for name in found if wanted is None or name in wanted]


def check_pool(name: str, pool: str) -> str:
    """`pool`, if it is one of `POOLS`; ConfigError otherwise."""
    if pool not in POOLS:
        raise ConfigError(f"{name} is {pool!r}.{nearest(pool, POOLS)}")
    return pool


def level_features(
    context: EvalContext, state: Any, split: str, pool: str = "auto"
) -> tuple[dict[str, Float[np.ndarray, "n d"]], np.ndarray]:
    """Features of all levels, and labels, of a split, on the host; kept as long as `extract`'s are.

    They are large: 9,000 numbers for each level and image of a ResNet, so a data set of ImageNet's size does not fit.
    """

    def function(state: Any, batch: Any) -> dict[str, Array]:
        levels = extract_levels(context.method(state), context.preprocess(batch)["image"], pool)
        return {name: value.astype(jnp.float32) for name, value in levels.items()}

    def compute() -> Any:
        # jit sorts the keys of dictionaries, so the order of the levels is asked for apart.
        batch = next(iter(context.loader(split)), None)
        if batch is None:
            raise ConfigError(f"evaluators: the {split} split has no images; check config.data.{split}.dataset")
        order: list[str] = []
        jax.eval_shape(lambda s, b: order.extend(function(s, b)), state, batch)
        compiled = jax.jit(function)
        found, labels, _ = run_over(context, split, lambda b: compiled(state, b))
        return {name: found[name] for name in order}, labels

    return remember(context, state, ("levels", split, pool), compute)


def extract_levels(method: Any, images: Float[Array, "b h w c"], pool: str = "auto") -> dict[str, Float[Array, "b d"]]:
    """The representation at each level of a method's encoder, from one forward pass, first level first.

    Levels are `stem` and `stage1`, `stage2`, ... of networks with feature maps (the end of a stage is where the shape
    changes), and `block1`, `block2`, ... of networks with tokens of one shape; the last level, `features`, is
    `method.features` (global average pooling after the last stage of a ResNet).

    Args:
        method: in eval mode.
        images: normalised.
        pool: 'grid' averages a map down to s x s positions, where s is the largest for which it has no more than
            9,216 numbers. At the sizes of ResNet-50 and 224 pixels the windows are those of MMSelfSup; otherwise each of
            the s x s windows covers its share of the map, as PyTorch's adaptive pooling. 'mean' averages over positions,
            'cls' takes the first token. 'auto' is 'grid' for ResNets, else 'mean' (without class token and registers).

    Raises:
        ConfigError: nothing to be seen inside the network; 'cls' without class token.
    """
    from jaxpretrain.models.resnet import ResNet

    with capture(method, "*.out", "out", "*.stem") as found:
        features = method.features(images)
    stem = next((value for name, value in found.items() if name.endswith("stem")), None)
    blocks = [value for name, value in found.items() if name.split(".")[-1] == "out"]
    if not blocks:
        raise ConfigError(f"{type(method).__name__}: its network shows no levels; probe its features (LinearProbe)")
    encoder = _encoder(method)
    if pool == "auto":
        pool = "grid" if isinstance(encoder, ResNet) else "mean"
    if blocks[0].ndim == 3:
        extra = getattr(encoder, "num_extra_tokens", 0)
        if pool == "cls" and getattr(encoder, "cls_token", None) is None:
            raise ConfigError(f"pool='cls': {type(encoder).__name__} has no class token; use 'mean'")
        vectors = [x[:, 0] if pool == "cls" else x[:, extra:].mean(axis=1, dtype=jnp.float32) for x in blocks]
        levels = {f"block{i + 1}": x for i, x in enumerate(vectors)}
    else:
        if pool == "cls":
            raise ConfigError(f"pool='cls': {type(encoder).__name__} has maps and no tokens; use 'grid' or 'mean'")
        ends = [i for i, x in enumerate(blocks) if i + 1 == len(blocks) or blocks[i + 1].shape != x.shape]
        maps = {} if stem is None else {"stem": stem}
        maps |= {f"stage{number + 1}": blocks[i] for number, i in enumerate(ends)}
        levels = {name: pool_map(x) if pool == "grid" else x.mean(axis=(1, 2)) for name, x in maps.items()}
    return {**levels, "features": features}


def _encoder(method: Any) -> Any:
    core = getattr(method, "model", method)
    return getattr(core, "backbone", core)


def pool_map(x: Float[Array, "b h w c"], dims: int = MAP_DIMS) -> Float[Array, "b d"]:
    """A map averaged down to the largest grid of at most `dims` numbers, flattened; smaller maps are only flattened."""
    _, height, width, channels = x.shape
    size = max(1, math.isqrt(dims // channels))
    rows, columns = (_averages(length, min(size, length)) for length in (height, width))
    x = jnp.einsum("bhwc,ih,jw->bijc", x.astype(jnp.float32), rows, columns, precision="highest")
    return x.reshape(len(x), -1)


@lru_cache(maxsize=64)
def _averages(length: int, size: int) -> Float[np.ndarray, "size length"]:
    """The matrix that averages `length` positions over `size` windows."""
    if (length, size) in _WINDOWS:
        window, stride, padding = _WINDOWS[length, size]
        starts = np.arange(size) * stride - padding
        ends, weight = starts + window, np.full(size, 1 / window)  # padding counts as zeros
    else:
        starts, ends = np.arange(size) * length // size, -(-np.arange(1, size + 1) * length // size)
        weight = 1 / (ends - starts)
    at = np.arange(length)
    inside = (at >= starts[:, None]) & (at < ends[:, None])
    return (inside * weight[:, None]).astype(np.float32)
