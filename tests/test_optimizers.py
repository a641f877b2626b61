"""Optimizers, gradient clipping and averages of weights against PyTorch, MMEngine and MMPretrain, step by step."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from jaxpretrain.build import ConfigError
from jaxpretrain.optim import base_lr, build_optimizer, cosine_ema_momentum, ema_update, learning_rates, scale_lr
from tests.parity import load_golden

GOLDEN = load_golden("optimizers")
SHAPES = {"w": (4, 3), "b": (3,), "n": (3,)}
OURS = ("SGD", "Adam", "AdamW", "RMSprop", "LARS", "Lamb")
CASES = [name for name, case in GOLDEN["optimizers"].items() if case["optimizer"]["type"] in OURS]


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
    """Parity in float32 to 1e-5 of the largest magnitude; in float64 to the golden file's 9 digits."""
    with jax.enable_x64(request.param == "float64"):
        yield jnp.dtype(request.param)


def tolerance(dtype):
    return 1e-5 if dtype == jnp.float32 else 5.1e-9


def draw(seed, dtype, scale=1.0):
    rng = np.random.Generator(np.random.PCG64(seed))
    while True:
        yield {name: jnp.asarray(scale * rng.standard_normal(shape), dtype) for name, shape in SHAPES.items()}


def run(optim_wrapper, dtype, steps=12, scale=1.0, **kwargs):
    """The parameters after each step at a constant learning rate."""
    params, grads = next(draw(11, dtype)), draw(12, dtype, scale)
    rates = np.full(steps, optim_wrapper["optimizer"]["lr"])
    optimizer = build_optimizer(optim_wrapper, rates, params, **kwargs)
    state, path = optimizer.init(params), []
    step = jax.jit(optimizer.update)
    for _ in range(steps):
        updates, state = step(next(grads), state, params)
        params = optax.apply_updates(params, updates)
        path.append(params)
    assert jax.tree.leaves(params)[0].dtype == dtype
    return path, state


def assert_path(path, golden, dtype):
    largest = max(np.abs(np.concatenate([step[name] for name in SHAPES])).max() for step in golden)
    for index, (ours, theirs) in enumerate(zip(path, golden, strict=True)):
        for name in SHAPES:
            error = np.abs(np.asarray(ours[name], np.float64).ravel() - theirs[name]).max() / largest
            assert error <= tolerance(dtype), f"step {index}, {name}: off by {error:.1e} of {largest}"


def wrapper(case):
    """The golden case, its overrides of groups written as custom_keys."""
    optimizer = case["optimizer"]
    keys = {}
    for name, override in case.get("param_overrides", {}).items():
        keys[f".{name}"] = dict(
            lr_mult=override.get("lr", optimizer["lr"]) / optimizer["lr"],
            decay_mult=override.get("weight_decay", 1.0) and 1.0,
            lars_exclude=override.get("lars_exclude", False),
        )
    return dict(optimizer=optimizer, paramwise_cfg=dict(custom_keys=keys), clip_grad=case.get("clip_grad"))


def test_cases_are_there():
    assert len(CASES) == 24


@pytest.mark.parametrize("name", CASES)
def test_optimizer(name, dtype):
    case = GOLDEN["optimizers"][name]
    path, state = run(wrapper(case), dtype)
    assert_path(path, case["trajectory"], dtype)
    assert state["step"] == 12


@pytest.mark.parametrize("name", GOLDEN["gradient_clipping"])
def test_gradient_clipping(name, dtype):
    case = GOLDEN["gradient_clipping"][name]
    path, _ = run(wrapper(case), dtype, scale=case["grad_scale"])
    assert_path(path, case["trajectory"], dtype)


def test_the_test_notices_a_wrong_hyperparameter(dtype):
    case = dict(GOLDEN["optimizers"]["adamw_mae"])
    case["optimizer"] = dict(case["optimizer"], betas=[0.9, 0.96])
    with pytest.raises(AssertionError, match="off by"):
        assert_path(run(wrapper(case), dtype)[0], case["trajectory"], dtype)


