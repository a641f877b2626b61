"""Data sets made of others: joined, repeated, balanced, cut into folds."""

from __future__ import annotations

import io
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image
from sklearn.model_selection import KFold

from jaxpretrain.build import ConfigError, build
from jaxpretrain.data.base import InMemory, Source
from jaxpretrain.data.pipeline import EvalLoader, TrainLoader
from jaxpretrain.data.records import write_array_record
from jaxpretrain.data.wrappers import repeat_factors
from tests.test_voc import EXPECTED, make_voc


def counted(labels, start=0, classes=None):
    """A data set whose images show their own number."""
    labels = np.asarray(labels)
    images = np.arange(start, start + len(labels), dtype=np.uint8)[:, None, None, None] * np.ones((4, 4, 3), np.uint8)
    return InMemory(images, labels, classes)


def numbers(data):
    return [int(data[i]["image"].max()) for i in range(len(data))]


def labels(data):
    return [data[i]["label"] for i in range(len(data))]


# ------------------------------------------------------------------------------------------------ ConcatDataset


def test_concatenated_samples_keep_their_names_and_labels(tmp_path):
    for name, count in (("one", 2), ("two", 3)):
        (tmp_path / name / "x").mkdir(parents=True)
        for i in range(count):
            Image.fromarray(np.full((4, 4, 3), i, np.uint8)).save(tmp_path / name / "x" / f"{i}.png")
    parts = [dict(type="CustomDataset", data_root=str(tmp_path / name)) for name in ("one", "two")]
    data = pickle.loads(pickle.dumps(build(dict(type="ConcatDataset", datasets=parts))))
    assert len(data) == 5 and data.num_classes == 1 and data.classes == ("x",) and not data.in_memory
    assert data.name(1) == str(tmp_path / "one" / "x" / "1.png") == data[1]["path"]
    assert data.name(2) == str(tmp_path / "two" / "x" / "0.png") == data[2]["path"]
    assert data.labels.tolist() == [0] * 5
    part = build(dict(type="ConcatDataset", datasets=parts, indices=-2))
    assert [part.name(i) for i in range(2)] == [data.name(3), data.name(4)]


def test_concatenation_of_different_classes_is_refused():
    one, two = counted([0, 1], classes=["a", "b"]), counted([1, 0], 10, classes=["b", "a"])
    with pytest.raises(ConfigError, match="number 1\\) has other classes .*b, a, and a, b.*ignore_keys='classes'"):
        build(dict(type="ConcatDataset", datasets=[one, two]))
    data = build(dict(type="ConcatDataset", datasets=[one, two], ignore_keys="classes"))
    assert labels(data) == [0, 1, 1, 0] == data.labels.tolist() and numbers(data) == [0, 1, 10, 11] and data.in_memory
    with pytest.raises(ConfigError, match="is empty"):
        build(dict(type="ConcatDataset", datasets=[]))


def test_concatenation_of_several_kinds_of_labels(tmp_path):
    voc = build(dict(type="VOC", data_root=str(make_voc(tmp_path))))
    view = build(dict(type="Subset", dataset=voc, indices=[2, 0]))
    data = build(dict(type="ConcatDataset", datasets=[voc, view]))
    np.testing.assert_array_equal(data.labels, EXPECTED[[0, 1, 2, 3, 2, 0]])
    with pytest.raises(ConfigError, match="labels of several kinds"):
        build(dict(type="ConcatDataset", datasets=[voc, counted([0, 1], classes=voc.classes)]))


# ------------------------------------------------------------------------------------- RepeatDataset, subsets


def test_repeated():
    data = build(dict(type="RepeatDataset", dataset=counted([3, 1, 2]), times=3))
    assert len(data) == 9 and numbers(data) == [0, 1, 2] * 3 and labels(data) == [3, 1, 2] * 3 == data.labels.tolist()
    assert data.name(7) == data.name(1) == "InMemory[1]" and data.in_memory
    assert len(build(dict(type="RepeatDataset", dataset=counted([0, 1]), times=3, indices=5))) == 5
    for times in (0, 1.5):
        with pytest.raises(ConfigError, match="times"):
            build(dict(type="RepeatDataset", dataset=counted([0]), times=times))
    loader = TrainLoader(dict(dataset=data), batch_size=9)
    assert sorted(next(loader)["label"].tolist()) == [1, 1, 1, 2, 2, 2, 3, 3, 3]


def test_subset_by_indices():
    data = build(dict(type="Subset", dataset=counted([3, 1, 2, 0]), indices=[3, 0]))
    assert numbers(data) == [3, 0] and labels(data) == [0, 3]
    half = build(dict(type="Subset", dataset=counted([0, 0, 1, 1, 1, 1]), fraction=0.5, indices=2))
    assert len(half) == 2
    with pytest.raises(ConfigError, match="either fraction .* or indices"):
        build(dict(type="Subset", dataset=counted([0])))


# --------------------------------------------------------------------------------------- ClassBalancedDataset


