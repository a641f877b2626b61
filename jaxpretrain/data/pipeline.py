"""Loaders: from a source and host transforms to uint8 batches, in an order that depends on the seed alone.

grain computes chunks of batches (`chunks.py`), in threads or in worker processes, and hands them over in order; the
loader puts them together. The whole state is a step number, and the list of files known to be bad.

With worker processes a script needs the usual `if __name__ == "__main__":` guard.
"""

from __future__ import annotations

import atexit
import dataclasses
import logging
import multiprocessing.util
import os
import shutil
import signal
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from jaxpretrain.build import ConfigError, build
from jaxpretrain.cli import ExpectedFailure
from jaxpretrain.data import labels
from jaxpretrain.data.chunks import CHUNK, SUBSTITUTES, Chunks, EvalPlan, Reader, Rows, TrainPlan, refuse_shapes
from jaxpretrain.data.decode import BadImage
from jaxpretrain.data.host_transforms import build_pipeline
from jaxpretrain.data.phases import phase_at, phases_of
from jaxpretrain.data.samplers import Order, build_sampler, permutation, size_of

Batch = dict[str, Any]

SMALL = 2**16  # bytes of a sample below which threads only fight for Python's lock
ENDLESS = 2**62

logger = logging.getLogger(__name__)


class TooManyBadImages(ExpectedFailure):
    """More than `max_bad` of the data set cannot be decoded."""


