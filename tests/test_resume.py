"""A run that is killed, stopped, moved or tampered with: it ends as if nothing had happened, or says what did."""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from PIL import Image

from jaxpretrain import cli, main, sharding
from jaxpretrain.cli import ExpectedFailure
from jaxpretrain.config import load_config
from jaxpretrain.trainer import Trainer, train
from tests.tiny import losses, records, tiny_config, xla_flags

ROOT = Path(__file__).parents[1]
STEPS = 48  # two epochs of 23 steps and a bit

# Something of everything that a run carries from step to step: moments, averages, statistics, a teacher, noise, scores.
EVERYTHING: dict[str, Any] = dict(
    batch_size=64,
    accumulative_counts=2,
    max_steps=STEPS,
    ema=dict(momentum=0.1),
    evaluators=dict(accuracy=dict(type="Accuracy")),
    evaluation=dict(interval=6, by_epoch=False, at_start=True),
    checkpoint=dict(interval=4, by_epoch=False, max_to_keep=2, save_best="accuracy/top1"),
)
CROP = dict(type="RandomResizedCrop", scale=8, crop_ratio_range=(0.5, 1.0))


def write_recipe(path: Path, seconds: float, fields: dict[str, Any]) -> Path:
    """A recipe file: `tiny_config` with `fields`, and a loader that takes `seconds` longer for each image."""
    path.write_text(
        "from tests.tiny import tiny_config\n\n\n"
        "def get_config(name=None):\n"
        f"    config = tiny_config(**{fields!r})\n"
        f"    config.data.train.pipeline = [{CROP!r}, dict(type='tests.tiny.Slowly', seconds={seconds})]\n"
        "    return config\n"
    )
    return path


class Command:
    """`python -m jaxpretrain.main --config=RECIPE --workdir=WORKDIR ...` in a process of its own."""

    def __init__(self, recipe: Path, cache: Path):
        self.recipe, self.cache = recipe, cache

    @contextlib.contextmanager
    def start(self, workdir: Path, *overrides: str, devices: int = 1) -> Iterator[subprocess.Popen[str]]:
        """The process, leader of its own process group; all of the group is killed at the end, whatever happens."""
        env = os.environ | dict(
            PYTHONPATH=str(ROOT),
            XLA_FLAGS=xla_flags(devices),
            JAX_COMPILATION_CACHE_DIR=str(self.cache),  # not the one of other tests: a kill may leave half an entry
        )
        arguments = [f"--config={self.recipe}", f"--workdir={workdir}", *(f"--config.{item}" for item in overrides)]
        with (workdir.parent / f"{workdir.name}.log").open("w+") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "jaxpretrain.main", *arguments],
                env=env, stdout=log, stderr=log, text=True, start_new_session=True,
            )  # fmt: skip
            try:
                yield process
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def output(self, workdir: Path) -> str:
        """What the last process of this workdir has printed."""
        return (workdir.parent / f"{workdir.name}.log").read_text()

    def run(self, workdir: Path, *overrides: str, devices: int = 1) -> tuple[int, str]:
        """Runs to the end: exit code and output."""
        with self.start(workdir, *overrides, devices=devices) as process:
            code = process.wait(timeout=600)
        return code, self.output(workdir)

    def finish(self, workdir: Path, *overrides: str, devices: int = 1) -> str:
        """Runs to the end, which must be a good one: the output."""
        code, output = self.run(workdir, *overrides, devices=devices)
        assert code == 0, output
        return output

    def stop(
        self, workdir: Path, after: int, number: signal.Signals, *overrides: str, devices: int = 1, delay: float = 0.0
    ) -> tuple[int, str]:
        """Sends a signal `delay` seconds after step `after` was logged (0: after the start): exit code and output.

        SIGKILL goes to the process, as from the kernel; others to all of the group, as from a terminal or SLURM.
        """
        with self.start(workdir, *overrides, devices=devices) as process:
            deadline = time.monotonic() + 300
            while last_step(workdir) < after and process.poll() is None:
                assert time.monotonic() < deadline, self.output(workdir)
                time.sleep(0.01)
            time.sleep(delay)
            if number == signal.SIGKILL:
                process.kill()
            else:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, number)
            code = process.wait(timeout=300)
        return code, self.output(workdir)


