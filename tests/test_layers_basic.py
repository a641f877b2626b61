"""Convolution, pooling, linear layers, initialisation rules and freezing, against PyTorch and by definition."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxpretrain.build import ConfigError
from jaxpretrain.models.layers import BaseModule, BatchNorm, Conv2d, Frozen, LayerNorm, Linear, build_norm, freeze
from jaxpretrain.models.layers.conv import avg_pool2d, global_avg_pool, max_pool2d, relu
from jaxpretrain.models.layers.init import apply_init_cfg
from tests.parity import TOLERANCE


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def assert_close(actual, desired, tolerance=TOLERANCE):
    actual, desired = np.asarray(actual, np.float64), np.asarray(desired, np.float64)
    assert actual.shape == desired.shape
    assert np.abs(actual - desired).max() <= tolerance * max(np.abs(desired).max(), 1e-30)


def nchw(x):
    torch = pytest.importorskip("torch")
    return torch.tensor(np.asarray(x).transpose(0, 3, 1, 2).copy(), requires_grad=True)


def nhwc(x):
    return x.detach().numpy().transpose(0, 2, 3, 1)


def assert_same_with_gradient(ours, theirs, x, *params):
    """Values and input gradients of two functions of NHWC images, the second one PyTorch's on NCHW.

    The first one gets `params` too; returns their gradients.
    """
    tx = nchw(x)
    ty = theirs(tx)
    g = normal(*nhwc(ty).shape, seed=9)
    ty.backward(nchw(g).detach())

    @jax.jit
    def run(g, *args):
        y, vjp = jax.vjp(ours, *args)
        return y, vjp(g)

    y, (dx, *grads) = run(g, x, *params)
    assert_close(y, nhwc(ty))
    assert_close(dx, nhwc(tx.grad))
    return grads


# --- convolution and linear ------------------------------------------------------------------------------------------

CONVS = [
    dict(kernel_size=3, padding=1),
    dict(kernel_size=3, stride=2, padding=1, bias=False),
    dict(kernel_size=7, stride=2, padding=3),
    dict(kernel_size=3, stride=2, padding=2, dilation=2),
    dict(kernel_size=(3, 5), stride=(2, 1), padding=(1, 2), dilation=(1, 2)),
    dict(kernel_size=3, padding=1, groups=2),
    dict(kernel_size=5, padding=2, groups=4, stride=3),
    dict(kernel_size=1),
    dict(kernel_size=1, stride=2),
    dict(kernel_size=1, stride=3, bias=False),
    dict(kernel_size=1, padding=1, stride=2),
    dict(kernel_size=1, groups=4),
]


@pytest.mark.parametrize("size", [(8, 9), (7, 7)])
@pytest.mark.parametrize("config", CONVS, ids=str)
def test_conv2d_equals_pytorch(config, size):
    torch = pytest.importorskip("torch")
    conv = Conv2d(4, 8, **config, rngs=nnx.Rngs(0))
    theirs = torch.nn.Conv2d(4, 8, **config)
    kernel = normal(*conv.kernel.shape, seed=1)
    assert kernel.transpose(3, 2, 0, 1).shape == tuple(theirs.weight.shape)
    theirs.weight.data = torch.tensor(kernel.transpose(3, 2, 0, 1).copy())
    conv.kernel.set_value(jnp.asarray(kernel))
    if conv.bias is not None:
        conv.bias.set_value(jnp.asarray(normal(8, seed=2)))
        theirs.bias.data = torch.tensor(normal(8, seed=2))
    graphdef, params = nnx.split(conv)
    x, params = normal(2, *size, 4), nnx.to_pure_dict(params)
    (grads,) = assert_same_with_gradient(lambda x, params: nnx.merge(graphdef, params)(x), theirs, x, params)
    assert_close(grads["kernel"].transpose(3, 2, 0, 1), theirs.weight.grad.numpy())
    if conv.bias is not None:
        assert_close(grads["bias"], theirs.bias.grad.numpy())


def test_linear_and_layer_norm_equal_pytorch():
    torch = pytest.importorskip("torch")
    x, scale, bias = normal(2, 3, 16) + 5, normal(16, seed=1), normal(16, seed=2)
    linear, norm = Linear(16, 5, rngs=nnx.Rngs(0)), LayerNorm(16)
    norm.scale.set_value(jnp.asarray(scale))
    norm.bias.set_value(jnp.asarray(bias))
    theirs, their_norm = torch.nn.Linear(16, 5), torch.nn.LayerNorm(16)
    theirs.weight.data = torch.tensor(np.array(linear.kernel[...]).T.copy())
    theirs.bias.data = torch.tensor(np.array(linear.bias[...]))
    their_norm.weight.data, their_norm.bias.data = torch.tensor(scale), torch.tensor(bias)
    assert_close(linear(x), theirs(torch.tensor(x)).detach())
    assert_close(norm(x), their_norm(torch.tensor(x)).detach())


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64])
def test_layers_compute_in_the_dtype_of_their_input(dtype):
    with jax.enable_x64(dtype is jnp.float64):
        rngs = nnx.Rngs(0)
        layers = [Conv2d(4, 4, 3, rngs=rngs), Conv2d(4, 4, 1, rngs=rngs), Linear(4, 4, rngs=rngs), BatchNorm(4)]
        layers += [LayerNorm(4), relu, lambda x: max_pool2d(x, 2), lambda x: avg_pool2d(x, 2), global_avg_pool]
        for layer in layers:
            call = layer if isinstance(layer, BatchNorm) else partial(jax.eval_shape, layer)  # which has state
            assert call(jnp.ones((2, 5, 5, 4), dtype)).dtype == dtype
            if isinstance(layer, nnx.Module):
                dtypes = {v.dtype for _, v in nnx.state(layer).flat_state()}
                assert dtypes <= {jnp.dtype("float32"), jnp.dtype("int32")}


# --- pooling ---------------------------------------------------------------------------------------------------------

POOLS = [  # size, kernel, stride, padding
    ((8, 8), 3, 2, 1),
    ((7, 9), 3, 2, 1),
    ((9, 8), 3, 2, 0),
    ((7, 7), 2, None, 0),
    ((8, 7), 2, 2, 1),
    ((5, 6), 1, 3, 0),
    ((6, 6), 5, 1, 2),
    ((11, 10), 4, 3, 2),
]


@pytest.mark.parametrize("ceil_mode", [False, True])
@pytest.mark.parametrize(("size", "kernel", "stride", "padding"), POOLS)
def test_max_pool2d_equals_pytorch(size, kernel, stride, padding, ceil_mode):
    torch = pytest.importorskip("torch")
    x = np.round(normal(2, *size, 3) * 2)  # many ties: the gradient goes to the first of them
    assert_same_with_gradient(
        lambda x: max_pool2d(x, kernel, stride, padding, ceil_mode),
        lambda x: torch.nn.functional.max_pool2d(x, kernel, stride, padding, ceil_mode=ceil_mode),
        x,
    )


def test_max_pool2d_by_definition():
    x = normal(1, 4, 4, 1)
    desired = x.reshape(2, 2, 2, 2).max(axis=(1, 3))
    np.testing.assert_array_equal(max_pool2d(x, 2)[0, :, :, 0], desired)
    np.testing.assert_array_equal(max_pool2d(-jnp.ones((1, 3, 3, 1)), 3, 2, 1), -jnp.ones((1, 2, 2, 1)))
    ties = jax.grad(lambda x: max_pool2d(x, 2).sum())(jnp.zeros((1, 4, 4, 1)))
    np.testing.assert_array_equal(ties[0, :, :, 0], np.kron(np.ones((2, 2)), [[1, 0], [0, 0]]))


def test_max_pool2d_keeps_nan_and_minus_infinity():
    """A loss that is not finite must not be hidden by pooling."""
    for position in range(4):
        x = np.zeros((1, 2, 2, 1), np.float32)
        x.reshape(-1)[position] = np.nan
        assert np.isnan(max_pool2d(x, 2)).all()
    assert max_pool2d(jnp.full((1, 2, 2, 1), -jnp.inf), 2) == -jnp.inf


@pytest.mark.parametrize("count_include_pad", [False, True])
@pytest.mark.parametrize("ceil_mode", [False, True])
@pytest.mark.parametrize(("size", "kernel", "stride", "padding"), POOLS)
def test_avg_pool2d_equals_pytorch(size, kernel, stride, padding, ceil_mode, count_include_pad):
    torch = pytest.importorskip("torch")
    assert_same_with_gradient(
        lambda x: avg_pool2d(x, kernel, stride, padding, ceil_mode, count_include_pad),
        lambda x: torch.nn.functional.avg_pool2d(x, kernel, stride, padding, ceil_mode, count_include_pad),
        normal(2, *size, 3),
    )


def test_avg_pool2d_by_definition():
    x = normal(1, 5, 4, 1)
    np.testing.assert_allclose(avg_pool2d(x, 2)[0, :, :, 0], x[0, :4].reshape(2, 2, 2, 2).mean(axis=(1, 3)), rtol=1e-6)
    hanging = avg_pool2d(x, 2, ceil_mode=True)
    np.testing.assert_allclose(hanging[0, 2, :, 0], x[0, 4].reshape(2, 2).mean(axis=1), rtol=1e-6)
    np.testing.assert_allclose(global_avg_pool(x), x.mean(axis=(1, 2)), rtol=1e-6)


def test_pooling_that_cannot_work_is_an_error():
    with pytest.raises(ValueError, match="a window of 3 does not fit into 2 pixels"):
        max_pool2d(jnp.zeros((1, 2, 5, 1)), 3)
    with pytest.raises(ValueError, match="more than half"):
        avg_pool2d(jnp.zeros((1, 5, 5, 1)), 3, 1, 2)


# --- initialisation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "fan_in"),
    [
        (lambda rngs: Linear(50, 4000, rngs=rngs), 50),
        (lambda rngs: Conv2d(8, 4000, (3, 5), groups=2, rngs=rngs), 4 * 15),
    ],
    ids=["Linear", "Conv2d"],
)
def test_default_initialisation_is_pytorchs(layer, fan_in):
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)), for kernel and bias: bounds, and the first four moments."""
    ours = layer(nnx.Rngs(0))
    bound = fan_in**-0.5
    for variable in (ours.kernel, ours.bias):
        values = np.asarray(variable[...]) / bound
        assert 0.99 < np.abs(values).max() <= 1
        assert abs(values.mean()) < 0.03
        assert values.var() == pytest.approx(1 / 3, rel=0.05)
        assert (values**4).mean() == pytest.approx(1 / 5, rel=0.05)


