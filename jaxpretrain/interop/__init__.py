"""Weights of PyTorch <-> ours: one invertible table of names per foreign layout (see `rules`), and the files they come in."""

from jaxpretrain.interop.fitting import Report
from jaxpretrain.interop.forms import Found, read_model
from jaxpretrain.interop.rules import InteropError
from jaxpretrain.interop.weights import export, load_weights, read_weights, save_weights, starting_weights

__all__ = [
    "Found",
    "InteropError",
    "Report",
    "export",
    "load_weights",
    "read_model",
    "read_weights",
    "save_weights",
    "starting_weights",
]
