"""Listing folders: order, odd names, memory, and the benchmark that measures a million files."""

from __future__ import annotations

import os
import pickle
import runpy
from pathlib import Path

import numpy as np
import pytest

from jaxpretrain.build import ConfigError
from jaxpretrain.data.listing import Paths, list_images
from jaxpretrain.data.sources import CustomDataset

NAMES = ["b/z.jpg", "a.jpg", "", "ü/ñ.png", "new\nline.jpg", os.fsdecode(b"\xff\xfe.jpg"), "x" * 255]


def make(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def test_paths_are_a_sequence_of_strings():
    paths = Paths(NAMES)
    assert list(paths) == NAMES and len(paths) == len(NAMES)
    assert paths[-1] == NAMES[-1] and paths[np.int64(3)] == NAMES[3]
    assert list(paths[1:3]) == NAMES[1:3]
    assert list(paths[np.array([4, 0, 4])]) == ["new\nline.jpg", "b/z.jpg", "new\nline.jpg"]
    assert list(Paths()) == [] and not Paths()
    with pytest.raises(IndexError, match="7 of 7"):
        paths[7]
    with pytest.raises(IndexError):
        paths[-8]


def test_more_paths_than_a_block_and_joined_parts():
    many = [f"{i:x}/{i}.jpg" for i in range(10_000)]
    paths = Paths(iter(many))
    assert list(paths) == many
    parts = [Paths(many[:3]), Paths(), Paths(many[3:])]
    assert Paths.join(parts) == paths and list(Paths.join([])) == []
    assert Paths(many[1:]) != paths
    assert Paths(["ab", "c"]) != Paths(["a", "bc"]), "the same characters, divided otherwise"


def test_paths_are_compact_also_when_one_is_long():
    """Fixed width would take 4 kB for each."""
    paths = Paths([f"n{i:08d}.jpg" for i in range(10_000)] + ["d/" * 2000 + "x.jpg"])
    assert paths.nbytes < 10_000 * (13 + 8) + 10_000
    copy = pickle.loads(data := pickle.dumps(paths))
    assert copy == paths and len(data) < paths.nbytes + 1000


def test_images_come_sorted_in_the_order_of_the_folders(tmp_path):
    make(tmp_path, "b/2.jpg", "b/10.JPG", "b/deep/er/1.png", "b/notes.txt", "a/x.jpeg", "a/.hidden.jpg", "c/readme.md")
    found = list_images(str(tmp_path), ["a", "b", "c", "missing"], (".jpg", ".jpeg", ".png"))
    assert [list(paths) for paths in found] == [
        ["a/.hidden.jpg", "a/x.jpeg"],
        ["b/10.JPG", "b/2.jpg", "b/deep/er/1.png"],
        [],
        [],
    ]
    alone = list_images(str(tmp_path), [""], (".jpg",))[0]
    assert list(alone) == ["a/.hidden.jpg", "b/10.JPG", "b/2.jpg"]


def test_many_folders_keep_their_labels(tmp_path):
    """More folders than threads: whichever is listed first, labels follow names."""
    rng = np.random.default_rng(0)
    names = [f"c{label:03d}/{i}.jpg" for label in range(60) for i in range(rng.integers(1, 5))]
    make(tmp_path, *names)
    data = CustomDataset(str(tmp_path))
    assert [os.path.relpath(data.name(i), tmp_path) for i in range(len(data))] == names
    assert data.labels.tolist() == [int(name[1:4]) for name in names] and data.labels.dtype == np.int32
    assert data.num_classes == 60
    assert pickle.loads(pickle.dumps(data)).name(7) == data.name(7)


def test_names_that_are_no_text_can_be_read(tmp_path):
    make(tmp_path, "c/ok.jpg")
    with open(os.fsencode(tmp_path) + b"/c/\xff.jpg", "wb") as file:
        file.write(b"bytes")
    data = CustomDataset(str(tmp_path))
    assert data[1]["image"] == b"bytes"


def test_a_folder_that_may_not_be_read_says_so(tmp_path, monkeypatch):
    make(tmp_path, "a/1.jpg", "b/1.jpg")
    scandir = os.scandir

    def guarded(path):
        if str(path).endswith("/b"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    with pytest.raises((PermissionError, ConfigError), match="Permission denied"):
        CustomDataset(str(tmp_path))


def test_lists_with_labels_and_parts_of_them(tmp_path):
    (tmp_path / "list.txt").write_text("".join(f"{i}.jpg {i % 3}\n" for i in range(5000)))
    data = CustomDataset(str(tmp_path), ann_file="list.txt")
    assert len(data) == 5000 and data.name(4999).endswith("/4999.jpg") and data.labels[4999] == 1
    part = CustomDataset(str(tmp_path), ann_file="list.txt", indices=[7, 3])
    assert [os.path.basename(part.name(i)) for i in range(2)] == ["7.jpg", "3.jpg"] and part.labels.tolist() == [1, 0]


def test_the_benchmark_measures_and_cleans_up(tmp_path, capfd):
    script = Path(__file__).parents[1] / "benchmarks" / "listing.py"
    main = runpy.run_path(str(script))["main"]
    main(["--files=300", "--classes=7", f"--folder={tmp_path}"])
    out = capfd.readouterr().out
    assert out.count('"files": 300') == 2 and "peak_mb" in out
    assert not list(tmp_path.iterdir())
