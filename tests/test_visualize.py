"""Curves, reconstruction pictures and the report, on work directories made up here."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from jaxpretrain.build import ConfigError
from jaxpretrain.visualize.curves import is_percent, plot_curves, read_metrics, score_names, series
from jaxpretrain.visualize.reconstructions import reconstruction_grid, save_png
from jaxpretrain.visualize.report import write_report


def write_metrics(workdir, records, tail=""):
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + tail)


def made_up_run(steps=400, every=10):
    rng = np.random.default_rng(0)

    def scores(step):
        gain = 30 * step / steps
        values = {
            "knn/top1": 61.25 + gain,
            "linear/top1": 70 + 0.8 * gain,
            "linear/lr": 0.3,
            "picture/mse": 2 - gain / 30,
        }
        return {"phase": "eval", "step": step, "epoch": step / 50, **values}

    records = [scores(0)]
    for step in range(every, steps + 1, every):
        loss = 0.3 + math.exp(-step / 90) + 0.03 * rng.standard_normal()
        lr = 1e-3 * 0.5 * (1 + math.cos(math.pi * step / steps))
        speed = dict(images_per_second=900 + step, elapsed=step * 0.25)
        records.append(dict(phase="train", step=step, epoch=step / 50, loss=loss, lr=lr, **speed))
        if step % 100 == 0:
            records.append(scores(step))
    return records


class Page(HTMLParser):
    """What a browser would see: tags, text, and the images."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.images, self.links = [], "", [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href"):
                self.links.append(value)
        if tag == "img":
            self.images.append(Image.open(io.BytesIO(base64.b64decode(dict(attrs)["src"].split(",")[1]))))

    def handle_data(self, data):
        self.text += data


# ------------------------------------------------------------------------------------------------ metrics


def test_read_metrics_keeps_the_later_of_repeated_steps_and_drops_cut_lines(tmp_path):
    records = [
        dict(phase="train", step=10, loss=3.0),
        dict(phase="train", step=20, loss=2.0),
        dict(phase="eval", step=10, **{"knn/top1": 50.0}),
        dict(phase="train", step=20, loss=1.5),  # repeated after a kill
        dict(phase="eval", step=10, **{"linear/top1": 60.0}),
        dict(phase="train", step=30, loss=float("nan")),
    ]
    write_metrics(tmp_path, records, tail='not json\n[1]\n{"phase": "train", "step": 40, "lo')
    read = read_metrics(tmp_path)
    assert [(r["phase"], r["step"]) for r in read] == [("train", 10), ("eval", 10), ("train", 20), ("train", 30)]
    steps, values = series(read, "loss", "train")
    assert steps.tolist() == [10, 20] and values.tolist() == [3.0, 1.5]
    assert score_names(read) == ["knn/top1", "linear/top1"]


@pytest.mark.parametrize("function", [read_metrics, plot_curves, write_report])
def test_a_folder_without_metrics_is_an_error(tmp_path, function):
    with pytest.raises(ConfigError, match=r"metrics.jsonl does not exist.*--workdir"):
        function(tmp_path / "nowhere")
    write_metrics(tmp_path, [], tail="{")
    with pytest.raises(ConfigError, match="holds no records yet"):
        function(tmp_path)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    "name, percent",
    [("knn/top1", True), ("knn/k20_top5", True), ("svm/k8_map", True), ("linear/lr", False), ("stop/mse", False)],
)
def test_which_scores_are_percentages(name, percent):
    assert is_percent(name) is percent


# ------------------------------------------------------------------------------------------------ curves


@pytest.mark.parametrize("records", [made_up_run(), made_up_run(20, 10), made_up_run()[:1], made_up_run()[1:3]])
def test_curves_of_short_and_long_runs(tmp_path, records):
    write_metrics(tmp_path, records)
    path = plot_curves(tmp_path)
    assert path == tmp_path / "pictures" / "curves.png"
    picture = np.asarray(Image.open(path).convert("RGB"))
    assert picture.shape[1] == 1152
    assert (picture.min(axis=2) < 120).sum() > 1000  # there is ink


def test_curves_show_the_data(tmp_path):
    """The red-brown second score and the blue loss are drawn where, and only where, there are values."""

    def coloured(records, name):
        write_metrics(tmp_path, records)
        picture = np.asarray(Image.open(plot_curves(tmp_path, tmp_path / name)).convert("RGB")).astype(int)
        return (np.abs(picture - np.array([0xD1, 0x62, 0x2B])).sum(axis=2) < 30).sum()

    both = made_up_run()
    one = [{key: value for key, value in record.items() if key != "linear/top1"} for record in both]
    assert coloured(both, "both.png") > 200
    assert coloured(one, "one.png") == 0


# ------------------------------------------------------------------------------------------------ reconstructions