def last_step(workdir: Path) -> int:
    """The last step in a metrics.jsonl that is being written, 0 if there is none."""
    try:
        lines = (workdir / "metrics.jsonl").read_text().split("\n")
    except FileNotFoundError:
        return 0
    return json.loads(lines[-2])["step"] if len(lines) > 1 else 0


TIMES = ("elapsed", "images_per_sec", "data_wait", "mfu")


def history(workdir: Path) -> list[dict[str, Any]]:
    """All of metrics.jsonl but what the clock says."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    seconds = [line["elapsed"] for line in lines]
    assert seconds == sorted(seconds)
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def checkpoints(workdir: Path) -> dict[str, tuple[dict[str, np.ndarray], Any]]:
    """Step -> arrays by name, and what else must not differ, of all checkpoints; read by Orbax alone."""
    found = {}
    for path in sorted((workdir / "checkpoints").iterdir()):
        handler = ocp.PyTreeCheckpointHandler()
        structure = handler.metadata(path / "state").tree
        how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), structure)
        tree = handler.restore(path / "state", args=ocp.args.PyTreeRestore(restore_args=how))
        arrays = {jax.tree_util.keystr(key): leaf for key, leaf in jax.tree_util.tree_leaves_with_path(tree)}
        meta = json.loads((path / "meta" / "metadata").read_text())["meta"]
        found[path.name] = arrays, {name: meta[name] for name in ("step", "data_state", "metrics", "best")}
    return found


def assert_same_run(one: Path, other: Path) -> None:
    """Equal histories, and equal checkpoints bit for bit."""
    assert history(one) == history(other)
    a, b = checkpoints(one), checkpoints(other)
    assert a.keys() == b.keys() and a
    for step in a:
        (arrays, rest), (others, other_rest) = a[step], b[step]
        assert rest == other_rest and arrays.keys() == others.keys() and len(arrays) > 5
        different = [name for name in arrays if arrays[name].tobytes() != others[name].tobytes()]
        assert not different, (step, different)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Command:
    return Command(write_recipe(tmp_path_factory.mktemp("recipe") / "everything.py", 5e-4, EVERYTHING), cache)


@pytest.fixture(scope="module")
def uninterrupted(command: Command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workdir of a run that nothing happened to; tests copy it before they touch it."""
    workdir = tmp_path_factory.mktemp("uninterrupted") / "run"
    command.finish(workdir)
    return workdir


@pytest.fixture
def copy(uninterrupted: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(uninterrupted, tmp_path / "copy"))


# ----------------------------------------------------------------------------------------------------------------------
# Killed and stopped


def test_the_uninterrupted_run_is_whole(uninterrupted: Path) -> None:
    assert [step for step, _ in losses(uninterrupted)] == list(range(1, STEPS + 1))
    assert [record["step"] for record in records(uninterrupted, "eval")] == list(range(0, STEPS + 1, 6))
    arrays, rest = checkpoints(uninterrupted)[str(STEPS)]
    groups = {name.split("'")[1] for name in arrays}
    assert groups == {"params", "model_state", "opt_state", "ema", "step", "rng"}
    assert rest["data_state"]["step"] == STEPS
    assert np.abs(arrays["['model_state']['teacher']"]).max() > 0


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_killed_at_random_moments(command: Command, uninterrupted: Path, tmp_path: Path) -> None:
    """SIGKILL during start-up, steps, evaluations and saves, as it comes; with accumulation, averages and a teacher."""
    seed = int(os.environ.get("RESUME_SEED", random.randrange(10**6)))
    print(f"RESUME_SEED={seed}")  # shown if the test fails, and set to repeat it
    rng = random.Random(seed)
    workdir, reached = tmp_path / "run", []
    moments = [(0, rng.uniform(0.5, 4.0))]  # while it imports, compiles, or later
    moments += [(rng.randint(first, first + 8), rng.uniform(0.0, 0.2)) for first in (1, 12, 22, 32)]
    for step, delay in moments:
        code, output = command.stop(workdir, step, signal.SIGKILL, delay=delay)
        print(f"killed {delay:.2f} s after step {step}, at step {last_step(workdir)}")
        assert code in (-signal.SIGKILL, 0), output
        reached.append(last_step(workdir))
    assert 0 < reached[1] < STEPS  # or nothing was interrupted
    command.finish(workdir)
    assert_same_run(workdir, uninterrupted)


