"""MobileOne: An Improved One millisecond Mobile Backbone (Vasu et al., 2022), trained with labels.

None of these has been run by us; published by MMPretrain: top-1 on ImageNet-1k.

| recipe | command | hardware | wall time | metric |
|---|---|---|---|---|
| mobileone-s0_8xb32_in1k | `--config=configs/mobileone.py` | 8 GPUs | | 71.34 |
| mobileone-s1_8xb32_in1k | `--config=configs/mobileone.py:NAME` | 8 GPUs | | 75.72 |
| mobileone-s2_8xb32_in1k | | 8 GPUs | | 77.37 |
| mobileone-s3_8xb32_in1k | | 8 GPUs | | 78.06 |
| mobileone-s4_8xb32_in1k | | 8 GPUs | | 79.69 |
| mobileone-sN_deploy_8xb32_in1k | | 8 GPUs | | |

`8xb32` means 8 GPUs with 32 images each, normalised apart: BatchNorm in 8 groups, on any number of devices. The recipes of
`deploy` have the fused form, in which trained weights are evaluated (`python -m jaxpretrain.tools.reparameterize_model`).
"""

from __future__ import annotations

from functools import partial

from ml_collections import ConfigDict

from jaxpretrain.config import pick
from jaxpretrain.recipes import FLIP, Cfg, warmup_cosine
from jaxpretrain.supervised_recipes import classic, plain_crops, smoothing

WIDTHS = dict(s0=1024, s1=1280, s2=2048, s3=2048, s4=2048)
LEVELS = dict(s1=(0.7, 7.0, 7.0)) | dict.fromkeys(("s2", "s3", "s4"), (2.1, 4.9, 7.0))


def augmented(size: int, level: float) -> list[Cfg]:
    return [
        dict(type="RandomResizedCrop", scale=size, backend="pillow"),
        FLIP,
        dict(
            type="RandAugment",
            policies="timm_increasing",
            num_policies=2,
            total_level=10,
            magnitude_level=level,
            magnitude_std=0.5,
            hparams=dict(pad_val=[124, 116, 104]),
        ),
    ]


def growing(levels: tuple[float, float, float]) -> Cfg:
    """`data` of images that grow and are changed ever more: of 160 pixels, of 192 from epoch 37 on, of 224 from 112 on.

    This is the paper's curriculum and what MMPretrain's file asks for. There the pictures stay as they began: the file says
    `pipeline`, and the hook that is to change it looks for `train_pipeline`.
    """
    data = plain_crops(backend="pillow")
    first, second, third = (augmented(size, level) for size, level in zip((160, 192, 224), levels, strict=True))
    later = [dict(begin=36, pipeline=second), dict(begin=111, pipeline=third)]
    data["train"] |= dict(pipeline=first, device_pipeline=[], later=later)
    return data


def mobileone(arch: str, **backbone: bool) -> ConfigDict:
    """300 epochs of SGD with averaged weights; rate and weight decay fall on cosines."""
    decay: Cfg = dict(
        type="CosineAnnealingParamScheduler", param_name="weight_decay", eta_min=1e-5, by_epoch=True, begin=0, end=300
    )
    return classic(
        dict(type="MobileOne", arch=arch, out_indices=(3,), norm_cfg=dict(type="BN", groups=8), **backbone),
        WIDTHS[arch],
        epochs=300,
        schedule=[*warmup_cosine(300, 5, 1e-3, by_iter=False, eta_min=1e-6), decay],
        no_decay=dict(norm_decay_mult=0.0),
        loss=smoothing(mode="original"),
        data=growing(LEVELS[arch]) if arch in LEVELS else plain_crops(backend="pillow"),
        ema=dict(momentum=5e-4, update_buffers=True),
    )


RECIPES = {f"mobileone-{arch}_8xb32_in1k": partial(mobileone, arch) for arch in WIDTHS}
RECIPES |= {f"mobileone-{arch}_deploy_8xb32_in1k": partial(mobileone, arch, deploy=True) for arch in WIDTHS}


def get_config(name: str | None = None) -> ConfigDict:
    return pick(RECIPES, name)
