"""Data sets of scenes, textures and objects: SUN397, Places205, DTD, Caltech101, ImageNet-21k."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxpretrain.build import ConfigError
from jaxpretrain.data.base import check_split
from jaxpretrain.data.class_names import class_names
from jaxpretrain.data.image_set import ImageSet, Listing, mat_field, read_mat
from jaxpretrain.data.sources import EXTENSIONS, CustomDataset

logger = logging.getLogger(__name__)


class SUN397(ImageSet):
    """SUN397 (Xiao et al., 2010): 397 scenes, the first of the ten partitions: 19850 training and 19850 test images.

    Some of its files are called .jpg and are PNG, GIF or BMP; that does not matter here. See ImageSet for the arguments.
    """

    names = "sun397"
    layout = """
        SUN397/<letter>/<scene>/*.jpg
        Partitions/Training_01.txt and Partitions/Testing_01.txt: lines of '/<letter>/<scene>/<image>'
    """

    def read(self) -> Listing:
        folder = self.folder("SUN397")
        listed = self.file(f"Partitions/{'Training' if self.split == 'train' else 'Testing'}_01.txt")
        rows = list(self.rows(listed, r"/(\w/(.+)/[^/]+)", "/<letter>/<scene>/<image>"))
        # A scene may have a place: /a/apse/indoor is called apse_indoor.
        return [f"{folder}/{path}" for path, _ in rows], self.labels_of(scene.replace("/", "_") for _, scene in rows)


class DTD(ImageSet):
    """Describable Textures (Cimpoi et al., 2014): 47 textures; the first of ten partitions: 1880 images in each split.

    `trainval`, the default, has 3760. See ImageSet for the arguments. Read from `imdb/imdb.mat`, in its order, as MMPretrain
    does; where that is missing, from the text files.
    """

    names = "dtd"
    splits = ("trainval", "train", "val", "test")
    layout = """
        images/<texture>/*.jpg
        imdb/imdb.mat: struct 'images' with 'name', 'class' and 'set'
        or labels/train1.txt, labels/val1.txt and labels/test1.txt: lines of '<texture>/<image>.jpg'
    """

    def read(self) -> Listing:
        folder = self.folder("images")
        parts = ["train", "val"] if self.split == "trainval" else [self.split]
        if self.has("imdb/imdb.mat"):
            path = self.file("imdb/imdb.mat")
            (images,) = read_mat(path, "images")
            kept = np.isin(mat_field(images, "set", path), [("train", "val", "test").index(part) + 1 for part in parts])
            names = [str(name) for name in mat_field(images, "name", path)[kept]]
            labels = (mat_field(images, "class", path)[kept].astype(int) - 1).tolist()
        else:
            lists = [self.file("imdb/imdb.mat", f"labels/{part}1.txt") for part in parts]
            form = (r"([^/]+/[^/]+)", "<texture>/<image>.jpg")
            names = [name for path in lists for (name,) in self.rows(path, *form)]
            labels = self.labels_of(name.partition("/")[0] for name in names)
        return [f"{folder}/{name}" for name in names], labels


class Caltech101(ImageSet):
    """Caltech-101 (Fei-Fei et al., 2004): 101 kinds of objects and a background class; 9144 images.

    There is no official split. `meta/<split>.txt` are lists such as those that MMPretrain offers, with 3060 training
    images, 30 of each class; without them, 30 images of each class, drawn once and for all, are the training set, and the
    others the test set. See ImageSet for the arguments.
    """

    names = "caltech101"
    layout = """
        101_ObjectCategories/<class>/*.jpg
        meta/train.txt and meta/test.txt (optional): lines of '<class>/<image> <label>'
    """
    _PER_CLASS = 30

    def read(self) -> Listing:
        folder = self.folder("101_ObjectCategories")
        if self.has("meta"):
            rows = list(self.rows(self.file(f"meta/{self.split}.txt"), r"(.+) (\d+)", "<class>/<image> <label>"))
            return [f"{folder}/{path}" for path, _ in rows], [int(label) for _, label in rows]
        logger.warning(
            "Caltech101: no meta/%s.txt in %s, so the split is one drawn here: compare results with those of others only "
            "if they used the same lists",
            self.split,
            self.root,
        )
        rng, paths, labels = np.random.RandomState(0), [], []  # RandomState: its streams are frozen for good
        for label, name in enumerate(self.known_classes() or ()):
            place = os.path.join(self.root, self.folder(f"{folder}/{name}"))
            images = sorted(image for image in os.listdir(place) if image.lower().endswith(EXTENSIONS))
            order = rng.permutation(len(images))
            chosen = order[: self._PER_CLASS] if self.split == "train" else order[self._PER_CLASS :]
            paths += [f"{folder}/{name}/{images[i]}" for i in sorted(chosen)]
            labels += [label] * len(chosen)
        return paths, labels


class Places205(CustomDataset):
    """Places205 (Zhou et al., 2014): 205 scenes; 2448873 training and 20500 validation images.

    Takes what CustomDataset takes, in the same layouts; the names of the classes are known. The publisher's own lists,
    `ann_file='trainvalsplit_places205/train_places205.csv'`, go with
    `data_prefix='data/vision/torralba/deeplearning/images256'`.
    """

    def __init__(
        self,
        data_root: str = "",
        data_prefix: str | Mapping[str, str] = "",
        ann_file: str = "",
        metainfo: Mapping[str, Any] | None = None,
        **options: Any,
    ):
        if options.get("classes") is None and not (metainfo or {}).get("classes"):
            options["classes"] = class_names("Places205")
        super().__init__(data_root, data_prefix, ann_file, metainfo=metainfo, **options)


class ImageNet21k(CustomDataset):
    """ImageNet-21k (Deng et al., 2009): 14197088 images in 21841 classes, one folder for each, or listed.

    Layouts under `data_root`: `train/<wnid>/`, in which images may lie deeper, with labels in the order of the wnids; and
    `meta/train.txt` with lines of `path label`, which starts at once, where listing the folders takes minutes.

    Args:
        data_root: folder of the data set.
        split: `train`; or empty, and `data_prefix` and `ann_file` say it all, for a validation set of one's own.
        data_prefix, ann_file: see CustomDataset; the split's own by default.
        metainfo: see CustomDataset.
        multi_label: refused, as in MMPretrain; MultiLabelDataset reads several labels of each image.
        options: see CustomDataset. There are no names for the classes of a list, unless `classes` gives them.
    """

    def __init__(
        self,
        data_root: str = "",
        split: str = "",
        data_prefix: str | Mapping[str, str] = "",
        ann_file: str = "",
        metainfo: Mapping[str, Any] | None = None,
        multi_label: bool = False,
        **options: Any,
    ):
        if multi_label:
            raise ConfigError("ImageNet21k has one label for each image; use MultiLabelDataset for several")
        if split:
            check_split("ImageNet21k", split, ("train",))
            data_prefix = data_prefix or split
            listed = os.path.join("meta", f"{split}.txt")
            if not ann_file and os.path.isfile(os.path.join(os.path.expanduser(data_root), listed)):
                ann_file = listed
        super().__init__(data_root, data_prefix, ann_file, metainfo=metainfo, **options)
