"""Compares representations: `python -m jaxpretrain.tools.bench_features CHECKPOINT ... --data=FOLDER --out=DIR`.

Runs the evaluation protocols of self-supervised learning on the frozen features of any checkpoints and writes one table
(DIR/bench.md, and DIR/bench.json) and one plot (DIR/bench.png) for all of them. A CHECKPOINT is a workdir, a directory of
converted weights, a name of the zoo (its published weights), or MODEL=FILE with a .pth or .safetensors file in any known layout,
MODEL being a name of the zoo or a recipe; MODEL=untrained, or `untrained` alone for the first one's network, is the baseline.

What is done already in DIR for the same checkpoint, data and settings is not done again. Protocols: docs/evaluation.md.

    python -m jaxpretrain.tools.bench_features runs/mae-digits untrained --data=digits --out=bench
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxpretrain import cli
from jaxpretrain.build import ConfigError, nearest
from jaxpretrain.tools import checkpoints
from jaxpretrain.tools.checkpoints import Checkpoint

logger = logging.getLogger("jaxpretrain")

FLAGS = {
    "data": "a folder with train/ and val/, each with one folder per class; a folder with one per class, of which a fifth "
    "is kept for scoring; PASCAL VOC's; or digits (default)",
    "out": "the folder to write (default: bench)",
    "protocols": "of knn, linear, lowshot, svm, levels, statistics, neighbours, semi, finetune, separated by commas "
    "(default: knn,linear,lowshot; lowshot,svm for VOC)",
    "size": "pixels of the images (default: as each checkpoint was evaluated, or trained)",
    "shots": "k of lowshot (default: 1,2,4,8,16,32,64,96)",
    "costs": "C of the SVMs (default: MMSelfSup's 19)",
    "levels": "stages or blocks for levels, lowshot and svm: all, or names separated by commas (lowshot and svm: the "
    "features alone by default)",
    "pool": "how levels become vectors: auto (default), grid, mean or cls",
    "epochs": "of semi and finetune (default: 20)",
    "lists": "files that list the images of semi, such as SimCLR's, separated by commas (default: 1 % and 10 % drawn)",
    "rates": "learning rates of semi (default: 0.001,0.01,0.1)",
    "heads": "multipliers of the new head's learning rate in semi (default: 1,10,100)",
    "batch_size": "images at a time (default: 256)",
    "threads": "that read images (default: 8)",
    "dtype": "float32 (default) or bfloat16",
    "seed": "of everything random (default: 0)",
}
FROZEN = ("knn", "linear", "lowshot", "svm", "levels", "statistics", "neighbours")
TRAINED = ("semi", "finetune")
VOC_PROTOCOLS = ("lowshot", "svm", "statistics", "neighbours")
Scores = dict[str, float]


def main(argv: list[str]) -> int:
    specs, rest = cli.positional(argv, FLAGS)
    flags = cli.parse(rest, FLAGS, usage=__doc__ or "")
    if flags.overrides:
        raise ConfigError(f"--config.{flags.overrides[0]}: this command takes no configuration")
    from jaxpretrain.logs import setup_logging
    from jaxpretrain.visualize.bench import plot_bench

    setup_logging()
    settings = read_settings(flags)
    out = Path(flags.out or "bench")
    out.mkdir(parents=True, exist_ok=True)
    results = bench(checkpoints.resolve_all(specs), settings, out)
    text = markdown(results, settings)
    (out / "bench.md").write_text(text, encoding="utf-8")
    print(text)
    print(f"{out / 'bench.md'}, {out / 'bench.json'}, {plot_bench(results, out / 'bench.png')}")
    return cli.OK


def read_settings(flags: cli.Flags) -> dict[str, Any]:
    """All that the scores depend on besides the checkpoint, checked."""
    data = flags.data or "digits"
    splits = labelled_data(data, seed := _whole("seed", flags.seed or "0"))
    multi_label = splits["train"]["type"] == "VOC"
    known = VOC_PROTOCOLS if multi_label else (*FROZEN, *TRAINED)
    chosen = _words(flags.protocols) or (("lowshot", "svm") if multi_label else ("knn", "linear", "lowshot"))
    for name in chosen:
        if name not in known:
            what = "for data with several labels per image" if name in (*FROZEN, *TRAINED) else "at all"
            raise ConfigError(f"--protocols: there is no {name!r} {what}.{nearest(name, known)}")
    return dict(
        data=data,
        splits=splits,
        protocols=[name for name in (*FROZEN, *TRAINED) if name in chosen],
        size=_whole("size", flags.size) if flags.size else None,
        shots=_numbers("shots", flags.shots, int),
        costs=_numbers("costs", flags.costs, float),
        levels=flags.levels if flags.levels in (None, "all") else _words(flags.levels),
        pool=flags.pool or "auto",
        epochs=_whole("epochs", flags.epochs or "20"),
        lists=_words(flags.lists),
        rates=_numbers("rates", flags.rates, float) or (0.001, 0.01, 0.1),
        heads=_numbers("heads", flags.heads, float) or (1.0, 10.0, 100.0),
        batch_size=_whole("batch_size", flags.batch_size or "256"),
        threads=_whole("threads", flags.threads or "8"),
        dtype=flags.dtype or "float32",
        seed=seed,
    )


def labelled_data(data: str, seed: int = 0) -> dict[str, dict[str, Any]]:
    """The data sets `train` and `val` that --data means."""
    if data == "digits":
        return {split: dict(type="Digits", split=split) for split in ("train", "val")}
    root = Path(data).expanduser()
    if not root.is_dir():
        raise ConfigError(f"--data={data}: there is no such folder; give one, or digits")
    if (root / "ImageSets" / "Main").is_dir():
        lists = [p.stem for p in (root / "ImageSets" / "Main").glob("*.txt")]
        splits = ("trainval", "test") if "test" in lists else ("train", "val")
        return {
            ours: dict(type="VOC", data_root=str(root), split=s)
            for ours, s in zip(("train", "val"), splits, strict=True)
        }
    if (root / "train").is_dir():
        score_on = next((name for name in ("val", "test") if (root / name).is_dir()), None)
        if score_on is None:
            raise ConfigError(f"--data={data} has train/ but neither val/ nor test/ to score on")
        classes = sorted(p.name for p in (root / "train").iterdir() if p.is_dir() and not p.name.startswith("."))
        if not classes:
            raise ConfigError(f"--data={data}: train/ has no folders, one for each class")
        kind = dict(type="CustomDataset", data_root=str(root))
        return {"train": dict(kind, data_prefix="train"), "val": dict(kind, data_prefix=score_on)}
    whole = dict(type="CustomDataset", data_root=str(root))
    part = dict(type="Subset", dataset=whole, fraction=0.8, seed=seed)
    return {"train": part, "val": dict(part, rest=True)}


# ------------------------------------------------------------------------------------------------------- running


def bench(found: Sequence[Checkpoint], settings: Mapping[str, Any], out: Path) -> dict[str, dict[str, Scores]]:
    """{label: {protocol: scores}} of all checkpoints; `out/bench.json` is written after each protocol."""
    path = out / "bench.json"
    record: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    results: dict[str, dict[str, Scores]] = {}
    for checkpoint in found:
        keys = {name: _fingerprint(checkpoint, settings, name) for name in settings["protocols"]}
        missing = [name for name, key in keys.items() if key not in record]
        if missing:
            logger.info("%s: %s", checkpoint.label, ", ".join(missing))
            for name, scores, seconds in _run(checkpoint, settings, missing, out):
                record[keys[name]] = dict(
                    checkpoint=checkpoint.label,
                    path=checkpoint.path,
                    data=settings["data"],
                    protocol=name,
                    scores=scores,
                    seconds=round(seconds, 1),
                )
                _write(path, record)
        results[checkpoint.label] = {name: record[key]["scores"] for name, key in keys.items()}
    _write(path, record)
    return results


def _run(checkpoint: Checkpoint, settings: Mapping[str, Any], protocols: Sequence[str], out: Path) -> Any:
    """(protocol, scores, seconds), one after the other."""
    import jax

    from jaxpretrain.evaluators.context import make_context, make_evaluators
    from jaxpretrain.recipes import recipe
    from jaxpretrain.sharding import make_mesh

    checkpoint, report = checkpoints.read(checkpoint)
    logger.info("%s: %s", checkpoint.label, report or "as initialised")
    pipeline = checkpoints.eval_pipeline(checkpoint, settings["size"])
    pixels = dict(mean=tuple(checkpoint.mean), std=tuple(checkpoint.std))
    config = recipe(
        method=checkpoint.encoder,
        data=dict(
            train=dict(dataset=settings["splits"]["train"]),
            val=dict(dataset=settings["splits"]["val"], pipeline=pipeline),
            num_threads=settings["threads"],
        ),
        data_preprocessor=pixels,
        batch_size=settings["batch_size"],
        dtype=settings["dtype"],
        seed=settings["seed"],
        evaluators={name: evaluator(name, settings) for name in protocols if name in FROZEN},
    )
    mesh = make_mesh(config.mesh)
    folder = out / "checkpoints" / f"{_slug(checkpoint.label)}-{_fingerprint(checkpoint, settings, 'network')[:8]}"
    context = make_context(config, mesh, folder)
    evaluators = make_evaluators(config, context)
    state = checkpoints.make_state(config, report, mesh)
    for name in evaluators:
        begin = time.perf_counter()
        yield name, evaluators[name].run(state), time.perf_counter() - begin
    trained = [name for name in protocols if name in TRAINED]
    if trained:
        batch = next(iter(context.loader("val")))
        dims = int(jax.eval_shape(context.features, state, batch).shape[1])
    context.clear()
    for name in trained:
        begin = time.perf_counter()
        scores = _fine_tuned(name, checkpoint, state, config, dims, batch["image"].shape[1:3], settings, folder)
        yield name, scores, time.perf_counter() - begin


def evaluator(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The evaluator of a protocol."""
    levels = settings["levels"]
    probed = {} if levels in (None, "all") else {"levels": levels}
    svm: dict[str, Any] = dict(
        type="LowShotSVM", pool=settings["pool"], levels=True if levels == "all" else levels or False
    )
    if settings["costs"]:
        svm["costs"] = settings["costs"]
    evaluators: dict[str, dict[str, Any]] = {
        "knn": dict(type="KNN", k=(10, 20, 100, 200)),
        "linear": dict(type="LinearProbe"),
        "lowshot": dict(svm, **({"k": settings["shots"]} if settings["shots"] else {})),
        "svm": dict(svm, k=(), full=True),
        "levels": dict(type="LevelProbe", pool=settings["pool"], **probed),
        "statistics": dict(type="FeatureStatistics"),
        "neighbours": dict(type="NearestNeighbours"),
    }
    return evaluators[name]


