"""Learning rate schedules against MMEngine's, for every recipe of MMPretrain."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxpretrain.build import ConfigError
from jaxpretrain.optim.schedules import learning_rates, weight_decays
from tests.parity import load_golden

ENTRIES = load_golden("schedules")["entries"]


def run(*schedulers, base=1.0, steps=30, per_epoch=10, epochs=3):
    return learning_rates(list(schedulers), base, steps, per_epoch, epochs)


@pytest.mark.parametrize("entry", ENTRIES, ids=[entry["recipes"][0] for entry in ENTRIES])
def test_recipe(entry):
    args = (entry["total_iters"], entry["epoch_length"], entry["max_epochs"])
    actual = learning_rates(entry["param_scheduler"], entry["base_lr"], *args)
    assert actual.dtype == np.float64 and actual.shape == (entry["total_iters"],)
    np.testing.assert_allclose(actual[entry["iters"]], entry["lr"], rtol=1e-9, atol=0)
    decay = weight_decays(entry["param_scheduler"], entry.get("base_weight_decay", 0.05), *args)
    if "weight_decay" in entry:
        np.testing.assert_allclose(decay[entry["iters"]], entry["weight_decay"], rtol=1e-9, atol=0)
    else:
        assert (decay == 0.05).all()


def test_every_kind_of_weight_decay_schedule_is_among_the_recipes():
    assert sum("weight_decay" in entry for entry in ENTRIES) == 4


@pytest.mark.parametrize("case", ["mae_vit", "simclr_resnet18_lars", "sup_vit_adamw_mixup", "sup_resnet18_sgd"])
def test_rates_of_whole_runs(case):
    golden = load_golden(f"trajectories/{case}")
    config = golden["config"]
    lr = config["optim_wrapper"]["optimizer"]["lr"]
    actual = learning_rates(config["param_scheduler"], lr, len(golden["steps"]), 10, 3)
    np.testing.assert_allclose(actual, [step["lr"][0] for step in golden["steps"]], rtol=1e-8)  # stored with 9 digits


def test_warmup_reaches_the_full_rate_at_its_last_step():
    warmup = dict(type="LinearLR", start_factor=0.1, by_epoch=True, begin=0, end=1, convert_to_iter_based=True)
    np.testing.assert_allclose(run(warmup)[:12], [*np.linspace(0.1, 1, 10), 1, 1])


def test_without_conversion_the_curve_is_a_staircase():
    rates = run(dict(type="CosineAnnealingLR", by_epoch=True))
    assert [len(set(rates[i : i + 10])) for i in (0, 10, 20)] == [1, 1, 1]
    np.testing.assert_allclose(rates[::10], [(1 + math.cos(math.pi * e / 3)) / 2 for e in range(3)])


def test_overlapping_schedulers_multiply():
    warmup = dict(type="LinearLR", start_factor=0.25, by_epoch=False, begin=0, end=15)
    steps = dict(type="MultiStepLR", by_epoch=True, milestones=[1, 2], gamma=0.1)
    np.testing.assert_allclose(run(warmup, steps), run(warmup) * run(steps))


def test_at_an_epochs_start_those_that_count_steps_act_first():
    # Worked by hand: at step 2 (epoch 1), the step-wise cosine (T_max 4, to 0.5) acts before the epoch-wise factor 0.1.
    cosine = dict(type="CosineAnnealingLR", T_max=4, eta_min=0.5, by_epoch=False)
    stairs = dict(type="StepLR", step_size=1, by_epoch=True)
    height = [1 + math.cos(math.pi * k / 4) for k in range(3)]
    first = 0.5 + 0.5 * height[1] / height[0]
    expected = [1.0, first, 0.1 * (0.5 + (first - 0.5) * height[2] / height[1])]
    for order in ((cosine, stairs), (stairs, cosine)):
        np.testing.assert_allclose(run(*order, steps=4, per_epoch=2, epochs=2)[:3], expected)


def test_cosine_climbs_again_after_T_max():
    rates = run(dict(type="CosineAnnealingLR", T_max=5, eta_min=0.2, by_epoch=False), steps=11)
    np.testing.assert_allclose(rates, 0.2 + 0.4 * (1 + np.cos(np.pi * np.arange(11) / 5)))


def test_cosine_eta_min_ratio():
    rates = run(dict(type="CosineAnnealingLR", T_max=29, eta_min_ratio=0.1, by_epoch=False), base=0.3)
    assert rates[-1] == pytest.approx(0.03)


def test_constant_takes_its_factor_back_at_its_last_turn():
    rates = run(dict(type="ConstantLR", factor=0.5, by_epoch=False, begin=2, end=6))
    np.testing.assert_allclose(rates[:8], [1, 1, 0.5, 0.5, 0.5, 1, 1, 1])


def test_exponential_by_step_equals_by_epoch_at_epochs():
    stairs = run(dict(type="ExponentialLR", gamma=0.1))
    smooth = run(dict(type="ExponentialLR", gamma=0.1, convert_to_iter_based=True))
    np.testing.assert_allclose(stairs[::10], [1, 0.1, 0.01])
    np.testing.assert_allclose(smooth, 0.1 ** (np.arange(30) / 10))


def test_converted_steps_and_milestones_count_from_begin():
    for cfg in (dict(type="StepLR", step_size=1), dict(type="MultiStepLR", milestones=[1])):
        rates = run(dict(cfg, begin=1, convert_to_iter_based=True))
        np.testing.assert_allclose(rates, [*[1.0] * 20, *[0.1] * 10])


def test_forms_of_the_description():
    cfg = dict(type="StepLR", step_size=1)
    expected = run(cfg)
    for form in (cfg, (cfg,), ConfigDict(cfg), [ConfigDict(cfg)], ConfigDict(dict(x=[cfg])).x):
        np.testing.assert_array_equal(learning_rates(form, 1.0, 30, 10, 3), expected)
    for nothing in (None, [], ()):
        assert (learning_rates(nothing, 0.3, 30, 10, 3) == 0.3).all()


def test_a_run_cut_short_keeps_the_shape():
    schedule = [
        dict(type="LinearLR", start_factor=0.1, by_epoch=True, end=1, convert_to_iter_based=True),
        dict(type="CosineAnnealingLR", begin=1, by_epoch=True, convert_to_iter_based=True),
    ]
    np.testing.assert_array_equal(run(*schedule, steps=7), run(*schedule)[:7])
    late = dict(type="CosineAnnealingLR", begin=10, by_epoch=False)
    assert (run(late, steps=3) == 1).all()


def test_parameters_without_weight_decay_keep_none():
    cfg = [dict(type="CosineAnnealingWeightDecay", eta_min=0.2, T_max=3, by_epoch=True)]
    assert (weight_decays(cfg, 0.0, 30, 10, 3) == 0).all()
    assert weight_decays(cfg, 0.04, 30, 10, 3)[-1] > 0.04


def test_a_million_steps_take_seconds():
    cfg = [
        dict(type="LinearLR", start_factor=1e-4, end=40, convert_to_iter_based=True),
        dict(type="CosineAnnealingLR", begin=40, convert_to_iter_based=True),
    ]
    start = time.process_time()
    rates = learning_rates(cfg, 1.0, 1_000_000, 2500, 400)
    assert time.process_time() - start < 5
    assert rates[99_999] == pytest.approx(1) and 0 < rates[-1] < 1e-10


@pytest.mark.parametrize(
    "cfg, message",
    [
        (dict(type="CosineAnealingLR"), "Unknown type 'CosineAnealingLR'. Did you mean 'CosineAnnealingLR'"),
        (
            dict(type="LinearLR", start_facter=0.1),
            "LinearLR has no argument 'start_facter'. Did you mean 'start_factor'",
        ),
        (dict(type="StepLR"), "StepLR needs step_size"),
        (dict(type="LinearLR", start_factor=0), "start_factor=0 must be in"),
        (dict(type="LinearLR", begin=5, end=5), "begin=5 must be at least 0 and smaller than end=5"),
        (
            dict(type="LinearLR", end=5, by_epoch=False, convert_to_iter_based=True),
            "convert_to_iter_based is for schedulers",
        ),
        (dict(type="CosineAnnealingLR", eta_min=0.1, eta_min_ratio=0.1), "not both"),
        (dict(type="CosineAnnealingParamScheduler", param_name="momentum"), "param_name='momentum'"),
        (dict(type="SGD"), "SGD is not a scheduler"),
    ],
)
def test_mistakes_are_named(cfg, message):
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        learning_rates([cfg], 1.0, 30, 10, 3)
