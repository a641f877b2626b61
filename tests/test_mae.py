"""MAE: masking, target, decoder, reconstruction, initialisation; and the reference's numbers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxpretrain.build import ConfigError, build
from jaxpretrain.methods.mae import MAE, MAEPretrainHead
from jaxpretrain.models.layers import Frozen
from jaxpretrain.models.layers.position import build_2d_sincos_position_embedding
from jaxpretrain.models.vision_transformer import TransformerEncoderLayer
from tests.parity import (
    assert_summary,
    build_by_reference,
    load_golden,
    loss_and_grads,
    reference_gradient_errors,
    reference_input,
)

ARCH = dict(embed_dims=16, num_layers=2, num_heads=2, feedforward_channels=32)
L2 = dict(type="PixelReconstructionLoss", criterion="L2")


def config() -> dict[str, Any]:
    """A tiny MAE: 16-pixel images in 16 patches of 4 pixels."""
    return dict(
        type="MAE",
        backbone=dict(type="MAEViT", arch=ARCH, img_size=16, patch_size=4),
        neck=dict(type="MAEPretrainDecoder", patch_size=4, decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2),
        head=dict(type="MAEPretrainHead", norm_pix=True, patch_size=4, loss=L2),
    )


@pytest.fixture(scope="module")
def method() -> MAE:
    method = build(config(), rngs=nnx.Rngs(0))
    method.init_weights(nnx.Rngs(1))
    return method


@pytest.fixture
def images():
    return jax.random.normal(jax.random.key(3), (2, 16, 16, 3))


def noise(seed: int = 0) -> jax.Array:
    return jax.random.uniform(jax.random.key(seed), (2, 16))


@pytest.mark.slow
def test_golden_vit_base():
    golden = load_golden("mae_vit-base-p16_8xb512-amp-coslr-300e_in1k")
    method = build_by_reference(golden["model_cfg"], golden["manifest"])
    method.set_attributes(scan_layers=True, raise_if_not_found=False)  # compiles in a third of the time
    weights = jax.tree.leaves(nnx.state(method, (nnx.Param, Frozen)))
    assert sum(x.size for x in weights) == golden["n_params"]

    ssl, stages = golden["ssl"], golden["ssl"]["stages"]
    images = reference_input(golden["input_shape"])
    noise = np.random.Generator(np.random.PCG64(1000)).random((2, 196)).astype(np.float32)
    loss, grads = loss_and_grads(method, dict(image=images, noise=noise))
    assert loss == pytest.approx(ssl["total"], rel=1e-6)
    assert len(jax.tree.leaves(grads)) == ssl["n_grad_params"]
    assert reference_gradient_errors(grads, ssl) < 1e-6

    @nnx.jit
    def forward(method, images):
        latent, mask, ids_restore = method.backbone(images, noise=noise)
        pred = method.neck(latent, ids_restore)
        return (latent, mask, ids_restore), pred, method.backbone(images, mask=None)

    outputs, pred, features = forward(method, images)
    for ours, summary in zip(outputs, stages["backbone"][0], strict=True):
        assert_summary(ours, summary)
    assert_summary(pred, stages["neck"][0])
    assert_summary(features[-1], golden["features"][0])


@pytest.mark.parametrize("name", ["mae_head_norm0", "mae_head_norm1"])
def test_golden_head(name):
    golden = load_golden("ssl_heads")
    case, inputs = golden["heads"][name], {key: jnp.asarray(x) for key, x in golden["inputs"].items()}
    images = inputs["img_target"].transpose(0, 2, 3, 1)
    head = MAEPretrainHead(L2, norm_pix=case["config"]["norm_pix"], patch_size=2)
    np.testing.assert_allclose(
        head.construct_target(images)[0], case["target_tokens_first_image"], rtol=1e-5, atol=1e-6
    )
    value, grad = jax.value_and_grad(head.loss)(inputs["tok_rec"], images, inputs["tok_mask"])
    assert value == pytest.approx(case["value"], rel=1e-6)
    assert jnp.linalg.norm(grad) == pytest.approx(case["grad"]["pred"]["norm"], rel=1e-6)
    np.testing.assert_allclose(grad.reshape(-1)[:8], case["grad"]["pred"]["first8"], atol=1e-7)


def test_patches_keep_rows_before_columns_before_channels(images):
    head = MAEPretrainHead(L2, patch_size=4)
    patches = head.patchify(images)
    np.testing.assert_array_equal(patches[1, 4 + 2], images[1, 4:8, 8:12].reshape(-1))
    np.testing.assert_array_equal(head.unpatchify(patches, 16, 16), images)
    tall = jnp.concatenate([images, images + 1], axis=1)
    np.testing.assert_array_equal(head.unpatchify(head.patchify(tall), 32, 16), tall)
    with pytest.raises(ValueError, match="18x16 px do not divide into patches of 4"):
        head.patchify(jnp.zeros((1, 18, 16, 3)))


def test_targets_are_normalised_by_the_unbiased_variance(images):
    target = MAEPretrainHead(L2, norm_pix=True, patch_size=4).construct_target(images)
    np.testing.assert_allclose(target.mean(-1), 0, atol=1e-6)
    np.testing.assert_allclose(target.std(-1, ddof=1), 1, rtol=1e-5)
    flat = MAEPretrainHead(L2, norm_pix=True, patch_size=4).construct_target(jnp.ones_like(images))
    np.testing.assert_array_equal(flat, 0)


def test_masking_keeps_the_smallest_noise(method):
    backbone = method.backbone
    tokens = jnp.arange(2 * 16 * 3.0).reshape(2, 16, 3)
    kept, mask, ids_restore = backbone.random_masking(tokens, noise())
    order = np.argsort(noise(), axis=1)
    np.testing.assert_array_equal(kept, np.take_along_axis(np.asarray(tokens), order[:, :4, None], axis=1))
    np.testing.assert_array_equal(mask.sum(axis=1), 12)
    np.testing.assert_array_equal(np.take_along_axis(np.asarray(mask), order[:, :4], axis=1), 0)
    np.testing.assert_array_equal(np.take_along_axis(order, np.asarray(ids_restore), axis=1), [np.arange(16)] * 2)


def test_masks_differ_between_images_and_keys(method, images):
    backbone = method.backbone
    masks = [backbone(images, rngs=nnx.Rngs(seed))[1] for seed in (0, 0, 1)]
    assert (masks[0] == masks[1]).all()
    assert (masks[0] != masks[2]).any()
    assert (masks[0][0] != masks[0][1]).any()
    with pytest.raises(ValueError, match="call it with rngs"):
        backbone(images)


def test_only_visible_tokens_enter_the_encoder(method, images, monkeypatch):
    shapes = []
    original = TransformerEncoderLayer.__call__
    monkeypatch.setattr(
        TransformerEncoderLayer,
        "__call__",
        lambda self, x, **kwargs: shapes.append(x.shape) or original(self, x, **kwargs),
    )
    method.loss({"image": images}, rngs=nnx.Rngs(0))
    assert shapes == [(2, 1 + 4, 16)] * 2 + [(2, 1 + 16, 16)]


def test_hidden_pixels_reach_the_target_only(method, images):
    first = method.reconstruct(images, noise=noise())
    changed = jnp.where(first["mask"] > 0, images + 1, images)  # norm_pix puts the brightness back
    second = method.reconstruct(changed, noise=noise())
    np.testing.assert_array_equal(first["mask"], second["mask"])
    np.testing.assert_allclose(second["reconstructed"], first["reconstructed"] + first["mask"], atol=1e-5)
    seen = method.reconstruct(images + (1 - first["mask"]) * images, noise=noise())
    assert jnp.abs(seen["pasted"] - first["pasted"]).max() > 0.1


@pytest.mark.parametrize("norm_pix", [False, True])
def test_reconstruct(method, images, norm_pix, monkeypatch):
    monkeypatch.setattr(method.head, "norm_pix", norm_pix)
    made = method.reconstruct(images.astype(jnp.bfloat16), noise=noise())
    assert {name: x.shape for name, x in made.items()} == dict(
        masked=(2, 16, 16, 3), reconstructed=(2, 16, 16, 3), pasted=(2, 16, 16, 3), mask=(2, 16, 16, 1)
    )
    assert all(x.dtype == jnp.float32 for x in made.values())

    made = method.reconstruct(images, noise=noise())
    hidden = made["mask"]
    assert hidden.mean() == 0.75
    np.testing.assert_array_equal(made["masked"], jnp.where(hidden > 0, 0, images))
    np.testing.assert_array_equal(made["pasted"], jnp.where(hidden > 0, made["reconstructed"], images))
    # With a perfect prediction, the picture is the image.
    target = method.head.construct_target(images)
    np.testing.assert_allclose(method.head.to_pixels(target, images), method.head.patchify(images), atol=1e-5)


def test_features_are_the_mean_of_patch_tokens(method, images):
    tokens = method.backbone(images, mask=None)[-1]
    assert tokens.shape == (2, 17, 16)
    np.testing.assert_allclose(method.features(images), tokens[:, 1:].mean(axis=1), atol=1e-6)
    assert method.features(images.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    assert not method.has_logits
    with pytest.raises(NotImplementedError, match="MAE learns without labels"):
        method.logits(images)


def test_initialisation():
    method = build(
        dict(
            config(),
            backbone=dict(type="MAEViT", arch=dict(ARCH, embed_dims=64), img_size=32, patch_size=4),
            neck=dict(
                type="MAEPretrainDecoder", patch_size=4, decoder_embed_dim=32, decoder_num_heads=2, decoder_depth=1
            ),
        ),
        rngs=nnx.Rngs(0),
    )
    method.init_weights(nnx.Rngs(1))
    backbone, neck = method.backbone, method.neck

    def is_glorot(kernel: jax.Array, fan_in: int, fan_out: int) -> bool:
        bound = (6 / (fan_in + fan_out)) ** 0.5
        return bool((abs(kernel) <= bound).all()) and float(kernel.std()) == pytest.approx(bound / 3**0.5, rel=0.05)

    assert is_glorot(backbone.patch_embed.projection.kernel[...], 48, 64)
    assert is_glorot(backbone.layers[0].attn.qkv.kernel[...], 64, 192)
    assert is_glorot(backbone.layers[1].ffn.fc1.kernel[...], 64, 32)
    assert is_glorot(neck.decoder_pred.kernel[...], 32, 48)
    np.testing.assert_array_equal(backbone.layers[0].attn.qkv.bias[...], 0)
    assert float(backbone.cls_token[...].std()) == pytest.approx(0.02, rel=0.3)
    assert float(neck.mask_token[...].std()) == pytest.approx(0.02, rel=0.4)
    np.testing.assert_array_equal(neck.ln1.scale[...], 1)
    for module, name, grid, width in ((backbone, "pos_embed", (8, 8), 64), (neck, "decoder_pos_embed", (8, 8), 32)):
        table = getattr(module, name)
        assert isinstance(table, Frozen)
        np.testing.assert_array_equal(table[...], build_2d_sincos_position_embedding(grid, width, cls_token=True))


def test_images_that_are_not_square(images):
    cfg = config()
    cfg["backbone"]["img_size"] = (16, 8)
    method: MAE = build(cfg, rngs=nnx.Rngs(0))
    assert method.neck.grid == (4, 2)
    assert method.reconstruct(images[:, :, :8], rngs=nnx.Rngs(0))["pasted"].shape == (2, 16, 8, 3)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("neck", dict(num_patches=49), r"neck.num_patches \(7, 7\) is not the backbone's patches \(4, 4\)"),
        ("neck", dict(num_patches=50), "num_patches=50 is no square"),
        ("neck", dict(embed_dim=1024), "neck.embed_dim 1024 is not the backbone's width 16"),
        ("neck", dict(patch_size=8), "neck's prediction 192 is not the head's pixels per patch 48"),
        ("head", dict(patch_size=8), "make backbone, neck and head agree"),
        ("backbone", dict(mask_ratio=1.0), r"mask_ratio=1.0 must be in \[0, 1\)"),
        ("backbone", dict(with_cls_token=False), "with_cls_token=False is not supported"),
        ("backbone", dict(mask_ration=0.5), "MAEViT has no argument 'mask_ration'. Did you mean 'mask_ratio'"),
    ],
)
def test_parts_that_do_not_fit_are_refused(part, change, message):
    cfg = config()
    cfg[part].update(change)
    with pytest.raises(ConfigError, match=message):
        build(cfg, rngs=nnx.Rngs(0))


def test_images_of_another_size_are_refused(method):
    with pytest.raises(ValueError, match="is for 4x4 patches, and got 64"):
        method.loss({"image": jnp.zeros((2, 32, 32, 3))}, rngs=nnx.Rngs(0))
