"""Inferencers: from anything that is an image to classes and features. Tiny models with random weights."""

from __future__ import annotations

import doctest
import io

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

import jaxpretrain
from jaxpretrain import FeatureExtractor, ImageClassificationInferencer, get_model, inference, inference_model
from jaxpretrain.build import ConfigError
from jaxpretrain.cli import ExpectedFailure
from jaxpretrain.data.class_names import class_names
from jaxpretrain.data.host_transforms import build_pipeline
from jaxpretrain.inference import ImageError, jit, load_image
from jaxpretrain.inference.compiled import normalize
from jaxpretrain.interop import export, files
from jaxpretrain.models.classifiers import ImageClassifier
from jaxpretrain.zoo import Preprocessing, model_info
from tests.weights_server import serve

NAME = "resnet18_8xb16_cifar10"
TINY = dict(backbone=dict(base_channels=4, stem_channels=4), head=dict(in_channels=32))
CIFAR = model_info(NAME).preprocessing


def photo(seed: int, height: int = 40, width: int = 60) -> np.ndarray:
    """Coloured gradients with noise, uint8."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    planes = [128 + 60 * np.sin(x / 9 + c * seed) + 50 * np.cos(y / 7 - c) for c in range(3)]
    return (np.stack(planes, axis=-1) + rng.normal(0, 6, (height, width, 3))).clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def model() -> ImageClassifier:
    return get_model(NAME, **TINY)


@pytest.fixture(scope="module")
def classify(model) -> ImageClassificationInferencer:
    return ImageClassificationInferencer(model)


@pytest.fixture
def folder(tmp_path):
    """Three photographs of different sizes: a.png, b.png, c.png."""
    for number, name in enumerate("abc"):
        Image.fromarray(photo(number, 30 + 10 * number, 50)).save(tmp_path / f"{name}.png")
    return tmp_path


def by_hand(model, image: np.ndarray, preprocessing: Preprocessing = CIFAR) -> np.ndarray:
    """The scores of an image, step by step."""
    pixels = build_pipeline(preprocessing.pipeline)({"image": image}, np.random.default_rng(0))["image"]
    x = (pixels.astype(np.float32) - np.float32(preprocessing.mean)) / np.float32(preprocessing.std)
    x = x[..., ::-1] if preprocessing.channel_order == "bgr" else x
    return np.asarray(model.predict(jnp.asarray(x[None])))[0]


# --- classification --------------------------------------------------------------------------------------------------


def test_the_result_for_one_image_is_a_list_of_one(classify, model, folder):
    (result,) = classify(str(folder / "a.png"))
    assert list(result) == ["pred_scores", "pred_label", "pred_score", "pred_class"]
    scores = result["pred_scores"]
    assert type(scores) is np.ndarray and scores.dtype == np.float32 and scores.shape == (10,)
    assert type(result["pred_label"]) is int and result["pred_label"] == scores.argmax()
    assert type(result["pred_score"]) is float and result["pred_score"] == scores.max()
    assert result["pred_class"] == class_names("cifar10")[result["pred_label"]]
    np.testing.assert_allclose(scores, by_hand(model, photo(0, 30, 50)), atol=1e-6)


def test_every_form_of_an_image_gives_the_same(classify, folder):
    """Arrays are RGB: the array that a PNG holds gives what its file gives."""
    pixels, path = photo(0, 30, 50), folder / "a.png"
    with serve() as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("no_proxy", "*")
        server.content["/x/a%20b.png"] = path.read_bytes()
        forms = [str(path), path, f"{server.url}/x/a%20b.png", path.read_bytes(), pixels, Image.fromarray(pixels)]
        forms += [Image.open(path), pixels[None], jnp.asarray(pixels), [path], (path,), iter([path])]
        results = [classify(form) for form in forms]
    assert all(len(found) == 1 for found in results)
    for found in results:
        assert (found[0]["pred_scores"] == results[0][0]["pred_scores"]).all()
    assert (classify(pixels[..., ::-1])[0]["pred_scores"] != results[0][0]["pred_scores"]).any()


def test_grey_images_and_orientation(classify):
    grey = photo(0)[..., 0]
    expected = classify(np.stack([grey] * 3, axis=-1))[0]["pred_scores"]
    for form in (grey, grey[..., None], Image.fromarray(grey)):
        assert (classify(form)[0]["pred_scores"] == expected).all()
    turned, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # to be shown turned right
    Image.fromarray(photo(0)).save(turned, "PNG", exif=exif)
    assert (load_image(turned.getvalue()) == np.rot90(photo(0), -1)).all()
    assert (load_image(Image.open(turned)) == np.rot90(photo(0), -1)).all()


def test_lists_and_folders_in_batches_of_one_shape(model, folder, monkeypatch):
    shapes = []
    original = ImageClassifier.predict
    monkeypatch.setattr(
        ImageClassifier, "predict", lambda self, images: (shapes.append(images.shape), original(self, images))[1]
    )
    classify = ImageClassificationInferencer(model)
    (folder / "notes.txt").write_text("no image")
    alone = [classify(folder / f"{name}.png")[0]["pred_scores"] for name in "abc"]
    assert shapes == [(1, 32, 32, 3)]
    for inputs in (folder, [folder / f"{name}.png" for name in "abc"], list(photo(1)[None].repeat(3, 0))):
        assert len(classify(inputs, batch_size=2)) == 3
    for found, expected in zip(classify(str(folder), batch_size=2), alone, strict=True):
        np.testing.assert_allclose(found["pred_scores"], expected, atol=1e-6)
    assert shapes == [(1, 32, 32, 3), (2, 32, 32, 3)], "traced once for each batch size: the last batch is filled up"
    assert len(classify(photo(0), batch_size=2)) == 1 and len(shapes) == 2


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("none.png", "none.png.: there is no such file"),
        ("text.png", "text.png.: not an image"),
        ("half.png", "half.png.: OSError: image file is truncated"),
        (np.zeros((8, 8, 3), np.float32), r"ndarray \[8, 8, 3\].: expected uint8 pixels \[H, W, 3\], got float32"),
        (np.zeros((8, 8, 4), np.uint8), "expected uint8 pixels"),
        (17, "int.: expected uint8 pixels"),
        ("http://127.0.0.1:9/a.png", "http://127.0.0.1:9/a.png cannot be read: .*refused"),
    ],
)
def test_a_bad_image_is_named(classify, folder, bad, message, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    (folder / "text.png").write_text("no image at all")
    (folder / "half.png").write_bytes((folder / "a.png").read_bytes()[:1500])
    if isinstance(bad, str) and not bad.startswith("http"):
        bad = folder / bad
    with pytest.raises(ImageError, match=f"Image 2 of 3 cannot be used .*{message}"):
        classify([folder / "a.png", bad, folder / "b.png"], batch_size=2)
    with pytest.raises(ImageError, match=f"The image cannot be used .*{message}"):
        classify(bad)
    assert issubclass(ImageError, ExpectedFailure) and issubclass(ImageError, ValueError)


def test_an_empty_folder_and_a_batch_of_none(classify, tmp_path):
    with pytest.raises(ImageError, match="There are no images in "):
        classify(tmp_path)
    with pytest.raises(ConfigError, match="batch_size=0 must be at least 1"):
        classify(photo(0), batch_size=0)
    assert classify([]) == []


def test_class_names(model):
    image = photo(0)
    mine = [f"class of mine {i}" for i in range(10)]
    result = ImageClassificationInferencer(model, classes=mine)(image)[0]
    assert result["pred_class"] == mine[result["pred_label"]]
    assert ImageClassificationInferencer(model, classes="CIFAR-10")(image)[0]["pred_class"] in class_names("cifar10")
    with pytest.raises(ConfigError, match="classes has 3 names, and the model 10 classes"):
        ImageClassificationInferencer(model, classes=["a", "b", "c"])(image)
    with pytest.raises(ConfigError, match="No class names are known for the data set 'cifar11'"):
        ImageClassificationInferencer(model, classes="cifar11")


def test_a_changed_head_has_no_names():
    """The zoo's names are of other classes then."""
    changed = get_model(NAME, backbone=TINY["backbone"], head=dict(in_channels=32, num_classes=4))
    assert "pred_class" not in ImageClassificationInferencer(changed)(photo(0))[0]


