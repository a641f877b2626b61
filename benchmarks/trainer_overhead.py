"""Trainer overhead: images/s of the trainer against a bare loop over the same compiled step and one constant batch.

The trainer decodes, crops, moves to the device, logs; the bare loop does nothing but call the step. In one run, in turn.

    python benchmarks/trainer_overhead.py [--config=configs/mae.py:digits] [--steps=100] [--rounds=3] [--config.a.b=v ...]
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax

from jaxpretrain import cli
from jaxpretrain.config import load_config
from jaxpretrain.data.prefetch import device_prefetch
from jaxpretrain.trainer import Trainer

FLAGS = {"config": "recipe", "steps": "steps of each measurement", "rounds": "how often each is measured"}


def bare(trainer: Trainer, steps: int) -> float:
    """Images/s of the step alone, on one batch that stays on the device."""
    state = jax.jit(trainer.init, out_shardings=trainer.shardings)()
    batches = device_prefetch(iter(trainer.loader), trainer.batch_sharding, 1)
    batch = next(batches)
    batches.close()
    step = trainer.compile(state, batch)
    for _ in range(3):
        state, metrics = step(state, batch)
    jax.block_until_ready(metrics)
    begin = time.perf_counter()
    for _ in range(steps):
        state, metrics = step(state, batch)
    jax.block_until_ready(state)
    return steps * trainer.config.batch_size / (time.perf_counter() - begin)


def trained(config: Any, steps: int) -> float:
    """Images/s of the whole trainer, by its own records, from the second record on."""
    with tempfile.TemporaryDirectory() as workdir:
        Trainer(config, workdir).fit()
        lines = (Path(workdir) / "metrics.jsonl").read_text().splitlines()
        records = [record for record in map(json.loads, lines) if record["phase"] == "train"]
        first, last = records[0], records[-1]
        seconds = last["elapsed"] - first["elapsed"]
        return (last["step"] - first["step"]) * config.batch_size / seconds


def main(argv: list[str]) -> int:
    flags = cli.parse(argv, FLAGS, usage=__doc__ or "")
    steps, rounds = int(flags.steps or 100), int(flags.rounds or 3)
    config = load_config(flags.config or "configs/mae.py:digits", flags.overrides)
    config.evaluators = {}
    config.checkpoint.interval = -1
    config.max_steps = steps + 10
    config.log_interval = 10
    rates: dict[str, list[float]] = {"bare loop": [], "trainer": []}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as workdir:
            rates["bare loop"].append(bare(Trainer(config, workdir), steps))
        rates["trainer"].append(trained(config, steps))
    for name, values in rates.items():
        print(f"{name}: {statistics.median(values):.0f} images/s")
    ratios = [a / b for a, b in zip(rates["trainer"], rates["bare loop"], strict=True)]
    print(f"trainer / bare loop: {statistics.median(ratios):.3f} (rounds: {', '.join(f'{r:.3f}' for r in ratios)})")
    return cli.OK


if __name__ == "__main__":
    sys.exit(cli.run(main))
