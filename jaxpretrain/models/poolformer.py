"""PoolFormer: MetaFormer is Actually What You Need for Vision (Yu et al., 2022, https://arxiv.org/abs/2111.11418).

A transformer whose tokens are mixed by average pooling, which learns nothing, in place of attention.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxpretrain.build import ConfigError, nearest
from jaxpretrain.models.layers.activation import activation
from jaxpretrain.models.layers.base import BaseModule, freeze_stage
from jaxpretrain.models.layers.conv import Conv2d, avg_pool2d
from jaxpretrain.models.layers.drop import Dropout, drop_path
from jaxpretrain.models.layers.norm import build_norm
from jaxpretrain.models.layers.stack import apply_layers

_GN = {"type": "GN", "num_groups": 1}
_GELU = {"type": "GELU"}


class PatchEmbed(BaseModule):
    """Overlapping patches to channels by a convolution, `proj`: the stem, and the downsampling between stages."""

    def __init__(self, ins: int, outs: int, patch_size: int, stride: int, padding: int, *, rngs: nnx.Rngs):
        self.proj = Conv2d(ins, outs, patch_size, stride, padding, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        return self.proj(x)


class Pooling(nnx.Module):
    """The mean over a window of positions, less the position itself: blocks have a shortcut, which adds it again."""

    def __init__(self, pool_size: int = 3):
        self.pool_size = pool_size

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        return avg_pool2d(x, self.pool_size, 1, self.pool_size // 2, count_include_pad=False) - x


class Mlp(BaseModule):
    """Two 1x1 convolutions, an activation between them, and dropout after each."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        act_cfg: Mapping[str, Any] = _GELU,
        drop: float = 0.0,
        *,
        rngs: nnx.Rngs,
    ):
        self.fc1 = Conv2d(in_features, hidden_features, 1, rngs=rngs)
        self.act = activation(act_cfg)
        self.fc2 = Conv2d(hidden_features, in_features, 1, rngs=rngs)
        self.drop = Dropout(drop)

    def __call__(self, x: Float[Array, "b h w c"], *, rngs: nnx.Rngs | None = None) -> Float[Array, "b h w c"]:
        x = self.drop(self.act(self.fc1(x)), rngs=rngs)
        return self.drop(self.fc2(x), rngs=rngs)


