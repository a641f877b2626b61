"""The cache of decoded images: that it is whole or not there, and that samples are the data set's."""

from __future__ import annotations

import collections
import json
import logging
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxpretrain.build import ConfigError, build
from jaxpretrain.cli import ExpectedFailure
from jaxpretrain.data import cache_builder
from jaxpretrain.data.base import InMemory
from jaxpretrain.data.cache import CachedDataset, building
from jaxpretrain.data.cache_builder import build_cache, shorten
from jaxpretrain.data.decode import BadImage, decode
from jaxpretrain.data.pipeline import TooManyBadImages, TrainLoader
from jaxpretrain.data.sources import CustomDataset
from jaxpretrain.data.subset import labels_of
from jaxpretrain.tools import build_cache as tool
from tests.test_cache_formats import pixels, smooth, stored


def folder_of(root: Path, count: int, sizes: tuple[int, int] = (20, 60)) -> Path:
    """PNG files in three class folders."""
    rng = np.random.default_rng(0)
    for i in range(count):
        path = root / f"c{i % 3}" / f"{i:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(smooth(rng, *rng.integers(*sizes, size=2))).save(path)
    return root


@pytest.fixture
def files(tmp_path):
    return folder_of(tmp_path / "files", 12)


# ----------------------------------------------------------------------------------------------------------------------
# The data set


@pytest.mark.parametrize("format", ["raw", "yuv420", "jpeg"])
def test_samples_are_those_of_the_data_set(files, tmp_path, format):
    plain = CustomDataset(str(files))
    cfg = dict(type="CachedDataset", dataset=dict(type="CustomDataset", data_root=str(files)), format=format)
    cached = build(dict(cfg, folder=str(tmp_path / "cache"), short_edge=30, build=True))
    assert len(cached) == len(plain) and cached.classes == plain.classes and cached.num_classes == 3
    assert (cached.labels == plain.labels).all()
    for i in range(len(plain)):
        mine, theirs = cached[i], plain[i]
        assert {k: v for k, v in mine.items() if k != "image"} == {k: v for k, v in theirs.items() if k != "image"}
        assert cached.name(i) == plain.name(i)
        expected = shorten(decode(theirs["image"]), 30)
        assert (pixels(mine["image"]) == pixels(stored(format, expected)[0])).all() and min(expected.shape[:2]) <= 30


def test_a_part_of_it_and_an_odd_folder_name(files, tmp_path):
    folder = tmp_path / "with space" / "cache.v1"
    whole = CachedDataset(CustomDataset(str(files)), str(folder), build=True)
    part = CachedDataset(CustomDataset(str(files)), str(folder), indices=[7, 2])
    assert len(part) == 2 and part.labels.tolist() == whole.labels[[7, 2]].tolist()
    assert part[0]["path"] == whole[7]["path"] and part.name(1) == whole.name(2)
    assert (pixels(part[0]["image"]) == pixels(whole[7]["image"])).all()


def test_whatever_a_sample_holds_is_kept(tmp_path):
    """Labels that the source does not have at hand, labels of several tasks, further keys."""

    class Odd:
        def __len__(self):
            return 3

        def __getitem__(self, index):
            label = {"colour": index, "parts": np.array([1, 0, -1], np.int8)}
            pixels = np.full((4, 5), index, np.uint8)
            return {"image": pixels, "label": label, "path": f"other{index}", "item": index * 10, "box": np.arange(4)}

    cached = CachedDataset(Odd(), str(tmp_path / "cache"), format="raw", build=True)
    sample = cached[2]
    assert (pixels(sample["image"]) == 2).all() and sample["image"].shape == (4, 5, 3), "grey becomes RGB"
    assert sample["label"]["colour"] == 2 and sample["label"]["parts"].tolist() == [1, 0, -1]
    assert sample["label"]["parts"].dtype == np.int8
    assert sample["path"] == "other2" and sample["item"] == 20 and sample["box"] == [0, 1, 2, 3]
    assert cached.labels["colour"].tolist() == [0, 1, 2] and cached.labels["parts"].shape == (3, 3)
    assert cached.num_classes is None and cached.name(1) == "Odd[1]"

    class Worse(Odd):
        def __getitem__(self, index):
            return {"image": np.zeros((4, 4, 3), np.uint8), "caption": b"bytes"}

    with pytest.raises(ConfigError, match="JSON.*caption"):
        CachedDataset(Worse(), str(tmp_path / "other"), build=True)


