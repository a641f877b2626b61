"""Every command of the README, as it stands there."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from sklearn.datasets import load_sample_image

from jaxpretrain import get_model
from jaxpretrain.interop import export, files

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
COMMANDS = [line.split("#")[0].strip() for block in BLOCKS for line in block.splitlines() if line.strip()]
PYTHON = [command for command in COMMANDS if command.startswith("python ")]
SMALL = [
    "--config.max_steps=2",
    "--config.batch_size=8",
    "--config.log_interval=1",
    "--config.evaluation.at_start=False",
]
# One device, as users have, and the tests' quick compilation.
FLAGS = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
ENV = dict(os.environ, XLA_FLAGS=" ".join(FLAGS))


def run(command: str, folder: Path, *more: str) -> subprocess.CompletedProcess:
    arguments = [sys.executable, *shlex.split(command)[1:], *more]
    return subprocess.run(arguments, cwd=folder, env=ENV, capture_output=True, text=True, timeout=800)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """One empty folder for all commands: the last scores what the first has trained."""
    return tmp_path_factory.mktemp("readme")


def test_the_commands_are_there():
    assert "make quickstart" in COMMANDS and "make test" in COMMANDS and len(PYTHON) >= 5


@pytest.mark.parametrize("target", ["quickstart", "test"])
def test_make_knows_its_targets(target):
    shown = subprocess.run(["make", "-n", target], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    if target == "quickstart":
        assert PYTHON[0].removeprefix("python ") in shown
    assert "-m pytest" in shown or target == "quickstart"


@pytest.mark.slow
@pytest.mark.parametrize("command", PYTHON)
def test_command_runs_as_written(command, folder):
    """Training is cut to two steps of eight images; what needs ImageNet says that it is missing."""
    if "--print_config" in command:
        result = run(command, folder)
        assert result.returncode == 0 and "MoCoV3" in result.stdout
    elif "jaxpretrain.evaluate" in command:
        if not (folder / "runs" / "mae-digits").exists():  # another worker runs the command that trains it
            run(PYTHON[0], folder, *SMALL)
        result = run(command, folder)
        assert result.returncode == 0 and "linear/top1" in result.stdout, result.stderr
    elif "jaxpretrain.tools" in command:
        run_tool(command, folder)
    elif ":digits" in command:
        result = run(command, folder, *SMALL)
        assert result.returncode == 0, result.stderr
        assert list((folder / "runs").glob("*/report.html"))
    else:
        result = run(command, folder)
        assert result.returncode == 2 and "data/imagenet" in result.stderr and "Traceback" not in result.stderr


def run_tool(command: str, folder: Path) -> None:
    """A tool, with the files that it names; the weights of the demo cannot be downloaded everywhere."""
    if not (folder / "deit_tiny.pth").exists():
        files.write(folder / "deit_tiny.pth", export(get_model("deit-tiny_4xb256_in1k")))
        Image.fromarray(load_sample_image("flower.jpg")).save(folder / "photo.jpg")
    if "to_torch" in command and not (folder / "weights").exists():
        run(next(other for other in PYTHON if "from_torch" in other), folder)
    result = run(command, folder)
    if "image_demo" in command:
        assert result.returncode == 0 or "cannot be downloaded" in result.stderr
        assert "Traceback" not in result.stderr
    else:
        assert result.returncode == 0, result.stderr
    if "to_torch" in command:
        assert "blocks.11.attn.qkv.weight" in files.read(folder / "deit_tiny.safetensors")


@pytest.mark.slow
def test_python_example_runs(folder):
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1].replace('{"max_epochs": 5}', str(
        {"max_steps": 2, "batch_size": 8, "evaluators": {}}))  # fmt: skip
    subprocess.run([sys.executable, "-c", code], cwd=folder, env=ENV, check=True, capture_output=True, text=True)
