"""The metrics record and where it goes: file, progress line, TensorBoard, W&B; and the clock."""

from __future__ import annotations

import io
import json
import logging
import os
import struct
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import masked_crc32c

from jaxpretrain import logs
from jaxpretrain.build import ConfigError
from jaxpretrain.logs import Clock, MetricLogger, setup_logging

CONFIG = ConfigDict(dict(max_epochs=4, max_steps=None, peak_flops=1e12, tensorboard=False, wandb=None))


def make_logger(workdir: Path, resume_step: int = 0, **changes: Any) -> MetricLogger:
    return MetricLogger(workdir, 100, 8, ConfigDict({**CONFIG.to_dict(), **changes}), resume_step)


def records(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def frozen_clock(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A clock that moves when it is told."""
    now = types.SimpleNamespace(seconds=1000.0)
    monkeypatch.setattr(logs.time, "perf_counter", lambda: now.seconds)
    return now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


# ----------------------------------------------------------------------------------------------------------------------
# Records


def test_records(tmp_path: Path, frozen_clock: Any) -> None:
    with make_logger(tmp_path) as log:
        log.set_flops(8 * 10**9)
        frozen_clock.seconds += 2.0
        log.write(10, dict(loss=jnp.float32(0.1), lr=1e-3), data_wait=0.5)
        with log.clock.pause():
            frozen_clock.seconds += 60.0
            log.evaluation(10, {"knn/top1": np.float32(0.7), "knn/top5": 1})
        frozen_clock.seconds += 1.0
        log.write(20, dict(loss=np.float64(1) / 3, lr=1e-3), data_wait=0.6)
    first, score, second = records(tmp_path)
    speed = dict(images_per_sec=40.0, data_wait=0.25, mfu=8e9 * 5 / (1e12 * 8))  # the tests have 8 devices
    common = dict(step=10, epoch=0.4, phase="train", elapsed=2.0)
    assert first == {**common, "loss": float(np.float32(0.1)), "lr": 1e-3, **speed}
    assert score == {
        "step": 10,
        "epoch": 0.4,
        "phase": "eval",
        "elapsed": 2.0,
        "knn/top1": float(np.float32(0.7)),
        "knn/top5": 1,
    }
    assert second["elapsed"] == 3.0 and second["images_per_sec"] == 80.0
    assert second["data_wait"] == pytest.approx(0.1) and second["mfu"] == pytest.approx(0.01)
    assert list(first)[:5] == ["step", "epoch", "phase", "elapsed", "loss"]


def test_numbers_keep_every_bit(tmp_path: Path) -> None:
    values = (
        np.random.default_rng(0).standard_normal(200).astype(np.float32) * 10.0 ** np.arange(-30, 30).repeat(4)[:200]
    )
    values = values.astype(np.float32)
    with make_logger(tmp_path) as log:
        for step, value in enumerate(values, 1):
            log.write(step, dict(loss=jnp.asarray(value)))
    read = np.array([record["loss"] for record in records(tmp_path)], np.float32)
    assert read.tobytes() == values.tobytes()


def test_what_is_not_finite_becomes_null(tmp_path: Path) -> None:
    with make_logger(tmp_path) as log:
        log.write(1, dict(loss=float("nan"), norm=jnp.inf))
        log.evaluation(1, {"knn/top1": float("nan")})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert records(tmp_path)[0]["loss"] is None and records(tmp_path)[1]["knn/top1"] is None


def test_mfu_needs_a_peak(tmp_path: Path, frozen_clock: Any) -> None:
    with make_logger(tmp_path, peak_flops=None) as log:  # a CPU is not in the table
        log.set_flops(10**9)
        frozen_clock.seconds += 1
        log.write(1, dict(loss=1.0))
    assert records(tmp_path)[0]["mfu"] is None


@pytest.mark.parametrize(("changes", "epoch"), [({}, 0.4), (dict(max_steps=100), None)])
def test_epoch(tmp_path: Path, changes: dict, epoch: float | None) -> None:
    with make_logger(tmp_path, **changes) as log:
        log.write(10, dict(loss=1.0))
    assert records(tmp_path)[0]["epoch"] == epoch
    with MetricLogger(tmp_path, 100, 8, CONFIG, steps_per_epoch=20) as log:
        log.write(10, dict(loss=1.0))
    assert records(tmp_path)[0]["epoch"] == 0.5


# ----------------------------------------------------------------------------------------------------------------------
# Going on


def test_resuming_drops_later_records(tmp_path: Path) -> None:
    with make_logger(tmp_path) as log:
        for step in (10, 20, 30, 40):
            log.write(step, dict(loss=float(step)))
        log.evaluation(20, {"knn/top1": 0.2})
        log.evaluation(40, {"knn/top1": 0.4})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 50, "lo')  # killed while writing
    with make_logger(tmp_path, resume_step=20) as log:
        log.write(30, dict(loss=-30.0))
        log.evaluation(40, {"knn/top1": -0.4})
    assert [(r["step"], r["phase"], r.get("loss", r.get("knn/top1"))) for r in records(tmp_path)] == [
        (10, "train", 10.0),
        (20, "train", 20.0),
        (20, "eval", 0.2),
        (30, "train", -30.0),
        (40, "eval", -0.4),
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_starting_again_without_a_checkpoint_starts_anew(tmp_path: Path) -> None:
    with make_logger(tmp_path) as log:
        log.evaluation(0, {"knn/top1": 0.1})
        log.write(10, dict(loss=1.0))
    with make_logger(tmp_path) as log:
        log.evaluation(0, {"knn/top1": 0.1})
    assert [record["step"] for record in records(tmp_path)] == [0]


@pytest.mark.parametrize(
    "tail", ['{"step": 20, "loss"', '{"step": 20, "loss": 1.0}', '{"st\\ufffd', "null\n", "\x00\x00"]
)
def test_a_torn_last_line(tmp_path: Path, tail: str) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 10, "phase": "train"}\n' + tail)
    with make_logger(tmp_path, resume_step=20) as log:
        log.write(30, dict(loss=1.0))
    whole = tail.endswith("}")  # all of it but the end of the line
    assert [record["step"] for record in records(tmp_path)] == ([10, 20, 30] if whole else [10, 30])


def test_killed_while_rewriting_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with make_logger(tmp_path) as log:
        log.write(10, dict(loss=1.0))
        log.write(20, dict(loss=2.0))
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(logs.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        make_logger(tmp_path, resume_step=10)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_each_record_is_in_the_file_at_once(tmp_path: Path) -> None:
    """So that a SIGKILL right after it loses nothing."""
    program = """
import os, signal, sys
from ml_collections import ConfigDict
from jaxpretrain.logs import MetricLogger
log = MetricLogger(sys.argv[1], 10, 1, ConfigDict(dict(max_epochs=1)))
for step in range(1, 4):
    log.write(step, dict(loss=1.0))
os.kill(os.getpid(), signal.SIGKILL)
"""
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], env=env, check=False, capture_output=True)
    assert [record["step"] for record in records(tmp_path)] == [1, 2, 3]
    assert [value for _, _, value in scalars(tmp_path, "train/loss")] == [1.0] * 3


# ----------------------------------------------------------------------------------------------------------------------
# TensorBoard


def events(workdir: Path) -> list[Event]:
    """All events, file after file; each is framed as length (8 bytes), checksum (4), event, checksum (4)."""
    found = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            assert struct.unpack("<I", data[8:12])[0] == masked_crc32c(data[:8])
            assert struct.unpack("<I", data[12 + length : 16 + length])[0] == masked_crc32c(data[12 : 12 + length])
            found.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return found


def scalars(workdir: Path, tag: str) -> list[tuple[int, str, float]]:
    return [(e.step, v.tag, v.simple_value) for e in events(workdir) for v in e.summary.value if v.tag == tag]


def test_tensorboard(tmp_path: Path) -> None:
    for resume_step in (0, 20):
        with make_logger(tmp_path, resume_step, tensorboard=True) as log:
            for step in range(resume_step + 10, 41, 10):
                log.write(step, dict(loss=float(step)))
            log.evaluation(40, {"knn/top1": 0.5, "knn/nan": float("nan")})
    assert [step for step, _, _ in scalars(tmp_path, "train/loss")] == [10, 20, 30, 40, 30, 40]
    assert scalars(tmp_path, "eval/knn/top1") == [(40, "eval/knn/top1", 0.5)] * 2
    assert not scalars(tmp_path, "eval/knn/nan") and not scalars(tmp_path, "train/phase")
    purges = [event.step for event in events(tmp_path) if event.session_log.status == SessionLog.START]
    assert purges == [21]  # TensorBoard hides what the first file has from there on
    with make_logger(tmp_path, 0, tensorboard=True) as log:
        log.write(10, dict(loss=10.0))
    assert len(scalars(tmp_path, "train/loss")) == 1


# ----------------------------------------------------------------------------------------------------------------------
# Weights & Biases


def test_wandb_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"pip install jaxpretrain\[wandb\]"):
        make_logger(tmp_path, wandb=dict(project="p"))
    make_logger(tmp_path).close()


def test_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[dict] = []
    logged: list[dict] = []
    run = types.SimpleNamespace(log=logged.append, define_metric=lambda *a, **k: None, finish=lambda: logged.append({}))
    fake = types.SimpleNamespace(init=lambda **options: started.append(options) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for resume_step in (0, 10):
        with make_logger(tmp_path, resume_step, wandb=dict(project="digits", name="x")) as log:
            log.write(resume_step + 10, dict(loss=0.5))
    first, second = started
    assert first["project"] == "digits" and first["name"] == "x" and first["config"]["max_epochs"] == 4
    assert first["id"] == second["id"] and second["resume"] == "allow"
    assert logged[0]["step"] == 10 and logged[0]["train/loss"] == 0.5 and logged[1] == {}


def test_nothing_heavy_is_imported() -> None:
    program = (
        "import sys, jaxpretrain.logs; print([m for m in ('wandb', 'tensorboardX', 'tensorflow') if m in sys.modules])"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    output = subprocess.run([sys.executable, "-c", program], env=env, check=True, capture_output=True, text=True)
    assert output.stdout == "[]\n"


# ----------------------------------------------------------------------------------------------------------------------
# The console


def test_plain_lines(tmp_path: Path, capsys: pytest.CaptureFixture, frozen_clock: Any) -> None:
    with make_logger(tmp_path) as log:
        log.set_flops(10**10)
        frozen_clock.seconds += 4.0
        log.write(10, dict(loss=0.42134567, lr=1.5e-5, other=1.0), data_wait=0.1)
        log.evaluation(10, {"knn/top1": 0.912345})
    assert capsys.readouterr().err == (
        "step  10/100  loss 0.4213  lr 1.5e-05  20 images/s  data-wait 2%  MFU 0.3%  ETA 0:00:36\n"
        "eval at step 10:  knn/top1 0.9123\n"
    )


def test_line_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, frozen_clock: Any) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "70")
    with make_logger(tmp_path) as log:
        for step in (25, 50):
            frozen_clock.seconds += 1
            log.write(step, dict(loss=1.0, lr=0.1))
        log.evaluation(50, {"a": 1.0})
        log.write(75, dict(loss=1.0, lr=0.1))
    lines = terminal.getvalue().split("\r\x1b[K")[1:]
    assert lines[0].startswith("step  25/100  [####------------]  loss 1  lr 0.1  200 images/s")
    assert len(lines) == 4 and all(len(line.rstrip("\n")) <= 69 for line in lines)
    assert [line.endswith("\n") for line in lines] == [
        False,
        False,
        True,
        True,
    ]  # rewritten, until there is a last word


def test_console_messages(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])  # a command that ran in this process has left its own
    setup_logging()
    setup_logging()
    (console,) = root.handlers
    stream = Terminal()
    console.stream = stream  # type: ignore[attr-defined]
    logging.getLogger("jaxpretrain").info("hello %d", 7)
    logging.getLogger("jaxpretrain").warning("careful")
    logging.getLogger("absl").info("chatter")
    logging.getLogger("somebody").warning("theirs")
    orbax = logging.LogRecord("absl", logging.ERROR, "/x/orbax/checkpoint/y.py", 1, "trace", (), None)
    root.handle(orbax)
    written = stream.getvalue().split("\r\x1b[K")[1:]
    assert [line[9:] for line in written] == ["hello 7\n", "warning: careful\n", "warning: theirs\n"]
    assert time.strptime(written[0][:8], "%H:%M:%S")


# ----------------------------------------------------------------------------------------------------------------------
# The clock


def test_clock(frozen_clock: Any) -> None:
    clock = Clock()
    frozen_clock.seconds += 5
    assert clock.seconds == 0 and not clock.running
    with clock.pause():
        frozen_clock.seconds += 5
    assert clock.seconds == 0 and not clock.running
    clock.start()
    frozen_clock.seconds += 2
    clock.start()
    with clock.pause():
        frozen_clock.seconds += 10
        with clock.pause():
            frozen_clock.seconds += 10
        frozen_clock.seconds += 10
        assert clock.seconds == 2
        state = json.loads(json.dumps(clock.state_dict()))
    frozen_clock.seconds += 1
    assert clock.seconds == 3
    resumed = Clock()
    resumed.load_state_dict(state)
    frozen_clock.seconds += 50
    resumed.start()
    frozen_clock.seconds += 4
    assert resumed.seconds == 6
    resumed.load_state_dict(state)
    assert resumed.seconds == 2 and resumed.running


def test_clock_goes_on_after_an_error_in_a_pause(frozen_clock: Any) -> None:
    clock = Clock()
    clock.start()
    with pytest.raises(ValueError, match="x"), clock.pause():
        raise ValueError("x")
    frozen_clock.seconds += 1
    assert clock.seconds == 1


def test_speed_after_resuming_counts_only_this_process(tmp_path: Path, frozen_clock: Any) -> None:
    clock = Clock()
    clock.load_state_dict(dict(seconds=500.0))
    with MetricLogger(tmp_path, 100, 8, CONFIG, 50, clock=clock) as log:
        frozen_clock.seconds += 1
        log.write(60, dict(loss=1.0))
    assert records(tmp_path)[0]["elapsed"] == 501.0 and records(tmp_path)[0]["images_per_sec"] == 80.0


def test_only_the_first_process_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(logs.jax, "process_index", lambda: 1)
    with make_logger(tmp_path, tensorboard=True, wandb=dict(project="p")) as log:
        log.write(10, dict(loss=1.0))
        log.evaluation(10, {"knn/top1": 1.0})
        assert log.clock.running
    assert not list(tmp_path.iterdir()) and not capsys.readouterr().err