def test_adam_is_exact_in_float32_from_the_first_step():
    # Bias corrections that cancel in float32 are off by 1e-5 of the step here; the whole step is lr * sign(g).
    params = {"w": jnp.zeros(3)}
    optimizer = build_optimizer(dict(optimizer=dict(type="Adam", lr=1.0, eps=0.0)), np.ones(1), params)
    updates, _ = optimizer.update({"w": jnp.array([1.0, -2.0, 1e-3])}, optimizer.init(params), params)
    np.testing.assert_allclose(updates["w"], [-1, 1, -1], rtol=3e-7)


def test_rates_come_from_the_table_by_the_optimizers_own_step():
    params, table = {"w": jnp.zeros(2)}, np.array([1.0, 0.5, 0.25])
    optimizer = build_optimizer(dict(optimizer=dict(type="SGD", lr=1.0)), table, params)
    state, seen = optimizer.init(params), []
    step = jax.jit(optimizer.update)
    for _ in range(4):
        updates, state = step({"w": jnp.ones(2)}, state, params)
        seen.append(-float(updates["w"][0]))
    assert seen == [1.0, 0.5, 0.25, 0.25]


def test_a_function_of_the_base_rate_keeps_eta_min_for_multiplied_parameters():
    params = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
    cosine = [dict(type="CosineAnnealingLR", T_max=10, eta_min=0.05, by_epoch=False)]
    rates = functools.partial(learning_rates, cosine, total_steps=11, steps_per_epoch=11)
    cfg = dict(optimizer=dict(type="SGD", lr=1.0), paramwise_cfg=dict(custom_keys={".b": dict(lr_mult=0.1)}))
    optimizer = build_optimizer(cfg, rates, params)
    state = dict(optimizer.init(params), step=jnp.int32(10))
    updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, params), state, params)
    np.testing.assert_allclose([updates["a"][0], updates["b"][0]], [-0.05, -0.05], rtol=1e-6)
    proportional = build_optimizer(cfg, rates(1.0), params)
    updates, _ = proportional.update(jax.tree.map(jnp.ones_like, params), state, params)
    np.testing.assert_allclose([updates["a"][0], updates["b"][0]], [-0.05, -0.005], rtol=1e-6)


@pytest.mark.parametrize("kind", ["SGD", "LARS", "AdamW", "Lamb"])
def test_a_parameter_that_begins_late_sleeps_and_then_starts_afresh(kind):
    # As a parameter of PyTorch whose gradient is None: the other one is on its own, in clipping too.
    options = dict(max_grad_norm=None) if kind == "Lamb" else dict(momentum=0.9) if kind in ("SGD", "LARS") else {}
    cfg = dict(
        optimizer=dict(type=kind, lr=0.1, weight_decay=0.1, **options),
        paramwise_cfg=dict(custom_keys={"late": dict(begin=3)}),
        clip_grad=dict(max_norm=0.5),
    )
    rng = np.random.default_rng(0)
    start = {name: jnp.asarray(rng.standard_normal(3), jnp.float32) for name in ("soon", "late")}
    grads = [{name: jnp.asarray(rng.standard_normal(3), jnp.float32) for name in start} for _ in range(6)]
    # A schedule, so that the late one's first rate is the fourth of the table.
    table = np.linspace(0.1, 0.02, 6)
    optimizer = build_optimizer(cfg, table, start)
    alone = build_optimizer(dict(cfg, paramwise_cfg=None), table, {"soon": start["soon"]})
    state, state_alone = optimizer.init(start), alone.init({"soon": start["soon"]})
    both, one = start, {"soon": start["soon"]}
    step = jax.jit(optimizer.update)
    for k in range(3):
        updates, state = step(grads[k], state, both)
        both = optax.apply_updates(both, updates)
        updates, state_alone = alone.update({"soon": grads[k]["soon"]}, state_alone, one)
        one = optax.apply_updates(one, updates)
        np.testing.assert_array_equal(both["late"], start["late"])
        np.testing.assert_allclose(both["soon"], one["soon"], rtol=1e-6)
        for slot in set(state) - {"step"}:
            np.testing.assert_array_equal(state[slot]["late"], 0)
    # From here on it moves as one that begins now, at the rates that are left.
    fresh = build_optimizer(dict(cfg, paramwise_cfg=None, clip_grad=None), table[3:], {"late": start["late"]})
    plain = build_optimizer(dict(cfg, clip_grad=None), table, start)
    new, late = fresh.init({"late": start["late"]}), {"late": start["late"]}
    for k in range(3, 6):
        updates, state = plain.update(grads[k], state, both)
        both = optax.apply_updates(both, updates)
        updates, new = fresh.update({"late": grads[k]["late"]}, new, late)
        late = optax.apply_updates(late, updates)
        assert not (np.asarray(both["late"]) == np.asarray(start["late"])).any()
        np.testing.assert_allclose(both["late"], late["late"], rtol=1e-6)


