"""MILAN: the reference's numbers, which patches are seen, the prompting decoder, the loss."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxpretrain.build import ConfigError, abstract
from jaxpretrain.interop import load_weights
from jaxpretrain.interop import mmpretrain as hub
from jaxpretrain.methods.milan import MILAN, MIMHead
from jaxpretrain.models.layers import Frozen
from tests.method_cases.base import make
from tests.method_cases.latent import CASES, COSINE
from tests.parity import (
    assert_summary,
    build_by_reference,
    load_golden,
    loss_and_grads,
    reference_gradient_errors,
    reference_input,
)

CONFIG = CASES["milan"].config


@pytest.fixture(scope="module")
def method() -> MILAN:
    return make(CONFIG)


@pytest.fixture(scope="module")
def images() -> jax.Array:
    return jax.random.normal(jax.random.key(3), (2, 16, 16, 3))


@pytest.mark.slow
def test_golden_vit_base():
    golden = load_golden("milan_vit-base-p16_16xb256-amp-coslr-400e_in1k")
    method = build_by_reference(golden["model_cfg"], golden["manifest"])
    method.set_attributes(scan_layers=True, raise_if_not_found=False)  # compiles in a third of the time
    assert sum(x.size for x in jax.tree.leaves(nnx.state(method, (nnx.Param, Frozen)))) == golden["n_params"]
    assert len(hub.names(method)) == golden["n_keys"]

    ssl, stages = golden["ssl"], golden["ssl"]["stages"]
    images = reference_input(golden["input_shape"])
    noise = np.zeros((2, 196), np.float32)  # the golden run sees the most important patches
    loss, grads = loss_and_grads(method, dict(image=images, noise=noise))
    assert loss == pytest.approx(ssl["total"], rel=1e-6)
    assert len(jax.tree.leaves(grads)) == ssl["n_grad_params"]
    assert reference_gradient_errors(grads, ssl) < 1e-5

    @nnx.jit
    def forward(method, images):
        features, attention = method.target_generator(images)
        outputs = method.backbone(images, attention[:, 0, 1:], noise=noise)
        return (features, attention), outputs, method.neck(*outputs), method.backbone(images)

    targets, outputs, pred, features = forward(method, images)
    for name, arrays in (("target_generator", targets), ("backbone", outputs)):
        for ours, summary in zip(arrays, stages[name][0], strict=True):
            assert_summary(ours, summary)
    assert_summary(pred, stages["neck"][0])
    assert_summary(features[-1], golden["features"][0])


def test_patches_are_drawn_by_importance(method):
    """As one after the other from an urn: all orders of two out of four, against their probabilities."""
    importance = np.asarray([0.1, 0.2, 0.3, 0.4], np.float32)
    count = 20000
    noise = jax.random.gumbel(jax.random.key(0), (count, 4))
    tokens = jnp.zeros((count, 4, 1))
    _, ids_restore, ids_keep, ids_dump = method.backbone.attention_masking(
        tokens, jnp.tile(importance, (count, 1)), noise
    )
    assert ids_keep.shape == ids_dump.shape == (count, 2)
    for i, j in itertools.permutations(range(4), 2):
        wanted = importance[i] * importance[j] / (1 - importance[i])
        found = np.mean((ids_keep == np.asarray([i, j])).all(axis=1))
        assert found == pytest.approx(wanted, abs=0.01)
    order = np.concatenate([ids_keep, ids_dump], axis=1)
    np.testing.assert_array_equal(np.take_along_axis(order, np.asarray(ids_restore), axis=1), [np.arange(4)] * count)


def test_patches_of_no_importance_are_seen_last(method):
    tokens, importance = jnp.arange(8.0).reshape(1, 4, 2), jnp.asarray([[0.0, 0.5, 0.0, 0.5]])
    kept, _, ids_keep, _ = method.backbone.attention_masking(tokens, importance, jnp.zeros((1, 4)))
    np.testing.assert_array_equal(ids_keep, [[1, 3]])
    np.testing.assert_array_equal(kept, tokens[:, [1, 3]])


def test_decoder_leaves_visible_tokens_untouched(method):
    neck = method.neck
    x = jax.random.normal(jax.random.key(0), (2, 9, 16))
    order = jnp.stack([jax.random.permutation(jax.random.key(i), 16) for i in range(2)])
    keep, dump = order[:, :8], order[:, 8:]
    pred = neck(x, jnp.argsort(order, axis=1), keep, dump)
    assert pred.shape == (2, 17, 12)
    embedded, positions = neck.decoder_embed(x), neck.decoder_pos_embed[0]
    for i in range(2):
        wanted = embedded[i] + jnp.concatenate([positions[:1], positions[1:][keep[i]]])
        wanted = neck.decoder_pred(neck.ln1(wanted))
        np.testing.assert_allclose(pred[i, 0], wanted[0], atol=1e-5)
        np.testing.assert_allclose(pred[i, 1 + keep[i]], wanted[1:], atol=1e-5)
    # Hidden ones look at them, and at each other.
    changed = neck(x.at[:, 3].add(1.0), jnp.argsort(order, axis=1), keep, dump)
    rows = np.arange(2)[:, None]
    assert (np.abs(changed - pred)[rows, 1 + dump].max(axis=(1, 2)) > 1e-4).all()


def test_loss_by_hand(method, images):
    noise = jax.random.gumbel(jax.random.key(1), (2, 16))
    loss, metrics = method.loss({"image": images, "noise": noise})
    target, attention = map(np.asarray, method.target_generator(images))
    latent, *ids = method.backbone(images, attention[:, 0, 1:], noise=noise)
    pred = np.asarray(method.neck(latent, *ids), np.float64)
    cosine = np.sum(pred * target, axis=-1) / np.linalg.norm(pred, axis=-1) / np.linalg.norm(target, axis=-1)
    assert loss == pytest.approx(np.mean(2 - 2 * cosine), rel=1e-5)  # class token and visible patches included
    assert metrics.keys() == {"feature_std"}
    assert latent.shape == (2, 9, 16)


def test_head_with_a_mask():
    head = MIMHead(COSINE["loss"])
    pred = jnp.asarray([[[1.0, 0.0], [0.0, 2.0]]])
    target = jnp.asarray([[[3.0, 0.0], [1.0, 0.0]]])
    assert head.loss(pred, target) == pytest.approx(1.0)
    assert head.loss(pred, target, jnp.asarray([[0.0, 1.0]])) == pytest.approx(2.0)


def test_target_does_not_learn(method):
    learning = {path[0] for path, _ in nnx.state(method, nnx.Param).flat_state()}
    assert learning == {"backbone", "neck"}
    assert isinstance(method.target_generator.tokenizer.visual.proj, Frozen)


def test_features_and_pictures(method, images):
    tokens = method.backbone(images)[-1]
    np.testing.assert_allclose(method.features(images), tokens[:, 1:].mean(axis=1), atol=1e-6)
    made = method.reconstruct(images, rngs=nnx.Rngs(0))
    assert made["mask"].mean() == 0.5
    assert {x.shape for name, x in made.items() if name not in ("mask", "agreement")} == {images.shape}
    np.testing.assert_array_equal(made["masked"], jnp.where(made["mask"] > 0, 0, images))
    assert jnp.abs(made["reconstructed"]).max() <= 2.001
    with pytest.raises(ValueError, match="call it with rngs"):
        method.loss({"image": images})


def test_round_trip_through_mmpretrains_layout(method):
    state = hub.to_state_dict(method)
    assert {"neck.decoder_blocks.0.attn.kv.weight", "target_generator.tokenizer.visual.conv1.weight"} <= state.keys()
    other = abstract(CONFIG)
    load_weights(other, state)
    for name, array in hub.to_state_dict(other).items():
        np.testing.assert_array_equal(array, state[name])


def test_mistakes():
    with pytest.raises(ConfigError, match="predicts 512 channels, and the target has 12"):
        abstract(CONFIG | dict(neck=dict(CONFIG["neck"], predict_feature_dim=512)))
    with pytest.raises(ConfigError, match="give target_generator"):
        abstract({key: value for key, value in CONFIG.items() if key != "target_generator"})
    method = abstract(CONFIG | dict(neck=dict(CONFIG["neck"], num_patches=9)))
    with pytest.raises(ValueError, match="is for 3x3 patches, and got 16"):
        jax.eval_shape(lambda m, x: m.loss({"image": x}, rngs=nnx.Rngs(0)), method, jnp.zeros((2, 16, 16, 3)))
