"""The input pipeline (skeleton: signatures are final, bodies follow)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Batch = dict[str, Any]


class TooManyBadImages(RuntimeError):
    """More than `max_bad` of the data set cannot be decoded."""


class TrainLoader:
    """Endless iterator over host-local batches dict(image uint8 [b,H,W,3] or tuple of views, label, index, epoch int32 [b])."""

    steps_per_epoch: int
    num_classes: int | None
    source: Any

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
    ) -> None: ...

    def __iter__(self) -> Iterator[Batch]: ...
    def __next__(self) -> Batch: ...
    def get_state(self, step: int) -> dict[str, Any]: ...
    def set_state(self, state: dict[str, Any]) -> None: ...
    def close(self) -> None: ...


class EvalLoader:
    """One ordered pass per `iter()`: dict(image, label, index, valid bool [b]); the last batch is padded to the static shape."""

    num_classes: int | None
    source: Any

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
    ) -> None: ...

    def __len__(self) -> int: ...  # batches
    def __iter__(self) -> Iterator[Batch]: ...
    def close(self) -> None: ...
