"""The training loop: what it does around the step, whatever the method."""

from __future__ import annotations

import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpretrain import sharding
from jaxpretrain.build import ConfigError
from jaxpretrain.checkpoint import load_params
from jaxpretrain.evaluate import evaluate
from jaxpretrain.trainer import NonFiniteError, Trainer, train
from tests.tiny import losses, records, tiny_config

EVALUATORS = dict(accuracy=dict(type="Accuracy", topk=(1, 5)), knn=dict(type="KNN"))


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """These tests are not about several devices: meshes are made of the first ones."""
    make = sharding.make_mesh

    def smallest(mesh, devices=None):
        sizes = [mesh.get(axis, 1) for axis in sharding.AXES]
        return make(mesh, jax.devices()[: math.prod(sizes)] if -1 not in sizes else devices)

    monkeypatch.setattr("jaxpretrain.trainer.make_mesh", smallest)
    monkeypatch.setattr("jaxpretrain.sharding.make_mesh", smallest)


def test_a_run_learns_and_leaves_its_files(tmp_path):
    scores = train(
        tiny_config(
            max_steps=60,
            evaluators=EVALUATORS,
            evaluation=dict(interval=30, by_epoch=False, at_start=True),
            checkpoint=dict(interval=20, by_epoch=False, max_to_keep=2),
            tensorboard=True,
        ),
        tmp_path,
    )
    steps, values = zip(*losses(tmp_path), strict=True)
    assert steps == tuple(range(1, 61)) and np.mean(values[-10:]) < 0.6 * np.mean(values[:3])
    evaluations = records(tmp_path, "eval")
    assert [record["step"] for record in evaluations] == [0, 30, 60]
    assert scores["accuracy/top1"] == evaluations[-1]["accuracy/top1"] > evaluations[0]["accuracy/top1"] + 20
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["40", "60"]
    assert json.loads((tmp_path / "config.json").read_text())["batch_size"] == 32
    assert "<html" in (tmp_path / "report.html").read_text()
    assert list((tmp_path / "tensorboard").glob("events*")) and list((tmp_path / "pictures").glob("*.png"))
    for record in records(tmp_path):
        assert record["images_per_sec"] > 0 and 0 <= record["data_wait"] <= 1 and record["grad_norm"] > 0
        assert record["lr"] == pytest.approx(1e-2)


def test_the_clock_stands_still_in_evaluation(tmp_path, monkeypatch):
    import time

    from jaxpretrain import trainer

    def slow(evaluators, state):
        time.sleep(1.0)
        return {"x/y": 1.0}

    monkeypatch.setattr(trainer, "run_all", slow)
    begin = time.perf_counter()
    train(tiny_config(evaluators=EVALUATORS, evaluation=dict(interval=2, by_epoch=False)), tmp_path)
    assert time.perf_counter() - begin > 5.0
    assert records(tmp_path)[-1]["elapsed"] < time.perf_counter() - begin - 5.0


def test_statistics_are_averaged_too(tmp_path):
    ema = dict(momentum=0.25, update_buffers=True)
    checkpoint = dict(interval=1, by_epoch=False, max_to_keep=-1)
    config = tiny_config(max_steps=4, ema=ema, checkpoint=checkpoint, evaluators=EVALUATORS)
    scores = train(config, tmp_path)
    states = [load_params(tmp_path, step).state for step in (1, 2, 3, 4)]
    for average, source, leaf in (("ema", "params", "scale"), ("ema_state", "model_state", "var")):
        expected = states[0][source]["norm"][leaf]
        for state in states[1:]:
            expected = expected + 0.25 * (state[source]["norm"][leaf] - expected)
        np.testing.assert_allclose(states[-1][average]["norm"][leaf], expected, rtol=1e-5)
        assert not np.allclose(expected, states[-1][source]["norm"][leaf], rtol=1e-3)
    assert evaluate(config, tmp_path) == pytest.approx(scores)
    newest = evaluate(tiny_config(ema=dict(momentum=0.25), evaluators=EVALUATORS), tmp_path)
    assert newest["knn/top1"] != scores["knn/top1"]
    with pytest.raises(ConfigError, match="choose one"):
        Trainer(tiny_config(ema=ema, precise_bn=dict(num_samples=64)), tmp_path)


def test_accumulation_equals_one_batch(tmp_path):
    config = dict(method=dict(type="tests.tiny.TinyMethod", batch_norm=False, noise=0.0))
    train(tiny_config(**config), tmp_path / "whole")
    train(tiny_config(**config, accumulative_counts=4), tmp_path / "pieces")
    for (_, a), (_, b) in zip(losses(tmp_path / "whole"), losses(tmp_path / "pieces"), strict=True):
        assert a == pytest.approx(b, rel=1e-5)


def test_accumulation_updates_statistics_once_per_micro_batch(tmp_path):
    train(tiny_config(accumulative_counts=2, checkpoint=dict(interval=5, by_epoch=False)), tmp_path)
    state = load_params(tmp_path).state["model_state"]
    assert state["norm"]["num_batches_tracked"] == 20


