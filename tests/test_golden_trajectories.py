"""Whole training runs against the reference's, step by step: loss, learning rate, gradient, weights, statistics.

Thirty optimizer steps from the same weights and data through the trainer's own step. Transformers agree in float32. With
BatchNorm, runs are compared in float64: in float32 one activation within rounding of 0 takes the other side of a ReLU after
a few steps, and the runs part, the reference's own float32 and float64 runs among them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jaxtyping import Array

from jaxpretrain.data.batch_augments import Mixup
from jaxpretrain.methods.base import Method, Progress
from jaxpretrain.methods.momentum_encoder import MomentumMethod
from jaxpretrain.methods.supervised import Supervised
from jaxpretrain.methods.swav import SwAV
from jaxpretrain.optim import build_optimizer, cosine_ema_momentum, learning_rates
from jaxpretrain.train_state import make_train_step, split
from tests.parity import build_by_reference, load_golden, reference_input, reference_layout


class WatchedSwAV(SwAV):
    """Remembers prototypes as the optimizer leaves them: the reference brings them to unit length in the next loss only."""

    def after_step(self, progress: Progress) -> None:
        self.moved.set_value(self.head.loss_module.prototypes.kernel[...])
        super().after_step(progress)


class Run:
    """One golden run: its record, and the same steps made by us."""

    def __init__(self, case: str, dtype: type):
        golden = load_golden(f"trajectories/{case}")
        self.config, self.data, self.manifest = golden["config"], golden["data"], golden["manifest"]
        self.dtype, self.drift = dtype, golden["drift"]
        self.lrs = [step["lr"][0] for step in golden["steps"]]
        self.columns = golden["steps"]
        record = golden if dtype == np.float32 else golden["float64"]
        self.steps, self.snapshots = record["steps"], record["snapshots"]
        self.pieces = self.config["optim_wrapper"].get("accumulative_counts", 1)
        self.prefix = "model" if self.config["model"]["type"] == "ImageClassifier" else ""
        hooks = {hook["type"]: hook for hook in self.config["custom_hooks"]}
        ema = hooks.get("EMAHook")
        self.ema = {key: ema[key] for key in ("momentum", "begin_iter")} if ema else None
        self.frozen = hooks.get("SwAVHook", {}).get("frozen_layers_cfg", {})  # part of a name -> steps without learning

    def method(self) -> Method:
        model = self.config["model"]
        cfg = dict(type="Supervised", model=model) if self.prefix else model
        cfg = dict(cfg, type=WatchedSwAV) if cfg["type"] == "SwAV" else cfg
        method = build_by_reference(cfg, self.manifest, self.prefix)
        if isinstance(method, MomentumMethod):
            method.reset_teacher()
        if isinstance(method, WatchedSwAV):
            method.moved = nnx.BatchStat(method.head.loss_module.prototypes.kernel[...])
            method.head.loss_module.normalize_prototypes()
        return method

    def batch(self, s: int) -> dict[str, Any]:
        """The data of iteration s."""
        size, count = self.data["views"], self.data["batch_size"]
        views = tuple(reference_input((count, 3, n, n), 10000 * s + i) for i, n in enumerate(size))
        lam = 0.5 + 0.5 * np.random.Generator(np.random.PCG64(10000 * s + 4000)).random()
        noise = np.random.Generator(np.random.PCG64(10000 * s + 1000)).random((count, 16)).astype(np.float32)
        batch = dict(
            image=views if len(views) > 1 else views[0],
            label=(3 * np.arange(count, dtype=np.int32) + s) % 10,
            lam=np.full(count, lam),
            noise=noise,
        )
        return jax.tree.map(self.cast, batch)

    def cast(self, x: Any) -> Any:
        return np.asarray(x, self.dtype) if np.issubdtype(x.dtype, np.floating) else np.asarray(x)

    def states(self) -> Iterator[tuple[int, dict, dict, dict]]:
        """(iterations done, state before, state after, metrics) of each optimizer step."""
        method = self.method()
        augment = self.pin_mixup(method)
        epoch = self.data["iters_per_epoch"]
        rates = partial(
            learning_rates, self.config["param_scheduler"], total_steps=self.data["max_iters"], steps_per_epoch=epoch
        )
        lrs = rates(self.config["optim_wrapper"]["optimizer"]["lr"])
        np.testing.assert_allclose(lrs, self.lrs, rtol=1e-8)
        lrs = lrs[self.pieces - 1 :: self.pieces]  # the reference's schedules count iterations, ours optimizer steps

        graphdef, params, model_state = split(method)
        params, model_state = jax.tree.map(self.cast, (params, model_state))
        wrapper = {key: value for key, value in self.config["optim_wrapper"].items() if key != "accumulative_counts"}
        if self.frozen:
            wrapper["paramwise_cfg"] = dict(custom_keys={key: dict(begin=n) for key, n in self.frozen.items()})
        optimizer = build_optimizer(wrapper, lrs, params)
        state = dict(params=params, model_state=model_state, opt_state=optimizer.init(params), step=np.int32(0))
        state |= dict(ema=params if self.ema else {}, rng=jax.random.key_data(jax.random.key(0)))
        train_step = make_train_step(graphdef, optimizer, lrs, augment, self.pieces, self.ema)
        # Convolutions in float64 are plain loops on CPUs: they need the optimisation that tests otherwise do without.
        step = jax.jit(train_step, compiler_options={"xla_backend_optimization_level": 3})
        for done in range(self.pieces, self.data["max_iters"] + 1, self.pieces):
            # A micro-batch of ours is every n-th row.
            parts = [self.batch(s) for s in range(done - self.pieces, done)]
            batch = jax.tree.map(lambda *rows: np.stack(rows, axis=1).reshape(-1, *rows[0].shape[1:]), *parts)
            before = state
            state, metrics = step(state, batch)
            state = jax.device_get(state)
            yield done, before, state, jax.device_get(metrics)

    def pin_mixup(self, method: Method) -> Any:
        """Replaces what Mixup draws, if there is any, by the batch's `lam` and a shift by one."""
        drawn: dict[str, Array] = {}

        def pinned(images: Array, labels: Array, key: Array) -> tuple[Array, Array]:
            return Mixup.mix(images, labels, (jnp.arange(len(images)) + 1) % len(images), drawn["lam"])

        def augment(batch: dict[str, Any], rng: Array) -> dict[str, Any]:
            drawn["lam"] = batch["lam"][0]
            return batch

        if isinstance(method, Supervised) and method.augment is not None:
            method.augment = pinned
        return augment


