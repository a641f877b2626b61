"""Swin Transformer and Swin Transformer V2 against the reference, and the contracts of their arguments and layers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxpretrain.build import ConfigError, build, resolve
from jaxpretrain.models.layers import Frozen, intermediates
from jaxpretrain.models.layers.patch_merging import PatchMerging
from jaxpretrain.models.layers.relative_position import relative_position_bias, relative_position_index
from jaxpretrain.models.layers.stack import _runs
from jaxpretrain.models.layers.window import MASKED, ShiftWindowMSA, shifted_regions, window_partition, window_reverse
from jaxpretrain.models.swin_transformer import SwinTransformer, WindowMSA
from jaxpretrain.models.swin_transformer_v2 import SwinTransformerV2, WindowMSAV2, relative_coords_table
from tests.parity import build_by_reference, load_golden, reference_input
from tests.test_layers_transformer import filled, quick_jit
from tests.vit import (
    abstract,
    assert_counts,
    assert_forms_agree,
    assert_golden,
    assert_gradients,
    assert_half_precision,
    assert_input_sizes,
    assert_modes,
    assert_outputs,
    images,
    make,
    run,
)

ARCH = dict(embed_dims=8, depths=[1, 4], num_heads=[2, 2])
V1 = dict(type="SwinTransformer", arch=ARCH, img_size=32, window_size=4, out_indices=(0, 1), drop_path_rate=0.0)
V2 = V1 | dict(
    type="SwinTransformerV2",
    arch=ARCH | dict(extra_norm_every_n_blocks=2),
    window_size=[4, 2],
    pretrained_window_sizes=[3, 0],
)
BOTH = pytest.mark.parametrize("cfg", [V1, V2], ids=["v1", "v2"])


# Parity with the reference


@pytest.mark.parametrize("name", ["swin-tiny_16xb64_in1k", "swinv2-tiny-w8_3rdparty_in1k-256px"])
def test_features_and_logits_are_the_references(name):
    """With scanned blocks, which agree with unrolled ones: see `test_stacked_and_rematerialised_blocks_agree`."""
    assert_golden(name, scan_layers=True)


@pytest.mark.slow
def test_glip_features_are_the_references():
    golden = load_golden("swin-t_glip-pre_3rdparty")
    model = build_by_reference(golden["model_cfg"], golden["manifest"])
    assert_counts(model, golden["n_keys"], golden["n_params"])
    model.eval()
    model.set_attributes(scan_layers=True, raise_if_not_found=False)
    x = reference_input(tuple(golden["input_shape"]))
    assert_outputs(run(model.backbone, x, jit=jax.jit), golden["features"])


SIZES = load_golden("second_sizes_swin_beit")


@pytest.mark.parametrize("case", [pytest.param(c, id=c["name"]) for c in SIZES["cases"] if "swin" in c["name"]])
def test_other_input_sizes_are_the_references(case):
    assert_input_sizes(case)


# Settings of the models of the zoo: names, the backbone's arguments, classes, keys and parameters.
W12, GLIP = dict(stage_cfgs=dict(block_cfgs=dict(window_size=12))), dict(out_indices=(1, 2, 3))
ZOO_V1: list[tuple[str, dict[str, Any], int, int, int]] = [
    ("swin-tiny_16xb64_in1k, swin-tiny_3rdparty_in1k", dict(arch="tiny"), 1000, 185, 28288354),
    ("swin-small_16xb64_in1k, swin-small_3rdparty_in1k", dict(arch="small"), 1000, 353, 49606258),
    ("swin-base_16xb64_in1k, -3rdparty, -in21k, -w7_simmim-100e and -800e", dict(arch="base"), 1000, 353, 87768224),
    ("swin-base_3rdparty_in1k-384, -in21k", dict(arch="base", img_size=384, **W12), 1000, 353, 87903584),
    ("swin-large_in21k-pre-3rdparty_in1k", dict(arch="large"), 1000, 353, 196532476),
    ("swin-large_in21k-pre-3rdparty_in1k-384", dict(arch="large", img_size=384, **W12), 1000, 353, 196735516),
    ("swin-large_8xb8_cub-384px", dict(arch="large", img_size=384, **W12), 200, 353, 195505916),
    (
        "swin-base-w6_simmim-100e",
        dict(arch="base", img_size=192, stage_cfgs=dict(block_cfgs=dict(window_size=6))),
        1000,
        353,
        87750176,
    ),
    (
        "swin-large-w14_simmim-800e",
        dict(arch="large", stage_cfgs=dict(block_cfgs=dict(window_size=14)), pad_small_map=True),
        1000,
        353,
        196848316,
    ),
    ("swin-t_glip", dict(arch="tiny", **GLIP), 0, 187, 27520506),
    ("swin-l_glip-384px", dict(arch="large", img_size=384, **GLIP, **W12), 0, 355, 195200820),
]
W16, W24 = dict(window_size=[16, 16, 16, 8]), dict(window_size=[24, 24, 24, 12], img_size=384)
W12_192 = dict(window_size=[12, 12, 12, 6], img_size=192)
PRE = dict(pretrained_window_sizes=[12, 12, 12, 6])
ZOO_V2: list[tuple[str, dict[str, Any], int, int, int]] = [
    ("swinv2-tiny-w8_3rdparty_in1k-256px", dict(arch="tiny"), 1000, 245, 28347154),
    ("swinv2-tiny-w16_3rdparty_in1k-256px", dict(arch="tiny", **W16), 1000, 245, 28347154),
    ("swinv2-small-w8_3rdparty_in1k-256px", dict(arch="small"), 1000, 473, 49728418),
    ("swinv2-small-w16_3rdparty_in1k-256px", dict(arch="small", **W16), 1000, 473, 49728418),
    ("swinv2-base-w8_3rdparty_in1k-256px", dict(arch="base"), 1000, 473, 87918816),
    ("swinv2-base-w16_3rdparty_in1k-256px, -in21k", dict(arch="base", **W16, **PRE), 1000, 473, 87918816),
    ("swinv2-base-w24_in21k-pre_3rdparty_in1k-384px", dict(arch="base", **W24, **PRE), 1000, 473, 87918816),
    # The settings that MMPretrain records for swinv2-large-w12_3rdparty_in21k-192px are those of base, by mistake.
    ("swinv2-base-w12_3rdparty_in21k-192px", dict(arch="base", **W12_192), 21841, 473, 109280841),
    ("swinv2-large-w16_in21k-pre_3rdparty_in1k-256px", dict(arch="large", **W16, **PRE), 1000, 473, 196739932),
    ("swinv2-large-w24_in21k-pre_3rdparty_in1k-384px", dict(arch="large", **W24, **PRE), 1000, 473, 196739932),
]


@pytest.mark.parametrize(
    ("kind", "backbone", "classes", "keys", "params"),
    [
        pytest.param(kind, *row, id=names)
        for kind, rows in (("SwinTransformer", ZOO_V1), ("SwinTransformerV2", ZOO_V2))
        for names, *row in rows
    ],
)
def test_every_model_of_the_zoo_builds(kind, backbone, classes, keys, params):
    model = abstract(dict(type=kind, **backbone))
    width = model.stages[-1].embed_dims
    head = 2 * bool(classes), classes * (width + 1)
    assert_counts(model, keys - head[0], params - head[1], params - head[1])


@pytest.mark.parametrize(
    ("kind", "names", "embed_dims", "depths", "num_heads"),
    [
        ("SwinTransformer", "t tiny", 96, [2, 2, 6, 2], [3, 6, 12, 24]),
        ("SwinTransformer", "s small", 96, [2, 2, 18, 2], [3, 6, 12, 24]),
        ("SwinTransformer", "b base", 128, [2, 2, 18, 2], [4, 8, 16, 32]),
        ("SwinTransformer", "L Large", 192, [2, 2, 18, 2], [6, 12, 24, 48]),
        ("SwinTransformerV2", "t tiny", 96, [2, 2, 6, 2], [3, 6, 12, 24]),
        ("SwinTransformerV2", "l large", 192, [2, 2, 18, 2], [6, 12, 24, 48]),
        ("SwinTransformerV2", "h huge", 352, [2, 2, 18, 2], [8, 16, 32, 64]),
        ("SwinTransformerV2", "g giant", 512, [2, 2, 42, 4], [16, 32, 64, 128]),
    ],
)
def test_architectures(kind, names, embed_dims, depths, num_heads):
    size = dict(embed_dims=embed_dims, depths=depths, num_heads=num_heads)
    for name in names.split():
        assert resolve(kind).size(name).items() >= size.items()


def test_some_blocks_of_the_largest_have_a_norm_more():
    assert SwinTransformerV2.size("giant")["extra_norm_every_n_blocks"] == 6
    assert SwinTransformerV2.size("large")["extra_norm_every_n_blocks"] == 0
    model = abstract(dict(type="SwinTransformerV2", arch="huge"))
    extra = [[i for i, block in enumerate(stage.blocks, start=1) if block.norm3] for stage in model.stages]
    assert extra == [[], [], [6, 12, 18], []]
    assert [len(stage.blocks) for stage in model.stages] == [2, 2, 18, 2]
    assert [stage.blocks[0].attn.w_msa.num_heads for stage in model.stages] == [8, 16, 32, 64]
    assert [stage.blocks[0].ffn.fc1.in_features for stage in model.stages] == [352, 704, 1408, 2816]
    assert _runs(model.stages[2].blocks, ()) == [(0, 6, 3)]


# Windows, shifts and merged patches


def test_windows_are_cut_and_put_together():
    x = images(2, 6, 4, 3)
    windows = window_partition(x, 2)
    assert windows.shape == (12, 4, 3)
    np.testing.assert_array_equal(windows[7], x[1, :2, 2:].reshape(4, 3))
    np.testing.assert_array_equal(window_reverse(windows, 6, 4), x)


@pytest.mark.parametrize(("height", "width", "size", "shift"), [(8, 12, 4, 2), (4, 8, 4, 1), (9, 6, 3, 2)])
def test_shifted_windows_join_tokens_that_were_neighbours_only(height, width, size, shift):
    """By definition: two tokens of a window are together if they lie to each other as they did before the shift."""
    before = np.stack(np.indices((height, width)), axis=-1)[None]
    tokens = window_partition(jnp.roll(before, (-shift, -shift), axis=(1, 2)), size)
    in_window = np.stack(np.indices((size, size)), axis=-1).reshape(-1, 2)
    together = (tokens[:, :, None] - tokens[:, None] == in_window[:, None] - in_window).all(-1)
    regions = shifted_regions(height, width, size, shift)
    np.testing.assert_array_equal(regions[:, :, None] == regions[:, None], together)


class Echo(nnx.Module):
    """A stand-in for the attention: each token gets the mean of those that it sees."""

    def __init__(self, embed_dims, num_heads, window_size, *, rngs):
        pass

    def __call__(self, x, regions=None, *, rngs=None):
        if regions is None:
            return jnp.broadcast_to(x.mean(axis=1, keepdims=True), x.shape)
        seen = np.tile(regions[:, :, None] == regions[:, None], (len(x) // len(regions), 1, 1))
        return jnp.einsum("bqk,bkc->bqc", seen / seen.sum(-1, keepdims=True), x)


def echo(x: jax.Array, window_size: int, **kwargs: Any) -> jax.Array:
    return ShiftWindowMSA(3, 1, window_size, window_msa=Echo, rngs=nnx.Rngs(0), **kwargs)(x)


def test_shifted_attention_sees_windows_that_begin_half_a_window_later():
    x = images(2, 8, 6, 3)
    y = echo(x, 2, shift_size=1)
    np.testing.assert_allclose(
        y[:, 1:3, 3:5], jnp.broadcast_to(x[:, 1:3, 3:5].mean((1, 2))[:, None, None], (2, 2, 2, 3))
    )
    np.testing.assert_allclose(y[:, :1, 1:3], jnp.broadcast_to(x[:, :1, 1:3].mean((1, 2))[:, None, None], (2, 1, 2, 3)))
    np.testing.assert_allclose(y[:, -1, -1], x[:, -1, -1], rtol=1e-6)


def test_padding_takes_part_and_small_maps_are_not_shifted():
    x = images(1, 5, 6, 3)
    y = echo(x, 3)
    np.testing.assert_allclose(y[:, 3:, :3], jnp.broadcast_to(x[:, 3:, :3].sum((1, 2)) / 9, (1, 2, 3, 3)), rtol=1e-5)
    np.testing.assert_array_equal(echo(x, 5, shift_size=2), echo(x, 5))  # as small as the window, on one side
    assert np.abs(echo(x, 5, shift_size=2, pad_small_map=True) - echo(x, 5, pad_small_map=True)).max() > 0.1
    with pytest.raises(ConfigError, match="5x6 is smaller than its window of 7.*pad_small_map=True"):
        echo(x, 7)
    np.testing.assert_allclose(echo(x, 7, pad_small_map=True), jnp.broadcast_to(x.sum((1, 2)) / 49, x.shape), atol=1e-6)
    with pytest.raises(ConfigError, match="shift_size=4"):
        echo(x, 4, shift_size=4)


def test_merged_channels_are_ordered_as_unfold_has_them():
    layer = filled(lambda: PatchMerging(3, 5, norm_cfg=None, rngs=nnx.Rngs(0)))
    x = np.asarray(images(2, 5, 4, 3))
    padded = np.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0)))
    joined = np.stack([padded[:, i::2, j::2] for i in range(2) for j in range(2)], axis=-1).reshape(2, 3, 2, 12)
    np.testing.assert_allclose(layer(jnp.asarray(x)), joined @ np.asarray(layer.reduction.kernel[...]), atol=1e-5)


def test_merging_normalises_before_or_after():
    x = images(2, 6, 6, 4)
    before = filled(lambda: PatchMerging(4, 5, kernel_size=3, bias=True, rngs=nnx.Rngs(0)))
    after = filled(lambda: PatchMerging(4, 5, kernel_size=3, bias=True, use_post_norm=True, rngs=nnx.Rngs(0)))
    assert before.norm.scale.shape == (36,) and after.norm.scale.shape == (5,)
    assert before(x).shape == after(x).shape == (2, 2, 2, 5)
    y = (after(x) - after.norm.bias[...]) / after.norm.scale[...]
    np.testing.assert_allclose(y.mean(-1), 0, atol=1e-5)
    with pytest.raises(ConfigError, match="stride=1 must be kernel_size=2"):
        PatchMerging(4, 5, stride=1, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("window", [(3, 3), (2, 4), (1, 1)])
def test_biases_are_looked_up_by_offset(window):
    index = relative_position_index(window)
    table = jnp.asarray(np.random.default_rng(0).standard_normal((index.max() + 1, 2)), jnp.float32)
    assert len(table) == (2 * window[0] - 1) * (2 * window[1] - 1)
    bias = relative_position_bias(table, window)
    np.testing.assert_array_equal(bias, np.asarray(table)[index].transpose(2, 0, 1))
    tokens = np.indices(window).reshape(2, -1).T
    for q, query in enumerate(tokens):
        for k, key in enumerate(tokens):
            down, right = query - key + np.array(window) - 1
            np.testing.assert_array_equal(bias[:, q, k], table[down * (2 * window[1] - 1) + right])


# Attention by hand


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Softmax attention of one window, [n, heads, d] each, in float64."""
    logits = np.einsum("qhd,khd->hqk", q, k) + bias
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return np.einsum("hqk,khd->qhd", weights / weights.sum(-1, keepdims=True), v)


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("kind", [WindowMSA, WindowMSAV2])
def test_window_attention_is_the_formula(kind, shifted):
    layer = filled(lambda: kind(6, (2, 3), 2, rngs=nnx.Rngs(0)))
    x = images(4, 6, 6)
    regions = np.array([[0, 0, 1, 0, 0, 1], [0, 0, 0, 1, 1, 1]]) if shifted else None
    y = layer(x, regions)
    weights = {"/".join(map(str, p)): np.asarray(v[...], np.float64) for p, v in nnx.state(layer).flat_state()}
    index = relative_position_index((2, 3))
    for i in range(4):
        qkv = np.asarray(x[i], np.float64) @ weights["qkv/kernel"]
        if kind is WindowMSA:
            q, k, v = np.split(qkv + weights["qkv/bias"], 3, axis=-1)
            bias = weights["relative_position_bias_table"][index].transpose(2, 0, 1)
        else:
            q, k, v = np.split(qkv, 3, axis=-1)
            q, v = q + weights["q_bias"], v + weights["v_bias"]
            hidden = relative_coords_table((2, 3), (0, 0)).reshape(-1, 2) @ weights["cpb_mlp/0/kernel"]
            table = np.maximum(hidden + weights["cpb_mlp/0/bias"], 0) @ weights["cpb_mlp/2/kernel"]
            bias = (16 / (1 + np.exp(-table)))[index].transpose(2, 0, 1)
        q, k, v = (part.reshape(6, 2, 3) for part in (q, k, v))
        if kind is WindowMSA:
            q = q / np.sqrt(3)
        else:
            q = q / np.linalg.norm(q, axis=-1, keepdims=True) * np.exp(weights["logit_scale"][:, 0])
            k = k / np.linalg.norm(k, axis=-1, keepdims=True)
        if shifted:
            bias = bias + np.where(regions[i % 2][:, None] == regions[i % 2], 0, MASKED)
        out = attention(q, k, v, bias).reshape(6, 6) @ weights["proj/kernel"] + weights["proj/bias"]
        np.testing.assert_allclose(y[i], out, atol=1e-5)


