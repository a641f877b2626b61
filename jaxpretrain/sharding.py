"""Who holds what: one mesh (data, fsdp, tensor) and rules from parameter paths to partition specs.

The same rules serve parameters, optimizer state and averaged weights, because their paths end alike. The batch is split over
`data` and `fsdp`. XLA inserts the communication; results do not depend on the mesh, up to the order of float sums.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxpretrain.build import ConfigError

logger = logging.getLogger("jaxpretrain")

AXES = ("data", "fsdp", "tensor")
BATCH = PartitionSpec(("data", "fsdp"))

# (regular expression of the path, what to do). A tuple names a mesh axis (or None) for each axis of the array;
# 'fsdp' shards the largest axis that divides, if the array is worth it; 'replicate' copies it. The first match counts.
DEFAULT_RULES: tuple[tuple[str, Any], ...] = (
    # Into a block by columns, out of it by rows: between the two nothing has to move. Necks count from fc0, ffn from fc1.
    (r"(qkv|ffn/fc1|fc0)/kernel$", ("fsdp", "tensor")),
    (r"(proj|fc\d)/kernel$", ("tensor", "fsdp")),
    (r"(qkv|ffn/fc1|fc0)/bias$", ("tensor",)),
    (r"", "fsdp"),
)
FSDP_MIN_SIZE = 2**10  # smaller arrays are not worth a gather


def make_mesh(mesh: Any, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh that config.mesh describes: sizes of data, fsdp and tensor; -1 takes all remaining devices.

    Raises ConfigError if the sizes do not multiply to the number of devices, or name another axis.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = {axis: int(mesh.get(axis, 1)) for axis in AXES}
    known = math.prod(size for size in sizes.values() if size != -1)
    if list(sizes.values()).count(-1) > 1 or any(size == 0 or size < -1 for size in sizes.values()):
        raise ConfigError(f"config.mesh={sizes}: sizes are positive, and at most one is -1 (all remaining devices)")
    sizes = {axis: len(devices) // known if size == -1 else size for axis, size in sizes.items()}
    if math.prod(sizes.values()) != len(devices):
        raise ConfigError(
            f"config.mesh={sizes} needs {math.prod(sizes.values())} devices, but there are {len(devices)}; "
            "set --config.mesh.data=-1 to use all that remain"
        )
    types = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=types, devices=devices)


def path_name(path: Sequence[Any]) -> str:
    """'params/backbone/layers/0/ln1/scale' from a key path of jax.tree_util."""
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def _spec(name: str, shape: tuple[int, ...], rules: Sequence[tuple[str, Any]], mesh: Mesh) -> PartitionSpec:
    for pattern, tactic in rules:
        if not re.search(pattern, name):
            continue
        if tactic == "replicate":
            return PartitionSpec()
        if tactic == "fsdp":
            size = mesh.shape["fsdp"]
            axes = [axis for axis in np.argsort(shape, kind="stable")[::-1] if shape[axis] % size == 0]
            if size == 1 or not axes or math.prod(shape) < FSDP_MIN_SIZE:
                return PartitionSpec()
            return PartitionSpec(*("fsdp" if axis == axes[0] else None for axis in range(len(shape))))
        if len(tactic) != len(shape):
            continue
        # An axis that does not divide stays whole.
        named = (a if a is not None and n % mesh.shape[a] == 0 else None for a, n in zip(tactic, shape, strict=True))
        return PartitionSpec(*named)
    return PartitionSpec()


def tree_shardings(tree: Any, mesh: Mesh, rules: Sequence[tuple[str, Any]] | None = None) -> Any:
    """The sharding of every array of `tree` (arrays or ShapeDtypeStructs), by its path.

    Rules that a config gives come before the defaults. ConfigError names an unknown mesh axis or tactic.
    """
    rules = [*(rules or ()), *DEFAULT_RULES]
    for pattern, tactic in rules:
        wanted = [tactic] if isinstance(tactic, str) else [axis for axis in tactic if axis is not None]
        valid = ("fsdp", "replicate") if isinstance(tactic, str) else AXES
        if any(axis not in valid for axis in wanted):
            raise ConfigError(f"config.sharding_rules: {tactic!r} for {pattern!r}: choose from {valid}")

    def sharding(path: Sequence[Any], leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, _spec(path_name(path), tuple(leaf.shape), rules, mesh))

    return jax.tree_util.tree_map_with_path(sharding, tree)


def log_replicated(tree: Any, shardings: Any, mesh: Mesh) -> list[str]:
    """Logs which arrays every device holds whole although the mesh could split them; returns their names."""
    if mesh.shape["fsdp"] == mesh.shape["tensor"] == 1:
        return []
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    whole = [
        (leaf.size * leaf.dtype.itemsize, path_name(path))
        for (path, leaf), sharding in zip(leaves, jax.tree.leaves(shardings), strict=True)
        if sharding.is_fully_replicated and leaf.ndim
    ]
    total = sum(leaf.size * leaf.dtype.itemsize for _, leaf in leaves)
    whole.sort(reverse=True)
    largest = ", ".join(f"{name} ({size / 2**20:.2f} MiB)" for size, name in whole[:5])
    logger.info(
        "sharding: %d of %d arrays (%.1f of %.1f MiB) stay whole on every device%s",
        len(whole), len(leaves), sum(size for size, _ in whole) / 2**20, total / 2**20,
        f"; the largest: {largest}" if whole else "",
    )  # fmt: skip
    return [name for _, name in whole]
