"""Images in, as the reference does it: its test pipelines and its decoder, on photographs."""

from __future__ import annotations

import base64
import io
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import pytest
import sklearn.datasets
from PIL import Image

from jaxpretrain.build import ConfigError
from jaxpretrain.data import decode as decoding
from jaxpretrain.data.decode import BadImage, decode
from jaxpretrain.data.efficientnet_crops import EfficientNetCenterCrop
from jaxpretrain.data.host_transforms import build_pipeline

from .parity import load_golden

PHOTOGRAPHS = Path(sklearn.datasets.__file__).parent / "images"
GOLDEN = load_golden("preprocessing")
PIPELINES = {
    " ".join(str(value) for step in entry["steps"] for value in step.values()): entry for entry in GOLDEN["pipelines"]
}


@cache
def photograph(name: str) -> np.ndarray:
    """The input called `name` in the golden file, from the encoded photograph."""
    entry = GOLDEN["images"][name]
    image = decode((PHOTOGRAPHS / entry["file"]).read_bytes())
    if entry["part"] is not None:
        top, left, height, width = entry["part"]
        image = image[top : top + height, left : left + width]
    return image.swapaxes(0, 1) if entry["transposed"] else image


def run(steps, image):
    return build_pipeline(steps)({"image": image}, np.random.default_rng(0))["image"]


# ------------------------------------------------------------------------------------------------ pipelines


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_pipelines_of_the_recipes(pipeline):
    """Within one grey level, 0.05 on average; with the versions named in the golden file it is 0 and 0."""
    entry = PIPELINES[pipeline]
    for name, golden in entry["results"].items():
        out = run(entry["steps"], photograph(name))
        height, width = golden["size"]
        assert out.dtype == np.uint8 and out.shape == (height, width, 3), name
        corners = [0, width - 1, (height - 1) * width, height * width - 1]
        positions = np.concatenate([(np.arange(196) * 40503 + 7) % (height * width), corners])
        pixels = np.frombuffer(base64.b64decode(golden["pixels"]), np.uint8).reshape(-1, 3)
        difference = np.abs(out.reshape(-1, 3)[positions].astype(int) - pixels)
        assert difference.max() <= 1, name
        assert difference.mean() < 0.05, name
        assert np.abs(out.mean((0, 1)) - golden["mean"]).max() < 0.05, name


def test_the_comparison_tells_filters_apart():
    """What the golden pixels would not forgive: another library, another kernel, a crop beside the right one."""
    right = run([dict(type="ResizeEdge", scale=256, backend="pillow", interpolation="bicubic")], photograph("china"))
    for other in (
        dict(type="ResizeEdge", scale=256, backend="cv2", interpolation="bicubic"),
        dict(type="ResizeEdge", scale=256, backend="pillow", interpolation="bilinear"),
        dict(type="ResizeEdge", scale=256, backend="pillow", interpolation="lanczos"),
    ):
        assert np.abs(run([other], photograph("china")).astype(int) - right).mean() > 0.5
    assert np.abs(right[:, 1:].astype(int) - right[:, :-1]).mean() > 0.5


def test_efficientnet_crop_leaves_its_margin():
    box = EfficientNetCenterCrop(224).box(400, 600)
    assert box == (25, 125, 350, 350)  # 224 / 256 of 400; half a pixel beside the middle rounds to even
    assert EfficientNetCenterCrop(224).box(1, 1) == (0, 0, 1, 1)
    assert EfficientNetCenterCrop(224, crop_padding=0).box(401, 300) == (50, 0, 300, 300)
    size = dict(crop_size=224)
    for bad in (
        dict(crop_size=0),
        dict(crop_size=(8, 8)),
        dict(size, crop_padding=-1),
        dict(size, interpolation="cubic"),
    ):
        with pytest.raises(ConfigError):
            EfficientNetCenterCrop(**bad)


# ------------------------------------------------------------------------------------------------ decoding


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def sixteen_bits(channels: int, kind: str = ".png") -> bytes:
    shape = (40, 50, channels) if channels > 1 else (40, 50)
    return cv2.imencode(kind, np.random.default_rng(2).integers(0, 65536, shape, np.uint16))[1].tobytes()


def photo() -> Image.Image:
    return Image.open(PHOTOGRAPHS / "china.jpg").crop((100, 50, 311, 207))  # odd edges


def with_alpha() -> Image.Image:
    image = photo().convert("RGBA")
    image.putalpha(Image.fromarray(np.random.default_rng(1).integers(0, 256, image.size[::-1], np.uint8)))
    return image


def inks() -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (10, 12, 4), np.uint8)
    return Image.fromarray(values.repeat(8, 0).repeat(8, 1), "CMYK")


def ycck() -> bytes:
    """Photoshop's other form of CMYK: the same file, its Adobe marker saying that the inks are in YCbCr."""
    data = bytearray(encoded(photo().convert("CMYK"), "JPEG", quality=90))
    data[data.index(b"Adobe") + 11] = 2
    return bytes(data)


