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

    - SLURM (`srun`): nothing to set; more than one task means several processes.
    - Anywhere else, Kubernetes included: JAX_COORDINATOR_ADDRESS=host:port (of process 0), JAX_NUM_PROCESSES, and
      JAX_PROCESS_ID or Kubernetes' JOB_COMPLETION_INDEX.

    Raises ConfigError if only some of the variables are set.
    """
    env = os.environ
    if all(name in env for name in SLURM) and int(env["SLURM_NTASKS"]) > 1:
        jax.distributed.initialize()
    elif "JAX_COORDINATOR_ADDRESS" in env:
        index = env.get("JAX_PROCESS_ID", env.get("JOB_COMPLETION_INDEX"))
        if index is None or "JAX_NUM_PROCESSES" not in env:
            raise ConfigError(
                "JAX_COORDINATOR_ADDRESS is set, so JAX_NUM_PROCESSES and JAX_PROCESS_ID (or JOB_COMPLETION_INDEX) "
                "must be set too"
            )
        if jax.config.jax_platforms == "cpu" or env.get("JAX_PLATFORMS") == "cpu":
            jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(env["JAX_COORDINATOR_ADDRESS"], int(env["JAX_NUM_PROCESSES"]), int(index))
    else:
        return
    logger.info(
        "process %d of %d, %d of %d devices",
        jax.process_index(), jax.process_count(), jax.local_device_count(), jax.device_count(),
    )  # fmt: skip