RULES = [  # rule, standard deviation of a kernel [3, 3, 40, 60], of one [40, 60], kurtosis
    (dict(type="Kaiming"), (2 / 540) ** 0.5, (2 / 60) ** 0.5, 3.0),
    (dict(type="Kaiming", a=3), (2 / 540) ** 0.5, (2 / 60) ** 0.5, 3.0),  # `a` is a leaky ReLU's only
    (dict(type="Kaiming", mode="fan_in", nonlinearity="linear"), 360**-0.5, 40**-0.5, 3.0),
    (
        dict(type="Kaiming", a=5**0.5, distribution="uniform", mode="fan_in", nonlinearity="leaky_relu"),
        (1 / 3 / 360) ** 0.5,
        (1 / 3 / 40) ** 0.5,
        1.8,
    ),
    (dict(type="Caffe2Xavier"), 360**-0.5, 40**-0.5, 1.8),
    (dict(type="Xavier"), (2 / 900) ** 0.5, (2 / 100) ** 0.5, 3.0),
    (dict(type="Xavier", distribution="uniform", gain=2), 2 * (2 / 900) ** 0.5, 2 * (2 / 100) ** 0.5, 1.8),
    (dict(type="Normal", std=0.01), 0.01, 0.01, 3.0),
    (dict(type="Uniform", a=-3, b=3), 3**0.5, 3**0.5, 1.8),
    (dict(type="TruncNormal", std=0.02), 0.02, 0.02, 3.0),
    (dict(type="TruncNormal"), 0.8796, 0.8796, 2.37),  # cut at -2 and 2, not at multiples of std
]


