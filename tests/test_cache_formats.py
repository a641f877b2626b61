"""The formats of the cache of decoded images: what they keep of an image, and which bytes a crop reads."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from jaxpretrain.data.cache_builder import shorten
from jaxpretrain.data.cache_formats import FORMATS, RawImage, YUV420Image
from jaxpretrain.data.decode import as_rgb, decode
from jaxpretrain.data.image_ops import Box
from jaxpretrain.data.lazy_image import LazyImage


def smooth(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """An image with the detail of a photograph: noise of several sizes."""
    levels = np.zeros((height, width, 3))
    for size in (2, 5, 12):
        noise = Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8))
        levels += np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC)) / 3
    return levels.astype(np.uint8)


def pixels(image) -> np.ndarray:
    """What a source gives as `image`, read."""
    return np.asarray(as_rgb(image))


def stored(format: str, image: np.ndarray):
    """An image as a cache gives it, and the (first byte, count) of each read."""
    data, reads = FORMATS[format].encode(image), []

    def read(first: int, count: int) -> bytes:
        reads.append((first, count))
        assert count < 0 or first + count <= len(data)
        return data[first:] if count < 0 else data[first : first + count]

    return FORMATS[format].open(read, *image.shape[:2]), data, reads


SHAPES = [(1, 1), (1, 7), (6, 1), (2, 2), (31, 50), (32, 49), (33, 47), (48, 64)]


@pytest.mark.parametrize("shape", SHAPES)
def test_raw_is_exact(shape):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    lazy, data, _ = stored("raw", image)
    assert len(data) == 3 * shape[0] * shape[1]
    assert isinstance(lazy, LazyImage) and lazy.shape == image.shape
    assert (pixels(lazy) == image).all() and (lazy.pixels() == image).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_yuv_keeps_grey_and_flat_colours(shape):
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 256, (*shape, 1), dtype=np.uint8).repeat(3, axis=2)
    lazy, data, _ = stored("yuv420", grey)
    assert len(data) == shape[0] * shape[1] + 2 * -(-shape[0] // 2) * -(-shape[1] // 2)
    assert np.abs(lazy.pixels().astype(int) - grey).max() <= 1, "brightness has full resolution and range"
    for colour in [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (12, 200, 140)]:
        flat = np.full((*shape, 3), colour, np.uint8)
        assert np.abs(stored("yuv420", flat)[0].pixels().astype(int) - flat).max() <= 2, colour


def test_yuv_is_jpegs_colour_space():
    """Against the formulas of JFIF, by hand: Y, Cr, Cb of a 2x2 image of one colour."""
    for r, g, b in [(200, 30, 90), (3, 250, 17), (0, 0, 255)]:
        luma = 0.299 * r + 0.587 * g + 0.114 * b
        expected = [luma] * 4 + [(r - luma) / 1.402 + 128, (b - luma) / 1.772 + 128]
        data = stored("yuv420", np.full((2, 2, 3), (r, g, b), np.uint8))[1]
        np.testing.assert_allclose(list(data), np.clip(expected, 0, 255), atol=1.1)


def test_yuv_colours_stand_between_their_pixels():
    """A linear ramp of colour survives where it does not meet the border: sited anywhere else it would be shifted."""
    slope = 3 * np.array(
        [1.402, -0.714136, 0]
    )  # Cr rises by 3 per pixel, Y and Cb stay: half a pixel is 2 levels of red
    image = np.rint(128 + (np.arange(40) - 19.5)[:, None] * slope).astype(np.uint8)
    for ramp in (np.tile(image[None], (16, 1, 1)), np.tile(image[:, None], (1, 16, 1))):
        difference = stored("yuv420", ramp)[0].pixels().astype(int) - ramp
        difference = difference[2:-2, 2:-2]
        assert np.abs(difference).max() <= 3 and np.abs(difference.mean((0, 1))).max() < 0.9


@pytest.mark.parametrize(("format", "mean", "most"), [("yuv420", 0.8, 12), ("jpeg", 2.0, 40), ("raw", 0, 0)])
def test_errors_of_a_photograph_in_grey_levels(format, mean, most):
    image = smooth(np.random.default_rng(3), 96, 128)
    error = np.abs(pixels(stored(format, image)[0]).astype(int) - image)
    assert error.mean() <= mean and error.max() <= most


def test_yuv_comes_as_close_as_a_jpeg_of_quality_100():
    """Both halve the resolution of colour, and nothing else."""
    image = smooth(np.random.default_rng(4), 64, 64)
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=100, subsampling="4:2:0")
    theirs = np.abs(decode(buffer.getvalue()).astype(int) - image).mean()
    assert np.abs(stored("yuv420", image)[0].pixels().astype(int) - image).mean() < theirs + 0.1


@pytest.mark.parametrize("format", ["raw", "yuv420"])
@pytest.mark.parametrize("shape", [(37, 53), (64, 48), (1, 9)])
def test_a_crop_is_a_part_of_the_image(format, shape):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    lazy, _, _ = stored(format, image)
    whole = lazy.pixels()
    rng = np.random.default_rng(1)
    for _ in range(60):
        h, w = rng.integers(1, shape[0] + 1), rng.integers(1, shape[1] + 1)
        box = Box(int(rng.integers(shape[0] - h + 1)), int(rng.integers(shape[1] - w + 1)), int(h), int(w))
        part = lazy.crop(box)
        expected = whole[box.top : box.top + h, box.left : box.left + w]
        assert part.dtype == np.uint8 and part.shape == expected.shape and (part == expected).all(), box
    beyond = lazy.crop(Box(-2, -3, 100, 100))
    assert (beyond == whole).all(), "what lies outside is cut off"
    with pytest.raises(ValueError, match="no pixel"):
        lazy.crop(Box(shape[0], 0, 2, 2))


def test_a_crop_reads_its_rows_alone():
    image = np.zeros((100, 40, 3), np.uint8)
    lazy, _, reads = stored("raw", image)
    lazy.crop(Box(20, 5, 10, 10))
    assert reads == [(20 * 120, 10 * 120)]
    lazy, data, reads = stored("yuv420", image)
    lazy.crop(Box(20, 5, 10, 10))
    assert reads[0] == (20 * 40, 10 * 40)
    assert (
        len(reads) == 3
        and reads[1][1] == reads[2][1] <= (10 // 2 + 2) * 20
        and sum(count for _, count in reads) < len(data) / 6
    )


def test_images_are_shortened_with_antialiasing_and_never_enlarged():
    image = smooth(np.random.default_rng(0), 300, 401)
    short = shorten(image, 100)
    assert short.shape == (100, 134, 3)
    assert shorten(image.swapaxes(0, 1), 100).shape == (134, 100, 3)
    assert shorten(image, 300) is image and shorten(image, 500) is image and shorten(image, None) is image
    assert shorten(np.zeros((1000, 3, 3), np.uint8), 1).shape == (333, 1, 3)
    stripes = np.zeros((400, 400, 3), np.uint8)
    stripes[:, ::2] = 200
    assert np.abs(shorten(stripes, 100)[5:-5, 5:-5].astype(int) - 100).max() <= 2, "stripes blur to grey"
    theirs = Image.fromarray(image).resize((134, 100), Image.Resampling.BICUBIC)
    assert (short == np.asarray(theirs)).all()


def test_formats_have_a_class_each():
    assert FORMATS["raw"].open is RawImage and FORMATS["yuv420"].open is YUV420Image
