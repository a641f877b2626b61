"""`tools.vis_scheduler`: the curves are what the optimizer of a training uses."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxpretrain import cli
from jaxpretrain.build import ConfigError
from jaxpretrain.config import load_config
from jaxpretrain.optim import build_optimizer, learning_rates, weight_decays
from jaxpretrain.optim.curves import distinct, group_curves
from jaxpretrain.tools.vis_scheduler import main, steps_per_epoch
from jaxpretrain.train_state import make_method, split
from tests.tiny import tiny_config

SCHEDULE = [
    dict(type="LinearLR", start_factor=0.1, by_epoch=False, begin=0, end=4),
    dict(type="CosineAnnealingLR", by_epoch=True, begin=1, end=3, eta_min=1e-3, convert_to_iter_based=True),
    dict(type="CosineAnnealingWeightDecay", by_epoch=False, begin=0, eta_min=0.2),
]
KEYS = {
    "head/bias": dict(lr_mult=3.0, decay_mult=0.0),
    "head/kernel": dict(begin=5),
    "norm": dict(fix_lr=True, decay_mult=0.5),
}


def config_of(**optimizer):
    optimizer = {**dict(type="SGD", lr=0.05, weight_decay=0.1), **optimizer}
    return tiny_config(
        optim_wrapper=dict(optimizer=optimizer, paramwise_cfg=dict(custom_keys=KEYS)),
        param_scheduler=SCHEDULE,
        max_steps=None,
        max_epochs=3,
    )


def updates(config, steps_per_epoch, gradient):
    """{path: update [total_steps] of a parameter of ones whose gradient is constant}, by the optimizer itself."""
    total = config.max_epochs * steps_per_epoch
    length = dict(total_steps=total, steps_per_epoch=steps_per_epoch, max_epochs=config.max_epochs)
    wrapper, schedule = config.optim_wrapper.to_dict(), list(config.param_scheduler)
    params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), split(make_method(config))[1])
    optimizer = build_optimizer(
        wrapper, partial(learning_rates, schedule, **length), params, partial(weight_decays, schedule, **length)
    )
    state, grads = optimizer.init(params), jax.tree.map(lambda leaf: jnp.full(leaf.shape, gradient), params)
    step, found = jax.jit(lambda state: optimizer.update(grads, state, params)), {}
    for _ in range(total):
        change, state = step(state)
        for path, leaf in jax.tree_util.tree_flatten_with_path(change)[0]:
            found.setdefault(jax.tree_util.keystr(path, simple=True, separator="/"), []).append(float(leaf.ravel()[0]))
    return found


def test_the_curves_are_what_the_optimizer_does():
    config, steps_per_epoch = config_of(), 4
    curves = {name: group for group in group_curves(config, steps_per_epoch) for name in group.names}
    by_gradient, by_decay = (updates(config, steps_per_epoch, gradient) for gradient in (1.0, 0.0))
    assert set(curves) == set(by_gradient) and len({id(group) for group in curves.values()}) == 4
    for name, group in curves.items():
        lr, decay = np.nan_to_num(group.lr), np.nan_to_num(group.weight_decay)
        np.testing.assert_allclose(-lr * (1 + decay), by_gradient[name], rtol=1e-5, atol=1e-9)
        np.testing.assert_allclose(-lr * decay, by_decay[name], rtol=1e-5, atol=1e-9)
    assert np.isnan(curves["head/kernel"].lr[:5]).all() and not np.isnan(curves["head/kernel"].lr[5:]).any()


def test_a_curve_that_groups_share_counts_once():
    groups = group_curves(config_of(), 4)
    rates, decays = distinct(groups, "lr"), distinct(groups, "weight_decay")
    assert len(rates) == 4 and len(decays) == 4
    assert sum(curve.size for curve in rates) == sum(group.size for group in groups)
    plain = group_curves(load_config("configs/mae.py:digits"), 11)
    assert len(plain) == 2 and len(distinct(plain, "lr")) == 1 and len(distinct(plain, "weight_decay")) == 2
    assert len(distinct(plain, "lr")[0].names) == len(plain[0].names) + len(plain[1].names)


@pytest.mark.parametrize(
    ("optimizer", "momentum"),
    [
        (dict(type="SGD", momentum=0.8), 0.8),
        (dict(type="AdamW", betas=(0.7, 0.95)), 0.7),
        (dict(type="LARS", momentum=0.6), 0.6),
    ],
)
def test_momentum(optimizer, momentum):
    assert all(np.nanmax(group.momentum) == momentum for group in group_curves(config_of(**optimizer), 4))


def test_a_group_may_have_its_own_momentum():
    config = config_of(momentum=0.9)
    with config.unlocked():
        config.optim_wrapper.paramwise_cfg = dict(custom_keys={"head": dict(momentum=0.5)})
    values = {curve.values[0]: curve.names for curve in distinct(group_curves(config, 4), "momentum")}
    assert values[0.5] == ("head/bias", "head/kernel") and set(values) == {0.5, 0.9}


def test_linear_scaling():
    config = config_of()
    config.auto_scale_lr.enable, config.auto_scale_lr.base_batch_size = True, 8
    scaled = group_curves(config, 4)[0]  # batch_size=32
    config.param_scheduler = []
    assert (
        group_curves(config, 4)[0].lr[-1] == pytest.approx(0.05 * 4)
        and scaled.lr[0] != group_curves(config, 4)[0].lr[0]
    )


def test_one_picture_for_several_recipes_without_data(tmp_path, capsys):
    path = tmp_path / "new" / "curves.png"
    arguments = ["configs/mae.py", "--config=configs/dino.py:digits", "--dataset-size=81920", "--config.max_epochs=50"]
    assert main([*arguments, f"--output={path}", "--parameter=lr,wd"]) == cli.OK  # there is no ImageNet here
    out = capsys.readouterr().out
    assert "mae.py: 1000 steps, 20 each epoch" in out and "dino:digits: 32000 steps, 640 each epoch" in out
    assert "lr" in out and "momentum" not in out and "from step 11" in out
    picture = np.asarray(Image.open(path).convert("RGB"))
    assert picture.shape == (864, 1152, 3) and (picture != 255).any(-1).mean() > 0.01


def test_the_size_of_the_data_set_and_of_the_window(tmp_path, capsys):
    path = tmp_path / "curves.png"
    assert main(["--config=configs/mae.py:digits", f"--save-path={path}", "--window-size=5*4"]) == cli.OK
    assert "440 steps, 11 each epoch" in capsys.readouterr().out
    assert Image.open(path).size == (600, 480)


def test_a_sampler_sets_the_length_of_an_epoch():
    config = load_config("configs/mae.py:digits")
    config.data.train.sampler = dict(type="ClassBalancedSampler", num_samples=500)
    assert steps_per_epoch(config, {}) == 500 // 128


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--config is needed"),
        (["configs/mae.py:digits", "--parameter=weight_decey"], "weight_decay"),
        (["configs/mae.py:digits", "--dataset-size=100"], "batch_size=128"),
        (["configs/mae.py:digits", "--window-size=12"], "12\\*7"),
    ],
)
def test_mistakes(arguments, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        main([*arguments, f"--output={tmp_path / 'curves.png'}"])