def test_a_fixed_rate_ignores_the_schedule():
    params = {"predictor": jnp.zeros(1), "rest": jnp.zeros(1)}
    keys = {"predictor": dict(fix_lr=True, lr_mult=2.0)}
    optimizer = build_optimizer(
        dict(optimizer=dict(type="SGD", lr=0.5), paramwise_cfg=dict(custom_keys=keys)),
        np.array([0.5, 0.1, 0.0]),
        params,
    )
    state, seen = optimizer.init(params), []
    for _ in range(3):
        updates, state = optimizer.update(jax.tree.map(jnp.ones_like, params), state, params)
        seen.append((-float(updates["predictor"][0]), -float(updates["rest"][0])))
    np.testing.assert_allclose(seen, [(1.0, 0.5), (1.0, 0.1), (1.0, 0.0)], rtol=1e-6)


@pytest.mark.parametrize("kind", ["SGD", "LARS"])
def test_momentum_of_its_own(kind):
    params = {"head": jnp.ones(1), "rest": jnp.ones(1)}
    keys = {"head": dict(momentum=0.0, lars_exclude=True), "rest": dict(lars_exclude=True)}
    optimizer = build_optimizer(
        dict(optimizer=dict(type=kind, lr=1.0, momentum=0.9), paramwise_cfg=dict(custom_keys=keys)), np.ones(3), params
    )
    state, seen = optimizer.init(params), []
    for _ in range(3):
        updates, state = optimizer.update(jax.tree.map(jnp.ones_like, params), state, params)
        seen.append((-float(updates["head"][0]), -float(updates["rest"][0])))
    np.testing.assert_allclose(seen, [(1, 1), (1, 1.9), (1, 2.71)], rtol=1e-6)


def test_weight_decay_can_be_scheduled():
    params = {"w": jnp.ones(1)}
    cfg = dict(optimizer=dict(type="AdamW", lr=1.0, weight_decay=0.1))
    optimizer = build_optimizer(cfg, np.ones(2), params, weight_decays=np.array([0.1, 0.3]))
    state, seen = optimizer.init(params), []
    for _ in range(2):
        updates, state = optimizer.update({"w": jnp.zeros(1)}, state, params)
        seen.append(-float(updates["w"][0]))
    np.testing.assert_allclose(seen, [0.1, 0.3], rtol=1e-6)


@pytest.mark.parametrize("kind, slots", [("SGD", ""), ("LARS", "momentum"), ("AdamW", "mu nu"), ("Lamb", "mu nu")])
def test_state_is_a_plain_dict_that_mirrors_the_parameters(kind, slots):
    slots = slots.split()
    params = {"layers": {0: {"fc": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}}}
    options = dict(momentum=0.9) if kind == "LARS" else {}
    shapes = jax.eval_shape(lambda: params)
    optimizer = build_optimizer(dict(optimizer=dict(type=kind, lr=0.1, **options)), np.ones(5), shapes)
    state = optimizer.init(params)
    assert sorted(state) == sorted(["step", *slots]) and state["step"].dtype == jnp.int32
    for name in slots:
        assert jax.tree.map(jnp.shape, state[name]) == jax.tree.map(jnp.shape, params)
    _, new = jax.jit(optimizer.update)(params, state, params)
    assert jax.tree.structure(new) == jax.tree.structure(state)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), new) == jax.tree.map(lambda x: (x.shape, x.dtype), state)


