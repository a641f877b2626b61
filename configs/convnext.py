"""ConvNeXt: A ConvNet for the 2020s (Liu et al., 2022), trained with labels.

These have not been run by us; published by MMPretrain: top-1 on ImageNet-1k.

| recipe | command | hardware | wall time | metric |
|---|---|---|---|---|
| convnext-tiny_32xb128_in1k | `--config=configs/convnext.py` | 32 GPUs | | 82.14 |
| convnext-small_32xb128_in1k | `--config=configs/convnext.py:NAME` | 32 GPUs | | 83.16 |
| convnext-base_32xb128_in1k | | 32 GPUs | | 83.66 |

The recipes of other names are those of MMPretrain's files; their published weights come from the papers' own training.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from ml_collections import ConfigDict

from jaxpretrain.config import pick
from jaxpretrain.supervised_recipes import CONVNEXT_INIT, from_scratch, plain_crops

WIDTHS = dict(tiny=768, small=768, base=1024, large=1536, xlarge=2048)


def convnext(arch: str, drop_path_rate: float, size: int = 224, **settings: Any) -> ConfigDict:
    """300 epochs at a batch of 4,096, with averaged weights; at 384 pixels too."""
    wide = arch in ("large", "xlarge")
    defaults: dict[str, Any] = dict(
        clip=None if size == 224 else 5.0, averaged=1e-4 if size == 224 else 4e-5, head=dict(init_cfg=None)
    )
    return from_scratch(
        dict(type="ConvNeXt", arch=arch, drop_path_rate=drop_path_rate),
        WIDTHS[arch],
        lr=4e-3,
        gpus=64 if wide else 32,
        per_gpu=64 if wide else 128,
        size=size,
        model=CONVNEXT_INIT,
        auto_scale_lr=dict(base_batch_size=4096),
        **defaults | settings,
    )


def in21k(arch: str) -> ConfigDict:
    """Crops and mirrors of ImageNet-21k, with mixed images. There is nothing to evaluate on."""
    data = plain_crops() | dict(val=dict(dataset=None, pipeline=[]))
    data["train"]["dataset"] = dict(type="ImageNet21k", data_root="data/imagenet21k", split="train")
    return convnext(
        arch,
        0.5,
        clip=5.0,
        averaged=None,
        head=dict(init_cfg=None, num_classes=21841),
        data=data,
        evaluators={},
        evaluation=dict(interval=-1),
    )


DROP_PATHS = dict(tiny=0.1, small=0.4, base=0.5, large=0.5, xlarge=0.5)
RECIPES = {
    "convnext-tiny_32xb128_in1k": partial(convnext, "tiny", 0.1),
    "convnext-small_32xb128_in1k": partial(convnext, "small", 0.4),
    "convnext-base_32xb128_in1k": partial(convnext, "base", 0.5),
    "convnext-base_3rdparty_in1k": partial(convnext, "base", 0.5),
    "convnext-base_3rdparty-noema_in1k": partial(convnext, "base", 0.5),
    "convnext-base_3rdparty_in1k-384px": partial(convnext, "base", 0.5, 384),
    "convnext-large_3rdparty_in1k": partial(convnext, "large", 0.5),
    "convnext-large_3rdparty_in1k-384px": partial(convnext, "large", 0.5, 384),
}
RECIPES |= {
    f"convnext-{arch}_32xb128-noema_in1k": partial(convnext, arch, DROP_PATHS[arch])
    for arch in ("tiny", "small", "base")
}
RECIPES |= {
    f"convnext-{arch}_in21k-pre_3rdparty_in1k": partial(convnext, arch, rate) for arch, rate in DROP_PATHS.items()
}
RECIPES |= {
    f"convnext-{arch}_in21k-pre{'_' if arch in ('tiny', 'small') else '-'}3rdparty_in1k-384px": partial(
        convnext, arch, rate, 384
    )
    for arch, rate in DROP_PATHS.items()
}
RECIPES |= {f"convnext-{arch}_3rdparty_in21k": partial(in21k, arch) for arch in ("base", "large", "xlarge")}


def get_config(name: str | None = None) -> ConfigDict:
    return pick(RECIPES, name)
