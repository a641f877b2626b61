"""Data sets by name, `dict(type='ImageNet', data_root='data/imagenet', split='train')`: random access to samples."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxpretrain.build import ConfigError
from jaxpretrain.data.base import InMemory, Sample, Source, check_split, read_classes
from jaxpretrain.data.binary_formats import CIFAR10, CIFAR100, MNIST, FashionMNIST
from jaxpretrain.data.records import ArrayRecordDataset, TFDSDataset, write_array_record

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "MNIST",
    "ArrayRecordDataset",
    "CustomDataset",
    "Digits",
    "FashionMNIST",
    "ImageNet",
    "InMemory",
    "Source",
    "TFDSDataset",
    "write_array_record",
]

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif")


class Digits(InMemory):
    """scikit-learn's handwritten digits: 1797 grey images of 8x8 in 10 classes, as RGB. They come with scikit-learn.

    Grey levels 0..16 are scaled to 0..255. A fixed permutation gives 1500 images to `train` and 297 to `val`.

    Args:
        split: `train` or `val`.
        size: edge length to which the images are enlarged once, by Pillow's bicubic filter; None keeps 8.
    """

    def __init__(self, split: str = "train", size: int | None = None):
        from sklearn.datasets import load_digits

        check_split("Digits", split, ("train", "val"))
        digits = load_digits()
        order = np.random.RandomState(0).permutation(len(digits.target))  # RandomState: its streams are frozen for good
        order = order[:1500] if split == "train" else order[1500:]
        images = np.rint(digits.images[order] * (255 / 16)).astype(np.uint8)
        if size is not None:
            from PIL import Image

            enlarge = [Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC) for image in images]
            images = np.stack([np.asarray(image) for image in enlarge])
        super().__init__(images, digits.target[order], [str(name) for name in digits.target_names])


class CustomDataset(Source):
    """Image files: in one sub-folder per class, or listed in a text file; with labels or without.

    - No `ann_file`, `with_label=True`: every folder directly under `data_root/data_prefix` is a class, in the order of
      the names; images may lie deeper. `with_label=False`: all images under it.
    - `ann_file`: lines of `path label`, the label an integer from 0, or of `path` alone with `with_label=False`. Paths
      are relative to `data_root/data_prefix`.

    Args:
        data_root: folder to which `data_prefix` and `ann_file` refer.
        data_prefix: folder of the images; a mapping gives it as `img_path`.
        ann_file: the text file.
        with_label: whether there are labels; labels are -1 otherwise.
        extensions: what is an image when listing a folder; case does not matter.
        classes: names of the classes, or a text file with one per line; by default the names of the folders. Also
            accepted as `metainfo=dict(classes=...)`.
        metainfo: see `classes`.

    Raises:
        ConfigError: a folder or file that does not exist, no images, malformed lines, or another number of classes than
            `classes` names. That a listed image is missing shows only when it is read.
    """

    def __init__(
        self,
        data_root: str = "",
        data_prefix: str | Mapping[str, str] = "",
        ann_file: str = "",
        with_label: bool = True,
        extensions: Sequence[str] = EXTENSIONS,
        classes: Sequence[str] | str | None = None,
        metainfo: Mapping[str, Any] | None = None,
    ):
        if not isinstance(data_prefix, str):
            data_prefix = data_prefix.get("img_path", "")
        self.root = os.path.join(os.path.expanduser(data_root), os.path.expanduser(data_prefix)) or "."
        self.extensions = tuple(extension.lower() for extension in extensions)
        self.classes = read_classes((metainfo or {}).get("classes") if classes is None else classes)
        if ann_file:
            ann_file = os.path.join(os.path.expanduser(data_root), os.path.expanduser(ann_file))
            paths, labels = self._from_list(ann_file, with_label)
        elif not os.path.isdir(self.root):
            raise ConfigError(
                f"{type(self).__name__}: no folder {os.path.abspath(self.root)}; set data_root and data_prefix of the "
                "dataset, for instance --config.data.train.dataset.data_root=/path/to/images"
            )
        elif with_label:
            paths, labels = self._from_class_folders(self._class_folders())
        else:
            paths = sorted(self._images_in(""))
            labels = [-1] * len(paths)
        if not paths:
            raise ConfigError(
                f"{type(self).__name__}: no images in {os.path.abspath(ann_file or self.root)} (extensions: "
                f"{', '.join(self.extensions)})"
            )
        # One array of bytes, not a million Python strings: less memory, and cheap to send to worker processes.
        self._paths = np.array([os.fsencode(path) for path in paths])
        self.labels = np.asarray(labels, np.int32)
        self._num_classes = None
        if with_label:
            self._num_classes = len(self.classes) if self.classes is not None else int(self.labels.max()) + 1
            if self.labels.min() < 0 or self.labels.max() >= self._num_classes:
                raise ConfigError(
                    f"{ann_file or self.root}: labels {self.labels.min()}..{self.labels.max()} do not fit "
                    f"{self._num_classes} classes"
                )

    def _from_list(self, ann_file: str, with_label: bool) -> tuple[list[str], list[int]]:
        if not os.path.isfile(ann_file):
            raise ConfigError(f"{type(self).__name__}: no file {os.path.abspath(ann_file)} (ann_file)")
        paths, labels = [], []
        with open(ann_file, encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if not (line := line.strip()):
                    continue
                path, _, label = line.rpartition(" ") if with_label else (line, "", "-1")
                if not path or not label.lstrip("-").isdigit():
                    raise ConfigError(
                        f"{ann_file}:{number}: expected 'path label' with an integer label, got {line!r}; "
                        "with_label=False for a list without labels"
                    )
                paths.append(path.strip())
                labels.append(int(label))
        return paths, labels

    def _class_folders(self) -> list[str]:
        """Names of the class folders, in the order of the labels."""
        folders = _folders_in(self.root)
        if not folders:
            raise ConfigError(
                f"{type(self).__name__}: {os.path.abspath(self.root)} has no class sub-folders; list the images in a "
                "text file (ann_file='...', lines of 'path label'), or set with_label=False for images without labels"
            )
        if self.classes is None:
            self.classes = tuple(folders)
        elif len(self.classes) != len(folders):
            raise ConfigError(
                f"{os.path.abspath(self.root)} has {len(folders)} class folders, but classes names {len(self.classes)}"
            )
        return folders

    def _from_class_folders(self, folders: Sequence[str]) -> tuple[list[str], list[int]]:
        paths, labels = [], []
        for label, folder in enumerate(folders):
            found = sorted(self._images_in(folder))
            paths += found
            labels += [label] * len(found)
        return paths, labels

    def _images_in(self, folder: str) -> Iterator[str]:
        """Images under `root/folder`, relative to root; `scandir` knows files from folders without asking for each."""
        try:
            entries = list(os.scandir(os.path.join(self.root, folder)))
        except FileNotFoundError:
            return
        for entry in entries:
            path = os.path.join(folder, entry.name)
            if entry.name.lower().endswith(self.extensions):
                yield path
            elif entry.is_dir():
                yield from self._images_in(path)

    @property
    def num_classes(self) -> int | None:
        return self._num_classes

    def __len__(self) -> int:
        return len(self._paths)

    def name(self, index: int) -> str:
        return os.path.join(self.root, os.fsdecode(self._paths[index]))

    def __getitem__(self, index: int) -> Sample:
        path = self.name(index)
        with open(path, "rb", buffering=0) as file:
            return {"image": file.read(), "label": int(self.labels[index]), "path": path}


class ImageNet(CustomDataset):
    """ImageNet-1k (Russakovsky et al., 2015), 1281167 training and 50000 validation images, from a local copy.

    Layouts under `data_root`, tried in this order:

    - `meta/<split>.txt` with lines of `path label`, and the images it names in `<split>/`;
    - `<split>/<wnid>/*.JPEG`, labels in the order of the wnids (of `train/`, where that is there too);
    - ArrayRecord shards `<split>*.array_record` or `<split>/*.array_record`, as `write_array_record` makes them.

    Args:
        data_root: folder of the data set.
        split: `train`, `val` or `test`; `test` needs no labels. Empty: `data_prefix` and `ann_file` say it all.
        data_prefix, ann_file: see CustomDataset; the split's own by default.
    """

    def __init__(
        self,
        data_root: str = "",
        split: str = "",
        data_prefix: str | Mapping[str, str] = "",
        ann_file: str = "",
        classes: Sequence[str] | str | None = None,
        metainfo: Mapping[str, Any] | None = None,
    ):
        self._records: ArrayRecordDataset | None = None
        self.split = split
        self.data_root = os.path.expanduser(data_root)
        if split:
            check_split("ImageNet", split, ("train", "val", "test"))
            if not data_prefix:
                data_prefix = split
            listed = os.path.join(self.data_root, "meta", f"{split}.txt")
            if not ann_file and os.path.isfile(listed):
                ann_file = os.path.join("meta", f"{split}.txt")
        prefix = data_prefix if isinstance(data_prefix, str) else data_prefix.get("img_path", "")
        folder = os.path.join(self.data_root, prefix)
        shards = self._shards() if split and not ann_file else []
        if shards:
            self._records = ArrayRecordDataset(shards, classes=classes, num_classes=None if classes else 1000)
            self.classes = self._records.classes
            self._num_classes = self._records.num_classes
            return
        if not os.path.isdir(folder):
            raise ConfigError(self._advice(f"no folder {os.path.abspath(folder)}"))
        if not ann_file and split != "test" and not any(entry.is_dir() for entry in os.scandir(folder)):
            raise ConfigError(
                self._advice(f"{os.path.abspath(folder)} has no class folders, and there is no meta/{split}.txt")
            )
        super().__init__(data_root, data_prefix, ann_file, split != "test", (*EXTENSIONS, ".webp"), classes, metainfo)
        if ann_file and self.classes is None and split != "test":
            self._num_classes = max(1000, self._num_classes or 0)

    def _shards(self) -> list[str]:
        root = glob.escape(self.data_root)
        patterns = (
            f"{self.split}*.array_record",
            f"{self.split}*.array_record-*",
            os.path.join(self.split, "*.array_record"),
        )
        return sorted(path for pattern in patterns for path in glob.glob(os.path.join(root, pattern)))

    def _class_folders(self) -> list[str]:
        folders = super()._class_folders()
        train = os.path.join(self.data_root, "train")
        if self.split != "val" or not os.path.isdir(train):
            return folders
        # A validation set that lacks a class must not shift the labels of the classes behind it.
        classes = _folders_in(train)
        if unknown := sorted(set(folders) - set(classes)) if classes else []:
            raise ConfigError(
                f"{self.root} has class folders that {train} lacks: {', '.join(unknown[:5])} ({len(unknown)} in all)"
            )
        if classes and self.classes == tuple(folders):
            self.classes = tuple(classes)
        return classes or folders

    def _advice(self, problem: str) -> str:
        part = "val" if self.split == "val" else "train"
        return (
            f"ImageNet not found: {problem}. Accepted under data_root={self.data_root!r}:\n"
            "  train/<wnid>/*.JPEG and val/<wnid>/*.JPEG\n"
            "  train/ and val/ with any files, listed in meta/train.txt and meta/val.txt as lines of 'path label'\n"
            "  ArrayRecord shards train*.array_record and val*.array_record, written by "
            "jaxpretrain.data.sources.write_array_record\n"
            f"Set the folder with --config.data.{part}.dataset.data_root=/path/to/imagenet, or run without data on the "
            "embedded digits by the recipe :digits, as in --config=configs/mae.py:digits"
        )

    def __len__(self) -> int:
        return len(self._records) if self._records is not None else super().__len__()

    def __getitem__(self, index: int) -> Sample:
        return self._records[index] if self._records is not None else super().__getitem__(index)

    def name(self, index: int) -> str:
        return self._records.name(index) if self._records is not None else super().name(index)


def _folders_in(path: str) -> list[str]:
    return sorted(entry.name for entry in os.scandir(path) if entry.is_dir() and not entry.name.startswith("."))
