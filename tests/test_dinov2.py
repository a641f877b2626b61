"""DINOv2: Sinkhorn-Knopp, KoLeo, shared-out masks and the loss against NumPy."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxpretrain.build import ConfigError, abstract, build
from jaxpretrain.methods.dinov2 import DINOv2Head, KoLeoLoss, sinkhorn_knopp
from jaxpretrain.models.layers import Frozen
from tests.method_cases import CASES
from tests.method_cases.base import make
from tests.test_dino import softmax

CASE = CASES["dinov2"]


def balance(scores: np.ndarray, temp: float, iterations: int = 3) -> np.ndarray:
    """SwAV's algorithm as DINOv2 states it: rows of Q are prototypes, columns samples."""
    q = np.exp(scores / temp).T
    q /= q.sum()
    k, b = q.shape
    for _ in range(iterations):
        q /= q.sum(axis=1, keepdims=True) * k
        q /= q.sum(axis=0, keepdims=True) * b
    return (q * b).T


def koleo(x: np.ndarray) -> float:
    """Minus the mean log distance to the nearest neighbour on the sphere."""
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    distances = [min(np.linalg.norm(a - b) for j, b in enumerate(x) if j != i) for i, a in enumerate(x)]
    return -float(np.mean(np.log(distances)))


# Sinkhorn-Knopp


@pytest.mark.parametrize("iterations", [1, 3])
def test_sinkhorn_by_hand(iterations):
    scores = np.random.default_rng(0).uniform(-1, 1, (12, 5))
    found = sinkhorn_knopp(jnp.asarray(scores / 0.1), iterations=iterations)
    np.testing.assert_allclose(found, balance(scores, 0.1, iterations), rtol=1e-4)
    np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-5)


def test_sinkhorn_balances_prototypes():
    scores = np.random.default_rng(0).standard_normal((64, 8)) + np.arange(8)
    found = np.asarray(sinkhorn_knopp(jnp.asarray(scores), iterations=50))
    np.testing.assert_allclose(found.mean(axis=0), 1 / 8, rtol=1e-3)


def test_sinkhorn_leaves_invalid_rows_out():
    scores = np.random.default_rng(0).uniform(-1, 1, (9, 4))
    valid = np.array([1, 1, 0, 1, 1, 1, 0, 1, 1], bool)
    found = np.asarray(sinkhorn_knopp(jnp.asarray(scores / 0.07), jnp.asarray(valid)))
    np.testing.assert_allclose(found[valid], balance(scores[valid], 0.07), rtol=1e-4)
    assert not found[~valid].any()
    assert not np.asarray(sinkhorn_knopp(jnp.asarray(scores), jnp.zeros(9, bool))).any()


def test_sinkhorn_does_not_overflow():
    scores = 1e4 * np.random.default_rng(0).standard_normal((6, 3))
    found = sinkhorn_knopp(jnp.asarray(scores, jnp.float32))
    assert jnp.isfinite(found).all()
    np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-4)
    assert not jax.grad(lambda x: sinkhorn_knopp(x)[0, 0])(jnp.asarray(scores)).any()


# KoLeo


def test_koleo_by_hand():
    x = np.random.default_rng(0).standard_normal((7, 4))
    assert KoLeoLoss()(jnp.asarray(x)) == pytest.approx(koleo(x), rel=1e-4)
    groups = np.random.default_rng(1).standard_normal((8, 4))
    wanted = (koleo(groups[:4]) + koleo(groups[4:])) / 2
    assert KoLeoLoss(groups=2)(jnp.asarray(groups)) == pytest.approx(wanted, rel=1e-4)
    assert abs(wanted - koleo(groups)) > 0.01


def test_koleo_gradient_and_equal_features():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((6, 3)))
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(0).standard_normal((6, 3)))
        grad = jax.grad(KoLeoLoss())(x)
        for index in ((0, 0), (4, 2)):
            step = jnp.zeros_like(x).at[index].set(1e-6)
            wanted = float(KoLeoLoss()(x + step) - KoLeoLoss()(x - step)) / 2e-6
            assert grad[index] == pytest.approx(wanted, rel=1e-4)
    collapsed = jnp.ones((4, 3))
    assert KoLeoLoss()(collapsed) > 10
    assert jnp.isfinite(jax.grad(KoLeoLoss())(collapsed)).all()
    with pytest.raises(ConfigError, match="has no neighbour"):
        KoLeoLoss(groups=4)(collapsed)


