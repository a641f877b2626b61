"""PASCAL VOC's layout, on files made here."""

from __future__ import annotations

import io
import pickle

import numpy as np
import pytest
from PIL import Image

from jaxpretrain.build import ConfigError, build
from jaxpretrain.data.class_names import class_names
from jaxpretrain.data.pipeline import EvalLoader

CLASSES = class_names("VOC")
# image -> {class: difficult or not}, of all its objects
OBJECTS = {
    "000001": [("dog", 0), ("person", 0)],
    "000002": [("cat", 1), ("cat", 0), ("sofa", 1)],
    "000003": [("person", 1), ("person", 1)],
    "000004": [],
}
EXPECTED = np.zeros((4, 20), np.int8)
EXPECTED[0, [CLASSES.index("dog"), CLASSES.index("person")]] = 1
EXPECTED[1, CLASSES.index("cat")], EXPECTED[1, CLASSES.index("sofa")] = 1, -1
EXPECTED[2, CLASSES.index("person")] = -1


def make_voc(root, objects=OBJECTS, split="trainval", class_files=True, seed=0):
    """A copy of VOC's layout with small random images."""
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / name).mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for name, found in objects.items():
        pixels = rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "JPEGImages" / f"{name}.jpg")
        inside = "".join(f"<object><name>{c}</name><difficult>{d}</difficult></object>" for c, d in found)
        (root / "Annotations" / f"{name}.xml").write_text(f"<annotation>{inside}</annotation>")
    main = root / "ImageSets" / "Main"
    (main / f"{split}.txt").write_text("".join(f"{name}\n" for name in objects))
    for c in CLASSES if class_files else ():
        lines = []
        for name, found in objects.items():
            marks = [d for kind, d in found if kind == c]
            lines.append(f"{name} {'-1' if not marks else ' 0' if all(marks) else ' 1'}\n")
        (main / f"{c}_{split}.txt").write_text("".join(lines))
    return root


@pytest.mark.parametrize("class_files", [True, False])
def test_labels_from_class_files_and_from_annotations_agree(tmp_path, class_files):
    data = build(dict(type="VOC", data_root=str(make_voc(tmp_path, class_files=class_files))))
    assert len(data) == 4 and data.num_classes == 20 and data.classes == CLASSES
    np.testing.assert_array_equal(data.labels, EXPECTED)
    assert data.labels.dtype == np.int8


def test_samples_are_the_files(tmp_path):
    data = build(dict(type="VOC", data_root=str(make_voc(tmp_path)), test_mode=True))
    sample = data[1]
    np.testing.assert_array_equal(sample["label"], EXPECTED[1])
    assert sample["path"].endswith("JPEGImages/000002.jpg") == data.name(1).endswith("2.jpg")
    assert np.asarray(Image.open(io.BytesIO(sample["image"]))).shape == (20, 30, 3)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(data)).labels, data.labels)
    split = dict(dataset=dict(type="VOC", data_root=str(tmp_path)), pipeline=[dict(type="Resize", scale=(8, 8))])
    batch = next(iter(EvalLoader(split, batch_size=4)))
    assert batch["image"].shape == (4, 8, 8, 3) and batch["valid"].all()
    assert batch["index"].tolist() == [0, 1, 2, 3] and batch["label"].dtype == np.int8
    np.testing.assert_array_equal(batch["label"], EXPECTED)


def test_other_lists_splits_and_images_alone(tmp_path):
    make_voc(tmp_path, class_files=False)
    (tmp_path / "mine.txt").write_text("000003\n000001\n")
    data = build(dict(type="VOC", data_root=str(tmp_path), image_set_path="mine.txt"))
    np.testing.assert_array_equal(data.labels, EXPECTED[[2, 0]])
    make_voc(tmp_path, {"000009": [("bus", 0)]}, split="test")
    assert len(build(dict(type="VOC", data_root=str(tmp_path), split="test"))) == 1
    alone = build(dict(type="VOC", data_root=str(tmp_path), data_prefix="JPEGImages"))
    assert alone.labels is None and len(alone) == 4 and alone[0]["label"] == -1
    part = build(dict(type="VOC", data_root=str(tmp_path), indices=[3, 1]))
    np.testing.assert_array_equal(part.labels, EXPECTED[[3, 1]])
    assert part.name(1).endswith("000002.jpg")


