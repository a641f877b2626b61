"""Test set-up: eight virtual CPU devices, quick compilation, and a compilation cache that survives between runs."""

from __future__ import annotations

import gc
import importlib.util
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest


def _xla_flags() -> list[str]:
    """Eight devices, and quick compilation: older emitters in one piece take a third of the time of what XLA would do.

    A flag that this release of XLA does not know would end the process, so its library is asked.
    """
    library = next(Path(importlib.util.find_spec("jaxlib").submodule_search_locations[0]).glob("libjax_common.*"), None)
    quick = ["xla_cpu_use_fusion_emitters=false", "xla_cpu_parallel_codegen_split_count=1"]
    if library is None:
        quick = []
    else:
        with open(library, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            quick = [flag for flag in quick if content.find(flag.partition("=")[0].encode()) >= 0]
    known = ["xla_force_host_platform_device_count=8", "xla_backend_optimization_level=0"]
    return [f"--{flag}" for flag in known + quick]


# Before jax is imported, and inherited by the processes that tests start.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", " ".join(_xla_flags()))
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


# Tracing makes objects by the million; looking for garbage among them as often as usual is a seventh of its time.
gc.set_threshold(10_000)


def pytest_collection_finish() -> None:
    """What has been imported stays, and need not be looked at again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def _forget_programs() -> Iterator[None]:
    """Compiled programs hold memory, golden models' by the gigabyte; the next module has its own."""
    yield
    import jax

    jax.clear_caches()
    gc.collect()
