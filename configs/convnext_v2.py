"""ConvNeXt V2: Co-designing and Scaling ConvNets with Masked Autoencoders (Woo et al., 2023): fine-tuning with labels.

Pre-training is in `configs/convnext_v2_fcmae.py`; to start from its run, which lacks the last norm,
`--config.load_from="{'path': RUN, 'part': 'backbone', 'fresh': ['norm3']}"`. These have not been run by us; published by
MMPretrain: top-1 on ImageNet-1k, of weights from the paper's own training.

| recipe | command | hardware | wall time | metric |
|---|---|---|---|---|
| convnext-v2-atto_fcmae-pre_3rdparty_in1k | `--config=configs/convnext_v2.py` | 32 GPUs | | 76.64 |
| convnext-v2-femto_fcmae-pre_3rdparty_in1k | `--config=configs/convnext_v2.py:NAME` | 32 GPUs | | 78.48 |
| convnext-v2-pico_fcmae-pre_3rdparty_in1k | | 32 GPUs | | 80.31 |
| convnext-v2-nano_fcmae-pre_3rdparty_in1k | | 32 GPUs | | 81.86 |
| convnext-v2-tiny_fcmae-pre_3rdparty_in1k | | 32 GPUs | | 82.94 |
| convnext-v2-base_fcmae-pre_3rdparty_in1k | | 32 GPUs | | 84.87 |
| convnext-v2-large_fcmae-pre_3rdparty_in1k | | 32 GPUs | | 85.76 |
| convnext-v2-huge_fcmae-pre_3rdparty_in1k | | 32 GPUs | | 86.25 |

Those whose name has `in21k` were trained with labels of ImageNet-21k in between; the recipe is the same.
"""

from __future__ import annotations

from functools import partial

from ml_collections import ConfigDict

from jaxpretrain.config import pick
from jaxpretrain.supervised_recipes import CONVNEXT_INIT, from_scratch, smoothing

WIDTHS = dict(atto=320, femto=384, pico=512, nano=640, tiny=768, base=1024, large=1536, huge=2816)


def fine_tune(arch: str, size: int = 224) -> ConfigDict:
    """Long without mixed images for small ones."""
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
        model=CONVNEXT_INIT,
        **settings,
    )


# Weights named `3rdparty-fcmae` are of the encoder before this.
RECIPES = {f"convnext-v2-{arch}_fcmae-pre_3rdparty_in1k": partial(fine_tune, arch) for arch in WIDTHS}
RECIPES |= {f"convnext-v2-{arch}_3rdparty-fcmae_in1k": partial(fine_tune, arch) for arch in WIDTHS}
RECIPES |= {
    f"convnext-v2-{arch}_fcmae-in21k-pre_3rdparty_in1k{'' if size == 224 else f'-{size}px'}": partial(
        fine_tune, arch, size
    )
    for arch in ("nano", "tiny", "base", "large", "huge")
    for size in ((384, 512) if arch == "huge" else (224, 384))
}


def get_config(name: str | None = None) -> ConfigDict:
    return pick(RECIPES, name)