@pytest.mark.slow
def test_sigterm_saves_and_the_same_command_goes_on(command: Command, uninterrupted: Path, tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    code, output = command.stop(workdir, 5, signal.SIGTERM)
    assert code == 1 and "Traceback" not in output
    last = output.strip().splitlines()[-1]
    step = last_step(workdir)
    assert last == (
        f"stopped: SIGTERM received: stopped after step {step} of {STEPS}, checkpoint saved; "
        "the same command continues from there"
    )
    saved = sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())
    assert 5 <= step == saved[-1] < STEPS
    output = command.finish(workdir)
    assert f"continuing from step {step} of {STEPS} in {workdir}" in output
    assert_same_run(workdir, uninterrupted)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_worker_processes(cache: Path, tmp_path: Path) -> None:
    """Images read by two worker processes; the uninterrupted run has none, so their number changes nothing either."""
    rng = np.random.default_rng(0)
    for index in range(52):
        path = tmp_path / "images" / "ab"[index % 2] / f"{index:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).save(path)
    dataset = dict(type="CustomDataset", data_root=str(tmp_path / "images"))
    fields = dict(
        # One thread each: the workers are what the loop waits for, and they get the SIGTERM too.
        data=dict(train=dict(dataset=dataset, pipeline=[], device_pipeline=[]), num_workers=2, num_threads=2),
        batch_size=8,
        max_steps=30,
        checkpoint=dict(interval=2, by_epoch=False),
    )
    command = Command(write_recipe(tmp_path / "workers.py", 1e-2, fields), cache)
    command.finish(tmp_path / "whole", "data.num_workers=0")
    workdir = tmp_path / "pieces"
    code, output = command.stop(workdir, 5, signal.SIGKILL, delay=0.1)
    assert code == -signal.SIGKILL and 5 <= last_step(workdir) < 30, output
    code, output = command.stop(workdir, 15, signal.SIGTERM)
    assert code == 1 and "Traceback" not in output and "SIGTERM received" in output, output
    assert "continuing from step" in command.finish(workdir)
    assert_same_run(workdir, tmp_path / "whole")


@pytest.mark.slow
def test_from_eight_devices_to_two(command: Command, uninterrupted: Path, tmp_path: Path) -> None:
    """Parameters sharded over eight devices, then over two: the losses of the one that has a single device."""
    workdir = tmp_path / "run"
    code, output = command.stop(workdir, 5, signal.SIGTERM, "mesh.fsdp=8", devices=8)
    assert code == 1 and "checkpoint saved" in output, output
    assert "sharding: 5 of 6 arrays" in output  # the largest is split
    output = command.finish(workdir, "mesh.fsdp=2", devices=2)
    assert "continuing from step" in output
    assert [step for step, _ in losses(workdir)] == list(range(1, STEPS + 1))
    np.testing.assert_allclose([x for _, x in losses(workdir)], [x for _, x in losses(uninterrupted)], rtol=1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# In this process: stopped by a signal that comes with a step


@pytest.fixture
def one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    make = sharding.make_mesh
    monkeypatch.setattr(
        "jaxpretrain.trainer.make_mesh",
        lambda mesh: make(mesh, jax.devices()[: math.prod(mesh[axis] for axis in sharding.AXES)]),
    )


class Observed(Trainer):
    """A trainer that keeps the batches it trains on, and gets SIGTERM during step `stop`."""

    def __init__(self, config: Any, workdir: Path, stop: int | None = None):
        super().__init__(config, workdir)
        self.batches: list[dict[str, Any]] = []
        self.stop = stop

    def compile(self, state: Any, batch: Any, phase: int = 0) -> Any:
        step = super().compile(state, batch, phase)

        def observed(state: Any, batch: Any) -> Any:
            self.batches.append(jax.device_get(batch))
            if int(jax.device_get(state["step"])) + 1 == self.stop:
                signal.raise_signal(signal.SIGTERM)
            return step(state, batch)

        return observed


def in_pieces(config: Any, workdir: Path, *stops: int) -> list[dict[str, Any]]:
    """Runs the config, stopped after each of `stops` and continued: the batches that it was trained on."""
    batches = []
    for stop in stops:
        trainer = Observed(config, workdir, stop)
        with pytest.raises(ExpectedFailure, match=f"SIGTERM received: stopped after step {stop} of"):
            trainer.fit()
        batches += trainer.batches
    trainer = Observed(config, workdir)
    trainer.fit()
    return batches + trainer.batches


def test_data_continue_where_they_were(one_device: None, tmp_path: Path) -> None:
    """Two epochs of 23 batches and 4 more, cut within and between epochs: no image is left out or seen twice."""
    config = tiny_config(batch_size=64, max_steps=50, checkpoint=dict(interval=5, by_epoch=False))
    whole = Observed(config, tmp_path / "whole")
    whole.fit()
    pieces = in_pieces(config, tmp_path / "pieces", 23, 37)
    assert len(pieces) == 50
    for epoch in range(3):
        indices = np.concatenate([b["index"] for b in pieces if (b["epoch"] == epoch).all()])
        assert len(set(indices.tolist())) == len(indices) == (64 * 23 if epoch < 2 else 64 * 4)
    for one, other in zip(pieces, whole.batches, strict=True):
        assert one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)
    assert_same_run(tmp_path / "pieces", tmp_path / "whole")


