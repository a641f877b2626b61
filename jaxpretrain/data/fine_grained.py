"""Data sets of kinds that look alike: birds, cars, aircraft, flowers, pets, dishes, species."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from jaxpretrain.build import ConfigError
from jaxpretrain.data.image_set import ImageSet, Listing, mat_field, read_mat


class CUB(ImageSet):
    """Caltech-UCSD Birds 200-2011 (Wah et al., 2011): 200 species; 5994 training and 5794 test images.

    See ImageSet for the arguments. MMClassification's configs tell the split by `test_mode` alone: with no `split`, that
    is `test`.
    """

    names = "cub"
    layout = """
        images/<class>/*.jpg
        images.txt: lines of '<image id> <path in images/>'
        image_class_labels.txt: lines of '<image id> <class, from 1>'
        train_test_split.txt: lines of '<image id> <1 for training, 0 for test>'
    """

    def __init__(self, data_root: str, split: str | None = None, test_mode: bool = False, **options: Any):
        super().__init__(data_root, ("test" if test_mode else "train") if split is None else split, **options)

    def read(self) -> Listing:
        folder = self.folder("images")
        paths = dict(self.rows(self.file("images.txt"), r"(\d+) (.+)", "<image id> <path>"))
        kinds = dict(self.rows(self.file("image_class_labels.txt"), r"(\d+) (\d+)", "<image id> <class>"))
        training = dict(self.rows(self.file("train_test_split.txt"), r"(\d+) ([01])", "<image id> <0 or 1>"))
        if not paths.keys() == kinds.keys() == training.keys():
            counts = f"{len(paths)}, {len(kinds)} and {len(training)}"
            raise ConfigError(
                f"CUB: images.txt, image_class_labels.txt and train_test_split.txt in {self.root} are not about the same "
                f"images: they have {counts} lines; unpack the archive again"
            )
        wanted = "1" if self.split == "train" else "0"
        ids = [i for i in paths if training[i] == wanted]
        return [f"{folder}/{paths[i]}" for i in ids], [int(kinds[i]) - 1 for i in ids]


class StanfordCars(ImageSet):
    """Stanford Cars (Krause et al., 2013): 196 models; 8144 training and 8041 test images. See ImageSet for arguments."""

    names = "stanford_cars"
    layout = """
        either cars_annos.mat, and car_ims/*.jpg
        or devkit/cars_train_annos.mat and cars_train/*.jpg for the split train,
        devkit/cars_test_annos_withlabels.mat (or beside devkit/) and cars_test/*.jpg for the split test
    """

    def read(self) -> Listing:
        if self.has("cars_annos.mat"):
            path = self.file("cars_annos.mat")
            (cars,) = read_mat(path, "annotations")
            kept = mat_field(cars, "test", path).astype(int) == (self.split == "test")
            paths = [str(name) for name in mat_field(cars, "relative_im_path", path)[kept]]
            self.folder(os.path.dirname(paths[0]) if paths else "car_ims")
            return paths, mat_field(cars, "class", path)[kept].astype(int) - 1
        if self.split == "train":
            path = self.file("devkit/cars_train_annos.mat")
        else:
            path = self.file("devkit/cars_test_annos_withlabels.mat", "cars_test_annos_withlabels.mat")
        folder = self.folder(f"cars_{self.split}")
        (cars,) = read_mat(path, "annotations")
        paths = [f"{folder}/{name}" for name in mat_field(cars, "fname", path)]
        return paths, mat_field(cars, "class", path).astype(int) - 1


class FGVCAircraft(ImageSet):
    """FGVC-Aircraft, release 2013b (Maji et al., 2013): 100 variants; 3334 training, 3333 validation, 3333 test images.

    `trainval`, the default, has 6667. See ImageSet for the arguments.
    """

    names = "fgvc_aircraft"
    splits = ("trainval", "train", "val", "test")
    layout = """
        data/images/*.jpg
        data/images_variant_<split>.txt: lines of '<image> <variant>'
    """

    def read(self) -> Listing:
        folder = self.folder("data/images")
        listed = self.file(f"data/images_variant_{self.split}.txt")
        rows = list(self.rows(listed, r"(\S+) (.+)", "<image> <variant>"))
        return [f"{folder}/{image}.jpg" for image, _ in rows], self.labels_of(variant for _, variant in rows)


class Flowers102(ImageSet):
    """Oxford 102 Flowers (Nilsback and Zisserman, 2008): 102 categories; 1020 training, 1020 validation, 6149 test images.

    `trainval`, the default, has 2040: those of train, then those of val. See ImageSet for the arguments.
    """

    names = "flowers102"
    splits = ("trainval", "train", "val", "test")
    layout = """
        jpg/image_00001.jpg, ...
        imagelabels.mat: 'labels', the category of each image, from 1
        setid.mat: 'trnid', 'valid' and 'tstid', the numbers of the images of each split
    """

    def read(self) -> Listing:
        folder = self.folder("jpg")
        (labels,) = read_mat(self.file("imagelabels.mat"), "labels")
        path = self.file("setid.mat")
        parts = {"train": ["trnid"], "val": ["valid"], "trainval": ["trnid", "valid"], "test": ["tstid"]}[self.split]
        numbers = [int(number) for part in read_mat(path, *parts) for number in part.reshape(-1)]
        if numbers and not 1 <= min(numbers) <= max(numbers) <= labels.size:
            raise ConfigError(f"{path}: images {min(numbers)}..{max(numbers)}, but imagelabels.mat has {labels.size}")
        return (
            [f"{folder}/image_{number:05d}.jpg" for number in numbers],
            [int(labels.reshape(-1)[number - 1]) - 1 for number in numbers],
        )


class OxfordIIITPet(ImageSet):
    """Oxford-IIIT Pet (Parkhi et al., 2012): 37 breeds of cats and dogs; 3680 images in trainval (default), 3669 in test.

    See ImageSet for the arguments.
    """

    names = "oxford_pets"
    splits = ("trainval", "test")
    layout = """
        images/*.jpg
        annotations/<split>.txt: lines of '<image> <breed, from 1> <species> <breed of the species>'
    """

    def read(self) -> Listing:
        folder = self.folder("images")
        listed = self.file(f"annotations/{self.split}.txt")
        rows = list(self.rows(listed, r"(\S+) (\d+) \d+ \d+", "<image> <breed> <species> <breed of the species>"))
        return [f"{folder}/{image}.jpg" for image, _ in rows], [int(breed) - 1 for _, breed in rows]


class Food101(ImageSet):
    """Food-101 (Bossard et al., 2014): 101 dishes; 75750 training and 25250 test images. See ImageSet for the arguments."""

    names = "food101"
    layout = """
        images/<class>/*.jpg
        meta/<split>.txt: lines of '<class>/<image>'; or meta/<split>.json: these by class
    """

    def read(self) -> Listing:
        folder = self.folder("images")
        listed = self.file(f"meta/{self.split}.txt", f"meta/{self.split}.json")
        if listed.endswith(".json"):
            names = [name for group in read_json(listed).values() for name in group]
        else:
            names = [name for (name,) in self.rows(listed, r"([^/]+/[^/]+)", "<class>/<image>")]
        return [f"{folder}/{name}.jpg" for name in names], self.labels_of(name.partition("/")[0] for name in names)


class iNaturalist2018(ImageSet):
    """iNaturalist 2018 (Van Horn et al., 2018): 8142 species; 437513 training, 24426 validation, 149394 test images.

    Read from the publisher's annotations, or from lists of `path label`, which MMPretrain's converter makes of them. The
    test images have no labels (-1).

    Args:
        data_root: folder of the data set, with what `layout` says.
        split: train, val or test.
        data_prefix: folder of the images, to which the paths in the annotations are relative.
        ann_file: another annotation file or list, relative to data_root.
        options: see ImageSet.

    Names of the classes are those of the annotations' `categories` or of `categories.json`; lists have none.
    """

    splits = ("train", "val", "test")
    layout = """
        <split>2018.json, the publisher's annotations; or meta/<split>.txt, lines of '<path> <label>'
        train_val2018/<kingdom>/<species>/*.jpg and test2018/*.jpg, the images, as the annotations name them
        categories.json, the names of the species (optional)
    """

    def __init__(
        self,
        data_root: str,
        split: str | None = None,
        data_prefix: str | Mapping[str, str] = "",
        ann_file: str = "",
        **options: Any,
    ):
        self.prefix = data_prefix if isinstance(data_prefix, str) else data_prefix.get("img_path", "")
        self.ann_file = ann_file
        self._names: tuple[str, ...] | None = None
        super().__init__(data_root, split, **options)

    def read(self) -> Listing:
        lists = [self.ann_file] if self.ann_file else [f"{self.split}2018.json", f"meta/{self.split}.txt"]
        listed = self.file(*lists)
        if not listed.endswith(".json"):
            rows = list(self.rows(listed, r"(.+?)(?: (\d+))?", "<path> <label>"))
            paths, labels = [path for path, _ in rows], [int(label or -1) for _, label in rows]
        else:
            content = read_json(listed)
            kinds = {row["image_id"]: row["category_id"] for row in content.get("annotations", ())}
            paths = [image["file_name"] for image in content["images"]]
            labels = [kinds.get(image["id"], -1) for image in content["images"]]
            self._names = self._read_names(content)
        if self.split != "test" and labels and min(labels) < 0:
            raise ConfigError(f"{listed}: {labels.count(-1)} of {len(labels)} images have no label")
        return [os.path.join(self.prefix, path) for path in paths], labels

    def _read_names(self, content: Mapping[str, Any]) -> tuple[str, ...] | None:
        rows = read_json(self.file("categories.json")) if self.has("categories.json") else content.get("categories")
        if not rows:
            return None
        names = {row["id"]: row["name"] for row in rows}
        return tuple(str(names.get(i, i)) for i in range(max(names) + 1))

    def known_classes(self) -> tuple[str, ...] | None:
        return self._names

    @property
    def num_classes(self) -> int | None:
        return 8142 if self.classes is None else len(self.classes)


def read_json(path: str) -> Any:
    """The content of a JSON file. Raises ConfigError for a damaged one."""
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except ValueError as error:
        raise ConfigError(f"{path}: not JSON ({error}); download it again") from error
