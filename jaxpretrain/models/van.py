"""VAN: Visual Attention Network (Guo et al., 2023, https://arxiv.org/abs/2202.09741)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from jaxpretrain.build import ConfigError
from jaxpretrain.models.layers.activation import activation
from jaxpretrain.models.layers.arch import architecture, output_indices
from jaxpretrain.models.layers.base import BaseModule, freeze_stage
from jaxpretrain.models.layers.conv import Conv2d
from jaxpretrain.models.layers.drop import Dropout, drop_path
from jaxpretrain.models.layers.norm import build_norm
from jaxpretrain.models.layers.stack import apply_block


def _depthwise(channels: int, kernel_size: int, dilation: int = 1, *, rngs: nnx.Rngs) -> Conv2d:
    padding = dilation * (kernel_size // 2)
    return Conv2d(channels, channels, kernel_size, padding=padding, dilation=dilation, groups=channels, rngs=rngs)


class MixFFN(BaseModule):
    """fc2(act(depthwise(fc1(x)))) on a map, with dropout after activation and output.

    Args:
        embed_dims: channels of input and output.
        feedforward_channels: channels in between.
        act_cfg: the activation.
        ffn_drop: dropout rate in training.
    """

    def __init__(
        self,
        embed_dims: int,
        feedforward_channels: int,
        act_cfg: Mapping[str, Any] = {"type": "GELU"},
        ffn_drop: float = 0.0,
        *,
        rngs: nnx.Rngs,
    ):
        self.fc1 = Conv2d(embed_dims, feedforward_channels, 1, rngs=rngs)
        self.dwconv = _depthwise(feedforward_channels, 3, rngs=rngs)
        self.act = activation(act_cfg)
        self.fc2 = Conv2d(feedforward_channels, embed_dims, 1, rngs=rngs)
        self.drop = Dropout(ffn_drop)

    def __call__(self, x: Float[Array, "b h w c"], *, rngs: nnx.Rngs | None = None) -> Float[Array, "b h w c"]:
        x = self.drop(self.act(self.dwconv(self.fc1(x))), rngs=rngs)
        return self.drop(self.fc2(x), rngs=rngs)


class LKA(BaseModule):
    """Large kernel attention: x times what a 21x21 convolution of x makes of it (eq. 1 and 2).

    The large kernel is a 5x5 depthwise convolution, a 7x7 one with dilation 3, and a 1x1 one.
    """

    def __init__(self, embed_dims: int, *, rngs: nnx.Rngs):
        self.DW_conv = _depthwise(embed_dims, 5, rngs=rngs)
        self.DW_D_conv = _depthwise(embed_dims, 7, dilation=3, rngs=rngs)
        self.conv1 = Conv2d(embed_dims, embed_dims, 1, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        return x * self.conv1(self.DW_D_conv(self.DW_conv(x)))


class SpatialAttention(BaseModule):
    """x + proj_2(LKA(act(proj_1(x)))), the attention of a block with its own shortcut."""

    def __init__(self, embed_dims: int, act_cfg: Mapping[str, Any] = {"type": "GELU"}, *, rngs: nnx.Rngs):
        self.proj_1 = Conv2d(embed_dims, embed_dims, 1, rngs=rngs)
        self.activation = activation(act_cfg)
        self.spatial_gating_unit = LKA(embed_dims, rngs=rngs)
        self.proj_2 = Conv2d(embed_dims, embed_dims, 1, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        return x + self.proj_2(self.spatial_gating_unit(self.activation(self.proj_1(x))))


class VANBlock(BaseModule):
    """x + scale * attn(norm1(x)), then x + scale * mlp(norm2(x)).

    Args:
        embed_dims: channels of input and output.
        ffn_ratio: hidden channels of the feed-forward half, as a multiple of `embed_dims`.
        drop_rate: dropout in the feed-forward half.
        drop_path_rate: probability of dropping a branch of a sample.
        act_cfg, norm_cfg: activations and norms.
        norm_eval: whether BatchNorm always uses its running statistics.
        layer_scale_init_value: start of the gains of both branches; 0 for none.
    """

    def __init__(
        self,
        embed_dims: int,
        ffn_ratio: float = 4.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        act_cfg: Mapping[str, Any] = {"type": "GELU"},
        norm_cfg: Mapping[str, Any] = {"type": "BN", "eps": 1e-5},
        layer_scale_init_value: float = 1e-2,
        init_cfg: Any = None,
        *,
        norm_eval: bool = False,
        rngs: nnx.Rngs,
    ):
        self.init_cfg, self.drop_path_rate, self.deterministic = init_cfg, float(drop_path_rate), False
        self.norm1 = build_norm(norm_cfg, embed_dims, norm_eval=norm_eval, rngs=rngs)
        self.attn = SpatialAttention(embed_dims, act_cfg, rngs=rngs)
        self.norm2 = build_norm(norm_cfg, embed_dims, norm_eval=norm_eval, rngs=rngs)
        self.mlp = MixFFN(embed_dims, int(embed_dims * ffn_ratio), act_cfg, drop_rate, rngs=rngs)

        def gain() -> nnx.Param | None:
            scaled = layer_scale_init_value > 0
            return nnx.Param(jnp.full((embed_dims,), layer_scale_init_value, jnp.float32)) if scaled else None

        self.layer_scale_1, self.layer_scale_2 = gain(), gain()

    def __call__(self, x: Float[Array, "b h w c"], *, rngs: nnx.Rngs | None = None) -> Float[Array, "b h w c"]:
        x = self._add(x, self.attn(self.norm1(x)), self.layer_scale_1, rngs)
        return self._add(x, self.mlp(self.norm2(x), rngs=rngs), self.layer_scale_2, rngs)

    def _add(self, x: Array, branch: Array, scale: nnx.Variable | None, rngs: nnx.Rngs | None) -> Array:
        branch = branch if scale is None else branch * scale[...].astype(branch.dtype)
        return x + drop_path(branch, 0.0 if self.deterministic else self.drop_path_rate, rngs)


class VANPatchEmbed(BaseModule):
    """Overlapping patches: a strided convolution and its BatchNorm."""

    def __init__(self, in_channels: int, embed_dims: int, patch_size: int, *, norm_eval: bool = False, rngs: nnx.Rngs):
        half = patch_size // 2
        self.projection = Conv2d(in_channels, embed_dims, patch_size, half + 1, half, rngs=rngs)
        self.norm = build_norm({"type": "BN"}, embed_dims, norm_eval=norm_eval, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        return self.norm(self.projection(x))


class VAN(BaseModule):
    """VAN, for images of any size: [B, H, W, in_channels] -> a tuple of [B, H/s, W/s, C] maps, s = 4, 8, 16, 32.

    Args:
        arch: 'tiny', 'small', 'base' or 'large' (t, s, b, l); or a dict with embed_dims, depths and ffn_ratios, each with a
            number for every stage.
        patch_sizes: kernel size of the convolution before each stage; it strides by its half, rounded up.
        in_channels: channels of the images.
        drop_rate: dropout in the feed-forward halves.
        drop_path_rate: stochastic depth of the last block; grows linearly from 0 at the first.
        out_indices: the stages whose features are returned, from 0; negative ones count from the end.
        frozen_stages: the last stage that does not learn; all before it do not either. -1 for none.
        norm_eval: whether BatchNorms always use, and never change, their running statistics.
        norm_cfg: the norm at the end of each stage.
        block_cfgs: further arguments of the blocks.
        init_cfg: initialisation (see `BaseModule`).

    Attributes:
        remat: what the backward pass recomputes: 'none', 'full' (all within a block), 'dots' (all but convolutions).

    Raises:
        ConfigError: an unknown name, or stages that do not exist.
    """

    archs: ClassVar[dict[tuple[str, ...], dict[str, Any]]] = {
        ("t", "tiny"): dict(embed_dims=[32, 64, 160, 256], depths=[3, 3, 5, 2], ffn_ratios=[8, 8, 4, 4]),
        ("s", "small"): dict(embed_dims=[64, 128, 320, 512], depths=[2, 2, 4, 2], ffn_ratios=[8, 8, 4, 4]),
        ("b", "base"): dict(embed_dims=[64, 128, 320, 512], depths=[3, 3, 12, 3], ffn_ratios=[8, 8, 4, 4]),
        ("l", "large"): dict(embed_dims=[64, 128, 320, 512], depths=[3, 5, 27, 3], ffn_ratios=[8, 8, 4, 4]),
    }

    def __init__(
        self,
        arch: str | Mapping[str, Any] = "tiny",
        patch_sizes: Sequence[int] = (7, 3, 3, 3),
        in_channels: int = 3,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        out_indices: int | Sequence[int] = (3,),
        frozen_stages: int = -1,
        norm_eval: bool = False,
        norm_cfg: Mapping[str, Any] = {"type": "LN"},
        block_cfgs: Mapping[str, Any] = {},
        init_cfg: Any = None,
        *,
        rngs: nnx.Rngs,
    ):
        size = architecture(arch, self.archs, "VAN")
        widths, depths, ratios = (list(size[key]) for key in ("embed_dims", "depths", "ffn_ratios"))
        if not len(widths) == len(depths) == len(ratios) <= len(patch_sizes):
            raise ConfigError(
                f"VAN: {len(depths)} depths need as many embed_dims, ffn_ratios and patch_sizes, "
                f"not {len(widths)}, {len(ratios)} and {len(patch_sizes)}"
            )
        self.num_stages, self.init_cfg, self.remat = len(depths), init_cfg, "none"
        self.out_indices = output_indices(out_indices, len(depths), "VAN")
        if not -1 <= frozen_stages < len(depths):
            raise ConfigError(f"VAN: frozen_stages is -1 (none) to {len(depths) - 1}, not {frozen_stages}")

        rates = iter(np.linspace(0, drop_path_rate, sum(depths)).tolist())
        for i, width in enumerate(widths):
            patches = VANPatchEmbed(in_channels, width, patch_sizes[i], norm_eval=norm_eval, rngs=rngs)
            cfg: dict[str, Any] = {"ffn_ratio": ratios[i], "drop_rate": drop_rate, "norm_eval": norm_eval}
            blocks = [
                VANBlock(width, **{**cfg, "drop_path_rate": next(rates), **block_cfgs}, rngs=rngs)
                for _ in range(depths[i])
            ]
            norm = build_norm(norm_cfg, width, norm_eval=norm_eval, rngs=rngs)
            for name, part in (("patch_embed", patches), ("blocks", nnx.List(blocks)), ("norm", norm)):
                setattr(self, f"{name}{i + 1}", part)
                if i <= frozen_stages:
                    freeze_stage(part).set_attributes(rate=0.0, raise_if_not_found=False)
            in_channels = width

    def __call__(
        self, x: Float[Array, "b h w c"], *, rngs: nnx.Rngs | None = None
    ) -> tuple[Float[Array, "b h2 w2 c2"], ...]:
        """The maps of the chosen stages, normalised; `rngs` is for dropout and drop path in training."""
        outputs = []
        for i in range(self.num_stages):
            x = getattr(self, f"patch_embed{i + 1}")(x)
            for block in getattr(self, f"blocks{i + 1}"):
                x = apply_block(block, x, rngs=rngs, remat=self.remat)
            x = getattr(self, f"norm{i + 1}")(x)
            if i in self.out_indices:
                outputs.append(x)
        return tuple(outputs)
