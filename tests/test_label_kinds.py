"""Labels that are not one integer: in batches, losses, batch augmentations, scores, and whole runs."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from PIL import Image

from jaxpretrain import main
from jaxpretrain.build import ConfigError, build
from jaxpretrain.data.labels import canonical, column, put
from jaxpretrain.data.pipeline import EvalLoader, TrainLoader
from jaxpretrain.data.prefetch import device_prefetch
from jaxpretrain.data.records import decode_record, encode_record, write_array_record
from jaxpretrain.evaluators.base import EvalContext
from jaxpretrain.models.layers import BaseModule
from jaxpretrain.models.layers.conv import Conv2d
from jaxpretrain.trainer import Trainer
from tests.test_voc import make_voc
from tests.tiny import records, tiny_config

GOLDEN = json.loads((Path(__file__).parent / "golden" / "multi_label_metrics.json").read_text())

# ---------------------------------------------------------------------------------------------------- in batches


def test_kinds_of_labels():
    assert canonical(np.int64(3)) == 3 and canonical(np.array(2)) == 2 and isinstance(canonical(True), int)
    for given in ([1, 0, -1], (1, 0, -1), np.array([1, 0, -1], np.int64)):
        assert canonical(given).dtype == np.int8 and canonical(given).tolist() == [1, 0, -1]
    assert canonical([True, False]).tolist() == [1, 0] and canonical([0.5, 0.25]).dtype == np.float32
    np.testing.assert_equal(canonical({"a": np.int32(1), "b": [0, 1]}), {"a": 1, "b": np.int8([0, 1])})
    for wrong, message in (
        ([0, 3], r"1, 0 or -1.*got \[0, 3\]"),
        ([[0, 1]], "a number for each class"),
        (["x"], "not <U1"),
    ):
        with pytest.raises(ConfigError, match=message):
            canonical(wrong)


def test_columns_keep_what_is_unknown():
    labels = column(canonical({"a": 1, "b": [0, 1], "c": {"d": 2}}), 4)
    put(labels, slice(1, 3), [{"a": 5, "b": np.int8([1, 1])}, {"c": {"d": 7}}])
    np.testing.assert_equal(
        labels, {"a": [-1, 5, -1, -1], "b": [[-1, -1], [1, 1], [-1, -1], [-1, -1]], "c": {"d": [-1, -1, 7, -1]}}
    )
    assert labels["a"].dtype == np.int32 and labels["b"].dtype == np.int8
    put(labels, [3, 0], [{"a": 1}, {"a": 2}])
    assert labels["a"].tolist() == [2, 5, -1, 1]
    for kind, new, message in (
        ({"a": 1}, {"b": 1}, "label for b, but the first sample has labels for a"),
        ({"a": 1}, 3, r"label for \(no task\)"),
        (1, {"a": 1}, "one for each of a, and one integer before"),
        (1, np.int8([1, 0]), "a number for each of 2 classes, and one integer before"),
        (np.int8([1, 0]), np.int8([1, 0, 1]), "each of 3 classes, and a number for each of 2 classes before"),
    ):
        with pytest.raises(ConfigError, match=message):
            put(column(kind, 2), slice(0, 1), [new])


class Tasks:
    """70 samples; a task may be missing in one. The first has all."""

    def __len__(self):
        return 70

    def __getitem__(self, index):
        label = {"digit": index % 10} if index % 3 else {"digit": index % 10, "bits": [index & 1, index >> 1 & 1, -1]}
        return dict(image=np.full((4, 4, 3), index, np.uint8), label=label)


def check_tasks(batch):
    index = batch["index"]
    np.testing.assert_array_equal(batch["label"]["digit"], np.where(index < 0, -1, index % 10))
    bits = np.stack([index & 1, index >> 1 & 1, np.full_like(index, -1)], axis=1)
    np.testing.assert_array_equal(
        batch["label"]["bits"], np.where((index < 0)[:, None] | (index % 3 > 0)[:, None], -1, bits)
    )
    assert batch["label"]["bits"].dtype == np.int8 and batch["label"]["digit"].dtype == np.int32


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_tasks_in_batches_of_several_chunks(workers):
    split = dict(dataset=Tasks())
    for batch in EvalLoader(split, batch_size=40, num_workers=workers):
        check_tasks(batch)
    assert batch["valid"].sum() == 30  # rows that are missing are -1
    loader = TrainLoader(split, batch_size=70, num_workers=workers)
    check_tasks(next(loader))
    loader.close()


def test_the_first_sample_says_what_there_is():
    class Odd(Tasks):
        def __getitem__(self, index):
            return {**super().__getitem__(index), "label": {"a": 0} if index < 35 else {"b": 0}}

    with pytest.raises(ConfigError, match="label for b, but the first sample has labels for a"):
        list(EvalLoader(dict(dataset=Odd()), batch_size=70))


def test_records_hold_every_kind(tmp_path):
    labels = [3, np.int8([1, -1]), np.float32([0.25, 0.5]), {"a": 1, "b": np.int8([0, 1])}]
    pixels = np.zeros((2, 2, 3), np.uint8)
    for label in labels:
        np.testing.assert_equal(decode_record(encode_record(dict(image=pixels, label=label)))["label"], label)
    samples = [dict(image=pixels, label=np.int8([1, 0, 1]))] * 2
    write_array_record(tmp_path / "two.array_record", samples)
    data = build(dict(type="ArrayRecordDataset", paths=str(tmp_path / "two.array_record")))
    assert data.num_classes == 3 and data[1]["label"].dtype == np.int8


def test_labels_are_split_over_devices():
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    with device_prefetch(iter(EvalLoader(dict(dataset=Tasks()), batch_size=40)), sharding) as batches:
        batch = next(batches)
        assert all(leaf.sharding == sharding for leaf in jax.tree.leaves(batch["label"]))
        check_tasks(jax.device_get(batch))


# --------------------------------------------------------------------------------------------------- in learning

LOSSES = [
    dict(type="CrossEntropyLoss", use_sigmoid=True),
    dict(type="CrossEntropyLoss", use_sigmoid=True, pos_weight=[2.0, 1.0, 0.5, 3.0], class_weight=[1.0, 2.0, 1.0, 0.5]),
    dict(type="LabelSmoothLoss", label_smooth_val=0.1, mode="multi_label"),
    dict(type="FocalLoss"),
    dict(type="AsymmetricLoss"),
]


@pytest.mark.parametrize("cfg", LOSSES, ids=lambda cfg: cfg["type"])
def test_what_does_not_count_changes_no_loss(cfg):
    """The loss is the sum over what counts, and the gradient of what does not is zero."""
    loss = build(cfg)
    rng = np.random.default_rng(0)
    logits, target = jnp.asarray(rng.standard_normal((6, 4))), rng.integers(0, 2, (6, 4)).astype(np.int8)
    counted = rng.random((6, 4)) < 0.7
    each = loss(logits, jnp.asarray(target), reduction_override="none")
    masked = jnp.asarray(np.where(counted, target, -1).astype(np.int8))
    value, gradient = jax.value_and_grad(lambda x: loss(x, masked, avg_factor=6))(logits)
    np.testing.assert_allclose(value, (np.asarray(each) * counted).sum() / 6, rtol=1e-6)
    assert (np.asarray(gradient)[~counted] == 0).all() and (np.asarray(gradient)[counted] != 0).all()


class Patches(BaseModule):
    """A backbone of one convolution: [B, H, W, 3] to a map of [B, H/8, W/8, width]."""

    def __init__(self, width: int = 8, *, rngs: nnx.Rngs):
        self.conv = Conv2d(3, width, 8, stride=8, rngs=rngs)

    def __call__(self, x, *, rngs=None):
        return (jax.nn.relu(self.conv(x)),)


BACKBONE = dict(type=f"{__name__}.Patches")
GAP = dict(type="GlobalAveragePooling")
HEADS = {
    "linear": (GAP, dict(type="MultiLabelLinearClsHead", num_classes=4, in_channels=8)),
    "csra": (None, dict(type="CSRAClsHead", num_classes=4, in_channels=8, num_heads=2, lam=0.5)),
    "bce": (GAP, dict(type="LinearClsHead", num_classes=4, in_channels=8, loss=LOSSES[0])),
}
TASK_HEADS = dict(
    corner=dict(type="LinearClsHead", num_classes=4, in_channels=8),
    there=dict(type="MultiLabelLinearClsHead", num_classes=4, in_channels=8),
)


def supervised(neck, head, **options):
    model = dict(type="ImageClassifier", backbone=BACKBONE, neck=neck, head=head, **options)
    return dict(type="Supervised", model=model)


def batch_of(label, seed=0):
    images = np.random.default_rng(seed).standard_normal((4, 16, 16, 3)).astype(np.float32)
    return dict(image=jnp.asarray(images), label=jax.tree.map(jnp.asarray, label))


SEVERAL = np.array([[1, 0, 0, 1], [0, 0, 0, 0], [1, -1, 0, -1], [-1, -1, -1, -1]], np.int8)


@pytest.mark.parametrize("kind", HEADS)
def test_supervised_learns_from_several_labels(kind):
    neck, head = HEADS[kind]
    method = build(supervised(neck, head))
    batch = batch_of(SEVERAL)
    value, metrics = method.loss(batch, rngs=nnx.Rngs(0))
    logits = np.asarray(method.logits(batch["image"]), np.float64)
    terms = np.logaddexp(0, -logits) + np.where(SEVERAL == 1, 0, logits)
    np.testing.assert_allclose(value, terms[SEVERAL >= 0].sum() / 4, rtol=1e-5)
    assert metrics == {}
    other = dict(batch, image=batch["image"].at[3].add(1.0))  # of the last image nothing counts
    np.testing.assert_allclose(method.loss(other, rngs=nnx.Rngs(0))[0], value, rtol=1e-6)


def test_mixed_labels_of_several_classes():
    """Mixup of int8 labels is not rounded, and what does not count in one image does not in the mixture."""
    neck, head = HEADS["linear"]
    method = build(supervised(neck, head, train_cfg=dict(augments=[dict(type="Mixup", alpha=1.0)])))
    batch = batch_of(SEVERAL)
    images, label = method._mix(batch["image"], batch["label"], jax.random.key(3))
    _, plain = method.augment(batch["image"], jnp.asarray(np.maximum(SEVERAL, 0), jnp.float32), jax.random.key(3))
    _, missing = method.augment(batch["image"], jnp.asarray(SEVERAL < 0, jnp.float32), jax.random.key(3))
    np.testing.assert_allclose(label, np.where(np.asarray(missing) > 0, -1, plain), rtol=1e-6)
    assert 0 < (np.asarray(missing) > 0).sum() < 16 and images.shape == batch["image"].shape
    assert np.isfinite(method.loss(batch, rngs=nnx.Rngs(0))[0])


def test_several_tasks_count_where_they_are_known():
    method = build(supervised(GAP, dict(type="MultiTaskHead", task_heads=TASK_HEADS)))
    corner = np.array([2, -1, 0, -1], np.int32)
    batch = batch_of(dict(corner=corner, there=SEVERAL))
    value, metrics = method.loss(batch, rngs=nnx.Rngs(0))
    logits = jax.tree.map(lambda x: np.asarray(x, np.float64), method.logits(batch["image"]))
    log_softmax = logits["corner"] - np.logaddexp.reduce(logits["corner"], axis=1, keepdims=True)
    first = -(log_softmax[0, 2] + log_softmax[2, 0]) / 2
    terms = np.logaddexp(0, -logits["there"]) + np.where(SEVERAL == 1, 0, logits["there"])
    second = terms[SEVERAL >= 0].sum() / 3  # the third image has labels for two of four classes
    np.testing.assert_allclose(value, first + second, rtol=1e-5)
    assert metrics["corner_mask_size"] == 2 and metrics["there_mask_size"] == 3


@pytest.mark.parametrize(
    ("neck", "head", "label", "message"),
    [
        (GAP, dict(type="LinearClsHead", num_classes=4, in_channels=8), SEVERAL, "several labels .*, and LinearClsHead"),
        (GAP, HEADS["linear"][1], {"a": SEVERAL}, r"several tasks \(a\) need a MultiTaskHead"),
        (GAP, dict(type="MultiTaskHead", task_heads=TASK_HEADS), SEVERAL, "MultiTaskHead needs labels of several tasks"),
        (GAP, dict(type="MultiTaskHead", task_heads=TASK_HEADS), {"corner": SEVERAL[:, 0]}, r"no labels for \['there'\]"),
    ],
)  # fmt: skip
def test_heads_that_do_not_fit_are_named(neck, head, label, message):
    with pytest.raises(ConfigError, match=message):
        build(supervised(neck, head)).loss(batch_of(label), rngs=nnx.Rngs(0))


# ------------------------------------------------------------------------------------------------------ in scores


def context_of(logits, labels, valid=None, num_classes=None, classes=None):
    """A context of one `val` batch per half, in a shuffled order, with these logits."""
    count = len(jax.tree.leaves(labels)[0])
    order = np.random.default_rng(0).permutation(count)

    def loader(split):
        for rows in np.array_split(order, 2):
            label = jax.tree.map(lambda x: jnp.asarray(x[rows]), labels)  # noqa: B023
            yield dict(label=label, index=jnp.asarray(rows), valid=jnp.ones(len(rows), bool))

    return EvalContext(
        features=None,
        logits=lambda state, batch: jax.tree.map(lambda x: jnp.asarray(x)[batch["index"]], logits),
        loader=loader,
        num_classes=num_classes,
        method=None,
        workdir=None,
        seed=0,
        preprocess=None,
        classes=classes,
    )


def inverse_sigmoid(scores):
    p = np.asarray(scores, np.float64)
    return np.log(p / (1 - p)).astype(np.float32)


@pytest.mark.parametrize("name", [n for n in GOLDEN["metrics"] if n != "multi_task"])
def test_multi_label_scores_are_mmpretrains(name):
    case = GOLDEN["metrics"][name]
    labels = np.array(GOLDEN["inputs"]["ml_target"], np.int8)
    if "gt_label_difficult" in case["inputs"]:
        labels[(np.array(GOLDEN["inputs"]["ml_difficult"]) == 1) & (labels == 0)] = -1
    cfg = {key: value for key, value in case["config"].items() if key != "thrs"}
    scores = build(cfg, context=context_of(inverse_sigmoid(GOLDEN["inputs"]["ml_scores"]), labels)).run(None)
    for key, expected in case["result"].items():
        key = key.removeprefix("multi-label/")
        if isinstance(expected, list):
            assert sum(k.startswith(f"{key}/") for k in scores) == len(expected) == 6
            np.testing.assert_allclose([scores[f"{key}/{c}"] for c in range(6)], expected, rtol=1e-5, atol=1e-4)
        else:
            np.testing.assert_allclose(scores[key], expected, rtol=1e-5)


def test_scores_by_name_of_the_class_and_of_one_label():
    logits = np.float32([[3, 1, 0], [0, 2, 1], [1, 0, 2], [2, 1, 0]])
    context = context_of(logits, np.int32([0, 1, 2, 1]), num_classes=3, classes=("a", "b", "c"))
    scores = build(dict(type="AveragePrecision", average=None), context=context).run(None)
    assert scores == {"AP_classwise/a": 100.0, "AP_classwise/b": pytest.approx(100.0), "AP_classwise/c": 100.0}
    assert build(dict(type="MultiLabelMetric", topk=1, items=["recall"]), context=context).run(None) == {
        "recall_top1": pytest.approx(100 * (1 + 0.5 + 1) / 3)
    }


def test_scores_of_several_tasks_are_mmpretrains():
    case, inputs = GOLDEN["metrics"]["multi_task"], GOLDEN["inputs"]
    logits = {"t0": np.float32(inputs["scores"]), "t1": np.float32(inputs["ml_scores"])}
    labels = np.array(inputs["labels"], np.int32)
    labels = {"t0": np.where(np.arange(len(labels)) % 3 != 0, labels, -1), "t1": labels}  # unknown where not evaluated
    metrics = {"t0": [dict(type="Accuracy", topk=(1,))], "t1": dict(type="Accuracy", topk=(1, 2))}
    context = context_of(logits, labels)
    scores = build(dict(type="MultiTasksMetric", task_metrics=metrics), context=context).run(None)
    expected = {key.replace("accuracy/", ""): v for key, v in case["result"].items() if "accuracy" in key}
    assert scores.keys() == expected.keys() == {"t0_top1", "t1_top1", "t1_top2"}
    np.testing.assert_allclose([scores[key] for key in expected], list(expected.values()), rtol=1e-5)


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (
            dict(type="MultiTasksMetric", task_metrics=dict(z=[dict(type="Accuracy")])),
            "no task 'z' in the head; it has a",
        ),
        (dict(type="Accuracy"), "several labels for each image; score them with AveragePrecision"),
        (dict(type="AveragePrecision"), r"labels of several tasks \(a\).*MultiTasksMetric"),
        (dict(type="MultiLabelMetric", items=["recal"]), "unknown item 'recal'. Did you mean 'recall'"),
        (dict(type="MultiLabelMetric", average="mikro"), "average='mikro' must be"),
        (dict(type="AveragePrecision", average="micro"), "average='micro' must be"),
    ],
)
def test_scores_that_do_not_fit_are_named(cfg, message):
    labels, logits = {"a": np.int8([[1, 0], [0, 1]])}, {"a": np.zeros((2, 2), np.float32)}
    with pytest.raises(ConfigError, match=message):
        build(cfg, context=context_of(logits, labels)).run(None)


# ------------------------------------------------------------------------------------------------------ whole runs

COLOURS = {"red": (220, 40, 40), "green": (40, 220, 40), "blue": (40, 40, 220), "white": (220, 220, 220)}
NAMES = tuple(COLOURS)
PALETTE = np.array([*COLOURS.values(), *[(40, 40, 40)] * 4])


def squares(rng):
    """(image 16x16 of four squares, the colour of each: 0 to 3, or 4 and more for none)."""
    found = rng.integers(0, len(PALETTE), 4)
    pixels = np.kron(PALETTE[found].reshape(2, 2, 3), np.ones((8, 8, 1))) + rng.normal(0, 20, (16, 16, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), found


def write_voc(root, count, split, seed):
    """VOC's layout with images of squares, some of their colours marked as difficult."""
    rng = np.random.default_rng(seed)
    names = [f"{split}{i:03d}" for i in range(count)]
    made = {name: squares(rng) for name in names}
    objects = {
        name: [(c, int(rng.random() < 0.1)) for number, c in enumerate(NAMES) if number in found]
        for name, (_, found) in made.items()
    }
    make_voc(root, objects, split, class_files=False)
    for name, (image, _) in made.items():
        image.save(root / "JPEGImages" / f"{name}.jpg", quality=95)