def norm(tree: Any) -> float:
    return float(np.sqrt(sum(np.sum(np.square(np.asarray(x, np.float64))) for x in jax.tree.leaves(tree))))


def relative(actual: Any, wanted: Any) -> float:
    return abs(float(actual) / float(wanted) - 1)


class Errors(dict):
    """The worst error of each kind over a run, in units of its tolerance."""

    def add(self, kind: str, error: float, tolerance: float, where: Any) -> None:
        if not error / tolerance <= self.get(kind, (-1, None))[0]:
            self[kind] = (error / tolerance, f"{error:.1e} at {where}, allowed {tolerance:.1e}")

    def check(self) -> None:
        failed = {kind: text for kind, (ratio, text) in self.items() if not ratio <= 1}
        assert not failed, failed


# Parameters whose gradient is 0 but for rounding noise, which AdamW turns into steps of full size in float32 (in float64 it
# is far below AdamW's epsilon). Losses do not see them.
# Biases of attention keys: the softmax takes no notice of a shift. They are the middle third of qkv's bias.
# In MoCo v3 the bias of the ViT's last norm: a BatchNorm follows, which takes it away, and whose mean it moves.
NOISY_NORM = re.compile(r"qkv\.bias$")
NOISY = re.compile(r"(backbone|module\.0)\.ln1\.bias$|(neck|module\.1)\.bn0\.running_mean$")


def compare_tensors(
    errors: Errors, kind: str, tree: Any, wanted: dict, prefix: str, tolerance: float, done: int, noisy: bool
) -> None:
    """Golden tensors are [L2 norm, first four values]."""
    for key, (length, first) in wanted.items():
        if noisy and NOISY.search(key):
            continue
        array = reference_layout(tree, key, prefix).astype(np.float64)
        error = np.abs(array.reshape(-1)[:4] - first).max() / np.abs(array).max()
        errors.add(kind, error, tolerance, (done, key))
        if not NOISY_NORM.search(key):
            errors.add(kind + " norm", relative(np.linalg.norm(array), length), tolerance, (done, key))


