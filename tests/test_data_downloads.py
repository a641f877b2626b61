"""CIFAR and MNIST from the network when asked: against a server on this machine."""

from __future__ import annotations

import gzip
import hashlib
import io
import struct
import tarfile
import threading

import numpy as np
import pytest

from jaxpretrain.build import ConfigError, build
from jaxpretrain.data import binary_formats
from jaxpretrain.data.archives import unpack
from jaxpretrain.data.class_names import class_names
from jaxpretrain.zoo import download as module
from jaxpretrain.zoo.download import DownloadError
from tests.weights_server import serve

SETS = {
    "CIFAR10": ("cifar-10-binary.tar.gz", "cifar-10-batches-bin", {"train": 10, "test": 2}),
    "CIFAR100": ("cifar-100-binary.tar.gz", "cifar-100-binary", {"train": 3, "test": 3}),
}


def records(name: str, labels: list[int]) -> bytes:
    """A file of the binary version: label bytes, then 3072 pixels that tell the label."""
    coarse = [[0]] * len(labels) if name == "CIFAR100" else [[]] * len(labels)
    return b"".join(bytes([*c, label]) + bytes([label]) * 3072 for c, label in zip(coarse, labels, strict=True))


def archive(name: str) -> bytes:
    kind = getattr(binary_formats, name)
    _, folder, counts = SETS[name]
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for split, files in kind.files.items():
            labels = np.array_split(np.arange(counts[split]), len(files))
            for file, part in zip(files, labels, strict=True):
                data = records(name, part.tolist())
                entry = tarfile.TarInfo(f"{folder}/{file}.bin")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


MNIST_FILES = {
    f"{prefix}-{kind}-ubyte.gz": gzip.compress(idx(array))
    for prefix, n in (("train", 4), ("t10k", 2))
    for kind, array in (
        ("images-idx3", np.full((n, 28, 28), n, np.uint8)),
        ("labels-idx1", np.arange(n, dtype=np.uint8)),
    )
}


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(module, "_PAUSE", 0.01)
    with serve() as server:
        for name, (file, *_) in SETS.items():
            kind, data = getattr(binary_formats, name), archive(name)
            server.content[f"/new/{file}"] = data
            monkeypatch.setattr(kind, "archives", tuple(f"{server.url}/{place}/{file}" for place in ("gone", "new")))
            monkeypatch.setattr(kind, "sha256", hashlib.sha256(data).hexdigest())
        digests = {file: hashlib.sha256(data).hexdigest() for file, data in MNIST_FILES.items()}
        for name in ("MNIST", "FashionMNIST"):
            kind = getattr(binary_formats, name)
            server.content |= {f"/{name}/{file}": data for file, data in MNIST_FILES.items()}
            monkeypatch.setattr(kind, "servers", (f"{server.url}/gone/", f"{server.url}/{name}/"))
            monkeypatch.setattr(kind, "sha256", digests)
        yield server


@pytest.mark.parametrize("name", SETS)
def test_cifar_is_fetched_once_from_where_it_is(server, name, tmp_path):
    file, folder, counts = SETS[name]
    for split, count in counts.items():
        data = build(dict(type=name, data_root=str(tmp_path / "new"), split=split, download=True))
        assert data.labels.tolist() == list(range(count))
        assert all((data[i]["image"] == i).all() and data[i]["image"].shape == (32, 32, 3) for i in range(count))
    assert [path for path, _ in server.requests] == [f"/gone/{file}", f"/new/{file}"]
    assert sorted(p.name for p in (tmp_path / "new").iterdir() if p.name[0] != ".") == sorted([file, folder])
    prefixed = build(dict(type=name, data_root=str(tmp_path), data_prefix="new", test_mode=True))
    assert prefixed.split == "test" and len(prefixed) == counts["test"]


@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST"])
def test_mnist_fetches_what_it_needs(server, name, tmp_path):
    data = build(dict(type=name, data_root=str(tmp_path), test_mode=True, download=True))
    assert data.labels.tolist() == [0, 1] and (data[0]["image"] == 2).all()
    here = sorted(p.name for p in (tmp_path / name / "raw").iterdir() if p.name[0] != ".")
    assert here == ["t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"]
    count = len(server.requests)
    assert len(build(dict(type=name, data_root=str(tmp_path), split="test", download=True))) == 2
    assert len(server.requests) == count, "what is there is not fetched again"
    assert len(build(dict(type=name, data_root=str(tmp_path), download=True))) == 4