# Masks


def test_masks_are_shared_out():
    method = build(dict(CASE.config, groups=3), rngs=nnx.Rngs(0))
    masks, bound = method.draw_group_masks(60, (14, 14), nnx.Rngs(0))
    hidden = np.asarray(masks).reshape(3, 40, -1).sum(axis=2)
    ratios = np.linspace(0.1, 0.5, 21)
    assert bound == sum(int(196 * r) for r in ratios[1:])
    assert (hidden.sum(axis=1) <= bound).all()
    for group in hidden:
        assert (group > 0).sum() == 20
        some = np.sort(group[group > 0])
        # One in each step of the ladder; blocks fall a little short of it at times.
        assert (some <= 196 * ratios[1:] + 1e-6).all()
        assert (some >= 196 * ratios[:-1] - 12).mean() > 0.8
    where = np.asarray(masks).reshape(3, 40, -1).any(axis=2)
    assert (where[0] != where[1]).any()  # shuffled


# Loss


def numbers(method, batch, mask):
    """What the networks say of every view, [B, 2 or V, ...], in float64."""
    backbone, neck = method.momentum_encoder.module
    crops, extra = batch["image"], method.backbone.num_extra_tokens
    student = [method.backbone(x, jnp.asarray(mask[:, i].reshape(len(x), -1)))[-1] for i, x in enumerate(crops[:2])]
    small = [method.backbone(x)[-1] for x in crops[2:]]
    teacher = [backbone(x)[-1] for x in crops[:2]]
    found = dict(
        features=[x[:, 0] for x in student],
        s_cls=[method.neck(x[:, 0]) for x in student + small],
        t_cls=[neck(x[:, 0]) for x in teacher],
        s_patch=[method.neck.patches(x[:, extra:]) for x in student],
        t_patch=[neck.patches(x[:, extra:]) for x in teacher],
    )
    return {name: np.stack([np.float64(x) for x in arrays], axis=1) for name, arrays in found.items()}


