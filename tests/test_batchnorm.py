"""BatchNorm in groups: PyTorch's BatchNorm of each group, by definition (NumPy, float64) and live."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxpretrain.build import ConfigError
from jaxpretrain.models.layers import BatchNorm
from tests.parity import TOLERANCE

CASES = [  # shape, groups
    ((8, 5, 6, 3), 1),
    ((8, 5, 6, 3), 2),
    ((8, 5, 6, 3), 8),
    ((12, 7), 1),
    ((12, 7), 3),
]


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def make(channels, groups=1, **kwargs):
    norm = BatchNorm(channels, groups=groups, **kwargs)
    norm.scale.set_value(jnp.asarray(1 + 0.3 * normal(channels, seed=1)))
    norm.bias.set_value(jnp.asarray(normal(channels, seed=2)))
    norm.mean.set_value(jnp.asarray(normal(channels, seed=3)))
    norm.var.set_value(jnp.asarray(0.5 + normal(channels, seed=4) ** 2))
    return norm


def split(norm, *filters):
    """Structure and plain arrays; states would hand the very variables on to what is merged."""
    graphdef, *states = nnx.split(norm, *filters)
    return graphdef, *map(nnx.to_pure_dict, states)


def run(norm, x, g):
    """Output, gradients (input, scale, bias) for the output gradient g, and the new statistics."""
    graphdef, params, stats = split(norm, nnx.Param, ...)

    def apply(x, params):
        twin = nnx.merge(graphdef, params, stats)
        y = twin(x)
        return (y.astype(g.dtype) * g).sum(), (y, nnx.to_pure_dict(nnx.state(twin, nnx.BatchStat)))

    (dx, dparams), (y, new) = jax.jit(jax.grad(apply, argnums=(0, 1), has_aux=True))(x, params)
    return y, dx, dparams.get("scale"), dparams.get("bias"), new


def reference(norm, x, g, training=True):
    """The same in float64, by the formulas of the paper (and the derivative written out)."""
    x, g = np.asarray(x, np.float64), np.asarray(g, np.float64)
    scale, bias, mean, var = (np.asarray(v[...], np.float64) for v in (norm.scale, norm.bias, norm.mean, norm.var))
    y, dx = np.empty_like(x), np.empty_like(x)
    dscale = np.zeros_like(scale)
    means, variances = [], []
    for part in np.split(np.arange(len(x)), norm.groups if training else 1):
        rows, drows = x[part].reshape(-1, x.shape[-1]), g[part].reshape(-1, x.shape[-1])
        n = len(rows)
        m, v = (rows.mean(0), rows.var(0)) if training else (mean, var)
        std = np.sqrt(v + norm.eps)
        hat = (rows - m) / std
        y[part] = (hat * scale + bias).reshape(x[part].shape)
        inner = drows - drows.mean(0) - hat * (drows * hat).mean(0) if training else drows
        dx[part] = (scale / std * inner).reshape(x[part].shape)
        dscale += (drows * hat).sum(0)
        means.append(m)
        variances.append(v * n / (n - 1))
    new = {"mean": mean, "var": var, "num_batches_tracked": 0}
    if training:
        new["mean"] = (1 - norm.momentum) * mean + norm.momentum * np.mean(means, axis=0)
        new["var"] = (1 - norm.momentum) * var + norm.momentum * np.mean(variances, axis=0)
        new["num_batches_tracked"] = 1
    return y, dx, dscale, g.reshape(-1, x.shape[-1]).sum(0), new


def live_pytorch(norm, x, g, training=True):
    """The same by torch.nn.BatchNorm2d, one module per group, whose buffers are averaged."""
    torch = pytest.importorskip("torch")
    groups = norm.groups if training else 1
    results = []
    for part, gpart in zip(np.split(x, groups), np.split(g, groups), strict=True):
        theirs = torch.nn.BatchNorm2d(x.shape[-1], eps=norm.eps, momentum=norm.momentum).train(training)
        for ours, name in (("scale", "weight"), ("bias", "bias"), ("mean", "running_mean"), ("var", "running_var")):
            getattr(theirs, name).data = torch.tensor(np.array(getattr(norm, ours)[...]))
        tx, tg = (
            torch.tensor(np.moveaxis(a.reshape(len(a), -1, a.shape[-1]), -1, 1)[..., None]) for a in (part, gpart)
        )
        ty = theirs(tx.requires_grad_())
        ty.backward(tg)
        y, dx = (np.moveaxis(t.detach().numpy()[..., 0], 1, -1).reshape(part.shape) for t in (ty, tx.grad))
        buffers = [theirs.running_mean.numpy(), theirs.running_var.numpy(), theirs.num_batches_tracked.numpy()]
        results.append((y, dx, theirs.weight.grad.numpy(), theirs.bias.grad.numpy(), *buffers))
    y, dx, dscale, dbias, mean, var, steps = zip(*results, strict=True)
    new = {"mean": np.mean(mean, 0), "var": np.mean(var, 0), "num_batches_tracked": steps[0]}
    return np.concatenate(y), np.concatenate(dx), np.sum(dscale, 0), np.sum(dbias, 0), new


def assert_close(actual, desired, tolerance=TOLERANCE):
    actual, desired = np.asarray(actual, np.float64), np.asarray(desired, np.float64)
    assert actual.shape == desired.shape
    assert np.abs(actual - desired).max() <= tolerance * np.abs(desired).max()


def assert_all_close(ours, theirs, tolerance=TOLERANCE):
    for actual, desired in zip(ours[:4], theirs[:4], strict=True):
        assert_close(actual, desired, tolerance)
    for name in ("mean", "var"):
        assert_close(ours[4][name], theirs[4][name])
    assert ours[4]["num_batches_tracked"] == theirs[4]["num_batches_tracked"]


@pytest.mark.parametrize("other", [reference, live_pytorch], ids=["definition", "pytorch"])
@pytest.mark.parametrize(("shape", "groups"), CASES)
def test_training_equals_pytorch_per_group(shape, groups, other):
    norm = make(shape[-1], groups, momentum=0.3, eps=1e-3)
    x, g = 3 + 2 * normal(*shape, seed=5), normal(*shape, seed=6)
    assert_all_close(run(norm, x, g), other(norm, x, g))


@pytest.mark.parametrize("other", [reference, live_pytorch], ids=["definition", "pytorch"])
@pytest.mark.parametrize(("shape", "groups"), CASES[:2])
@pytest.mark.parametrize("mode", ["eval", "norm_eval"])
def test_eval_uses_and_keeps_the_running_statistics(mode, shape, groups, other):
    norm = make(shape[-1], groups, norm_eval=mode == "norm_eval")
    if mode == "eval":
        norm.eval()
    x, g = 3 + 2 * normal(*shape, seed=5), normal(*shape, seed=6)
    assert_all_close(run(norm, x, g), other(norm, x, g, training=False))


def test_norm_eval_survives_train():
    norm = make(3, norm_eval=True)
    norm.eval()
    norm.train()
    before = np.asarray(norm.mean[...])
    norm(normal(4, 3))
    np.testing.assert_array_equal(norm.mean[...], before)


@pytest.mark.parametrize("other", [reference, live_pytorch], ids=["definition", "pytorch"])
@pytest.mark.parametrize("groups", [1, 4])
def test_bfloat16_input_has_float32_statistics(groups, other):
    """The same numbers as in float32, but for the rounding of the output (2^-8 of a value) and of its gradient."""
    x = jnp.asarray(3 + 2 * normal(8, 5, 6, 3, seed=5)).astype(jnp.bfloat16)
    g = jnp.asarray(normal(8, 5, 6, 3, seed=6)).astype(jnp.bfloat16).astype(jnp.float32)
    norm = make(3, groups)
    y, dx, dscale, dbias, new = run(norm, x, g)
    assert y.dtype == dx.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in (dscale, dbias, new["mean"], new["var"])} == {jnp.dtype("float32")}
    assert_all_close(
        (y, dx, dscale, dbias, new), other(norm, np.asarray(x, np.float32), np.asarray(g, np.float32)), 2**-8
    )


def test_statistics_move_step_by_step():
    norm = BatchNorm(3)
    mean, var = np.zeros(3), np.ones(3)
    for step in range(3):
        x = normal(10, 3, seed=step)
        norm(x)
        mean, var = 0.9 * mean + 0.1 * x.mean(0), 0.9 * var + 0.1 * x.var(0, ddof=1)
    assert_close(norm.mean[...], mean)
    assert_close(norm.var[...], var)
    assert norm.num_batches_tracked[...] == 3


def test_running_statistics_get_no_gradient():
    norm = make(3)
    graphdef, state = split(norm)

    def total(x):
        twin = nnx.merge(graphdef, state)
        twin(x)
        return twin.mean[...].sum() + twin.var[...].sum()

    assert not np.any(jax.grad(total)(jnp.asarray(normal(6, 3)))), "statistics must not carry gradients to the images"


@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_precision_on_many_values(offset):
    """Two passes, summed in an order that keeps the digits: 800,000 values per channel, far from zero."""
    x = (offset + np.random.default_rng(0).standard_normal((16, 224, 224, 2))).astype(np.float32)
    norm = BatchNorm(2, momentum=1.0)
    norm(x)
    exact = x.reshape(-1, 2).astype(np.float64)
    assert np.abs(np.asarray(norm.mean[...]) - exact.mean(0)).max() <= 1e-6 * max(offset, 1)
    assert_close(norm.var[...], exact.var(0, ddof=1), 1e-6)


def test_groups_are_consecutive_and_independent():
    norm = make(3, groups=2)
    x = normal(6, 4, 4, 3)
    y = norm(x)
    changed = x.copy()
    changed[3:] += 7 * normal(3, 4, 4, 3, seed=8)
    np.testing.assert_array_equal(make(3, groups=2)(changed)[:3], y[:3])
    assert not np.allclose(make(3, groups=1)(changed)[:3], make(3, groups=1)(x)[:3])


def test_batches_without_statistics_are_errors():
    with pytest.raises(ConfigError, match="a batch of 6 cannot be cut into 4 equal groups"):
        BatchNorm(3, groups=4)(jnp.zeros((6, 3)))
    with pytest.raises(ConfigError, match="one value per channel"):
        BatchNorm(3, groups=4)(jnp.zeros((4, 1, 1, 3)))
    norm = BatchNorm(3, groups=4)
    norm.eval()
    norm(jnp.zeros((1, 3)))


def test_second_derivatives_are_right():
    """Gradient penalties differentiate twice; a trick that is exact once only would be wrong here."""
    norm = make(2)
    x = jnp.asarray(normal(5, 2))
    weights = jnp.asarray(normal(5, 2, seed=7))
    graphdef, state = split(norm)

    def f(x):
        return (jnp.tanh(nnx.merge(graphdef, state)(x)) * weights).sum()

    direction = jnp.asarray(normal(5, 2, seed=8))
    hvp = jax.jvp(jax.grad(f), (x,), (direction,))[1]
    with jax.enable_x64(True):
        eps, x64 = 1e-5, np.asarray(x, np.float64)
        numeric = (jax.grad(f)(x64 + eps * direction) - jax.grad(f)(x64 - eps * direction)) / (2 * eps)
    assert_close(hvp, numeric, 1e-4)  # float32 against differences in float64


@pytest.mark.parametrize("groups", [1, 4, 8, 16])
def test_devices_change_nothing(groups):
    """A batch split over eight devices: the same values; and no communication where each group lives on one device."""
    norm = make(3, groups)
    graphdef, state = split(norm)
    x = normal(16, 4, 4, 3)

    def apply(x):
        return nnx.merge(graphdef, state)(x)

    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.NamedSharding(mesh, jax.P("data"))
    compiled = jax.jit(apply, in_shardings=sharding, out_shardings=sharding).lower(x).compile()
    assert_close(compiled(jax.device_put(x, sharding)), norm(x), 1e-6)
    collectives = ("all-reduce", "all-gather", "collective-permute", "all-to-all")
    assert any(name in compiled.as_text() for name in collectives) == (groups < 8)
