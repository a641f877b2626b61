"""Heads and their losses against the reference, and necks; the simplest heads are in test_losses.py."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxpretrain.build import ConfigError, build
from jaxpretrain.interop import mmpretrain
from jaxpretrain.methods.supervised import Supervised
from jaxpretrain.models.heads import ClsHead, EfficientFormerClsHead, MultiTaskHead, StackedLinearClsHead
from jaxpretrain.models.layers import Frozen
from jaxpretrain.models.margin_head import ArcFaceClsHead
from jaxpretrain.models.multi_label_heads import CSRAClsHead, MultiLabelClsHead, MultiLabelLinearClsHead
from jaxpretrain.models.necks import (
    ClsBatchNormNeck,
    GeneralizedMeanPooling,
    GlobalAveragePooling,
    LinearNeck,
    LinearReduction,
)
from tests.parity import TOLERANCE, load_golden
from tests.test_resnet import TWO, assert_close, normal, random, split

GOLDEN = load_golden("heads")
STEPS = [name for name, case in GOLDEN["losses"].items() if "steps" in case]
PRECISIONS = pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])


def golden_input(name, dtype=np.float32):
    array = np.asarray(GOLDEN["inputs"][name])
    return array.astype(np.int32) if array.dtype.kind == "i" else array.astype(dtype)


def golden_heads(prefix):
    return [name for name in GOLDEN["heads"] if name.startswith(prefix)]


def assert_gradient(grad, golden, tolerance):
    grad = np.asarray(grad)
    assert_close(grad.reshape(-1)[:8], golden["first8"], tolerance)
    assert_close(np.linalg.norm(grad), golden["norm"], tolerance)


# --- losses ----------------------------------------------------------------------------------------------------------


def test_every_case_is_there():
    """So that a golden file cut short does not pass."""
    kinds = [case["config"]["type"] for case in GOLDEN["losses"].values()]
    assert [kinds.count(kind) for kind in ("FocalLoss", "AsymmetricLoss", "SeesawLoss")] == [4, 6, 4]
    assert [len(golden_heads(kind)) for kind in ("arcface", "csra", "multilabel")] == [5, 5, 3]


@PRECISIONS
@pytest.mark.parametrize("name", sorted(set(GOLDEN["losses"]) - set(STEPS)))
def test_loss_equals_reference(name, dtype):
    case = GOLDEN["losses"][name]
    args = {key: golden_input(value, dtype) for key, value in case["args"].items()}
    tolerance = TOLERANCE if dtype is np.float32 else 1e-6  # the reference's one-hot labels pass through float32
    with jax.enable_x64(dtype is np.float64):
        loss = build(case["config"])

        def value(x):
            return loss(**{**args, "cls_score": x}, **case.get("call_kwargs", {}))

        assert_close(value(args["cls_score"]), case["value"], tolerance)
        grad = jax.grad(lambda x: value(x).sum())(args["cls_score"])
    assert grad.dtype == dtype
    assert_gradient(grad, case["grad"]["cls_score"], tolerance)


@PRECISIONS
@pytest.mark.parametrize("name", STEPS)
def test_seesaw_loss_counts_as_the_reference(name, dtype):
    case = GOLDEN["losses"][name]
    tolerance = TOLERANCE if dtype is np.float32 else 1e-6
    with jax.enable_x64(dtype is np.float64):
        loss = build(case["config"])
        for i, step in enumerate(case["steps"]):
            scores = (golden_input("logits", dtype) + dtype(0.5 * i)) * dtype(1 + 0.3 * i)
            labels = np.asarray(step["labels"], np.int32)
            value = loss(scores, labels)
            assert_close(value, step["value"], tolerance)
            np.testing.assert_array_equal(loss.cum_samples[...], step["cum_samples"])
            loss.eval()  # counts no more
            assert_gradient(jax.grad(lambda x, y=labels: loss(x, y).sum())(scores), step["grad"], tolerance)
            np.testing.assert_array_equal(loss.cum_samples[...], step["cum_samples"])
            loss.train()


def test_losses_compute_in_float32_and_stay_finite():
    labels = golden_input("labels")
    far = jnp.asarray([[90.0, -90.0, 0.0]])
    for kind in ("FocalLoss", "AsymmetricLoss"):
        logits = jnp.asarray(golden_input("logits"), jnp.bfloat16)
        assert build(dict(type=kind))(logits, labels) == build(dict(type=kind))(logits.astype(jnp.float32), labels)
        for label in range(3):
            grad = jax.grad(lambda x, k=kind, y=label: build(dict(type=k))(x, jnp.asarray([y])))(far)
            assert np.isfinite(grad).all()


# --- ArcFace ---------------------------------------------------------------------------------------------------------


def arcface(dtype=np.float32, weight="arc_weight", **config):
    head = ArcFaceClsHead(**{"num_classes": 5, "in_channels": 8, **config}, rngs=nnx.Rngs(0))
    head.norm_product.kernel.set_value(jnp.asarray(golden_input(weight, dtype).T))
    return head


@PRECISIONS
@pytest.mark.parametrize("name", golden_heads("arcface"))
def test_arcface_equals_reference(name, dtype):
    case = GOLDEN["heads"][name]
    feats, labels = golden_input(case["args"]["feats"], dtype), golden_input(case["labels"])
    tolerance = TOLERANCE if dtype is np.float32 else 1e-6  # of the margins, which are float32 there
    with jax.enable_x64(dtype is np.float64):
        head = arcface(dtype, case["weight"], **case["config"])
        assert_close(head((feats,)), case["eval_logits"], tolerance)
        assert_close(head(feats, labels), case["train_logits"], tolerance)
        loss, metrics = head.loss(feats, labels)
        assert_close(loss, case["value"], tolerance)
        assert metrics == {}
        grad = jax.grad(lambda x: head.loss(x, labels)[0])(feats)
    assert_gradient(grad, case["grad"]["feats"], tolerance)


def test_margins_from_numbers_and_files(tmp_path):
    feats, labels = golden_input("feat_a"), golden_input("labels")
    margins = [0.5, 0.3, 0.2, 0.45, 0.6]
    wanted = arcface(margins=margins)(feats, labels)
    file = tmp_path / "margins.txt"
    file.write_text("\n".join(map(str, margins)) + "\n")
    np.testing.assert_array_equal(arcface(margins=str(file))(feats, labels), wanted)
    head = arcface(margins=1)
    assert head.margins == (1.0,) * 5
    for values in (margins, tuple(margins), np.asarray(margins), jnp.asarray(margins)):
        head.set_margins(values)
        assert_close(head(feats, labels), wanted, 1e-6)
    head.set_margins(0.25)
    np.testing.assert_array_equal(head(feats, labels), arcface(margins=0.25)(feats, labels))


def test_arcface_is_exact_in_half_precision_and_at_its_centers():
    feats, labels = golden_input("feat_a"), golden_input("labels")
    head = arcface()
    half = head(jnp.asarray(feats, jnp.bfloat16))
    assert half.dtype == jnp.float32
    assert_close(half, head(jnp.asarray(feats, jnp.bfloat16).astype(jnp.float32)), 1e-6)
    centers = golden_input("arc_weight")
    assert_close(head(centers).diagonal(), np.full(5, 64.0), 1e-6)
    grad = jax.grad(lambda x: head.loss(x, jnp.arange(5))[0])(jnp.asarray(centers))
    assert np.isfinite(grad).all(), "the angle's own gradient is infinite there"
    assert np.isnan(head.loss(feats, jnp.asarray(labels).at[0].set(5))[0]), "a label out of range"


def test_arcface_learns():
    """From features that point anywhere to the classes' centers."""
    head = arcface(scale=16.0, weight="arc_weight")
    graphdef, params = split(head)
    feats, labels = golden_input("feat_a"), golden_input("labels")

    @jax.jit
    def step(params):
        loss, grads = jax.value_and_grad(lambda p: nnx.merge(graphdef, p).loss(feats, labels)[0])(params)
        return loss, jax.tree.map(lambda p, g: p - 0.05 * g, params, grads)

    losses = []
    for _ in range(60):
        loss, params = step(params)
        losses.append(float(loss))
    assert losses[-1] < 0.1 * losses[0]


