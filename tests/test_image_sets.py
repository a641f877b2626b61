"""The published data sets of image files, each on a small copy of its layout, written here as its publisher packs it."""

from __future__ import annotations

import io
import json
import logging
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from jaxpretrain.build import ConfigError, build, resolve
from jaxpretrain.data.class_names import class_names
from jaxpretrain.data.pipeline import EvalLoader

Listed = list[tuple[str, int]]  # paths relative to data_root, and labels


def put(root: Path, *paths: str) -> None:
    """Files that hold their own paths, so that reading the wrong one shows."""
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(path)


def write(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def structs(**fields: list) -> np.ndarray:
    """What MATLAB calls a struct array, 1 x n."""
    table = np.zeros((1, len(next(iter(fields.values())))), [(name, object) for name in fields])
    for name, values in fields.items():
        table[name][0] = values
    return table


def cell(values: list) -> np.ndarray:
    array = np.empty((1, len(values)), object)
    array[0] = values
    return array


def make_cub(root: Path) -> None:
    paths = ["001.Black_footed_Albatross/a.jpg", "001.Black_footed_Albatross/b.jpg", "200.Common_Yellowthroat/c.jpg"]
    put(root / "images", *paths)
    write(root / "images.txt", *(f"{i} {path}" for i, path in enumerate(paths, 1)))
    write(root / "image_class_labels.txt", "1 1", "2 1", "3 200")
    write(root / "train_test_split.txt", "1 0", "2 1", "3 1")


def make_cars(root: Path) -> None:
    put(root, *(f"cars_{split}/0000{i}.jpg" for split in ("train", "test") for i in (1, 2)))
    (root / "devkit").mkdir()
    for name, kinds in (("train_annos", [196, 3]), ("test_annos_withlabels", [1, 2])):
        boxes = {f"bbox_{corner}": [1, 2] for corner in ("x1", "y1", "x2", "y2")}
        table = structs(**boxes, **{"class": [np.uint8(kind) for kind in kinds], "fname": ["00001.jpg", "00002.jpg"]})
        savemat(root / "devkit" / f"cars_{name}.mat", {"annotations": table})


def make_cars_in_one(root: Path) -> None:
    put(root, *(f"car_ims/00000{i}.jpg" for i in (1, 2, 3)))
    paths = [f"car_ims/00000{i}.jpg" for i in (1, 2, 3)]
    table = structs(relative_im_path=paths, **{"class": [7, 8, 196], "test": [0, 1, 0]})
    savemat(root / "cars_annos.mat", {"annotations": table, "class_names": cell(["a", "b"])})


def make_aircraft(root: Path) -> None:
    put(root / "data", "images/0034309.jpg", "images/1025794.jpg", "images/0056978.jpg", "images/0900914.jpg")
    parts = {"train": ["1025794 707-320"], "val": ["0034309 MD-80"], "test": ["0056978 Yak-42", "0900914 Cessna 172"]}
    parts["trainval"] = parts["train"] + parts["val"]
    for split, lines in parts.items():
        write(root / "data" / f"images_variant_{split}.txt", *lines)


def make_flowers(root: Path) -> None:
    put(root, *(f"jpg/image_0000{i}.jpg" for i in range(1, 6)))
    savemat(root / "imagelabels.mat", {"labels": np.array([[77, 1, 102, 5, 5]], np.uint8)})
    ids = {"trnid": [[4, 1]], "valid": [[2]], "tstid": [[5, 3]]}
    savemat(root / "setid.mat", {name: np.array(row, np.uint16) for name, row in ids.items()})


def make_pets(root: Path) -> None:
    put(root / "images", "Abyssinian_100.jpg", "american_bulldog_1.jpg", "yorkshire_terrier_9.jpg")
    write(root / "annotations/trainval.txt", "yorkshire_terrier_9 37 2 25", "Abyssinian_100 1 1 1")
    write(root / "annotations/test.txt", "american_bulldog_1 2 2 1")


def make_food(root: Path, as_json: bool = False) -> None:
    put(root / "images", "waffles/7.jpg", "apple_pie/12.jpg", "baklava/3.jpg")
    for split, names in (("train", ["apple_pie/12", "waffles/7"]), ("test", ["baklava/3"])):
        write(root / "meta" / f"{split}.txt", *names)
        if as_json:
            (root / "meta" / f"{split}.txt").unlink()
            content = {name.split("/")[0]: [name] for name in names}
            (root / "meta" / f"{split}.json").write_text(json.dumps(content))


def make_sun(root: Path) -> None:
    put(root / "SUN397", "a/abbey/s1.jpg", "a/apse/indoor/s2.jpg", "y/youth_hostel/s3.jpg")
    write(root / "Partitions/Training_01.txt", "/a/abbey/s1.jpg", "/y/youth_hostel/s3.jpg")
    write(root / "Partitions/Testing_01.txt", "/a/apse/indoor/s2.jpg")


DTD_IMAGES = ["banded/banded_0002.jpg", "banded/banded_0004.jpg", "zigzagged/zigzagged_0001.jpg", "dotted/dotted_1.jpg"]


def make_dtd(root: Path, mat: bool = True) -> None:
    put(root / "images", *DTD_IMAGES)
    if mat:
        (root / "imdb").mkdir()
        fields = {"id": [[1, 2, 3, 4]], "name": cell(DTD_IMAGES), "set": [[2, 1, 3, 1]], "class": [[1, 1, 47, 11]]}
        savemat(root / "imdb/imdb.mat", {"images": fields, "meta": {"sets": cell(["train", "val", "test"])}})
    for split, rows in (("train", [1, 3]), ("val", [0]), ("test", [2])):
        write(root / "labels" / f"{split}1.txt", *(DTD_IMAGES[i] for i in rows))


def make_caltech(root: Path) -> None:
    put(
        root / "101_ObjectCategories",
        "yin_yang/image_0001.jpg",
        "ant/image_0001.jpg",
        "BACKGROUND_Google/image_0001.jpg",
    )
    write(root / "meta/train.txt", "yin_yang/image_0001.jpg 101", "BACKGROUND_Google/image_0001.jpg 0")
    write(root / "meta/test.txt", "ant/image_0001.jpg 8")


def make_inat(root: Path) -> None:
    kinds = [{"id": 1, "name": "Puma concolor", "supercategory": "Mammalia"}, {"id": 0, "name": "Alces alces"}]
    for split, images in (("train", [(9, "Plantae/1/x"), (4, "Aves/0/y")]), ("val", [(5, "Aves/0/z")]), ("test", [])):
        rows = [{"id": i, "file_name": f"train_val2018/{name}.jpg", "width": 8, "height": 8} for i, name in images]
        labels = [{"id": i, "image_id": i, "category_id": int(name.split("/")[1])} for i, name in reversed(images)]
        content = {"images": rows, "annotations": labels, "categories": kinds, "info": {}, "licenses": []}
        if split == "test":
            content = {"images": [{"id": 1, "file_name": "test2018/t.jpg"}], "info": {}}
        (root / f"{split}2018.json").write_text(json.dumps(content))
        put(root, *(row["file_name"] for row in content["images"]))


def make_inat_lists(root: Path) -> None:
    """As MMPretrain's converter writes them."""
    put(root, "train_val2018/Plantae/1/x.jpg", "train_val2018/Aves/0/z.jpg")
    write(root / "meta/train.txt", "train_val2018/Plantae/1/x.jpg 1")
    write(root / "meta/val.txt", "train_val2018/Aves/0/z.jpg 0")


def make_in_shop(root: Path) -> None:
    rows = [
        ("img/WOMEN/Dresses/id_00000002/02_1_front.jpg", "id_00000002", "train"),
        ("img/WOMEN/Dresses/id_00000007/01_1_front.jpg", "id_00000007", "gallery"),
        ("img/WOMEN/Dresses/id_00000001/01_1_front.jpg", "id_00000001", "query"),
        ("img/MEN/Denim/id_00000003/01_1_front.jpg", "id_00000003", "train"),
        ("img/WOMEN/Dresses/id_00000001/01_2_side.jpg", "id_00000001", "gallery"),
        ("img/WOMEN/Dresses/id_00000007/01_2_side.jpg", "id_00000007", "gallery"),
        ("img/WOMEN/Dresses/id_00000002/02_2_side.jpg", "id_00000002", "train"),
        ("img/WOMEN/Dresses/id_00000007/01_3_back.jpg", "id_00000007", "query"),
    ]
    put(root / "Img", *(path for path, *_ in rows))
    lines = [f"{path}   {item} {split:>8} " for path, item, split in rows]
    write(root / "Eval/list_eval_partition.txt", str(len(rows)), "image_name item_id evaluation_status", *lines)


def make_imagenet21k(root: Path) -> None:
    put(root / "train", "n00004475/a.JPEG", "n00004475/deeper/b.jpg", "n15300051/c.JPEG")


def make_imagenet21k_list(root: Path) -> None:
    put(root / "train", "x.jpg", "y.jpg")
    write(root / "meta/train.txt", "y.jpg 3", "x.jpg 0")


def make_places(root: Path) -> None:
    put(root / "images256", "a/abbey/gsun_1.jpg", "w/wheat_field/gsun_2.jpg")
    write(root / "trainvalsplit_places205/val_places205.csv", "w/wheat_field/gsun_2.jpg 201", "a/abbey/gsun_1.jpg 0")


PLACES = dict(data_prefix="images256", ann_file="trainvalsplit_places205/val_places205.csv")
SIDES = dict(banded=0, dotted=10, zigzagged=46)  # labels of DTD's textures


@dataclass
class Case:
    """A data set, how to write a small copy of it, and what it should be in each split; the first is the default."""

    type: str
    make: Callable[[Path], None]
    expected: dict[str, Listed]
    classes: int
    options: dict[str, Any] = field(default_factory=dict)
    note: str = ""

    def build(self, root: Path, split: str | None = None, **options: Any) -> Any:
        options = {**self.options, **options, **({"split": split} if split else {})}
        return build(dict(type=self.type, data_root=str(root), **options))


def flower(*numbers: int) -> Listed:
    return [(f"jpg/image_0000{number}.jpg", [76, 0, 101, 4, 4][number - 1]) for number in numbers]


def textures(*positions: int) -> Listed:
    return [(f"images/{DTD_IMAGES[i]}", SIDES[DTD_IMAGES[i].split("/")[0]]) for i in positions]


CUB, SHOP = "images/001.Black_footed_Albatross/", "Img/img/WOMEN/Dresses/"
FOOD = {
    "train": [("images/apple_pie/12.jpg", 0), ("images/waffles/7.jpg", 100)],
    "test": [("images/baklava/3.jpg", 2)],
}
AIR = {
    "train": [("data/images/1025794.jpg", 0)],
    "val": [("data/images/0034309.jpg", 86)],
    "test": [("data/images/0056978.jpg", 99), ("data/images/0900914.jpg", 47)],
}
CASES = [
    Case("CUB", make_cub, {"train": [(f"{CUB}b.jpg", 0), ("images/200.Common_Yellowthroat/c.jpg", 199)],
                           "test": [(f"{CUB}a.jpg", 0)]}, 200),
    Case("StanfordCars", make_cars, {"train": [("cars_train/00001.jpg", 195), ("cars_train/00002.jpg", 2)],
                                     "test": [("cars_test/00001.jpg", 0), ("cars_test/00002.jpg", 1)]}, 196),
    Case("StanfordCars", make_cars_in_one, {"train": [("car_ims/000001.jpg", 6), ("car_ims/000003.jpg", 195)],
                                            "test": [("car_ims/000002.jpg", 7)]}, 196, note="one file"),
    Case("FGVCAircraft", make_aircraft, {"trainval": AIR["train"] + AIR["val"], **AIR}, 100),
    Case("Flowers102", make_flowers, {"trainval": flower(4, 1, 2), "train": flower(4, 1), "val": flower(2),
                                      "test": flower(5, 3)}, 102),
    Case("OxfordIIITPet", make_pets, {"trainval": [("images/yorkshire_terrier_9.jpg", 36), ("images/Abyssinian_100.jpg", 0)],
                                      "test": [("images/american_bulldog_1.jpg", 1)]}, 37),
    Case("Food101", make_food, FOOD, 101),
    Case("Food101", lambda root: make_food(root, as_json=True), FOOD, 101, note="json"),
    Case("SUN397", make_sun, {"train": [("SUN397/a/abbey/s1.jpg", 0), ("SUN397/y/youth_hostel/s3.jpg", 396)],
                              "test": [("SUN397/a/apse/indoor/s2.jpg", 9)]}, 397),
    Case("DTD", make_dtd, {"trainval": textures(0, 1, 3), "train": textures(1, 3), "val": textures(0),
                           "test": textures(2)}, 47),
    Case("DTD", lambda root: make_dtd(root, mat=False), {"trainval": textures(1, 3, 0), "train": textures(1, 3),
                                                         "val": textures(0), "test": textures(2)}, 47, note="lists"),
    Case("Caltech101", make_caltech, {"train": [("101_ObjectCategories/yin_yang/image_0001.jpg", 101),
                                                ("101_ObjectCategories/BACKGROUND_Google/image_0001.jpg", 0)],
                                      "test": [("101_ObjectCategories/ant/image_0001.jpg", 8)]}, 102),
    Case("iNaturalist2018", make_inat, {"train": [("train_val2018/Plantae/1/x.jpg", 1), ("train_val2018/Aves/0/y.jpg", 0)],
                                        "val": [("train_val2018/Aves/0/z.jpg", 0)], "test": [("test2018/t.jpg", -1)]}, 2),
    Case("iNaturalist2018", make_inat_lists, {"train": [("train_val2018/Plantae/1/x.jpg", 1)],
                                              "val": [("train_val2018/Aves/0/z.jpg", 0)]}, 8142, note="lists"),
    Case("InShop", make_in_shop, {"train": [(f"{SHOP}id_00000002/02_1_front.jpg", 0),
                                            ("Img/img/MEN/Denim/id_00000003/01_1_front.jpg", 1),
                                            (f"{SHOP}id_00000002/02_2_side.jpg", 0)],
                                  "query": [(f"{SHOP}id_00000001/01_1_front.jpg", 1), (f"{SHOP}id_00000007/01_3_back.jpg", 0)],
                                  "gallery": [(f"{SHOP}id_00000007/01_1_front.jpg", 0), (f"{SHOP}id_00000001/01_2_side.jpg", 1),
                                              (f"{SHOP}id_00000007/01_2_side.jpg", 0)]}, 2),
    Case("ImageNet21k", make_imagenet21k, {"train": [("train/n00004475/a.JPEG", 0), ("train/n00004475/deeper/b.jpg", 0),
                                                     ("train/n15300051/c.JPEG", 1)]}, 2, {"split": "train"}),
    Case("ImageNet21k", make_imagenet21k_list, {"train": [("train/y.jpg", 3), ("train/x.jpg", 0)]}, 4, {"split": "train"},
         note="list"),
    Case("Places205", make_places, {"": [("images256/w/wheat_field/gsun_2.jpg", 201), ("images256/a/abbey/gsun_1.jpg", 0)]},
         205, PLACES),
    Case("DeepClusterImageNet", make_imagenet21k, {"train": [("train/n00004475/a.JPEG", 0), ("train/n00004475/deeper/b.jpg", 0),
                                                             ("train/n15300051/c.JPEG", 1)]}, 2, {"split": "train"}),
]  # fmt: skip
each = pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.type}{' ' * bool(case.note)}{case.note}")
READERS = [case for case in CASES if case.type not in ("ImageNet21k", "Places205", "DeepClusterImageNet")]