def test_cosine_attention_is_bounded_and_keeps_finite_gradients():
    layer = filled(lambda: WindowMSAV2(6, (2, 2), 2, rngs=nnx.Rngs(0)))
    x = images(1, 4, 6)
    layer.logit_scale.set_value(jnp.full((2, 1, 1), np.log(100.0)))
    bounded = layer(x)
    layer.logit_scale.set_value(jnp.full((2, 1, 1), 50.0))
    np.testing.assert_allclose(layer(x), bounded, rtol=1e-5)
    graphdef, params = nnx.split(layer)
    zeros = x.at[:, 2:].set(0.0)  # as of padding; their keys have no direction
    grads = quick_jit(jax.grad(lambda params, x: nnx.merge(graphdef, params)(x).sum()))(params, zeros)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_coordinates_are_logarithmic():
    table = relative_coords_table((8, 8), (0, 0))
    assert table.shape == (1, 15, 15, 2) and table.dtype == np.float32
    np.testing.assert_array_equal(table[0, :, 3, 0], -table[0, ::-1, 3, 0])
    np.testing.assert_allclose(table[0, 4, 14], [-np.log2(1 + 8 * 3 / 7) / 3, np.log2(9) / 3], rtol=1e-6)
    larger = relative_coords_table((16, 16), (8, 8))  # what the network has learnt keeps its place
    np.testing.assert_allclose(larger[:, 8:23, 8:23], table, rtol=1e-6)


