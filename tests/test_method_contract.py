"""What every method promises of its state: any mesh gives the same losses, and a run that was interrupted goes on exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from jaxpretrain import sharding
from jaxpretrain.build import abstract
from jaxpretrain.checkpoint import Checkpointer
from jaxpretrain.optim import build_optimizer
from jaxpretrain.sharding import BATCH, make_mesh, tree_shardings
from jaxpretrain.train_state import make_train_step, split
from tests.method_cases import CASES

STEPS = 4
# A low rate: the order of float sums may differ, and training itself must not make much of it. SGD, for Adam would turn a
# gradient that is 0 but for rounding (a bias before a BatchNorm) into a step of full size.
LR = 1e-4


class Run:
    """The trainer's own step on a case's fixed batch, on one device or a mesh."""

    def __init__(self, name: str):
        self.case = CASES[name]
        graphdef, params, rest = split(self.case.make())
        optimizer = build_optimizer(dict(optimizer=dict(type="SGD", lr=LR, momentum=0.9)), np.full(STEPS, LR), params)
        self.batch = self.case.batch()
        step, rng = np.int32(0), jax.random.key_data(jax.random.key(0))
        opt_state = optimizer.init(params)
        self.first = jax.device_get(
            dict(params=params, model_state=rest, opt_state=opt_state, ema={}, step=step, rng=rng)
        )
        self.step = make_train_step(graphdef, optimizer, np.full(STEPS, LR), lambda batch, rng: batch)

    def __call__(self, mesh: dict[str, int], steps: int = STEPS, state: Any = None, compiled: Any = None) -> Any:
        """(losses, last state, compiled step)."""
        devices = jax.devices()[: np.prod(list(mesh.values()))]
        where = make_mesh(mesh, devices)
        shardings = tree_shardings(self.first, where)
        # A state must not be donated: the tests use it again.
        state = jax.device_put(jax.tree.map(np.asarray, self.first if state is None else state), shardings)
        rows = NamedSharding(where, BATCH)
        batch = jax.device_put(self.batch, rows)
        if compiled is None:
            # From shapes alone, which know of no mesh: JAX traces a step once for all meshes.
            shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (state, batch))
            compiled = jax.jit(self.step, in_shardings=(shardings, rows), out_shardings=(shardings, None))
            compiled = compiled.lower(*shapes).compile()
        losses = []
        for _ in range(steps):
            state, metrics = compiled(state, batch)
            losses.append(float(metrics["loss"]))
        return np.array(losses), state, compiled


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Compiles faster, and is partitioned all the same; small arrays are shared out too."""
    monkeypatch.setattr(sharding, "FSDP_MIN_SIZE", 64)
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def bits(tree: Any) -> dict[str, bytes]:
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(tree))
    return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in leaves}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_meshes_and_resume(name: str, tmp_path: Path) -> None:
    run = Run(name)
    single, last, compiled = run(dict(data=1))
    assert np.isfinite(single).all()
    teacher_and_all = bits(last)
    assert teacher_and_all != bits(run.first), "weights that stand still prove nothing"

    # From a checkpoint half-way, bit by bit the same; all state comes back.
    _, middle, _ = run(dict(data=1), steps=STEPS // 2, compiled=compiled)
    checkpoints = Checkpointer(tmp_path)
    checkpoints.save(STEPS // 2, middle)
    checkpoints.wait()
    restored = Checkpointer(tmp_path).restore(jax.tree.map(_abstract, middle)).state
    assert bits(restored) == bits(middle)
    rest, again, _ = run(dict(data=1), steps=STEPS - STEPS // 2, state=restored, compiled=compiled)
    assert (rest == single[STEPS // 2 :]).all()
    assert bits(again) == teacher_and_all

    # Eight devices: the batch is split over all of them, arrays are shared out among four. (test_scale.py has other meshes.)
    ours, state, _ = run(dict(data=2, fsdp=4))
    np.testing.assert_allclose(ours, single, rtol=1e-4)
    shares = [leaf.size // leaf.addressable_shards[0].data.size for leaf in jax.tree.leaves(state["params"])]
    assert max(shares) == 4


def _abstract(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


@pytest.mark.parametrize("name", [name for name in CASES if name != "supervised"])
def test_only_parameters_learn(name: str) -> None:
    """Everything else (teachers, targets, queues, centres) is of another kind, and so out of the optimizer's reach.

    What is differentiated is `nnx.Param`s alone; the loss's other state comes out as ordinary arrays without a gradient path
    into them: the derivative of the loss by such state is not asked for anywhere.
    """
    method = abstract(CASES[name].config)
    learns = {path for path, _ in nnx.state(method, nnx.Param).flat_state()}
    if teacher := getattr(method, "teacher_name", None):
        assert not [path for path in learns if teacher in path]
    assert not [path for path in learns if "target_generator" in path or "queue" in str(path[-1])]
