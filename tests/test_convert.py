"""The conversion scripts, as they are called: there and back bit for bit, and one line for every mistake."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from jaxpretrain.cli import run
from jaxpretrain.interop import export, files, load_weights
from jaxpretrain.interop import mmpretrain as hub
from jaxpretrain.tools import compare, from_torch, to_torch
from tests.test_interop import CLASSIFIER, abstract, random_state

ROOT = Path(__file__).parents[1]


@pytest.fixture
def folder(tmp_path):
    """A model.json of a tiny ViT and its weights as MMPretrain's and timm's files."""
    (tmp_path / "model.json").write_text(json.dumps(CLASSIFIER))
    model = abstract(CLASSIFIER)
    state = random_state(model)
    load_weights(model, state)
    files.write(tmp_path / "mmpretrain.pth", state, meta=dict(epoch=1))
    files.write(tmp_path / "timm.safetensors", export(model, "timm"))
    return tmp_path


def call(main, **flags):
    return run(main, [f"--{name}={value}" for name, value in flags.items()])


def same(a, b):
    a, b = files.read(a), files.read(b)
    assert a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def test_there_and_back(folder, capsys):
    assert call(from_torch.main, model=folder / "model.json", src=folder / "timm.safetensors", dst=folder / "d") == 0
    assert "(layout timm)" in capsys.readouterr().out
    note = json.loads((folder / "d" / "model.json").read_text())
    assert note["model"] == CLASSIFIER and note["layout"] == "timm"
    assert call(to_torch.main, checkpoint=folder / "d", dst=folder / "back.pth") == 0
    same(folder / "back.pth", folder / "mmpretrain.pth")
    assert call(to_torch.main, checkpoint=folder / "d", dst=folder / "back.safetensors", layout="timm") == 0
    same(folder / "back.safetensors", folder / "timm.safetensors")


def test_the_backbone_alone(folder):
    flags = dict(model=folder / "model.json", src=folder / "mmpretrain.pth", dst=folder / "d", part="backbone")
    assert call(from_torch.main, **flags) == 0
    assert call(to_torch.main, checkpoint=folder / "d", dst=folder / "b.pth") == 0
    state = files.read(folder / "mmpretrain.pth")
    wanted = {name.removeprefix("backbone."): array for name, array in state.items() if not name.startswith("head.")}
    back = files.read(folder / "b.pth")
    assert back.keys() == wanted.keys() and all(np.array_equal(back[name], wanted[name]) for name in back)


def test_another_number_of_classes(folder, capsys):
    config = {**CLASSIFIER, "head": {**CLASSIFIER["head"], "num_classes": 3}}
    (folder / "model.json").write_text(json.dumps(config))
    flags = dict(model=folder / "model.json", src=folder / "mmpretrain.pth", dst=folder / "d")
    assert call(from_torch.main, **flags) == 2
    assert "--reinit-head" in capsys.readouterr().err
    assert run(from_torch.main, [*(f"--{k}={v}" for k, v in flags.items()), "--reinit-head"]) == 0
    model = abstract(config)
    load_weights(model, folder / "d")
    assert export(model)["head.layers.head.bias"].shape == (3,)


@pytest.mark.parametrize(
    ("main", "flags", "message"),
    [
        (from_torch.main, dict(model="m"), "--src is needed"),
        (from_torch.main, dict(modle="m"), "Unknown flag --modle. Did you mean 'model'"),
        (from_torch.main, dict(model="deit-tinny_4xb256_in1k", src="x.pth", dst="d"), "deit-tiny_4xb256_in1k"),
        (from_torch.main, dict(model="resnet18_8xb16_cifar10", src="x.pth", dst="d"), "There is no file x.pth"),
        (to_torch.main, dict(checkpoint="nowhere", dst="x.pth"), "is not a directory"),
        (compare.main, dict(src="x.pth"), "--model is needed"),
    ],
)
def test_mistakes(main, flags, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call(main, **flags) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_scripts_run_from_any_folder(tmp_path):
    for name in ("from_torch", "to_torch", "compare"):
        command = [sys.executable, ROOT / "convert" / f"{name}.py", "--help"]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        assert f"convert/{name}.py" in result.stdout


class TorchBlock(torch.nn.Module):
    """A transformer block with timm's names."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = torch.nn.LayerNorm(16, eps=1e-6), torch.nn.LayerNorm(16, eps=1e-6)
        self.attn = torch.nn.Module()
        self.attn.qkv, self.attn.proj = torch.nn.Linear(16, 48), torch.nn.Linear(16, 16)
        self.mlp = torch.nn.Module()
        self.mlp.fc1, self.mlp.fc2 = torch.nn.Linear(16, 24), torch.nn.Linear(24, 16)

    def forward(self, x):
        q, k, v = self.attn.qkv(self.norm1(x)).reshape(len(x), -1, 3, 2, 8).permute(2, 0, 3, 1, 4)
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        x = x + self.attn.proj(y)
        return x + self.mlp.fc2(torch.nn.functional.gelu(self.mlp.fc1(self.norm2(x))))


