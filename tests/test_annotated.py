"""Annotation files: one label, several, or several tasks for each image; lists of images; and what all data sets take."""

from __future__ import annotations

import json
import pickle
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from jaxpretrain.build import ConfigError, build, register
from jaxpretrain.data.annotated import BaseDataset
from jaxpretrain.data.base import InMemory, Source
from jaxpretrain.data.pipeline import EvalLoader
from jaxpretrain.data.records import write_array_record

NAMES = ["a.png", "b.png", "sub/c.png", "d.png"]


@pytest.fixture
def root(tmp_path):
    """Four images in `train/`, each of one grey level: 0, 10, 20, 30."""
    for level, name in enumerate(NAMES):
        path = tmp_path / "train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((6, 5, 3), 10 * level, np.uint8)).save(path)
    return tmp_path


def annotate(root, labels, name="ann.json", **metainfo):
    """An annotation file; a label of `...` is left out."""
    items = [
        {"img_path": path, **({} if label is ... else {"gt_label": label})}
        for path, label in zip(NAMES, labels, strict=False)
    ]
    content = {"metainfo": metainfo, "data_list": items}
    if name.endswith(".json"):
        (root / name).write_text(json.dumps(content))
    elif name.endswith(".pkl"):
        (root / name).write_bytes(pickle.dumps(content))
    else:
        import yaml

        (root / name).write_text(yaml.safe_dump(content))
    return name


def dataset(root, type="BaseDataset", ann_file="ann.json", **options):
    return build(dict(type=type, data_root=str(root), ann_file=ann_file, data_prefix="train", **options))


def level(sample):
    import io

    return int(np.asarray(Image.open(io.BytesIO(sample["image"])))[0, 0, 0])


def loaded(data, **options):
    """All of a data set in one batch."""
    split = dict(dataset=data, pipeline=[dict(type="Resize", scale=(4, 4))])
    return next(iter(EvalLoader(split, batch_size=len(data), **options)))


# ---------------------------------------------------------------------------------------------------- BaseDataset


@pytest.mark.parametrize("name", ["ann.json", "ann.yaml", "ann.yml", "ann.pkl"])
def test_every_format_of_the_file(root, name):
    annotate(root, [1, 0, 2, ...], name, classes=["x", "y", "z"])
    data = dataset(root, ann_file=name, **({"allow_pickle": True} if name.endswith("pkl") else {}))
    assert len(data) == 4 and data.num_classes == 3 and data.classes == ("x", "y", "z")
    assert data.labels.dtype == np.int32 and data.labels.tolist() == [1, 0, 2, -1]
    assert [data[i]["label"] for i in range(4)] == [1, 0, 2, -1] and isinstance(data[0]["label"], int)
    assert [level(data[i]) for i in range(4)] == [0, 10, 20, 30]
    assert data.name(2) == data[2]["path"] == str(root / "train" / "sub" / "c.png")


def test_a_pickle_is_refused_unless_allowed(root):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("the pickle was read",))

    (root / "ann.pkl").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ConfigError, match=r"runs whatever program is in it.*allow_pickle=True"):
        dataset(root, ann_file="ann.pkl")


def test_paths_and_precedence_of_class_names(root):
    annotate(root, [1, 0], classes=["x", "y"])
    assert dataset(root, metainfo=dict(classes=["p", "q"])).classes == ("p", "q")
    assert dataset(root, metainfo=dict(classes=["p", "q"]), classes=["r", "s"]).classes == ("r", "s")
    (root / "names.txt").write_text("one\ntwo\nthree\n")
    data = dataset(root, classes=str(root / "names.txt"))
    assert data.classes == ("one", "two", "three") and data.num_classes == 3
    absolute = build(
        dict(type="BaseDataset", ann_file=str(root / "ann.json"), data_prefix=dict(img_path=str(root / "train")))
    )
    assert level(absolute[1]) == 10
    annotate(root, [1, 0])
    assert dataset(root).num_classes == 2 and dataset(root).classes is None  # the highest label tells
    annotate(root, [..., ...])
    assert dataset(root).num_classes is None and dataset(root).labels.tolist() == [-1, -1]


def test_several_files_one_after_another(root):
    annotate(root, [1, 0], classes=["x", "y"])
    (root / "more.json").write_text(json.dumps(dict(data_list=[dict(img_path="d.png", gt_label=1)])))
    data = dataset(root, ann_file=["ann.json", "more.json"])
    assert data.labels.tolist() == [1, 0, 1] and level(data[2]) == 30
    annotate(root, [0], "other.json", classes=["y", "x"])
    with pytest.raises(ConfigError, match="name different classes"):
        dataset(root, ann_file=["ann.json", "other.json"])


