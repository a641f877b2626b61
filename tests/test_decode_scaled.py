"""JPEGs decoded smaller where a crop allows it: which scale, the same draws, and how far the pixels are off."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from jaxpretrain.build import ConfigError
from jaxpretrain.data import decode
from jaxpretrain.data.decode import BadImage, ScaledJPEG, as_rgb
from jaxpretrain.data.host_transforms import build_pipeline
from jaxpretrain.data.image_ops import Box, crop, resize
from jaxpretrain.data.pipeline import TrainLoader
from jaxpretrain.data.seeds import SAMPLE, generator

pytest.importorskip("simplejpeg")

PHOTOS = load_sample_images().images  # two of 427x640
SCALED = dict(type="LoadImageFromFile", scaled=True)


def jpeg(pixels, orientation=1, **options) -> bytes:
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95, exif=exif, **options)
    return buffer.getvalue()


def run(data: bytes, *steps, seed=0):
    pipeline = build_pipeline(steps)
    return pipeline(dict(image=as_rgb(data, pipeline.scaled)), generator(SAMPLE, seed, 0, 0))["image"]


def scales(monkeypatch) -> list[int]:
    """The factors at which ScaledJPEGs are decoded from now on."""
    seen, whole = [], ScaledJPEG._decode
    monkeypatch.setattr(ScaledJPEG, "_decode", lambda self, factor: seen.append(factor) or whole(self, factor))
    return seen


@pytest.mark.parametrize(
    ("size", "factor"), [((640, 427), 1), ((321, 200), 1), ((320, 213), 2), ((160, 106), 4), ((80, 53), 8), ((8, 8), 8)]
)
def test_the_smallest_scale_above_the_result(size, factor, monkeypatch):
    seen = scales(monkeypatch)
    image = as_rgb(jpeg(PHOTOS[0]), scaled=True)
    assert isinstance(image, ScaledJPEG) and image.shape == (427, 640, 3)
    part = image.crop(Box(0, 0, 427, 640), size)
    assert seen == [factor] and part.shape[0] >= size[1] and part.shape[1] >= size[0]
    assert part.shape == (round(427 / factor), 640 // factor, 3)


@pytest.mark.parametrize("seed", range(30))
def test_crops_never_fall_short(seed):
    """Whatever the box: at least the size of the result, and where the box is, within half a pixel."""
    rng = np.random.default_rng(seed)
    height, width = rng.integers(20, 120, 2)
    ramp = np.broadcast_to(np.linspace(0, 255, width, dtype=np.float32)[:, None], (height, width, 3)).astype(np.uint8)
    h, w = rng.integers(8, height + 1), rng.integers(8, width + 1)
    box = Box(int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), int(h), int(w))
    size = (int(rng.integers(1, w + 1)), int(rng.integers(1, h + 1)))
    part = as_rgb(jpeg(ramp), scaled=True).crop(box, size)
    assert size[1] <= part.shape[0] <= box.height and size[0] <= part.shape[1] <= box.width
    step = 255 / (width - 1)
    assert abs(part.mean() - step * (box.left + (box.width - 1) / 2)) < step * 4.5 + 1.5


def test_pixels_without_shrinking_are_exact():
    data = jpeg(PHOTOS[0])
    for steps in ([dict(type="RandomResizedCrop", scale=400)], [dict(type="CenterCrop", crop_size=300)], []):
        np.testing.assert_array_equal(run(data, SCALED, *steps), run(data, *steps))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(orientation):
    """The crop is of the image as it is to be seen."""
    data = jpeg(PHOTOS[1], orientation)
    steps = dict(type="RandomResizedCrop", scale=48, backend="pillow")
    exact, scaled = run(data, steps).astype(int), run(data, SCALED, steps).astype(int)
    assert abs(exact - scaled).mean() < 5
    assert np.corrcoef(exact.ravel(), scaled.ravel())[0, 1] > 0.98


@pytest.mark.parametrize(
    "step",
    [
        dict(type="RandomResizedCrop", scale=24),
        dict(type="Resize", scale=(40, 30)),
        dict(type="Resize", scale=50, keep_ratio=True),
        dict(type="ResizeEdge", scale=30),
        dict(type="MAERandomResizedCrop", size=24),
        dict(type="EfficientNetRandomCrop", scale=24),
        dict(type="MultiView", num_views=[2], transforms=[[dict(type="RandomResizedCrop", scale=24)]]),
    ],
    ids=lambda step: step["type"],
)
def test_draws_are_those_of_the_full_decode(step, monkeypatch):
    """What is left in the generator afterwards is the same, and so are size and place of the result."""
    data, states, images = jpeg(PHOTOS[0]), [], []
    seen = scales(monkeypatch)
    for first in ([], [SCALED]):
        rng, pipeline = generator(SAMPLE, 5, 0, 0), build_pipeline([*first, step])
        images.append(pipeline(dict(image=as_rgb(data, pipeline.scaled)), rng)["image"])
        states.append(rng.bit_generator.state)
    assert states[0] == states[1] and seen and max(seen) > 1
    for exact, scaled in zip(*(np.atleast_1d(i) if isinstance(i, tuple) else [i] for i in images), strict=True):
        assert exact.shape == scaled.shape and exact.dtype == scaled.dtype
        assert np.corrcoef(exact.ravel(), scaled.ravel())[0, 1] > 0.9


@pytest.mark.parametrize(("grid", "limit"), [(8, 1.8), (1, 3.4)])
@pytest.mark.parametrize("size", [192, 96, 24])
def test_the_error_against_an_antialiased_full_decode(size, grid, limit):
    """In grey levels, mean over crops of photographs: for boxes on the grid of the reduced pixels, and for any, whose
    edges move by up to half of such a pixel. cv2's filter without antialiasing, on all pixels, is farther off.
    """
    rng, errors, plain = np.random.default_rng(0), [], []
    for photo in PHOTOS:
        data, full = jpeg(photo), as_rgb(jpeg(photo))
        for _ in range(10):
            h, w = rng.integers(2 * size, 427), rng.integers(2 * size, 640)
            corner_and_size = (rng.integers(428 - h), rng.integers(641 - w), h, w)
            box = Box(*(int(number) // grid * grid for number in corner_and_size))
            exact = resize(crop(full, box), (size, size), "pillow").astype(int)
            for filter_ in (("pillow", "bilinear"), ("cv2", "antialias")):
                reduced = crop(as_rgb(data, scaled=True), box, (size, size))
                assert reduced.shape[0] < box.height
                errors.append(abs(resize(reduced, (size, size), *filter_) - exact).mean())
            plain.append(abs(resize(crop(full, box), (size, size)) - exact).mean())
    assert np.mean(errors) < limit and np.mean(plain) > 1.15 * np.mean(errors), (np.mean(errors), np.mean(plain))


def test_views_share_what_is_decoded(monkeypatch):
    seen = scales(monkeypatch)
    large, small = (dict(type="RandomResizedCrop", scale=size, crop_ratio_range=(0.9, 1)) for size in (300, 24))
    views = dict(type="MultiView", num_views=[2, 6], transforms=[[large], [small]])
    run(jpeg(PHOTOS[0]), SCALED, views)
    assert seen == [1], "the full image is there for the small crops"
    run(jpeg(PHOTOS[0]), SCALED, dict(views, num_views=[6, 2], transforms=[[small], [large]]))
    assert seen == [1, 8, 1]


def test_other_transforms_get_pixels():
    kinds = []

    def look(sample):
        kinds.append(type(sample["image"]))
        return sample

    run(jpeg(PHOTOS[0]), SCALED, look, dict(type="Resize", scale=20))
    assert kinds == [np.ndarray]


@pytest.mark.parametrize(
    ("mode", "kind"), [("L", "JPEG"), ("CMYK", "JPEG"), ("RGB", "PNG"), ("RGBA", "PNG"), ("P", "GIF"), ("RGB", "WEBP")]
)
def test_other_files_are_decoded_in_full(mode, kind):
    buffer = io.BytesIO()
    Image.fromarray(PHOTOS[0]).resize((64, 48)).convert(mode).save(buffer, kind)
    data = buffer.getvalue()
    assert isinstance(as_rgb(data, scaled=True), ScaledJPEG) == (kind == "JPEG" and mode == "L")
    assert run(data, SCALED, dict(type="Resize", scale=8)).shape == (8, 8, 3)


def test_defects_are_found_all_the_same(monkeypatch):
    data = jpeg(PHOTOS[0])
    with pytest.raises(BadImage):
        run(data[: len(data) // 2], SCALED, dict(type="Resize", scale=8))
    with pytest.raises(BadImage, match="empty"):
        as_rgb(b"", scaled=True)
    monkeypatch.setattr(decode, "MAX_PIXELS", 100)
    with pytest.raises(BadImage, match="640x427 pixels"):
        as_rgb(data, scaled=True)


def test_progressive_and_odd_sizes():
    for size in ((1, 1), (2, 3), (15, 17), (33, 640)):
        pixels = np.asarray(Image.fromarray(PHOTOS[0]).resize(size[::-1]))
        for options in (dict(), dict(progressive=True), dict(subsampling=0)):
            image = run(jpeg(pixels, **options), SCALED, dict(type="Resize", scale=(4, 4), backend="pillow"))
            exact = resize(as_rgb(jpeg(pixels, **options)), (4, 4), "pillow")
            assert abs(image.astype(int) - exact).mean() < 12  # edges move by up to 4 of 17 pixels


def test_without_simplejpeg_everything_is_decoded_in_full(monkeypatch):
    monkeypatch.setattr(decode, "simplejpeg", None)
    assert isinstance(as_rgb(jpeg(PHOTOS[0]), scaled=True), np.ndarray)


def test_through_the_loader(tmp_path):
    (tmp_path / "a").mkdir()
    for i in range(4):
        (tmp_path / "a" / f"{i}.jpg").write_bytes(jpeg(PHOTOS[i % 2]))
    (tmp_path / "a" / "4.jpg").write_bytes(jpeg(PHOTOS[0])[:9000])
    dataset = dict(type="CustomDataset", data_root=str(tmp_path))
    crop = dict(type="RandomResizedCrop", scale=16, crop_ratio_range=(0.8, 1), backend="pillow")
    batches = []
    for steps in ([crop], [SCALED, crop]):
        loader = TrainLoader(dict(dataset=dataset, pipeline=steps), batch_size=5, max_bad=0.5)
        batches.append(next(loader))
        loader.close()
        assert loader.bad_indices == [4]
    exact, scaled = (batch["image"].astype(int) for batch in batches)
    assert (batches[0]["index"] == batches[1]["index"]).all() and 0 < abs(exact - scaled).mean() < 2


def test_an_unknown_option():
    with pytest.raises(ConfigError, match="scaled"):
        build_pipeline([dict(type="LoadImageFromFile", scale=True)])


# ----------------------------------------------------------------------------------------------------------------------
# interpolation='antialias'


@pytest.mark.parametrize(("size", "mean", "rms"), [(224, 0.8, 1.8), (96, 0.5, 1.0), (32, 0.4, 1.1)])
def test_the_fast_antialiasing_is_nearly_pillows(size, mean, rms):
    """In grey levels, over crops of photographs; plain linear interpolation is 2, 6 and 11 off in the mean."""
    crop = dict(type="RandomResizedCrop", scale=size)
    differences, plain = [], []
    for photo in PHOTOS:
        for seed in range(12):
            pillow = run(jpeg(photo), crop | dict(backend="pillow"), seed=seed).astype(int)
            differences.append(run(jpeg(photo), crop | dict(interpolation="antialias"), seed=seed) - pillow)
            plain.append(run(jpeg(photo), crop, seed=seed) - pillow)
    assert abs(np.stack(differences)).mean() < mean
    assert np.sqrt((np.stack(differences) ** 2).mean()) < rms
    assert abs(np.stack(plain)).mean() > 2 * mean


@pytest.mark.parametrize("factor", [2, 3, 5])
def test_the_fast_antialiasing_is_exact_at_whole_factors(factor):
    pixels = np.random.default_rng(0).integers(0, 256, (24 * factor, 20 * factor, 3), dtype=np.uint8)
    inside = np.s_[2:-2, 2:-2]  # at the border Pillow leaves out what is missing, instead of repeating the edge
    fast = resize(pixels, (20, 24), "cv2", "antialias")[inside].astype(int)
    assert abs(fast - resize(pixels, (20, 24), "pillow", "bilinear")[inside]).max() <= (1 if factor % 2 else 12)


def test_the_fast_antialiasing_leaves_enlarging_alone():
    pixels = PHOTOS[0][:20, :30]
    np.testing.assert_array_equal(resize(pixels, (64, 64), "cv2", "antialias"), resize(pixels, (64, 64)))
    assert resize(pixels[:, ::-1], (64, 10), "cv2", "antialias").shape == (10, 64, 3)
