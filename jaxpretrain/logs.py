"""What a run tells: one record of metrics goes to a progress line, metrics.jsonl, TensorBoard and Weights & Biases."""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import math
import os
import shutil
import socket
import struct
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import jax

from jaxpretrain import flops
from jaxpretrain.build import ConfigError
from jaxpretrain.config import to_plain

logger = logging.getLogger("jaxpretrain")

_CLEAR = "\r\x1b[K"  # back to the start of the line, and erase it


# ----------------------------------------------------------------------------------------------------------------------
# The console


class _Console(logging.StreamHandler):
    """Time and message on standard error; warnings say so. Takes the place of a progress line that is being shown."""

    def __init__(self) -> None:
        super().__init__()
        self.addFilter(_worth_reading)

    def format(self, record: logging.LogRecord) -> str:
        level = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        text = f"{time.strftime('%H:%M:%S', time.localtime(record.created))} {level}{record.getMessage()}"
        if record.exc_info:
            text += "\n" + logging.Formatter().formatException(record.exc_info)
        return _CLEAR + text if self.stream.isatty() else text


def _worth_reading(record: logging.LogRecord) -> bool:
    # Failures inside Orbax reach the user as a CheckpointError, which says what to do.
    orbax = f"{os.sep}orbax{os.sep}" in record.pathname or record.name == "asyncio"
    if orbax and record.levelno < logging.CRITICAL:
        return False
    several = record.levelno < logging.WARNING and jax.distributed.is_initialized()
    return not (several and jax.process_index() > 0)


def setup_logging(level: int = logging.INFO) -> None:
    """Sends messages of this library (from `level`) and warnings of others to standard error, in a readable form.

    Of several processes, only the first tells more than warnings. Calling it again changes nothing but the level.
    """
    root = logging.getLogger()
    if not any(isinstance(handler, _Console) for handler in root.handlers):
        root.addHandler(_Console())
    logger.setLevel(level)
    for other in ("absl", "jax", "orbax"):
        logging.getLogger(other).setLevel(logging.WARNING)


def _duration(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds)))


def _number(value: float) -> str:
    """Four significant digits, and no more characters than needed: 0.4213, 1.5e-05, 12."""
    return f"{value:.4g}"


class _Progress:
    """One line on standard error: rewritten in place on a terminal, else a new line each time."""

    def __init__(self, total_steps: int, stream: TextIO | None = None) -> None:
        self.total_steps, self.stream = total_steps, stream or sys.stderr
        self.in_place = self.stream.isatty()
        self._shown = False

    def show(self, record: Mapping[str, Any], eta: float | None) -> None:
        step, total = record["step"], self.total_steps
        parts = [f"step {step:{len(str(total))}d}/{total}"]
        if self.in_place:
            done = round(16 * step / total)
            parts.append("[" + "#" * done + "-" * (16 - done) + "]")
        parts += [f"{key} {_number(record[key])}" for key in ("loss", "lr") if record.get(key) is not None]
        parts.append(f"{record['images_per_sec']:,.0f} images/s")
        parts.append(f"data-wait {record['data_wait']:.0%}")
        if record["mfu"] is not None:
            parts.append(f"MFU {record['mfu']:.1%}")
        if eta is not None:
            parts.append(f"ETA {_duration(eta)}")
        line = "  ".join(parts)
        if self.in_place:
            line = _CLEAR + line[: shutil.get_terminal_size().columns - 1]
        self.stream.write(line if self.in_place else line + "\n")
        self.stream.flush()
        self._shown = True

    def message(self, text: str) -> None:
        self.stream.write(f"{_CLEAR if self.in_place else ''}{text}\n")
        self.stream.flush()
        self._shown = False

    def close(self) -> None:
        if self.in_place and self._shown:
            self.stream.write("\n")
            self.stream.flush()


# ----------------------------------------------------------------------------------------------------------------------
# The clock


class Clock:
    """Seconds of training, over all the processes that a run was cut into; stands still while paused.

    Starts standing; `start` sets it going.
    """

    def __init__(self) -> None:
        self._before = 0.0  # what was counted up to `_since`
        self._since: float | None = None  # None: standing
        self._pauses = 0

    def start(self) -> None:
        """Sets the clock going, unless it is going already."""
        if self._since is None and not self._pauses:
            self._since = time.perf_counter()

    @property
    def running(self) -> bool:
        return self._since is not None

    @property
    def seconds(self) -> float:
        """Seconds counted so far."""
        return self._before + (0.0 if self._since is None else time.perf_counter() - self._since)

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Stops the clock for evaluation, checkpoints, compilation; pauses may be nested. A standing clock stays so."""
        was_running, self._before, self._since = self.running, self.seconds, None
        self._pauses += 1
        try:
            yield
        finally:
            self._pauses -= 1
            if was_running:
                self._since = time.perf_counter()

    def state_dict(self) -> dict[str, float]:
        """For the checkpoint: seconds counted."""
        return dict(seconds=self.seconds)

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Goes on from what `state_dict` gave, going or standing as it is."""
        self._before = float(state["seconds"])
        if self.running:
            self._since = time.perf_counter()


