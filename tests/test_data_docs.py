"""docs/data.md: its example runs, its names exist, and none is missing."""

from __future__ import annotations

import importlib
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxpretrain import build, cli
from jaxpretrain.data import device, host_transforms, samplers
from jaxpretrain.tools import browse_dataset

TEXT = (Path(__file__).parents[1] / "docs" / "data.md").read_text()
CODE = set(re.findall(r"`([^`\n]+)`", TEXT))


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A working folder with the example as mine.py."""
    (tmp_path / "mine.py").write_text(re.search(r"```python\n(.*?)```", TEXT, re.DOTALL)[1])
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("mine", None)


def test_the_example_of_ones_own_data(mine):
    from jaxpretrain.config import load_config, to_plain
    from jaxpretrain.data.pipeline import TrainLoader
    from jaxpretrain.data.stages import Tracer

    config = load_config("mine.py")
    tracer = Tracer(config, skip=["Mixup", "CutMix"])
    (trace,) = tracer([(1, 0)])
    assert [stage[0].title for stage in trace.stages] == ["original", "Noise", "Darken"] and tracer.source.classes[
        1
    ] == "down"
    original, noisy, dark = (stage[0].image.astype(float) for stage in trace.stages)
    assert 15 < np.std((noisy - original)[10:20]) < 25 and 0.45 < dark.sum() / noisy.sum() < 1
    loader = TrainLoader(to_plain(config.data.train), batch_size=8)
    assert next(loader)["image"].shape == (8, 32, 32, 3)
    loader.close()
    assert len(build.build(dict(type="mine.Ramps", indices=10))) == 10


@pytest.mark.slow
def test_the_example_trains(mine):
    from jaxpretrain.config import load_config
    from jaxpretrain.trainer import train

    overrides = {"max_steps": 2, "batch_size": 8, "evaluators": {}, "tensorboard": False}
    stage = dict(num_stages=1, strides=(1,), dilations=(1,), out_indices=(0,), stem_channels=8, base_channels=8)
    overrides |= {f"method.model.backbone.{name}": value for name, value in stage.items()}  # compiles faster
    train(load_config("mine.py", overrides | {"method.model.head.in_channels": 8}), mine / "run")
    assert (mine / "run" / "metrics.jsonl").exists()


def test_the_command_of_the_first_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = next(line for line in TEXT.splitlines() if line.startswith("python -m jaxpretrain.tools.browse_dataset"))
    assert browse_dataset.main([*shlex.split(command)[3:], "--num=2"]) == cli.OK
    assert (tmp_path / "browse" / "contact_sheet.png").exists()


def test_every_data_set_transform_and_sampler_is_listed():
    sets = {name for name, where in build._TABLE.items() if where.startswith("jaxpretrain.data.")}
    augments = {"Mixup", "CutMix", "ResizeMix", "RandomBatchAugment"}
    listed = {name for code in CODE for name in re.findall(r"[\w/]+", code)}
    for names in (sets - augments, set(host_transforms.TRANSFORMS), set(device.TRANSFORMS), set(samplers.SAMPLERS)):
        assert names - listed == set()


def test_every_tool_exists():
    tools = re.findall(r"^\| `(\w+) [^|]*\|", TEXT[TEXT.index("## Tools") :], re.MULTILINE)
    assert len(tools) == 10
    for tool in {*tools, *re.findall(r"jaxpretrain\.tools\.(\w+)", TEXT)} - {"NAME"}:
        module = importlib.import_module(f"jaxpretrain.tools.{tool}")
        assert callable(module.main) and module.__doc__
    rows = {
        tool: re.findall(r"--([\w-]+)", row)
        for tool, row in re.findall(r"^\| `(\w+) ([^|]*\|[^|]*)\|$", TEXT, re.MULTILINE)
    }
    for tool, flags in rows.items():
        module = importlib.import_module(f"jaxpretrain.tools.{tool}")
        known = {*module.FLAGS, *getattr(module, "SWITCHES", {})}
        assert set(flags) <= known, tool


def test_the_splits_of_data_sets():
    rows = re.findall(r"^\| `(\w+)`(?:, `\w+`)* \| ([\w, ]+) \|", TEXT, re.MULTILINE)
    checked = 0
    for name, splits in rows:
        kind = build.resolve(name) if name in build._TABLE else None
        if getattr(kind, "splits", ()):
            assert tuple(splits.split(", ")) == tuple(kind.splits), name
            checked += 1
    assert checked >= 10
