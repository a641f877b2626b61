"""SAM's image encoder against the reference, and the contracts of its arguments."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxpretrain.build import ConfigError
from jaxpretrain.models.layers import intermediates
from jaxpretrain.models.layers.rel_pos_decomposed import decomposed_bias, relative_vectors
from jaxpretrain.models.vit_sam import SAMEncoderLayer
from tests.parity import build_by_reference, load_golden, reference_input
from tests.vit import (
    TINY,
    abstract,
    assert_counts,
    assert_forms_agree,
    assert_gradients,
    assert_half_precision,
    assert_input_sizes,
    assert_modes,
    assert_outputs,
    assert_zoo_row,
    images,
    input_size_cases,
    make,
    run,
    zoo_rows,
)

ARCH = TINY | dict(num_layers=4, global_attn_indexes=[1, 3])
CFG = dict(type="ViTSAM", arch=ARCH, img_size=20, patch_size=4, out_channels=8, window_size=3)


# Parity with the reference


@pytest.mark.slow
def test_features_are_the_references():
    golden = load_golden("vit-base-p16_sam-pre_3rdparty_sa1b-1024px")
    model = build_by_reference(golden["model_cfg"], golden["manifest"])
    assert_counts(model, golden["n_keys"], golden["n_params"])
    model.eval()
    model.backbone.scan_layers = True
    x = reference_input(tuple(golden["input_shape"]))
    fast = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 2})  # worth it here
    halves = [run(model.backbone, x[i : i + 1], jit=fast)[0] for i in range(2)]  # half the memory
    assert_outputs((jnp.concatenate(halves),), golden["features"])


@pytest.mark.parametrize("case", input_size_cases("ViTSAM"))
def test_other_input_sizes_are_the_references(case):
    assert_input_sizes(case)


@pytest.mark.parametrize("row", zoo_rows("ViTSAM"))
def test_every_model_of_the_zoo_builds(row):
    assert_zoo_row(row)


@pytest.mark.parametrize(
    ("names", "sizes", "everywhere"),
    [
        (("b", "base"), (768, 12, 12, 3072), [2, 5, 8, 11]),
        (("l", "large"), (1024, 24, 16, 4096), [5, 11, 17, 23]),
        (("h", "huge"), (1280, 32, 16, 5120), [7, 15, 23, 31]),
    ],
)
def test_architectures(names, sizes, everywhere):
    for name in names:
        model = abstract(dict(type="ViTSAM", arch=name, img_size=320))
        layer = model.layers[0]
        assert (model.embed_dims, len(model.layers), layer.attn.num_heads, layer.ffn.fc1.out_features) == sizes
        assert [i for i, layer in enumerate(model.layers) if not layer.window_size] == everywhere
        assert layer.attn.rel_pos_h.shape[0] == 27 and model.layers[everywhere[0]].attn.rel_pos_h.shape[0] == 39


# Relative positions


def test_bias_is_the_formula():
    h, w, d = 3, 5, 4
    q, rows, columns = (np.asarray(images(*shape)) for shape in ((2, h * w, 2, d), (2 * h - 1, d), (2 * w - 1, d)))
    ours = np.asarray(decomposed_bias(jnp.asarray(q), (h, w), jnp.asarray(rows), jnp.asarray(columns)))
    assert ours.shape == (2, 2, h * w, h * w)
    for i in range(h * w):
        for j in range(h * w):
            (row, column), (key_row, key_column) = divmod(i, w), divmod(j, w)
            vector = rows[row - key_row + h - 1] + columns[column - key_column + w - 1]
            np.testing.assert_allclose(ours[:, :, i, j], q[:, i] @ vector, atol=1e-5)


@pytest.mark.parametrize(("source", "target"), [(5, 9), (8, 3), (4, 5), (14, 1)])
def test_resized_tables_are_pytorchs(source, target):
    torch = pytest.importorskip("torch")
    table = np.asarray(images(2 * source - 1, 6))
    resized = torch.nn.functional.interpolate(
        torch.from_numpy(table.T[None].copy()), size=2 * target - 1, mode="linear"
    )
    vectors = relative_vectors(jnp.asarray(table), target)
    for i in range(target):
        for j in range(target):
            # 1e-5 of the largest magnitude, about 3: PyTorch computes the sampling points in float32
            np.testing.assert_allclose(vectors[i, j], resized[0, :, i - j + target - 1], atol=3e-5)


# Windows


def test_windows_do_not_see_each_other_and_global_layers_do():
    x = images(1, 6, 6, 24)
    moved = x.at[0, 4, 4].add(images(24))
    args = dict(type=SAMEncoderLayer, embed_dims=24, num_heads=3, feedforward_channels=32, use_rel_pos=True)
    windows, everywhere = make(args | dict(window_size=3)), make(args | dict(input_size=(6, 6)))
    for layer, reached in ((windows, 9), (everywhere, 36)):
        change = np.abs(np.asarray(run(layer, moved) - run(layer, x))).max(axis=-1)[0]
        assert (change > 1e-5).sum() == reached
        assert (change[3:, 3:] > 1e-5).all()


def test_padding_of_windows_takes_part():
    """A map of 4x5 in windows of 3 is one of 6x6 that was zero outside after the norm."""
    args = dict(type=SAMEncoderLayer, embed_dims=24, num_heads=3, feedforward_channels=32, use_rel_pos=True)
    layer = make(args | dict(window_size=3))
    x = images(2, 4, 5, 24)
    padded = jnp.pad(x, ((0, 0), (0, 2), (0, 1), (0, 0)))
    np.testing.assert_allclose(layer._attend(x, None), layer._attend(padded, None)[:, :4, :5], atol=1e-6)
    assert layer(x).shape == x.shape


# The backbone


def test_output_types_and_indices():
    x = images(2, 20, 28, 3)
    (raw,) = run(make(CFG), x)
    assert raw.shape == (2, 5, 7, 8)
    (mean,) = run(make(CFG | dict(out_type="avg_featmap")), x)
    np.testing.assert_allclose(mean, raw.mean(axis=(1, 2)), atol=1e-6)
    first, last = run(make(CFG | dict(out_indices=(0, -1), out_type="featmap")), x)
    np.testing.assert_allclose(last, raw, atol=1e-5)
    assert first.shape == raw.shape


@pytest.mark.slow  # compiles six programs
def test_all_forms_agree_and_modes_differ():
    model = make(CFG | dict(drop_path_rate=0.5, drop_rate=0.1))
    assert_forms_agree(model, images(2, 20, 28, 3))
    assert_modes(model, images(2, 20, 20, 3))


def test_alike_layers_are_scanned():
    """SAM's layers take turns: windows, everywhere, windows, everywhere."""
    model = make(CFG)
    model.eval()
    x = images(1, 20, 20, 3)
    wanted = run(model, x)[0]
    model.scan_layers = True
    np.testing.assert_allclose(run(model, x)[0], wanted, atol=1e-5)
    graphdef, state = nnx.split(model)
    program = jax.make_jaxpr(lambda state, x: nnx.merge(graphdef, state)(x))(state, x)
    assert str(program).count("scan[") == 1


