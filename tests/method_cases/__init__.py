"""Small methods for the tests of what every method promises; each module here adds its own to `CASES`."""

from __future__ import annotations

import importlib
import pkgutil

from tests.method_cases.base import Case

CASES: dict[str, Case] = {}
for _found in sorted(pkgutil.iter_modules(__path__), key=lambda module: module.name):
    _module = importlib.import_module(f"{__name__}.{_found.name}")
    CASES |= getattr(_module, "CASES", {})
