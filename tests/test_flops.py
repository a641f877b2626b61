"""Counted arithmetic against what paper and pencil give."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.extend.core import Primitive
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxpretrain.flops import count_flops, peak_flops
from jaxpretrain.models.vision_transformer import VisionTransformer


def array(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def test_matrix_products() -> None:
    assert count_flops(jnp.matmul, array(3, 5), array(5, 7)) == 2 * 3 * 5 * 7
    assert count_flops(jnp.matmul, array(4, 3, 5), array(4, 5, 7)) == 2 * 4 * 3 * 5 * 7
    attention = lambda q, k: jnp.einsum("bthc,bshc->bhts", q, k)  # noqa: E731
    assert count_flops(attention, array(2, 6, 3, 8), array(2, 9, 3, 8)) == 2 * 2 * 3 * 6 * 9 * 8
    assert count_flops(lambda x: jnp.sin(x) + x.sum(), array(100)) == 0


@pytest.mark.parametrize(("stride", "groups"), [(1, 1), (2, 1), (2, 2), (1, 8)])
def test_convolutions(stride: int, groups: int) -> None:
    def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
        numbers = ("NHWC", "HWIO", "NHWC")
        strides, padding = (stride, stride), ((1, 1), (1, 1))
        return jax.lax.conv_general_dilated(
            x, kernel, strides, padding, dimension_numbers=numbers, feature_group_count=groups
        )

    x, kernel = array(2, 16, 16, 8), array(3, 3, 8 // groups, 24)
    forward = 2 * (2 * (16 // stride) ** 2 * 24) * (3 * 3 * 8 // groups)
    assert count_flops(convolve, x, kernel) == forward
    # Each gradient takes as many multiplications as the forward pass, which the jaxpr holds too.
    loss = lambda x, kernel: convolve(x, kernel).sum()  # noqa: E731
    assert count_flops(jax.grad(loss, 0), x, kernel) == 2 * forward
    assert count_flops(jax.grad(loss, 1), x, kernel) == 2 * forward
    assert count_flops(jax.grad(loss, (0, 1)), x, kernel) == 3 * forward


def test_control_flow() -> None:
    product = 2 * 8**3
    x = array(8, 8)
    assert count_flops(lambda x: jax.lax.scan(lambda c, _: (c @ c, None), x, length=5)[0], x) == 5 * product
    assert count_flops(lambda x: jax.lax.fori_loop(0, 7, lambda _, c: c @ c, x), x) == 7 * product
    dear, cheap = (lambda x: x @ x @ x), (lambda x: x @ x)
    assert count_flops(lambda x: jax.lax.cond(x[0, 0] > 0, cheap, dear, x), x) == 2 * product
    assert count_flops(lambda x: jax.lax.while_loop(lambda c: c[0, 0] > 0, cheap, x), x) == product
    assert count_flops(jax.jit(lambda x: jax.jit(cheap)(x) @ x), x) == 2 * product
    assert count_flops(jax.vmap(cheap), array(3, 8, 8)) == 3 * product
    # Forward and two gradient products for each of two; what remat computes again counts again.
    loss = lambda x: jnp.sum(jnp.sin(dear(x)))  # noqa: E731
    assert count_flops(jax.grad(loss), x) == 6 * product
    assert count_flops(jax.grad(jax.checkpoint(loss)), x) == 8 * product


def test_custom_derivatives() -> None:
    @jax.custom_vjp
    def square(x: jax.Array) -> jax.Array:
        return x @ x

    square.defvjp(lambda x: (x @ x, x), lambda x, g: (g @ x.T + x.T @ g,))
    assert count_flops(square, array(8, 8)) == 2 * 8**3
    assert count_flops(jax.grad(lambda x: square(x).sum()), array(8, 8)) == 3 * 2 * 8**3


def test_shard_map_counts_all_devices() -> None:
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    rows = lambda x: x @ x.T  # noqa: E731
    mapped = jax.shard_map(rows, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    assert count_flops(mapped, array(8, 16)) == 4 * (2 * 2 * 16 * 2)


@pytest.mark.parametrize(("layout", "shape"), [(0, (2, 6, 3, 8)), (1, (2, 3, 6, 8))])
def test_fused_attention(layout: int, shape: tuple[int, ...]) -> None:
    """cuDNN's primitive, which CPUs lack: two products forward, four backward."""

    def count(name: str) -> int:
        primitive = Primitive(name)
        primitive.def_abstract_eval(lambda q, k, v, **_: q)
        return count_flops(lambda q: primitive.bind(q, q, q, layout=layout), array(*shape))

    product = 2 * 2 * 3 * 6 * 6 * 8
    assert count("dot_product_attention_fwd_wrapper") == 2 * product
    assert count("dot_product_attention_bwd_wrapper") == 4 * product


def test_vision_transformer() -> None:
    """ViT-B/16 at 224: the well-known 17.6 G multiply-adds."""
    model = nnx.eval_shape(lambda: VisionTransformer(arch="base", rngs=nnx.Rngs(0)))
    model.eval()
    graphdef, state = nnx.split(model)
    counted = count_flops(lambda state, x: nnx.merge(graphdef, state)(x), state, array(1, 224, 224, 3))
    tokens, width, layers = 197, 768, 12
    block = tokens * width * (3 + 1 + 4 + 4) * width + 2 * tokens**2 * width
    assert counted == 2 * (196 * 768 * width + layers * block)
    assert counted / 2 == pytest.approx(17.6e9, rel=0.01)


def test_peak_flops() -> None:
    for kind, peak in {
        "NVIDIA A100-SXM4-80GB": 312e12,
        "NVIDIA H100 80GB HBM3": 989e12,
        "NVIDIA H100 PCIe": 756e12,
        "NVIDIA H200": 989e12,
        "Tesla V100-SXM2-16GB": 125e12,
        "NVIDIA L4": 121e12,
        "NVIDIA L40S": 362e12,
        "NVIDIA L40": 181e12,
        "NVIDIA A10G": 70e12,
        "NVIDIA A40": 150e12,
        "NVIDIA GeForce RTX 4090": 165e12,
        "TPU v4": 275e12,
        "TPU v5 lite": 197e12,
        "TPU v5e": 197e12,
        "TPU v5p": 459e12,
        "TPU v5": 459e12,
        "TPU v6 lite": 918e12,
        "TPU v6e": 918e12,
        "cpu": None,
        "NVIDIA GeForce GTX 1080": None,
    }.items():
        assert peak_flops(kind) == peak, kind
