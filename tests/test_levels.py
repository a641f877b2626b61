"""Features at each level of a network, and their probes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxpretrain.build import ConfigError, abstract, build
from jaxpretrain.evaluators.encoder import Encoder
from jaxpretrain.evaluators.levels import extract_levels, pool_map
from jaxpretrain.models.layers import intermediates
from tests.test_evaluators import MEAN, STD, make_context

RESNET = dict(type="ResNet", depth=18, stem_channels=8, base_channels=8)
VIT = dict(
    type="VisionTransformer",
    arch=dict(embed_dims=16, num_layers=3, num_heads=2, feedforward_channels=32),
    img_size=16,
    patch_size=4,
    num_registers=2,
)
SWIN = dict(
    type="SwinTransformer",
    arch=dict(embed_dims=8, depths=[2, 2], num_heads=[1, 2]),
    img_size=32,
    patch_size=2,
    window_size=4,
    out_indices=(1,),
)


def make(cfg, seed=0):
    """A method around a backbone, with random weights, in eval mode."""
    method = Encoder(dict(type="ImageClassifier", backbone=cfg), rngs=nnx.Rngs(seed))
    method.eval()
    return method


def images(size=32, count=2):
    return jax.random.normal(jax.random.key(0), (count, size, size, 3))


# ------------------------------------------------------------------------------------------------ pooling


@pytest.mark.parametrize(
    "size, channels, window",
    [(112, 64, (10, 10, 4)), (56, 256, (16, 8, 0)), (28, 512, (13, 5, 0)), (14, 1024, (8, 3, 0)), (7, 2048, (6, 1, 0))],
)
def test_maps_of_resnet50_are_pooled_as_the_benchmark_does(size, channels, window):
    kernel, stride, padding = window
    x = np.random.default_rng(0).standard_normal((1, size, size, channels)).astype(np.float32)
    padded = np.pad(x, [(0, 0), (padding, padding), (padding, padding), (0, 0)])
    out = (size + 2 * padding - kernel) // stride + 1
    expected = np.empty((1, out, out, channels), np.float32)
    for i in range(out):
        for j in range(out):
            rows, columns = (slice(k * stride, k * stride + kernel) for k in (i, j))
            expected[:, i, j] = padded[:, rows, columns].mean(axis=(1, 2))
    assert 8000 < expected.size < 9300  # "about 9,000 dimensions"
    np.testing.assert_allclose(pool_map(jnp.asarray(x)), expected.reshape(1, -1), atol=1e-6)


def test_other_maps_are_pooled_in_even_shares():
    x = np.random.default_rng(0).standard_normal((2, 7, 5, 3)).astype(np.float32)
    pooled = np.asarray(pool_map(jnp.asarray(x), dims=30)).reshape(2, 3, 3, 3)  # the largest grid of at most 30 numbers
    for i, (a, b) in enumerate(((0, 3), (2, 5), (4, 7))):
        for j, (c, d) in enumerate(((0, 2), (1, 4), (3, 5))):
            np.testing.assert_allclose(pooled[:, i, j], x[:, a:b, c:d].mean(axis=(1, 2)), atol=1e-6)
    np.testing.assert_allclose(pool_map(jnp.asarray(x), dims=3), x.mean(axis=(1, 2)), atol=1e-6)
    np.testing.assert_array_equal(pool_map(jnp.asarray(x)), x.reshape(2, -1))  # small enough as it is


# ------------------------------------------------------------------------------------------------ levels


def test_levels_of_a_resnet_are_its_stem_and_stages():
    method = make(RESNET)
    x = images()
    levels = extract_levels(method, x)
    assert list(levels) == ["stem", "stage1", "stage2", "stage3", "stage4", "features"]
    backbone = make(dict(RESNET, out_indices=(0, 1, 2, 3))).model.backbone  # the same seed, the same weights
    maps = backbone(x)
    for name, expected in zip(list(levels)[1:5], maps, strict=True):
        np.testing.assert_allclose(levels[name], pool_map(expected), atol=1e-6)
    stem = jax.nn.relu(backbone.bn1(backbone.conv1(x)))
    np.testing.assert_allclose(levels["stem"], pool_map(stem), atol=1e-6)  # before max-pooling
    np.testing.assert_allclose(levels["features"], maps[-1].mean(axis=(1, 2)), atol=1e-6)
    means = extract_levels(method, x, pool="mean")
    np.testing.assert_allclose(means["stage2"], maps[1].mean(axis=(1, 2)), atol=1e-6)


def test_levels_of_a_vit_are_its_blocks():
    method = make(VIT)
    x = images(16)
    tokens = intermediates(method.model, x, names="*.layers.*.out")[1]
    levels = extract_levels(method, x)
    assert list(levels) == ["block1", "block2", "block3", "features"]
    for i in range(3):
        expected = tokens[f"backbone.layers.{i}.out"]
        assert expected.shape == (2, 1 + 2 + 16, 16)
        np.testing.assert_allclose(levels[f"block{i + 1}"], expected[:, 3:].mean(axis=1), atol=1e-6)
        first = extract_levels(method, x, pool="cls")[f"block{i + 1}"]
        np.testing.assert_allclose(first, expected[:, 0], atol=1e-6)
    np.testing.assert_allclose(levels["features"], method.model(x)[-1], atol=1e-6)


def test_levels_of_a_swin_are_its_stages():
    method = make(SWIN)
    x = images(32)
    levels = extract_levels(method, x)
    assert {name: value.shape for name, value in levels.items()} == {
        "stage1": (2, 8),
        "stage2": (2, 16),
        "features": (2, 16),
    }
    found = intermediates(method.model, x)[1]
    np.testing.assert_allclose(levels["stage1"], found["backbone.stages.0.blocks.1.out"].mean(axis=(1, 2)), atol=1e-6)
    assert extract_levels(method, x, pool="grid")["stage1"].shape == (2, 16 * 16 * 8)


def test_levels_of_a_masked_method_see_the_whole_image():
    arch = VIT["arch"]
    cfg = dict(
        type="MAE",
        backbone=dict(type="MAEViT", arch=arch, img_size=16, patch_size=4),
        neck=dict(type="MAEPretrainDecoder", patch_size=4, decoder_embed_dim=16, decoder_depth=2, decoder_num_heads=2),
        head=dict(type="MAEPretrainHead", patch_size=4, loss=dict(type="PixelReconstructionLoss", criterion="L2")),
    )
    method = Encoder(cfg, rngs=nnx.Rngs(0))
    method.eval()
    levels = jax.jit(lambda state, x: extract_levels(nnx.merge(nnx.split(method)[0], state), x))(
        nnx.split(method)[1], images(16)
    )
    assert set(levels) == {"block1", "block2", "block3", "features"}  # the decoder's blocks do not run
    np.testing.assert_allclose(levels["features"], method.model.features(images(16)), atol=1e-6)


def test_mistakes_are_named():
    with pytest.raises(ConfigError, match="has maps and no tokens"):
        extract_levels(make(RESNET), images(), pool="cls")
    with pytest.raises(ConfigError, match="VisionTransformer has no class token"):
        extract_levels(make(dict(VIT, with_cls_token=False, out_type="avg_featmap")), images(16), pool="cls")

    class Blind:
        def features(self, x):
            return x.mean(axis=(1, 2))

    with pytest.raises(ConfigError, match="Blind: its network shows no levels"):
        extract_levels(nnx_like(Blind)(), images())


def nnx_like(cls):
    return type(cls.__name__, (cls, nnx.Module), {})


# ------------------------------------------------------------------------------------------------ probes


@pytest.fixture(scope="module")
def context():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 96)
    pixels = (rng.integers(0, 60, (96, 16, 16, 3)) + 45 * labels[:, None, None, None]).astype(np.uint8)
    splits = {"train": (pixels[:64], labels[:64]), "val": (pixels[64:], labels[64:])}
    method = abstract(dict(type="Encoder", model=dict(type="ImageClassifier", backbone=VIT)))
    method.eval()
    graphdef = nnx.split(method)[0]
    passes: list[str] = []
    context = make_context(
        splits, batch_size=40, num_classes=4, passes=passes, method=lambda state: nnx.merge(graphdef, state["model"])
    )
    context.passes = passes
    assert MEAN.shape == STD.shape == (3,)
    return context


@pytest.fixture(scope="module")
def state():
    return {"model": nnx.split(make(VIT))[1], "step": jnp.asarray(0)}


def test_probes_of_all_levels_take_one_pass(context, state):
    context.passes.clear()
    scores = build(dict(type="LevelProbe", epochs=20, batch_size=16), context=context).run(state)
    assert (
        context.passes.count("train") == context.passes.count("val") == 2
    )  # one of them for a look at the first batch
    names = ["block1", "block2", "block3", "features"]
    assert list(scores) == [*(f"{name}_top1" for name in names), "best"]
    values = [scores[f"{name}_top1"] for name in names]
    assert scores["best"] == 1 + int(np.argmax(values)) and max(values) > 80
    svm = build(dict(type="LowShotSVM", k=4, draws=2, costs=1.0, levels=True), context=context).run(state)
    assert context.passes.count("train") == 2  # the features are still there
    assert svm["level"] == 1 + int(np.argmax([svm[f"{name}_map"] for name in names]))
    assert svm["k4_map"] == max(svm[f"{name}_map"] for name in names)
    some = build(dict(type="LevelProbe", epochs=20, batch_size=16, levels=["block2"]), context=context).run(state)
    assert some == {"block2_top1": scores["block2_top1"], "best": 2.0}
    context.clear()


def test_a_probe_of_one_level_is_a_linear_probe_of_those_features(context, state):
    scores = build(dict(type="LevelProbe", epochs=5), context=context).run(state)
    context.clear()
    context.features = jax.jit(
        lambda s, b: context.method(s).features(context.preprocess(b)["image"]).astype(jnp.float32)
    )
    alone = build(dict(type="LinearProbe", epochs=5), context=context).run(state)
    assert scores["features_top1"] == alone["top1"]
    context.clear()


def test_unknown_levels_and_pools_are_named(context, state):
    with pytest.raises(ConfigError, match="there is no level 'block9'. Did you mean 'block"):
        build(dict(type="LevelProbe", levels=["block9"]), context=context).run(state)
    with pytest.raises(ConfigError, match="LevelProbe.pool is 'max'"):
        build(dict(type="LevelProbe", pool="max"), context=context)
