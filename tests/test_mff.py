"""MFF: the fusion of layers; and the reference's numbers. The rest is MAE's (test_mae.py)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxpretrain.build import build
from jaxpretrain.interop import mmpretrain
from jaxpretrain.methods.mff import MFF
from jaxpretrain.models.layers import Frozen
from jaxpretrain.models.vision_transformer import VisionTransformer
from tests.method_cases.base import VIT
from tests.method_cases.masked import CASES
from tests.parity import (
    assert_summary,
    build_by_reference,
    load_golden,
    loss_and_grads,
    reference_gradient_errors,
    reference_input,
)

CASE = CASES["mff"]


@pytest.fixture(scope="module")
def method() -> MFF:
    return CASE.make()


@pytest.mark.slow
def test_golden_vit_base():
    golden = load_golden("mff_vit-base-p16_8xb512-amp-coslr-300e_in1k")
    method = build_by_reference(golden["model_cfg"], golden["manifest"])
    state = mmpretrain.to_state_dict(method)
    assert {row[0]: tuple(row[1]) for row in golden["manifest"]} == {name: x.shape for name, x in state.items()}
    assert len(state) == golden["n_keys"]
    assert mmpretrain.num_parameters(method) == golden["n_params"]
    images, ssl = reference_input(golden["input_shape"]), golden["ssl"]
    noise = np.random.Generator(np.random.PCG64(1000)).random((2, 196)).astype(np.float32)
    loss, grads = loss_and_grads(method, dict(image=images, noise=noise))
    assert loss == pytest.approx(ssl["total"], rel=1e-6)
    assert len(jax.tree.leaves(grads)) == ssl["n_grad_params"]
    assert reference_gradient_errors(grads, ssl) < 1e-4
    for i, weight in enumerate(method.backbone.fusion_weights()):
        assert weight == pytest.approx(ssl["losses"][f"weight_{i}"], rel=1e-6)

    @jax.jit
    def plain(backbone, images):
        """What the reference gives for features: patches hidden even so, and nothing fused."""
        tokens = backbone.random_masking(backbone.embed(images)[0], noise)[0]
        return backbone.ln1(VisionTransformer.run_layers(backbone, backbone.add_cls_token(tokens)))

    assert_summary(plain(method.backbone, images), golden["features"][0])


def test_import_and_export(method):
    state = mmpretrain.to_state_dict(method)
    assert state["backbone.proj_weights"].shape == (2, 1, 1, 1)
    assert state["backbone.proj_layers.0.weight"].shape == (16, 16)
    other = build(CASE.config, rngs=nnx.Rngs(7))
    mmpretrain.fill(other, mmpretrain.from_state_dict(other, state))
    batch = CASE.batch()
    assert other.loss(batch, rngs=nnx.Rngs(0))[0] == method.loss(batch, rngs=nnx.Rngs(0))[0]


def test_fusion_by_hand():
    """Section 4 of the paper: a weighted mean of linear maps of shallow layers, and the last layer itself."""
    config = dict(type="MFFViT", **VIT | dict(arch=VIT["arch"] | dict(num_layers=3)), out_indices=(0, 1, 2))
    backbone = build(config, rngs=nnx.Rngs(0))
    backbone.init_weights(nnx.Rngs(1))
    backbone.proj_weights.set_value(jnp.asarray([0.3, -0.2, 1.0]).reshape(3, 1, 1, 1))
    images = CASE.batch()["image"]
    noise = jax.random.uniform(jax.random.key(0), (8, 16))
    fused = backbone(images, noise=noise)[0]

    tokens = backbone.add_cls_token(backbone.random_masking(backbone.embed(images)[0], noise)[0])
    outputs = []
    for layer in backbone.layers:
        tokens = layer(tokens)
        outputs.append(np.asarray(tokens, np.float64))
    weights = np.exp([0.3, -0.2, 1.0]) / np.exp([0.3, -0.2, 1.0]).sum()
    wanted = weights[2] * outputs[2]
    for i in range(2):
        layer = backbone.proj_layers[i]
        wanted += weights[i] * (outputs[i] @ np.asarray(layer.kernel) + np.asarray(layer.bias))
    mean, var = wanted.mean(-1, keepdims=True), wanted.var(-1, keepdims=True)
    np.testing.assert_allclose(fused, (wanted - mean) / np.sqrt(var + 1e-6), atol=1e-5)
    backbone.set_attributes(scan_layers=True, remat="full", raise_if_not_found=False)
    np.testing.assert_allclose(backbone(images, noise=noise)[0], fused, atol=1e-5)


def test_whole_images_are_encoded_as_by_mae(method):
    images = CASE.batch()["image"]
    plain = build(dict(type="MAEViT", **VIT), rngs=nnx.Rngs(2))
    state = mmpretrain.to_state_dict(method.backbone)
    mmpretrain.fill(
        plain, mmpretrain.from_state_dict(plain, {k: v for k, v in state.items() if not k.startswith("proj")})
    )
    tokens = plain(images, mask=None)[-1]
    np.testing.assert_array_equal(method.backbone(images, mask=None)[-1], tokens)
    np.testing.assert_allclose(method.features(images), tokens[:, 1:].mean(axis=1), atol=1e-6)


def test_weights_are_logged_and_learn(method):
    batch = CASE.batch()
    _, metrics = method.loss(batch, rngs=nnx.Rngs(0))
    assert metrics["weight_0"] + metrics["weight_1"] == pytest.approx(1)
    assert metrics["weight_0"] == 0.5
    graphdef, params, rest = nnx.split(method, nnx.Param, ...)
    grads = jax.grad(lambda p: nnx.merge(graphdef, p, rest).loss(batch, rngs=nnx.Rngs(0))[0])(params)
    assert jnp.abs(grads["backbone"]["proj_weights"][...]).max() > 0


def test_one_layer_needs_no_weights():
    backbone = build(dict(type="MFFViT", **VIT), rngs=nnx.Rngs(0))
    assert isinstance(backbone.proj_weights, Frozen)
    assert len(backbone.proj_layers) == 0
    images, noise = CASE.batch()["image"], jax.random.uniform(jax.random.key(0), (8, 16))
    plain = build(dict(type="MAEViT", **VIT), rngs=nnx.Rngs(0))
    assert backbone(images, noise=noise)[0].shape == plain(images, noise=noise)[0].shape
    assert backbone.fusion_weights() == 1


def test_reconstruct(method):
    images = CASE.batch()["image"]
    made = method.reconstruct(images, rngs=nnx.Rngs(0))
    assert made["mask"].mean() == 0.75
    assert made["pasted"].shape == images.shape