def test_what_else_an_entry_has_reaches_the_transforms(root):
    items = [dict(img_path="a.png", gt_label=0, caption="grey", box=[1, 2]), dict(img_path="b.png", gt_label=1)]
    (root / "ann.json").write_text(json.dumps(dict(metainfo={}, data_list=items)))
    data = dataset(root)
    assert data[0]["caption"] == "grey" and data[0]["box"] == [1, 2] and "caption" not in data[1]
    assert "img_path" not in data[0] and "gt_label" not in data[0]
    assert data.get_data_info(1) == dict(path=str(root / "train" / "b.png"), label=1)


class Filelist(BaseDataset):
    """MMPretrain's tutorial: lines of `path label`."""

    METAINFO = {"classes": ("x", "y", "z")}

    def load_data_list(self):
        with open(self.ann_file) as lines:
            pairs = [line.split() for line in lines]
        return [dict(img_path=f"{self.img_prefix}/{path}", gt_label=int(label)) for path, label in pairs]

    def filter_data(self):
        lowest = self.filter_cfg.get("lowest", 0)
        return [item for item in self.data_list if item["gt_label"] >= lowest]


class Generated(BaseDataset):
    def load_data_list(self):
        return [dict(img=np.full((3, 3, 3), 7 * i, np.uint8), gt_label=i) for i in range(3)]


class Pairs(BaseDataset):
    """An entry of the file stands for two samples."""

    def parse_data_info(self, raw_data_info):
        entry = super().parse_data_info(raw_data_info)
        return [entry, {**entry, "gt_label": entry["gt_label"] + 1}]


def test_subclasses_load_their_own_lists(root):
    register()(Filelist)
    (root / "list.txt").write_text("b.png 2\na.png 0\n")
    data = dataset(root, "Filelist", "list.txt")
    assert data.labels.tolist() == [2, 0] and level(data[0]) == 10 and data.classes == ("x", "y", "z")
    assert dataset(root, Filelist, "list.txt", filter_cfg=dict(lowest=1)).labels.tolist() == [2]
    generated = build(dict(type=Generated))
    assert [int(generated[i]["image"].max()) for i in range(3)] == [0, 7, 14] and generated.name(1) == "Generated[1]"
    assert "path" not in generated[0] and loaded(generated)["label"].tolist() == [0, 1, 2]
    annotate(root, [1, 0])
    assert dataset(root, Pairs).labels.tolist() == [1, 2, 0, 1]


def test_mistakes_are_named(root):
    with pytest.raises(ConfigError, match=r"no file .*absent.json \(ann_file\)") as caught:
        dataset(root, ann_file="absent.json")
    assert "train/" in str(caught.value)  # what is there
    with pytest.raises(ConfigError, match="must end in .json"):
        dataset(root, ann_file="ann.txt")
    cases = {
        "[1, 2]": "expected a dictionary with metainfo and data_list, a list; found a list",
        '{"metainfo": {}, "images": []}': re.escape("found the keys ['metainfo', 'images']"),
        '{"data_list": []}': "has no samples",
        '{"metainfo": {"classes"': "is damaged or not JSON",
        '{"data_list": [{"gt_label": 1}]}': "sample 0: expected a dictionary with img_path",
        '{"data_list": ["a.png"]}': "sample 0: expected a dictionary",
        '{"data_list": [{"img_path": "a.png", "gt_label": "cat"}]}': "sample 0: gt_label must be an integer",
        '{"data_list": [{"img_path": "a.png", "gt_label": [0, 1]}]}': "need type='MultiLabelDataset'",
        '{"data_list": [{"img_path": "a.png", "gt_label": {"x": 1}}]}': "need type='MultiTaskDataset'",
        '{"metainfo": {"classes": ["x"]}, "data_list": [{"img_path": "a.png", "gt_label": 1}]}': "label 1 does not fit 1",
        '{"data_list": [{"img_path": "a.png", "gt_label": 0}, {"img_path": "b.png", "gt_label": -3}]}': "sample 1: label -3",
    }
    for text, message in cases.items():
        (root / "ann.json").write_text(text)
        with pytest.raises(ConfigError, match=message):
            dataset(root)
    (root / "ann.yaml").write_text("a: [1, 2\nb: {")
    with pytest.raises(ConfigError, match="is damaged or not YAML"):
        dataset(root, ann_file="ann.yaml")


def test_yaml_runs_nothing(root):
    (root / "ann.yaml").write_text("metainfo: !!python/object/apply:os.system ['true']\ndata_list: []\n")
    with pytest.raises(ConfigError, match="not YAML"):
        dataset(root, ann_file="ann.yaml")


