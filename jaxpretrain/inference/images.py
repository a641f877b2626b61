"""Images as users hand them over -> uint8 RGB pixels."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
from jaxtyping import UInt8

from jaxpretrain.cli import ExpectedFailure
from jaxpretrain.data.decode import BadImage, as_rgb, decode
from jaxpretrain.zoo.download import DownloadError, is_url, read_url

_LARGEST = 64 << 20  # bytes of an image from the network
_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".jfif", ".ppm", ".pgm"}


class ImageError(ExpectedFailure, ValueError):
    """An image that cannot be read; the message names it."""


def list_images(inputs: Any) -> list[Any]:
    """The single images of what an inferencer is called with.

    Args:
        inputs: one image (see `load_image`); a list or other iterable of images; a folder: all image files directly in it,
            by name; or an array [B, H, W, 3].
    """
    if isinstance(inputs, str | os.PathLike) and Path(inputs).is_dir():
        found = sorted(path for path in Path(inputs).iterdir() if path.suffix.lower() in _SUFFIXES)
        if not found:
            raise ImageError(f"There are no images in {inputs}")
        return found
    if getattr(inputs, "ndim", None) == 4:
        return list(np.asarray(inputs))
    single = isinstance(inputs, str | os.PathLike | bytes) or hasattr(inputs, "__array__") or _is_pillow(inputs)
    return [inputs] if single or not isinstance(inputs, Iterable) else list(inputs)


def load_image(source: Any) -> UInt8[np.ndarray, "h w 3"]:
    """The pixels of one image, RGB.

    Args:
        source: a path or URL, or the bytes of a file, in any format that Pillow reads; an array uint8 [H, W, 3] in **RGB**
            (MMPretrain takes BGR), [H, W] or [H, W, 1]; or a Pillow image. Orientation in EXIF is applied.

    Raises:
        ImageError: it cannot be read.
    """
    try:
        if is_url(source):
            return decode(read_url(source, _LARGEST))
        if isinstance(source, str | os.PathLike):
            return decode(Path(source).expanduser().read_bytes())
        if isinstance(source, bytes):
            return decode(source)
        if _is_pillow(source):
            from PIL import ImageOps

            return np.array(ImageOps.exif_transpose(source).convert("RGB"))
        return np.asarray(as_rgb(np.asarray(source)))
    except FileNotFoundError as error:
        raise ImageError(
            "there is no such file" + ("" if Path(source).is_absolute() else f" in {Path.cwd()}")
        ) from error
    except (BadImage, DownloadError, OSError) as error:
        raise ImageError(str(error)) from error


def describe(source: Any) -> str:
    """What to call an image in a message: its path or URL, or what it is."""
    if isinstance(source, str | os.PathLike):
        return os.fspath(source)
    if isinstance(source, bytes):
        return f"{len(source)} bytes"
    shape = list(getattr(source, "shape", getattr(source, "size", ())))
    return f"{type(source).__name__} {shape}" if shape else type(source).__name__


def stem(source: Any) -> str | None:
    """The name of an image's file without its suffix; None of what has no file."""
    if not isinstance(source, str | os.PathLike):
        return None
    text = os.fspath(source)
    return Path(unquote(urlsplit(text).path) if is_url(text) else text).stem or None


def _is_pillow(value: Any) -> bool:
    from PIL import Image

    return isinstance(value, Image.Image)