# --- multi-label -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", golden_heads("csra"))
def test_residual_attention_equals_reference(name):
    case = GOLDEN["heads"][name]
    head = CSRAClsHead(**case["config"], rngs=nnx.Rngs(0))
    assert [module.T for module in head.csra_heads] == case["temperatures"]
    rng = np.random.Generator(np.random.PCG64(161))  # by the golden file's note
    for module in head.csra_heads:
        module.head.kernel.set_value(jnp.asarray(rng.standard_normal((5, 6, 1, 1)).transpose(2, 3, 1, 0), jnp.float32))
    maps = golden_input("csra_feat").transpose(0, 2, 3, 1)
    assert_close(head((maps,)), case["logits"])
    soft = golden_input("soft")[:2]
    grad = jax.grad(lambda x: (head(x) * soft).sum())(jnp.asarray(maps)).transpose(0, 3, 1, 2)
    assert_gradient(grad, case["grad"]["feats"], TOLERANCE)
    assert head(jnp.asarray(maps, jnp.bfloat16)).dtype == jnp.float32


@pytest.mark.parametrize("name", golden_heads("multilabel"))
def test_multi_label_head_equals_reference(name):
    case = GOLDEN["heads"][name]
    head = MultiLabelClsHead(**case["config"])
    logits = golden_input("logits")
    loss, metrics = head.loss((logits,), golden_input("multi"))
    assert_close(loss, case["loss"])
    assert metrics == {}
    scores = head.predict(logits)
    assert_close(scores[0], case["pred_scores"])
    positive = np.asarray(head.positive(scores))
    assert [np.flatnonzero(row).tolist() for row in positive] == [sorted(labels) for labels in case["pred_labels"]]


