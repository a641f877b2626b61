"""iBOT: masks, hidden patches, and the loss against NumPy."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxpretrain.build import ConfigError, abstract, build
from jaxpretrain.methods.ibot import IBOTHead, block_masks
from tests.method_cases import CASES
from tests.method_cases.base import make
from tests.test_dino import dino_loss, softmax

IBOT = CASES["ibot"]


def ibot(**more: Any) -> Any:
    return make(dict(IBOT.config, **more))


# Masks


@pytest.fixture(scope="module")
def masks() -> tuple[np.ndarray, np.ndarray]:
    counts = np.random.default_rng(0).integers(0, 99, 400).astype(np.int32)
    drawn = jax.jit(lambda key, counts: block_masks(key, counts, (14, 14), 16))(jax.random.key(0), counts)
    return counts, np.asarray(drawn)


def test_masks_hide_at_most_so_many_and_mostly_nearly_as_many(masks):
    counts, drawn = masks
    hidden = drawn.sum(axis=(1, 2))
    assert (hidden <= counts).all()
    assert (hidden[counts == 0] == 0).all()
    # Less where ten rectangles in a row did not fit, as in the release (98 % on average there and here).
    assert (hidden / np.maximum(counts, 1))[counts > 20].mean() > 0.96


def test_masks_are_unions_of_rectangles(masks):
    """Neighbours are alike far more often than in random masks of the same size; the edges are reached too."""
    _, drawn = masks
    alike = (drawn[:, 1:] == drawn[:, :-1]).mean()
    share = drawn.mean(axis=(1, 2))
    assert alike > 0.9 > (share**2 + (1 - share) ** 2).mean() + 0.1
    assert drawn.any(axis=0).all()
    one = jax.jit(lambda key, counts: block_masks(key, counts, (14, 14), 16, attempts=1))
    single = np.asarray(one(jax.random.key(1), jnp.full(50, 16)))
    assert single.any(axis=(1, 2)).sum() > 20
    for mask in single[single.any(axis=(1, 2))]:
        rows, columns = mask.any(axis=1), mask.any(axis=0)
        assert mask.sum() == rows.sum() * columns.sum()
        assert 0.2 < rows.sum() / columns.sum() < 5  # aspects from 0.3 to 1 / 0.3, rounded


def test_the_bound_on_attempts_is_no_distortion():
    """Half as many would hide nearly as much."""
    counts = jnp.asarray(np.random.default_rng(1).integers(20, 99, 100))
    hidden = [block_masks(jax.random.key(0), counts, (14, 14), 4, 98, attempts=n).sum() for n in (24, 48)]
    assert int(hidden[0]) == pytest.approx(int(hidden[1]), rel=0.02)


def test_ratios_of_the_paper():
    """Half of the views hide nothing, the others U(0.1, 0.5) of their patches."""
    config = dict(IBOT.config, pred_ratio=(0.0, 0.3), pred_ratio_var=(0.0, 0.2), pred_shape="rand")
    method = build(config, rngs=nnx.Rngs(0))
    drawn = np.asarray(method.draw_masks(1000, (14, 14), jnp.int32(0), nnx.Rngs(0))).mean(axis=(1, 2))
    assert drawn.shape == (2000,)
    some = drawn[drawn > 0]
    assert len(some) == pytest.approx(1000, abs=100)
    assert 0.09 < some.min() < 0.12 and 0.48 < some.max() <= 0.5
    assert some.mean() == pytest.approx(0.3, abs=0.01)


def test_masks_begin_in_an_epoch():
    method = build(dict(IBOT.config, pred_start_epoch=3), rngs=nnx.Rngs(0))
    assert not method.draw_masks(8, (4, 4), jnp.int32(2), nnx.Rngs(0)).any()
    assert method.draw_masks(8, (4, 4), jnp.int32(3), nnx.Rngs(0)).any()


# Networks


def test_hidden_patches_are_the_token_at_their_position():
    backbone = abstract(IBOT.config["backbone"])
    assert backbone.mask_token.shape == (1, 16)
    backbone = IBOT.make().backbone
    backbone.mask_token.set_value(jax.random.normal(jax.random.key(1), (1, 16)))
    x = IBOT.batch()["image"][0]
    mask = jnp.arange(16) % 3 == 0
    whole = jnp.broadcast_to(mask, (8, 16))
    (plain,), (nothing,), (hidden,) = backbone(x), backbone(x, jnp.zeros_like(whole)), backbone(x, whole)
    np.testing.assert_allclose(plain, nothing, rtol=1e-5, atol=1e-6)
    # What is hidden makes no difference, what is seen does.
    blocks = x.reshape(8, 4, 4, 4, 4, 3)
    where = mask.reshape(4, 4)[None, :, None, :, None, None]
    (changed,) = backbone(jnp.where(where, 7.0, blocks).reshape(x.shape), whole)
    np.testing.assert_allclose(changed, hidden, rtol=1e-5, atol=1e-6)
    assert np.abs(np.asarray(plain - hidden)).max() > 0.1
    tokens, _ = backbone.embed(x)
    first = jnp.where(whole[:, :, None], backbone.mask_token[...] + backbone.pos_embed[:, 1:], tokens)
    wanted = backbone.ln1(backbone.run_layers(backbone.add_cls_token(first)))
    np.testing.assert_allclose(hidden, wanted, rtol=1e-5, atol=1e-6)


def test_shared_and_separate_prototypes():
    shared, apart = (abstract(CASES[name].config).neck for name in ("ibot", "ibot_two_heads"))
    assert shared.last_layer2 is None and shared.patch_out_channels == 24
    assert apart.last_layer2.kernel.shape == (8, 20) and apart.patch_out_channels == 20
    neck = CASES["ibot_two_heads"].make().neck
    x = jax.random.normal(jax.random.key(0), (2, 3, 16))
    np.testing.assert_allclose(neck.patches(x), neck.last_layer2(neck.bottleneck(x)))


# Loss


@pytest.mark.parametrize("name", ["ibot", "ibot_two_heads"])
def test_loss_by_hand(name):
    case = CASES[name]
    method, batch = make(dict(case.config, lambda1=0.7, lambda2=1.3)), case.batch()
    mask = np.random.default_rng(0).random((8, 2, 4, 4)) < 0.4
    mask[0, 0] = False  # a view without any counts as 0
    batch["mask"] = jnp.asarray(mask, jnp.int32)
    value, metrics = jax.jit(lambda m, b: m.loss(b, rngs=nnx.Rngs(0)))(method, batch)

    backbone, neck = method.momentum_encoder.module
    crops = batch["image"]
    student = [method.backbone(x, jnp.asarray(mask[:, i].reshape(8, -1)))[-1] for i, x in enumerate(crops[:2])]
    small = [method.backbone(x)[-1] for x in crops[2:]]
    teacher = [backbone(x)[-1] for x in crops[:2]]
    s_cls = np.stack([method.neck(x[:, 0]) for x in student + small], axis=1)
    t_cls = np.stack([neck(x[:, 0]) for x in teacher], axis=1)
    loss_cls = 0.7 * dino_loss(np.float64(s_cls), np.float64(t_cls), 0.0, 0.1, 0.05)
    per_view = []
    for view in range(2):
        p = softmax(np.float64(neck.patches(teacher[view][:, 1:])) / 0.05)
        log_q = np.log(softmax(np.float64(method.neck.patches(student[view][:, 1:])) / 0.1))
        ce, m = -(p * log_q).sum(axis=-1), mask[:, view].reshape(8, -1)
        per_view += [(ce[i] * m[i]).sum() / max(m[i].sum(), 1) for i in range(8)]
    loss_patch = 1.3 * np.mean(per_view)
    assert metrics["loss_cls"] == pytest.approx(loss_cls, rel=1e-5)
    assert metrics["loss_patch"] == pytest.approx(loss_patch, rel=1e-5)
    assert value == pytest.approx(loss_cls + loss_patch, rel=1e-5)


def test_centres_of_class_tokens_and_patches():
    head = IBOTHead(5, 3, center_momentum=0.9)
    rng = np.random.default_rng(0)
    cls, patches = rng.standard_normal((4, 2, 5)), rng.standard_normal((4, 2, 6, 3))
    head.targets(jnp.asarray(cls), 0, 0)
    first = head.patch_targets(jnp.asarray(patches), jnp.int32(0), jnp.int32(0))
    np.testing.assert_allclose(first, softmax(patches / 0.04), rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(head.center[...], 0.1 * cls.mean(axis=(0, 1))[None], rtol=1e-5)
    np.testing.assert_allclose(head.center2[...], 0.1 * patches.mean(axis=(0, 1, 2))[None, None], rtol=1e-5)
    second = head.patch_targets(jnp.asarray(patches), jnp.int32(29), jnp.int32(0))  # the last epoch of the warm-up
    np.testing.assert_allclose(
        second, softmax((patches - 0.1 * patches.mean(axis=(0, 1, 2))) / 0.07), rtol=1e-4, atol=1e-7
    )


def test_masks_depend_on_the_key_alone():
    method, batch = IBOT.make(), IBOT.batch()
    loss = jax.jit(lambda m, b, seed: m.loss(b, rngs=nnx.Rngs(jax.random.key(seed)))[0])
    assert loss(method, batch, 0) == loss(method, batch, 0) != loss(method, batch, 1)
    with pytest.raises(ValueError, match="call it with rngs"):
        method.loss(batch)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(pred_ratio=(0.3,), pred_ratio_var=(0.0, 0.2)), "equally long"),
        (dict(pred_ratio=(0.1,), pred_ratio_var=(0.2,)), "within 0 to 1"),
        (dict(pred_shape="blocks"), "Did you mean 'block'"),
        (dict(head=dict(type="IBOTHead", out_channels=24, patch_out_channels=9)), "the head expects 9"),
    ],
)
def test_parts_that_do_not_fit(wrong, message):
    with pytest.raises(ConfigError, match=message):
        build(dict(IBOT.config, **wrong), rngs=nnx.Rngs(0))
