"""MixMIM: the reference's numbers, and what mixing means."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxpretrain.build import ConfigError, build
from jaxpretrain.interop import mmpretrain as hub
from tests.method_cases.base import make
from tests.method_cases.hierarchical import CONFIGS
from tests.parity import (
    assert_summary,
    build_by_reference,
    load_golden,
    loss_and_grads,
    reference_gradient_errors,
    reference_input,
)

CONFIG = CONFIGS["mixmim"]


@pytest.fixture(scope="module")
def method():
    return make(CONFIG)


@pytest.fixture(scope="module")
def images() -> jax.Array:
    return jax.random.normal(jax.random.key(3), (4, 16, 16, 3))


@pytest.fixture(scope="module")
def noise() -> jax.Array:
    return jax.random.uniform(jax.random.key(1), (4, 4))


@pytest.mark.slow
def test_golden():
    golden = load_golden("mixmim_mixmim-base_16xb128-coslr-300e_in1k")
    method = build_by_reference(golden["model_cfg"], golden["manifest"])
    method.set_attributes(scan_layers=True, raise_if_not_found=False)  # compiles in a third of the time
    assert hub.num_parameters(method) == golden["n_params"]
    assert len(hub.names(method)) + len(hub.derived(method)) == golden["n_keys"]

    ssl, stages = golden["ssl"], golden["ssl"]["stages"]
    images = reference_input(golden["input_shape"])
    noise = np.random.Generator(np.random.PCG64(1001)).random((7, 7)).astype(np.float32)
    loss, grads = loss_and_grads(method, dict(image=images, noise=noise))
    assert loss == pytest.approx(ssl["total"], rel=1e-5)
    assert len(jax.tree.leaves(grads)) == ssl["n_grad_params"]
    assert reference_gradient_errors(grads, ssl) < 1e-4

    @nnx.jit
    def forward(method, images):
        latent, mask = method.backbone(images, noise=noise)
        return latent, mask, method.neck(latent, mask), method.features(images)

    latent, mask, pred, features = forward(method, images)
    assert_summary(latent.reshape(2, 49, -1), stages["backbone"][0][0])
    assert_summary(mask.reshape(1, 49, 1), stages["backbone"][0][1])
    assert_summary(pred, stages["neck"][0])
    assert_summary(features, golden["features"][0])


def test_masks_are_alike_at_all_strides(method, noise):
    masks = method.backbone.random_masks((4, 4), noise, None)
    assert [mask.shape for mask in masks] == [(8, 8), (4, 4)]
    np.testing.assert_array_equal(masks[0], masks[1].repeat(2, axis=0).repeat(2, axis=1))
    assert masks[1].sum() == 8
    assert (noise[masks[1] == 1].max() < noise[masks[1] == 0]).all(), "the smallest noise is the other image's"


def test_ratio_with_a_range():
    backbone = build(CONFIG["backbone"] | dict(mask_ratio=0.25, range_mask_ratio=0.5), rngs=nnx.Rngs(0))
    counts = {int(backbone.random_masks((4, 4), None, nnx.Rngs(seed))[-1].sum()) for seed in range(20)}
    assert len(counts) > 3
    assert min(counts) >= 4 and max(counts) < 12


def test_images_of_a_mixture_do_not_see_each_other(method, images, noise):
    """An image's own features depend on its own patches alone, although they share windows with others'."""
    latent, mask = method.backbone(images, noise=noise)
    other, _ = method.backbone(images.at[3].add(1.0), noise=noise)  # image 3 is mixed into image 0
    np.testing.assert_allclose(other[0][mask == 0], latent[0][mask == 0], atol=1e-5)
    assert (jnp.abs(other[0] - latent[0])[mask == 1].max(axis=-1) > 1e-4).all()
    np.testing.assert_allclose(other[1:3], latent[1:3], atol=1e-5)


def test_loss_by_hand(method, images, noise):
    loss, metrics = method.loss({"image": images, "noise": noise})
    assert metrics.keys() == {"feature_std"}
    latent, mask = method.backbone(images, noise=noise)
    pred = np.asarray(method.neck(latent, mask), np.float64)
    target = np.asarray(method.head.construct_target(images), np.float64)
    assert pred.shape == (8, 16, 48)
    hidden, errors = np.asarray(mask).reshape(-1) > 0, []
    for i in range(4):
        errors.append(np.square(pred[i] - target[i])[hidden])  # from its own mixture
        errors.append(np.square(pred[4 + 3 - i] - target[i])[~hidden])  # from the one it was mixed into
    assert float(loss) == pytest.approx(np.concatenate(errors).mean(), rel=1e-5)


def test_decoder_sees_one_image_at_a_time(method, images, noise):
    latent, mask = method.backbone(images, noise=noise)
    pred = method.neck(latent, mask)
    other = jnp.where(mask[None, :, :, None] > 0, latent + 1, latent)
    again = method.neck(other, mask)
    np.testing.assert_array_equal(pred[:4], again[:4])
    assert jnp.abs(pred[4:] - again[4:]).max() > 1e-3


def test_reconstruct(method, images, noise):
    made = method.reconstruct(images, noise=noise)
    hidden = made["mask"]
    assert hidden.mean() == 0.5
    np.testing.assert_array_equal(made["masked"], images * (1 - hidden))
    np.testing.assert_array_equal(made["mixed"], jnp.where(hidden > 0, images[::-1], images))
    np.testing.assert_array_equal(made["pasted"], jnp.where(hidden > 0, made["reconstructed"], images))


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("neck", dict(num_patches=49), r"neck.num_patches \(7, 7\) is not the backbone's last map \(4, 4\)"),
        ("neck", dict(embed_dim=1024), "neck.embed_dim 1024 is not the backbone's channels 16"),
        ("neck", dict(encoder_stride=32), "neck.encoder_stride 32 is not the backbone's 4"),
        ("backbone", dict(mask_ratio=0.9, range_mask_ratio=0.2), "must be between 0 and 1"),
        ("backbone", dict(window_size=[4]), "give one for each stage"),
    ],
)
def test_parts_that_do_not_fit_are_refused(part, change, message):
    with pytest.raises(ConfigError, match=message):
        build(CONFIG | {part: CONFIG[part] | change}, rngs=nnx.Rngs(0))


def test_sizes_that_do_not_fit_are_refused(method):
    with pytest.raises(ValueError, match="do not divide into squares of 4"):
        method.backbone(jnp.zeros((2, 18, 16, 3)), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="is for maps of 4x4, and got 8x8"):
        method.loss({"image": jnp.zeros((2, 32, 32, 3))}, rngs=nnx.Rngs(0))
