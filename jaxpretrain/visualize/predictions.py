"""A classifier's answer written on the image: score and class name on a shaded box."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from jaxpretrain.build import ConfigError
from jaxpretrain.data.decode import as_rgb
from jaxpretrain.data.image_ops import resize

_READABLE = (160, 48)  # px, width and height under which text does not fit: smaller images are enlarged
_TEXT = 1 / 22  # height of the text, of the image's width, or of the edge of a square as large where that is less
_SMALLEST, _LARGEST = 11, 40  # px, of the text
_COVERED = 0.5  # of the image's height; where the box would be higher, the text is made smaller
_SHADE = 0.6  # opacity of the box: white text keeps a contrast over 5:1, even on white

Line = tuple[int, str]  # indent in pixels, words


def draw_prediction(
    image: UInt8[np.ndarray, "h w 3"],
    result: Mapping[str, Any],
    *,
    draw_score: bool = True,
    rescale_factor: float | None = None,
    top: int = 1,
    classes: Sequence[str] | None = None,
) -> UInt8[np.ndarray, "height width 3"]:
    """The image with its prediction at the top left, in a size that suits the image; long class names are wrapped.

    Args:
        image: RGB, or grey [H,W].
        result: what the inferencer gives for an image: `pred_label`, and where known `pred_score`, `pred_class` (without
            it the text is "class 65") and `pred_scores` [classes].
        draw_score: write the score before the name.
        rescale_factor: enlarge the image first, pixels staying squares, or shrink it. None enlarges an image by the
            whole factor that makes room for text, if it is smaller than 160x48; 1 leaves it as it is.
        top: how many classes to write, the best first.
        classes: names of all classes, for `top` above 1.

    Raises:
        ConfigError: a factor or `top` that is not positive, or `top` above 1 without `pred_scores`.
        BadImage: `image` is not an image of uint8.
    """
    pixels = _rescale(np.asarray(as_rgb(image)), rescale_factor)
    entries = _entries(result, draw_score, top, classes)
    height, width = pixels.shape[:2]
    size = round(min(width, math.sqrt(height * width)) * _TEXT)
    size = min(max(size, _SMALLEST), _LARGEST)
    while True:
        font, margin = _font(size), size // 3
        ascent, descent = font.getmetrics()
        step = ascent + descent
        lines = [line for entry in entries for line in _wrap(*entry, font, width - 4 * margin)]
        if size <= _SMALLEST or len(lines) * step + 4 * margin <= height * _COVERED:
            break
        size -= 1
    lines = _cut(lines, (height - 4 * margin) // step)

    right = max(indent + math.ceil(font.getlength(words)) for indent, words in lines)
    box = (margin, margin, margin * 3 + right, margin * 3 + step * len(lines))
    picture = Image.fromarray(pixels)
    shade = Image.new("L", picture.size)
    ImageDraw.Draw(shade).rounded_rectangle(box, radius=margin, fill=round(255 * _SHADE))
    picture.paste((0, 0, 0), mask=shade)
    draw = ImageDraw.Draw(picture)
    for row, (indent, words) in enumerate(lines):
        draw.text((2 * margin + indent, 2 * margin + row * step), words, fill=(255, 255, 255), font=font)
    return np.array(picture)


def _rescale(pixels: UInt8[np.ndarray, "h w 3"], factor: float | None) -> UInt8[np.ndarray, "h2 w2 3"]:
    height, width = pixels.shape[:2]
    if factor is None:
        factor = max(1, *(math.ceil(least / have) for least, have in zip(_READABLE, (width, height), strict=True)))
    if factor <= 0:
        raise ConfigError(f"rescale_factor={factor} must be positive")
    size = max(1, round(width * factor)), max(1, round(height * factor))
    return resize(pixels, size, "pillow", "box")  # enlarged: squares; shrunk: means


def _entries(
    result: Mapping[str, Any], draw_score: bool, top: int, classes: Sequence[str] | None
) -> list[tuple[str, str]]:
    """(score, name) of the classes to write; the score is empty where it is not wanted or not known."""
    if top < 1:
        raise ConfigError(f"top={top} must be at least 1")
    label, scores = int(result["pred_label"]), result.get("pred_scores")
    if top == 1:
        best = [(label, result.get("pred_score"))]
    elif scores is None:
        raise ConfigError(f"top={top} needs the scores of all classes; the result has no `pred_scores`")
    else:
        scores = np.asarray(scores)
        best = [(int(k), float(scores[k])) for k in np.argsort(-scores, kind="stable")[:top]]

    def name(k: int) -> str:
        if k == label and result.get("pred_class"):
            return str(result["pred_class"])
        return classes[k] if classes is not None else f"class {k}"

    return [(f"{score:.2f}" if draw_score and score is not None else "", name(k)) for k, score in best]


def _wrap(score: str, name: str, font: ImageFont.FreeTypeFont, width: int) -> list[Line]:
    """The lines of one entry, none wider than `width`; where there is room, names stay right of their scores."""
    prefix = f"{score}  " if score else ""
    indent = math.ceil(font.getlength(prefix))
    if indent > width / 3:  # too narrow for two columns
        prefix, indent, name = "", 0, f"{score} {name}"
    words, lines = name.split(), []
    while words:
        line = words.pop(0)
        while words and font.getlength(f"{line} {words[0]}") <= width - indent:
            line += " " + words.pop(0)
        fits = len(line)
        while fits > 1 and font.getlength(line[:fits]) > width - indent:
            fits -= 1
        if fits < len(line):  # one word wider than the line
            words.insert(0, line[fits:])
        lines.append((indent, line[:fits]))
    if prefix:
        lines[:1] = [(0, prefix + lines[0][1])]
    return lines


def _cut(lines: list[Line], room: int) -> list[Line]:
    """As many lines as there is room for; the last of them says if there are more."""
    room = max(room, 1)
    if len(lines) <= room:
        return lines
    indent, words = lines[room - 1]
    return [*lines[: room - 1], (indent, words[:-1].rstrip(", ") + "…")]


@functools.lru_cache(maxsize=64)
def _font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with Matplotlib; `size` in pixels."""
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)
