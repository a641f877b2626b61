"""One program, any number of devices and processes: the same losses, sharded arrays, one set of files."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpretrain import distributed
from jaxpretrain.build import ConfigError
from jaxpretrain.config import load_config
from jaxpretrain.sharding import FSDP_MIN_SIZE, path_name
from jaxpretrain.trainer import Trainer, train
from tests.tiny import first_devices, losses, records, tiny_config

ROOT = Path(__file__).parents[1]
ONE = (1, 1, 1)
MESHES = {"data": (8, 1, 1), "fsdp": (1, 8, 1), "tensor": (2, 1, 4), "mixed": (2, 2, 2)}
INITIALISED = ("mae", MESHES["mixed"])  # this run makes its first weights itself, the others have one device's
TOLERANCE = 1e-4  # relative, on each of ten losses

ARCH = dict(embed_dims=32, num_layers=2, num_heads=4, feedforward_channels=128)
RESNET = {
    "num_stages": 2,
    "strides": (1, 2),
    "dilations": (1, 1),
    "out_indices": (1,),
    "stem_channels": 16,
    "base_channels": 16,
}
LR, CROP = "optim_wrapper.optimizer.lr", "data.train.pipeline.0.scale"
CROPS = "data.train.pipeline.0.transforms.0.0.scale"
# The digits recipes on images of 16x16 pixels, with two layers or two stages. Rates are low: the order of float sums may
# differ, and the differences must not grow to 1e-4 by what training itself makes of them within ten steps.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "resnet": (
        "configs/resnet.py:digits",
        {f"method.model.backbone.{name}": value for name, value in RESNET.items()}
        | {"method.model.head.in_channels": 32, LR: 0.01, CROP: 16},
    ),
    "mae": (
        "configs/mae.py:digits",
        {
            "method.backbone.arch": ARCH,
            "method.backbone.img_size": 16,
            "method.neck.num_patches": 16,
            "method.neck.embed_dim": 32,
            "method.neck.decoder_embed_dim": 32,
            "method.neck.decoder_depth": 1,
            LR: 1e-3,
            CROP: 16,
        },
    ),
    "simclr": (
        "configs/simclr.py:digits",
        {f"method.backbone.{name}": value for name, value in RESNET.items()}
        | {"method.neck.in_channels": 32, "method.neck.hid_channels": 64, LR: 0.01, CROPS: 16},
    ),
    "mocov3": (
        "configs/mocov3.py:digits",
        {
            "method.backbone.arch": ARCH,
            "method.backbone.img_size": 16,
            "method.neck.in_channels": 32,
            "method.neck.hid_channels": 64,
            "method.head.predictor.hid_channels": 64,
            LR: 1e-4,
            CROPS: 16,
        },
    ),
}
LOOP = {
    "batch_size": 32,
    "max_steps": 10,
    "param_scheduler": [],
    "evaluators": {},
    "checkpoint.interval": -1,
    "log_interval": 1,
    "tensorboard": False,
    "transfer_guard": True,
}


@dataclass
class Run:
    """What a run of ten steps leaves: its losses, first and last state, and the last batch's loss with the first weights."""

    losses: np.ndarray
    first: Any
    state: Any
    untrained: float


def small_config(method: str, mesh: tuple[int, int, int], **overrides: Any) -> Any:
    recipe, shrink = METHODS[method]
    sizes = dict(zip(("mesh.data", "mesh.fsdp", "mesh.tensor"), mesh, strict=True))
    return load_config(recipe, shrink | LOOP | sizes | overrides)


def fit(config: Any, workdir: Path, first: Any = None) -> Run:
    """Trains with the trainer's own loop, looking over its shoulder at each step; from the state `first` if given."""
    with first_devices():
        trainer = Trainer(config, workdir)
    if first is not None:  # to compile the initialisation for every mesh takes as long as the step itself
        trainer._restore_or_init = lambda: (jax.device_put(first, trainer.shardings, may_alias=False), 0)
    seen: dict[str, Any] = {}
    compile_step = trainer.compile

    def watched(state: Any, batch: Any, phase: int) -> Any:
        step = compile_step(state, batch, phase)
        seen["first"] = jax.tree.map(jnp.copy, state)

        def call(state: Any, batch: Any) -> Any:
            at = jnp.copy(state["step"])
            seen["state"], metrics = step(state, batch)
            seen["last"] = (at, batch)
            return seen["state"], metrics

        seen["step"] = step
        return call

    with mock.patch.object(trainer, "compile", watched):
        trainer.fit()
    at, batch = seen["last"]
    first = jax.tree.map(np.array, seen["first"])
    untrained = seen["step"](dict(seen["first"], step=at), batch)[1]["loss"]
    return Run(np.array([loss for _, loss in losses(workdir)]), first, seen["state"], float(untrained))


