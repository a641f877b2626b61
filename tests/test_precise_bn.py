"""BatchNorm's statistics over many batches: their mean, of the batches that come next; training itself unchanged."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import jax
import numpy as np
import pytest

from jaxpretrain import sharding
from jaxpretrain.build import ConfigError
from jaxpretrain.config import to_plain
from jaxpretrain.data.pipeline import TrainLoader
from jaxpretrain.trainer import Trainer, train
from tests.tiny import losses, tiny_config

CONFIG = functools.partial(
    tiny_config,
    batch_size=500,  # three steps an epoch
    max_epochs=2,
    max_steps=None,
    checkpoint=dict(interval=1),
    data_preprocessor=dict(mean=(0.0,) * 3, std=(1.0,) * 3),
)
TWO_BATCHES = dict(num_samples=1000)


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """These tests are not about several devices: the mesh is made of the first one."""
    make = sharding.make_mesh
    monkeypatch.setattr("jaxpretrain.trainer.make_mesh", lambda mesh: make(mesh, jax.devices()[:1]))


def weights(config: Any, workdir: Any, step: int) -> dict[str, Any]:
    """The state of a checkpoint."""
    config.checkpoint.step = step
    return Trainer(config, workdir)._restore_or_init()[0]


def expected(config: Any, state: dict[str, Any], params: Any, step: int, batches: int, pieces: int = 1) -> Any:
    """Mean and variance of `TinyMethod`'s hidden layer, in NumPy."""
    loader = TrainLoader(to_plain(config.data.train), batch_size=config.batch_size, seed=config.seed)
    loader.set_order(None, step)
    kernel, bias = (np.asarray(params["hidden"][name], np.float64) for name in ("kernel", "bias"))
    means, variances = [], []
    for batch in itertools.islice(loader, batches):
        for piece in range(pieces):
            x = batch["image"][piece::pieces].reshape(-1, 8 * 8 * 3) @ kernel + bias
            means.append(x.mean(axis=0))
            variances.append(x.var(axis=0, ddof=1))
    loader.close()
    return np.mean(means, axis=0), np.mean(variances, axis=0)


@pytest.mark.parametrize(
    ("fields", "pieces", "where"),
    [
        ({}, 1, "params"),
        (dict(accumulative_counts=2), 2, "params"),
        (dict(ema=dict(momentum=0.1)), 1, "ema"),
    ],
)
def test_statistics_are_the_mean_over_the_batches_that_come_next(fields, pieces, where, tmp_path):
    config = CONFIG(precise_bn=TWO_BATCHES, **fields)
    train(config, tmp_path)
    for step in (3, 6):
        state = weights(config, tmp_path, step)
        mean, var = expected(config, state, state[where], step, 2, pieces)
        found = state["model_state"]["norm"]
        np.testing.assert_allclose(found["mean"], mean, rtol=1e-5, atol=1e-5 * np.abs(mean).max())
        np.testing.assert_allclose(found["var"], var, rtol=1e-5)
        assert found["num_batches_tracked"] == step * pieces


def test_training_goes_on_as_without(tmp_path):
    train(CONFIG(precise_bn=TWO_BATCHES), tmp_path / "precise")
    train(CONFIG(), tmp_path / "plain")
    assert losses(tmp_path / "precise") == losses(tmp_path / "plain")


def test_only_after_every_so_many_epochs_and_before_the_evaluation(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("jaxpretrain.trainer.run_all", lambda evaluators, state: seen.append(state) or {})
    config = CONFIG(
        precise_bn=dict(num_samples=1, interval=2),
        evaluators=dict(accuracy=dict(type="Accuracy")),
        evaluation=dict(interval=1),
    )
    train(config, tmp_path)
    assert len(seen) == 2
    means = [np.asarray(state["model_state"]["norm"]["mean"]) for state in seen]
    wanted = [expected(config, state, state["params"], step, 1)[0] for state, step in zip(seen, (3, 6), strict=True)]
    assert not np.allclose(means[0], wanted[0], rtol=1e-3)
    np.testing.assert_allclose(means[1], wanted[1], rtol=1e-5, atol=1e-5 * np.abs(wanted[1]).max())


def test_a_run_that_goes_on_from_the_end_of_an_epoch_is_the_same(tmp_path):
    config = CONFIG(precise_bn=TWO_BATCHES)
    train(config, tmp_path / "whole")
    train(CONFIG(precise_bn=TWO_BATCHES, max_epochs=1), tmp_path / "parts")
    longer = CONFIG(precise_bn=TWO_BATCHES)
    longer.checkpoint.ignore_config = True
    train(longer, tmp_path / "parts")
    whole, parts = weights(config, tmp_path / "whole", 6), weights(longer, tmp_path / "parts", 6)
    jax.tree.map(np.testing.assert_array_equal, whole["model_state"], parts["model_state"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(num_sample=8), "Did you mean 'num_samples'"),
        (dict(interval=1), "num_samples=0 and interval=1 must be at least 1"),
        (dict(num_samples=8, interval=0), "interval=0 must be at least 1"),
    ],
)
def test_mistakes(settings, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        Trainer(CONFIG(precise_bn=settings), tmp_path)


def test_a_method_without_batch_norm_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="TinyMethod has no BatchNorm"):
        Trainer(CONFIG(method=dict(batch_norm=False), precise_bn=TWO_BATCHES), tmp_path)
