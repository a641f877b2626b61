"""Cross-validates: `python -m jaxpretrain.tools.kfold_cross_valid --config=configs/X.py:RECIPE --num-splits=5 --workdir=DIR`.

Trains the recipe once per fold on the other folds of its training set, and evaluates it on the fold that was held out, in
place of its validation set. Fold i runs in DIR/fold<i>, from the seed of the config plus i; the folds themselves follow from
the seed alone. The same command skips folds that are done and continues the one that was stopped. DIR/kfold.md and
DIR/kfold.json hold the scores of all folds, with their mean and standard deviation.
"""

from __future__ import annotations

import json
import logging
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jaxpretrain import cli
from jaxpretrain.build import ConfigError
from jaxpretrain.config import load_config, to_plain

FLAGS = {
    "config": "recipe: configs/resnet.py:digits",
    "num-splits": "number of folds (default 5)",
    "fold": "train this one alone, from 0 (default: all of them, one after another)",
    "workdir": "folder for all folds and the table (default runs/RECIPE-kfold)",
}
SWITCHES = {"summary": "train nothing; only write and print the table of what is there"}
Scores = dict[str, float]

logger = logging.getLogger("jaxpretrain")


def main(argv: list[str]) -> int:
    flags = cli.parse(argv, FLAGS, SWITCHES, __doc__ or "")
    if not flags.config:
        raise ConfigError("--config is needed, e.g. --config=configs/resnet.py:digits")
    config = load_config(flags.config, flags.overrides)
    num_splits = _whole("num-splits", flags.values.get("num-splits", "5"), lowest=2)
    chosen = list(range(num_splits))
    if flags.fold is not None:
        chosen = [_whole("fold", flags.fold, lowest=0)]
        if chosen[0] >= num_splits:
            raise ConfigError(f"--fold={chosen[0]}: with --num-splits={num_splits} folds are 0 to {num_splits - 1}")
    workdir = Path(flags.workdir or f"runs/{config.recipe or 'run'}-kfold")
    if flags.summary:
        return _report(workdir, num_splits)
    from jaxpretrain import distributed
    from jaxpretrain.logs import setup_logging

    setup_logging()
    distributed.initialize()
    for fold in chosen:
        run_fold(fold_config(config, fold, num_splits), workdir / f"fold{fold}")
    return _report(workdir, num_splits)


def fold_config(config: ConfigDict, fold: int, num_splits: int) -> ConfigDict:
    """The config of one fold: its training set is that of the others, its validation set the fold itself.

    Raises:
        ConfigError: no evaluators, so nothing to compare; no training set.
    """
    if not any(config.evaluators.values()):
        raise ConfigError("cross-validation needs scores: the recipe has no evaluators (config.evaluators)")
    if config.data.train.dataset is None:
        raise ConfigError("config.data.train.dataset is not set")
    split = dict(
        type="KFoldDataset",
        dataset=config.data.train.dataset.to_dict(),
        fold=fold,
        num_splits=num_splits,
        seed=int(config.seed),
    )
    config = config.copy_and_resolve_references()
    with config.ignore_type(), config.unlocked():
        config.data.train.dataset = ConfigDict(split)
        config.data.val.dataset = ConfigDict(dict(split, test_mode=True))
        config.seed = int(config.seed) + fold
    return config


def run_fold(config: ConfigDict, workdir: Path) -> Scores:
    """The scores of a fold, at the end of its training; those that are there already are not computed again.

    Raises:
        ConfigError: the fold was trained with another configuration.
    """
    import jax

    from jaxpretrain.checkpoint_format import config_difference
    from jaxpretrain.trainer import train

    done = workdir / "scores.json"
    if done.is_file():
        record = json.loads(done.read_text())
        if different := config_difference(record["config"], to_plain(config)):
            lines = "\n  ".join(different)
            raise ConfigError(f"{workdir} was trained with another configuration:\n  {lines}\nChoose another --workdir")
        logger.info("%s is done", workdir)
        return record["scores"]
    logger.info("%s", workdir)
    scores = train(config, workdir) or _last_evaluation(workdir)  # a run that had ended trains and scores nothing
    if jax.process_index() == 0:
        partial = workdir / "scores.json.partial"
        partial.write_text(json.dumps(dict(scores=scores, config=to_plain(config)), indent=2))
        partial.replace(done)
    jax.clear_caches()  # the next fold compiles its own programs
    return scores


def _last_evaluation(workdir: Path) -> Scores:
    records = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    *_, last = [record for record in records if record["phase"] == "eval"]
    return {name: value for name, value in last.items() if "/" in name}


# --------------------------------------------------------------------------------------------------------- the table


def _report(workdir: Path, num_splits: int) -> int:
    """Writes and prints the table of the folds that are done."""
    import jax

    folds = {}
    for fold in range(num_splits):
        done = workdir / f"fold{fold}" / "scores.json"
        if done.is_file():
            record = json.loads(done.read_text())
            if (was := record["config"]["data"]["train"]["dataset"]["num_splits"]) != num_splits:
                raise ConfigError(f"{done.parent} is one of {was} folds, not of --num-splits={num_splits}")
            folds[fold] = record["scores"]
    if not folds:
        raise ConfigError(f"{workdir.absolute()} has no fold that is done (fold*/scores.json)")
    if jax.process_index() == 0:
        summary = summarise(folds)
        text = markdown(folds, summary, num_splits)
        (workdir / "kfold.md").write_text(text, encoding="utf-8")
        record = dict(num_splits=num_splits, folds={str(fold): scores for fold, scores in folds.items()}, **summary)
        (workdir / "kfold.json").write_text(json.dumps(record, indent=2))
        print(text)
    return cli.OK


def summarise(folds: Mapping[int, Scores]) -> dict[str, Scores]:
    """`mean` and `std` (of the sample, 0 for a single fold) of each score over the folds that have it."""
    columns = {name: [scores[name] for scores in folds.values() if name in scores] for name in _names(folds)}
    return dict(
        mean={name: statistics.fmean(column) for name, column in columns.items()},
        std={name: statistics.stdev(column) if len(column) > 1 else 0.0 for name, column in columns.items()},
    )


def markdown(folds: Mapping[int, Scores], summary: Mapping[str, Scores], num_splits: int) -> str:
    """One row for each fold, then their mean and standard deviation."""
    names = _names(folds)

    def row(title: str, scores: Mapping[str, float]) -> str:
        return " | ".join(["", title, *(f"{scores[n]:.2f}" if n in scores else "-" for n in names), ""]).strip()

    lines = [" | ".join(["", "fold", *names, ""]).strip(), "|" + " --- |" * (len(names) + 1)]
    lines += [row(str(fold), folds.get(fold, {})) for fold in range(num_splits)]
    lines += [row("mean", summary["mean"]), row("std", summary["std"])]
    return "\n".join([*lines, "", f"{len(folds)} of {num_splits} folds are done.", ""])


def _names(folds: Mapping[int, Scores]) -> Sequence[str]:
    return list(dict.fromkeys(name for scores in folds.values() for name in scores))


def _whole(flag: str, value: Any, lowest: int) -> int:
    if not str(value).isdecimal() or int(value) < lowest:
        raise ConfigError(f"--{flag}={value}: expected a whole number from {lowest} up")
    return int(value)


if __name__ == "__main__":
    sys.exit(cli.run(main))