def _fine_tuned(
    protocol: str,
    checkpoint: Checkpoint,
    state: Mapping[str, Any],
    config: Any,
    dims: int,
    size: tuple[int, int],
    settings: Mapping[str, Any],
    folder: Path,
) -> Scores:
    """The scores of `semi` ('1pct_top1', ...) or `finetune` ('top1', ...)."""
    from flax import nnx

    from jaxpretrain.config import to_plain
    from jaxpretrain.interop import save_weights
    from jaxpretrain.tools.fine_tuning import Settings, fine_tune
    from jaxpretrain.train_state import make_method, split

    weights = folder / "weights"
    if not (weights / "model.json").is_file():
        graphdef = split(make_method(config))[0]
        model = nnx.merge(graphdef, dict(state["params"]), dict(state["model_state"])).model
        save_weights(model, weights, meta=dict(model=checkpoint.model))
    digits = settings["data"] == "digits"
    crop = dict(type="RandomResizedCrop", scale=size[::-1], backend="pillow")
    data = to_plain(config.data)
    data["train"] = dict(
        data["train"],
        pipeline=[dict(crop, crop_ratio_range=(0.6, 1.0)) if digits else crop],
        device_pipeline=[] if digits else [dict(type="RandomFlip", prob=0.5, direction="horizontal")],
    )
    fields = dict(data_preprocessor=to_plain(config.data_preprocessor), dtype=config.dtype)
    common = dict(epochs=settings["epochs"], batch_size=settings["batch_size"], seed=settings["seed"])

    def tuned(name: str, **options: Any) -> Scores:
        key = _fingerprint(checkpoint, settings, f"{protocol} {name}")[:8]
        plan = Settings(**common, **options)
        return fine_tune(checkpoint.encoder, str(weights), dims, data, plan, folder / f"{name}-{key}", **fields)

    if protocol == "finetune":
        return tuned("finetune", fraction=1.0, optimizer="AdamW", rates=(5e-4,), head_multipliers=(1,))
    parts: dict[str, dict[str, Any]] = {"1pct": dict(fraction=0.01), "10pct": dict(fraction=0.1)}
    if settings["lists"]:
        parts = {Path(path).stem: dict(names=path) for path in settings["lists"]}
    grid = dict(rates=settings["rates"], head_multipliers=settings["heads"])
    return {f"{name}_{k}": v for name, part in parts.items() for k, v in tuned(name, **part, **grid).items()}


