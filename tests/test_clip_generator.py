"""CLIP's image tower: against our own ViT with the same weights, from OpenAI's kind of file; and what happens without one."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxpretrain.build import ConfigError, abstract, build
from jaxpretrain.interop import export, load_weights, starting_weights
from jaxpretrain.interop import mmpretrain as hub
from jaxpretrain.models.layers import Frozen, freeze, intermediates
from tests.test_interop_originals import torchscript

ARCH = dict(embed_dims=64, num_layers=3, num_heads=2, feedforward_channels=256)
SIZE = dict(arch=ARCH, img_size=16, patch_size=4)
TEXT = dict(width=64, layers=1, words=10, context=5)
CLIP = dict(type="CLIPGenerator", out_dims=12, text=TEXT, **SIZE)
VIT = dict(
    type="VisionTransformer",
    pre_norm=True,
    norm_cfg=dict(type="LN", eps=1e-5),
    layer_cfgs=dict(act_cfg=dict(type="QuickGELU")),
    out_type="raw",
    **SIZE,
)


@pytest.fixture(scope="module")
def state() -> dict[str, np.ndarray]:
    """Weights by the names of OpenAI's files."""
    random = np.random.default_rng(0)
    shapes = hub.shapes(abstract(CLIP))
    state = {
        name.removeprefix("tokenizer."): random.normal(
            1.0 if name.endswith("weight") and len(shape) == 1 else 0, 0.1, shape
        )
        for name, shape in shapes.items()
    }
    return {name: np.asarray(array, np.float32) for name, array in state.items()}


@pytest.fixture(scope="module")
def images() -> jax.Array:
    return jax.random.normal(jax.random.key(0), (2, 16, 16, 3))


def loaded(state: dict[str, np.ndarray], cfg: dict[str, Any] = CLIP, **options: Any) -> Any:
    model = abstract(cfg)
    load_weights(model, state, **options)
    return model


def test_is_our_vit_with_a_projection(state, images):
    clip = loaded(state, layout="clip")
    features, attention = jax.jit(lambda m, x: m(x))(clip, images)
    vit = loaded(state, VIT, layout="clip")
    run = jax.jit(lambda m, x: intermediates(m, x, names="layers.2.attn.weights"))
    (tokens,), found = run(vit, images)
    np.testing.assert_allclose(features, tokens @ state["visual.proj"], atol=1e-5 * float(jnp.abs(features).max()))
    np.testing.assert_allclose(attention, found["layers.2.attn.weights"].mean(axis=1), atol=1e-6)
    np.testing.assert_allclose(attention.sum(axis=-1), 1, rtol=1e-5)
    half, _ = clip(images.astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), features, atol=0.05 * float(jnp.abs(features).max()))


def test_names_are_clips(state):
    assert "visual.transformer.resblocks.2.attn.in_proj_weight" in state
    assert state["visual.transformer.resblocks.0.attn.in_proj_weight"].shape == (192, 64)
    assert state["visual.transformer.resblocks.0.mlp.c_fc.weight"].shape == (256, 64)
    assert {"positional_embedding", "token_embedding.weight", "ln_final.bias", "logit_scale"} <= state.keys()
    exported = export(loaded(state), "clip")
    assert exported.keys() == state.keys()
    for name, array in exported.items():
        np.testing.assert_array_equal(array, state[name])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_openais_archive(state, tmp_path):
    archive = {name: array.astype(np.float16) for name, array in state.items()} | {
        "input_resolution": np.asarray(16),
        "context_length": np.asarray(5),
        "vocab_size": np.asarray(10),
    }
    torchscript(tmp_path / "ViT-B-16.pt", archive)
    generator = abstract(CLIP | dict(tokenizer_path=str(tmp_path / "ViT-B-16.pt")))
    arrays = starting_weights(nnx.Dict(target_generator=generator))
    assert len(arrays) == len(state)
    ours = arrays["target_generator", "tokenizer", "visual", "proj"]
    np.testing.assert_array_equal(ours, state["visual.proj"].astype(np.float16))


def test_without_weights_training_does_not_begin():
    url = "https://download.openmmlab.com/mmselfsup/1.x/target_generator_ckpt/clip_vit_base_16.pth.tar"
    for path in (None, url, "nowhere/clip.pth"):
        with pytest.raises(ConfigError, match=r"(?s)needs trained weights.*clip_vit_base_16\.pth\.tar.*ViT-B-16\.pt"):
            starting_weights(nnx.Dict(target_generator=abstract(CLIP | dict(tokenizer_path=path))))
    assert not starting_weights(nnx.Dict(target_generator=abstract(CLIP | dict(stand_in=True))))


def test_stand_in_is_random_and_has_no_text_tower(images):
    clip = build(CLIP | dict(stand_in=True), rngs=nnx.Rngs(0))
    assert not any("token_embedding" in name for name in hub.names(clip))
    before = clip(images)[0]
    clip.init_weights(nnx.Rngs(1))
    after = clip(images)[0]
    np.testing.assert_array_equal(before, after)
    assert float(after.std(axis=0).mean()) > 0.01  # it tells images apart
    freeze(clip)
    assert not jax.tree.leaves(nnx.state(clip, nnx.Param))
    assert jax.tree.leaves(nnx.state(clip, Frozen))


def test_scanned_layers_are_the_same(state, images):
    clip = loaded(state)
    plain = clip(images)
    clip.set_attributes(scan_layers=True, raise_if_not_found=False)
    for a, b in zip(plain, jax.jit(lambda m, x: m(x))(clip, images), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_images_of_another_size(state, images):
    larger = jax.image.resize(images, (2, 24, 24, 3), "bilinear")
    features, attention = loaded(state)(larger)
    assert features.shape == (2, 37, 12)
    assert attention.shape == (2, 37, 37)
    resized = loaded(state, CLIP | dict(img_size=24))
    assert resized.tokenizer.visual.positional_embedding.shape == (37, 64)
    np.testing.assert_allclose(resized(larger)[0], features, atol=1e-5)
