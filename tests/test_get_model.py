"""`get_model`: names and configurations to models, with weights and without. Tiny models; a web server on this machine."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict, FrozenConfigDict

import jaxpretrain
from jaxpretrain import get_model, init_model
from jaxpretrain.build import ConfigError, build
from jaxpretrain.interop import InteropError, export, files, save_weights
from jaxpretrain.models.layers import BatchNorm
from jaxpretrain.models.layers.conv import Conv2d
from jaxpretrain.zoo import download as download_module
from jaxpretrain.zoo import factory, index
from jaxpretrain.zoo.download import DownloadError
from jaxpretrain.zoo.index import model_info
from tests.weights_server import serve

NAME = "resnet18_8xb16_cifar10"
SMALL = dict(base_channels=4, stem_channels=4)
TINY = dict(backbone=SMALL, head=dict(in_channels=32))
IMAGES = np.random.default_rng(0).standard_normal((2, 32, 32, 3)).astype(np.float32)


def arrays(model: nnx.Module) -> dict[tuple, np.ndarray]:
    return {path: np.asarray(variable.get_value()) for path, variable in nnx.state(model).flat_state()}


def assert_same(a: nnx.Module, b: nnx.Module) -> None:
    left, right = arrays(a), arrays(b)
    assert left.keys() == right.keys()
    assert all((left[path] == right[path]).all() for path in left)


# --- without weights -------------------------------------------------------------------------------------------------


def test_a_name_gives_a_classifier_in_eval_mode():
    model = get_model(NAME, **TINY)
    assert model(IMAGES).shape == (2, 10)
    assert all(m.use_running_average for _, m in nnx.iter_modules(model) if isinstance(m, BatchNorm))
    one, two = model(IMAGES[:1]), model(IMAGES)[:1]
    np.testing.assert_allclose(one, two, atol=1e-6, err_msg="in training mode images would depend on each other")
    np.testing.assert_allclose(model.predict(IMAGES).sum(axis=1), 1, rtol=1e-6)
    assert model.info.name == NAME and model.info.preprocessing.size == (32, 32)
    assert model.config is model._config and model.config["backbone"]["base_channels"] == 4
    model.train()
    assert not model.backbone.bn1.use_running_average
    assert model.eval() is None and model.backbone.bn1.use_running_average


def test_names_know_no_case():
    assert get_model(NAME.upper(), **TINY).info.name == NAME


def test_features_by_stage():
    model = get_model(NAME, backbone=dict(SMALL, out_indices=(0, 1, 2, 3)), head=dict(in_channels=32))
    maps = model.extract_feat(IMAGES, stage="backbone")
    assert [f.shape for f in maps] == [(2, 32, 32, 4), (2, 16, 16, 8), (2, 8, 8, 16), (2, 4, 4, 32)]
    assert [f.shape for f in model.extract_feat(IMAGES)] == [(2, 4), (2, 8), (2, 16), (2, 32)]
    assert model.extract_feat(IMAGES, stage="pre_logits").shape == (2, 32)


def test_none_removes_a_part():
    model = get_model(NAME, head=None, neck=None, backbone=dict(SMALL, out_indices=(1, 2, 3)))
    assert model.head is None and model.neck is None
    assert [f.shape for f in model(IMAGES)] == [(2, 16, 16, 8), (2, 8, 8, 16), (2, 4, 4, 32)]


def test_another_type_replaces_a_part_and_delete_does():
    neck = dict(type="NonLinearNeck", in_channels=32, hid_channels=8, out_channels=6)
    model = get_model(NAME, backbone=SMALL, neck=neck, head=None)
    assert model.config["neck"] == neck
    head = dict(_delete_=True, type="LinearClsHead", num_classes=3, in_channels=32)
    assert get_model(NAME, backbone=SMALL, head=head).config["head"] == {k: head[k] for k in list(head)[1:]}
    same = get_model(NAME, backbone=SMALL, head=dict(type="LinearClsHead", in_channels=32))
    assert same.config["head"]["num_classes"] == 10


def test_random_weights_follow_the_seed():
    assert_same(get_model(NAME, **TINY), get_model(NAME, **TINY))
    one, other = get_model(NAME, seed=1, **TINY), get_model(NAME, seed=2, **TINY)
    assert (one.backbone.conv1.kernel[...] != other.backbone.conv1.kernel[...]).any()


def test_random_weights_have_the_layers_own_distributions():
    """PyTorch's: uniform within 1 / sqrt(fan-in); norms 1 and 0; as `build` has them, and quite without jax.random."""
    model = get_model(NAME, backbone=dict(base_channels=16, stem_channels=16), head=dict(in_channels=128))
    by_jax = build(model.config, rngs=nnx.Rngs(0))
    for (path, layer), (_, other) in zip(nnx.iter_modules(model), nnx.iter_modules(by_jax), strict=True):
        if isinstance(layer, Conv2d):
            kernel, bound = np.asarray(layer.kernel[...]), layer.kernel[...][..., 0].size ** -0.5
            assert np.abs(kernel).max() <= bound, path
            assert abs(kernel.std() * 3**0.5 / bound - 1) < 5 / kernel.size**0.5, path
            assert (kernel != other.kernel[...]).any()
        elif isinstance(layer, BatchNorm):
            assert (layer.scale[...] == 1).all() and (layer.bias[...] == 0).all()


