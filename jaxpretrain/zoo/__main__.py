"""Lists the zoo: `python -m jaxpretrain.zoo [PATTERN] [--task='Image Classification'] [--available]`.

One line for each model: name, millions of parameters, published top-1 accuracy on ImageNet-1k, licence of the weights; and
what is missing, where this version cannot build it yet.
"""

from __future__ import annotations

import sys

from jaxpretrain import cli
from jaxpretrain.build import ConfigError
from jaxpretrain.zoo.index import ModelInfo, list_models, model_info

FLAGS = {"task": "only models with published results for this task; null: those without any"}
SWITCHES = {"available": "only models that this version can build"}


def main(argv: list[str]) -> int:
    patterns, rest = cli.positional(argv, FLAGS)
    flags = cli.parse(rest, FLAGS, SWITCHES, __doc__ or "")
    if len(patterns) > 1:
        raise ConfigError(f"Give one pattern, in quotes; got {' '.join(patterns)}")
    names = list_models(patterns[0] if patterns else None, task=flags.task, available_only=bool(flags.available))
    for name in names:
        print(describe(model_info(name)))
    there = sum(name.available for name in names)
    print(f"{len(names)} models, of which {there} can be built", file=sys.stderr)
    return cli.OK


def describe(info: ModelInfo) -> str:
    """One line about a model."""
    params = f"{info.built['params'] / 1e6:8.1f} M" if "params" in info.built else " " * 10
    top1 = [r["metrics"].get("Top 1 Accuracy") for r in info.results if r["dataset"] == "ImageNet-1k" and r["metrics"]]
    accuracy = f"{top1[0]:6.2f}" if top1 and top1[0] is not None else " " * 6
    mark = f"   not yet: {', '.join(info.missing)}" if info.missing else ""
    return f"{info.name.lower():72}{params} {accuracy}  {info.license or 'no weights'}{mark}"


if __name__ == "__main__":
    sys.exit(cli.run(main))