class PoolFormerBlock(BaseModule):
    """x + scale1 * mix(norm1(x)), then x + scale2 * mlp(norm2(x)), with a learned factor for each channel.

    Args:
        dim: channels.
        pool_size: side of the window of the pooling.
        mlp_ratio: hidden channels of the MLP, as a multiple of `dim`.
        norm_cfg, act_cfg: norms and activation.
        drop: dropout of the MLP.
        drop_path: probability of dropping a branch of a sample in training.
        layer_scale_init_value: where the factors start.
    """

    def __init__(
        self,
        dim: int,
        pool_size: int = 3,
        mlp_ratio: float = 4.0,
        norm_cfg: Mapping[str, Any] = _GN,
        act_cfg: Mapping[str, Any] = _GELU,
        drop: float = 0.0,
        drop_path: float = 0.0,
        layer_scale_init_value: float = 1e-5,
        *,
        rngs: nnx.Rngs,
    ):
        self.drop_path_rate, self.deterministic = drop_path, False
        self._build_mixer(dim, pool_size, norm_cfg, rngs)
        self.norm2 = build_norm(norm_cfg, dim, rngs=rngs)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_cfg, drop, rngs=rngs)
        self.layer_scale_1 = nnx.Param(jnp.full((dim,), layer_scale_init_value))
        self.layer_scale_2 = nnx.Param(jnp.full((dim,), layer_scale_init_value))

    def _build_mixer(self, dim: int, pool_size: int, norm_cfg: Mapping[str, Any], rngs: nnx.Rngs) -> None:
        self.norm1 = build_norm(norm_cfg, dim, rngs=rngs)
        self.token_mixer = Pooling(pool_size)

    def mix(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """The first branch, before its factors."""
        return self.token_mixer(self.norm1(x))

    def __call__(
        self, x: Float[Array, "b h w c"], *, rngs: nnx.Rngs | None = None, drop_path_rate: float | Array | None = None
    ) -> Float[Array, "b h w c"]:
        """`drop_path_rate` replaces the block's own; it may be traced (see `apply_layers`)."""
        rate = self.drop_path_rate if drop_path_rate is None else drop_path_rate
        rate = 0.0 if self.deterministic else rate
        x = x + drop_path(self.mix(x) * self.layer_scale_1[...].astype(x.dtype), rate, rngs)
        y = self.mlp(self.norm2(x), rngs=rngs)
        return x + drop_path(y * self.layer_scale_2[...].astype(x.dtype), rate, rngs)


class PoolFormer(BaseModule):
    """PoolFormer: [B, H, W, 3] -> a tuple of maps; the last is [B, H/32, W/32, C].

    Args:
        arch: 's12', 's24', 's36', 'm36', 'm48'; or a dictionary with layers and embed_dims, and maybe mlp_ratios, each with
            a number for each stage, and layer_scale_init_value.
        pool_size: side of the window of the pooling.
        norm_cfg, act_cfg: norms and activations.
        in_patch_size, in_stride, in_pad: of the first convolution.
        down_patch_size, down_stride, down_pad: of those between stages; stages of the same channels have none.
        drop_rate: dropout of the MLPs.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0 in the first.
        out_indices: positions whose outputs are returned, each through a norm: 0, 2, 4, 6 are the stages, 1, 3, 5 the
            convolutions between them. Negative ones count from the end.
        frozen_stages: how many of these positions do not learn, besides the first convolution; -1: nor that is frozen.
        init_cfg: initialisation, MMEngine's dictionaries.

    Attributes:
        scan_layers, remat: how the blocks of a stage are run (see `apply_layers`).
    """

    arch_settings: ClassVar[dict[str, dict[str, Any]]] = {
        name: dict(layers=layers, embed_dims=widths, mlp_ratios=[4, 4, 4, 4], layer_scale_init_value=scale)
        for name, layers, widths, scale in (
            ("s12", [2, 2, 6, 2], [64, 128, 320, 512], 1e-5),
            ("s24", [4, 4, 12, 4], [64, 128, 320, 512], 1e-5),
            ("s36", [6, 6, 18, 6], [64, 128, 320, 512], 1e-6),
            ("m36", [6, 6, 18, 6], [96, 192, 384, 768], 1e-6),
            ("m48", [8, 8, 24, 8], [96, 192, 384, 768], 1e-6),
        )
    }

    def __init__(
        self,
        arch: str | Mapping[str, Any] = "s12",
        pool_size: int = 3,
        norm_cfg: Mapping[str, Any] = _GN,
        act_cfg: Mapping[str, Any] = _GELU,
        in_patch_size: int = 7,
        in_stride: int = 4,
        in_pad: int = 2,
        down_patch_size: int = 3,
        down_stride: int = 2,
        down_pad: int = 1,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        out_indices: int | Sequence[int] = -1,
        frozen_stages: int = 0,
        init_cfg: Any = None,
        *,
        rngs: nnx.Rngs,
    ):
        block = {"norm_cfg": norm_cfg, "act_cfg": act_cfg, "drop": drop_rate, "pool_size": pool_size}
        self._build(
            arch,
            3,
            (in_patch_size, in_stride, in_pad),
            (down_patch_size, down_stride, down_pad),
            block,
            drop_path_rate,
            out_indices,
            init_cfg,
            rngs,
        )
        self._freeze(frozen_stages, frozen_stages)

    def _block(self, **args: Any) -> nnx.Module:
        return PoolFormerBlock(**args)

    def _build(
        self,
        arch: str | Mapping[str, Any],
        in_channels: int,
        patches: tuple[int, int, int],
        downsampling: tuple[int, int, int],
        block: dict[str, Any],
        drop_path_rate: float,
        out_indices: int | Sequence[int],
        init_cfg: Any,
        rngs: nnx.Rngs,
    ) -> None:
        name = type(self).__name__
        self.init_cfg, self.scan_layers, self.remat = init_cfg, False, "none"
        if isinstance(arch, str):
            if arch not in self.arch_settings:
                raise ConfigError(f"{name} has no arch {arch!r}.{nearest(arch, self.arch_settings)}")
            arch = self.arch_settings[arch]
        if missing := {"layers", "embed_dims"} - set(arch):
            raise ConfigError(f"{name}: arch lacks {sorted(missing)}")
        depths, widths = list(arch["layers"]), list(arch["embed_dims"])
        ratios = arch.get("mlp_ratios", [4] * len(depths))
        block = block | {"layer_scale_init_value": arch.get("layer_scale_init_value", 1e-5), "rngs": rngs}

        self.patch_embed = PatchEmbed(in_channels, widths[0], *patches, rngs=rngs)
        network: list[Any] = []
        outs, count = [], 0  # channels at each position, blocks so far
        for i, (depth, width, ratio) in enumerate(zip(depths, widths, ratios, strict=True)):
            if i > 0 and widths[i - 1] != width:
                network.append(PatchEmbed(widths[i - 1], width, *downsampling, rngs=rngs))
                outs.append(width)
            rates = [drop_path_rate * (count + j) / max(sum(depths) - 1, 1) for j in range(depth)]
            network.append(
                nnx.List([self._block(dim=width, mlp_ratio=ratio, drop_path=rate, **block) for rate in rates])
            )
            outs.append(width)
            count += depth
        self.network = nnx.List(network)

        indices = (out_indices,) if isinstance(out_indices, int) else tuple(out_indices)
        if not all(-len(outs) <= i < len(outs) for i in indices):
            raise ConfigError(f"{name}: out_indices {indices} must be in {-len(outs)} ... {len(outs) - 1}")
        self.out_indices = tuple(sorted({i % len(outs) for i in indices}))
        for i in self.out_indices:
            setattr(self, f"norm{i}", build_norm(block["norm_cfg"], outs[i], rngs=rngs))

    def _freeze(self, frozen_stages: int, positions: int) -> None:
        """Freezes the first `positions` of the network, and the first convolution unless `frozen_stages` is -1."""
        if not -1 <= frozen_stages <= len(self.network):
            name = type(self).__name__
            raise ConfigError(f"{name}: frozen_stages is -1 (none) to {len(self.network)}, not {frozen_stages}")
        if frozen_stages < 0:
            return
        freeze_stage(self.patch_embed)
        for i in range(min(positions, len(self.network))):
            freeze_stage(self.network[i])
            if i in self.out_indices:
                freeze_stage(getattr(self, f"norm{i}"))

    def __call__(
        self, x: Float[Array, "b h w c"], *, rngs: nnx.Rngs | None = None
    ) -> tuple[Float[Array, "b h2 w2 c2"], ...]:
        """The normalised maps at `out_indices`, in order. `rngs` is for dropout and drop path in training."""
        x = self.patch_embed(x)
        outs = []
        for i, layer in enumerate(self.network):
            if isinstance(layer, nnx.List):
                x, _ = apply_layers(layer, x, rngs=rngs, scan_layers=self.scan_layers, remat=self.remat)
            else:
                x = layer(x)
            if i in self.out_indices:
                outs.append(getattr(self, f"norm{i}")(x))
        return tuple(outs)