def test_truncated_and_normal_draws_of_the_host():
    from jaxpretrain.models.layers.init import draw_on_host, normal, trunc_normal, uniform

    with draw_on_host(0):
        cut = np.asarray(trunc_normal(std=0.5, mean=0.25, a=-0.5, b=1.0)(None, (200_000,)))
        plain = np.asarray(normal(mean=1.0, std=2.0)(None, (200_000,)))
        even = np.asarray(uniform(-1.0, 3.0)(None, (200_000,)))
    by_jax = np.asarray(trunc_normal(std=0.5, mean=0.25, a=-0.5, b=1.0)(jax.random.key(0), (200_000,)))
    assert cut.min() >= -0.5 and cut.max() <= 1.0 and cut.dtype == plain.dtype == even.dtype == np.float32
    np.testing.assert_allclose([cut.mean(), cut.std()], [by_jax.mean(), by_jax.std()], atol=0.01)
    np.testing.assert_allclose([plain.mean(), plain.std(), even.mean(), even.std()], [1, 2, 1, 4 / 12**0.5], atol=0.02)
    assert (even >= -1).all() and (even < 3).all()


@pytest.mark.parametrize("device", ["cpu:3", "cpu"])
def test_devices(device):
    model = get_model(NAME, device=device, **TINY)
    expected = jax.local_devices(backend="cpu")[int(device[4:] or 0)]
    assert {d for v in jax.tree.leaves(nnx.state(model)) for d in v.devices()} == {expected}
    assert model(IMAGES).devices() == {expected}
    assert get_model(NAME, device=expected, **TINY).head.fc.kernel[...].devices() == {expected}


@pytest.mark.parametrize("device", ["cpu:99", "quantum", "cpu:x", "cuda:0"])
def test_a_device_that_is_not_there(device):
    with pytest.raises(ConfigError, match=f"There is no device '{device}' here; there are cpu:0, cpu:1"):
        get_model(NAME, device=device, **TINY)


def test_inside_eval_shape_there_are_shapes_alone():
    model = nnx.eval_shape(lambda: get_model("vit-base-p16_32xb128-mae_in1k"))
    assert isinstance(model.backbone.pos_embed.get_value(), jax.ShapeDtypeStruct)
    assert model.info.name == "vit-base-p16_32xb128-mae_in1k"
    assert nnx.eval_shape(lambda: get_model(NAME, head=None)).head is None
    with pytest.raises(ConfigError, match="cannot be loaded inside jit or eval_shape"):
        nnx.eval_shape(lambda: get_model(NAME, pretrained=True))


def test_pretraining_names_give_the_method():
    method = nnx.eval_shape(lambda: get_model("mae_vit-base-p16_8xb512-amp-coslr-300e_in1k"))
    assert type(method).__name__ == "MAE"
    features = nnx.eval_shape(lambda: get_model("simclr_resnet50_16xb256-coslr-200e_in1k")(jnp.zeros((2, 64, 64, 3))))
    assert features[0].shape == (2, 2, 2, 2048)
    tokens = nnx.eval_shape(
        lambda: get_model("mae_vit-base-p16_8xb512-amp-coslr-300e_in1k").extract_feat(jnp.zeros((1, 224, 224, 3)))
    )
    assert tokens[-1].shape == (1, 197, 768), "nothing is hidden"


