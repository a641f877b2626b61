"""RIFormer: Keep Your Vision Backbone Effective But Removing Token Mixer (Wang et al., 2023, https://arxiv.org/abs/2304.05659).

PoolFormer without the pooling: a gain and a shift for each channel are in its place in training, and melt into the norm
before them for inference (`switch_to_deploy`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from jaxpretrain.models.layers.base import BaseModule
from jaxpretrain.models.layers.conv import Conv2d
from jaxpretrain.models.layers.norm import build_norm
from jaxpretrain.models.poolformer import PoolFormer, PoolFormerBlock

_GN = {"type": "GN", "num_groups": 1}
_GELU = {"type": "GELU"}


class Affine(BaseModule):
    """gain * x + shift - x, with a gain and a shift for each channel: a 1x1 depthwise convolution, `affine`."""

    def __init__(self, in_features: int, *, rngs: nnx.Rngs):
        self.affine = Conv2d(in_features, in_features, 1, groups=in_features, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        assert self.affine.bias is not None
        gain, shift = self.affine.kernel[0, 0, 0], self.affine.bias[...]
        return x * (gain - 1).astype(x.dtype) + shift.astype(x.dtype)


class RIFormerBlock(PoolFormerBlock):
    """The block of PoolFormer with `Affine` for its pooling; deployed, with the norm `norm_reparam` alone.

    Args:
        deploy: whether to build the deployed form.
        kwargs: arguments of `PoolFormerBlock`, but for `pool_size`.
    """

    def __init__(self, *, deploy: bool = False, rngs: nnx.Rngs, **kwargs: Any):
        self.deploy = deploy
        super().__init__(rngs=rngs, **kwargs)

    def _build_mixer(self, dim: int, pool_size: int, norm_cfg: Mapping[str, Any], rngs: nnx.Rngs) -> None:
        norm = build_norm(norm_cfg, dim, rngs=rngs)
        self.norm_reparam: Any = norm if self.deploy else None
        self.norm1: Any = None if self.deploy else norm
        self.token_mixer: Any = None if self.deploy else Affine(dim, rngs=rngs)

    def mix(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """The first branch, before its factors."""
        return self.norm_reparam(x) if self.deploy else self.token_mixer(self.norm1(x))

    def switch_to_deploy(self) -> None:
        """Melts the gain and the shift into the norm before them, in place; the values stay the same."""
        if self.deploy:
            return
        norm, affine = self.norm1, self.token_mixer.affine
        gain, shift = affine.kernel[0, 0, 0] - 1, affine.bias[...]
        norm.scale.set_value(norm.scale[...] * gain)
        norm.bias.set_value(norm.bias[...] * gain + shift)
        self.norm1 = self.token_mixer = None
        self.norm_reparam = nnx.data(norm)
        self.deploy = True


class RIFormer(PoolFormer):
    """RIFormer: [B, H, W, in_channels] -> a tuple of maps; the last is [B, H/32, W/32, C].

    Args:
        arch: 's12', 's24', 's36', 'm36', 'm48', or a dictionary: see `PoolFormer`, as for all that is not said here.
        in_channels: channels of the images.
        frozen_stages: the last position (see `out_indices`) that does not learn; -1: all learn.
        deploy: whether to build the form for inference (see `switch_to_deploy`).

    Attributes:
        deploy: whether it has this form.
        scan_layers, remat: how the blocks of a stage are run (see `apply_layers`).
    """

    def __init__(
        self,
        arch: str | Mapping[str, Any] = "s12",
        in_channels: int = 3,
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
        frozen_stages: int = -1,
        init_cfg: Any = None,
        deploy: bool = False,
        *,
        rngs: nnx.Rngs,
    ):
        self.deploy = deploy
        block = {"norm_cfg": norm_cfg, "act_cfg": act_cfg, "drop": drop_rate, "deploy": deploy}
        self._build(
            arch,
            in_channels,
            (in_patch_size, in_stride, in_pad),
            (down_patch_size, down_stride, down_pad),
            block,
            drop_path_rate,
            out_indices,
            init_cfg,
            rngs,
        )
        self._freeze(frozen_stages, frozen_stages + 1)

    def _block(self, **args: Any) -> nnx.Module:
        return RIFormerBlock(**args)

    def switch_to_deploy(self) -> None:
        """Melts the gains and shifts into the norms before them, in place; the values stay the same."""
        for layer in self.network:
            for block in layer if isinstance(layer, nnx.List) else ():
                block.switch_to_deploy()
        self.deploy = True
