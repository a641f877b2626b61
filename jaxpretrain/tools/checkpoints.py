"""From what a user calls a checkpoint to a network with weights: what the tools for several checkpoints share."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from jaxpretrain.build import ConfigError
from jaxpretrain.config import IMAGENET_MEAN, IMAGENET_STD
from jaxpretrain.tools.from_torch import model_config

UNTRAINED = "untrained"
SPEC_HELP = (
    "a workdir (or one of its checkpoints/STEP), a converted directory, a name of the zoo (its published weights), "
    "MODEL=FILE with a .pth or .safetensors file in any layout, or MODEL=untrained; MODEL is a name of the zoo, a recipe "
    "(configs/mae.py:RECIPE) or a .json file"
)


@dataclass(frozen=True)
class Checkpoint:
    """A network and where its weights are.

    Attributes:
        label: what to call it in tables; short.
        model: the configuration of a method or a classifier.
        path: of the weights; None for none: as it is initialised.
        pipeline: host transforms of its images in evaluation, or None if nothing is known.
        mean, std: of its images, RGB, in grey levels.
        channel_order: of the network, 'rgb', 'bgr' or 'grey'.
        train_pipeline: host transforms of its pre-training, if known: masks are made there.
    """

    label: str
    model: dict[str, Any]
    path: str | None
    pipeline: Sequence[Mapping[str, Any]] | None = None
    mean: Sequence[float] = IMAGENET_MEAN
    std: Sequence[float] = IMAGENET_STD
    channel_order: str = "rgb"
    train_pipeline: Sequence[Mapping[str, Any]] = field(default=())

    @property
    def encoder(self) -> dict[str, Any]:
        """The network as a method of evaluation."""
        return dict(type="Encoder", model=self.model, channel_order=self.channel_order)


def resolve_all(specs: Sequence[str]) -> list[Checkpoint]:
    """The checkpoints that a list of specs means, with labels of their own; see `SPEC_HELP`.

    `untrained` alone is the network of the first of the others.

    Raises:
        ConfigError: nothing given; not a spec; an unknown model.
    """
    named = [resolve(spec) for spec in specs if spec != UNTRAINED]
    if not named:
        raise ConfigError(f"Which checkpoints? Each is {SPEC_HELP}")
    found = [
        replace(named[0], label=UNTRAINED, path=None) if spec == UNTRAINED else named[i - specs[:i].count(UNTRAINED)]
        for i, spec in enumerate(specs)
    ]
    labels = [c.label for c in found]
    return [
        c if labels.count(c.label) == 1 else replace(c, label=f"{c.label} ({labels[: i + 1].count(c.label)})")
        for i, c in enumerate(found)
    ]


def resolve(spec: str) -> Checkpoint:
    """The checkpoint that one spec means; see `SPEC_HELP`."""
    from jaxpretrain.zoo.index import is_model_name

    name, equals, path = spec.rpartition("=")
    if equals:
        if path != UNTRAINED and not Path(path).exists() and "://" not in path:
            raise ConfigError(f"{spec}: there are no weights at {Path(path).absolute()}")
        known = _of_name(name)
        if path == UNTRAINED:
            return replace(known, label=f"{known.label}, untrained", path=None)
        return replace(known, label=f"{known.label}: {Path(path).stem}", path=path)
    given = Path(spec)
    if given.is_dir():
        return _of_directory(given)
    if given.suffix in (".pth", ".pt", ".bin", ".safetensors"):
        what = "" if given.exists() else f" (and there is no file {given})"
        raise ConfigError(f"{spec}: which model are these weights of?{what} Give MODEL={spec}; --help says more")
    if is_model_name(spec):
        from jaxpretrain.zoo.index import model_info
        from jaxpretrain.zoo.weights import converted_weights

        return replace(_of_name(spec), path=str(converted_weights(model_info(spec))))
    if ".py" in spec:
        raise ConfigError(f"{spec} is a recipe: give {spec}=FILE, or {spec}={UNTRAINED}")
    raise ConfigError(f"{spec} is no directory and no model of the zoo. A checkpoint is {SPEC_HELP}")


def _of_name(name: str) -> Checkpoint:
    """The network of a zoo name, a recipe or a .json file, without weights."""
    from jaxpretrain.zoo.index import is_model_name, model_info

    model = model_config(name)
    if is_model_name(name):
        preprocessing = model_info(name).preprocessing
        about: dict[str, Any] = {}
        if preprocessing is not None:
            about = {key: getattr(preprocessing, key) for key in ("pipeline", "mean", "std", "channel_order")}
        return Checkpoint(name, model, None, **about)
    if name.endswith(".json"):
        return _with_data(Checkpoint(Path(name).stem, model, None), json.loads(Path(name).read_text()))
    from jaxpretrain.config import load_config, to_plain

    config = to_plain(load_config(name))
    return _with_data(Checkpoint(_recipe_label(name, config), model, None), config)


def _of_directory(path: Path) -> Checkpoint:
    """A workdir, one of its steps, or converted weights."""
    for folder in (path, path.parent, path.parent.parent):
        if (folder / "config.json").is_file():
            config = json.loads((folder / "config.json").read_text())
            if not config.get("method"):
                continue
            method = config["method"]
            model = method["model"] if method.get("type") == "Supervised" else method
            label = folder.resolve().name if folder == path else f"{folder.resolve().name}, step {path.name}"
            return _with_data(Checkpoint(label, model, str(path)), config)
    if (path / "model.json").is_file():
        about = json.loads((path / "model.json").read_text())
        if about.get("model"):
            known = _of_name(about["name"]) if _is_name(about.get("name")) else Checkpoint(path.name, {}, None)
            return replace(known, label=path.resolve().name, model=about["model"], path=str(path))
    raise ConfigError(f"{path} is neither a workdir nor converted weights that say of which model; give MODEL={path}")


def _is_name(name: Any) -> bool:
    from jaxpretrain.zoo.index import is_model_name

    return isinstance(name, str) and is_model_name(name)


def _recipe_label(name: str, config: Mapping[str, Any]) -> str:
    recipe = config.get("recipe") or ""
    return f"{Path(name.split(':')[0]).stem}:{recipe}" if recipe else name


def _with_data(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Checkpoint:
    """With what a run's configuration says about its images."""
    data, pixels = config.get("data") or {}, config.get("data_preprocessor") or {}
    return replace(
        checkpoint,
        pipeline=(data.get("val") or {}).get("pipeline") or None,
        train_pipeline=(data.get("train") or {}).get("pipeline") or (),
        mean=pixels.get("mean") or IMAGENET_MEAN,
        std=pixels.get("std") or IMAGENET_STD,
        channel_order=pixels.get("channel_order") or "rgb",
    )