@pytest.mark.slow
def test_mocov3_and_its_teacher(one_device: None, tmp_path: Path) -> None:
    smaller = {
        "method.backbone.arch": dict(embed_dims=32, num_layers=1, num_heads=2, feedforward_channels=64),
        "method.neck.in_channels": 32,
        "batch_size": 16,
        "max_steps": 8,
        "param_scheduler": [],  # the full rate at once, so that the weights move
        "ema": dict(momentum=0.1),
        "accumulative_counts": 2,
        "evaluators": {},
        "checkpoint.interval": 8,
        "checkpoint.by_epoch": False,
        "log_interval": 1,
        "mesh.data": 1,
        "tensorboard": False,
        "transfer_guard": True,
    }
    config = load_config(str(ROOT / "configs" / "mocov3.py") + ":digits", smaller)
    train(config, tmp_path / "whole")
    in_pieces(config, tmp_path / "pieces", 3)
    shutil.rmtree(tmp_path / "pieces" / "checkpoints" / "3")  # the whole run has none of this step
    assert_same_run(tmp_path / "pieces", tmp_path / "whole")
    arrays, _ = checkpoints(tmp_path / "whole")["8"]
    for part, name in (("backbone", "0"), ("neck", "1")):  # the teacher is somewhere else than what it follows
        prefix = f"['model_state']['momentum_encoder']['module']['{name}']"
        theirs = {key.removeprefix(prefix): leaf for key, leaf in arrays.items() if key.startswith(prefix)}
        moved = [
            key
            for key, leaf in theirs.items()
            if not np.array_equal(leaf, arrays.get(f"['params']['{part}']{key}", leaf))
        ]
        assert moved, (part, list(theirs))


def test_no_checkpoints_at_all(one_device: None, tmp_path: Path) -> None:
    config = tiny_config(checkpoint=dict(interval=-1))
    with pytest.raises(ExpectedFailure, match=r"stopped after step 4 of 10, nothing saved \(interval=-1\)"):
        Observed(config, tmp_path, stop=4).fit()
    assert not list(tmp_path.rglob("checkpoints/*"))
    assert len(in_pieces(config, tmp_path)) == 10  # from the beginning
    assert not list(tmp_path.rglob("checkpoints/*")) and [step for step, _ in losses(tmp_path)] == list(range(1, 11))