def check(data: Any, root: Path, expected: Listed) -> None:
    assert len(data) == len(expected)
    samples = [data[i] for i in range(len(data))]
    assert [Path(s["path"]).relative_to(root).as_posix() for s in samples] == [path for path, _ in expected]
    assert [s["label"] for s in samples] == [label for _, label in expected] == data.labels.tolist()
    assert all(Path(data.name(i)) == Path(s["path"]) for i, s in enumerate(samples))
    for s in samples:  # files hold the end of their own path
        assert s["path"].endswith(s["image"].decode())


@each
def test_splits(case, tmp_path):
    case.make(tmp_path)
    default = case.build(tmp_path)
    check(default, tmp_path, next(iter(case.expected.values())))
    for split, expected in case.expected.items():
        data = case.build(tmp_path, split)
        check(data, tmp_path, expected)
        check(pickle.loads(pickle.dumps(data)), tmp_path, expected)
        if split != "test" or case.type != "iNaturalist2018":
            assert data.num_classes == case.classes
        assert isinstance(data.labels, np.ndarray) and data.labels.dtype == np.int32
        assert f"{len(expected)} samples" in repr(data)
        check(case.build(tmp_path, split, indices=-1), tmp_path, expected[-1:])
        check(case.build(tmp_path, split, indices=[0], test_mode=split == "test"), tmp_path, expected[:1])


