"""Convolution and pooling on NHWC images, with PyTorch's padding."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from jaxpretrain.build import ConfigError
from jaxpretrain.models.layers.activation import activation
from jaxpretrain.models.layers.depthwise import depthwise_by_taps
from jaxpretrain.models.layers.init import Initializer, torch_uniform
from jaxpretrain.models.layers.norm import build_norm, norm_name


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


class Conv2d(nnx.Module):
    """2-D convolution of [B, H, W, in] images with a kernel [kh, kw, in / groups, out], in the dtype of the input.

    Args:
        in_channels, out_channels: channels of input and output.
        kernel_size, stride, padding, dilation: an int, or a pair (vertical, horizontal); padding is in pixels per side, or
            'same': as much as makes ceil(size / stride) pixels of the output, an odd one after (TensorFlow's).
        groups: number of channel groups.
        bias: whether there is a bias.
        kernel_init, bias_init: initialisers; PyTorch's defaults if None.
    """

    state_names: ClassVar = {"kernel": "weight"}

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        kernel_init: Initializer | None = None,
        bias_init: Initializer | None = None,
        rngs: nnx.Rngs,
    ):
        if isinstance(padding, str) and padding != "same":
            raise ConfigError(f"Conv2d: padding is in pixels, or 'same', not {padding!r}")
        self.kernel_size, self.stride = _pair(kernel_size), _pair(stride)
        self.padding = None if isinstance(padding, str) else _pair(padding)  # None: what the images need
        self.dilation, self.groups = _pair(dilation), groups
        shape = (*self.kernel_size, in_channels // groups, out_channels)
        default = torch_uniform(shape[0] * shape[1] * shape[2])
        self.kernel = nnx.Param((kernel_init or default)(rngs.params(), shape, jnp.float32))
        self.bias = nnx.Param((bias_init or default)(rngs.params(), (out_channels,), jnp.float32)) if bias else None

    def __call__(self, x: Float[Array, "b h w in"]) -> Float[Array, "b h2 w2 out"]:
        kernel, pads = self.kernel[...].astype(x.dtype), self._pads(x.shape[1:3])
        if self.kernel_size == (1, 1) and pads == ((0, 0), (0, 0)) and self.groups == 1:
            # A 1x1 convolution as slice and one matmul: XLA:CPU needs a third of the time, gradients included.
            x = x[:, :: self.stride[0], :: self.stride[1]]
            y = (x.reshape(-1, x.shape[-1]) @ kernel[0, 0]).reshape(*x.shape[:-1], kernel.shape[-1])
        else:
            convolve = partial(_convolve, stride=self.stride, padding=pads, dilation=self.dilation)
            whole = partial(convolve, groups=self.groups)
            if self.groups == 1:
                y = whole(x, kernel)
            else:
                by_taps = self.groups == x.shape[-1] == kernel.shape[-1]
                on_cpu: Callable[..., Array] = (
                    partial(_by_taps, stride=self.stride, padding=pads, dilation=self.dilation)
                    if by_taps
                    else partial(_convolve_in_parts, groups=self.groups, convolve=convolve)
                )
                y = lax.platform_dependent(x, kernel, cpu=on_cpu, default=whole)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)

    def _pads(self, size: Sequence[int]) -> Pads:
        """Pixels (above, below), (left, right) for images of this size."""
        if self.padding is not None:
            return tuple((p, p) for p in self.padding)
        need = (
            max((-(-n // s) - 1) * s + (k - 1) * d + 1 - n, 0)
            for n, k, s, d in zip(size, self.kernel_size, self.stride, self.dilation, strict=True)
        )
        return tuple((n // 2, n - n // 2) for n in need)


Pads = tuple[tuple[int, int], ...]


def _by_taps(x: Array, kernel: Array, stride: tuple[int, int], padding: Pads, dilation: tuple[int, int]) -> Array:
    return depthwise_by_taps(x, kernel, stride, padding, dilation)  # its arguments have places, not names


def _convolve(
    x: Array,
    kernel: Array,
    stride: tuple[int, int],
    padding: Pads,
    dilation: tuple[int, int],
    groups: int = 1,
) -> Array:
    return lax.conv_general_dilated(
        x,
        kernel,
        stride,
        padding,
        rhs_dilation=dilation,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def _convolve_in_parts(
    x: Float[Array, "b h w in"], kernel: Float[Array, "kh kw i out"], groups: int, convolve: Callable[..., Array]
) -> Array:
    """A grouped convolution as a few dense ones, each of several groups with zeros between them.

    For XLA:CPU, which takes up to 200 times PyTorch's time for the kernel's gradient of a grouped convolution, and up
    to six times for the convolution itself; so done, it takes PyTorch's time or less. Parts of 32 channels run fastest,
    but each is compiled, so there are at most `_MAX_PARTS`.
    """
    channels = max(_MIN_PART, x.shape[-1] // _MAX_PARTS)  # of x, in a part
    together = max(k for k in range(1, groups + 1) if groups % k == 0 and (k == 1 or k * kernel.shape[2] <= channels))
    *window, ins, outs = kernel.shape
    group_of_output = np.arange(outs) * groups // outs % together
    own = np.arange(together)[:, None] == group_of_output
    dense = jnp.where(own[:, None], kernel[:, :, None], 0).reshape(*window, together * ins, outs)
    parts = groups // together
    pieces = zip(jnp.split(x, parts, axis=-1), jnp.split(dense, parts, axis=-1), strict=True)
    return jnp.concatenate([convolve(*piece) for piece in pieces], axis=-1)


_MIN_PART, _MAX_PARTS = 32, 8


class ConvTranspose2d(nnx.Module):
    """The transpose of a 2-D convolution, which enlarges [B, H, W, in] images: PyTorch's `ConvTranspose2d`.

    Its kernel is that of the convolution from `out_channels` to `in_channels` that it transposes: [kh, kw, out, in].

    Args:
        in_channels, out_channels: channels of input and output.
        kernel_size, stride, padding: of the convolution; sides become (n - 1) * stride + kernel_size - 2 * padding.
        bias: whether there is a bias.
    """

    state_names: ClassVar = {"kernel": "weight"}

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        bias: bool = True,
        *,
        rngs: nnx.Rngs,
    ):
        self.stride, self.padding = stride, padding
        shape = (kernel_size, kernel_size, out_channels, in_channels)
        default = torch_uniform(kernel_size**2 * out_channels)
        self.kernel = nnx.Param(default(rngs.params(), shape, jnp.float32))
        self.bias = nnx.Param(default(rngs.params(), (out_channels,), jnp.float32)) if bias else None

    def __call__(self, x: Float[Array, "b h w in"]) -> Float[Array, "b h2 w2 out"]:
        edge = self.kernel.shape[0] - 1 - self.padding
        y = lax.conv_transpose(
            x,
            self.kernel[...].astype(x.dtype),
            (self.stride, self.stride),
            [(edge, edge)] * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            transpose_kernel=True,
        )
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class ConvModule(nnx.Module):
    """A convolution, its norm and its activation: `conv` and `bn` (`ln`, `gn` for other norms), as MMCV names them.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups: as of `Conv2d`.
        bias: 'auto' is without a norm only.
        conv_cfg: None, or dict(type='Conv2dAdaptivePadding') for `padding='same'`.
        norm_cfg: the norm, as for `build_norm`; None for none.
        act_cfg: the activation, as for `activation`; None for none.
        norm_eval: whether BatchNorm always uses its running statistics.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool | str = "auto",
        conv_cfg: Mapping[str, Any] | None = None,
        norm_cfg: Mapping[str, Any] | None = None,
        act_cfg: Mapping[str, Any] | None = {"type": "ReLU"},
        *,
        norm_eval: bool = False,
        rngs: nnx.Rngs,
    ):
        if conv_cfg and conv_cfg["type"] not in ("Conv2d", "Conv", "Conv2dAdaptivePadding"):
            raise ConfigError(f"conv_cfg: no type {conv_cfg['type']!r}; there are Conv2d and Conv2dAdaptivePadding")
        if conv_cfg and conv_cfg["type"] == "Conv2dAdaptivePadding":
            padding = "same"
        has_bias = norm_cfg is None if bias == "auto" else bool(bias)
        self.conv = Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias=has_bias, rngs=rngs
        )
        self.norm_name = "" if norm_cfg is None else norm_name(norm_cfg)
        if norm_cfg is not None:
            setattr(self, self.norm_name, build_norm(norm_cfg, out_channels, norm_eval=norm_eval, rngs=rngs))
        self.act = None if act_cfg is None else activation(act_cfg)

    def __call__(self, x: Float[Array, "b h w in"]) -> Float[Array, "b h2 w2 out"]:
        x = self.conv(x)
        if self.norm_name:
            x = getattr(self, self.norm_name)(x)
        return x if self.act is None else self.act(x)


