"""Recipes against those of MMPretrain's zoo, whose resolved settings are in `tests/golden/recipes`: one file an algorithm.

A golden file has `names`: name in the zoo -> the recipe that made it (weights of several names may have one recipe; recipes
without weights go by their own name), `recipes`: its settings, and `followers`: pretraining -> those on its encoder. Both
sides are brought to one form (`ours`, `theirs`): what they do not say is filled in with our classes' defaults, so that only
what makes a difference is compared. Names are held together by MMPretrain's conventions: `8xb32` is 8 GPUs with 32 images
each. Colours are B, G, R there and R, G, B here.
"""

from __future__ import annotations

import functools
import gzip
import inspect
import json
import math
import re
from typing import Any

import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict

from jaxpretrain.build import ConfigError, resolve
from jaxpretrain.config import load_config, to_plain
from jaxpretrain.data import device, host_transforms
from jaxpretrain.data.phases import phases_of
from jaxpretrain.interop import mmpretrain
from jaxpretrain.interop.weights import read_weights
from jaxpretrain.optim import learning_rates, weight_decays
from jaxpretrain.optim.param_groups import ParamGroup, param_groups
from jaxpretrain.train_state import make_method, split
from tests.parity import GOLDEN, load_golden
from tests.test_config import ALL

# Where ours depart, why. Every entry is tested to be a departure.
BATCH_OF_THE_NAME = {"batch": "the file's images per GPU are not those of its name, to which its learning rate belongs"}
FORGOTTEN_BATCH = {
    "batch": "the file forgets the images per GPU of its name; it has those of the files that it builds on"
}
SOFT_LABELS = {
    f"method.model.head.{part}": "mixed labels go to the head of single labels, whose loss takes them as well"
    for part in ("type", "loss.use_soft")
}
LATE_JITTER = {"augmentation order": "colours change on the device, so after cropping instead of before"}
WITHOUT_TEACHER = {
    "method.model.head.distillation": "a head that learns from a teacher cannot train, in MMPretrain neither"
}
DEVIATIONS: dict[str, dict[str, str]] = {
    "beit_beit-base-p16_8xb256-amp-coslr-300e_in1k": LATE_JITTER,
    "beitv2_beit-base-p16_8xb256-amp-coslr-300e_in1k": LATE_JITTER,
    "beitv2_beit-base-p16_8xb256-amp-coslr-1600e_in1k": LATE_JITTER,
    **{
        f"convnext-{arch}_3rdparty_in21k": {
            f"method.model.{part}": "the file builds on the base model, to which its weights do not belong"
            for part in ("backbone.arch", "head.in_channels")
        }
        for arch in ("large", "xlarge")
    },
    "convnextv2-tiny_spark-pre_300e_in1k": BATCH_OF_THE_NAME,
    **{
        f"deit3-large-p16_{weights}3rdparty_in1k-384px": {"auto_scale_lr": "the file has 1025 for 64 times 16 images"}
        for weights in ("", "in21k-pre_")
    },
    "densecl_resnet50_8xb32-coslr-200e_in1k": {
        "method.start_iters": "the dense loss begins after 1,000 steps in the paper's code; MMPretrain's recipe lost its hook"
    },
    "itpn-clip-b_hivit-base-p16_8xb256-amp-coslr-300e_in1k": LATE_JITTER,
    "itpn-clip-b_hivit-base-p16_8xb256-amp-coslr-800e_in1k": LATE_JITTER,
    "resnet50_8xb16-mixup_cifar10": SOFT_LABELS,
    "resnet50_8xb32-mixup_in1k": SOFT_LABELS,
    "resnet50_8xb32-cutmix_in1k": SOFT_LABELS
    | {
        "method.model.train_cfg.augments": "MMPretrain's file still has the transform's name and arguments of version 0"
    },
    "simclr_resnet50_16xb256-coslr-800e_in1k": BATCH_OF_THE_NAME,
    "simmim_swin-base-w6_16xb128-amp-coslr-800e_in1k-192px": BATCH_OF_THE_NAME,
    "simmim_swin-large-w12_16xb128-amp-coslr-800e_in1k-192px": BATCH_OF_THE_NAME,
    "vit-huge-p14_mae-1600e-pre_32xb8-coslr-50e_in1k-448px": {
        "batch": "the file forgets the 8 images per GPU of its name; ours then scales the learning rate with the batch"
    },
    "vgg16_8xb16_voc": {
        "paramwise_cfg": "the file's key, `.backbone.classifier`, fits no parameter there: names do not begin with a dot"
    },
    **dict.fromkeys(("hornet-tiny_3rdparty_in1k", "hornet-tiny-gf_3rdparty_in1k"), BATCH_OF_THE_NAME),
    **{f"efficientformer-{arch}_3rdparty_8xb128_in1k": WITHOUT_TEACHER for arch in ("l1", "l3", "l7")},
    **{f"levit-{arch}_3rdparty_in1k": WITHOUT_TEACHER for arch in ("128s", "128", "192", "256", "384")},
    **{f"edgenext-{arch}_3rdparty_in1k": FORGOTTEN_BATCH for arch in ("xxsmall", "xsmall", "small", "base")},
    **dict.fromkeys(("edgenext-small-usi_3rdparty_in1k", "edgenext-base_3rdparty-usi_in1k"), FORGOTTEN_BATCH),
    **{f"tinyvit-{arch}_3rdparty_in1k": FORGOTTEN_BATCH for arch in ("5m", "11m", "21m")},
    **{f"tinyvit-{arch}_in21k-distill-pre_3rdparty_in1k": FORGOTTEN_BATCH for arch in ("5m", "11m", "21m")},
    **{f"tinyvit-21m_in21k-distill-pre_3rdparty_in1k-{size}px": FORGOTTEN_BATCH for size in (384, 512)},
}


