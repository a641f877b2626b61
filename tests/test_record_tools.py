"""Converters: folders to ArrayRecord, parts of ImageNet's labels, iNaturalist's lists; and what records hold."""

from __future__ import annotations

import io
import json
import os
import pickle
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from jaxpretrain import cli
from jaxpretrain.build import ConfigError
from jaxpretrain.data.decode import decode
from jaxpretrain.data.records import ArrayRecordDataset, TFDSDataset, decode_record, encode_record, write_array_record
from jaxpretrain.data.sources import CustomDataset, Digits, ImageNet
from jaxpretrain.data.subset import Subset
from jaxpretrain.tools import convert_inaturalist, folder_to_array_record, imagenet_subset


def png(level: int, size=(4, 3), form="PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (level,) * 3).save(buffer, form)
    return buffer.getvalue()


def fill(root, names, size=(4, 3)):
    for i, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(i, size))
    return root


def contents(source) -> list[tuple[int, int]]:
    return [(int(decode(source[i]["image"])[0, 0, 0]), source[i]["label"]) for i in range(len(source))]


# ---------------------------------------------------------------------------------------------------------------------
# Records


def test_labels_of_every_kind():
    several = np.array([1, 0, -1], np.int8)
    for label in (3, -1, several, {"colour": 2, "parts": several}):
        sample = decode_record(encode_record({"image": b"x", "label": label, "path": "a/b"}))
        np.testing.assert_equal(sample["label"], label)
        assert sample["image"] == b"x" and sample["path"] == "a/b"
    assert decode_record(encode_record({"image": b"x", "label": several}))["label"].dtype == np.int8


def test_labels_are_known_without_reading(tmp_path, monkeypatch):
    for shard in range(2):
        write_array_record(tmp_path / f"x-{shard}.array_record", [dict(image=b"i", label=shard + i) for i in range(3)])
    source = ArrayRecordDataset(str(tmp_path))
    monkeypatch.setattr(ArrayRecordDataset, "__getitem__", None)
    assert source.labels.tolist() == [0, 1, 2, 1, 2, 3] and source.num_classes == 4
    assert ArrayRecordDataset(str(tmp_path), indices=[4, 0]).labels.tolist() == [2, 0]
    assert Subset(source, fraction=0.01).labels.tolist() == [0, 1, 2, 3]
    monkeypatch.undo()
    (tmp_path / "x-0.array_record.labels.npy").unlink()
    source = ArrayRecordDataset(str(tmp_path))
    assert source.labels is None and source.num_classes == 4, "found in the records"
    several = [dict(image=b"i", label=np.array([1, 0, 1], np.int8)) for _ in range(2)]
    write_array_record(tmp_path / "m.array_record", several, compress=False)
    source = ArrayRecordDataset(str(tmp_path / "m.array_record"))
    assert source.labels.tolist() == [[1, 0, 1]] * 2 and source.labels.dtype == np.int8 and source.num_classes == 3
    # A shard of other labels that replaces another does not keep its labels.
    write_array_record(tmp_path / "m.array_record", [dict(image=b"i", label={"a": 1})])
    source = ArrayRecordDataset(str(tmp_path / "m.array_record"))
    assert source.labels is None and source.num_classes is None and source[0]["label"] == {"a": 1}


def test_splits_and_parts(tmp_path):
    for name, level in (("train-00000-of-00002", 0), ("train-00001-of-00002", 1), ("val-00000-of-00001", 2)):
        write_array_record(tmp_path / f"{name}.array_record", [dict(image=png(level), label=level)])
    assert contents(ArrayRecordDataset(str(tmp_path), split="train")) == [(0, 0), (1, 1)]
    assert contents(ArrayRecordDataset("train-{00000..00001}-of-00002.array_record", str(tmp_path), indices=-1)) == [
        (1, 1)
    ]
    with pytest.raises(ConfigError, match="no split 'trian'.*'train'"):
        ArrayRecordDataset(str(tmp_path), split="trian")
    with pytest.raises(ConfigError, match=r"no file .*lost\.array_record; .* has train-00000"):
        ArrayRecordDataset("lost.array_record", str(tmp_path))


def test_parts_of_tfds(tmp_path):
    from .tiny_tfds import TinyTfds

    TinyTfds(data_dir=str(tmp_path), file_format="array_record").download_and_prepare()
    whole = contents(TFDSDataset("tiny_tfds", "train", str(tmp_path)))
    part = TFDSDataset("tiny_tfds", "train", str(tmp_path), indices=[4, 1])
    assert contents(part) == [whole[4], whole[1]] == contents(pickle.loads(pickle.dumps(part)))


# ---------------------------------------------------------------------------------------------------------------------
# Folders to ArrayRecord

convert = folder_to_array_record.main