FILES = {
    "photograph": lambda: (PHOTOGRAPHS / "flower.jpg").read_bytes(),
    "JPEG 4:4:4": lambda: encoded(photo(), "JPEG", subsampling=0, quality=95),
    "JPEG 4:2:2": lambda: encoded(photo(), "JPEG", subsampling=1, quality=50),
    "JPEG 4:2:0": lambda: encoded(photo(), "JPEG", subsampling=2, quality=30),
    "JPEG 4:1:1": lambda: encoded(photo(), "JPEG", subsampling="4:1:1"),
    "JPEG progressive": lambda: encoded(photo(), "JPEG", progressive=True),
    "JPEG of 1x1": lambda: encoded(photo().crop((0, 0, 1, 1)), "JPEG"),
    "JPEG of 3x2": lambda: encoded(photo().crop((0, 0, 3, 2)), "JPEG"),
    "JPEG in RGB": lambda: encoded(photo(), "JPEG", keep_rgb=True),
    "JPEG grey": lambda: encoded(photo().convert("L"), "JPEG"),
    "JPEG grey, turned": lambda: encoded(photo().convert("L"), "JPEG", exif=turned(6)),
    "JPEG CMYK": lambda: encoded(inks(), "JPEG", quality=95),
    "JPEG CMYK, turned": lambda: encoded(inks(), "JPEG", exif=turned(8)),
    "JPEG YCCK": ycck,
    **{f"JPEG turned {k}": lambda k=k: encoded(photo(), "JPEG", exif=turned(k)) for k in range(1, 9)},
    "PNG": lambda: encoded(photo(), "PNG"),
    "PNG turned": lambda: encoded(photo(), "PNG", exif=turned(6)),
    "PNG grey": lambda: encoded(photo().convert("L"), "PNG"),
    "PNG of 1 bit": lambda: encoded(photo().convert("1"), "PNG"),
    "PNG palette": lambda: encoded(photo().quantize(64), "PNG"),
    "PNG palette, transparent": lambda: encoded(photo().quantize(32), "PNG", transparency=3),
    "PNG RGB, transparent": lambda: encoded(photo(), "PNG", transparency=(10, 20, 30)),
    "PNG alpha": lambda: encoded(with_alpha(), "PNG"),
    "PNG grey and alpha": lambda: encoded(with_alpha().convert("LA"), "PNG"),
    "PNG grey of 16 bits": lambda: sixteen_bits(1),
    "PNG of 16 bits": lambda: sixteen_bits(3),
    "PNG alpha of 16 bits": lambda: sixteen_bits(4),
    "WebP": lambda: encoded(photo(), "WEBP", quality=80),
    "WebP alpha": lambda: encoded(with_alpha(), "WEBP", lossless=True, exact=True),
    "TIFF": lambda: encoded(photo(), "TIFF"),
    "TIFF turned": lambda: encoded(photo(), "TIFF", exif=turned(6)),
    "TIFF CMYK": lambda: encoded(photo().convert("CMYK"), "TIFF"),
    "TIFF grey of 16 bits": lambda: sixteen_bits(1, ".tiff"),
    "BMP": lambda: encoded(photo(), "BMP"),
    "PPM": lambda: encoded(photo(), "PPM"),
}


@pytest.mark.parametrize("name", FILES)
def test_pixels_of_opencv(name):
    """The reference reads files by cv2.imdecode, so OpenCV itself is the golden decoder here."""
    data = FILES[name]()
    theirs = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
    np.testing.assert_array_equal(decode(data), theirs)


@pytest.mark.parametrize("name", ["photograph", "JPEG 4:2:0", "JPEG grey", "JPEG turned 5"])
def test_pixels_of_opencv_without_the_fast_decoder(name, monkeypatch):
    monkeypatch.setattr(decoding, "simplejpeg", None)
    test_pixels_of_opencv(name)


def test_turned_files_are_turned_back():
    """Against the pixels as stored, so that two decoders that both ignore EXIF would not pass."""
    plain = decode(encoded(photo(), "JPEG"))
    assert decode(encoded(photo(), "JPEG", exif=turned(6))).shape == (plain.shape[1], plain.shape[0], 3)
    np.testing.assert_array_equal(decode(encoded(photo(), "JPEG", exif=turned(3))), plain[::-1, ::-1])
    webp = encoded(photo(), "WEBP", lossless=True, exif=turned(3))  # OpenCV 5 turns it too, 4 did not
    np.testing.assert_array_equal(decode(webp), np.asarray(photo())[::-1, ::-1])


def test_known_differences_from_opencv():
    """What the docstring of `decode` owns up to."""
    data = sixteen_bits(3, ".tiff")
    theirs = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
    assert np.abs(decode(data).astype(int) - theirs).max() == 1
    np.testing.assert_array_equal(decode(encoded(with_alpha(), "TIFF")), np.asarray(photo()))
    with pytest.raises(BadImage, match="no fixed range"):
        decode(cv2.imencode(".tiff", np.zeros((4, 4), np.float32))[1].tobytes())