def test_a_missing_image_is_a_bad_image_when_it_is_read(root):
    annotate(root, [0, 1, 0, 1])
    (root / "train" / "b.png").unlink()
    batch = loaded(dataset(root), max_bad=0.5)
    assert batch["valid"].tolist() == [True, False, True, True] and batch["label"].tolist() == [0, -1, 0, 1]


def test_it_pickles_and_takes_threads(root):
    annotate(root, [{"g": 0, "w": [1, 0]}, {"g": 1}, {"w": [0, -1]}, {}])
    data = dataset(root, "MultiTaskDataset")
    again = pickle.loads(pickle.dumps(data))
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(again.__getitem__, list(range(4)) * 25))
    for number, sample in enumerate(found):
        assert level(sample) == 10 * (number % 4)
        np.testing.assert_equal(sample["label"], data[number % 4]["label"])


def test_memory_is_compact(root):
    items = [dict(img_path=f"folder/image_{i:07d}.jpg", gt_label=i % 10) for i in range(20_000)]
    (root / "ann.json").write_text(json.dumps(dict(data_list=items)))
    assert len(pickle.dumps(dataset(root))) < 20_000 * (len(str(root)) + 26 + 8 + 4 + 8 + 20)


# ------------------------------------------------------------------------------------------ several labels, tasks


def test_multi_label_lists_are_class_numbers(root):
    annotate(root, [[0, 1], [2], [], ...], classes=["A", "B", "C"])
    data = dataset(root, "MultiLabelDataset")
    expected = np.array([[1, 1, 0], [0, 0, 1], [0, 0, 0], [-1, -1, -1]], np.int8)
    np.testing.assert_array_equal(data.labels, expected)
    assert data.labels.dtype == np.int8 and data.num_classes == 3
    np.testing.assert_array_equal(data[1]["label"], expected[1])
    annotate(root, [[0, 4], 2])  # no names: the highest number tells; one number is a list of one
    np.testing.assert_array_equal(dataset(root, "MultiLabelDataset").labels, [[1, 0, 0, 0, 1], [0, 0, 1, 0, 0]])
    for label, message in (
        ([3], "sample 1: label 3 does not fit 3"),
        ("A", "list of class numbers"),
        ([-1], "negative"),
    ):
        annotate(root, [[0], label], classes=["A", "B", "C"])
        with pytest.raises(ConfigError, match=message):
            dataset(root, "MultiLabelDataset")


def test_multi_task_labels(root):
    annotate(
        root,
        [{"gender": 0, "wear": [1, 0, 1, 0]}, {"gender": 1}, {"wear": [0, 0, 0, -1]}, ...],
        tasks=["gender", "wear"],
    )
    data = dataset(root, "MultiTaskDataset")
    assert data.num_classes == dict(gender=2, wear=4) and list(data.labels) == ["gender", "wear"]
    assert data.labels["gender"].dtype == np.int32 and data.labels["gender"].tolist() == [0, 1, -1, -1]
    wear = np.array([[1, 0, 1, 0], [-1] * 4, [0, 0, 0, -1], [-1] * 4], np.int8)
    np.testing.assert_array_equal(data.labels["wear"], wear)
    assert data[1]["label"]["gender"] == 1
    np.testing.assert_array_equal(data[1]["label"]["wear"], wear[1])


def test_multi_task_of_named_categories_and_of_tasks_again(root):
    tasks = [
        dict(name="gender", type="single-label", categories=["f", "m", "?"]),
        dict(name="wear", categories=["a", "b"]),
    ]
    annotate(root, [{"gender": 1}, {"wear": [1, 0]}], tasks=tasks)
    assert dataset(root, "MultiTaskDataset").num_classes == dict(gender=3, wear=2)
    annotate(root, [{"x": {"y": 1, "z": [0, 1]}}, {"w": 0}])
    data = dataset(root, "MultiTaskDataset")
    assert data.num_classes == {"x": {"y": 2, "z": 2}, "w": 1}
    np.testing.assert_equal(data[1]["label"], {"x": {"y": -1, "z": np.int8([-1, -1])}, "w": 0})


@pytest.mark.parametrize(
    ("labels", "metainfo", "message"),
    [
        ([0, {"a": 1}], {}, "sample 0: gt_label must be a dictionary"),
        ([{"a": 1}, {"wera": 1}], dict(tasks=["a", "wear"]), "labels for wera, .* Did you mean 'wear'"),
        ([{"a": [1, 0]}, {"a": [1, 0, 0]}], {}, "sample 1: gt_label\\['a'\\] must be a list of 2 numbers"),
        ([{"a": [1, 3]}], {}, "must be a list of 2 numbers, each 1, 0 or -1"),
        ([{"a": 1}, {"a": "x"}], {}, "sample 1: gt_label\\['a'\\] must be an integer"),
        ([{"a": 1}, {"a": 2}], dict(tasks=[dict(name="a", categories=["p", "q"])]), "label 2 does not fit 2 classes"),
    ],
)
def test_multi_task_mistakes_are_named(root, labels, metainfo, message):
    annotate(root, labels, **metainfo)
    with pytest.raises(ConfigError, match=message):
        dataset(root, "MultiTaskDataset")