# ----------------------------------------------------------------------------------------------------------------------
# The logger


class MetricLogger:
    """Writes records of metrics to standard error, `workdir/metrics.jsonl`, TensorBoard and Weights & Biases.

    Each record is one JSON object in metrics.jsonl: `step` (completed steps), `epoch` (fractional), `phase` ('train', 'eval', or
    'clusters': what a method did before this step, that begins an epoch), `elapsed` (seconds of training), the metrics
    themselves, and in training `images_per_sec`, `data_wait` (the fraction of time since the last record that the loop waited
    for data) and `mfu` (model FLOPs utilisation, null where the device's peak is unknown). Numbers have all their digits; NaN
    and infinities become null.

    Going on from `resume_step`, records of later steps are removed: those steps will be logged anew. So the file holds each
    step once, however often the run was killed.

    Args:
        workdir: of the run; created if missing.
        total_steps: of the whole run.
        batch_size: images per step, of all devices together.
        config: reads `tensorboard` (bool), `wandb` (None or arguments of wandb.init), `peak_flops` (of one device; None looks
            it up), and without `steps_per_epoch` also `max_epochs`; is passed to wandb whole.
        resume_step: the step that the run goes on from; 0 starts the files anew.
        clock: of the run. It is started if it stands, so make the logger right before the loop.
        steps_per_epoch: None derives it from `total_steps` and `max_epochs`.

    Only the first of several processes writes. Raises ConfigError if wandb is asked for, but not installed.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        total_steps: int,
        batch_size: int,
        config: Any,
        resume_step: int = 0,
        *,
        clock: Clock | None = None,
        steps_per_epoch: float | None = None,
    ) -> None:
        self.workdir, self.total_steps, self.batch_size = Path(workdir), total_steps, batch_size
        max_epochs = config.get("max_epochs") if not config.get("max_steps") else None
        self.steps_per_epoch = steps_per_epoch or (total_steps / max_epochs if max_epochs else None)
        self.peak_flops = config.get("peak_flops") or flops.peak_flops(jax.devices()[0].device_kind)
        self.flops_per_step: int | None = None
        self.clock = clock or Clock()
        self._file: TextIO | None = None
        self._tensorboard: _TensorBoard | None = None
        self._wandb: Any = None
        if jax.process_index() == 0:
            self.workdir.mkdir(parents=True, exist_ok=True)
            self._progress = _Progress(total_steps)
            if config.get("wandb"):
                self._wandb = _start_wandb(self.workdir, config)
            self._file = _open_metrics(self.workdir / "metrics.jsonl", resume_step)
            if config.get("tensorboard", True):
                self._tensorboard = _TensorBoard(self.workdir / "tensorboard", resume_step)
        self.clock.start()
        self._first = self._last = (resume_step, self.clock.seconds, 0.0)  # step, seconds, seconds of waiting

    def set_flops(self, flops_per_step: int) -> None:
        """Operations of one optimizer step on all devices together, for MFU."""
        self.flops_per_step = flops_per_step

    def write(self, step: int, metrics: Mapping[str, Any], data_wait: float = 0.0) -> None:
        """Logs one step of training.

        Args:
            step: completed steps.
            metrics: name -> scalar, already on the host (or it is fetched here).
            data_wait: seconds that the loop has waited for data since it began, in all.
        """
        if self._file is None:
            return
        now = (step, self.clock.seconds, data_wait)
        steps, seconds, waited = (a - b for a, b in zip(now, self._last, strict=True))
        pace = seconds / steps if steps else 0.0
        speed = dict(
            images_per_sec=self.batch_size / pace if pace else 0.0,
            data_wait=min(waited / seconds, 1.0) if seconds else 0.0,
            mfu=self._mfu(1 / pace) if pace else None,
        )
        record = self._record(step, "train", now[1]) | _plain(metrics) | speed
        self._write(record)
        done, spent = step - self._first[0], now[1] - self._first[1]
        self._progress.show(record, eta=spent / done * (self.total_steps - step) if done else None)
        self._last = now

    def evaluation(self, step: int, metrics: Mapping[str, Any], phase: str = "eval") -> None:
        """Logs the scores of an evaluation after `step` completed steps; or of what else `phase` says, done before it."""
        if self._file is None:
            return
        scores = _plain(metrics)
        self._write(self._record(step, phase, self.clock.seconds) | scores)
        text = "  ".join(f"{name} {'nan' if value is None else _number(value)}" for name, value in scores.items())
        self._progress.message(f"{phase} at step {step}:  {text}")

    def close(self) -> None:
        """Ends the progress line and closes all files."""
        if self._file is None:
            return
        self._progress.close()
        self._file.close()
        self._file = None
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()

    def __enter__(self) -> MetricLogger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _mfu(self, steps_per_second: float) -> float | None:
        if self.flops_per_step is None or self.peak_flops is None:
            return None
        return self.flops_per_step * steps_per_second / (self.peak_flops * jax.device_count())

    def _record(self, step: int, phase: str, elapsed: float) -> dict[str, Any]:
        epoch = step / self.steps_per_epoch if self.steps_per_epoch else None
        return dict(step=step, epoch=epoch, phase=phase, elapsed=elapsed)

    def _write(self, record: Mapping[str, Any]) -> None:
        assert self._file is not None
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        step, phase = record["step"], record["phase"]
        values = {f"{phase}/{k}": v for k, v in record.items() if k not in ("step", "phase") and v is not None}
        if self._tensorboard is not None:
            self._tensorboard.scalars(step, values)
        if self._wandb is not None:
            self._wandb.log(values | {"step": step})


def _plain(metrics: Mapping[str, Any]) -> dict[str, float | int | None]:
    """Python numbers, without losing a digit; None where a value is not finite, for JSON has no word for that."""
    numbers = {
        name: value.item() if hasattr(value, "item") else value for name, value in jax.device_get(dict(metrics)).items()
    }
    return {name: value if math.isfinite(value) else None for name, value in numbers.items()}


def _open_metrics(path: Path, resume_step: int) -> TextIO:
    """metrics.jsonl opened for appending, without records after `resume_step` (all, if that is 0) and torn lines."""
    if path.exists():
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
        kept = [line for line in lines if resume_step and _step(line) <= resume_step]
        text = "".join(line + "\n" for line in kept)
        # Beside its place first: killed in between, the old file is still whole.
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    return path.open("a", encoding="utf-8")


def _step(line: str) -> float:
    """The step of one line of metrics.jsonl; infinity if it is not a record, as when a kill cut it short."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf
    return step if isinstance(step, int) else math.inf


