"""What is particular to ConvNeXt, ConvMixer, HorNet, MLP-Mixer, VAN and XCiT; the rest is in test_backbones.py."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxpretrain.build import ConfigError, build
from jaxpretrain.models.hornet import HorNet, _stretch
from jaxpretrain.models.layers import Frozen
from jaxpretrain.models.layers.grn import GRN
from jaxpretrain.models.layers.init import draw_on_host
from jaxpretrain.models.layers.intermediates import intermediates
from tests.backbone_cases import CASES
from tests.test_backbones import assert_close, call, images, loss_grads, made

CONVNEXT = dict(type="ConvNeXt", arch=dict(depths=[3], channels=[4]), stem_patch_size=8)


def drawn(**cfg):
    with draw_on_host(0):
        return build(cfg, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (dict(type="ConvNeXt", arch="tiney"), "unknown arch 'tiney'. Did you mean 'tiny'"),
        (dict(type="ConvNeXt", arch=dict(depths=[1])), "missing: channels"),
        (dict(type="ConvNeXt", arch=dict(depths=[1], channels=[4], width=1)), "not width"),
        (dict(type="ConvNeXt", arch=dict(depths=[1], channels=[4, 8])), "1 depths, 2 channels"),
        (dict(type="ConvNeXt", arch=dict(depths=[1], channels=[4]), out_indices=1), "its outputs are 0 to 0"),
        (dict(type="ConvNeXt", arch=dict(depths=[1], channels=[4]), frozen_stages=2), "frozen_stages is 0"),
        (dict(type="HorNet", arch="tiny-gff"), "Did you mean 'tiny-gf'"),
        (dict(type="XCiT", patch_size=32), "patch_size is 16 or 8"),
        (dict(type="XCiT", img_size=100), "not a multiple"),
        (dict(type="XCiT", out_indices=(3,)), "layer 3 has no class token"),
        (dict(type="XCiT", out_type="class_token", depth=1), "Did you mean 'cls_token'"),
    ],
)
def test_mistakes(cfg, message):
    with pytest.raises(ConfigError) as error:
        nnx.eval_shape(lambda: build(cfg, rngs=nnx.Rngs(0)))
    assert message in str(error.value)


def test_mixer_takes_images_of_one_size():
    with pytest.raises(ValueError, match=r"images of \(32, 32\) pixels, so it cannot take \(64, 64\)"):
        made(CASES["MlpMixer"].config, training=False)(images(64))


def test_scanned_layers_give_the_same():
    model = made(CASES["MlpMixer"].config | dict(drop_path_rate=0.3), training=True)
    x = images(32)
    value, grads, _ = loss_grads(model, x)
    model.scan_layers = True
    again, same, _ = loss_grads(model, x)
    assert_close(again, value, 1e-5)
    scale = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(grads))
    for a, b in zip(jax.tree.leaves(same), jax.tree.leaves(grads), strict=True):
        assert np.abs(np.asarray(a) - np.asarray(b)).max() <= 1e-5 * scale


def test_scanned_blocks_give_the_same():
    model = made(CONVNEXT, training=False)
    (plain,) = call(model, images(32))
    model.scan_layers = True
    assert_close(call(model, images(32))[0], plain, 1e-5)


# --- ConvNeXt --------------------------------------------------------------------------------------------------------


def test_grn_by_its_formula():
    """And at first it changes nothing; a dead channel has a gradient."""
    x = np.random.default_rng(0).standard_normal((2, 3, 4, 5)).astype(np.float32)
    x[..., 2] = 0
    layer = GRN(5)
    np.testing.assert_array_equal(layer(x), x)
    layer.gamma[...], layer.beta[...] = jnp.arange(5.0), jnp.ones(5)
    norm = np.linalg.norm(x.reshape(2, 12, 5), axis=1)[:, None, None]
    wanted = np.arange(5) * x * norm / (norm.mean(-1, keepdims=True) + 1e-6) + 1 + x
    assert_close(layer(x), wanted, 1e-6)
    assert np.isfinite(jax.grad(lambda x: layer(x).sum())(jnp.asarray(x))).all()


def test_maps_or_averages():
    """`gap_before_final_norm` averages before the norm."""
    maps = made(CONVNEXT | dict(gap_before_final_norm=False), training=False)
    (features,) = call(maps, images(32))
    assert features.shape == (4, 4, 4, 4)
    maps.gap_before_final_norm = True
    (averages,) = call(maps, images(32))
    assert averages.shape == (4, 4) and np.abs(averages - features.mean((1, 2))).max() > 1e-3


def test_initial_weights():
    model = drawn(**CONVNEXT, layer_scale_init_value=0.5)
    model.init_weights(nnx.Rngs(0))
    block = model.stages[0][0]
    assert 0.015 < float(block.pointwise_conv1.kernel[...].std()) < 0.025
    assert not block.depthwise_conv.bias[...].any() and (block.gamma[...] == 0.5).all()


# --- HorNet ----------------------------------------------------------------------------------------------------------


def test_spectra_are_stretched_to_their_corners():
    """Linear interpolation with both ends in place (PyTorch's align_corners)."""
    values = np.array([1.0, 3.0, 2.0])
    np.testing.assert_allclose(_stretch(3, 5) @ values, [1, 2, 3, 2.5, 2])
    np.testing.assert_allclose(_stretch(3, 2) @ values, [1, 2])
    np.testing.assert_allclose(_stretch(3, 1) @ values, [1])


def test_filters_are_for_the_maps_of_their_images():
    """14x14 and 7x7 maps of 224 pixels, 24x24 of 384; the last of 384 pixels, 12x12, is not what the release has."""
    for name, wanted in (("base-gf", [(14, 8), (7, 4)]), ("base-gf384", [(24, 12), (13, 7)])):
        cfgs = next(size for names, size in HorNet.archs.items() if name in names)["dw_cfg"]
        assert [(cfg["h"], cfg["w"]) for cfg in cfgs[2:]] == wanted


# --- VAN -------------------------------------------------------------------------------------------------------------


def test_large_kernel_reaches_21_pixels():
    cfg = dict(type="VAN", arch=dict(embed_dims=[4], depths=[1], ffn_ratios=[1]), out_indices=0)
    attention = made(cfg, training=False).blocks1[0].attn.spatial_gating_unit
    kernel = lambda x: attention.DW_D_conv(attention.DW_conv(x))  # noqa: E731
    x = jnp.zeros((1, 41, 41, 4))
    spread = np.abs(np.asarray(kernel(x.at[0, 20, 20].set(1)) - kernel(x))).sum(-1)[0] > 1e-6
    rows = np.flatnonzero(spread.any(1))
    assert (rows.min(), rows.max()) == (
        20 - 11,
        20 + 11,
    )  # 5x5 and 7x7 with holes of 3 pixels: 23, for the 21 asked for


def test_norm_eval_keeps_statistics():
    model = made(CASES["VAN"].config | dict(norm_eval=True), training=True)
    before = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
    _, _, after = loss_grads(model, images(32))
    after = dict(jax.tree_util.tree_leaves_with_path(after))
    for path, leaf in jax.tree_util.tree_leaves_with_path(before):
        np.testing.assert_array_equal(after[path], leaf)


# --- XCiT ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("out_type", "shapes"),
    [
        ("raw", [(4, 16, 16), (4, 17, 16)]),
        ("featmap", [(4, 4, 4, 16), (4, 4, 4, 16)]),
        ("avg_featmap", [(4, 16), (4, 16)]),
    ],
)
def test_outputs_of_xcit(out_type, shapes):
    model = made(CASES["XCiT"].config | dict(out_type=out_type, out_indices=(0, -1)), training=False)
    assert [out.shape for out in call(model, images(32))] == shapes


def test_channels_attend_to_channels():
    model = made(CASES["XCiT"].config, training=False)
    found = jax.jit(lambda x: intermediates(model, x, names="*.weights")[1])(images(32))
    assert len(found) == 4
    for name, value in found.items():
        assert value.shape == ((4, 2, 8, 8) if name.startswith("xca_layers") else (4, 2, 1, 17))
        np.testing.assert_allclose(np.asarray(value).sum(-1), 1, atol=1e-5)


@pytest.mark.parametrize(("frozen_stages", "learns"), [(0, 6), (3, 2), (4, 0)])
def test_frozen_parts_of_xcit(frozen_stages, learns):
    """The patch embedding, so many layers of both kinds, the class token with the first that has it, all and the norm."""
    model = made(CASES["XCiT"].config | dict(frozen_stages=frozen_stages), training=True)
    parts = [model.cls_token, *(layer.gamma1 for layer in (*model.xca_layers, *model.ca_layers)), model.norm.scale]
    assert sum(isinstance(part, nnx.Param) for part in parts) == learns
    assert isinstance(model.patch_embed.proj[0].conv.kernel, Frozen)
    assert isinstance(model.pos_embed.token_projection.conv.kernel, Frozen)