# ------------------------------------------------------------------------------------------------------ ImageList


def test_image_lists(root):
    (root / "one.txt").write_text("a.png 1\nb.png\n")
    (root / "two.txt").write_text("sub/c.png 4\n\nd.png 0\n")
    data = build(dict(type="ImageList", data_root=str(root), data_prefix="train", ann_file=["one.txt", "two.txt"]))
    assert data.labels.tolist() == [1, -1, 4, 0] and data.num_classes == 5
    assert [level(data[i]) for i in range(4)] == [0, 10, 20, 30]
    (root / "train" / "my image").mkdir()
    Image.fromarray(np.full((4, 4, 3), 99, np.uint8)).save(root / "train" / "my image" / "e.png")
    (root / "three.txt").write_text("my image/e.png\n")  # a blank is part of the path unless a number follows it
    alone = build(dict(type="ImageList", data_root=str(root), data_prefix="train", ann_file="three.txt"))
    assert level(alone[0]) == 99 and alone.num_classes is None and alone[0]["label"] == -1
    with pytest.raises(ConfigError, match="needs ann_file"):
        build(dict(type="ImageList", ann_file=[]))
    several = build(
        dict(type="CustomDataset", data_root=str(root), data_prefix="train", ann_file=["two.txt", "two.txt"])
    )
    assert several.labels.tolist() == [4, 0, 4, 0]


# -------------------------------------------------------------------------------- what every data set takes


def sources(root):
    """(description, number of samples) of a data set of each kind."""
    annotate(root, [1, 0, 2, 1])
    annotate(root, [[0], [1], [0, 1], []], "several.json")
    annotate(root, [{"a": 0}, {"a": 1}, {}, {"a": 0}], "tasks.json")
    (root / "list.txt").write_text("".join(f"{name} {i}\n" for i, name in enumerate(NAMES)))
    common = dict(data_root=str(root), data_prefix="train")
    samples = [{"image": np.full((4, 4, 3), i, np.uint8), "label": i} for i in range(4)]
    write_array_record(root / "four.array_record", samples)
    return [
        dict(type="BaseDataset", ann_file="ann.json", **common),
        dict(type="MultiLabelDataset", ann_file="several.json", **common),
        dict(type="MultiTaskDataset", ann_file="tasks.json", **common),
        dict(type="CustomDataset", ann_file="list.txt", **common),
        dict(type="ImageList", ann_file="list.txt", **common),
        dict(type="ArrayRecordDataset", paths=str(root / "four.array_record")),
        dict(type="Digits", indices=4),
    ]


def test_every_data_set_takes_indices_and_meaningless_arguments(root):
    for cfg in sources(root):
        whole = build(cfg)
        assert isinstance(whole, Source) and len(whole) == 4
        meaningless = dict(test_mode=True, lazy_init=True, serialize_data=False, max_refetch=3, pipeline=[])
        for indices, kept in ((3, [0, 1, 2]), (-1, [3]), ([2, 0, 2], [2, 0, 2]), ([-1], [3]), (99, [0, 1, 2, 3])):
            if cfg["type"] == "Digits":
                continue
            part = pickle.loads(pickle.dumps(build({**cfg, **meaningless, "indices": indices})))
            assert len(part) == len(kept), cfg
            for i, row in enumerate(kept):
                np.testing.assert_equal(part[i], whole[row])
                assert part.name(i) == whole.name(row)
            assert part.num_classes == whole.num_classes or cfg["type"] == "ArrayRecordDataset"
        for wrong, message in (([], "leave none"), (0, "leave none"), ([4], "do not fit the 4"), ([0.5], "integers")):
            if cfg["type"] != "Digits":
                with pytest.raises(ConfigError, match=message):
                    build({**cfg, "indices": wrong})
        with pytest.raises(ConfigError, match=r"pipeline does not belong to the data set.*config.data.train.pipeline"):
            build({**cfg, "pipeline": [dict(type="LoadImageFromFile")]})


def test_class_names_of_data_in_memory_can_be_given():
    assert build(dict(type="Digits", classes=["null"] * 10)).classes == ("null",) * 10
    data = InMemory(np.zeros((5, 2, 2), np.uint8), np.arange(5), indices=[4, 1])
    assert data.labels.tolist() == [4, 1] and data.images.shape == (2, 2, 2)