def _windows(size: int, kernel_size: int, stride: int, padding: int, ceil_mode: bool) -> tuple[int, int]:
    """How many windows fit along an axis, and by how many pixels the last one hangs over the padding."""
    if 2 * padding > kernel_size:
        raise ValueError(f"pooling: padding {padding} is more than half of the kernel size {kernel_size}")
    span = size + 2 * padding - kernel_size
    count = span // stride + 1
    if ceil_mode and span % stride and count * stride < size + padding:  # one more, if it begins inside the image
        count += 1
    if count < 1:
        raise ValueError(f"pooling: a window of {kernel_size} does not fit into {size} pixels padded by {padding}")
    return count, max((count - 1) * stride - span, 0)


def max_pool2d(
    x: Float[Array, "b h w c"], kernel_size: int, stride: int | None = None, padding: int = 0, ceil_mode: bool = False
) -> Float[Array, "b h2 w2 c"]:
    """Maximum over windows, as PyTorch has it: padding never wins, NaN always does, and of equal values the first.

    Args:
        x: images.
        kernel_size, stride, padding: in pixels, for both axes; `stride` is the kernel size if None.
        ceil_mode: whether a last window may hang over the edge.
    """
    stride = stride or kernel_size
    (h, over_h), (w, over_w) = (_windows(n, kernel_size, stride, padding, ceil_mode) for n in x.shape[1:3])
    pads = ((0, 0), (padding, padding + over_h), (padding, padding + over_w), (0, 0))
    x = jnp.pad(x, pads, constant_values=-jnp.inf)
    # Strided slices and selects rather than reduce_window: the same on XLA:CPU in a seventh of the time, with gradient.
    best = None
    for i in range(kernel_size):
        for j in range(kernel_size):
            pixel = x[:, i : i + stride * (h - 1) + 1 : stride, j : j + stride * (w - 1) + 1 : stride]
            best = pixel if best is None else jnp.where((pixel > best) | jnp.isnan(pixel), pixel, best)
    assert best is not None
    return best


