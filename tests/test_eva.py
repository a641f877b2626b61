"""EVA in the form of an MAE: the reference's numbers, and the loss."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxpretrain.build import ConfigError, abstract
from jaxpretrain.interop import load_weights
from jaxpretrain.interop import mmpretrain as hub
from jaxpretrain.methods.eva import EVA
from jaxpretrain.models.layers import Frozen
from tests.method_cases.base import make
from tests.method_cases.latent import CASES
from tests.parity import (
    assert_summary,
    build_by_reference,
    load_golden,
    loss_and_grads,
    reference_gradient_errors,
    reference_input,
)

CONFIG = CASES["eva"].config


@pytest.fixture(scope="module")
def method() -> EVA:
    return make(CONFIG)


@pytest.fixture(scope="module")
def images() -> jax.Array:
    return jax.random.normal(jax.random.key(3), (2, 16, 16, 3))


@pytest.mark.slow
def test_golden_vit_base():
    golden = load_golden("eva-mae-style_vit-base-p16_16xb256-coslr-400e_in1k")
    method = build_by_reference(golden["model_cfg"], golden["manifest"])
    method.set_attributes(scan_layers=True, raise_if_not_found=False)  # compiles in a third of the time
    assert sum(x.size for x in jax.tree.leaves(nnx.state(method, (nnx.Param, Frozen)))) == golden["n_params"]
    assert len(hub.names(method)) == golden["n_keys"]

    ssl, stages = golden["ssl"], golden["ssl"]["stages"]
    images = reference_input(golden["input_shape"])
    noise = np.random.Generator(np.random.PCG64(1000)).random((2, 196)).astype(np.float32)
    loss, grads = loss_and_grads(method, dict(image=images, noise=noise))
    assert loss == pytest.approx(ssl["total"], rel=1e-6)
    assert len(jax.tree.leaves(grads)) == ssl["n_grad_params"]
    assert reference_gradient_errors(grads, ssl) < 1e-5

    @nnx.jit
    def forward(method, images):
        outputs = method.backbone(images, noise=noise)
        return outputs, method.neck(outputs[0], outputs[2])

    outputs, pred = forward(method, images)
    for ours, summary in zip(outputs, stages["backbone"][0], strict=True):
        assert_summary(ours, summary)
    assert_summary(pred, stages["neck"][0])


def test_loss_by_hand(method, images):
    noise = jax.random.uniform(jax.random.key(1), (2, 16))
    loss, metrics = method.loss({"image": images, "noise": noise})
    target = np.asarray(method.target_generator(images)[0], np.float64)[:, 1:]
    latent, mask, ids_restore = method.backbone(images, noise=noise)
    pred = np.asarray(method.neck(latent, ids_restore), np.float64)
    assert pred.shape == target.shape == (2, 16, 12)
    cosine = np.sum(pred * target, axis=-1) / np.linalg.norm(pred, axis=-1) / np.linalg.norm(target, axis=-1)
    hidden = np.asarray(mask) == 1
    assert hidden.sum() == 16
    assert loss == pytest.approx(np.mean(2 - 2 * cosine[hidden]), rel=1e-5)
    assert metrics.keys() == {"feature_std"}


def test_target_does_not_learn(method):
    learning = {path[0] for path, _ in nnx.state(method, nnx.Param).flat_state()}
    assert learning == {"backbone", "neck"}
    assert isinstance(method.target_generator.tokenizer.visual.proj, Frozen)


def test_features_and_pictures(method, images):
    tokens = method.backbone(images, mask=None)[-1]
    np.testing.assert_allclose(method.features(images), tokens[:, 1:].mean(axis=1), atol=1e-6)
    noise = jax.random.uniform(jax.random.key(1), (2, 16))
    made = method.reconstruct(images, noise=noise)
    assert made["mask"].mean() == 0.5
    np.testing.assert_array_equal(made["masked"], jnp.where(made["mask"] > 0, 0, images))
    np.testing.assert_array_equal(made["pasted"], jnp.where(made["mask"] > 0, made["reconstructed"], images))
    _, pred, target, _ = method._predict(images, noise, None)
    cosine = jnp.sum(pred * target, axis=-1) / jnp.linalg.norm(pred, axis=-1) / jnp.linalg.norm(target, axis=-1)
    np.testing.assert_allclose(made["reconstructed"][:, ::4, ::4, 0].reshape(2, 16), 2 * cosine, atol=1e-5)


def test_round_trip_through_mmpretrains_layout(method):
    state = hub.to_state_dict(method)
    other = abstract(CONFIG)
    load_weights(other, state)
    for name, array in hub.to_state_dict(other).items():
        np.testing.assert_array_equal(array, state[name])


def test_mistakes():
    with pytest.raises(ConfigError, match="EVA: the neck predicts 48 channels, and the target has 12"):
        abstract(CONFIG | dict(neck=dict(CONFIG["neck"], predict_feature_dim=48)))
