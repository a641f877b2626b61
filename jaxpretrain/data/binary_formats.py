"""The binary files in which CIFAR and MNIST are published: read from a given folder, downloaded to it when asked."""

from __future__ import annotations

import gzip
import io
import math
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Int32, UInt8

from jaxpretrain.build import ConfigError
from jaxpretrain.data.base import InMemory, check_split, read_classes
from jaxpretrain.data.class_names import class_names
from jaxpretrain.data.layout import layout_error


class BinaryFiles(InMemory):
    """Few files with all pixels and labels of a split. A sub-class says in `read` how they are found and read.

    Args:
        data_root: folder of the files, see `layout`.
        split: `train` or `test`; by default train, or test with `test_mode`, by which MMClassification's configs tell.
        metainfo: `classes` gives other names for the classes.
        download: fetch what is missing, to data_root, with its checksum. MMPretrain does so unless told not to; here it
            has to be asked for.
        data_prefix: sub-folder of data_root; or the folder itself, with no data_root.
        test_mode: see `split`.
        classes: other names for the classes, or a text file with one per line.
        common: `indices` and others, see Source.

    Raises:
        ConfigError: files that are missing or damaged, an unknown split.
        DownloadError: no connection, or another file than promised.
    """

    names: ClassVar[str]  # of the classes, in class_names
    layout: ClassVar[str]  # what is expected under data_root

    def __init__(
        self,
        data_root: str = "",
        split: str | None = None,
        metainfo: Mapping[str, Any] | None = None,
        download: bool = False,
        data_prefix: str | Mapping[str, str] = "",
        test_mode: bool = False,
        classes: Sequence[str] | str | None = None,
        **common: Any,
    ):
        self.split = ("test" if test_mode else "train") if split is None else split
        check_split(type(self).__name__, self.split, ("train", "test"))
        prefix = data_prefix if isinstance(data_prefix, str) else data_prefix.get("root", "")
        if not data_root and not prefix:
            raise ConfigError(f"{type(self).__name__} needs data_root, the folder of its files")
        root = Path(data_root).expanduser() / Path(prefix).expanduser()
        images, labels = self.read(root, download)
        known = class_names(self.names)
        classes = read_classes((metainfo or {}).get("classes") if classes is None else classes) or known
        if len(classes) != len(known):
            raise ConfigError(f"{type(self).__name__} has {len(known)} classes, but classes names {len(classes)}")
        super().__init__(images, labels, classes, **common)

    def read(self, root: Path, download: bool) -> tuple[UInt8[np.ndarray, "n h w *c"], Int32[np.ndarray, " n"]]:
        """The images and labels of the split."""
        raise NotImplementedError


