"""Parquet: files as Hugging Face writes them, read at random; and messages that say what to do."""

from __future__ import annotations

import builtins
import io
import json
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from jaxpretrain.build import ConfigError, build
from jaxpretrain.data import parquet as module
from jaxpretrain.data.decode import BadImage, decode
from jaxpretrain.data.parquet import ParquetDataset

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def png(level: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3), (level,) * 3).save(buffer, "PNG")
    return buffer.getvalue()


def write(path, levels, labels, names=("cat", "dog", "owl"), group=2, image="image"):
    """As `datasets` does: a struct for the image, and features in the metadata of the schema."""
    path.parent.mkdir(parents=True, exist_ok=True)
    images = pa.array(
        [{"bytes": png(level), "path": f"{level}.png"} for level in levels],
        pa.struct({"bytes": pa.binary(), "path": pa.string()}),
    )
    features = {image: {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": list(names)}}
    table = pa.table({image: images, "label": pa.array(labels, pa.int64())})
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path, row_group_size=group)
    return path


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "data/train-00000-of-00002.parquet", range(5), [0, 1, 2, 0, 1])
    write(tmp_path / "data/train-00001-of-00002.parquet", range(5, 8), [2, 0, 1])
    write(tmp_path / "data/test-00000-of-00001.parquet", [100, 101], [1, None])
    return tmp_path


def contents(source) -> list[tuple[int, int]]:
    return [(int(decode(source[i]["image"])[0, 0, 0]), source[i]["label"]) for i in range(len(source))]


def test_rows(folder):
    source = build(dict(type="ParquetDataset", paths="data", data_root=str(folder), split="train"))
    assert contents(source) == [(i, i % 3) for i in range(8)]
    assert source.classes == ("cat", "dog", "owl") and source.num_classes == 3
    assert source.labels.tolist() == [i % 3 for i in range(8)] and source.labels.dtype == np.int32
    assert source[6]["path"] == "6.png" and "row 1 of row group 0" in source.name(6) and "00001-of" in source.name(6)
    order = [7, 0, 4, 3, 0]
    assert [source[i]["path"] for i in order] == [f"{i}.png" for i in order]
    assert contents(ParquetDataset(str(folder), split="test")) == [(100, 1), (101, -1)]
    assert len(ParquetDataset(str(folder / "data"))) == 10
    part = ParquetDataset(str(folder), split="train", indices=[6, 1])
    assert contents(part) == [(6, 0), (1, 1)] and part.labels.tolist() == [0, 1] and "00001-of" in part.name(0)
    assert contents(ParquetDataset(str(folder), split="train", indices=-2)) == [(6, 0), (7, 1)]


def test_threads_and_processes(folder):
    source = pickle.loads(pickle.dumps(ParquetDataset(str(folder), split="train", cached_groups=2)))
    order = np.random.default_rng(0).integers(0, 8, 400)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: source[int(i)]["path"], order))
    assert found == [f"{i}.png" for i in order]
    assert len(source._cache) == 2, "memory stays flat"
    assert contents(pickle.loads(pickle.dumps(source))) == contents(source)


def test_in_order_every_row_group_is_read_once(folder, monkeypatch):
    reads = []
    read = pq.ParquetFile.read_row_group
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", lambda self, i, **o: reads.append(i) or read(self, i, **o))
    source = ParquetDataset(str(folder), split="train")
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda i: source[i]["label"], range(8))) == [i % 3 for i in range(8)]
    assert sorted(reads) == [0, 0, 1, 1, 2]


def test_plain_columns(tmp_path):
    kinds = {"binary": pa.binary(), "large": pa.large_binary()}
    for name, kind in kinds.items():
        table = pa.table({"img": pa.array([png(3), png(4)], kind), "fine_label": pa.array([1, 0], pa.int32())})
        pq.write_table(table, tmp_path / f"{name}.parquet")
        source = ParquetDataset(str(tmp_path / f"{name}.parquet"), image_key="img", label_key="fine_label")
        assert contents(source) == [(3, 1), (4, 0)] and source.classes is None and source.num_classes == 2
        assert "path" not in source[0]
    source = ParquetDataset(str(tmp_path / "large.parquet"), image_key="img", label_key=None)
    assert contents(source) == [(3, -1), (4, -1)] and source.num_classes is None


def test_names_of_classes(tmp_path):
    given = ParquetDataset(str(write(tmp_path / "a.parquet", [1], [1])), classes=["x", "y"])
    assert given.classes == ("x", "y") and given.num_classes == 2
    metadata = {b"huggingface": json.dumps({"info": {"features": {"label": {"names": {"1": "b", "0": "a"}}}}}).encode()}
    assert module.class_names(metadata, "label") == ("a", "b")
    assert module.class_names(metadata, "other") is None and module.class_names(None, "label") is None
    assert module.class_names({b"huggingface": b"{"}, "label") is None


def test_mistakes(folder, monkeypatch):
    path = str(folder / "data/train-00000-of-00002.parquet")
    for options, message in (
        (dict(paths=str(folder / "lost")), "no file .*lost; .* has data"),
        (dict(paths=str(folder), split="trian"), "no split 'trian'.*'train'"),
        (dict(paths=path, image_key="img"), "no column 'img' .image_key.*'image'"),
        (dict(paths=path, label_key="labels"), "no column 'labels'.*'label'"),
        (dict(paths=path, image_key="label"), "are int64; expected a struct"),
        (dict(paths=path, label_key="image"), "not integers .label_key='image'"),
        (dict(paths=path, classes=["one"]), "labels up to 2 .* do not fit 1 classes"),
        (dict(paths=path, pipeline=[dict(type="Resize")]), "pipeline"),
    ):
        with pytest.raises(ConfigError, match=message):
            ParquetDataset(**options)
    (folder / "bad.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(ConfigError, match=r"cannot read .*bad\.parquet"):
        ParquetDataset(str(folder / "bad.parquet"))
    imported = builtins.__import__

    def missing(name, *args, **options):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return imported(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ConfigError, match=r"jaxpretrain\[parquet\]"):
        ParquetDataset(path)


def test_bad_rows_and_groups(tmp_path):
    path = tmp_path / "a.parquet"
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    images = pa.array([{"bytes": None, "path": "x.png"}, None, {"bytes": png(1), "path": None}], kind)
    pq.write_table(pa.table({"image": images, "label": [0, 0, 0]}), path, row_group_size=2, compression="none")
    source = ParquetDataset(str(path))
    with pytest.raises(BadImage, match="no bytes, only the path 'x.png'"):
        source[0]
    with pytest.raises(BadImage, match="no bytes$"):
        source[1]
    whole = path.read_bytes()
    start = pq.read_metadata(path).row_group(1).column(0).data_page_offset
    path.write_bytes(whole[:start] + b"\xff" * 16 + whole[start + 16 :])
    with pytest.raises(BadImage, match="row group 1"):
        ParquetDataset(str(path))[2]


def test_large_row_groups_are_worth_a_word(folder, monkeypatch, caplog):
    ParquetDataset(str(folder))
    assert not caplog.text
    monkeypatch.setattr(module, "SLOW", 10)
    ParquetDataset(str(folder))
    assert "folder_to_array_record" in caplog.text