def test_multi_label_linear_head():
    head = build(dict(type="MultiLabelLinearClsHead", num_classes=4, in_channels=400, thr=0.1, topk=2))
    assert isinstance(head, MultiLabelLinearClsHead)
    head.init_weights(nnx.Rngs(1))
    assert np.std(head.fc.kernel[...]) == pytest.approx(0.01, rel=0.1)
    x = normal(3, 400)
    assert_close(head((x, x)), x @ head.fc.kernel[...])
    assert_close(head.predict(x), jax.nn.sigmoid(x @ head.fc.kernel[...]))
    np.testing.assert_array_equal(head.positive(jnp.asarray([[0.1, 0.2, 0.3, 0.05]])), [[True, True, True, False]])


def test_classifier_with_a_multi_label_head_trains_and_predicts():
    model = random(
        dict(
            type="ImageClassifier",
            backbone=dict(type="ResNet", depth=18, **TWO, out_indices=(1,)),
            head=dict(type="CSRAClsHead", num_classes=3, in_channels=8, num_heads=2, lam=0.2),
        )
    )
    method = Supervised(model, rngs=nnx.Rngs(0))
    x, label = jnp.asarray(normal(4, 16, 16, 3)), jnp.asarray([[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]])
    graphdef, state = split(method)

    @jax.jit
    def run(state):
        method = nnx.merge(graphdef, state)
        loss, metrics = method.loss({"image": x, "label": label})
        trained = method.model.loss(x, label)[0]
        method.eval()
        return loss, metrics, trained, method.model.predict(x), method.features(x), method.logits(x)

    loss, metrics, trained, scores, features, logits = run(state)
    assert metrics == {}
    assert_close(loss, trained)
    assert features.shape == (4, 8)
    assert_close(scores, jax.nn.sigmoid(logits))


# --- stacked, distilled and several heads ----------------------------------------------------------------------------


def test_stacked_linear_head_by_definition():
    head = StackedLinearClsHead(
        5, 6, [8, 7], dropout_rate=0.5, norm_cfg=dict(type="BN1d"), act_cfg=dict(type="HSwish"), rngs=nnx.Rngs(0)
    )
    assert set(mmpretrain.names(head)) == {
        *(f"layers.{i}.{name}" for i in range(3) for name in ("fc.weight", "fc.bias")),
        *(f"layers.{i}.norm.{name}" for i in range(2) for name in ("weight", "bias")),
        *(
            f"layers.{i}.norm.{name}"
            for i in range(2)
            for name in ("running_mean", "running_var", "num_batches_tracked")
        ),
    }
    head.eval()
    x = y = normal(4, 6)
    for layer in head.layers[:2]:
        y = (y @ layer.fc.kernel[...] + layer.fc.bias[...]) / np.sqrt(1 + 1e-5)
        y = y * np.clip(y + 3, 0, 6) / 6
    assert_close(head.pre_logits((x,)), y)
    assert_close(head((x,)), y @ head.layers[2].fc.kernel[...] + head.layers[2].fc.bias[...])


