"""Cross-validation from the command line."""

from __future__ import annotations

import json
import statistics

import jax
import numpy as np
import pytest

from jaxpretrain import sharding, trainer
from jaxpretrain.build import ConfigError, build
from jaxpretrain.config import load_config
from jaxpretrain.tools import kfold_cross_valid as tool
from tests.tiny import records

RECIPE = """
from tests.tiny import tiny_config


def get_config(recipe=None):
    evaluators = {} if recipe == "blind" else dict(accuracy=dict(type="Accuracy", topk=(1, 3)))
    config = tiny_config(evaluators=evaluators, checkpoint=dict(interval=4, by_epoch=False))
    config.data.train.dataset.indices = 180
    config.recipe = recipe or "tiny"
    return config
"""


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """A mesh of the first device alone compiles sooner."""
    make = sharding.make_mesh
    monkeypatch.setattr(trainer, "make_mesh", lambda mesh: make(mesh, jax.devices()[:1]))


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "recipe.py").write_text(RECIPE)
    return tmp_path / "recipe.py"


def test_every_fold_trains_on_the_others(recipe):
    folds = [tool.fold_config(load_config(str(recipe)), fold, 3) for fold in range(3)]
    held_out = []
    for number, config in enumerate(folds):
        train, val = (build(config.data[split].dataset) for split in ("train", "val"))
        assert len(train) == 120 and len(val) == 60 and config.seed == number
        assert not {*train.rows.tolist()} & {*val.rows.tolist()}
        held_out += val.rows.tolist()
        np.testing.assert_array_equal(
            val[0]["image"], build(load_config(str(recipe)).data.train.dataset)[int(val.rows[0])]["image"]
        )
    assert sorted(held_out) == list(range(180))
    assert folds[0].data.val.pipeline == load_config(str(recipe)).data.val.pipeline


def test_folds_are_trained_resumed_and_summed_up(recipe, tmp_path, capsys):
    workdir = tmp_path / "cv"
    common = [f"--config={recipe}", "--num-splits=3", f"--workdir={workdir}"]
    with pytest.raises(ConfigError, match="has no fold that is done"):
        tool.main([*common, "--summary"])
    assert tool.main([*common, "--fold=1"]) == 0
    assert "1 of 3 folds are done" in capsys.readouterr().out
    written = (workdir / "fold1" / "scores.json").stat().st_mtime_ns

    # Fold 0 was stopped in the middle: it goes on from its last checkpoint.
    half = tool.fold_config(load_config(str(recipe), ["max_steps=8"]), 0, 3)
    trainer.train(half, workdir / "fold0")
    assert tool.main([*common, "--config.checkpoint.ignore_config=True"]) == 0
    assert [r["step"] for r in records(workdir / "fold0")] == list(range(1, 11))
    assert (workdir / "fold1" / "scores.json").stat().st_mtime_ns == written  # not trained again

    text, table = capsys.readouterr().out, json.loads((workdir / "kfold.json").read_text())
    assert (workdir / "kfold.md").read_text().strip() in text
    for fold in range(3):
        last = records(workdir / f"fold{fold}", "eval")[-1]
        assert table["folds"][str(fold)] == {k: last[k] for k in ("accuracy/top1", "accuracy/top3")}
    column = [scores["accuracy/top3"] for scores in table["folds"].values()]
    assert table["mean"]["accuracy/top3"] == pytest.approx(np.mean(column))
    assert (
        table["std"]["accuracy/top3"] == pytest.approx(statistics.stdev(column)) and table["std"]["accuracy/top3"] > 0
    )
    lines = text.strip().splitlines()
    assert (
        lines[0] == "| fold | accuracy/top1 | accuracy/top3 |" and lines[2].startswith("| 0 |") and "| mean |" in text
    )
    assert f"| std | {table['std']['accuracy/top1']:.2f} | {table['std']['accuracy/top3']:.2f} |" in lines

    # A fold that ended but was stopped before its scores were written, and the mistakes.
    (workdir / "fold0" / "scores.json").unlink()
    tool.main([*common, "--fold=0", "--config.checkpoint.ignore_config=True"])
    assert json.loads((workdir / "kfold.json").read_text())["folds"] == table["folds"]
    with pytest.raises(ConfigError, match=r"another configuration:\n  batch_size: 32 -> 40\nChoose another"):
        tool.main([*common, "--config.batch_size=40"])
    with pytest.raises(ConfigError, match="fold0 is one of 3 folds, not of --num-splits=4"):
        tool.main([common[0], common[2], "--num-splits=4", "--summary"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num-splits=1"], "--num-splits=1: expected a whole number from 2 up"),
        (["--num-splits=3", "--fold=3"], "folds are 0 to 2"),
        (["--folds=3"], "Unknown flag --folds. Did you mean 'fold'"),
    ],
)
def test_mistakes_are_named(recipe, tmp_path, flags, message):
    with pytest.raises(ConfigError, match=message):
        tool.main([f"--config={recipe}", f"--workdir={tmp_path}", *flags])
    with pytest.raises(ConfigError, match="has no evaluators"):
        tool.main([f"--config={recipe}:blind", f"--workdir={tmp_path}"])
    with pytest.raises(ConfigError, match="--config is needed"):
        tool.main([])