def test_labels_follow_the_data_set_not_the_cache(files, tmp_path):
    """The images are the same, the labels others: as when a list is mended."""
    names = [os.path.relpath(path, files) for path in sorted(files.glob("*/*"))]
    for number in (0, 1):
        (tmp_path / f"{number}.txt").write_text("".join(f"{name} {(i + number) % 3}\n" for i, name in enumerate(names)))
    first, second = (
        CachedDataset(CustomDataset("", str(files), str(tmp_path / f"{i}.txt")), str(tmp_path / "cache"), build=not i)
        for i in (0, 1)
    )
    assert [first[i]["label"] for i in range(3)] == [0, 1, 2] and [second[i]["label"] for i in range(3)] == [1, 2, 0]


def test_labels_of_wrappers(files, tmp_path):
    """They come from the data set, unless that would read it through; then they are in the cache."""
    repeated = dict(type="RepeatDataset", dataset=dict(type="CustomDataset", data_root=str(files)), times=2)
    cached = CachedDataset(repeated, str(tmp_path / "cache"), build=True)
    assert cached.labels.tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2] * 2
    assert [cached[i]["label"] for i in (0, 11, 12)] == [0, 2, 0]

    class Records:
        def __init__(self):
            self.read = 0

        def __len__(self):
            return 6

        def __getitem__(self, index):
            self.read += 1
            return {"image": np.full((4, 4, 3), index, np.uint8) if index != 3 else b"?", "label": index * 2}

    records = Records()
    twice = dict(type="RepeatDataset", dataset=records, times=2)
    build_cache(build(twice), tmp_path / "other")
    records.read = 0
    cached = CachedDataset(twice, str(tmp_path / "other"))
    assert cached.labels.tolist() == labels_of(cached).tolist() == [0, 2, 4, 6, 8, 10] * 2, "of bad images too"
    assert CachedDataset(twice, str(tmp_path / "other"), indices=[7, 2]).labels.tolist() == [2, 4]
    assert records.read <= 24, "no more than to recognise it, twice"
    with pytest.raises(BadImage, match="not an image"):
        cached[9]


def test_a_cache_without_labels_needs_them_from_the_data_set(files, tmp_path):
    folder, dataset = str(tmp_path / "cache"), CustomDataset(str(files))
    build_cache(dataset, folder)
    dataset.labels = None
    with pytest.raises(ConfigError, match="left the labels to a data set"):
        CachedDataset(dataset, folder)


def test_it_pickles_and_reads_from_many_threads(files, tmp_path):
    cached = CachedDataset(CustomDataset(str(files)), str(tmp_path / "cache"), build=True)
    data = pickle.dumps(cached)
    assert len(data) < 10_000, "neither pixels nor the index travel"
    copy = pickle.loads(data)
    wanted = [pixels(cached[i]["image"]).tobytes() for i in range(12)]
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(lambda i: pixels(copy[i % 12]["image"]).tobytes(), range(240)))
    assert read == wanted * 20


@pytest.mark.parametrize("workers", [0, 1])
def test_the_loader_gives_the_same_batches_however_it_works(files, tmp_path, workers):
    cfg = dict(type="CachedDataset", dataset=dict(type="CustomDataset", data_root=str(files)), format="raw")
    cfg |= dict(folder=str(tmp_path / "cache"), short_edge=None, build=True)
    pipeline = [dict(type="RandomResizedCrop", scale=16), dict(type="RandomFlip", prob=0.5)]

    def batches(dataset, **options):
        loader = TrainLoader(dict(dataset=dataset, pipeline=pipeline), batch_size=4, seed=5, **options)
        found = [next(loader) for _ in range(5)]
        loader.close()
        return found

    cached = batches(cfg, num_workers=workers, num_threads=2)
    plain = batches(dict(type="CustomDataset", data_root=str(files)), num_threads=1)
    for one, other in zip(cached, plain, strict=True):
        for key in ("image", "label", "index", "epoch"):
            assert (one[key] == other[key]).all(), key


# ----------------------------------------------------------------------------------------------------------------------
# Bad images