def recipe_file(path, **fields):
    """A recipe file that the command line takes."""
    path.write_text(
        f"from tests.tiny import tiny_config\n\n\ndef get_config(recipe=None):\n    return tiny_config(**{fields!r})\n"
    )
    return path


FIELDS = dict(
    mesh=dict(data=-1),
    batch_size=32,
    max_steps=60,
    log_interval=20,
    data_preprocessor=dict(mean=(100.0,) * 3, std=(70.0,) * 3),
    optim_wrapper=dict(optimizer=dict(type="AdamW", lr=3e-2, weight_decay=0.0)),
)


def split_of(dataset, **more):
    return dict(dataset=dataset, pipeline=[dict(type="Resize", scale=(16, 16))], **more)


@pytest.mark.parametrize("kind", ["linear", "csra"])
def test_a_multi_label_run_from_the_command_line(tmp_path, kind):
    write_voc(tmp_path / "voc", 96, "trainval", 0)
    write_voc(tmp_path / "voc", 48, "test", 1)
    voc = dict(type="VOC", data_root=str(tmp_path / "voc"), metainfo=dict(classes=list(NAMES)))
    neck, head = HEADS[kind]
    recipe = recipe_file(
        tmp_path / "recipe.py",
        method=supervised(neck, head, train_cfg=dict(augments=[dict(type="Mixup", alpha=0.2)], probs=[0.5])),
        data=dict(train=split_of(dict(voc, split="trainval")), val=split_of(dict(voc, split="test"))),
        evaluators=dict(
            ap=dict(type="VOCAveragePrecision"),
            each=dict(type="AveragePrecision", average=None),
            multi=dict(type="VOCMultiLabelMetric", average="micro"),
        ),
        evaluation=dict(at_start=True),
        accumulative_counts=2,
        **FIELDS,
    )
    assert main.main([f"--config={recipe}", f"--workdir={tmp_path / 'run'}"]) == 0
    first, last = records(tmp_path / "run", "eval")
    assert first["ap/mAP"] < 90 and last["ap/mAP"] > 97, (first, last)
    assert last["multi/f1-score_micro"] > 85 and last["each/AP_classwise/blue"] > 90


