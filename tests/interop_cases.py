"""What the tests of timm's and torchvision's layouts share: tiny models of theirs, and what is to hold for ours.

`python -m tests.interop_cases timm torchvision` (where these are installed) runs theirs and writes golden files: names
and shapes of state dicts, the tables that constructors make, and outputs. Weights are a function of name and shape, so
none is stored. Of published models, names and shapes alone are kept.
"""

from __future__ import annotations

import gzip
import importlib
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxpretrain.build import build
from jaxpretrain.interop import InteropError, export, fitting, load_weights, read_weights
from jaxpretrain.interop import mmpretrain as hub
from jaxpretrain.interop.rules import translate
from tests.parity import GOLDEN, TOLERANCE, reference_input, reference_weight
from tests.test_layers_transformer import quick_jit

FOLDER = GOLDEN / "interop"
CLASSES = 10


@dataclass(frozen=True, eq=False)
class Case:
    """A tiny model of theirs, and of ours.

    Attributes:
        theirs: path of the constructor; its first part is the layout.
        name: of the golden file, behind the layout.
        args: its arguments; strings that begin with 'torch.', 'timm.' or 'torchvision.' stand for what is there.
        ours: our configuration.
        size: side of the input images.
        method: what of theirs is called.
        no_key_bias: regular expression of biases of queries, keys and values where that of the keys must be zero.
        recognised: what layout='auto' takes it for, if an earlier layout has the same names.
    """

    theirs: str
    name: str
    args: Mapping[str, Any]
    ours: Mapping[str, Any]
    size: int = 32
    method: str = "forward"
    no_key_bias: str | None = None
    recognised: str = ""

    @property
    def layout(self) -> str:
        return self.theirs.split(".")[0]

    def __repr__(self) -> str:
        return self.name


GAP = dict(type="GlobalAveragePooling")


def classifier(
    backbone: Mapping[str, Any], channels: int, head: str = "LinearClsHead", neck: Any = None, **args: Any
) -> dict[str, Any]:
    """A configuration of ours; `args` are the head's."""
    cfg = dict(type=head, num_classes=CLASSES, in_channels=channels) | args
    return dict(type="ImageClassifier", backbone=backbone, neck=neck, head=cfg)


def named(kind: str, channels: int, head: str = "LinearClsHead", **args: Any) -> dict[str, Any]:
    """A classifier of 1000 classes; the backbone alone for 0 `channels`. `args` are the backbone's."""
    backbone = dict(type=kind, **args)
    neck = GAP if "Res" in kind or "Swin" in kind else None
    return classifier(backbone, channels, head, neck, num_classes=1000) if channels else backbone


@cache
def load(name: str) -> dict[str, Any]:
    """The golden file `tests/golden/interop/NAME.json.gz`."""
    return json.loads(gzip.decompress((FOLDER / f"{name}.json.gz").read_bytes()))


