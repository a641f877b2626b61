"""Structural re-parameterisation: parallel linear branches that are one convolution in inference.

A convolution and the BatchNorm behind it are, with running statistics, a convolution with other weights; a sum of
convolutions of one geometry is the convolution with the summed weights (Ding et al., 2021, https://arxiv.org/abs/2101.03697,
section 3.3).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from jaxpretrain.build import ConfigError
from jaxpretrain.models.layers.base import BaseModule
from jaxpretrain.models.layers.conv import Conv2d
from jaxpretrain.models.layers.norm import BatchNorm, build_norm

Kernel = Float[Array, "kh kw in out"]
Bias = Float[Array, " out"]


class ConvNorm(BaseModule):
    """A convolution without bias, `conv`, and its norm, `norm`.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups: as of `Conv2d`.
        norm_cfg, norm_eval: as for `build_norm`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        dilation: int = 1,
        groups: int = 1,
        norm_cfg: Mapping[str, Any] = {"type": "BN"},
        *,
        norm_eval: bool = False,
        rngs: nnx.Rngs,
    ):
        self.conv = Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias=False, rngs=rngs
        )
        self.norm = build_norm(norm_cfg, out_channels, norm_eval=norm_eval, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w in"]) -> Float[Array, "b h2 w2 out"]:
        return self.norm(self.conv(x))


class ParallelBranches(BaseModule):
    """The sum of a convolution and of other branches beside it; deployed, the one convolution `branch_reparam`.

    Sub-classes have the branches as attributes and name them in `branch_names`: lists of `ConvNorm`, a `ConvNorm`, or the
    norm of an identity; None where there is none.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups: of the one convolution.
        norm_cfg, norm_eval: the norms, as for `build_norm`.
        deploy: whether to build the deployed form.

    Attributes:
        deploy: whether it has this form.
    """

    branch_names: tuple[str, ...] = ()

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        padding: int = 1,
        dilation: int = 1,
        groups: int = 1,
        norm_cfg: Mapping[str, Any] = {"type": "BN"},
        deploy: bool = False,
        *,
        norm_eval: bool = False,
        rngs: nnx.Rngs,
    ):
        self.in_channels, self.out_channels, self.kernel_size, self.groups = (
            in_channels,
            out_channels,
            kernel_size,
            groups,
        )
        self.deploy = deploy
        if deploy:
            self.branch_reparam: Any = Conv2d(
                in_channels, out_channels, kernel_size, stride, padding, dilation, groups, rngs=rngs
            )
            return

        def branch(size: int, padding: int, dilation: int) -> ConvNorm:
            shape = (in_channels, out_channels, size, stride, padding, dilation, groups)
            return ConvNorm(*shape, norm_cfg, norm_eval=norm_eval, rngs=rngs)

        # The identity must see what the middle of the kernel sees.
        kept = in_channels == out_channels and stride == 1 and 2 * padding == dilation * (kernel_size - 1)
        self.branch_norm: Any = build_norm(norm_cfg, in_channels, norm_eval=norm_eval, rngs=rngs) if kept else None
        self._build_branches(branch, padding, dilation)

    def _build_branches(self, branch: Any, padding: int, dilation: int) -> None:
        """Makes the convolutional branches, by `branch(kernel size, padding, dilation)`."""
        raise NotImplementedError

    def branches(self) -> list[Any]:
        """All branches that there are, in order."""
        found: list[Any] = []
        for name in self.branch_names:
            branch = getattr(self, name)
            found += list(branch) if isinstance(branch, nnx.List) else [branch]
        return [branch for branch in found if branch is not None]

    def combine(self, x: Float[Array, "b h w in"]) -> Float[Array, "b h2 w2 out"]:
        """The sum of the branches."""
        if self.deploy:
            return self.branch_reparam(x)
        first, *others = self.branches()
        y = first(x)
        for branch in others:
            y = y + branch(x)
        return y

    def switch_to_deploy(self) -> None:
        """Makes the branches one convolution, in place. Eval mode gives the same; training is over.

        Raises:
            ConfigError: norms that are no BatchNorm.
        """
        if self.deploy:
            return
        kernel: Any = 0.0
        bias: Any = 0.0
        widest = None
        for branch in self.branches():
            if isinstance(branch, ConvNorm):
                one, shift = fuse_norm(branch.conv, branch.norm)
                widest = branch.conv if branch.conv.kernel_size[0] == self.kernel_size else widest
            else:
                scale, shift = scale_and_shift(branch)
                one = jnp.asarray(identity_kernel(self.in_channels, self.groups)) * scale
            kernel, bias = kernel + centred(one, self.kernel_size), bias + shift
        assert widest is not None
        set_weights(widest, kernel, bias)
        for name in self.branch_names:
            delattr(self, name)
        self.branch_reparam = widest
        self.deploy = True


def scale_and_shift(norm: Any) -> tuple[Float[Array, " c"], Float[Array, " c"]]:
    """What BatchNorm with its running statistics multiplies by, and then adds.

    Raises:
        ConfigError: another norm, which depends on its input.
    """
    if not isinstance(norm, BatchNorm):
        raise ConfigError(f"Only BatchNorm can be fused with a convolution, not {type(norm).__name__}: see norm_cfg")
    scale = 1 / jnp.sqrt(norm.var[...] + norm.eps)
    if norm.scale is not None:
        scale = scale * norm.scale[...]
    shift = -norm.mean[...] * scale
    return scale, shift if norm.bias is None else shift + norm.bias[...]


def fuse_norm(layer: Any, norm: Any) -> tuple[Float[Array, "... out"], Bias]:
    """Kernel and bias of the convolution (or linear layer) that is `norm` after `layer`."""
    scale, shift = scale_and_shift(norm)
    bias = shift if layer.bias is None else shift + layer.bias[...] * scale
    return layer.kernel[...] * scale, bias


def set_weights(layer: Any, kernel: Array, bias: Array) -> None:
    """Gives a layer, which may have had no bias, these weights; they learn if its kernel did."""
    layer.kernel.set_value(kernel)
    layer.bias = nnx.data(type(layer.kernel)(bias))  # the attribute may have been None, which is no variable


def centred(kernel: Kernel, size: int) -> Float[Array, "size size in out"]:
    """A kernel with zeros around it, so that it is `size` wide: the same convolution, if padded accordingly."""
    pad = (size - kernel.shape[0]) // 2
    return jnp.pad(kernel, ((pad, pad), (pad, pad), (0, 0), (0, 0)))


def identity_kernel(channels: int, groups: int) -> Float[np.ndarray, "1 1 in out"]:
    """The 1x1 kernel of a grouped convolution that changes nothing."""
    return np.tile(np.eye(channels // groups, dtype=np.float32), groups)[None, None]


def deploy_all(modules: Sequence[Any]) -> None:
    """`switch_to_deploy()` of each module that has it, in a list and the lists within it."""
    for module in modules:
        if isinstance(module, nnx.List):
            deploy_all(list(module))
        elif hasattr(module, "switch_to_deploy"):
            module.switch_to_deploy()
