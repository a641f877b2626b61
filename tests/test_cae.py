"""CAE: which patches go where, the regressor, the losses, the teacher; and the reference's numbers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxpretrain.build import ConfigError, build
from jaxpretrain.interop import mmpretrain as hub
from jaxpretrain.methods.cae import CAELoss, CAETransformerRegressorLayer
from jaxpretrain.models.layers import Frozen
from jaxpretrain.models.layers.position import build_2d_sincos_position_embedding
from tests.method_cases import CASES
from tests.method_cases.base import VIT
from tests.parity import assert_summary, load_golden, loss_and_grads, reference_gradient_errors
from tests.test_beit_pretrain import golden_batch, golden_method

CASE = CASES["cae"]


@pytest.mark.slow
def test_golden():
    golden = load_golden("cae_beit-base-p16_8xb256-amp-coslr-300e_in1k")
    method, batch, ssl = golden_method(golden), golden_batch(golden), golden["ssl"]
    loss, grads = loss_and_grads(method, batch)
    assert loss == pytest.approx(ssl["total"], rel=1e-5)
    assert len(jax.tree.leaves(grads)) == ssl["n_grad_params"]
    assert reference_gradient_errors(grads, ssl) < 1e-4

    @nnx.jit
    def forward(method, batch):
        hidden, visible = method.split(batch["mask"])
        images = batch["image"][0]
        return method.predict(images, hidden, visible), method.backbone(images), method.loss(batch)[1]

    (encoded, *predicted), whole, metrics = forward(method, batch)
    assert metrics["main"] == pytest.approx(ssl["losses"]["main"], rel=1e-5)
    assert metrics["align"] == pytest.approx(ssl["losses"]["align"], rel=1e-5)
    stages = ssl["stages"]
    assert_summary(encoded, stages["backbone"][0])
    for ours, summary in zip(predicted, stages["neck"][0], strict=True):
        assert_summary(ours, summary)
    assert_summary(whole[-1], golden["features"][0])


def run(method, batch):
    return jax.jit(lambda method, batch: method.loss(batch))(method, batch)


def test_masks_say_which_patches_go_where():
    method, mask = CASE.make(), CASE.batch()["mask"]
    hidden, visible = method.split(mask)
    for row, here, there in zip(np.asarray(mask).reshape(8, 16), hidden, visible, strict=True):
        np.testing.assert_array_equal(here, np.flatnonzero(row))
        np.testing.assert_array_equal(there, np.flatnonzero(row == 0))


def test_encoder_sees_the_kept_patches_alone():
    backbone = CASE.make().backbone
    batch = CASE.batch()
    images, (_, visible) = batch["image"][0], CASE.make().split(batch["mask"])
    forward = jax.jit(lambda m, x, keep: m(x, keep))
    hidden = batch["mask"].repeat(4, axis=1).repeat(4, axis=2)[..., None] > 0
    first, second = (forward(backbone, x, visible) for x in (images, jnp.where(hidden, 9.0, images)))
    assert first.shape == (8, 1 + 10, 16)
    np.testing.assert_array_equal(first, second)
    everything = jnp.broadcast_to(jnp.arange(16), (8, 16))
    np.testing.assert_allclose(forward(backbone, images, everything), backbone(images)[-1], rtol=1e-4, atol=1e-5)
    # Tokens know their places: in another order they are the same tokens.
    turned = forward(backbone, images, everything[:, ::-1])
    np.testing.assert_allclose(turned[:, :0:-1], backbone(images)[-1][:, 1:], rtol=1e-4, atol=1e-5)


def test_regressor_layer_by_hand():
    """Equations of the release: norms of queries, keys and values; the second norm on the main path."""
    layer = CAETransformerRegressorLayer(8, 2, 16, qkv_bias=True, layer_scale_init_value=0.3, rngs=nnx.Rngs(0))
    for _, variable in nnx.state(layer, nnx.Param).flat_state():  # biases and norms too
        variable.set_value(variable[...] + 0.1 * jax.random.normal(jax.random.key(variable.size), variable.shape))
    keys = jax.random.split(jax.random.key(1), 4)
    x, visible, pos, pos_visible = (
        np.asarray(jax.random.normal(key, (2, n, 8)), np.float64) for key, n in zip(keys, (3, 4, 3, 4), strict=True)
    )
    p = jax.tree.map(lambda v: np.asarray(v, np.float64), nnx.to_pure_dict(nnx.state(layer, nnx.Param)))

    def norm(y, name):
        y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-6)
        return y * p[name]["scale"] + p[name]["bias"]

    def heads(y):
        return y.reshape(2, -1, 2, 4).transpose(0, 2, 1, 3)

    both, both_pos = np.concatenate([visible, x], 1), np.concatenate([pos_visible, pos], 1)
    attn = p["cross_attn"]
    q = heads(norm(x + pos, "norm1_q_cross") @ attn["q"]["kernel"] + attn["q_bias"])
    k = heads(norm(both + both_pos, "norm1_k_cross") @ attn["k"]["kernel"])
    v = heads(norm(both, "norm1_v_cross") @ attn["v"]["kernel"] + attn["v_bias"])
    weights = np.exp(q @ k.transpose(0, 1, 3, 2) / 2)
    y = (weights / weights.sum(-1, keepdims=True)) @ v
    y = y.transpose(0, 2, 1, 3).reshape(2, 3, 8) @ attn["proj"]["kernel"] + attn["proj"]["bias"]
    wanted = norm(x + p["gamma_1_cross"] * y, "norm2_cross")
    fc1, fc2 = p["ffn"]["fc1"], p["ffn"]["fc2"]
    inner = np.asarray(jax.nn.gelu(wanted @ fc1["kernel"] + fc1["bias"], approximate=False), np.float64)
    wanted = wanted + p["gamma_2_cross"] * (inner @ fc2["kernel"] + fc2["bias"])
    arrays = (jnp.asarray(a, jnp.float32) for a in (visible, pos, pos_visible))
    made = layer(jnp.asarray(x, jnp.float32), **dict(zip(("visible", "pos", "pos_visible"), arrays, strict=True)))
    np.testing.assert_allclose(made, wanted, atol=1e-5)


def test_layers_without_layer_scale_keep_the_names():
    layer = CAETransformerRegressorLayer(8, 2, 16, rngs=nnx.Rngs(0))
    assert isinstance(layer.gamma_1_cross, Frozen)
    np.testing.assert_array_equal(layer.gamma_2_cross[...], 1)
    assert {"gamma_1_cross", "gamma_2_cross"} < set(hub.to_state_dict(layer))


def test_loss_by_hand():
    keys = jax.random.split(jax.random.key(0), 3)
    logits = jax.random.normal(keys[0], (6, 5))
    pred, target = (jax.random.normal(key, (2, 3, 4)) for key in keys[1:])
    tokens = jnp.asarray([0, 1, 2, 3, 4, 0])
    main, align = CAELoss(lambd=2)(logits, tokens, pred, target)
    rows = np.asarray(logits, np.float64)
    wanted = np.mean([np.log(np.exp(row).sum()) - row[t] for row, t in zip(rows, tokens, strict=True)])
    assert main == pytest.approx(wanted, rel=1e-6)
    assert align == pytest.approx(2 * np.mean((np.asarray(pred) - np.asarray(target)) ** 2), rel=1e-6)
    assert not jax.grad(lambda t: CAELoss(2)(logits, tokens, pred, t)[1])(target).any()

    method, batch = CASE.make(), CASE.batch()
    value, metrics = run(method, batch)
    assert value == pytest.approx(float(metrics["main"] + metrics["align"]), rel=1e-6)
    method = CASE.make()
    hidden, visible = method.split(batch["mask"])
    _, logits, latent = method.predict(batch["image"][0], hidden, visible)
    target = method.teacher(batch["image"][0], hidden)[:, 1:]
    tokens = method.target_generator(batch["image"][1])
    tokens = np.take_along_axis(np.asarray(tokens), np.asarray(hidden), axis=1).ravel()
    rows = np.asarray(logits, np.float64).reshape(-1, 16)
    wanted = np.mean([np.log(np.exp(row).sum()) - row[t] for row, t in zip(rows, tokens, strict=True)])
    assert metrics["main"] == pytest.approx(wanted, rel=1e-5)
    assert metrics["align"] == pytest.approx(2 * float(jnp.mean(jnp.square(latent - target))), rel=1e-4)
    assert metrics["accuracy"] == pytest.approx(100 * np.mean(rows.argmax(1) == tokens), abs=1e-3)


def teacher(method) -> dict:
    return {path: np.asarray(value[...]) for path, value in nnx.state(method.teacher, Frozen).flat_state()}


@pytest.mark.parametrize("momentum", [0.0, 0.75])
def test_teacher_follows_after_its_use(momentum):
    config = CASE.config | dict(base_momentum=momentum)
    method = build(config, rngs=nnx.Rngs(0))
    method.init_weights(nnx.Rngs(1))
    start = teacher(method)
    backbone = dict(nnx.state(method.backbone, (nnx.Param, Frozen)).flat_state())
    assert start.keys() == backbone.keys()
    assert all((start[path] == value[...]).all() for path, value in backbone.items())
    assert not jax.tree.leaves(nnx.state(method.teacher, nnx.Param))

    for _, variable in nnx.state(method.backbone, nnx.Param).flat_state():
        variable.set_value(variable[...] + 0.5)
    moved = {path: np.asarray(value[...]) for path, value in backbone.items()}
    batch = CASE.batch()
    target = method.teacher(batch["image"][0], method.split(batch["mask"])[0])[:, 1:]
    hidden, visible = method.split(batch["mask"])
    latent = method.predict(batch["image"][0], hidden, visible)[2]
    _, metrics = nnx.jit(lambda method, batch: method.loss(batch))(method, batch)
    # The target came from the old teacher ...
    assert metrics["align"] == pytest.approx(2 * float(jnp.mean(jnp.square(latent - target))), rel=1e-3)
    # ... which has now followed, but for the positions, which never move.
    for path, value in teacher(method).items():
        np.testing.assert_allclose(value, momentum * start[path] + (1 - momentum) * moved[path], atol=1e-6)
    np.testing.assert_array_equal(teacher(method)[("pos_embed",)], start[("pos_embed",)])


def test_initialisation():
    method = CASE.make()
    table = build_2d_sincos_position_embedding((4, 4), 16, cls_token=True)
    for module in (method.backbone, method.teacher):
        np.testing.assert_array_equal(module.pos_embed[...], table)
        assert isinstance(module.pos_embed, Frozen)
    neck = method.neck
    assert 0.01 < float(neck.head.kernel[...].std()) < 0.03
    assert 0 < float(jnp.abs(neck.mask_token[...]).max()) < 0.1
    assert not neck.decoders[0].ffn.fc1.bias[...].any()
    bound = (6 / 32) ** 0.5
    assert 0.9 * bound < float(jnp.abs(neck.regressors[0].cross_attn.q.kernel[...]).max()) <= bound


def test_scanned_and_rematerialised_layers_give_the_same():
    neck = CASE.config["neck"] | dict(regressor_depth=3, decoder_depth=3)
    config = CASE.config | dict(backbone=CASE.config["backbone"] | VIT, neck=neck)
    batch, values = CASE.batch(), []
    for scan_layers, remat in ((False, "none"), (True, "none"), (True, "full")):
        method = build(config, rngs=nnx.Rngs(0))
        method.set_attributes(scan_layers=scan_layers, remat=remat, raise_if_not_found=False)
        values.append(loss_and_grads(method, batch))
    for loss, grads in values[1:]:
        assert loss == pytest.approx(values[0][0], rel=1e-5)
        for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(values[0][1]), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4 * float(jnp.abs(b).max()) + 1e-7)


def test_mistakes():
    neck = CASE.config["neck"]
    with pytest.raises(ConfigError, match=r"neck.mask_tokens_num=16 must be in 1..15, the backbone's patches"):
        build(CASE.config | dict(neck=neck | dict(mask_tokens_num=16)), rngs=nnx.Rngs(0))
    backbone = CASE.config["backbone"]
    for change in (dict(use_abs_pos_emb=False), dict(use_rel_pos_bias=True), dict(use_shared_rel_pos_bias=True)):
        with pytest.raises(ConfigError, match="needs a class token and absolute positions alone"):
            build(backbone | change, rngs=nnx.Rngs(0))
    with pytest.raises(ConfigError, match="CAE needs a target_generator"):
        build({key: v for key, v in CASE.config.items() if key != "target_generator"}, rngs=nnx.Rngs(0))