def test_dropout_in_a_head_draws_in_training_alone():
    cfg = dict(type="StackedLinearClsHead", num_classes=5, in_channels=8, mid_channels=[64], dropout_rate=0.5)
    model = random(
        dict(
            type="ImageClassifier",
            backbone=dict(type="ResNet", depth=18, **TWO, out_indices=(1,)),
            neck=dict(type="GlobalAveragePooling"),
            head={**cfg, "norm_cfg": dict(type="BN1d")},
        )
    )
    x, label = jnp.asarray(normal(4, 16, 16, 3)), jnp.arange(4)
    method = Supervised(model, rngs=nnx.Rngs(0))
    graphdef, state = split(method)

    @jax.jit
    def run(state, key):
        method = nnx.merge(graphdef, state)
        loss, metrics = method.loss({"image": x, "label": label}, rngs=nnx.Rngs(key))
        return loss, metrics, method.model.head.layers[0].norm.num_batches_tracked[...]

    (a, metrics, counted), (b, *_), (c, *_) = (run(state, jax.random.key(seed)) for seed in (0, 0, 1))
    assert a == b != c
    assert counted == 1, "the accuracy does not count the batch again"
    assert 0 <= metrics["accuracy_top-1"] <= 100
    with pytest.raises(ValueError, match="rngs"):
        model.head(normal(4, 8))
    with pytest.raises(ValueError, match="rngs"):
        model.loss(x, label)
    model(x, rngs=nnx.Rngs(0))
    model.eval()
    np.testing.assert_array_equal(model(x), model(x, rngs=nnx.Rngs(0)))


def test_distilled_head_is_the_mean_and_for_inference():
    head = EfficientFormerClsHead(5, 6, rngs=nnx.Rngs(0))
    x = normal(3, 6)
    assert_close(head((x,)), (head.head(x) + head.dist_head(x)) / 2)
    with pytest.raises(ConfigError, match="distillation=False"):
        head.loss(x, jnp.arange(3))
    alone = EfficientFormerClsHead(5, 6, distillation=False, rngs=nnx.Rngs(0))
    assert set(mmpretrain.names(alone)) == {"head.weight", "head.bias"}
    assert_close(alone.loss(x, jnp.arange(3))[0], -jax.nn.log_softmax(alone(x))[jnp.arange(3), jnp.arange(3)].mean())


def test_several_tasks_with_labels_for_some_samples():
    cfg = dict(
        type="MultiTaskHead",
        task_heads=dict(
            kind=dict(type="LinearClsHead", num_classes=4, cal_acc=True),
            parts=dict(type="MultiLabelLinearClsHead", num_classes=3),
            more=dict(
                type="MultiTaskHead", task_heads=dict(size=dict(type="LinearClsHead", num_classes=2)), in_channels=6
            ),
        ),
        in_channels=6,
    )
    head = build(cfg)
    assert isinstance(head, MultiTaskHead)
    assert "task_heads.more.task_heads.size.fc.weight" in mmpretrain.names(head)
    x = normal(4, 6)
    label = dict(
        kind=jnp.asarray([1, -1, 3, 0]),
        parts=jnp.asarray([[1, 0, 1], [0, 0, 1], [-1, -1, -1], [-1, -1, -1]]),
        more=dict(size=jnp.full(4, -1)),
    )
    loss, metrics = head.loss((x,), label)
    kind, parts = head.task_heads["kind"], head.task_heads["parts"]
    known = np.asarray([0, 2, 3])
    wanted = kind.loss(x[known], label["kind"][known])
    assert_close(metrics["kind_loss"], wanted[0])
    assert_close(metrics["kind_accuracy_top-1"], wanted[1]["accuracy_top-1"])
    assert_close(metrics["parts_loss"], parts.loss(x[:2], label["parts"][:2])[0])
    assert metrics["more_loss"] == metrics["more_size_loss"] == 0
    assert [metrics[f"{name}_mask_size"] for name in ("kind", "parts", "more_size")] == [3, 2, 0]
    assert_close(loss, metrics["kind_loss"] + metrics["parts_loss"])
    logits, scores = head(x), head.predict(x)
    assert_close(scores["parts"], jax.nn.sigmoid(logits["parts"]))
    assert scores["more"]["size"].shape == (4, 2)
    grads = jax.grad(lambda x: head.loss(x, label)[0])(jnp.asarray(x))
    assert np.isfinite(grads).all()
    with pytest.raises(ConfigError, match=r"no labels for \['more', 'parts'\]"):
        head.loss(x, dict(kind=label["kind"]))


