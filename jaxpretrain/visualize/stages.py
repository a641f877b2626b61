"""Samples and their transforms as cards: one cell for each picture, its title and size below it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image, ImageDraw, ImageFont

from jaxpretrain.data.stages import Picture

_CELL = 224  # px: larger pictures are reduced to this edge, smaller ones enlarged by a whole factor
_NARROWEST = 96  # px: room for titles, where pictures are narrower
_GAP, _MARGIN = 8, 12  # px: between cells, around a card
_TEXT, _HEAD = 13, 16  # px, of titles and of the first line of a card
_PAPER, _INK, _FAINT, _RULE = (255, 255, 255), (40, 40, 40), (120, 120, 120), (214, 214, 214)
_HIDDEN = np.array([118.0, 126.0, 140.0])  # colour of masked patches
_COVER = 0.82  # its opacity

Row = Sequence[Picture | None]
Pixels = UInt8[np.ndarray, "height width 3"]


def draw_mask(image: Pixels, mask: Int[np.ndarray, "rows columns"]) -> Pixels:
    """The image with a flat colour over the patches whose number is not 0; they shine through a little."""
    height, width = image.shape[:2]
    rows = np.arange(height) * mask.shape[0] // height
    columns = np.arange(width) * mask.shape[1] // width
    hidden = (mask[rows][:, columns] != 0)[..., None]
    return np.where(hidden, np.round(_COVER * _HIDDEN + (1 - _COVER) * image), image).astype(np.uint8)


def draw_card(rows: Sequence[Row], heading: str, note: str = "", rescale_factor: float | None = None) -> Pixels:
    """One sample: two lines of text above rows of pictures; gaps where a row has None.

    Args:
        rows: of pictures, the first row on top.
        heading, note: the lines; cut where the card ends.
        rescale_factor: by which pictures are enlarged, pixels staying squares, or reduced. None: to at most 224 pixels,
            and small ones by the whole factor that fits.
    """
    cells = [[None if p is None else (p.title, _size_text(p), _fit(p, rescale_factor)) for p in row] for row in rows]
    width = max(_NARROWEST, *(cell[2].shape[1] for row in cells for cell in row if cell))
    heights = [max(cell[2].shape[0] for cell in row if cell) for row in cells]
    step_x, below = width + _GAP, 2 * _TEXT + 3 * _GAP  # below a picture: two lines of text
    top = _MARGIN + _HEAD + _TEXT + 2 * _GAP
    size = 2 * _MARGIN + max(map(len, rows)) * step_x - _GAP, top + sum(heights) + len(rows) * below + _MARGIN - _GAP
    picture = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(picture)
    _text(draw, (_MARGIN, _MARGIN), heading, _INK, _HEAD, size[0] - 2 * _MARGIN)
    _text(draw, (_MARGIN, _MARGIN + _HEAD + _GAP // 2), note, _FAINT, _TEXT, size[0] - 2 * _MARGIN)
    for row, height in zip(cells, heights, strict=True):
        for column, cell in enumerate(row):
            if cell is None:
                continue
            title, pixels, image = cell
            left, bottom = _MARGIN + column * step_x, top + height
            picture.paste(Image.fromarray(image), (left, bottom - image.shape[0]))
            _text(draw, (left, bottom + _GAP // 2), title, _INK, _TEXT, width)
            _text(draw, (left, bottom + _GAP // 2 + _TEXT + 3), pixels, _FAINT, _TEXT - 1, width)
        top += height + below
    return np.asarray(picture)


def contact_sheet(cards: Sequence[Pixels]) -> Pixels:
    """All cards on one sheet, in reading order, a little wider than high."""
    height, width = max(card.shape[0] for card in cards), max(card.shape[1] for card in cards)

    def badness(columns: int) -> float:
        rows = -(-len(cards) // columns)
        empty = rows * columns / len(cards) - 1
        return empty + abs(np.log(columns * width / (rows * height) / 1.4))

    columns = min(range(1, len(cards) + 1), key=badness)
    rows = -(-len(cards) // columns)
    sheet = Image.new("RGB", (columns * width, rows * height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, card in enumerate(cards):
        row, column = divmod(i, columns)
        sheet.paste(Image.fromarray(card), (column * width, row * height))
        if column:
            draw.line([(column * width, row * height + _MARGIN), (column * width, (row + 1) * height - _MARGIN)], _RULE)
        if row:
            draw.line([(column * width + _MARGIN, row * height), ((column + 1) * width - _MARGIN, row * height)], _RULE)
    return np.asarray(sheet)


def _fit(picture: Picture, factor: float | None) -> Pixels:
    image = picture.image if picture.mask is None else draw_mask(picture.image, picture.mask)
    height, width = image.shape[:2]
    if factor is None:
        edge = max(height, width)
        factor = _CELL // edge if edge <= _CELL else _CELL / edge
    size = max(1, round(width * factor)), max(1, round(height * factor))
    resample = Image.Resampling.NEAREST if factor >= 1 else Image.Resampling.BICUBIC
    return np.asarray(Image.fromarray(np.ascontiguousarray(image)).resize(size, resample))


def _size_text(picture: Picture) -> str:
    height, width = picture.image.shape[:2]
    return f"{width} x {height}"


def _text(
    draw: ImageDraw.ImageDraw, at: tuple[int, int], text: str, colour: tuple[int, int, int], size: int, width: int
) -> None:
    """One line, in smaller letters or cut if it is wider than `width`."""
    while size > 10 and ImageFont.load_default(size=size).getlength(text) > width:
        size -= 1
    font = ImageFont.load_default(size=size)
    while len(text) > 1 and font.getlength(text) > width:
        text = text[:-2].rstrip(" …") + "…"
    draw.text(at, text, fill=colour, font=font)
