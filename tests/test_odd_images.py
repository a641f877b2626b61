"""Files that are no ordinary photographs, each through the loader: pixels as they should be, or refused by name."""

from __future__ import annotations

import io
import logging
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from jaxpretrain.data import decode
from jaxpretrain.data.pipeline import EvalLoader, TooManyBadImages, TrainLoader

# Four coloured quarters: red and green above, blue and yellow below.
QUARTERS = np.asarray([[[200, 30, 30], [30, 200, 30]], [[30, 30, 200], [200, 200, 30]]], np.uint8)
PICTURE = QUARTERS.repeat(24, 0).repeat(32, 1)
GREY = np.asarray([[40, 80], [120, 200]], np.uint8).repeat(24, 0).repeat(32, 1)


def encoded(image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def turned(orientation: int) -> bytes:
    """A JPEG stored so that this orientation shows PICTURE."""
    inverse = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]  # Image.Transpose
    stored = Image.fromarray(PICTURE)
    stored = stored if inverse is None else stored.transpose(inverse)
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(stored, "JPEG", exif=exif, quality=95)


def with_alpha() -> Image.Image:
    """Half transparent on one side: the colour stays, alpha is dropped."""
    alpha = np.full(PICTURE.shape[:2], 255, np.uint8)
    alpha[:, :32] = 10
    return Image.fromarray(np.dstack([PICTURE, alpha]))


def frames() -> list[Image.Image]:
    return [Image.fromarray(255 - PICTURE) for _ in range(2)]