@functools.cache
def golden() -> dict[str, dict[str, Any]]:
    """name -> dict(algorithm, path, settings, followers)."""
    found = {}
    for file in sorted((GOLDEN / "recipes").glob("*.json.gz")):
        data = json.loads(gzip.decompress(file.read_bytes()))
        algorithm = file.name.removesuffix(".json.gz")
        for name, path in data["names"].items():
            followers = data["followers"].get(name, [])
            found[name] = dict(algorithm=algorithm, path=path, settings=data["recipes"][path], followers=followers)
    return found


PAIRS = [(file, name) for file, name in ALL if name in golden()]


# ---------------------------------------------------------------------------------------------------------------------
# One form for both


@functools.cache
def defaults(component: Any) -> dict[str, Any]:
    """The arguments of a class that may be left out; those of its parents where it hands arguments on."""
    found: dict[str, Any] = {}
    for cls in component.__mro__ if inspect.isclass(component) else [component]:
        function = cls.__dict__.get("__init__") if inspect.isclass(cls) else cls
        if function is None or cls is object:
            continue
        try:
            parameters = inspect.signature(function).parameters.values()
        except ValueError:
            break
        for parameter in parameters:
            if parameter.default is not inspect.Parameter.empty:
                found.setdefault(parameter.name, parameter.default)
        if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
            break
    return found


def component(kind: Any) -> Any:
    if kind in host_transforms.TRANSFORMS:
        return host_transforms.host_transform(kind)
    if kind in device.TRANSFORMS:
        return device.TRANSFORMS[kind]
    try:
        return resolve(kind)
    except (ConfigError, ImportError, AttributeError):
        return None


def filled(cfg: Any) -> Any:
    """The description with all arguments that it leaves to defaults; tuples as lists."""
    if isinstance(cfg, dict):
        known = defaults(component(cfg["type"])) if "type" in cfg and component(cfg["type"]) is not None else {}
        full = {**known, **cfg}
        return {k: filled(v) for k, v in full.items() if k not in IRRELEVANT and not is_ours(k, full)}
    if isinstance(cfg, list | tuple):
        return [filled(value) for value in cfg]
    return cfg


# What only matters in PyTorch, is not in our classes, or is compared elsewhere.
IRRELEVANT = {"topk", "cal_acc", "with_cp", "data_preprocessor", "rngs", "pretrained", "requires_grad"}