class _Loader:
    """What the two loaders share: the source, chunks computed by grain, batches of chunks, the count of bad files."""

    def __init__(
        self,
        split_cfg: Any,
        *,
        batch_size: int,
        seed: int,
        process_index: int,
        process_count: int,
        num_workers: int,
        num_threads: int,
        prefetch: int,
        max_bad: float,
    ):
        split = dict(split_cfg)
        if "dataset" not in split:
            raise ConfigError(f"a data split needs a 'dataset'; got only {sorted(split)}")
        if batch_size <= 0 or batch_size % process_count:
            raise ConfigError(
                f"batch_size={batch_size} must be positive and divide evenly among {process_count} processes"
            )
        if seed < 0:
            raise ConfigError(f"seed={seed} must not be negative")
        self.source = build(split["dataset"])
        self.num_classes: int | None = getattr(self.source, "num_classes", None)
        self.length = len(self.source)
        self.batch_size, self.local_batch_size = batch_size, batch_size // process_count
        self.seed, self.process_index, self.process_count = int(seed), process_index, process_count
        self.max_bad = max_bad
        self.phases = phases_of(split)
        first, *later = [build_pipeline(phase.pipeline) for phase in self.phases]
        begins = [phase.begin for phase in self.phases]
        self._reader = Reader(self.source, first, self.seed, list(zip(begins[1:], later, strict=True)))
        self._bad: dict[int, int] = {}  # index -> step at which it was first met
        self._examples = list(map(self._find_example, begins))
        in_memory = getattr(self.source, "in_memory", False)
        self._num_workers = 0 if in_memory else num_workers
        if in_memory and max(map(_nbytes, self._examples)) < SMALL:
            num_threads = min(1, num_threads)
        self._num_threads, self._prefetch = num_threads, max(1, prefetch)
        self._chunk = min(CHUNK, self.local_batch_size)
        self._chunks_per_batch = -(-self.local_batch_size // self._chunk)
        self._running: list[Any] = []  # grain's iterators, and nowhere else: closing drops them
        weakref.finalize(self, _close_all, self._running).atexit = False
        if self._num_workers:  # at exit before multiprocessing's own handler, which was registered when it was imported
            atexit.register(_close_all, self._running)

    def _start(self, chunks: Chunks, first: int, last: int) -> Any:
        """A grain iterator over the chunks first..last."""
        import grain

        numbers = grain.MapDataset.range(first, last)
        ahead = max(1, self._prefetch * self._chunks_per_batch)
        workers = min(self._num_workers, max(1, last - first))
        threads = max(1, self._num_threads // workers) if workers else self._num_threads
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(threads, 0 if workers else ahead))
        dataset = numbers.map(chunks).to_iter_dataset(options)
        if workers:
            _parse_flags()
            self._check_shared_memory(2 * ahead)  # grain buffers in the workers, and again here
            buffer = -(-ahead // workers)
            dataset = dataset.mp_prefetch(
                grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=buffer), _end_with_parent
            )
        iterator = iter(dataset)
        self._running.append(iterator)
        return iterator

    def _check_shared_memory(self, chunks: int) -> None:
        """Warns where /dev/shm is too small for the chunks on their way: the run would die of SIGBUS, without a word."""
        if not os.path.isdir("/dev/shm"):
            return
        needed = chunks * self._chunk * max(map(_nbytes, self._examples))
        free = shutil.disk_usage("/dev/shm").free
        if needed > free:
            logger.warning(
                "worker processes hand images over in /dev/shm, which has %d MiB left and may need %d: start the container "
                "with more (docker run --shm-size=...), or lower data.prefetch, or use threads alone (data.num_workers=0)",
                free >> 20,
                needed >> 20,
            )

    def close(self) -> None:
        """Stops threads and worker processes. Whatever needs them next starts them again."""
        _close_all(self._running)

    def _assemble(self, chunks: Iterator[dict[str, Any]], step: int, phase: int = 0) -> Batch:
        """The next batch; `chunks` stands at its first chunk. Rows without a sample: zero, label and index -1."""
        size = self.local_batch_size
        columns = {name: np.full(size, -1, np.int32) for name in ("index", "epoch", "repeat")}
        label = labels.column(self.label, size)
        valid = np.zeros(size, bool)
        zeros = lambda view: np.zeros((size, *view.shape), view.dtype)  # noqa: E731
        arrays = {name: _map(zeros, one) for name, one in self._examples[phase].items()}
        for _ in range(self._chunks_per_batch):
            chunk = next(chunks)
            rows: Rows = chunk["rows"]
            self._count_bad(rows.bad, step)
            if rows.error is not None:
                raise rows.error
            if not rows.row:
                continue
            first, last = rows.row[0], rows.row[-1]
            where = slice(first, last + 1) if last - first + 1 == len(rows.row) else rows.row  # a slice is faster
            for name, array in arrays.items():
                _put(array, where, chunk["arrays"][name])
            valid[where] = True
            labels.put(label, where, rows.label)
            for name, column in columns.items():
                column[where] = getattr(rows, name)
        return {**arrays, "label": label, **columns, "valid": valid}

    def _find_example(self, epoch: int) -> Any:
        """The arrays of one sample (and `label`, its label): the shapes of all, and a first test of the pipeline."""
        if not self.length:
            raise ConfigError(f"the data set {self.source!r} is empty")
        last = ""
        for candidate in self._reader.candidates(0, 0):
            try:
                example, self.label = self._reader.read(epoch, candidate)
            except BadImage as reason:
                last = f"{self._name(candidate)}: {reason}"
                continue
            for view in _views(example["image"]):
                if not (isinstance(view, np.ndarray) and view.dtype == np.uint8 and view.ndim == 3):
                    kind = getattr(view, "dtype", type(view).__name__)
                    raise ConfigError(
                        f"host transforms must end with uint8 pixels [H, W, 3], got {kind} {list(np.shape(view))}; "
                        f"normalisation runs on the device"
                    )
            return example
        raise TooManyBadImages(
            f"no image of {self.source!r} can be decoded ({SUBSTITUTES + 1} tried); the last: {last}"
        )

    def _count_bad(self, bad: list[tuple[int, str]], step: int) -> None:
        for index, reason in bad:
            if index not in self._bad:
                self._bad[index] = step
                logger.warning("bad image %s: %s; skipped (%d so far)", self._name(index), reason, len(self._bad))
        if len(self._bad) > self.max_bad * self.length:
            names = [self._name(index) for index in sorted(self._bad)[:10]]
            if len(self._bad) > len(names):
                names.append(f"and {len(self._bad) - len(names)} more")
            raise TooManyBadImages(
                f"{len(self._bad)} of {self.length} images ({len(self._bad) / self.length:.3%}) cannot be decoded, "
                f"more than data.max_bad={self.max_bad:g} allows:\n  " + "\n  ".join(names) + "\n"
                "Repair or remove them, or raise the limit with --config.data.max_bad=FRACTION."
            )

    def _name(self, index: int) -> str:
        name = getattr(self.source, "name", None)
        return name(index) if callable(name) else f"sample {index} of {self.source!r}"

    @property
    def bad_indices(self) -> list[int]:
        """Samples that could not be decoded so far, ascending."""
        return sorted(self._bad)


class TrainLoader(_Loader):
    """Endless iterator over the batches of this host, in the order of the sampler: a new random one each epoch.

    A batch is a dict of NumPy arrays with b = batch_size / process_count rows: `image` uint8 [b,H,W,3] (a tuple of them
    after MultiView), `label` int32 [b] (see labels.py for data whose labels are not one integer), `index`, `epoch`
    and `repeat` int32 [b]. Epoch e is what the sampler makes of (seed, e), a permutation of the data set unless there is
    one, without the rest that does not fill a batch; the concatenation over hosts does not depend on how many there are.
    `repeat` is how often the epoch has had the sample before. The transforms of a sample draw from a generator seeded by
    (seed, epoch, index, repeat).

    An image that cannot be decoded is logged once and replaced by another, whose label and index the batch then
    carries.

    Args:
        split_cfg: dict(dataset=..., pipeline=[...], sampler=None or dict(type=...), later=[...]), see samplers.py and
            phases.py; other keys are not looked at.
        batch_size: of all hosts together.
        seed: of order, transforms and replacements.
        process_index, process_count: this host and how many there are.
        num_workers: worker processes; 0 computes in threads of this process. Data sets in memory ignore it.
        num_threads: threads that decode and transform, of all workers together.
        prefetch: batches computed ahead.
        max_bad: fraction of the data set that may be bad; counted as different files that this host has met.

    Raises:
        ConfigError: for mistakes in the configuration; also while iterating, where only the images show them.
        TooManyBadImages: while iterating.
    """

    def __init__(
        self,
        split_cfg: Any,
        *,
        batch_size: int,
        seed: int = 0,
        process_index: int = 0,
        process_count: int = 1,
        num_workers: int = 0,
        num_threads: int = 8,
        prefetch: int = 2,
        max_bad: float = 0.001,
    ):
        super().__init__(
            split_cfg,
            batch_size=batch_size,
            seed=seed,
            process_index=process_index,
            process_count=process_count,
            num_workers=num_workers,
            num_threads=num_threads,
            prefetch=prefetch,
            max_bad=max_bad,
        )
        order = build_sampler(dict(split_cfg).get("sampler"), self.source, batch_size)
        samples = size_of(order, self.length)
        if samples < batch_size:
            raise ConfigError(
                f"the data set has {self.length} samples"
                + (f", and the sampler takes {samples} of them" if samples != self.length else "")
                + f", fewer than one batch of batch_size={batch_size}; lower --config.batch_size"
            )
        self.steps_per_epoch: int = samples // batch_size
        self._plan = TrainPlan(
            self.length, self.seed, batch_size, self.local_batch_size, process_index, self._chunk, order
        )
        self._chunks = Chunks(self._reader, self._plan, replace=True)
        self._step = 0  # number of the next batch

    def __iter__(self) -> TrainLoader:
        return self

    def __next__(self) -> Batch:
        if not self._running:
            self._start(self._chunks, self._step * self._chunks_per_batch, ENDLESS)
        try:
            phase = phase_at(self.phases, self._step // self.steps_per_epoch)
            batch = self._assemble(self._running[0], self._step, phase)
        except BaseException:
            self.close()  # half a batch is gone: the next call computes it again
            raise
        if not batch.pop("valid").all():
            self.close()
            raise TooManyBadImages(
                f"{SUBSTITUTES} in a row cannot be decoded; {len(self._bad)} of {self.length} are bad"
            )
        self._step += 1
        return batch

    def set_order(self, order: Order | None, step: int) -> None:
        """Goes on after `step` batches, with epochs in another order; None: that of the sampler.

        The order is no part of the state: whoever restores that, sets it again.

        Raises:
            ConfigError: there is a sampler already.
        """
        if order is not None and self._plan.order is not permutation:
            raise ConfigError("the method orders its samples itself: remove data.train.sampler")
        self.close()
        self._chunks = Chunks(
            self._reader, dataclasses.replace(self._plan, order=order or self._plan.order), replace=True
        )
        self._step = step

    def get_state(self, step: int) -> dict[str, Any]:
        """The state after `step` batches, for JSON. The loader itself may be ahead, by what is prefetched."""
        return {
            "version": 1,
            "step": int(step),
            "seed": self.seed,
            "batch_size": self.batch_size,
            "length": self.length,
            "bad": sorted(index for index, seen in list(self._bad.items()) if seen < step),
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues after `state['step']` batches, with any number of workers, threads and hosts.

        Raises:
            ConfigError: the state is of another seed, batch size or data set.
        """
        own = self.get_state(0)
        different = [
            f"{key}: {state.get(key)} in the state, {own[key]} here"
            for key in ("version", "seed", "batch_size", "length")
            if state.get(key) != own[key]
        ]
        if different:
            raise ConfigError("the data state is of another run: " + "; ".join(different))
        self.close()
        self._step = int(state["step"])
        self._bad = dict.fromkeys(state["bad"], -1)


class EvalLoader(_Loader):
    """The data set once, in order, at each `iter()`; batches of one static shape.

    A batch is as TrainLoader's, with `valid` bool [b] and without `epoch` and
    `repeat`. Rows that are missing in the last batch, and
    images that cannot be decoded, are zero with label and index -1 and `valid` False. All hosts yield the same number
    of batches. Random transforms draw from (0, 0, index): every pass sees the same pixels.

    Args:
        limit: at most this many samples, evenly spread over the data set; None takes all.
        (the others are TrainLoader's)
    """

    def __init__(
        self,
        split_cfg: Any,
        *,
        batch_size: int,
        process_index: int = 0,
        process_count: int = 1,
        num_workers: int = 0,
        num_threads: int = 8,
        prefetch: int = 2,
        max_bad: float = 0.001,
        limit: int | None = None,
    ):
        super().__init__(
            split_cfg,
            batch_size=batch_size,
            seed=0,
            process_index=process_index,
            process_count=process_count,
            num_workers=num_workers,
            num_threads=num_threads,
            prefetch=prefetch,
            max_bad=max_bad,
        )
        count = self.length if limit is None else min(limit, self.length)
        self.indices = np.arange(count) * self.length // max(count, 1)
        plan = EvalPlan(self.indices, batch_size, self.local_batch_size, process_index, self._chunk)
        self._chunks = Chunks(self._reader, plan, replace=False)

    @property
    def num_samples(self) -> int:
        """Samples of one pass, over all hosts."""
        return len(self.indices)

    def __len__(self) -> int:
        """Batches of one pass."""
        return -(-self.num_samples // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        iterator = self._start(self._chunks, 0, len(self) * self._chunks_per_batch)
        try:
            for step in range(len(self)):
                batch = self._assemble(iterator, step)
                del batch["epoch"], batch["repeat"]
                yield batch
        finally:
            if iterator in self._running:
                self._running.remove(iterator)
            iterator.close()


def _close_all(iterators: list[Any]) -> None:
    while iterators:
        iterators.pop().close()


def _end_with_parent(worker: int, workers: int) -> None:
    """In a worker process: ends it when the program that started it is killed; grain's workers would live on for ever.

    Signals that go to all processes of a job at once (a terminal's, a scheduler's) are left to the program, which may
    need more batches until it stops.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def wait() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _parse_flags() -> None:
    """grain's worker processes read absl flags, which only `absl.app.run` parses."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


def _map(function: Callable[[np.ndarray], Any], image: Any) -> Any:
    return tuple(function(view) for view in image) if isinstance(image, tuple) else function(image)


def _nbytes(arrays: dict[str, Any]) -> int:
    return sum(view.nbytes for array in arrays.values() for view in _views(array))


def _views(image: Any) -> tuple[np.ndarray, ...]:
    return image if isinstance(image, tuple) else (image,)


def _put(images: Any, where: Any, part: Any) -> None:
    for whole, piece in zip(_views(images), _views(part), strict=True):
        if whole.shape[1:] != piece.shape[1:]:
            refuse_shapes(whole.shape[1:], piece.shape[1:])
        whole[where] = piece