@dataclass
class Runs:
    """Runs each config once."""

    root: Path
    done: dict[str, Run] = field(default_factory=dict)

    def __call__(self, method: str, mesh: tuple[int, int, int], **overrides: Any) -> Run:
        name = re.sub(r"\W+", "-", f"{method}-{mesh}-{overrides}")
        if name not in self.done:
            first = None if (method, mesh) in ((method, ONE), INITIALISED) else self(method, ONE).first
            self.done[name] = fit(small_config(method, mesh, **overrides), self.root / name, first)
        return self.done[name]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs without most of XLA's optimizations: they compile twice as fast, and are partitioned all the same."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield Runs(tmp_path_factory.mktemp("runs"))
    jax.config.update("jax_disable_most_optimizations", False)


def assert_same_losses(ours: Run, single: Run, tolerance: float = TOLERANCE) -> None:
    deviation = np.abs(ours.losses / single.losses - 1).max()
    print(f"largest relative deviation {deviation:.2e}, of losses {single.losses[0]:.4f} ... {single.losses[-1]:.4f}")
    assert len(ours.losses) == len(single.losses) == 10
    assert deviation < tolerance


# ----------------------------------------------------------------------------------------------------------------------
# Meshes


# One method on every mesh, the others on the one that has all axes; test_method_contract.py has all methods.
@pytest.mark.parametrize(
    ("method", "mesh"), [(m, mesh) for m in METHODS for mesh in MESHES if mesh == "mixed" or m == "mae"]
)
def test_the_mesh_does_not_change_the_losses(run, method, mesh):
    single, ours = run(method, ONE), run(method, MESHES[mesh])
    assert abs(single.losses[-1] / single.untrained - 1) > 50 * TOLERANCE, "weights that stand still prove nothing"
    assert_same_losses(ours, single)
    assert_split(ours.state, *MESHES[mesh])


