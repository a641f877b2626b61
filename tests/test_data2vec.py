"""data2vec 2.0: masks, the loss against NumPy, targets, decoder, and the slow copy."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxpretrain.build import ConfigError, abstract, build
from jaxpretrain.config import load_config
from jaxpretrain.interop import load_weights
from jaxpretrain.interop import mmpretrain as hub
from jaxpretrain.methods.base import Progress, draw_key
from jaxpretrain.methods.data2vec import Data2Vec2, Data2VecHead
from jaxpretrain.models.layers import Frozen
from jaxpretrain.train_state import make_method
from tests import numpy_vit as reference
from tests.method_cases.base import VIT, make
from tests.method_cases.latent import DATA2VEC as CONFIG


@pytest.fixture(scope="module")
def method() -> Data2Vec2:
    method = make(CONFIG)
    for _, variable in nnx.state(method, (nnx.Param, Frozen)).flat_state():
        noise = jax.random.normal(jax.random.key(variable.size % 97), variable.shape)
        variable.set_value(variable[...] + 0.1 * noise)
    for _, variable in nnx.state(method.ema, Frozen).flat_state():
        variable.set_value(variable[...] * 1.1)
    method.neck.mask_noise_std = 0.0
    return method


@pytest.fixture(scope="module")
def images() -> jax.Array:
    return jax.random.normal(jax.random.key(3), (2, 16, 16, 3))


# Masks


def test_masks_leave_a_fifth_to_see_in_blocks():
    backbone = abstract(dict(type="Data2VecViT"))
    hidden = np.asarray(backbone.block_masks(jax.random.key(0), 2000, (14, 14)))
    assert hidden.shape == (2000, 196)
    assert (hidden.sum(axis=1) == 196 - 39).all()
    seen = ~hidden.reshape(-1, 14, 14)
    beside = (seen[:, 1:] & seen[:, :-1]).sum() / seen[:, 1:].sum()
    assert 0.55 < beside < 0.75  # inside a block of 3, two thirds; at random, one fifth
    where = seen.mean(axis=0)
    assert where.min() > 0.08 and where.max() < 0.3  # blocks at the edge are cut, so less of it is seen
    np.testing.assert_allclose(where, where[::-1, ::-1], atol=0.05)
    assert len({row.tobytes() for row in hidden}) == 2000


def test_masks_of_the_other_settings():
    large = abstract(dict(type="Data2VecViT", mask_ratio=0.75, mask_adjust=0.1))
    assert large.num_visible((14, 14)) == 49
    wide = build(dict(type="Data2VecViT", mask_ratio=0.5, mask_adjust=0.0, **VIT), rngs=nnx.Rngs(0))
    hidden = wide.block_masks(jax.random.key(0), 100, (4, 8))
    assert (hidden.sum(axis=1) == 16).all()
    one = np.asarray(wide.block_masks(jax.random.key(0), 4000, (9, 9))).reshape(-1, 9, 9)
    assert np.abs((~one).mean(axis=0) - 0.49).max() < 0.25


def test_only_visible_tokens_enter_the_encoder(method, images):
    latent, hidden, ids_restore = method.backbone(images, rngs=nnx.Rngs(0))
    assert latent.shape == (4, 1 + 8, 16)
    assert (hidden.sum(axis=1) == 8).all()
    assert (hidden[0] != hidden[1]).any()  # two masks of one image
    np.testing.assert_array_equal(np.take_along_axis(np.sort(hidden, axis=1), np.asarray(ids_restore), axis=1), hidden)
    # What is hidden does not matter.
    pixels = np.repeat(np.repeat(np.asarray(hidden[0]).reshape(4, 4), 4, axis=0), 4, axis=1)[..., None]
    changed = images.at[0].add(5 * pixels)
    np.testing.assert_allclose(method.backbone(changed, rngs=nnx.Rngs(0))[0][0], latent[0], atol=1e-5)


# Loss


def post_norm_block(x: np.ndarray, layer: nnx.Module) -> tuple[np.ndarray, np.ndarray]:
    x = reference.layer_norm(x + reference.attention(x, layer.attn), layer.ln1)
    y = reference.feed_forward(x, layer.ffn)
    return reference.layer_norm(x + y, layer.ln2), y


def encode(tokens: np.ndarray, backbone: nnx.Module) -> tuple[np.ndarray, list[np.ndarray]]:
    x = np.concatenate([reference.array(backbone.cls_token)[0], tokens])
    x = reference.layer_norm(x, backbone.pre_norm)
    outputs = []
    for layer in backbone.layers:
        x, y = post_norm_block(x, layer)
        outputs.append(y[1:])
    return x, outputs


def convolve(x: np.ndarray, conv: nnx.Module) -> np.ndarray:
    """3x3, zeros around, in groups; [H, W, C]."""
    kernel, height, width = reference.array(conv.kernel), *x.shape[:2]
    padded = np.pad(x, ((1, 1), (1, 1), (0, 0)))
    ins, outs = x.shape[2] // conv.groups, kernel.shape[3] // conv.groups
    result = np.zeros((height, width, kernel.shape[3]))
    for g in range(conv.groups):
        part, into = slice(g * ins, (g + 1) * ins), slice(g * outs, (g + 1) * outs)
        for i in range(height):
            for j in range(width):
                window = padded[i : i + 3, j : j + 3, part]
                result[i, j, into] = np.tensordot(window, kernel[..., into], axes=3)
    return result + reference.array(conv.bias)


def test_loss_by_hand(method, images):
    """Sections 3.1 to 3.4, image by image and mask by mask; mask tokens are 0 here."""
    (loss, metrics) = jax.jit(lambda m, x: m.loss({"image": x}, rngs=nnx.Rngs(0)))(method, images)
    hidden = np.asarray(method.backbone.block_masks(draw_key(nnx.Rngs(0), "mask"), 4, (4, 4)))
    regression, cls, count = 0.0, 0.0, 0
    for i, image in enumerate(np.asarray(images, np.float64)):
        teacher = method.ema.module[0]
        _, outputs = encode(reference.patch_tokens(image, teacher), teacher)
        target = np.mean([reference.standardized(y, 0) for y in outputs], axis=0)
        target = reference.standardized(target, -1)
        for mask in hidden[2 * i : 2 * i + 2]:
            x, _ = encode(reference.patch_tokens(image, method.backbone)[~mask], method.backbone)
            cls += np.sum((x[0] - target.mean(axis=0)) ** 2) / 4 / 4  # root of 16 channels; four masks in all
            y = np.zeros((16, 16))
            y[~mask] = x[1:]
            y = y.reshape(4, 4, 16)
            for conv in method.neck.blocks:
                y = y + reference.gelu(reference.standardized(convolve(y, conv), -1))
            y = reference.linear(y, method.neck.proj).reshape(16, 16)
            regression += np.sum((y - target)[mask] ** 2) / 4
            count += mask.sum()
    assert metrics["loss_regression"] == pytest.approx(regression / count, rel=1e-5)
    assert metrics["loss_cls"] == pytest.approx(0.1 * cls, rel=1e-5)
    assert loss == pytest.approx(regression / count + 0.1 * cls, rel=1e-5)


def test_targets_are_standardised():
    outputs = [jax.random.normal(jax.random.key(i), (2, 9, 8)) * (i + 1) + i for i in range(3)]
    target = Data2VecHead(top_k=3).targets([x.astype(jnp.bfloat16) for x in outputs])
    assert target.dtype == jnp.float32
    np.testing.assert_allclose(target.mean(axis=-1), 0, atol=1e-5)
    np.testing.assert_allclose(target.std(axis=-1), 1, atol=1e-3)
    scaled = Data2VecHead(top_k=3).targets([outputs[0] * 100 + 5, *outputs[1:]])  # no layer outweighs another
    np.testing.assert_allclose(scaled, Data2VecHead(top_k=3).targets(outputs), atol=1e-4)


def test_targets_come_from_the_last_blocks(method, images):
    both = method.ema.module[0].feed_forward_outputs(images, 2)
    last = method.ema.module[0].feed_forward_outputs(images, 1)
    assert len(both) == 2 and len(last) == 1
    np.testing.assert_array_equal(both[1], last[0])


def test_mask_tokens_are_noise(method, images):
    neck = make(CONFIG).neck
    latent, _, ids_restore = method.backbone(images, rngs=nnx.Rngs(0))
    one, two = (neck(latent, ids_restore, rngs=nnx.Rngs(seed)) for seed in (0, 1))
    assert float(jnp.abs(one - two).max()) > 0


def test_only_encoder_and_decoder_learn(method):
    learning = {path[0] for path, _ in nnx.state(method, nnx.Param).flat_state()}
    assert learning == {"backbone", "neck"}
    assert len(method.ema.module) == 1  # no copy of the decoder
    assert isinstance(method.backbone.pos_embed, Frozen)


def test_initialisation():
    vit = dict(VIT, arch=dict(VIT["arch"], embed_dims=64))
    backbone = make(dict(CONFIG, backbone=dict(CONFIG["backbone"], **vit))).backbone
    assert float(backbone.layers[0].ffn.fc1.kernel[...].std()) == pytest.approx(0.02, rel=0.1)
    assert float(backbone.layers[1].attn.qkv.kernel[...].std()) == pytest.approx(0.02, rel=0.1)
    np.testing.assert_array_equal(backbone.layers[0].ffn.fc1.bias[...], 0)
    assert float(backbone.cls_token[...].std()) == pytest.approx(1, rel=0.4)
    bound = math.sqrt(6 / (48 + 64))
    assert 0.98 * bound < float(jnp.abs(backbone.patch_embed.projection.kernel[...]).max()) <= bound


# The slow copy


def test_teacher_follows_in_a_straight_line_and_then_evenly():
    method = build(CONFIG | dict(ema_decay=0.9, ema_end_decay=0.99, ema_anneal_steps=10), rngs=nnx.Rngs(0))
    momentum = [float(method.teacher_momentum(Progress(jnp.int32(s), 100))) for s in (1, 5, 10, 50)]
    np.testing.assert_allclose(momentum, [0.091, 0.055, 0.01, 0.01], rtol=1e-4)


# Recipes


@pytest.mark.parametrize(
    ("name", "width", "layers", "top_k"),
    [("data2vec2_vit-base-p16_200e_in1k", 768, 12, 10), ("data2vec2_vit-large-p16_150e_in1k", 1024, 24, 18)],
)
def test_recipes(name, width, layers, top_k):
    config = load_config(f"configs/data2vec.py:{name}")
    method = make_method(config)
    encoder = sum(x.size for x in jax.tree.leaves(nnx.state(method.backbone, nnx.Param)))
    block = 12 * width**2 + 13 * width
    assert encoder == (768 + 1) * width + width + layers * block + 2 * width
    assert method.head.top_k == top_k
    assert method.backbone.num_masks == 16
    assert method.backbone.num_visible((14, 14)) == {768: 39, 1024: 49}[width]
    x = jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32)
    loss, metrics = jax.eval_shape(lambda m, x: m.loss({"image": x}, rngs=nnx.Rngs(0)), method, x)
    assert loss.shape == () and set(metrics) == {"loss_regression", "loss_cls", "feature_std"}


def test_round_trip_through_mmpretrains_layout(method):
    state = hub.to_state_dict(method)
    assert "ema.module.0.layers.0.attn.qkv.weight" in state
    other = abstract(CONFIG)
    load_weights(other, state)
    for name, array in hub.to_state_dict(other).items():
        np.testing.assert_array_equal(array, state[name])


def test_reconstruct(method, images):
    made = method.reconstruct(images, rngs=nnx.Rngs(0))
    assert made["mask"].shape == (2, 16, 16, 1)
    assert made["mask"].mean() == 0.5
    np.testing.assert_array_equal(made["masked"], jnp.where(made["mask"] > 0, 0, images))
    assert made["pasted"].shape == images.shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(backbone=dict(CONFIG["backbone"], mask_ratio=1.0)), "mask_ratio=1.0 must be between 0 and 1"),
        (dict(backbone=dict(CONFIG["backbone"], with_cls_token=False)), "needs a class token"),
        (dict(neck=dict(CONFIG["neck"], decoder_kernel=4)), "decoder_kernel=4 must be odd"),
        (dict(neck=dict(CONFIG["neck"], decoder_groups=5)), "decoder_groups=5 must divide"),
        (dict(neck=dict(CONFIG["neck"], num_patches=9)), r"neck.num_patches \(3, 3\) is not"),
        (dict(head=dict(type="Data2VecHead", top_k=3)), "top_k=3, of 2 blocks"),
    ],
)
def test_mistakes(change, message):
    with pytest.raises(ConfigError, match=message):
        abstract(CONFIG | change)