@pytest.mark.parametrize(("rule", "conv_std", "linear_std", "kurtosis"), RULES, ids=[str(r[0]) for r in RULES])
def test_rules_have_their_distribution(rule, conv_std, linear_std, kurtosis):
    rngs = nnx.Rngs(0)
    net = nnx.List([Conv2d(40, 60, 3, rngs=rngs), Linear(40, 60, rngs=rngs)])
    apply_init_cfg(net, {**rule, "layer": ["Conv2d", "Linear"], "bias": 0.25}, nnx.Rngs(1))
    for layer, std in zip(net, (conv_std, linear_std), strict=True):
        values = np.asarray(layer.kernel[...]).ravel()
        assert values.std() == pytest.approx(std, rel=0.05)
        assert abs(values.mean()) < 0.1 * std
        assert (values**4).mean() / values.var() ** 2 == pytest.approx(kurtosis, rel=0.1)
        assert (layer.bias[...] == 0.25).all()


class Inner(BaseModule):
    def __init__(self, init_cfg, rngs):
        self.init_cfg = init_cfg
        self.fc = Linear(2, 3, rngs=rngs)
        self.other = Linear(2, 3, rngs=rngs)
        self.norm = BatchNorm(3)


class Outer(BaseModule):
    def __init__(self, init_cfg, inner_cfg=None):
        rngs = nnx.Rngs(0)
        self.init_cfg = init_cfg
        self.plain = Linear(2, 3, rngs=rngs)
        self.parts = nnx.List([Inner(inner_cfg, rngs)])
        self.named = nnx.Dict(a=nnx.Sequential(Inner(inner_cfg, rngs)))

    def init_weights(self, rngs):
        super().init_weights(rngs)
        self.plain.bias.set_value(jnp.full((3,), 9.0))