def test_datasamples(classify):
    sample, result = classify(photo(0), return_datasamples=True)[0], classify(photo(0))[0]
    assert sample.pred_label == result["pred_label"] and sample.pred_class == result["pred_class"]
    assert (sample.pred_scores == result["pred_scores"]).all() and sample.pred_score == result["pred_score"]


def test_channel_order(model):
    bgr = Preprocessing(CIFAR.pipeline, (1.0, 2.0, 3.0), (50.0, 60.0, 70.0), "bgr")
    found = ImageClassificationInferencer(model, preprocessing=bgr)(photo(0))[0]["pred_scores"]
    np.testing.assert_allclose(found, by_hand(model, photo(0), bgr), atol=1e-6)
    assert np.abs(found - by_hand(model, photo(0))).max() > 1e-4
    pixel = normalize(jnp.asarray([[[[255, 0, 0]]]], jnp.uint8), bgr)
    np.testing.assert_allclose(pixel.ravel(), [-3 / 70, -2 / 60, 254 / 50], rtol=1e-6)


# --- pictures --------------------------------------------------------------------------------------------------------


def test_pictures_are_saved_under_the_images_names(classify, folder, tmp_path):
    out = tmp_path / "new" / "out"
    (folder / "more").mkdir()
    Image.fromarray(photo(5)).save(folder / "more" / "a.png")
    classify([folder / "a.png", folder / "b.png", folder / "more" / "a.png", photo(7)], batch_size=3, show_dir=out)
    assert sorted(path.name for path in out.iterdir()) == ["3.png", "a.png", "a_1.png", "b.png"]
    picture = np.asarray(Image.open(out / "b.png"))
    assert picture.ndim == 3 and picture.shape[0] % 40 == 0, "small images are enlarged by whole factors"


