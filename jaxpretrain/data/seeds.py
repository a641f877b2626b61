"""The random streams of the host."""

from __future__ import annotations

import numpy as np

ORDER, SAMPLE, SUBSTITUTE = 1, 2, 3  # what a stream is for: keeps (seed, epoch) and (seed, epoch, index) apart


def generator(purpose: int, seed: int, epoch: int, index: int, repeat: int = 0) -> np.random.Generator:
    """The stream of one purpose; `repeat` counts the times that an epoch has had the sample already."""
    numbers = [seed, epoch, index, purpose, repeat] if repeat else [seed, epoch, index, purpose]
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(numbers)))