def test_gradients_are_those_of_finite_differences():
    model = make(CFG | dict(layer_cfgs=dict(layer_scale_init_value=0.1)))
    model.eval()
    assert_gradients(model, images(2, 20, 28, 3))


def test_half_precision():
    assert_half_precision(make(CFG), images(2, 20, 28, 3))


@pytest.mark.parametrize("frozen_stages", [2, 4])
def test_frozen_stages(frozen_stages):
    model = make(CFG | dict(frozen_stages=frozen_stages, drop_rate=0.5, drop_path_rate=0.5))
    trained = {path[0] if path[0] != "layers" else path[:2] for path, _ in nnx.state(model, nnx.Param).flat_state()}
    assert trained == ({("layers", 2), ("layers", 3), "channel_reduction"} if frozen_stages == 2 else set())
    if frozen_stages == 4:  # nothing is random any more, even in training mode
        x = images(1, 20, 20, 3)
        whole = make(CFG)
        whole.eval()
        np.testing.assert_allclose(run(model, x)[0], run(whole, x)[0], atol=1e-5)


def test_without_positions():
    model = make(CFG | dict(use_abs_pos=False, use_rel_pos=False, drop_rate=0.5, frozen_stages=1))
    assert model.pos_embed is None and model.layers[0].attn.rel_pos_h is None and model.drop_after_pos.rate == 0
    model.init_weights(nnx.Rngs(0))
    model.eval()
    assert run(model, images(1, 16, 36, 3))[0].shape == (1, 4, 9, 8)


def test_initialisation():
    model = make(CFG)
    model.init_weights(nnx.Rngs(0))
    np.testing.assert_allclose(model.pos_embed[...].std(), 0.02, rtol=0.1)


def test_intermediates():
    model = make(CFG)
    model.eval()
    _, found = intermediates(model, images(2, 20, 20, 3), names=("layers.[01].out", "*.weights"))
    assert found["layers.0.attn.weights"].shape == (2 * 4, 3, 9, 9)  # four windows of 3x3, in a map of 5x5
    assert found["layers.1.attn.weights"].shape == (2, 3, 25, 25)
    assert found["layers.1.out"].shape == (2, 5, 5, 24)
    np.testing.assert_allclose(found["layers.0.attn.weights"].sum(-1), 1, rtol=1e-5)


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (dict(arch="bas"), "ViTSAM: unknown arch 'bas'. Did you mean 'base'"),
        (dict(arch=TINY), "arch needs global_attn_indexes"),
        (dict(arch=dict(global_attn_indexes=[])), "missing: embed_dims"),
        (dict(out_type="cls_token"), "ViTSAM: unknown out_type 'cls_token'"),
        (dict(with_cls_token=True), "no argument 'with_cls_token'"),
        (dict(frozen_stages=5), "ViTSAM: frozen_stages=5, but it has 4 layers"),
    ],
)
def test_mistakes_are_named(cfg, message):
    with pytest.raises(ConfigError, match=message):
        abstract(CFG | cfg)


def test_a_layer_with_relative_positions_needs_its_size():
    with pytest.raises(ConfigError, match="needs input_size"):
        SAMEncoderLayer(24, 3, 32, use_rel_pos=True, rngs=nnx.Rngs(0))
