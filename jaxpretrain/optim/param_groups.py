"""Which parameter learns how fast and decays how much: MMEngine's `paramwise_cfg`, from paths and shapes alone.

A layer is known by its leaves. `scale` and `bias` together make it a normalisation layer (a LayerScale has no bias),
and a `kernel` [h, w, 1, c] a depth-wise convolution.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import jax
from jaxtyping import PyTree

from jaxpretrain.build import ConfigError, nearest
from jaxpretrain.optim.layer_decay import layer_numbers

logger = logging.getLogger("jaxpretrain")

_OPTIONS = (
    "custom_keys",
    "layer_decay_rate",
    "bias_lr_mult",
    "bias_decay_mult",
    "norm_decay_mult",
    "dwconv_decay_mult",
    "flat_decay_mult",
    "bypass_duplicate",  # every parameter is in our tree once
)


@dataclass(frozen=True)
class ParamGroup:
    """How one parameter departs from the optimizer's settings. Not a pytree, so that one can be a leaf of a tree.

    Attributes:
        lr_mult: times the learning rate.
        decay_mult: times the weight decay.
        lars_exclude: whether LARS leaves out its trust ratio.
        begin: how many steps it sleeps first: until then neither gradient, weight decay nor momentum touch it, and the
            optimizer counts its steps from there (the prototypes of SwAV, DINO's last layer).
        fix_lr: whether it keeps the base learning rate whatever the schedule does (SimSiam's predictor).
        momentum: in place of the optimizer's; SGD and LARS only (ODC's head).
    """

    lr_mult: float = 1.0
    decay_mult: float = 1.0
    lars_exclude: bool = False
    begin: int = 0
    fix_lr: bool = False
    momentum: float | None = None


_CUSTOM_OPTIONS = tuple(field.name for field in fields(ParamGroup))


def param_groups(params: PyTree, paramwise_cfg: Mapping[str, Any] | None = None) -> PyTree:
    """The settings that `paramwise_cfg` gives to each parameter: a pytree like `params`, of `ParamGroup`.

    Args:
        params: nested dicts of arrays or ShapeDtypeStructs; paths are keys joined by '/', such as
            'backbone/layers/0/ln1/scale'.
        paramwise_cfg: any of
            custom_keys: {part of a path: dict(lr_mult=, decay_mult=, lars_exclude=, begin=, fix_lr=, momentum=)}, the
                attributes of `ParamGroup`. The longest key that occurs in the path decides, alphabetically first among
                equally long ones, and no other rule for its kind applies. Separators may be '/' or '.' (ConfigDicts
                allow no '.'), and MMPretrain's leaf name `weight` fits `kernel` and `scale`, so its keys work unchanged.
            layer_decay_rate: the rate of each layer of the backbone is this times that of the layer above (see
                `layer_decay`), on top of any lr_mult.
            norm_decay_mult: for scales and biases of normalisation layers.
            bias_lr_mult: for biases that are not a normalisation layer's.
            bias_decay_mult: for all biases for which no norm_decay_mult is given.
            dwconv_decay_mult: for depth-wise convolutions.
            flat_decay_mult: for one-dimensional parameters to which no other rule applies.

    Raises:
        ConfigError: an unknown option, naming the nearest; layer decay on a backbone whose layers are not known.
    """
    cfg: Mapping[str, Any] = paramwise_cfg or {}
    for option in cfg:
        if option not in _OPTIONS:
            raise ConfigError(f"paramwise_cfg has no option {option!r}.{nearest(option, _OPTIONS)}")
    custom = _custom_groups(cfg.get("custom_keys") or {})
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    shapes = {jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape) for path, leaf in leaves}
    layers = layer_numbers(shapes) if cfg.get("layer_decay_rate") is not None else {}

    used: set[str] = set()
    groups = []
    for name, shape in shapes.items():
        key = next((key for key in custom if _occurs(key, name)), None)
        if key is not None:
            used.add(key)
        group = _by_kind(name, shape, shapes, cfg) if key is None else custom[key]
        if layers:
            layer, count = layers[name]
            group = replace(group, lr_mult=group.lr_mult * cfg["layer_decay_rate"] ** (count - 1 - layer))
        groups.append(group)
    if unused := sorted(set(custom) - used):
        logger.info("paramwise_cfg.custom_keys that occur in no parameter's name: %s", ", ".join(unused))
    return jax.tree.unflatten(treedef, groups)


def _custom_groups(custom_keys: Mapping[str, Mapping[str, Any]]) -> dict[str, ParamGroup]:
    """The rules in the order in which they are tried."""
    for key, options in custom_keys.items():
        for option in options:
            if option not in _CUSTOM_OPTIONS:
                hint = nearest(option, _CUSTOM_OPTIONS)
                raise ConfigError(f"paramwise_cfg.custom_keys[{key!r}] has no option {option!r}.{hint}")
        if options.get("begin", 0) < 0:
            raise ConfigError(f"paramwise_cfg.custom_keys[{key!r}].begin={options['begin']} must be at least 0")
    ordered = sorted(sorted(custom_keys), key=len, reverse=True)
    return {key: ParamGroup(**custom_keys[key]) for key in ordered}


def _occurs(key: str, name: str) -> bool:
    # A key such as '.cls_token' means a whole component, so a path of one component starts with the separator too.
    path = name if "/" in name else "/" + name
    parent, _, leaf = path.rpartition("/")
    spellings = {path, f"{parent}/weight" if leaf in ("kernel", "scale") else path}
    return any(key.replace("/", ".") in spelling.replace("/", ".") for spelling in spellings)


def _by_kind(
    name: str, shape: tuple[int, ...], shapes: Mapping[str, tuple[int, ...]], cfg: Mapping[str, Any]
) -> ParamGroup:
    parent, _, leaf = name.rpartition("/")
    beside = parent + "/" if parent else ""
    is_bias = leaf == "bias"
    is_norm = leaf in ("scale", "bias") and all(beside + name in shapes for name in ("scale", "bias"))
    kernel = shapes.get(f"{beside}kernel", ())
    rules = (
        (is_norm, "norm_decay_mult"),
        (is_bias, "bias_decay_mult"),
        (len(kernel) == 4 and kernel[2] == 1 and leaf in ("kernel", "bias"), "dwconv_decay_mult"),
        (len(shape) == 1, "flat_decay_mult"),
    )
    decay = next((cfg[rule] for applies, rule in rules if applies and cfg.get(rule) is not None), 1.0)
    lr = cfg.get("bias_lr_mult") if is_bias and not is_norm else None
    return ParamGroup(lr_mult=1.0 if lr is None else float(lr), decay_mult=float(decay))
