"""Sources: every layout and format, decoding of every kind of file, and messages that say what to do."""

from __future__ import annotations

import gzip
import io
import pickle
import struct

import numpy as np
import pytest
from PIL import Image

from jaxpretrain.build import ConfigError, build
from jaxpretrain.data import decode as decoding
from jaxpretrain.data.decode import BadImage, as_rgb, decode
from jaxpretrain.data.sources import (
    CIFAR10,
    CIFAR100,
    MNIST,
    ArrayRecordDataset,
    CustomDataset,
    Digits,
    FashionMNIST,
    ImageNet,
    TFDSDataset,
    write_array_record,
)

PHOTO = np.add.outer(np.arange(24) * 5, np.arange(36) * 3)[..., None] + np.array([0, 20, 40])
PHOTO = PHOTO.astype(np.uint8)


def encode(pixels: np.ndarray, form: str = "PNG", mode: str | None = None, **options) -> bytes:
    image = Image.fromarray(pixels)
    buffer = io.BytesIO()
    (image.convert(mode) if mode else image).save(buffer, form, **options)
    return buffer.getvalue()


def grey(level: int) -> bytes:
    return encode(np.full((4, 6, 3), level, np.uint8))


# ---------------------------------------------------------------------------------------------------------------------
# Decoding


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_formats(form):
    assert (decode(encode(PHOTO, form)) == PHOTO).all()


def test_jpeg_as_pillow_reads_it(monkeypatch):
    data = encode(PHOTO, "JPEG", quality=95)
    fast = decode(data)
    monkeypatch.setattr(decoding, "simplejpeg", None)
    assert np.abs(fast.astype(int) - decode(data)).max() <= 1
    assert np.abs(fast.astype(int) - PHOTO).mean() < 3


def test_grey_alpha_palette_and_deep_images():
    grey_pixels = PHOTO[..., 0]
    assert (decode(encode(grey_pixels)) == grey_pixels[..., None]).all()
    assert decode(encode(grey_pixels, "JPEG")).shape == PHOTO.shape
    alpha = np.dstack([PHOTO, np.full(PHOTO.shape[:2], 7, np.uint8)])
    assert (decode(encode(alpha)) == PHOTO).all(), "alpha is dropped, not blended"
    assert (decode(encode(alpha[..., [0, 3]])) == grey_pixels[..., None]).all()
    palette = Image.fromarray(PHOTO).convert("P", palette=Image.Palette.ADAPTIVE)
    buffer = io.BytesIO()
    palette.save(buffer, "PNG", transparency=0)
    assert (decode(buffer.getvalue()) == np.asarray(palette.convert("RGB"))).all()
    assert (decode(encode(grey_pixels > 60)) == np.where(grey_pixels > 60, 255, 0)[..., None]).all()
    deep = grey_pixels.astype(np.uint16) * 256 + 99
    assert (decode(encode(deep)) == grey_pixels[..., None]).all(), "the high byte"
    assert (decode(encode(deep, "TIFF")) == grey_pixels[..., None]).all()
    with pytest.raises(BadImage, match="floating-point"):
        decode(encode(grey_pixels.astype(np.float32), "TIFF"))


def test_cmyk_jpeg_goes_through_pillow():
    data = encode(PHOTO, "JPEG", mode="CMYK", quality=100)
    assert np.abs(decode(data).astype(int) - PHOTO).mean() < 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    pixels = PHOTO.copy()
    pixels[:8, :8] = 255  # a corner to recognise
    image = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = orientation
    for form, options in (("JPEG", dict(quality=100, subsampling=0)), ("PNG", {})):
        buffer = io.BytesIO()
        image.save(buffer, form, exif=exif, **options)
        operation = {
            2: Image.Transpose.FLIP_LEFT_RIGHT,
            3: Image.Transpose.ROTATE_180,
            4: Image.Transpose.FLIP_TOP_BOTTOM,
            5: Image.Transpose.TRANSPOSE,
            6: Image.Transpose.ROTATE_270,
            7: Image.Transpose.TRANSVERSE,
            8: Image.Transpose.ROTATE_90,
        }.get(orientation)
        expected = np.asarray(image if operation is None else image.transpose(operation))
        out = decode(buffer.getvalue())
        assert out.shape == expected.shape
        assert np.abs(out.astype(int) - expected).mean() < 3


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
def test_truncated_files(form, part):
    noise = np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    data = encode(noise, form)
    with pytest.raises(BadImage):
        decode(data[: int(len(data) * part)])


