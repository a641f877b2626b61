"""Conformer: Local Features Coupling Global Representations (Peng et al., 2021, https://arxiv.org/abs/2105.03889).

A residual network and a transformer side by side, which hand each other their features in every block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Num

from jaxpretrain.build import ConfigError
from jaxpretrain.models.heads import ClsHead, check_classes
from jaxpretrain.models.layers.arch import architecture
from jaxpretrain.models.layers.base import BaseModule
from jaxpretrain.models.layers.conv import Conv2d, avg_pool2d, global_avg_pool, max_pool2d, relu
from jaxpretrain.models.layers.drop import drop_path
from jaxpretrain.models.layers.init import apply_init_cfg, normal, trunc_normal
from jaxpretrain.models.layers.linear import Linear
from jaxpretrain.models.layers.norm import build_norm
from jaxpretrain.models.layers.stack import apply_block
from jaxpretrain.models.vision_transformer import TransformerEncoderLayer

_BN = {"type": "BN", "eps": 1e-6}
_LN = {"type": "LN", "eps": 1e-6}
_EXPANSION = 4
_INIT = (
    {"type": "TruncNormal", "layer": "Linear", "std": 0.02},
    {"type": "Constant", "layer": ["LayerNorm", "BatchNorm2d"], "val": 1.0},
)

Pair = tuple[Float[Array, "b c"], Float[Array, "b d"]]


class ConvBlock(BaseModule):
    """A bottleneck: 1x1, 3x3 and 1x1 convolutions beside a shortcut, with ReLU behind the sum.

    Args:
        in_channels, out_channels: channels of input and output; a quarter of the latter in between.
        stride: of the 3x3 convolution.
        groups: of the 3x3 convolution.
        drop_path_rate: probability that a sample skips the convolutions in training.
        with_residual_conv: whether the shortcut is a 1x1 convolution.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        groups: int = 1,
        drop_path_rate: float = 0.0,
        with_residual_conv: bool = False,
        *,
        rngs: nnx.Rngs,
    ):
        self.drop_path_rate, self.deterministic = float(drop_path_rate), False
        middle = out_channels // _EXPANSION
        self.conv1 = Conv2d(in_channels, middle, 1, bias=False, rngs=rngs)
        self.bn1 = build_norm(_BN, middle, rngs=rngs)
        self.conv2 = Conv2d(middle, middle, 3, stride, 1, groups=groups, bias=False, rngs=rngs)
        self.bn2 = build_norm(_BN, middle, rngs=rngs)
        self.conv3 = Conv2d(middle, out_channels, 1, bias=False, rngs=rngs)
        self.bn3: Any = build_norm(_BN, out_channels, rngs=rngs)
        convolve = with_residual_conv
        self.residual_conv = Conv2d(in_channels, out_channels, 1, stride, bias=False, rngs=rngs) if convolve else None
        self.residual_bn = build_norm(_BN, out_channels, rngs=rngs) if convolve else None

    def __call__(
        self,
        x: Float[Array, "b h w in"],
        fusion: Float[Array, "b h w mid"] | float = 0.0,
        *,
        rngs: nnx.Rngs | None = None,
    ) -> tuple[Float[Array, "b h2 w2 out"], Float[Array, "b h2 w2 mid"]]:
        """The output, and what the 3x3 convolution gave; `fusion` is added to the latter's input."""
        middle = relu(self.bn1(self.conv1(x))) + fusion
        middle = relu(self.bn2(self.conv2(middle)))
        y = self.bn3(self.conv3(middle))
        y = drop_path(y, 0.0 if self.deterministic else self.drop_path_rate, rngs)
        if self.residual_conv is not None and self.residual_bn is not None:
            x = self.residual_bn(self.residual_conv(x))
        return relu(y + x), middle

    def init_weights(self, rngs: nnx.Rngs) -> None:
        """The block starts as its shortcut: its last norm's scale is zero."""
        super().init_weights(rngs)
        self.bn3.scale.set_value(jnp.zeros(self.bn3.scale.shape))