# Forms, modes, precision


@BOTH
def test_stacked_and_rematerialised_blocks_agree(cfg):
    model = make(cfg | dict(drop_path_rate=0.4, drop_rate=0.1))
    assert_forms_agree(model, images(2, 30, 40, 3))


@BOTH
def test_gradients_are_finite_differences(cfg):
    model = make(cfg | dict(use_abs_pos_embed=True))
    model.eval()
    # 36 pixels are 9 patches: windows of 4 are padded; positions are interpolated
    assert_gradients(model, images(2, 36, 32, 3))


@BOTH
def test_training_draws_and_evaluation_does_not(cfg):
    stage_cfgs = dict(block_cfgs=dict(attn_cfgs=dict(attn_drop=0.1, proj_drop=0.1), ffn_cfgs=dict(ffn_drop=0.1)))
    assert_modes(make(cfg | dict(drop_path_rate=0.5, drop_rate=0.1, stage_cfgs=stage_cfgs)), images(4, 32, 32, 3))


@pytest.mark.parametrize("kind", [WindowMSA, WindowMSAV2])
def test_attention_dropout_is_on_the_weights(kind):
    layer = filled(lambda: kind(6, (2, 2), 2, attn_drop=0.5, rngs=nnx.Rngs(0)))
    x = images(1, 4, 6)
    draw = quick_jit(jax.vmap(lambda key: layer(x, rngs=nnx.Rngs(dropout=key))))
    draws = draw(jax.random.split(jax.random.key(0), 4000))
    assert float(draws.std(axis=0).min()) > 1e-3
    layer.eval()
    np.testing.assert_allclose(draws.mean(axis=0), layer(x), atol=0.1)


