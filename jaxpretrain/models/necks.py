"""Necks: what lies between a backbone and a head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxpretrain.build import ConfigError
from jaxpretrain.models.layers.activation import activation
from jaxpretrain.models.layers.base import BaseModule, Frozen
from jaxpretrain.models.layers.conv import global_avg_pool, relu
from jaxpretrain.models.layers.linear import Linear
from jaxpretrain.models.layers.norm import BatchNorm, build_norm

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


class GeneralizedMeanPooling(BaseModule):
    """(mean of x^p over an image's positions)^(1/p): [B, H, W, C] -> [B, C]; of each array, if given a tuple.

    From the mean (p = 1) to the maximum (p to infinity). Radenović et al. (2019, https://arxiv.org/abs/1711.02512).

    Args:
        p: the exponent, 1 or more; where it starts, if it learns.
        eps: values below are raised to it, if `clamp`.
        clamp: whether to do so; a negative value has no power.
        p_trainable: whether p learns.
    """

    def __init__(self, p: float = 3.0, eps: float = 1e-6, clamp: bool = True, p_trainable: bool = True):
        if p < 1:
            raise ConfigError(f"GeneralizedMeanPooling: p must be 1 or more, not {p}")
        self.eps, self.clamp = eps, clamp
        self.p = (nnx.Param if p_trainable else Frozen)(jnp.full((1,), p, jnp.float32))

    def __call__(self, x: Any) -> Any:
        if isinstance(x, tuple | list):
            return tuple(self(array) for array in x)
        y = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        y = jnp.maximum(y, self.eps) if self.clamp else y
        p = self.p[...].astype(y.dtype)
        return (global_avg_pool(y**p) ** (1 / p)).astype(x.dtype)


class ClsBatchNormNeck(BaseModule):
    """Batch normalisation of [B, C] class tokens before the head, in MAE's linear probing; of each array of a tuple.

    Args:
        input_features: C.
        affine: whether to learn scale and bias.
        eps: added to the variance.
        init_cfg: initialisation, MMEngine's dictionaries.
        groups: number of parts of the batch normalised apart in training, as of `BatchNorm`; not in MMPretrain.
    """

    def __init__(
        self, input_features: int, affine: bool = False, eps: float = 1e-6, init_cfg: Any = None, groups: int = 1
    ):
        self.init_cfg = init_cfg
        self.bn = BatchNorm(input_features, eps=eps, affine=affine, groups=groups)

    def __call__(self, x: Any) -> Any:
        if isinstance(x, tuple | list):
            return tuple(self(array) for array in x)
        return self.bn(x)


class LinearNeck(BaseModule):
    """act(norm(fc(x))) of the last array of a tuple, or of an array: [B, ..., in] -> ([B, out],).

    Args:
        in_channels, out_channels: widths of input and output.
        gap_dim: number of spatial axes to average over first, 0 to 3; with 0, they are flattened.
        norm_cfg: the norm, as for `build_norm`; None: none.
        act_cfg: the activation; None: none.
        init_cfg: initialisation, MMEngine's dictionaries.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        gap_dim: int = 0,
        norm_cfg: Mapping[str, Any] | None = {"type": "BN1d"},
        act_cfg: Mapping[str, Any] | None = None,
        init_cfg: Any = None,
        *,
        rngs: nnx.Rngs,
    ):
        if gap_dim not in (0, 1, 2, 3):
            raise ConfigError(f"LinearNeck: gap_dim is 0, 1, 2 or 3, not {gap_dim}")
        self.init_cfg = init_cfg
        self.gap = GlobalAveragePooling(gap_dim) if gap_dim else None
        self.fc = Linear(in_channels, out_channels, rngs=rngs)
        self.norm = build_norm(norm_cfg, out_channels, rngs=rngs) if norm_cfg else None
        self.act = activation(act_cfg) if act_cfg else None

    def __call__(self, x: Any) -> tuple[Float[Array, "b out"]]:
        x = x[-1] if isinstance(x, tuple | list) else x
        x = x if self.gap is None else self.gap(x)
        x = self.fc(x.reshape(x.shape[0], -1))
        x = x if self.norm is None else self.norm(x)
        return (x if self.act is None else self.act(x),)


class LinearReduction(LinearNeck):
    """What `LinearNeck` was called in MMClassification 1.0, where checkpoints call its layer `reduction`."""

    state_names: ClassVar = {"fc": "reduction"}


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
