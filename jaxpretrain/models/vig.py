"""Vision GNN: An Image is Worth Graph of Nodes (Han et al., 2022, arXiv:2206.00272).

Patches are nodes of a graph whose edges go to the most similar patches, found anew in each block. A block first gathers from
the neighbours (`Grapher`), then changes each node by itself (`FFN`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from jaxpretrain.build import ConfigError, nearest
from jaxpretrain.models.heads import ClsHead, Features, check_classes
from jaxpretrain.models.layers.activation import Activation, activation
from jaxpretrain.models.layers.arch import architecture, output_indices
from jaxpretrain.models.layers.base import BaseModule, Frozen, freeze_stage
from jaxpretrain.models.layers.conv import Conv2d, avg_pool2d
from jaxpretrain.models.layers.drop import Dropout, drop_path
from jaxpretrain.models.layers.linear import Linear
from jaxpretrain.models.layers.norm import BatchNorm, build_norm
from jaxpretrain.models.layers.position import _bicubic, resize_pos_embed
from jaxpretrain.models.layers.stack import apply_block

_BN, _GELU = {"type": "BN"}, {"type": "GELU"}


# --- The graph -------------------------------------------------------------------------------------------------------


def nearest_nodes(
    x: Float[Array, "b n c"],
    y: Float[Array, "b m c"],
    k: int,
    relative_pos: Float[Array, "1 n m"] | None = None,
) -> Int[Array, "b n k"]:
    """For each node of x the `k` nearest of y, the nearest first: by direction, and by position if there is a table.

    Distances are squared ones of unit vectors, in float32 at least; there is no gradient.
    """
    if k > y.shape[1]:
        raise ValueError(
            f"a map of {y.shape[1]} nodes has no {k} neighbours for each node: take larger images, or a smaller k"
        )

    def unit(x: Array) -> Array:
        x = lax.stop_gradient(x).astype(jnp.promote_types(x.dtype, jnp.float32))
        return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)

    x, y = unit(x), unit(y)
    squares = jnp.square(x).sum(-1)[:, :, None] + jnp.square(y).sum(-1)[:, None, :]
    distance = squares - 2 * jnp.einsum("bnc,bmc->bnm", x, y, precision="highest")
    if relative_pos is not None:
        distance = distance + relative_pos
    return lax.top_k(-distance, k)[1]


def gather_nodes(y: Float[Array, "b m c"], index: Int[Array, "b n k"]) -> Float[Array, "b n k c"]:
    """The features of each node's neighbours."""
    b, n, k = index.shape
    return jnp.take_along_axis(y, index.reshape(b, n * k, 1), axis=1).reshape(b, n, k, -1)


