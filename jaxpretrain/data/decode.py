"""Encoded bytes -> uint8 RGB pixels."""

from __future__ import annotations

import io

import numpy as np
from jaxtyping import UInt8

from jaxpretrain.data.image_ops import Box
from jaxpretrain.data.lazy_image import LazyImage

try:  # two to three times as fast as Pillow; without it everything still works
    import simplejpeg
except ImportError:  # pragma: no cover
    simplejpeg = None

MAX_PIXELS = 178_956_970  # Pillow's own limit against decompression bombs, here for both decoders


class BadImage(ValueError):
    """Bytes that are not a complete image; the message is the reason."""


def decode(data: bytes) -> UInt8[np.ndarray, "h w 3"]:
    """The pixels of an encoded image (JPEG, PNG, WebP, BMP, TIFF, GIF, ...: whatever Pillow reads).

    To the last grey level what OpenCV's IMREAD_COLOR, so MMPretrain, reads: EXIF orientation is applied (also of PNG,
    WebP and TIFF), grey is repeated to three channels, palettes are looked up, alpha and transparent colours are dropped
    (not blended), 16 bits keep their high byte, the CMYK of JPEG is mixed in OpenCV's integers; colour profiles and
    gamma are ignored. Of an animation, the first frame. Known differences: OpenCV rounds colour TIFF of 16 bits (one
    grey level) and blends TIFF's alpha with black; its version 4 does not turn WebP; its GIF has holes of its own.

    Raises:
        BadImage: empty, truncated, not an image, without pixels, over MAX_PIXELS, or in a pixel format without a
            natural 8-bit form (floating point; OpenCV refuses it too).
    """
    if not data:
        raise BadImage("empty file")
    if simplejpeg is not None and data[:3] == b"\xff\xd8\xff":
        pixels = _decode_jpeg(data)
        if pixels is not None:
            return pixels
    return _decode_pillow(data)