# --- configurations --------------------------------------------------------------------------------------------------

CONFIG = dict(
    type="ImageClassifier",
    backbone=dict(type="ResNet_CIFAR", depth=18, **SMALL),
    neck=dict(type="GlobalAveragePooling"),
    head=dict(type="LinearClsHead", num_classes=5, in_channels=32),
)
NORMALISATION = dict(mean=[1.0, 2.0, 3.0], std=[4.0, 5.0, 6.0], to_rgb=True)
PIPELINE = [dict(type="LoadImageFromFile"), dict(type="Resize", scale=32), dict(type="PackInputs")]


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        ConfigDict(CONFIG),
        FrozenConfigDict(CONFIG),
        dict(model=CONFIG),
        dict(method=dict(type="Supervised", model=CONFIG)),
    ],
    ids=["dict", "ConfigDict", "FrozenConfigDict", "model", "method"],
)
def test_configurations(config):
    model = get_model(config, head=dict(num_classes=4))
    assert model(IMAGES).shape == (2, 4)
    assert CONFIG["head"]["num_classes"] == 5, "the caller's own is not changed"
    assert model.info.name == "" and model.info.preprocessing is None and model.info.paper is None


def test_preprocessing_of_a_whole_configuration():
    loader = dict(dataset=dict(type="ImageNet", pipeline=PIPELINE))
    whole = dict(model=CONFIG, data_preprocessor=NORMALISATION, test_dataloader=loader)
    ours = get_model(whole).info.preprocessing
    assert ours.pipeline == PIPELINE[1:2] and ours.mean == (1, 2, 3) and ours.channel_order == "rgb"
    theirs = get_model(whole | dict(data_preprocessor=dict(NORMALISATION, to_rgb=False))).info.preprocessing
    assert theirs.mean == (3, 2, 1) and theirs.std == (6, 5, 4) and theirs.channel_order == "bgr"


def test_recipes_and_json_files(tmp_path):
    model = get_model("configs/resnet.py:digits")
    assert type(model).__name__ == "ImageClassifier" and model.info.preprocessing.size == (32, 32)
    (tmp_path / "config.json").write_text(json.dumps(dict(method=CONFIG, data={}, load_from=None)))
    assert get_model(tmp_path / "config.json")(IMAGES).shape == (2, 5)
    with pytest.raises(ConfigError, match="There is no file .*none.json"):
        get_model(str(tmp_path / "none.json"))
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ConfigError, match="is not JSON"):
        get_model(tmp_path / "bad.json")


def test_mistakes_name_what_is_near():
    for call, message in [
        (lambda: get_model("resnet18_8xb16_cifar1"), "There is no model .*Did you mean 'resnet18_8xb16_cifar10'"),
        (lambda: get_model(NAME, hed=dict()), "ImageClassifier has no argument 'hed'. Did you mean 'head'"),
        (lambda: get_model(NAME, backbone=dict(dept=18)), "no argument 'dept'. Did you mean 'depth'"),
        (lambda: get_model(dict(backbone={})), "a configuration has a 'type'"),
        (lambda: get_model(3), "give a name, a file or a configuration, not int"),
        (lambda: get_model(CONFIG, pretrained=True), "a configuration has no weights of its own"),
    ]:
        with pytest.raises(ConfigError, match=message):
            call()