def test_what_is_not_an_image():
    with pytest.raises(BadImage, match="not an image"):
        decode(b"<html>404 not found</html>")
    with pytest.raises(BadImage, match="empty file"):
        decode(b"")
    with pytest.raises(BadImage):
        decode(b"\xff\xd8\xff\xe0 no more than the first bytes of a JPEG")
    with pytest.raises(BadImage, match="uint8"):
        as_rgb(np.zeros((4, 4, 3), np.float32))


def test_harmless_defects_of_jpegs_are_read():
    data = encode(PHOTO, "JPEG", quality=95)
    assert (decode(data + b"\0\0trailing bytes") == decode(data)).all()
    spliced = data[:-2] + b"\x00\x00\x00" + data[-2:]  # "extraneous bytes before marker", as in some ImageNet files
    assert (decode(spliced) == decode(data)).all()


def test_a_decompression_bomb_is_refused(monkeypatch):
    monkeypatch.setattr(decoding, "MAX_PIXELS", 100)
    for form in ("JPEG", "PNG"):
        with pytest.raises(BadImage, match="limit"):
            decode(encode(PHOTO, form))


# ---------------------------------------------------------------------------------------------------------------------
# Digits


def test_digits():
    train, val = Digits("train"), Digits("val")
    assert (len(train), len(val), train.num_classes) == (1500, 297, 10)
    assert train[0]["image"].shape == (8, 8) and train[0]["image"].dtype == np.uint8
    assert train.images.max() == 255 and train.images.min() == 0
    assert as_rgb(train[0]["image"]).shape == (8, 8, 3)
    # The two splits share no position of the original set, and the split never changes.
    both = np.concatenate([train.images, val.images]).reshape(1797, -1)
    from sklearn.datasets import load_digits

    original = np.rint(load_digits().images * (255 / 16)).astype(np.uint8).reshape(1797, -1)
    assert (np.sort(both.astype(int) @ np.arange(64) ** 3) == np.sort(original.astype(int) @ np.arange(64) ** 3)).all()
    assert train.labels[:8].tolist() == [2, 8, 2, 6, 6, 7, 1, 9]
    assert Digits("val", size=32)[0]["image"].shape == (32, 32)
    with pytest.raises(ConfigError, match="no split 'test'.*val"):
        Digits("test")


# ---------------------------------------------------------------------------------------------------------------------
# Folders and lists


@pytest.fixture
def folder(tmp_path):
    """Classes b, a (in this order on disk), files in no order, one deeper, one that is no image."""
    for name, level in (("b/2.png", 20), ("b/1.PNG", 10), ("a/x/3.jpeg", 30), ("a/0.png", 0)):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(grey(level))
    (tmp_path / "images/a/readme.txt").write_text("no image")
    (tmp_path / "images/.cache").mkdir()
    (tmp_path / "list.txt").write_text("b/2.png 3\n\na/0.png 1\n")
    (tmp_path / "plain.txt").write_text("b/2.png\na/x/3.jpeg\n")
    return tmp_path


def levels(source) -> list[tuple[int, int]]:
    return [(int(as_rgb(source[i]["image"])[0, 0, 0]), source[i]["label"]) for i in range(len(source))]


def test_class_folders(folder):
    source = build(dict(type="CustomDataset", data_root=str(folder), data_prefix="images"))
    assert levels(source) == [(0, 0), (30, 0), (10, 1), (20, 1)]
    assert source.classes == ("a", "b") and source.num_classes == 2
    assert source[1]["path"] == source.name(1) == str(folder / "images/a/x/3.jpeg")
    assert source.labels.dtype == np.int32
    assert levels(pickle.loads(pickle.dumps(source))) == levels(source)


def test_folder_without_labels(folder):
    source = CustomDataset(str(folder), dict(img_path="images"), with_label=False)
    assert levels(source) == [(0, -1), (30, -1), (10, -1), (20, -1)]
    assert source.num_classes is None and source.classes is None