def _fingerprint(checkpoint: Checkpoint, settings: Mapping[str, Any], protocol: str) -> str:
    """Another one for other weights, data or settings."""
    used = {"splits", "size", "batch_size", "dtype", "seed", "data"}
    used |= {"semi": {"epochs", "rates", "heads", "lists"}, "finetune": {"epochs"}}.get(protocol.split()[0], set())
    used |= {"lowshot": {"shots", "costs", "levels", "pool"}, "svm": {"costs", "levels", "pool"}}.get(protocol, set())
    used |= {"levels": {"levels", "pool"}}.get(protocol, set())
    if protocol == "network":
        used = {"size", "data", "dtype"}
    facts = [protocol, checkpoint.model, _stamp(checkpoint.path), checkpoint.pipeline, checkpoint.mean, checkpoint.std]
    facts += [[key, settings[key]] for key in sorted(used)]
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _stamp(path: str | None) -> list[Any]:
    """Where weights are and when they, or the steps of a run, were written."""
    if path is None or not Path(path).exists():
        return [path]
    place = Path(path).resolve()
    inside = place / "checkpoints" if (place / "checkpoints").is_dir() else place
    parts = sorted(inside.iterdir()) if place.is_dir() else [place]
    return [str(place), *([part.name, part.stat().st_mtime_ns] for part in parts)]


