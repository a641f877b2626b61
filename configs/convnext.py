"""ConvNeXt: A ConvNet for the 2020s (Liu et al., 2022), and ConvNeXt V2 (Woo et al., 2023), trained with labels.

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

from ml_collections import ConfigDict

from jaxpretrain.config import pick
from jaxpretrain.supervised_recipes import from_scratch, smoothing

WIDTHS = dict(
    atto=320, femto=384, pico=512, nano=640, tiny=768, small=768, base=1024, large=1536, xlarge=2048, huge=2816
)
INIT = dict(init_cfg=dict(type="TruncNormal", layer=["Conv2d", "Linear"], std=0.02, bias=0.0))


def v1(arch: str, drop_path_rate: float, size: int = 224) -> ConfigDict:
    """300 epochs at a batch of 4,096, with averaged weights; at 384 pixels too."""
    wide = arch in ("large", "xlarge")
    return from_scratch(
        dict(type="ConvNeXt", arch=arch, drop_path_rate=drop_path_rate),
        WIDTHS[arch],
        lr=4e-3,
        gpus=64 if wide else 32,
        per_gpu=64 if wide else 128,
        size=size,
        clip=None if size == 224 else 5.0,
        averaged=1e-4 if size == 224 else 4e-5,
        head=dict(init_cfg=None),
        model=INIT,
        auto_scale_lr=dict(base_batch_size=4096),
    )


def v2(arch: str, size: int = 224) -> ConfigDict:
    """The fine-tuning of encoders that FCMAE trained: long without mixed images for small ones."""
    small = arch in ("atto", "femto", "pico", "nano")
    if small:
        settings = dict(lr=8e-4, weight_decay=0.3, epochs=600, warmup=0, mixed=False)
    elif arch == "tiny":
        settings = dict(lr=3.2e-3, epochs=300, warmup=40)
    else:
        settings = dict(lr=2.5e-3, epochs=100)
    return from_scratch(
        dict(
            type="ConvNeXt",
            arch=arch,
            drop_path_rate=0.2 if arch == "tiny" else 0.1,
            layer_scale_init_value=0.0,
            use_grn=True,
        ),
        WIDTHS[arch],
        gpus=32,
        per_gpu=32,
        size=size,
        averaged=1e-4,
        loss=smoothing(0.2 if arch in ("atto", "nano", "tiny") else 0.1),
        head=dict(init_cfg=None),
        model=INIT,
        **settings,
    )


DROP_PATHS = dict(tiny=0.1, small=0.4, base=0.5, large=0.5, xlarge=0.5)
RECIPES = {
    "convnext-tiny_32xb128_in1k": partial(v1, "tiny", 0.1),
    "convnext-small_32xb128_in1k": partial(v1, "small", 0.4),
    "convnext-base_32xb128_in1k": partial(v1, "base", 0.5),
    "convnext-base_3rdparty_in1k": partial(v1, "base", 0.5),
    "convnext-base_3rdparty-noema_in1k": partial(v1, "base", 0.5),
    "convnext-base_3rdparty_in1k-384px": partial(v1, "base", 0.5, 384),
    "convnext-large_3rdparty_in1k": partial(v1, "large", 0.5),
    "convnext-large_3rdparty_in1k-384px": partial(v1, "large", 0.5, 384),
}
RECIPES |= {
    f"convnext-{arch}_32xb128-noema_in1k": partial(v1, arch, DROP_PATHS[arch]) for arch in ("tiny", "small", "base")
}
RECIPES |= {f"convnext-{arch}_in21k-pre_3rdparty_in1k": partial(v1, arch, rate) for arch, rate in DROP_PATHS.items()}
RECIPES |= {
    f"convnext-{arch}_in21k-pre{'_' if arch in ('tiny', 'small') else '-'}3rdparty_in1k-384px": partial(
        v1, arch, rate, 384
    )
    for arch, rate in DROP_PATHS.items()
}
V2_ARCHS = ("atto", "femto", "pico", "nano", "tiny", "base", "large", "huge")
for _kind in ("3rdparty-fcmae", "fcmae-pre_3rdparty"):
    RECIPES |= {f"convnext-v2-{arch}_{_kind}_in1k": partial(v2, arch) for arch in V2_ARCHS}
RECIPES |= {
    f"convnext-v2-{arch}_fcmae-in21k-pre_3rdparty_in1k{'' if size == 224 else f'-{size}px'}": partial(v2, arch, size)
    for arch in V2_ARCHS[3:]
    for size in (224, 384, 512)
    if (size != 224 if arch == "huge" else size != 512)
}


def get_config(name: str | None = None) -> ConfigDict:
    return pick(RECIPES, name)
