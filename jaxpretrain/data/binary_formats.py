"""The binary files in which CIFAR and MNIST are published, read from a given folder. Nothing is downloaded."""

from __future__ import annotations

import gzip
import io
import math
import pickle
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from jaxtyping import UInt8

from jaxpretrain.build import ConfigError
from jaxpretrain.data.base import InMemory, check_split

_CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_CIFAR100 = (
    "apple", "aquarium_fish", "baby", "bear", "beaver", "bed", "bee", "beetle", "bicycle", "bottle", "bowl",
    "boy", "bridge", "bus", "butterfly", "camel", "can", "castle", "caterpillar", "cattle", "chair",
    "chimpanzee", "clock", "cloud", "cockroach", "couch", "crab", "crocodile", "cup", "dinosaur", "dolphin",
    "elephant", "flatfish", "forest", "fox", "girl", "hamster", "house", "kangaroo", "keyboard", "lamp",
    "lawn_mower", "leopard", "lion", "lizard", "lobster", "man", "maple_tree", "motorcycle", "mountain",
    "mouse", "mushroom", "oak_tree", "orange", "orchid", "otter", "palm_tree", "pear", "pickup_truck",
    "pine_tree", "plain", "plate", "poppy", "porcupine", "possum", "rabbit", "raccoon", "ray", "road", "rocket",
    "rose", "sea", "seal", "shark", "shrew", "skunk", "skyscraper", "snail", "snake", "spider", "squirrel",
    "streetcar", "sunflower", "sweet_pepper", "table", "tank", "telephone", "television", "tiger", "tractor",
    "train", "trout", "tulip", "turtle", "wardrobe", "whale", "willow_tree", "wolf", "woman", "worm",
)  # fmt: skip
_FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")


class CIFAR10(InMemory):
    """CIFAR-10 (Krizhevsky, 2009): 50000 + 10000 images of 32x32 in 10 classes.

    Args:
        data_root: folder that holds `cifar-10-batches-py` (the "python version") or `cifar-10-batches-bin` (the "binary
            version"), or that folder itself.
        split: `train` or `test`.
    """

    url = "https://www.cs.toronto.edu/~kriz/cifar.html"
    folders = ("cifar-10-batches-py", "cifar-10-batches-bin")
    files: ClassVar = {"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "test": ("test_batch",)}
    label_key = "labels"
    label_bytes = 1  # of a record of the binary version; the last of them is the label
    class_names: tuple[str, ...] = _CIFAR10

    def __init__(self, data_root: str, split: str = "train"):
        name = type(self).__name__
        check_split(name, split, ("train", "test"))
        root = Path(data_root).expanduser()
        names = self.files[split]
        for folder in (root, *(root / f for f in self.folders)):
            if all((folder / n).is_file() for n in names):
                parts = [self._read_python(folder / n) for n in names]
                break
            if all((folder / f"{n}.bin").is_file() for n in names):
                parts = [self._read_binary(folder / f"{n}.bin") for n in names]
                break
        else:
            raise ConfigError(
                f"{name}: {', '.join(names)} (or the same with .bin) found neither in {root.absolute()} nor in its "
                f"{' or '.join(self.folders)}. Unpack the archive of {self.url} and set data_root to its folder."
            )
        pixels, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        images = np.ascontiguousarray(pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
        super().__init__(images, labels, self.class_names)

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
    """CIFAR-100 (Krizhevsky, 2009) with its 100 fine labels; folder `cifar-100-python` or `cifar-100-binary`; see
    CIFAR10.
    """

    folders = ("cifar-100-python", "cifar-100-binary")
    files: ClassVar = {"train": ("train",), "test": ("test",)}
    label_key = "fine_labels"
    label_bytes = 2  # coarse, fine
    class_names = _CIFAR100


class MNIST(InMemory):
    """MNIST (LeCun et al., 1998): 60000 + 10000 grey images of 28x28 in 10 classes, as RGB.

    Args:
        data_root: folder with the four idx files under their published names (`train-images-idx3-ubyte`, ...), plain or
            with `.gz`; also found in its sub-folder `raw` or `<class name>/raw`.
        split: `train` or `test`.
    """

    url = "http://yann.lecun.com/exdb/mnist/"
    class_names: tuple[str, ...] = tuple(str(digit) for digit in range(10))

    def __init__(self, data_root: str, split: str = "train"):
        check_split(type(self).__name__, split, ("train", "test"))
        prefix = "train" if split == "train" else "t10k"
        images = read_idx(self._find(data_root, f"{prefix}-images", 3), 3)
        labels = read_idx(self._find(data_root, f"{prefix}-labels", 1), 1)
        super().__init__(images, labels.astype(np.int32), self.class_names)

    def _find(self, data_root: str, stem: str, dims: int) -> Path:
        root, name = Path(data_root).expanduser(), type(self).__name__
        for folder in (root, root / "raw", root / name / "raw"):
            for spelling in (f"{stem}-idx{dims}-ubyte", f"{stem}.idx{dims}-ubyte"):
                for path in (folder / spelling, folder / f"{spelling}.gz"):
                    if path.is_file():
                        return path
        raise ConfigError(
            f"{name}: {stem}-idx{dims}-ubyte (or with .gz) found neither in {root.absolute()} nor in its raw/ or "
            f"{name}/raw/. "
            f"Download the four files of {self.url} and set data_root to their folder."
        )


class FashionMNIST(MNIST):
    """Fashion-MNIST (Xiao et al., 2017): the files and sizes of MNIST. See MNIST."""

    url = "https://github.com/zalandoresearch/fashion-mnist"
    class_names = _FASHION


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