def test_bad_images_keep_their_reasons(files, tmp_path, caplog, monkeypatch):
    names = sorted(files.glob("*/*"))
    names[1].write_bytes(b"")
    names[4].write_bytes(b"no image at all")
    dataset = CustomDataset(str(files))
    with caplog.at_level(logging.INFO):
        cached = CachedDataset(dataset, str(tmp_path / "cache"), build=True)
    assert "12 images, 2 of them bad" in caplog.text
    assert list(cached.bad()) == [str(names[1]), str(names[4])]
    for row in (1, 4):
        with pytest.raises(BadImage) as here:
            cached[row]
        with pytest.raises(BadImage) as there:
            decode(dataset[row]["image"])
        assert str(here.value) == str(there.value)
    monkeypatch.setattr("jaxpretrain.data.cache.SIZES", 0)
    build_cache(dataset, tmp_path / "cache", rebuild=True)
    names[1].write_bytes(names[0].read_bytes())
    with pytest.raises(BadImage, match="empty file"):
        CachedDataset(dataset, str(tmp_path / "cache"))[1]
    loader = TrainLoader(
        dict(dataset=cached, pipeline=[dict(type="Resize", scale=8)]), batch_size=4, max_bad=0.1, num_threads=1
    )
    with pytest.raises(TooManyBadImages, match=names[4].name):
        for _ in range(6):
            next(loader)
    loader.close()


def test_a_missing_file_is_bad(files, tmp_path):
    dataset = CustomDataset(str(files))
    Path(dataset.name(3)).unlink()
    cached = CachedDataset(dataset, str(tmp_path / "cache"), build=True)
    with pytest.raises(BadImage, match="FileNotFoundError: No such file"):
        cached[3]


def test_a_disk_that_goes_away_stops_the_build(tmp_path, monkeypatch):
    """Else every image from there on would be bad for ever."""
    files = folder_of(tmp_path / "files", 36, (8, 12))
    monkeypatch.setattr(cache_builder, "SECTION", 12)
    monkeypatch.setattr(cache_builder, "PROBES", 1)
    dataset = CustomDataset(str(files))
    with monkeypatch.context() as patch:
        read = CustomDataset.__getitem__

        def gone(self, index):
            if index >= 14:
                raise OSError(116, "Stale file handle")
            return read(self, index)

        patch.setattr(CustomDataset, "__getitem__", gone)
        with pytest.raises(ExpectedFailure, match="10 of 12 files.*Stale file handle.*same command"):
            build_cache(dataset, tmp_path / "cache")
    build_cache(dataset, tmp_path / "cache")
    cached = CachedDataset(dataset, str(tmp_path / "cache"))
    assert len(cached) == 36 and not cached.bad() and not list(cached.damaged())


def test_nothing_readable_stops_the_build_at_once(files, tmp_path):
    dataset = CustomDataset(str(files))
    away = files.rename(tmp_path / "unmounted")
    with pytest.raises(ExpectedFailure, match="none of 12 images.*No such file"):
        build_cache(dataset, tmp_path / "cache")
    away.rename(files)
    build_cache(dataset, tmp_path / "cache")
    assert not CachedDataset(dataset, str(tmp_path / "cache")).bad()


# ----------------------------------------------------------------------------------------------------------------------
# Whose cache it is


def test_settings_and_data_sets_are_told_apart(files, tmp_path):
    folder = str(tmp_path / "cache")
    dataset = CustomDataset(str(files))
    with pytest.raises(ConfigError, match=r"no cache at .*build_cache.*build=True"):
        CachedDataset(dataset, folder)
    CachedDataset(dataset, folder, short_edge=32, build=True)
    for change, text in [
        (dict(short_edge=24), "short_edge: 32 there, 24 here"),
        (dict(short_edge=32, format="raw"), "format: yuv420 there, raw here"),
        (dict(short_edge=32, interpolation="box"), "interpolation: bicubic there, box here"),
    ]:
        with pytest.raises(ConfigError, match=text + ".*--rebuild"):
            CachedDataset(dataset, folder, build=True, **change)
    with pytest.raises(ConfigError, match="samples: 12 there, 11 here"):
        CachedDataset(CustomDataset(str(files), indices=11), folder, short_edge=32)
    moved = files.rename(tmp_path / "elsewhere")
    CachedDataset(CustomDataset(str(moved)), folder, short_edge=32)
    first = sorted(moved.glob("*/*"))[0]
    first.write_bytes(first.read_bytes() + b"more")
    with pytest.raises(ConfigError, match="sizes: .* there"):
        CachedDataset(CustomDataset(str(moved)), folder, short_edge=32)
    first.rename(first.with_name("other.png"))
    with pytest.raises(ConfigError, match="names: .* there"):
        CachedDataset(CustomDataset(str(moved)), folder, short_edge=32)
    build_cache(CustomDataset(str(moved)), folder, short_edge=24, rebuild=True)
    assert min(CachedDataset(CustomDataset(str(moved)), folder, short_edge=24)[0]["image"].shape[:2]) <= 24


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (dict(format="yuv"), "no format 'yuv'.*yuv420"),
        (dict(interpolation="cubic"), "no interpolation 'cubic'.*bicubic"),
        (dict(short_edge=0), "short_edge=0 must be"),
        (dict(pipeline=[1]), "pipeline does not belong"),
    ],
)
def test_wrong_settings(files, tmp_path, options, text):
    with pytest.raises(ConfigError, match=text):
        CachedDataset(CustomDataset(str(files)), str(tmp_path / "cache"), build=True, **options)