def check(case: str, dtype: type, tolerance: float) -> None:
    run, errors = Run(case, dtype), Errors()
    noisy = case == "mocov3_vit" and dtype == np.float32
    for update, (done, before, state, metrics) in enumerate(run.states()):
        rows = run.steps[done - run.pieces : done]
        row, s = rows[-1], rows[-1]["s"]
        # Ten times the distance between the reference's own float32 and float64 runs so far, where that grows.
        loose = 10 * max(run.drift["loss_abs"][: s + 1]) if noisy else 0
        loose_grad = 10 * max(run.drift["grad_rel"][: s + 1]) if noisy else 0
        losses = [step["losses"]["loss"] for step in rows]
        errors.add("loss", relative(metrics["loss"], np.mean(losses)), max(tolerance, loose), s)
        asleep = sum(s < steps for steps in run.frozen.values())  # these have no gradient in the reference
        if not asleep:
            errors.add("grad_norm", relative(metrics["grad_norm"], row["grad_norm"]), max(tolerance, loose_grad), s)
        errors.add("lr", relative(metrics["lr"], run.lrs[done - 1]), 1e-6, s)
        # Small updates drown in float32's rounding of the parameters, some of MoCo v3's are noise (see
        # above). Three times the distance between the reference's own runs is allowed.
        drift = run.drift["update_rel"][update] if dtype == np.float32 else 0
        allowed = max(1e-3 if noisy else tolerance, 3 * drift)
        params = as_recorded(state)
        change = jax.tree.map(np.subtract, params, before["params"])
        errors.add("update_norm", relative(norm(change), row["update_norm"]), allowed, s)
        errors.add("param_norm", relative(norm(params), row["param_norm"]), tolerance, s)
        assert len(jax.tree.leaves(params)) == run.columns[done - 1]["n_grads"] + asleep

        wanted = run.snapshots.get(str(done), {})
        compare = partial(
            compare_tensors, errors, prefix=run.prefix, tolerance=max(tolerance, loose), done=done, noisy=noisy
        )
        compare("params", params, wanted.get("params", {}))
        compare("statistics", state["model_state"], wanted.get("bn", {}))
        compare("ema", state["ema"], wanted.get("ema", {}))
        if "teacher" in wanted:
            # The reference moves its teacher inside the next loss, and we at the end of the step.
            compare("teacher", before["model_state"], wanted["teacher"])
            compare("teacher statistics", state["model_state"], wanted["teacher_bn"])
            name = next(iter(wanted["teacher"])).split(".")[0]
            assert state["model_state"][name]["steps"] == done == wanted["teacher_steps"]
        if "queue" in wanted:
            compare_queue(errors, state["model_state"], wanted["queue"], tolerance, done)
    errors.check()


def as_recorded(state: dict[str, Any]) -> dict[str, Any]:
    """The parameters as the optimizer left them (see `WatchedSwAV`)."""
    params = jax.tree.map(lambda x: x, state["params"])  # new dicts
    if "moved" in state["model_state"]:
        params["head"]["loss_module"]["prototypes"]["kernel"] = state["model_state"]["moved"]
    return params


def compare_queue(errors: Errors, state: dict[str, Any], wanted: dict, tolerance: float, done: int) -> None:
    """The keys of MoCo, and where the next will be written."""
    queue = np.asarray(state["queue"], np.float64)
    assert state["queue_ptr"][0] == wanted["ptr"]
    errors.add("queue norm", relative(np.linalg.norm(queue), wanted["norm"]), tolerance, done)
    for what, ours in (("first4", queue.reshape(-1)), ("column0", queue[:, 0])):
        errors.add("queue", np.abs(ours[: len(wanted[what])] - wanted[what]).max(), tolerance, (done, what))


@pytest.mark.parametrize("case", ["mae_vit", "sup_vit_adamw_mixup", "mocov3_vit"])
def test_transformers_in_float32(case):
    check(case, np.float32, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        "mae_vit",
        "sup_vit_adamw_mixup",
        "mocov3_vit",
        "mocov2_resnet18",
        "swav_resnet18_lars",
        "simclr_resnet18_lars",
        "sup_resnet18_sgd",
        "sup_resnet18_ema",
        "sup_resnet18_accum2",
    ],
)
def test_all_in_float64(case):
    with jax.enable_x64(True):
        check(case, np.float64, 1e-7)


def test_momentum_of_the_teacher():
    run = Run("mocov3_vit", np.float32)
    for row in run.columns[1:]:
        ours = cosine_ema_momentum(row["s"], run.config["model"]["base_momentum"], 0.0, run.data["max_iters"])
        assert relative(ours, row["ema_momentum"]) < 1e-5
