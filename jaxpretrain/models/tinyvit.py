"""TinyViT: Fast Pretraining Distillation for Small Vision Transformers (Wu et al., 2022, https://arxiv.org/abs/2207.10666).

Inverted residuals on the largest map, then attention within windows with a small convolution beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from jaxpretrain.build import ConfigError, nearest
from jaxpretrain.models.layers.activation import Activation, activation
from jaxpretrain.models.layers.base import BaseModule, freeze_stage
from jaxpretrain.models.layers.conv import Conv2d, global_avg_pool
from jaxpretrain.models.layers.drop import Dropout, drop_path
from jaxpretrain.models.layers.linear import Linear
from jaxpretrain.models.layers.norm import build_norm
from jaxpretrain.models.layers.offset_attention import OffsetAttention
from jaxpretrain.models.layers.stack import apply_block
from jaxpretrain.models.layers.window import window_partition, window_reverse

_GELU = {"type": "GELU"}
_LN = {"type": "LN"}


class ConvBN2d(BaseModule):
    """A convolution without bias, and BatchNorm.

    Args:
        in_channels, out_channels, kernel_size, stride, groups: of the convolution; it pads by half its size.
        bn_weight_init: where the norm's scale starts.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        stride: int = 1,
        groups: int = 1,
        bn_weight_init: float = 1.0,
        *,
        rngs: nnx.Rngs,
    ):
        padding = kernel_size // 2
        self.conv2d = Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=False, rngs=rngs
        )
        norm: Any = build_norm({"type": "BN"}, out_channels, rngs=rngs)
        norm.scale.set_value(jnp.full((out_channels,), bn_weight_init))
        self.bn2d = norm

    def __call__(self, x: Float[Array, "b h w in"]) -> Float[Array, "b h2 w2 out"]:
        return self.bn2d(self.conv2d(x))