class TorchViT(torch.nn.Module):
    """A ViT with timm's names, for `CLASSIFIER`."""

    def __init__(self):
        super().__init__()
        self.cls_token = torch.nn.Parameter(torch.zeros(1, 1, 16))
        self.pos_embed = torch.nn.Parameter(torch.zeros(1, 17, 16))
        self.patch_embed = torch.nn.Module()
        self.patch_embed.proj = torch.nn.Conv2d(3, 16, 4, 4)
        self.blocks = torch.nn.Sequential(TorchBlock(), TorchBlock())
        self.norm, self.head = torch.nn.LayerNorm(16, eps=1e-6), torch.nn.Linear(16, 5)

    def forward(self, x):
        x = self.patch_embed.proj(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


def torch_vit(state):
    theirs = TorchViT()
    theirs.load_state_dict({name: torch.from_numpy(np.array(array)) for name, array in state.items()})
    return theirs.eval()


def test_compare_finds_the_blocks_and_the_difference(folder):
    model = abstract(CLASSIFIER)
    model.eval()
    load_weights(model, folder / "timm.safetensors")
    state = files.read(folder / "timm.safetensors")
    rows = compare.compare(model, torch_vit(state), "timm", 16)
    assert [row[:3] for row in rows] == [
        ("backbone.layers.0", "blocks.0", (2, 17, 16)),
        ("backbone.layers.1", "blocks.1", (2, 17, 16)),
        ("(output)", "(output)", (2, 5)),
    ]
    assert all(error < 1e-5 for *_, error in rows)
    state["blocks.1.mlp.fc2.bias"] = state["blocks.1.mlp.fc2.bias"] + 10 * np.eye(16, dtype=np.float32)[0]
    first, second, output = compare.compare(model, torch_vit(state), "timm", 16)
    assert first[3] < 1e-5 < 1e-3 < min(second[3], output[3])
    assert len(compare.table(rows).splitlines()) == 4


def test_compare_says_what_is_missing(folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    assert call(compare.main, model=folder / "model.json", src=folder / "timm.safetensors") == 1
    output = capsys.readouterr()
    assert "32 of 32 tensors come back bit-identical" in output.out and "pip install timm" in output.err


def test_feature_maps_of_both_orders_are_compared():
    ours = np.random.default_rng(0).standard_normal((2, 3, 4, 5))
    assert compare.difference(ours, ours.transpose(0, 3, 1, 2)) == 0
    assert compare.difference(ours.reshape(2, 12, 5), ours) == 0
    assert compare.difference(ours, ours[:1]) == float("inf")


@pytest.mark.slow
def test_memory_of_a_large_conversion(tmp_path):
    """ViT-L, 1.2 GB: at most 2.5 times the file's size, PyTorch and JAX themselves included."""
    (tmp_path / "model.json").write_text(
        json.dumps(
            dict(
                type="ImageClassifier",
                backbone=dict(type="VisionTransformer", arch="l"),
                head=dict(type="VisionTransformerClsHead", num_classes=1000, in_channels=1024),
            )
        )
    )
    model = abstract(json.loads((tmp_path / "model.json").read_text()))
    tensors = {name: torch.full(size, 0.5) for name, size in hub.shapes(model).items()}
    torch.save(dict(state_dict=tensors), tmp_path / "large.pth")
    del tensors
    size = os.path.getsize(tmp_path / "large.pth")
    assert size > 1.2e9
    program = (
        "import sys; from jaxpretrain.cli import run; from jaxpretrain.tools.from_torch import main\n"
        "assert run(main, sys.argv[1:]) == 0\n"
        "print(open('/proc/self/status').read())"  # getrusage would count the process that started this one
    )
    flags = [f"--model={tmp_path / 'model.json'}", f"--src={tmp_path / 'large.pth'}", f"--dst={tmp_path / 'd'}"]
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}  # one device, as users have
    result = subprocess.run(
        [sys.executable, "-c", program, *flags], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    peak = 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", result.stdout)[1])
    assert peak < 2.5 * size, f"{peak / size:.2f} times the file's size"
    assert "100%" in result.stderr  # the progress bar


def test_a_run_is_exported(tmp_path):
    """The workdir of a training run goes back to PyTorch: the classifier inside `Supervised`."""
    from jaxpretrain.trainer import train
    from tests.test_interop import vit_config

    config = vit_config(checkpoint=dict(interval=1))
    train(config, tmp_path / "run")
    assert call(to_torch.main, checkpoint=tmp_path / "run", dst=tmp_path / "x.pth", layout="timm") == 0
    state = files.read(tmp_path / "x.pth")
    model = abstract(config.method.model.to_dict())
    load_weights(model, state, layout="timm")
    assert state["blocks.1.attn.qkv.weight"].shape == (48, 16)
