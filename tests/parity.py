"""Reading golden data: the reference's weights by rule, written into our modules by its names, and summaries compared.

Golden files in `tests/golden` were made by running MMPretrain 1.2; weights are a function of each tensor's name and shape,
so none are stored. Names are ours with a few renamings (`RENAMES`), arrays are transposed to our layouts.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxpretrain.build import abstract
from jaxpretrain.interop import mmpretrain

GOLDEN = Path(__file__).parent / "golden"
TOLERANCE = 1e-5  # of the largest magnitude; PyTorch's own float32 noise is 1e-6

RENAMES = [
    (r"\.ffn\.layers\.0\.0\.", ".ffn.fc1."),
    (r"\.ffn\.layers\.1\.", ".ffn.fc2."),
    (r"\.running_mean$", ".mean"),
    (r"\.running_var$", ".var"),
]


def load_golden(name: str) -> dict[str, Any]:
    """The golden file `tests/golden/NAME.json` or `.json.gz`."""
    path = GOLDEN / f"{name}.json"
    if path.exists():
        return json.loads(path.read_text())
    return json.loads(gzip.decompress(path.with_suffix(".json.gz").read_bytes()))


def reference_weight(key: str, shape: tuple[int, ...], fill: str) -> np.ndarray:
    """The value of one tensor of the reference, by the rule in the golden files."""
    rng = np.random.Generator(np.random.PCG64(zlib.crc32(key.encode())))
    if fill == "running_var":
        value = 0.5 + rng.random(shape)
    elif fill == "norm":
        value = 1 + 0.1 * rng.standard_normal(shape)
    elif fill == "bias":
        value = 0.1 * rng.standard_normal(shape)
    elif fill == "weight":
        value = rng.standard_normal(shape) * np.sqrt(1 / np.prod(shape[1:]))
    elif fill == "queue":
        value = rng.standard_normal(shape)
        value = value / np.linalg.norm(value, axis=0)
    elif fill == "one":
        value = np.ones(shape)
    else:
        raise ValueError(f"{key}: no rule for fill {fill!r}")
    return value.astype(np.float32)


def our_name(key: str) -> str:
    """The path in our modules of a tensor of the reference, up to its last part."""
    for pattern, new in RENAMES:
        key = re.sub(pattern, new, key)
    return key


def fill_by_reference(module: nnx.Module, manifest: list, prefix: str = "", skip: str | None = None) -> None:
    """Writes the reference's weights into `module`, in place, by the library's own importer; both sides must match.

    Args:
        module: what to fill.
        manifest: rows [key, shape, (dtype,) fill, ...] of a golden file.
        prefix: only keys that start so are used, and lose it.
        skip: regular expression of keys of the reference that we derive instead of storing; those that
            `BaseModule.derived` gives need not be named.
    """
    state = {}
    shapes, derived, aliases = mmpretrain.shapes(module), mmpretrain.derived(module), mmpretrain.aliases(module)
    for row in manifest:
        key, shape = row[0], tuple(row[1])
        fill = next(part for part in row[2:] if part not in ("float32", "int64", "bool", "int32"))
        name = key.removeprefix(prefix)
        if not key.startswith(prefix) or (skip and re.search(skip, key)):
            continue
        if name in aliases:
            assert fill == f"alias:{prefix}{aliases[name]}"
            continue
        if name in derived:
            assert derived[name].shape == shape, f"{key}: {derived[name].shape} is not {shape}"
            continue
        # A counter starts at 0. (The reference's other values of this kind are derived.)
        state[name] = np.zeros(shape, np.int64) if fill == "as_built" else reference_weight(key, shape, fill)
    assert {k: v.shape for k, v in state.items()} == shapes, set(shapes) ^ set(state)
    mmpretrain.fill(module, mmpretrain.from_state_dict(module, state))


def _key(part: str) -> str | int:
    return int(part) if part.isdigit() else part


def reference_input(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """The golden input: NCHW standard normal numbers, handed over as NHWC."""
    x = np.random.Generator(np.random.PCG64(seed)).standard_normal(shape).astype(np.float32)
    return x.transpose(0, 2, 3, 1)


def assert_summary(actual: Any, summary: dict[str, Any], tolerance: float = TOLERANCE) -> None:
    """Compares an array of ours with a golden summary (mean, std, absmax, first8, samples16) of the reference's layout.

    Four-dimensional arrays are images: ours are NHWC, the summary's are NCHW.
    """
    array = np.asarray(actual)
    if array.ndim == 4:
        array = array.transpose(0, 3, 1, 2)
    assert list(array.shape) == summary["shape"]
    flat = array.reshape(-1).astype(np.float64)
    scale = summary["absmax"]
    index = np.linspace(0, flat.size - 1, 16).astype(np.int64)
    for name, value in (
        ("absmax", np.abs(flat).max()),
        ("mean", flat.mean()),
        ("std", flat.std()),
        ("first8", flat[:8]),
        ("samples16", flat[index]),
    ):
        error = np.abs(np.asarray(value) - np.asarray(summary[name])).max() / scale
        assert error <= tolerance, f"{name}: off by {error:.2e} of the largest magnitude {scale}"


def assert_logits(actual: Any, golden: dict[str, Any], tolerance: float = TOLERANCE) -> None:
    """Compares logits [B, classes] with the golden rows, relative to their largest magnitude."""
    array = np.asarray(actual, np.float64)
    for ours, row in zip(array, golden["rows"], strict=True):
        width = len(row["first32"])
        error = np.abs(ours[:width] - np.asarray(row["first32"])).max() / row["absmax"]
        assert error <= tolerance, f"off by {error:.2e} of the largest magnitude {row['absmax']}"
        assert ours.argmax() == row["argmax"]


def build_by_reference(cfg: dict[str, Any], manifest: list, prefix: str = "") -> nnx.Module:
    """The module of a configuration with the reference's weights, without drawing random ones first.

    Args:
        cfg: `dict(type=...)`, as for `build`.
        manifest: rows of a golden file.
        prefix: path of the part that the manifest describes, such as 'model'; the whole module if empty.
    """
    module = abstract(cfg)
    graphdef, state = nnx.split(module)
    module = nnx.merge(graphdef, jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), state))
    fill_by_reference(getattr(module, prefix) if prefix else module, manifest)
    return module


def reference_layout(tree: Any, key: str, prefix: str = "") -> np.ndarray:
    """The array of ours, from nested dicts, that the reference calls `key`, with its order of axes.

    Args:
        tree: parameters, gradients or statistics.
        key: the reference's name.
        prefix: path of the part that the reference names describe, such as 'model'.
    """
    *path, leaf = our_name(f"{prefix}.{key}" if prefix else key).split(".")
    for part in path:
        tree = tree[_key(part)]
    leaf = next(name for name in ("kernel", "scale", "weight") if name in tree) if leaf == "weight" else leaf
    array = np.asarray(tree[_key(leaf)])
    if leaf == "kernel":
        array = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
    return array


def loss_and_grads(method: Any, batch: dict[str, Any]) -> tuple[float, dict[str, Any]]:
    """A method's loss on a batch, and its gradients as nested dicts."""
    graphdef, *state = nnx.split(method, nnx.Param, ...)
    params, rest = map(nnx.to_pure_dict, state)

    @jax.jit
    def compute(params: Any, rest: Any, batch: Any) -> Any:
        return jax.value_and_grad(lambda p: nnx.merge(graphdef, p, rest).loss(batch)[0])(params)

    loss, grads = compute(params, rest, batch)
    return float(loss), grads


def reference_gradient_errors(grads: Any, ssl: dict[str, Any]) -> float:
    """The largest error of the golden norm of all gradients, and of some gradients' norms and first values.

    Args:
        grads: nested dicts of ours.
        ssl: the golden file's field, with `grad_norm` and `grads`.
    """
    total = np.sqrt(sum(np.sum(np.square(np.asarray(x, np.float64))) for x in jax.tree.leaves(grads)))
    errors = [abs(total / ssl["grad_norm"] - 1)]
    for key, golden in ssl["grads"].items():
        array = reference_layout(grads, key).astype(np.float64).reshape(-1)
        errors.append(abs(np.linalg.norm(array) / golden["l2"] - 1))
        errors.append(np.abs(array[:4] - golden["first4"]).max() / np.abs(array).max())
    return max(errors)


def one_pass(classifier: Any) -> Any:
    """The classifier, in place, with a backbone that runs once: its stages and logits are of one pass.

    Asked one by one they are equal, but traced and compiled as often.
    """
    backbone, kept = classifier.backbone, []

    def call(*args: Any, **kwargs: Any) -> Any:
        if not kept:
            kept.append(backbone(*args, **kwargs))
        return kept[0]

    classifier.backbone = call
    return classifier