def test_sizes_of_pictures(classify, folder, tmp_path):
    classify(folder / "b.png", show_dir=tmp_path / "1", rescale_factor=3)
    assert Image.open(tmp_path / "1" / "b.png").size == (150, 120)
    classify(folder / "b.png", show_dir=tmp_path / "2", resize=200, rescale_factor=1)
    assert Image.open(tmp_path / "2" / "b.png").size == (250, 200)
    classify(folder / "b.png", show_dir=tmp_path / "3", resize=200, rescale_factor=1, draw_score=False)
    assert np.any(np.asarray(Image.open(tmp_path / "2" / "b.png")) != np.asarray(Image.open(tmp_path / "3" / "b.png")))


def test_show_opens_the_viewer(classify, folder, monkeypatch):
    shown = []
    monkeypatch.setattr(Image.Image, "show", lambda self, title=None: shown.append((title, self.size)))
    classify([folder / "a.png", photo(1)], show=True, wait_time=1)
    assert [title for title, _ in shown] == ["a", "1"]


# --- models ----------------------------------------------------------------------------------------------------------


def test_by_name_the_published_weights_are_needed(monkeypatch, tmp_path):
    """`pretrained` is True unless said otherwise: nobody wants the classes of random weights without a word."""
    asked = []

    def refuse(model, pretrained, device, **options):
        asked.append(pretrained)
        raise ConfigError("stop here")

    monkeypatch.setattr(inference.base, "get_model", refuse)
    for arguments in ({}, dict(pretrained=None), dict(pretrained=True), dict(pretrained=False)):
        with pytest.raises(ConfigError, match="stop here"):
            ImageClassificationInferencer(NAME, **arguments)
    assert asked == [True, True, True, False]


def test_a_configuration_with_changes():
    config = dict(model=dict(model_info(NAME).model), data_preprocessor=dict(mean=[0] * 3, std=[255] * 3, to_rgb=True))
    config["test_dataloader"] = dict(dataset=dict(pipeline=[dict(type="Resize", scale=16)]))
    inferencer = ImageClassificationInferencer(config, False, "cpu:1", **TINY)
    assert inferencer.preprocessing.size == (16, 16) and inferencer.model.config["head"]["in_channels"] == 32
    assert "pred_class" not in inferencer(photo(0))[0], "nobody said which classes these are"


def test_weights_into_a_model_that_is_there(tmp_path, model):
    other = get_model(NAME, seed=3, **TINY)
    files.write(tmp_path / "other.safetensors", export(other))
    filled = get_model(NAME, **TINY)
    filled.train()
    found = ImageClassificationInferencer(filled, tmp_path / "other.safetensors")(photo(0))[0]["pred_scores"]
    np.testing.assert_allclose(found, by_hand(other, photo(0)), atol=1e-6)
    with pytest.raises(ConfigError, match="backbone: a model that is built cannot be changed; give its name"):
        ImageClassificationInferencer(model, backbone=dict(depth=34))


def test_models_that_do_not_classify(model):
    with pytest.raises(ConfigError, match="MAE has no head that classifies"):
        ImageClassificationInferencer("configs/mae.py:digits", pretrained=False)
    with pytest.raises(ConfigError, match="ImageClassifier has no head"):
        ImageClassificationInferencer(NAME, pretrained=False, head=None)
    with pytest.raises(ConfigError, match="does not know how images are prepared for this model: give preprocessing="):
        FeatureExtractor(model.backbone)
    with pytest.raises(ConfigError, match="Preprocessing has no argument 'men'. Did you mean 'mean'"):
        FeatureExtractor(model, preprocessing=dict(pipeline=[], men=(0, 0, 0)))