def assert_split(state: Any, data: int, fsdp: int, tensor: int) -> None:
    """Every large array of parameters and optimizer state has its share, and no more, on each device."""
    leaves = jax.tree_util.tree_leaves_with_path({name: state[name] for name in ("params", "opt_state")})
    shares = {path_name(path): leaf.size // leaf.addressable_shards[0].data.size for path, leaf in leaves}
    sizes = {path_name(path): leaf.size for path, leaf in leaves}
    if fsdp > 1:
        large = [name for name, size in sizes.items() if size >= FSDP_MIN_SIZE]
        assert any("opt_state" in name for name in large) and any("params" in name for name in large)
        assert all(shares[name] >= fsdp for name in large)
        assert sum(size / shares[name] for name, size in sizes.items()) < 1.5 * sum(sizes.values()) / fsdp
    matrices = [name for name in sizes if re.search(r"(qkv|proj|ffn/fc1|ffn/fc2)/kernel$", name)]
    assert all(shares[name] == fsdp * tensor for name in matrices)
    if fsdp == tensor == 1:
        assert set(shares.values()) == {1}


def test_tensor_parallel_layers_split_columns_then_rows(run):
    """So that what lies between the two matrices of a block stays where it is."""
    layer = run("mae", MESHES["tensor"]).state["params"]["backbone"]["layers"][0]
    shapes = {name: layer[part][name]["kernel"].addressable_shards[0].data.shape
              for part, name in (("attn", "qkv"), ("attn", "proj"), ("ffn", "fc1"), ("ffn", "fc2"))}  # fmt: skip
    assert shapes == dict(qkv=(32, 24), proj=(8, 32), fc1=(32, 32), fc2=(32, 32))
    assert layer["ffn"]["fc1"]["bias"].addressable_shards[0].data.shape == (32,)


@pytest.mark.parametrize("mesh", ["data", "mixed"])
def test_groups_of_batch_norm_are_the_same_rows_on_any_mesh(run, mesh):
    """Groups of 8 rows: on 8 devices each group spans two of them."""
    grouped = {"method.model.backbone.norm_cfg": dict(type="BN", groups=4)}
    single = run("resnet", ONE, **grouped)
    effect = np.abs(single.losses / run("resnet", ONE).losses - 1).max()
    assert effect > TOLERANCE, "groups change nothing"
    assert_same_losses(run("resnet", MESHES[mesh], **grouped), single, tolerance=effect / 50)


def test_accumulation_on_a_mesh_equals_accumulation_on_one_device(run):
    halves = {"accumulative_counts": 2}
    assert_same_losses(run("mae", MESHES["mixed"], **halves), run("mae", ONE, **halves))


def test_bfloat16_on_a_mesh_stays_finite_and_near_float32(run):
    half = run("mae", MESHES["mixed"], dtype="bfloat16")
    assert np.isfinite(half.losses).all()
    np.testing.assert_allclose(half.losses, run("mae", ONE).losses, rtol=0.02)  # eight bits of mantissa
    assert {leaf.dtype for leaf in jax.tree.leaves(half.state["params"])} == {np.dtype("float32")}


def test_the_trainer_tells_what_stays_whole(tmp_path, caplog):
    with caplog.at_level("INFO", "jaxpretrain"):
        Trainer(tiny_config(mesh=dict(data=1, fsdp=8)), tmp_path)
    assert re.search(r"sharding: \d+ of 6 arrays .* stay whole on every device; the largest: ", caplog.text)


# ----------------------------------------------------------------------------------------------------------------------
# Processes

TWO = {
    "max_steps": 8,
    "batch_size": 32,
    "log_interval": 1,
    "param_scheduler": [],
    "method": {"type": "tests.tiny.TinyMethod"},  # instead of a MAE, for it compiles at once
    "data.train.pipeline.0.scale": 8,
    "data.val.pipeline.0.scale": (8, 8),
    "evaluation.at_start": False,
    "evaluation.by_epoch": False,
    "evaluation.interval": 4,
    "checkpoint.by_epoch": False,
    "checkpoint.interval": 4,
    "evaluators": {"knn": {"type": "KNN"}, "accuracy": {"type": "Accuracy"}},
}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def documented_command(workdir: Path, overrides: dict[str, Any], log: Path) -> list[str]:
    """The command of docs/distributed.md that starts two processes on CPU, made short by flags; each writes to a log."""
    text = (ROOT / "docs" / "distributed.md").read_text()
    (command,) = re.findall(r"```bash\n(for i in 0 1; do\n.*?)```", text, re.DOTALL)
    flags = " ".join(f'"--config.{name}={value}"' for name, value in overrides.items())
    for old, new in (
        ("--workdir=runs/two-processes", f"--workdir={workdir} {flags} > {log}$i 2>&1"),
        (":12345", f":{free_port()}"),
        ("  python ", f"  exec {sys.executable} "),  # exec: a signal reaches the process itself
    ):
        assert command.count(old) == 1
        command = command.replace(old, new)
    return ["bash", "-c", command]


@dataclass
class Two:
    """Two processes of one run, two devices each."""

    workdir: Path
    overrides: dict[str, Any]

    def __enter__(self) -> Two:
        self.log = self.workdir.with_name(self.workdir.name + "-log")
        env = dict(
            os.environ,
            XLA_FLAGS="--xla_force_host_platform_device_count=2",
            JAX_DISABLE_MOST_OPTIMIZATIONS="1",  # they compile faster
            PYTHONPATH=str(ROOT),
        )
        command = documented_command(self.workdir, self.overrides, self.log)
        self.shell = subprocess.Popen(command, cwd=ROOT, env=env, start_new_session=True)
        return self

    def __exit__(self, *exception: Any) -> None:
        if self.shell.poll() is None:
            os.killpg(self.shell.pid, signal.SIGKILL)
            self.shell.wait()

    def children(self) -> list[int]:
        return [int(pid) for pid in subprocess.check_output(["pgrep", "-P", str(self.shell.pid)], text=True).split()]

    def logs(self) -> list[str]:
        return [Path(f"{self.log}{i}").read_text() for i in range(2)]

    def wait(self, timeout: float = 300) -> list[str]:
        """Until both have ended; what they wrote."""
        try:
            self.shell.wait(timeout)
        except subprocess.TimeoutExpired:
            pytest.fail("still running:\n" + "\n".join(self.logs()))
        return self.logs()


def config_of(overrides: dict[str, Any], **more: Any) -> Any:
    return load_config("configs/mae.py:digits", overrides | more)


def steps_saved(workdir: Path) -> list[int]:
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


@pytest.mark.slow
def test_two_processes_are_one_run(tmp_path):
    """FSDP over both processes: parameters, checkpoints and evaluation need them both."""
    both, alone = tmp_path / "both", tmp_path / "alone"
    mesh = {"mesh.data": 1, "mesh.fsdp": 4}
    with Two(both, TWO | mesh) as processes:
        logs = processes.wait()
    assert "process 0 of 2, 2 of 4 devices" in logs[0], logs
    assert "report: " in logs[0] and "step" not in logs[1], logs
    with first_devices():
        scores = train(config_of(TWO, **{"mesh.data": 1}), alone)
    assert [step for step, _ in losses(both)] == list(range(1, 9))
    np.testing.assert_allclose([v for _, v in losses(both)], [v for _, v in losses(alone)], rtol=TOLERANCE)
    evaluations = records(both, "eval")
    assert [record["step"] for record in evaluations] == [4, 8]
    # One of the 297 test images more or less: a tie may fall the other way.
    assert {name: evaluations[-1][name] for name in scores} == pytest.approx(scores, abs=0.5)
    assert scores["accuracy/top1"] > 0 and scores["knn/top1"] > 0
    assert steps_saved(both) == [4, 8]
    assert len(list((both / "tensorboard").iterdir())) == 1

    # One process goes on from what two have saved, with another mesh.
    shutil.rmtree(both / "checkpoints" / "8")
    train(config_of(TWO, **{"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}), both)
    assert [step for step, _ in losses(both)] == list(range(1, 9))
    np.testing.assert_allclose([v for _, v in losses(both)], [v for _, v in losses(alone)], rtol=TOLERANCE)
    assert steps_saved(both) == [4, 8]


@pytest.mark.slow
@pytest.mark.parametrize("told", [(0, 1), (1,)], ids=["both", "one of them"])
def test_preemption_saves_and_ends_both_processes(tmp_path, told):
    workdir = tmp_path / "run"
    overrides = TWO | {"max_steps": 100_000, "evaluators": {}, "checkpoint.interval": 100_000}
    with Two(workdir, overrides) as processes:
        deadline = time.monotonic() + 240
        while not (workdir / "metrics.jsonl").exists() or len(losses(workdir)) < 3:
            assert time.monotonic() < deadline and processes.shell.poll() is None, processes.logs()
            time.sleep(0.5)
        children = processes.children()
        for i in told:
            os.kill(children[i], signal.SIGTERM)
        logs = processes.wait()
    (step,) = steps_saved(workdir)
    message = rf"stopped: SIGTERM received: stopped after step {step} of 100000, checkpoint saved; the same command"
    for log in logs:
        assert re.search(message, log) and "Traceback" not in log, log
    assert losses(workdir)[-1][0] == step


# ----------------------------------------------------------------------------------------------------------------------
# Joining

SLURM = dict(
    SLURM_JOB_ID="7", SLURM_STEP_NODELIST="n[1-4]", SLURM_NTASKS="4", SLURM_PROCID="1", SLURM_LOCALID="0",
    SLURM_STEP_NUM_NODES="4",
)  # fmt: skip
ADDRESS = dict(JAX_COORDINATOR_ADDRESS="host0:12345", JAX_NUM_PROCESSES="4")


@pytest.fixture
def joined(monkeypatch):
    """initialize() under given variables -> the arguments of `jax.distributed.initialize`, None if it is not called."""
    for name in os.environ:
        if name.startswith(("SLURM_", "JAX_COORDINATOR", "JAX_NUM_PROC", "JAX_PROCESS", "JOB_COMPLETION")):
            monkeypatch.delenv(name)

    def call(**variables: str) -> tuple[tuple, dict] | None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        with mock.patch("jax.distributed.initialize") as initialize:
            distributed.initialize()
        return initialize.call_args and (initialize.call_args.args, initialize.call_args.kwargs)

    return call


def test_one_process_joins_nothing(joined):
    assert joined() is None


def test_slurm_needs_no_variables_of_ours(joined):
    """One task on each node: it drives all devices there. JAX alone would take the first only."""
    assert joined(**SLURM) == ((), dict(local_device_ids=[]))


def test_slurm_with_a_task_for_each_device(joined):
    assert joined(**SLURM | dict(SLURM_STEP_NUM_NODES="1", SLURM_LOCALID="1")) == ((), dict(local_device_ids=None))


def test_one_task_of_slurm_is_one_process(joined):
    assert joined(**SLURM | dict(SLURM_NTASKS="1")) is None


@pytest.mark.parametrize("index", ["JAX_PROCESS_ID", "JOB_COMPLETION_INDEX"])
def test_address_and_index_join(joined, index):
    args, _ = joined(**ADDRESS, **{index: "3"})
    assert args == ("host0:12345", 4, 3)


def test_kubernetes_numbers_pods_of_other_jobs_too(joined):
    assert joined(JOB_COMPLETION_INDEX="3") is None


@pytest.mark.parametrize(
    "variables",
    [
        ADDRESS,
        dict(JAX_COORDINATOR_ADDRESS="host0:12345", JAX_PROCESS_ID="0"),
        dict(JAX_NUM_PROCESSES="4", JAX_PROCESS_ID="0"),
        ADDRESS | dict(JAX_PROCESS_ID="first"),
        ADDRESS | dict(JAX_PROCESS_ID="4"),
    ],
)
def test_variables_that_do_not_fit_together_are_refused(joined, variables):
    with pytest.raises(ConfigError, match="JAX_COORDINATOR_ADDRESS"):
        joined(**variables)