def const(val, layer="Linear", **kwargs):
    return dict(type="Constant", val=val, layer=layer, **kwargs)


def test_inner_rules_have_the_last_word():
    net = Outer(const(1.0, bias=2.0), inner_cfg=[const(3.0), const(4.0, "_BatchNorm", bias=5.0)])
    net.init_weights(nnx.Rngs(1))
    assert (net.plain.kernel[...] == 1).all()
    assert (net.plain.bias[...] == 9).all(), "a rule of the class's own comes after init_cfg"
    for inner in (net.parts[0], net.named.a.layers[0]):
        assert (inner.fc.kernel[...] == 3).all()
        assert (inner.fc.bias[...] == 0).all()
        assert (inner.norm.scale[...] == 4).all()
        assert (inner.norm.bias[...] == 5).all()
        assert (inner.norm.mean[...] == 0).all() and (inner.norm.var[...] == 1).all()


def test_rules_reach_through_modules_without_rules():
    net = Outer([const(1.0), const(7.0, ["_BatchNorm", "GroupNorm"])])
    net.init_weights(nnx.Rngs(1))
    assert (net.parts[0].fc.kernel[...] == 1).all()
    assert (net.named.a.layers[0].norm.scale[...] == 7).all()


def test_override_and_bias_prob():
    inner = Inner(None, nnx.Rngs(0))
    rule = const(1.0, override=[dict(type="Constant", val=2.0, bias=3.0, name="other")], bias_prob=0.01)
    apply_init_cfg(inner, rule, nnx.Rngs(0))
    assert (inner.fc.kernel[...] == 1).all()
    assert_close(inner.fc.bias[...], np.full(3, -np.log(99)))
    assert (inner.other.kernel[...] == 2).all() and (inner.other.bias[...] == 3).all()
    apply_init_cfg(inner, dict(type="Constant", val=5.0, override=dict(name="norm")), nnx.Rngs(0))
    assert (inner.norm.scale[...] == 5).all()
    assert (inner.fc.kernel[...] == 1).all(), "without 'layer', a rule is for its overrides alone"


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (dict(type="Kaimin", layer="Linear"), "Did you mean 'Kaiming'"),
        (dict(type="Kaiming", layer="Linear", distribtion="uniform"), "Did you mean 'distribution'"),
        (dict(type="Kaiming", layer="Linear", nonlinearity="rellu"), "Did you mean 'relu'"),
        (dict(type="Xavier", layer="Linear", distribution="gauss"), "'normal' or 'uniform'"),
        (dict(type="Kaiming", layer="Linear", mode="fan"), "'fan_in' or 'fan_out'"),
        (dict(type="Constant", layer="Linear"), "needs val"),
        (dict(type="Constant", val=1, override=dict(name="fd")), "names no part of Inner: 'fd'"),
    ],
)
def test_wrong_rules_are_named(rule, message):
    with pytest.raises(ConfigError, match=message):
        apply_init_cfg(Inner(None, nnx.Rngs(0)), rule, nnx.Rngs(0))