def test_lists_of_models():
    assert "resnet50_8xb32_in1k" in ImageClassificationInferencer.list_models("resnet50")
    assert "mae_vit-base-p16_8xb512-amp-coslr-300e_in1k" in FeatureExtractor.list_models("mae")
    assert not ImageClassificationInferencer.list_models("mae_")


# --- features --------------------------------------------------------------------------------------------------------


def test_features_of_image_files(folder):
    """The documents' example: a vector for each stage, without the batch axis."""
    model = get_model(NAME, backbone=dict(TINY["backbone"], out_indices=(0, 1, 2, 3)), head=dict(in_channels=32))
    extract = FeatureExtractor(model)
    found = extract(folder, batch_size=2)
    assert [tuple(f.shape for f in features) for features in found] == [((4,), (8,), (16,), (32,))] * 3
    assert all(isinstance(f, np.ndarray) for features in found for f in features)
    pixels = extract.prepare(photo(0, 30, 50))
    images = normalize(jnp.asarray(pixels)[None], CIFAR)
    for one, expected in zip(found[0], model.extract_feat(images), strict=True):
        np.testing.assert_allclose(one, expected[0], rtol=1e-4, atol=1e-5)
    maps = extract(folder / "a.png", stage="backbone")[0]
    assert [f.shape for f in maps] == [(32, 32, 4), (16, 16, 8), (8, 8, 16), (4, 4, 32)]
    assert extract(folder / "a.png", stage="pre_logits")[0].shape == (32,)
    with pytest.raises(ConfigError, match="unknown stage 'nek'. Did you mean 'neck'"):
        extract(folder / "a.png", stage="nek")


def test_features_of_a_method():
    features = FeatureExtractor("configs/mae.py:digits", pretrained=False)(photo(0))[0]
    assert features[-1].shape == (65, 64)


# --- inference_model -------------------------------------------------------------------------------------------------


def test_inference_model(model, folder, tmp_path):
    result = inference_model(model, folder / "a.png", show_dir=tmp_path / "out", classes=list("abcdefghij"))
    assert result["pred_class"] in "abcdefghij" and (tmp_path / "out" / "a.png").exists()
    np.testing.assert_allclose(result["pred_scores"], by_hand(model, photo(0, 30, 50)), atol=1e-6)
    with pytest.raises(ConfigError, match="inference_model has no argument 'show_dri'. Did you mean 'show_dir'"):
        inference_model(model, folder / "a.png", show_dri="x")
    with pytest.raises(ConfigError, match="llava-7b-v1.5_vqa is for Visual Question Answering, for which"):
        inference_model("llava-7b-v1.5_vqa", folder / "a.png")
    with pytest.raises(ConfigError, match="There is no model 'resnet51' in the zoo"):
        inference_model("resnet51", folder / "a.png")


# --- compiled calls --------------------------------------------------------------------------------------------------


def test_compiled_calls_follow_the_model():
    model = get_model(NAME, **TINY)
    fast, images = jit(model), jnp.asarray(np.random.default_rng(0).standard_normal((2, 32, 32, 3)), jnp.float32)
    np.testing.assert_allclose(fast(images), model(images), atol=1e-5)
    np.testing.assert_allclose(fast.predict(images), model.predict(images), atol=1e-6)
    features = fast.extract_feat(images, stage="backbone")
    np.testing.assert_allclose(features[-1], model.extract_feat(images, stage="backbone")[-1], atol=1e-5)
    assert fast.extract_feat(images)[-1].shape == (2, 32)
    model.head.fc.bias[...] = jnp.arange(10.0)
    np.testing.assert_allclose(fast(images), model(images), atol=1e-5)
    model.train()
    trained = fast(images)
    model.eval()
    assert np.abs(fast(images) - trained).max() > 1e-3
    model.head = None
    assert fast(images)[-1].shape == (2, 32)


# --- examples --------------------------------------------------------------------------------------------------------


EXAMPLES = ("get_model", "inference_model", "jit", "list_models", "model_info")


@pytest.mark.parametrize("name", [*EXAMPLES, "FeatureExtractor", "ImageClassificationInferencer"])
def test_examples_in_docstrings(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number, file in enumerate(("photo.jpg", "other.jpg")):
        Image.fromarray(photo(number)).save(file)
    scope = {key: getattr(jaxpretrain, key) for key in dir(jaxpretrain)} | dict(jnp=jnp, jit=jit, model_info=model_info)
    found = doctest.DocTestFinder(recurse=False).find(scope[name], name, globs=scope)
    assert sum(len(test.examples) for test in found) > 0
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    for test in found:
        out: list[str] = []
        assert runner.run(test, out=out.append).failed == 0, "".join(out)
    assert isinstance(scope["get_model"]("resnet18_8xb16_cifar10", **TINY), nnx.Module)