def test_another_version_asks_to_be_made_anew(files, tmp_path, monkeypatch):
    folder, dataset = tmp_path / "cache", CustomDataset(str(files))
    CachedDataset(dataset, str(folder), build=True)
    header = json.loads((folder / "header.json").read_text())
    (folder / "header.json").write_text(json.dumps(header | {"version": 99}))
    for build_it in (False, True):
        with pytest.raises(ConfigError, match=r"version 99 .* reads version 1.*--rebuild"):
            CachedDataset(dataset, str(folder), build=build_it)
    with pytest.raises(ConfigError, match="version 99"):
        build_cache(dataset, folder)
    build_cache(dataset, folder, rebuild=True)
    assert len(CachedDataset(dataset, str(folder))) == 12
    (folder / "header.json").write_text("{")
    with pytest.raises(ConfigError, match="not a cache"):
        CachedDataset(dataset, str(folder))


# ----------------------------------------------------------------------------------------------------------------------
# Damage


@pytest.mark.parametrize("name", ["images", "index"])
@pytest.mark.parametrize("change", [-1, 1])
def test_a_file_of_another_length_is_refused(files, tmp_path, name, change):
    folder, dataset = tmp_path / "cache", CustomDataset(str(files))
    build_cache(dataset, folder)
    with open(folder / name, "r+b") as file:
        size = file.seek(0, 2)
        file.truncate(size + change)
    with pytest.raises(ConfigError, match=f"damaged: `{name}` has {size + change} bytes instead of {size}.*--rebuild"):
        CachedDataset(dataset, str(folder))
    (folder / name).unlink()
    with pytest.raises(ConfigError, match="damaged.*No such file"):
        CachedDataset(dataset, str(folder))


def test_changed_bytes_are_found(files, tmp_path):
    folder, dataset = tmp_path / "cache", CustomDataset(str(files))
    build_cache(dataset, folder, format="raw", short_edge=None)
    cached = CachedDataset(dataset, str(folder), "raw", None)
    assert list(cached.damaged()) == []
    start = int(cached._index["start"][5])
    with open(folder / "images", "r+b") as file:
        file.seek(start + 3)
        byte = file.read(1)[0]
        file.seek(start + 3)
        file.write(bytes([byte ^ 1]))
    assert list(cached.damaged()) == [5] and list(cached.damaged([4, 6])) == []
    with open(folder / "index", "r+b") as file:
        file.write(b"\x01")
    with pytest.raises(ConfigError, match="checksum of `index`"):
        CachedDataset(dataset, str(folder), "raw", None)


def test_a_file_cut_under_a_running_loader_makes_images_bad(files, tmp_path):
    folder, dataset = tmp_path / "cache", CustomDataset(str(files))
    build_cache(dataset, folder)
    cached = CachedDataset(dataset, str(folder))
    os.truncate(folder / "images", int(cached._index["start"][6]) + 10)
    pixels(cached[5]["image"])
    for row in (6, 11):
        with pytest.raises(BadImage, match="ends within"):
            pixels(cached[row]["image"])
    assert list(cached.damaged()) == list(range(6, 12))


# ----------------------------------------------------------------------------------------------------------------------
# Building


def test_the_size_is_told_before_and_holds(files, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        build_cache(CustomDataset(str(files)), tmp_path / "cache", short_edge=32)
    told, done = (record.getMessage() for record in caplog.records[-2:])
    assert "cache of 12 images as yuv420 with a short edge of 32" in told and "free" in told
    assert "complete" in done
    size = sum((tmp_path / "cache" / name).stat().st_size for name in ("images", "index"))
    assert f"about {size / 1e6:.1f} MB" in told, "of so few images all are looked at"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "cache.lock", "files"]


