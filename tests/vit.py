"""What the tests of all Vision Transformers share: golden data, and checks that every family must pass."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxpretrain.build import abstract as build_abstract
from jaxpretrain.build import build
from jaxpretrain.interop import mmpretrain
from tests.parity import (
    assert_logits,
    assert_summary,
    build_by_reference,
    fill_by_reference,
    load_golden,
    one_pass,
    reference_input,
)
from tests.test_layers_transformer import assert_same, filled, quick_jit

TINY = dict(embed_dims=24, num_layers=3, num_heads=3, feedforward_channels=32)
DERIVED = r"\.rope\.freqs_"
FORMS = [(True, "full"), (False, "dots")]  # besides unrolled without remat


def make(cfg: dict[str, Any]) -> Any:
    """The module of a configuration, with weights that depend on their names alone."""
    return filled(lambda: build(cfg, rngs=nnx.Rngs(0)))


def abstract(cfg: dict[str, Any]) -> Any:
    """The module of a configuration, without weights."""
    return build_abstract(cfg)


def images(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)


def run(model: Any, x: Any, jit: Any = quick_jit, **kwargs: Any) -> tuple[Any, ...]:
    """`model(x)`, compiled."""
    graphdef, state = nnx.split(model)
    return jit(lambda state, x: nnx.merge(graphdef, state)(x, **kwargs))(state, x)


def assert_outputs(outputs: Any, summaries: Any) -> None:
    """Compares a backbone's outputs, which may be pairs of tokens, with golden summaries."""
    for output, summary in zip(outputs, summaries, strict=True):
        if isinstance(summary, list):
            assert_outputs(output, summary)
        else:
            assert_summary(output, summary)


def assert_counts(model: Any, keys: int, params: int, trainable: int | None = None) -> None:
    """Compares the numbers of keys in the state dict, of parameters, and of those that learn."""
    assert len(mmpretrain.names(model)) + len(mmpretrain.derived(model)) == keys
    assert mmpretrain.num_parameters(model) == params
    if trainable is not None:
        learning = nnx.state(model, nnx.Param).flat_state()
        assert sum(int(np.prod(variable.shape)) for _, variable in learning) == trainable


def assert_golden(name: str, scan_layers: bool = False) -> None:
    """A model of MMPretrain's zoo against its golden file: keys, parameters, features and logits."""
    golden = load_golden(name)
    model = build_by_reference(golden["model_cfg"], [row for row in golden["manifest"] if "freqs_" not in row[0]])
    assert_counts(model, golden["n_keys"], golden["n_params"])
    model.eval()
    model.set_attributes(scan_layers=scan_layers, raise_if_not_found=False)
    graphdef, state = nnx.split(model)

    @jax.jit
    def forward(state: Any, x: Any) -> Any:
        model = one_pass(nnx.merge(graphdef, state))
        return model.extract_feat(x, stage="backbone"), model(x)

    features, logits = forward(state, reference_input(tuple(golden["input_shape"])))
    assert_outputs(features, golden["features"])
    if "logits" in golden:
        assert_logits(logits, golden["logits"])


def input_size_cases(*kinds: str) -> list[Any]:
    """Small networks that MMPretrain 1.2.0 (commit ee7f2e88) ran at several input sizes, as parameters of a test.

    Weights are by the rule of the other golden files, inputs by theirs too. 'deit3_paper' normalises by `ln2` and
    'eva02_release' has the tables of EVA-02's release, by replacing these in the reference.
    """
    cases = [case for case in load_golden("vit_input_sizes") if case["cfg"]["type"] in kinds]
    return [pytest.param(case, id=case["name"]) for case in cases]


def assert_input_sizes(case: dict[str, Any]) -> None:
    """One of `input_size_cases`: keys, parameters, and outputs at all sizes."""
    model = abstract(case["cfg"])
    names = set(mmpretrain.names(model)) | set(mmpretrain.derived(model))
    assert names == {key for key, *_ in case["manifest"]}
    assert mmpretrain.num_parameters(model) == case["n_params"]
    fill_by_reference(model, case["manifest"], skip=DERIVED)
    model.eval()
    for golden in case["runs"]:
        assert_outputs(run(model, reference_input(tuple(golden["input_shape"]))), golden["features"])


def zoo_rows(kind: str) -> list[Any]:
    """Backbones and heads of all models of MMPretrain's zoo with a backbone `kind`, as parameters of a test.

    `keys` leaves the three statistics of a `ClsBatchNormNeck` out.
    """
    rows = [row for row in load_golden("zoo_vision_transformers") if row["backbone"]["type"] == kind]
    return [pytest.param(row, id=row["names"][0]) for row in rows]


