"""Configuration: recipes are Python files, a recipe is an `ml_collections.ConfigDict`, any field can be overridden.

`configs/mae.py` means the file's first recipe (the algorithm's flagship on ImageNet), `configs/mae.py:NAME` another one,
`configs/mae.py:digits` the one on embedded data. A recipe file defines `get_config(recipe)`, usually by `pick`.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jaxpretrain.build import ConfigError, accepted_arguments, nearest

IMAGENET_MEAN = (123.675, 116.28, 103.53)  # RGB, 0 to 255
IMAGENET_STD = (58.395, 57.12, 57.375)


def base_config() -> ConfigDict:
    """Every field that the trainer knows, with its default. Recipes start from this and fill in the rest."""
    return ConfigDict(
        dict(
            recipe="",
            seed=0,
            # What learns: dict(type='MAE', backbone=..., neck=..., head=...).
            method=None,
            # Weights to start from: a workdir of ours, converted weights, a .pth or .safetensors file in any layout; or
            # dict(path=..., part='backbone', ...) with options of interop.read_weights. The optimizer starts afresh.
            load_from=None,
            # Data. `batch_size` is global and belongs to one optimizer step; `accumulative_counts` cuts it into
            # micro-batches that run one after the other, for when it does not fit.
            batch_size=256,
            accumulative_counts=1,
            data=dict(
                # `sampler`: dict(type='RepeatAugSampler', ...), see jaxpretrain/data/samplers.py; None: random order.
                # `later`: [dict(begin=EPOCHS, pipeline=[...], device_pipeline=[...]), ...], other images after so many epochs.
                train=dict(dataset=None, pipeline=[], device_pipeline=[], sampler=None, later=[]),
                # How the evaluators see both splits; `train` is seen through `val`'s pipeline too.
                val=dict(dataset=None, pipeline=[]),
                eval_batch_size=None,  # as batch_size if None
                num_workers=0,  # processes; 0: threads in this one
                num_threads=8,
                prefetch=2,  # batches waiting on the device
                max_bad=0.001,  # part of the images that may be unreadable before the run stops
            ),
            # Of the first view and, where it differs, of the second: the target picture of BEiT and CAE.
            # All are of R, G, B; `channel_order` is the network's: 'rgb', 'bgr' or 'grey'.
            data_preprocessor=dict(
                mean=IMAGENET_MEAN, std=IMAGENET_STD, second_mean=None, second_std=None, channel_order="rgb"
            ),
            # How long. Steps are optimizer steps; max_steps wins where both are given.
            max_epochs=100,
            max_steps=None,
            # Optimization, in MMEngine's terms.
            optim_wrapper=dict(optimizer=None, paramwise_cfg=None, clip_grad=None),
            param_scheduler=[],
            # Linear scaling: with `enable`, lr is multiplied by batch_size / base_batch_size.
            auto_scale_lr=dict(enable=False, base_batch_size=None),
            precise_bn=None,  # dict(num_samples=8192, interval=1): BatchNorm's statistics anew after every so many epochs
            # dict(momentum=1e-4, begin_iter=0, update_buffers=False): evaluate an average of the weights, and of BatchNorm's
            # statistics if `update_buffers`; otherwise with the newest of these.
            ema=None,
            # How it is computed.
            dtype="float32",  # 'bfloat16': activations; parameters and statistics stay float32
            remat="none",  # 'full' or 'dots': recompute activations in the backward pass
            scan_layers=False,  # run alike layers as one loop: compiles faster
            mesh=dict(data=-1, fsdp=1, tensor=1),  # -1: all remaining devices
            sharding_rules=None,  # [(regex, spec), ...]; see jaxpretrain/sharding.py
            # When things happen; `by_epoch` counts in epochs, else in steps. -1: never (an evaluation: only at the end).
            log_interval=50,
            evaluation=dict(interval=-1, by_epoch=True, at_start=False),
            evaluators=dict(),
            checkpoint=dict(
                interval=1,
                by_epoch=True,
                max_to_keep=3,
                save_best=None,  # a metric, such as 'knn/top1': the best checkpoint by it is kept besides the latest
                best_mode=None,  # 'max' or 'min'; by the metric's name if None
                step=None,  # restore this one instead of the latest
                ignore_config=False,  # restore although the config differs
            ),
            # Watching.
            profile=False,  # write a trace of a few early steps to workdir/profile
            transfer_guard=False,  # make hidden transfers between host and device an error
            peak_flops=None,  # of one device, for MFU where the device is not known
            tensorboard=True,
            wandb=None,  # dict(project=..., ...): arguments of wandb.init
        )
    )


def recipe_path(path: str) -> Path:
    """The recipe file that `path` means: as given, or the copy that travels inside the installed package."""
    given = Path(path)
    name = given.name if given.parent.name == "configs" else path
    here = Path(__file__).parent
    roots = [here / "configs", here.parent / "configs"]
    for candidate in [given, *(root / name for root in roots)]:
        if candidate.is_file():
            return candidate
    known = sorted({f"configs/{file.name}" for root in roots for file in root.glob("*.py")})
    raise ConfigError(f"There is no recipe file {path!r} (looked from {Path.cwd()}).{nearest(path, known)}")


def load_config(spec: str, overrides: Mapping[str, Any] | Sequence[str] = ()) -> ConfigDict:
    """The config of `FILE.py` or `FILE.py:RECIPE`, with overrides (`['a.b=v', ...]` or `{'a.b': v}`) applied.

    Raises ConfigError for an unknown file, recipe or field, naming the nearest valid one.
    """
    path, recipe = spec, None
    if ":" in spec:
        path, recipe = spec.rsplit(":", 1)
    file = recipe_path(path)
    module_spec = importlib.util.spec_from_file_location(f"jaxpretrain_recipe_{file.stem}", file)
    assert module_spec is not None and module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ConfigError(f"{file} defines no get_config(recipe), so it is not a recipe file")
    config = module.get_config(recipe) if recipe else module.get_config()
    apply_overrides(config, overrides)
    return config


def pick(recipes: Mapping[str, Callable[[], ConfigDict]], recipe: str | None) -> ConfigDict:
    """The config of one recipe of a file; its first one if `recipe` is None. Names are matched without regard to case."""
    name = recipe or next(iter(recipes))
    by_lower = {known.lower(): known for known in recipes}
    if name.lower() not in by_lower:
        raise ConfigError(f"There is no recipe {name!r} here.{nearest(name, recipes)}")
    name = by_lower[name.lower()]
    config = recipes[name]()
    config.recipe = name
    return config


def apply_overrides(config: ConfigDict, overrides: Mapping[str, Any] | Sequence[str]) -> None:
    """Sets fields in place. Strings are read as Python literals; a type that does not fit the field is an error."""
    if isinstance(overrides, Mapping):
        for path, value in overrides.items():
            _set(config, path, value)
        return
    for item in overrides:
        path, equals, text = item.partition("=")
        if not equals:
            raise ConfigError(f"--config.{path} needs a value: --config.{path}=VALUE")
        _set(config, path, _literal(text))


def _literal(text: str) -> Any:
    named = {"true": True, "false": False, "none": None, "null": None}
    if text.lower() in named:
        return named[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _set(config: Any, path: str, value: Any) -> None:
    node, parts = config, path.split(".")
    for depth, part in enumerate(parts):
        where = ".".join(parts[:depth]) or "the config"
        key: Any = part
        if isinstance(node, list | tuple):
            if not part.isdigit() or int(part) >= len(node):
                raise ConfigError(f"{where} is a list of {len(node)}; {part!r} is not one of its indices")
            key = int(part)
        elif not isinstance(node, Mapping | ConfigDict):
            raise ConfigError(f"{where} is {node!r} and has no field {part!r}; set it whole: --config.{where}=VALUE")
        elif key not in node and key not in _possible(node):
            raise ConfigError(f"There is no field {part!r} in {where}.{nearest(part, {*node, *_possible(node)})}")
        if depth < len(parts) - 1:
            if isinstance(node, Mapping | ConfigDict) and key not in node:
                raise ConfigError(f"{where}.{part} is not set; set it whole: --config.{where}.{part}=VALUE")
            node = node[key]
            continue
        old = node[key] if isinstance(node, list | tuple) or key in node else None
        new = _fit(path, old, value)
        if isinstance(node, tuple):
            raise ConfigError(f"{where} is a tuple; set it whole: --config.{where}={tuple(node)}")
        if isinstance(node, ConfigDict):
            with node.ignore_type(), node.unlocked():
                node[key] = new
        else:
            node[key] = new


def _possible(node: Any) -> set[str]:
    """Arguments that a component takes although its recipe does not mention them."""
    return set(accepted_arguments(node["type"])) if "type" in node else set()


def _fit(path: str, old: Any, value: Any) -> Any:
    """`value` in the type of the field that it replaces; ConfigError where it has another one."""
    if old is None or value is None:
        return value
    if isinstance(old, bool) or isinstance(value, bool):
        fits = isinstance(old, bool) and isinstance(value, bool)
    elif isinstance(old, int):
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        fits = isinstance(value, int | float) and not (isinstance(value, float))
    elif isinstance(old, float):
        value = float(value) if isinstance(value, int) else value
        fits = isinstance(value, float)
    elif isinstance(old, list | tuple):
        fits = isinstance(value, list | tuple)
        value = type(old)(value) if fits else value
    elif isinstance(old, Mapping | ConfigDict):
        fits = isinstance(value, Mapping)
    else:
        fits = isinstance(value, type(old)) or not isinstance(old, str)
    if not fits:
        kind = "dict" if isinstance(old, Mapping | ConfigDict) else type(old).__name__
        raise ConfigError(f"config.{path} is of type {kind} (now {old!r}); {value!r} does not fit")
    return value


def to_plain(config: Any, *, keep_callables: bool = False) -> Any:
    """The config as plain dicts, lists and scalars: what is written to config.json and compared on resume.

    Functions and classes become their names, unless `keep_callables`: then the result can be built from.
    """
    if isinstance(config, Mapping | ConfigDict):
        return {str(key): to_plain(value, keep_callables=keep_callables) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return [to_plain(value, keep_callables=keep_callables) for value in config]
    if callable(config) and not keep_callables:
        return f"{config.__module__}.{getattr(config, '__qualname__', type(config).__qualname__)}"
    return config
