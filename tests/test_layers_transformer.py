"""The building blocks of transformers: attention, feed-forward, patches, positions, stacks."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxpretrain.build import ConfigError
from jaxpretrain.models.layers import (
    FFN,
    Dropout,
    MultiheadAttention,
    PatchEmbed,
    SwiGLUFFNFused,
    apply_layers,
    build_2d_sincos_position_embedding,
    capture,
    freeze,
    resize_pos_embed,
)
from jaxpretrain.models.layers.attention import scaled_dot_product_attention
from jaxpretrain.models.layers.drop import drop_path
from jaxpretrain.models.layers.linear import Linear
from jaxpretrain.models.vision_transformer import TransformerEncoderLayer


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# Programs that run once on tiny arrays: most of their time would be spent on optimising them.
quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def filled(make: Callable[[], Any]) -> Any:
    """A module with random weights that depend on their names alone, by NumPy: JAX would compile a program per shape."""
    module = nnx.eval_shape(make)
    weights = []
    for path, variable in nnx.state(module).flat_state():
        value = np.random.default_rng(zlib.crc32(str(path).encode())).standard_normal(variable.shape)
        if path[-1] == "kernel":
            value = value / math.sqrt(math.prod(value.shape[:-1]))
        elif path[-1] == "scale":
            value = 1 + 0.1 * value
        else:
            value = 0.1 * value
        variable.set_value(jnp.asarray(value, jnp.float32))
        weights.append((path, variable))
    nnx.update(module, nnx.State.from_flat_path(dict(weights)))
    return module


# Attention


def attention_by_hand(layer: MultiheadAttention, x: np.ndarray) -> np.ndarray:
    b, n, c = x.shape
    h = layer.num_heads
    qkv = x.astype(np.float64) @ np.asarray(layer.qkv.kernel[...], np.float64)
    if layer.qkv.bias is not None:
        qkv = qkv + np.asarray(layer.qkv.bias[...])
    q, k, v = (qkv[..., i * c : (i + 1) * c].reshape(b, n, h, c // h).transpose(0, 2, 1, 3) for i in range(3))
    logits = q @ k.transpose(0, 1, 3, 2) / math.sqrt(c // h)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    y = (weights / weights.sum(-1, keepdims=True)) @ v
    y = y.transpose(0, 2, 1, 3).reshape(b, n, c)
    return y @ np.asarray(layer.proj.kernel[...], np.float64) + np.asarray(layer.proj.bias[...])


@pytest.mark.parametrize("qkv_bias", [True, False])
def test_attention_is_the_formula(qkv_bias):
    layer = filled(lambda: MultiheadAttention(24, 3, qkv_bias=qkv_bias, rngs=nnx.Rngs(0)))
    x = normal(1, 2, 7, 24) * 3
    wanted = attention_by_hand(layer, x)
    scale = np.abs(wanted).max()
    np.testing.assert_allclose(layer(jnp.asarray(x)) / scale, wanted / scale, atol=2e-6)


def test_attention_keeps_float64():
    layer = filled(lambda: MultiheadAttention(24, 3, rngs=nnx.Rngs(0)))
    x = normal(1, 2, 7, 24).astype(np.float64) * 3
    with jax.enable_x64(True):
        y = layer(jnp.asarray(x))
    assert y.dtype == np.float64
    np.testing.assert_allclose(y, attention_by_hand(layer, x), atol=1e-13)


@pytest.mark.parametrize("shape", [(3, 7, 5), (2, 3, 7, 5), (2, 1, 7, 5), (1, 3, 1, 5)])
def test_attention_with_a_bias_is_the_formula(shape):
    q, k, v = (normal(i, 2, n, 3, 4) for i, n in enumerate((7, 5, 5)))
    bias = 2 * normal(3, *shape)
    logits = 0.7 * np.einsum("bqhd,bkhd->bhqk", q, k) + bias
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights = weights / weights.sum(-1, keepdims=True)
    wanted = np.einsum("bhqk,bkhd->bqhd", weights, v)
    module = Dropout(0.0)  # any module: the one whose weights these are
    y = scaled_dot_product_attention(module, q := jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), scale=0.7, bias=bias)
    np.testing.assert_allclose(y, wanted, atol=1e-5)
    with capture(module) as found:
        again = scaled_dot_product_attention(
            module, q, jnp.asarray(k), jnp.asarray(v), scale=0.7, bias=jnp.asarray(bias)
        )
    np.testing.assert_allclose(again, wanted, atol=1e-5)
    np.testing.assert_allclose(found["weights"], weights, atol=1e-5)
    half = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)]
    assert scaled_dot_product_attention(module, *half, scale=0.7, bias=jnp.asarray(bias)).dtype == jnp.bfloat16


def test_attention_dropout_is_on_the_weights():
    layer = filled(lambda: MultiheadAttention(8, 2, attn_drop=0.5, rngs=nnx.Rngs(0)))
    x = jnp.asarray(normal(1, 1, 5, 8))
    with pytest.raises(ValueError, match="rngs"):
        layer(x)
    draw = quick_jit(jax.vmap(lambda key: layer(x, rngs=nnx.Rngs(dropout=key))))
    draws = draw(jax.random.split(jax.random.key(0), 4000))
    assert float(draws.std(axis=0).min()) > 1e-3
    layer.eval()
    np.testing.assert_allclose(draws.mean(axis=0), layer(x), atol=0.05)


def test_attention_scale_and_errors():
    layer = filled(lambda: MultiheadAttention(8, 2, qk_scale=0.0, rngs=nnx.Rngs(0)))
    x = jnp.asarray(normal(1, 1, 5, 8))
    y = layer(x)  # with logits of zero every token gets the mean of all values
    np.testing.assert_allclose(y, jnp.broadcast_to(y[:, :1], y.shape), atol=1e-6)
    with pytest.raises(ConfigError, match="embed_dims=10 is not a multiple of num_heads=4"):
        MultiheadAttention(10, 4, rngs=nnx.Rngs(0))


# Feed-forward


def linear(layer: Any, x: np.ndarray) -> np.ndarray:
    return x @ np.asarray(layer.kernel[...]) + np.asarray(layer.bias[...])


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("GELU", lambda x: 0.5 * x * (1 + math.erf(x / math.sqrt(2)))),
        ("mmpretrain.QuickGELU", lambda x: x / (1 + math.exp(-1.702 * x))),
        ("ReLU", lambda x: max(x, 0.0)),
        ("SiLU", lambda x: x / (1 + math.exp(-x))),
    ],
)
def test_ffn_is_the_formula(name, function):
    layer = filled(lambda: FFN(6, 10, act_cfg=dict(type=name), rngs=nnx.Rngs(0)))
    x = normal(0, 2, 3, 6) * 3
    hidden = np.vectorize(function)(linear(layer.fc1, x))
    np.testing.assert_allclose(layer(jnp.asarray(x)), linear(layer.fc2, hidden), atol=2e-6)


def test_ffn_layer_scale_dropout_and_unknown_activation():
    x = jnp.asarray(normal(0, 2, 3, 6))
    plain, scaled = FFN(6, 10, rngs=nnx.Rngs(0)), FFN(6, 10, layer_scale_init_value=0.1, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(scaled(x), 0.1 * plain(x), rtol=1e-5)
    dropped = FFN(6, 10, ffn_drop=0.9, rngs=nnx.Rngs(0))(x, rngs=nnx.Rngs(0))
    assert (np.asarray(dropped) == 0).mean() > 0.5
    with pytest.raises(ConfigError, match="Did you mean 'GELU'"):
        FFN(6, 10, act_cfg=dict(type="GELUU"), rngs=nnx.Rngs(0))


def test_swiglu_is_the_formula():
    layer = filled(lambda: SwiGLUFFNFused(6, 18, rngs=nnx.Rngs(0)))
    x = normal(0, 2, 3, 6)
    gate, value = np.split(linear(layer.w12, x), 2, axis=-1)
    assert gate.shape[-1] == 16  # 2/3 of 18 is 12, rounded up to a multiple of 8
    np.testing.assert_allclose(layer(jnp.asarray(x)), linear(layer.w3, gate / (1 + np.exp(-gate)) * value), atol=2e-6)


# Patches


def test_patch_embed_is_its_convolution():
    layer = filled(lambda: PatchEmbed(3, 8, (4, 2), rngs=nnx.Rngs(0)))
    x = jnp.asarray(normal(0, 2, 12, 10, 3))
    tokens, grid = layer(x)
    assert grid == (3, 5)
    np.testing.assert_allclose(tokens, layer.projection(x).reshape(2, 15, 8), atol=1e-5)


def test_patch_embed_fills_incomplete_patches_with_zeros():
    layer = filled(lambda: PatchEmbed(3, 8, 4, input_size=(9, 14), rngs=nnx.Rngs(0)))
    x = jnp.asarray(normal(0, 2, 9, 14, 3))
    padded = jnp.pad(x, ((0, 0), (0, 3), (0, 2), (0, 0)))
    tokens, grid = layer(x)
    assert grid == layer.init_out_size == (3, 4)
    np.testing.assert_array_equal(tokens, layer(padded)[0])


def test_patch_embed_errors():
    layer = PatchEmbed(3, 8, 4, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"expected images \[batch, height, width, 3\]"):
        layer(jnp.zeros((2, 3, 16, 16)))
    with pytest.raises(ConfigError, match="stride=2 must be kernel_size=4"):
        PatchEmbed(3, 8, 4, stride=2, rngs=nnx.Rngs(0))


# Positions


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
@pytest.mark.parametrize(
    ("source", "target"), [((14, 14), (24, 24)), ((7, 5), (3, 9)), ((14, 14), (13, 5)), ((2, 2), (5, 1))]
)
def test_resized_positions_are_pytorchs(mode, source, target):
    torch = pytest.importorskip("torch")
    table = normal(0, 1, 2 + source[0] * source[1], 6)
    image = torch.from_numpy(table[:, 2:].reshape(1, *source, 6)).permute(0, 3, 1, 2)
    wanted = torch.nn.functional.interpolate(image, size=target, mode=mode, align_corners=False)
    ours = resize_pos_embed(jnp.asarray(table), source, target, mode, num_extra_tokens=2)
    np.testing.assert_array_equal(ours[:, :2], table[:, :2])
    # 1e-5 of the largest magnitude: PyTorch computes the sampling points in float32
    scale = wanted.abs().max().item()
    np.testing.assert_allclose(ours[:, 2:] / scale, wanted.permute(0, 2, 3, 1).reshape(1, -1, 6) / scale, atol=1e-5)


def test_resized_positions_without_pytorch():
    """Twice as many samples of an impulse: the cubic kernel with a = -0.75 at 0.25, 0.75, 1.25 and 1.75 pixels."""
    impulse = jnp.zeros((1, 8, 1)).at[0, 4, 0].set(1.0)
    ours = resize_pos_embed(impulse, (1, 8), (1, 16), num_extra_tokens=0)[0, :, 0]
    half = [0.0, -0.03515625, -0.10546875, 0.26171875, 0.87890625]
    np.testing.assert_allclose(ours[4:14], half + half[::-1], atol=1e-7)
    assert resize_pos_embed(impulse, (1, 8), (1, 8), num_extra_tokens=0) is impulse


def test_resized_positions_errors():
    table = jnp.zeros((1, 17, 4))
    with pytest.raises(ConfigError, match="Did you mean 'bicubic'"):
        resize_pos_embed(table, (4, 4), (5, 5), mode="bicubik")
    with pytest.raises(ValueError, match="17 tokens are not 4x4 patches and 0 extra"):
        resize_pos_embed(table, (4, 4), (5, 5), num_extra_tokens=0)


@pytest.mark.parametrize("grid", [(4, 4), (3, 5)])
def test_sincos_positions_are_the_formula(grid):
    table = np.asarray(build_2d_sincos_position_embedding(grid, 24, cls_token=True))
    assert table.shape == (1, 1 + grid[0] * grid[1], 24) and table.dtype == np.float32
    assert not table[0, 0].any()
    for row in range(grid[0]):
        for column in range(grid[1]):
            token = table[0, 1 + row * grid[1] + column].reshape(4, 6)
            for i in range(6):
                f = 10000 ** (-i / 6)
                wanted = [math.sin(row * f), math.cos(row * f), math.sin(column * f), math.cos(column * f)]
                np.testing.assert_allclose(token[:, i], wanted, atol=1e-6)


def test_sincos_positions_arguments():
    np.testing.assert_array_equal(
        build_2d_sincos_position_embedding(4, 8), build_2d_sincos_position_embedding((4, 4), 8)
    )
    with pytest.raises(ConfigError, match="multiples of 4"):
        build_2d_sincos_position_embedding(4, 10)


# Stacks


class Branch(nnx.Module):
    """As little as a block of a stack can be, with every kind of draw."""

    def __init__(self, drop: float, drop_path_rate: float, *, rngs: nnx.Rngs):
        self.fc1, self.fc2 = Linear(8, 12, rngs=rngs), Linear(12, 8, rngs=rngs)
        self.drop, self.drop_path_rate, self.deterministic = Dropout(drop), drop_path_rate, False

    def __call__(self, x, *, rngs=None, drop_path_rate=None):
        rate = self.drop_path_rate if drop_path_rate is None else drop_path_rate
        y = self.fc2(self.drop(jnp.tanh(self.fc1(x)), rngs=rngs))
        return x + drop_path(y, 0.0 if self.deterministic else rate, rngs)


FORMS = [(scan, remat) for scan in (False, True) for remat in ("none", "full", "dots")]


def blocks(num_layers: int = 4, drop: float = 0.0) -> nnx.List:
    def block() -> TransformerEncoderLayer:
        return TransformerEncoderLayer(8, 2, 12, drop_rate=drop, attn_drop_rate=drop, rngs=nnx.Rngs(0))

    return filled(lambda: nnx.List([block() for _ in range(num_layers)]))


def branches(num_layers: int, drop: float = 0.0, drop_path_rate: float = 0.0) -> nnx.List:
    rates = np.linspace(0, drop_path_rate, num_layers).tolist()
    return filled(lambda: nnx.List([Branch(drop, rate, rngs=nnx.Rngs(0)) for rate in rates]))


def value_and_grads(layers: nnx.List, x: jax.Array, scan: bool, remat: str, out_indices=()) -> Any:
    graphdef, params, rest = nnx.split(layers, nnx.Param, ...)

    @quick_jit
    @jax.value_and_grad
    def loss(params):
        y, outs = apply_layers(
            nnx.merge(graphdef, params, rest),
            x,
            rngs=nnx.Rngs(dropout=jax.random.key(7)),
            scan_layers=scan,
            remat=remat,
            out_indices=out_indices,
        )
        return (y**2).mean() + sum(i * (out**2).mean() for i, out in outs.items())

    return loss(nnx.to_pure_dict(params))


def assert_same(actual: Any, wanted: Any) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(wanted)
    scale = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(wanted))
    for a, w in zip(jax.tree.leaves(actual), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a / scale, w / scale, atol=2e-6)


def test_all_forms_agree_in_value_gradient_and_draws():
    layers, x = branches(3, drop=0.2, drop_path_rate=0.5), jnp.asarray(normal(0, 3, 5, 8))
    wanted = value_and_grads(layers, x, False, "none", (0, 2))
    assert all(float(np.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(wanted[1]))
    for scan, remat in FORMS[1:]:
        assert_same(value_and_grads(layers, x, scan, remat, (0, 2)), wanted)


@pytest.mark.parametrize(("scan", "remat"), FORMS)
def test_each_layer_draws_from_a_key_of_its_own(scan, remat):
    class Noise(nnx.Module):
        drop_path_rate = 0.0

        def __init__(self):
            self.scale = nnx.Param(jnp.ones(()))

        def __call__(self, x, *, rngs=None, drop_path_rate=None):
            return x + self.scale[...] * jax.random.normal(rngs.dropout(), x.shape)

    def outputs(seed: int) -> np.ndarray:
        layers = [Noise() for _ in range(4)]
        _, outs = apply_layers(
            layers, jnp.zeros((2, 3)), rngs=nnx.Rngs(seed), scan_layers=scan, remat=remat, out_indices=(0, 1, 2, 3)
        )
        return np.diff(np.stack([np.zeros((2, 3)), *outs.values()]), axis=0)

    noise = outputs(0)
    assert min(np.abs(noise[i] - noise[j]).max() for i in range(4) for j in range(i)) > 0.1
    np.testing.assert_array_equal(noise, outputs(0))
    assert np.abs(noise - outputs(1)).max() > 0.1


@pytest.mark.parametrize("scan", [False, True])
def test_each_layer_has_its_own_drop_path_rate(scan):
    layers = blocks(3)
    for layer, rate in zip(layers, (1e-9, 1.0 - 1e-6, 1e-9), strict=True):
        layer.drop_path_rate = rate
    _, outs = apply_layers(
        layers, jnp.asarray(normal(0, 3, 5, 8)), rngs=nnx.Rngs(0), scan_layers=scan, out_indices=(0, 1, 2)
    )
    np.testing.assert_allclose(outs[1], outs[0], rtol=1e-6)  # the middle layer is always dropped, the last never
    assert float(jnp.abs(outs[2] - outs[1]).max()) > 0.01


def test_scan_shrinks_the_program_and_splits_at_outputs_and_frozen_layers():
    layers, x = blocks(6), jnp.zeros((1, 5, 8))

    def scans(out_indices=(), scan=True) -> int:
        program = jax.make_jaxpr(lambda x: apply_layers(layers, x, scan_layers=scan, out_indices=out_indices)[0])(x)
        return str(program).count("scan[")

    assert scans(scan=False) == 0
    assert scans() == 1
    assert scans((5,)) == 1
    assert scans((2, 5)) == 2
    freeze(layers[0])
    freeze(layers[1])
    assert scans() == 2


def test_frozen_layers_pass_through_every_form():
    layers, x = branches(4), jnp.asarray(normal(0, 3, 5, 8))
    freeze(layers[0])
    freeze(layers[1])
    wanted = value_and_grads(layers, x, False, "none")
    assert set(wanted[1]) == {2, 3}
    for scan, remat in ((False, "dots"), (True, "none")):
        assert_same(value_and_grads(layers, x, scan, remat), wanted)


@pytest.mark.parametrize("scan", [False, True])
def test_remat_recomputes_what_its_policy_says(scan):
    layers, x = blocks(3), jnp.zeros((2, 5, 8))
    graphdef, params = nnx.split(layers)

    def matmuls(remat: str) -> int:
        def loss(params):
            return apply_layers(nnx.merge(graphdef, params), x, scan_layers=scan, remat=remat)[0].sum()

        return str(jax.make_jaxpr(jax.grad(loss))(params)).count("dot_general")

    assert matmuls("none") < matmuls("dots") < matmuls("full")


def test_stack_errors():
    layers, x = blocks(2, drop=0.1), jnp.zeros((1, 5, 8))
    with pytest.raises(ConfigError, match="Did you mean 'dots'"):
        apply_layers(layers, x, remat="dot")
    for scan, remat in FORMS:
        with pytest.raises(ValueError, match="in training mode a call needs `rngs`"):
            apply_layers(layers, x, scan_layers=scan, remat=remat)

    class Counting(TransformerEncoderLayer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.seen = nnx.BatchStat(jnp.zeros(()))

    counting = [Counting(8, 2, 12, rngs=nnx.Rngs(0)) for _ in range(2)]
    with pytest.raises(ConfigError, match="running statistics"):
        apply_layers(counting, x, scan_layers=True)