@each
def test_a_wrong_split_names_the_nearest(case, tmp_path):
    if case.type == "Places205":
        pytest.skip("has no splits")
    case.make(tmp_path)
    with pytest.raises(ConfigError, match=f"{'ImageNet' if 'Deep' in case.type else case.type} has no split 'tranval'"):
        case.build(tmp_path, "tranval")


@pytest.mark.parametrize("case", READERS, ids=lambda case: f"{case.type} {case.note}")
def test_a_wrong_folder_shows_what_is_there_and_what_should_be(case, tmp_path):
    put(tmp_path, "elsewhere/readme.txt", "cats.zip")
    with pytest.raises(ConfigError) as error:
        case.build(tmp_path)
    message = str(error.value)
    assert message.startswith(f"{case.type}: there is no ")
    assert f"Found in {tmp_path}: cats.zip, elsewhere/." in message
    assert f"Expected under data_root={str(tmp_path)!r}:\n  " in message
    assert all(line.strip() in message for line in resolve(case.type).layout.strip().splitlines())
    with pytest.raises(ConfigError, match="There is no folder .*lost/lost. Found in .*: cats.zip, elsewhere/"):
        case.build(tmp_path / "lost" / "lost")


@pytest.mark.parametrize("case", READERS, ids=lambda case: f"{case.type} {case.note}")
def test_every_file_that_is_needed_is_missed_by_name(case, tmp_path):
    case.make(tmp_path)
    default = next(iter(case.expected))
    listed = {path for split in case.expected.values() for path, _ in split}
    missed = 0
    for path in sorted(p for p in tmp_path.rglob("*") if p.is_file()):
        if (relative := path.relative_to(tmp_path).as_posix()) in listed:
            continue
        content = path.read_bytes()
        path.unlink()
        try:
            data = case.build(tmp_path)
        except ConfigError as error:
            missed += 1
            assert path.name in str(error) and "Expected under data_root" in str(error)
        else:  # lists of other splits, and those that imdb.mat makes superfluous
            assert len(data) == len(case.expected[default])
            assert default not in relative or case.type == "DTD"
        path.write_bytes(content)
    assert missed or (case.type, case.note) == ("DTD", "")  # imdb.mat and the text files stand for each other


