"""The image retriever: the reference's numbers, what it finds, and where its prototype comes from."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxpretrain.build import ConfigError, build
from jaxpretrain.interop import mmpretrain
from jaxpretrain.methods.supervised import Supervised
from jaxpretrain.models.classifiers import ImageClassifier
from jaxpretrain.models.retrievers import ImageToImageRetriever, cosine_similarity
from tests.parity import assert_logits, assert_summary, build_by_reference, load_golden, reference_input
from tests.test_resnet import TWO, assert_close, normal, random, split

BACKBONE = dict(type="ResNet", depth=18, **TWO, out_indices=(1,))
CONFIG = dict(
    type="ImageToImageRetriever",
    image_encoder=[BACKBONE, dict(type="GlobalAveragePooling")],
    head=dict(type="ArcFaceClsHead", num_classes=5, in_channels=8),
    prototype=dict(batch_size=32, dataset=dict(type="InShop")),
    topk=3,
)


def retriever(**kwargs):
    model = random(CONFIG | kwargs)
    model.eval()
    return model


@pytest.mark.slow
def test_retriever_equals_reference():
    golden = load_golden("resnet50-arcface_inshop")
    model = build_by_reference(golden["model_cfg"], golden["manifest"])
    assert len(mmpretrain.names(model)) == golden["n_keys"]
    assert mmpretrain.num_parameters(model) == golden["n_params"]
    model.eval()
    graphdef, state = split(model)

    @jax.jit
    def run(state, images):
        model = nnx.merge(graphdef, state)
        feats = model(images)
        return feats, model.head(feats)

    (feats,), logits = run(state, reference_input(tuple(golden["input_shape"])))
    assert_summary(feats, golden["features"][0])
    assert_logits(logits, golden["logits"])


def test_names_are_the_references():
    model = retriever()
    names = set(mmpretrain.names(model))
    assert "image_encoder.0.layer1.0.conv1.weight" in names and "head.norm_product.weight" in names
    model.prepare_prototype(normal(4, 8))
    assert set(mmpretrain.names(model)) == names, "what is searched is no weight"
    alone = random(CONFIG | dict(image_encoder=BACKBONE, head=None))
    assert "image_encoder.layer1.0.conv1.weight" in mmpretrain.names(alone)


def test_matching_sorts_by_cosine():
    model = retriever()
    feats, vecs = normal(2, 8), normal(6, 8, seed=1) * np.arange(1, 7, dtype=np.float32)[:, None]
    model.prepare_prototype(vecs)
    found = model.matching(jnp.asarray(feats))
    cosines = (feats @ vecs.T) / np.linalg.norm(feats, axis=1)[:, None] / np.linalg.norm(vecs, axis=1)
    assert_close(found["score"], cosines)
    order = np.argsort(-cosines, axis=1)[:, :3]
    np.testing.assert_array_equal(found["pred_label"], order)
    assert_close(found["pred_score"], np.take_along_axis(cosines, order, axis=1))
    for topk, count in ((-1, 6), (10, 6), (1, 1)):
        model.topk = topk
        assert model.matching(jnp.asarray(feats))["pred_label"].shape == (2, count)
    model.similarity = lambda a, b: -jnp.square(a[:, None] - b).sum(axis=2)
    distances = np.square(feats[:, None] - vecs).sum(axis=2)
    assert model.matching(jnp.asarray(feats))["pred_label"][:, 0].tolist() == distances.argmin(axis=1).tolist()


def test_similarity_of_half_precision_and_zeros():
    a = jnp.asarray(normal(3, 8), jnp.bfloat16)
    assert_close(jnp.diagonal(cosine_similarity(a, a)), np.ones(3), 1e-6)
    assert not np.any(cosine_similarity(jnp.zeros((1, 8)), a))


def test_prototypes_from_images_batches_and_files(tmp_path):
    model = retriever()
    images = normal(7, 16, 16, 3)
    wanted = model.extract_feat(jnp.asarray(images), stage="pre_logits")
    assert_close(model.extract_feat(jnp.asarray(images))[0], wanted)
    model.train()
    before = split(model)[1]
    for prototype in (
        images,
        iter([images[:4], images[4:]]),
        [{"image": images[:4]}, {"image": images[4:]}],
        np.asarray(wanted),
    ):
        model.prepare_prototype(prototype, batch_size=3)
        assert_close(model.prototype.vecs, wanted, 1e-6)
    jax.tree.map(np.testing.assert_array_equal, split(model)[1], before)
    assert not model.image_encoder[0].bn1.use_running_average, "the model itself stays in its mode"
    model.dump_prototype(tmp_path / "vecs.npz")
    np.save(tmp_path / "images.npy", images)
    for file in ("vecs.npz", "images.npy"):
        other = ImageToImageRetriever(model.image_encoder, str(tmp_path / file), rngs=nnx.Rngs(0))
        other.eval()
        found = other.predict(jnp.asarray(images))
        assert found["pred_label"].shape == (7, 7)
        assert found["pred_label"][:, 0].tolist() == list(range(7)), "each image is most like itself"
        assert_close(found["pred_score"][:, 0], np.ones(7))


def test_retriever_learns_by_its_head():
    model = random(CONFIG | dict(train_cfg=dict(augments=None)))
    x, label = jnp.asarray(normal(4, 16, 16, 3)), jnp.arange(4)
    graphdef, state = split(Supervised(model, rngs=nnx.Rngs(0)))

    @jax.jit
    def run(state):
        method = nnx.merge(graphdef, state)
        loss, metrics = method.loss({"image": x, "label": label})
        wanted = method.model.loss(x, label)[0]
        method.eval()
        return loss, metrics, wanted, method.features(x)

    loss, metrics, wanted, features = run(state)
    assert_close(loss, wanted)
    assert features.shape == (4, 8) and 0 <= metrics["accuracy_top-1"] <= 100


def test_encoder_may_be_a_classifier_without_a_head():
    classifier = dict(type="ImageClassifier", backbone=BACKBONE, neck=dict(type="GlobalAveragePooling"))
    model = retriever(image_encoder=classifier)
    assert isinstance(model.image_encoder, ImageClassifier)
    x = jnp.asarray(normal(2, 16, 16, 3))
    assert model.extract_feat(x, stage="pre_logits").shape == (2, 8)


def test_mistakes_are_named(tmp_path):
    model = retriever(head=None)
    x = jnp.zeros((1, 16, 16, 3))
    with pytest.raises(ConfigError, match="call prepare_prototype"):
        model.predict(x)
    for nothing in (None, dict(batch_size=32)):
        with pytest.raises(ConfigError, match="needs features, images"):
            model.prepare_prototype(nothing)
    with pytest.raises(ConfigError, match="no images"):
        model.prepare_prototype([])
    with pytest.raises(ConfigError, match="no head"):
        model.loss(x, jnp.zeros(1, jnp.int32))
    with pytest.raises(ConfigError, match="Did you mean 'neck'"):
        model.extract_feat(x, "nek")
    with pytest.raises(ConfigError, match="Cannot read the prototype"):
        model.prepare_prototype(tmp_path / "missing.npz")
    np.savez(tmp_path / "two.npz", a=np.zeros((1, 8)), b=np.zeros((1, 8)))
    with pytest.raises(ConfigError, match=r"must hold one array; it has \['a', 'b'\]"):
        model.prepare_prototype(tmp_path / "two.npz")
    (tmp_path / "pickle.npy").write_bytes(b"\x80\x04N.")
    with pytest.raises(ConfigError, match="Cannot read the prototype"):
        model.prepare_prototype(tmp_path / "pickle.npy")
    with pytest.raises(ConfigError, match="Did you mean 'cosine_similarity'"):
        build(CONFIG | dict(similarity_fn="cosine"))
    with pytest.raises(ConfigError, match="topk is positive"):
        build(CONFIG | dict(topk=0))
