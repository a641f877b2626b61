"""dict(type=...) -> object, and the errors of it."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

from jaxpretrain import build
from jaxpretrain.build import ConfigError


class Part:
    def __init__(self, width: int, depth: int = 2):
        self.width, self.depth = width, depth


class Child(Part):
    def __init__(self, colour: str = "red", **kwargs):
        super().__init__(**kwargs)
        self.colour = colour


def test_every_name_of_the_table_exists_where_it_says():
    for name, place in build._TABLE.items():
        module, _, attribute = place.partition(":")
        assert hasattr(importlib.import_module(module), attribute or name), f"{module} has no {attribute or name}"


def test_builds_from_a_name_a_class_or_a_dotted_path():
    build.register("MyPart")(Part)
    assert build.build(dict(type="MyPart", width=3)).width == 3
    assert build.build(dict(type=Part, width=4)).width == 4
    assert build.build(dict(type="collections.OrderedDict")) == {}
    part = Part(1)
    assert build.build(part) is part


def test_keyword_arguments_reach_the_parent_and_are_checked_there():
    assert build.build(dict(type=Child, width=3, colour="blue")).colour == "blue"
    with pytest.raises(ConfigError, match="Child has no argument 'widht'. Did you mean 'width'"):
        build.build(dict(type=Child, widht=3))
    with pytest.raises(ConfigError, match="Child needs width"):
        build.build(dict(type=Child))


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (dict(type="ResNett"), "Unknown type 'ResNett'. Did you mean 'ResNet'"),
        (dict(type="resnet", depth=18), "Did you mean 'ResNet'"),
        (dict(type="no.such.Module"), "cannot be imported"),
        (dict(depth=50), "needs a 'type'"),
        (dict(type="ResNet", dept=50), "ResNet has no argument 'dept'. Did you mean 'depth'"),
        (dict(type="NonLinearNeck", in_channels=3), "NonLinearNeck needs hid_channels, out_channels"),
    ],
)
def test_mistakes_name_the_nearest_valid_thing(cfg, message):
    with pytest.raises(ConfigError, match=message):
        build.build(cfg)


def test_importing_the_package_is_quick_and_loads_no_framework():
    code = (
        "import sys, time; t = time.perf_counter(); import jaxpretrain; t = time.perf_counter() - t; "
        "heavy = {'jax', 'flax', 'torch', 'tensorflow', 'numpy'} & set(sys.modules); "
        "models = [m for m in sys.modules if m.startswith('jaxpretrain.')]; "
        "assert not heavy and not models, (heavy, models); assert dir(jaxpretrain); print(t)"
    )
    seconds = float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
    assert seconds < 0.5


def test_using_the_library_loads_neither_torch_nor_tensorflow():
    code = (
        "import sys; import jaxpretrain.trainer, jaxpretrain.evaluate; "
        "bad = {'torch', 'tensorflow'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