def test_weights_of_samples():
    logits, labels = golden_input("logits"), golden_input("labels")
    head = ClsHead(cal_acc=True)
    weight = jnp.asarray([1, 0, 1, 1, 0, 0], jnp.float32)
    chosen = np.flatnonzero(weight)
    jax.tree.map(assert_close, head.loss(logits, labels, weight=weight), head.loss(logits[chosen], labels[chosen]))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dict(type="ArcFaceClsHead", margins=[0.1, 0.2]), "2 margins for num_classes=3"),
        (dict(type="ArcFaceClsHead", margins="margins.csv"), "'.txt' file"),
        (dict(type="ArcFaceClsHead", margins="missing.txt"), "cannot read margins from 'missing.txt'"),
        (dict(type="ArcFaceClsHead", margins=None), "margins are numbers"),
        (dict(type="ArcFaceClsHead", num_subcenters=0), "num_subcenters must be 1"),
        (dict(type="CSRAClsHead", num_heads=3, lam=0.1), r"one of \[1, 2, 4, 6, 8\], not 3"),
        (dict(type="CSRAClsHead", num_heads=2, lam=0), "lam must be positive"),
        (dict(type="CSRAClsHead", num_heads=2, lam=1, treshold=0.1), "no argument 'treshold'"),
        (dict(type="MultiLabelLinearClsHead", num_classes=0), "must be positive"),
        (dict(type="StackedLinearClsHead", mid_channels=8), "list of widths, not 8"),
        (dict(type="StackedLinearClsHead", mid_channels=[8], act_cfg=dict(type="HSwich")), "Did you mean 'HSwish'"),
        (dict(type="MultiTaskHead", task_heads=[dict(type="ClsHead")]), "dictionary of heads"),
        (dict(type="MultiTaskHead", task_heads=dict(a=dict(type="LinearHead"))), "Did you mean 'LinearClsHead'"),
        (dict(type="SeesawLoss", use_sigmoid=True), "no use_sigmoid"),
        (dict(type="FocalLoss", reduction="men"), "Did you mean 'mean'"),
    ],
)
def test_wrong_settings_are_named(config, message):
    common = dict(num_classes=3, in_channels=4) if config["type"].endswith("ClsHead") else {}
    with pytest.raises(ConfigError, match=message):
        build(common | config)


def test_wrong_calls_are_named():
    with pytest.raises(ConfigError, match="switch off the batch augmentations"):
        arcface().loss(golden_input("feat_a"), golden_input("soft"))
    with pytest.raises(ConfigError, match="without a neck"):
        build(dict(type="CSRAClsHead", num_classes=3, in_channels=4, num_heads=1, lam=0.1))(jnp.ones((2, 4)))
    with pytest.raises(ConfigError, match="int labels"):
        build(dict(type="SeesawLoss", num_classes=5))(golden_input("logits"), golden_input("soft"))
    with pytest.raises(ConfigError, match="num_classes=4, but 5 logits"):
        build(dict(type="SeesawLoss", num_classes=4))(golden_input("logits"), golden_input("labels"))
    with pytest.raises(ValueError, match="AsymmetricLoss: labels"):
        build(dict(type="AsymmetricLoss"))(golden_input("logits"), golden_input("soft")[:, :4])


# --- necks -----------------------------------------------------------------------------------------------------------