class ScaledJPEG(LazyImage):
    """A JPEG that is decoded at 1/2, 1/4 or 1/8 of its size where a crop shrinks it that far: its inverse DCT is then
    one of fewer frequencies, and the rest of the work is on fewer pixels.

    A pixel is then the mean of a square of 4, 16 or 64, nearly; the edges of a crop move to the nearest of these pixels.
    Several crops share what has been decoded, so one may come sharper than alone.
    """

    def __init__(self, data: bytes, height: int, width: int):
        self._data, self._orientation = data, _jpeg_orientation(data)
        self._turned = self._orientation in (5, 6, 7, 8)
        self.shape = (width, height, 3) if self._turned else (height, width, 3)
        self._decoded: dict[int, np.ndarray] = {}

    def crop(self, box: Box, size: tuple[int, int] | None = None) -> UInt8[np.ndarray, "h w 3"]:
        height, width = self.shape[:2]
        top, left = max(box.top, 0), max(box.left, 0)
        bottom, right = min(box.top + box.height, height), min(box.left + box.width, width)
        wanted = size or (right - left, bottom - top)
        factor = next(f for f in FACTORS if (right - left >= f * wanted[0] and bottom - top >= f * wanted[1]) or f == 1)
        factor = next((f for f in FACTORS if f <= factor and f in self._decoded), factor)
        if factor not in self._decoded:
            self._decoded[factor] = self._decode(factor)
        top, left, bottom, right = ((2 * edge + factor) // (2 * factor) for edge in (top, left, bottom, right))
        return self._decoded[factor][top:bottom, left:right]

    def _decode(self, factor: int) -> UInt8[np.ndarray, "h w 3"]:
        height, width = (-(-length // factor) for length in (self.shape[1::-1] if self._turned else self.shape[:2]))
        try:
            pixels = simplejpeg.decode_jpeg(self._data, "RGB", min_height=height, min_width=width)
        except ValueError:
            pixels = None  # defects, which Pillow judges
        if pixels is None or pixels.shape != (height, width, 3):
            return _shrunk(_decode_pillow(self._data), factor)
        return _orient(pixels, self._orientation)


FACTORS = (8, 4, 2, 1)


def _shrunk(image: UInt8[np.ndarray, "h w 3"], factor: int) -> UInt8[np.ndarray, "h w 3"]:
    from PIL import Image

    return np.asarray(Image.fromarray(image).reduce(factor)) if factor > 1 else image


def decode_lazily(data: bytes) -> UInt8[np.ndarray, "h w 3"] | ScaledJPEG:
    """As `decode`, but a JPEG is a ScaledJPEG; other files are read at once."""
    if simplejpeg is not None and data[:3] == b"\xff\xd8\xff":
        try:
            height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
        except ValueError:
            return decode(data)
        if colorspace not in ("CMYK", "YCCK") and height * width <= MAX_PIXELS:
            return ScaledJPEG(data, height, width)
    return decode(data)


def as_rgb(image: bytes | np.ndarray | LazyImage, scaled: bool = False) -> UInt8[np.ndarray, "h w 3"] | LazyImage:
    """What a source gives as `image`: encoded bytes, uint8 pixels [H,W], [H,W,1] or [H,W,3], or a LazyImage, which stays
    one. `scaled` leaves JPEGs encoded too. Raises BadImage.
    """
    if isinstance(image, LazyImage):
        return image
    if isinstance(image, bytes | bytearray | memoryview):
        return decode_lazily(bytes(image)) if scaled else decode(bytes(image))
    return _three_channels(np.asarray(image))


def _three_channels(image: np.ndarray) -> UInt8[np.ndarray, "h w 3"]:
    if image.ndim == 2:
        image = image[..., None]
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] not in (1, 3) or 0 in image.shape:
        raise BadImage(f"expected uint8 pixels [H, W, 3], got {image.dtype} {list(image.shape)}")
    return image if image.shape[-1] == 3 else image.repeat(3, axis=-1)


def _decode_jpeg(data: bytes) -> UInt8[np.ndarray, "h w 3"] | None:
    """Grey and YCbCr JPEGs without any defect; None leaves the rest to Pillow, which knows which defects are fatal."""
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
        if colorspace in ("CMYK", "YCCK"):
            return None
        if height * width > MAX_PIXELS:
            raise BadImage(f"{width}x{height} pixels are more than the limit of {MAX_PIXELS}")
        pixels = simplejpeg.decode_jpeg(data, colorspace="RGB")
    except BadImage:
        raise
    except ValueError:
        return None
    return _orient(pixels, _jpeg_orientation(data))


def _jpeg_orientation(data: bytes) -> int:
    """EXIF orientation 1..8 (1: as stored), also where EXIF is absent or damaged."""
    block = _exif_block(data)
    if block is None:
        return 1
    from PIL import Image

    exif = Image.Exif()
    try:
        exif.load(block)
        return int(exif.get(0x0112, 1))
    except Exception:  # a damaged EXIF block says nothing about the pixels
        return 1


def _exif_block(data: bytes) -> bytes | None:
    """The APP1 segment that holds EXIF, found by walking the segments up to the first scan."""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != 0xDA:
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        if data[at + 1] == 0xE1 and data[at + 4 : at + 10] == b"Exif\x00\x00":
            return data[at + 4 : at + 2 + length]
        at += 2 + length
    return None


def _orient(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Undoes EXIF orientation."""
    if orientation in (5, 6, 7, 8):  # stored transposed
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def _decode_pillow(data: bytes) -> UInt8[np.ndarray, "h w 3"]:
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.width * image.height > MAX_PIXELS:
                raise BadImage(f"{image.width}x{image.height} pixels are more than the limit of {MAX_PIXELS}")
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image), jpeg=image.format == "JPEG")
    except BadImage:
        raise
    except UnidentifiedImageError:
        raise BadImage(f"not an image (starts with {data[:8]!r})") from None
    except Exception as error:  # Pillow's readers raise OSError, SyntaxError, struct.error, ... on damaged files
        raise BadImage(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__) from error


def _to_rgb(image, jpeg: bool) -> UInt8[np.ndarray, "h w 3"]:
    """A Pillow image of any mode as RGB. `jpeg`: it was read from a JPEG file."""
    if image.mode.startswith("I"):  # 16 bits, in `I;16*` or in the 32 bits of `I`
        grey = (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
        return _three_channels(grey)
    if image.mode == "F":
        raise BadImage("floating-point pixels have no fixed range")
    if image.mode == "CMYK" and jpeg:
        return _mix_inks(np.asarray(image))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow asks for this detour where a palette has transparent entries
    return np.array(image.convert("RGB"))


def _mix_inks(cmyk: UInt8[np.ndarray, "h w 4"]) -> UInt8[np.ndarray, "h w 3"]:
    """Cyan, magenta, yellow and black (255: full ink) as RGB: white x (1 - ink) x (1 - black), in OpenCV's fixed point.

    OpenCV divides by 256 where 255 would be right, and so is a grey level lighter than Pillow's conversion.
    """
    inks = cmyk.astype(np.uint16)
    light = 255 - inks[..., 3:]
    return (light - (inks[..., :3] * light >> 8)).astype(np.uint8)
