"""Pictures of masked image modelling: original, masked and predicted side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Num, UInt8
from PIL import Image, ImageDraw, ImageFont

_SMALLEST = 112  # px: images smaller than this are enlarged
_GAP = 8  # px between images
_PAPER, _INK = 255, 40  # grey levels


def reconstruction_grid(
    columns: Mapping[str, Num[np.ndarray, "n h w c"]],
    mean: Sequence[float] = (0.0, 0.0, 0.0),
    std: Sequence[float] = (255.0, 255.0, 255.0),
) -> UInt8[np.ndarray, "height width 3"]:
    """One row per image, one column per kind of picture. Small images are enlarged by a whole factor, pixels staying squares.

    Args:
        columns: title -> pictures, RGB or of one channel: floats normalised by mean and std, or uint8 as they are. Those of
            another size than the first column's are brought to it.
        mean, std: of the normalisation, in grey levels from 0 to 255; by default images are from 0 to 1.
    """
    pixels = [images if images.dtype == np.uint8 else _to_uint8(images, mean, std) for images in columns.values()]
    pixels = [images if images.shape[3] == 3 else images.repeat(3, axis=3) for images in pixels]
    count, height, width = pixels[0].shape[:3]
    factor = max(1, -(-_SMALLEST // min(height, width)))
    height, width = height * factor, width * factor
    text_height = min(max(width // 8, 12), 24)
    while text_height > 9 and max(map(ImageFont.load_default(size=text_height).getlength, columns)) > width + _GAP // 2:
        text_height -= 1
    font, title_height = ImageFont.load_default(size=text_height), 2 * text_height
    canvas = np.full(
        (title_height + count * (height + _GAP), len(pixels) * (width + _GAP) + _GAP, 3), _PAPER, dtype=np.uint8
    )
    for i, column in enumerate(pixels):
        left = _GAP + i * (width + _GAP)
        for j, image in enumerate(column):
            top = title_height + j * (height + _GAP)
            resized = Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST)
            canvas[top : top + height, left : left + width] = np.asarray(resized)
    picture = Image.fromarray(canvas)
    draw = ImageDraw.Draw(picture)
    for i, title in enumerate(columns):
        centre = _GAP + i * (width + _GAP) + width // 2
        draw.text((centre, title_height // 2), title, fill=(_INK,) * 3, font=font, anchor="mm")
    return np.asarray(picture)


def save_png(path: Path, picture: UInt8[np.ndarray, "h w 3"]) -> Path:
    """Writes a picture, making its folder; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path)
    return path


def _to_uint8(images: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    pixels = np.asarray(images, np.float32) * np.asarray(std, np.float32) + np.asarray(mean, np.float32)
    return np.clip(np.round(np.nan_to_num(pixels)), 0, 255).astype(np.uint8)