def test_a_disk_that_is_too_small_is_refused(files, tmp_path, monkeypatch):
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**40, 0, cache_builder.MARGIN + 1000))
    with pytest.raises(
        ExpectedFailure, match=r"needs up to 0\.0 MB in .*1\.1 GB are free.*1\.1 GB are to stay.*smaller"
    ):
        build_cache(CustomDataset(str(files)), tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**40, 0, cache_builder.MARGIN + 10**6))
    build_cache(CustomDataset(str(files)), tmp_path / "cache")


def test_a_disk_that_fills_up_keeps_what_is_finished(files, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_builder, "SECTION", 4)
    dataset, sync, calls = CustomDataset(str(files)), cache_builder._sync, []

    def full(file):
        calls.append(file.name)
        if len(calls) == 5:
            raise OSError(28, "No space left on device")
        sync(file)

    monkeypatch.setattr(cache_builder, "_sync", full)
    with pytest.raises(ExpectedFailure, match="full.*same command"):
        build_cache(dataset, tmp_path / "cache", threads=1)
    monkeypatch.setattr(cache_builder, "_sync", sync)
    assert building(tmp_path / "cache").exists() and not (tmp_path / "cache").exists()
    build_cache(dataset, tmp_path / "cache", threads=1)
    assert list(CachedDataset(dataset, str(tmp_path / "cache")).damaged()) == []


BUILD = """
import logging, os, sys, time
logging.basicConfig(level=logging.INFO)
import jaxpretrain.data.cache_builder as builder
from jaxpretrain.data.sources import CustomDataset
files, folder, gate = sys.argv[1:]
builder.SECTION, builder.PROBES = 16, 1
encode = builder._Builder._encode
def slow(self, row):
    while row >= 40 and gate and not os.path.exists(gate):
        time.sleep(0.01)
    return encode(self, row)
builder._Builder._encode = slow
builder.build_cache(CustomDataset(files), folder, format="raw", threads=2)
"""


