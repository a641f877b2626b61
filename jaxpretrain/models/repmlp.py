"""RepMLPNet: hierarchical vision MLP with re-parameterised locality (Ding et al., 2022, https://arxiv.org/abs/2112.11081).

Every unit maps all positions to all positions by matrices, each shared by many channels. In training there are small
convolutions beside them, which melt into the matrices for inference (`switch_to_deploy`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from jaxpretrain.build import ConfigError
from jaxpretrain.models.layers.arch import architecture, output_indices
from jaxpretrain.models.layers.base import BaseModule
from jaxpretrain.models.layers.conv import Conv2d, ConvModule
from jaxpretrain.models.layers.norm import build_norm
from jaxpretrain.models.layers.patch_embed import PatchEmbed, to_2tuple
from jaxpretrain.models.layers.reparam import centred, fuse_norm, scale_and_shift, set_weights
from jaxpretrain.models.layers.se import SELayer
from jaxpretrain.models.layers.stack import apply_block

_BN = {"type": "BN", "requires_grad": True}


class RepMLPBlock(BaseModule):
    """se(x) * (fc3(x) + convolutions of x): each image's map as a vector, through matrices over positions.

    Channels are dealt out to `num_sharesets` sets in turn (channel c is in set c mod num_sharesets); those of a set share one
    matrix, one filter of each convolution, and one gain and shift of each norm.

    Args:
        channels: of input and output; a multiple of `num_sharesets`.
        path_h, path_w: size of the map.
        reparam_conv_kernels: sizes of the convolutions beside the matrices, `repconv1` and so on; odd.
        globalperceptron_ratio: channels over those squeezed to, in `gp`.
        num_sharesets: number of matrices.
        norm_cfg: the norms, as for `build_norm`.
        deploy: whether to build the form for inference: without convolutions and norms.

    Attributes:
        fc3: the matrices, as a 1x1 convolution with one group for each set.
    """

    def __init__(
        self,
        channels: int,
        path_h: int,
        path_w: int,
        reparam_conv_kernels: Sequence[int] | None = None,
        globalperceptron_ratio: int = 4,
        num_sharesets: int = 1,
        norm_cfg: Mapping[str, Any] = _BN,
        deploy: bool = False,
        *,
        rngs: nnx.Rngs,
    ):
        if channels % num_sharesets:
            raise ConfigError(f"RepMLPNet: {channels} channels cannot be dealt out to {num_sharesets} sets")
        self.sets, self.size, self.deploy = num_sharesets, (path_h, path_w), deploy
        self.gp = SELayer(channels, ratio=globalperceptron_ratio, return_weight=True, rngs=rngs)
        features = path_h * path_w * num_sharesets
        self.fc3: Any = Conv2d(features, features, 1, groups=num_sharesets, bias=deploy, rngs=rngs)
        self.fc3_bn: Any = None if deploy else build_norm(norm_cfg, num_sharesets, rngs=rngs)
        self.kernels = () if deploy else tuple(reparam_conv_kernels or ())
        for k in self.kernels:
            shape = (num_sharesets, num_sharesets, k, 1, k // 2, 1, num_sharesets)
            setattr(self, f"repconv{k}", ConvModule(*shape, norm_cfg=norm_cfg, act_cfg=None, rngs=rngs))

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        (h, w), s = self.size, self.sets
        vectors = x.reshape(len(x), h * w, -1, s)
        matrices = self.fc3.kernel[...].astype(x.dtype).reshape(h * w, s, h * w)
        y = jnp.einsum("biqs,iso->boqs", vectors, matrices)
        if self.deploy:
            y = y + self.fc3.bias[...].astype(x.dtype).reshape(s, h * w).T[:, None]
        else:
            y = self.fc3_bn(y)
            if self.kernels:
                y = y + self._local(vectors)
        return y.reshape(x.shape) * self.gp(x)

    def _local(self, vectors: Float[Array, "b n q s"]) -> Float[Array, "b n q s"]:
        """The sum of the convolutions, each over the channels of a set as if they were images of their own."""
        b, n, q, s = vectors.shape
        maps = vectors.swapaxes(1, 2).reshape(b * q, *self.size, s)
        first, *others = (getattr(self, f"repconv{k}") for k in self.kernels)
        y = first(maps)
        for conv in others:
            y = y + conv(maps)
        return y.reshape(b, q, n, s).swapaxes(1, 2)

    def switch_to_deploy(self) -> None:
        """Melts norms and convolutions into the matrices, in place. Eval mode gives the same; training is over."""
        if self.deploy:
            return
        (h, w), s = self.size, self.sets
        scale, shift = scale_and_shift(self.fc3_bn)
        matrices = self.fc3.kernel[...].reshape(h * w, s, h * w) * scale[:, None]
        if self.kernels:
            widest = max(self.kernels)
            fused = [fuse_norm(conv.conv, conv.bn) for conv in (getattr(self, f"repconv{k}") for k in self.kernels)]
            kernel: Any = sum(centred(kernel, widest) for kernel, _ in fused)
            matrices = matrices + conv_matrices(kernel, self.size)
            shift = shift + sum(bias for _, bias in fused)
        set_weights(self.fc3, matrices.reshape(self.fc3.kernel.shape), jnp.repeat(shift, h * w))
        for k in self.kernels:
            delattr(self, f"repconv{k}")
        self.kernels, self.fc3_bn, self.deploy = (), None, True


def conv_matrices(kernel: Float[Array, "k k 1 s"], size: tuple[int, int]) -> Float[Array, "n s n"]:
    """The depthwise convolution that keeps the map's size, as matrices [input position, channel, output position]."""
    taps, inside = [], []
    for length in size:
        tap = np.arange(length)[:, None] - np.arange(length)[None] + kernel.shape[0] // 2  # [input, output]
        taps.append(np.clip(tap, 0, kernel.shape[0] - 1))
        inside.append((tap >= 0) & (tap < kernel.shape[0]))
    rows, columns = taps[0][:, None, :, None], taps[1][None, :, None, :]  # [row, column, output row, output column]
    there = inside[0][:, None, :, None] & inside[1][None, :, None, :]
    entries = jnp.where(there[..., None], kernel[rows, columns, 0], 0)
    count = size[0] * size[1]
    return entries.reshape(count, count, -1).swapaxes(1, 2)


