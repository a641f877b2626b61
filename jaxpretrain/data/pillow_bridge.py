"""NumpyToPIL and PILToNumpy: in MMPretrain, what lies between them works on Pillow images."""

from __future__ import annotations

from typing import Any

from jaxpretrain.build import ConfigError
from jaxpretrain.data.base import Transform
from jaxpretrain.data.image_ops import Image


class NumpyToPIL(Transform):
    """Accepted so that MMPretrain's pipelines read unchanged: images stay arrays here, and transforms use Pillow inside.

    A function of one's own that stands in between gets an array too.

    Args:
        to_rgb: True in every recipe. Without it, MMPretrain's transforms up to `PILToNumpy` take blue for red; so do
            these, as the channels are reversed.
    """

    def __init__(self, to_rgb: bool = False):
        self.to_rgb = to_rgb

    def apply(self, image: Image, parameters: Any) -> Image:
        return image if self.to_rgb else image[..., ::-1]


class PILToNumpy(Transform):
    """The end of what `NumpyToPIL` began.

    Args:
        to_bgr: True in every recipe; without it the channels are reversed, as in MMPretrain: back, if they were.
        dtype: None or 'uint8'.
    """

    def __init__(self, to_bgr: bool = False, dtype: str | None = None):
        if dtype not in (None, "uint8"):
            raise ConfigError(
                f"PILToNumpy: dtype={dtype!r}; images stay uint8 up to the device, which makes them float"
            )
        self.to_bgr = to_bgr

    def apply(self, image: Image, parameters: Any) -> Image:
        return image if self.to_bgr else image[..., ::-1]
