"""TinyViT: Fast Pretraining Distillation for Small Vision Transformers (Wu et al., 2022), trained with labels.

These have not been run by us; published by MMPretrain: top-1 on ImageNet-1k, of weights from the paper's own training. Those
named `distill` learnt from a teacher on ImageNet-21k first; MMPretrain's recipe of that name is of plain training.

| recipe | command | hardware | wall time | metric |
|---|---|---|---|---|
| tinyvit-5m_3rdparty_in1k | `--config=configs/tinyvit.py` | 8 GPUs | | 79.02 |
| tinyvit-11m_3rdparty_in1k | `--config=configs/tinyvit.py:NAME` | 8 GPUs | | 81.44 |
| tinyvit-21m_3rdparty_in1k | | 8 GPUs | | 83.08 |
| tinyvit-5m_in21k-distill-pre_3rdparty_in1k | | 8 GPUs | | 80.71 |
| tinyvit-11m_in21k-distill-pre_3rdparty_in1k | | 8 GPUs | | 83.19 |
| tinyvit-21m_in21k-distill-pre_3rdparty_in1k | | 8 GPUs | | 84.85 |
| tinyvit-21m_in21k-distill-pre_3rdparty_in1k-384px | | 8 GPUs | | 86.21 |
| tinyvit-21m_in21k-distill-pre_3rdparty_in1k-512px | | 8 GPUs | | 86.44 |

The learning rate belongs to a batch of 1,024; `--config.auto_scale_lr.enable=true` scales it to the batch.
"""

from __future__ import annotations

from functools import partial

from ml_collections import ConfigDict

from jaxpretrain.config import pick
from jaxpretrain.supervised_recipes import CROSS_ENTROPY, PILLOW, from_scratch, plain_crops

WIDTHS = {"5m": 320, "11m": 448, "21m": 576}
INIT = [
    dict(type="TruncNormal", layer=["Conv2d", "Linear"], std=0.02, bias=0.0),
    dict(type="Constant", layer=["LayerNorm"], val=1.0, bias=0.0),
]


def tinyvit(arch: str, drop_path_rate: float, size: int = 224) -> ConfigDict:
    """Crops and mirrors alone, of 224 pixels whatever the `size` that windows are for and evaluation has, as in MMPretrain.

    BatchNorm is over the whole batch here; MMPretrain's is over each GPU's images.
    """
    data = plain_crops(**PILLOW)
    if size != 224:
        data["val"]["pipeline"] = [dict(type="Resize", scale=(size, size), **PILLOW)]
    window = size // 32
    return from_scratch(
        dict(
            type="TinyViT",
            arch=arch,
            img_size=(size, size),
            window_size=[window, window, 2 * window, window],
            out_indices=(3,),
            drop_path_rate=drop_path_rate,
            gap_before_final_norm=True,
            init_cfg=INIT,
        ),
        WIDTHS[arch],
        lr=1e-3,
        gpus=8,
        per_gpu=256,
        loss=CROSS_ENTROPY,
        mixed=False,
        data=data,
    )


RECIPES = {
    "tinyvit-5m_3rdparty_in1k": partial(tinyvit, "5m", 0.0),
    "tinyvit-11m_3rdparty_in1k": partial(tinyvit, "11m", 0.1),
    "tinyvit-21m_3rdparty_in1k": partial(tinyvit, "21m", 0.2),
    "tinyvit-5m_in21k-distill-pre_3rdparty_in1k": partial(tinyvit, "5m", 0.0),
    "tinyvit-11m_in21k-distill-pre_3rdparty_in1k": partial(tinyvit, "11m", 0.1),
    "tinyvit-21m_in21k-distill-pre_3rdparty_in1k": partial(tinyvit, "21m", 0.2),
    "tinyvit-21m_in21k-distill-pre_3rdparty_in1k-384px": partial(tinyvit, "21m", 0.1, 384),
    "tinyvit-21m_in21k-distill-pre_3rdparty_in1k-512px": partial(tinyvit, "21m", 0.1, 512),
}


def get_config(name: str | None = None) -> ConfigDict:
    return pick(RECIPES, name)
