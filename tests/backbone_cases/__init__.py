"""Small forms of all backbones, one file for each family: `CASES`, name -> Backbone."""

from __future__ import annotations

import importlib
import pkgutil

from tests.backbone_cases.base import Backbone

CASES: dict[str, Backbone] = {}
for _module in sorted(info.name for info in pkgutil.iter_modules(__path__) if info.name != "base"):
    _cases = importlib.import_module(f"{__name__}.{_module}").CASES
    assert not CASES.keys() & _cases.keys(), f"{_module}: {CASES.keys() & _cases.keys()} are cases of another file"
    CASES |= _cases