# --- freezing and norms from configs -----------------------------------------------------------------------------------


def test_freeze_hides_weights_from_the_optimizer_and_keeps_sharing():
    net = Outer(None)
    net.tokens = nnx.List([nnx.Param(jnp.ones(2))])
    net.tied = net.parts[0].fc
    net.parts[0].other.kernel = net.parts[0].fc.kernel
    before = nnx.to_pure_dict(nnx.state(net))
    trained = len(nnx.state(net.plain, nnx.Param).flat_state())
    freeze(net.parts)
    freeze(net.named)
    freeze(net.tokens)
    assert len(nnx.state(net, nnx.Param).flat_state()) == trained == 2
    assert isinstance(net.tokens[0], Frozen)
    assert net.tied is net.parts[0].fc
    assert net.parts[0].other.kernel is net.parts[0].fc.kernel
    assert isinstance(net.parts[0].norm.mean, nnx.BatchStat)
    after = nnx.to_pure_dict(nnx.state(net))
    assert jax.tree.all(jax.tree.map(np.array_equal, before, after))
    Outer.init_weights(net, nnx.Rngs(0))  # frozen weights are initialised like others


def test_build_norm_reads_norm_cfg():
    rngs = nnx.Rngs(0)
    norm = build_norm(dict(type="BN", eps=1e-3, momentum=0.01, groups=4), 3, norm_eval=True, rngs=rngs)
    assert (norm.eps, norm.momentum, norm.groups, norm.norm_eval) == (1e-3, 0.01, 4, True)
    assert build_norm(dict(type="SyncBN", requires_grad=True), 3, rngs=rngs).groups == 1
    assert isinstance(build_norm(dict(type="LN", eps=1e-6), 3, rngs=rngs), LayerNorm)
    frozen = build_norm(dict(type="BN", requires_grad=False), 3, rngs=rngs)
    assert isinstance(frozen.scale, Frozen) and isinstance(frozen.bias, Frozen)
    assert nnx.state(build_norm(dict(type="BN", affine=False), 3, rngs=rngs), nnx.Param) == nnx.State({})


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (dict(type="BNN"), "Did you mean 'BN'"),
        (dict(eps=1e-3), "unknown type None"),
        (dict(type="BN", group=8), "Did you mean 'groups'"),
        (dict(type="SyncBN", groups=8), "type 'BN' with groups"),
        (dict(type="BN", groups=0), "1 or more"),
    ],
)
def test_wrong_norm_cfg_is_named(cfg, message):
    with pytest.raises(ConfigError, match=message):
        build_norm(cfg, 3, rngs=nnx.Rngs(0))
