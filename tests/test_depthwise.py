"""The depthwise convolution as a sum over taps, against XLA's own; activations, norms and convolutions by MMCV's names."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from jaxpretrain.build import ConfigError
from jaxpretrain.flops import count_flops
from jaxpretrain.models.layers import Conv2d, ConvModule
from jaxpretrain.models.layers.activation import ACTIVATIONS, activation
from jaxpretrain.models.layers.norm import GroupNorm, build_norm
from jaxpretrain.models.layers.se import SELayer


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(
    ("size", "stride", "padding", "dilation"),
    [
        ((3, 3), (1, 1), (1, 1), (1, 1)),
        ((3, 3), (2, 2), (1, 1), (1, 1)),
        ((5, 3), (2, 1), (0, 2), (1, 2)),
        ((7, 7), (1, 1), (9, 9), (3, 3)),
        ((2, 2), (2, 2), (0, 0), (1, 1)),
        ((9, 9), (1, 1), (4, 4), (1, 1)),  # a loop over rows
        ((1, 11), (1, 1), (0, 5), (1, 1)),
    ],
)
def test_depthwise_equals_its_definition(size, stride, padding, dilation):
    conv = Conv2d(6, 6, size, stride, padding, dilation, groups=6, bias=False, rngs=nnx.Rngs(0))
    graphdef = nnx.graphdef(conv)
    x, kernel = normal(2, 11, 12, 6), np.asarray(conv.kernel[...])

    def ours(x, kernel):
        return nnx.merge(graphdef, {"kernel": kernel})(x)

    def xla(x, kernel):
        pads, dims = [(p, p) for p in padding], ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(x, kernel, stride, pads, None, dilation, dims, feature_group_count=6)

    def value_and_grads(function):
        return jax.jit(lambda x, k: (function(x, k), jax.grad(lambda *a: (function(*a) ** 2).sum(), (0, 1))(x, k)))

    for a, b in zip(
        jax.tree.leaves(value_and_grads(ours)(x, kernel)), jax.tree.leaves(value_and_grads(xla)(x, kernel)), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())
    assert count_flops(ours, x, kernel) == count_flops(xla, x, kernel)
    half = jax.jit(ours)(x.astype(jnp.bfloat16), kernel)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        half.astype(np.float32), xla(x, kernel), atol=0.03 * float(jnp.abs(xla(x, kernel)).max())
    )


@pytest.mark.parametrize(
    ("size", "stride", "kernel"), [(7, 2, 3), (8, 2, 3), (8, 2, 5), (9, 3, 3), (5, 1, 3), (6, 2, 1)]
)
def test_same_padding(size, stride, kernel):
    """TensorFlow's, which XLA knows as SAME."""
    conv = ConvModule(3, 4, kernel, stride, conv_cfg=dict(type="Conv2dAdaptivePadding"), act_cfg=None, rngs=nnx.Rngs(0))
    x = normal(1, size, size, 3)
    wanted = lax.conv_general_dilated(
        x, conv.conv.kernel[...], (stride,) * 2, "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_allclose(conv(x), wanted + conv.conv.bias[...], atol=1e-5)


def test_conv_module_names_its_parts_as_mmcv():
    assert set(nnx.to_pure_dict(nnx.state(ConvModule(3, 4, 1, norm_cfg=dict(type="LN2d"), rngs=nnx.Rngs(0))))) == {
        "conv",
        "ln",
    }
    plain = ConvModule(3, 4, 1, rngs=nnx.Rngs(0))
    assert plain.conv.bias is not None
    with_norm = ConvModule(3, 4, 1, norm_cfg=dict(type="BN"), act_cfg=dict(type="ReLU6"), rngs=nnx.Rngs(0))
    assert with_norm.conv.bias is None
    assert float(with_norm(10 * normal(8, 4, 4, 3)).min()) >= 0 and float(with_norm(99 * normal(8, 4, 4, 3)).max()) <= 6
    with pytest.raises(ConfigError, match="no type 'DCN'"):
        ConvModule(3, 4, 1, conv_cfg=dict(type="DCN"), rngs=nnx.Rngs(0))


def test_activations_against_pytorch():
    torch = pytest.importorskip("torch")
    x = np.linspace(-5, 5, 101, dtype=np.float32)
    theirs = {
        "Hardswish": torch.nn.Hardswish(),
        "HSwish": torch.nn.Hardswish(),
        "HSigmoid": torch.nn.Hardsigmoid(),
        "QuickGELU": lambda x: x * torch.sigmoid(1.702 * x),
        "Swish": torch.nn.SiLU(),
    }
    for name in ACTIVATIONS:
        function = theirs.get(name) or getattr(torch.nn, name)()
        np.testing.assert_allclose(
            activation(dict(type=name))(x), function(torch.from_numpy(x)), atol=1e-6, err_msg=name
        )
    leaky = activation(dict(type="LeakyReLU", negative_slope=0.1, inplace=True))
    np.testing.assert_allclose(leaky(np.float32(-2.0)), -0.2)
    with pytest.raises(ConfigError, match="unknown type 'Gelu'"):
        activation(dict(type="Gelu"))


def test_group_norm_against_pytorch():
    torch = pytest.importorskip("torch")
    x = normal(2, 3, 4, 6)
    ours = build_norm(dict(type="GN", num_groups=2), 6, rngs=nnx.Rngs(0))
    assert isinstance(ours, GroupNorm)
    ours.scale.set_value(normal(6, seed=1))
    theirs = torch.nn.GroupNorm(2, 6)
    theirs.weight.data = torch.from_numpy(normal(6, seed=1))
    wanted = theirs(torch.from_numpy(x.transpose(0, 3, 1, 2))).detach().numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(ours(x), wanted, atol=1e-5)
    with pytest.raises(ConfigError, match="6 channels cannot be cut into 4"):
        build_norm(dict(type="GN", num_groups=4), 6, rngs=nnx.Rngs(0))


def test_squeeze_and_excitation_with_other_activations():
    x = normal(2, 3, 3, 16)
    acts = (dict(type="ReLU"), dict(type="HSigmoid", bias=1.0, divisor=2.0))
    layer = SELayer(16, ratio=4, act_cfg=acts, rngs=nnx.Rngs(0))
    factors = SELayer(16, ratio=4, act_cfg=acts, return_weight=True, rngs=nnx.Rngs(0))(x)
    np.testing.assert_allclose(layer(x), x * factors, rtol=1e-6)
    hidden = jnp.maximum(x.mean((1, 2)) @ layer.conv1.conv.kernel[0, 0] + layer.conv1.conv.bias[...], 0)
    wanted = jnp.clip((hidden @ layer.conv2.conv.kernel[0, 0] + layer.conv2.conv.bias[...] + 1) / 2, 0, 1)
    np.testing.assert_allclose(factors[:, 0, 0], wanted, atol=1e-6)
