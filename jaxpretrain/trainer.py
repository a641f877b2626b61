"""The one training loop, for every method."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import logging
import math
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from jaxpretrain import flops
from jaxpretrain.build import ConfigError, nearest
from jaxpretrain.checkpoint import Checkpointer
from jaxpretrain.cli import ExpectedFailure
from jaxpretrain.config import to_plain
from jaxpretrain.data.device import DevicePipeline
from jaxpretrain.data.phases import phase_at
from jaxpretrain.data.pipeline import TrainLoader
from jaxpretrain.data.prefetch import device_prefetch
from jaxpretrain.distributed import wait_for_all
from jaxpretrain.evaluators.base import run_all
from jaxpretrain.evaluators.context import make_context, make_evaluators
from jaxpretrain.interop import starting_weights
from jaxpretrain.logs import Clock, MetricLogger
from jaxpretrain.models.heads import ClsHead
from jaxpretrain.optim import base_lr, build_optimizer, learning_rates, scale_lr, weight_decays
from jaxpretrain.precise_bn import PreciseBN
from jaxpretrain.regrouping import Regrouping
from jaxpretrain.sharding import BATCH, log_replicated, make_mesh, tree_shardings
from jaxpretrain.train_state import Batch, State, init_state, make_method, make_train_step, split
from jaxpretrain.visualize.report import write_report

logger = logging.getLogger("jaxpretrain")


class NonFiniteError(ExpectedFailure):
    """A loss or another metric became NaN or infinite."""


def train(config: Any, workdir: str | Path) -> dict[str, float]:
    """Trains to the end, or on from the latest checkpoint in `workdir`; returns the last evaluation's scores."""
    return Trainer(config, workdir).fit()


