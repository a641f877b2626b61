"""Host to device (skeleton: signatures are final)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any


class DevicePrefetch:
    """Iterator of global jax.Arrays; `wait_seconds` is the time the consumer waited, cumulative."""

    wait_seconds: float

    def __iter__(self) -> DevicePrefetch: ...
    def __next__(self) -> Any: ...
    def close(self) -> None: ...


def device_prefetch(iterator: Iterator[Any], sharding: Any | Callable[[Any], Any], size: int = 2) -> DevicePrefetch:
    """`sharding`: a jax.sharding.Sharding of the batch dimension, or a function of the host array that gives one."""
    ...