@pytest.fixture
def images(tmp_path):
    return fill(tmp_path / "images", [f"{c}/{i}.png" for c in ("cat", "dog") for i in range(5)])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_folder(images, tmp_path, capsys, workers):
    dst = tmp_path / "records"
    assert convert([str(images), f"--dst={dst}", "--shard-size=3", f"--num-workers={workers}"]) == cli.OK
    files = sorted(path.name for path in dst.glob("*.array_record"))
    assert files == [f"train-{i:05d}-of-00004.array_record" for i in range(4)]
    source = ArrayRecordDataset(str(dst))
    original = CustomDataset(str(images))
    assert len(source) == 10 and source.classes == ("cat", "dog") and source.labels.tolist() == [0] * 5 + [1] * 5
    for i in range(10):
        assert source[i]["image"] == original[i]["image"] and source[i]["label"] == original[i]["label"]
        assert source[i]["path"] == os.path.relpath(original.name(i), images)
    out = capsys.readouterr().out
    assert "10 records in 4 shards" in out and f"paths='{dst}', split='train'" in out
    assert contents(ImageNet(str(dst), "train")) == contents(original)
    assert ImageNet(str(dst), "train").labels.tolist() == original.labels.tolist()


def test_pixels_and_configs(tmp_path):
    assert convert(["configs/mae.py:digits", "--split=val", f"--dst={tmp_path}"]) == cli.OK
    source, digits = ArrayRecordDataset(str(tmp_path), split="val"), Digits("val")
    assert len(source) == 297 and source.classes == digits.classes
    assert [source[i]["label"] for i in range(297)] == digits.labels.tolist()


def test_smaller_images(tmp_path):
    images = fill(tmp_path / "images", ["a/large.png", "a/wide.png"], (80, 40))
    (images / "a/wide.png").write_bytes(png(200, (33, 10)))
    (images / "a/noise.jpg").write_bytes(png(77, (41, 300), "JPEG"))
    dst = tmp_path / "records"
    assert convert([str(images), f"--dst={dst}", "--short-edge=20", "--quality=90"]) == cli.OK
    source = ArrayRecordDataset(str(dst))
    by_path = {source[i]["path"]: source[i]["image"] for i in range(3)}
    assert by_path["a/wide.png"] == (images / "a/wide.png").read_bytes(), "small ones stay as they are"
    assert decode(by_path["a/large.png"]).shape == (20, 40, 3) and by_path["a/large.png"][:2] == b"\xff\xd8"
    noise = decode(by_path["a/noise.jpg"])
    assert noise.shape == (146, 20, 3) and abs(noise.mean() - 77) < 1


def test_quality():
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    high, low = (folder_to_array_record.encode_jpeg(pixels, quality) for quality in (95, 30))
    assert len(low) < len(high) / 2
    smooth = np.add.outer(np.arange(64), np.arange(64))[..., None].astype(np.uint8).repeat(3, -1)
    again = decode(folder_to_array_record.smaller(png(0, (200, 100)), 64, 95))
    assert again.shape == (64, 128, 3)
    assert np.abs(decode(folder_to_array_record.encode_jpeg(smooth, 95)).astype(int) - smooth).max() < 6