def test_averaged_weights_are_what_is_evaluated(tmp_path):
    config = tiny_config(
        ema=dict(momentum=0.1), evaluators=EVALUATORS, checkpoint=dict(interval=10, by_epoch=False), max_steps=20
    )
    scores = train(config, tmp_path)
    state = load_params(tmp_path).state
    kernel, average = (np.asarray(state[name]["hidden"]["kernel"]) for name in ("params", "ema"))
    assert np.abs(kernel - average).max() > 1e-3
    assert evaluate(config, tmp_path) == pytest.approx(scores)
    config.ema = None  # the same run without averages scores differently, so the scores above are the averages'
    assert train(config, tmp_path / "plain")["knn/top1"] != scores["knn/top1"]


def test_gradients_are_clipped_and_their_norm_is_logged_before(tmp_path):
    optimizer = dict(type="SGD", lr=1.0)
    train(tiny_config(optim_wrapper=dict(optimizer=optimizer, clip_grad=dict(max_norm=1e-3)), max_steps=3), tmp_path)
    assert records(tmp_path)[0]["grad_norm"] > 1e-2
    assert abs(records(tmp_path)[2]["loss"] - records(tmp_path)[0]["loss"]) < 0.5


def test_bfloat16_computes_in_bfloat16_and_keeps_float32(tmp_path):
    seen = []

    def spy(images):
        seen.append(images.dtype)

    config = tiny_config(dtype="bfloat16", checkpoint=dict(interval=10, by_epoch=False))
    trainer = Trainer(config, tmp_path)
    batch = dict(image=jnp.zeros((4, 8, 8, 3), jnp.uint8), index=jnp.zeros(4, jnp.int32), epoch=jnp.zeros(4, jnp.int32))
    spy(trainer.augments[0](batch, jax.random.key(0))["image"])
    assert seen == [jnp.bfloat16]
    trainer.fit()
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(load_params(tmp_path).state["params"])}
    assert dtypes == {np.dtype("float32")}
    assert losses(tmp_path)[-1][1] < losses(tmp_path)[0][1]


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(tmp_path):
    config = tiny_config(
        optim_wrapper=dict(optimizer=dict(type="SGD", lr=1e30)),
        param_scheduler=[dict(type="ConstantLR", factor=1e-32, by_epoch=False, begin=0, end=8)],
        max_steps=20,
        log_interval=20,
        checkpoint=dict(interval=4, by_epoch=False),
    )
    with pytest.raises(NonFiniteError, match=r"step (8|9|10): (loss|grad_norm|drift).* is not finite"):
        train(config, tmp_path)
    steps = sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit())
    assert steps and max(steps) <= 8  # nothing that is poisoned was saved
    kernel = load_params(tmp_path).state["params"]["hidden"]["kernel"]
    assert np.isfinite(kernel).all()


def test_profile_writes_a_trace(tmp_path):
    train(tiny_config(profile=True, max_steps=16), tmp_path)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_a_finished_run_is_not_trained_again(tmp_path):
    config = tiny_config(checkpoint=dict(interval=5, by_epoch=False))
    train(config, tmp_path)
    before = (tmp_path / "metrics.jsonl").read_text()
    train(config, tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_transfer_guard_catches_hidden_transfers(tmp_path, monkeypatch):
    trainer = Trainer(tiny_config(), tmp_path)
    compile_step = trainer.compile

    def leaky(state, batch, phase):
        step = compile_step(state, batch, phase)

        def wrapped(state, batch):
            state, metrics = step(state, batch)
            return state, dict(metrics, leak=metrics["loss"] + np.float32(1.0))

        return wrapped

    monkeypatch.setattr(trainer, "compile", leaky)
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        trainer.fit()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(batch_size=30, accumulative_counts=4), "batch_size=30 is not divisible"),
        (dict(batch_size=4000), "1500 samples, fewer than one batch"),
        (dict(mesh=dict(data=3)), "not divisible"),
        (dict(optim_wrapper=dict(optimizer=dict(type="AdamV", lr=1))), "Did you mean 'Adam'"),
        (dict(param_scheduler=[dict(type="CosineAnealingLR", T_max=3)]), "Did you mean 'CosineAnnealingLR'"),
        (dict(evaluators=dict(a=dict(type="KNM"))), "Did you mean 'KNN'"),
        (dict(evaluators=dict(a=dict(type="KNN", kk=3))), "KNN has no argument 'kk'. Did you mean 'k'"),
        (dict(remat="fulll"), "Did you mean 'full'"),
        (dict(dtype="bfloat61"), "Did you mean 'bfloat16'"),
        (dict(wandb=dict(project="x")), r"jaxpretrain\[wandb\]"),
    ],
)
def test_what_cannot_work_is_said_before_training(fields, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        train(tiny_config(**fields), tmp_path)


def test_a_head_of_another_class_count_is_refused(tmp_path):
    from jaxpretrain.config import load_config

    config = load_config("configs/resnet.py:digits", {"method.model.head.num_classes": 7, "mesh.data": 1})
    with pytest.raises(ConfigError, match="7 classes, but the data set has 10.*num_classes=10"):
        Trainer(config, tmp_path)


def test_log_line_has_speed_waiting_and_time_left(tmp_path, capsys):
    train(tiny_config(log_interval=5, peak_flops=1e9), tmp_path)
    line = next(line for line in capsys.readouterr().err.splitlines() if re.match(r"step +5/10", line))
    for part in ("loss ", "images/s", "data-wait", "ETA 0:00:0", "MFU"):
        assert part in line
