"""Models by name or configuration, with or without weights."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxpretrain.build import ConfigError, build
from jaxpretrain.zoo.index import ModelInfo, Preprocessing, is_model_name, missing_components, model_info

if TYPE_CHECKING:
    import jax
    from flax import nnx

    from jaxpretrain.zoo.weights import UrlMapping

_PACKED = ("LoadImageFromFile", "PackInputs")  # steps of MMPretrain's pipelines that are not geometry


class _Settings(dict):
    """A dictionary that may be a static attribute of a module: it hashes as the object that it is."""

    __hash__ = object.__hash__  # type: ignore[assignment]


def get_model(
    model: str | os.PathLike | Mapping[str, Any],
    pretrained: bool | str | os.PathLike | None = False,
    device: Any = None,
    *,
    reinit_head: bool = False,
    strict: bool = True,
    url_mapping: UrlMapping | None = None,
    seed: int = 0,
    fuse: bool = False,
    **overrides: Any,
) -> Any:
    """A model of the zoo, or of a configuration, in eval mode.

    A classifier takes images, float [B, H, W, 3], normalised (`model.info.preprocessing` says how), and gives logits
    [B, classes]; it has `extract_feat(images, stage='backbone'|'neck'|'pre_logits')`, `predict(images)`, `train()` and
    `eval()`. Names of pre-training give the method (MAE, SimCLR, ...), which has `extract_feat`. `model.config` is the
    configuration, `model.info` the zoo's entry. Each call outside of `jit` runs one operation after the other;
    `jaxpretrain.inference.jit(model)` compiles them together.

    Works inside `nnx.eval_shape`, for shapes without memory. With weights, nothing is initialised at random.

    Args:
        model: a name (see `list_models`; case does not matter); a recipe of ours, `configs/mae.py:RECIPE`; a .json file of
            a configuration, such as the one in a workdir; or a configuration: `dict(type='ImageClassifier', ...)`, or a
            mapping with such a one as `model` or `method`.
        pretrained: True: the published weights, which are downloaded to `~/.cache/jaxpretrain` (`JAXPRETRAIN_HOME`) and
            converted at the first use. A path or URL: those weights, in any layout of `jaxpretrain.interop`. False:
            random weights, each layer's default distribution.
        device: 'cpu', 'gpu', 'cuda:0', 'tpu:1', a `jax.Device`; None: JAX's default.
        reinit_head: with weights of another number of classes, initialise the head anew. Without it they are an error.
        strict: weights must fill the model exactly. False: where `overrides` add, remove or resize parts (Swin's norms of
            more `out_indices`), what fits is taken, the rest stays random, and a warning lists it.
        url_mapping: (regular expression, replacement) applied to URLs of weights, for a mirror or a local folder:
            `('https://.*/', './checkpoints/')`.
        seed: of random weights.
        fuse: the form for inference: branches are one layer, BatchNorms are melted into convolutions (`models.fuse`).
        overrides: changes to the configuration, merged into it: `backbone=dict(out_indices=(1, 2, 3))`. A part with
            another `type` replaces the old one, as `_delete_=True` does; None removes a part, and its weights are left
            out: `head=None, neck=None`.

    Example:
        >>> model = get_model("resnet18_8xb16_cifar10", head=dict(num_classes=7))
        >>> model(jnp.zeros((1, 32, 32, 3))).shape
        (1, 7)

    Raises:
        ConfigError: an unknown name or argument, naming the nearest; a model that does not exist yet in this version,
            naming what is missing; weights that do not fit (InteropError).
        DownloadError: weights that cannot be downloaded.
    """
    config, info, load_from = _describe(model)
    removed = [name for name, value in overrides.items() if value is None and config.get(name) is not None]
    if pretrained is True or (pretrained and pretrained == info.weights):
        config = _merge(config, info.released)
    info = dataclasses.replace(info, model=_merge(config, overrides))
    _check_exists(info)
    if pretrained is True and load_from:
        pretrained = load_from
    if _tracing():
        if pretrained:
            raise ConfigError(
                "get_model: weights cannot be loaded inside jit or eval_shape; pass pretrained=False there"
            )
        return _finish(_fused(_build(info, seed), fuse), info)

    import jax

    target = find_device(device)
    with jax.default_device(target):
        if pretrained:
            options: dict[str, Any] = dict(reinit_head=reinit_head, url_mapping=url_mapping, seed=seed)
            if strict or not overrides:
                module = _with_weights(info, pretrained, removed, **options)
            else:
                unchanged = dataclasses.replace(info, model=config)
                module = _with_random_weights(info, seed)
                _copy_what_fits(_with_weights(unchanged, pretrained, [], **options), module)
        else:
            module = _with_random_weights(info, seed)
        module = _fused(module, fuse)
    return place(_finish(module, info), target)


def init_model(config: Any, checkpoint: Any = None, device: Any = None, **overrides: Any) -> Any:
    """`get_model` under its name in MMClassification: without a checkpoint, weights are random."""
    return get_model(config, checkpoint, device, **overrides)


def find_device(device: Any) -> jax.Device | None:
    """The device called 'cpu', 'gpu', 'cuda:1', 'tpu', ...; None and devices as they are. Raises ConfigError."""
    import jax

    if device is None or isinstance(device, jax.Device):
        return device
    kind, _, number = str(device).partition(":")
    try:
        return jax.local_devices(backend=kind)[int(number or 0)]
    except (RuntimeError, IndexError, ValueError):
        kinds = {d.platform for d in (*jax.local_devices(), *jax.local_devices(backend="cpu"))}
        there = [f"{kind}:{i}" for kind in sorted(kinds) for i in range(len(jax.local_devices(backend=kind)))]
        raise ConfigError(f"There is no device {str(device)!r} here; there are {', '.join(there)}") from None


def place(module: nnx.Module, device: jax.Device | None) -> nnx.Module:
    """Moves the weights of a model to a device, in place; None leaves them where they are."""
    if device is not None:
        import jax
        from flax import nnx

        nnx.update(module, jax.device_put(nnx.state(module), device))
    return module


# From what the user gives to a configuration.


def _describe(model: Any) -> tuple[dict[str, Any], ModelInfo, Any]:
    """The model's configuration; what is known about it; and the weights that the configuration starts from."""
    if isinstance(model, str | os.PathLike):
        text = os.fspath(model)
        if is_model_name(text):
            info = model_info(text)
            return info.model, info, None
        if not re.search(r"\.(py|json)(:|$)", text):
            model_info(text)  # says which names are near
        model = _read_config(text)
    whole = _plain(model)
    if not isinstance(whole, dict):
        raise ConfigError(f"get_model: give a name, a file or a configuration, not {type(model).__name__}")
    config = whole if "type" in whole else whole.get("model") or whole.get("method")
    if not isinstance(config, dict) or "type" not in config:
        raise ConfigError(
            f"get_model: a configuration has a 'type', or a 'model' or 'method' that has; this one has {sorted(whole)}"
        )
    if config["type"] == "Supervised":  # our method around a classifier
        config = config["model"]
    info = ModelInfo(name="", collection="", model=config, preprocessing=_preprocessing(whole))
    return config, info, whole.get("load_from")


