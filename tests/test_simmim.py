"""SimMIM: mask tokens, decoder, loss and reconstruction; and the reference's numbers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxpretrain.build import ConfigError, abstract, build
from jaxpretrain.interop import mmpretrain
from jaxpretrain.methods.masking import batch_mask, enlarge, random_mask
from jaxpretrain.methods.simmim import SimMIM, SimMIMHead, SimMIMLinearDecoder
from tests.method_cases.masked import CASES, L1
from tests.parity import (
    assert_summary,
    build_by_reference,
    load_golden,
    loss_and_grads,
    reference_gradient_errors,
    reference_input,
)

CASE = CASES["simmim"]


@pytest.fixture(scope="module")
def method() -> SimMIM:
    return CASE.make()


@pytest.mark.slow
def test_golden_swin_base():
    golden = load_golden("simmim_swin-base-w6_8xb256-amp-coslr-100e_in1k-192px")
    # The golden run had no drop path; the reference's default rate is 0.1.
    method = build_by_reference(golden["model_cfg"], golden["manifest"])
    state = mmpretrain.to_state_dict(method)
    assert len(state) == golden["n_keys"]
    assert mmpretrain.num_parameters(method) == golden["n_params"]
    assert {row[0]: tuple(row[1]) for row in golden["manifest"]} == {name: x.shape for name, x in state.items()}
    method.set_attributes(scan_layers=True, raise_if_not_found=False)  # compiles faster
    method.set_attributes(drop_path_rate=0.0, raise_if_not_found=False)

    squares = np.zeros((2, 36), np.int32)
    for b in range(2):
        order = np.argsort(np.random.Generator(np.random.PCG64(2000 + b)).random(36), kind="stable")
        squares[b, order[:22]] = 1
    mask = squares.reshape(2, 6, 6).repeat(8, axis=1).repeat(8, axis=2)
    images, ssl = reference_input(golden["input_shape"]), golden["ssl"]
    loss, grads = loss_and_grads(method, dict(image=images, mask=mask))
    assert loss == pytest.approx(ssl["total"], rel=1e-6)
    assert len(jax.tree.leaves(grads)) == ssl["n_grad_params"]
    assert reference_gradient_errors(grads, ssl) < 1e-4
    method.eval()
    assert_summary(jax.jit(lambda m, x: m.extract_feat(x)[-1])(method, images), golden["features"][0])


@pytest.mark.parametrize("name", ["simmim_swin-base-w6", "simmim_swin-large-w12"])
def test_counts_of_the_zoo(name):
    arch, window, channels, params = {
        "simmim_swin-base-w6": ("base", 6, 1024, 89_874_104),
        "simmim_swin-large-w12": ("large", 12, 1536, 199_920_372),
    }[name]
    method = abstract(
        dict(
            type="SimMIM",
            backbone=dict(
                type="SimMIMSwinTransformer",
                arch=arch,
                img_size=192,
                stage_cfgs=dict(block_cfgs=dict(window_size=window)),
                pad_small_map=arch == "large",
            ),
            neck=dict(type="SimMIMLinearDecoder", in_channels=channels, encoder_stride=32),
            head=dict(type="SimMIMHead", patch_size=4, loss=L1),
        )
    )
    assert mmpretrain.num_parameters(method) == params
    assert len(mmpretrain.shapes(method)) + len(mmpretrain.derived(method)) == 354


def test_import_and_export(method):
    state = mmpretrain.to_state_dict(method)
    assert state["neck.decoder.0.weight"].shape == (48, 16, 1, 1)
    other = build(CASE.config, rngs=nnx.Rngs(7))
    arrays = {name: array for name, array in state.items() if name not in mmpretrain.derived(method)}
    mmpretrain.fill(other, mmpretrain.from_state_dict(other, arrays))
    batch = CASE.batch()
    assert other.loss(batch)[0] == method.loss(batch)[0]


def test_loss_by_hand(method):
    """Equation 1 of the paper: the absolute error over hidden pixels, divided by their number."""
    batch = CASE.batch()
    prediction = method.neck(method.backbone(batch["image"], batch["mask"])[-1])
    total, count = 0.0, 0
    for image, pred, mask in zip(batch["image"], np.asarray(prediction, np.float64), batch["mask"], strict=True):
        for row in range(16):
            for column in range(16):
                if mask[row // 2, column // 2]:
                    total += np.abs(pred[row, column] - image[row, column]).sum()
                    count += 3
    assert method.loss(batch)[0] == pytest.approx(total / count, rel=1e-5)


def test_mask_tokens_take_the_place_of_hidden_patches(method):
    batch = CASE.batch()
    images, mask = batch["image"], batch["mask"]
    hidden = enlarge(mask, 16, 16)[..., None] > 0
    backbone = method.backbone
    np.testing.assert_array_equal(
        backbone(images, mask)[-1], backbone(jnp.where(hidden, 9.0, images), mask)[-1], "hidden pixels are not seen"
    )
    assert (backbone(images, mask)[-1] != backbone(jnp.where(hidden, images, 9.0), mask)[-1]).any()
    np.testing.assert_array_equal(backbone(images, jnp.zeros_like(mask))[-1], backbone(images)[-1])
    # All patches hidden: no image is seen, and so all are alike.
    blind = backbone(images, jnp.ones_like(mask))[-1]
    np.testing.assert_allclose(blind, jnp.broadcast_to(blind[:1], blind.shape), atol=1e-6)


def test_the_decoder_s_channels_are_pixels():
    """A vector becomes the square of pixels at its place: outputs are ordered by channel, row, column."""
    decoder = SimMIMLinearDecoder(12, 2, rngs=nnx.Rngs(0))
    decoder.decoder[0].kernel.set_value(jnp.eye(12)[None, None])
    decoder.decoder[0].bias.set_value(jnp.zeros(12))
    x = jnp.arange(2 * 3 * 12.0).reshape(1, 2, 3, 12)
    images = decoder(x)
    assert images.shape == (1, 4, 6, 3)
    for row, column, channel in [(0, 0, 0), (1, 0, 2), (2, 5, 1), (3, 4, 0)]:
        wanted = x[0, row // 2, column // 2, channel * 4 + (row % 2) * 2 + column % 2]
        assert images[0, row, column, channel] == wanted


def test_the_head_s_mask_is_of_patches():
    head = SimMIMHead(2, L1 | dict(channel=3))
    pred, target = jnp.zeros((1, 4, 4, 3)), jnp.ones((1, 4, 4, 3)).at[:, :2, 2:].set(5.0)
    assert head.loss(pred, target, jnp.asarray([[[0, 1], [0, 0]]])) == 5
    assert head.loss(pred, target, jnp.asarray([[[0, 1], [1, 0]]])) == 3


def test_reconstruct(method):
    batch = CASE.batch()
    images, mask = batch["image"], batch["mask"]
    made = method.reconstruct(images.astype(jnp.bfloat16), mask=mask)
    assert all(x.dtype == jnp.float32 for x in made.values())
    made = method.reconstruct(images, mask=mask)
    hidden = made["mask"]
    np.testing.assert_array_equal(hidden[..., 0], np.kron(mask, np.ones((2, 2))))
    np.testing.assert_array_equal(made["masked"], jnp.where(hidden > 0, 0, images))
    np.testing.assert_array_equal(made["pasted"], jnp.where(hidden > 0, made["reconstructed"], images))
    loss = jnp.abs(made["reconstructed"] - images)
    assert method.loss(batch)[0] == pytest.approx(float(loss.mean(where=hidden > 0)), rel=1e-5)

    drawn = method.reconstruct(images, rngs=nnx.Rngs(0))["mask"][..., 0]
    squares = np.asarray(drawn).reshape(8, 4, 4, 4, 4).transpose(0, 1, 3, 2, 4).reshape(8, 16, 16)
    assert (squares == squares[..., :1]).all(), "squares of the encoder's stride"
    assert (squares[..., 0].sum(axis=1) == 10).all(), "60 % of 16"
    with pytest.raises(ValueError, match="call it with rngs"):
        method.reconstruct(images)


def test_features(method):
    images = CASE.batch()["image"]
    method.eval()
    feature_map = method.extract_feat(images)[-1]
    assert feature_map.shape == (8, 4, 4, 16)
    np.testing.assert_allclose(method.features(images), feature_map.mean(axis=(1, 2)), atol=1e-6)
    method.train()


def test_initialisation():
    arch = dict(embed_dims=64, depths=[1, 1], num_heads=[2, 2])
    config = CASE.config | dict(backbone=CASE.config["backbone"] | dict(arch=arch))
    method = build(config | dict(neck=CASE.config["neck"] | dict(in_channels=128)), rngs=nnx.Rngs(0))
    method.init_weights(nnx.Rngs(1))
    block = method.backbone.stages[0].blocks[0]
    for weight in (
        block.attn.w_msa.qkv.kernel,
        block.ffn.fc1.kernel,
        block.attn.w_msa.relative_position_bias_table,
        method.backbone.mask_token,
    ):
        assert float(weight[...].std()) == pytest.approx(0.02, rel=0.3)
    np.testing.assert_array_equal(block.ffn.fc1.bias[...], 0)
    np.testing.assert_array_equal(block.norm1.scale[...], 1)


def test_random_masks_have_exact_numbers_of_ones():
    mask = random_mask(jax.random.key(0), 500, (3, 4), 0.6)
    assert mask.shape == (500, 3, 4) and (mask.sum(axis=(1, 2)) == 7).all()
    np.testing.assert_allclose(mask.mean(axis=0), 7 / 12, atol=0.08)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("neck", dict(in_channels=8), "neck.in_channels=8 is not the backbone's channels 16"),
        ("neck", dict(encoder_stride=8), "neck.encoder_stride=8 is not the backbone's stride 4"),
        ("head", dict(patch_size=4), "head.patch_size=4 is not the backbone's 2; make backbone, neck and head agree"),
        ("backbone", dict(img_sise=16), "SimMIMSwinTransformer has no argument 'img_sise'. Did you mean 'img_size'"),
    ],
)
def test_parts_that_do_not_fit_are_refused(part, change, message):
    with pytest.raises(ConfigError, match=message):
        abstract(CASE.config | {part: CASE.config[part] | change})


def test_batches_without_fitting_masks_are_refused(method):
    batch = CASE.batch()
    with pytest.raises(ConfigError, match=r"add dict\(type='SimMIMMaskGenerator', ...\) to the end of"):
        method.loss({"image": batch["image"]})
    with pytest.raises(ValueError, match="a mask of 4x4 patches, for images of 8x8: give the mask generator"):
        method.loss(batch | dict(mask=jnp.zeros((8, 4, 4))))
    assert batch_mask(batch, "") is batch["mask"]
