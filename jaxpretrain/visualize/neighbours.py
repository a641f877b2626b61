"""Pictures of nearest neighbours: each query with the images that the network takes for its like."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image, ImageDraw, ImageFont

_SMALLEST, _LARGEST = 64, 128  # px: smaller images are enlarged by whole factors, larger ones reduced
_GAP, _FRAME = 6, 4  # px, between cells and around images
_PAPER, _INK = (255, 255, 255), (40, 40, 40)
_RIGHT, _WRONG = (44, 140, 84), (200, 62, 45)


def neighbour_grid(
    queries: UInt8[np.ndarray, "n h w 3"],
    neighbours: UInt8[np.ndarray, "n k h w 3"],
    labels: Sequence[str],
    neighbour_labels: Sequence[Sequence[str]],
    right: Bool[np.ndarray, "n k"],
) -> UInt8[np.ndarray, "height width 3"]:
    """One row per query: the query, a gap, and its neighbours, the nearest first; labels are written below.

    Args:
        queries, neighbours: images.
        labels, neighbour_labels: what is written below them; cut where it does not fit.
        right: which neighbours have a green frame; the others' is red.
    """
    size = _cell_size(queries.shape[1:3])
    text_height = 13
    font = ImageFont.load_default(size=text_height)
    cell_w, cell_h = size[0] + 2 * _FRAME + _GAP, size[1] + 2 * _FRAME + _GAP + text_height + 4
    left, top = 3 * _GAP, text_height + 3 * _GAP
    count, k = neighbours.shape[:2]
    picture = Image.new("RGB", (2 * left + (k + 1) * cell_w + _GAP, top + count * cell_h + _GAP), _PAPER)
    draw = ImageDraw.Draw(picture)
    draw.text((_GAP + cell_w // 2, top // 2), "query", fill=_INK, font=font, anchor="mm")
    draw.text(
        (left + cell_w + _GAP, top // 2),
        "nearest training images, the nearest first",
        fill=_INK,
        font=font,
        anchor="lm",
    )

    def cell(image: np.ndarray, text: str, x: int, y: int, colour: tuple[int, int, int]) -> None:
        box = (x, y, x + size[0] + 2 * _FRAME - 1, y + size[1] + 2 * _FRAME - 1)
        draw.rectangle(box, fill=colour)
        shrinks = image.shape[1] > size[0]
        resample = Image.Resampling.BICUBIC if shrinks else Image.Resampling.NEAREST
        picture.paste(Image.fromarray(image).resize(size, resample), (x + _FRAME, y + _FRAME))
        while text and font.getlength(text) > size[0] + 2 * _FRAME:
            text = text[:-2].rstrip("…, ") + "…" if len(text) > 2 else ""
        middle = (x + _FRAME + size[0] // 2, y + size[1] + 2 * _FRAME + 2)
        draw.text(middle, text, fill=_INK, font=font, anchor="mt")

    for row in range(count):
        y = top + row * cell_h
        cell(queries[row], labels[row], _GAP, y, _PAPER)
        for column in range(k):
            colour = _RIGHT if right[row, column] else _WRONG
            x = left + (column + 1) * cell_w
            cell(neighbours[row, column], neighbour_labels[row][column], x, y, colour)
    return np.asarray(picture)


def _cell_size(shape: tuple[int, int]) -> tuple[int, int]:
    """(width, height) at which images of (height, width) are drawn."""
    height, width = shape
    if max(shape) > _LARGEST:
        factor = _LARGEST / max(shape)
        return max(1, round(width * factor)), max(1, round(height * factor))
    factor = max(1, -(-_SMALLEST // min(shape)))
    return width * factor, height * factor