@pytest.mark.parametrize("case", READERS, ids=lambda case: f"{case.type} {case.note}")
def test_a_missing_image_shows_when_it_is_read(case, tmp_path):
    case.make(tmp_path)
    data = case.build(tmp_path)
    Path(data.name(0)).unlink()
    assert len(case.build(tmp_path)) == len(data)
    with pytest.raises(FileNotFoundError):
        data[0]


@pytest.mark.parametrize(
    ("name", "file", "line", "message"),
    [
        ("CUB", "images.txt", "one.jpg", r"images.txt:1: expected '<image id> <path>', got 'one.jpg'"),
        ("CUB", "image_class_labels.txt", "1 first", r"image_class_labels.txt:1: expected"),
        ("CUB", "train_test_split.txt", "1 1", r"not about the same\s+images: they have 3, 3 and 1 lines"),
        (
            "FGVCAircraft",
            "data/images_variant_trainval.txt",
            "1025794 707-230",
            "no class '707-230'. Did you mean '707-320'",
        ),
        (
            "OxfordIIITPet",
            "annotations/trainval.txt",
            "Abyssinian_100 1 1",
            r"trainval.txt:1: expected '<image> <breed>",
        ),
        (
            "OxfordIIITPet",
            "annotations/trainval.txt",
            "Abyssinian_100 38 1 1",
            r"labels 37..37 do not fit its\s+37 classes",
        ),
        ("OxfordIIITPet", "annotations/trainval.txt", "", "the lists name no images of the split 'trainval'"),
        ("Food101", "meta/train.txt", "apple_pie", "train.txt:1: expected '<class>/<image>'"),
        ("Food101", "meta/train.txt", "aple_pie/1", "no class 'aple_pie'. Did you mean 'apple_pie'"),
        (
            "SUN397",
            "Partitions/Training_01.txt",
            "abbey/s1.jpg",
            "Training_01.txt:1: expected '/<letter>/<scene>/<image>'",
        ),
        ("Caltech101", "meta/train.txt", "ant/image_0001.jpg", "train.txt:1: expected '<class>/<image> <label>'"),
        ("Flowers102", "setid.mat", "not MATLAB's", "setid.mat: not a MATLAB file that can be read"),
        ("DTD", "imdb/imdb.mat", "", "imdb.mat: not a MATLAB file that can be read"),
        ("iNaturalist2018", "train2018.json", "{", "train2018.json: not JSON"),
        ("InShop", "Eval/list_eval_partition.txt", "9", r"its first line is '9', but 0 images follow"),
    ],
)
def test_malformed_lists(tmp_path, name, file, line, message):
    next(case for case in CASES if case.type == name).make(tmp_path)
    (tmp_path / file).write_text(line)
    with pytest.raises(ConfigError, match=message):
        build(dict(type=name, data_root=str(tmp_path)))