def test_rare_classes_are_repeated_as_in_the_paper():
    # f = 0.9, 0.1: r = max(1, sqrt(0.4 / f)) = 1 and 2.
    data = build(dict(type="ClassBalancedDataset", dataset=counted([0] * 9 + [1]), oversample_thr=0.4))
    assert numbers(data) == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9] and labels(data) == [0] * 9 + [1, 1]
    factors = repeat_factors(np.array([0] * 9 + [1, -1]), 0.5)
    np.testing.assert_allclose(factors, [1] * 9 + [np.sqrt(0.5 * 11), 1])
    rare = build(dict(type="ClassBalancedDataset", dataset=counted([0] * 99 + [1]), oversample_thr=0.03))
    assert len(rare) == 99 + 2  # sqrt(3) rounded up


def test_the_most_demanding_label_counts():
    rows = np.zeros((10, 3), np.int8)
    rows[:, 0] = 1
    rows[4, 1] = 1
    rows[5, 2] = -1  # difficult: as if it were not there
    np.testing.assert_allclose(repeat_factors(rows, 0.9), [1, 1, 1, 1, 3, 1, 1, 1, 1, 1])
    rows[:] = 0
    np.testing.assert_array_equal(repeat_factors(rows, 0.9), np.ones(10))
    with pytest.raises(ConfigError, match="several tasks"):
        repeat_factors({"a": np.zeros(3)}, 0.5)
    for thr in (0, 1.5):
        with pytest.raises(ConfigError, match="oversample_thr"):
            repeat_factors(np.zeros(3, int), thr)


def test_labels_that_are_not_kept_are_read(tmp_path):
    samples = [{"image": np.zeros((4, 4, 3), np.uint8), "label": int(i == 9)} for i in range(10)]
    write_array_record(tmp_path / "ten.array_record", samples)
    records = dict(type="ArrayRecordDataset", paths=str(tmp_path / "ten.array_record"))
    data = build(dict(type="ClassBalancedDataset", dataset=records, oversample_thr=0.4))
    assert data.labels.tolist() == [0] * 9 + [1, 1] and len(data) == 11


# ----------------------------------------------------------------------------------------------- KFoldDataset


@pytest.mark.parametrize("seed", [None, 0, 7])
@pytest.mark.parametrize(("count", "splits"), [(10, 5), (11, 4), (5, 5)])
def test_folds_are_scikit_learns(seed, count, splits):
    data = counted(np.arange(count) % 3)
    expected = KFold(splits, shuffle=seed is not None, random_state=seed).split(np.zeros(count))
    for fold, (train, test) in enumerate(expected):
        common = dict(type="KFoldDataset", dataset=data, fold=fold, num_splits=splits, seed=seed)
        assert numbers(build(common)) == train.tolist()
        held_out = build(dict(common, test_mode=True))
        assert numbers(held_out) == test.tolist() and labels(held_out) == (test % 3).tolist()
        assert held_out.labels.tolist() == (test % 3).tolist() and held_out.name(0) == f"InMemory[{test[0]}]"


@pytest.mark.parametrize(
    ("options", "message"),
    [(dict(fold=5), "fold=5 must be from 0 to 4"), (dict(num_splits=1), "num_splits=1"), (dict(num_splits=99), "99")],
)
def test_impossible_folds_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        build(dict(type="KFoldDataset", dataset=counted(range(10)), **options))


# ------------------------------------------------------------------------------------------------- together


class Plain:
    """A data set of a user's: no base class, no names, no labels at hand."""

    def __len__(self):
        return 6

    def __getitem__(self, index):
        return dict(image=np.full((4, 4, 3), index, np.uint8), label=index % 2)


def nested():
    inner = dict(type="ConcatDataset", datasets=[Plain(), dict(type="RepeatDataset", dataset=Plain(), times=2)])
    return dict(type="KFoldDataset", dataset=dict(type="Subset", dataset=inner, fraction=0.5), num_splits=3, seed=1)


def test_wrappers_of_wrappers_of_anything():
    data = build(nested())
    assert isinstance(data, Source) and len(data) == 5 and data.num_classes is None  # 8 samples, 3 held out
    assert labels(data) == data.labels.tolist() == [n % 2 for n in numbers(data)]
    assert data.name(0).startswith("Plain[")
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(pickle.loads(pickle.dumps(data)).__getitem__, list(range(5)) * 10))
    assert [int(sample["image"].max()) for sample in found] == numbers(data) * 10


def test_worker_processes_read_wrapped_files(tmp_path):
    make_voc(tmp_path)
    voc = dict(type="VOC", data_root=str(tmp_path))
    data = dict(
        type="RepeatDataset", dataset=dict(type="ConcatDataset", datasets=[voc, dict(voc, indices=[1])]), times=2
    )
    split = dict(dataset=data, pipeline=[dict(type="Resize", scale=(8, 8))])
    batches = [next(iter(EvalLoader(split, batch_size=10, num_workers=workers))) for workers in (0, 1)]
    for one, other in zip(*(batch.values() for batch in batches), strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(batches[0]["label"], EXPECTED[[0, 1, 2, 3, 1] * 2])
    pixels = np.asarray(Image.open(io.BytesIO(build(voc)[1]["image"])).resize((8, 8)), int)
    assert abs(batches[1]["image"][4].astype(int) - pixels).mean() < 40  # it is that image
