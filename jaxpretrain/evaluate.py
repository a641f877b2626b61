"""Scores a checkpoint: `python -m jaxpretrain.evaluate --config=configs/mae.py:digits --checkpoint=runs/mae-digits`.

Runs the evaluators of the config (choose others with `--config.evaluators=...`) and prints one line of JSON. `--checkpoint` is a
run's workdir or its checkpoints folder; without it the network is scored as it is initialised.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from jaxpretrain import cli
from jaxpretrain.build import ConfigError
from jaxpretrain.config import load_config

FLAGS = {
    "config": "recipe: configs/mae.py:RECIPE, as for training",
    "checkpoint": "workdir or checkpoints folder of a run; none: the untrained network",
    "step": "which checkpoint: 'latest' (default), 'best' or a step",
    "workdir": "folder for pictures and for scores.json (default: none are written)",
}


def evaluate(
    config: Any, checkpoint: str | Path | None = None, step: str | int = "latest", workdir: str | Path | None = None
) -> dict[str, float]:
    """The scores of all evaluators in the config, by `EVALUATOR/SCORE`.

    Args:
        config: the recipe; its `method` must fit the checkpoint.
        checkpoint: a run's workdir or checkpoints folder; None scores the untrained network.
        step: 'latest', 'best' or a step number.
        workdir: where evaluators may write pictures.

    Raises:
        ConfigError: no evaluators, or data that is missing. CheckpointError: weights missing, damaged or of another shape.
    """
    import jax
    import optax

    from jaxpretrain.checkpoint import load_params
    from jaxpretrain.evaluators.base import run_all
    from jaxpretrain.evaluators.context import make_context, make_evaluators
    from jaxpretrain.sharding import make_mesh, tree_shardings
    from jaxpretrain.train_state import init_state

    mesh = make_mesh(config.mesh)
    context = make_context(config, mesh, Path(workdir) if workdir else None)
    evaluators = make_evaluators(config, context)
    if not evaluators:
        raise ConfigError("config.evaluators is empty; e.g. --config.evaluators=\"{'knn': {'type': 'KNN'}}\"")
    init = lambda: init_state(config, optax.identity())  # noqa: E731
    abstract = jax.eval_shape(init)
    shardings = tree_shardings(abstract, mesh, config.sharding_rules)
    if checkpoint is None:
        state = jax.jit(init, out_shardings=shardings)()
    else:
        wanted = jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), abstract, shardings
        )
        loaded = load_params(checkpoint, step, wanted)
        state = dict(loaded.state, step=loaded.step)
    return run_all(evaluators, state)


def main(argv: list[str]) -> int:
    flags = cli.parse(argv, FLAGS, usage=__doc__ or "")
    if not flags.config:
        raise ConfigError("--config is needed, e.g. --config=configs/mae.py:digits")
    from jaxpretrain import distributed
    from jaxpretrain.logs import setup_logging

    setup_logging()
    distributed.initialize()
    step = flags.step or "latest"
    config = load_config(flags.config, flags.overrides)
    scores = evaluate(config, flags.checkpoint, int(step) if step.isdigit() else step, flags.workdir)
    text = json.dumps({name: round(value, 4) for name, value in scores.items()})
    if flags.workdir:
        Path(flags.workdir).mkdir(parents=True, exist_ok=True)
        (Path(flags.workdir) / "scores.json").write_text(text + "\n")
    print(text)
    return cli.OK


if __name__ == "__main__":
    sys.exit(cli.run(main))
