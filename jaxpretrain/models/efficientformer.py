"""EfficientFormer: Vision Transformers at MobileNet Speed (Li et al., 2022, https://arxiv.org/abs/2206.01191).

Pooling as in PoolFormer on maps ("4D"), and attention on the tokens ("3D") of the smallest map only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from jaxpretrain.build import ConfigError, nearest
from jaxpretrain.models.layers.activation import activation
from jaxpretrain.models.layers.base import BaseModule, freeze_stage
from jaxpretrain.models.layers.conv import Conv2d, ConvModule
from jaxpretrain.models.layers.drop import Dropout, drop_path
from jaxpretrain.models.layers.layer_scale import LayerScale
from jaxpretrain.models.layers.linear import Linear
from jaxpretrain.models.layers.norm import build_norm
from jaxpretrain.models.layers.offset_attention import OffsetAttention, offset_index
from jaxpretrain.models.layers.stack import apply_block
from jaxpretrain.models.poolformer import Pooling

_GELU = {"type": "GELU"}
_BN = {"type": "BN"}
RESOLUTION = 7  # side of the last map, which the attention's biases are for


class AttentionWithBias(OffsetAttention):
    """The attention of EfficientFormer: 8 heads with keys of 32 and values of 128 channels, whatever the width."""

    def __init__(self, embed_dims: int, *, rngs: nnx.Rngs):
        super().__init__(embed_dims, 8, 32, 4.0, (RESOLUTION, RESOLUTION), rngs=rngs)

    def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        if x.shape[1] != RESOLUTION**2:
            raise ConfigError(
                f"EfficientFormer attends to {RESOLUTION}x{RESOLUTION} tokens, not to {x.shape[1]}: its images have 224x224 "
                "pixels"
            )
        return super().__call__(x)

    def derived(self) -> dict[str, np.ndarray]:
        return {"attention_bias_idxs": offset_index(self.grid)}


class Flat(nnx.Module):
    """A map as tokens: [B, H, W, C] -> [B, H * W, C]."""

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b n c"]:
        return x.reshape(x.shape[0], -1, x.shape[-1])


class LinearMlp(BaseModule):
    """Two linear layers, an activation between them, and dropout after each."""

    def __init__(self, dim: int, hidden: int, act_cfg: Mapping[str, Any], drop: float, *, rngs: nnx.Rngs):
        self.fc1 = Linear(dim, hidden, rngs=rngs)
        self.act = activation(act_cfg)
        self.fc2 = Linear(hidden, dim, rngs=rngs)
        self.drop = Dropout(drop)

    def __call__(self, x: Float[Array, "b n c"], *, rngs: nnx.Rngs | None = None) -> Float[Array, "b n c"]:
        x = self.drop(self.act(self.fc1(x)), rngs=rngs)
        return self.drop(self.fc2(x), rngs=rngs)


class ConvMlp(BaseModule):
    """Two 1x1 convolutions, each with BatchNorm, an activation between them, and dropout after each."""

    def __init__(self, dim: int, hidden: int, act_cfg: Mapping[str, Any], drop: float, *, rngs: nnx.Rngs):
        self.fc1 = Conv2d(dim, hidden, 1, rngs=rngs)
        self.norm1 = build_norm(_BN, hidden, rngs=rngs)
        self.act = activation(act_cfg)
        self.fc2 = Conv2d(hidden, dim, 1, rngs=rngs)
        self.norm2 = build_norm(_BN, dim, rngs=rngs)
        self.drop = Dropout(drop)

    def __call__(self, x: Float[Array, "b h w c"], *, rngs: nnx.Rngs | None = None) -> Float[Array, "b h w c"]:
        x = self.drop(self.act(self.norm1(self.fc1(x))), rngs=rngs)
        return self.drop(self.norm2(self.fc2(x)), rngs=rngs)


class MetaBlock(BaseModule):
    """x + scale1 * token_mixer(x), then x + scale2 * mlp(x), where both begin with a norm in blocks on tokens.

    Args:
        dim: channels.
        token_mixer, mlp: the two branches.
        norms: whether there are norms before them.
        drop_path: probability of dropping a branch of a sample in training.
        use_layer_scale: whether there are factors for each channel.
    """

    def __init__(
        self,
        dim: int,
        token_mixer: Any,
        mlp: nnx.Module,
        norms: bool,
        drop_path: float = 0.0,
        use_layer_scale: bool = True,
        *,
        rngs: nnx.Rngs,
    ):
        self.drop_path_rate, self.deterministic = drop_path, False
        self.norm1 = build_norm({"type": "LN"}, dim, rngs=rngs) if norms else None
        self.token_mixer = token_mixer
        self.norm2 = build_norm({"type": "LN"}, dim, rngs=rngs) if norms else None
        self.mlp: Any = mlp
        self.ls1 = LayerScale(dim) if use_layer_scale else None
        self.ls2 = LayerScale(dim) if use_layer_scale else None

    def __call__(self, x: Float[Array, "b *n c"], *, rngs: nnx.Rngs | None = None) -> Float[Array, "b *n c"]:
        rate = 0.0 if self.deterministic else self.drop_path_rate
        y = self.token_mixer(x if self.norm1 is None else self.norm1(x))
        x = x + drop_path(y if self.ls1 is None else self.ls1(y), rate, rngs)
        y = self.mlp(x if self.norm2 is None else self.norm2(x), rngs=rngs)
        return x + drop_path(y if self.ls2 is None else self.ls2(y), rate, rngs)


class Meta3D(MetaBlock):
    """A block on tokens: attention and linear layers, with LayerNorms."""

    def __init__(
        self, dim: int, mlp_ratio: float, act_cfg: Mapping[str, Any], drop: float, *, rngs: nnx.Rngs, **kwargs: Any
    ):
        mlp = LinearMlp(dim, int(dim * mlp_ratio), act_cfg, drop, rngs=rngs)
        super().__init__(dim, AttentionWithBias(dim, rngs=rngs), mlp, norms=True, rngs=rngs, **kwargs)


class Meta4D(MetaBlock):
    """A block on maps: pooling and 1x1 convolutions, with BatchNorms in the latter. Its hidden channels are 4 * `dim`."""

    def __init__(
        self, dim: int, pool_size: int, act_cfg: Mapping[str, Any], drop: float, *, rngs: nnx.Rngs, **kwargs: Any
    ):
        mlp = ConvMlp(dim, 4 * dim, act_cfg, drop, rngs=rngs)
        super().__init__(dim, Pooling(pool_size), mlp, norms=False, rngs=rngs, **kwargs)


class EfficientFormer(BaseModule):
    """EfficientFormer: [B, 224, 224, in_channels] -> a tuple of normalised maps; the last is tokens [B, 49, C].

    (MMPretrain's tokens are [B, C, 49]; here channels are last, as everywhere.)

    Args:
        arch: 'l1', 'l3', 'l7', or a dictionary: layers (blocks), embed_dims and downsamples, each with an entry for each
            stage, and vit_num, the number of blocks with attention at the end.
        in_channels: channels of the images.
        pool_size: side of the window of the pooling.
        mlp_ratios: hidden channels of the blocks with attention, as a multiple.
        reshape_last_feat: whether the last output is a map too, [B, 7, 7, C], with another norm.
        out_indices: the stages whose outputs are returned; negative ones count from the end.
        frozen_stages: how many stages do not learn, besides the first convolutions; -1: all learn.
        act_cfg: activations.
        drop_rate: dropout of the MLPs.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0 in the first.
        use_layer_scale: whether branches have a factor for each channel.
        init_cfg: initialisation, MMEngine's dictionaries.

    Attributes:
        remat: what the backward pass recomputes: 'none', 'full' (all within a block), 'dots' (all but matmuls).
    """

    arch_settings: ClassVar[dict[str, dict[str, Any]]] = {
        name: dict(layers=layers, embed_dims=widths, downsamples=[False, True, True, True], vit_num=attending)
        for name, layers, widths, attending in (
            ("l1", [3, 2, 6, 4], [48, 96, 224, 448], 1),
            ("l3", [4, 4, 12, 6], [64, 128, 320, 512], 4),
            ("l7", [6, 6, 18, 8], [96, 192, 384, 768], 8),
        )
    }

    def __init__(
        self,
        arch: str | Mapping[str, Any] = "l1",
        in_channels: int = 3,
        pool_size: int = 3,
        mlp_ratios: float = 4,
        reshape_last_feat: bool = False,
        out_indices: int | Sequence[int] = -1,
        frozen_stages: int = -1,
        act_cfg: Mapping[str, Any] = _GELU,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        use_layer_scale: bool = True,
        init_cfg: Any = None,
        *,
        rngs: nnx.Rngs,
    ):
        self.init_cfg, self.remat = init_cfg, "none"
        depths, widths, downsamples, attending = self._arch(arch)
        self.as_tokens = attending > 0 and not reshape_last_feat
        self.patch_embed = nnx.List(
            ConvModule(ins, outs, 3, 2, 1, bias=True, norm_cfg=_BN, rngs=rngs)
            for ins, outs in ((in_channels, widths[0] // 2), (widths[0] // 2, widths[0]))
        )
        block: dict[str, Any] = {"act_cfg": act_cfg, "drop": drop_rate, "use_layer_scale": use_layer_scale}
        total, count, network = sum(depths), 0, []
        for i, (depth, width) in enumerate(zip(depths, widths, strict=True)):
            stage: list[Any] = []
            if downsamples[i]:
                down = ConvModule(
                    widths[max(i - 1, 0)], width, 3, 2, 1, bias=True, norm_cfg=_BN, act_cfg=None, rngs=rngs
                )
                stage.append(down)
            for _ in range(depth):
                args = block | {"drop_path": drop_path_rate * count / max(total - 1, 1), "rngs": rngs}
                if total - count == attending:
                    stage.append(Flat())
                if total - count <= attending:
                    stage.append(Meta3D(width, mlp_ratios, **args))
                else:
                    stage.append(Meta4D(width, pool_size, **args))
                count += 1
            network.append(nnx.List(stage))
        self.network = nnx.List(network)

        name, stages = type(self).__name__, len(depths)
        indices = (out_indices,) if isinstance(out_indices, int) else tuple(out_indices)
        if not all(-stages <= i < stages for i in indices):
            raise ConfigError(f"{name}: out_indices {indices} must be in {-stages} ... {stages - 1}")
        self.out_indices = tuple(sorted({i % stages for i in indices}))
        for i in self.out_indices:
            tokens = self.as_tokens and i == stages - 1
            norm = {"type": "LN"} if tokens else {"type": "GN", "num_groups": 1}
            setattr(self, f"norm{i}", build_norm(norm, widths[i], rngs=rngs))
        if not -1 <= frozen_stages <= stages:
            raise ConfigError(f"{name}: frozen_stages is -1 (none) to {stages}, not {frozen_stages}")
        if frozen_stages >= 0:
            freeze_stage(self.patch_embed)
        for i in range(frozen_stages):
            freeze_stage(self.network[i])
            if i in self.out_indices:
                freeze_stage(getattr(self, f"norm{i}"))

    def _arch(self, arch: str | Mapping[str, Any]) -> tuple[list[int], list[int], list[bool], int]:
        """Depths, widths, whether a stage begins with a stride, and how many of the last blocks attend."""
        if isinstance(arch, str):
            if arch not in self.arch_settings:
                raise ConfigError(f"EfficientFormer has no arch {arch!r}.{nearest(arch, self.arch_settings)}")
            arch = self.arch_settings[arch]
        if set(arch) != set(self.arch_settings["l1"]):
            raise ConfigError(
                f"EfficientFormer: arch as a dictionary has {sorted(self.arch_settings['l1'])}; got {sorted(arch)}"
            )
        depths, widths, downsamples = (list(arch[key]) for key in ("layers", "embed_dims", "downsamples"))
        if not len(depths) == len(widths) == len(downsamples):
            raise ConfigError(f"EfficientFormer: layers, embed_dims and downsamples differ in length: {dict(arch)}")
        if not 0 <= arch["vit_num"] <= depths[-1]:
            raise ConfigError(
                f"EfficientFormer: vit_num={arch['vit_num']} must be from 0 to {depths[-1]}, the last stage's"
            )
        return depths, widths, downsamples, arch["vit_num"]

    def __call__(
        self, x: Float[Array, "b h w c"], *, rngs: nnx.Rngs | None = None
    ) -> tuple[Float[Array, "b *n c2"], ...]:
        """The normalised outputs of the stages in `out_indices`, in order. `rngs` is for dropout and drop path."""
        for layer in self.patch_embed:
            x = layer(x)
        outs = []
        for i, stage in enumerate(self.network):
            for layer in stage:
                is_block = isinstance(layer, MetaBlock)
                x = apply_block(layer, x, rngs=rngs, remat=self.remat) if is_block else layer(x)
            if i in self.out_indices:
                if x.ndim == 3 and not self.as_tokens:
                    x = x.reshape(x.shape[0], RESOLUTION, RESOLUTION, -1)
                outs.append(getattr(self, f"norm{i}")(x))
        return tuple(outs)
