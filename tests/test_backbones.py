"""What every backbone promises: the reference's numbers, and one way to use them all."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxpretrain.build import _TABLE, resolve
from jaxpretrain.interop import mmpretrain
from jaxpretrain.models.layers import Frozen, intermediates
from tests.backbone_cases import CASES
from tests.parity import assert_logits, assert_summary, build_by_reference, load_golden, reference_input
from tests.test_resnet import random

GOLDEN = [(name, case) for name, case in CASES.items() if case.golden]
BATCH = 4


def images(size: int, batch: int = BATCH, channels: int = 3) -> np.ndarray:
    """Blobs on noise: neighbouring pixels are alike, as in photographs."""
    rng = np.random.default_rng(0)
    coarse = jax.image.resize(rng.standard_normal((batch, 4, 4, channels)), (batch, size, size, channels), "linear")
    return np.asarray(coarse + 0.2 * rng.standard_normal((batch, size, size, channels)), np.float32)


def tensors(output: Any) -> list[Any]:
    """All arrays that a backbone gives, in order: maps, or pairs of map and token."""
    return jax.tree.leaves(output)


def parts(module: nnx.Module) -> tuple[Any, Any, Any]:
    graphdef, params, rest = nnx.split(module, nnx.Param, ...)
    return graphdef, nnx.to_pure_dict(params), nnx.to_pure_dict(rest)


def made(config: dict[str, Any], *, training: bool) -> Any:
    """The backbone with plausible random weights."""
    model = random(config)
    model.train() if training else model.eval()
    return model


def call(module: nnx.Module, x: Any, seed: int | None = None) -> list[Any]:
    """Outputs under jit; the module itself stays as it is."""
    graphdef, params, rest = parts(module)

    @jax.jit
    def run(params, rest, x):
        return nnx.merge(graphdef, params, rest)(x, rngs=None if seed is None else nnx.Rngs(dropout=seed))

    return tensors(run(params, rest, x))


def loss_grads(module: nnx.Module, x: Any) -> tuple[Any, Any, Any]:
    """(value, gradients by the parameters, other state afterwards) of a sum that depends on every output."""
    graphdef, params, rest = parts(module)

    @jax.jit
    def run(params, rest, x):
        def value(params):
            model = nnx.merge(graphdef, params, rest)
            outputs = tensors(model(x, rngs=nnx.Rngs(dropout=1)))
            waves = [jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape) for out in outputs]
            total = sum((out * wave).sum() for out, wave in zip(outputs, waves, strict=True))
            return total, nnx.to_pure_dict(nnx.split(model, nnx.Param, ...)[2])

        return jax.value_and_grad(value, has_aux=True)(params)

    (value, rest), grads = run(params, rest, x)
    return value, grads, rest


def assert_close(ours: Any, theirs: Any, tolerance: float = 1e-5) -> None:
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "file"), [pytest.param(name, file, id=file) for name, case in GOLDEN for file in case.golden]
)
def test_classifier_equals_reference(name: str, file: str) -> None:
    case, golden = CASES[name], load_golden(file)
    model = build_by_reference(golden["model_cfg"], golden["manifest"])
    assert type(model.backbone).__name__ == name
    keys = len(mmpretrain.names(model)) + len(mmpretrain.derived(model)) + len(mmpretrain.aliases(model))
    assert keys == golden["n_keys"]
    assert mmpretrain.num_parameters(model) == golden["n_params"]
    model.eval()
    graphdef, params, rest = parts(model)

    @jax.jit
    def run(params, rest, x):
        model = nnx.merge(graphdef, params, rest)
        feats = model.extract_feat(x, "backbone")
        return feats, model(x)

    feats, logits = run(params, rest, reference_input(tuple(golden["input_shape"])))
    summaries = jax.tree.leaves(golden["features"], is_leaf=lambda node: isinstance(node, dict))
    for array, summary in zip(tensors(feats), summaries, strict=True):
        array = array.swapaxes(1, 2) if case.channels_first and array.ndim == 3 else array
        assert_summary(array, summary, case.tolerance)
    for ours, theirs in zip(
        logits if isinstance(logits, tuple) else (logits,),
        golden["logits"] if isinstance(golden["logits"], list) else [golden["logits"]],
        strict=True,
    ):
        assert_logits(ours, theirs, case.tolerance)


@pytest.mark.parametrize("name", CASES)
def test_contract(name: str) -> None:
    """In eval mode: the same twice, in bfloat16, at other sizes, at several stages, and by name from inside."""
    case = CASES[name]
    model = made(case.config, training=False)
    x = images(case.size, channels=case.channels)
    outputs = call(model, x)
    assert all(np.isfinite(out).all() and out.dtype == jnp.float32 and len(out) == BATCH for out in outputs)
    for one, again in zip(outputs, call(model, x, seed=3), strict=True):
        np.testing.assert_array_equal(one, again, err_msg="eval mode draws nothing")
    for half, full in zip(call(model, x.astype(jnp.bfloat16)), outputs, strict=True):
        assert half.dtype == jnp.bfloat16
        assert_close(half, full, case.bfloat16)
    if case.other_size:
        other = call(model, images(case.other_size, channels=case.channels))
        assert all(np.isfinite(out).all() for out in other)
        assert [out.shape[-1] for out in other] == [out.shape[-1] for out in outputs]
    _, found = intermediates(model, x[:1], names="*.out")
    assert found and all(np.isfinite(value).all() for value in map(np.asarray, jax.tree.leaves(found)))
    if case.out_indices:
        several = made(case.config | dict(out_indices=case.out_indices), training=False)
        wanted = several(x)
        assert len(wanted) == len(case.out_indices)
        assert [tuple(a.shape) for a in tensors(wanted[-1])] == [tuple(a.shape) for a in tensors(model(x)[-1])]


@pytest.mark.parametrize("name", CASES)
def test_learns(name: str) -> None:
    """In training: a gradient for every parameter, running statistics that move; frozen stages that stand still; remat."""
    case = CASES[name]
    x = images(case.size, channels=case.channels)
    model = made(case.config, training=True)
    value, grads, rest = loss_grads(model, x)
    before = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
    if before:
        means = [
            (path, leaf)
            for path, leaf in jax.tree_util.tree_leaves_with_path(before)
            if str(path[-1]).endswith("'mean']")
        ]
        after = dict(jax.tree_util.tree_leaves_with_path(rest))
        assert means and all(np.abs(after[path] - leaf).max() > 0 for path, leaf in means), "statistics of the batch"
    for path, gradient in jax.tree_util.tree_leaves_with_path(grads):
        where = jax.tree_util.keystr(path, simple=True, separator="/")
        untouched = bool(case.untouched and re.search(case.untouched, where))
        assert np.isfinite(gradient).all()
        assert (float(jnp.abs(gradient).max()) > 0) != untouched, f"{where}: gradient {np.abs(gradient).max()}"
    if case.remat:
        model.remat = "full"
        again, same, _ = loss_grads(model, x)
        assert_close(again, value, 1e-4)
        scale = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads))
        for a, b in zip(jax.tree.leaves(same), jax.tree.leaves(grads), strict=True):
            assert np.abs(np.asarray(a) - np.asarray(b)).max() <= 1e-4 * scale


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.drop_path_rate])
def test_drop_path(name: str) -> None:
    """Samples skip branches in training, each draw other ones."""
    case = CASES[name]
    model = made(case.config | {case.drop_path_rate: 0.5}, training=True)
    x = np.repeat(images(case.size, 1, case.channels), 8, axis=0)  # of one image: what differs was drawn
    one = call(model, x, seed=1)[-1]
    assert any(np.abs(np.asarray(row) - np.asarray(one[0])).max() > 1e-3 for row in one[1:])
    assert np.abs(np.asarray(call(model, x, seed=2)[-1]) - np.asarray(one)).max() > 1e-3


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.frozen_stages is not None])
def test_frozen_stages(name: str) -> None:
    """The first stages are no parameters any more, and their statistics stand still."""
    case = CASES[name]
    model = made(case.config | dict(frozen_stages=case.frozen_stages), training=True)
    frozen = nnx.state(model, Frozen).flat_state()
    usual = len(nnx.state(made(case.config, training=True), nnx.Param).flat_state())
    learns = len(nnx.state(model, nnx.Param).flat_state())
    assert 0 < learns < usual and frozen
    before = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
    _, _, rest = loss_grads(model, images(case.size, channels=case.channels))
    after = dict(jax.tree_util.tree_leaves_with_path(rest))
    frozen_parts = {str(path[:-1]) for path, _ in frozen}
    for path, leaf in jax.tree_util.tree_leaves_with_path(before):
        part = str(tuple(getattr(key, "key", getattr(key, "idx", None)) for key in path[:-1]))
        if part in frozen_parts:
            np.testing.assert_array_equal(after[path], leaf)


def test_every_backbone_has_a_case() -> None:
    """All that MMPretrain registers as backbones, but for those of methods, which have cases of their own."""
    backbones = {
        name for name, where in _TABLE.items() if where.startswith("jaxpretrain.models.") and _is_backbone(name)
    }
    assert backbones <= set(CASES) | {"ViTSAM"}, "ViTSAM's windows: see test_vit_sam.py"


def _is_backbone(name: str) -> bool:
    where = list(_TABLE)
    return where.index(name) < where.index("GlobalAveragePooling") and isinstance(resolve(name), type)