class Trainer:
    """Everything that a run needs, set up from its config; `fit` runs the loop.

    Setting up allocates no weights and reads no images. Raises ConfigError for what cannot work: batch sizes that do not
    divide, a classifier of another class count than the data, missing data.
    """

    def __init__(self, config: Any, workdir: str | Path):
        self.config, self.workdir = config, Path(workdir)
        self.mesh = make_mesh(config.mesh)
        self._check_fields()
        self.loader = TrainLoader(
            to_plain(config.data.train, keep_callables=True),
            batch_size=config.batch_size,
            seed=config.seed,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            num_workers=config.data.num_workers,
            num_threads=config.data.num_threads,
            prefetch=config.data.prefetch,
            max_bad=config.data.max_bad,
        )
        self.steps_per_epoch = self.loader.steps_per_epoch
        self.regrouping = Regrouping(config, self.mesh, self.loader.length)
        self.total_steps = config.max_steps or config.max_epochs * self.steps_per_epoch
        optim_wrapper = to_plain(config.optim_wrapper)
        if config.auto_scale_lr.enable:
            optim_wrapper = scale_lr(optim_wrapper, config.batch_size, config.auto_scale_lr.base_batch_size)
        schedulers = to_plain(config.param_scheduler)
        length: dict[str, int] = dict(
            total_steps=self.total_steps, steps_per_epoch=self.steps_per_epoch, max_epochs=config.max_epochs
        )
        rates = lambda lr: learning_rates(schedulers, lr, **length)  # noqa: E731
        decays = lambda decay: weight_decays(schedulers, decay, **length)  # noqa: E731
        method = make_method(config)
        self._check_class_count(method)
        graphdef, params, _ = split(method)
        optimizer = build_optimizer(optim_wrapper, rates, params, decays)
        self.init = functools.partial(init_state, config, optimizer)
        self.abstract_state = jax.eval_shape(self.init)
        self.shardings = tree_shardings(self.abstract_state, self.mesh, config.sharding_rules)
        log_replicated(self.abstract_state["params"], self.shardings["params"], self.mesh)
        self._step = functools.partial(
            make_train_step,
            optimizer=optimizer,
            learning_rates=rates(base_lr(optim_wrapper)).astype(np.float32),
            accumulative_counts=config.accumulative_counts,
            ema=to_plain(config.ema),
        )
        self.graphdef = graphdef
        self.precise_bn = PreciseBN(config, self.steps_per_epoch, self.shardings)
        self.augments = [self._augment(phase.device_pipeline) for phase in self.loader.phases]
        self.checkpointer = Checkpointer(self.workdir / "checkpoints", to_plain(config), **config.checkpoint)
        self.batch_sharding = NamedSharding(self.mesh, BATCH)
        self.clock = Clock()

    # ------------------------------------------------------------------------------------------------------------------
    # The loop

    def fit(self) -> dict[str, float]:
        """Restores or initialises, trains, evaluates, saves; at the end writes the report."""
        config, scores = self.config, {}
        self.workdir.mkdir(parents=True, exist_ok=True)
        state, start = self._restore_or_init()
        self.loader.set_order(self.regrouping.order(state), start)
        batches = device_prefetch(iter(self.loader), self.batch_sharding, config.data.prefetch)
        context = make_context(config, self.mesh, self.workdir)
        evaluators = make_evaluators(config, context)
        log = MetricLogger(
            self.workdir,
            self.total_steps,
            config.batch_size,
            config,
            start,
            steps_per_epoch=self.steps_per_epoch,
            clock=self.clock,
        )
        compiled: Any = None
        running, step = -1, start  # no phase yet
        window: list[tuple[int, dict[str, Any]]] = []  # steps whose metrics are still on the device

        def evaluate(step: int) -> dict[str, float]:
            with self.clock.pause():
                scores.update(run_all(evaluators, state))
            log.evaluation(step, scores)
            return scores

        def check_window() -> dict[str, Any]:
            """Fetches all steps since the last time; the last one's metrics. Stops at a value that is not finite."""
            fetched = jax.device_get(window)
            window.clear()
            self._stop_if_not_finite(fetched)
            return fetched[-1][1] if fetched else {}

        if start == 0 and config.evaluation.at_start and evaluators:
            evaluate(0)
        with Preemption() as preemption, self._transfer_guard(), contextlib.closing(batches):
            for step in range(start + 1, self.total_steps + 1):
                epoch, step_of_epoch = divmod(step - 1, self.steps_per_epoch)
                if step_of_epoch == 0 and self.regrouping.due(epoch):
                    check_window()
                    with batches.interrupted(), jax.transfer_guard("allow"):
                        state, clusters = self.regrouping(state, epoch, context)
                        self.loader.set_order(self.regrouping.order(state), step - 1)
                    log.evaluation(step, clusters, phase="clusters")
                batch = next(batches)
                if (phase := phase_at(self.loader.phases, epoch)) != running:  # at the start, and when images change
                    with self.clock.pause():
                        compiled, running = self.compile(state, batch, phase), phase
                    log.set_flops(self.flops)
                with self._profile(step - start, self.total_steps - start):
                    state, metrics = compiled(state, batch)
                window.append((step, metrics))
                if step == start + 1:
                    jax.block_until_ready(metrics)
                    logger.info("first step done")
                last = step == self.total_steps
                if step % config.log_interval == 0 or last:
                    self.checkpointer.check()
                    log.write(step, check_window(), data_wait=batches.wait_seconds)
                if self.precise_bn.due(step):
                    check_window()
                    with self.clock.pause(), batches.interrupted(), jax.transfer_guard("allow"):
                        state = self._with_precise_statistics(state, step)
                fresh_scores = None
                if evaluators and (last or self._due(step, config.evaluation)):
                    check_window()
                    fresh_scores = evaluate(step)
                preempted = preemption.reached(step)
                if self._should_save(step, fresh_scores, preempted):
                    check_window()
                    with self.clock.pause():
                        self._save(step, state, fresh_scores)
                if preempted:
                    break
            with self.clock.pause():  # still deaf to SIGTERM: the checkpoint being written is the one that it asks for
                self.checkpointer.wait()
        log.close()
        self.loader.close()
        if preemption.received and (step < self.total_steps):
            raise ExpectedFailure(
                f"{preemption.received} received: stopped after step {step} of {self.total_steps}"
                + (", checkpoint saved" if config.checkpoint.interval != -1 else ", nothing saved (interval=-1)")
                + "; the same command continues from there"
            )
        if jax.process_index() == 0:
            logger.info("report: %s", write_report(self.workdir))
        return scores

    # ------------------------------------------------------------------------------------------------------------------
    # Its parts

    def _restore_or_init(self) -> tuple[State, int]:
        abstract = jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            self.abstract_state,
            self.shardings,
        )
        if self.checkpointer.latest_step() is None:
            state = jax.jit(self.init, out_shardings=self.shardings)()
            state = self._load_weights(state)
            if jax.process_index() == 0:
                (self.workdir / "config.json").write_text(json.dumps(to_plain(self.config), indent=2))
            return state, 0
        restored = self.checkpointer.restore(abstract)
        self.loader.set_state(restored.data_state)
        self.clock.load_state_dict(restored.clock)
        logger.info("continuing from step %d of %d in %s", restored.step, self.total_steps, self.workdir)
        return restored.state, restored.step

    def _load_weights(self, state: State) -> State:
        """The state with the weights that `load_from` and `init_cfg` of type Pretrained name, from wherever they are."""
        method = make_method(self.config)
        arrays = starting_weights(method, to_plain(self.config.load_from))
        if not arrays:
            return state

        def replace(prefix: str) -> Any:
            def one(path: tuple, x: jax.Array) -> jax.Array:
                array = arrays.get(tuple(key.key for key in path))
                if array is None:
                    return x
                array = np.asarray(array, x.dtype)
                return jax.make_array_from_callback(x.shape, x.sharding, lambda index: array[index])

            return jax.tree_util.tree_map_with_path(one, state[prefix])

        state = dict(state, params=replace("params"), model_state=replace("model_state"))
        teacher = getattr(method, "teacher_name", None)
        if teacher and not any(teacher in path for path in arrays):
            state["model_state"] = jax.jit(self._with_new_teacher, out_shardings=self.shardings["model_state"])(state)
        if self.config.ema:
            state["ema"] = jax.tree.map(jnp.copy, state["params"])
        if "ema_state" in state:
            state["ema_state"] = jax.tree.map(jnp.copy, state["model_state"])
        return state

    def _with_new_teacher(self, state: State) -> Any:
        method = nnx.merge(self.graphdef, state["params"], state["model_state"])
        method.reset_teacher()
        return split(method)[2]

    def _with_precise_statistics(self, state: State, step: int) -> State:
        """By the batches that come next, which the loader then has yet to give."""
        order = self.regrouping.order(state)
        self.loader.set_order(order, step)
        phase = phase_at(self.loader.phases, step // self.steps_per_epoch)
        with device_prefetch(iter(self.loader), self.batch_sharding, self.config.data.prefetch) as batches:
            state = self.precise_bn(state, batches, self.augments[phase])
        self.loader.set_order(order, step)
        return state

    def _should_save(self, step: int, scores: dict[str, float] | None, preempted: bool) -> bool:
        if preempted:
            return self.config.checkpoint.interval != -1
        return self.checkpointer.should_save(step, self.steps_per_epoch, total_steps=self.total_steps, metrics=scores)

    def _save(self, step: int, state: State, scores: dict[str, float] | None) -> None:
        self.checkpointer.save(
            step, state, data_state=self.loader.get_state(step), clock=self.clock.state_dict(), metrics=scores
        )

    def compile(self, state: State, batch: Batch, phase: int = 0) -> Any:
        """The training step for arrays like these: (state, batch) -> (state, metrics); it consumes the state.

        `phase` says which of `data.train.later` holds, 0 for none.

        Also counts `flops`, of matrix products and convolutions in one step; recomputation by remat is not work.
        """
        begin = time.perf_counter()
        shardings = (self.shardings, NamedSharding(self.mesh, PartitionSpec()))
        step = functools.partial(self._step, augment=self.augments[phase])
        traced = jax.jit(step(self.graphdef), donate_argnums=0, out_shardings=shardings).trace(state, batch)
        compiled = traced.lower().compile()
        jaxpr = traced.jaxpr
        if self.config.remat != "none":
            plain = make_method(self.config)
            plain.set_attributes(remat="none", raise_if_not_found=False)
            jaxpr = jax.make_jaxpr(step(split(plain)[0]))(state, batch)
        self.flops = flops.count_jaxpr(jaxpr)
        wait_for_all("training step compiled")  # gloo gives up on a process that comes 30 s later than another
        logger.info("training step compiled in %.1f s", time.perf_counter() - begin)
        return compiled

    def _augment(self, transforms: Sequence[Any]) -> Any:
        pipeline = DevicePipeline(transforms, **self.config.data_preprocessor)
        dtype = jnp.dtype(self.config.dtype)

        def augment(batch: Batch, rng: jax.Array) -> Batch:
            batch = pipeline(batch, rng)
            return dict(batch, image=jax.tree.map(lambda image: image.astype(dtype), batch["image"]))

        return augment

    def _due(self, step: int, when: Any) -> bool:
        every = when.interval * (self.steps_per_epoch if when.by_epoch else 1)
        return every > 0 and step % every == 0

    def _transfer_guard(self) -> Any:
        return jax.transfer_guard("disallow") if self.config.transfer_guard else contextlib.nullcontext()

    @contextlib.contextmanager
    def _profile(self, step: int, steps: int, first: int = 10, last: int = 14) -> Iterator[None]:
        """Traces steps 10 to 14 of the `steps` of this process, past warm-up, if config.profile is set."""
        if self.config.profile and step == min(first, steps):
            jax.profiler.start_trace(str(self.workdir / "profile"))
        yield
        if self.config.profile and step == min(last, steps):
            jax.profiler.stop_trace()
            logger.info("profile: %s", self.workdir / "profile")

    def _stop_if_not_finite(self, fetched: list[tuple[int, dict[str, Any]]]) -> None:
        for step, metrics in fetched:
            bad = [f"{name}={float(value)}" for name, value in metrics.items() if not math.isfinite(value)]
            if bad:
                self.checkpointer.wait()  # the last good one may still be on its way to the disk
                raise NonFiniteError(
                    f"step {step}: {', '.join(bad)} is not finite; nothing was saved since the last good checkpoint. "
                    "A lower learning rate, a longer warm-up, optim_wrapper.clip_grad or dtype='float32' may help"
                )

    def _check_fields(self) -> None:
        config, rows = self.config, self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        for name, valid in (("dtype", ("float32", "bfloat16", "float16")), ("remat", ("none", "full", "dots"))):
            if config[name] not in valid:
                raise ConfigError(f"config.{name}={config[name]!r}.{nearest(config[name], valid)}")
        if config.precise_bn and (config.ema or {}).get("update_buffers"):
            raise ConfigError(
                "config.ema.update_buffers averages the statistics that config.precise_bn takes anew: choose one"
            )
        if config.batch_size % (rows * config.accumulative_counts):
            raise ConfigError(
                f"config.batch_size={config.batch_size} is not divisible by {rows} (devices along data and fsdp) x "
                f"{config.accumulative_counts} (config.accumulative_counts)"
            )

    def _check_class_count(self, method: Any) -> None:
        if not method.has_logits:  # its classes are of its own making
            return
        for path, node in nnx.iter_graph(method):
            own = getattr(node, "num_classes", None) if isinstance(node, ClsHead) else None
            if own is None:
                continue
            classes: Any = self.loader.num_classes
            label: Any = self.loader.label
            for task in [after for name, after in itertools.pairwise(path) if name == "task_heads"]:
                classes, label = (part.get(task) if isinstance(part, Mapping) else None for part in (classes, label))
            several = isinstance(label, np.ndarray)  # then each has a number of its own, and none may be left over
            if isinstance(classes, int) and (own < classes or (several and own != classes)):
                place = ".".join(map(str, path))
                raise ConfigError(
                    f"The head has {own} classes, but the data set has {classes}: "
                    f"set --config.method.{place}.num_classes={classes}"
                )


class Preemption:
    """Notices SIGTERM (a cluster taking the machine back), so that the loop can save and leave between two steps.

    With several processes all agree on the step, whichever of them got the signal.
    """

    def __init__(self) -> None:
        self.received: str | None = None

    def __enter__(self) -> Preemption:
        self._distributed = jax.process_count() > 1  # there, JAX's own service listens for the signal
        if not self._distributed:
            self._previous = signal.signal(signal.SIGTERM, self._receive)
        return self

    def _receive(self, number: int, frame: Any) -> None:
        self.received = signal.Signals(number).name

    def reached(self, step: int) -> bool:
        """Whether to stop after this step."""
        if self._distributed and multihost_utils.reached_preemption_sync_point(step):
            self.received = "SIGTERM"
        return self.received is not None

    def __exit__(self, *exception: Any) -> None:
        if not self._distributed:
            signal.signal(signal.SIGTERM, self._previous)