class PatchEmbed(BaseModule):
    """Two 3x3 convolutions of stride 2, and an activation between them."""

    def __init__(self, in_channels: int, embed_dim: int, *, rngs: nnx.Rngs):
        first = ConvBN2d(in_channels, embed_dim // 2, 3, 2, rngs=rngs)
        second = ConvBN2d(embed_dim // 2, embed_dim, 3, 2, rngs=rngs)
        self.seq = nnx.List([first, Activation(_GELU), second])

    def __call__(self, x: Float[Array, "b h w in"]) -> Float[Array, "b h2 w2 out"]:
        for layer in self.seq:
            x = layer(x)
        return x


class PatchMerging(BaseModule):
    """Halves a map: 1x1, 3x3 depthwise of stride 2, and 1x1 convolutions, with activations between them."""

    def __init__(self, in_channels: int, out_channels: int, act_cfg: Mapping[str, Any] = _GELU, *, rngs: nnx.Rngs):
        self.act = activation(act_cfg)
        self.conv1 = ConvBN2d(in_channels, out_channels, rngs=rngs)
        self.conv2 = ConvBN2d(out_channels, out_channels, 3, 2, groups=out_channels, rngs=rngs)
        self.conv3 = ConvBN2d(out_channels, out_channels, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w in"]) -> Float[Array, "b h2 w2 out"]:
        return self.conv3(self.act(self.conv2(self.act(self.conv1(x)))))


class MBConvBlock(BaseModule):
    """An inverted residual with GELU, also behind the sum; it starts as that alone, for its last norm's scale is zero.

    Args:
        channels: of input and output.
        expand_ratio: channels in between, as a multiple.
        drop_path: probability that a sample skips the convolutions in training.
    """

    def __init__(self, channels: int, expand_ratio: float, drop_path: float = 0.0, *, rngs: nnx.Rngs):
        self.drop_path_rate, self.deterministic = drop_path, False
        hidden = int(channels * expand_ratio)
        self.act = activation(_GELU)
        self.conv1 = ConvBN2d(channels, hidden, rngs=rngs)
        self.conv2 = ConvBN2d(hidden, hidden, 3, groups=hidden, rngs=rngs)
        self.conv3 = ConvBN2d(hidden, channels, bn_weight_init=0.0, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"], *, rngs: nnx.Rngs | None = None) -> Float[Array, "b h w c"]:
        y = self.conv3(self.act(self.conv2(self.act(self.conv1(x)))))
        return self.act(x + (y if self.deterministic else drop_path(y, self.drop_path_rate, rngs)))


class LeAttention(OffsetAttention):
    """LeViT's attention within a window, behind a LayerNorm; keys and values are equally wide."""

    def __init__(self, dim: int, num_heads: int, window_size: int, *, rngs: nnx.Rngs):
        super().__init__(dim, num_heads, dim // num_heads, 1, (window_size, window_size), rngs=rngs)
        self.norm = build_norm(_LN, dim, rngs=rngs)

    def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        return super().__call__(self.norm(x))


class MLP(BaseModule):
    """A LayerNorm, and two linear layers with an activation between them and dropout after each."""

    def __init__(self, dim: int, hidden: int, act_cfg: Mapping[str, Any], drop: float, *, rngs: nnx.Rngs):
        self.norm = build_norm(_LN, dim, rngs=rngs)
        self.fc1 = Linear(dim, hidden, rngs=rngs)
        self.fc2 = Linear(hidden, dim, rngs=rngs)
        self.act, self.drop = activation(act_cfg), Dropout(drop)

    def __call__(self, x: Float[Array, "b h w c"], *, rngs: nnx.Rngs | None = None) -> Float[Array, "b h w c"]:
        x = self.drop(self.act(self.fc1(self.norm(x))), rngs=rngs)
        return self.drop(self.fc2(x), rngs=rngs)


class TinyViTBlock(BaseModule):
    """Attention within windows, a depthwise convolution across their borders, and an MLP.

    Maps whose sides are no multiples of the window get zeros at the bottom and the right, which take part.

    Args:
        channels: of input and output.
        num_heads: heads; must divide `channels`.
        window_size: tokens along a side of a window.
        mlp_ratio: hidden channels of the MLP, as a multiple.
        drop: dropout of the MLP.
        drop_path: probability of dropping a branch of a sample in training.
        local_conv_size: side of the depthwise convolution.
        act_cfg: activation of the MLP.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int,
        window_size: int = 7,
        mlp_ratio: float = 4.0,
        drop: float = 0.0,
        drop_path: float = 0.0,
        local_conv_size: int = 3,
        act_cfg: Mapping[str, Any] = _GELU,
        *,
        rngs: nnx.Rngs,
    ):
        if channels % num_heads:
            raise ConfigError(f"TinyViT: {channels} channels are not a multiple of {num_heads} heads")
        self.drop_path_rate, self.deterministic, self.window_size = drop_path, False, window_size
        self.attn = LeAttention(channels, num_heads, window_size, rngs=rngs)
        self.mlp = MLP(channels, int(channels * mlp_ratio), act_cfg, drop, rngs=rngs)
        self.local_conv = ConvBN2d(channels, channels, local_conv_size, groups=channels, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"], *, rngs: nnx.Rngs | None = None) -> Float[Array, "b h w c"]:
        rate = 0.0 if self.deterministic else self.drop_path_rate
        x = x + drop_path(self._attend(x), rate, rngs)
        x = self.local_conv(x)
        return x + drop_path(self.mlp(x, rngs=rngs), rate, rngs)

    def _attend(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        (height, width), size = x.shape[1:3], self.window_size
        bottom, right = -height % size, -width % size
        if bottom or right:
            x = jnp.pad(x, ((0, 0), (0, bottom), (0, right), (0, 0)))
        y = self.attn(window_partition(x, size))
        return window_reverse(y, height + bottom, width + right)[:, :height, :width]


class Stage(BaseModule):
    """Blocks, and a downsampling for the next stage.

    Attributes:
        remat: what the backward pass recomputes (see `apply_block`).
    """

    def __init__(self, blocks: list[Any], downsample: PatchMerging | None, use_checkpoint: bool):
        self.blocks, self.downsample = nnx.List(blocks), downsample
        self.remat = "full" if use_checkpoint else "none"

    def __call__(self, x: Float[Array, "b h w c"], *, rngs: nnx.Rngs | None = None) -> Float[Array, "b h2 w2 c2"]:
        for block in self.blocks:
            x = apply_block(block, x, rngs=rngs, remat=self.remat)
        return x if self.downsample is None else self.downsample(x)


class TinyViT(BaseModule):
    """TinyViT: [B, H, W, in_channels] -> a tuple of features [B, C], or maps [B, H/32, W/32, C] without pooling.

    Args:
        arch: '5m', '11m', '21m'; or a dictionary with channels, num_heads and depths, each with a number for each stage.
        img_size: accepted for MMPretrain's configs; images may have any size.
        window_size: tokens along a side of the windows of each stage; the first stage has none.
        in_channels: channels of the images.
        mlp_ratio: hidden channels of the MLPs, as a multiple.
        drop_rate: dropout of the MLPs.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0 in the first.
        use_checkpoint: the same as `remat='full'`.
        mbconv_expand_ratio: channels inside the first stage's blocks, as a multiple.
        local_conv_size: side of the convolutions beside the attention.
        layer_lr_decay: accepted for MMPretrain's configs; the optimizer has an argument for it.
        out_indices: the stages whose outputs are returned, behind their downsampling; negative ones count from the end.
        frozen_stages: how many stages do not learn.
        gap_before_final_norm: whether outputs are the mean over positions, normalised; maps otherwise.
        act_cfg: activations of MLPs and downsampling; others are GELU.
        norm_cfg: the outputs' norms.
        init_cfg: initialisation, MMEngine's dictionaries.
    """

    arch_settings: ClassVar[dict[str, dict[str, list[int]]]] = {
        "5m": dict(channels=[64, 128, 160, 320], num_heads=[2, 4, 5, 10], depths=[2, 2, 6, 2]),
        "11m": dict(channels=[64, 128, 256, 448], num_heads=[2, 4, 8, 14], depths=[2, 2, 6, 2]),
        "21m": dict(channels=[96, 192, 384, 576], num_heads=[3, 6, 12, 18], depths=[2, 2, 6, 2]),
    }

    def __init__(
        self,
        arch: str | Mapping[str, Sequence[int]] = "5m",
        img_size: int | Sequence[int] = (224, 224),
        window_size: Sequence[int] = (7, 7, 14, 7),
        in_channels: int = 3,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        use_checkpoint: bool = False,
        mbconv_expand_ratio: float = 4.0,
        local_conv_size: int = 3,
        layer_lr_decay: float = 1.0,
        out_indices: int | Sequence[int] = -1,
        frozen_stages: int = 0,
        gap_before_final_norm: bool = True,
        act_cfg: Mapping[str, Any] = _GELU,
        norm_cfg: Mapping[str, Any] = _LN,
        init_cfg: Any = None,
        *,
        rngs: nnx.Rngs,
    ):
        self.init_cfg, self.gap_before_final_norm = init_cfg, gap_before_final_norm
        if isinstance(arch, str):
            if arch not in self.arch_settings:
                raise ConfigError(f"TinyViT has no arch {arch!r}.{nearest(arch, self.arch_settings)}")
            arch = self.arch_settings[arch]
        if missing := {"channels", "num_heads", "depths"} - set(arch):
            raise ConfigError(f"TinyViT: arch lacks {sorted(missing)}")
        widths, depths, count = arch["channels"], arch["depths"], len(arch["channels"])
        if not len(depths) == len(arch["num_heads"]) == len(window_size) == count:
            raise ConfigError(f"TinyViT: {count} stages need as many depths, num_heads and entries of window_size")

        self.patch_embed = PatchEmbed(in_channels, widths[0], rngs=rngs)
        rates = iter(np.linspace(0.0, drop_path_rate, sum(depths)).tolist())
        stages = []
        for i, width in enumerate(widths):
            blocks: list[Any] = []
            for rate in [next(rates) for _ in range(depths[i])]:
                if i == 0:
                    blocks.append(MBConvBlock(width, mbconv_expand_ratio, rate, rngs=rngs))
                    continue
                sizes = (width, arch["num_heads"][i], window_size[i], mlp_ratio)
                blocks.append(TinyViTBlock(*sizes, drop_rate, rate, local_conv_size, act_cfg, rngs=rngs))
            down = PatchMerging(width, widths[i + 1], act_cfg, rngs=rngs) if i < count - 1 else None
            stages.append(Stage(blocks, down, use_checkpoint))
        self.stages = nnx.List(stages)

        indices = (out_indices,) if isinstance(out_indices, int) else tuple(out_indices)
        if not all(-count <= i < count for i in indices):
            raise ConfigError(f"TinyViT: out_indices {indices} must be in {-count} ... {count - 1}")
        self.out_indices = tuple(sorted({i % count for i in indices}))
        for i in self.out_indices:
            setattr(self, f"norm{i}", build_norm(norm_cfg, widths[min(i + 1, count - 1)], rngs=rngs))
        if not 0 <= frozen_stages <= count:
            raise ConfigError(f"TinyViT: frozen_stages is 0 (none) to {count}, not {frozen_stages}")
        for stage in self.stages[:frozen_stages]:
            freeze_stage(stage)

    def __call__(
        self, x: Float[Array, "b h w c"], *, rngs: nnx.Rngs | None = None
    ) -> tuple[Float[Array, "b *n c2"], ...]:
        """The outputs of the stages in `out_indices`, in order. `rngs` is for dropout and drop path in training."""
        x = self.patch_embed(x)
        outs = []
        for i, stage in enumerate(self.stages):
            x = stage(x, rngs=rngs)
            if i in self.out_indices:
                norm = getattr(self, f"norm{i}")
                outs.append(norm(global_avg_pool(x) if self.gap_before_final_norm else x))
        return tuple(outs)