def png_of_16_bits() -> bytes:
    """RGB with 16 bits for each colour, which Pillow cannot write: the high byte is PICTURE."""
    rows = (PICTURE.astype(">u2") * 256 + 77).astype(">u2")
    data = b"".join(b"\0" + row.tobytes() for row in rows)

    def block(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", PICTURE.shape[1], PICTURE.shape[0], 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + block(b"IHDR", header) + block(b"IDAT", zlib.compress(data)) + block(b"IEND", b"")


GOOD = {
    "gif": (lambda: encoded(PICTURE, "GIF"), PICTURE),
    "gif, animated": (
        lambda: encoded(PICTURE, "GIF", save_all=True, append_images=frames()),
        PICTURE,
    ),
    "gif, transparent": (lambda: encoded(Image.fromarray(PICTURE).quantize(4), "GIF", transparency=0), PICTURE),
    "png": (lambda: encoded(PICTURE, "PNG"), PICTURE),
    "png, alpha": (lambda: encoded(with_alpha(), "PNG"), PICTURE),
    "png, palette": (lambda: encoded(Image.fromarray(PICTURE).quantize(4), "PNG"), PICTURE),
    "png, grey and alpha": (lambda: encoded(Image.fromarray(GREY).convert("LA"), "PNG"), GREY),
    "png, 1 bit": (lambda: encoded(Image.fromarray(GREY > 100), "PNG"), np.where(GREY > 100, 255, 0)),
    "png, 16 bits grey": (lambda: encoded(GREY.astype(np.uint16) * 256 + 99, "PNG"), GREY),
    "png, 16 bits": (png_of_16_bits, PICTURE),
    "jpeg, grey": (lambda: encoded(GREY, "JPEG", quality=95), GREY),
    "jpeg, cmyk": (lambda: encoded(Image.fromarray(PICTURE).convert("CMYK"), "JPEG", quality=95), PICTURE),
    "jpeg, progressive": (lambda: encoded(PICTURE, "JPEG", quality=95, progressive=True), PICTURE),
    "webp, alpha": (lambda: encoded(with_alpha(), "WEBP", lossless=True, exact=True), PICTURE),
    "bmp": (lambda: encoded(PICTURE, "BMP"), PICTURE),
    "tiff, 16 bits": (lambda: encoded(GREY.astype(np.uint16) * 256 + 99, "TIFF"), GREY),
    "1x1": (lambda: encoded(PICTURE[:1, :1], "PNG"), PICTURE[:1, :1]),
    "1x1, jpeg": (lambda: encoded(PICTURE[:1, :1], "JPEG", quality=95), PICTURE[:1, :1]),
    "1 pixel wide": (lambda: encoded(PICTURE[:, :1], "JPEG", quality=95), PICTURE[:, :1]),
    "10,000x10,000, jpeg": (
        lambda: encoded(Image.new("RGB", (10_000, 10_000), (30, 200, 30)), "JPEG"),
        QUARTERS[:1, 1:],
    ),
    "10,000x10,000, png": (lambda: encoded(Image.new("P", (10_000, 10_000), 0), "PNG"), np.zeros((1, 1, 3))),
    **{f"exif {n}": (lambda n=n: turned(n), PICTURE) for n in range(1, 9)},
}
BAD = {
    "empty": (lambda: b"", "empty file"),
    "text": (lambda: b"<html>not found</html>", "not an image"),
    "truncated": (lambda: encoded(PICTURE, "PNG")[:60], ""),
    "floats": (lambda: encoded(np.float32(GREY), "TIFF"), "floating-point pixels"),
    "a bomb": (
        lambda: encoded(Image.new("1", (20_000, 10_000)), "PNG"),
        "DecompressionBombError: Image size (200000000 pixels) exceeds limit",
    ),
}


@pytest.fixture(scope="module")
def cached():
    """The bytes of each file, made once: large ones take a second."""
    made: dict[str, bytes] = {}
    return lambda name, make: made.setdefault(name, make())


def split(tmp_path, data: bytes, steps=(), copies: int = 1):
    (tmp_path / "class").mkdir()
    for i in range(copies):
        (tmp_path / "class" / f"odd{i}.img").write_bytes(data)
    dataset = dict(type="CustomDataset", data_root=str(tmp_path), extensions=(".img",))
    return dict(dataset=dataset, pipeline=[*steps, dict(type="Resize", scale=(32, 24), interpolation="area")])


CASES = [
    pytest.param(name, scaled, marks=pytest.mark.slow if "10,000" in name and not scaled else (), id=f"{name}{how}")
    for name in GOOD
    for scaled, how in ((False, ""), (True, ", scaled"))
    if not scaled or "jpeg" in name or "exif" in name  # nothing else is decoded at other sizes
]


@pytest.mark.filterwarnings("ignore:Image size:PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(("name", "scaled"), CASES)
def test_read(name, scaled, tmp_path, cached):
    make, expected = GOOD[name]
    steps = [dict(type="LoadImageFromFile", scaled=True)] if scaled else []
    batch = next(iter(EvalLoader(split(tmp_path, cached(name, make), steps), batch_size=1)))
    assert batch["valid"].all() and batch["image"].shape == (1, 24, 32, 3)
    expected = np.asarray(expected)
    expected = expected[..., None].repeat(3, -1) if expected.ndim == 2 else expected
    rows = (np.arange(24) + 0.5) * expected.shape[0] / 24
    columns = (np.arange(32) + 0.5) * expected.shape[1] / 32
    wanted = expected[rows.astype(int)][:, columns.astype(int)].astype(int)
    far_from_edges = np.s_[[4, 5, 18, 19]]
    difference = abs(batch["image"][0] - wanted)[far_from_edges][:, [4, 5, 26, 27]]
    assert difference.max() <= (6 if "jpeg" in name or "exif" in name else 1), difference.max()


@pytest.mark.parametrize("name", BAD)
def test_refused_by_name(name, tmp_path, cached, caplog):
    make, reason = BAD[name]
    config = split(tmp_path, cached(name, make), copies=2)
    (tmp_path / "class" / "good.img").write_bytes(encoded(PICTURE, "PNG"))
    with caplog.at_level(logging.WARNING):
        batch = next(iter(EvalLoader(config, batch_size=3, max_bad=1.0)))
    assert batch["valid"].tolist() == [True, False, False]  # `good` comes first
    assert f"odd1.img: {reason}" in caplog.text and batch["index"].tolist() == [0, -1, -1]
    loader = TrainLoader(config, batch_size=3, max_bad=0.1)
    with pytest.raises(TooManyBadImages, match=r"odd[01]\.img"):
        next(loader)


def test_the_limit_of_pixels(tmp_path, monkeypatch):
    """Both decoders know it, before they have the memory."""
    monkeypatch.setattr(decode, "MAX_PIXELS", PICTURE.shape[0] * PICTURE.shape[1] - 1)
    for kind in ("JPEG", "PNG"):
        with pytest.raises(decode.BadImage, match="64x48 pixels are more than the limit of 3071"):
            decode.decode(encoded(PICTURE, kind))
