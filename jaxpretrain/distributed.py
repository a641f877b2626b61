"""Joining the processes of one run: found by itself under SLURM, or from environment variables."""

from __future__ import annotations

import logging
import os

import jax

from jaxpretrain.build import ConfigError

logger = logging.getLogger("jaxpretrain")

SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")


def initialize() -> None:
    """Calls `jax.distributed.initialize` if this is one process of several; must come before any other use of JAX.

    - SLURM (`srun`): nothing to set; more than one task means several processes. With one task per node it drives all
      devices of the node, with more each has the device of its local number.
    - Anywhere else, Kubernetes included: JAX_COORDINATOR_ADDRESS=host:port (of process 0), JAX_NUM_PROCESSES, and
      JAX_PROCESS_ID or Kubernetes' JOB_COMPLETION_INDEX. A process drives all devices that it sees.

    Raises ConfigError if only some of the variables are set, or are not the numbers that they should be.
    """
    env = os.environ
    if "JAX_COORDINATOR_ADDRESS" in env or "JAX_NUM_PROCESSES" in env or "JAX_PROCESS_ID" in env:
        address, count, index = _from_variables()
        _prepare_cpu()
        # Within an allocation of SLURM or MPI, JAX would guess which devices are meant.
        jax.distributed.initialize(address, count, index, cluster_detection_method="deactivate")
    elif all(name in env for name in SLURM) and int(env["SLURM_NTASKS"]) > 1:
        _prepare_cpu()
        task_per_node = env.get("SLURM_STEP_NUM_NODES") == env["SLURM_NTASKS"]
        # None would mean one device per task, whatever their number; an empty list does not restrict.
        jax.distributed.initialize(local_device_ids=[] if task_per_node else None)
    else:
        return
    logger.info(
        "process %d of %d, %d of %d devices",
        jax.process_index(), jax.process_count(), jax.local_device_count(), jax.device_count(),
    )  # fmt: skip


def _from_variables() -> tuple[str, int, int]:
    """Coordinator, number of processes, and which of them this is."""
    env = os.environ
    address, count = env.get("JAX_COORDINATOR_ADDRESS", ""), env.get("JAX_NUM_PROCESSES", "")
    index = env.get("JAX_PROCESS_ID", env.get("JOB_COMPLETION_INDEX", ""))
    if not (address and count.isdecimal() and index.isdecimal() and int(index) < int(count)):
        raise ConfigError(
            "Several processes need JAX_COORDINATOR_ADDRESS=host:port, JAX_NUM_PROCESSES=N, and JAX_PROCESS_ID or "
            f"JOB_COMPLETION_INDEX from 0 to N - 1; they are {address!r}, {count!r} and {index!r}"
        )
    return address, int(count), int(index)


def _prepare_cpu() -> None:
    """On CPUs processes are joined by gloo, which takes one program with communication at a time, or else they block."""
    if (getattr(jax.config, "jax_platforms", None) or os.environ.get("JAX_PLATFORMS")) == "cpu":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.config.update("jax_cpu_enable_async_dispatch", False)


def wait_for_all(point: str, seconds: float = 3600.0) -> None:
    """Waits until all processes have come to this point, a name used once; without communication between devices."""
    from orbax.checkpoint import multihost

    multihost.get_barrier_sync_fn()(key=point, timeout_ms=int(seconds * 1000))
