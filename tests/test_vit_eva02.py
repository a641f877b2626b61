"""EVA-02's Vision Transformer against the reference, and the contracts of its arguments."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxpretrain.build import ConfigError
from jaxpretrain.models.layers import SwiGLUFFNFused, intermediates
from jaxpretrain.models.layers.ffn import SwiGLUFFN
from jaxpretrain.models.layers.rotary import rotary_table, rotate
from tests.parity import load_golden
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

CFG = dict(type="ViTEVA02", arch=TINY, img_size=16, patch_size=4)


# Parity with the reference


def test_features_and_logits_are_the_references():
    assert_golden("vit-tiny-p14_eva02-in21k-pre_3rdparty_in1k-336px", scan_layers=True)


@pytest.mark.parametrize("case", input_size_cases("ViTEVA02"))
def test_other_input_sizes_are_the_references(case):
    assert_input_sizes(case)


@pytest.mark.parametrize("row", zoo_rows("ViTEVA02"))
def test_every_model_of_the_zoo_builds(row):
    assert_zoo_row(row)


def test_derived_tables_are_the_references():
    golden = load_golden("vit-tiny-p14_eva02-in21k-pre_3rdparty_in1k-336px")
    cfg = golden["model_cfg"]["backbone"]
    derived = {f"backbone.{name}": table for name, table in abstract(cfg).derived().items()}
    rows = [row for row in golden["manifest"] if "freqs_" in row[0]]
    assert set(derived) == {row[0] for row in rows}
    for name, shape, dtype, _, *summary in rows:
        table = derived[name]
        assert list(table.shape) == shape and str(table.dtype) == dtype
        for mean, std, first in summary:  # the aliases have none
            np.testing.assert_allclose([table.mean(), table.std(), *table.ravel()[:4]], [mean, std, *first], atol=1e-6)


@pytest.mark.parametrize(
    ("names", "sizes"),
    [
        (("t", "ti", "tiny"), (192, 12, 3, 512)),
        (("s", "small"), (384, 12, 6, 1024)),
        (("b", "base"), (768, 12, 12, 2048)),
        (("l", "large"), (1024, 24, 16, 2730)),
    ],
)
def test_architectures(names, sizes):
    for name in names:
        model = abstract(dict(type="ViTEVA02", arch=name))
        layer = model.layers[0]
        assert (model.embed_dims, len(model.layers), layer.attn.num_heads, layer.mlp.w3.in_features) == sizes


# Rotary positions


def test_rotation_is_the_product_of_complex_numbers():
    """Each pair of channels is a complex number, turned by theta^(-i / 4) times its row or column."""
    grid, d = (2, 3), 16
    x = np.random.default_rng(0).standard_normal((1, 6, 2, d))
    numbers = (x[..., ::2] + 1j * x[..., 1::2]).reshape(1, 2, 3, 2, 2, d // 4)  # ..., axis, frequency
    frequency = 10000.0 ** -(np.arange(d // 4) / (d // 4))
    for i in range(2):
        for j in range(3):
            for axis, place in enumerate((i * 16 / 2, j * 16 / 3)):
                numbers[:, i, j, :, axis] *= np.exp(1j * place * frequency)
    wanted = numbers.reshape(1, 6, 2, d // 2)
    with jax.enable_x64(True):
        ours = np.asarray(rotate(jnp.asarray(x), rotary_table(grid, d)))
    assert ours.dtype == np.float64
    np.testing.assert_allclose(ours[..., ::2], wanted.real, atol=1e-12)
    np.testing.assert_allclose(ours[..., 1::2], wanted.imag, atol=1e-12)


def test_products_of_rotated_tokens_depend_on_their_distance_alone():
    table = rotary_table((6, 6), 8, span=6)
    q, k = images(2, 1, 8)
    turned_q, turned_k = (rotate(jnp.broadcast_to(x, (1, 36, 1, 8)), table) for x in (q, k))
    products = jnp.einsum("bnhd,bmhd->nm", turned_q, turned_k).reshape(6, 6, 6, 6)
    np.testing.assert_allclose(products[0, 0, 2, 3], products[2, 1, 4, 4], atol=1e-5)
    np.testing.assert_allclose(products[5, 4, 1, 0], products[4, 5, 0, 1], atol=1e-5)
    assert abs(products[0, 0, 2, 3] - products[0, 0, 3, 2]) > 1e-3


def test_tokens_before_the_patches_stay_and_half_precision_is_kept():
    table, x = rotary_table((2, 2), 8), images(1, 7, 2, 8)
    turned = rotate(x, table)
    np.testing.assert_array_equal(turned[:, :3], x[:, :3])
    np.testing.assert_array_equal(turned[:, 3], x[:, 3])  # the first patch has the angle 0
    assert (jnp.abs(turned[:, 4:] - x[:, 4:]).max(axis=(0, 2, 3)) > 0.1).all()
    assert rotate(x.astype(jnp.bfloat16), table).dtype == jnp.bfloat16


def test_a_larger_grid_lies_between_the_places_of_a_smaller_one():
    small, large = rotary_table((4, 3), 8), rotary_table((8, 6), 8)
    for a, b in zip(small, large, strict=True):
        np.testing.assert_allclose(a.reshape(4, 3, 8), b.reshape(8, 6, 8)[::2, ::2], atol=1e-12)


def test_registers_are_not_rotated():
    model = make(CFG | dict(num_registers=2, out_type="raw"))
    model.eval()
    (raw,) = run(model, images(2, 16, 24, 3))
    assert raw.shape == (2, 3 + 24, 24)
    assert make(CFG | dict(num_registers=2, out_type="featmap"))(images(1, 16, 24, 3))[0].shape == (1, 4, 6, 24)


# The backbone


def test_all_forms_agree_and_modes_differ():
    drop = dict(drop_path_rate=0.5, drop_rate=0.1, attn_drop_rate=0.1, proj_drop_rate=0.1)
    model = make(CFG | drop | dict(arch=TINY | dict(num_layers=2), sub_ln=True))
    layer = model.layers[1]
    rates = layer.drop_path_rate, layer.attn.attn_drop.rate, layer.attn.proj_drop.rate, layer.mlp.drop.rate
    assert rates == (0.5, 0.1, 0.1, 0.1)
    assert_forms_agree(model, images(3, 16, 24, 3))
    assert_modes(model, images(3, 16, 16, 3))


@pytest.mark.parametrize("rope", ["mmpretrain", "eva02"])
def test_gradients_are_those_of_finite_differences(rope):
    model = make(CFG | dict(sub_ln=True, rope=rope, layer_cfgs=dict(layer_scale_init_value=0.1)))
    model.eval()
    assert_gradients(model, images(2, 16, 24, 3))


def test_half_precision():
    assert_half_precision(make(CFG | dict(sub_ln=True)), images(2, 16, 24, 3))


def test_ropes_differ():
    x = images(2, 16, 16, 3)
    ours, paper = (run(make(CFG | dict(rope=rope)), x)[0] for rope in ("mmpretrain", "eva02"))
    assert float(jnp.abs(ours - paper).max()) > 1e-3


def test_sub_ln_and_biases():
    plain, sub_ln = abstract(CFG), abstract(CFG | dict(sub_ln=True))
    assert plain.layers[0].mlp.norm is None and sub_ln.layers[0].mlp.norm.scale.shape == (32,)
    assert plain.layers[0].attn.qkv.bias is not None
    assert abstract(CFG | dict(qkv_bias=False)).layers[0].attn.qkv.bias is None
    assert plain.layers[0].norm1.eps == plain.ln1.eps == 1e-5


def test_gated_layer_with_a_norm_is_the_formula():
    layer = make(dict(type=SwiGLUFFN, embed_dims=6, feedforward_channels=10, norm_cfg=dict(type="LN")))
    x = np.asarray(images(2, 3, 6))
    gate, value = np.split(x @ np.asarray(layer.w12.kernel[...]) + np.asarray(layer.w12.bias[...]), 2, axis=-1)
    hidden = gate / (1 + np.exp(-gate)) * value
    hidden = (hidden - hidden.mean(-1, keepdims=True)) / np.sqrt(hidden.var(-1, keepdims=True) + 1e-5)
    hidden = hidden * np.asarray(layer.norm.scale[...]) + np.asarray(layer.norm.bias[...])
    wanted = hidden @ np.asarray(layer.w3.kernel[...]) + np.asarray(layer.w3.bias[...])
    np.testing.assert_allclose(layer(jnp.asarray(x)), wanted, atol=1e-5)
    assert abstract(dict(type=SwiGLUFFNFused, embed_dims=6, feedforward_channels=18)).w3.in_features == 16


def test_frozen_stages():
    model = make(CFG | dict(frozen_stages=2, attn_drop_rate=0.5, proj_drop_rate=0.5, drop_rate=0.5, drop_path_rate=0.5))
    trained = {path[0] if path[0] != "layers" else path[:2] for path, _ in nnx.state(model, nnx.Param).flat_state()}
    assert trained == {("layers", 2), "ln1"}
    tokens = model.add_cls_token(model.embed(images(2, 16, 16, 3))[0])
    for layer in model.layers[:2]:  # nothing is random in them, even in training mode
        tokens = layer(tokens)
    with pytest.raises(ValueError, match="rngs"):
        model.layers[2](tokens)


def test_intermediates():
    model = make(CFG)
    model.eval()
    _, found = intermediates(model, images(2, 16, 16, 3), names=("layers.*.out", "layers.1.attn.weights"))
    assert list(found) == ["layers.0.out", "layers.1.attn.weights", "layers.1.out", "layers.2.out"]
    assert found["layers.1.attn.weights"].shape == (2, 3, 17, 17)


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (dict(arch="tinny"), "ViTEVA02: unknown arch 'tinny'. Did you mean 'tiny'"),
        (dict(rope="eva"), "unknown rope 'eva'. Did you mean 'eva02'"),
        (dict(arch=TINY | dict(num_heads=4)), "heads with a multiple of 4 channels, not 6"),
        (dict(subln=True), "no argument 'subln'. Did you mean 'sub_ln'"),
        (dict(out_indices=3), "ViTEVA02: out_indices has 3, but there are 3 layers"),
    ],
)
def test_mistakes_are_named(cfg, message):
    with pytest.raises(ConfigError, match=message):
        abstract(CFG | cfg)
