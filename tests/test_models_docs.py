"""docs/models.md: every example runs, in order, where the zoo's names stand for small networks with weights of their own."""

from __future__ import annotations

import importlib
import json
import re
import shlex
from pathlib import Path
from typing import Any

import jax
import pytest
from flax import nnx

from jaxpretrain import build, cli
from jaxpretrain.config import load_config, to_plain
from jaxpretrain.interop import export, files, save_weights
from jaxpretrain.models.layers import BatchNorm
from jaxpretrain.models.lora import LoRALinear
from jaxpretrain.zoo import index, weights
from tests.backbone_cases import CASES
from tests.test_resnet import random

TEXT = (Path(__file__).parents[1] / "docs" / "models.md").read_text()
BLOCKS = re.findall(r"```(python|bash)\n(.*?)```", TEXT, re.DOTALL)
VIT = dict(embed_dims=8, num_layers=2, num_heads=2, feedforward_channels=16)
SMALL = {  # name -> backbone, channels of its features
    "resnet50_8xb32_in1k": (dict(depth=18, base_channels=2, stem_channels=2), 16),
    "repvgg-a0_8xb32_in1k": (CASES["RepVGG"].config, 16),
    "vit-base-p16_32xb128-mae_in1k": (dict(arch=VIT), 8),
}


def small(model: dict[str, Any], name: str) -> dict[str, Any]:
    """The configuration of a classifier, in small."""
    backbone, width = SMALL[name]
    model["backbone"] |= backbone
    model["head"] |= dict(num_classes=5, in_channels=width)
    return model


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    """The names that the examples leave behind, and the folder in which they ran."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("models")
        patch.chdir(folder)
        lines = dict(index._lines())
        for name in SMALL:
            entry = json.loads(lines[name])
            lines[name] = json.dumps(entry | dict(model=small(entry["model"], name)))
        patch.setattr(index, "_lines", lambda: lines)
        patch.setattr(weights, "converted_weights", lambda info, _=None: folder / f"{info.name}.pth")
        for name in SMALL:
            info = index.model_info(name)
            files.write(folder / f"{info.name}.pth", export(random(info.model)))
            (folder / f"{name.split('-')[0].split('_')[0]}.pth").write_bytes((folder / f"{info.name}.pth").read_bytes())
        names: dict[str, Any] = {}
        for kind, block in BLOCKS:
            if "runs/lora/config.json" in block:
                make_run(folder / "runs" / "lora", names["get_config"]())
            if kind == "python":
                exec(compile(block, "docs/models.md", "exec"), names)
            else:
                for command in block.splitlines():
                    run(shlex.split(command, comments=True))
        yield names, folder


def run(command: list[str]) -> None:
    """A tool, in this process; training is another test."""
    module = command[2]
    if module != "jaxpretrain.main":
        assert command[:2] == ["python", "-m"] and cli.run(importlib.import_module(module).main, command[3:]) == cli.OK


def in_small(config: Any) -> Any:
    """The example's recipe with a small network."""
    model = config.method.model
    model.backbone.module.arch = VIT
    model.head.update(num_classes=10, in_channels=8)
    return config


def make_run(folder: Path, config: Any) -> None:
    """What training with this config leaves."""
    method = to_plain(in_small(config).method)
    save_weights(random(method), folder)
    (folder / "config.json").write_text(json.dumps(dict(method=method)))


def norms(model: nnx.Module) -> list[Any]:
    return [path for path, module in nnx.iter_modules(model) if isinstance(module, BatchNorm)]


def test_what_the_examples_say(examples):
    names, folder = examples
    assert names["small"](jax.numpy.zeros((1, 32, 32, 3))).shape == (1, 10)
    assert [array.shape[1] for array in names["jit"](names["encoder"])(names["images"])[-1:]] == [16]
    assert names["larger"].backbone.pos_embed.shape[1] == 1 + 24**2
    assert not norms(names["deployed"]) and not norms(names["fused"])
    updates = [path for path, _ in nnx.state(names["vit"].backbone, nnx.Param).flat_state()]
    assert len(updates) == 2 * (2 + 4) and {path[-2] for path in updates} == {"lora_down", "lora_up"}
    assert not any(isinstance(module, LoRALinear) for _, module in nnx.iter_modules(names["plain"]))
    assert names["report"].layout == "timm" and names["encoder"].head is None
    again = names["get_model"]("weights/merged/model.json", folder / "weights" / "merged")
    assert files.read(folder / "merged.pth").keys() == export(again).keys()


@pytest.mark.slow
def test_the_recipe_of_lora_trains(tmp_path, monkeypatch):
    """On digits: the updates and the head move, the network does not."""
    from jaxpretrain.trainer import train

    monkeypatch.chdir(tmp_path)
    recipe = next(block for _, block in BLOCKS if "def get_config" in block)
    (tmp_path / "lora.py").write_text(recipe)
    config = in_small(load_config("lora.py"))
    config.method.model.backbone.module.update(img_size=32, patch_size=8)
    config.data = load_config("configs/resnet.py:digits").data.to_dict()
    config.update(batch_size=8, max_steps=2, evaluators={}, tensorboard=False, dtype="float32")
    pretrained = build.build(dict(type="MAEViT", arch=VIT, img_size=32, patch_size=8))
    files.write("mae.pth", {f"backbone.{name}": array for name, array in export(pretrained).items()})
    config.load_from.path = "mae.pth"
    train(config, tmp_path / "runs" / "lora")
    tuned = build.abstract(to_plain(config.method))
    from jaxpretrain.interop import load_weights

    load_weights(tuned, tmp_path / "runs" / "lora")
    layer = tuned.model.backbone.module.layers[0].attn.qkv
    assert layer.lora_up.kernel[...].any()
    assert (layer.kernel[...] == pretrained.layers[0].attn.qkv.kernel[...]).all()


def test_tools_and_layouts_of_the_text_exist():
    for tool in re.findall(r"jaxpretrain\.tools\.(\w+)", TEXT):
        assert importlib.import_module(f"jaxpretrain.tools.{tool}").main
    for page in re.findall(r"\]\((\w+\.md)", TEXT):
        assert (Path(__file__).parents[1] / "docs" / page).is_file()