def test_a_multi_task_run_from_the_command_line(tmp_path):
    rng = np.random.default_rng(0)
    for split, count in (("train", 96), ("val", 48)):
        items = []
        (tmp_path / split).mkdir()
        for i in range(count):
            image, found = squares(rng)
            image.save(tmp_path / split / f"{i}.png")
            label = {"there": [int(c in found) for c in range(4)], "corner": int(found[0]) if found[0] < 4 else -1}
            if i and i % 3 == 0:
                del label["there" if i % 2 else "corner"]
            items.append(dict(img_path=f"{i}.png", gt_label=label))
        content = dict(metainfo=dict(tasks=["corner", "there"]), data_list=items)
        (tmp_path / f"{split}.json").write_text(json.dumps(content))
    data = {
        split: split_of(
            dict(type="MultiTaskDataset", data_root=str(tmp_path), ann_file=f"{split}.json", data_prefix=split)
        )
        for split in ("train", "val")
    }
    neck = [dict(type=f"{__name__}.Flat")]
    heads = {name: dict(head, in_channels=32) for name, head in TASK_HEADS.items()}
    method = supervised(neck, dict(type="MultiTaskHead", task_heads=heads))
    task_metrics = dict(corner=[dict(type="Accuracy", topk=(1,))], there=[dict(type="AveragePrecision")])
    evaluators = dict(tasks=dict(type="MultiTasksMetric", task_metrics=task_metrics))
    recipe = recipe_file(tmp_path / "recipe.py", method=method, data=data, evaluators=evaluators, **FIELDS)
    assert main.main([f"--config={recipe}", f"--workdir={tmp_path / 'run'}"]) == 0
    (last,) = records(tmp_path / "run", "eval")
    assert last["tasks/corner_top1"] > 90 and last["tasks/there_mAP"] > 95, last
    train = records(tmp_path / "run")[-1]
    assert train["corner_loss"] < 0.5 and 20 <= train["there_mask_size"] < 32

    def fewer(task, **change):
        changed = dict(heads, **{task: dict(heads[task], **change)})
        fields = {k: v for k, v in FIELDS.items() if k != "log_interval"}
        return tiny_config(method=supervised(neck, dict(type="MultiTaskHead", task_heads=changed)), data=data, **fields)

    for task, count in (("corner", 3), ("there", 5)):
        with pytest.raises(
            ConfigError, match=rf"{count} classes, but the data set has 4: .*task_heads.{task}.num_classes=4"
        ):
            Trainer(fewer(task, num_classes=count), tmp_path / "other")


class Flat(BaseModule):
    """The positions of a map side by side."""

    def __call__(self, x):
        return tuple(part.reshape(len(part), -1) for part in x)
