"""HorNet: Efficient High-Order Spatial Interactions with Recursive Gated Convolutions (Rao et al., 2022,
https://arxiv.org/abs/2207.14284). Variants with `-gf` have global filters in the last two stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from jaxpretrain.build import ConfigError, nearest
from jaxpretrain.models.layers.activation import activation
from jaxpretrain.models.layers.arch import architecture, output_indices
from jaxpretrain.models.layers.base import BaseModule, freeze_stage
from jaxpretrain.models.layers.conv import Conv2d, global_avg_pool
from jaxpretrain.models.layers.drop import drop_path
from jaxpretrain.models.layers.layer_scale import LayerScale
from jaxpretrain.models.layers.linear import Linear
from jaxpretrain.models.layers.norm import LayerNorm
from jaxpretrain.models.layers.stack import apply_layers

_layer_norm = partial(LayerNorm, eps=1e-6)


def _depthwise(channels: int, kernel_size: int, bias: bool = True, *, rngs: nnx.Rngs) -> Conv2d:
    return Conv2d(
        channels, channels, kernel_size, padding=(kernel_size - 1) // 2, groups=channels, bias=bias, rngs=rngs
    )


def _stretch(source: int, target: int) -> Float[np.ndarray, "target source"]:
    """Linear interpolation of `source` values at `target` places, the first and last of which are theirs."""
    if target == 1:
        return np.eye(1, source)
    places = np.linspace(0, source - 1, target)[:, None]
    return np.maximum(1 - np.abs(places - np.arange(source)), 0)


class GlobalLocalFilter(BaseModule):
    """A 3x3 depthwise convolution of one half of the channels, and a learnt filter of frequencies of the other.

    The filter has the size of the map: multiplying spectra is a circular convolution as large as the image (GFNet: Rao et
    al., 2021, https://arxiv.org/abs/2107.00645). Its spectrum is interpolated for maps of another size.

    Args:
        dim: channels; even.
        h, w: frequencies of the filter: the map's height, and half its width plus one.
    """

    def __init__(self, dim: int, h: int = 14, w: int = 8, *, rngs: nnx.Rngs):
        self.dw = _depthwise(dim // 2, 3, bias=False, rngs=rngs)
        self.complex_weight = nnx.Param(0.02 * jax.random.normal(rngs.params(), (dim // 2, h, w, 2)))
        self.pre_norm, self.post_norm = _layer_norm(dim), _layer_norm(dim)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        near, far = jnp.split(self.pre_norm(x), 2, axis=-1)
        y = jnp.stack([self.dw(near), self._filter(far)], axis=-1)  # halves take turns in what follows
        return self.post_norm(y.reshape(x.shape))

    def _filter(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """In float32 at least."""
        size, wide = x.shape[1:3], jnp.promote_types(x.dtype, jnp.float32)
        spectrum = jnp.fft.rfft2(x.astype(wide), axes=(1, 2), norm="ortho")
        weight = self.complex_weight[...].astype(wide)
        if weight.shape[1:3] != spectrum.shape[1:3]:
            down, across = (
                jnp.asarray(_stretch(*sizes), wide)
                for sizes in zip(weight.shape[1:3], spectrum.shape[1:3], strict=True)
            )
            weight = jnp.einsum("ih,chwr,jw->cijr", down, weight, across, precision="highest")
        gain = lax.complex(weight[..., 0], weight[..., 1]).transpose(1, 2, 0)
        return jnp.fft.irfft2(spectrum * gain, size, axes=(1, 2), norm="ortho").astype(x.dtype)


class gnConv(BaseModule):
    """Recursive gated convolution: p <- proj(p) * q, over features q of growing width (eq. 5).

    All q are channels of one convolution of large reach, so that each order of interaction costs one product.

    Args:
        dim: channels of input and output; a multiple of 2^(order - 1).
        order: how many products.
        dw_cfg: the convolution: dict(type='DW', kernel_size=7), or dict(type='GF', h=14, w=8) for `GlobalLocalFilter`.
        scale: factor of its results.
    """

    def __init__(
        self,
        dim: int,
        order: int = 5,
        dw_cfg: Mapping[str, Any] = {"type": "DW", "kernel_size": 7},
        scale: float = 1.0,
        *,
        rngs: nnx.Rngs,
    ):
        if dim % 2 ** (order - 1):
            raise ConfigError(f"gnConv: {dim} channels cannot be halved {order - 1} times, as order={order} needs")
        kinds: dict[str, Any] = {"DW": _depthwise, "GF": GlobalLocalFilter}
        args = dict(dw_cfg)
        if (kind := args.pop("type")) not in kinds:
            raise ConfigError(f"gnConv: dw_cfg has no type {kind!r}.{nearest(str(kind), kinds)}")
        self.scale, self.dims = scale, tuple(dim // 2**i for i in reversed(range(order)))
        self.proj_in = Conv2d(dim, 2 * dim, 1, rngs=rngs)
        self.dwconv = kinds[kind](sum(self.dims), **args, rngs=rngs)
        self.proj_out = Conv2d(dim, dim, 1, rngs=rngs)
        self.projs = nnx.List(Conv2d(a, b, 1, rngs=rngs) for a, b in pairwise(self.dims))

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        p, q = jnp.split(self.proj_in(x), [self.dims[0]], axis=-1)
        first, *others = jnp.split(self.dwconv(q) * self.scale, np.cumsum(self.dims)[:-1].tolist(), axis=-1)
        p = p * first
        for project, gate in zip(self.projs, others, strict=True):
            p = project(p) * gate
        return self.proj_out(p)


class HorNetBlock(BaseModule):
    """x + gamma1 * gnconv(norm1(x)), then x + gamma2 * mlp(norm2(x)).

    Args:
        dim: channels of input and output.
        order, dw_cfg, scale: of `gnConv`.
        drop_path_rate: probability of dropping a branch of a sample.
        use_layer_scale: whether branches have a `LayerScale`.
    """

    def __init__(
        self,
        dim: int,
        order: int = 5,
        dw_cfg: Mapping[str, Any] = {"type": "DW", "kernel_size": 7},
        scale: float = 1.0,
        drop_path_rate: float = 0.0,
        use_layer_scale: bool = True,
        *,
        rngs: nnx.Rngs,
    ):
        self.drop_path_rate, self.deterministic = float(drop_path_rate), False
        self.norm1, self.norm2 = _layer_norm(dim), _layer_norm(dim)
        self.gnconv = gnConv(dim, order, dw_cfg, scale, rngs=rngs)
        self.pwconv1, self.pwconv2 = Linear(dim, 4 * dim, rngs=rngs), Linear(4 * dim, dim, rngs=rngs)
        self.act = activation({"type": "GELU"})
        self.gamma1 = LayerScale(dim) if use_layer_scale else None
        self.gamma2 = LayerScale(dim) if use_layer_scale else None

    def __call__(
        self, x: Float[Array, "b h w c"], *, rngs: nnx.Rngs | None = None, drop_path_rate: float | Array | None = None
    ) -> Float[Array, "b h w c"]:
        """`drop_path_rate` replaces the block's own; it may be traced (see `apply_layers`)."""
        rate = self.drop_path_rate if drop_path_rate is None else drop_path_rate
        rate = 0.0 if self.deterministic else rate
        y = self.gnconv(self.norm1(x))
        x = x + drop_path(y if self.gamma1 is None else self.gamma1(y), rate, rngs)
        y = self.pwconv2(self.act(self.pwconv1(self.norm2(x))))
        return x + drop_path(y if self.gamma2 is None else self.gamma2(y), rate, rngs)


def _arch(base_dim: int, *frequencies: tuple[int, int]) -> dict[str, Any]:
    """The sizes all have in common, with global filters of these frequencies in the last stages."""
    convs: list[dict[str, Any]] = [dict(type="DW", kernel_size=7)] * (4 - len(frequencies))
    filters: list[dict[str, Any]] = [dict(type="GF", h=h, w=w) for h, w in frequencies]
    return dict(base_dim=base_dim, depths=[2, 3, 18, 2], orders=[2, 3, 4, 5], dw_cfg=convs + filters)


_FOR_224, _FOR_384 = ((14, 8), (7, 4)), ((24, 12), (13, 7))


class HorNet(BaseModule):
    """HorNet, for images of any size: [B, H, W, in_channels] -> a tuple of features, [B, C] each by default.

    Args:
        arch: 'tiny', 'small', 'base' or 'large' (t, s, b, l), with `-gf` for global filters; 'base-gf384' and
            'large-gf384' have filters for images of 384 pixels. Or a dict with base_dim, and depths, orders and dw_cfg of
            each of four stages.
        in_channels: channels of the images.
        drop_path_rate: stochastic depth of the last block; grows linearly from 0 at the first.
        scale: factor of what the large convolutions give.
        use_layer_scale: whether blocks have a `LayerScale` on each branch.
        out_indices: the stages whose features are returned, from 0; negative ones count from the end.
        frozen_stages: the last stage that does not learn; all before it and their norms do not either. -1 for none.
        with_cp: MMPretrain's name for `remat='full'`.
        gap_before_final_norm: whether features are averaged over the image, before their norm; else they are maps.
        init_cfg: initialisation (see `BaseModule`).

    Attributes:
        scan_layers, remat: how the blocks are run (see `apply_layers`); False and 'none' unless set.

    Raises:
        ConfigError: an unknown name, or stages that do not exist.
    """

    archs: ClassVar[dict[tuple[str, ...], dict[str, Any]]] = {
        ("t", "tiny"): _arch(64),
        ("t-gf", "tiny-gf"): _arch(64, *_FOR_224),
        ("s", "small"): _arch(96),
        ("s-gf", "small-gf"): _arch(96, *_FOR_224),
        ("b", "base"): _arch(128),
        ("b-gf", "base-gf"): _arch(128, *_FOR_224),
        ("b-gf384", "base-gf384"): _arch(128, *_FOR_384),
        ("l", "large"): _arch(192),
        ("l-gf", "large-gf"): _arch(192, *_FOR_224),
        ("l-gf384", "large-gf384"): _arch(192, *_FOR_384),
    }

    def __init__(
        self,
        arch: str | Mapping[str, Any] = "tiny",
        in_channels: int = 3,
        drop_path_rate: float = 0.0,
        scale: float = 1 / 3,
        use_layer_scale: bool = True,
        out_indices: int | Sequence[int] = (3,),
        frozen_stages: int = -1,
        with_cp: bool = False,
        gap_before_final_norm: bool = True,
        init_cfg: Any = None,
        *,
        rngs: nnx.Rngs,
    ):
        size = architecture(arch, self.archs, "HorNet")
        depths, orders, dw_cfgs = size["depths"], size["orders"], size["dw_cfg"]
        if not len(depths) == len(orders) == len(dw_cfgs) == 4:
            raise ConfigError(
                f"HorNet: four stages need as many depths, orders and dw_cfg, not {len(depths)}, {len(orders)} and "
                f"{len(dw_cfgs)}"
            )
        self.init_cfg, self.gap_before_final_norm = init_cfg, gap_before_final_norm
        self.out_indices = output_indices(out_indices, 4, "HorNet")
        self.scan_layers, self.remat = False, "full" if with_cp else "none"

        dims = [size["base_dim"] * 2**i for i in range(4)]
        self.downsample_layers = nnx.List(
            [nnx.List([Conv2d(in_channels, dims[0], 4, 4, rngs=rngs), _layer_norm(dims[0])])]
        )
        for ins, outs in pairwise(dims):
            self.downsample_layers.append(nnx.List([_layer_norm(ins), Conv2d(ins, outs, 2, 2, rngs=rngs)]))
        rates = iter(np.linspace(0, drop_path_rate, sum(depths)).tolist())
        self.stages = nnx.List(
            nnx.List(
                HorNetBlock(dims[i], orders[i], dw_cfgs[i], scale, next(rates), use_layer_scale, rngs=rngs)
                for _ in range(depths[i])
            )
            for i in range(4)
        )
        for i in self.out_indices:
            setattr(self, f"norm{i}", _layer_norm(dims[i]))

        if not -1 <= frozen_stages < 4:
            raise ConfigError(f"HorNet: frozen_stages is -1 (none) to 3, not {frozen_stages}")
        for i in range(frozen_stages + 1):
            parts: list[nnx.Module] = [self.downsample_layers[i], self.stages[i]]
            parts += [getattr(self, f"norm{i}")] if i in self.out_indices else []
            for part in parts:
                freeze_stage(part)

    def __call__(
        self, x: Float[Array, "b h w c"], *, rngs: nnx.Rngs | None = None
    ) -> tuple[Float[Array, "b *grid c2"], ...]:
        """The features of the chosen stages, normalised; `rngs` is for drop path in training."""
        outputs = []
        for i, (downsample, blocks) in enumerate(zip(self.downsample_layers, self.stages, strict=True)):
            for layer in downsample:
                x = layer(x)
            x, _ = apply_layers(blocks, x, rngs=rngs, scan_layers=self.scan_layers, remat=self.remat)
            if i in self.out_indices:
                norm = getattr(self, f"norm{i}")
                outputs.append(norm(global_avg_pool(x) if self.gap_before_final_norm else x))
        return tuple(outputs)
