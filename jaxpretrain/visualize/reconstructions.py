"""Pictures of masked autoencoders: original, masked and reconstructed side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont

TITLES = ("original", "masked", "reconstructed")
_SMALLEST = 112  # px: images smaller than this are enlarged
_GAP = 8  # px between images
_PAPER, _INK = 255, 40  # grey levels


def reconstruction_grid(
    original: Float[np.ndarray, "n h w 3"],
    masked: Float[np.ndarray, "n h w 3"],
    reconstructed: Float[np.ndarray, "n h w 3"],
    mean: Sequence[float] = (0.0, 0.0, 0.0),
    std: Sequence[float] = (255.0, 255.0, 255.0),
) -> UInt8[np.ndarray, "height width 3"]:
    """One row per image, under column titles. Small images are enlarged by a whole factor, pixels staying squares.

    Args:
        original, masked, reconstructed: images normalised by mean and std, in RGB.
        mean, std: of the normalisation, in grey levels from 0 to 255; by default images are from 0 to 1.
    """
    columns = [_to_uint8(images, mean, std) for images in (original, masked, reconstructed)]
    count, height, width = columns[0].shape[:3]
    factor = max(1, -(-_SMALLEST // min(height, width)))
    columns = [column.repeat(factor, axis=1).repeat(factor, axis=2) for column in columns]
    height, width = height * factor, width * factor
    text_height = min(max(width // 8, 12), 24)
    font, title_height = ImageFont.load_default(size=text_height), 2 * text_height
    canvas = np.full(
        (title_height + count * (height + _GAP), len(columns) * (width + _GAP) + _GAP, 3), _PAPER, dtype=np.uint8
    )
    for i, column in enumerate(columns):
        left = _GAP + i * (width + _GAP)
        for j, image in enumerate(column):
            top = title_height + j * (height + _GAP)
            canvas[top : top + height, left : left + width] = image
    picture = Image.fromarray(canvas)
    draw = ImageDraw.Draw(picture)
    for i, title in enumerate(TITLES):
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
