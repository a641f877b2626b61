"""WebDataset: every form of tar shard read at random, the kept index, and messages that say what to do."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import tarfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from jaxpretrain.build import ConfigError, build
from jaxpretrain.data import tar_index, webdataset
from jaxpretrain.data.decode import BadImage, decode
from jaxpretrain.data.shards import expand_braces, expand_files, split_of
from jaxpretrain.data.webdataset import WebDataset


def png(level: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3), (level,) * 3).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path, members, form=tarfile.USTAR_FORMAT):
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def members(first: int, count: int):
    for i in range(first, first + count):
        yield f"n{i:02d}.png", png(i)
        yield f"n{i:02d}.cls", f"{i % 3}\n".encode()
        yield f"n{i:02d}.json", json.dumps({"label": i % 4, "about": {"name": "cat" if i % 2 else "dog"}}).encode()


@pytest.fixture
def shards(tmp_path):
    for shard, count in enumerate((3, 1, 4)):
        write_tar(tmp_path / f"train-{shard:06d}.tar", members(10 * shard, count))
    return tmp_path


LEVELS = [0, 1, 2, 10, 20, 21, 22, 23]


def contents(source) -> list[tuple[int, int]]:
    return [(int(decode(source[i]["image"])[0, 0, 0]), source[i]["label"]) for i in range(len(source))]


def test_samples(shards):
    source = build(dict(type="WebDataset", shards="train-{000000..000002}.tar", data_root=str(shards)))
    assert contents(source) == [(level, level % 3) for level in LEVELS]
    assert source.num_classes == 3 and source.labels.tolist() == [level % 3 for level in LEVELS]
    assert source[3]["path"] == "n10" and source.name(3) == f"n10 in {shards}/train-000001.tar"
    for again in (str(shards), str(shards / "train-*.tar"), [str(shards / f"train-00000{i}.tar") for i in range(3)]):
        assert contents(WebDataset(again)) == contents(source)
    assert [source[i]["label"] for i in (7, 0, 4)] == [2, 0, 2]
    part = WebDataset(str(shards), indices=[5, 0])
    assert contents(part) == [(21, 0), (0, 0)] and part.labels.tolist() == [0, 0] and len(part) == 2
    assert contents(WebDataset(str(shards), indices=-1)) == [(23, 2)]


def test_the_readers_of_many_threads(shards, monkeypatch):
    monkeypatch.setattr(webdataset, "_OPEN", 1)
    source = pickle.loads(pickle.dumps(WebDataset(str(shards))))
    order = np.random.default_rng(0).integers(0, 8, 400)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: int(decode(source[int(i)]["image"])[0, 0, 0]), order))
    assert found == [LEVELS[i] for i in order]
    assert len(source._files) == 1
    again = pickle.loads(pickle.dumps(source))
    assert again._files == {} and contents(again) == contents(source)


def test_where_labels_are(shards):
    def labels(label, **options):
        return WebDataset(str(shards), label=label, **options).labels.tolist()

    assert labels("json:label") == [level % 4 for level in LEVELS]
    assert labels("json:about.name", classes=["dog", "cat"]) == [level % 2 for level in LEVELS]
    assert labels(None) == [-1] * 8 and WebDataset(str(shards), label=None).num_classes is None
    assert WebDataset(str(shards), num_classes=1000).num_classes == 1000
    write_tar(shards / "text.tar", [("a.jpg", png(1)), ("a.txt", b"sea snake\n"), ("b.jpg", png(2)), ("b.txt", b"7")])
    source = WebDataset(str(shards / "text.tar"), label="txt", classes=["x"] * 9 + ["sea snake"])
    assert source.labels.tolist() == [9, 7] and source.num_classes == 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(label="txt"), "8 of 8 samples have no label .*'txt'.*n00 in .*members found: cls, json, png"),
        (dict(label="json"), "json:label"),
        (dict(label="json:lable"), r"n00\.json has no 'lable'.*label, about"),
        (dict(label="json:about.name"), "'(cat|dog)' is no integer; give the names"),
        (dict(label="json:about.name", classes=["dog", "cow"]), "'cat' is none of the 2 classes"),
        (dict(classes=["only", "two"]), r"labels 0\.\.2 .*do not fit 2 classes"),
        (dict(image="jpg"), "no image members.*looked for: jpg; found: png, cls, json"),
        (dict(shards="train-{000000..000003}.tar"), r"no file .*train-000003\.tar; .* has train-000000\.tar"),
        (dict(shards="train-{3}.tar"), "braces hold a range"),
        (dict(shards="https://somewhere/train.tar"), "reads local files"),
        (dict(shards="elsewhere/*.tar"), "there is no folder .*elsewhere"),
        (dict(pipeline=[dict(type="Resize")]), "pipeline"),
    ],
)
def test_mistakes(shards, options, message):
    with pytest.raises(ConfigError, match=message):
        WebDataset(**{"shards": "*.tar", "data_root": str(shards), **options})


def test_tar_formats(tmp_path):
    """Long names are written in three ways; each is read as `tarfile` reads it. Folders and links are no samples."""
    deep = "very/" * 30 + "long" * 30
    for number, form in enumerate((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)):
        name = "very/" * 30 + "name" if form == tarfile.USTAR_FORMAT else deep
        path = write_tar(tmp_path / f"{number}.tar", [(f"{name}.seg.png", png(9)), (f"{name}.PNG", png(5))], form)
        with tarfile.open(path, "a", format=form) as tar:
            folder, link = tarfile.TarInfo("folder.png"), tarfile.TarInfo("link.png")
            folder.type, link.type, link.linkname = tarfile.DIRTYPE, tarfile.SYMTYPE, "x"
            tar.addfile(folder)
            tar.addfile(link)
            for other, content in (("__meta__.png", png(1)), (".hidden.png", png(1)), ("größe.png", png(7))):
                info = tarfile.TarInfo(other)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        source = WebDataset(str(path), label=None)
        assert [source[i]["path"] for i in range(len(source))] == [name, "größe"]
        assert contents(source) == [(5, -1), (7, -1)]


def test_large_numbers():
    """From 8 GiB on, GNU tar writes sizes in binary."""
    info = tarfile.TarInfo("x")
    info.size = 9 << 30
    header = info.tobuf(tarfile.GNU_FORMAT)
    assert tar_index._number(header[124:136]) == 9 << 30
    header = info.tobuf(tarfile.PAX_FORMAT)
    assert tar_index._attributes(header[512 : 512 + int(header[124:136].strip(b"\0 "), 8)])["size"] == str(9 << 30)


def test_samples_without_image_are_left_out(shards, caplog):
    write_tar(shards / "some.tar", [("a.cls", b"1"), ("b.png", png(2)), ("b.cls", b"0")])
    assert contents(WebDataset(str(shards / "some.tar"))) == [(2, 0)]
    assert "1 samples" in caplog.text


def test_the_index_is_kept_and_renewed(shards, monkeypatch):
    built = []
    build_index = tar_index._build
    monkeypatch.setattr(tar_index, "_build", lambda shard, wanted: built.append(shard) or build_index(shard, wanted))
    first = contents(WebDataset(str(shards)))
    assert len(built) == 3 and len(list(shards.glob("*.index"))) == 3
    assert contents(WebDataset(str(shards))) == first and len(built) == 3, "read from the files"
    WebDataset(str(shards), label="json:label")
    WebDataset(str(shards))
    assert len(built) == 6, "an index for each thing to look for"
    path = write_tar(shards / "train-000001.tar", members(30, 2))
    assert [level for level, _ in contents(WebDataset(str(shards)))] == [0, 1, 2, 30, 31, 20, 21, 22, 23]
    assert len(built) == 7, "a changed shard is walked over again, the others are not"
    os.utime(path, ns=(1, 1))
    WebDataset(str(shards))
    assert len(built) == 8, "the time of change counts, too"
    for index in shards.glob("*.index"):
        index.write_bytes(index.read_bytes()[:100])
    assert len(WebDataset(str(shards))) == 9 and len(built) == 11, "damaged ones are built again"
    assert not list(shards.glob("*.partial"))


def test_where_the_index_is_kept(shards, tmp_path, monkeypatch):
    cache = tmp_path / "cache" / "deep"
    source = WebDataset(str(shards), index_folder=str(cache))
    assert len(list(cache.iterdir())) == 3 and not list(shards.glob("*.index"))

    def read_only(*args, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tar_index.tempfile, "NamedTemporaryFile", read_only)
    assert contents(WebDataset(str(shards))) == contents(source) and not list(shards.glob("*.index"))


def test_damaged_shards(shards, caplog):
    path = shards / "train-000000.tar"
    whole = path.read_bytes()
    path.write_bytes(gzip.compress(whole))
    with pytest.raises(ConfigError, match=r"compressed \(gzip\).*decompress"):
        WebDataset(str(path))
    path.write_bytes(whole[:600])
    with pytest.raises(ConfigError, match="truncated.*download it again"):
        WebDataset(str(path))
    path.write_bytes(whole[:1024])
    assert len(WebDataset(str(path), label=None)) == 1 and "no mark at its end" in caplog.text
    path.write_bytes(whole[:1024] + b"junk" + whole[1028:])
    with pytest.raises(ConfigError, match="damaged at byte 1024"):
        WebDataset(str(path))
    path.write_bytes(b"no tar file at all" * 100)
    with pytest.raises(ConfigError, match="is not a tar file"):
        WebDataset(str(path))
    path.write_bytes(whole)
    source = WebDataset(str(path))
    path.write_bytes(whole[:600])
    with pytest.raises(BadImage, match="has changed since"):
        source[2]


def test_names_of_shards(tmp_path):
    assert expand_braces("a{08..11}b") == ["a08b", "a09b", "a10b", "a11b"]
    assert expand_braces("{x,y}{0..1}") == ["x0", "x1", "y0", "y1"]
    assert expand_braces("{9..11}") == ["9", "10", "11"] and expand_braces("{2..0}") == ["2", "1", "0"]
    with pytest.raises(ConfigError, match="braces hold"):
        expand_braces("{a,b{1,2}}")
    for name in (
        "train-00000-of-00002.x",
        "train-00001-of-00002.x",
        "val/0000.x",
        "test.x",
        "in{1}.x",
        "pre-train-7.x",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [split_of(f"d/{n}") for n in ("train-00000-of-00002.x", "val/0000.x", "test.x", "pre-train-7.x")] == [
        "train", "val", "test", "pre-train",
    ]  # fmt: skip
    found = expand_files("Any", str(tmp_path), extension=".x", split="train")
    assert [os.path.basename(file) for file in found] == ["train-00000-of-00002.x", "train-00001-of-00002.x"]
    assert expand_files("Any", "in{1}.x", str(tmp_path), ".x") == [str(tmp_path / "in{1}.x")], (
        "a name with braces in it"
    )
    with pytest.raises(ConfigError, match="no split 'tset'.*'test'"):
        expand_files("Any", str(tmp_path), extension=".x", split="tset")


def test_in_the_loader(shards):
    from jaxpretrain.data.pipeline import EvalLoader

    split = dict(dataset=dict(type="WebDataset", shards=str(shards)), pipeline=[])
    batches = list(EvalLoader(split, batch_size=4, num_threads=2))
    assert np.concatenate([batch["image"][:, 0, 0, 0] for batch in batches]).tolist() == LEVELS
    assert np.concatenate([batch["label"] for batch in batches]).tolist() == [level % 3 for level in LEVELS]