def test_grid_undoes_the_normalisation_and_enlarges_by_whole_pixels():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (2, 32, 32, 3))
    mean, std = np.array([120.0, 110.0, 100.0]), np.array([60.0, 55.0, 50.0])
    normalised = ((pixels - mean) / std).astype(np.float32)
    columns = dict(original=normalised, masked=np.zeros_like(normalised), reconstructed=normalised + 100)
    grid = reconstruction_grid(columns, mean, std)
    assert grid.dtype == np.uint8
    enlarged = pixels[1].repeat(4, axis=0).repeat(4, axis=1)
    assert grid.shape[1] == 3 * (128 + 8) + 8
    bottom, size = grid.shape[0] - 8, 128
    np.testing.assert_array_equal(grid[bottom - size : bottom, 8 : 8 + size], enlarged)
    assert (grid[bottom - size : bottom, 144 : 144 + size] == mean).all()  # zero is the mean colour
    assert (grid[bottom - size : bottom, 280 : 280 + size] == 255).all()  # clipped, not wrapped around
    title = grid[: grid.shape[0] - 2 * (size + 8)]
    assert all((title[:, left : left + size] < 100).any() for left in (8, 144, 280))


def test_grid_does_not_shrink_or_enlarge_large_images():
    images = np.zeros((1, 224, 160, 3), np.float32)
    grid = reconstruction_grid(dict(a=images, b=images, c=images))
    assert grid.shape[1] == 3 * 168 + 8
    assert grid.shape[0] > 224


def test_grid_draws_what_there_is_under_its_title():
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 256, (1, 112, 112, 3), dtype=np.uint8)
    grey = rng.integers(0, 256, (1, 56, 56, 1), dtype=np.uint8)
    grid = reconstruction_grid(
        {"original": raw / np.float32(255), "as it is": raw, "a grey map of half the size": grey}
    )
    assert grid.shape[1] == 3 * 120 + 8
    cells = [grid[-120:-8, left : left + 112] for left in (8, 128, 248)]
    np.testing.assert_array_equal(cells[0], raw[0])
    np.testing.assert_array_equal(cells[1], raw[0])
    np.testing.assert_array_equal(cells[2], grey[0].repeat(2, 0).repeat(2, 1).repeat(3, 2))
    title = grid[: grid.shape[0] - 120]
    assert (title[:, -8:] == 255).all() and (title[:, :8] == 255).all()  # a long title is set smaller, not cut


def test_save_png_makes_its_folder(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    path = save_png(tmp_path / "a" / "b.png", picture)
    np.testing.assert_array_equal(np.asarray(Image.open(path)), picture)


# ------------------------------------------------------------------------------------------------ report


@pytest.fixture
def workdir(tmp_path):
    workdir = tmp_path / "run"
    write_metrics(workdir, made_up_run())
    config = dict(recipe="digits<script>", method=dict(type="MAE"), note="</pre><b>bold</b> & more")
    (workdir / "config.json").write_text(json.dumps(config))
    for step, colour in ((0, 10), (100, 20), (400, 30)):
        save_png(workdir / "pictures" / f"reconstruction_{step}.png", np.full((8, 8, 3), colour, np.uint8))
    save_png(workdir / "pictures" / "reconstruction.png", np.full((8, 8, 3), 30, np.uint8))
    save_png(workdir / "pictures" / "extra.png", np.full((8, 8, 3), 40, np.uint8))
    return workdir


def test_report_shows_everything_in_one_file(workdir):
    path = write_report(workdir)
    assert path == workdir / "report.html"
    page = Page(path.read_text())
    assert all(link.startswith("data:image/png;base64,") for link in page.links)  # nothing outside the file
    assert not re.search(r"url\(|@import|<script", path.read_text())
    assert "MAE: digits<script>" in page.text and "</pre><b>bold</b> & more" in page.text  # as text, not as tags
    assert "b" not in page.tags and page.tags.count("pre") == 1
    row = re.search(r"<tr><td>knn/top1 \(%\)</td>.*?</tr>", path.read_text())[0]
    assert re.findall(r">([^<>]+)</td>", row) == ["knn/top1 (%)", "61.2", "91.2", "+30.0"]
    assert [image.getpixel((0, 0))[0] for image in page.images[1:]] == [40, 10, 30]  # extra, then untrained and last
    assert page.images[0].size[0] == 1152
    for text in ("400", "1 min 40 s", "1,110", "→", "untrained", "jax", "devices"):
        assert text in page.text


def test_report_leaves_out_what_is_missing(tmp_path):
    write_metrics(tmp_path, [dict(step=5, loss=1.0)])
    page = Page(write_report(tmp_path).read_text())
    assert len(page.images) == 1 and "Settings" not in page.text and "Scores" not in page.text
    assert tmp_path.name in page.text and "Environment" in page.text
    (tmp_path / "config.json").write_text("{ broken")
    (tmp_path / "environment.json").write_text(json.dumps(dict(devices="8 x H200")))
    page = Page(write_report(tmp_path).read_text())
    assert "{ broken" in page.text and "8 x H200" in page.text


def test_report_of_an_untrained_network_has_no_trained_score(tmp_path):
    write_metrics(tmp_path, made_up_run()[:1])
    assert re.search(r"knn/top1 \(%\)</td><td>61.2</td><td class=trained>–<", write_report(tmp_path).read_text())
