"""`tools.print_config`: what it prints is the config, and can be used as one."""

from __future__ import annotations

import json
import math

import pytest
import yaml

from jaxpretrain import cli
from jaxpretrain.build import ConfigError
from jaxpretrain.config import load_config, to_plain
from jaxpretrain.tools.print_config import as_python, main


def printed(capsys, *arguments: str) -> str:
    assert main(list(arguments)) == cli.OK
    return capsys.readouterr().out


def same(a, b) -> bool:
    """Equal, tuples and lists told apart."""
    if hasattr(a, "items"):
        return hasattr(b, "items") and set(a) == set(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or (a != a and b != b))


@pytest.mark.parametrize(
    "spec",
    ["configs/simclr.py:digits", "configs/mae.py", "configs/resnet.py:digits", "configs/swav.py", "configs/dinov2.py"],
)
def test_python_is_a_recipe_file_of_the_same_config(spec, tmp_path, capsys):
    file = tmp_path / "mine.py"
    file.write_text(printed(capsys, f"--config={spec}", "--config.batch_size=24", "--config.seed=7"))
    assert max(map(len, file.read_text().splitlines())) <= 120
    config = load_config(str(file))
    assert same(config, load_config(spec, ["batch_size=24", "seed=7"])) and config.batch_size == 24
    assert load_config(str(file), ["seed=9"]).seed == 9  # and can be overridden in its turn


def augment(sample):
    return sample


def test_unusual_values_survive(tmp_path):
    config = {
        "a": (1,),
        "b": [],
        "c": {},
        "class": {"x": {"bn/1": None, "d": float("inf"), "e": -math.inf}},
        "f": 'quotes " and ünicode\n',
        "g": [{"type": augment}] * 40,
        "h": {1: (), 2: True},
    }
    space: dict = {}
    exec(as_python(config), space)
    read = space["get_config"]()
    assert read["g"][0]["type"] == "tests.test_print_config.augment" and len(read["g"]) == 40
    assert isinstance(read["a"], tuple) and read["h"][1] == () and read["class"]["x"]["e"] == -math.inf
    assert read["f"] == config["f"] and read["class"]["x"]["bn/1"] is None and read["b"] == [] and len(read["c"]) == 0


def test_json_and_yaml(capsys):
    plain = to_plain(load_config("configs/mae.py:digits", ["batch_size=16"]))
    arguments = ["configs/mae.py:digits", "--config.batch_size=16"]
    assert json.loads(printed(capsys, *arguments, "--format=json")) == plain
    assert yaml.safe_load(printed(capsys, *arguments, "--format=yaml")) == plain


def test_diff_shows_what_differs_and_nothing_else(capsys):
    spec = "configs/simclr.py:digits"
    assert printed(capsys, spec, f"--diff={spec}").strip() == "no difference"
    overrides = [
        "--config.batch_size=32",
        "--config.data.train.pipeline.0.num_views=3",
        "--config.ema={'momentum': 0.1}",
        "--config.profile=true",
    ]
    assert printed(capsys, spec, f"--diff={spec}", *overrides).splitlines() == [
        "batch_size",
        "  - 128",
        "  + 32",
        "data.train.pipeline.0.num_views",
        "  - 2",
        "  + 3",
        "ema",
        "  - None",
        "  + dict(momentum=0.1)",
        "profile",
        "  - False",
        "  + True",
    ]
    table = json.loads(printed(capsys, spec, "--diff=configs/mae.py:digits", "--format=json"))
    assert table["max_epochs"] == {"there": 40, "here": 12}
    assert table["method.backbone.patch_size"] == {"there": 4}  # SimCLR has none


def test_diff_against_a_run(tmp_path, capsys):
    config = load_config("configs/mae.py:digits", ["seed=3"])
    (tmp_path / "config.json").write_text(json.dumps(to_plain(config)))
    assert printed(capsys, "configs/mae.py:digits", f"--diff={tmp_path}").splitlines() == ["seed", "  - 3", "  + 0"]
    assert json.loads(printed(capsys, str(tmp_path), "--format=json"))["seed"] == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--config is needed"),
        (["configs/mae.py", "--config=configs/mae.py"], "once"),
        (["configs/mae.py", "--format=jsn"], "json"),
        (["configs/mae.py", "--config.batchsize=3"], "batch_size"),
        (["runs/nothing/config.json"], "does not exist"),
    ],
)
def test_mistakes(arguments, message):
    with pytest.raises(ConfigError, match=message):
        main(arguments)
