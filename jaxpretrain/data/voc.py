"""PASCAL VOC: images with several labels each."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from jaxpretrain.build import ConfigError
from jaxpretrain.data.base import Sample, Source, check_split, read_classes
from jaxpretrain.data.class_names import class_names
from jaxpretrain.data.layout import layout_error

_PREFIX = {"img_path": "JPEGImages", "ann_path": "Annotations"}
_SPLITS = ("train", "val", "trainval", "test")
_LAYOUT = """
    JPEGImages/*.jpg
    ImageSets/Main/<split>.txt, the images; and <class>_<split>.txt there, or Annotations/*.xml, their labels
"""


class VOC(Source):
    """PASCAL VOC 2007 or 2012 (Everingham et al., 2010) for classification: 20 classes, several of them in an image.

    Read from a local copy: `ImageSets/Main/<split>.txt` lists the images; their labels are in
    `ImageSets/Main/<class>_<split>.txt`, or, where those are missing, follow from the objects in `Annotations/*.xml`.

    A sample's `label` is int8 [20]: 1 where the class is there, 0 where it is not, -1 where all its objects are marked as
    difficult, which neither training nor scores count. (MMPretrain trains on them as not there.)

    Args:
        data_root: the folder with JPEGImages and ImageSets, such as data/VOCdevkit/VOC2007.
        split: train, val, trainval or test.
        image_set_path: another list of images, relative to data_root; `split` then only tells which labels to look for.
        data_prefix: the folders of images and annotations; one name is that of the images, and there are no annotations.
        metainfo: `classes` may name others than VOC's, in the order of the labels.
        common: `indices` and others, see Source. Labels are read in `test_mode` all the same.

    Attributes:
        labels: of all samples, int8 [N, 20]. None if there is nothing to tell them from; a sample's is then -1.

    Raises:
        ConfigError: folders or files that are missing or malformed, an unknown split or class.
    """

    per_sample = ("ids", "labels")

    def __init__(
        self,
        data_root: str,
        split: str = "trainval",
        image_set_path: str = "",
        data_prefix: str | Mapping[str, str] = _PREFIX,
        metainfo: Mapping[str, Any] | None = None,
        **common: Any,
    ):
        check_split("VOC", split, _SPLITS)
        self.root, self.split = Path(data_root).expanduser(), split
        prefix = {"img_path": data_prefix} if isinstance(data_prefix, str) else dict(data_prefix)
        self.images, self.annotations = self.root / prefix.get("img_path", "JPEGImages"), prefix.get("ann_path")
        self.classes: tuple[str, ...] = read_classes((metainfo or {}).get("classes")) or class_names("VOC")
        listed = self.root / (image_set_path or os.path.join("ImageSets", "Main", f"{split}.txt"))
        if not listed.is_file():
            problem = (
                f"there is no file {listed.absolute()}; data_root must be the folder with JPEGImages/, Annotations/ and "
                "ImageSets/, such as data/VOCdevkit/VOC2007"
            )
            raise layout_error("VOC", self.root, problem, _LAYOUT)
        self.ids = [line.split()[0] for line in listed.read_text().splitlines() if line.strip()]
        if not self.ids:
            raise ConfigError(f"VOC: {listed} lists no images")
        self.labels = self._read_labels(listed.parent)
        super().__init__(**common)

    def _read_labels(self, folder: Path) -> np.ndarray | None:
        files = [folder / f"{name}_{self.split}.txt" for name in self.classes]
        if all(file.is_file() for file in files):
            return np.stack([self._read_class(file) for file in files], axis=1)
        if self.annotations and (self.root / self.annotations).is_dir():
            return np.stack([self._read_annotation(name) for name in self.ids])
        return None

    def _read_class(self, file: Path) -> np.ndarray:
        """int8 [N]: a line has an image and 1, -1 (not there) or 0 (difficult)."""
        meaning = {"1": 1, "-1": 0, "0": -1}
        found: dict[str, int] = {}
        for number, line in enumerate(file.read_text().splitlines(), 1):
            if not line.strip():
                continue
            name, *rest = line.split()
            if len(rest) != 1 or rest[0] not in meaning:
                raise ConfigError(f"{file}:{number}: expected 'image label' with 1, 0 or -1, got {line!r}")
            found[name] = meaning[rest[0]]
        if missing := [name for name in self.ids if name not in found]:
            raise ConfigError(f"{file} says nothing about {len(missing)} images: {', '.join(missing[:5])}")
        return np.array([found[name] for name in self.ids], np.int8)

    def _read_annotation(self, name: str) -> np.ndarray:
        """int8 [classes] of one image, from its objects."""
        path = self.root / str(self.annotations) / f"{name}.xml"
        try:
            objects = ElementTree.parse(path).getroot().iter("object")
            pairs = [(o.findtext("name", "").strip(), o.findtext("difficult", "0").strip() == "1") for o in objects]
        except (OSError, ElementTree.ParseError) as error:
            raise ConfigError(f"VOC: {path} cannot be read: {error}") from error
        target = np.zeros(len(self.classes), np.int8)
        for kind, difficult in sorted(pairs, key=lambda pair: not pair[1]):  # difficult ones first
            if kind not in self.classes:
                raise ConfigError(f"{path}: there is no class {kind!r}; the classes are {', '.join(self.classes)}")
            target[self.classes.index(kind)] = -1 if difficult else 1
        return target

    @property
    def num_classes(self) -> int | None:
        return len(self.classes)

    def __len__(self) -> int:
        return len(self.ids)

    def name(self, index: int) -> str:
        return str(self.images / f"{self.ids[index]}.jpg")

    def __getitem__(self, index: int) -> Sample:
        path = self.name(index)
        with open(path, "rb", buffering=0) as file:
            return {"image": file.read(), "label": -1 if self.labels is None else self.labels[index], "path": path}
