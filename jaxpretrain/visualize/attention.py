"""What the class token looks at: self-attention of the last layer, drawn beside the image (Caron et al., 2021, figure 1)."""

from __future__ import annotations

from typing import Any

import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, UInt8
from PIL import Image, ImageDraw, ImageFont

from jaxpretrain.build import ConfigError
from jaxpretrain.models.layers.intermediates import capture

MASS = 0.6  # of the attention that is outlined, as in the paper
_SMALLEST, _LARGEST = 96, 224  # px: images are brought between these
_GAP = 6  # px between cells
_PAPER, _INK = (255, 255, 255), (40, 40, 40)


def class_attention(method: nnx.Module, images: Float[Array, "b h w 3"]) -> Float[Array, "b heads down across"]:
    """How the class token of the last layer spreads its attention over the patches, for each head.

    Maps add up to less than 1: the rest is on the class token itself and on registers. May be called inside jit.

    Args:
        method: anything with `features(images)` whose backbone is a Vision Transformer, in eval mode.
        images: normalised.

    Raises:
        ConfigError: no attention of a class token to patches in it.
    """
    with capture(method, "*layers.*.attn.weights") as found:
        method.features(images)  # type: ignore[attr-defined]
    modules = dict(nnx.iter_modules(method))
    for path, weights in reversed(found.items()):
        owner = path.split(".layers.")[0] if ".layers." in path else ""
        backbone: Any = next((m for p, m in modules.items() if ".".join(map(str, p)) == owner), None)
        extra = getattr(backbone, "num_extra_tokens", 0)
        patch = getattr(getattr(backbone, "patch_embed", None), "patch_size", None)
        if patch is None or getattr(backbone, "cls_token", None) is None:
            continue
        down, across = images.shape[1] // patch[0], images.shape[2] // patch[1]
        if weights.shape[-1] == extra + down * across:
            return weights[:, :, 0, extra:].reshape(*weights.shape[:2], down, across)
    raise ConfigError(
        f"{type(method).__name__} has no attention of a class token to all patches: attention maps need a Vision Transformer "
        "with a class token; take AttentionMaps out of config.evaluators"
    )


def most_attended(maps: Float[np.ndarray, "*b down across"], mass: float = MASS) -> Bool[np.ndarray, "*b down across"]:
    """The fewest patches that hold more than `mass` of each map's sum."""
    flat = np.asarray(maps, np.float64).reshape(*maps.shape[:-2], -1)
    order = np.argsort(-flat, axis=-1, kind="stable")
    ranked = np.take_along_axis(flat, order, axis=-1)
    before = np.cumsum(ranked, axis=-1) - ranked
    kept = np.zeros(flat.shape, bool)
    np.put_along_axis(kept, order, before <= mass * flat.sum(axis=-1, keepdims=True), axis=-1)
    return kept.reshape(maps.shape)


def attention_grid(
    images: UInt8[np.ndarray, "n h w 3"],
    maps: Float[np.ndarray, "n heads down across"],
    mass: float = MASS,
    max_heads: int = 6,
) -> UInt8[np.ndarray, "height width 3"]:
    """One row per image: the image, where `mass` of the mean over heads lies (the rest darkened), the mean, single heads.

    Each map is drawn from its smallest value (black) to its largest (bright yellow).

    Args:
        images: as they were shown, in RGB.
        maps: of `class_attention`.
        mass: see above.
        max_heads: how many heads are drawn at most, the first ones.
    """
    from matplotlib import colormaps

    colours = colormaps["inferno"]
    count, heads = len(images), min(maps.shape[1], max_heads)
    size = _cell_size(images.shape[1:3])
    mean = np.asarray(maps, np.float32).mean(axis=1)
    titles = ["image", f"{mass:.0%} of attention", "mean", *(f"head {i + 1}" for i in range(heads))]
    text_height = 13
    top, cell_w, cell_h = text_height + 2 * _GAP, size[0] + _GAP, size[1] + _GAP
    picture = Image.new("RGB", (_GAP + len(titles) * cell_w, top + count * cell_h), _PAPER)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=text_height)
    for i, title in enumerate(titles):
        draw.text((_GAP + i * cell_w + size[0] // 2, top // 2), title, fill=_INK, font=font, anchor="mm")

    def heat(one: np.ndarray) -> Image.Image:
        low, high = float(one.min()), float(one.max())
        pixels = colours((one - low) / max(high - low, 1e-12))[..., :3]
        return Image.fromarray(np.round(255 * pixels).astype(np.uint8)).resize(size, Image.Resampling.NEAREST)

    for row in range(count):
        resample = Image.Resampling.BICUBIC if images.shape[2] > size[0] else Image.Resampling.NEAREST
        image = Image.fromarray(images[row]).resize(size, resample)
        chosen = Image.fromarray(255 * most_attended(mean[row], mass).astype(np.uint8)).resize(
            size, Image.Resampling.NEAREST
        )
        dark = image.point(lambda level: level // 4)
        cells = [image, Image.composite(image, dark, chosen), heat(mean[row])]
        cells += [heat(np.asarray(maps[row, i], np.float32)) for i in range(heads)]
        for i, cell in enumerate(cells):
            picture.paste(cell, (_GAP + i * cell_w, top + row * cell_h))
    return np.asarray(picture)


def _cell_size(shape: tuple[int, ...]) -> tuple[int, int]:
    """(width, height) of a cell: small images are enlarged by a whole factor, large ones reduced."""
    height, width = shape
    if max(shape) > _LARGEST:
        factor = _LARGEST / max(shape)
        return max(1, round(width * factor)), max(1, round(height * factor))
    factor = max(1, -(-_SMALLEST // min(shape)))
    return width * int(factor), height * int(factor)