def is_ours(key: str, cfg: dict[str, Any]) -> bool:
    """Whether this is the number of groups of a BatchNorm, not of channels: MMPretrain has as many as GPUs."""
    return key == "groups" and "width_per_group" not in cfg and not str(cfg.get("type")).startswith("ShuffleNet")


def network(backbone: dict[str, Any]) -> dict[str, Any]:
    """What files of weights are of: LoRA's is around it."""
    return backbone["module"] if backbone["type"] == "LoRAModel" else backbone


def model_of(cfg: dict[str, Any], encoder_is_loaded: bool) -> dict[str, Any]:
    """A model with all its arguments; initialisations as lists, without those that are overwritten by files."""

    def tidy(node: Any) -> Any:
        if isinstance(node, list):
            return [tidy(value) for value in node]
        if not isinstance(node, dict):
            return node
        node = {key: tidy(value) for key, value in node.items()}
        if "init_cfg" in node:
            rules = node["init_cfg"] if isinstance(node["init_cfg"], list) else [node["init_cfg"]]
            node["init_cfg"] = [rule for rule in rules if rule] or None
        return {key: value for key, value in node.items() if value is not None}

    full = filled(cfg)
    if encoder_is_loaded:
        network(full["model"]["backbone"])["init_cfg"] = None
    if isinstance(full.get("target_generator"), dict):  # its weights are a file's, in one way or another
        full["target_generator"]["init_cfg"] = None
    return tidy(full)


