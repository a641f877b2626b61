"""The losses and classification heads against the reference's values and gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxpretrain.build import ConfigError, build
from jaxpretrain.models.heads import ClsHead, LinearClsHead, VisionTransformerClsHead
from jaxpretrain.models.losses import CrossEntropyLoss, LabelSmoothLoss, PixelReconstructionLoss
from tests.parity import TOLERANCE, load_golden

GOLDEN = load_golden("losses")


def golden_input(name: str, dtype: type = np.float32) -> np.ndarray:
    array = np.asarray(GOLDEN["inputs"][name])
    return array.astype(np.int32) if array.dtype.kind == "i" else array.astype(dtype)


def assert_close(actual, desired, tolerance=TOLERANCE):
    desired = np.asarray(desired)
    assert np.shape(actual) == desired.shape
    error = np.abs(np.asarray(actual, np.float64) - desired).max()
    assert error <= tolerance * np.abs(desired).max(), f"off by {error:.2e}"


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", GOLDEN["losses"])
def test_loss_equals_reference(name, dtype):
    case = GOLDEN["losses"][name]
    args = {key: golden_input(value, dtype) for key, value in case["args"].items()}
    tolerance = TOLERANCE if dtype is np.float32 else 1e-6  # the reference's one-hot labels pass through float32
    with jax.enable_x64(dtype is np.float64):
        loss = build(case["config"])
        (wrt, golden_grad), *rest = case["grad"].items()
        assert not rest
        assert_close(loss(**args, **case.get("call_kwargs", {})), case["value"], tolerance)

        def total(x):
            return loss(**{**args, wrt: x}, **case.get("call_kwargs", {})).sum()

        grad = np.asarray(jax.grad(total)(args[wrt]))
    assert grad.dtype == dtype
    assert_close(grad.reshape(-1)[:8], golden_grad["first8"], tolerance)
    assert_close(np.linalg.norm(grad), golden_grad["norm"], tolerance)


def test_every_mode_is_covered():
    """So that a golden file cut short does not pass."""
    kinds = [case["config"]["type"] for case in GOLDEN["losses"].values()]
    assert (kinds.count("CrossEntropyLoss"), kinds.count("LabelSmoothLoss")) == (21, 11)
    assert kinds.count("PixelReconstructionLoss") == 8


@pytest.mark.parametrize("name", ["simmim_head_L1", "simmim_head_L2"])
def test_pixel_loss_of_masked_images(name):
    """SimMIM's form: images, and a mask of one channel that is finer than the golden one by the patch size."""
    case = GOLDEN["heads"][name]
    pred, target = (golden_input(case["args"][k]).transpose(0, 2, 3, 1) for k in ("pred", "target"))
    size = case["config"]["patch_size"]
    mask = golden_input(case["args"]["mask"]).repeat(size, 1).repeat(size, 2)[..., None]
    loss = PixelReconstructionLoss(case["config"]["criterion"], case["config"]["channel"])
    assert_close(loss(pred, target, mask), case["value"])
    assert_close(loss(pred, target, mask.astype(bool)), case["value"])
    grad = np.asarray(jax.grad(loss)(pred, target, mask)).transpose(0, 3, 1, 2)
    assert_close(np.linalg.norm(grad), case["grad"]["pred"]["norm"])
    assert_close(grad.reshape(-1)[:8], case["grad"]["pred"]["first8"])


@pytest.mark.parametrize("name", ["cls_head_index", "cls_head_gt_score", "cls_head_rsb_bce", "cls_head_class_weight"])
def test_head_loss_equals_reference(name):
    case = GOLDEN["heads"][name]
    config = dict(case.get("config", {}))
    if config.get("loss", {}).get("class_weight"):
        config["loss"] = {**config["loss"], "class_weight": GOLDEN["inputs"]["class_weight"]}
    head = ClsHead(**config, topk=(1, 3), cal_acc="accuracy" in case)
    loss, metrics = head.loss(golden_input("logits"), golden_input(case["args"]["gt"]))
    assert_close(loss, case["loss"])
    assert sorted(metrics) == sorted(case.get("accuracy", {}))


def test_head_accuracy():
    """The reference counts a hit only if its logit is above 0, we count all: both rules are checked."""
    golden = GOLDEN["heads"]["cls_head_index"]["accuracy"]
    logits, labels = golden_input("logits"), golden_input("labels")
    head = ClsHead(topk=(1, 3), cal_acc=True)
    _, metrics = head.loss(logits, labels)
    rank = np.array([(row > row[label]).sum() for row, label in zip(logits, labels, strict=True)])
    positive = logits[np.arange(6), labels] > 0
    for k in (1, 3):
        assert_close(metrics[f"accuracy_top-{k}"], 100 * np.mean(rank < k))
        assert_close(100 * np.mean((rank < k) & positive), np.squeeze(golden[f"accuracy_top-{k}"]))
    assert ClsHead(topk=1).loss(logits, labels)[1] == {}


def test_head_predict_equals_reference():
    case = GOLDEN["heads"]["cls_head_predict"]
    scores = ClsHead().predict((None, golden_input("logits")))
    assert_close(scores, case["pred_scores"])
    assert scores.argmax(1).tolist() == np.squeeze(case["pred_labels"]).tolist()