@pytest.mark.parametrize(("mode", "kept"), [(None, ["3", "8", "10"]), ("min", ["5", "8", "10"])])
def test_the_best_checkpoint_is_kept(
    mode: str | None, kept: list[str], one_device: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saved every 4 steps, and whenever an evaluation is the best so far, also in between."""
    scores = {1: 0.2, 2: 0.3, 3: 0.9, 4: 0.5, 5: 0.1, 6: 0.6, 7: 0.4, 8: 0.7, 9: 0.8, 10: 0.3}
    monkeypatch.setattr(
        "jaxpretrain.trainer.run_all", lambda _, state: {"x/y": scores[int(jax.device_get(state["step"]))]}
    )
    config = tiny_config(
        evaluators=dict(x=dict(type="Accuracy")),
        evaluation=dict(interval=1, by_epoch=False),
        checkpoint=dict(interval=4, by_epoch=False, max_to_keep=2, save_best="x/y", best_mode=mode),
    )
    train(config, tmp_path)
    assert sorted(checkpoints(tmp_path), key=int) == kept
    meta = checkpoints(tmp_path)[kept[0]][1]
    assert meta["metrics"] == {"x/y": scores[int(kept[0])]} and meta["best"] == ["x/y", mode or "max"]


# ----------------------------------------------------------------------------------------------------------------------
# Refused


@pytest.fixture
def refuse(command: Command, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the command in this process, which must refuse: exit code and what it prints at the end."""
    monkeypatch.setattr("jaxpretrain.logs.setup_logging", lambda: None)

    def run(workdir: Path, *overrides: str) -> tuple[int, str]:
        items = [f"--config.{item}" for item in ("mesh.data=-1", *overrides)]
        before = sorted(workdir.rglob("*"))
        code = cli.run(main.main, [f"--config={command.recipe}", f"--workdir={workdir}", *items])
        assert code and sorted(workdir.rglob("*")) == before  # and nothing was touched
        return code, capsys.readouterr().err

    return run


def largest_file(directory: Path) -> Path:
    return max((path for path in directory.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def test_a_flipped_byte_is_refused(refuse: Any, copy: Path) -> None:
    path = largest_file(copy / "checkpoints" / str(STEPS) / "state")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    code, error = refuse(copy)
    assert code == 1 and "Traceback" not in error, error
    last = error.strip().splitlines()[-1]
    assert last.startswith(f"stopped: The checkpoint of step {STEPS} is damaged: ")
    assert "Older ones: steps" in last and "--config.checkpoint.step=44" in last


def test_a_missing_file_is_refused(refuse: Any, copy: Path) -> None:
    largest_file(copy / "checkpoints" / str(STEPS) / "state").unlink()
    code, error = refuse(copy)
    assert code == 1 and f"The checkpoint of step {STEPS} is damaged: " in error


def test_a_foreign_directory_is_refused(refuse: Any, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "epoch_300.pth").write_bytes(b"x")
    code, error = refuse(tmp_path)
    assert code == 1
    assert f"stopped: {tmp_path / 'checkpoints'} is not a directory of jaxpretrain's checkpoints" in error
    assert "epoch_300.pth; weights of PyTorch have to be converted first" in error


def test_another_config_is_refused(refuse: Any, copy: Path) -> None:
    code, error = refuse(copy, "optim_wrapper.optimizer.lr=0.02", "seed=3", "log_interval=7", "data.num_workers=3")
    assert code == 1
    differences = [line.strip() for line in error.splitlines() if " -> " in line]
    assert sorted(differences) == ["optim_wrapper.optimizer.lr: 0.01 -> 0.02", "seed: 0 -> 3"]
    assert "Start in a new --workdir" in error


def test_mistakes_in_the_command_are_refused(refuse: Any, copy: Path) -> None:
    code, error = refuse(copy, "checkpoint.max_to_kepp=1")
    assert code == 2 and "Did you mean 'max_to_keep'" in error
    code, error = refuse(copy, "checkpoint.step=45")
    assert code == 1 and "There is no checkpoint 45 in" in error


@pytest.mark.slow
def test_neutral_fields_may_change(command: Command, uninterrupted: Path, copy: Path) -> None:
    """From an older checkpoint, with other logs, evaluators, threads and workers: the same weights in the end."""
    overrides = ("checkpoint.step=44", "log_interval=2", "evaluators={}", "data.num_workers=2", "data.prefetch=1")
    output = command.finish(copy, *overrides)
    assert f"continuing from step 44 of {STEPS}" in output
    old, new = checkpoints(uninterrupted)[str(STEPS)][0], checkpoints(copy)[str(STEPS)][0]
    assert all(old[name].tobytes() == new[name].tobytes() for name in old)
    assert [record["step"] for record in records(copy, "eval")] == list(range(0, 43, 6))
    assert losses(copy) == [(step, loss) for step, loss in losses(uninterrupted) if step <= 44 or step % 2 == 0]
