"""Image pre-training in JAX: MMPretrain's models, methods and recipes, sharded, resumable, exchangeable with PyTorch.

Importing this package loads no model, no torch and no TensorFlow; parts are imported when they are first asked for.
"""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "list_models": "jaxpretrain.zoo.index",
    "get_model": "jaxpretrain.zoo.factory",
    "init_model": "jaxpretrain.zoo.factory",
    "inference_model": "jaxpretrain.inference.classification",
    "ImageClassificationInferencer": "jaxpretrain.inference.classification",
    "FeatureExtractor": "jaxpretrain.inference.features",
    "ConfigError": "jaxpretrain.build",
    "register": "jaxpretrain.build",
    "resolve": "jaxpretrain.build",
    "load_config": "jaxpretrain.config",
    "train": "jaxpretrain.trainer",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        import importlib

        value = getattr(importlib.import_module(_PUBLIC[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'jaxpretrain' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
