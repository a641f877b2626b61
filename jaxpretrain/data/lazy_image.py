"""Images whose pixels are made when they are asked for, and only of the part that a crop takes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import UInt8

if TYPE_CHECKING:
    from jaxpretrain.data.image_ops import Box


class LazyImage:
    """An RGB image of known size whose pixels are not in memory yet.

    A transform with `lazy = True` may get one as `sample["image"]`; it looks at `shape` and calls `crop`. All others get
    arrays: a pipeline whose first step is not lazy never sees one.
    """

    shape: tuple[int, int, int]  # (height, width, 3)
    ndim = 3
    dtype = np.dtype(np.uint8)

    def crop(self, box: Box, size: tuple[int, int] | None = None) -> UInt8[np.ndarray, "h w 3"]:
        """The pixels inside `box`; what lies outside the image is cut off.

        `size` (width, height) is what they will be resized to: where that is less, they may come reduced by a whole
        factor, antialiased, but never below it.

        Raises:
            BadImage: the pixels cannot be read.
        """
        raise NotImplementedError

    def pixels(self) -> UInt8[np.ndarray, "h w 3"]:
        """The whole image."""
        from jaxpretrain.data.image_ops import Box

        return self.crop(Box(0, 0, *self.shape[:2]))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.pixels(), dtype)
