"""BEiT's Vision Transformer against the reference, and the contracts of its arguments and biases."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxpretrain.build import ConfigError
from jaxpretrain.models.beit import BEiTAttention, BEiTViT, RelativePositionBias
from jaxpretrain.models.layers import Frozen, intermediates
from jaxpretrain.models.layers.relative_position import (
    relative_position_bias,
    relative_position_index,
    resize_relative_position_bias_table,
)
from tests.parity import assert_summary, load_golden
from tests.test_layers_transformer import filled
from tests.vit import (
    TINY,
    abstract,
    assert_counts,
    assert_forms_agree,
    assert_golden,
    assert_gradients,
    assert_half_precision,
    assert_input_sizes,
    assert_modes,
    images,
    make,
    run,
)

CFG = dict(type="BEiTViT", arch=TINY, img_size=16, patch_size=4)
SHARED = CFG | dict(use_rel_pos_bias=False, use_shared_rel_pos_bias=True)
POSITIONS = CFG | dict(use_rel_pos_bias=False, use_abs_pos_emb=True, bias=True, layer_scale_init_value=0.0)
ALL = pytest.mark.parametrize("cfg", [CFG, SHARED, POSITIONS], ids=["biases", "shared biases", "positions"])


# Parity with the reference


@pytest.mark.parametrize(
    "name",
    [
        "beit-base-p16_beit-pre_8xb128-coslr-100e_in1k",
        pytest.param("beit-base-p16_beitv2-pre_8xb128-coslr-100e_in1k", marks=pytest.mark.slow),  # the same network
        pytest.param("beit-base-p16_cae-pre_8xb128-coslr-100e_in1k", marks=pytest.mark.slow),
        pytest.param("beit-l-p14_eva-pre_3rdparty_in1k-196px", marks=pytest.mark.slow),
    ],
)
def test_features_and_logits_are_the_references(name):
    assert_golden(name, scan_layers=True)


SIZES = load_golden("second_sizes_swin_beit")


@pytest.mark.parametrize("case", [pytest.param(c, id=c["name"]) for c in SIZES["cases"] if "beit" in c["name"]])
def test_other_input_sizes_are_the_references(case):
    assert_input_sizes(case)


BASE = dict(arch="base", use_rel_pos_bias=True)
EVA = dict(use_abs_pos_emb=True, use_rel_pos_bias=False, layer_scale_init_value=0.0)
EVA_L = EVA | dict(arch="l", patch_size=14, layer_cfgs=dict(bias=True))
EVA_G = EVA | dict(arch="eva-g", patch_size=14)


@pytest.mark.parametrize(  # names, the backbone's arguments, classes, keys and parameters
    ("backbone", "classes", "keys", "params"),
    [
        pytest.param(*row, id=names)
        for names, *row in [
            ("beit-base-p16_beit-pre, _beit-in21k-pre, _beitv2-pre, _beitv2-in21k-pre", BASE, 1000, 211, 86530984),
            ("beit-base-p16_cae-pre", BASE | dict(use_abs_pos_emb=True), 1000, 212, 86682280),
            ("beit-l-p14_eva-pre, _eva-in21k-pre-196px", EVA_L | dict(img_size=196), 1000, 296, 304142312),
            ("beit-l-p14_3rdparty-eva_in21k, _eva-pre_3rdparty_in21k", EVA_L, 0, 294, 303178752),
            ("beit-l-p14_eva-pre, _eva-in21k-pre-336px", EVA_L | dict(img_size=336), 1000, 296, 304531432),
            ("beit-g-p16_3rdparty-eva_30m", EVA_G | dict(patch_size=16), 0, 526, 1011315072),
            ("beit-g-p14_3rdparty-eva_30m, _eva-30m-pre_3rdparty_in21k", EVA_G, 0, 526, 1011146112),
            ("beit-g-p14_eva-30m-in21k-pre_3rdparty_in1k-336px", EVA_G | dict(img_size=336), 1000, 528, 1013005672),
            ("beit-g-p14_eva-30m-in21k-pre_3rdparty_in1k-560px", EVA_G | dict(img_size=560), 1000, 528, 1014447464),
        ]
    ],
)
def test_every_model_of_the_zoo_builds(backbone, classes, keys, params):
    model = abstract(dict(type="BEiTViT", **backbone))
    head = (model.embed_dims + 1) * classes
    assert_counts(model, keys - 2 * bool(classes), params - head, params - head)


# Relative positions


def test_class_tokens_have_rows_of_their_own():
    index = relative_position_index((2, 3), with_cls_token=True)
    assert index.shape == (7, 7) and index.dtype == np.int64
    np.testing.assert_array_equal(index[1:, 1:], relative_position_index((2, 3)))
    assert set(index[0, 1:]) == {15} and set(index[1:, 0]) == {16} and index[0, 0] == 17
    table = jnp.asarray(np.random.default_rng(0).standard_normal((18, 2)), jnp.float32)
    bias = relative_position_bias(table, (2, 3))
    np.testing.assert_array_equal(bias, np.asarray(table)[index].transpose(2, 0, 1))


@pytest.mark.parametrize("case", SIZES["tables"], ids=lambda case: f"{case['src']} to {case['dst']}")
def test_resized_tables_are_the_references(case):
    src, dst = (case["src"],) * 2, (case["dst"],) * 2
    rows = (2 * case["src"] - 1) ** 2
    table = np.random.Generator(np.random.PCG64(case["src"])).standard_normal((rows, 2)).astype(np.float32)
    resized = resize_relative_position_bias_table(table, src, dst)
    assert_summary(resized, case["summary"])
    extra = np.arange(6, dtype=np.float32).reshape(3, 2)
    with_cls = resize_relative_position_bias_table(np.concatenate([table, extra]), src, dst)
    assert with_cls.dtype == np.float32
    np.testing.assert_array_equal(with_cls, np.concatenate([resized, extra]))


@pytest.mark.parametrize("grid", [(3, 5), (6, 2), (4, 4), (1, 1)])
def test_biases_for_another_grid_are_those_of_the_resized_table(grid):
    table = np.random.default_rng(0).standard_normal((7 * 7 + 3, 2)).astype(np.float32)
    resized = resize_relative_position_bias_table(table, (4, 4), grid)
    assert len(resized) == (2 * grid[0] - 1) * (2 * grid[1] - 1) + 3
    bias = relative_position_bias(jnp.asarray(table), (4, 4), grid)
    np.testing.assert_allclose(bias, relative_position_bias(jnp.asarray(resized), grid), atol=1e-5)


def test_resizing_keeps_the_centre_and_the_ends_and_what_is_constant():
    table = np.random.default_rng(0).standard_normal((13 * 9, 2))
    resized = resize_relative_position_bias_table(table, (7, 5), (12, 8))
    old, new = table.reshape(13, 9, 2), resized.reshape(23, 15, 2)
    np.testing.assert_allclose(new[11, 7], old[6, 4], atol=1e-9)
    np.testing.assert_allclose(new[[0, -1]][:, [0, -1]], old[[0, -1]][:, [0, -1]], atol=1e-4)
    flat = resize_relative_position_bias_table(np.ones((13 * 9, 2)), (7, 5), (12, 8))
    np.testing.assert_allclose(flat, 1, atol=1e-9)
    np.testing.assert_array_equal(resize_relative_position_bias_table(table, (7, 5), (7, 5)), table)
    with pytest.raises(
        ValueError, match=r"window of \(7, 6\) has 143 rows, or 3 more with a class token; this one has 117"
    ):
        resize_relative_position_bias_table(table, (7, 6), (7, 7))


@ALL
def test_images_of_other_sizes(cfg):
    model = make(cfg | dict(out_type="featmap"))
    model.eval()
    assert run(model, images(2, 16, 16, 3))[0].shape == (2, 4, 4, 24)
    assert run(model, images(2, 27, 13, 3))[0].shape == (2, 7, 4, 24)


def test_a_network_for_larger_images_is_the_same_network_with_resized_tables():
    """What the network does with larger images equals another one, made for them, with converted tables."""
    for cfg in (CFG, SHARED):
        model, larger = make(cfg), make(cfg | dict(img_size=(24, 20)))
        tables = {path: v for path, v in nnx.state(model).flat_state() if path[-1] == "relative_position_bias_table"}
        assert len(tables) == (3 if cfg is CFG else 1)
        for path, value in tables.items():
            resized = resize_relative_position_bias_table(np.asarray(value[...]), (4, 4), (6, 5))
            nnx.update(larger, nnx.State.from_flat_path({path: nnx.Param(jnp.asarray(resized))}))
        model.eval()
        larger.eval()
        x = images(2, 24, 20, 3)
        np.testing.assert_allclose(run(model, x)[0], run(larger, x)[0], atol=1e-5)


# Attention


@pytest.mark.parametrize("bias", [True, False, "qv_bias"])
def test_attention_is_the_formula(bias):
    layer = filled(lambda: BEiTAttention(6, 2, (2, 2), True, bias=bias, rngs=nnx.Rngs(0)))
    x, shared = images(1, 5, 6), images(2, 5, 5)
    y = layer(x, rel_pos_bias=shared)
    weights = {"/".join(map(str, p)): np.asarray(v[...], np.float64) for p, v in nnx.state(layer).flat_state()}
    assert set(weights) == {"qkv/kernel", "proj/kernel", "proj/bias", "relative_position_bias_table"} | (
        {"qkv/bias"} if bias is True else {"q_bias", "v_bias"} if bias else set()
    )
    q, k, v = np.split(np.asarray(x[0], np.float64) @ weights["qkv/kernel"] + weights.get("qkv/bias", 0), 3, axis=-1)
    q, v = q + weights.get("q_bias", 0), v + weights.get("v_bias", 0)
    q, k, v = (part.reshape(5, 2, 3) for part in (q, k, v))
    table = weights["relative_position_bias_table"][relative_position_index((2, 2), True)].transpose(2, 0, 1)
    logits = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(3) + table + np.asarray(shared)
    attention = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    wanted = np.einsum("hqk,khd->qhd", attention, v).reshape(5, 6) @ weights["proj/kernel"] + weights["proj/bias"]
    np.testing.assert_allclose(y[0], wanted, atol=1e-5)


def test_attention_errors():
    def attention(**kwargs: Any) -> BEiTAttention:
        args = dict(embed_dims=6, num_heads=2, window_size=(2, 2), use_rel_pos_bias=True) | kwargs
        return BEiTAttention(**args, rngs=nnx.Rngs(0))

    with pytest.raises(ConfigError, match="bias must be True, False or 'qv_bias', not 'qkv_bias'"):
        attention(bias="qkv_bias")
    with pytest.raises(ConfigError, match="use_rel_pos_bias=True needs a window_size"):
        attention(window_size=None)
    with pytest.raises(ConfigError, match="embed_dims=6 is not a multiple of num_heads=4"):
        attention(num_heads=4)


def test_derived_arrays():
    assert list(RelativePositionBias((2, 2), 2).derived()) == ["relative_position_index"]
    model = make(CFG)
    assert model.layers[0].attn.derived()["relative_position_index"].shape == (17, 17)
    assert make(POSITIONS).layers[0].attn.derived() == {}


# Forms, modes, precision


@ALL
def test_stacked_and_rematerialised_layers_agree(cfg):
    assert_forms_agree(
        make(cfg | dict(arch=TINY | dict(num_layers=2), drop_path_rate=0.4, drop_rate=0.1)), images(2, 16, 24, 3)
    )


@ALL
def test_gradients_are_finite_differences(cfg):
    model = make(cfg | dict(final_norm=True, out_indices=(0, 2)))
    model.eval()
    assert_gradients(model, images(2, 16, 12, 3))


@ALL
def test_training_draws_and_evaluation_does_not(cfg):
    assert_modes(
        make(cfg | dict(drop_path_rate=0.5, drop_rate=0.1, layer_cfgs=dict(attn_drop_rate=0.3))), images(4, 16, 16, 3)
    )


@ALL
def test_half_precision(cfg):
    assert_half_precision(make(cfg), images(2, 16, 16, 3))


def test_intermediates():
    for cfg in (CFG, SHARED):
        model = make(cfg)
        model.eval()
        model.scan_layers = True
        (output,), found = intermediates(model, images(2, 16, 16, 3), names=("layers.*.out", "*.weights"))
        assert found["layers.2.out"].shape == (2, 17, 24)
        assert found["layers.1.attn.weights"].shape == (2, 3, 17, 17)
        np.testing.assert_allclose(output, run(model, images(2, 16, 16, 3))[0], atol=1e-5)


# Arguments


@ALL
def test_steps_of_the_forward_pass(cfg):
    model = make(cfg | dict(out_type="raw"))
    model.eval()
    x = images(2, 16, 24, 3)
    tokens, grid = model.embed(x)
    assert tokens.shape == (2, 24, 24) and grid == (4, 6)
    tokens = model.run_layers(model.add_cls_token(tokens), grid)
    np.testing.assert_allclose(tokens, run(model, x)[0], atol=1e-5)
    if cfg is not POSITIONS:
        assert model.pos_embed is None
        np.testing.assert_array_equal(model.add_cls_token(model.embed(x)[0])[:, :1], model.cls_token[...].repeat(2, 0))
        np.testing.assert_array_equal(model.embed(x)[0], model.patch_embed(x)[0])


def test_output_types():
    shapes = dict(raw=(2, 17, 24), cls_token=(2, 24), featmap=(2, 4, 4, 24), avg_featmap=(2, 24))
    for out_type, shape in shapes.items():
        model = make(CFG | dict(out_type=out_type, out_indices=(0, -1), final_norm=True))
        assert [y.shape for y in run(model, images(2, 16, 16, 3))] == [shape] * 2
        assert (model.ln2 is not None) == (out_type == "avg_featmap")


@pytest.mark.parametrize("cfg", [CFG, SHARED])
def test_no_class_token(cfg):
    model = make(cfg | dict(with_cls_token=False))
    bias = model.rel_pos_bias or model.layers[0].attn
    assert bias.relative_position_bias_table.shape == (49, 3)
    assert bias.derived()["relative_position_index"].shape == (16, 16)
    assert run(model, images(2, 16, 16, 3))[0].shape == (2, 24)


@pytest.mark.parametrize("frozen_stages", [2, 3])
@ALL
def test_frozen_stages(cfg, frozen_stages):
    model = make(cfg | dict(frozen_stages=frozen_stages, drop_rate=0.5, drop_path_rate=0.5))
    trained = {path[0] if path[0] != "layers" else path[:2] for path, _ in nnx.state(model, nnx.Param).flat_state()}
    shared = {"rel_pos_bias"} if cfg is SHARED else set()  # MMPretrain does not freeze what layers share
    assert trained == shared | ({("layers", 2), "ln2"} if frozen_stages == 2 else set())
    whole = make(cfg)
    assert len(nnx.state(model, (nnx.Param, Frozen)).flat_state()) == len(nnx.state(whole).flat_state())
    if frozen_stages == 3:
        x = images(2, 16, 16, 3)
        np.testing.assert_allclose(run(model, x)[0], run(whole, x)[0], atol=1e-5)


def test_drop_path_drops_each_branch_as_often():
    """MMPretrain drops the feed-forward branch twice; here it is dropped as often as the attention."""
    layer = make(CFG).layers[0]
    x = jnp.broadcast_to(images(1, 17, 24), (2000, 17, 24))
    attention = layer.gamma_1[...] * layer.attn(layer.ln1(x[:1]))
    y = np.asarray(layer(x, rngs=nnx.Rngs(0), drop_path_rate=0.3))
    kept = np.abs(y - np.asarray(x)).max((1, 2)) > 1e-6
    attention_only = np.abs(y - np.asarray(x + attention / 0.7)).max((1, 2)) < 1e-4
    np.testing.assert_allclose([1 - kept.mean(), attention_only.mean()], [0.3 * 0.3, 0.7 * 0.3], atol=0.04)


def test_initialisation():
    arch = dict(embed_dims=192, num_layers=2, num_heads=3, feedforward_channels=768)
    model = BEiTViT(arch, init_cfg=dict(type="TruncNormal", layer="Linear", std=0.02), rngs=nnx.Rngs(0))
    layer = model.layers[1]
    assert not layer.attn.relative_position_bias_table[...].any()
    model.init_weights(nnx.Rngs(1))
    np.testing.assert_allclose(layer.attn.relative_position_bias_table[...].std(), 0.02, rtol=0.1)
    np.testing.assert_allclose(layer.attn.qkv.kernel[...].std(), 0.02, rtol=0.02)
    np.testing.assert_array_equal(layer.gamma_1[...], np.float32(0.1))
    np.testing.assert_allclose(np.abs(layer.ffn.fc1.kernel[...]).max(), np.sqrt(6 / (192 + 768)), rtol=1e-3)
    assert not layer.attn.q_bias[...].any() and not layer.attn.v_bias[...].any() and not model.cls_token[...].any()
    model = BEiTViT(**{k: v for k, v in SHARED.items() if k != "type"}, use_abs_pos_emb=True, rngs=nnx.Rngs(0))
    model.init_weights(nnx.Rngs(1))
    np.testing.assert_allclose(model.pos_embed[...].std(), 0.02, rtol=0.2)
    assert not model.rel_pos_bias.relative_position_bias_table[...].any()  # zeros, in MMPretrain too


def test_layers_can_be_set_one_by_one():
    model = abstract(CFG | dict(layer_cfgs=[dict(bias=bias) for bias in (True, False, "qv_bias")]))
    assert [layer.attn.qkv.bias is not None for layer in model.layers] == [True, False, False]
    assert [layer.attn.q_bias is not None for layer in model.layers] == [False, False, True]
    model = abstract(CFG | dict(layer_scale_init_value=None))
    assert {layer.gamma_1 for layer in model.layers} == {None}


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (dict(arch="bse"), "BEiTViT: unknown arch 'bse'. Did you mean 'base'"),
        (dict(use_shared_rel_pos_bias=True), "choose one of use_rel_pos_bias and use_shared_rel_pos_bias"),
        (dict(out_type="avg"), "BEiTViT: unknown out_type 'avg'"),
        (dict(out_type="cls_token", with_cls_token=False), "needs with_cls_token=True"),
        (dict(out_indices=3), "out_indices has 3, but there are 3 layers"),
        (dict(frozen_stages=4), "frozen_stages=4, but it has 3 layers"),
        (dict(layer_cfgs=dict(biass=True)), "no argument 'biass'. Did you mean 'bias'"),
        (dict(qkv_bias=True), "BEiTViT has no argument 'qkv_bias'"),
    ],
)
def test_mistakes_are_named(cfg, message):
    with pytest.raises(ConfigError, match=message):
        abstract(CFG | cfg)


def test_it_runs_abstractly_at_the_size_of_eva():
    model = abstract(dict(type="BEiTViT", **EVA_G, img_size=560))
    model.eval()
    model.scan_layers = True
    graphdef, state = nnx.split(model)
    x = jax.ShapeDtypeStruct((1, 560, 560, 3), jnp.bfloat16)
    (y,) = jax.eval_shape(lambda state, x: nnx.merge(graphdef, state)(x), state, x)
    assert y.shape == (1, 1408) and y.dtype == jnp.bfloat16
