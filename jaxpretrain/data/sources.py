"""Data sets by name, `dict(type='ImageNet', data_root='data/imagenet', split='train')`: random access to samples."""

from __future__ import annotations

import glob
import os
from array import array
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from jaxpretrain.build import ConfigError
from jaxpretrain.data.base import InMemory, Sample, Source, check_split, read_classes
from jaxpretrain.data.binary_formats import CIFAR10, CIFAR100, MNIST, FashionMNIST
from jaxpretrain.data.class_names import class_names
from jaxpretrain.data.image_files import ImageFiles
from jaxpretrain.data.layout import layout_error
from jaxpretrain.data.listing import Paths, list_images
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
        common: see Source.
    """

    def __init__(self, split: str = "train", size: int | None = None, **common: Any):
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
        super().__init__(images, digits.target[order], **{"classes": map(str, digits.target_names), **common})


class CustomDataset(ImageFiles):
    """Image files: in one sub-folder per class, or listed in a text file; with labels or without.

    - No `ann_file`, `with_label=True`: every folder directly under `data_root/data_prefix` is a class, in the order of
      the names; images may lie deeper. `with_label=False`: all images under it.
    - `ann_file`: lines of `path label`, the label an integer from 0, or of `path` alone with `with_label=False`. Paths
      are relative to `data_root/data_prefix`. Several files are read one after another.

    Args:
        data_root: folder to which `data_prefix` and `ann_file` refer.
        data_prefix: folder of the images; a mapping gives it as `img_path`.
        ann_file: the text file or files.
        with_label: whether there are labels; labels are -1 otherwise. None: some lines of the list have one.
        extensions: what is an image when listing a folder; case does not matter.
        classes: names of the classes, or a text file with one per line; by default the names of the folders. Also
            accepted as `metainfo=dict(classes=...)`.
        metainfo: see `classes`.
        common: `indices` and others, see Source.

    Raises:
        ConfigError: a folder or file that does not exist, no images, malformed lines, or another number of classes than
            `classes` names. That a listed image is missing shows only when it is read.
    """

    layout = """
        <data_prefix>/<class>/*.jpg, where images may lie deeper
        or <ann_file> with lines of 'path label', and the images in <data_prefix>/
    """

    def __init__(
        self,
        data_root: str = "",
        data_prefix: str | Mapping[str, str] = "",
        ann_file: str | Sequence[str] = "",
        with_label: bool | None = True,
        extensions: Sequence[str] = EXTENSIONS,
        classes: Sequence[str] | str | None = None,
        metainfo: Mapping[str, Any] | None = None,
        **common: Any,
    ):
        if not isinstance(data_prefix, str):
            data_prefix = data_prefix.get("img_path", "")
        self.data_root = os.path.expanduser(data_root)
        self.root = os.path.join(self.data_root, os.path.expanduser(data_prefix)) or "."
        self.extensions = tuple(extension.lower() for extension in extensions)
        self.classes = read_classes((metainfo or {}).get("classes") if classes is None else classes)
        place = os.path.abspath(self.root)
        if ann_file:
            files = [ann_file] if isinstance(ann_file, str) else ann_file
            files = [os.path.join(os.path.expanduser(data_root), os.path.expanduser(file)) for file in files]
            parts = [self._from_list(file, with_label) for file in files]
            paths, labels = Paths.join([part[0] for part in parts]), np.concatenate([part[1] for part in parts])
            place = ", ".join(files)
        elif not os.path.isdir(self.root):
            raise self._wrong(
                f"no folder {os.path.abspath(self.root)}; set data_root and data_prefix of the dataset, for instance "
                "--config.data.train.dataset.data_root=/path/to/images"
            )
        elif with_label:
            paths, labels = self._from_class_folders(self._class_folders())
        else:
            paths = list_images(self.root, [""], self.extensions)[0]
            labels = np.full(len(paths), -1)
        if not paths:
            raise self._wrong(f"no images in {place} (extensions: {', '.join(self.extensions)})")
        self._paths = paths
        self.labels = np.asarray(labels, np.int32)
        self._num_classes = None
        if with_label or (with_label is None and self.labels.max() >= 0):
            self._num_classes = len(self.classes) if self.classes is not None else int(self.labels.max()) + 1
            if self.labels.min() < (0 if with_label else -1) or self.labels.max() >= self._num_classes:
                raise ConfigError(
                    f"{place}: labels {self.labels.min()}..{self.labels.max()} do not fit {self._num_classes} classes"
                )
        super().__init__(**common)

    def _from_list(self, ann_file: str, with_label: bool | None) -> tuple[Paths, Int[np.ndarray, " n"]]:
        if not os.path.isfile(ann_file):
            raise self._wrong(f"no file {os.path.abspath(ann_file)} (ann_file)", os.path.dirname(ann_file))
        labels = array("q")

        def read() -> Iterator[str]:
            with open(ann_file, encoding="utf-8") as lines:
                for number, line in enumerate(lines, 1):
                    if not (line := line.strip()):
                        continue
                    path, _, label = line.rpartition(" ") if with_label is not False else (line, "", "-1")
                    if with_label is None and not (path and label.lstrip("-").isdigit()):
                        path, label = line, "-1"
                    if not path or not label.lstrip("-").isdigit():
                        raise ConfigError(
                            f"{ann_file}:{number}: expected 'path label' with an integer label, got {line!r}; "
                            "with_label=False for a list without labels"
                        )
                    labels.append(int(label))
                    yield path.strip()

        return Paths(read()), np.array(labels)

    def _class_folders(self) -> list[str]:
        """Names of the class folders, in the order of the labels."""
        folders = _folders_in(self.root)
        if not folders:
            raise self._wrong(
                f"{os.path.abspath(self.root)} has no class sub-folders; list the images in a text file (ann_file='...', "
                "lines of 'path label'), or set with_label=False for images without labels"
            )
        if self.classes is None:
            self.classes = tuple(folders)
        elif len(self.classes) != len(folders):
            raise ConfigError(
                f"{os.path.abspath(self.root)} has {len(folders)} class folders, but classes names {len(self.classes)}"
            )
        return folders

    def _from_class_folders(self, folders: Sequence[str]) -> tuple[Paths, Int[np.ndarray, " n"]]:
        found = list_images(self.root, folders, self.extensions)
        return Paths.join(found), np.repeat(np.arange(len(found)), [len(part) for part in found])

    def _wrong(self, problem: str, inside: str | None = None) -> ConfigError:
        return layout_error(type(self).__name__, self.data_root, problem, self.layout, inside or self.root)

    @property
    def num_classes(self) -> int | None:
        return self._num_classes


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
        classes, metainfo: see CustomDataset; by default the usual names of the 1000 classes, or the wnids of fewer.
        options: see CustomDataset; `with_label` is False for the split `test`, unless it is given.
    """

    layout = """
        train/<wnid>/*.JPEG and val/<wnid>/*.JPEG
        or train/ and val/ with any files, listed in meta/train.txt and meta/val.txt as lines of 'path label'
        or ArrayRecord shards train*.array_record and val*.array_record, as write_array_record makes them
    """

    def __init__(
        self,
        data_root: str = "",
        split: str = "",
        data_prefix: str | Mapping[str, str] = "",
        ann_file: str = "",
        classes: Sequence[str] | str | None = None,
        metainfo: Mapping[str, Any] | None = None,
        **options: Any,
    ):
        options = {"with_label": split != "test", "extensions": (*EXTENSIONS, ".webp"), **options}
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
            common = {name: options[name] for name in options.keys() - {"with_label", "extensions"}}
            self._records = ArrayRecordDataset(shards, "", classes, None if classes else 1000, **common)
            self.classes = self._records.classes
            self._num_classes = self._records.num_classes
            self.labels = self._records.labels
            self._name_classes()
            return
        if not os.path.isdir(folder):
            raise self._not_found(f"no folder {os.path.abspath(folder)}", self.data_root)
        if not ann_file and options["with_label"] and not any(entry.is_dir() for entry in os.scandir(folder)):
            problem = f"{os.path.abspath(folder)} has no class folders, and there is no meta/{split}.txt"
            raise self._not_found(problem, folder)
        super().__init__(data_root, data_prefix, ann_file, classes=classes, metainfo=metainfo, **options)
        if options["with_label"]:
            self._name_classes()

    def _name_classes(self) -> None:
        """The usual names, where there are none, or only the folders' of all 1000 classes."""
        if self.classes is None:
            self._num_classes = max(1000, self._num_classes or 0)
        elif (len(self.classes), self.classes[0], self.classes[-1]) != (1000, "n01440764", "n15075141"):
            return
        if self._num_classes == 1000:
            self.classes = class_names("imagenet")

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

    def _not_found(self, problem: str, inside: str) -> ConfigError:
        part = "val" if self.split == "val" else "train"
        problem = (
            f"{problem}. Set the folder with --config.data.{part}.dataset.data_root=/path/to/imagenet, or run without data "
            "on the embedded digits by the recipe :digits, as in --config=configs/mae.py:digits"
        )
        return layout_error("ImageNet", self.data_root, problem, self.layout, inside)

    def __len__(self) -> int:
        return len(self._records) if self._records is not None else super().__len__()

    def __getitem__(self, index: int) -> Sample:
        return self._records[index] if self._records is not None else super().__getitem__(index)

    def name(self, index: int) -> str:
        return self._records.name(index) if self._records is not None else super().name(index)


def _folders_in(path: str) -> list[str]:
    return sorted(entry.name for entry in os.scandir(path) if entry.is_dir() and not entry.name.startswith("."))