def test_matlab_files_of_something_else(tmp_path):
    make_flowers(tmp_path)
    savemat(tmp_path / "imagelabels.mat", {"classes": [1, 2]})
    with pytest.raises(ConfigError, match="has no variable labels; it has classes"):
        build(dict(type="Flowers102", data_root=str(tmp_path)))
    savemat(tmp_path / "imagelabels.mat", {"labels": [1, 2]})
    with pytest.raises(ConfigError, match=r"images 1..4, but imagelabels.mat has 2"):
        build(dict(type="Flowers102", data_root=str(tmp_path)))
    make_cars(tmp_path)
    savemat(tmp_path / "devkit/cars_train_annos.mat", {"annotations": structs(fname=["1.jpg"], kind=[1])})
    with pytest.raises(ConfigError, match="has no field 'class'; it has fname, kind"):
        build(dict(type="StanfordCars", data_root=str(tmp_path)))


def test_a_struct_of_one_image(tmp_path):
    put(tmp_path, "cars_train/00001.jpg")
    (tmp_path / "devkit").mkdir()
    table = structs(**{"class": [4], "fname": ["00001.jpg"]})
    savemat(tmp_path / "devkit/cars_train_annos.mat", {"annotations": table})
    check(build(dict(type="StanfordCars", data_root=str(tmp_path))), tmp_path, [("cars_train/00001.jpg", 3)])


