"""The recipes themselves: those on digits train, the others build with the sizes that are known."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from flax import nnx

from jaxpretrain.config import load_config, to_plain
from jaxpretrain.models.layers import Frozen
from jaxpretrain.train_state import make_method
from jaxpretrain.trainer import train
from tests.test_config import ALL
from tests.tiny import losses

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


@pytest.mark.slow
@pytest.mark.parametrize(("file", "name"), DIGITS)
def test_digits_recipe_takes_two_steps(file, name, tmp_path):
    config = load_config(
        f"configs/{file}:{name}",
        {"max_steps": 2, "batch_size": 8, "evaluators": {}, "log_interval": 1, "transfer_guard": True, "mesh.data": -1},
    )
    train(config, tmp_path)
    values = [loss for _, loss in losses(tmp_path)]
    assert len(values) == 2 and np.isfinite(values).all()


def networks() -> list[tuple[str, str]]:
    """One recipe for each different network, among them all in PARAMETERS."""
    by_method = {}
    for file, name in sorted(ALL, key=lambda recipe: recipe[1] not in PARAMETERS):
        method = str(to_plain(load_config(f"configs/{file}:{name}").method))
        by_method.setdefault(method, (file, name))
    return list(by_method.values())


@pytest.mark.parametrize(("file", "name"), networks())
def test_recipe_builds(file, name):
    config = load_config(f"configs/{file}:{name}")
    method = make_method(config)
    if name in PARAMETERS:
        leaves = jax.tree.leaves(nnx.state(method, (nnx.Param, Frozen)))
        assert sum(leaf.size for leaf in leaves) == PARAMETERS[name]