def test_text_lists(folder):
    source = CustomDataset(str(folder), "images", "list.txt")
    assert levels(source) == [(20, 3), (0, 1)] and source.num_classes == 4
    assert levels(CustomDataset(str(folder), "images", "plain.txt", with_label=False)) == [(20, -1), (30, -1)]
    names = ["w", "x", "y", "z", "one more"]
    assert CustomDataset(str(folder), "images", "list.txt", metainfo=dict(classes=names)).num_classes == 5
    (folder / "names.txt").write_text("cat\ndog\n")
    assert CustomDataset(str(folder), "images", classes=str(folder / "names.txt")).classes == ("cat", "dog")
    (folder / "images/my cat.png").write_bytes(grey(1))
    (folder / "spaces.txt").write_text("my cat.png 0\n")
    assert levels(CustomDataset(str(folder), "images", "spaces.txt")) == [(1, 0)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(data_prefix="nowhere"), "no folder .*/nowhere; set data_root"),
        (dict(data_prefix="images", ann_file="lost.txt"), "no file .*/lost.txt"),
        (dict(data_prefix="images", ann_file="plain.txt"), "plain.txt:1: expected 'path label'.*b/2.png"),
        (dict(data_prefix="images/b"), "no class sub-folders.*ann_file.*with_label=False"),
        (dict(data_prefix="images", extensions=[".gif"]), "no images in .*/images .*\\.gif"),
        (dict(data_prefix="images", classes=["only one"]), "2 class folders, but classes names 1"),
        (dict(data_prefix="images", ann_file="list.txt", classes=["a", "b"]), "labels 1..3 do not fit 2 classes"),
    ],
)
def test_mistakes_about_folders(folder, arguments, message):
    with pytest.raises(ConfigError, match=message):
        CustomDataset(str(folder), **arguments)


# ---------------------------------------------------------------------------------------------------------------------
# ImageNet


@pytest.fixture
def imagenet(tmp_path):
    for split, wnids in (("train", "n01 n02 n03"), ("val", "n01 n03")):
        for number, wnid in enumerate(wnids.split()):
            (tmp_path / split / wnid).mkdir(parents=True)
            (tmp_path / split / wnid / f"{wnid}_0.JPEG").write_bytes(grey(10 * number))
    return tmp_path


def test_imagenet_class_folders(imagenet):
    assert levels(ImageNet(str(imagenet), "train")) == [(0, 0), (10, 1), (20, 2)]
    val = ImageNet(str(imagenet), "val")
    assert levels(val) == [(0, 0), (10, 2)], "a class missing in val does not shift the labels"
    assert val.classes == ("n01", "n02", "n03") and val.num_classes == 3
    (imagenet / "val/n09").mkdir()
    with pytest.raises(ConfigError, match="n09"):
        ImageNet(str(imagenet), "val")


def test_imagenet_with_lists(imagenet):
    (imagenet / "meta").mkdir()
    (imagenet / "val/ILSVRC2012_val_00000001.JPEG").write_bytes(grey(99))
    (imagenet / "meta/val.txt").write_text("ILSVRC2012_val_00000001.JPEG 65\n")
    source = ImageNet(str(imagenet), "val")
    assert levels(source) == [(99, 65)] and source.num_classes == 1000
    old_style = ImageNet(str(imagenet), ann_file="meta/val.txt", data_prefix=dict(img_path="val/"))
    assert levels(old_style) == [(99, 65)]


def test_imagenet_shards(tmp_path):
    samples = [dict(image=grey(i), label=i) for i in range(5)]
    write_array_record(tmp_path / "train-00000-of-00002.array_record", samples[:3])
    write_array_record(tmp_path / "train-00001-of-00002.array_record", samples[3:])
    source = ImageNet(str(tmp_path), "train")
    assert levels(source) == [(i, i) for i in range(5)] and source.num_classes == 1000
    assert levels(pickle.loads(pickle.dumps(source))) == levels(source)


def test_imagenet_missing(tmp_path):
    with pytest.raises(ConfigError) as caught:
        ImageNet(str(tmp_path / "imagenet"), "train")
    message = str(caught.value)
    assert str(tmp_path / "imagenet/train") in message
    assert "train/<wnid>/*.JPEG" in message and "meta/train.txt" in message and "array_record" in message
    assert "--config.data.train.dataset.data_root=" in message and ":digits" in message
    with pytest.raises(ConfigError, match="--config.data.val.dataset.data_root="):
        ImageNet(str(tmp_path), "val")
    (tmp_path / "val").mkdir()
    (tmp_path / "val/1.JPEG").write_bytes(grey(0))
    with pytest.raises(ConfigError, match="no class folders, and there is no meta/val.txt"):
        ImageNet(str(tmp_path), "val")
    with pytest.raises(ConfigError, match="Did you mean 'train'"):
        ImageNet(str(tmp_path), "trian")


# ---------------------------------------------------------------------------------------------------------------------
# Binary formats


def cifar_pixels(count: int) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, 3072), dtype=np.uint8)