def test_the_labels_of_the_cars_test_set_may_lie_beside_the_devkit(tmp_path):
    make_cars(tmp_path)
    (tmp_path / "devkit/cars_test_annos_withlabels.mat").rename(tmp_path / "cars_test_annos_withlabels.mat")
    assert build(dict(type="StanfordCars", data_root=str(tmp_path), split="test")).labels.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("name", "key"),
    [("CUB", "cub"), ("StanfordCars", "stanford_cars"), ("FGVCAircraft", "fgvc_aircraft"), ("Flowers102", "flowers102"),
     ("OxfordIIITPet", "oxford_pets"), ("Food101", "food101"), ("SUN397", "sun397"), ("DTD", "dtd"),
     ("Caltech101", "caltech101"), ("Places205", "places205")],
)  # fmt: skip
def test_names_of_classes(tmp_path, name, key):
    case = next(case for case in CASES if case.type == name)
    case.make(tmp_path)
    assert case.build(tmp_path).classes == class_names(key)
    own = [f"class {i}" for i in range(case.classes)]
    assert case.build(tmp_path, classes=own).classes == tuple(own)
    assert case.build(tmp_path, metainfo=dict(classes=own)).classes == tuple(own)
    write(tmp_path / "own.txt", *own)
    assert case.build(tmp_path, classes=str(tmp_path / "own.txt")).classes == tuple(own)
    with pytest.raises(ConfigError):
        case.build(tmp_path, classes=["only one"])


