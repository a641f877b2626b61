"""LeViT: a Vision Transformer in ConvNet's Clothing for Faster Inference (Graham et al., 2021, https://arxiv.org/abs/2104.01136).

Its linear layers and convolutions are followed by BatchNorm, which melts into them for inference (`switch_to_deploy`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from jaxpretrain.build import ConfigError, nearest
from jaxpretrain.models.heads import ClsHead, Features, check_classes
from jaxpretrain.models.layers.activation import Activation, activation
from jaxpretrain.models.layers.attention import scaled_dot_product_attention
from jaxpretrain.models.layers.base import BaseModule
from jaxpretrain.models.layers.conv import Conv2d
from jaxpretrain.models.layers.drop import drop_path
from jaxpretrain.models.layers.linear import Linear
from jaxpretrain.models.layers.norm import build_norm
from jaxpretrain.models.layers.offset_attention import check_grid, offset_bias, offset_index
from jaxpretrain.models.layers.reparam import fuse_norm, scale_and_shift, set_weights
from jaxpretrain.models.layers.stack import apply_block

_HSWISH = {"type": "HSwish"}


def fuse_batch_norms(module: nnx.Module) -> None:
    """Replaces all that can `fuse()` below `module`, in place, by the one layer that gives the same in eval mode."""
    places: list[tuple[tuple[Any, ...], Any]] = [(tuple(path), node) for path, node in nnx.iter_modules(module)]
    for path, node in places:
        if path and hasattr(node, "fuse"):
            owner: Any = module
            for part in path[:-1]:
                owner = owner[part] if isinstance(owner, nnx.List) else getattr(owner, part)
            if isinstance(owner, nnx.List):
                owner[path[-1]] = node.fuse()
            else:
                setattr(owner, path[-1], node.fuse())


class ConvolutionBatchNorm(BaseModule):
    """A 3x3 convolution of stride 2 without bias, and its BatchNorm."""

    def __init__(self, in_channel: int, out_channel: int, *, rngs: nnx.Rngs):
        self.conv = Conv2d(in_channel, out_channel, 3, 2, 1, bias=False, rngs=rngs)
        self.bn = build_norm({"type": "BN"}, out_channel, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w in"]) -> Float[Array, "b h2 w2 out"]:
        return self.bn(self.conv(x))

    def fuse(self) -> Conv2d:
        """The convolution with the norm in its kernel and bias."""
        set_weights(self.conv, *fuse_norm(self.conv, self.bn))
        return self.conv


class LinearBatchNorm(BaseModule):
    """A linear layer without bias, and its BatchNorm over all tokens of the batch."""

    def __init__(self, in_feature: int, out_feature: int, *, rngs: nnx.Rngs):
        self.linear = Linear(in_feature, out_feature, bias=False, rngs=rngs)
        self.bn = build_norm({"type": "BN1d"}, out_feature, rngs=rngs)

    def __call__(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        return self.bn(self.linear(x))

    def fuse(self) -> Linear:
        """The linear layer with the norm in its kernel and bias."""
        set_weights(self.linear, *fuse_norm(self.linear, self.bn))
        return self.linear


class BatchNormLinear(BaseModule):
    """BatchNorm, and a linear layer behind it."""

    def __init__(self, in_channels: int, out_channels: int, *, rngs: nnx.Rngs):
        self.bn = build_norm({"type": "BN1d"}, in_channels, rngs=rngs)
        self.linear = Linear(in_channels, out_channels, rngs=rngs)

    def __call__(self, x: Float[Array, "b in"]) -> Float[Array, "b out"]:
        return self.linear(self.bn(x))

    def fuse(self) -> Linear:
        """The linear layer with the norm in its kernel and bias."""
        scale, shift = scale_and_shift(self.bn)
        kernel, bias = self.linear.kernel, self.linear.bias
        assert bias is not None
        bias.set_value(bias[...] + jnp.matmul(shift, kernel[...], precision="highest"))
        kernel.set_value(kernel[...] * scale[:, None])
        return self.linear


class HybridBackbone(BaseModule):
    """Images to tokens by four convolutions of stride 2: [B, H, W, 3] -> [B, H/16, W/16, embed_dim]."""

    def __init__(self, embed_dim: int, *, rngs: nnx.Rngs):
        widths = [3, embed_dim // 8, embed_dim // 4, embed_dim // 2, embed_dim]
        layers: list[Any] = []
        for ins, outs in itertools.pairwise(widths):
            layers += [ConvolutionBatchNorm(ins, outs, rngs=rngs), Activation(_HSWISH)]
        self.patch_embed = nnx.List(layers[:-1])

    def __call__(self, x: Float[Array, "b h w 3"]) -> Float[Array, "b h2 w2 c"]:
        for layer in self.patch_embed:
            x = layer(x)
        return x


class Attention(BaseModule):
    """Attention of queries at every `stride`-th row and column, with a bias for each offset between query and key.

    With a stride it is the paper's shrinking attention: it halves the map and may widen it.

    Args:
        in_dim, out_dim: channels of input and output.
        key_dim: channels of queries and keys, in each head.
        num_heads: heads.
        attn_ratio: channels of values over those of keys.
        act_cfg: activation before the projection.
        resolution: side of the input map.
        stride: 1, or of the queries.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        key_dim: int,
        num_heads: int = 8,
        attn_ratio: float = 4,
        act_cfg: Mapping[str, Any] = _HSWISH,
        resolution: int = 14,
        stride: int = 1,
        *,
        rngs: nnx.Rngs,
    ):
        self.num_heads, self.key_dim, self.value_dim = num_heads, key_dim, int(attn_ratio * key_dim)
        self.scale, self.grid, self.stride = key_dim**-0.5, (resolution, resolution), stride
        keys, values = num_heads * key_dim, num_heads * self.value_dim
        if stride == 1:
            self.qkv = LinearBatchNorm(in_dim, 2 * keys + values, rngs=rngs)
        else:
            self.kv = LinearBatchNorm(in_dim, keys + values, rngs=rngs)
            self.q = nnx.List([Subsample(stride), LinearBatchNorm(in_dim, keys, rngs=rngs)])
        self.proj = nnx.List([Activation(act_cfg), LinearBatchNorm(values, out_dim, rngs=rngs)])
        self.attention_biases = nnx.Param(jnp.zeros((num_heads, resolution**2)))

    def __call__(self, x: Float[Array, "b h w in"], *, rngs: nnx.Rngs | None = None) -> Float[Array, "b h2 w2 out"]:
        check_grid(self, x.shape, self.grid)
        dim, shape = self.key_dim, (len(x), -1, self.num_heads)
        if self.stride == 1:
            q, k, v = jnp.split(self.qkv(x).reshape(*shape, 2 * dim + self.value_dim), (dim, 2 * dim), axis=-1)
        else:
            k, v = jnp.split(self.kv(x).reshape(*shape, dim + self.value_dim), (dim,), axis=-1)
            q = self.q[1](self.q[0](x)).reshape(*shape, dim)
        bias = offset_bias(self.attention_biases[...], self.grid, self.stride)
        y = scaled_dot_product_attention(self, q, k, v, scale=self.scale, bias=bias)
        side = -(-self.grid[0] // self.stride)
        y = y.reshape(len(x), side, side, -1)
        for layer in self.proj:
            y = layer(y)
        return y

    def derived(self) -> dict[str, np.ndarray]:
        return {"attention_bias_idxs": offset_index(self.grid, self.stride)}


class Subsample(nnx.Module):
    """Every `stride`-th row and column."""

    def __init__(self, stride: int):
        self.stride = stride

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
        return x[:, :: self.stride, :: self.stride]


class MLP(BaseModule):
    """Two linear layers with norms, and an activation between them; `mlp_ratio` times as many channels inside."""

    def __init__(self, embed_dim: int, mlp_ratio: int, act_cfg: Mapping[str, Any] = _HSWISH, *, rngs: nnx.Rngs):
        self.linear1 = LinearBatchNorm(embed_dim, embed_dim * mlp_ratio, rngs=rngs)
        self.act = activation(act_cfg)
        self.linear2 = LinearBatchNorm(embed_dim * mlp_ratio, embed_dim, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        return self.linear2(self.act(self.linear1(x)))


class Residual(BaseModule):
    """x + block(x), where a sample skips the block with probability `drop_path_rate` in training."""

    def __init__(self, block: nnx.Module, drop_path_rate: float = 0.0):
        self.block, self.drop_path_rate, self.deterministic = block, drop_path_rate, False

    def __call__(self, x: Float[Array, "b h w c"], *, rngs: nnx.Rngs | None = None) -> Float[Array, "b h w c"]:
        y = self.block(x)
        return x + (y if self.deterministic else drop_path(y, self.drop_path_rate, rngs))


class LeViT(BaseModule):
    """LeViT: [B, img_size, img_size, 3] -> a tuple of maps; the last is [B, img_size/64, img_size/64, C], rounded up.

    Args:
        arch: '128s', '128', '192', '256', '384'; or a dictionary with embed_dims, num_heads, depths and key_dims, each with
            a number for each stage.
        img_size: side of the images; others do not fit the biases.
        patch_size: pixels along a side of a token; what `hybrid_backbone` makes.
        attn_ratio: channels of values over those of keys.
        mlp_ratio: hidden channels of the MLPs, as a multiple; 0 for no MLPs.
        act_cfg: activation of attention and MLPs.
        hybrid_backbone: what makes tokens: called with their channels and `rngs`.
        out_indices: the stages whose outputs are returned; negative ones count from the end.
        deploy: whether to build the form for inference, without BatchNorm (see `switch_to_deploy`).
        drop_path_rate: stochastic depth of all blocks.
        init_cfg: initialisation, MMEngine's dictionaries.

    Attributes:
        deploy: whether it has this form.
        remat: what the backward pass recomputes: 'none', 'full' (all within a block), 'dots' (all but matmuls).
    """

    arch_zoo: ClassVar[dict[str, dict[str, list[int]]]] = {
        "128s": dict(embed_dims=[128, 256, 384], num_heads=[4, 6, 8], depths=[2, 3, 4], key_dims=[16, 16, 16]),
        "128": dict(embed_dims=[128, 256, 384], num_heads=[4, 8, 12], depths=[4, 4, 4], key_dims=[16, 16, 16]),
        "192": dict(embed_dims=[192, 288, 384], num_heads=[3, 5, 6], depths=[4, 4, 4], key_dims=[32, 32, 32]),
        "256": dict(embed_dims=[256, 384, 512], num_heads=[4, 6, 8], depths=[4, 4, 4], key_dims=[32, 32, 32]),
        "384": dict(embed_dims=[384, 512, 768], num_heads=[6, 9, 12], depths=[4, 4, 4], key_dims=[32, 32, 32]),
    }

    def __init__(
        self,
        arch: str | Mapping[str, Sequence[int]],
        img_size: int = 224,
        patch_size: int = 16,
        attn_ratio: float = 2,
        mlp_ratio: int = 2,
        act_cfg: Mapping[str, Any] = _HSWISH,
        hybrid_backbone: Callable[..., nnx.Module] = HybridBackbone,
        out_indices: int | Sequence[int] = -1,
        deploy: bool = False,
        drop_path_rate: float = 0.0,
        init_cfg: Any = None,
        *,
        rngs: nnx.Rngs,
    ):
        self.init_cfg, self.remat, self.deploy = init_cfg, "none", False
        if isinstance(arch, str):
            if arch.lower() not in self.arch_zoo:
                raise ConfigError(f"LeViT has no arch {arch!r}.{nearest(arch, self.arch_zoo)}")
            arch = self.arch_zoo[arch.lower()]
        if set(arch) != set(self.arch_zoo["128"]):
            raise ConfigError(f"LeViT: arch as a dictionary has {sorted(self.arch_zoo['128'])}; got {sorted(arch)}")

        widths = arch["embed_dims"]
        self.patch_embed: Any = hybrid_backbone(widths[0], rngs=rngs)
        side, ins = img_size // patch_size, widths[0]
        stages = []
        for i, (outs, key_dim, depth, heads) in enumerate(
            zip(widths, arch["key_dims"], arch["depths"], arch["num_heads"], strict=True)
        ):
            mixers: list[Any] = []
            if i > 0:
                mixers.append(Attention(ins, outs, key_dim, ins // key_dim, 4, act_cfg, side, stride=2, rngs=rngs))
                side = -(-side // 2)
            mixers += [
                Residual(Attention(outs, outs, key_dim, heads, attn_ratio, act_cfg, side, rngs=rngs), drop_path_rate)
                for _ in range(depth)
            ]
            blocks = []
            for mixer in mixers:
                blocks.append(mixer)
                if mlp_ratio > 0:
                    blocks.append(Residual(MLP(outs, mlp_ratio, act_cfg, rngs=rngs), drop_path_rate))
            stages.append(nnx.List(blocks))
            ins = outs
        self.stages = nnx.List(stages)
        self.out_indices = stage_indices(self, out_indices, len(stages))
        if deploy:
            self.switch_to_deploy()

    def switch_to_deploy(self) -> None:
        """Melts every BatchNorm into the layer before it, in place. Eval mode gives the same; training is over."""
        if not self.deploy:
            fuse_batch_norms(self)
            self.deploy = True

    def __call__(
        self, x: Float[Array, "b h w 3"], *, rngs: nnx.Rngs | None = None
    ) -> tuple[Float[Array, "b h2 w2 c"], ...]:
        """The maps of the stages in `out_indices`, in order. `rngs` is for drop path in training."""
        x = self.patch_embed(x)
        outs = []
        for i, stage in enumerate(self.stages):
            for block in stage:
                x = apply_block(block, x, rngs=rngs, remat=self.remat)
            if i in self.out_indices:
                outs.append(x)
        return tuple(outs)


def stage_indices(model: nnx.Module, out_indices: int | Sequence[int], count: int) -> tuple[int, ...]:
    """`out_indices` as a tuple from 0, in ascending order. Raises ConfigError for those that there are not."""
    indices = (out_indices,) if isinstance(out_indices, int) else tuple(out_indices)
    if not all(-count <= i < count for i in indices):
        raise ConfigError(f"{type(model).__name__}: out_indices {indices} must be in {-count} ... {count - 1}")
    return tuple(sorted({i % count for i in indices}))


class LeViTClsHead(ClsHead):
    """BatchNorm and a linear layer, `head`, and with distillation a second pair, `head_dist`; logits are their mean.

    Args:
        num_classes: number of classes.
        distillation: whether there is a second classifier, which learnt from a teacher. Then it is for inference only.
        in_channels: channels of the features.
        deploy: whether to build the form for inference, without BatchNorm (see `switch_to_deploy`).
        kwargs: `loss`, `topk`, `cal_acc` and `init_cfg` of `ClsHead`.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        distillation: bool = True,
        in_channels: int | None = None,
        deploy: bool = False,
        *,
        rngs: nnx.Rngs,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        check_classes(self, num_classes)
        if in_channels is None:
            raise ConfigError("LeViTClsHead needs in_channels, the channels of the features")
        self.num_classes, self.in_channels, self.deploy = num_classes, in_channels, False
        self.head: Any = BatchNormLinear(in_channels, num_classes, rngs=rngs)
        self.head_dist: Any = BatchNormLinear(in_channels, num_classes, rngs=rngs) if distillation else None
        if deploy:
            self.switch_to_deploy()

    def switch_to_deploy(self) -> None:
        """Melts every BatchNorm into the linear layer behind it, in place. Eval mode gives the same; training is over."""
        if not self.deploy:
            fuse_batch_norms(self)
            self.deploy = True

    def __call__(self, feats: Features, *, rngs: nnx.Rngs | None = None) -> Float[Array, "b classes"]:
        """Logits, before softmax."""
        x = self.pre_logits(feats)
        return self.head(x) if self.head_dist is None else (self.head(x) + self.head_dist(x)) / 2

    def loss(self, *args: Any, **kwargs: Any) -> tuple[Float[Array, ""], dict[str, Array]]:
        """As of `ClsHead`; raises ConfigError with distillation, for want of a teacher."""
        if self.head_dist is not None:
            raise ConfigError("LeViTClsHead cannot train with a teacher: set distillation=False")
        return super().loss(*args, **kwargs)
