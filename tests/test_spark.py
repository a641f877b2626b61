"""SparK: the reference's numbers, what is hidden is not seen, loss, reconstruction, and files of the release."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxpretrain.build import ConfigError, abstract
from jaxpretrain.interop import export, load_weights, mmpretrain
from jaxpretrain.methods.spark import SparK, SparKLightDecoder
from jaxpretrain.models.layers.conv import ConvTranspose2d
from jaxpretrain.models.layers.norm import BatchNorm, build_norm
from jaxpretrain.models.layers.sparse import draw_visible, hide, visible_at, visible_mean
from tests.method_cases.spark import CASES
from tests.parity import (
    assert_summary,
    build_by_reference,
    load_golden,
    loss_and_grads,
    reference_gradient_errors,
    reference_input,
)

CASE = CASES["spark"]


@pytest.fixture(scope="module")
def method() -> SparK:
    return CASE.make()


def noise(batch: int, places: int) -> jax.Array:
    return jax.random.uniform(jax.random.key(3), (batch, places))


def check_golden(golden: dict, loss_error: float, gradient_error: float) -> SparK:
    method = build_by_reference(golden["model_cfg"], golden["manifest"])
    state = mmpretrain.to_state_dict(method)
    assert len(state) == golden["n_keys"]
    assert mmpretrain.num_parameters(method) == golden["n_params"]
    assert {row[0]: tuple(row[1]) for row in golden["manifest"]} == {name: x.shape for name, x in state.items()}
    method.set_attributes(drop_path_rate=0.0, raise_if_not_found=False)
    ssl = golden["ssl"]
    drawn = np.random.Generator(np.random.PCG64(1000)).random(ssl["random_calls"][0][1]).astype(np.float32)
    images = reference_input(tuple(golden["input_shape"]))
    loss, grads = loss_and_grads(method, dict(image=images, noise=drawn))
    assert loss == pytest.approx(ssl["total"], rel=loss_error)
    assert len(jax.tree.leaves(grads)) == ssl["n_grad_params"]
    assert reference_gradient_errors(grads, ssl) < gradient_error
    return method


@pytest.mark.slow
def test_golden_resnet50():
    # Two images leave 40 numbers per channel in the last norms, which so magnify rounding: float32 gradients of the
    # reference itself move by 1e-2 from run to run. Those of the tiny networks below are exact.
    check_golden(load_golden("spark_sparse-resnet50_800e_in1k"), 1e-5, 5e-2)


@pytest.mark.parametrize(
    ("name", "gradient_error"),
    [
        ("v2", 1e-5),
        # Our float32 against float64, through 34 BatchNorms.
        pytest.param("resnet", 1e-4, marks=pytest.mark.slow),
        pytest.param("v2_convolutions", 1e-5, marks=pytest.mark.slow),
        pytest.param("v1", 1e-5, marks=pytest.mark.slow),
    ],
)
def test_golden_tiny(name, gradient_error):
    """Networks that MMPretrain ran in float64: ConvNeXt V2, with 1x1 convolutions for linear layers too, V1; ResNet-18."""
    golden = load_golden("spark_tiny")[name]
    method = check_golden(golden, 1e-6, gradient_error)
    images = reference_input(tuple(golden["input_shape"]))
    shape = golden["ssl"]["random_calls"][0][1]
    visible = method.mask(images, np.random.Generator(np.random.PCG64(1000)).random(shape))
    maps = jax.jit(lambda m, *args: m(*args))(method.backbone, images, visible)
    for ours, summary in zip(maps, golden["backbone"], strict=True):
        assert_summary(ours, summary)


@pytest.mark.parametrize("name", ["spark", "spark_convnext"])
def test_what_is_hidden_is_neither_seen_nor_filled(name):
    case = CASES[name]
    method = case.make()
    images = case.batch()["image"]
    ratio = method.downsample_raito
    visible = method.mask(images, noise(8, (16 // ratio) ** 2))
    shown = visible_at(visible, 16, 16)[..., None]
    backbone = jax.jit(lambda m, x, visible: m(x, visible))  # None for `visible` is another program
    maps = backbone(method.backbone, images, visible)
    for x, y in zip(maps, backbone(method.backbone, jnp.where(shown, images, 9.0), visible), strict=True):
        np.testing.assert_array_equal(x, y)
        assert (hide(x, ~visible) == 0).all() and (hide(x, visible) != 0).any()
    # All visible: the same as without a mask.
    whole = backbone(method.backbone, images, jnp.ones_like(visible))
    for x, y in zip(whole, backbone(method.backbone, images, None), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5 * np.abs(y).max())


def test_batch_norm_counts_what_is_visible():
    x = np.random.default_rng(0).standard_normal((4, 6, 6, 3)) * 2 + 1
    visible = np.asarray(draw_visible(noise(4, 9), 4, (3, 3)))
    shown = np.kron(visible, np.ones((1, 2, 2))) > 0
    for groups in (1, 2):
        norm = BatchNorm(3, groups=groups)
        y = np.asarray(norm(jnp.asarray(x, jnp.float32), jnp.asarray(shown)))
        mean, var = [], []
        for part in np.split(np.arange(4), groups):
            values = x[part][shown[part]]
            wanted = (values - values.mean(axis=0)) / np.sqrt(values.var(axis=0) + 1e-5)
            np.testing.assert_allclose(y[part][shown[part]], wanted, atol=1e-5)
            mean.append(values.mean(axis=0))
            var.append(values.var(axis=0, ddof=1))
        assert (y[~shown] == 0).all()
        np.testing.assert_allclose(norm.mean[...], 0.1 * np.mean(mean, axis=0), atol=1e-6)
        np.testing.assert_allclose(norm.var[...], 0.9 + 0.1 * np.mean(var, axis=0), atol=1e-5)
    norm.eval()
    assert (np.asarray(norm(jnp.ones((4, 6, 6, 3)), jnp.asarray(shown)))[~shown] == 0).all()


def test_sparse_norms_have_names():
    assert isinstance(build_norm(dict(type="SparseBatchNorm2d", groups=2), 4, rngs=nnx.Rngs(0)), BatchNorm)
    with pytest.raises(ConfigError, match="SparseSyncBatchNorm2d normalises the whole batch at once"):
        build_norm(dict(type="SparseSyncBatchNorm2d", groups=2), 4, rngs=nnx.Rngs(0))


def test_masks():
    visible = draw_visible(jnp.asarray([[0.3, 0.1, 0.9, 0.2, 0.5, 0.7]]), 2, (2, 3))
    np.testing.assert_array_equal(visible, [[[False, True, False], [True, False, False]]])
    x = jnp.arange(24.0).reshape(1, 4, 6, 1)
    np.testing.assert_allclose(visible_mean(x, visible), np.mean([2, 3, 8, 9, 12, 13, 18, 19]))
    with pytest.raises(ValueError, match="2x3 patches do not divide a map of 4x4 positions"):
        visible_at(visible, 4, 4)


def test_transposed_convolution_is_the_transpose():
    """<conv(y), x> = <y, transpose(x)>, by a loop over all pixels."""
    layer = ConvTranspose2d(2, 3, 4, 2, 1, bias=False, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).standard_normal((1, 3, 2, 2)).astype(np.float32)
    kernel, out = np.asarray(layer.kernel[...]), np.zeros((8, 6, 3))
    for row, column, i, j in np.ndindex(3, 2, 4, 4):
        out[2 * row + i, 2 * column + j] += kernel[i, j] @ x[0, row, column]
    np.testing.assert_allclose(layer(jnp.asarray(x))[0], out[1:-1, 1:-1], atol=1e-5)
    assert mmpretrain.to_state_dict(layer)["weight"].shape == (2, 3, 4, 4)


def test_loss_by_hand(method):
    """The squared error over hidden patches, each normalised by its own mean and variance."""
    batch = CASE.batch() | dict(noise=noise(8, 4))
    visible = np.asarray(draw_visible(batch["noise"], 2, (2, 2)))
    prediction, _ = jax.jit(lambda m, *args: m.predict(*args))(method, batch["image"], visible)
    errors = []
    for b, row, column in zip(*np.nonzero(~visible), strict=True):
        window = np.s_[b, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
        target = np.asarray(batch["image"][window], np.float64)
        target = (target - target.mean()) / np.sqrt(target.var(ddof=1) + 1e-6)
        errors.append(np.mean((np.asarray(prediction[window]) - target) ** 2))
    assert len(errors) == 16
    loss, _ = jax.jit(lambda m, batch: m.loss(batch))(method, batch)
    assert loss == pytest.approx(np.mean(errors), rel=1e-4)


def test_reconstruct(method):
    images = CASE.batch()["image"]
    reconstruct = jax.jit(lambda m, images: m.reconstruct(images, noise=noise(8, 4)))
    assert all(
        x.dtype == jnp.float32 for x in jax.eval_shape(reconstruct, method, images.astype(jnp.bfloat16)).values()
    )
    made = reconstruct(method, images)
    hidden = np.asarray(made["mask"])
    assert (hidden.reshape(8, -1).mean(axis=1) == 0.5).all(), "2 of 4: the nearest to 60 %"
    np.testing.assert_array_equal(made["masked"], np.where(hidden > 0, 0, images))
    np.testing.assert_array_equal(made["pasted"], np.where(hidden > 0, made["reconstructed"], images))
    # True patches lend mean and deviation: a perfect prediction gives the images.
    head = method.head
    perfect = head.unpatchify(head.construct_target(images), 16, 16)
    np.testing.assert_allclose(head.true_colours(perfect, images), images, atol=1e-4)
    with pytest.raises(ValueError, match="call it with rngs"):
        method.reconstruct(images)


def test_features(method):
    images = CASE.batch()["image"]
    method.eval()
    feature_map, features = jax.jit(lambda m, x: (m.extract_feat(x)[-1], m.features(x)))(method, images)
    assert feature_map.shape == (8, 2, 2, 16)
    np.testing.assert_allclose(features, feature_map.mean(axis=(1, 2)), atol=1e-6)
    method.train()


def test_initialisation(method):
    for token in method.mask_tokens:
        assert 0 < float(jnp.abs(token[...]).max()) <= 0.02
    upsample = method.neck.decoder[0].upsample.kernel[...]
    assert float(upsample.std()) == pytest.approx((2 / (16 * 32)) ** 0.5, rel=0.1)


def test_a_projection_is_left_out_where_it_does_nothing():
    config = CASE.config | dict(neck=CASE.config["neck"] | dict(feature_dim=16))
    method = abstract(config)
    assert method.enc_dec_projectors[0] is None
    names = mmpretrain.shapes(method)
    assert "enc_dec_projectors.0.weight" not in names and names["enc_dec_projectors.1.weight"] == (8, 8, 3, 3)


def release_name(name: str) -> str:
    """What keyu-tian's code calls a variable of MMPretrain's, written down from its modules."""
    for ours, theirs in (
        (r"^backbone\.", "sparse_encoder.sp_cnn."),
        (r"^enc_dec_norms", "densify_norms"),
        (r"^enc_dec_projectors", "densify_projs"),
        (r"^neck\.decoder\.(\d+)\.upsample", r"dense_decoder.dec.\1.up_sample"),
        (r"^neck\.decoder\.(\d+)\.conv_blocks\.0\.conv1", r"dense_decoder.dec.\1.conv.0"),
        (r"^neck\.decoder\.(\d+)\.conv_blocks\.0\.norm1", r"dense_decoder.dec.\1.conv.1"),
        (r"^neck\.decoder\.(\d+)\.conv_blocks\.0\.conv2", r"dense_decoder.dec.\1.conv.3"),
        (r"^neck\.decoder\.(\d+)\.conv_blocks\.0\.norm2", r"dense_decoder.dec.\1.conv.4"),
        (r"^neck\.proj", "dense_decoder.proj"),
        (r"depthwise_conv", "dwconv"),
        (r"pointwise_conv", "pwconv"),
    ):
        name = re.sub(ours, theirs, name)
    return name


@pytest.mark.parametrize("version", ["resnet", "convnext"])
def test_files_of_the_release(version):
    """A checkpoint of its training, both ways, and the encoder of one. (Its ConvNeXt is version 1.)"""
    config = CASES["spark"].config
    if version == "convnext":
        config = CASES["spark_convnext"].config
        config = config | dict(backbone=config["backbone"] | dict(use_grn=False, layer_scale_init_value=1e-6))
    method = abstract(config)
    rng = np.random.default_rng(0)
    state = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in mmpretrain.shapes(method).items()}
    state |= {name: np.asarray(7, np.int64) for name in state if name.endswith("num_batches_tracked")}
    file = {release_name(name): array for name, array in state.items()}
    file |= dict(imn_m=np.zeros((1, 3, 1, 1)), norm_black=np.zeros((1, 3, 16, 16)))
    report = load_weights(method, file)
    assert report.layout == "spark" and sorted(report.ignored) == ["imn_m", "norm_black"]
    assert_equal(mmpretrain.to_state_dict(method), state)
    assert_equal(export(method, "spark"), {name: file[name] for name in file.keys() - {"imn_m", "norm_black"}})
    encoder = abstract(config["backbone"])
    assert load_weights(encoder, file).layout == "spark"
    own = {name.removeprefix("backbone."): array for name, array in state.items() if name.startswith("backbone.")}
    assert_equal(mmpretrain.to_state_dict(encoder), own)


def assert_equal(ours, wanted):
    assert ours.keys() == wanted.keys()
    for name, array in ours.items():
        np.testing.assert_array_equal(array, wanted[name], name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(mask_ratio=1.0), "mask_ratio=1.0 must be between 0 and 1"),
        (dict(downsample_raito=16), "neck.upsample_ratio=8 is not downsample_raito=16"),
        (dict(head=CASE.config["head"] | dict(patch_size=4)), "head.patch_size=4 is not downsample_raito=8"),
        (dict(neck=dict(type="SparKLightDecoder", feature_dim=8, upsample_ratio=12)), "12 is no power of 2"),
        (dict(backbone=dict(type="SparseConvNeXt", arch="atto")), "give the backbone gap_before_output=False"),
    ],
)
def test_parts_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        abstract(CASE.config | change)


def test_sizes_that_do_not_fit_are_refused(method):
    with pytest.raises(ValueError, match="SparK: images of 12x12 px do not divide into patches of 8"):
        method.loss(dict(image=jnp.zeros((2, 12, 12, 3))), rngs=nnx.Rngs(0))
    with pytest.raises(ConfigError, match="kernel_size=3 must be scale_factor=2, or an even number more"):
        SparKLightDecoder(8, 4, kernel_size=3, rngs=nnx.Rngs(0))
