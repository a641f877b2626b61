"""Forms for inference: the same outputs from fewer layers, in memory, in files and by the tool."""

from __future__ import annotations

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import nnx

from jaxpretrain import cli, get_model
from jaxpretrain.build import ConfigError, abstract, build
from jaxpretrain.interop import InteropError, export, files, load_weights
from jaxpretrain.interop import mmpretrain as hub
from jaxpretrain.models.fuse import deployed_config, for_inference, fuse_conv_bn, switch_to_deploy
from jaxpretrain.models.layers.base import BaseModule, Frozen
from jaxpretrain.models.layers.conv import Conv2d, ConvModule
from jaxpretrain.models.layers.norm import BatchNorm
from jaxpretrain.models.layers.patch_embed import PatchEmbed
from jaxpretrain.tools import compare, from_torch, reparameterize_model, to_torch
from tests.backbone_cases import CASES
from tests.test_backbones import assert_close, call, images, made

DEPLOYED = ("RepVGG", "RepVGGWithAll", "MobileOne", "RepLKNet", "RepMLPNet")
NORMS_LEFT = {"RepMLPNet": 7, "RepLKNet": 5}  # those before a layer, and the last


def norms(model):
    return [path for path, module in nnx.iter_modules(model) if isinstance(module, BatchNorm)]


@pytest.mark.parametrize("name", DEPLOYED)
def test_forms_for_inference_give_the_same(name):
    case = CASES[name]
    model, x = made(case.config, training=False), images(case.size, 2)
    before, count = call(model, x), len(hub.names(model))
    model.switch_to_deploy()
    model.switch_to_deploy()  # a second time changes nothing
    assert len(hub.names(model)) < count
    for deployed, output in zip(call(model, x), before, strict=True):
        assert_close(deployed, output)
    assert fuse_conv_bn(model, image_size=case.size) or name in ("RepVGG", "MobileOne")
    assert len(norms(model)) == NORMS_LEFT.get(name, 0)
    for fused, output in zip(call(model, x), before, strict=True):
        assert_close(fused, output)


@pytest.mark.parametrize("name", DEPLOYED)
def test_both_forms_are_read_and_written(name):
    """By MMPretrain's names; the constructor's deployed form is that of `switch_to_deploy`."""
    config = CASES[name].config
    model = made(config, training=False)
    plain = export(model)
    again = abstract(config)
    load_weights(again, plain)
    switch_to_deploy(again)
    state = export(again)
    deployed = abstract(deployed_config(config))
    load_weights(deployed, state)
    assert hub.shapes(deployed) == {name: array.shape for name, array in state.items()}
    for key, array in export(deployed).items():
        np.testing.assert_array_equal(array, state[key])
    with pytest.raises(InteropError):
        load_weights(abstract(config), state)


class Patches(BaseModule):
    """Of images whose sides are padded or cut."""

    def __init__(self, rngs):
        kwargs = dict(embed_dims=6, kernel_size=4, norm_cfg=dict(type="BN"), rngs=rngs)
        self.padded, self.cut = PatchEmbed(**kwargs), PatchEmbed(**kwargs, padding=0)

    def __call__(self, x, *, rngs=None):
        return self.padded(x)[0], self.cut(x)[0]


def test_norms_of_patches():
    """Their projection is a convolution, though it computes otherwise."""
    model, x = made(dict(type=Patches), training=False), images(10, 2)
    before = call(model, x)
    assert [output.shape[1] for output in before] == [9, 4]
    assert fuse_conv_bn(model, image_size=10) == ["padded.norm", "cut.norm"]
    for fused, output in zip(call(model, x), before, strict=True):
        assert_close(fused, output)


def test_frozen_stages_stay_frozen():
    case = CASES["RepVGG"]
    model = made(case.config | dict(frozen_stages=1), training=False)
    switch_to_deploy(model)
    assert isinstance(model.stem.branch_reparam.bias, Frozen) and isinstance(model.stem.branch_reparam.kernel, Frozen)
    assert isinstance(model.stage_2[0].branch_reparam.bias, nnx.Param)