def weight(case: Case, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The value of a tensor of theirs."""
    if name.endswith("num_batches_tracked"):
        return np.asarray(len(name), np.int64)
    if name.endswith("running_var"):
        return reference_weight(name, shape, "running_var")
    if len(shape) > 1:
        return reference_weight(name, shape, "weight")
    value = reference_weight(name, shape, "bias" if name.endswith(("bias", "mean")) else "norm")
    if case.no_key_bias and re.search(case.no_key_bias, name):
        value[len(value) // 3 : 2 * len(value) // 3] = 0
    return value


@cache
def state(case: Case) -> dict[str, np.ndarray]:
    """Their state dict; do not change it."""
    golden = load(f"{case.layout}_{case.name}")
    found = {
        name: weight(case, name, tuple(shape)) for name, shape in golden["keys"].items() if name not in golden["tables"]
    }
    return found | {name: np.asarray(values, dtype) for name, (values, dtype) in golden["tables"].items()}


def abstract(cfg: Mapping[str, Any]) -> Any:
    """Our model without weights, in eval mode."""
    # One key for all draws: an abstract model needs none, and tracing the counts of `nnx.Rngs` takes most of the time.
    key = jax.random.key(0)
    model = nnx.eval_shape(lambda: build(cfg, rngs=SimpleNamespace(params=lambda: key)))
    model.eval()
    return model


@cache
def _abstract(case: Case) -> Any:
    return abstract(case.ours)


@cache
def loaded(case: Case) -> Any:
    """Our model with their weights; do not change it."""
    model = abstract(case.ours)
    report = load_weights(model, state(case), layout=case.layout)
    assert report.layout == case.layout and not report.reinitialised and not report.ignored
    return model


# What is to hold.


def check_outputs(case: Case) -> None:
    """Ours gives what theirs gives, to 1e-5 of the largest magnitude."""
    golden = load(f"{case.layout}_{case.name}")
    graphdef, weights = nnx.split(loaded(case))
    x = jnp.asarray(reference_input(tuple(golden["input_shape"])))
    output = quick_jit(lambda weights, x: nnx.merge(graphdef, weights)(x))(weights, x)
    ours = np.asarray(output[-1] if isinstance(output, tuple) else output)
    ours = ours.transpose(0, 3, 1, 2) if ours.ndim == 4 else ours
    wanted = np.asarray(golden["output"])
    assert ours.shape == wanted.shape
    assert np.abs(ours - wanted).max() <= TOLERANCE * np.abs(wanted).max()


def check_recognised(case: Case) -> None:
    """The layout is found from the names, and gives the same weights."""
    report = read_weights(_abstract(case), state(case))
    assert report.layout == (case.recognised or case.layout)
    assert_identical(report.arrays, read_weights(_abstract(case), state(case), layout=case.layout).arrays)


def check_export(case: Case) -> None:
    """What comes back is the same file: names, shapes, dtypes, every bit."""
    assert_identical(export(loaded(case), case.layout), state(case))


def assert_identical(actual: Mapping[Any, np.ndarray], wanted: Mapping[Any, np.ndarray]) -> None:
    assert set(actual) == set(wanted)
    for name, array in wanted.items():
        assert (actual[name].shape, actual[name].dtype) == (array.shape, array.dtype), name
        assert actual[name].tobytes() == array.tobytes(), name


def check_renamed(case: Case) -> None:
    """A name that no table knows is one error, with both ends of what is left over."""
    renamed = dict(state(case))
    name = next(name for name in renamed if name.endswith("weight"))
    array = renamed[f"{name}x"] = renamed.pop(name)
    with pytest.raises(InteropError) as error:
        read_weights(_abstract(case), renamed, layout=case.layout)
    lines = str(error.value).splitlines()
    assert any("no place for" in line and f" {name}x {array.shape}" in line for line in lines), error.value
    assert any("nothing for" in line and str(array.shape) in line for line in lines), error.value


class Tiny:
    """All of it. A sub-class is parametrised over its `case`s; `checks` is the module with the functions for them."""

    checks: Any = sys.modules[__name__]

    def test_outputs(self, case: Any) -> None:
        self.checks.check_outputs(case)

    def test_recognised(self, case: Any) -> None:
        self.checks.check_recognised(case)

    def test_export(self, case: Any) -> None:
        self.checks.check_export(case)

    def test_renamed(self, case: Any) -> None:
        self.checks.check_renamed(case)


def check_named(layout: str, name: str, ours: Mapping[str, Any]) -> None:
    """Names and shapes of a published model are those of ours, in both directions."""
    check_state(layout, load(f"{layout}_models")["models"][name], ours)


def check_state(layout: str, keys: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """The names and shapes `keys` of a layout are those of our model, in both directions."""
    golden = {key: tuple(shape) for key, shape in keys.items()}
    model = abstract(ours)
    fit = fitting.recognise(model, _zeros(golden), layout, None, False)
    assert not fit.leftovers(), f"{fit.unused} {fit.missing()} {fit.wrong()} {fit.incomplete}"
    shapes = hub.shapes(model) | {key: table.shape for key, table in hub.derived(model).items()}
    table = fitting.for_export(fitting.table_of(layout, model), model)
    exported = translate(_zeros(fitting.with_root(shapes, model)), table, inverse=True).state
    assert {key: array.shape for key, array in exported.items()} == golden


def _zeros(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Arrays that take no memory."""
    return {key: np.broadcast_to(np.float32(0), shape) for key, shape in shapes.items()}


# Making golden files.


def _resolve(value: Any) -> Any:
    """What a path within a library stands for, in any nesting."""
    if isinstance(value, Mapping):
        return {key: _resolve(part) for key, part in value.items()}
    if not isinstance(value, str) or not value.startswith(("torch.", "timm.", "torchvision.")):
        return value
    module, _, name = value.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _write(name: str, golden: Mapping[str, Any]) -> None:
    FOLDER.mkdir(exist_ok=True)
    text = json.dumps(golden, separators=(",", ":")).encode()
    (FOLDER / f"{name}.json.gz").write_bytes(gzip.compress(text, mtime=0))


def _make(case: Case) -> None:
    import torch

    library = importlib.import_module(case.layout)
    model = _resolve(case.theirs)(**_resolve(case.args)).eval()
    own = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    made = {n for n, array in own.items() if "relative_" in n and "bias_table" not in n}
    tables = {name: [own[name].tolist(), str(own[name].dtype)] for name in made}
    weights = {n: own[n] if n in made else weight(case, n, array.shape) for n, array in own.items()}
    model.load_state_dict({name: torch.from_numpy(array.copy()) for name, array in weights.items()})
    shape = (2, 3, case.size, case.size)
    with torch.no_grad():
        output = getattr(model, case.method)(torch.from_numpy(reference_input(shape).transpose(0, 3, 1, 2).copy()))
    _write(
        f"{case.layout}_{case.name}",
        dict(
            library=f"{case.layout} {library.__version__}",
            input_shape=shape,
            keys={name: array.shape for name, array in own.items()},
            tables=tables,
            output=np.vectorize(lambda value: float(f"{value:.8g}"))(output.numpy()).tolist(),
        ),
    )


def _make_named(layout: str, names: Any, file: str = "") -> None:
    import torch

    library = importlib.import_module(layout)
    create = _resolve("timm.create_model" if layout == "timm" else "torchvision.models.get_model")
    models = {}
    for name in names:
        with torch.device("meta"):
            models[name] = {key: tuple(tensor.shape) for key, tensor in create(name).state_dict().items()}
    _write(file or f"{layout}_models", dict(library=f"{layout} {library.__version__}", models=models))


if __name__ == "__main__":
    for layout in sys.argv[1:]:
        module = importlib.import_module(f"tests.test_interop_{layout}")
        for case in (*module.CASES, *getattr(module, "BIG", ())):
            print(case)
            _make(case)
        _make_named(layout, module.NAMED)
