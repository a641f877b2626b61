"""channel_statistics: exact, also where floating point is not; and what it prints."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
from PIL import Image

from jaxpretrain import cli
from jaxpretrain.data.base import InMemory
from jaxpretrain.data.sources import Digits
from jaxpretrain.tools.channel_statistics import main, mean_and_deviation, statistics


def test_against_numpy():
    rng = np.random.default_rng(0)
    images = (rng.integers(0, 256, (70, 5, 7, 3)) // [1, 2, 3]).astype(np.uint8)
    for options in (dict(threads=3), dict(workers=2)):
        found = statistics(InMemory(images, np.zeros(70, int)), **options)
        np.testing.assert_allclose(found.mean, images.mean((0, 1, 2), dtype=np.float64), rtol=1e-14)
        np.testing.assert_allclose(found.std, images.std((0, 1, 2), dtype=np.float64), rtol=1e-13)
        assert (found.pixels, found.images, found.bad) == (70 * 35, 70, 0)
    part = statistics(InMemory(images, np.zeros(70, int)), sample=7)
    np.testing.assert_allclose(part.mean, images[::10].mean((0, 1, 2)), rtol=1e-14)


def test_exact_where_floating_point_is_not():
    """10^15 pixels of 200 and one of 201: sums of squares in float64 would lose the deviation."""
    histogram = np.zeros(256, np.int64)
    histogram[200], histogram[201] = 10**15, 1
    mean, std = mean_and_deviation(histogram)
    assert mean == pytest.approx(200 + 1e-15) and std == pytest.approx(math.sqrt(1e-15), rel=1e-12)
    assert mean_and_deviation(np.eye(256, dtype=np.int64)[7]) == (7.0, 0.0)


@pytest.fixture
def folder(tmp_path):
    for name, level, size in (("a/1", 10, (4, 4)), ("a/2", 30, (8, 8)), ("b/1", 30, (8, 8))):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", size, (level, 0, 255)).save(tmp_path / f"{name}.png")
    (tmp_path / "b/broken.png").write_bytes(b"")
    return tmp_path


def test_command(folder, capsys):
    assert main([str(folder), "--num-threads=2"]) == cli.OK
    out = capsys.readouterr().out
    assert "3 images (1 cannot be read and are left out), 144 pixels" in out
    mean = (16 * 10 + 128 * 30) / 144
    std = math.sqrt((16 * 100 + 128 * 900) / 144 - mean**2)
    assert f"R: mean {mean:.3f}, standard deviation {std:.3f}" in out and "a channel is constant" in out
    assert (
        f"config.data_preprocessor = dict(mean=[{round(mean, 3)}, 0.0, 255.0], std=[{round(std, 3)}, 0.0, 0.0])" in out
    )
    assert main([str(folder), "--size=4"]) == cli.OK, "all images alike"
    assert f"R: mean {(10 + 30 + 30) / 3:.3f}" in capsys.readouterr().out


def test_a_recipe_and_a_sample(capsys):
    assert main(["configs/mae.py:digits", "--sample=100"]) == cli.OK
    out = capsys.readouterr().out
    rows = [i * 1500 // 100 for i in range(100)]
    size = int(re.search(r"(\d+) pixels", out)[1]) // 100
    images = Digits("train", size=math.isqrt(size)).images if size > 64 else Digits("train").images
    assert f"G: mean {images[rows].mean():.3f}, standard deviation {images[rows].std():.3f}" in out


def test_mistakes(folder, capsys):
    assert cli.run(main, [str(folder), "--sample=0"]) == cli.USAGE
    assert "--sample=0 must be at least 1" in capsys.readouterr().err
    for path in folder.rglob("*.png"):
        path.write_bytes(b"")
    assert cli.run(main, [str(folder)]) == cli.FAILED
    assert "none of the 4 images" in capsys.readouterr().err
