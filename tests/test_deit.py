"""DeiT's distilled model and DeiT III against the reference, and the contracts of their arguments."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxpretrain.build import ConfigError, build
from jaxpretrain.models.layers import Frozen, intermediates
from tests.vit import (
    TINY,
    abstract,
    assert_forms_agree,
    assert_golden,
    assert_gradients,
    assert_half_precision,
    assert_input_sizes,
    assert_modes,
    assert_zoo_row,
    images,
    input_size_cases,
    make,
    run,
    zoo_rows,
)

DISTILLED = dict(type="DistilledVisionTransformer", arch=TINY, img_size=16, patch_size=4)
DEIT3 = dict(type="DeiT3", arch=TINY, img_size=16, patch_size=4)
HEAD = dict(type="DeiTClsHead", num_classes=5, in_channels=24)
KINDS = ("DistilledVisionTransformer", "DeiT3")


# Parity with the reference


@pytest.mark.parametrize("name", ["deit-tiny-distilled_3rdparty_in1k", "deit3-small-p16_3rdparty_in1k"])
def test_features_and_logits_are_the_references(name):
    assert_golden(name, scan_layers=True)


@pytest.mark.parametrize("case", input_size_cases(*KINDS))
def test_other_input_sizes_are_the_references(case):
    assert_input_sizes(case)


@pytest.mark.parametrize("row", [row for kind in KINDS for row in zoo_rows(kind)])
def test_every_model_of_the_zoo_builds(row):
    assert_zoo_row(row)


@pytest.mark.parametrize(
    ("names", "sizes"),
    [
        (("s", "small"), (384, 12, 6, 1536)),
        (("m", "medium"), (512, 12, 8, 2048)),
        (("b", "base"), (768, 12, 12, 3072)),
        (("l", "large"), (1024, 24, 16, 4096)),
        (("h", "huge"), (1280, 32, 16, 5120)),
    ],
)
def test_architectures_of_deit3(names, sizes):
    for name in names:
        model = abstract(dict(type="DeiT3", arch=name))
        layer = model.layers[0]
        assert (model.embed_dims, len(model.layers), layer.attn.num_heads, layer.ffn.fc1.out_features) == sizes


# Both backbones


@pytest.mark.parametrize("cfg", [DISTILLED, DEIT3], ids=KINDS)
def test_all_forms_agree_and_modes_differ(cfg):
    model = make(cfg | dict(arch=TINY | dict(num_layers=2), drop_path_rate=0.5, drop_rate=0.1))
    assert_forms_agree(model, images(3, 16, 24, 3))
    assert_modes(model, images(3, 16, 16, 3))


@pytest.mark.parametrize(
    ("cfg", "unused"),
    [(DISTILLED, ()), (DEIT3, ("ln2",)), (DEIT3 | dict(ffn_norm="ln2"), ())],
    ids=["distilled", "deit3", "deit3_paper"],
)
def test_gradients_are_those_of_finite_differences(cfg, unused):
    model = make(cfg)
    model.eval()
    assert_gradients(model, images(2, 16, 24, 3), without_gradient=unused)


@pytest.mark.parametrize("cfg", [DISTILLED, DEIT3], ids=KINDS)
def test_half_precision(cfg):
    assert_half_precision(make(cfg), images(2, 16, 24, 3))


@pytest.mark.parametrize("cfg", [DISTILLED, DEIT3], ids=KINDS)
@pytest.mark.parametrize("frozen_stages", [2, 3])
def test_frozen_stages(cfg, frozen_stages):
    model = make(cfg | dict(frozen_stages=frozen_stages, drop_rate=0.5, drop_path_rate=0.5))
    trained = {path[0] if path[0] != "layers" else path[:2] for path, _ in nnx.state(model, nnx.Param).flat_state()}
    assert trained == ({("layers", 2), "ln1"} if frozen_stages == 2 else set())
    tokens = {path[0] for path, _ in nnx.state(model, Frozen).flat_state()} & {"cls_token", "dist_token", "pos_embed"}
    assert len(tokens) == (3 if "Distilled" in cfg["type"] else 2)
    if frozen_stages == 3:  # nothing is random any more, even in training mode
        whole = make(cfg)
        whole.eval()
        np.testing.assert_allclose(run(model, images(2, 16, 16, 3))[0], run(whole, images(2, 16, 16, 3))[0], atol=1e-5)


@pytest.mark.parametrize("cfg", [DISTILLED, DEIT3], ids=KINDS)
def test_intermediates(cfg):
    model = make(cfg)
    model.eval()
    model.scan_layers = True
    x = images(2, 16, 16, 3)
    outputs, found = intermediates(model, x, names=("layers.*.out", "layers.2.attn.weights"))
    tokens = 16 + model.num_extra_tokens
    assert list(found) == ["layers.0.out", "layers.1.out", "layers.2.attn.weights", "layers.2.out"]
    weights = found["layers.2.attn.weights"]
    assert weights.shape == (2, 3, tokens, tokens)
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
    first = model.ln1(found["layers.2.out"])[:, 0]
    np.testing.assert_allclose(outputs[0][0] if "Distilled" in cfg["type"] else outputs[0], first, atol=1e-5)


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (DISTILLED | dict(with_cls_token=False), "with_cls_token=False, but both tokens"),
        (DISTILLED | dict(frozen_stages=4), "DistilledVisionTransformer: frozen_stages=4, but it has 3 layers"),
        (DEIT3 | dict(arch="meduim"), "DeiT3: unknown arch 'meduim'. Did you mean 'medium'"),
        (DEIT3 | dict(ffn_norm="ln3"), "unknown ffn_norm 'ln3'. Did you mean"),
        (DEIT3 | dict(with_cls_token=False), "DeiT3: out_type='cls_token' needs with_cls_token=True"),
        (DEIT3 | dict(layer_cfgs=dict(ffn_nrom="ln2")), "no argument 'ffn_nrom'. Did you mean 'ffn_norm'"),
        (DEIT3 | dict(use_layerscale=True), "no argument 'use_layerscale'. Did you mean 'use_layer_scale'"),
    ],
)
def test_mistakes_are_named(cfg, message):
    with pytest.raises(ConfigError, match=message):
        abstract(cfg)


# DeiT's distilled model


def test_distillation_token_is_the_second_and_has_a_position():
    model = make(DISTILLED | dict(out_type="raw"))
    x = images(2, 16, 16, 3)
    tokens = model.add_cls_token(model.embed(x)[0])
    positions = model.pos_embed[...]
    assert tokens.shape == (2, 18, 24) and positions.shape == (1, 18, 24)
    for i, token in enumerate((model.cls_token, model.dist_token)):
        np.testing.assert_allclose(tokens[0, i], token[0, 0] + positions[0, i], rtol=1e-6)
    np.testing.assert_allclose(tokens[:, 2:], model.patch_embed(x)[0] + positions[:, 2:], rtol=1e-6)
    ((cls_token, dist_token),) = run(make(DISTILLED), x)
    (raw,) = run(model, x)
    np.testing.assert_allclose(raw[:, 0], cls_token, atol=1e-6)
    np.testing.assert_allclose(raw[:, 1], dist_token, atol=1e-6)


def test_initialisation_of_the_distillation_token():
    model = build(dict(type="DistilledVisionTransformer", arch=TINY | dict(embed_dims=192)), rngs=nnx.Rngs(0))
    model.init_weights(nnx.Rngs(1))
    assert not model.cls_token[...].any()
    np.testing.assert_allclose(model.dist_token[...].std(), 0.02, rtol=0.15)


def test_head_takes_the_mean_of_both_tokens_logits():
    head = make(HEAD)
    pair = images(3, 24), images(4, 24)[:3]
    by_hand = 0.5 * (pair[0] @ head.layers.head.kernel[...] + pair[1] @ head.layers.head_dist.kernel[...])
    by_hand = by_hand + 0.5 * (head.layers.head.bias[...] + head.layers.head_dist.bias[...])
    np.testing.assert_allclose(head((pair,)), by_hand, atol=1e-5)
    np.testing.assert_array_equal(head(((pair[1], pair[0]), pair)), head((pair,)))  # the last scale counts
    np.testing.assert_array_equal(head(pair), head((pair,)))
    np.testing.assert_array_equal(head.pre_logits((pair,))[1], pair[1])
    np.testing.assert_allclose(head.predict((pair,)).sum(axis=1), 1, rtol=1e-6)
    with pytest.raises(ConfigError, match="use DistilledVisionTransformer"):
        head((pair[0],))


def test_head_with_a_hidden_layer():
    head = make(HEAD | dict(hidden_dim=7))
    pair = images(3, 24), images(4, 24)[:3]
    hidden = [jnp.tanh(x @ head.layers.pre_logits.kernel[...] + head.layers.pre_logits.bias[...]) for x in pair]
    for ours, wanted in zip(head.pre_logits((pair,)), hidden, strict=True):
        np.testing.assert_allclose(ours, wanted, atol=1e-5)
    assert head.layers.head_dist.in_features == 7
    assert head((pair,)).shape == (3, 5)


def test_training_the_head_warns_that_nothing_is_distilled():
    head = make(HEAD)
    feats = ((images(3, 24), images(3, 24)),)
    with pytest.warns(UserWarning, match="distillation is not supported"):
        loss, _ = head.loss(feats, jnp.array([0, 1, 2]))
    assert jnp.isfinite(loss)


# DeiT III


def test_deit3_class_token_has_no_position():
    model = make(DEIT3 | dict(out_type="raw"))
    assert model.pos_embed.shape == (1, 16, 24)
    tokens = model.add_cls_token(model.embed(images(2, 16, 16, 3))[0])
    np.testing.assert_array_equal(tokens[:, :1], jnp.broadcast_to(model.cls_token[...], (2, 1, 24)))


def test_deit3_layer_scale():
    assert {float(layer.attn.gamma1.scale[0]) for layer in build(DEIT3).layers} == {np.float32(1e-5)}
    plain = abstract(DEIT3 | dict(use_layer_scale=False))
    assert plain.layers[0].attn.gamma1 is None and plain.layers[0].ffn.gamma2 is None
    mixed = abstract(DEIT3 | dict(layer_cfgs=[dict(use_layer_scale=i > 1) for i in range(3)]))
    assert [layer.ffn.gamma2 is not None for layer in mixed.layers] == [False, False, True]


def test_deit3_drops_before_the_class_token_comes():
    model = make(DEIT3 | dict(drop_rate=0.9, out_type="raw", layer_cfgs=dict(drop_rate=0.0)))
    tokens = model._prepare(model.embed(images(4, 16, 16, 3))[0], nnx.Rngs(0))
    assert (np.asarray(tokens[:, 0]) != 0).all() and (np.asarray(tokens[:, 1:]) == 0).mean() > 0.8