class _TensorBoard:
    """TensorBoard's event file, written at once: tensorboardX's own writer keeps events back, and a kill would lose them.

    Going on from a step, an event tells TensorBoard to hide what earlier files have of later steps.
    """

    def __init__(self, directory: Path, resume_step: int) -> None:
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        if resume_step == 0:
            shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}"
        self._file = (directory / name).open("ab", buffering=0)
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        if resume_step:
            session = SessionLog(status=SessionLog.START)
            self._write(Event(wall_time=time.time(), step=resume_step + 1, session_log=session))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])
        self._write(Event(wall_time=time.time(), step=step, summary=summary))

    def close(self) -> None:
        self._file.close()

    def _write(self, event: Any) -> None:
        from tensorboardX.record_writer import masked_crc32c

        data = event.SerializeToString()
        length = struct.pack("<Q", len(data))
        checks = [struct.pack("<I", masked_crc32c(part)) for part in (length, data)]
        self._file.write(length + checks[0] + data + checks[1])


def _start_wandb(workdir: Path, config: Any) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ConfigError(
            "config.wandb is set, but Weights & Biases is not installed: pip install jaxpretrain[wandb], "
            "or turn it off with --config.wandb=None"
        ) from error
    # The same run of theirs goes on when ours does.
    id_file = workdir / "wandb.id"
    if not id_file.exists():
        id_file.write_text(uuid.uuid4().hex[:12])
    options = dict(config["wandb"]) if isinstance(config["wandb"], Mapping) or hasattr(config["wandb"], "keys") else {}
    defaults = dict(dir=str(workdir), id=id_file.read_text(), resume="allow", config=to_plain(config))
    run = wandb.init(**defaults | options)
    run.define_metric("*", step_metric="step")  # repeated steps would be refused as W&B's own step
    return run
