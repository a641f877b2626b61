"""EdgeNeXt: Efficiently Amalgamated CNN-Transformer Architecture for Mobile Vision Applications (Maaz et al., 2022), with labels.

These have not been run by us; published by MMPretrain: top-1 on ImageNet-1k, of weights from the paper's own training. `usi` is
training with a teacher, of which the recipe has only the size of the images in evaluation.

| recipe | command | hardware | wall time | metric |
|---|---|---|---|---|
| edgenext-small_3rdparty_in1k | `--config=configs/edgenext.py` | 8 GPUs | | 79.41 |
| edgenext-xxsmall_3rdparty_in1k | `--config=configs/edgenext.py:NAME` | 8 GPUs | | 71.20 |
| edgenext-xsmall_3rdparty_in1k | | 8 GPUs | | 74.86 |
| edgenext-base_3rdparty_in1k | | 8 GPUs | | 82.48 |
| edgenext-small-usi_3rdparty_in1k | | 8 GPUs | | 81.06 |
| edgenext-base_3rdparty-usi_in1k | | 8 GPUs | | 83.67 |

The learning rate belongs to a batch of 4,096; `--config.auto_scale_lr.enable=true` scales it to the batch.
"""

from __future__ import annotations

from functools import partial

from ml_collections import ConfigDict

from jaxpretrain.config import pick
from jaxpretrain.followers import strong_augmentation
from jaxpretrain.supervised_recipes import CROSS_ENTROPY, from_scratch

WIDTHS = dict(xxsmall=168, xsmall=192, small=304, base=584)
INIT = [
    dict(type="TruncNormal", layer=["Conv2d", "Linear"], std=0.02, bias=0.0),
    dict(type="Constant", layer=["LayerNorm"], val=1.0, bias=0.0),
]


def edgenext(arch: str, resize: int = 292) -> ConfigDict:
    """Images of 256 pixels; in evaluation the middle of those whose short edge is `resize`."""
    data = strong_augmentation(256)
    data["val"]["pipeline"][0]["scale"] = resize
    return from_scratch(
        dict(
            type="EdgeNeXt",
            arch=arch,
            out_indices=(3,),
            drop_path_rate=0.1,
            gap_before_final_norm=True,
            init_cfg=INIT,
        ),
        WIDTHS[arch],
        lr=6e-3,
        gpus=8,
        per_gpu=256,
        clip=5.0,
        averaged=4e-5,
        loss=CROSS_ENTROPY,
        mixed=False,
        data=data,
        auto_scale_lr=dict(base_batch_size=4096),
    )


RECIPES = {
    "edgenext-small_3rdparty_in1k": partial(edgenext, "small"),
    "edgenext-xxsmall_3rdparty_in1k": partial(edgenext, "xxsmall"),
    "edgenext-xsmall_3rdparty_in1k": partial(edgenext, "xsmall"),
    "edgenext-base_3rdparty_in1k": partial(edgenext, "base"),
    "edgenext-small-usi_3rdparty_in1k": partial(edgenext, "small", 269),
    "edgenext-base_3rdparty-usi_in1k": partial(edgenext, "base", 269),
}


def get_config(name: str | None = None) -> ConfigDict:
    return pick(RECIPES, name)