@BOTH
def test_half_precision(cfg):
    assert_half_precision(make(cfg), images(2, 32, 32, 3))


def test_blocks_in_turn_are_scanned_together():
    blocks = abstract(dict(type="SwinTransformer", arch="small")).stages[2].blocks
    assert _runs(blocks, ()) == [(0, 2, 9)]
    assert _runs(blocks, (5, 17)) == [(0, 2, 3), (6, 2, 6)]
    assert _runs(blocks[:5], ()) == [(0, 2, 2), (4, 1, 1)]  # a last one without partner
    cfg = V1 | dict(arch=ARCH | dict(depths=[2, 12]))

    def program(scan: bool) -> str:
        model = make(cfg)
        model.set_attributes(scan_layers=scan, raise_if_not_found=False)
        return str(jax.make_jaxpr(model)(images(1, 32, 32, 3)))

    model = make(cfg)
    model.eval()
    assert program(True).count("dot_general") < program(False).count("dot_general") / 3


@BOTH
def test_intermediates(cfg):
    model = make(cfg)
    model.eval()
    model.set_attributes(scan_layers=True, raise_if_not_found=False)
    x = images(2, 36, 32, 3)
    graphdef, state = nnx.split(model)
    names = ("stages.*.out", "*.weights")
    outputs, found = quick_jit(lambda state, x: intermediates(nnx.merge(graphdef, state), x, names=names))(state, x)
    assert found["stages.1.blocks.3.out"].shape == (2, 5, 4, 16)
    weights = found["stages.0.blocks.0.attn.w_msa.weights"]
    assert weights.shape == (2 * 3 * 2, 2, 16, 16)
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)
    for y, wanted in zip(outputs, run(model, x), strict=True):
        np.testing.assert_allclose(y, wanted, atol=1e-4)