# --- weights ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def zoo(monkeypatch, tmp_path):
    """The zoo with one model more, `tiny`, whose weights a server on this machine has."""
    monkeypatch.setenv("JAXPRETRAIN_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(download_module, "_PAUSE", 0.01)
    original = get_model(CONFIG, seed=7)
    files.write(tmp_path / "tiny.pth", export(original), meta=dict(epoch=3))
    data = (tmp_path / "tiny.pth").read_bytes()
    path = f"/tiny_20230101-{hashlib.sha256(data).hexdigest()[:8]}.pth"
    with serve() as server:
        server.content[path] = data
        lines = dict(index._lines())
        entry = json.dumps(
            json.loads(lines[NAME]) | dict(name="tiny", model=CONFIG, weights=server.url + path, note="Mind.")
        )
        monkeypatch.setattr(index, "_lines", lambda: lines | {"tiny": entry})
        server.original, server.path, server.file = original, path, tmp_path / "tiny.pth"
        yield server


def no_random_weights(monkeypatch) -> None:
    def refuse(*args):
        raise AssertionError("with weights, nothing is to be initialised at random")

    monkeypatch.setattr(factory, "_with_random_weights", refuse)


def test_published_weights_are_fetched_and_converted_once(zoo, tmp_path, monkeypatch):
    no_random_weights(monkeypatch)
    model = get_model("tiny", pretrained=True)
    assert_same(model, zoo.original)
    assert model(IMAGES).shape == (2, 5) and model.backbone.bn1.use_running_average
    assert len(zoo.requests) == 1
    name = zoo.path[1:-4]
    folder = tmp_path / "home"
    assert (folder / "downloads" / f"{name}.pth").exists() and (folder / "models" / f"{name}.safetensors").exists()
    (
        folder / "downloads" / f"{name}.pth"
    ).unlink()  # the converted form is enough, and needs neither PyTorch nor network
    monkeypatch.setattr(files, "import_torch", lambda path: pytest.fail("PyTorch was asked for"))
    assert_same(get_model("tiny", pretrained=True), zoo.original)
    assert_same(get_model("tiny", pretrained=model.info.weights), zoo.original)
    assert len(zoo.requests) == 1


def test_settings_that_the_published_weights_need(zoo, monkeypatch):
    released = dict(backbone=dict(style="caffe"))
    info = dataclasses.replace(model_info("tiny"), released=released)
    monkeypatch.setattr("jaxpretrain.zoo.factory.model_info", lambda name: info)
    assert get_model("tiny", pretrained=True).config["backbone"]["style"] == "caffe"
    assert get_model("tiny", pretrained=True, backbone=dict(style="pytorch")).config["backbone"]["style"] == "pytorch"
    assert "style" not in get_model("tiny").config["backbone"]
    assert "style" not in get_model("tiny", pretrained=str(zoo.file)).config["backbone"]
    for name, setting in (("deit3-small-p16_3rdparty_in1k", "ffn_norm"), ("vit-tiny-p14_eva02-pre_in21k", "rope")):
        assert setting in model_info(name).released["backbone"]


def test_weights_converted_and_damaged_since_are_made_again(zoo, tmp_path):
    get_model("tiny", pretrained=True)
    file = tmp_path / "home" / "models" / f"{zoo.path[1:-4]}.safetensors"
    data = bytearray(file.read_bytes())
    data[-9] ^= 64
    file.write_bytes(data)
    assert_same(get_model("tiny", pretrained=True), zoo.original)
    assert len(zoo.requests) == 1


def test_a_wrong_file_is_not_used(zoo, tmp_path):
    zoo.content[zoo.path] = zoo.content[zoo.path][:-1] + b"x"
    with pytest.raises(DownloadError, match="damaged or another file"):
        get_model("tiny", pretrained=True)
    assert not list((tmp_path / "home" / "models").glob("*.safetensors"))


def test_offline_the_file_can_be_put_there_by_hand(zoo, tmp_path):
    data = zoo.content.pop(zoo.path)
    place = tmp_path / "home" / "downloads" / zoo.path[1:]
    with pytest.raises(DownloadError, match=f"put it at {place}"):
        get_model("tiny", pretrained=True)
    place.write_bytes(data)
    assert_same(get_model("tiny", pretrained=True), zoo.original)


def test_another_place_for_all_weights(zoo, tmp_path):
    mirror = tmp_path / "mirror"
    mirror.mkdir()
    (mirror / zoo.path[1:]).write_bytes(zoo.content[zoo.path])
    model = get_model("tiny", pretrained=True, url_mapping=("http://.*/", f"{mirror}/"))
    assert_same(model, zoo.original) and not zoo.requests
    with pytest.raises(ConfigError, match="There are no weights at /nowhere/"):
        get_model("tiny", pretrained="http://host/other.pth", url_mapping=("http://.*/", "/nowhere/"))


def test_a_head_of_another_class_count(zoo):
    with pytest.raises(InteropError, match=r"(?s)head.*another number of classes: reinit_head=True.*\nMind\."):
        get_model("tiny", pretrained=True, head=dict(num_classes=3))
    model = get_model("tiny", pretrained=True, reinit_head=True, head=dict(num_classes=3))
    assert model(IMAGES).shape == (2, 3)
    kernel = np.asarray(model.head.fc.kernel[...])
    assert 0 < kernel.std() < 0.05, "the head's own rule, N(0, 0.01)"
    assert (model.backbone.conv1.kernel[...] == zoo.original.backbone.conv1.kernel[...]).all()
    assert_same(get_model("tiny", pretrained=True), zoo.original)  # the cache holds the published weights
    assert_same(get_model("tiny", pretrained=True, reinit_head=True), zoo.original)  # nothing to initialise anew


def test_removed_parts_leave_their_weights_out(zoo, monkeypatch):
    no_random_weights(monkeypatch)
    model = get_model("tiny", pretrained=True, head=None, neck=None, backbone=dict(out_indices=(1, 2, 3)))
    assert [f.shape[-1] for f in model(IMAGES)] == [8, 16, 32]
    assert set(arrays(zoo.original)) - set(arrays(model)) == {("head", "fc", "kernel"), ("head", "fc", "bias")}


def test_not_strict_takes_what_fits_and_warns_of_the_rest(zoo):
    with pytest.warns(UserWarning) as warnings:
        neck = dict(type="NonLinearNeck", in_channels=32, hid_channels=8, out_channels=32, with_avg_pool=True)
        model = get_model("tiny", pretrained=True, strict=False, neck=neck, head=dict(num_classes=3))
    said = " ".join(str(w.message) for w in warnings)
    assert "stays random: " in said and "neck.fc0.kernel" in said and "head.fc.bias" in said and "conv1" not in said
    assert model(IMAGES).shape == (2, 3)
    assert (model.backbone.conv1.kernel[...] == zoo.original.backbone.conv1.kernel[...]).all()
    with pytest.warns(UserWarning, match="of the weights is left out: head.fc.bias, head.fc.kernel"):
        get_model("tiny", pretrained=True, strict=False, head=None)


@pytest.mark.parametrize("form", ["pth", "safetensors", "directory", "url"])
def test_weights_of_ones_own(zoo, tmp_path, form, monkeypatch):
    no_random_weights(monkeypatch)
    source = {
        "pth": zoo.file,
        "safetensors": tmp_path / "w.safetensors",
        "directory": tmp_path / "converted",
        "url": f"{zoo.url}{zoo.path}",
    }[form]
    if form == "safetensors":
        files.write(source, export(zoo.original))
    if form == "directory":
        save_weights(zoo.original, source)
    assert_same(get_model(CONFIG, pretrained=source), zoo.original)
    assert_same(init_model(CONFIG, source if form == "url" else str(source), "cpu"), zoo.original)


def test_a_configuration_may_say_what_it_starts_from(zoo):
    assert_same(get_model(dict(model=CONFIG, load_from=str(zoo.file)), pretrained=True), zoo.original)


def test_no_such_weights(tmp_path):
    with pytest.raises(ConfigError, match="There are no weights at none.pth in "):
        get_model(CONFIG, pretrained="none.pth")
    with pytest.raises(ConfigError, match="published no weights of vit-base-p16_mae-300e-pre_8xb128"):
        get_model("vit-base-p16_mae-300e-pre_8xb128-coslr-100e_in1k", pretrained=True)


# --- the package -----------------------------------------------------------------------------------------------------


def test_importing_the_package_loads_next_to_nothing():
    code = (
        "import sys, time; t = time.perf_counter(); import jaxpretrain; names = jaxpretrain.list_models('resnet'); "
        "t = time.perf_counter() - t; "
        "loaded = {'jax', 'flax', 'torch', 'tensorflow', 'numpy', 'matplotlib', 'PIL'} & set(sys.modules); "
        "assert not loaded, loaded; assert t < 1, t; assert names"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names_are_documented_with_examples():
    for name in ("list_models", "get_model", "inference_model", "ImageClassificationInferencer", "FeatureExtractor"):
        assert name in dir(jaxpretrain)
        assert ">>> " in getattr(jaxpretrain, name).__doc__


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet50_8xb32_in1k", "vit-base-p16_32xb128-mae_in1k"])
def test_random_weights_take_seconds(name):
    """15 and 8 s of CPU time by jax.random outside of jit; 1.5 and 1.7 s here."""
    start = time.process_time()
    get_model(name)
    assert time.process_time() - start < 5
