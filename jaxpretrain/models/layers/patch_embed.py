"""Images to patch tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxpretrain.build import ConfigError
from jaxpretrain.models.layers.base import BaseModule
from jaxpretrain.models.layers.conv import Conv2d
from jaxpretrain.models.layers.norm import build_norm


def to_2tuple(value: Any) -> tuple[int, int]:
    """An int twice, or a pair as it is."""
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


class PatchProjection(Conv2d):
    """A convolution whose stride is its kernel size, [p, q, in, out], computed by a reshape and one matmul.

    Args:
        in_channels, out_channels, bias: as of `Conv2d`.
        patch_size: height and width of kernel and stride; images must be multiples of it.
    """

    def __init__(
        self, in_channels: int, out_channels: int, patch_size: tuple[int, int], bias: bool = True, *, rngs: nnx.Rngs
    ):
        super().__init__(in_channels, out_channels, patch_size, patch_size, bias=bias, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w in"]) -> Float[Array, "b h2 w2 out"]:
        b, height, width, c = x.shape
        p, q = self.kernel_size
        h, w = height // p, width // q
        patches = x.reshape(b, h, p, w, q, c).transpose(0, 1, 3, 2, 4, 5).reshape(b, h * w, p * q * c)
        y = patches @ self.kernel[...].reshape(p * q * c, -1).astype(x.dtype)
        y = y if self.bias is None else y + self.bias[...].astype(x.dtype)
        return y.reshape(b, h, w, -1)


class PatchEmbed(BaseModule):
    """Cuts images into patches that do not overlap, and maps each to a token.

    Images of any size are taken.

    Args:
        in_channels: channels of the images.
        embed_dims: channels of the tokens.
        kernel_size: size of a patch in pixels, one number or (height, width).
        stride: accepted for MMPretrain's settings; must be None or `kernel_size`.
        padding: what becomes of a last row or column of patches that the image does not fill: 'corner' adds zeros at the
            bottom and the right, 0 leaves it out.
        bias: whether the projection has a bias.
        norm_cfg: a norm after the projection; none by default.
        input_size: size of the images that `init_out_size` is for.

    Attributes:
        init_out_size: patches (down, across) in an image of `input_size`.

    Raises:
        ConfigError: a stride or padding that is not supported.
    """

    def __init__(
        self,
        in_channels: int = 3,
        embed_dims: int = 768,
        kernel_size: int | tuple[int, int] = 16,
        stride: int | tuple[int, int] | None = None,
        padding: int | str = "corner",
        bias: bool = True,
        norm_cfg: Mapping[str, Any] | None = None,
        input_size: int | tuple[int, int] = 224,
        *,
        rngs: nnx.Rngs,
    ):
        self.patch_size = to_2tuple(kernel_size)
        if stride is not None and to_2tuple(stride) != self.patch_size:
            raise ConfigError(f"PatchEmbed: stride={stride} must be kernel_size={kernel_size}; patches do not overlap")
        if padding not in ("corner", 0):
            raise ConfigError(f"PatchEmbed: padding={padding!r} must be 'corner' or 0")
        self.in_channels, self.padded = in_channels, padding == "corner"
        self.init_out_size = self._grid(*to_2tuple(input_size))
        self.projection = PatchProjection(in_channels, embed_dims, self.patch_size, bias, rngs=rngs)
        self.norm = build_norm(norm_cfg, embed_dims, rngs=rngs) if norm_cfg else None

    def __call__(self, x: Float[Array, "b h w c"]) -> tuple[Float[Array, "b n d"], tuple[int, int]]:
        """Tokens in row-major order, and the numbers of patches down and across."""
        if x.ndim != 4 or x.shape[-1] != self.in_channels:
            raise ValueError(f"PatchEmbed: expected images [batch, height, width, {self.in_channels}], got {x.shape}")
        _, height, width, _ = x.shape
        p, q = self.patch_size
        h, w = self._grid(height, width)
        if (h * p, w * q) != (height, width):
            if self.padded:
                x = jnp.pad(x, ((0, 0), (0, h * p - height), (0, w * q - width), (0, 0)))
            x = x[:, : h * p, : w * q]
        tokens = self.projection(x)
        tokens = tokens if self.norm is None else self.norm(tokens)
        return tokens.reshape(len(x), h * w, -1), (h, w)

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        """Patches down and across in an image of this size."""
        p, q = self.patch_size
        return (-(-height // p), -(-width // q)) if self.padded else (height // p, width // q)


class ConvPatchEmbed(BaseModule):
    """Images to a map of tokens by a convolution (`projection`), whose windows may overlap.

    Args:
        in_channels: channels of the images.
        embed_dims: channels of the tokens.
        kernel_size, stride, padding: of the convolution, as of `Conv2d`; `stride` is the kernel size if None.
        bias: whether the convolution has a bias.
        norm_cfg: a norm behind it; none by default.
    """

    def __init__(
        self,
        in_channels: int,
        embed_dims: int,
        kernel_size: int = 7,
        stride: int | None = None,
        padding: int | str = "same",
        bias: bool = True,
        norm_cfg: Mapping[str, Any] | None = None,
        *,
        rngs: nnx.Rngs,
    ):
        stride = kernel_size if stride is None else stride
        self.projection = Conv2d(in_channels, embed_dims, kernel_size, stride, padding, bias=bias, rngs=rngs)
        self.norm = build_norm(norm_cfg, embed_dims, rngs=rngs) if norm_cfg else None

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        x = self.projection(x)
        return x if self.norm is None else self.norm(x)
