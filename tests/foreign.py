"""What the interop tests share: golden files of other libraries' tiny models, and what is to hold for each layout.

A file in `tests/golden/interop` says how a model of that library was made and lists its state dict: name, shape, and for
tables that its constructor makes the values. Weights are a function of name and shape; so is the input, of its shape. Of
each output there are shape, largest magnitude and samples.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxpretrain.build import abstract as build_abstract
from jaxpretrain.interop import InteropError, export, load_weights
from jaxpretrain.models.layers.intermediates import capture
from tests.parity import GOLDEN, TOLERANCE, reference_input, reference_weight
from tests.test_layers_transformer import quick_jit


@dataclass
class Run:
    """What a model of ours made of the golden input."""

    model: Any
    x: jax.Array
    result: Any
    found: Mapping[str, jax.Array]


@dataclass(frozen=True, eq=False)
class Case:
    """A golden file, and our model that it belongs to.

    Attributes:
        golden: name of the file.
        layout: whose names it has.
        model: the configuration of ours.
        outputs: golden output -> the same of ours.
        ignored: names that the layout's table leaves out.
        recognised: what layout='auto' finds, if not `layout`: the first of those that have the same names.
        bare: what begins the names of a backbone in a larger model's file, and not when it is exported alone.
        call: how the model is run, if not `model(x)`.
    """

    golden: str
    layout: str
    model: Mapping[str, Any]
    outputs: Mapping[str, Callable[[Run], Any]]
    ignored: frozenset[str] = field(default=frozenset())
    recognised: str = ""
    bare: str = ""
    call: Callable[[Any, jax.Array], Any] = lambda model, x: model(x)

    def __repr__(self) -> str:
        return f"{self.golden}-{self.layout}"


@cache
def load(name: str) -> dict[str, Any]:
    """The golden file `tests/golden/interop/NAME.json.gz`."""
    return json.loads(gzip.decompress((GOLDEN / "interop" / f"{name}.json.gz").read_bytes()))


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The value of a tensor by its foreign name."""
    if name.endswith("num_batches_tracked"):
        rng = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
        return np.asarray(int(rng.integers(1000)), np.int64)
    fill = "weight"
    if name.endswith("running_var"):
        fill = "running_var"
    elif len(shape) == 1:
        fill = "bias" if name.endswith(("bias", "running_mean", "token", "embedding")) else "norm"
    return np.asarray(reference_weight(name, shape, fill))


@cache
def state(name: str) -> dict[str, np.ndarray]:
    """The foreign state dict of a golden file; do not change it."""
    found = {}
    for row in load(name)["manifest"]:
        values = row[2] if len(row) > 2 and isinstance(row[2], Mapping) else None
        found[row[0]] = weight(row[0], tuple(row[1])) if values is None else unpack(values, row[1])
    return found


def unpack(values: Mapping[str, Any], shape: list[int]) -> np.ndarray:
    return np.asarray(values["values"], values["dtype"]).reshape(shape)


@cache
def _built(case: Case) -> Any:
    model = build_abstract(case.model)
    model.eval()
    return model


def abstract(case: Case) -> Any:
    """Our model without weights, in eval mode."""
    return nnx.clone(_built(case))


@cache
def loaded(case: Case) -> Any:
    """Our model with the golden weights; do not change it."""
    model = abstract(case)
    report = load_weights(model, state(case.golden), layout=case.layout)
    assert report.layout == case.layout and not report.reinitialised
    assert len(report.ignored) == len(case.ignored)
    assert all(any(name.endswith(found) for name in case.ignored) for found in report.ignored), report.ignored
    return model


def images(case: Case) -> jax.Array:
    """The golden input, in our order of axes."""
    return jnp.asarray(reference_input(tuple(load(case.golden)["input_shape"])))


def run(case: Case, model: Any, x: jax.Array) -> Run:
    """A model's run, with all that its layers hand out."""
    graphdef, weights = nnx.split(model)

    def apply(weights: Any, x: jax.Array) -> Any:
        merged = nnx.merge(graphdef, weights)
        with capture(merged) as found:
            return case.call(merged, x), found

    return Run(model, x, *quick_jit(apply)(weights, x))


@cache
def observed(case: Case) -> Run:
    """The run with the golden weights."""
    return run(case, loaded(case), images(case))


def assert_samples(actual: Any, summary: Mapping[str, Any], what: str = "") -> None:
    """Compares an array with shape, largest magnitude and samples of a golden one, to 1e-5 of the largest magnitude."""
    array = np.asarray(actual, np.float64)
    assert list(array.shape) == summary["shape"], what
    flat, samples = array.reshape(-1), np.asarray(summary["samples"])
    index = np.linspace(0, flat.size - 1, len(samples)).astype(np.int64)
    error = max(np.abs(flat[index] - samples).max(), abs(np.abs(flat).max() - summary["absmax"])) / summary["absmax"]
    assert error <= TOLERANCE, f"{what}: off by {error:.2e} of the largest magnitude {summary['absmax']}"


# What is to hold for every case.


def check_outputs(case: Case) -> None:
    """Every output that both have is the golden one."""
    golden = load(case.golden)["outputs"]
    for name, get in case.outputs.items():
        assert_samples(get(observed(case)), golden[name], f"{case} {name}")


def check_recognised(case: Case) -> None:
    """The layout is found from the names, and gives the same weights."""
    model = abstract(case)
    report = load_weights(model, state(case.golden))
    assert report.layout == (case.recognised or case.layout)
    for (path, ours), (_, wanted) in zip(
        nnx.state(model).flat_state(), nnx.state(loaded(case)).flat_state(), strict=True
    ):
        np.testing.assert_array_equal(ours[...], wanted[...], str(path))


def check_export(case: Case) -> None:
    """Back in the foreign layout, it is the same file: names, shapes, dtypes and every bit.

    Tables of floats that the constructor makes are computed, not kept: they agree to 1e-6.
    """
    exported = export(loaded(case), case.layout)
    wanted = {n.removeprefix(case.bare): v for n, v in state(case.golden).items() if n not in case.ignored}
    assert set(exported) == set(wanted)
    computed = {row[0] for row in load(case.golden)["manifest"] if isinstance(row[-1], Mapping)}
    for name, array in exported.items():
        assert array.dtype == wanted[name].dtype and array.shape == wanted[name].shape, name
        if name in computed and array.dtype.kind == "f":
            np.testing.assert_allclose(array, wanted[name], atol=1e-6, err_msg=name)
        else:
            np.testing.assert_array_equal(array, wanted[name], name)


def check_renamed(case: Case) -> None:
    """One name that nobody knows: a single error with both ends of what is left over."""
    name = next(n for n in reversed(state(case.golden)) if n not in case.ignored and n.endswith("weight"))
    wrong = {(f"{n}x" if n == name else n): v for n, v in state(case.golden).items()}
    with pytest.raises(InteropError) as error:
        load_weights(abstract(case), wrong, layout=case.layout)
    lines = str(error.value).splitlines()
    assert any("no place for" in line and ".".join(f"{name}x".split(".")[-2:]) in line for line in lines), error.value
    assert any("nothing for" in line or "incomplete" in line for line in lines), error.value
