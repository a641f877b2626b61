"""Vision GNN: the reference's numbers in float64, and its graph."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxpretrain.build import ConfigError, build
from jaxpretrain.interop import mmpretrain as hub
from jaxpretrain.models import vig
from tests.parity import (
    assert_logits,
    assert_summary,
    build_by_reference,
    load_golden,
    one_pass,
    reference_input,
)
from tests.test_resnet import random


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vig-tiny_3rdparty_in1k", "pvig-tiny_3rdparty_in1k"])
def test_golden(name):
    """In float64: in float32, the last digits decide which nodes are the nearest."""
    golden = load_golden(name)
    model = build_by_reference(golden["model_cfg"], golden["manifest"])
    assert hub.num_parameters(model) == golden["n_params"]
    assert len(hub.names(model)) == golden["n_keys"]
    tables = {row[0]: row for row in golden["manifest"] if row[0].endswith("relative_pos")}
    for path, module in nnx.iter_modules(model):
        if isinstance(module, vig.Grapher) and module.grid is not None:
            table = vig.relative_positions(module.channels, module.grid, module.r)
            mean, std, first = tables[".".join(map(str, path)) + ".relative_pos"][4]
            np.testing.assert_allclose(
                [table.mean(), table.std(), *table.reshape(-1)[:4]], [mean, std, *first], atol=2e-6
            )
            module.relative_pos.set_value(table)
    model.eval()
    with jax.enable_x64(True):
        graphdef, state = nnx.split(model)
        state = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64 if x.dtype == jnp.float32 else x.dtype), state)

        @jax.jit
        def run(state, x):
            model = one_pass(nnx.merge(graphdef, state))
            return model.extract_feat(x, "backbone"), model(x)

        feats, logits = run(state, jnp.asarray(reference_input(golden["input_shape"]), jnp.float64))
        assert_summary(feats[-1], golden["features"][0])
        assert_logits(logits, golden["logits"])


def test_nearest_nodes_by_hand():
    rng = np.random.default_rng(0)
    x, y, table = rng.standard_normal((2, 5, 3)), rng.standard_normal((2, 7, 3)), rng.standard_normal((1, 5, 7))
    unit = [a / np.linalg.norm(a, axis=-1, keepdims=True) for a in (x, y)]
    distance = np.square(unit[0][:, :, None] - unit[1][:, None]).sum(-1)
    np.testing.assert_array_equal(vig.nearest_nodes(x, y, 3), distance.argsort(-1)[..., :3])
    np.testing.assert_array_equal(vig.nearest_nodes(x, y, 7, table), (distance + table).argsort(-1))
    near = vig.gather_nodes(jnp.asarray(y), jnp.asarray([[[6, 0]] * 5] * 2))
    np.testing.assert_allclose(near[:, 2, 0], y[:, 6], rtol=1e-6)
    with pytest.raises(ValueError, match="a map of 7 nodes has no 8 neighbours"):
        vig.nearest_nodes(x, y, 8)


def test_relative_positions_are_nearest_at_the_place_itself():
    table = vig.relative_positions(16, (4, 4))[0]
    np.testing.assert_array_equal(table.argmin(axis=1), np.arange(16))
    np.testing.assert_allclose(table, table.T, atol=1e-6)
    assert vig.relative_positions(16, (8, 8), 2).shape == (1, 64, 16)


@pytest.mark.parametrize("kind", ["mr", "edge", "sage", "gin"])
def test_graph_convolutions_by_hand(kind):
    """Against loops over nodes and neighbours, with a linear map alone."""
    conv = vig._CONVS[kind](4, 8, act_cfg=None, norm_cfg=None, bias=True, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    x, near = (jnp.asarray(rng.standard_normal((1, 2, k, 4)), jnp.float32) for k in (1, 3))

    def linear(layers, values):
        return np.asarray(layers[0](jnp.asarray(values, jnp.float32)[None, None, None])[0, 0, 0])

    for n in range(2):
        node, others = np.asarray(x[0, n, 0]), np.asarray(near[0, n])
        if kind == "mr":
            wanted = linear(conv.nn, np.stack([node, (others - node).max(axis=0)], axis=-1).reshape(-1))
        elif kind == "edge":
            wanted = np.max([linear(conv.nn, np.concatenate([node, other - node])) for other in others], axis=0)
        elif kind == "sage":
            most = np.max([linear(conv.nn1, other) for other in others], axis=0)
            wanted = linear(conv.nn2, np.concatenate([node, most]))
        else:
            wanted = linear(conv.nn, node + others.sum(axis=0))
        np.testing.assert_allclose(conv(x, near)[0, n, 0], wanted, rtol=1e-5, atol=1e-6)


def test_dilation_and_stochastic_neighbours():
    graph = vig.DyGraphConv2d(4, 8, 3, 2, "mr", True, 1.0, 1, act_cfg=None, norm_cfg=None, bias=True, rngs=nnx.Rngs(0))
    drawn = {tuple(np.asarray(graph._order(nnx.Rngs(seed)))) for seed in range(5)}
    assert len(drawn) > 1 and all(len(set(order)) == 3 and max(order) < 6 for order in drawn)
    with pytest.raises(ValueError, match="a call needs `rngs`"):
        graph._order(None)
    graph.eval()
    np.testing.assert_array_equal(graph._order(None), [0, 2, 4])


@pytest.mark.parametrize("kind", ["edge", "sage", "gin"])
def test_other_graph_convolutions_learn(kind):
    model = random(dict(type="Vig", arch=dict(num_blocks=1, channels=8), k=2, graph_conv_type=kind))
    model.eval()
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    x = np.random.default_rng(0).standard_normal((2, 32, 32, 3)).astype(np.float32)
    grads = jax.jit(jax.grad(lambda p: jnp.square(nnx.merge(graphdef, p, rest)(x)[-1]).sum()))(params)
    assert all(np.isfinite(g).all() and np.abs(g).max() > 0 for g in jax.tree.leaves(grads))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dict(type="Vig", arch="tinny"), "Did you mean 'tiny'"),
        (dict(type="Vig", arch="tiny", graph_conv_type="max"), "no 'max'"),
        (dict(type="PyramidVig", arch="tiny", frozen_stages=5), "frozen_stages is 0"),
        (dict(type="PyramidVig", arch=dict(blocks=[1], channels=[8, 8])), "one for each of 1 to 4 stages"),
    ],
)
def test_errors(config, message):
    with pytest.raises(ConfigError, match=message):
        build(config, rngs=nnx.Rngs(0))