def views(*pipelines: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The transforms of each view, one after the other."""
    found: list[list[dict[str, Any]]] = [[]]
    for step in (step for pipeline in pipelines for step in pipeline):
        if step["type"] == "Pictures":  # several of one crop, changed alike
            found = [[*view, *step["transforms"]] for view in found]
        elif step["type"] == "MultiView":
            numbers, chains = step["num_views"], step["transforms"]
            numbers = [numbers] * len(chains) if isinstance(numbers, int) else numbers
            parts = [chain for number, chain in zip(numbers, chains, strict=True) for _ in range(number)]
            found = found * len(parts) if len(found) == 1 else found
            found = [[*view, *part] for view, part in zip(found, parts, strict=True)]
        else:
            found = [[*view, step] for view in found]
    return found


def transform(step: dict[str, Any], bgr: bool) -> dict[str, Any] | None:
    """A transform with all its arguments; None for those that do nothing here."""
    step = json.loads(json.dumps(step))
    if step["type"] in ("LoadImageFromFile", "PackInputs", "ToPIL", "ToNumpy", "NumpyToPIL", "PILToNumpy"):
        return None
    if step["type"] == "torchvision/RandomHorizontalFlip":
        step = dict(type="RandomFlip", prob=step["p"])
    if step["type"] == "torchvision/Resize":
        step = dict(type="ResizeEdge", scale=step["size"], edge="short", backend="pillow")
    if bgr:
        for colours in (step, step.get("hparams", {})):
            for key in ("fill_color", "fill_std", "pad_val"):
                if isinstance(colours.get(key), list):
                    colours[key] = colours[key][::-1]
    return filled(step)


def steps(pipeline: list[dict[str, Any]], bgr: bool = False) -> list[dict[str, Any]]:
    return [done for step in pipeline if (done := transform(step, bgr)) is not None]


def sorted_steps(chain: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(chain, key=lambda step: json.dumps(step, sort_keys=True))


def order(chain: list[dict[str, Any]]) -> list[str]:
    """Names in their order, without mirrors, whose place makes no difference."""
    return [step["type"] for step in chain if step["type"] != "RandomFlip"]


def groups_of(paramwise_cfg: dict[str, Any] | None) -> dict[str, Any]:
    cfg = {key: value for key, value in (paramwise_cfg or {}).items() if key not in ("_delete", "custom_keys")}
    keys = (paramwise_cfg or {}).get("custom_keys") or {}
    return cfg | {"custom_keys": {key.replace(".", "/"): vars(ParamGroup(**options)) for key, options in keys.items()}}


def curves(schedule: Any, optimizer: dict[str, Any], epochs: int) -> dict[str, Any]:
    """Learning rate and weight decay at 400 steps of a run of 9 steps an epoch."""
    length = dict(total_steps=9 * epochs, steps_per_epoch=9, max_epochs=epochs)
    at = np.unique(np.linspace(0, 9 * epochs - 1, 400).astype(int))
    return {
        "learning rate": learning_rates(schedule, optimizer["lr"], **length)[at].tolist(),
        "weight decay": weight_decays(schedule, optimizer["weight_decay"], **length)[at].tolist(),
    }


def clip_of(cfg: dict[str, Any] | None) -> dict[str, Any] | None:
    return cfg and {"type": "norm", "norm_type": 2} | {k: v for k, v in cfg.items() if k != "error_if_nonfinite"}


def common(optimizer: dict[str, Any], wrapper: dict[str, Any], schedule: Any, epochs: int) -> dict[str, Any]:
    optimizer = vars(resolve(optimizer["type"])(**{k: v for k, v in optimizer.items() if k != "type"})) | {
        "type": optimizer["type"]
    }
    return dict(
        epochs=epochs,
        optimizer=optimizer,
        paramwise_cfg=groups_of(wrapper.get("paramwise_cfg")),
        clip_grad=clip_of(wrapper.get("clip_grad")),
        **curves(schedule, optimizer, epochs),
    )


def ours(file: str, name: str) -> dict[str, Any]:
    config = to_plain(load_config(f"configs/{file}:{name}"))
    wrapper, method = config["optim_wrapper"], config["method"]
    evaluated = "model" in method and config["data"]["val"]["dataset"] is not None
    loads = config["load_from"] is not None and config["load_from"]["part"] == "backbone"
    train = views(config["data"]["train"]["pipeline"], config["data"]["train"]["device_pipeline"])
    train = [steps(chain) for chain in train]
    pixels = config["data_preprocessor"]
    mean_std = {
        key: value if key == "channel_order" else list(value) for key, value in pixels.items() if value is not None
    }
    return dict(
        common(wrapper["optimizer"], wrapper, config["param_scheduler"], config["max_epochs"]),
        batch=config["batch_size"],
        accumulative_counts=config["accumulative_counts"],
        bfloat16=config["dtype"] == "bfloat16",
        augmentations=[sorted_steps(chain) for chain in train],
        mean_std=mean_std,
        method=model_of(method, loads),
        starts_from_encoder=loads,
        auto_scale_lr=config["auto_scale_lr"]["base_batch_size"],
        ema=config["ema"],
        images=config["data"]["train"]["dataset"]["type"],
        sampler=config["data"]["train"]["sampler"],
        later=[
            {
                "begin": phase.begin,
                "augmentations": [steps(chain) for chain in views(phase.pipeline, phase.device_pipeline)],
            }
            for phase in phases_of(config["data"]["train"])[1:]
        ],
        precise_bn=config["precise_bn"],
        **{"augmentation order": [order(chain) for chain in train]},
        evaluation=steps(config["data"]["val"]["pipeline"]) if evaluated else None,
    )


def gpus_of(stem: str) -> int | None:
    """Of the name of a file; None where it does not say, and the batch is the one that its learning rate is for."""
    named = re.search(r"(\d+)xb(\d+)", stem)
    return None if named is None else int(named[1])


def colours(preprocessor: dict[str, Any], pipeline: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation of R, G and B, and the order that the network wants. CIFAR's images are RGB there too."""
    found = {k: v for k, v in preprocessor.items() if re.fullmatch(r"(second_)?(mean|std)", k)}
    is_file = pipeline[0]["type"] == "LoadImageFromFile"
    if preprocessor.get("to_rgb") or (len(found["mean"]) == 3 and not is_file):
        return found | {"channel_order": "rgb"}
    return {k: v[::-1] for k, v in found.items()} | {"channel_order": "grey" if len(found["mean"]) == 1 else "bgr"}


def sampler_of(loader: dict[str, Any]) -> dict[str, Any] | None:
    sampler = {key: value for key, value in loader["sampler"].items() if (key, value) != ("shuffle", True)}
    return None if sampler == dict(type="DefaultSampler") else sampler


def theirs(name: str) -> dict[str, Any]:
    entry = golden()[name]
    recipe, stem = entry["settings"], entry["path"].rsplit("/")[-1]
    wrapper, loader, model = recipe["optim_wrapper"], recipe["train_dataloader"], recipe["model"]
    train = [steps(chain, bgr=True) for chain in views(loader["dataset"]["pipeline"])]
    is_classifier = model["type"] == "ImageClassifier"
    evaluated = is_classifier and recipe.get("val_dataloader") is not None
    init = network(model["backbone"]).get("init_cfg") if is_classifier else None
    loads = is_classifier and isinstance(init, dict) and init["type"] == "Pretrained"
    gpus, scale = gpus_of(stem), recipe.get("auto_scale_lr") or {}
    hooks = {hook["type"]: hook for hook in recipe.get("custom_hooks") or []}
    ema = hooks.pop("EMAHook", None)
    settings = dict(
        common(wrapper["optimizer"], wrapper, recipe["param_scheduler"], recipe["train_cfg"]["max_epochs"]),
        batch=scale["base_batch_size"] if gpus is None else gpus * loader["batch_size"],
        accumulative_counts=wrapper.get("accumulative_counts", 1),
        bfloat16=wrapper.get("type") == "AmpOptimWrapper" or "-amp-" in stem,
        augmentations=[sorted_steps(chain) for chain in train],
        mean_std=colours(recipe["data_preprocessor"], loader["dataset"]["pipeline"]),
        method=model_of(dict(type="Supervised", model=model) if is_classifier else model, loads),
        starts_from_encoder=loads,
        auto_scale_lr=scale.get("base_batch_size"),
        ema=None if ema is None else {key: ema[key] for key in ("momentum", "update_buffers") if key in ema},
        images=loader["dataset"]["type"],
        sampler=sampler_of(loader),
        later=[],
        precise_bn=None,
        **{"augmentation order": [order(chain) for chain in train]},
        evaluation=steps(recipe["val_dataloader"]["dataset"]["pipeline"], bgr=True) if evaluated else None,
    )
    for kind, hook in hooks.items():
        HOOKS[kind](hook, settings)
    return settings


def simsiam_hook(hook: dict[str, Any], settings: dict[str, Any]) -> None:
    """The predictor's rate is `lr` at every step: `fix_lr` of its key, which keeps the optimizer's."""
    assert hook["fix_pred_lr"] and hook["lr"] == settings["optimizer"]["lr"]
    assert settings["paramwise_cfg"]["custom_keys"]["predictor"]["fix_lr"]


def swav_hook(hook: dict[str, Any], settings: dict[str, Any]) -> None:
    """The queue is our method's own; frozen layers are keys with `begin`."""
    frozen = {key: vars(ParamGroup(begin=steps)) for key, steps in hook["frozen_layers_cfg"].items()}
    settings["paramwise_cfg"]["custom_keys"] |= frozen
    settings["method"] |= {key: hook[key] for key in ("epoch_queue_starts", "queue_length")}
    assert hook["crops_for_assign"] == settings["method"]["head"]["loss"]["crops_for_assign"]


def precise_bn_hook(hook: dict[str, Any], settings: dict[str, Any]) -> None:
    settings["precise_bn"] = {key: hook[key] for key in ("num_samples", "interval")}


def switch_recipe_hook(hook: dict[str, Any], settings: dict[str, Any]) -> None:
    """Epochs count from 1 there."""
    for entry in hook["schedule"]:
        augmentations = [steps(chain, bgr=True) for chain in views(entry["pipeline"])]
        settings["later"].append({"begin": entry["action_epoch"] - 1, "augmentations": augmentations})


HOOKS = dict(
    PreciseBNHook=precise_bn_hook,
    SimSiamHook=simsiam_hook,
    SwAVHook=swav_hook,
    SwitchRecipeHook=switch_recipe_hook,
)


def differences(mine: Any, other: Any, where: str = "") -> dict[str, str]:
    """Where two settings differ: path -> both values. Numbers are alike within 1e-9 of their size."""
    if isinstance(mine, dict) and isinstance(other, dict):
        found = {}
        for key in [*mine, *(key for key in other if key not in mine)]:
            path = f"{where}.{key}" if where else key
            if key not in mine or key not in other:
                found[path] = f"ours {mine.get(key, 'nothing')!r}, theirs {other.get(key, 'nothing')!r}"
            else:
                found |= differences(mine[key], other[key], path)
        return found
    if isinstance(mine, list | tuple) and isinstance(other, list | tuple) and len(mine) == len(other):
        found = {}
        for i, (a, b) in enumerate(zip(mine, other, strict=True)):
            found |= differences(a, b, f"{where}[{i}]")
        return found
    numbers = isinstance(mine, int | float) and isinstance(other, int | float)
    if numbers and not isinstance(mine, bool) and math.isclose(mine, other, rel_tol=1e-9, abs_tol=1e-15):
        return {}
    return {} if type(mine) is type(other) and mine == other else {where: f"ours {mine!r}, theirs {other!r}"}


# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("file", "name"), PAIRS)
def test_recipe_has_the_settings_of_the_zoo(file, name):
    found = differences(ours(file, name), theirs(name))
    allowed = DEVIATIONS.get(name, {})
    unexpected = {
        where: text
        for where, text in found.items()
        if not any(where == path or where.startswith((f"{path}.", f"{path}[")) for path in allowed)
    }
    assert not unexpected, "\n".join(f"{where}: {text}" for where, text in list(unexpected.items())[:20])
    for path in allowed:
        assert any(where == path or where.startswith((f"{path}.", f"{path}[")) for where in found), f"{path} agrees"


@pytest.mark.parametrize("algorithm", sorted({entry["algorithm"] for entry in golden().values()}))
def test_every_recipe_of_the_algorithm_is_there(algorithm):
    expected = {name for name, entry in golden().items() if entry["algorithm"] == algorithm}
    assert not expected - {name for _, name in PAIRS}


def followers() -> list[Any]:
    """(pretraining, what follows), one pair for every two networks; the big ones are slow to build."""
    files, by_networks = {name: file for file, name in PAIRS}, {}
    for name in files:
        for follower in golden()[name]["followers"]:
            if follower in files:
                specs = f"{files[name]}:{name}", f"{files[follower]}:{follower}"
                networks = tuple(str(to_plain(load_config(f"configs/{spec}").method)) for spec in specs)
                by_networks.setdefault(networks, specs)
    return [
        pytest.param(*specs, marks=pytest.mark.slow if re.search("large|huge", specs[0]) else ())
        for specs in by_networks.values()
    ]


def state_dict(model: nnx.Module) -> dict[str, np.ndarray]:
    """Of the shapes of an abstract model."""
    zero = np.zeros((), np.float32)
    state = {name: np.broadcast_to(zero, shape) for name, shape in mmpretrain.shapes(model).items()}
    return state | mmpretrain.derived(model)


@pytest.mark.parametrize(("pretraining", "follower"), followers())
def test_followers_take_their_encoders(pretraining, follower):
    """By names and shapes of whole state dicts, in memory of a few bytes."""
    source = make_method(load_config(f"configs/{pretraining}"))
    config = load_config(f"configs/{follower}")
    method = make_method(config)
    options = {key: value for key, value in to_plain(config.load_from).items() if key != "path"}
    report = read_weights(method, state_dict(source), **options)
    encoder = {path for path, _ in nnx.state(method).flat_state() if path[:2] == ("model", "backbone")}
    # The norm of the patches' mean or of a map, and CAE's biases, which the pre-trained encoder has not.
    anew = encoder - set(report.arrays)
    assert all(path[2] in ("ln2", "norm3") or path[-1] == "relative_position_bias_table" for path in anew)
    assert len(report.arrays) > 100


@pytest.mark.parametrize(
    ("source", "follower", "options"),
    [
        (
            "vision_transformer.py:vit-base-p16_in21k-pre_3rdparty_in1k-384px",
            "vision_transformer.py:vit-base-p16_8xb64-lora_in1k-384px",
            dict(part="backbone"),
        ),
        (
            "convnext_v2_fcmae.py:convnext-v2-atto_fcmae-1600e_in1k",
            "convnext_v2.py:convnext-v2-atto_fcmae-pre_3rdparty_in1k",
            dict(part="backbone", fresh=["norm3"]),
        ),
    ],
)
def test_recipes_take_the_files_that_they_speak_of(source, follower, options):
    found, wanted = (make_method(load_config(f"configs/{spec}")) for spec in (source, follower))
    report = read_weights(wanted, state_dict(getattr(found, "model", found)), **options)
    assert len(report.arrays) > 100


def groups_known() -> list[tuple[str, str]]:
    """(golden file of parameter groups, recipe of ours) of the recipes that are here."""
    names = {entry["path"].replace("/", "__"): name for name, entry in golden().items()}
    files = [file.name.removesuffix(".json.gz") for file in sorted((GOLDEN / "param_groups").iterdir())]
    return [(file, names[file]) for file in files if file in names]


@pytest.mark.parametrize(
    ("groups", "name"),
    [pytest.param(*pair, marks=pytest.mark.slow if "large" in pair[1] else ()) for pair in groups_known()],
)
def test_parameters_of_the_model_itself_are_grouped_as_in_the_zoo(groups, name):
    reference = load_golden(f"param_groups/{groups}")
    config = load_config(f"configs/{next(file for file, other in PAIRS if other == name)}:{name}")
    method = make_method(config)
    root, core = (("model",), method.model) if hasattr(method, "model") else ((), method)
    found = flatten_dict(param_groups(split(method)[1], to_plain(config.optim_wrapper)["paramwise_cfg"]))
    paths = mmpretrain.names(core)
    rows = {root + paths[row[0]]: row for row in reference["params"] if row[0] in paths}
    assert set(found) <= set(rows)
    base = reference["optimizer"]["weight_decay"]
    for path, group in found.items():
        _, _, lr_mult, decay, lars_exclude, flags = rows[path]
        assert "frozen" not in flags, path
        assert (group.lr_mult, group.decay_mult * base) == pytest.approx((lr_mult, decay), rel=1e-8), path
        assert (group.lars_exclude, group.fix_lr) == (lars_exclude, "fix_lr" in flags), path
    # What rests here does so there, or is a network of targets, or a table that the reference fixes when training starts.
    resting = {row[0] for path, row in rows.items() if path not in found and "frozen" not in row[5]}
    assert all(re.match(r"target_generator|teacher|momentum_encoder|backbone\.pos_embed$", key) for key in resting), (
        resting
    )


def test_deviations_are_of_recipes_that_exist():
    assert set(DEVIATIONS) <= set(golden())


def batch_norm_groups(cfg: Any) -> list[int]:
    if isinstance(cfg, list | tuple):
        return [groups for value in cfg for groups in batch_norm_groups(value)]
    if not isinstance(cfg, dict):
        return []
    own = [value for key, value in cfg.items() if is_ours(key, cfg)]
    return own + [groups for value in cfg.values() for groups in batch_norm_groups(value)]


def test_groups_of_batch_norms_are_gpus():
    for file, name in PAIRS:
        method = to_plain(load_config(f"configs/{file}:{name}").method)
        assert set(batch_norm_groups(method)) <= {gpus_of(golden()[name]["path"].rsplit("/")[-1]), 1}, name


def test_the_comparison_notices_changes():
    name = "mae_vit-base-p16_8xb512-amp-coslr-300e_in1k"
    right, wrong = theirs(name), theirs(name)
    assert differences(right, theirs(name)) == {}
    wrong["learning rate"][200] *= 1 + 1e-6
    wrong["augmentations"][0][0]["scale"] = 225
    wrong["method"]["neck"]["decoder_depth"] = 7
    del wrong["paramwise_cfg"]["custom_keys"]["ln"]
    assert sorted(path.split("[")[0] for path in differences(right, wrong)) == [
        "augmentations",
        "learning rate",
        "method.neck.decoder_depth",
        "paramwise_cfg.custom_keys.ln",
    ]