def test_names_of_species(tmp_path):
    make_inat(tmp_path)
    assert build(dict(type="iNaturalist2018", data_root=str(tmp_path))).classes == ("Alces alces", "Puma concolor")
    names = [{"id": i, "name": name} for i, name in enumerate(["moose", "puma"])]
    (tmp_path / "categories.json").write_text(json.dumps(names))
    assert build(dict(type="iNaturalist2018", data_root=str(tmp_path))).classes == ("moose", "puma")
    data = build(dict(type="iNaturalist2018", data_root=str(tmp_path), split="test"))
    assert data.labels.tolist() == [-1] and data.num_classes == 2
    content = json.loads((tmp_path / "val2018.json").read_text())
    (tmp_path / "val2018.json").write_text(json.dumps({**content, "annotations": []}))
    with pytest.raises(ConfigError, match="1 of 1 images have no label"):
        build(dict(type="iNaturalist2018", data_root=str(tmp_path), split="val"))
    other = build(dict(type="iNaturalist2018", data_root=str(tmp_path), ann_file="train2018.json", data_prefix="moved"))
    assert other.name(0) == str(tmp_path / "moved/train_val2018/Plantae/1/x.jpg")


def test_cub_by_test_mode_as_in_mmclassification(tmp_path):
    make_cub(tmp_path)
    assert build(dict(type="CUB", data_root=str(tmp_path), test_mode=True)).split == "test"
    assert build(dict(type="CUB", data_root=str(tmp_path), split="train", test_mode=True)).split == "train"


def test_what_queries_should_find(tmp_path):
    make_in_shop(tmp_path)
    query = build(dict(type="InShop", data_root=str(tmp_path), split="query"))
    gallery = build(dict(type="InShop", data_root=str(tmp_path), split="gallery"))
    assert [match.tolist() for match in query.matches] == [[1], [0, 2]]
    for label, match in zip(query.labels, query.matches, strict=True):
        assert (gallery.labels[match] == label).all()
    one = build(dict(type="InShop", data_root=str(tmp_path), split="query", indices=[1]))
    assert [match.tolist() for match in one.matches] == [[0, 2]]
    with pytest.raises(ConfigError, match="matches are those of the split 'query'"):
        _ = gallery.matches
    with pytest.raises(ConfigError, match="items have no names"):
        build(dict(type="InShop", data_root=str(tmp_path), classes=["a", "b"]))
    listed = tmp_path / "Eval/list_eval_partition.txt"
    listed.write_text(listed.read_text().replace("id_00000001  gallery", "id_00000004  gallery"))
    with pytest.raises(ConfigError, match="1 queries have no match in the gallery: id_00000001"):
        build(dict(type="InShop", data_root=str(tmp_path), split="query"))


def test_caltech_without_lists_is_split_once_and_for_all(tmp_path, caplog):
    names = class_names("caltech101")
    for label, name in enumerate(names):
        put(tmp_path / "101_ObjectCategories", *(f"{name}/image_{i:04d}.jpg" for i in range(31 + label % 3)))
    with caplog.at_level(logging.WARNING):
        train, test = (build(dict(type="Caltech101", data_root=str(tmp_path), split=s)) for s in ("train", "test"))
    assert "the split is one drawn here" in caplog.text
    assert np.bincount(train.labels).tolist() == [30] * 102
    assert np.bincount(test.labels).tolist() == [1 + label % 3 for label in range(102)]
    paths = [data.name(i) for data in (train, test) for i in range(len(data))]
    assert len(set(paths)) == sum(31 + label % 3 for label in range(102))
    again = build(dict(type="Caltech101", data_root=str(tmp_path)))
    assert [again.name(i) for i in range(len(again))] == paths[: len(again)]


