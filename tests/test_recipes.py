"""The recipes themselves: those on digits train, the others build with the sizes that are known."""

from __future__ import annotations

import functools
import json
import re
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict

from jaxpretrain.build import ConfigError, abstract, build
from jaxpretrain.checkpoint import load_params
from jaxpretrain.config import apply_overrides, load_config, to_plain
from jaxpretrain.followers import ENCODER, MASKED_ENCODER, linear_probe
from jaxpretrain.interop import starting_weights
from jaxpretrain.models.layers import Frozen
from jaxpretrain.recipes import DIGITS_MEAN_STD as GREY
from jaxpretrain.recipes import digits
from jaxpretrain.train_state import make_method
from jaxpretrain.trainer import train
from jaxpretrain.zoo import list_models, model_info
from tests.test_config import ALL
from tests.tiny import first_devices, losses

DIGITS = [(file, name) for file, name in ALL if name.startswith("digits")]
# Parameters of the whole method as MMPretrain builds it, momentum encoders and fixed tables included.
PARAMETERS = {
    "mae_vit-base-p16_8xb512-amp-coslr-300e_in1k": 111_907_840,
    "mae_vit-large-p16_8xb512-amp-coslr-1600e_in1k": 329_541_888,
    "mae_vit-huge-p14_8xb512-amp-coslr-1600e_in1k": 657_074_508,
    "mocov3_vit-small-p16_16xb256-amp-coslr-300e_in1k": 84_266_752,
    "simclr_resnet50_16xb256-coslr-200e_in1k": 27_968_832,
    "resnet50_8xb32_in1k": 25_557_032,
    "resnet18_8xb16_cifar10": 11_173_962,
}


# Where a method says how many images it remembers.
REMEMBERED = {
    "deepcluster.py": "method.num_samples",
    "npid.py": "method.memory_bank.length",
    "odc.py": "method.memory_bank.length",
}


@pytest.fixture
def quick_compilation():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.slow
@pytest.mark.parametrize(("file", "name"), DIGITS)
def test_digits_recipe_takes_two_epochs(file, name, tmp_path, quick_compilation):
    """Of two steps each: clusters are made anew in between."""
    fields = dict(max_epochs=2, batch_size=8, evaluators={}, log_interval=1, transfer_guard=True, tensorboard=False)
    if remembered := REMEMBERED.get(file):  # clusters need some images
        fields |= {"batch_size": 160, "data.train.dataset.indices": 320, remembered: 320}
    else:
        fields["data.train.dataset.indices"] = 16
    config = load_config(f"configs/{file}:{name}", fields | {"mesh.data": 1, "checkpoint.interval": -1})
    with first_devices():
        train(config, tmp_path)
    values = [loss for _, loss in losses(tmp_path)]
    assert len(values) == 4 and np.isfinite(values).all()


def test_followers_say_that_the_encoder_is_not_named(tmp_path):
    method = build(dict(type="SimCLR", backbone=dict(type="ResNet_CIFAR", depth=18), neck=None, head=None))
    with pytest.raises(ConfigError, match="set --config.load_from.path to the workdir"):
        starting_weights(method, ENCODER)


def by_path(tree: dict) -> dict[str, np.ndarray]:
    return {"/".join(map(str, path)): array for path, array in flatten_dict(tree).items()}


@pytest.mark.slow
def test_a_probe_starts_from_a_run_and_leaves_its_encoder_alone(tmp_path):
    steps = {"max_steps": 2, "batch_size": 8, "evaluators": {}, "checkpoint.interval": 2, "checkpoint.by_epoch": False}
    pretraining = load_config("configs/mae.py:digits", steps)
    train(pretraining, tmp_path / "mae")
    arch = to_plain(pretraining.method.backbone.arch)
    model = dict(
        backbone=dict(
            type="VisionTransformer", arch=arch, img_size=32, patch_size=4, frozen_stages=3, out_type="cls_token"
        ),
        neck=dict(type="ClsBatchNormNeck", input_features=64),
        head=dict(type="LinearClsHead", num_classes=10, in_channels=64),
    )
    data = digits([dict(type="RandomResizedCrop", scale=32)], [])
    config = linear_probe(
        model, dict(type="LARS", lr=0.1), 1, [], per_gpu=1, load_from=MASKED_ENCODER, data=data, data_preprocessor=GREY
    )
    apply_overrides(config, steps | {"load_from.path": str(tmp_path / "mae")})
    train(config, tmp_path / "probe")

    before, after = (load_params(tmp_path / run, "latest").state for run in ("mae", "probe"))
    assert list(after["params"]["model"]) == ["head"]
    known = by_path(before["params"]["backbone"]) | by_path(before["model_state"]["backbone"])
    probed = by_path(after["model_state"]["model"]["backbone"])
    assert set(known) == set(probed)
    for path, array in probed.items():
        np.testing.assert_array_equal(array, known[path], err_msg=path)


@functools.cache
def methods() -> dict[tuple[str, str], dict[str, Any]]:
    """(file, name) -> the configuration of the method."""
    return {(file, name): to_plain(load_config(f"configs/{file}:{name}").method) for file, name in ALL}


def text(config: Any) -> str:
    return json.dumps(config, sort_keys=True)


def form(config: Any) -> Any:
    """What a configuration is made of, whatever its numbers and names: the zoo's models, which test_zoo.py builds, have those."""
    if isinstance(config, dict):
        return {key: value if key == "type" else form(value) for key, value in sorted(config.items())}
    return [form(value) for value in config] if isinstance(config, list) else type(config).__name__


def networks() -> list[Any]:
    """One recipe for each different network, among them all in PARAMETERS. Of classifiers it is the backbone that is slow to
    build: those that test_zoo.py builds with the zoo's models are not built again, and one of a form stands for the others.
    (Those on digits are trained above.)"""
    built = {text(info.model.get("backbone")) for info in map(model_info, list_models()) if info.available}
    by_network = {}
    for recipe in sorted(set(ALL) - set(DIGITS), key=lambda recipe: (recipe[1] not in PARAMETERS, recipe)):
        method = methods()[recipe]
        network = method["model"]["backbone"] if method["type"] == "Supervised" else method
        if text(network) not in built or recipe[1] in PARAMETERS:
            by_network.setdefault(text(form(network) if method["type"] == "Supervised" else network), recipe)
    return [
        pytest.param(*recipe, marks=pytest.mark.slow if re.match("(vit|swin)-(large|huge)", recipe[1]) else ())
        for recipe in by_network.values()
    ]


@pytest.mark.parametrize(("file", "name"), networks())
def test_recipe_builds(file, name):
    config = load_config(f"configs/{file}:{name}")
    method = make_method(config)
    if name in PARAMETERS:
        leaves = jax.tree.leaves(nnx.state(method, (nnx.Param, Frozen)))
        assert sum(leaf.size for leaf in leaves) == PARAMETERS[name]


def test_the_rest_of_each_classifier_builds():
    """Neck, head, loss and batch augmentations, on a backbone that is quickly built."""
    backbone = dict(type="ResNet_CIFAR", depth=18, num_stages=1, strides=(1,), dilations=(1,), out_indices=(0,))
    classifiers = [method for method in methods().values() if method["type"] == "Supervised"]
    different = {text(method | dict(model=method["model"] | dict(backbone=backbone))) for method in classifiers}
    assert len(different) > 50
    for method in map(json.loads, different):
        abstract(method)