def test_bad_images(images, tmp_path, capsys):
    (images / "cat/2.png").write_bytes(b"")
    dst = tmp_path / "records"
    argv = [str(images), f"--dst={dst}", "--shard-size=4"]
    assert cli.run(convert, argv) == cli.FAILED
    err = capsys.readouterr().err
    assert "1 of 10 images cannot be read" in err and "cat/2.png: empty file" in err and "verify_dataset" in err
    assert cli.run(convert, [*argv, "--max-bad=0.1"]) == cli.OK
    assert contents(ArrayRecordDataset(str(dst))) == [(i, i // 5) for i in range(10) if i != 2]
    assert "empty file" in (dst / "train.bad_images.txt").read_text()


def test_going_on(images, tmp_path, capsys):
    dst = tmp_path / "records"
    argv = [str(images), f"--dst={dst}", "--shard-size=3"]
    assert convert(argv) == cli.OK
    whole = [path.read_bytes() for path in sorted(dst.glob("*.array_record"))]
    times = {path: path.stat().st_mtime_ns for path in dst.glob("*.array_record")}
    lost = dst / "train-00002-of-00004.array_record"
    lost.unlink()
    (dst / f"{lost.name}.partial").write_bytes(b"half of it")
    assert convert(argv) == cli.OK
    assert "3 of 4 shards are there already" in capsys.readouterr().out
    assert [path.read_bytes() for path in sorted(dst.glob("*.array_record"))] == whole
    assert all(path.stat().st_mtime_ns == times[path] for path in times if path != lost)
    assert not list(dst.glob("*.partial"))
    # Other work does not mix with it.
    assert cli.run(convert, [*argv, "--short-edge=8"]) == cli.USAGE
    assert "other work (short_edge, quality changed since)" in capsys.readouterr().err
    assert convert([str(images), f"--dst={dst}", "--shard-size=5", "--restart"]) == cli.OK
    assert len(list(dst.glob("*.array_record"))) == 2 and len(ArrayRecordDataset(str(dst))) == 10
    (dst / "train.conversion.log").unlink()
    assert cli.run(convert, argv) == cli.USAGE
    assert "already has shards of this name" in capsys.readouterr().err


def test_going_on_after_a_kill(images, tmp_path):
    dst = tmp_path / "records"
    slow = (
        "import sys, time\n"
        "from jaxpretrain.tools import folder_to_array_record as f\n"
        "encode = f.smaller\n"
        "f.smaller = lambda *a: time.sleep(0.2) or encode(*a)\n"
        "f.main(sys.argv[1:])\n"
    )
    argv = [str(images), f"--dst={dst}", "--shard-size=2", "--short-edge=100", "--num-threads=1"]
    process = subprocess.Popen(
        [sys.executable, "-c", slow, *argv], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    log = dst / "train.conversion.log"
    deadline = time.time() + 60
    while not (log.exists() and '"shard": 1' in log.read_text()) and time.time() < deadline:
        time.sleep(0.02)
    time.sleep(0.1)  # into the next shard
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    done = sorted(dst.glob("*.array_record"))
    assert 2 <= len(done) < 5
    times = [path.stat().st_mtime_ns for path in done[:2]]
    assert convert(argv) == cli.OK
    assert [path.stat().st_mtime_ns for path in done[:2]] == times, "complete shards are not written again"
    assert contents(ArrayRecordDataset(str(dst))) == contents(CustomDataset(str(images)))
    assert not list(dst.glob("*.partial"))


def test_a_shard_that_lacks_records(images, tmp_path, capsys):
    dst = tmp_path / "records"
    argv = [str(images), f"--dst={dst}", "--shard-size=5"]
    assert convert(argv) == cli.OK
    write_array_record(dst / "train-00001-of-00002.array_record", [dict(image=png(1), label=0)])
    assert cli.run(convert, argv) == cli.FAILED
    assert "train-00001-of-00002.array_record has 1 records, but 5 were written" in capsys.readouterr().err


def test_mistakes(images, capsys):
    for argv, message in (
        ([str(images)], "--dst is needed"),
        ([str(images), "--dst=x", "--quality=90"], "--quality goes with --short-edge"),
        ([str(images), "--dst=x", "--short-edge=9", "--quality=101"], "at most 100"),
        ([str(images), "--dst=x", "--max-bad=few"], "--max-bad=few"),
    ):
        assert cli.run(convert, argv) == cli.USAGE
        assert message in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# Parts of ImageNet


@pytest.fixture
def imagenet(tmp_path):
    names = [f"train/n{c:02d}/n{c:02d}_{i}.JPEG" for c in range(3) for i in range(20)]
    return fill(tmp_path / "imagenet", names)


def rows(path):
    return [(name, int(label)) for name, label in (line.rsplit(" ", 1) for line in path.read_text().splitlines())]


def test_fractions(imagenet, capsys):
    main = imagenet_subset.main
    assert main([str(imagenet), "--fraction=0.1"]) == cli.OK
    out = capsys.readouterr().out
    assert "6 of 60 images, 3 classes" in out
    listed = rows(imagenet / "meta/train_10percent.txt")
    assert [label for _, label in listed] == [0, 0, 1, 1, 2, 2]
    part = eval(out.splitlines()[-1].removeprefix("dataset = "))
    source = ImageNet(**{name: value for name, value in part.items() if name != "type"})
    assert [source[i]["label"] for i in range(6)] == [0, 0, 1, 1, 2, 2]
    whole = Subset(ImageNet(str(imagenet), "train"), 0.1)
    assert [source.name(i) for i in range(6)] == [whole.name(i) for i in range(6)]
    assert main([str(imagenet), "--fraction=0.01", f"--out-file={imagenet}/one.txt"]) == cli.OK
    assert set(rows(imagenet / "one.txt")) < set(listed), "smaller fractions are parts of larger ones"
    assert main([str(imagenet), "--fraction=0.1", "--seed=1", f"--out-file={imagenet}/other.txt"]) == cli.OK
    assert rows(imagenet / "other.txt") != listed
    assert main([str(imagenet), "--fraction=0.1", "--rest"]) == cli.OK
    rest = rows(imagenet / "meta/train_10percent_rest.txt")
    assert len(rest) == 54 and not set(rest) & set(listed)


def test_published_lists(imagenet, tmp_path, monkeypatch):
    names = tmp_path / "1percent.txt"
    names.write_text("n01_3.JPEG\nn00_7.JPEG\n")
    assert imagenet_subset.main([str(imagenet), f"--names={names}"]) == cli.OK
    assert rows(imagenet / "meta/train_1percent.txt") == [("n00/n00_7.JPEG", 0), ("n01/n01_3.JPEG", 1)]
    asked = []
    monkeypatch.setattr("jaxpretrain.zoo.download.download", lambda url: asked.append(url) or names)
    assert imagenet_subset.main([str(imagenet), "--names=10percent"]) == cli.OK
    assert asked == [imagenet_subset.PUBLISHED["10percent"]] and "imagenet_subsets/10percent.txt" in asked[0]
    assert len(rows(imagenet / "meta/train_10percent.txt")) == 2


def test_mistakes_about_parts(imagenet, capsys):
    for argv, message in (
        ([str(imagenet)], "either fraction"),
        ([str(imagenet), "--fraction=2"], "above 0 and at most 1"),
        ([str(imagenet), "--fraction=ten"], "--fraction=ten must be a number"),
        ([str(imagenet), "--names=lost.txt"], "no file lost.txt"),
    ):
        assert cli.run(imagenet_subset.main, argv) == cli.USAGE
        assert message in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# iNaturalist


def inaturalist(labels: dict[str, int], categories=("wolf", "fox", "bear")) -> dict:
    images = [{"id": 100 + i, "file_name": name} for i, name in enumerate(labels)]
    annotations = [{"id": i, "image_id": 100 + i, "category_id": label} for i, label in enumerate(labels.values())]
    content = {"images": images, "annotations": annotations[::-1]}  # in no order
    if categories:
        content["categories"] = [{"id": i, "name": name} for i, name in enumerate(categories)][::-1]
    return content


def test_inaturalist(tmp_path, capsys):
    train = {"train_val2018/Mammalia/2/a.jpg": 2, "train_val2018/Mammalia/0/b.jpg": 0}
    fill(tmp_path, train)
    (tmp_path / "train2018.json").write_text(json.dumps(inaturalist(train)))
    (tmp_path / "val2018.json").write_text(json.dumps(inaturalist({"train_val2018/Mammalia/1/c.jpg": 1})))
    (tmp_path / "categories.json").write_text("[]")
    assert convert_inaturalist.main([str(tmp_path)]) == cli.OK
    assert rows(tmp_path / "meta/train.txt") == list(train.items())
    assert rows(tmp_path / "meta/val.txt") == [("train_val2018/Mammalia/1/c.jpg", 1)]
    assert (tmp_path / "meta/classes.txt").read_text() == "wolf\nfox\nbear\n"
    out = capsys.readouterr().out
    assert "meta/train.txt: 2 images of 2 classes" in out and "1 of its first 1 images are not under" in out
    source = CustomDataset(str(tmp_path), ann_file="meta/train.txt", classes=str(tmp_path / "meta/classes.txt"))
    assert contents(source) == [(0, 2), (1, 0)]
    assert convert_inaturalist.main([str(tmp_path), "--strip=train_val2018/", f"--out-folder={tmp_path}/x"]) == cli.OK
    assert rows(tmp_path / "x/val.txt") == [("Mammalia/1/c.jpg", 1)]


def test_categories_of_other_years():
    content = inaturalist({"a.jpg": 1, "b.jpg": 0})
    for row in [*content["annotations"]]:
        row["category_id"] = 10 * row["category_id"] + 5
    content["categories"] = [{"id": 15, "name": "y"}, {"id": 5, "name": "x"}]
    assert convert_inaturalist.image_list(content) == ([("a.jpg", 1), ("b.jpg", 0)], ["x", "y"])
    assert convert_inaturalist.image_list(inaturalist({"a.jpg": 7}, ())) == ([("a.jpg", 7)], []), "ids are labels"


def test_mistakes_about_inaturalist(tmp_path, capsys):
    main = convert_inaturalist.main
    assert cli.run(main, []) == cli.USAGE
    (tmp_path / "photo.jpg").touch()
    assert cli.run(main, [str(tmp_path)]) == cli.USAGE
    assert "has no train2018.json or val2018.json; it has photo.jpg" in capsys.readouterr().err
    for content, message in (
        ("{", "is not a json file of iNaturalist"),
        (json.dumps({"images": []}), "is not a json file of iNaturalist: KeyError"),
        (json.dumps({**inaturalist({"a.jpg": 0}), "annotations": []}), "image a.jpg has no annotation"),
    ):
        (tmp_path / "train2018.json").write_text(content)
        assert cli.run(main, [str(tmp_path)]) == cli.USAGE
        assert message in capsys.readouterr().err
