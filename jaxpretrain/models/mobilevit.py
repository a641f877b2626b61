"""MobileViT: Light-weight, General-purpose, and Mobile-friendly Vision Transformer.

Mehta & Rastegari (2022, https://arxiv.org/abs/2110.02178).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxpretrain.build import ConfigError, nearest
from jaxpretrain.models.layers.arch import check_frozen_stages, output_indices
from jaxpretrain.models.layers.base import BaseModule, freeze_stage
from jaxpretrain.models.layers.conv import ConvModule
from jaxpretrain.models.layers.norm import build_norm
from jaxpretrain.models.layers.stack import apply_block, apply_layers
from jaxpretrain.models.mobilenet_v2 import INIT, InvertedResidual
from jaxpretrain.models.vision_transformer import TransformerEncoderLayer

_BN, _LN, _SWISH = {"type": "BN"}, {"type": "LN"}, {"type": "Swish"}


class MobileVitBlock(BaseModule):
    """Convolutions for what is near, a transformer for what is far, and a convolution of both (section 3.1).

    The transformer sees the image in windows of `patch_size`: the pixels at one place within their windows attend to each
    other, over all windows, and to no other pixels. An image that cannot be cut is stretched first, and shrunk after.

    Args:
        in_channels, out_channels: channels of input and output.
        transformer_dim, ffn_dim: channels of tokens, and inside their feed-forward layers.
        conv_ksize: size of the convolutions for what is near, and of the last.
        conv_cfg, norm_cfg, act_cfg: of the convolutions, as for `ConvModule`.
        num_transformer_blocks, num_heads, drop_rate, attn_drop_rate, drop_path_rate, transformer_norm_cfg: of the transformer.
        patch_size: edge of a window in pixels.
        no_fusion: whether to leave out the convolution of input and output.

    Attributes:
        scan_layers: how the transformer is run (see `apply_layers`).
    """

    def __init__(
        self,
        in_channels: int,
        transformer_dim: int,
        ffn_dim: int,
        out_channels: int,
        conv_ksize: int = 3,
        conv_cfg: Mapping[str, Any] | None = None,
        norm_cfg: Mapping[str, Any] = _BN,
        act_cfg: Mapping[str, Any] = _SWISH,
        num_transformer_blocks: int = 2,
        patch_size: int = 2,
        num_heads: int = 4,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        no_fusion: bool = False,
        transformer_norm_cfg: Mapping[str, Any] = _LN,
        *,
        rngs: nnx.Rngs,
    ):
        self.patch_size, self.scan_layers = patch_size, False
        padding = conv_ksize // 2
        args: dict[str, Any] = {"conv_cfg": conv_cfg, "norm_cfg": norm_cfg, "act_cfg": act_cfg, "rngs": rngs}
        near = ConvModule(in_channels, in_channels, conv_ksize, padding=padding, **args)
        embed = ConvModule(in_channels, transformer_dim, 1, bias=False, conv_cfg=conv_cfg, act_cfg=None, rngs=rngs)
        self.local_rep = nnx.List([near, embed])
        layers = [
            TransformerEncoderLayer(
                transformer_dim,
                num_heads,
                ffn_dim,
                drop_rate=drop_rate,
                attn_drop_rate=attn_drop_rate,
                drop_path_rate=drop_path_rate,
                act_cfg=_SWISH,
                norm_cfg=transformer_norm_cfg,
                rngs=rngs,
            )
            for _ in range(num_transformer_blocks)
        ]
        self.global_rep = nnx.List([*layers, build_norm(transformer_norm_cfg, transformer_dim, rngs=rngs)])
        self.conv_proj = ConvModule(transformer_dim, out_channels, 1, **args)
        both = in_channels + out_channels
        self.conv_fusion = None if no_fusion else ConvModule(both, out_channels, conv_ksize, padding=padding, **args)

    def __call__(self, x: Float[Array, "b h w in"], *, rngs: nnx.Rngs | None = None) -> Float[Array, "b h w out"]:
        y = x
        for layer in self.local_rep:
            y = layer(y)
        b, h, w, c = y.shape
        p = self.patch_size
        rows, columns = -(-h // p), -(-w // p)
        fits = (h, w) == (rows * p, columns * p)
        if not fits:
            y = _resize(y, rows * p, columns * p)
        y = y.reshape(b, rows, p, columns, p, c).transpose(0, 2, 4, 1, 3, 5).reshape(b * p * p, rows * columns, c)
        *layers, norm = self.global_rep
        y, _ = apply_layers(layers, y, rngs=rngs, scan_layers=self.scan_layers)
        y = norm(y).reshape(b, p, p, rows, columns, c).transpose(0, 3, 1, 4, 2, 5).reshape(b, rows * p, columns * p, c)
        y = self.conv_proj(y if fits else _resize(y, h, w))
        return y if self.conv_fusion is None else self.conv_fusion(jnp.concatenate([x, y], axis=-1))


def _resize(x: Float[Array, "b h w c"], height: int, width: int) -> Float[Array, "b h2 w2 c"]:
    return jax.image.resize(x, (x.shape[0], height, width, x.shape[-1]), "linear", antialias=False)


class MobileViT(BaseModule):
    """MobileViT: [B, H, W, in_channels] -> a tuple of feature maps; the last is [B, H/32, W/32, 640] by default.

    Args:
        arch: 'small', 'x_small' or 'xx_small'; or a list of layers: ['mobilenetv2', channels, stride, blocks, factor that
            blocks widen by], or ['mobilevit', channels, stride, channels of tokens, of their feed-forward layers,
            transformer layers, factor].
        in_channels, stem_channels: channels of the images, and after the first convolution.
        last_exp_factor: factor of the channels that the last convolution makes.
        out_indices: the layers whose outputs are returned, from 0; negative ones count from the end. The last one's goes
            through the last convolution.
        frozen_stages: how many layers do not learn, without the first convolution; 0 and -1 are none.
        conv_cfg, norm_cfg, act_cfg: of all convolutions, as for `ConvModule`.
        init_cfg: initialisation, MMEngine's dictionaries.

    Attributes:
        remat: what the backward pass recomputes: 'none', 'full' (all within a block), 'dots' (all but convolutions).

    Raises:
        ConfigError: an unknown name or kind of layer, or layers that do not exist.
    """

    arch_settings: ClassVar[dict[str, list[list[Any]]]] = {
        "small": [
            ["mobilenetv2", 32, 1, 1, 4],
            ["mobilenetv2", 64, 2, 3, 4],
            ["mobilevit", 96, 2, 144, 288, 2, 4],
            ["mobilevit", 128, 2, 192, 384, 4, 4],
            ["mobilevit", 160, 2, 240, 480, 3, 4],
        ],
        "x_small": [
            ["mobilenetv2", 32, 1, 1, 4],
            ["mobilenetv2", 48, 2, 3, 4],
            ["mobilevit", 64, 2, 96, 192, 2, 4],
            ["mobilevit", 80, 2, 120, 240, 4, 4],
            ["mobilevit", 96, 2, 144, 288, 3, 4],
        ],
        "xx_small": [
            ["mobilenetv2", 16, 1, 1, 2],
            ["mobilenetv2", 24, 2, 3, 2],
            ["mobilevit", 48, 2, 64, 128, 2, 2],
            ["mobilevit", 64, 2, 80, 160, 4, 2],
            ["mobilevit", 80, 2, 96, 192, 3, 2],
        ],
    }

    def __init__(
        self,
        arch: str | Sequence[Sequence[Any]] = "small",
        in_channels: int = 3,
        stem_channels: int = 16,
        last_exp_factor: int = 4,
        out_indices: int | Sequence[int] = (4,),
        frozen_stages: int = -1,
        conv_cfg: Mapping[str, Any] | None = None,
        norm_cfg: Mapping[str, Any] = _BN,
        act_cfg: Mapping[str, Any] = _SWISH,
        init_cfg: Any = INIT,
        *,
        rngs: nnx.Rngs,
    ):
        if isinstance(arch, str):
            if arch.lower() not in self.arch_settings:
                raise ConfigError(f"MobileViT: unknown arch {arch!r}.{nearest(arch, self.arch_settings)}")
            arch = self.arch_settings[arch.lower()]
        self.init_cfg, self.remat = init_cfg, "none"
        self.out_indices = output_indices(out_indices, len(arch), "MobileViT")
        args: dict[str, Any] = {"conv_cfg": conv_cfg, "norm_cfg": norm_cfg, "act_cfg": act_cfg, "rngs": rngs}

        self.stem = ConvModule(in_channels, stem_channels, 3, 2, 1, **args)
        layers, channels = [], stem_channels
        for layer in arch:
            kind, outs, *numbers = cast("tuple", layer)
            if kind not in ("mobilenetv2", "mobilevit"):
                raise ConfigError(f"MobileViT: a layer is 'mobilenetv2' or 'mobilevit', not {kind!r}")
            make = _convolutional if kind == "mobilenetv2" else _mixed
            layers.append(make(channels, outs, *numbers, **args))
            channels = outs
        self.layers = nnx.List(layers)
        self.conv_1x1_exp = ConvModule(channels, last_exp_factor * channels, 1, **args)

        check_frozen_stages(frozen_stages, -1, len(layers), "MobileViT")
        for i in range(frozen_stages):
            freeze_stage(self.layers[i])

    def __call__(
        self, x: Float[Array, "b h w c"], *, rngs: nnx.Rngs | None = None
    ) -> tuple[Float[Array, "b h2 w2 c2"], ...]:
        """The outputs of the layers in `out_indices`, in order."""
        x = self.stem(x)
        outs = []
        for i, layer in enumerate(self.layers):
            for block in layer:
                x = apply_block(block, x, rngs=rngs, remat=self.remat)
            if i in self.out_indices:
                outs.append(self.conv_1x1_exp(x) if i == len(self.layers) - 1 else x)
        return tuple(outs)


def _convolutional(ins: int, outs: int, stride: int, count: int, factor: float = 4, **args: Any) -> nnx.List:
    """`count` inverted residuals, the first with the stride."""
    first = InvertedResidual(ins, outs, stride, factor, **args)
    return nnx.List([first, *(InvertedResidual(outs, outs, 1, factor, **args) for _ in range(count - 1))])


def _mixed(
    ins: int, outs: int, stride: int, dim: int, ffn_dim: int, count: int, factor: float = 4, **args: Any
) -> nnx.List:
    """An inverted residual with the stride, and a block with a transformer of `count` layers."""
    block = MobileVitBlock(outs, dim, ffn_dim, outs, num_transformer_blocks=count, **args)
    return nnx.List([InvertedResidual(ins, outs, stride, factor, **args), block])