def avg_pool2d(
    x: Float[Array, "b h w c"],
    kernel_size: int,
    stride: int | None = None,
    padding: int = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> Float[Array, "b h2 w2 c"]:
    """Mean over windows, summed in float32 at least, as PyTorch has it.

    Args:
        x: images.
        kernel_size, stride, padding: in pixels, for both axes; `stride` is the kernel size if None.
        ceil_mode: whether a last window may hang over the edge; what hangs over is not counted.
        count_include_pad: whether the zeros of the padding count as pixels.
    """
    stride = stride or kernel_size
    (_, over_h), (_, over_w) = (_windows(n, kernel_size, stride, padding, ceil_mode) for n in x.shape[1:3])
    border = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    overhang = ((0, 0), (0, over_h), (0, over_w), (0, 0))

    def window_sums(values: Array) -> Array:
        window, strides = (1, kernel_size, kernel_size, 1), (1, stride, stride, 1)
        zero = np.zeros((), values.dtype)  # a constant even under jit: of a traced one there is no gradient
        return lax.reduce_window(values, zero, lax.add, window, strides, overhang)

    y = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    counted = jnp.pad(jnp.ones((1, *x.shape[1:3], 1), y.dtype), border, constant_values=int(count_include_pad))
    return (window_sums(jnp.pad(y, border)) / window_sums(counted)).astype(x.dtype)


def global_avg_pool(x: Float[Array, "b *spatial c"]) -> Float[Array, "b c"]:
    """Mean over all axes between the first and the last, in float32 at least."""
    axes = tuple(range(1, x.ndim - 1))
    return jnp.mean(x, axis=axes, dtype=jnp.promote_types(x.dtype, jnp.float32)).astype(x.dtype)


def relu(x: Array) -> Array:
    """max(x, 0) with a gradient of 0 at 0, as PyTorch has it."""
    return jax.nn.relu(x)
