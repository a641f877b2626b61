"""Trains a method: `python -m jaxpretrain.main --config=configs/mae.py:RECIPE --workdir=DIR [--config.a.b=v ...]`.

The same command continues a run that was stopped or killed, from its latest checkpoint.
"""

from __future__ import annotations

import sys

from jaxpretrain import cli
from jaxpretrain.build import ConfigError
from jaxpretrain.config import load_config

FLAGS = {
    "config": "recipe: configs/mae.py (the flagship), configs/mae.py:RECIPE, configs/mae.py:digits",
    "workdir": "folder for checkpoints, logs and pictures (default runs/RECIPE)",
}
SWITCHES = {"print_config": "show the resulting config and exit"}


def main(argv: list[str]) -> int:
    flags = cli.parse(argv, FLAGS, SWITCHES, __doc__ or "")
    if not flags.config:
        raise ConfigError("--config is needed, e.g. --config=configs/mae.py:digits")
    config = load_config(flags.config, flags.overrides)
    if flags.print_config:
        print(config)
        return cli.OK
    from jaxpretrain import distributed
    from jaxpretrain.logs import setup_logging

    setup_logging()
    distributed.initialize()
    from jaxpretrain.trainer import train

    train(config, flags.workdir or f"runs/{config.recipe or 'run'}")
    return cli.OK


def console() -> int:
    """The entry point of the `jaxpretrain` command."""
    return cli.run(main)


if __name__ == "__main__":
    sys.exit(cli.run(main))