def test_only_batch_norm_can_be_fused():
    model = build(CASES["RepVGG"].config | dict(norm_cfg=dict(type="GN", num_groups=2)))
    with pytest.raises(ConfigError, match="Only BatchNorm can be fused with a convolution, not GroupNorm"):
        switch_to_deploy(model)


RESNET = dict(
    type="ImageClassifier",
    backbone=dict(type="ResNetV1d", depth=18, base_channels=2, stem_channels=8),
    neck=dict(type="GlobalAveragePooling"),
    head=dict(type="LinearClsHead", num_classes=5, in_channels=16),
)


def test_batch_norms_of_a_resnet():
    """Those of the stem, the blocks and the shortcuts, found by what follows what."""
    model, x = made(RESNET, training=False), images(32, 2)
    before = call(model, x)
    count = len(norms(model))
    gone = fuse_conv_bn(model, image_size=32)
    assert len(gone) == count and not norms(model)
    assert {"backbone.stem.0.bn", "backbone.layer1.0.bn2", "backbone.layer2.0.downsample.2"} <= set(gone)
    assert_close(call(model, x)[0], before[0])
    assert not fuse_conv_bn(model, image_size=32)


class PreActivation(nnx.Module):
    """What must not be fused: a norm before its convolution, an output with two readers, a layer that is called twice."""

    def __init__(self, rngs):
        self.bn1, self.conv1 = BatchNorm(3), Conv2d(3, 4, 3, padding=1, rngs=rngs)
        self.bn2, self.conv2 = BatchNorm(4), Conv2d(4, 4, 1, rngs=rngs)
        self.bn3, self.conv3 = BatchNorm(4), Conv2d(4, 4, 1, bias=False, rngs=rngs)
        self.bn4 = BatchNorm(4)

    def __call__(self, x, *, rngs=None):
        y = self.conv1(jax.nn.relu(self.bn1(x)))
        y = y + self.bn2(y)
        y = self.bn3(self.conv2(y))  # the one pair
        return self.bn4(self.conv3(self.bn4(self.conv3(y))))


def test_only_what_follows_directly_is_fused():
    model, x = PreActivation(nnx.Rngs(0)), images(8, 2)
    rng = np.random.default_rng(0)
    for norm in (model.bn1, model.bn2, model.bn3, model.bn4):
        for variable in (norm.mean, norm.var, norm.scale, norm.bias):
            variable.set_value(rng.uniform(0.5, 1.5, variable.shape).astype(np.float32))
    model.eval()
    before = call(model, x)[0]
    assert fuse_conv_bn(model, image_size=8) == ["bn3"]
    assert_close(call(model, x)[0], before)


def test_it_works_on_shapes_alone():
    model = nnx.eval_shape(lambda: for_inference(build(RESNET), image_size=32))
    assert not norms(model) and model.backbone.stem[0].conv.bias is not None
    assert isinstance(model.backbone.stem[0], ConvModule)