def test_names_of_imagenet(tmp_path):
    """The usual names for lists, and for the folders of all classes; others are called as their folders."""
    put(tmp_path, "train/a.jpg")
    write(tmp_path / "meta/train.txt", "a.jpg 65")
    listed = build(dict(type="ImageNet", data_root=str(tmp_path), split="train"))
    assert listed.classes == class_names("imagenet") and listed.num_classes == 1000
    own = build(dict(type="ImageNet", data_root=str(tmp_path), split="train", classes=[str(i) for i in range(66)]))
    assert own.num_classes == 66
    wnids = ["n01440764", *(f"n0{i}" for i in range(2000000, 2000998)), "n15075141"]
    put(tmp_path / "whole", *(f"train/{wnid}/1.JPEG" for wnid in wnids))
    assert build(dict(type="ImageNet", data_root=str(tmp_path / "whole"), split="train")).classes == listed.classes
    put(tmp_path / "part", *(f"train/{wnid}/1.JPEG" for wnid in wnids[:2]))
    assert build(dict(type="ImageNet", data_root=str(tmp_path / "part"), split="train")).classes == tuple(wnids[:2])


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (dict(type="CustomDataset"), "has no class sub-folders"),
        (dict(type="CustomDataset", data_prefix="lost"), "no folder .*lost"),
        (dict(type="CustomDataset", ann_file="meta/lost.txt"), "no file .*meta/lost.txt"),
        (dict(type="CustomDataset", with_label=False), "no images in"),
        (dict(type="Places205", data_prefix="lost"), "no folder .*lost"),
        (dict(type="ImageNet", split="train"), "no folder .*train"),
        (dict(type="ImageNet21k", split="train"), "no folder .*train"),
        (dict(type="VOC"), "there is no file .*ImageSets/Main/trainval.txt"),
    ],
)
def test_wrong_folders_of_the_others(tmp_path, options, problem):
    put(tmp_path, "readme.txt", "meta.zip")
    with pytest.raises(
        ConfigError, match=f"(?s){problem}.*\nExpected under data_root={str(tmp_path)!r}:\n  \\S"
    ) as error:
        build({**options, "data_root": str(tmp_path)})
    assert f"Found in {tmp_path}: meta.zip, readme.txt." in str(error.value)


def test_long_folders_are_cut_short(tmp_path):
    put(tmp_path, *(f"{i:02d}.txt" for i in range(20)))
    with pytest.raises(ConfigError, match=r"00.txt, .*, 11.txt, ... \(20 in all\)\."):
        build(dict(type="CUB", data_root=str(tmp_path)))


def test_imagenet21k(tmp_path):
    make_imagenet21k(tmp_path)
    data = build(dict(type="ImageNet21k", data_root=str(tmp_path), split="train"))
    assert data.classes == ("n00004475", "n15300051")
    with pytest.raises(ConfigError, match="one label for each image"):
        build(dict(type="ImageNet21k", data_root=str(tmp_path), split="train", multi_label=True))
    own = build(dict(type="ImageNet21k", data_root=str(tmp_path), data_prefix="train"))
    assert len(own) == 3


def test_images_go_through_the_pipeline(tmp_path):
    """Also files that are called .jpg and are something else, of which SUN397 has some."""
    make_sun(tmp_path)
    for path, kind in (("a/abbey/s1.jpg", "PNG"), ("y/youth_hostel/s3.jpg", "JPEG")):
        buffer = io.BytesIO()
        Image.new("RGB", (12, 9), (200, 10, 30)).save(buffer, kind)
        (tmp_path / "SUN397" / path).write_bytes(buffer.getvalue())
    dataset = dict(type="SUN397", data_root=str(tmp_path))
    batch = next(iter(EvalLoader(dict(dataset=dataset, pipeline=[dict(type="Resize", scale=(8, 8))]), batch_size=2)))
    assert batch["image"].shape == (2, 8, 8, 3) and batch["label"].tolist() == [0, 396]
    np.testing.assert_allclose(batch["image"], np.broadcast_to([200, 10, 30], (2, 8, 8, 3)), atol=3)
    with pytest.raises(ConfigError, match="pipeline"):
        build({**dataset, "pipeline": [dict(type="LoadImageFromFile")]})