def eval_pipeline(checkpoint: Checkpoint, size: int | None = None) -> list[dict[str, Any]]:
    """The host transforms of its images in evaluation; with `size`, resized and cropped to that.

    Where nothing is known: the size that the network's position table is for, else 224.
    """
    if size is None and checkpoint.pipeline:
        return [dict(step) for step in checkpoint.pipeline]
    if size is None:
        from jaxpretrain.build import abstract
        from jaxpretrain.tools.compare import image_size

        size = image_size(abstract(checkpoint.model))
    edge = dict(type="ResizeEdge", scale=round(size * 256 / 224), edge="short", backend="pillow")
    return [edge, dict(type="CenterCrop", crop_size=size)]


def read(checkpoint: Checkpoint) -> tuple[Checkpoint, Any]:
    """(the checkpoint, its weights as an `interop.Report`; None without any).

    Where the file has the backbone alone, it is taken for that: a classifier then loses its head, and the other parts of a
    method stay as they are initialised.

    Raises:
        InteropError: the weights do not fit.
    """
    from jaxpretrain.build import abstract
    from jaxpretrain.interop import InteropError, read_weights
    from jaxpretrain.zoo.weights import local_file

    if checkpoint.path is None:
        return checkpoint, None
    path = local_file(checkpoint.path)
    try:
        return checkpoint, read_weights(abstract(checkpoint.encoder), path)
    except InteropError as error:
        whole = error
    model = dict(checkpoint.model)
    if model.get("type") == "ImageClassifier":
        model["head"] = None
    bare = replace(checkpoint, model=model)
    encoder = abstract(bare.encoder)
    try:
        return bare, read_weights(encoder, path, part="backbone")
    except InteropError:
        if not hasattr(encoder.model, "backbone"):
            raise whole from None
    try:
        report = read_weights(encoder.model.backbone, path)
    except InteropError:
        raise whole from None  # of the three, this one says most
    return bare, replace(report, arrays={("model", "backbone", *p): array for p, array in report.arrays.items()})


def make_state(config: Any, report: Any, mesh: Any) -> dict[str, Any]:
    """The state of `config`, whose method holds the network as `model`, with the weights of `report`, on all devices."""
    import jax
    import numpy as np
    import optax
    from jax.sharding import NamedSharding, PartitionSpec

    from jaxpretrain.train_state import init_state

    def init() -> dict[str, Any]:
        state = init_state(config, optax.identity())
        return {name: state[name] for name in ("params", "model_state", "ema", "step")}

    on_all = NamedSharding(mesh, PartitionSpec())
    if report is None:
        return jax.jit(init, out_shardings=on_all)()
    shapes = jax.eval_shape(init)
    weights = {name: shapes[name] for name in ("params", "model_state")}
    paths = {tuple(key.key for key in path[1:]) for path, _ in jax.tree_util.tree_leaves_with_path(weights)}
    base = weights if paths <= report.arrays.keys() else jax.device_get(jax.jit(init)())

    def fill(path: tuple, leaf: Any) -> np.ndarray:
        array = report.arrays.get(tuple(key.key for key in path[1:]))
        return np.asarray(leaf if array is None else array, leaf.dtype)

    filled = jax.tree_util.tree_map_with_path(fill, {name: base[name] for name in weights})
    return jax.device_put(dict(filled, ema={}, step=np.zeros((), np.int32)), on_all)