def _write(path: Path, record: Mapping[str, Any]) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(partial, path)


# ------------------------------------------------------------------------------------------------------- the table


def markdown(results: Mapping[str, Mapping[str, Scores]], settings: Mapping[str, Any]) -> str:
    """One Markdown table: a row for each score, a column for each checkpoint, the best of a row in bold."""
    rows = [("", *results)]
    for protocol in settings["protocols"]:
        names = list(dict.fromkeys(name for found in results.values() for name in found.get(protocol, {})))
        names.sort(key=lambda name: ("_" not in name and name in ("best", "level"), name.startswith("features_")))
        for name in names:
            title = row_title(protocol, name)
            if title is None:
                continue
            values = [found.get(protocol, {}).get(name) for found in results.values()]
            spread = [found.get(protocol, {}).get(f"{name}_std") for found in results.values()]
            best = max((v for v in values if v is not None), default=None) if _percent(name) else None
            cells = [_cell(v, s, name, v == best and len(values) > 1) for v, s in zip(values, spread, strict=True)]
            rows.append((title, *cells))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| "
        + " | ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        + " |"
        for row in rows
    ]
    rule = "|" + "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
    what = (
        f"Features on {settings['data']}: percent, mean average precision (mAP) in percent; ± over draws of the images."
    )
    return "\n".join([what, "", lines[0], rule, *lines[1:]]) + "\n"


def row_title(protocol: str, name: str) -> str | None:
    """What a row of the table is called; None for what has no row of its own."""
    if name.endswith("_std") or protocol == "neighbours":  # a picture; its score is of a few images
        return None
    head, _, kind = name.rpartition("_")
    kind = {"top1": "top-1", "top5": "top-5", "map": "mAP"}.get(kind, kind)
    if protocol == "knn":
        return f"kNN, k = {head[1:]}, {kind}"
    if protocol == "linear":
        return {"top1": "linear probe, top-1", "top5": "linear probe, top-5"}.get(name)
    if protocol == "lowshot" and head[:1] == "k":
        return f"low-shot SVM, k = {head[1:]}, {kind}"
    if protocol == "svm" and head == "full":
        return f"SVM, all images, {kind}"
    if protocol in ("lowshot", "svm"):
        return f"{'low-shot SVM' if protocol == 'lowshot' else 'SVM'}, {head or 'best level, from 1'}{', mAP' if head else ''}"
    if protocol == "levels":
        return f"linear probe, {head}, top-1" if head else "linear probe, best level, from 1"
    if protocol == "semi":
        part = head.replace("pct", " %")
        return f"fine-tuned, {part} of labels, " + {"lr": "best lr", "head": "best head multiplier"}.get(kind, kind)
    if protocol == "finetune":
        return {"top1": "fine-tuned, top-1", "top5": "fine-tuned, top-5"}.get(name)
    return {"std": "features: standard deviation", "effective_rank": "features: effective rank"}.get(
        name, f"features: {name}"
    )


def _percent(name: str) -> bool:
    return name.rsplit("_", 1)[-1] in ("top1", "top5", "map")


def _cell(value: float | None, spread: float | None, name: str, best: bool) -> str:
    if value is None:
        return "–"
    text = f"{value:.1f}" if _percent(name) else f"{value:.4g}"
    text = f"**{text}**" if best else text
    return f"{text} ± {spread:.1f}" if spread is not None else text


# ------------------------------------------------------------------------------------------------------- flags


def _words(text: str | None) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip()) if text else ()


def _whole(name: str, text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise ConfigError(f"--{name}={text} must be a whole number") from None
    if value < (0 if name == "seed" else 1):
        raise ConfigError(f"--{name}={text} is too small")
    return value


def _numbers(name: str, text: str | None, kind: type) -> tuple[Any, ...]:
    try:
        return tuple(kind(word) for word in _words(text))
    except ValueError:
        raise ConfigError(f"--{name}={text} must be numbers separated by commas") from None


def _slug(label: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in label)


if __name__ == "__main__":
    sys.exit(cli.run(main))
