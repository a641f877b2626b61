"""iTPN and MAE on HiViT: the reference's numbers, and what is special about encoders with stages."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from jaxpretrain.build import ConfigError, build
from jaxpretrain.interop import mmpretrain as hub
from jaxpretrain.methods.itpn import iTPNClipHead
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

GOLDEN = dict(
    mae="mae_hivit-base-p16_8xb512-amp-coslr-400e_in1k",
    pixel="itpn-pixel_hivit-base-p16_8xb512-amp-coslr-800e_in1k",
    clip="itpn-clip-b_hivit-base-p16_8xb256-amp-coslr-800e_in1k",
)


@pytest.fixture(scope="module")
def images() -> jax.Array:
    return jax.random.normal(jax.random.key(3), (2, 16, 16, 3))


def uniform(seed: int, *shape: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64(seed)).random(shape)


def as_mmpretrain_resamples(table: jax.Array) -> np.ndarray:
    """The positions [1, N, C] of visible patches in MMPretrain 1.2, which takes a masked image for one of another size: it
    resamples the table to its own grid, with 0.1 added to the grid's edge as for other sizes. Values move by up to 4e-4."""
    edge = math.isqrt(table.shape[1])
    grid = torch.from_numpy(np.asarray(table).reshape(1, edge, edge, -1).transpose(0, 3, 1, 2).copy())
    moved = torch.nn.functional.interpolate(grid, scale_factor=(edge + 0.1) / edge, mode="bicubic")
    return moved.numpy().transpose(0, 2, 3, 1).reshape(table.shape)


@pytest.mark.slow
@pytest.mark.parametrize("kind", GOLDEN)
def test_golden(kind):
    golden = load_golden(GOLDEN[kind])
    method = build_by_reference(golden["model_cfg"], golden["manifest"])
    method.set_attributes(scan_layers=True, raise_if_not_found=False)  # compiles in a third of the time
    method.set_attributes(drop_path_rate=0.0, raise_if_not_found=False)
    assert hub.num_parameters(method) == golden["n_params"]
    assert len(hub.names(method)) + len(hub.derived(method)) == golden["n_keys"]

    images, batch = reference_input(golden["input_shape"]), {}
    positions = method.backbone.pos_embed[...]
    if kind == "clip":
        order = np.stack([np.argsort(uniform(2000 + b, 196), kind="stable").argsort() for b in range(2)])
        batch = dict(image=(images, reference_input(golden["input_shape"], seed=1)))
        batch["mask"] = (order < 75).astype(np.int32).reshape(2, 14, 14)
    else:
        batch = dict(image=images, noise=uniform(1000, 2, 196).astype(np.float32))
        method.backbone.pos_embed.set_value(as_mmpretrain_resamples(positions))
    ssl, stages = golden["ssl"], golden["ssl"]["stages"]
    loss, grads = loss_and_grads(method, batch)
    assert loss == pytest.approx(ssl["total"], rel=1e-5)
    assert len(jax.tree.leaves(grads)) == ssl["n_grad_params"]
    assert reference_gradient_errors(grads, ssl) < 1e-4

    @nnx.jit
    def forward(method, images, batch):
        if kind == "clip":
            outputs = method.backbone(images, batch["mask"])
            pred = method.neck(outputs)
        else:
            outputs = method.backbone(images, noise=batch["noise"])
            pred = method.neck(outputs[0], outputs[2])
        method.backbone.pos_embed.set_value(positions)
        return outputs, pred, method.backbone(images, mask=None)

    outputs, pred, features = forward(method, images, batch)
    summaries = jax.tree.leaves(stages["backbone"][0], is_leaf=lambda node: isinstance(node, dict))
    for ours, summary in zip(jax.tree.leaves(outputs), summaries, strict=True):
        assert_summary(ours, summary)
    assert_summary(pred, stages["neck"][0])
    assert_summary(features[-1], golden["features"][0])