def check_cifar(source, pixels, labels):
    assert len(source) == len(labels)
    sample = source[1]
    assert sample["image"].shape == (32, 32, 3) and sample["label"] == labels[1]
    # The files hold the red plane, then the green, then the blue, each by rows.
    assert sample["image"][2, 5].tolist() == [pixels[1, plane * 1024 + 2 * 32 + 5] for plane in range(3)]


@pytest.mark.parametrize("inside", [True, False])
def test_cifar10(tmp_path, inside):
    python, binary = tmp_path / "cifar-10-batches-py", tmp_path / "bin"
    python.mkdir()
    binary.mkdir()
    pixels, labels = cifar_pixels(10), np.arange(10)
    for i in range(5):
        part = slice(2 * i, 2 * i + 2)
        # Protocol 2, and bytes for keys after "latin1": as Python 2 wrote the published files.
        batch = {"data": pixels[part], "labels": labels[part].tolist(), "batch_label": "b", "filenames": ["a", "b"]}
        (python / f"data_batch_{i + 1}").write_bytes(pickle.dumps(batch, protocol=2))
        records = np.concatenate([labels[part, None].astype(np.uint8), pixels[part]], axis=1)
        (binary / f"data_batch_{i + 1}.bin").write_bytes(records.tobytes())
    check_cifar(CIFAR10(str(python if inside else tmp_path), "train"), pixels, labels)
    check_cifar(CIFAR10(str(binary), "train"), pixels, labels)
    assert CIFAR10(str(python)).classes[3] == "cat"
    with pytest.raises(ConfigError, match=r"test_batch.*cs\.toronto\.edu.*data_root"):
        CIFAR10(str(tmp_path), "test")
    with pytest.raises(ConfigError, match="no split 'val'"):
        CIFAR10(str(tmp_path), "val")


def test_cifar100(tmp_path):
    pixels, labels = cifar_pixels(3), [99, 98, 97]
    batch = {"data": pixels, "fine_labels": labels, "coarse_labels": [0, 1, 2]}
    (tmp_path / "train").write_bytes(pickle.dumps(batch, protocol=2))
    check_cifar(CIFAR100(str(tmp_path)), pixels, labels)
    (tmp_path / "train").unlink()
    records = np.concatenate([np.array([[1, 99], [2, 98], [3, 97]], np.uint8), pixels], axis=1)
    (tmp_path / "train.bin").write_bytes(records.tobytes())
    source = CIFAR100(str(tmp_path))
    check_cifar(source, pixels, labels)
    assert source.num_classes == 100 and source.classes[99] == "worm"


class Malicious:
    def __reduce__(self):
        return (print, ("this code must not run",))


def test_pickles_cannot_run_code(tmp_path, capsys):
    for content in (Malicious(), {"data": Malicious(), "labels": [0]}):
        (tmp_path / "test_batch").write_bytes(pickle.dumps(content))
        with pytest.raises(ConfigError, match=r"refused to load builtins\.print"):
            CIFAR10(str(tmp_path), "test")
    assert capsys.readouterr().out == ""
    for content in (b"", b"garbage", pickle.dumps({"data": np.zeros((2, 5), np.uint8), "labels": [0, 1]})):
        (tmp_path / "test_batch").write_bytes(content)
        with pytest.raises(ConfigError, match="test_batch"):
            CIFAR10(str(tmp_path), "test")


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def test_mnist(tmp_path):
    images = np.arange(2 * 28 * 28, dtype=np.uint32).astype(np.uint8).reshape(2, 28, 28)
    labels = np.array([7, 3], np.uint8)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(images))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(labels))
    raw = tmp_path / "FashionMNIST/raw"
    raw.mkdir(parents=True)
    (raw / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
    (raw / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
    for source in (MNIST(str(tmp_path)), FashionMNIST(str(tmp_path), "test")):
        assert [source[i]["label"] for i in range(2)] == [7, 3] and source.num_classes == 10
        assert (as_rgb(source[1]["image"]) == images[1][..., None]).all()
    assert FashionMNIST(str(tmp_path), "test").classes[9] == "Ankle boot"
    with pytest.raises(ConfigError, match="t10k-images-idx3-ubyte.*data_root"):
        MNIST(str(tmp_path), "test")
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(images)[:-1])
    with pytest.raises(ConfigError, match="truncated"):
        MNIST(str(tmp_path))
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(labels))
    with pytest.raises(ConfigError, match="not an idx file"):
        MNIST(str(tmp_path))


# ---------------------------------------------------------------------------------------------------------------------
# ArrayRecord and TFDS


