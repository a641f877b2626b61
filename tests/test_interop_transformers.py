"""timm's TNT, Twins, MViTv2 and DaViT: the names and shapes of its models, both ways."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import pytest

from jaxpretrain.build import abstract
from jaxpretrain.interop import fitting
from jaxpretrain.interop import mmpretrain as hub
from jaxpretrain.interop.rules import InteropError, translate
from tests.parity import load_golden

TWINS = dict(qkv_bias=True, norm_after_stage=[False, False, False, True])
MODELS: dict[str, tuple[dict[str, Any], int]] = {
    "tnt_s_legacy_patch16_224": (dict(type="TNT", arch="s"), 384),
    "twins_pcpvt_small": (dict(type="PCPVT", arch="small", **TWINS), 512),
    "twins_svt_small": (dict(type="SVT", arch="small", **TWINS), 512),
    "mvitv2_tiny": (dict(type="MViT", arch="tiny"), 768),
    "davit_tiny": (dict(type="DaViT", arch="tiny"), 768),
}


def classifier(backbone: dict[str, Any], width: int) -> Any:
    head = dict(type="LinearClsHead", num_classes=1000, in_channels=width)
    return abstract(dict(type="ImageClassifier", backbone=backbone, head=head))


@pytest.mark.parametrize("name", MODELS)
def test_names_and_shapes(name: str) -> None:
    shapes = load_golden("interop/timm_hierarchical")[name]
    state = {key: np.full(shape, zlib.crc32(key.encode()) % 65536, np.float32) for key, shape in shapes.items()}
    model = classifier(*MODELS[name])
    table = fitting.table_of("timm", model)
    ours = translate(state, table)
    assert not ours.unused and not ours.incomplete
    assert {key: array.shape for key, array in ours.state.items()} == hub.shapes(model)
    theirs = translate(ours.state, table, inverse=True)
    assert theirs.state.keys() == state.keys()
    assert all(np.array_equal(theirs.state[key], state[key]) for key in state)


def test_reversible_transformers_are_no_plain_ones() -> None:
    model = classifier(dict(type="RevVisionTransformer", arch="deit-small"), 768)
    for layout in ("timm", "hf", "mae"):
        with pytest.raises(InteropError, match="has no RevVisionTransformer"):
            fitting.table_of(layout, model)