@lru_cache(maxsize=16)
def relative_positions(channels: int, grid: tuple[int, int], reduction: int = 1) -> Float[np.ndarray, "1 n m"]:
    """How far apart nodes are, as a term of `nearest_nodes`: less 2 / C times the product of their sin-cos positions.

    Args:
        channels: of the positions.
        grid: nodes down and across.
        reduction: the neighbours are a map so many times smaller, down and across. Their columns are then interpolated from
            those of the whole map, as if it had a single row: so the released weights were trained.

    Returns:
        float32, to the last digit what PyTorch made for the released weights: nearly equal distances are common, and which
        node is the nearer one decides.
    """
    frequency = np.float32(1) / np.float32(10000) ** (np.arange(channels // 4, dtype=np.float32) / (channels / 4))
    row, column = (index.reshape(-1, 1).astype(np.float32) * frequency for index in np.indices(grid))
    waves = np.concatenate([np.sin(column), np.cos(column), np.sin(row), np.cos(row)], axis=1)
    table = 2 * waves @ waves.T / channels
    if reduction > 1:
        table = _interpolate(table, (grid[0] // reduction) * (grid[1] // reduction))
    return -table[None].astype(np.float32)


def _interpolate(table: Float[np.ndarray, "n n"], columns: int) -> Float[np.ndarray, "n m"]:
    """Rows resampled to `columns` by a cubic, in PyTorch's order: four products are added up, each with one rounding."""
    count = table.shape[1]
    position = (np.arange(columns) + 0.5) * (count / columns) - 0.5
    first = np.floor(position).astype(int)
    total = np.zeros((1, 1), np.float32)
    for tap in (0, -1, 1, 2):
        weight = _bicubic(np.abs(position - first - tap)).astype(np.float32).astype(np.float64)
        product = table[:, np.clip(first + tap, 0, count - 1)] * weight  # exact in float64
        total = (product + total).astype(np.float32)
    return total


# --- Gathering from neighbours ---------------------------------------------------------------------------------------


def basic_conv(
    ins: int, outs: int, act_cfg: Mapping[str, Any] | None, norm_cfg: Mapping[str, Any] | None, bias: bool, rngs: Any
) -> nnx.List:
    """A linear map in four groups of channels, a norm and an activation."""
    layers: list[Any] = [Conv2d(ins, outs, 1, groups=4, bias=bias, rngs=rngs)]
    layers += [build_norm(norm_cfg, outs, rngs=rngs)] if norm_cfg else []
    layers += [Activation(act_cfg)] if act_cfg else []
    return nnx.List(layers)


def run(layers: Sequence[Any], x: Array) -> Array:
    """The layers one after the other."""
    for layer in layers:
        x = layer(x)
    return x


class MRConv2d(BaseModule):
    """Max-relative graph convolution: of what neighbours have more than the node, the most (Li et al., 2019, DeepGCNs)."""

    def __init__(self, ins: int, outs: int, *, rngs: nnx.Rngs, **conv: Any):
        self.nn = basic_conv(2 * ins, outs, rngs=rngs, **conv)

    def __call__(self, x: Float[Array, "b n 1 c"], near: Float[Array, "b n k c"]) -> Float[Array, "b n 1 d"]:
        most = near.max(axis=2, keepdims=True) - x
        return run(self.nn, jnp.stack([x, most], axis=-1).reshape(*x.shape[:-1], -1))  # channels of both in turn


class EdgeConv2d(BaseModule):
    """Edge convolution: the most of a map of node and difference to the neighbour (Wang et al., 2018)."""

    def __init__(self, ins: int, outs: int, *, rngs: nnx.Rngs, **conv: Any):
        self.nn = basic_conv(2 * ins, outs, rngs=rngs, **conv)

    def __call__(self, x: Float[Array, "b n 1 c"], near: Float[Array, "b n k c"]) -> Float[Array, "b n 1 d"]:
        edges = jnp.concatenate([jnp.broadcast_to(x, near.shape), near - x], axis=-1)
        return run(self.nn, edges).max(axis=2, keepdims=True)


class GraphSAGE(BaseModule):
    """The node beside the most of a map of its neighbours (Hamilton et al., 2017)."""

    def __init__(self, ins: int, outs: int, *, rngs: nnx.Rngs, **conv: Any):
        self.nn1 = basic_conv(ins, ins, rngs=rngs, **conv)
        self.nn2 = basic_conv(2 * ins, outs, rngs=rngs, **conv)

    def __call__(self, x: Float[Array, "b n 1 c"], near: Float[Array, "b n k c"]) -> Float[Array, "b n 1 d"]:
        most = run(self.nn1, near).max(axis=2, keepdims=True)
        return run(self.nn2, jnp.concatenate([x, most], axis=-1))


class GINConv2d(BaseModule):
    """The sum of neighbours and (1 + eps) times the node (Xu et al., 2019, GIN)."""

    def __init__(self, ins: int, outs: int, *, rngs: nnx.Rngs, **conv: Any):
        self.nn = basic_conv(ins, outs, rngs=rngs, **conv)
        self.eps = nnx.Param(jnp.zeros((1,)))

    def __call__(self, x: Float[Array, "b n 1 c"], near: Float[Array, "b n k c"]) -> Float[Array, "b n 1 d"]:
        return run(self.nn, (1 + self.eps[...].astype(x.dtype)) * x + near.sum(axis=2, keepdims=True))


_CONVS = {"edge": EdgeConv2d, "mr": MRConv2d, "sage": GraphSAGE, "gin": GINConv2d}


class DyGraphConv2d(BaseModule):
    """A graph convolution, `gconv`, over each node's nearest nodes.

    Args:
        ins, outs: channels.
        k: neighbours of a node.
        dilation: every so many of the nearest nodes is a neighbour.
        graph_conv_type: 'mr', 'edge', 'sage' or 'gin'.
        use_stochastic, epsilon: whether in training, with probability `epsilon`, neighbours are any of the k * dilation
            nearest nodes.
        r: neighbours are of the map averaged over r x r nodes.
        conv: act_cfg, norm_cfg and bias of the graph convolution.
    """

    def __init__(
        self,
        ins: int,
        outs: int,
        k: int,
        dilation: int,
        graph_conv_type: str,
        use_stochastic: bool,
        epsilon: float,
        r: int,
        *,
        rngs: nnx.Rngs,
        **conv: Any,
    ):
        if graph_conv_type not in _CONVS:
            raise ConfigError(f"graph_conv_type: no {graph_conv_type!r}.{nearest(graph_conv_type, _CONVS)}")
        self.k, self.dilation, self.r = k, dilation, r
        self.use_stochastic, self.epsilon, self.deterministic = use_stochastic, epsilon, False
        self.gconv = _CONVS[graph_conv_type](ins, outs, rngs=rngs, **conv)

    def __call__(
        self,
        x: Float[Array, "b h w c"],
        relative_pos: Float[Array, "1 n m"] | None = None,
        *,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "b h w d"]:
        b, h, w, c = x.shape
        others = (avg_pool2d(x, self.r) if self.r > 1 else x).reshape(b, -1, c)
        nodes = x.reshape(b, h * w, c)
        index = nearest_nodes(nodes, others, self.k * self.dilation, relative_pos)
        index = index[:, :, self._order(rngs)]
        return self.gconv(nodes[:, :, None], gather_nodes(others, index)).reshape(b, h, w, -1)

    def _order(self, rngs: nnx.Rngs | None) -> Int[Array | np.ndarray, " k"]:
        """Which of the nearest nodes are neighbours."""
        dilated = np.arange(0, self.k * self.dilation, self.dilation)
        if not self.use_stochastic or self.deterministic:
            return dilated
        if rngs is None:
            raise ValueError(
                "use_stochastic: in training mode a call needs `rngs`; pass them, or call model.eval() first"
            )
        key, coin = jax.random.split(rngs.dropout())
        drawn = jax.random.permutation(key, self.k * self.dilation)[: self.k]
        return jnp.where(jax.random.bernoulli(coin, self.epsilon), drawn, dilated)


def _linear_bn(ins: int, outs: int, groups: int, rngs: nnx.Rngs) -> nnx.List:
    return nnx.List([Conv2d(ins, outs, 1, rngs=rngs), BatchNorm(outs, groups=groups, rngs=rngs)])


class Grapher(BaseModule):
    """x + fc2(graph_conv(fc1(x))).

    Args:
        channels: of the map; the graph convolution makes twice as many.
        grid: (down, across) of the map that the table of relative positions is for; None for no table.
        drop_path: probability of dropping the branch of a sample in training.
        r: as of `DyGraphConv2d`.
        groups: of the BatchNorms: parts of the batch that are normalised apart.
        graph: other arguments of `DyGraphConv2d`.
    """

    def __init__(
        self,
        channels: int,
        grid: tuple[int, int] | None = None,
        drop_path: float = 0.0,
        r: int = 1,
        groups: int = 1,
        *,
        rngs: nnx.Rngs,
        **graph: Any,
    ):
        self.drop_path_rate, self.deterministic = drop_path, False
        self.channels, self.grid, self.r = channels, grid, r
        self.fc1 = _linear_bn(channels, channels, groups, rngs)
        self.graph_conv = DyGraphConv2d(channels, 2 * channels, r=r, rngs=rngs, **graph)
        self.fc2 = _linear_bn(2 * channels, channels, groups, rngs)
        self.relative_pos = None if grid is None else Frozen(jnp.asarray(relative_positions(channels, grid, r)))

    def __call__(self, x: Float[Array, "b h w c"], *, rngs: nnx.Rngs | None = None) -> Float[Array, "b h w c"]:
        y = self.graph_conv(run(self.fc1, x), self._relative_pos((x.shape[1], x.shape[2])), rngs=rngs)
        rate = 0.0 if self.deterministic else self.drop_path_rate
        return x + drop_path(run(self.fc2, y), rate, rngs)

    def _relative_pos(self, grid: tuple[int, int]) -> Float[Array, "1 n m"] | None:
        if self.relative_pos is None or grid == self.grid:
            return None if self.relative_pos is None else self.relative_pos[...]
        return jnp.asarray(relative_positions(self.channels, grid, self.r))


class FFN(BaseModule):
    """x + fc2(act(fc1(x))), with four times the channels in between; a norm after both layers."""

    def __init__(
        self,
        channels: int,
        act_cfg: Mapping[str, Any] = _GELU,
        drop_path: float = 0.0,
        groups: int = 1,
        *,
        rngs: nnx.Rngs,
    ):
        self.drop_path_rate, self.deterministic = drop_path, False
        self.fc1 = _linear_bn(channels, 4 * channels, groups, rngs)
        self.act = activation(act_cfg)
        self.fc2 = _linear_bn(4 * channels, channels, groups, rngs)

    def __call__(self, x: Float[Array, "b h w c"], *, rngs: nnx.Rngs | None = None) -> Float[Array, "b h w c"]:
        rate = 0.0 if self.deterministic else self.drop_path_rate
        return x + drop_path(run(self.fc2, self.act(run(self.fc1, x))), rate, rngs)


# --- The networks ----------------------------------------------------------------------------------------------------


def _stem(
    widths: Sequence[int], strides: Sequence[int], norm_cfg: Mapping[str, Any], act_cfg: Mapping[str, Any], rngs: Any
) -> nnx.List:
    """3x3 convolutions with norms, and activations between them."""
    layers: list[Any] = []
    for ins, outs, stride in zip(widths[:-1], widths[1:], strides, strict=True):
        layers += [Activation(act_cfg)] if layers else []
        layers += [Conv2d(ins, outs, 3, stride, 1, rngs=rngs), build_norm(norm_cfg, outs, rngs=rngs)]
    return nnx.List(layers)


class _Vig(BaseModule):
    """What both forms have in common: a stem, positions, and parts of the network that follow one another.

    Attributes:
        remat: what the backward pass recomputes of a block: 'none', 'full', or 'dots' (see `apply_block`).
    """

    stem: nnx.List[Any]
    pos_embed: nnx.Variable

    def _finish(self, parts: Any, out_indices: int | Sequence[int], norm_eval: bool, frozen_stages: int) -> None:
        name, count = type(self).__name__, len(parts)
        self.out_indices = output_indices(out_indices, count, name)
        self.remat = "none"
        if norm_eval:
            self.set_attributes(norm_eval=True, raise_if_not_found=False)
        if not 0 <= frozen_stages <= count:
            raise ConfigError(f"{name}: frozen_stages is 0 (none) to {count}, not {frozen_stages}")
        if frozen_stages:
            self.pos_embed = Frozen(self.pos_embed.get_value())
            for part in (self.stem, *parts[:frozen_stages]):
                freeze_stage(part)

    def _start(self, x: Float[Array, "b height width 3"]) -> Float[Array, "b h w c"]:
        """The stem's map, with positions, interpolated if need be."""
        x = run(self.stem, x)
        _, c, height, width = self.pos_embed.shape
        table = self.pos_embed[...].transpose(0, 2, 3, 1).reshape(1, height * width, c)
        table = resize_pos_embed(table, (height, width), (x.shape[1], x.shape[2]), num_extra_tokens=0)
        return x + table.reshape(1, *x.shape[1:]).astype(x.dtype)

    def _blocks(self, blocks: Sequence[Any], x: Array, rngs: nnx.Rngs | None) -> Array:
        for block in blocks:
            x = apply_block(block, x, rngs=rngs, remat=self.remat)
        return x


class Vig(_Vig):
    """Vision GNN with maps of one size: [B, H, W, 3] -> a tuple of maps [B, H/16, W/16, C].

    Args:
        arch: 'tiny', 'small', 'base', or a dictionary with num_blocks and channels.
        in_channels: channels of the images.
        k: neighbours of a node in the first block; it grows linearly to twice as many in the last.
        out_indices: the blocks whose outputs are returned; negative ones count from the end.
        act_cfg, norm_cfg: activations, and the norms of stem and graph convolutions. Others are BatchNorms, which take the
            `groups` of `norm_cfg`.
        graph_conv_bias: whether graph convolutions have biases.
        graph_conv_type: 'mr' (max-relative), 'edge', 'sage' or 'gin'.
        epsilon, use_stochastic: see `DyGraphConv2d`.
        use_dilation: whether neighbours are taken from further and further away: every i / 4 + 1 of the nearest in block i.
        drop_path: stochastic depth of the last block; it grows linearly from 0 in the first.
        relative_pos: whether similarity has a term of relative position.
        norm_eval: whether BatchNorms always use their running statistics.
        frozen_stages: how many first blocks do not learn, with the stem and positions; 0: all learn.
        init_cfg: initialisation, MMEngine's dictionaries.

    Positions are for images of 224 px; for others they are interpolated (MMPretrain takes no others). In training, the stem
    normalises by the batch (MMPretrain's: by running statistics that never move).
    """

    archs: ClassVar[dict[tuple[str, ...], dict[str, Any]]] = {
        ("tiny",): dict(num_blocks=12, channels=192),
        ("small",): dict(num_blocks=16, channels=320),
        ("base",): dict(num_blocks=16, channels=640),
    }

    def __init__(
        self,
        arch: str | Mapping[str, Any],
        in_channels: int = 3,
        k: int = 9,
        out_indices: int | Sequence[int] = -1,
        act_cfg: Mapping[str, Any] = _GELU,
        norm_cfg: Mapping[str, Any] = _BN,
        graph_conv_bias: bool = True,
        graph_conv_type: str = "mr",
        epsilon: float = 0.2,
        use_dilation: bool = True,
        use_stochastic: bool = False,
        drop_path: float = 0.0,
        relative_pos: bool = False,
        norm_eval: bool = False,
        frozen_stages: int = 0,
        init_cfg: Any = None,
        *,
        rngs: nnx.Rngs,
    ):
        self.init_cfg = init_cfg
        size = architecture(arch, self.archs, "Vig")
        count, c = size["num_blocks"], size["channels"]
        self.stem = _stem([in_channels, c // 8, c // 4, c // 2, c, c], [2, 2, 2, 2, 1], norm_cfg, act_cfg, rngs)
        self.pos_embed = nnx.Param(jnp.zeros((1, c, 14, 14)))
        graph: dict[str, Any] = dict(graph_conv_type=graph_conv_type, use_stochastic=use_stochastic, epsilon=epsilon)
        graph |= dict(act_cfg=act_cfg, norm_cfg=norm_cfg, bias=graph_conv_bias)
        groups = norm_cfg.get("groups", 1)
        blocks = []
        for i, rate in enumerate(np.linspace(0, drop_path, count).tolist()):
            grapher = Grapher(
                c,
                (14, 14) if relative_pos else None,
                rate,
                groups=groups,
                k=k + k * i // max(count - 1, 1),
                dilation=min(i // 4 + 1, 196 // (2 * k)) if use_dilation else 1,
                rngs=rngs,
                **graph,
            )
            blocks.append(nnx.List([grapher, FFN(c, act_cfg, rate, groups, rngs=rngs)]))
        self.blocks = nnx.List(blocks)
        self._finish(self.blocks, out_indices, norm_eval, frozen_stages)

    def __call__(
        self, x: Float[Array, "b height width 3"], *, rngs: nnx.Rngs | None = None
    ) -> tuple[Float[Array, "b h w c"], ...]:
        """The maps at `out_indices`, in order. `rngs` is for what is drawn in training."""
        x, outs = self._start(x), []
        for i, block in enumerate(self.blocks):
            x = self._blocks(block, x, rngs)
            if i in self.out_indices:
                outs.append(x)
        return tuple(outs)


class PyramidVig(_Vig):
    """Vision GNN in stages: [B, H, W, 3] -> a tuple of maps; the last is [B, H/32, W/32, C].

    Each stage but the first starts with a convolution of stride 2. In the first two, neighbours are of a map that is 4 and 2
    times smaller; similarity always has a term of relative position.

    Args:
        arch: 'tiny', 'small', 'medium', 'base', or a dictionary with blocks and channels of the stages.
        k: neighbours of a node.
        out_indices: the stages whose outputs are returned; negative ones count from the end.
        frozen_stages: how many first stages do not learn, with the stem and positions; 0: all learn.
        in_channels, act_cfg, norm_cfg, graph_conv_bias, graph_conv_type, epsilon, use_stochastic, drop_path, norm_eval,
            init_cfg: as of `Vig`.
    """

    archs: ClassVar[dict[tuple[str, ...], dict[str, Any]]] = {
        ("tiny",): dict(blocks=[2, 2, 6, 2], channels=[48, 96, 240, 384]),
        ("small",): dict(blocks=[2, 2, 6, 2], channels=[80, 160, 400, 640]),
        ("medium",): dict(blocks=[2, 2, 16, 2], channels=[96, 192, 384, 768]),
        ("base",): dict(blocks=[2, 2, 18, 2], channels=[128, 256, 512, 1024]),
    }

    def __init__(
        self,
        arch: str | Mapping[str, Any],
        in_channels: int = 3,
        k: int = 9,
        out_indices: int | Sequence[int] = -1,
        act_cfg: Mapping[str, Any] = _GELU,
        norm_cfg: Mapping[str, Any] = _BN,
        graph_conv_bias: bool = True,
        graph_conv_type: str = "mr",
        epsilon: float = 0.2,
        use_stochastic: bool = False,
        drop_path: float = 0.0,
        norm_eval: bool = False,
        frozen_stages: int = 0,
        init_cfg: Any = None,
        *,
        rngs: nnx.Rngs,
    ):
        self.init_cfg = init_cfg
        size = architecture(arch, self.archs, "PyramidVig")
        counts, widths = list(size["blocks"]), list(size["channels"])
        if not len(counts) == len(widths) <= 4:
            raise ConfigError(
                f"PyramidVig: {len(counts)} blocks and {len(widths)} channels; one for each of 1 to 4 stages"
            )
        self.stem = _stem([in_channels, widths[0] // 2, widths[0], widths[0]], [2, 2, 1], norm_cfg, act_cfg, rngs)
        self.pos_embed = nnx.Param(jnp.zeros((1, widths[0], 56, 56)))
        graph: dict[str, Any] = dict(
            graph_conv_type=graph_conv_type, use_stochastic=use_stochastic, epsilon=epsilon, k=k
        )
        graph |= dict(act_cfg=act_cfg, norm_cfg=norm_cfg, bias=graph_conv_bias)
        groups = norm_cfg.get("groups", 1)
        rates = np.linspace(0, drop_path, sum(counts)).tolist()
        stages: list[Any] = []
        block = 0
        for i, (count, c) in enumerate(zip(counts, widths, strict=True)):
            side = 56 // 2**i
            parts: list[Any] = []
            if i > 0:
                down = Conv2d(widths[i - 1], c, 3, 2, 1, rngs=rngs)
                parts.append(nnx.List([down, build_norm(norm_cfg, c, rngs=rngs)]))
            for _ in range(count):
                dilation = min(block // 4 + 1, 49 // k)
                grapher = Grapher(
                    c, (side, side), rates[block], (4, 2, 1, 1)[i], groups, dilation=dilation, rngs=rngs, **graph
                )
                parts.append(nnx.List([grapher, FFN(c, act_cfg, rates[block], groups, rngs=rngs)]))
                block += 1
            stages.append(nnx.List(parts))
        self.stages = nnx.List(stages)
        self._finish(self.stages, out_indices, norm_eval, frozen_stages)

    def __call__(
        self, x: Float[Array, "b height width 3"], *, rngs: nnx.Rngs | None = None
    ) -> tuple[Float[Array, "b h w c"], ...]:
        """The maps at `out_indices`, in order. `rngs` is for what is drawn in training."""
        x, outs = self._start(x), []
        for i, stage in enumerate(self.stages):
            for j, part in enumerate(stage):
                x = run(part, x) if i > 0 and j == 0 else self._blocks(part, x, rngs)
            if i in self.out_indices:
                outs.append(x)
        return tuple(outs)


class VigClsHead(ClsHead):
    """fc2(dropout(act(bn(fc1(x))))).

    Args:
        num_classes: number of classes.
        in_channels: channels of the features.
        hidden_dim: channels in between.
        act_cfg: the activation.
        dropout: of the hidden channels, in training.
        groups: of the BatchNorm: parts of the batch that are normalised apart.
        kwargs: `loss`, `topk`, `cal_acc` and `init_cfg` of `ClsHead`.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        hidden_dim: int = 1024,
        act_cfg: Mapping[str, Any] = _GELU,
        dropout: float = 0.0,
        groups: int = 1,
        *,
        rngs: nnx.Rngs,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        check_classes(self, num_classes)
        self.num_classes, self.in_channels = num_classes, in_channels
        self.fc1 = Linear(in_channels, hidden_dim, rngs=rngs)
        self.bn = BatchNorm(hidden_dim, groups=groups, rngs=rngs)
        self.act = activation(act_cfg)
        self.drop = Dropout(dropout)
        self.fc2 = Linear(hidden_dim, num_classes, rngs=rngs)

    def pre_logits(self, feats: Features, *, rngs: nnx.Rngs | None = None) -> Float[Array, "b c"]:
        """The input of the last linear layer."""
        return self.drop(self.act(self.bn(self.fc1(super().pre_logits(feats)))), rngs=rngs)

    def __call__(self, feats: Features, *, rngs: nnx.Rngs | None = None) -> Float[Array, "b classes"]:
        """Logits, before softmax. `rngs` is for dropout in training."""
        return self.fc2(self.pre_logits(feats, rngs=rngs))
