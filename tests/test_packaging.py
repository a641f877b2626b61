"""The wheel carries the recipes, and finds them from any folder."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_wheel_holds_recipes_and_no_tests(unpacked):
    recipes = {path.name for path in (ROOT / "configs").glob("*.py")}
    assert {path.name for path in (unpacked / "jaxpretrain" / "configs").glob("*.py")} == recipes
    assert not (unpacked / "tests").exists()
    metadata = next(unpacked.glob("*.dist-info/METADATA")).read_text()
    for extra in ("cuda", "torch", "dev", "wandb"):
        assert f"Provides-Extra: {extra}" in metadata
    assert "jax[cuda13]" in metadata


def test_installed_package_finds_its_recipes_from_any_folder(unpacked, tmp_path):
    code = (
        "import sys, jaxpretrain; assert jaxpretrain.__file__.startswith(sys.argv[1]), jaxpretrain.__file__; "
        "from jaxpretrain.config import load_config, recipe_path; "
        "assert str(recipe_path('configs/mae.py')).startswith(sys.argv[1]); "
        "print(load_config('configs/mae.py:digits').recipe)"
    )
    env = dict(os.environ, PYTHONPATH=str(unpacked))
    result = subprocess.run(
        [sys.executable, "-c", code, str(unpacked)], cwd=tmp_path, env=env, check=True, capture_output=True, text=True
    )
    assert result.stdout.strip() == "digits"


def test_pinned_versions_cover_every_requirement():
    """Each requirement of pyproject.toml is pinned in constraints.txt, so both make targets install the same."""
    import re
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + [
        r for extra in ("torch", "dev") for r in project["optional-dependencies"][extra]
    ]
    normal = lambda name: re.sub(r"[-_.]+", "-", name).lower()  # noqa: E731
    pins = {normal(line.split("==")[0]) for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    assert not {normal(re.match(r"[\w.-]+", r)[0]) for r in wanted} - pins