def test_with_cp_is_remat():
    assert {stage.remat for stage in abstract(V1 | dict(with_cp=True)).stages} == {"full"}
    assert {stage.remat for stage in abstract(V2).stages} == {"none"}


# Arguments


@BOTH
def test_out_indices(cfg):
    x = images(2, 32, 32, 3)
    model = make(cfg)
    first, last = run(model, x)
    assert first.shape == (2, 8, 8, 8) and last.shape == (2, 4, 4, 16)
    np.testing.assert_array_equal(run(make(cfg | dict(out_indices=-1)), x)[0], last)
    (unnormed,) = run(make(cfg | dict(out_indices=[0], norm_cfg=None)), x)
    np.testing.assert_allclose(model.norm0(unnormed), first, atol=1e-4)


def test_outputs_behind_the_downsampling():
    first, last = run(make(V1 | dict(out_after_downsample=True)), images(2, 32, 32, 3))
    assert first.shape == last.shape == (2, 4, 4, 16)


@BOTH
def test_positions_are_added_and_interpolated(cfg):
    model = make(cfg | dict(use_abs_pos_embed=True))
    assert model.absolute_pos_embed.shape == (1, 64, 8)
    x = model.embed(images(1, 32, 32, 3))
    np.testing.assert_allclose(model.add_positions(x) - x, model.absolute_pos_embed[...].reshape(1, 8, 8, 8), atol=1e-5)
    assert model.add_positions(model.embed(images(1, 40, 20, 3))).shape == (1, 10, 5, 8)
    assert make(cfg).absolute_pos_embed is None