def _read_config(path: str) -> Any:
    if path.endswith(".json"):
        import json

        file = Path(path).expanduser()
        if not file.is_file():
            raise ConfigError(f"There is no file {path} (looked from {Path.cwd()})")
        try:
            return json.loads(file.read_text())
        except ValueError as error:
            raise ConfigError(f"{path} is not JSON: {error}") from error
    from jaxpretrain.config import load_config

    return load_config(path)


def _plain(value: Any) -> Any:
    """Mappings of any kind (ConfigDict, FrozenConfigDict, ...) as fresh dictionaries, all the way down."""
    if isinstance(value, Mapping) or hasattr(value, "to_dict"):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _merge(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(config)
    for key, value in changes.items():
        value, old = _plain(value), merged.get(key)
        if isinstance(value, dict):
            replaces = value.pop("_delete_", False)
            if isinstance(old, Mapping) and not replaces and value.get("type", old.get("type")) == old.get("type"):
                value = _merge(old, value)
        merged[key] = value
    return merged


def _preprocessing(whole: Mapping[str, Any]) -> Preprocessing | None:
    """That of a whole configuration, ours or MMPretrain's; None if it says nothing about images."""
    if not (normalisation := whole.get("data_preprocessor")):
        return None
    mean, std = tuple(normalisation["mean"]), tuple(normalisation["std"])
    if "data" in whole:
        pipeline, order = whole["data"]["val"]["pipeline"], normalisation.get("channel_order", "rgb")
    else:
        loader = whole.get("test_dataloader") or whole.get("val_dataloader") or {}
        pipeline = loader.get("dataset", {}).get("pipeline", [])
        order = "rgb" if normalisation.get("to_rgb") else "bgr"
        if order == "bgr":  # MMPretrain's images are BGR, and so are mean and std then
            mean, std = mean[::-1], std[::-1]
    steps = [step for step in pipeline if step.get("type") not in _PACKED]
    return Preprocessing(steps, mean, std, order) if steps else None


def _check_exists(info: ModelInfo) -> None:
    missing = missing_components(info.model)
    if missing and info.name:
        what = f"{', '.join(missing)}, which {'does' if len(missing) == 1 else 'do'} not exist yet in this version"
        raise ConfigError(f"{info.name} needs {what}; list_models(available_only=True) lists what can be built")


# From a configuration to a module.


def _tracing() -> bool:
    """Whether this runs inside `jit`, `eval_shape` or the like, where arrays have no values."""
    import jax
    import jax.numpy as jnp

    return isinstance(jnp.zeros(()), jax.core.Tracer)


def _build(info: ModelInfo, seed: int) -> Any:
    from flax import nnx

    return build(info.model, rngs=nnx.Rngs(seed))


def _with_random_weights(info: ModelInfo, seed: int) -> Any:
    from jaxpretrain.models.layers.init import draw_on_host

    with draw_on_host(seed):
        return _build(info, seed)


def _with_weights(
    info: ModelInfo,
    source: Any,
    removed: list[str],
    reinit_head: bool,
    url_mapping: UrlMapping | None,
    seed: int,
) -> Any:
    """The model with weights, which are read straight into it; without those of the parts called `removed`."""
    from jaxpretrain.interop import InteropError, read_model
    from jaxpretrain.zoo.weights import converted_weights, local_file

    if source is True and not info.name:
        raise ConfigError(
            "get_model: a configuration has no weights of its own; give pretrained=FILE, DIRECTORY or URL"
        )
    published = source is True or source == info.weights
    file = converted_weights(info, url_mapping) if published else local_file(source, url_mapping)
    options: dict[str, Any] = dict(drop=[rf"^{part}\." for part in removed], reinit_head=reinit_head, seed=seed)
    try:
        return read_model(info.model, file, **options).filled(seed)
    except InteropError as error:
        if not (published and info.note):
            raise
        raise InteropError(f"{error}\n{info.note}") from error


def _copy_what_fits(source: Any, target: Any) -> None:
    """Copies the arrays of `source` that `target` has in the same shape, and warns of all others."""
    import warnings

    from flax import nnx

    theirs = {path: variable.get_value() for path, variable in nnx.state(source).flat_state()}
    state = nnx.state(target)
    fresh = []
    for path, variable in state.flat_state():
        if path in theirs and theirs[path].shape == variable.shape:
            variable.set_value(theirs.pop(path))
        else:
            fresh.append(path)
    nnx.update(target, state)
    for what, paths in (("stays random", fresh), ("of the weights is left out", list(theirs))):
        if paths:
            names = ", ".join(".".join(map(str, path)) for path in paths)
            warnings.warn(f"get_model(strict=False): {what}: {names}", stacklevel=3)


def _fused(module: Any, fuse: bool) -> Any:
    if fuse:
        from jaxpretrain.models.fuse import for_inference

        for_inference(module)
    return module


def _finish(module: Any, info: ModelInfo) -> Any:
    module.info = info
    module.config = module._config = _Settings(info.model)
    module.eval()
    return module