def assert_zoo_row(row: dict[str, Any]) -> None:
    """One of `zoo_rows`: it builds, with as many keys and parameters as there."""
    model = abstract(dict(type="ImageClassifier", backbone=row["backbone"], head=row["head"]))
    assert_counts(model, row["keys"], row["params"], row["trainable"])


def value_and_grads(model: Any, x: jax.Array, call: Any = lambda f, *args: quick_jit(f)(*args)) -> Any:
    """A scalar of all outputs in training mode, and its gradients."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    @jax.value_and_grad
    def loss(params: Any, x: jax.Array) -> Any:
        outputs = nnx.merge(graphdef, params, rest)(x, rngs=nnx.Rngs(dropout=jax.random.key(7)))
        return sum(jnp.sum(y**3) for y in jax.tree.leaves(outputs))

    return call(loss, nnx.to_pure_dict(params), x)


def assert_forms_agree(model: Any, x: jax.Array) -> None:
    """Stacked layers and rematerialised ones give the same values, gradients and draws."""
    wanted = value_and_grads(model, x)
    assert jnp.isfinite(wanted[0])
    for scan, remat in FORMS:
        model.set_attributes(scan_layers=scan, remat=remat, raise_if_not_found=False)
        assert_same(value_and_grads(model, x), wanted)
    model.set_attributes(scan_layers=False, remat="none", raise_if_not_found=False)


def assert_gradients(model: Any, x: jax.Array, without_gradient: tuple[str, ...] = ()) -> None:
    """Gradients in float64 against finite differences along a random direction; and every parameter has one.

    Args:
        model: a tiny network, in eval mode.
        x: images.
        without_gradient: names of modules whose parameters must have none.
    """
    with jax.enable_x64(True):
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)
        params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float64), nnx.to_pure_dict(params))
        rng = np.random.default_rng(1)
        direction = jax.tree.map(lambda p: jnp.asarray(rng.standard_normal(p.shape)), params)

        def loss(params: Any, step: Any) -> Any:
            moved = jax.tree.map(lambda p, d: p + step * d, params, direction)
            outputs = nnx.merge(graphdef, moved, rest)(jnp.asarray(x, jnp.float64))
            assert all(y.dtype == jnp.float64 for y in jax.tree.leaves(outputs))
            return sum(jnp.sum(jnp.sin(y)) for y in jax.tree.leaves(outputs))

        run = quick_jit(jax.value_and_grad(loss))
        _, grads = run(params, 0.0)
        slope = sum(jnp.vdot(g, d) for g, d in zip(*map(jax.tree.leaves, (grads, direction)), strict=True))
        step = 1e-6
        ahead, behind = (run(params, s)[0] for s in (step, -step))
        difference = (ahead - behind) / (2 * step)
        np.testing.assert_allclose(slope, difference, rtol=1e-6)
        for path, grad in jax.tree_util.tree_leaves_with_path(grads):
            name = jax.tree_util.keystr(path)
            assert bool(np.any(grad)) != any(part in name for part in without_gradient), name


def assert_modes(model: Any, x: jax.Array) -> None:
    """Training draws from its key, which it needs; evaluation draws nothing. `model` has random parts."""
    model.train()
    with pytest.raises(ValueError, match="rngs"):
        model(x)
    graphdef, state = nnx.split(model)
    draw = quick_jit(lambda state, key: jax.tree.leaves(nnx.merge(graphdef, state)(x, rngs=nnx.Rngs(key)))[0])
    a, b, c = (draw(state, jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(a, b)
    assert float(jnp.abs(a - c).max()) > 1e-3
    model.eval()
    graphdef, state = nnx.split(model)
    # In one program, which XLA makes half of, if they are the same.
    both = quick_jit(lambda state, x: [nnx.merge(graphdef, state)(x, rngs=rngs) for rngs in (None, nnx.Rngs(0))])
    plain, keyed = (jax.tree.leaves(outputs)[0] for outputs in both(state, x))
    np.testing.assert_array_equal(plain, keyed)


def assert_half_precision(model: Any, x: jax.Array) -> None:
    """Half-precision images give half-precision outputs near the others; gradients are float32."""
    model.eval()
    full = jax.tree.leaves(run(model, x))
    model.set_attributes(scan_layers=True, raise_if_not_found=False)
    for y, wanted in zip(jax.tree.leaves(run(model, x.astype(jnp.bfloat16))), full, strict=True):
        assert y.dtype == jnp.bfloat16
        # bfloat16 has 8 bits: a relative error of 0.004 per operation
        np.testing.assert_allclose(y.astype(jnp.float32), wanted, atol=0.05 * float(jnp.abs(wanted).max()))
    _, grads = value_and_grads(model, x.astype(jnp.bfloat16), call=jax.eval_shape)
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
