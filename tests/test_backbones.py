"""What every backbone promises: the reference's numbers, and one way to use them all."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxpretrain.build import _TABLE, abstract, resolve
from jaxpretrain.interop import mmpretrain
from jaxpretrain.models.layers import Frozen, intermediates
from tests.backbone_cases import CASES
from tests.parity import (
    assert_logits,
    assert_summary,
    build_by_reference,
    load_golden,
    one_pass,
    reference_input,
)
from tests.test_resnet import random

GOLDEN = [(name, case) for name, case in CASES.items() if case.golden]
BATCH = 4
COPIES, DROP = 6, 0.4  # of each image, and the rate at which some, but not all, skip a branch


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


def observe(module: nnx.Module, x: Any, *seeds: int, names: str = "") -> Any:
    """(outputs, state afterwards, what is called `names` inside), under jit; a list of them where there are several seeds.

    The module itself stays as it is.
    """
    graphdef, params, rest = parts(module)

    @jax.jit
    def run(params, rest, x, seed):
        model = nnx.merge(graphdef, params, rest)
        rngs = None if seed is None else nnx.Rngs(dropout=jax.random.key(seed))
        outputs, found = intermediates(model, x, rngs=rngs, names=names) if names else (model(x, rngs=rngs), {})
        return tensors(outputs), nnx.to_pure_dict(nnx.split(model, nnx.Param, ...)[2]), found

    results = [run(params, rest, x, seed) for seed in map(jnp.uint32, seeds)] or [run(params, rest, x, None)]
    return results if len(results) > 1 else results[0]


def call(module: nnx.Module, x: Any, seed: int | None = None) -> list[Any]:
    """Outputs under jit; the module itself stays as it is."""
    return observe(module, x, *([] if seed is None else [seed]))[0]


def shapes(module: nnx.Module, x: Any) -> list[Any]:
    """What a call with random numbers at hand would give, without computing it."""
    graphdef, params, rest = parts(module)
    run = lambda params, rest, x: nnx.merge(graphdef, params, rest)(x, rngs=nnx.Rngs(dropout=3))  # noqa: E731
    return jax.eval_shape(run, params, rest, x)


def waves(outputs: list[Any]) -> Any:
    """A sum that depends on every number in the outputs."""
    return sum(
        (out * jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)).sum()
        for out in map(jnp.asarray, outputs)
    )


def loss_grads(module: nnx.Module, x: Any) -> tuple[Any, Any, Any]:
    """`waves` of the outputs in training, its gradients by the parameters, and other state afterwards."""
    graphdef, params, rest = parts(module)

    @jax.jit
    def run(params, rest, x):
        def value(params):
            model = nnx.merge(graphdef, params, rest)
            total = waves(tensors(model(x, rngs=nnx.Rngs(dropout=jax.random.key(1)))))
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
    model.set_attributes(scan_layers=True, raise_if_not_found=False)
    graphdef, params, rest = parts(model)

    @jax.jit
    def run(params, rest, x):
        model = one_pass(nnx.merge(graphdef, params, rest))
        return model.extract_feat(x, "backbone"), model(x)

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
    """In eval mode: no random numbers, bfloat16, other sizes, several stages, values from inside by name."""
    case = CASES[name]
    model = made(case.config, training=False)
    x = images(case.size, channels=case.channels)
    outputs, _, found = observe(model, x, names="*.out")
    assert all(np.isfinite(out).all() and out.dtype == jnp.float32 and len(out) == BATCH for out in outputs)
    assert found and all(np.isfinite(value).all() for value in map(np.asarray, jax.tree.leaves(found)))
    for half, full in zip(call(model, x.astype(jnp.bfloat16)), outputs, strict=True):
        assert half.dtype == jnp.bfloat16
        assert_close(half, full, case.bfloat16)
    if case.other_size:
        other = tensors(shapes(model, images(case.other_size, channels=case.channels)))
        assert [out.shape[-1] for out in other] == [out.shape[-1] for out in outputs]
    if case.out_indices:
        model = abstract(case.config | dict(out_indices=case.out_indices))
        model.eval()
        several = shapes(model, x)
        assert len(several) == len(case.out_indices)
        last = tensors(several[-1])
        assert [out.shape for out in last] == [out.shape for out in outputs[-len(last) :]]


@pytest.mark.parametrize("name", CASES)
def test_learns(name: str) -> None:
    """In training: a gradient for every parameter, running statistics that move, samples that skip branches, each draw
    other ones; and the same when blocks are recomputed."""
    case = CASES[name]
    if case.drop_path_rate:
        model = made(case.config | {case.drop_path_rate: DROP}, training=True)
        x = np.repeat(images(case.size, 2, case.channels), COPIES, axis=0)
        (outputs, rest, _), (others, _, _) = observe(model, x, 1, 2)
        copies = np.reshape(outputs[-1], (2, COPIES, -1))  # of one image: what differs was drawn
        assert np.abs(copies - copies[:, :1]).max() > 1e-3
        assert np.abs(others[-1] - outputs[-1]).max() > 1e-3
    else:
        model = made(case.config, training=True)
        x = images(case.size, channels=case.channels)
        outputs, rest, _ = observe(model, x, 1)
    before = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
    if before:
        means = [
            (path, leaf)
            for path, leaf in jax.tree_util.tree_leaves_with_path(before)
            if str(path[-1]).endswith("'mean']")
        ]
        after = dict(jax.tree_util.tree_leaves_with_path(rest))
        assert means and all(np.abs(after[path] - leaf).max() > 0 for path, leaf in means), "statistics of the batch"
    if case.remat:
        model.set_attributes(remat="full", raise_if_not_found=False)
    value, grads, _ = loss_grads(model, x)
    scale = sum(np.abs(out).sum(dtype=np.float64) for out in outputs)
    assert abs(float(value) - float(waves(outputs))) <= 1e-5 * scale
    for path, gradient in jax.tree_util.tree_leaves_with_path(grads):
        where = jax.tree_util.keystr(path, simple=True, separator="/")
        untouched = bool(case.untouched and re.search(case.untouched, where))
        assert np.isfinite(gradient).all()
        assert (np.abs(gradient).max() > 0) != untouched, f"{where}: gradient {np.abs(gradient).max()}"


def statistics(module: nnx.Module) -> dict[tuple[Any, ...], Any]:
    """Path -> running statistic, as it is: another value is another object."""
    return {path: variable.get_value() for path, variable in nnx.state(module, nnx.BatchStat).flat_state()}


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.frozen_stages is not None])
def test_frozen_stages(name: str) -> None:
    """The first stages are no parameters any more, and their statistics stand still."""
    case = CASES[name]
    model = abstract(case.config | dict(frozen_stages=case.frozen_stages))
    model.train()
    frozen = nnx.state(model, Frozen).flat_state()
    usual = len(nnx.state(abstract(case.config), nnx.Param).flat_state())
    learns = len(nnx.state(model, nnx.Param).flat_state())
    assert 0 < learns < usual and frozen
    if not statistics(model):
        return
    graphdef, params, rest = parts(model)
    moved = set()

    def run(params, rest, x):
        model = nnx.merge(graphdef, params, rest)
        before = statistics(model)
        model(x, rngs=nnx.Rngs(dropout=3))
        moved.update(path[:-1] for path, value in statistics(model).items() if value is not before[path])

    x = images(case.size, channels=case.channels)
    jax.eval_shape(run, params, rest, x)  # what stands still is not even computed
    assert moved and not moved & {path[:-1] for path, _ in frozen}


def test_every_backbone_has_a_case() -> None:
    """All that MMPretrain registers as backbones, but for those of methods, which have cases of their own."""
    backbones = {
        name for name, where in _TABLE.items() if where.startswith("jaxpretrain.models.") and _is_backbone(name)
    }
    assert backbones <= set(CASES) | {"ViTSAM"}, "ViTSAM's windows: see test_vit_sam.py"


def _is_backbone(name: str) -> bool:
    where = list(_TABLE)
    return where.index(name) < where.index("GlobalAveragePooling") and isinstance(resolve(name), type)