def test_mnist_and_fashion_mnist_may_share_a_folder(server, tmp_path):
    build(dict(type="MNIST", data_root=str(tmp_path), download=True))
    with pytest.raises(ConfigError, match="FashionMNIST: train-images-idx3-ubyte not found"):
        build(dict(type="FashionMNIST", data_root=str(tmp_path)))
    fashion = build(dict(type="FashionMNIST", data_root=str(tmp_path), download=True))
    assert fashion.classes == class_names("fashion_mnist")


@pytest.mark.parametrize("name", [*SETS, "MNIST", "FashionMNIST"])
def test_nothing_is_fetched_unless_asked_for(server, name, tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ConfigError) as error:
        build(dict(type=name, data_root=str(tmp_path)))
    message = str(error.value)
    assert "set download=True" in message and f"Found in {tmp_path}: notes.txt" in message
    assert f"Expected under data_root={str(tmp_path)!r}:\n  " in message
    assert not server.requests
    with pytest.raises(ConfigError, match="needs data_root"):
        build(dict(type=name, download=True))


def test_a_damaged_archive_is_not_used(server, tmp_path):
    server.content["/new/cifar-10-binary.tar.gz"] = b"something else"
    with pytest.raises(DownloadError, match="404(?s:.*)SHA-256(?s:.*)was not used"):
        build(dict(type="CIFAR10", data_root=str(tmp_path), download=True))
    assert not (tmp_path / "cifar-10-batches-bin").exists()
    server.content["/new/cifar-10-binary.tar.gz"] = archive("CIFAR10")
    assert len(build(dict(type="CIFAR10", data_root=str(tmp_path), download=True))) == 10


def test_a_broken_connection_is_resumed(server, tmp_path):
    server.breaks = [100]
    assert len(build(dict(type="CIFAR10", data_root=str(tmp_path), download=True))) == 10
    assert server.requests[-1] == ("/new/cifar-10-binary.tar.gz", "bytes=100-")


def test_unpacking_that_broke_off_is_done_again_and_only_once(tmp_path):
    path = tmp_path / "cifar-10-binary.tar.gz"
    path.write_bytes(archive("CIFAR10"))
    (tmp_path / "cifar-10-batches-bin.partial/cifar-10-batches-bin").mkdir(parents=True)
    (tmp_path / "cifar-10-batches-bin.partial/cifar-10-batches-bin/half.bin").touch()
    threads = [threading.Thread(target=unpack, args=(path, "cifar-10-batches-bin")) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(p.name for p in tmp_path.iterdir() if p.name[0] != ".") == ["cifar-10-batches-bin", path.name]
    assert len(list((tmp_path / "cifar-10-batches-bin").iterdir())) == 6
    with pytest.raises(DownloadError, match="holds no folder cifar-100-binary"):
        unpack(path, "cifar-100-binary")


def test_archives_cannot_write_elsewhere(tmp_path):
    path = tmp_path / "in" / "evil.tar.gz"
    path.parent.mkdir()
    with tarfile.open(path, "w:gz") as tar:
        entry = tarfile.TarInfo("../../outside.txt")
        entry.size = 1
        tar.addfile(entry, io.BytesIO(b"x"))
    with pytest.raises(tarfile.TarError):
        unpack(path, "folder")
    assert not (tmp_path / "outside.txt").exists() and not (tmp_path / "in/folder").exists()


def test_names_of_classes_and_the_arguments_that_all_data_sets_have(server, tmp_path):
    options = dict(data_root=str(tmp_path), download=True)
    for name in ("CIFAR10", "CIFAR100", "MNIST", "FashionMNIST"):
        data = build(dict(type=name, **options, indices=-2, lazy_init=True))
        assert data.classes == class_names(name) and len(data) == 2
    own = [str(i) for i in range(10)]
    assert build(dict(type="CIFAR10", **options, metainfo=dict(classes=own))).classes == tuple(own)
    with pytest.raises(ConfigError, match="CIFAR10 has 10 classes, but classes names 1"):
        build(dict(type="CIFAR10", **options, classes=["x"]))
