"""Weights of a network in whichever form they are: that of training, deployed, or with its norms melted away."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxpretrain.build import abstract
from jaxpretrain.interop import files
from jaxpretrain.interop import mmpretrain as hub
from jaxpretrain.interop.fitting import Report
from jaxpretrain.interop.rules import InteropError
from jaxpretrain.interop.weights import fill, read_weights
from jaxpretrain.models.fuse import abstract_fused, deployed_config, is_fused


@dataclass
class Found:
    """A network in the form that weights are of.

    Attributes:
        config: its configuration; that of the deployed form, if the weights are of that.
        fused: whether its norms are melted into the layers before them, which no configuration says.
        model: the network, with shapes for weights, in eval mode.
        report: the weights.
    """

    config: dict[str, Any]
    fused: bool
    model: Any
    report: Report

    def filled(self, seed: int = 0) -> Any:
        """The network with the weights. `seed` is for updates of LoRA that they lack."""
        fill(self.model, self.report, seed)
        return self.model


def read_model(config: Mapping[str, Any], src: str | os.PathLike, **options: Any) -> Found:
    """The network of `config` in the form of the weights in `src`: of training, or for inference (see `models.fuse`).

    Args:
        config: of the network in the form of training, or deployed.
        src, options: as of `read_weights`.

    Raises:
        InteropError: the weights fit in no form; the message is about the configuration as it was given.
    """
    first: InteropError | None = None
    for form, fused in _forms(dict(config), src, options.get("key")):
        model = abstract_fused(form) if fused else abstract(form)
        model.eval()
        try:
            return Found(form, fused, model, read_weights(model, src, **options))
        except InteropError as error:
            first = first or error
    assert first is not None
    raise first


def _forms(config: dict[str, Any], src: str | os.PathLike, key: str | None) -> Iterator[tuple[dict[str, Any], bool]]:
    """(configuration, whether norms are melted away), the likeliest first. Of a file it shows in what it lacks."""
    deployed = deployed_config(config)
    forms = [config] if deployed == config else [config, deployed]
    melted = is_fused(src)
    yield from ((form, melted) for form in forms)
    if not Path(src).is_dir() and _lacks_norms(config, files.read(src, key)):
        yield from ((form, True) for form in forms)


def _lacks_norms(config: dict[str, Any], state: Mapping[str, Any]) -> bool:
    """Whether some of the network's BatchNorms, of which every layout calls the statistics alike, are not in `state`."""
    model = abstract(config)
    file, network = (sum(name.endswith("running_mean") for name in names) for names in (state, hub.names(model)))
    return callable(model) and file < network
