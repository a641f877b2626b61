"""VQ-KD: tokens and the codebook's updates against NumPy, weights of both layouts, errors."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxpretrain.build import ConfigError, build
from jaxpretrain.interop import export, load_weights
from jaxpretrain.interop import mmpretrain as hub
from jaxpretrain.models.layers import Frozen
from jaxpretrain.models.vqkd import VQKD, NormEMAVectorQuantizer

ENCODER = dict(
    arch=dict(embed_dims=16, num_layers=2, num_heads=2, feedforward_channels=32),
    img_size=16,
    patch_size=4,
    out_type="featmap",
    final_norm=True,
    use_abs_pos_emb=True,
    use_rel_pos_bias=False,
    layer_scale_init_value=0.0,
)
DECODER = dict(ENCODER, img_size=4, patch_size=1, in_channels=8)
TINY = dict(type="VQKD", encoder_config=ENCODER, num_embed=24, embed_dims=8, quantize_kmeans_init=False)


def make(**args) -> VQKD:
    tokenizer = build({**TINY, **args}, rngs=nnx.Rngs(0))
    tokenizer.eval()
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> VQKD:
    return make()


@pytest.fixture(scope="module")
def images() -> jax.Array:
    return jax.random.normal(jax.random.key(3), (3, 16, 16, 3))


def test_tokens_are_the_codes_of_the_largest_cosine(tokenizer, images):
    state = {name: array.astype(np.float64) for name, array in hub.to_state_dict(tokenizer).items()}
    features = np.asarray(tokenizer.encoder(images)[-1], np.float64)
    assert features.shape == (3, 4, 4, 16)
    first, second = ((state[f"encode_task_layer.{i}.weight"].T, state[f"encode_task_layer.{i}.bias"]) for i in (0, 2))
    z = np.tanh(features @ first[0] + first[1]) @ second[0] + second[1]
    cosines = z @ state["quantize.embedding.weight"].T  # codes have length 1
    tokens = jax.jit(lambda m, x: m(x))(tokenizer, images)
    assert tokens.dtype == jnp.int32
    np.testing.assert_array_equal(tokens, cosines.argmax(axis=-1).reshape(3, 16))
    made = tokenizer.get_tokens(images)
    np.testing.assert_array_equal(made["token"], tokens)
    assert made["input_img"] is images
    assert len(np.unique(tokens)) > 3


def test_a_call_changes_nothing(tokenizer, images):
    before = hub.to_state_dict(tokenizer)
    before = {name: array.copy() for name, array in before.items()}
    tokenizer.train()
    tokenizer(images)
    tokenizer.eval()
    after = hub.to_state_dict(tokenizer)
    assert all((after[name] == array).all() for name, array in before.items())


def test_quantizer():
    quantizer = NormEMAVectorQuantizer(5, 4, beta=0.5, decay=0.9, kmeans_init=False, rngs=nnx.Rngs(0))
    codes = np.asarray(quantizer.embedding.weight[...], np.float64)
    np.testing.assert_allclose(np.linalg.norm(codes, axis=1), 1, rtol=1e-6)
    z = np.asarray(jax.random.normal(jax.random.key(1), (2, 3, 4)), np.float64)
    unit = z / np.linalg.norm(z, axis=-1, keepdims=True)
    index = (unit @ codes.T).argmax(axis=-1)
    taken, loss, found = quantizer(jnp.asarray(z, jnp.float32))
    np.testing.assert_array_equal(found, index)
    np.testing.assert_allclose(taken, codes[index], atol=1e-6)
    assert float(loss) == pytest.approx(0.5 * np.mean((codes[index] - unit) ** 2), rel=1e-5)

    # Straight through: as if the unit vectors themselves came out.
    def straight(z: jax.Array) -> jax.Array:
        return jnp.sum(quantizer(z)[0] * jnp.arange(4.0))

    def identity(z: jax.Array) -> jax.Array:
        return jnp.sum(z / jnp.linalg.norm(z, axis=-1, keepdims=True) * jnp.arange(4.0))

    z32 = jnp.asarray(z, jnp.float32)
    np.testing.assert_allclose(jax.grad(straight)(z32), jax.grad(identity)(z32), atol=1e-5)

    # Codes that were taken move towards the mean of what took them; others stay.
    quantizer.update(z32, found)
    wanted, count = codes.copy(), np.bincount(index.reshape(-1), minlength=5)
    for k in np.flatnonzero(count):
        mean = unit[index == k].mean(axis=0)
        moved = 0.9 * codes[k] + 0.1 * mean / np.linalg.norm(mean)
        wanted[k] = moved / np.linalg.norm(moved)
    assert 0 < (count == 0).sum() < 5
    np.testing.assert_allclose(quantizer.embedding.weight[...], wanted, atol=1e-6)
    np.testing.assert_allclose(quantizer.cluster_size[...], 0.1 * count, rtol=1e-6)


def test_what_is_weight_and_what_is_statistics(tokenizer):
    quantizer = tokenizer.quantize
    assert isinstance(quantizer.embedding.weight, Frozen)
    assert isinstance(quantizer.cluster_size, nnx.BatchStat)
    assert float(quantizer.embedding.initted[0]) == 1
    fresh = make(quantize_kmeans_init=True).quantize.embedding
    assert float(fresh.initted[0]) == 0
    assert not fresh.weight[...].any()


@pytest.mark.parametrize("decoder", [None, DECODER])
def test_weights_of_the_papers_release(decoder, images):
    tokenizer = make(decoder_config=decoder)
    released = export(tokenizer, "beit")
    assert {
        "encoder.fc_norm.weight",
        "encoder.blocks.1.attn.q_bias",
        "encoder.blocks.0.mlp.fc1.weight",
        "encoder.patch_embed.proj.weight",
        "quantize.embedding.weight",
        "quantize.cluster_size",
        "encode_task_layer.2.bias",
    } < set(released)
    assert any(name.startswith("decoder.") for name in released) == bool(decoder)
    beside = {"decode_task_layer.0.weight": np.ones((2, 2)), "scaling_layer.shift": np.ones(3)}
    if decoder is None:
        beside["decoder.blocks.0.norm1.weight"] = np.ones(16)
    other = build({**TINY, "decoder_config": decoder}, rngs=nnx.Rngs(7))
    report = load_weights(other, {**released, **beside})
    assert report.layout == "beit"
    assert set(report.ignored) == set(beside)
    other.eval()
    np.testing.assert_array_equal(other(images), tokenizer(images))


def test_encoders_without_feature_maps_are_refused():
    with pytest.raises(ConfigError, match=r"encoder_config.out_type is 'raw', and must be 'featmap'"):
        make(encoder_config=dict(ENCODER, out_type="raw"))
