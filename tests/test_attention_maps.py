"""Attention maps: which numbers they are, what is outlined, and the picture in a run's folder."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from jaxpretrain.build import ConfigError, abstract, build
from jaxpretrain.evaluators import EvalContext
from jaxpretrain.visualize.attention import attention_grid, class_attention, most_attended
from tests.method_cases import CASES
from tests.method_cases.base import make

SIZE = 16


@pytest.fixture(scope="module")
def dinov2() -> Any:
    method = CASES["dinov2"].make()
    method.eval()
    return method


@pytest.fixture(scope="module")
def images() -> jax.Array:
    return jax.random.normal(jax.random.key(2), (3, SIZE, SIZE, 3))


def by_hand(backbone: Any, images: Any) -> np.ndarray:
    """The class token's weights in the last layer, from queries and keys."""
    tokens, _ = backbone.embed(images)
    x = backbone.add_cls_token(tokens)
    for layer in list(backbone.layers)[:-1]:
        x = layer(x)
    last = backbone.layers[-1]
    q, k, _ = (np.asarray(a, np.float64) for a in last.attn.heads(last.ln1(x)))
    logits = np.einsum("bhd,bnhd->bhn", q[:, 0], k) * last.attn.scale
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return weights[:, :, backbone.num_extra_tokens :].reshape(len(images), q.shape[2], 4, 4)


def test_maps_are_the_class_tokens_last_attention(dinov2, images):
    """Of the teacher, which is what evaluators look at; registers and class token are left out."""
    with jax.default_matmul_precision("highest"):
        maps = jax.jit(class_attention)(dinov2, images)
        wanted = by_hand(dinov2.momentum_encoder.module[0], images)
    assert maps.shape == (3, 2, 4, 4)
    np.testing.assert_allclose(maps, wanted, rtol=1e-4)
    assert (maps.sum(axis=(2, 3)) < 1).all()


@pytest.mark.parametrize("name", ["mae", "mocov3_vit", "dino_vit"])
def test_any_method_with_a_class_token(name, images):
    method = abstract(CASES[name].config)
    method.eval()
    assert jax.eval_shape(class_attention, method, images).shape == (3, 2, 4, 4)


@pytest.mark.parametrize("name", ["dino_resnet", "vicreg"])
def test_networks_without_such_attention(name, images):
    method = abstract(CASES[name].config)
    method.eval()
    with pytest.raises(ConfigError, match=r"need a Vision Transformer with a class token; take AttentionMaps out"):
        jax.eval_shape(class_attention, method, images)


def test_most_attended_patches_are_the_fewest_that_hold_the_mass():
    one = np.array([[0.1, 0.4], [0.3, 0.2]])
    np.testing.assert_array_equal(most_attended(one, 0.6), [[False, True], [True, False]])
    np.testing.assert_array_equal(most_attended(one, 0.75), [[False, True], [True, True]])
    np.testing.assert_array_equal(most_attended(one, 0.3), [[False, True], [False, False]])
    random = np.random.default_rng(0).dirichlet(np.full(25, 0.3), size=(4, 3)).reshape(4, 3, 5, 5)
    chosen = most_attended(random * 0.7, 0.6)
    share = np.where(chosen, random, 0).sum(axis=(2, 3))
    assert (share >= 0.6).all()
    smallest = np.where(chosen, random, 1).min(axis=(2, 3))
    assert (share - smallest <= 0.6).all()  # without the least of them it would be less
    assert (np.where(chosen, 0, random).max(axis=(2, 3)) <= smallest).all()


def test_grid_shows_image_outline_mean_and_heads():
    images = np.full((2, 4, 4, 3), 200, np.uint8)
    maps = np.zeros((2, 3, 2, 2), np.float32)
    maps[:, :, 0, 0] = 0.9
    picture = attention_grid(images, maps, max_heads=2)
    cell = 96 + 6
    assert picture.shape == (13 + 12 + 2 * cell, 6 + 5 * cell, 3)
    row = picture[25 + cell : 25 + cell + 96]
    cells = [row[:, 6 + i * cell : 6 + i * cell + 96] for i in range(5)]
    assert (cells[0] == 200).all()
    assert (cells[1][:48, :48] == 200).all()
    assert (cells[1][48:] == 50).all() and (cells[1][:, 48:] == 50).all()
    for heat in cells[2:]:
        assert (heat[:48, :48] == heat[0, 0]).all() and heat[0, 0].sum() > 500  # bright
        assert heat[48:].max() < 10  # dark
    assert attention_grid(np.zeros((1, 448, 448, 3), np.uint8), maps[:1]).shape[1] == 6 + 6 * (224 + 6)


def context(method: Any, workdir: Any, images: np.ndarray) -> EvalContext:
    def loader(split: str) -> Any:
        valid = np.arange(len(images)) < len(images) - 1
        yield jax.device_put(dict(image=images, label=np.zeros(len(images), np.int32), valid=valid))

    def preprocess(batch: dict[str, Any]) -> dict[str, Any]:
        return {**batch, "image": batch["image"].astype(jnp.float32) / 128 - 1}

    graphdef, params = nnx.split(method)
    return EvalContext(
        features=lambda state, batch: None,
        logits=None,
        loader=loader,
        num_classes=None,
        method=lambda state: nnx.merge(graphdef, params),
        workdir=workdir,
        seed=0,
        preprocess=preprocess,
    )


def test_evaluator_writes_pictures(dinov2, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (4, SIZE, SIZE, 3), dtype=np.uint8)
    found = context(dinov2, tmp_path, images)
    scores = build(dict(type="AttentionMaps", num_images=4), context=found).run(dict(step=jnp.asarray(7)))
    maps = np.asarray(class_attention(dinov2, images[:3].astype(np.float32) / 128 - 1))
    assert scores == {"area": pytest.approx(100 * most_attended(maps.mean(axis=1)).mean())}
    picture = np.asarray(Image.open(tmp_path / "pictures" / "attention_7.png"))
    np.testing.assert_array_equal(picture, np.asarray(Image.open(tmp_path / "pictures" / "attention.png")))
    assert (picture == attention_grid(images[:3], maps)).mean() > 0.99  # two programs, and colours are rounded


def test_evaluator_without_workdir_and_with_bad_arguments(dinov2):
    images = np.zeros((2, SIZE, SIZE, 3), np.uint8)
    assert build(dict(type="AttentionMaps"), context=context(dinov2, None, images)).run({}).keys() == {"area"}
    for args, message in (
        (dict(mass=1.0), "between 0 and 1"),
        (dict(num_images=0), "num_images"),
        (dict(max_heads=0), "max_heads"),
    ):
        with pytest.raises(ConfigError, match=message):
            build(dict(type="AttentionMaps", **args), context=context(dinov2, None, images))
    empty = context(dinov2, None, images)
    empty.loader = lambda split: iter(())
    with pytest.raises(ConfigError, match="the val split has no images"):
        build(dict(type="AttentionMaps"), context=empty).run({})


def test_evenly_spread_attention_holds_its_share():
    """What the untrained network's score is near to."""
    config = CASES["dino_vit"].config
    method = make(config)
    method.eval()
    for layer in method.momentum_encoder.module[0].layers:
        layer.attn.qkv.kernel.set_value(jnp.zeros_like(layer.attn.qkv.kernel[...]))
        layer.attn.qkv.bias.set_value(jnp.zeros_like(layer.attn.qkv.bias[...]))
    maps = class_attention(method, jax.random.normal(jax.random.key(0), (2, SIZE, SIZE, 3)))
    np.testing.assert_allclose(maps, 1 / 17, rtol=1e-6)