class FCUDown(BaseModule):
    """From the convolutions' features to those of the patches: a 1x1 convolution, mean pooling, norm and GELU."""

    def __init__(self, in_channels: int, out_channels: int, down_stride: int, *, rngs: nnx.Rngs):
        self.down_stride = down_stride
        self.conv_project = Conv2d(in_channels, out_channels, 1, rngs=rngs)
        self.ln = build_norm(_LN, out_channels, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b n d"]:
        x = avg_pool2d(self.conv_project(x), self.down_stride)
        return jax.nn.gelu(self.ln(x.reshape(x.shape[0], -1, x.shape[3])), approximate=False)


class FCUUp(BaseModule):
    """From the patches' features to those of the convolutions: a 1x1 convolution, norm, ReLU and repetition."""

    def __init__(self, in_channels: int, out_channels: int, up_stride: int, *, rngs: nnx.Rngs):
        self.up_stride = up_stride
        self.conv_project = Conv2d(in_channels, out_channels, 1, rngs=rngs)
        self.bn = build_norm(_BN, out_channels, rngs=rngs)

    def __call__(self, x: Float[Array, "b n c"], grid: tuple[int, int]) -> Float[Array, "b h w d"]:
        x = relu(self.bn(self.conv_project(x.reshape(x.shape[0], *grid, -1))))
        return x.repeat(self.up_stride, axis=1).repeat(self.up_stride, axis=2)


class ConvTransBlock(BaseModule):
    """A convolutional block, a transformer layer that gets its features too, and a second block that gets the layer's.

    Args:
        in_channels, out_channels: channels of the map before and behind.
        embed_dims: channels of the tokens.
        conv_stride: stride of the first convolutional block.
        with_residual_conv: whether its shortcut is a convolution.
        down_stride: pixels of the map along a side of a patch.
        num_heads, mlp_ratio, qkv_bias: of the transformer layer.
        with_cls_token: whether the first token is no patch.
        drop_path_rate: probability of dropping a branch of a sample, but for the first block.
        last_fusion: whether the second block halves the map.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        embed_dims: int,
        conv_stride: int = 1,
        with_residual_conv: bool = False,
        down_stride: int = 4,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        with_cls_token: bool = True,
        drop_path_rate: float = 0.0,
        last_fusion: bool = False,
        *,
        rngs: nnx.Rngs,
    ):
        self.num_extra_tokens, self.down_stride = int(with_cls_token), down_stride
        middle, last = out_channels // _EXPANSION, bool(last_fusion)
        self.cnn_block = ConvBlock(
            in_channels, out_channels, conv_stride, with_residual_conv=with_residual_conv, rngs=rngs
        )
        self.fusion_block = ConvBlock(
            out_channels, out_channels, 1 + last, 1, drop_path_rate, with_residual_conv=last, rngs=rngs
        )
        self.squeeze_block = FCUDown(middle, embed_dims, down_stride, rngs=rngs)
        self.expand_block = FCUUp(embed_dims, middle, down_stride, rngs=rngs)
        self.trans_block = TransformerEncoderLayer(
            embed_dims,
            num_heads,
            int(embed_dims * mlp_ratio),
            drop_path_rate=drop_path_rate,
            qkv_bias=qkv_bias,
            norm_cfg=_LN,
            rngs=rngs,
        )

    def __call__(
        self, features: tuple[Float[Array, "b h w c"], Float[Array, "b n d"]], *, rngs: nnx.Rngs | None = None
    ) -> tuple[Float[Array, "b h2 w2 c2"], Float[Array, "b n d"]]:
        """The map and the tokens. The class token is added to itself where the others are added to the map's features."""
        x, tokens = features
        x, middle = self.cnn_block(x, rngs=rngs)
        grid = (middle.shape[1] // self.down_stride, middle.shape[2] // self.down_stride)
        extra = self.num_extra_tokens
        seen = jnp.concatenate([tokens[:, :extra], self.squeeze_block(middle)], axis=1)
        tokens = self.trans_block(seen + tokens, rngs=rngs)
        x, _ = self.fusion_block(x, self.expand_block(tokens[:, extra:], grid), rngs=rngs)
        return x, tokens


class Conformer(BaseModule):
    """Conformer: [B, H, W, 3] -> a tuple of pairs ([B, C], [B, D]): the mean of the map, and the class token, normalised.

    Images may have any size; what is no multiple of the patches is padded.

    Args:
        arch: 'tiny', 'small' or 'base' (t, s, b), or a dict with embed_dims, depths (the number of blocks), num_heads and
            channel_ratio (width of the map, as a multiple of `base_channels`).
        patch_size: pixels of a patch, a multiple of 16.
        base_channels: see `arch`.
        mlp_ratio: hidden channels of the transformer layers, as a multiple.
        qkv_bias: whether queries, keys and values have a bias.
        with_cls_token: whether there is a class token; otherwise the second of a pair is the mean of the patches.
        drop_path_rate: stochastic depth of the last block; grows linearly from 0 at the first.
        norm_eval, frozen_stages: accepted for MMPretrain's configs; they have no effect there either.
        out_indices: the blocks whose features are returned, counted from 1, the first of both branches together; -1 is
            the last.
        init_cfg: initialisation; the paper's is applied behind it.

    The attribute `remat` says what the backward pass recomputes (see `apply_block`).
    """

    archs: ClassVar = {
        ("t", "tiny"): dict(embed_dims=384, channel_ratio=1, num_heads=6, depths=12),
        ("s", "small"): dict(embed_dims=384, channel_ratio=4, num_heads=6, depths=12),
        ("b", "base"): dict(embed_dims=576, channel_ratio=6, num_heads=9, depths=12),
    }

    def __init__(
        self,
        arch: str | Mapping[str, Any] = "tiny",
        patch_size: int = 16,
        base_channels: int = 64,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        with_cls_token: bool = True,
        drop_path_rate: float = 0.0,
        norm_eval: bool = True,
        frozen_stages: int = 0,
        out_indices: int | Sequence[int] = -1,
        init_cfg: Any = None,
        *,
        rngs: nnx.Rngs,
    ):
        size = architecture(arch, self.archs, "Conformer")
        dims, depth, heads = size["embed_dims"], size["depths"], size["num_heads"]
        if patch_size % 16:
            raise ConfigError(f"Conformer: patch_size={patch_size} must be a multiple of 16")
        if depth % 3:
            raise ConfigError(f"Conformer: its 3 stages are alike in depth, so depths={depth} must be a multiple of 3")
        self.init_cfg, self.embed_dims, self.remat = init_cfg, dims, "none"
        self.out_indices = self._blocks(out_indices, depth)
        self.patch_stride = patch_size // 4
        self.num_extra_tokens = int(with_cls_token)
        self.cls_token = nnx.Param(jnp.zeros((1, 1, dims))) if with_cls_token else None

        rates = np.linspace(0, drop_path_rate, depth).tolist()
        width = int(base_channels * size["channel_ratio"])
        self.conv1 = Conv2d(3, 64, 7, 2, 3, bias=False, rngs=rngs)
        self.bn1 = build_norm({"type": "BN"}, 64, rngs=rngs)
        self.conv_1 = ConvBlock(64, width, with_residual_conv=True, rngs=rngs)
        self.trans_patch_conv = Conv2d(64, dims, self.patch_stride, self.patch_stride, rngs=rngs)
        layer: dict[str, Any] = {"num_heads": heads, "qkv_bias": qkv_bias}
        self.trans_1 = TransformerEncoderLayer(
            dims,
            feedforward_channels=int(dims * mlp_ratio),
            drop_path_rate=rates[0],
            norm_cfg=_LN,
            **layer,
            rngs=rngs,
        )
        layer |= {"mlp_ratio": mlp_ratio, "with_cls_token": with_cls_token}
        ins = width
        for i in range(2, depth + 1):
            stage = (i - 1) // (depth // 3)
            starts = stage > 0 and (i - 1) % (depth // 3) == 0
            outs = width * 2**stage
            block = ConvTransBlock(
                ins,
                outs,
                dims,
                conv_stride=2 if starts else 1,
                with_residual_conv=starts,
                down_stride=self.patch_stride // 2**stage,
                drop_path_rate=rates[i - 1],
                last_fusion=i == depth,
                **layer,
                rngs=rngs,
            )
            setattr(self, f"conv_trans_{i}", block)
            ins = outs
        self.depth = depth
        self.trans_norm = build_norm({"type": "LN"}, dims, rngs=rngs)

    @staticmethod
    def _blocks(out_indices: int | Sequence[int], depth: int) -> tuple[int, ...]:
        """The blocks, from 1, that `out_indices` mean; the first has no output of its own."""
        indices = [out_indices] if isinstance(out_indices, int) else list(out_indices)
        blocks = {index + depth + 1 if index < 0 else index for index in indices}
        if wrong := [block for block in blocks if not 2 <= block <= depth]:
            raise ConfigError(f"Conformer: out_indices mean the blocks {wrong}, but there are outputs of 2 to {depth}")
        return tuple(sorted(blocks))

    def __call__(self, x: Float[Array, "b h w 3"], *, rngs: nnx.Rngs | None = None) -> tuple[Pair, ...]:
        """The pairs of the blocks in `out_indices`, in order. `rngs` is for drop path in training."""
        x = max_pool2d(relu(self.bn1(self.conv1(x))), 3, 2, 1)
        bottom, right = -x.shape[1] % self.patch_stride, -x.shape[2] % self.patch_stride
        x = jnp.pad(x, ((0, 0), (0, bottom), (0, right), (0, 0)))
        tokens = self.trans_patch_conv(x)
        tokens = tokens.reshape(x.shape[0], -1, self.embed_dims)
        if self.cls_token is not None:
            token = jnp.broadcast_to(self.cls_token[...].astype(x.dtype), (x.shape[0], 1, self.embed_dims))
            tokens = jnp.concatenate([token, tokens], axis=1)
        features: Any = (self.conv_1(x, rngs=rngs)[0], self.trans_1(tokens, rngs=rngs))
        outs = []
        for i in range(2, self.depth + 1):
            features = apply_block(getattr(self, f"conv_trans_{i}"), features, rngs=rngs, remat=self.remat)
            if i in self.out_indices:
                tokens = self.trans_norm(features[1])
                second = global_avg_pool(tokens) if self.cls_token is None else tokens[:, 0]
                outs.append((global_avg_pool(features[0]), second))
        return tuple(outs)

    def init_weights(self, rngs: nnx.Rngs) -> None:
        """Besides `init_cfg`: linear layers and the class token from a truncated normal distribution of std 0.02,
        kernels of convolutions by He et al. (fan-out), and scales of norms 1, but for the last of each `ConvBlock`, 0.
        """
        super().init_weights(rngs)
        apply_init_cfg(self, _INIT, rngs)
        for _, part in nnx.iter_modules(self):
            if isinstance(part, Conv2d):  # whose biases stay
                h, w, _, outs = part.kernel.shape
                std = (2 / (h * w * outs)) ** 0.5
                part.kernel.set_value(normal(0.0, std)(rngs.params(), part.kernel.shape))
        for _, part in nnx.iter_modules(self):
            if isinstance(part, ConvBlock):
                part.bn3.scale.set_value(jnp.zeros(part.bn3.scale.shape))
        if self.cls_token is not None:
            self.cls_token.set_value(trunc_normal(0.02)(rngs.params(), self.cls_token.shape))


class ConformerHead(ClsHead):
    """A linear layer for each branch, `conv_cls_head` and `trans_cls_head`; scores are those of the logits' sum.

    Args:
        num_classes: number of classes.
        in_channels: channels of the map and of the token.
        init_cfg: initialisation, MMEngine's dictionaries.
        kwargs: `loss`, `topk` and `cal_acc` of `ClsHead`.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: Sequence[int],
        init_cfg: Any = {"type": "TruncNormal", "layer": "Linear", "std": 0.02},  # noqa: B006 - read only
        *,
        rngs: nnx.Rngs,
        **kwargs: Any,
    ):
        super().__init__(init_cfg=init_cfg, **kwargs)
        check_classes(self, num_classes)
        self.num_classes, self.in_channels = num_classes, tuple(in_channels)
        self.conv_cls_head = Linear(in_channels[0], num_classes, rngs=rngs)
        self.trans_cls_head = Linear(in_channels[1], num_classes, rngs=rngs)

    def __call__(self, feats: Any, *, rngs: nnx.Rngs | None = None) -> Any:
        """The logits of both branches, before softmax."""
        of_map, of_token = self.pre_logits(feats)
        return self.conv_cls_head(of_map), self.trans_cls_head(of_token)

    def pre_logits(self, feats: Any) -> Any:
        """The pair of the last block."""
        return feats[-1]

    def loss(
        self,
        feats: Any,
        label: Num[Array, "b ..."],
        *,
        weight: Float[Array, " b"] | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """The sum of both branches' losses; the accuracy is that of the sum of their logits."""
        first, second = self(feats, rngs=rngs)
        value = self._loss_of(first, label, weight)[0] + self._loss_of(second, label, weight)[0]
        return value, self._loss_of(first + second, label, weight)[1]

    def predict(self, feats: Any) -> Float[Array, "b classes"]:
        """Scores per class that sum to 1, in float32 at least."""
        logits = sum(self(feats))
        return jax.nn.softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)))