class CIFAR10(BinaryFiles):
    """CIFAR-10 (Krizhevsky, 2009): 50000 + 10000 images of 32x32 in 10 classes. See BinaryFiles for the arguments."""

    url = "https://www.cs.toronto.edu/~kriz/cifar.html"
    archives: ClassVar = tuple(  # the university has moved its pages from one to the other
        f"https://{place}/cifar-10-binary.tar.gz" for place in ("cave.cs.toronto.edu/kriz", "www.cs.toronto.edu/~kriz")
    )
    sha256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"  # as TensorFlow Datasets lists it
    folders = ("cifar-10-batches-py", "cifar-10-batches-bin")
    files: ClassVar = {"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "test": ("test_batch",)}
    label_key = "labels"
    label_bytes = 1  # of a record of the binary version; the last of them is the label
    names = "cifar10"
    layout = """
        cifar-10-batches-py/data_batch_1 to data_batch_5 and test_batch, the "python version"
        or cifar-10-batches-bin/data_batch_1.bin to data_batch_5.bin and test_batch.bin, the "binary version"
        or the files without the folder
    """

    def read(self, root: Path, download: bool) -> tuple[UInt8[np.ndarray, "n 32 32 3"], Int32[np.ndarray, " n"]]:
        parts = self._parts(root)
        if parts is None and download:
            from jaxpretrain.data.archives import fetch, unpack

            unpack(fetch(self.archives, self.sha256, root), self.folders[1])
            parts = self._parts(root)
        if parts is None:
            raise layout_error(
                type(self).__name__,
                root,
                f"{', '.join(self.files[self.split])} not found: unpack the archive of {self.url} and set data_root to "
                "its folder, or set download=True (162 MiB)",
                self.layout,
            )
        pixels, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return np.ascontiguousarray(pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)), labels

    def _parts(self, root: Path) -> list[tuple[np.ndarray, np.ndarray]] | None:
        """Pixels and labels of each file, in either version; None if they are not all there."""
        names = self.files[self.split]
        for folder in (root, *(root / f for f in self.folders)):
            if all((folder / name).is_file() for name in names):
                return [self._read_python(folder / name) for name in names]
            if all((folder / f"{name}.bin").is_file() for name in names):
                return [self._read_binary(folder / f"{name}.bin") for name in names]
        return None

    def _read_python(self, path: Path) -> tuple[np.ndarray, np.ndarray]:
        """(pixels uint8 [N,3072], labels [N]) of a pickled batch."""
        try:
            batch = _NumpyUnpickler(io.BytesIO(path.read_bytes()), encoding="latin1").load()
            pixels, labels = np.asarray(batch["data"]), np.asarray(batch[self.label_key], np.int32)
        except (pickle.UnpicklingError, EOFError, KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise ConfigError(
                f"{path}: not a batch of {type(self).__name__} ({error}); unpack the archive again"
            ) from error
        if pixels.dtype != np.uint8 or pixels.shape != (len(labels), 3072):
            raise ConfigError(
                f"{path}: expected uint8 pixels [{len(labels)}, 3072], got {pixels.dtype} {list(pixels.shape)}"
            )
        return pixels, labels

    def _read_binary(self, path: Path) -> tuple[np.ndarray, np.ndarray]:
        """(pixels uint8 [N,3072], labels [N]) of a file of fixed-size records: label bytes, then the three planes."""
        data = np.fromfile(path, np.uint8)
        record = self.label_bytes + 3072
        if data.size == 0 or data.size % record:
            raise ConfigError(f"{path}: {data.size} bytes are not a whole number of {record}-byte records")
        data = data.reshape(-1, record)
        return data[:, self.label_bytes :], data[:, self.label_bytes - 1].astype(np.int32)


class CIFAR100(CIFAR10):
    """CIFAR-100 (Krizhevsky, 2009) with its 100 fine labels; see CIFAR10."""

    archives: ClassVar = tuple(url.replace("cifar-10-", "cifar-100-") for url in CIFAR10.archives)
    sha256 = "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec"
    folders = ("cifar-100-python", "cifar-100-binary")
    files: ClassVar = {"train": ("train",), "test": ("test",)}
    label_key = "fine_labels"
    label_bytes = 2  # coarse, fine
    names = "cifar100"
    layout = """
        cifar-100-python/train and test, the "python version"
        or cifar-100-binary/train.bin and test.bin, the "binary version"
        or the files without the folder
    """


class MNIST(BinaryFiles):
    """MNIST (LeCun et al., 1998): 60000 + 10000 grey images of 28x28 in 10 classes, as RGB.

    See BinaryFiles for the arguments. Downloads go to `<class name>/raw` in data_root, as torchvision's do, so that MNIST
    and Fashion-MNIST, whose files have the same names, may share a data_root.
    """

    servers: ClassVar[tuple[str, ...]] = (
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
    )
    sha256: ClassVar[dict[str, str]] = {  # as TensorFlow Datasets lists them
        "train-images-idx3-ubyte.gz": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        "train-labels-idx1-ubyte.gz": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
        "t10k-images-idx3-ubyte.gz": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
        "t10k-labels-idx1-ubyte.gz": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
    }
    names = "mnist"
    layout = """
        train-images-idx3-ubyte and train-labels-idx1-ubyte for the split train, t10k-... for test, plain or with .gz
        or these in raw/ or <class name>/raw/
    """

    def read(self, root: Path, download: bool) -> tuple[UInt8[np.ndarray, "n 28 28"], Int32[np.ndarray, " n"]]:
        prefix = "train" if self.split == "train" else "t10k"
        images = read_idx(self._find(root, f"{prefix}-images", 3, download), 3)
        labels = read_idx(self._find(root, f"{prefix}-labels", 1, download), 1)
        return images, labels.astype(np.int32)

    def _find(self, root: Path, stem: str, dims: int, download: bool) -> Path:
        own = root / type(self).__name__ / "raw"
        for folder in (own, root, root / "raw"):
            for spelling in (f"{stem}-idx{dims}-ubyte", f"{stem}.idx{dims}-ubyte"):
                for path in (folder / spelling, folder / f"{spelling}.gz"):
                    if path.is_file():
                        return path
        file = f"{stem}-idx{dims}-ubyte.gz"
        if download:
            from jaxpretrain.data.archives import fetch

            return fetch([server + file for server in self.servers], self.sha256[file], own)
        problem = f"{file.removesuffix('.gz')} not found: set data_root to its folder, or set download=True"
        raise layout_error(type(self).__name__, root, problem, self.layout)


class FashionMNIST(MNIST):
    """Fashion-MNIST (Xiao et al., 2017): the files and sizes of MNIST. See MNIST."""

    servers = ("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",)
    sha256: ClassVar = {  # as TensorFlow Datasets lists them
        "train-images-idx3-ubyte.gz": "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
        "train-labels-idx1-ubyte.gz": "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
        "t10k-images-idx3-ubyte.gz": "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
        "t10k-labels-idx1-ubyte.gz": "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
    }
    names = "fashion_mnist"


def read_idx(path: Path, dims: int) -> UInt8[np.ndarray, " ..."]:
    """The array in an idx file of unsigned bytes with `dims` dimensions; `.gz` is unpacked.

    Raises:
        ConfigError: not such a file, or a damaged one.
    """
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise ConfigError(f"{path}: damaged gzip file ({error}); download it again") from error
    header = 4 + 4 * dims
    if (
        data[:4] != bytes([0, 0, 8, dims]) or len(data) < header
    ):  # two zeros, type 8 = unsigned byte, number of dimensions
        raise ConfigError(f"{path}: not an idx file of bytes with {dims} dimensions (starts with {data[:4]!r})")
    shape = tuple(int(n) for n in np.frombuffer(data, ">u4", dims, 4))
    if len(data) - header != math.prod(shape):
        raise ConfigError(f"{path}: truncated: {math.prod(shape)} values announced, {len(data) - header} found")
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


class _NumpyUnpickler(pickle.Unpickler):
    """Builds NumPy arrays and plain containers, and refuses everything else: a pickle may otherwise run any code."""

    def find_class(self, module: str, name: str) -> Any:
        reconstruct = np.empty(0).__reduce__()[0]
        allowed = {
            ("numpy.core.multiarray", "_reconstruct"): reconstruct,
            ("numpy._core.multiarray", "_reconstruct"): reconstruct,
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
            ("_codecs", "encode"): _latin1,
        }
        if (module, name) not in allowed:
            raise pickle.UnpicklingError(f"refused to load {module}.{name}")
        return allowed[module, name]


def _latin1(text: str, encoding: str = "latin1") -> bytes:
    """Stands for `_codecs.encode`, by which pickles of protocol 2 write bytes; they need no other codec."""
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"refused codec {encoding!r}")
    return text.encode("latin1")
