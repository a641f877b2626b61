"""Time from the start of the process to the end of the first training step, with a cold and a warm compilation cache.

    python benchmarks/startup.py [--config=configs/mae.py:digits] [--config.a.b=v ...]

Both runs are whole processes of the documented command, in one run; only the cache differs.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time

from jaxpretrain import cli

FLAGS = {"config": "recipe"}


def seconds(config: str, overrides: list[str], cache: str) -> float:
    """Runs one step in a process of its own; the time until it says that the step is done."""
    with tempfile.TemporaryDirectory() as workdir:
        command = [
            sys.executable, "-m", "jaxpretrain.main", f"--config={config}", f"--workdir={workdir}/run",
            "--config.max_steps=1", "--config.evaluators={}", "--config.checkpoint.interval=-1",
            *(f"--config.{item}" for item in overrides),
        ]  # fmt: skip
        env = dict(os.environ, JAX_COMPILATION_CACHE_DIR=cache, JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0")
        begin = time.perf_counter()
        process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        taken = [time.perf_counter() - begin for line in process.stderr or () if "first step done" in line]
        if process.wait() or not taken:
            raise cli.ExpectedFailure(f"the run failed: {' '.join(command)}")
        return taken[0]


def main(argv: list[str]) -> int:
    flags = cli.parse(argv, FLAGS, usage=__doc__ or "")
    config = flags.config or "configs/mae.py:digits"
    with tempfile.TemporaryDirectory() as cache:
        cold = seconds(config, flags.overrides, cache)
        warm = seconds(config, flags.overrides, cache)
    print(f"{config}: first step after {cold:.1f} s with a cold cache, {warm:.1f} s with a warm one")
    return cli.OK


if __name__ == "__main__":
    sys.exit(cli.run(main))
