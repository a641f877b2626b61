"""Necks: what lies between a backbone and a head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from jaxpretrain.build import ConfigError
from jaxpretrain.models.layers.base import BaseModule
from jaxpretrain.models.layers.conv import global_avg_pool, relu
from jaxpretrain.models.layers.linear import Linear
from jaxpretrain.models.layers.norm import build_norm

_SYNC_BN = {"type": "SyncBN"}
_INIT = ({"type": "Constant", "val": 1, "layer": ["_BatchNorm", "GroupNorm"]},)


class GlobalAveragePooling(BaseModule):
    """The mean over an image's positions: [B, H, W, C] -> [B, C]; of each array, if given a tuple.

    Args:
        dim: number of spatial axes: 1, 2 or 3.
    """

    def __init__(self, dim: int = 2):
        if dim not in (1, 2, 3):
            raise ConfigError(f"GlobalAveragePooling: dim is 1, 2 or 3, not {dim}")
        self.dim = dim

    def __call__(self, x: Any) -> Any:
        if isinstance(x, tuple | list):
            return tuple(self(array) for array in x)
        if x.ndim != self.dim + 2:
            raise ValueError(f"GlobalAveragePooling(dim={self.dim}): an array of shape {x.shape} has not dim + 2 axes")
        return global_avg_pool(x)


class NonLinearNeck(BaseModule):
    """fc-bn-[relu-fc-bn]x(num_layers - 1): the projector and predictor of SimCLR, BYOL, SimSiam and MoCo v3.

    Takes [B, ..., in_channels], or a tuple whose only entry that is, and gives [B, out_channels] in the same form.

    Args:
        in_channels, hid_channels, out_channels: widths of input, hidden layers and output.
        num_layers: number of linear layers, 1 or more; the first ends in hid_channels, as does a single one.
        with_bias: whether the linear layers but the last have a bias.
        with_last_bn, with_last_bn_affine: whether the last layer has a norm, and that a scale and bias.
        with_last_bias: whether the last linear layer has a bias.
        with_avg_pool: whether to average over the positions first.
        norm_cfg: the norms, as for `build_norm`.
        init_cfg: initialisation, MMEngine's dictionaries.
    """

    def __init__(
        self,
        in_channels: int,
        hid_channels: int,
        out_channels: int,
        num_layers: int = 2,
        with_bias: bool = False,
        with_last_bn: bool = True,
        with_last_bn_affine: bool = True,
        with_last_bias: bool = False,
        with_avg_pool: bool = True,
        norm_cfg: Mapping[str, Any] = _SYNC_BN,
        init_cfg: Any = _INIT,
        *,
        rngs: nnx.Rngs,
    ):
        self.init_cfg, self.num_layers, self.with_avg_pool = init_cfg, num_layers, with_avg_pool
        widths = [in_channels, *[hid_channels] * max(num_layers - 1, 1), out_channels]
        for i in range(num_layers):
            last = 0 < i == num_layers - 1
            fc = Linear(widths[i], widths[i + 1], bias=with_last_bias if last else with_bias, rngs=rngs)
            setattr(self, f"fc{i}", fc)
            norm = None
            if not last or with_last_bn:
                affine = {"affine": with_last_bn_affine} if last else {}
                norm = build_norm({**norm_cfg, **affine}, widths[i + 1], rngs=rngs)
            setattr(self, f"bn{i}", norm)

    def __call__(self, x: Any) -> Any:
        if isinstance(x, tuple | list):
            if len(x) != 1:
                raise ValueError(
                    f"NonLinearNeck takes one feature map, not {len(x)}: give the backbone one out_indices"
                )
            return (self(x[0]),)
        if self.with_avg_pool:
            x = global_avg_pool(x)
        return self._project(x.reshape(x.shape[0], -1))

    def _project(self, x: Float[Array, "b c"]) -> Float[Array, "b d"]:
        for i in range(self.num_layers):
            x = getattr(self, f"fc{i}")(relu(x) if i else x)
            norm = getattr(self, f"bn{i}")
            x = x if norm is None else norm(x)
        return x