def test_mistakes_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"no file .*trainval.txt; data_root must be the folder with JPEGImages"):
        build(dict(type="VOC", data_root=str(tmp_path)))
    make_voc(tmp_path)
    with pytest.raises(ConfigError, match="no split 'tranval'. Did you mean 'trainval'"):
        build(dict(type="VOC", data_root=str(tmp_path), split="tranval"))
    file = tmp_path / "ImageSets" / "Main" / "cow_trainval.txt"
    text = file.read_text()
    file.write_text(text.replace("000002 -1", "000002 2"))
    with pytest.raises(ConfigError, match=r"cow_trainval.txt:2: expected 'image label'"):
        build(dict(type="VOC", data_root=str(tmp_path)))
    file.write_text(text.replace("000002 -1\n", ""))
    with pytest.raises(ConfigError, match="says nothing about 1 images: 000002"):
        build(dict(type="VOC", data_root=str(tmp_path)))
    file.unlink()
    (tmp_path / "Annotations" / "000001.xml").write_text(
        "<annotation><object><name>unicorn</name></object></annotation>"
    )
    with pytest.raises(ConfigError, match="no class 'unicorn'"):
        build(dict(type="VOC", data_root=str(tmp_path)))
    (tmp_path / "Annotations" / "000001.xml").write_text("<annotation>")
    with pytest.raises(ConfigError, match=r"000001.xml cannot be read"):
        build(dict(type="VOC", data_root=str(tmp_path)))


# ------------------------------------------------------------------------------------------------ Subset


def test_subsets_are_balanced_nested_and_a_function_of_the_seed():
    def indices(**options):
        return build(dict(type="Subset", dataset=dict(type="Digits"), **options)).rows

    one, ten = indices(fraction=0.01), indices(fraction=0.1)
    whole = build(dict(type="Digits"))
    for part, fraction in ((one, 0.01), (ten, 0.1)):
        counts = np.bincount(whole.labels[part], minlength=10)
        np.testing.assert_array_equal(counts, np.maximum(1, np.round(fraction * np.bincount(whole.labels))))
    assert set(one) < set(ten)
    np.testing.assert_array_equal(one, indices(fraction=0.01))
    assert set(one) != set(indices(fraction=0.01, seed=1))
    rest = indices(fraction=0.1, rest=True)
    assert sorted([*ten, *rest]) == list(range(1500))
    data = build(dict(type="Subset", dataset=dict(type="Digits"), fraction=0.01))
    assert data.num_classes == 10 and len(data) == len(one) and data.in_memory
    assert data[3]["label"] == whole.labels[one[3]] == data.labels[3]
    np.testing.assert_array_equal(data[3]["image"], whole[one[3]]["image"])


def test_subsets_by_published_lists(tmp_path):
    for kind in ("n01", "n02"):
        (tmp_path / "train" / kind).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (4, 4)).save(tmp_path / "train" / kind / f"{kind}_{i}.png")
    whole = dict(type="CustomDataset", data_root=str(tmp_path / "train"))
    names = tmp_path / "1percent.txt"
    names.write_text("n02_1.png\nn01_0.png\n\n")
    data = build(dict(type="Subset", dataset=whole, names=str(names)))
    assert [data.name(i).rsplit("/")[-1] for i in range(2)] == ["n01_0.png", "n02_1.png"]
    assert data.labels.tolist() == [0, 1]
    names.write_text("n02/n02_2.png 1\n")  # MMSelfSup's lines
    assert build(dict(type="Subset", dataset=whole, names=str(names))).labels.tolist() == [1]
    names.write_text("n03_1.png\n")
    with pytest.raises(ConfigError, match=r"1 of the 1 names in .*n03_1.png"):
        build(dict(type="Subset", dataset=whole, names=str(names)))


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "either fraction .* or names"),
        (dict(fraction=0.1, names="x"), "either fraction .* or names"),
        (dict(fraction=1.5), "fraction=1.5 must be above 0 and at most 1"),
        (dict(names="nowhere.txt"), "no file nowhere.txt"),
    ],
)
def test_subset_mistakes(options, message):
    with pytest.raises(ConfigError, match=message):
        build(dict(type="Subset", dataset=dict(type="Digits"), **options))
