"""The annotated picture of a prediction: where there is text, that it can be read, and what is left of the image."""

from __future__ import annotations

import numpy as np
import pytest

from jaxpretrain.build import ConfigError
from jaxpretrain.data.class_names import class_names
from jaxpretrain.data.decode import BadImage
from jaxpretrain.visualize import predictions
from jaxpretrain.visualize.predictions import draw_prediction

SNAKE = dict(pred_label=65, pred_score=0.6649, pred_class="sea snake")
LONGEST = dict(SNAKE, pred_class=max(class_names("imagenet"), key=len))


def texture(height: int, width: int) -> np.ndarray:
    """Grey levels of 60 to 199: neither as dark nor as bright as the text on its box."""
    return np.random.default_rng(0).integers(60, 200, (height, width, 3), np.uint8)


def changed(before: np.ndarray, after: np.ndarray) -> tuple[slice, slice]:
    """Rows and columns of the smallest box that holds every changed pixel."""
    rows, columns = np.nonzero((before != after).any(-1))
    return slice(rows.min(), rows.max() + 1), slice(columns.min(), columns.max() + 1)


def ink(picture: np.ndarray) -> np.ndarray:
    """Which pixels are of the text's white."""
    return picture.min(-1) > 230


def words_on(monkeypatch, *arguments, **options) -> list[str]:
    """The lines that are drawn."""
    lines = []
    original = predictions.ImageDraw.ImageDraw.text
    monkeypatch.setattr(
        predictions.ImageDraw.ImageDraw,
        "text",
        lambda self, at, words, **kw: (lines.append(words), original(self, at, words, **kw))[1],
    )
    draw_prediction(*arguments, **options)
    return lines


@pytest.mark.parametrize("size", [(427, 640), (224, 224), (1280, 1920), (100, 1920), (1708, 240), (48, 160)])
@pytest.mark.parametrize("result", [SNAKE, LONGEST], ids=["short", "long"])
def test_white_text_on_a_dark_box_at_the_top_left(size, result):
    image = texture(*size)
    before = image.copy()
    picture = draw_prediction(image, result)
    assert picture.dtype == np.uint8 and picture.shape == image.shape
    np.testing.assert_array_equal(image, before)
    rows, columns = changed(image, picture)
    assert rows.start <= 14 and columns.start <= 14
    assert rows.stop <= size[0] and columns.stop <= size[1] - 2, "the box keeps inside the image"
    if min(size) > 100:
        assert rows.stop <= size[0] / 2 + 1, "more than half of the image stays free"
    box = picture[rows, columns]
    assert 0.02 < ink(box).mean() < 0.4
    assert np.median(box) < 0.45 * np.median(image), "the box is dark"
    # Text touches no edge of its box.
    assert (
        not ink(box[:2]).any() and not ink(box[-2:]).any() and not ink(box[:, :2]).any() and not ink(box[:, -2:]).any()
    )


def test_text_grows_with_the_image():
    heights = []
    for edge in (224, 640, 1280):
        image = texture(edge, edge)
        rows, _ = changed(image, draw_prediction(image, SNAKE))
        heights.append(rows.stop - rows.start)
    assert heights[0] < heights[1] < heights[2]


def test_long_names_wrap_and_keep_every_word(monkeypatch):
    lines = words_on(monkeypatch, texture(224, 224), LONGEST)
    assert len(lines) > 2
    assert " ".join(lines).split() == ["0.66", *LONGEST["pred_class"].split()]


def test_what_is_written(monkeypatch):
    image = texture(300, 300)
    assert words_on(monkeypatch, image, SNAKE) == ["0.66  sea snake"]
    assert words_on(monkeypatch, image, SNAKE, draw_score=False) == ["sea snake"]
    assert words_on(monkeypatch, image, dict(pred_label=7)) == ["class 7"]
    scores = np.array([0.1, 0.6, 0.0, 0.3])
    best = dict(pred_label=1, pred_score=0.6, pred_class="one", pred_scores=scores)
    assert words_on(monkeypatch, image, best, top=3, classes="abcd") == ["0.60  one", "0.30  d", "0.10  a"]
    assert words_on(monkeypatch, image, best, top=9) == ["0.60  one", "0.30  class 3", "0.10  class 0", "0.00  class 2"]


def test_a_word_wider_than_the_image_is_broken(monkeypatch):
    lines = words_on(monkeypatch, texture(160, 160), dict(SNAKE, pred_class="x" * 60))
    assert len(lines) > 2 and "".join(lines).count("x") == 60


def test_text_that_has_no_room_at_all_is_cut(monkeypatch):
    names = [f"class of things number {k}" for k in range(40)]
    result = dict(pred_label=0, pred_scores=np.linspace(1, 0, 40))
    lines = words_on(monkeypatch, texture(160, 200), result, top=40, classes=names)
    assert 5 < len(lines) < 20 and lines[-1].endswith("…") and lines[0] == "1.00  class of things number 0"


def test_small_images_are_enlarged():
    image = texture(32, 32)
    picture = draw_prediction(image, SNAKE)
    assert picture.shape == (160, 160, 3)
    squares = image.repeat(5, 0).repeat(5, 1)
    rows, _ = changed(squares, picture)
    assert rows.stop < 50, "pixels stay squares, and only the box differs"
    assert draw_prediction(image, SNAKE, rescale_factor=8).shape == (256, 256, 3)
    assert draw_prediction(image, SNAKE, rescale_factor=1).shape == (32, 32, 3)
    assert draw_prediction(texture(400, 600), SNAKE, rescale_factor=0.5).shape == (200, 300, 3)
    assert draw_prediction(texture(1, 1), SNAKE).shape == (160, 160, 3)
    assert draw_prediction(texture(1, 1), SNAKE, rescale_factor=1).shape == (1, 1, 3)


def test_grey_images_are_taken():
    picture = draw_prediction(texture(200, 200)[..., 0], SNAKE)
    assert picture.shape == (200, 200, 3) and ink(picture).any()


def test_mistakes():
    with pytest.raises(BadImage, match="uint8"):
        draw_prediction(np.zeros((8, 8, 3), np.float32), SNAKE)
    with pytest.raises(ConfigError, match="rescale_factor=0 must be positive"):
        draw_prediction(texture(8, 8), SNAKE, rescale_factor=0)
    with pytest.raises(ConfigError, match="top=0"):
        draw_prediction(texture(8, 8), SNAKE, top=0)
    with pytest.raises(ConfigError, match="no `pred_scores`"):
        draw_prediction(texture(8, 8), SNAKE, top=5)