@pytest.mark.parametrize("name", ["mae_hivit", "itpn"])
def test_visible_patches_are_encoded_without_the_others(name, images):
    method = make(CONFIGS[name])
    noise = jax.random.uniform(jax.random.key(1), (2, 16))
    first, mask, _ = method.backbone(images, noise=noise)
    hidden = mask.reshape(2, 4, 4).repeat(4, axis=1).repeat(4, axis=2)[..., None]
    second, _, _ = method.backbone(images + hidden, noise=noise)
    for one, other in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        assert one.shape[:2] == (2, 4)
        np.testing.assert_array_equal(one, other)
    made = method.reconstruct(images, noise=noise)
    np.testing.assert_array_equal(made["mask"], hidden)
    np.testing.assert_array_equal(made["pasted"], jnp.where(hidden > 0, made["reconstructed"], images))


def test_without_masking_all_are_as_in_the_whole_image(images):
    backbone = make(CONFIGS["mae_hivit"]).backbone
    backbone.mask_ratio = 0.0
    latent, mask, ids_restore = backbone(images, rngs=nnx.Rngs(0))
    whole = backbone(images, mask=None)[-1].reshape(2, 16, 16)
    assert not mask.any()
    np.testing.assert_allclose(
        jnp.take_along_axis(latent, ids_restore[:, :, None], axis=1), whole, rtol=1e-4, atol=1e-5
    )


def test_decoder_with_and_without_class_token(images):
    """MMPretrain's decoder takes the first visible patch of a HiViT for a class token."""
    config = CONFIGS["mae_hivit"]
    right, theirs = make(config), make(config | dict(neck=config["neck"] | dict(with_cls_token=True)))
    assert right.neck.decoder_pos_embed.shape == (1, 16, 16)
    assert theirs.neck.decoder_pos_embed.shape == (1, 17, 16)
    for method in (right, theirs):
        latent, _, ids_restore = method.backbone(images, rngs=nnx.Rngs(0))
        assert method.neck(latent, ids_restore).shape == (2, 16, 48)


def test_clip_head_by_hand():
    head = iTPNClipHead(4, 3, loss=dict(type="CrossEntropyLoss"), rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    feats, target = rng.standard_normal((2, 4, 4)), rng.standard_normal((2, 4, 3))
    mask = np.array([[[1, 0], [0, 1]], [[0, 0], [1, 0]]])
    logits = feats @ np.asarray(head.cls_head.kernel[...]) + np.asarray(head.cls_head.bias[...])
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    wanted = -(target * logs).sum(-1)[mask.reshape(2, 4) > 0].mean()
    loss = head.loss(jnp.asarray(feats), jnp.asarray(target), jnp.asarray(mask))
    assert float(loss) == pytest.approx(wanted, rel=1e-5)


def test_clip_reconstruction(images):
    method = make(CONFIGS["itpn_clip"])
    made = method.reconstruct(images, rngs=nnx.Rngs(0))
    assert made["reconstructed"].shape == images.shape
    assert -1 <= made["agreement"] <= 1


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("itpn", dict(neck=dict(reconstruction_type="clip")), "neck.reconstruction_type='clip' is not the backbone's"),
        ("itpn", dict(neck=dict(embed_dim=32)), "neck.embed_dim=32 is not the backbone's width 16"),
        ("itpn", dict(neck=dict(num_outs=4)), "the pyramid has 2 or 3 levels"),
        ("itpn", dict(backbone=dict(reconstruction_type="pixels")), "Did you mean 'pixel'"),
        ("itpn", dict(backbone=dict(mask_ratio=1.0)), r"must be in \[0, 1\)"),
        ("itpn", dict(backbone=dict(inner_patches=2)), "3 stages merge 4 inner patches into one, not 2"),
        ("itpn_clip", dict(target_generator=None), "needs target_generator"),
    ],
)
def test_parts_that_do_not_fit_are_refused(name, change, message):
    config = dict(CONFIGS[name])
    for part, arguments in change.items():
        config[part] = arguments and config[part] | arguments
    with pytest.raises(ConfigError, match=message):
        build(config, rngs=nnx.Rngs(0))
