"""DALL-E's encoder against a plain NumPy version, its names, its initialisation and its errors."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxpretrain.build import build
from jaxpretrain.interop import load_weights
from jaxpretrain.interop import mmpretrain as hub
from jaxpretrain.interop.files import write
from jaxpretrain.models.dalle import DALLEEncoder

TINY = dict(type="DALL-E", n_hid=8, vocab_size=12)


@pytest.fixture(scope="module")
def encoder() -> DALLEEncoder:
    return build(TINY, rngs=nnx.Rngs(0))


def convolve(x: np.ndarray, w: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Images [B, H, W, in] with PyTorch's kernel [out, in, k, k], zeros around."""
    pad = w.shape[2] // 2
    x = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(x, w.shape[2:], axis=(1, 2))
    return np.einsum("bhwikl,oikl->bhwo", windows, w) + b


def reference(state: dict[str, np.ndarray], x: np.ndarray, blocks: int, gain: float) -> np.ndarray:
    """The release's computation: a stem, four groups of bottlenecks with pooling between, and a classifier."""
    state = {name: array.astype(np.float64) for name, array in state.items()}

    def conv(name: str, x: np.ndarray) -> np.ndarray:
        return convolve(x, state[f"{name}.w"], state[f"{name}.b"])

    x = conv("blocks.input", x)
    for group in range(1, 5):
        for block in range(1, blocks + 1):
            name = f"blocks.group_{group}.block_{block}"
            y = x
            for i in range(1, 5):
                y = conv(f"{name}.res_path.conv_{i}", np.maximum(y, 0))
            x = (conv(f"{name}.id_path", x) if f"{name}.id_path.w" in state else x) + gain * y
        if group < 4:
            x = x.reshape(len(x), x.shape[1] // 2, 2, x.shape[2] // 2, 2, -1).max(axis=(2, 4))
    return conv("blocks.output.conv", np.maximum(x, 0))


@pytest.mark.parametrize(("args", "gain"), [({}, 1 / 64), (dict(n_blk_per_group=1, group_count=3), 1 / 9)])
def test_matches_numpy(args, gain):
    encoder = build({**TINY, **args}, rngs=nnx.Rngs(0))
    images = np.asarray(jax.random.normal(jax.random.key(0), (2, 16, 24, 3)))
    logits = jax.jit(lambda m, x: m(x))(encoder, images)
    assert logits.shape == (2, 2, 3, 12)
    state = hub.to_state_dict(encoder)
    # The biases start at zero: with others the reference would show a forgotten one.
    wanted = reference(state, images, args.get("n_blk_per_group", 2), gain)
    np.testing.assert_allclose(logits, wanted, atol=1e-5 * np.abs(wanted).max())


def test_names_and_initialisation(encoder):
    state = hub.to_state_dict(encoder)
    assert len(state) == 2 * (
        1 + 8 * 4 + 3 + 1
    )  # stem, four convolutions in each of eight blocks, three id_paths, output
    assert state["blocks.group_3.block_1.id_path.w"].shape == (32, 16, 1, 1)
    assert state["blocks.group_1.block_2.res_path.conv_1.w"].shape == (2, 8, 3, 3)
    assert not any(array.any() for name, array in state.items() if name.endswith(".b"))
    weight = state["blocks.group_4.block_2.res_path.conv_1.w"]
    assert weight.std() * (9 * 64) ** 0.5 == pytest.approx(1, abs=0.05)
    assert (encoder.patch_size, encoder.num_embed) == (8, 12)


def test_many_blocks_run_in_order():
    """By number: as strings, 10 comes before 2."""
    encoder = build(dict(TINY, n_blk_per_group=10, n_hid=4), rngs=nnx.Rngs(0))
    images = np.asarray(jax.random.normal(jax.random.key(1), (1, 8, 8, 3)))
    merged = nnx.merge(*nnx.split(encoder))
    wanted = reference(hub.to_state_dict(encoder), images, 10, 1 / 1600)
    np.testing.assert_allclose(jax.jit(lambda x: merged(x))(images), wanted, atol=1e-5 * np.abs(wanted).max())


def test_logits_are_float32_at_least(encoder):
    images = jax.random.normal(jax.random.key(0), (2, 16, 16, 3))
    run = jax.jit(lambda m, x: m(x))
    half, full = run(encoder, images.astype(jnp.bfloat16)), run(encoder, images)
    assert half.dtype == full.dtype == jnp.float32
    np.testing.assert_allclose(half, full, atol=0.05 * float(jnp.abs(full).max()))


def test_weights_from_a_file(encoder, tmp_path):
    write(tmp_path / "dalle_encoder.safetensors", hub.to_state_dict(encoder))
    other = build(TINY, rngs=nnx.Rngs(1))
    load_weights(other, tmp_path / "dalle_encoder.safetensors")
    images = jnp.ones((1, 8, 8, 3))
    np.testing.assert_array_equal(other(images), encoder(images))


@pytest.mark.parametrize("shape", [(8, 8, 3), (1, 8, 8, 4)])
def test_other_images_are_refused(encoder, shape):
    with pytest.raises(ValueError, match=r"DALL-E: expected images \[batch, height, width, 3\]"):
        encoder(jnp.zeros(shape))