def test_array_records(tmp_path):
    samples = [dict(image=grey(3), label=1, path="x/y.png"), dict(image=PHOTO, label=0), dict(image=PHOTO[..., 0])]
    assert write_array_record(tmp_path / "part-0.array_record", samples, classes=["no", "yes"]) == 3
    write_array_record(tmp_path / "part-1.array_record", samples[:1])
    source = build(dict(type="ArrayRecordDataset", paths="part-*.array_record", data_root=str(tmp_path)))
    assert len(source) == 4 and source.classes == ("no", "yes") and source.num_classes == 2
    assert source[0] == samples[0] and source[3] == samples[0]
    assert (source[1]["image"] == PHOTO).all() and source[1]["label"] == 0
    assert source[2]["image"].shape == PHOTO.shape[:2] and source[2]["label"] == -1
    assert len(ArrayRecordDataset(str(tmp_path))) == 4, "a folder stands for its files"
    assert ArrayRecordDataset(str(tmp_path), num_classes=7).num_classes == 7
    (tmp_path / "classes.txt").unlink()
    assert ArrayRecordDataset(str(tmp_path)).num_classes == 2
    assert "part-0" in source.name(1)
    assert pickle.loads(pickle.dumps(source))[3] == samples[0]
    assert not list(tmp_path.glob("*.partial"))


def test_array_records_from_a_source(tmp_path):
    digits = Digits("val")
    write_array_record(tmp_path / "digits.array_record", (digits[i] for i in range(5)), digits.classes)
    source = ArrayRecordDataset(str(tmp_path / "digits.array_record"))
    assert all((source[i]["image"] == digits[i]["image"]).all() for i in range(5)) and source.num_classes == 10


def test_foreign_records(tmp_path):
    with pytest.raises(ConfigError, match=r"no file .*lost\.array_record"):
        ArrayRecordDataset("lost.array_record", data_root=str(tmp_path))
    (tmp_path / "text.array_record").write_text("not an ArrayRecord file at all " * 100)
    with pytest.raises(ConfigError, match=r"cannot read .*text\.array_record"):
        ArrayRecordDataset(str(tmp_path / "text.array_record"))
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(tmp_path / "other.array_record"), "group_size:1")
    writer.write(b"\x0a\x03abc of another program")
    writer.write(b"JPR1\xff\xff\xff\xffdamaged")
    writer.close()
    source = ArrayRecordDataset(str(tmp_path / "other.array_record"), num_classes=1)
    with pytest.raises(BadImage, match="TFDSDataset"):
        source[0]
    with pytest.raises(BadImage, match="damaged"):
        source[1]


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory):
    """A data set prepared by a builder of our own, without TensorFlow. The builder's class must be importable."""
    folder = tmp_path_factory.mktemp("tfds")
    from .tiny_tfds import TinyTfds

    TinyTfds(data_dir=str(folder), file_format="array_record").download_and_prepare()
    return folder


def test_tfds(tfds_folder):
    import sys

    source = TFDSDataset("tiny_tfds", "train", str(tfds_folder))
    assert "tensorflow" not in sys.modules
    assert len(source) == 6 and source.num_classes == 3 and source.classes == ("a", "b", "c")
    by_label = {(int(decode(source[i]["image"])[0, 0, 0]), source[i]["label"]) for i in range(6)}
    assert by_label == {(10 * i, i % 3) for i in range(6)}
    copy = pickle.loads(pickle.dumps(source))
    assert [copy[i] for i in range(6)] == [source[i] for i in range(6)]
    assert len(TFDSDataset("tiny_tfds", "train[:50%]", str(tfds_folder))) == 3
    assert TFDSDataset("tiny_tfds", "train", str(tfds_folder), label_key=None)[0]["label"] == -1


def test_mistakes_about_tfds(tfds_folder, tmp_path):
    with pytest.raises(ConfigError, match="no feature 'img'.*image"):
        TFDSDataset("tiny_tfds", "train", str(tfds_folder), image_key="img")
    with pytest.raises(ConfigError, match="split 'test' of tiny_tfds.*\n.*splits: train"):
        TFDSDataset("tiny_tfds", "test", str(tfds_folder))
    with pytest.raises(ConfigError, match="cannot load the builder 'no_such_set'"):
        TFDSDataset("no_such_set", "train", str(tmp_path))
    with pytest.raises(ConfigError, match="not ready.*\n.*download_and_prepare"):
        TFDSDataset("tiny_tfds", "train", str(tmp_path))