def test_loss_of_bfloat16_logits_is_computed_in_float32():
    logits = jnp.asarray(golden_input("logits")).astype(jnp.bfloat16)
    labels = golden_input("labels")
    for loss in (CrossEntropyLoss(), CrossEntropyLoss(use_sigmoid=True), LabelSmoothLoss(0.1)):
        value = loss(logits, labels)
        assert value.dtype == jnp.float32
        assert value == loss(logits.astype(jnp.float32), labels)


def test_extreme_logits_give_finite_losses():
    logits = jnp.asarray([[1e4, -1e4, 0.0]])
    assert CrossEntropyLoss()(logits, jnp.asarray([1])) == 2e4
    assert CrossEntropyLoss(use_sigmoid=True, reduction="sum")(logits, jnp.asarray([1])) == pytest.approx(
        2e4 + np.log(2)
    )
    for use_sigmoid in (False, True):
        grad = jax.grad(lambda x, s=use_sigmoid: CrossEntropyLoss(use_sigmoid=s)(x, jnp.asarray([1])))(logits)
        assert np.isfinite(grad).all()


@pytest.mark.parametrize("label", [-1, 5])
def test_label_out_of_range_makes_the_loss_nan(label):
    labels = golden_input("labels").copy()
    labels[2] = label
    losses = CrossEntropyLoss(reduction="none")(golden_input("logits"), labels)
    assert np.isnan(losses).tolist() == [False, False, True, False, False, False]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dict(type="CrossEntropyLoss", use_sigmoid=True, use_soft=True), "exclude each other"),
        (dict(type="CrossEntropyLoss", pos_weight=[1.0]), "pos_weight needs use_sigmoid"),
        (dict(type="CrossEntropyLoss", reduction="average"), "Unknown reduction 'average'"),
        (dict(type="CrossEntropyLoss", los_weight=1.0), "Did you mean 'loss_weight'"),
        (dict(type="LabelSmoothLoss", label_smooth_val=1.0), r"in \[0, 1\)"),
        (dict(type="LabelSmoothLoss", label_smooth_val=0.1, mode="orignal"), "Did you mean 'original'"),
        (dict(type="PixelReconstructionLoss", criterion="L3"), "'L1' or 'L2', not 'L3'"),
        (dict(type="LinearClsHead", num_classes=0, in_channels=3), "must be positive"),
        (dict(type="VisionTransformerClsHead", num_classes=2, in_channels=3, act_cfg=dict(type="Tan")), "unknown type"),
    ],
)
def test_wrong_settings_are_named(config, message):
    with pytest.raises(ConfigError, match=message):
        build(config)


def test_wrong_calls_are_named():
    logits = golden_input("logits")
    with pytest.raises(ConfigError, match="num_classes=10, but the head has 5"):
        LabelSmoothLoss(0.1, num_classes=10)(logits, golden_input("labels"))
    with pytest.raises(ValueError, match="do not fit"):
        CrossEntropyLoss()(logits, golden_input("soft")[:, :4])
    with pytest.raises(ConfigError, match="avg_factor"):
        CrossEntropyLoss(reduction="sum")(logits, golden_input("labels"), avg_factor=6)
    with pytest.raises(ConfigError, match="cal_acc"):
        ClsHead(cal_acc=True).loss(logits, golden_input("soft"))


def test_linear_head_takes_the_last_scale_and_starts_small():
    head = LinearClsHead(num_classes=7, in_channels=400, rngs=nnx.Rngs(0))
    head.init_weights(nnx.Rngs(1))
    assert np.std(head.fc.kernel[...]) == pytest.approx(0.01, rel=0.05)
    assert not np.any(head.fc.bias[...])
    x = jnp.ones((2, 400))
    np.testing.assert_array_equal(head((x + 1, x)), head(x))
    np.testing.assert_array_equal(head.pre_logits((x + 1, x)), x)
    np.testing.assert_allclose(head(x), x @ head.fc.kernel[...], rtol=1e-6)


def test_vision_transformer_head_with_a_hidden_layer():
    head = VisionTransformerClsHead(num_classes=5, in_channels=900, hidden_dim=64, rngs=nnx.Rngs(0))
    names = {".".join(map(str, path)) for path, _ in nnx.state(head).flat_state()}
    assert names == {f"layers.{layer}.{leaf}" for layer in ("pre_logits", "head") for leaf in ("kernel", "bias")}
    head.init_weights(nnx.Rngs(1))
    hidden = np.asarray(head.layers.pre_logits.kernel[...])
    assert hidden.std() == pytest.approx(1 / 30, rel=0.05)
    assert not np.any(head.layers.pre_logits.bias[...])
    assert not np.any(head(jnp.ones((2, 900)))), "the last layer starts at zero"
    x = np.random.default_rng(0).standard_normal((2, 900)).astype(np.float32)
    np.testing.assert_allclose(head.pre_logits((x,)), np.tanh(x @ hidden), atol=1e-5)


def test_vision_transformer_head_without_a_hidden_layer():
    head = VisionTransformerClsHead(num_classes=5, in_channels=8, rngs=nnx.Rngs(0))
    x = jnp.ones((2, 8))
    assert head.pre_logits((x,)) is x
    np.testing.assert_allclose(head(x), x @ head.layers.head.kernel[...] + head.layers.head.bias[...], rtol=1e-6)