def test_generalized_mean_lies_between_mean_and_maximum():
    x = np.abs(normal(2, 3, 4, 5)) + 0.1
    assert_close(GeneralizedMeanPooling(p=1.0)(x), GlobalAveragePooling()(x))
    assert_close(GeneralizedMeanPooling()(x), (x**3).mean(axis=(1, 2)) ** (1 / 3))
    assert_close(GeneralizedMeanPooling(p=60.0)(x), x.max(axis=(1, 2)), 0.05)
    pooled = GeneralizedMeanPooling()((x, x[:, :2]))
    assert isinstance(pooled, tuple) and pooled[1].shape == (2, 5)
    half = GeneralizedMeanPooling()(jnp.asarray(x, jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    with jax.enable_x64(True):
        assert GeneralizedMeanPooling()(jnp.asarray(x, jnp.float64)).dtype == jnp.float64


def test_generalized_mean_clamps_and_learns_its_exponent():
    x = normal(2, 3, 4, 5)
    clamped = np.maximum(x, 0.5)
    assert_close(GeneralizedMeanPooling(eps=0.5)(x), (clamped**3).mean(axis=(1, 2)) ** (1 / 3))
    assert np.isnan(GeneralizedMeanPooling(p=2.5, clamp=False)(x)).any()
    neck = GeneralizedMeanPooling(p=2.0)
    assert isinstance(neck.p, nnx.Param) and neck.p.shape == (1,) and set(mmpretrain.names(neck)) == {"p"}
    assert isinstance(GeneralizedMeanPooling(p_trainable=False).p, Frozen)
    graphdef, params = split(neck)
    with jax.enable_x64(True):
        x = jnp.asarray(np.abs(x) + 0.1, jnp.float64)

        def value(p):
            return nnx.merge(graphdef, {"p": p})(x).sum()

        p = jnp.asarray(params["p"], jnp.float64)
        slope = (value(p + 1e-6) - value(p - 1e-6)) / 2e-6
        assert jax.grad(value)(p)[0] == pytest.approx(float(slope), rel=1e-6)
    with pytest.raises(ConfigError, match="1 or more"):
        GeneralizedMeanPooling(p=0.5)


def test_batch_norm_of_class_tokens():
    neck = ClsBatchNormNeck(6)
    assert set(mmpretrain.names(neck)) == {"bn.running_mean", "bn.running_var", "bn.num_batches_tracked"}
    x = normal(16, 6)
    (y,) = neck((x,))
    assert_close(y, (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-6))
    assert_close(neck.bn.mean[...], 0.1 * x.mean(0))
    neck.eval()
    assert_close(neck(x), (x - neck.bn.mean[...]) / np.sqrt(neck.bn.var[...] + 1e-6))
    apart = ClsBatchNormNeck(6, affine=True, groups=2)
    assert_close(apart(x)[8:], ClsBatchNormNeck(6)(x[8:]))
    assert apart.bn.scale is not None


def test_linear_neck():
    neck = LinearNeck(6, 4, gap_dim=2, act_cfg=dict(type="ReLU"), rngs=nnx.Rngs(0))
    x = normal(8, 3, 2, 6)
    neck.eval()
    (y,) = neck((x[:, :1], x))
    fc = np.asarray(x.mean(axis=(1, 2)) @ neck.fc.kernel[...] + neck.fc.bias[...])
    assert_close(y, np.maximum(fc / np.sqrt(1 + 1e-5), 0))
    plain = LinearNeck(6, 4, norm_cfg=None, rngs=nnx.Rngs(0))
    assert_close(plain(x[:, 0, 0])[0], x[:, 0, 0] @ plain.fc.kernel[...] + plain.fc.bias[...])
    assert set(mmpretrain.names(LinearReduction(6, 4, norm_cfg=None, rngs=nnx.Rngs(0)))) == {
        "reduction.weight",
        "reduction.bias",
    }
    with pytest.raises(ConfigError, match="0, 1, 2 or 3"):
        LinearNeck(6, 4, gap_dim=4, rngs=nnx.Rngs(0))


def test_classifier_with_a_list_of_necks():
    cfg = dict(
        type="ImageClassifier",
        backbone=dict(type="ResNet", depth=18, **TWO, out_indices=(0, 1)),
        neck=[dict(type="GeneralizedMeanPooling"), dict(type="LinearNeck", in_channels=8, out_channels=5)],
    )
    model = random(cfg)
    assert {"neck.0.p", "neck.1.fc.weight", "neck.1.norm.running_var"} <= set(mmpretrain.names(model))
    model.eval()
    x = jnp.asarray(normal(2, 16, 16, 3))
    maps = model.extract_feat(x, "backbone")
    jax.tree.map(np.testing.assert_array_equal, model.extract_feat(x), model.neck[1](model.neck[0](maps)))
