"""Mesh and rules: who holds what."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from jaxpretrain.build import ConfigError
from jaxpretrain.sharding import log_replicated, make_mesh, tree_shardings

SHAPES = {
    "params": {"layers": {0: {"attn": {"qkv": {"kernel": (96, 288), "bias": (288,)}, "proj": {"kernel": (96, 96)}}}}},
    "opt_state": {"mu": {"layers": {0: {"attn": {"qkv": {"kernel": (96, 288)}}}}}},
    "conv": {"kernel": (3, 3, 64, 64)},
    "odd": (7, 1001),
    "small": (8,),
    "step": (),
}
TREE = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, jnp.float32), SHAPES, is_leaf=lambda x: isinstance(x, tuple))


def specs(rules=None, **mesh):
    return jax.tree.map(lambda s: s.spec, tree_shardings(TREE, make_mesh(mesh), rules))


def test_mesh_takes_all_remaining_devices():
    assert dict(make_mesh(dict(data=-1, fsdp=2, tensor=2)).shape) == dict(data=2, fsdp=2, tensor=2)
    assert dict(make_mesh(dict(fsdp=-1)).shape) == dict(data=1, fsdp=8, tensor=1)


@pytest.mark.parametrize("mesh", [dict(data=3), dict(data=-1, fsdp=-1), dict(data=-1, fsdp=16), dict(data=0)])
def test_impossible_meshes(mesh):
    with pytest.raises(ConfigError, match="config.mesh"):
        make_mesh(mesh)


def test_data_parallel_replicates_everything():
    shardings = jax.tree.leaves(tree_shardings(TREE, make_mesh(dict(data=-1)), None))
    assert shardings and all(sharding.is_fully_replicated for sharding in shardings)


def test_fsdp_shards_the_largest_axis_that_divides_and_optimizer_state_alike():
    spec = specs(fsdp=8)
    assert spec["params"]["layers"][0]["attn"]["qkv"]["kernel"] == P("fsdp", "tensor")
    assert spec["opt_state"]["mu"]["layers"][0]["attn"]["qkv"]["kernel"] == P("fsdp", "tensor")
    assert "fsdp" in spec["conv"]["kernel"]
    assert spec["odd"] == P() and spec["small"] == P() and spec["step"] == P()


def test_tensor_parallel_splits_columns_then_rows():
    attention = specs(data=-1, fsdp=2, tensor=4)["params"]["layers"][0]["attn"]
    assert attention["qkv"]["kernel"] == P("fsdp", "tensor")
    assert attention["qkv"]["bias"] == P("tensor")
    assert attention["proj"]["kernel"] == P("tensor", "fsdp")


def test_own_rules_come_first_and_are_checked():
    assert specs([("qkv/kernel$", "replicate")], fsdp=8)["params"]["layers"][0]["attn"]["qkv"]["kernel"] == P()
    with pytest.raises(ConfigError, match="sharding_rules"):
        specs([("qkv", ("fdsp", None))], fsdp=8)


def test_what_stays_whole_is_named():
    mesh = make_mesh(dict(fsdp=8))
    names = log_replicated(TREE, tree_shardings(TREE, mesh), mesh)
    assert "odd" in names and "small" in names and not any("qkv/kernel" in name for name in names)