def test_a_donated_step_runs_without_hidden_transfers():
    params = {"w": jnp.ones((8, 8))}
    cfg = dict(optimizer=dict(type="AdamW", lr=0.1), clip_grad=dict(max_norm=1.0))
    optimizer = build_optimizer(cfg, np.linspace(1, 0, 10), params)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state):
        updates, state = optimizer.update(params, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.jit(optimizer.init)(params)
    with jax.transfer_guard("disallow"):
        before = state["mu"]["w"]
        for _ in range(3):
            params, state = step(params, state)
    assert before.is_deleted() and np.isfinite(params["w"]).all()


def test_gradients_in_bfloat16_leave_parameters_and_state_in_float32():
    params = {"w": jnp.ones(4)}
    optimizer = build_optimizer(dict(optimizer=dict(type="AdamW", lr=0.1)), np.ones(2), params)
    updates, state = optimizer.update({"w": jnp.ones(4, jnp.bfloat16)}, optimizer.init(params), params)
    assert updates["w"].dtype == state["mu"]["w"].dtype == state["nu"]["w"].dtype == jnp.float32


def test_lars_remembers_the_rates_of_the_past_and_sgd_does_not():
    params, table = {"w": jnp.ones(1)}, np.array([1.0, 0.1])
    keys = dict(custom_keys={"w": dict(lars_exclude=True)})
    for kind, expected in (("LARS", [1.0, 0.9 * 1.0 + 0.1]), ("SGD", [1.0, 0.1 * (0.9 + 1.0)])):
        cfg = dict(optimizer=dict(type=kind, lr=1.0, momentum=0.9), paramwise_cfg=keys)
        optimizer = build_optimizer(cfg, table, params)
        state, seen = optimizer.init(params), []
        for _ in table:
            updates, state = optimizer.update({"w": jnp.ones(1)}, state, params)
            seen.append(-float(updates["w"][0]))
        assert seen == pytest.approx(expected)


def test_lars_with_a_vanishing_norm_uses_the_plain_rate():
    params = {"w": jnp.zeros(2), "v": jnp.ones(2)}
    optimizer = build_optimizer(dict(optimizer=dict(type="LARS", lr=0.5)), np.full(1, 0.5), params)
    updates, _ = optimizer.update({"w": jnp.ones(2), "v": jnp.zeros(2)}, optimizer.init(params), params)
    np.testing.assert_array_equal(updates["w"], [-0.5, -0.5])
    np.testing.assert_array_equal(updates["v"], [0, 0])


def test_config_dicts_and_scaled_rates():
    cfg = ConfigDict(dict(optimizer=dict(type="AdamW", lr=1e-3), paramwise_cfg=None, clip_grad=None))
    scaled = scale_lr(cfg, batch_size=1024, base_batch_size=256)
    assert scaled["optimizer"]["lr"] == pytest.approx(4e-3) and cfg.optimizer.lr == 1e-3
    assert base_lr(dict(optimizer=dict(type="AdamW"))) == 1e-3
    assert scale_lr(dict(optimizer=dict(type="AdamW")), 512, 256)["optimizer"]["lr"] == pytest.approx(2e-3)
    build_optimizer(cfg, np.ones(1), {"w": jnp.ones(1)})
    with pytest.raises(ConfigError, match="base_batch_size"):
        scale_lr(cfg, 512, None)


@pytest.mark.parametrize(
    "cfg, message",
    [
        (dict(), "optimizer is not set"),
        (dict(optimizer=dict(type="AdamX", lr=1)), "Unknown type 'AdamX'. Did you mean 'Adam"),
        (dict(optimizer=dict(type="AdamW", beta=1)), "AdamW has no argument 'beta'. Did you mean 'betas'"),
        (dict(optimizer=dict(type="LARS")), "LARS needs lr"),
        (dict(optimizer=dict(type="SGD", nesterov=True)), "nesterov needs a momentum"),
        (dict(optimizer=dict(type="StepLR", step_size=1)), "StepLR is not an optimizer"),
        (dict(optimizer=dict(type="SGD"), clip_gard=None), "no option 'clip_gard'. Did you mean 'clip_grad'"),
        (
            dict(optimizer=dict(type="SGD"), clip_grad=dict(maxnorm=1)),
            "'maxnorm'. Did you mean 'max_norm'",
        ),
        (dict(optimizer=dict(type="SGD"), clip_grad=dict(max_norm=1, norm_type=1)), "norm_type is 2"),
        (dict(optimizer=dict(type="SGD"), accumulative_counts=2), "set config.accumulative_counts"),
        (dict(optimizer=dict(type="SGD"), type="DeepSpeedOptimWrapper"), "optim_wrapper.type='DeepSpeedOptimWrapper'"),
        (dict(optimizer=dict(type="SGD"), constructor="LearningRateDecay"), "Did you mean 'LearningRateDecayOptimWrap"),
        (
            dict(optimizer=dict(type="AdamW"), paramwise_cfg=dict(custom_keys={"w": dict(momentum=0.0)})),
            "AdamW has none to replace",
        ),
    ],
)
def test_mistakes_are_named(cfg, message):
    with pytest.raises(ConfigError, match=message):
        build_optimizer(cfg, np.ones(1), {"w": jnp.ones(1)})


# Averages of weights. `momentum` may change from step to step, so the other averages of the reference are this one.
AVERAGES = {
    "ema_0.1": lambda step: 0.1,
    "ema_4e-5": lambda step: 4e-5,
    "ema_0.0005_update_buffers": lambda step: 0.0005,
    "momentum_annealing_gamma5": lambda step: jnp.maximum(0.0002, 5 / (5 + step)),
    "swa": lambda step: 1 / (jnp.asarray(step) + 1),
    "cosine_ema_byol_0.01": lambda step: cosine_ema_momentum(step, 0.01, 0.0, 16),
    "cosine_ema_mocov3_0.004": lambda step: cosine_ema_momentum(step, 0.004, 0.0, 16),
    "cosine_ema_0.2_to_0.05": lambda step: cosine_ema_momentum(step, 0.2, 0.05, 16),
}


@pytest.mark.parametrize("name", AVERAGES)
def test_average_of_weights(name, dtype):
    # The reference computes a momentum that changes in float32 even when the weights are float64.
    golden = GOLDEN["ema"][name]
    limit = tolerance(dtype) if isinstance(AVERAGES[name](1), float) else max(tolerance(dtype), 1e-7)
    limit *= max(map(abs, golden["averaged_param"]))
    source = np.random.Generator(np.random.PCG64(13)).standard_normal((16, 2))
    ema = {"param": jnp.asarray(0.7, dtype), "buffer": jnp.asarray(-0.3, dtype), "count": jnp.int32(-1)}
    step = jax.jit(lambda ema, new, step: ema_update(ema, new, step, AVERAGES[name](step)))
    for k in range(16):
        new = {"param": source[k, 0].astype(dtype), "buffer": source[k, 1].astype(dtype), "count": np.int32(k)}
        ema = step(ema, jax.tree.map(jnp.asarray, new), jnp.int32(k))
        assert float(ema["param"]) == pytest.approx(golden["averaged_param"][k], abs=limit)
        if name.endswith("update_buffers"):  # otherwise buffers are the newest ones, and not averaged at all
            assert float(ema["buffer"]) == pytest.approx(golden["averaged_buffer"][k], abs=limit)
            assert int(ema["count"]) == golden["averaged_int_buffer"][k]
    assert ema["param"].dtype == dtype


def test_average_begins_late_with_a_copy():
    ema, seen = jnp.float32(-1), []
    for k in range(6):  # weights 0, 1, 2, ...
        ema = ema_update(ema, jnp.float32(k), k, momentum=0.5, begin_iter=3)
        seen.append(float(ema))
    assert seen == [0, 1, 2, 2.5, 3.25, 4.125]


@pytest.mark.parametrize("case", GOLDEN["cosine_ema_momentum"], ids=lambda case: str(case["momentum"]))
def test_cosine_momentum(case, dtype):
    args = (case["momentum"], case["end_momentum"], case["max_iters"])
    actual = [float(cosine_ema_momentum(jnp.int32(k), *args)) for k in range(17)]
    assert actual == pytest.approx(case["momentum_at_steps"], rel=tolerance(dtype), abs=1e-7 * args[0])