@pytest.mark.parametrize("centering", ["sinkhorn_knopp", "centering"])
def test_loss_by_hand(centering):
    head = dict(CASE.config["head"], centering=centering)
    method, batch = make(dict(CASE.config, head=head, groups=2)), CASE.batch()
    mask = np.random.default_rng(0).random((8, 2, 4, 4)) < 0.4
    mask[3, 1] = False
    batch["mask"] = jnp.asarray(mask, jnp.int32)
    graphdef, params, rest = nnx.split(method, nnx.Param, ...)

    @jax.jit
    def loss(params, rest):
        merged = nnx.merge(graphdef, params, rest)
        out = merged.loss(batch, rngs=nnx.Rngs(0))
        return out, merged.head.center[...], merged.head.center2[...]

    (value, metrics), center, center2 = loss(params, rest)
    n = numbers(method, batch, mask)
    flat = mask.reshape(8, 2, 16)
    if centering == "centering":
        t_cls, t_patch = softmax(n["t_cls"] / 0.05), softmax(n["t_patch"] / 0.05)
        np.testing.assert_allclose(center[0], 0.1 * n["t_cls"].mean(axis=(0, 1)), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(center2[0, 0], 0.1 * n["t_patch"][flat].mean(axis=0), rtol=1e-4, atol=1e-6)
    else:
        t_cls = balance(n["t_cls"].reshape(16, -1), 0.05).reshape(n["t_cls"].shape)
        t_patch = np.zeros(n["t_patch"].shape)
        t_patch[flat] = balance(n["t_patch"][flat], 0.05)
        assert not center.any() and not center2.any()
    # The release adds local pairs and global pairs up, each over 2 + 2 * local pairs.
    log_s = np.log(softmax(n["s_cls"] / 0.1))
    pairs = [-(t_cls[:, q] * log_s[:, v]).sum(-1).mean() for q in range(2) for v in range(4) if q != v]
    ce = -(t_patch * np.log(softmax(n["s_patch"] / 0.1))).sum(axis=-1)
    per_view = (ce * flat).sum(axis=-1) / np.maximum(flat.sum(axis=-1), 1)
    spreads = [koleo(part) for view in range(2) for part in np.split(n["features"][:, view], 2)]
    wanted = dict(loss_dino=np.sum(pairs) / 6, loss_ibot=per_view.mean(), loss_koleo=0.1 * np.sum(spreads) / 2)
    for name, number in wanted.items():
        assert metrics[name] == pytest.approx(number, rel=2e-5), name
    assert value == pytest.approx(sum(wanted.values()), rel=2e-5)


def test_drawn_masks_give_the_same_loss_as_given_ones():
    """The bound on hidden patches cuts nothing off."""
    method, batch = CASE.make(), CASE.batch()
    key = jax.random.key(3)
    drawn, _ = method.draw_group_masks(8, (4, 4), nnx.Rngs(mask=key))
    loss = jax.jit(lambda m, b: m.loss(b, rngs=nnx.Rngs(mask=key, dropout=key)))
    value, metrics = loss(method, batch)
    given, other = loss(method, dict(batch, mask=drawn.reshape(8, 2, 4, 4).astype(jnp.int32)))
    assert value == pytest.approx(float(given), rel=1e-5)
    assert metrics["loss_ibot"] == pytest.approx(float(other["loss_ibot"]), rel=1e-5)
    assert metrics["loss_ibot"] > 0.1


def test_only_the_student_gets_a_gradient():
    method = CASE.make()
    assert not jax.tree.leaves(nnx.state(method.momentum_encoder, nnx.Param))
    assert isinstance(method.neck.dino_head.last_layer.scale, nnx.Param)
    assert isinstance(method.momentum_encoder.module[1].dino_head.last_layer.scale, Frozen)


def test_one_head_for_both():
    neck = dict(CASE.config["neck"], ibot_head=None)
    head = dict(type="DINOv2Head", out_channels=24, centering="sinkhorn_knopp")
    method = make(dict(CASE.config, neck=neck, head=head))
    assert method.neck.ibot_head is None and method.neck.patch_out_channels == 24
    value = jax.jit(lambda m, b: m.loss(b, rngs=nnx.Rngs(0))[0])(method, CASE.batch())
    assert math.isfinite(value)


def test_without_masks_there_is_no_patch_loss():
    method = make(dict(CASE.config, mask_sample_probability=0.0))
    _, metrics = jax.jit(lambda m, b: m.loss(b, rngs=nnx.Rngs(0)))(method, CASE.batch())
    assert metrics["loss_ibot"] == 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(mask_ratio_min_max=(0.5, 0.1)), "must ascend"),
        (dict(mask_sample_probability=1.5), "must ascend"),
        (dict(pred_ratio=(0.3,)), "no argument 'pred_ratio'"),
        (dict(head=dict(CASE.config["head"], centering="sinkhorn")), "Did you mean 'sinkhorn_knopp'"),
    ],
)
def test_parts_that_do_not_fit(wrong, message):
    with pytest.raises(ConfigError, match=message):
        build(dict(CASE.config, **wrong), rngs=nnx.Rngs(0))


def test_groups_that_do_not_divide_the_batch():
    with pytest.raises(ConfigError, match="8 images do not divide into groups=3"):
        abstract(dict(CASE.config, groups=3)).loss(CASE.batch(), rngs=nnx.Rngs(0))


def test_step_wise_temperature():
    head = DINOv2Head(4, warmup_teacher_temp=0.04, teacher_temp=0.07, warmup_teacher_temp_steps=100)
    found = [float(head.temperature(jnp.int32(0), jnp.int32(step))) for step in (0, 50, 99, 1000)]
    np.testing.assert_allclose(found, [*np.linspace(0.04, 0.07, 100)[[0, 50, 99]], 0.07], rtol=1e-5)
