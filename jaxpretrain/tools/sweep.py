"""Going over a whole data set in parallel, with a progress bar, and going on where the last attempt ended.

What the tools that look at every image share.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from jaxpretrain import cli
from jaxpretrain.build import ConfigError, build, nearest

T = TypeVar("T")

DATA_FLAGS = {
    "split": "of a recipe: train (default), val, ...; of a data set: its own",
    "type": "of the data set in FOLDER: CustomDataset (default), ImageNet, ...",
    "num-workers": "processes (default: 0; threads of this one, as decoding does not hold Python's lock)",
    "num-threads": "threads, if there are no processes (default: one per core)",
}
DATA_HELP = (
    "DATA is a folder of images (in class folders, or not), a .json file or text with a data set's "
    '{"type": ..., ...}, or a recipe (configs/mae.py:RECIPE) whose config.data.<split>.dataset is meant'
)


def open_data(given: Sequence[str], flags: cli.Flags) -> tuple[dict[str, Any], Any]:
    """(config, source) of the one data set that a command line names; see DATA_HELP.

    Raises:
        ConfigError: none or several; no such folder, recipe or split; mistakes about the data set.
    """
    if len(given) != 1:
        raise ConfigError(f"Which data set? Give one DATA; {DATA_HELP}")
    config = _data_config(given[0], flags)
    source = build(config)
    if not len(source):
        raise ConfigError(f"{source!r} is empty")
    return config, source


def _data_config(spec: str, flags: cli.Flags) -> dict[str, Any]:
    text = spec.lstrip().startswith("{")
    if ".py" in spec and not text and not os.path.isdir(spec):
        return _of_recipe(spec, flags)
    if flags.overrides:
        raise ConfigError(f"--config.{flags.overrides[0]} goes with a recipe, not with {spec[:80]}")
    if os.path.isdir(spec):
        config: dict[str, Any] = dict(type=flags.type or "CustomDataset", data_root=spec)
        if config["type"] == "CustomDataset":
            config["with_label"] = any(e.is_dir() and not e.name.startswith(".") for e in os.scandir(spec))
    elif text or spec.endswith(".json"):
        try:
            config = json.loads(spec if text else Path(spec).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{spec[:80]} is not JSON: {error}") from error
    else:
        raise ConfigError(f"{spec} is no folder, recipe or JSON. {DATA_HELP}")
    return dict(config, split=flags.split) if flags.split else config


def _of_recipe(spec: str, flags: cli.Flags) -> dict[str, Any]:
    from jaxpretrain.config import load_config, to_plain

    data = to_plain(load_config(spec, flags.overrides)["data"])
    splits = [name for name, value in data.items() if isinstance(value, dict) and value.get("dataset")]
    split = flags.split or "train"
    if split not in splits:
        raise ConfigError(f"{spec} has no data.{split}.dataset.{nearest(split, splits)}")
    return data[split]["dataset"]


def number(flags: cli.Flags, name: str, default: int, least: int = 0) -> int:
    """The whole number given for a flag. Raises ConfigError if it is none, or below `least`."""
    text = flags.values.get(name, default)
    try:
        value = int(text)
    except ValueError:
        raise ConfigError(f"--{name}={text} must be a whole number") from None
    if value < least:
        raise ConfigError(f"--{name}={text} must be at least {least}")
    return value


def sweep(
    function: Callable[[int], T],
    numbers: Sequence[int],
    *,
    workers: int = 0,
    threads: int = 0,
    chunk: int = 32,
    ordered: bool = True,
) -> Iterator[tuple[list[int], list[T]]]:
    """`function` of every number, in parallel: (numbers, results) of one chunk after the other.

    Only a few chunks are on their way at any time, so memory does not grow. An exception ends the sweep.

    Args:
        function: with `workers`, it must pickle; it is sent to each process once.
        numbers: such as `range(len(source))`.
        workers: processes; 0 computes in threads of this one.
        threads: how many, without processes; 0: one per core.
        chunk: how many numbers are handed out at a time.
        ordered: chunks in the order of the numbers, or else as they are finished.
    """
    parallel = workers or threads or os.cpu_count() or 1
    pool: Executor
    work: Callable[[list[int]], list[T]]
    if workers:  # spawned: a copy of a process with JAX's threads may hang
        context = multiprocessing.get_context("spawn")
        pool, work = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(function,)), _in_worker
    else:
        pool, work = ThreadPoolExecutor(parallel), lambda part: [function(number) for number in part]
    running: dict[Future, list[int]] = {}

    def next_done() -> tuple[list[int], list[T]]:
        future = next(iter(running if ordered else wait(running, return_when=FIRST_COMPLETED).done))
        return running.pop(future), future.result()

    try:
        for start in range(0, len(numbers), chunk):
            part = list(numbers[start : start + chunk])
            running[pool.submit(work, part)] = part
            if len(running) > 3 * parallel:
                yield next_done()
        while running:
            yield next_done()
    finally:
        pool.shutdown(cancel_futures=True)


_function: Callable[[int], Any] | None = None


def _start_worker(function: Callable[[int], Any]) -> None:
    global _function
    _function = function
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to all; the main process decides


def _in_worker(part: list[int]) -> list[Any]:
    assert _function is not None
    return [_function(number) for number in part]


def progress(total: int, text: str, done: int = 0) -> Any:
    """A progress bar over images; where output goes to a file, a line every half minute."""
    from tqdm import tqdm

    interval = 0.2 if sys.stderr.isatty() else 30.0
    return tqdm(total=total, initial=done, desc=text, unit=" images", smoothing=0.05, mininterval=interval)


def fingerprint(config: Mapping[str, Any], source: Any) -> dict[str, Any]:
    """What tells whether a data set is still the one that an earlier attempt saw: its size, and names spread over it."""
    count = len(source)
    name = getattr(source, "name", str)
    names = "\n".join(name(int(i)) for i in np.unique(np.linspace(0, count - 1, 1000, dtype=int)))
    digest = hashlib.sha256(names.encode(errors="surrogateescape")).hexdigest()[:16]
    return {"data": json.loads(json.dumps(config, default=str)), "count": count, "names": digest}


class Log:
    """A file of JSON lines that grows while a tool works, and from which it goes on after it was interrupted or killed.

    The first line says what the work is; the log of other work is refused. A last line that is cut off is forgotten.

    Attributes:
        records: the lines of earlier attempts, without the first.
    """

    def __init__(self, path: str | Path, work: Mapping[str, Any], restart: bool = False):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        work = json.loads(json.dumps(work))
        lines = [] if restart else self._read(self.path)
        if lines and lines[0] != work:
            different = [key for key in {**work, **lines[0]} if work.get(key) != lines[0].get(key)]
            raise ConfigError(
                f"{self.path} is the log of other work ({', '.join(different)} changed since); --restart begins anew, or "
                "choose another file"
            )
        self.records: list[dict[str, Any]] = lines[1:]
        partial = self.path.with_name(self.path.name + ".partial")  # without the end that may be cut off
        partial.write_text("".join(json.dumps(line) + "\n" for line in [work, *self.records]), encoding="utf-8")
        os.replace(partial, self.path)
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115  (open as long as the work goes on)

    @property
    def finished(self) -> bool:
        """Whether an earlier attempt came to its end, and said so by `write(finished=True)`."""
        return _finished(self.records)

    @classmethod
    def is_finished(cls, path: str | Path, but: Mapping[str, Any] | None = None) -> bool:
        """Whether there is a log of work that came to its end; `but`: of other work than this."""
        lines = cls._read(Path(path))
        return _finished(lines) and (but is None or lines[0] != json.loads(json.dumps(but)))

    @staticmethod
    def _read(path: Path) -> list[dict[str, Any]]:
        if not path.exists():
            return []
        lines = []
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
            try:
                record = json.loads(line)
            except ValueError:
                break
            if not line.endswith("\n") or not isinstance(record, dict):
                break
            lines.append(record)
        if not lines and path.stat().st_size:
            raise ConfigError(f"{path} is not a log of this tool; choose another file")
        return lines

    def write(self, **record: Any) -> None:
        """Adds a line, which is in the file when this returns."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _finished(lines: Sequence[Mapping[str, Any]]) -> bool:
    return bool(lines and lines[-1].get("finished"))
