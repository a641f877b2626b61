"""Recipes, overrides, and what the command line says about mistakes."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from jaxpretrain.build import ConfigError
from jaxpretrain.config import apply_overrides, base_config, load_config, to_plain

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "configs").glob("*.py"))


def recipes(file: Path) -> list[str]:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return list(module.RECIPES)


ALL = [(file.name, name) for file in FILES for name in recipes(file)]


@pytest.mark.parametrize(("file", "name"), ALL)
def test_every_recipe_loads_and_knows_its_name(file, name):
    config = load_config(f"configs/{file}:{name}")
    assert config.recipe == name
    assert config.method.type
    assert to_plain(config) == to_plain(load_config(f"configs/{file}:{name.upper()}"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_recipe_is_in_its_files_table(file):
    text = file.read_text().split('"""')[1]
    names = recipes(file)
    assert names[0] in text
    if any(load_config(f"configs/{file.name}:{name}").method.type != "Supervised" for name in names):
        assert "digits" in names  # classifiers have resnet.py's
    assert ("digits" in names) == ("| digits |" in text)
    assert "DIGITS_" not in text, "figures that were never filled in"


def test_flagship_is_the_first_recipe():
    assert load_config("configs/mae.py").recipe == "mae_vit-base-p16_8xb512-amp-coslr-300e_in1k"


def test_overrides_are_literals_in_the_type_of_the_field():
    config = load_config(
        "configs/mae.py:digits",
        ["batch_size=64", "optim_wrapper.optimizer.lr=1", "param_scheduler.0.end=3", "dtype=bfloat16", "profile=true",
         "ema={'momentum': 1e-3}", "method.backbone.drop_path_rate=0.1", "data_preprocessor.mean=(1, 2, 3)"],
    )  # fmt: skip
    assert (config.batch_size, config.dtype, config.profile) == (64, "bfloat16", True)
    assert config.optim_wrapper.optimizer.lr == 1.0 and isinstance(config.optim_wrapper.optimizer.lr, float)
    assert config.param_scheduler[0]["end"] == 3
    assert config.ema.momentum == 1e-3
    assert config.method.backbone.drop_path_rate == 0.1  # an argument that the recipe does not mention
    assert config.data_preprocessor.mean == (1, 2, 3)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("batchsize=3", "There is no field 'batchsize' in the config. Did you mean 'batch_size'"),
        ("mesh.dat=2", "There is no field 'dat' in mesh. Did you mean 'data'"),
        ("method.backbone.drop_path_rat=0.1", "Did you mean 'drop_path_rate'"),
        ("batch_size=abc", "config.batch_size is of type int .* 'abc' does not fit"),
        ("batch_size=1.5", "does not fit"),
        ("profile=1", "does not fit"),
        ("mesh=3", "config.mesh is of type dict"),
        ("param_scheduler.7.end=1", "param_scheduler is a list of 2"),
        ("log_interval.x=1", "has no field 'x'"),
        ("ema.momentum=1", "ema is None and has no field 'momentum'; set it whole"),
        ("batch_size", "needs a value"),
    ],
)
def test_mistaken_overrides(override, message):
    with pytest.raises(ConfigError, match=message):
        load_config("configs/mae.py:digits", [override])


def test_mappings_override_too():
    config = base_config()
    apply_overrides(config, {"batch_size": 8, "mesh.fsdp": 2})
    assert (config.batch_size, config.mesh.fsdp) == (8, 2)


def test_unknown_file_and_recipe_name_the_nearest():
    with pytest.raises(ConfigError, match=r"no recipe file 'configs/mea.py'.*Did you mean 'configs/mae.py'"):
        load_config("configs/mea.py")
    with pytest.raises(ConfigError, match="no recipe 'digit' here. Did you mean 'digits'"):
        load_config("configs/mae.py:digit")
    with pytest.raises(ConfigError, match="defines no get_config"):
        load_config(str(ROOT / "tests" / "parity.py"))


def command(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "jaxpretrain.main", *arguments], cwd=cwd, capture_output=True, text=True, timeout=300
    )


def test_print_config_from_any_folder(tmp_path):
    result = command("--config=configs/mae.py:digits", "--config.batch_size=32", "--print_config", cwd=tmp_path)
    assert result.returncode == 0 and "batch_size: 32" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--confg=configs/mae.py"], "Unknown flag --confg. Did you mean 'config'"),
        (["--config=configs/mae.py:digitz"], "Did you mean 'digits'"),
        (["--config=configs/mae.py:digits", "--config.batchsize=3"], "Did you mean 'batch_size'"),
        (["--config=configs/mae.py:digits", "--config.method.type=MEA"], "Unknown type 'MEA'. Did you mean 'MAE'"),
        (
            ["--config=configs/mae.py:digits", "--config.method={'type': 'MAE', 'bakbone': 1}"],
            "Did you mean 'backbone'",
        ),
        ([], "--config is needed"),
        (["digits"], "flags start with --"),
    ],
)
def test_mistakes_on_the_command_line_exit_with_2_and_no_traceback(arguments, message, tmp_path):
    result = command(*arguments, "--workdir", str(tmp_path / "run"))
    assert result.returncode == 2, result.stderr
    assert message in result.stderr and "Traceback" not in result.stderr


def test_missing_imagenet_says_what_to_do(tmp_path):
    result = command("--config=configs/mae.py", f"--workdir={tmp_path}/run", cwd=tmp_path)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    for part in ("data/imagenet", "train/", "--config.data.train.dataset.data_root", "configs/mae.py:digits"):
        assert part in result.stderr, result.stderr