def start_build(files: Path, folder: Path, gate: Path | str = "") -> subprocess.Popen:
    """A process that builds, in sections of 16; after 40 images only once there is a file `gate`."""
    command = [sys.executable, "-c", BUILD, str(files), str(folder), str(gate)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def wait_for(condition, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_killed_build_goes_on_at_its_last_section(tmp_path, monkeypatch, caplog):
    files, folder = folder_of(tmp_path / "files", 100, (8, 12)), tmp_path / "cache"
    process = start_build(files, folder, tmp_path / "never")
    index = building(folder) / "index"
    wait_for(lambda: index.exists() and index.stat().st_size >= 32 * 32, process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not folder.exists()
    monkeypatch.setattr(cache_builder, "SECTION", 16)
    with open(building(folder) / "index", "ab") as file:
        file.write(b"half a record")
    with open(building(folder) / "images", "ab") as file:
        file.write(b"bytes of no section")
    dataset, encoded = CustomDataset(str(files)), []
    encode = cache_builder._Builder._encode
    monkeypatch.setattr(
        cache_builder._Builder, "_encode", lambda self, row: (encoded.append(row), encode(self, row))[1]
    )
    monkeypatch.setattr(cache_builder, "PROBES", 1)
    with pytest.raises(ConfigError, match="short_edge: 256 there, 5 here"):
        build_cache(dataset, folder, format="raw", short_edge=5)
    with caplog.at_level(logging.INFO):
        build_cache(dataset, folder, format="raw")
    assert encoded.pop(0) == 0, "the image that tells the size"
    assert min(encoded) >= 32 and sorted(encoded) == list(range(min(encoded), 100)), (
        "what is finished is not done again"
    )
    assert f"going on after {min(encoded)} of 100" in caplog.text
    build_cache(dataset, tmp_path / "other", format="raw")
    for name in ("images", "index"):
        assert (folder / name).read_bytes() == (tmp_path / "other" / name).read_bytes()


def test_a_section_that_was_not_written_whole_is_done_again(tmp_path, monkeypatch):
    """As after a power cut: the index tells of bytes that never reached the disk."""
    files, folder = folder_of(tmp_path / "files", 30, (8, 12)), tmp_path / "cache"
    monkeypatch.setattr(cache_builder, "SECTION", 10)
    dataset = CustomDataset(str(files))
    build_cache(dataset, folder)
    whole = (folder / "images").read_bytes()
    for keep, begun in ((len(whole) - 1, 20), (10, 0)):
        shutil.move(folder, building(folder))
        images = building(folder) / "images"
        images.write_bytes(whole[:keep] + b"\0" * (len(whole) - keep))
        encoded: list[int] = []
        with monkeypatch.context() as patch:
            encode = cache_builder._Builder._encode
            patch.setattr(
                cache_builder._Builder,
                "_encode",
                lambda self, row, e=encoded, f=encode: (e.append(row), f(self, row))[1],
            )
            patch.setattr(cache_builder, "PROBES", 1)
            build_cache(dataset, folder)
        assert (folder / "images").read_bytes() == whole and min(encoded[1:]) == begun


def test_two_builders_do_not_meet(tmp_path):
    files, folder = folder_of(tmp_path / "files", 60, (8, 12)), tmp_path / "cache"
    gate = tmp_path / "gate"
    first = start_build(files, folder, gate)
    wait_for(lambda: (building(folder) / "index").exists(), first)
    second = start_build(files, folder)
    assert second.stderr is not None
    said = second.stderr.readline()
    assert f"is being built by process {first.pid} on" in said
    gate.touch()
    assert "complete" in first.communicate(timeout=60)[1] and first.returncode == 0
    assert "complete" not in second.communicate(timeout=60)[1] and second.returncode == 0
    cached = CachedDataset(CustomDataset(str(files)), str(folder), "raw")
    assert list(cached.damaged()) == [] and len(cached) == 60


def test_an_empty_data_set_is_refused(tmp_path):
    empty = InMemory(np.zeros((0, 4, 4, 3), np.uint8), np.zeros(0, int))
    with pytest.raises(ConfigError, match="empty"):
        build_cache(empty, tmp_path / "cache")


# ----------------------------------------------------------------------------------------------------------------------
# The command

RECIPE = """
from jaxpretrain.config import base_config
def get_config(recipe=None):
    config = base_config()
    files = dict(type="CustomDataset", data_root={files!r})
    config.data.train.dataset = dict(
        type="Subset", fraction=0.5, dataset=dict(type="CachedDataset", dataset=files, folder={folder!r}, short_edge=16)
    )
    config.data.val.dataset = files
    return config
"""


def test_the_command_builds_and_verifies(files, tmp_path, capsys):
    recipe, folder = tmp_path / "recipe.py", tmp_path / "cache"
    recipe.write_text(RECIPE.format(files=str(files), folder=str(folder)))
    config = f"--config={recipe}"
    assert tool.main([config]) == 0
    cached = CachedDataset(CustomDataset(str(files)), str(folder), short_edge=16)
    assert len(cached) == 12
    assert tool.main([config, "--split=val", f"--folder={tmp_path / 'val'}", "--format=jpeg", "--short-edge=0"]) == 0
    CachedDataset(CustomDataset(str(files)), str(tmp_path / "val"), "jpeg", None)
    assert tool.main([config, "--verify"]) == 0
    assert "12 images, 0 of them bad, 0 damaged" in capsys.readouterr().out
    with open(folder / "images", "r+b") as file:
        file.write(b"\xff\xfe\xfd")
    assert tool.main([config, "--verify"]) == 1
    assert f"damaged in the cache: {cached.name(0)}" in capsys.readouterr().out
    assert tool.main([config, "--rebuild"]) == 0
    assert list(CachedDataset(CustomDataset(str(files)), str(folder), short_edge=16).damaged()) == []


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "--config is needed"),
        (["--config=RECIPE", "--split=test"], "data set for train, val"),
        (["--config=RECIPE", "--split=val"], "is a CachedDataset; --split=train --folder"),
        (["--config=RECIPE", "--folder=x"], "say which with --split"),
        (["--config=RECIPE", "--threads=many"], "--threads=many is not a number"),
    ],
)
def test_mistakes_in_the_command(files, tmp_path, arguments, text):
    recipe = tmp_path / "recipe.py"
    recipe.write_text(RECIPE.format(files=str(files), folder=str(tmp_path / "cache")))
    with pytest.raises(ConfigError, match=text):
        tool.main([argument.replace("RECIPE", str(recipe)) for argument in arguments])
