"""Time from the start of the process to the end of the first training step, with a cold and a warm compilation cache.

    python benchmarks/startup.py [--config=configs/mae.py:digits] [--config.a.b=v ...]

Both runs are whole processes of the documented command, in one run; only the cache differs.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile

from jaxpretrain import cli

FLAGS = {"config": "recipe"}


def seconds(config: str, overrides: list[str], cache: str) -> float:
    """Runs one step in a process of its own, and reads the time that it reports."""
    with tempfile.TemporaryDirectory() as workdir:
        command = [
            sys.executable, "-m", "jaxpretrain.main", f"--config={config}", f"--workdir={workdir}/run",
            "--config.max_steps=1", "--config.evaluators={}", "--config.checkpoint.interval=-1",
            *(f"--config.{item}" for item in overrides),
        ]  # fmt: skip
        env = dict(os.environ, JAX_COMPILATION_CACHE_DIR=cache, JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0")
        output = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
        return float(re.search(r"first step (?:done )?after ([\d.]+) s", output.stdout + output.stderr)[1])  # type: ignore[index]


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
