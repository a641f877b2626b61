"""Batches from the host to the devices, ahead of the step that needs them."""

from __future__ import annotations

import atexit
import contextlib
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np


class DevicePrefetch:
    """Iterator over global `jax.Array`s, with up to `size` batches on their way; made by `device_prefetch`.

    Attributes:
        wait_seconds: how long the consumer has waited in `next`, in all. Beside the wall time it tells whether the input
            is what holds the run back.
    """

    def __init__(self, iterator: Iterator[Any], sharding: Callable[[np.ndarray], jax.sharding.Sharding], size: int):
        self.wait_seconds = 0.0
        self._source = (iterator, sharding, size)
        self._start()

    def _start(self) -> None:
        iterator, sharding, size = self._source
        self._line = _Line(size)
        self._failure: BaseException | None = None
        # The thread holds the line, not this object: forgotten without `close`, it ends all the same.
        thread = threading.Thread(
            target=_produce, args=(iterator, sharding, self._line), name="device-prefetch", daemon=True
        )
        self._stop = weakref.finalize(self, self._line.stop, thread)
        self._stop.atexit = False
        atexit.register(self._line.stop, thread)  # handlers run in reverse: before the loader's, which the thread reads
        thread.start()

    def __iter__(self) -> DevicePrefetch:
        return self

    def __next__(self) -> Any:
        if self._failure is not None:
            raise self._failure
        if not self._stop.alive:
            raise StopIteration
        start = time.perf_counter()
        batch, failure = self._line.ready.get()
        self.wait_seconds += time.perf_counter() - start
        if failure is not None:
            self._failure = failure
            raise failure
        self._line.free.release()
        return batch

    def close(self) -> None:
        """Stops the thread and drops what it has prepared. The iterator stays open, and nothing uses it any more."""
        self._stop()

    @contextlib.contextmanager
    def interrupted(self) -> Iterator[None]:
        """Inside, nothing uses the iterator, so that it may be changed; what was prepared is dropped."""
        self.close()
        yield
        self._start()

    def __enter__(self) -> DevicePrefetch:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class _Line:
    """Between the thread and the consumer: batches in order, and how many more may be made."""

    def __init__(self, size: int):
        self.ready: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
        self.free = threading.Semaphore(
            size
        )  # taken before a batch is made: at most `size` exist beyond the consumer's
        self.stopped = threading.Event()

    def stop(self, thread: threading.Thread) -> None:
        atexit.unregister(self.stop)
        self.stopped.set()
        self.free.release()
        if thread is not threading.current_thread():  # garbage collection may run anywhere
            thread.join()
        while not self.ready.empty():
            self.ready.get()


def _produce(iterator: Iterator[Any], sharding: Callable[[np.ndarray], jax.sharding.Sharding], line: _Line) -> None:
    def to_device(array: np.ndarray) -> jax.Array:
        return jax.make_array_from_process_local_data(sharding(array), array)

    while True:
        line.free.acquire()
        if line.stopped.is_set():
            return
        try:
            batch = jax.tree.map(to_device, next(iterator))
        except BaseException as error:  # raised again where the consumer is; the end of the iterator among them
            line.ready.put((None, error))
            return
        line.ready.put((batch, None))
        del batch  # or this thread keeps it alive while it makes the next


def device_prefetch(
    iterator: Iterator[Any],
    sharding: jax.sharding.Sharding | Callable[[np.ndarray], jax.sharding.Sharding],
    size: int = 2,
) -> DevicePrefetch:
    """Puts batches on the devices from a background thread, in order, `size` of them ahead of the consumer.

    Each leaf of a batch is this host's part of a global array; the sharding says which part, so with one host it is all
    of it. All transfers are explicit (`jax.transfer_guard('disallow')` lets them pass). An exception of the iterator is
    raised by the `next` at its place in the order, and by every one after that.

    Args:
        iterator: over pytrees of NumPy arrays, `TrainLoader` for one. Only the thread uses it until `close`.
        sharding: of the leaves, for instance `NamedSharding(mesh, P('data'))`; or a function of a leaf that gives it.
        size: batches ahead, at least 1.
    """
    if size < 1:
        raise ValueError(f"size={size} must be at least 1")
    if isinstance(sharding, jax.sharding.Sharding):
        fixed = sharding
        sharding = lambda array: fixed  # noqa: E731
    return DevicePrefetch(iter(iterator), sharding, size)