@BOTH
def test_frozen_stages(cfg):
    whole = make(cfg)
    model = make(cfg | dict(frozen_stages=0, drop_path_rate=0.5))
    trained = {".".join(map(str, path[:2])) for path, _ in nnx.state(model, nnx.Param).flat_state()}
    # A downsampling belongs to the stage that has it: to the one before in Swin, to the one behind in Swin V2.
    assert trained == {"stages.1", "norm1.scale", "norm1.bias"}
    assert len(nnx.state(model, (nnx.Param, Frozen)).flat_state()) == len(nnx.state(whole).flat_state())
    model = make(cfg | dict(frozen_stages=1, drop_path_rate=0.5))
    assert not nnx.state(model, nnx.Param).flat_state()
    x = images(2, 32, 32, 3)
    for y, wanted in zip(run(model, x), run(whole, x), strict=True):  # nothing is random any more
        np.testing.assert_allclose(y, wanted, atol=1e-4)
    with pytest.raises(ConfigError, match="frozen_stages=2, but its 2 stages are 0 to 1"):
        make(cfg | dict(frozen_stages=2))


@BOTH
def test_drop_path_grows_linearly_over_all_blocks(cfg):
    model = abstract(cfg | dict(drop_path_rate=0.6))
    rates = [block.drop_path_rate for stage in model.stages for block in stage.blocks]
    np.testing.assert_allclose(rates, np.linspace(0, 0.6, 5))


def test_drop_path_of_v2_drops_normalised_branches():
    block = make(V2 | dict(drop_path_rate=1 - 1e-6)).stages[0].blocks[0]
    x = images(3, 4, 4, 8)
    np.testing.assert_array_equal(block(x, rngs=nnx.Rngs(0), drop_path_rate=1 - 1e-6), x)


