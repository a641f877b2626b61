"""Convolution and pooling on NHWC images, with PyTorch's padding."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from jaxpretrain.models.layers.init import Initializer, torch_uniform


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


class Conv2d(nnx.Module):
    """2-D convolution of [B, H, W, in] images with a kernel [kh, kw, in / groups, out], in the dtype of the input.

    Args:
        in_channels, out_channels: channels of input and output.
        kernel_size, stride, padding, dilation: an int, or a pair (vertical, horizontal); padding is in pixels per side.
        groups: number of channel groups.
        bias: whether there is a bias.
        kernel_init, bias_init: initialisers; PyTorch's defaults if None.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        kernel_init: Initializer | None = None,
        bias_init: Initializer | None = None,
        rngs: nnx.Rngs,
    ):
        self.kernel_size, self.stride = _pair(kernel_size), _pair(stride)
        self.padding, self.dilation, self.groups = _pair(padding), _pair(dilation), groups
        shape = (*self.kernel_size, in_channels // groups, out_channels)
        default = torch_uniform(shape[0] * shape[1] * shape[2])
        self.kernel = nnx.Param((kernel_init or default)(rngs.params(), shape, jnp.float32))
        self.bias = nnx.Param((bias_init or default)(rngs.params(), (out_channels,), jnp.float32)) if bias else None

    def __call__(self, x: Float[Array, "b h w in"]) -> Float[Array, "b h2 w2 out"]:
        kernel = self.kernel[...].astype(x.dtype)
        if self.kernel_size == (1, 1) and self.padding == (0, 0) and self.groups == 1:
            # A 1x1 convolution as slice and matmul: XLA:CPU needs a third of the time, gradients included.
            y = x[:, :: self.stride[0], :: self.stride[1]] @ kernel[0, 0]
        else:
            y = lax.conv_general_dilated(
                x,
                kernel,
                self.stride,
                [(p, p) for p in self.padding],
                rhs_dilation=self.dilation,
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
                feature_group_count=self.groups,
            )
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


def max_pool2d(
    x: Float[Array, "b h w c"], kernel_size: int, stride: int | None = None, padding: int = 0
) -> Float[Array, "b h2 w2 c"]:
    """Maximum over windows; the padding never wins. `stride` is the kernel size if None."""
    stride = stride or kernel_size
    pads = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, kernel_size, kernel_size, 1), (1, stride, stride, 1), pads)


def avg_pool2d(
    x: Float[Array, "b h w c"],
    kernel_size: int,
    stride: int | None = None,
    *,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> Float[Array, "b h2 w2 c"]:
    """Mean over windows. With `ceil_mode` a last window may hang over the edge; `count_include_pad=False` divides it by the
    number of pixels it really covers."""
    stride = stride or kernel_size
    extra = [(-(size - kernel_size)) % stride if ceil_mode else 0 for size in x.shape[1:3]]
    pads = ((0, 0), (0, extra[0]), (0, extra[1]), (0, 0))
    window, strides = (1, kernel_size, kernel_size, 1), (1, stride, stride, 1)
    total = lax.reduce_window(x, jnp.zeros((), x.dtype), lax.add, window, strides, pads)
    if not count_include_pad and any(extra):
        ones = jnp.ones((1, *x.shape[1:3], 1), x.dtype)
        return total / lax.reduce_window(ones, jnp.zeros((), x.dtype), lax.add, window, strides, pads)
    return total / jnp.asarray(kernel_size**2, x.dtype)


def global_avg_pool(x: Float[Array, "b h w c"]) -> Float[Array, "b c"]:
    """Mean over the image, accumulated in float32 at least."""
    return jnp.mean(x, axis=(1, 2), dtype=jnp.promote_types(x.dtype, jnp.float32)).astype(x.dtype)


def relu(x: Array) -> Array:
    """max(x, 0) with a gradient of 0 at 0, as PyTorch has it."""
    return jax.nn.relu(x)
