"""The demo's command line, from the repository and from an installed wheel in another folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxpretrain import cli, get_model, inference_model
from jaxpretrain.interop import export, files
from jaxpretrain.tools.image_demo import main
from jaxpretrain.zoo import model_info

ROOT = Path(__file__).parents[1]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A photograph, a tiny model's configuration and its weights; and the working directory."""
    model = dict(model_info("resnet18_8xb16_cifar10").model)
    model["backbone"] |= dict(base_channels=4, stem_channels=4)
    model["head"] |= dict(in_channels=32)
    test = dict(dataset=dict(type="CIFAR10", pipeline=[dict(type="Resize", scale=32)]))
    config = dict(model=model, data_preprocessor=dict(mean=[120] * 3, std=[60] * 3, to_rgb=True), test_dataloader=test)
    (tmp_path / "tiny.json").write_text(json.dumps(config))
    files.write(tmp_path / "tiny.safetensors", export(get_model(config, seed=5)))
    y, x = np.mgrid[:60, :80]
    pixels = np.stack([x * 3, y * 4, 255 - x * 3], axis=-1).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_prints_the_result_and_saves_the_picture(folder, capsys):
    arguments = ["photo.png", "tiny.json", "--checkpoint=tiny.safetensors", "--device", "cpu", "--show-dir=out"]
    assert cli.run(main, arguments) == cli.OK
    out, err = capsys.readouterr()
    expected = inference_model("tiny.json", "photo.png", pretrained="tiny.safetensors")
    assert json.loads(out) == {key: value for key, value in expected.items() if key != "pred_scores"}
    assert "out" in err and Image.open("out/photo.png").size == (160, 120)


def test_flags_may_come_first_and_the_picture_has_a_default_place(folder, capsys):
    assert cli.run(main, ["--device", "cpu", "photo.png", "--checkpoint", "tiny.safetensors", "tiny.json"]) == cli.OK
    assert Path("demo_results/photo.png").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["photo.png"], cli.USAGE, "Give IMAGE and MODEL, in this order; got photo.png"),
        (["photo.png", "resnet51"], cli.USAGE, "There is no model 'resnet51' in the zoo"),
        (["photo.png", "llava-7b-v1_caption"], cli.USAGE, "is for Image Caption, for which this version has no"),
        (["photo.png", "tiny.json", "--chekpoint=x"], cli.USAGE, "checkpoint"),
        (["photo.png", "tiny.json"], cli.USAGE, "a configuration has no weights of its own"),
        (["photo.png", "tiny.json", "--checkpoint=no.pth"], cli.USAGE, "There are no weights at no.pth in "),
        (["photo.png", "tiny.json", "--checkpoint=photo.png"], cli.USAGE, "photo.png"),
        (["none.png", "tiny.json", "--checkpoint=tiny.safetensors"], cli.FAILED, "none.png): there is no such file"),
        (["tiny.json", "tiny.json", "--checkpoint=tiny.safetensors"], cli.FAILED, "not an image"),
    ],
)
def test_mistakes_are_one_line_and_an_exit_code(folder, capsys, arguments, code, message):
    assert cli.run(main, arguments) == code
    out, err = capsys.readouterr()
    assert not out and message in err and len(err.strip().splitlines()) == 1


def test_help(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "image_demo IMAGE MODEL" in capsys.readouterr().out


@pytest.mark.slow
def test_the_installed_wheel_works_from_any_folder(folder, tmp_path_factory):
    build = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(build), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    with zipfile.ZipFile(next(build.glob("*.whl"))) as archive:
        archive.extractall(build / "site")
    env = dict(os.environ, PYTHONPATH=str(build / "site"), JAXPRETRAIN_HOME=str(folder / "home"))
    run = dict(cwd=folder, env=env, capture_output=True, text=True)
    code = "import sys, jaxpretrain; assert jaxpretrain.__file__.startswith(sys.argv[1]); print(len(jaxpretrain.list_models()))"
    listed = subprocess.run([sys.executable, "-c", code, str(build)], check=True, **run)
    assert listed.stdout.strip() == "548"
    demo = [sys.executable, "-m", "jaxpretrain.tools.image_demo", "photo.png", "tiny.json"]
    shown = subprocess.run([*demo, "--checkpoint=tiny.safetensors"], check=True, **run)
    assert {"pred_label", "pred_score"} <= set(json.loads(shown.stdout))
    assert (folder / "demo_results" / "photo.png").exists()
    offline = dict(env, http_proxy="http://127.0.0.1:9", https_proxy="http://127.0.0.1:9")
    failed = subprocess.run([*demo[:-1], "resnet18_8xb16_cifar10"], **(run | dict(env=offline)))
    assert failed.returncode == cli.FAILED
    place = folder / "home" / "downloads" / "resnet18_b16x8_cifar10_20210528-bd6371c8.pth"
    assert f"put it at {place}" in failed.stderr