def test_stages_and_blocks_can_be_set_one_by_one():
    stage_cfgs = [dict(depth=3, drop_paths=0.1), dict(block_cfgs=[dict(ffn_ratio=i + 1) for i in range(4)])]
    model = abstract(V1 | dict(stage_cfgs=stage_cfgs))
    assert [block.drop_path_rate for block in model.stages[0].blocks] == [0.1] * 3
    assert [block.ffn.fc1.out_features for block in model.stages[1].blocks] == [16, 32, 48, 64]
    model = abstract(V1 | dict(stage_cfgs=dict(downsample_cfg=dict(kernel_size=4), block_cfgs=dict(window_size=6))))
    assert model.stages[0].downsample.reduction.in_features == 128
    assert [block.attn.shift_size for block in model.stages[1].blocks] == [0, 3, 0, 3]


def test_initialisation():
    cfg = dict(type="TruncNormal", layer="Linear", std=0.02, bias=0.0)
    model = SwinTransformer(ARCH, img_size=64, out_indices=-1, use_abs_pos_embed=True, init_cfg=cfg, rngs=nnx.Rngs(0))
    model.init_weights(nnx.Rngs(1))
    for table in (model.absolute_pos_embed, model.stages[1].blocks[1].attn.w_msa.relative_position_bias_table):
        np.testing.assert_allclose(table[...].std(), 0.02, rtol=0.1)
    qkv = model.stages[1].blocks[0].attn.w_msa.qkv
    np.testing.assert_allclose(qkv.kernel[...].std(), 0.02, rtol=0.1)
    assert not qkv.bias[...].any()
    attn = WindowMSAV2(8, (2, 2), 2, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(attn.logit_scale[...], np.log(10), rtol=1e-6)
    assert not attn.q_bias[...].any() and not attn.v_bias[...].any()


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (V1 | dict(arch="tny"), "SwinTransformer: unknown arch 'tny'. Did you mean 'tiny'"),
        (V1 | dict(arch=dict(embed_dims=8)), "missing: depths, num_heads"),
        (V1 | dict(arch=ARCH | dict(depths=[2])), "1 depths, 2 num_heads"),
        (V1 | dict(out_indices=2), "out_indices has 2, but there are 2 stages"),
        (V1 | dict(stage_cfgs=[{}]), "1 stage_cfgs for 2 stages"),
        (V1 | dict(stage_cfgs=dict(block_cfgs=[{}, {}])), "1 blocks got 2 block_cfgs"),
        (V1 | dict(stage_cfgs=dict(block_cfgs=dict(windows=3))), "no argument 'windows'. Did you mean 'window_size'"),
        (V1 | dict(stage_cfgs=dict(block_cfgs=dict(attn_cfgs=dict(qkv=1)))), "WindowMSA has no argument 'qkv'"),
        (V1 | dict(stage_cfgs=dict(num_heads=3)), "embed_dims=8 is not a multiple of num_heads=3"),
        (V1 | dict(patch_cfg=dict(stride=2)), "stride=2 must be kernel_size=4"),
        (V2 | dict(arch=ARCH), "SwinTransformerV2: arch needs .*; missing: extra_norm_every_n_blocks"),
        (V2 | dict(arch="gigant"), "SwinTransformerV2: unknown arch 'gigant'. Did you mean 'giant'"),
        (V2 | dict(window_size=[4]), "window_size has 1 entries for 2 stages"),
        (V2 | dict(pretrained_window_sizes=[0, 0, 0]), "pretrained_window_sizes has 3 entries for 2 stages"),
        (V2 | dict(stage_cfgs=dict(num_heads=3)), "embed_dims=8 is not a multiple of num_heads=3"),
        (V2 | dict(out_after_downsample=True), "SwinTransformerV2 has no argument 'out_after_downsample'"),
    ],
)
def test_mistakes_are_named(cfg, message):
    with pytest.raises(ConfigError, match=message):
        abstract(cfg)


def test_maps_smaller_than_the_window_are_an_error_that_says_what_to_do():
    with pytest.raises(ConfigError, match="a feature map of 2x3 is smaller than its window of 4: take larger images"):
        make(V1)(images(1, 16, 24, 3))
    assert run(make(V1 | dict(pad_small_map=True)), images(1, 16, 24, 3))[1].shape == (1, 2, 3, 16)


def test_they_build_from_a_config():
    for kind in (SwinTransformer, SwinTransformerV2):
        model = nnx.eval_shape(lambda kind=kind: build(dict(type=kind.__name__)))
        assert type(model) is kind
        assert [stage.scan_layers for stage in model.stages] == [False] * 4
