"""VisionTransformer against the reference's golden data, and the contracts of its arguments."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxpretrain.build import ConfigError, build
from jaxpretrain.models.layers import Frozen
from jaxpretrain.models.vision_transformer import VisionTransformer
from tests.parity import fill_by_reference, load_golden, reference_input
from tests.test_layers_transformer import filled, quick_jit
from tests.vit import assert_golden, assert_input_sizes, assert_outputs, assert_zoo_row, input_size_cases, zoo_rows

TINY = dict(embed_dims=16, num_layers=4, num_heads=2, feedforward_channels=24)


def tiny(**kwargs) -> VisionTransformer:
    args = dict(arch=TINY, img_size=16, patch_size=4) | kwargs
    return filled(lambda: VisionTransformer(**args, rngs=nnx.Rngs(0)))


def images(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)


def abstract(**kwargs) -> VisionTransformer:
    return nnx.eval_shape(lambda: VisionTransformer(**kwargs, rngs=nnx.Rngs(0)))


def count(model: nnx.Module, *kinds: type) -> int:
    return sum(int(np.prod(v.shape)) for _, v in nnx.state(model, kinds).flat_state())


def run(model: VisionTransformer, x: jax.Array, jit: Any = quick_jit, **kwargs: Any) -> tuple[jax.Array, ...]:
    graphdef, state = nnx.split(model)
    return jit(lambda state, x: nnx.merge(graphdef, state)(x, **kwargs))(state, x)


# Parity with the reference


@pytest.mark.parametrize(
    "name",
    [
        "deit-tiny_4xb256_in1k",
        "vit-base-p16_maskfeat-pre_8xb256-coslr-100e_in1k",  # avg_featmap without the final norm
        "vit-base-p32_clip-openai-pre_3rdparty_in1k",  # pre_norm
        "vit-small-p14_dinov2-pre_3rdparty",  # LayerScale, 1,370 tokens
    ],
)
def test_features_are_the_references(name):
    golden = load_golden(name)
    cfg = {k: v for k, v in golden["model_cfg"]["backbone"].items() if k not in ("type", "init_cfg")}
    model = abstract(**cfg)
    fill_by_reference(model, [r for r in golden["manifest"] if r[0].startswith("backbone.")], "backbone.")
    model.eval()
    x = jnp.asarray(reference_input(tuple(golden["input_shape"])))
    model.scan_layers = not name.startswith("deit")  # that one is scanned below
    assert_outputs(run(model, x, jax.jit), golden["features"])


@pytest.mark.parametrize("name", ["deit-tiny_4xb256_in1k", "vit-base-p16_32xb128-mae_in1k"])
def test_features_and_logits_are_the_references(name):
    assert_golden(name, scan_layers=True)


def test_parameter_count_of_mocov3s_small():
    model = abstract(arch="mocov3-small")
    assert count(model, nnx.Param) + (model.embed_dims + 1) * 1000 == 22050664


@pytest.mark.parametrize(("arch", "sizes"), [("small", (768, 8, 8, 2304)), ("eva-g", (1408, 40, 16, 6144))])
def test_architectures_without_published_weights(arch, sizes):
    model = abstract(arch=arch)
    layer = model.layers[0]
    assert (model.embed_dims, len(model.layers), layer.attn.num_heads, layer.ffn.fc1.out_features) == sizes


# Arguments


def test_output_types():
    x = images(2, 16, 16, 3)
    shapes = dict(raw=(2, 17, 16), cls_token=(2, 16), featmap=(2, 4, 4, 16), avg_featmap=(2, 16))
    outputs = {}
    for out_type, shape in shapes.items():
        (outputs[out_type],) = run(tiny(out_type=out_type), x)
        assert outputs[out_type].shape == shape
    raw = outputs["raw"]
    np.testing.assert_array_equal(outputs["cls_token"], raw[:, 0])
    np.testing.assert_array_equal(outputs["featmap"].reshape(2, 16, 16), raw[:, 1:])
    mean = np.asarray(raw[:, 1:]).mean(axis=1)
    normalised = (mean - mean.mean(-1, keepdims=True)) / np.sqrt(mean.var(-1, keepdims=True) + 1e-6)
    norm = tiny(out_type="avg_featmap").ln2
    np.testing.assert_allclose(outputs["avg_featmap"], normalised * norm.scale[...] + norm.bias[...], atol=1e-5)


def test_out_indices_give_layers_in_order_and_norm_only_the_last():
    x = images(2, 16, 16, 3)
    model = tiny(out_indices=(-1, 0, 2), out_type="raw")
    first, third, last = run(model, x)
    tokens, _ = model.embed(x)
    tokens = model.add_cls_token(tokens)
    for i, layer in enumerate(model.layers):
        tokens = layer(tokens)
        if i in (0, 2):
            np.testing.assert_allclose(tokens, (first, third)[i // 2], atol=1e-5)
    np.testing.assert_allclose(model.ln1(tokens), last, atol=1e-5)
    np.testing.assert_allclose(model.run_layers(model.add_cls_token(model.embed(x)[0])), tokens, atol=1e-5)
    (unnormed,) = run(tiny(final_norm=False, out_type="raw"), x)
    np.testing.assert_allclose(unnormed, tokens, atol=1e-5)


def test_registers_are_after_the_class_token_and_have_no_position():
    x = images(2, 16, 24, 3)  # wider than the table is for
    model = tiny(num_registers=3, out_type="raw")
    assert model.num_extra_tokens == 4 and model.pos_embed.shape == (1, 17, 16)
    assert model.register_tokens.shape == (1, 3, 16)
    patches, _ = model.embed(x)
    tokens = model.add_cls_token(patches)
    np.testing.assert_array_equal(tokens[:, 1:4], jnp.broadcast_to(model.register_tokens[...], (2, 3, 16)))
    np.testing.assert_array_equal(tokens[:, 4:], patches)
    without = tiny()
    np.testing.assert_array_equal(tokens[:, :1], without.add_cls_token(without.embed(x)[0])[:, :1])
    np.testing.assert_array_equal(patches, without.embed(x)[0])
    (raw,) = run(model, x)
    assert raw.shape == (2, 4 + 24, 16)
    (featmap,) = run(tiny(num_registers=3, out_type="featmap"), x)
    np.testing.assert_array_equal(featmap.reshape(2, 24, 16), raw[:, 4:])
    (cls_token,) = run(tiny(num_registers=3), x)
    np.testing.assert_array_equal(cls_token, raw[:, 0])
    only = tiny(num_registers=2, with_cls_token=False, out_type="raw")
    assert only.pos_embed.shape == (1, 16, 16) and run(only, x)[0].shape == (2, 2 + 24, 16)


def test_registers_start_apart_and_learn():
    model = VisionTransformer(TINY, img_size=16, patch_size=4, num_registers=2, rngs=nnx.Rngs(0))
    model.init_weights(nnx.Rngs(1))
    registers = np.asarray(model.register_tokens[...])
    assert np.abs(registers[0, 0] - registers[0, 1]).max() > 0 and np.abs(registers).max() < 1e-5
    assert (
        count(abstract(arch="dinov2-s", num_registers=4), nnx.Param)
        == count(abstract(arch="dinov2-s"), nnx.Param) + 1536
    )
    frozen = tiny(num_registers=2, frozen_stages=1)
    assert isinstance(frozen.register_tokens, Frozen) and isinstance(frozen.cls_token, Frozen)
    with pytest.raises(ConfigError, match="num_registers is not supported"):
        build(dict(type="MAEViT", arch=TINY, img_size=16, patch_size=4, num_registers=2))


@pytest.mark.parametrize("case", input_size_cases("VisionTransformer"))
def test_other_input_sizes_are_the_references(case):
    assert_input_sizes(case)


@pytest.mark.parametrize("row", zoo_rows("VisionTransformer"))
def test_every_model_of_the_zoo_builds(row):
    assert_zoo_row(row)


def test_no_class_token():
    model = tiny(with_cls_token=False, out_type="avg_featmap")
    assert model.cls_token is None and model.pos_embed.shape == (1, 16, 16)
    assert run(model, images(2, 16, 16, 3))[0].shape == (2, 16)


def test_positions_are_interpolated_to_any_size():
    model = tiny(out_type="featmap", img_size=(16, 24))
    assert model.patch_resolution == (4, 6)
    assert run(model, images(2, 16, 24, 3))[0].shape == (2, 4, 6, 16)
    assert run(model, images(2, 40, 12, 3))[0].shape == (2, 10, 3, 16)
    assert run(model, images(2, 13, 18, 3))[0].shape == (2, 4, 5, 16)
    # A table that is the same for all patches of a row stays so, in the right orientation.
    rows = jnp.broadcast_to(jnp.arange(4.0)[:, None, None], (4, 6, 16)).reshape(1, 24, 16)
    model.pos_embed.set_value(jnp.concatenate([jnp.zeros((1, 1, 16)), rows], axis=1))
    tokens, grid = model.embed(jnp.zeros((1, 32, 12, 3)))
    positions = (tokens - model.patch_embed(jnp.zeros((1, 32, 12, 3)))[0]).reshape(*grid, 16)
    assert grid == (8, 3)
    np.testing.assert_allclose(positions, jnp.broadcast_to(positions[:, :1, :1], positions.shape), atol=1e-6)
    assert (np.diff(positions[1:-1, 0, 0]) > 0.2).all()


def test_drop_path_grows_linearly_and_layers_can_be_set_one_by_one():
    model = tiny(drop_path_rate=0.3, drop_rate=0.1)
    np.testing.assert_allclose([layer.drop_path_rate for layer in model.layers], [0, 0.1, 0.2, 0.3])
    assert {layer.ffn.drop.rate for layer in model.layers} == {model.drop_after_pos.rate} == {0.1}
    model = tiny(layer_cfgs=[dict(feedforward_channels=8 * (i + 1)) for i in range(4)])
    assert [layer.ffn.fc1.out_features for layer in model.layers] == [8, 16, 24, 32]
    model.scan_layers = True  # nothing is alike, so nothing is scanned
    assert run(model, images(1, 16, 16, 3))[0].shape == (1, 16)


@pytest.mark.parametrize("scan", [False, True])
def test_training_draws_and_evaluation_does_not(scan):
    model, x = tiny(drop_path_rate=0.5, drop_rate=0.1), images(4, 16, 16, 3)
    model.scan_layers = scan
    with pytest.raises(ValueError, match="rngs"):
        model(x)
    graphdef, state = nnx.split(model)
    draw = quick_jit(lambda state, key: nnx.merge(graphdef, state)(x, rngs=nnx.Rngs(key))[0])
    a, b, c = (draw(state, jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(a, b)
    assert float(jnp.abs(a - c).max()) > 0.01
    model.eval()
    np.testing.assert_array_equal(run(model, x)[0], run(model, x, rngs=nnx.Rngs(0))[0])


@pytest.mark.parametrize(("scan", "remat"), [(False, "none"), (True, "full")])
def test_every_parameter_learns_in_every_form(scan, remat):
    x = images(3, 16, 24, 3)
    model = tiny(layer_scale_init_value=0.1, pre_norm=True, drop_path_rate=0.2)
    model.set_attributes(scan_layers=scan, remat=remat, raise_if_not_found=False)
    graphdef, params = nnx.split(model, nnx.Param)

    def loss(params):
        return jnp.sum(nnx.merge(graphdef, params)(x, rngs=nnx.Rngs(0))[0] ** 3)

    value, grads = quick_jit(jax.value_and_grad(loss))(nnx.to_pure_dict(params))
    assert jnp.isfinite(value)
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        assert float(np.abs(grad).max()) > 0, f"no gradient for {jax.tree_util.keystr(path)}"


def test_bfloat16_computes_in_half_and_keeps_float32_weights():
    model, x = tiny(out_type="avg_featmap", img_size=(16, 24)), images(2, 16, 16, 3)
    for scan in (False, True):
        model.scan_layers = scan
        (full,), (half,) = run(model, x), run(model, x.astype(jnp.bfloat16))
        assert half.dtype == jnp.bfloat16
        np.testing.assert_allclose(half.astype(jnp.float32), full, atol=0.1)  # bfloat16 has 3 digits
    graphdef, state = nnx.split(model)

    def loss(state, x):
        return nnx.merge(graphdef, state)(x)[0].astype(jnp.float32).sum()

    program = str(jax.make_jaxpr(loss)(state, x.astype(jnp.bfloat16)))
    matmuls = [line.split("=")[0].split(":")[1] for line in program.splitlines() if "dot_general" in line]
    half = [kind for kind in matmuls if kind.startswith("bf16")]
    # In float32: the logits of the attention, and the two matmuls that interpolate the positions.
    assert len(half) == 6 and len(matmuls) == 9
    grads = quick_jit(jax.grad(loss))(state, x.astype(jnp.bfloat16))
    assert {leaf.dtype for leaf in jax.tree.leaves((state, grads))} == {jnp.dtype("float32")}


@pytest.mark.parametrize("frozen_stages", [2, 4])
def test_frozen_stages(frozen_stages):
    model = tiny(frozen_stages=frozen_stages, out_type="avg_featmap", pre_norm=True, drop_rate=0.5, drop_path_rate=0.5)
    trained = {path[0] if path[0] != "layers" else path[:2] for path, _ in nnx.state(model, nnx.Param).flat_state()}
    assert trained == ({("layers", 2), ("layers", 3), "ln1", "ln2"} if frozen_stages == 2 else set())
    whole = tiny(out_type="avg_featmap", pre_norm=True)
    assert count(model, nnx.Param, Frozen) == count(whole, nnx.Param)
    if frozen_stages == 4:  # nothing is random any more, even in training mode
        model.train()
        (a,), (b,) = model(images(2, 16, 16, 3)), run(whole, images(2, 16, 16, 3))
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_initialisation():
    arch = dict(embed_dims=192, num_layers=2, num_heads=3, feedforward_channels=768)
    model = VisionTransformer(arch, init_cfg=dict(type="TruncNormal", layer="Linear", std=0.02), rngs=nnx.Rngs(0))
    model.init_weights(nnx.Rngs(1))
    assert not model.cls_token[...].any()
    np.testing.assert_allclose(model.pos_embed[...].std(), 0.02, rtol=0.02)
    layer = model.layers[1]
    np.testing.assert_allclose(layer.attn.qkv.kernel[...].std(), 0.02, rtol=0.02)
    assert not layer.attn.qkv.bias[...].any()
    for fc in (layer.ffn.fc1, layer.ffn.fc2):  # U(-a, a) with a = sqrt(6 / (fan_in + fan_out)), whatever init_cfg says
        bound = np.sqrt(6 / (192 + 768))
        np.testing.assert_allclose(np.abs(fc.kernel[...]).max(), bound, rtol=1e-3)
        np.testing.assert_allclose(fc.kernel[...].std(), bound / np.sqrt(3), rtol=0.02)
        np.testing.assert_allclose(fc.bias[...].std(), 1e-6, rtol=0.2)
    bound = (3 * 16 * 16) ** -0.5  # the patch embedding keeps PyTorch's default of a convolution
    np.testing.assert_allclose(np.abs(model.patch_embed.projection.kernel[...]).max(), bound, rtol=1e-3)


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (dict(arch="deit-tny"), "unknown arch 'deit-tny'. Did you mean 'deit-tiny'"),
        (dict(arch=dict(embed_dims=8, num_layers=1)), "missing: num_heads, feedforward_channels"),
        (dict(out_type="cls"), "unknown out_type 'cls'. Did you mean 'cls_token'"),
        (dict(with_cls_token=False), "needs with_cls_token=True"),
        (dict(out_indices=(0, 4)), "out_indices has 4, but there are 4 layers"),
        (dict(frozen_stages=5), "frozen_stages=5, but it has 4 layers"),
        (dict(layer_cfgs=[{}]), "1 layer_cfgs for 4 layers"),
        (dict(layer_cfgs=dict(ffn_type="swiglu")), "Did you mean 'swiglu_fused'"),
        (dict(patch_cfg=dict(stride=2)), "stride=2 must be kernel_size=4"),
    ],
)
def test_mistakes_are_named(cfg, message):
    with pytest.raises(ConfigError, match=message):
        abstract(**(dict(arch=TINY, img_size=16, patch_size=4) | cfg))


def test_it_builds_from_a_config():
    model = build(dict(type="VisionTransformer", arch=TINY, img_size=16, patch_size=4))
    assert isinstance(model, VisionTransformer) and not model.scan_layers and model.remat == "none"
    with pytest.raises(ConfigError, match=r"no argument 'out_typ'\. Did you mean 'out_type'"):
        build(dict(type="VisionTransformer", out_typ="raw"))
