"""MaskFeat: histograms of gradients against NumPy and scikit-image's definition, masks; and the reference's numbers."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxpretrain.build import ConfigError, abstract, build
from jaxpretrain.interop import mmpretrain
from jaxpretrain.methods.maskfeat import HOGGenerator, MaskFeat
from tests.method_cases.masked import CASES
from tests.parity import (
    assert_summary,
    build_by_reference,
    load_golden,
    loss_and_grads,
    reference_gradient_errors,
    reference_input,
)

CASE = CASES["maskfeat"]


@pytest.fixture(scope="module")
def method() -> MaskFeat:
    return CASE.make()


def images_of(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@pytest.mark.slow
def test_golden_vit_base():
    golden = load_golden("maskfeat_vit-base-p16_8xb256-amp-coslr-300e_in1k")
    method = build_by_reference(golden["model_cfg"], golden["manifest"])
    state = mmpretrain.to_state_dict(method)
    assert {row[0]: tuple(row[1]) for row in golden["manifest"]} == {name: x.shape for name, x in state.items()}
    assert len(state) == golden["n_keys"]
    assert mmpretrain.num_parameters(method) == golden["n_params"]
    for row in golden["manifest"][-3:]:  # the generator's filters: mean, deviation and first values
        array = state[row[0]].astype(np.float64)
        assert array.mean() == pytest.approx(row[4][0], rel=1e-6, abs=1e-9)
        assert array.std() == pytest.approx(row[4][1], rel=1e-6)
        np.testing.assert_allclose(array.reshape(-1)[:4], row[4][2], rtol=1e-6)
    method.set_attributes(scan_layers=True, raise_if_not_found=False)  # compiles faster
    mask = np.zeros((2, 196), np.int32)
    for b in range(2):
        order = np.argsort(np.random.Generator(np.random.PCG64(2000 + b)).random(196), kind="stable")
        mask[b, order[:78]] = 1
    images, ssl = reference_input(golden["input_shape"]), golden["ssl"]
    loss, grads = loss_and_grads(method, dict(image=images, mask=mask.reshape(2, 14, 14)))
    assert loss == pytest.approx(ssl["total"], rel=1e-6)
    assert len(jax.tree.leaves(grads)) == ssl["n_grad_params"]
    assert reference_gradient_errors(grads, ssl) < 1e-4
    method.eval()
    assert_summary(jax.jit(lambda m, x: m.extract_feat(x)[-1])(method, images), golden["features"][0])


def hog_by_hand(images: np.ndarray, nbins: int, pool: int, window: int) -> np.ndarray:
    """Pixel by pixel: [B, h, w, C, bins], in float64."""
    b, height, width, channels = images.shape
    padded = np.pad(images.astype(np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
    sobel = np.array([[1, 2, 1], [0, 0, 0], [-1, -2, -1]])
    histograms = np.zeros((b, height // pool, width // pool, channels, nbins))
    for n in range(b):
        for y in range(height):
            for x in range(width):
                for c in range(channels):
                    around = padded[n, y : y + 3, x : x + 3, c]
                    gy, gx = (around * sobel).sum(), (around * sobel.T).sum()
                    weight = 1.0
                    if window:
                        sigma, centre = window // 2, (window - 1) / 2
                        weight = math.exp(-((y % window - centre) ** 2 + (x % window - centre) ** 2) / (2 * sigma**2))
                    angle = math.atan2(gx, gy) % math.pi  # unsigned
                    k = min(int(angle / math.pi * nbins), nbins - 1)
                    histograms[n, y // pool, x // pool, c, k] += weight * math.hypot(gx, gy)
    return histograms / np.linalg.norm(histograms, axis=-1, keepdims=True)


@pytest.mark.parametrize(("nbins", "pool", "window", "shape"), [(9, 8, 16, (1, 32, 16, 3)), (5, 4, 0, (2, 8, 12, 3))])
def test_histograms_by_hand(nbins, pool, window, shape):
    images = images_of(*shape)
    ours = HOGGenerator(nbins, pool, window).histograms(images)
    np.testing.assert_allclose(ours, hog_by_hand(images, nbins, pool, window), atol=1e-5)
    np.testing.assert_allclose(jnp.linalg.norm(ours, axis=-1), 1, rtol=1e-5)


def test_histograms_do_not_see_contrast_and_brightness():
    images = images_of(1, 16, 16, 3)
    generator = HOGGenerator()
    np.testing.assert_allclose(generator(5 * images + 2, (1, 1)), generator(images, (1, 1)), atol=1e-5)
    np.testing.assert_array_equal(generator(jnp.ones((1, 16, 16, 3)), (1, 1)), 0)
    assert generator(jnp.ones((1, 16, 16, 3), jnp.bfloat16), (1, 1)).dtype == jnp.float32


def test_patches_hold_their_cells():
    """In the order (channel, bin, row, column); `to_cells` puts them back."""
    generator, images = HOGGenerator(nbins=5, pool=4, gaussian_window=8), images_of(2, 16, 24, 3)
    cells, patches = generator.histograms(images), generator(images, (2, 3))
    assert cells.shape == (2, 4, 6, 3, 5)
    assert patches.shape == (2, 6, 60)
    vector = patches[1, 4].reshape(3, 5, 2, 2)  # the patch in row 1, column 1
    np.testing.assert_array_equal(vector[2, 3], cells[1, 2:4, 2:4, 2, 3])
    np.testing.assert_array_equal(generator.to_cells(patches, (2, 3), (2, 2)), cells)


def test_strokes_follow_edges():
    """A vertical edge is drawn as vertical strokes, a diagonal one as diagonal."""
    assert HOGGenerator(pool=2).draw(jnp.ones((1, 3, 4, 3, 9))).shape == (1, 24, 32), "strokes need 8 pixels"
    generator = HOGGenerator(nbins=9, pool=8, gaussian_window=0)
    y, x = np.mgrid[:24, :24].astype(np.float32)

    def stroke(ramp):
        cells = generator.histograms(np.repeat(ramp[None, ..., None], 3, axis=-1))
        drawn = np.asarray(generator.draw(cells))[0]
        assert drawn.shape == (24, 24) and drawn.min() == 0 and drawn.max() == pytest.approx(1, abs=0.1)
        rows, columns = np.nonzero(drawn[8:16, 8:16] > 0.3)
        spread = np.cov(rows, columns)
        return spread[0, 0], spread[1, 1], spread[0, 1]

    down, across, _ = stroke(x)
    assert down > 4 * across
    down, across, _ = stroke(y)
    assert across > 4 * down
    for ramp, sign in ((x + y, -1), (x - y, 1)):  # constant along x + y: from bottom left to top right
        down, across, both = stroke(ramp)
        assert both * sign > 0.5 * math.sqrt(down * across)


def test_loss_by_hand(method):
    """The squared error over hidden patches' histograms."""
    batch = CASE.batch()
    prediction = np.asarray(method.predict(batch["image"], batch["mask"])[0], np.float64)
    histograms = hog_by_hand(np.asarray(batch["image"]), 9, 2, 4)
    errors = []
    for b in range(8):
        for row in range(4):
            for column in range(4):
                if batch["mask"][b, row, column]:
                    own = histograms[b, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
                    target = own.transpose(2, 3, 0, 1).reshape(-1)
                    errors.append(np.mean((prediction[b, 4 * row + column] - target) ** 2))
    assert len(errors) == 8 * 6
    assert method.loss(batch)[0] == pytest.approx(np.mean(errors), rel=1e-5)


def test_mask_tokens_take_the_place_of_hidden_patches(method):
    batch = CASE.batch()
    images, mask, backbone = batch["image"], batch["mask"], method.backbone
    hidden = np.kron(mask, np.ones((4, 4)))[..., None] > 0
    first = backbone(images, mask)
    assert first.shape == (8, 17, 16)
    np.testing.assert_array_equal(first, backbone(jnp.where(hidden, 9.0, images), mask), "hidden pixels are not seen")
    assert (first != backbone(jnp.where(hidden, images, 9.0), mask)).any()
    whole = backbone(images)[-1]
    np.testing.assert_allclose(backbone(images, jnp.zeros_like(mask)), whole, atol=1e-6)
    np.testing.assert_allclose(method.features(images), whole[:, 1:].mean(axis=1), atol=1e-6)
    blind = backbone(images, jnp.ones_like(mask))
    np.testing.assert_allclose(blind, jnp.broadcast_to(blind[:1], blind.shape), atol=1e-6)
    assert jnp.abs(blind[:, 1] - blind[:, 2]).max() > 1e-4, "positions are added after masking"


def test_targets_have_no_gradient(method):
    """Of the images: what changes the target alone does not reach the loss' gradient."""
    batch = CASE.batch()
    hidden = np.kron(batch["mask"], np.ones((4, 4)))[..., None] > 0
    gradient = jax.jit(jax.grad(lambda images: method.loss(batch | dict(image=images))[0]))(batch["image"])
    assert not jnp.where(hidden, gradient, 0).any()
    assert jnp.abs(gradient).max() > 0


def test_reconstruct(method):
    batch = CASE.batch()
    images, mask = batch["image"], batch["mask"]
    made = method.reconstruct(images, mask=mask)
    hidden = made["mask"]
    np.testing.assert_array_equal(hidden[..., 0], np.kron(mask, np.ones((4, 4))))
    np.testing.assert_array_equal(made["masked"], jnp.where(hidden > 0, 0, images))
    for name in ("target", "reconstructed"):
        assert made[name].shape == (8, 64, 64, 3)
        assert made[name].min() >= images.min() and made[name].max() <= images.max()
    assert jnp.abs(made["target"] - made["reconstructed"]).max() > 0.1
    assert made["hog_mse"] == pytest.approx(float(method.loss(batch)[0]), rel=1e-5)
    # Nothing hidden: the picture is that of the images' own histograms.
    shown = method.reconstruct(images, mask=jnp.zeros_like(mask))
    np.testing.assert_array_equal(shown["reconstructed"], shown["target"])
    assert (method.reconstruct(images, rngs=nnx.Rngs(0))["mask"].sum(axis=(1, 2, 3)) == 6 * 16).all()


def test_import_and_export(method):
    state = mmpretrain.to_state_dict(method)
    generator = {name: array for name, array in state.items() if name.startswith("target_generator")}
    assert {name: array.shape for name, array in generator.items()} == {
        "target_generator.weight_x": (3, 1, 3, 3),
        "target_generator.weight_y": (3, 1, 3, 3),
        "target_generator.gaussian_kernel": (4, 4),
    }
    other = build(CASE.config, rngs=nnx.Rngs(7))
    rest = {name: array for name, array in state.items() if name not in generator}
    mmpretrain.fill(other, mmpretrain.from_state_dict(other, rest))
    batch = CASE.batch()
    assert other.loss(batch)[0] == method.loss(batch)[0]


def test_initialisation():
    backbone = build(
        dict(
            type="MaskFeatViT",
            arch=dict(embed_dims=64, num_layers=1, num_heads=2, feedforward_channels=64),
            img_size=16,
            patch_size=4,
        ),
        rngs=nnx.Rngs(0),
    )
    backbone.init_weights(nnx.Rngs(1))
    for weight in (
        backbone.patch_embed.projection.kernel,
        backbone.layers[0].attn.qkv.kernel,
        backbone.layers[0].ffn.fc1.kernel,
        backbone.cls_token,
        backbone.mask_token,
        backbone.pos_embed,
    ):
        assert float(weight[...].std()) == pytest.approx(0.02, rel=0.35)
    np.testing.assert_array_equal(backbone.layers[0].ffn.fc1.bias[...], 0)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("neck", dict(out_channels=27), "neck.out_channels=27, but 2x2 cells of a patch have 108 numbers"),
        (
            "target_generator",
            dict(pool=3),
            r"target_generator.pool=3 does not divide the backbone's patch_size=\(4, 4\)",
        ),
        ("target_generator", dict(nbin=8), "HOGGenerator has no argument 'nbin'. Did you mean 'nbins'"),
        ("backbone", dict(with_cls_token=False), "with_cls_token=False and pre_norm=True are not supported"),
    ],
)
def test_parts_that_do_not_fit_are_refused(part, change, message):
    config: dict[str, Any] = CASE.config | {part: CASE.config[part] | change}
    with pytest.raises(ConfigError, match=message):
        abstract(config)


def test_sizes_that_do_not_fit_are_refused(method):
    with pytest.raises(ValueError, match="images of 20x20 px do not divide into windows of gaussian_window=16 px"):
        HOGGenerator(pool=4).histograms(jnp.zeros((1, 20, 20, 3)))
    with pytest.raises(ValueError, match="4x4 cells do not divide among 14x14 patches"):
        HOGGenerator()(jnp.zeros((1, 32, 32, 3)))
    with pytest.raises(ConfigError, match="BEiTMaskGenerator"):
        method.loss({"image": CASE.batch()["image"]})