def test_get_model_fuses(tmp_path):
    (tmp_path / "model.json").write_text(json.dumps(RESNET))
    plain = get_model(tmp_path / "model.json", seed=3)
    fused = get_model(tmp_path / "model.json", seed=3, fuse=True)
    assert norms(plain) and not norms(fused)
    assert_close(call(fused, images(32, 2))[0], call(plain, images(32, 2))[0])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Two classifiers and their weights, in the working directory."""
    monkeypatch.chdir(tmp_path)
    head = dict(type="LinearClsHead", num_classes=5, in_channels=16)
    vgg = RESNET | dict(backbone=CASES["RepVGG"].config, head=head)
    for name, config in (("vgg", vgg), ("resnet", RESNET)):
        (tmp_path / f"{name}.json").write_text(json.dumps(config))
        files.write(f"{name}.pth", export(made(config, training=False)))
    return tmp_path


def run_tool(*arguments):
    return cli.run(reparameterize_model.main, list(arguments))


def test_the_tool_writes_a_file_and_a_directory(folder, capsys):
    assert run_tool("vgg.json", "vgg.pth", "deploy.pth") == cli.OK
    out = capsys.readouterr().out
    assert "parts deployed, 0 norms melted" in out and "of the largest magnitude apart" in out
    state = files.read("deploy.pth")
    assert "backbone.stem.branch_reparam.weight" in state and not any("branch_3x3" in name for name in state)
    assert run_tool("vgg.json", "vgg.pth", "deploy", "--layout=mmpretrain") == cli.OK
    about = json.loads((folder / "deploy" / "model.json").read_text())
    assert about["model"]["backbone"]["deploy"] is True and about["fused"] is False
    x = images(32, 2)
    expected = call(get_model("vgg.json", "vgg.pth"), x)[0]
    assert_close(call(get_model("deploy/model.json", "deploy"), x)[0], expected)
    assert_close(call(get_model("vgg.json", "deploy.pth", backbone=dict(deploy=True)), x)[0], expected)


def test_the_tool_fuses_batch_norms(folder):
    assert run_tool("resnet.json", "resnet.pth", "fused", "--fuse-bn") == cli.OK
    fused = get_model("fused/model.json", "fused")
    assert not norms(fused)
    assert_close(call(fused, images(32, 2))[0], call(get_model("resnet.json", "resnet.pth"), images(32, 2))[0])


@pytest.mark.parametrize("name", ["vgg", "resnet"])
def test_all_tools_read_every_form(folder, name):
    """Directories and files, deployed or fused; whether the configuration says so, or is that of training."""
    x = images(32, 2)
    expected = call(get_model(f"{name}.json", f"{name}.pth"), x)[0]
    assert run_tool(f"{name}.json", f"{name}.pth", "form", "--fuse-bn") == cli.OK
    for where in ("form.pth", "form.safetensors"):
        assert cli.run(to_torch.main, ["--checkpoint=form", f"--dst={where}"]) == cli.OK
        assert_close(call(get_model(f"{name}.json", where), x)[0], expected)
    assert cli.run(to_torch.main, ["--checkpoint=form.pth", f"--model={name}.json", "--dst=again.pth"]) == cli.OK
    state, again = files.read("form.pth"), files.read("again.pth")
    assert all(np.array_equal(again[key], array) for key, array in state.items()) and again.keys() == state.keys()
    assert cli.run(from_torch.main, [f"--model={name}.json", "--src=form.pth", "--dst=back"]) == cli.OK
    assert_close(call(get_model("back/model.json", "back"), x)[0], expected)
    assert cli.run(compare.main, [f"--model={name}.json", "--src=form.pth", "--layout=mmpretrain"]) == cli.FAILED


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["vgg.json", "vgg.pth"], "Give MODEL, CHECKPOINT and DST, in this order; got vgg.json vgg.pth"),
        (["resnet.json", "resnet.pth", "new"], "no form for inference; --fuse-bn melts BatchNorm"),
        (["resnet.json", "resnet.pth", "new.pth", "--fuse-bn"], "give a directory, not new.pth"),
        (["resnet.json", "resnet.pth", ".", "--fuse-bn"], "exists already"),
        (["vgg.json", "resnet.pth", "new"], "does not fit"),
    ],
)
def test_mistakes_are_one_line(folder, capsys, arguments, message):
    assert run_tool(*arguments) == cli.USAGE
    assert message in capsys.readouterr().err
    assert not (folder / "new").exists() and not (folder / "new.pth").exists()


def test_the_tool_says_how_it_is_used():
    command = [sys.executable, "-m", "jaxpretrain.tools.reparameterize_model", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "MODEL CHECKPOINT DST" in done.stdout and "--fuse_bn" in done.stdout