class ConvFFN(BaseModule):
    """fc2(gelu(fc1(x))), 1x1 convolutions with norms: `ffn_fc1`, `ffn_fc2`."""

    def __init__(self, channels: int, hidden: int, norm_cfg: Mapping[str, Any] = _BN, *, rngs: nnx.Rngs):
        self.ffn_fc1 = ConvModule(channels, hidden, 1, norm_cfg=norm_cfg, act_cfg={"type": "GELU"}, rngs=rngs)
        self.ffn_fc2 = ConvModule(hidden, channels, 1, norm_cfg=norm_cfg, act_cfg=None, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        return self.ffn_fc2(self.ffn_fc1(x))


class RepMLPNetUnit(BaseModule):
    """y = x + block(norm1(x)), then y + ffn(norm2(y)).

    Args:
        channels: of input and output.
        norm_cfg: the norms, as for `build_norm`.
        ffn_expand: hidden channels of the `ConvFFN`, as a multiple.
        kwargs: other arguments of `RepMLPBlock`.
    """

    def __init__(
        self, channels: int, norm_cfg: Mapping[str, Any] = _BN, ffn_expand: int = 4, *, rngs: nnx.Rngs, **kwargs: Any
    ):
        self.norm1 = build_norm(norm_cfg, channels, rngs=rngs)
        self.repmlp_block = RepMLPBlock(channels, norm_cfg=norm_cfg, rngs=rngs, **kwargs)
        self.norm2 = build_norm(norm_cfg, channels, rngs=rngs)
        self.ffn_block = ConvFFN(channels, channels * ffn_expand, norm_cfg, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"], *, rngs: nnx.Rngs | None = None) -> Float[Array, "b h w c"]:
        x = x + self.repmlp_block(self.norm1(x))
        return x + self.ffn_block(self.norm2(x))


class RepMLPNet(BaseModule):
    """RepMLPNet: [B, img_size, img_size, in_channels] -> a tuple of maps; the last is [B, img_size/32, img_size/32, C].

    All but the last stage are followed by a convolution of stride 2, which is part of their outputs.

    Args:
        arch: 'base' (or 'b'); or a dictionary with channels, depths and sharesets_nums, each a number for each stage.
        img_size: size of the images, one number or (height, width); the matrices are for no other.
        in_channels: channels of the images.
        patch_size: size of the patches, which are embedded one by one.
        out_indices: the stages whose outputs are returned; negative ones count from the end.
        reparam_conv_kernels, globalperceptron_ratio: see `RepMLPBlock`.
        conv_cfg: accepted for MMPretrain's configs; there is one kind of convolution.
        norm_cfg: the norms, as for `build_norm`.
        patch_cfg: further arguments of `PatchEmbed`.
        final_norm: whether the last output is normalised.
        deploy: whether to build the form for inference (see `switch_to_deploy`).
        init_cfg: initialisation, MMEngine's dictionaries.

    Attributes:
        deploy: whether it has this form.
        remat: what the backward pass recomputes: 'none', 'full' (all within a unit), 'dots' (all but convolutions and
            matmuls).

    Raises:
        ConfigError: an unknown architecture or stage; lists of different lengths.
    """

    arch_zoo: ClassVar[dict[tuple[str, ...], dict[str, Sequence[int]]]] = {
        ("b", "base"): dict(channels=(96, 192, 384, 768), depths=(2, 2, 12, 2), sharesets_nums=(1, 4, 32, 128)),
    }

    def __init__(
        self,
        arch: str | Mapping[str, Sequence[int]],
        img_size: int | tuple[int, int] = 224,
        in_channels: int = 3,
        patch_size: int | tuple[int, int] = 4,
        out_indices: int | Sequence[int] = (3,),
        reparam_conv_kernels: Sequence[int] | None = (3,),
        globalperceptron_ratio: int = 4,
        conv_cfg: Mapping[str, Any] | None = None,
        norm_cfg: Mapping[str, Any] = _BN,
        patch_cfg: Mapping[str, Any] = {},
        final_norm: bool = True,
        deploy: bool = False,
        init_cfg: Any = None,
        *,
        rngs: nnx.Rngs,
    ):
        numbers = architecture(arch, self.arch_zoo, "RepMLPNet")
        widths, depths, sets = (numbers[name] for name in ("channels", "depths", "sharesets_nums"))
        if not len(widths) == len(depths) == len(sets):
            raise ConfigError(f"RepMLPNet: arch needs a number for each stage in all of {numbers}")
        self.init_cfg, self.deploy, self.remat = init_cfg, deploy, "none"
        self.img_size = to_2tuple(img_size)
        self.out_indices = output_indices(out_indices, len(widths), "RepMLPNet")

        patches = dict(kernel_size=patch_size, stride=patch_size, norm_cfg=norm_cfg, bias=False)
        patches |= dict(in_channels=in_channels, embed_dims=widths[0], input_size=self.img_size)
        self.patch_embed = PatchEmbed(**(patches | dict(patch_cfg)), rngs=rngs)
        h, w = self.patch_embed.init_out_size
        stages, downsample_layers = [], []
        for i, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            unit: dict[str, Any] = dict(path_h=h >> i, path_w=w >> i, reparam_conv_kernels=reparam_conv_kernels)
            unit |= dict(globalperceptron_ratio=globalperceptron_ratio, num_sharesets=sets[i], norm_cfg=norm_cfg)
            stages.append(nnx.List([RepMLPNetUnit(width, deploy=deploy, rngs=rngs, **unit) for _ in range(depth)]))
            if i < len(widths) - 1:
                downsample_layers.append(ConvModule(width, widths[i + 1], 2, 2, norm_cfg=norm_cfg, rngs=rngs))
        self.stages, self.downsample_layers = nnx.List(stages), nnx.List(downsample_layers)
        self.final_norm = build_norm(norm_cfg, widths[-1], rngs=rngs) if final_norm else None

    def switch_to_deploy(self) -> None:
        """Melts norms and convolutions into the matrices, in place. Eval mode gives the same; training is over."""
        for stage in self.stages:
            for unit in stage:
                unit.repmlp_block.switch_to_deploy()
        self.deploy = True

    def __call__(
        self, x: Float[Array, "b h w c"], *, rngs: nnx.Rngs | None = None
    ) -> tuple[Float[Array, "b h2 w2 c2"], ...]:
        """The maps of the stages in `out_indices`, in order. Nothing is drawn: `rngs` is not used."""
        if x.shape[1:3] != self.img_size:
            raise ConfigError(
                f"RepMLPNet: images are {x.shape[1:3]}, but img_size is {self.img_size}, and must be theirs"
            )
        tokens, (h, w) = self.patch_embed(x)
        x = jax.nn.relu(tokens).reshape(len(x), h, w, -1)
        outs = []
        for i, stage in enumerate(self.stages):
            for unit in stage:
                x = apply_block(unit, x, remat=self.remat)
            if i < len(self.downsample_layers):
                x = self.downsample_layers[i](x)
            if i in self.out_indices:
                last = i == len(self.stages) - 1
                outs.append(self.final_norm(x) if last and self.final_norm is not None else x)
        return tuple(outs)
