"""How cached images lie on disk: raw RGB, YUV420 or JPEG; a crop reads no more rows than it has."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from jaxpretrain.data.image_ops import Box, Image, opencv
from jaxpretrain.data.lazy_image import LazyImage

Read = Callable[[int, int], bytes]  # (first byte, how many) of one stored image

# Of the re-encoded JPEG: 40 kB for an image of 256x341, errors of about 2 grey levels.
JPEG_QUALITY = 95


class RawImage(LazyImage):
    """RGB, row by row: 3 bytes per pixel, exact."""

    def __init__(self, read: Read, height: int, width: int):
        self.read, self.shape = read, (height, width, 3)

    @staticmethod
    def encode(image: Image) -> bytes:
        return image.tobytes()

    def crop(self, box: Box, size: tuple[int, int] | None = None) -> Image:
        (top, bottom), (left, right) = _inside(box, self.shape)
        row = self.shape[1] * 3
        rows = np.frombuffer(self.read(top * row, (bottom - top) * row), np.uint8)
        return rows.reshape(bottom - top, -1, 3)[:, left:right]


class YUV420Image(LazyImage):
    """Brightness of each pixel, colour of each 2x2 pixels: 1.5 bytes per pixel.

    Y, Cb and Cr are those of JPEG: ITU-R BT.601 in the full range 0..255. A colour sample is the mean of its 2x2 pixels
    and stands at their centre; on the way back it is interpolated linearly between such centres, as libjpeg does. An odd
    last row or column is repeated for that. The planes follow one another: Y [h,w], Cr and Cb [h/2,w/2].

    A crop is to the last grey level what the whole image is there.
    """

    def __init__(self, read: Read, height: int, width: int):
        self.read, self.shape = read, (height, width, 3)

    @staticmethod
    def encode(image: Image) -> bytes:
        cv2 = opencv()
        height, width = image.shape[:2]
        planes = cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2YCrCb)
        even = cv2.copyMakeBorder(planes, 0, height % 2, 0, width % 2, cv2.BORDER_REPLICATE)
        colour = cv2.resize(even, (even.shape[1] // 2, even.shape[0] // 2), interpolation=cv2.INTER_AREA)
        return planes[..., 0].tobytes() + colour[..., 1].tobytes() + colour[..., 2].tobytes()

    def crop(self, box: Box, size: tuple[int, int] | None = None) -> Image:
        cv2 = opencv()
        (top, bottom), (left, right) = _inside(box, self.shape)
        height, width = self.shape[:2]
        bright = np.frombuffer(self.read(top * width, (bottom - top) * width), np.uint8).reshape(-1, width)
        planes = [bright[:, left:right]]
        # Of the colour samples also the neighbours of these pixels', without which linear interpolation would differ.
        rows, columns = (height + 1) // 2, (width + 1) // 2
        first, last = max(0, (top - 1) // 2), min(rows, bottom // 2 + 1)
        start, stop = max(0, (left - 1) // 2), min(columns, right // 2 + 1)
        for plane in (0, 1):
            offset = height * width + (plane * rows + first) * columns
            colour = np.frombuffer(self.read(offset, (last - first) * columns), np.uint8).reshape(-1, columns)[
                :, start:stop
            ]
            colour = cv2.resize(colour, (colour.shape[1] * 2, colour.shape[0] * 2), interpolation=cv2.INTER_LINEAR)
            planes.append(colour[top - 2 * first : bottom - 2 * first, left - 2 * start : right - 2 * start])
        return cv2.cvtColor(cv2.merge(planes), cv2.COLOR_YCrCb2RGB)


def encode_jpeg(image: Image) -> bytes:
    """JPEG of quality 95 with colour at half the resolution: the smallest, and to be decoded each time."""
    from PIL import Image as pillow

    buffer = io.BytesIO()
    pillow.fromarray(image).save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling="4:2:0")
    return buffer.getvalue()


class Format(NamedTuple):
    """`encode` gives the bytes of an image; `open` takes (read, height, width) and gives what a source has as `image`."""

    encode: Callable[[Image], bytes]
    open: Callable[[Read, int, int], LazyImage | bytes]


FORMATS = {
    "yuv420": Format(YUV420Image.encode, YUV420Image),
    "raw": Format(RawImage.encode, RawImage),
    "jpeg": Format(encode_jpeg, lambda read, height, width: read(0, -1)),
}


def _inside(box: Box, shape: tuple[int, int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """First and last (exclusive) row and column of a box, within the image."""
    rows, columns = (
        (max(0, start), min(start + length, whole))
        for start, length, whole in zip(box[:2], box[2:], shape[:2], strict=True)
    )
    if rows[0] >= rows[1] or columns[0] >= columns[1]:
        raise ValueError(f"{box} has no pixel of an image of {shape[0]}x{shape[1]}")
    return rows, columns
