"""RepVGG: Making VGG-style ConvNets Great Again (Ding et al., 2021), trained with labels.

None of these has been run by us; published by MMPretrain: top-1 on ImageNet-1k, of its own training; that of D2se of the paper's.

| recipe | command | hardware | wall time | metric |
|---|---|---|---|---|
| repvgg-A0_8xb32_in1k | `--config=configs/repvgg.py` | 8 GPUs | | 72.37 |
| repvgg-A1_8xb32_in1k | `--config=configs/repvgg.py:NAME` | 8 GPUs | | 74.23 |
| repvgg-A2_8xb32_in1k |  | 8 GPUs | | 76.49 |
| repvgg-B0_8xb32_in1k |  | 8 GPUs | | 75.27 |
| repvgg-B1_8xb32_in1k |  | 8 GPUs | | 78.19 |
| repvgg-B1g2_8xb32_in1k |  | 8 GPUs | | 77.87 |
| repvgg-B1g4_8xb32_in1k |  | 8 GPUs | | 77.81 |
| repvgg-B2_8xb32_in1k |  | 8 GPUs | | 78.58 |
| repvgg-B2g4_8xb32_in1k |  | 8 GPUs | | 79.44 |
| repvgg-B3_8xb32_in1k |  | 8 GPUs | | 80.58 |
| repvgg-B3g4_8xb32_in1k |  | 8 GPUs | | 80.26 |
| repvgg-D2se_8xb32_in1k |  | 8 GPUs | | 81.81 |
| repvgg-A0_deploy_in1k |  | 8 GPUs | | |

A GPU has 32 images there, normalised apart: BatchNorm in 8 groups. `deploy` is the network whose branches are one convolution
each, as after `python -m jaxpretrain.tools.reparameterize_model`; MMPretrain has that file for testing.
"""

from __future__ import annotations

from functools import partial

from ml_collections import ConfigDict

from jaxpretrain.config import pick
from jaxpretrain.recipes import NO_DECAY, warmup_cosine
from jaxpretrain.supervised_recipes import classic, plain_crops, rand_augment, smoothing

WIDTHS = dict(A0=1280, A1=1280, A2=1408, B0=1280, B1=2048, B1g2=2048, B1g4=2048, B2=2560)
DECAY = dict(
    bias_decay_mult=0.0,
    custom_keys=dict.fromkeys(("branch_3x3/norm", "branch_1x1/norm", "branch_norm/bias"), NO_DECAY),
)


def repvgg(
    arch: str, epochs: int = 120, *, strong: bool = False, deploy: bool = False, **settings: object
) -> ConfigDict:
    """`strong`: with RandAugment, Mixup and smoothed labels."""
    data = plain_crops(backend="pillow")
    if strong:
        data["train"]["pipeline"].append(rand_augment(7))
        settings["loss"] = smoothing(mode="classy_vision", num_classes=1000, loss_weight=1.0)
        settings["augments"] = dict(type="Mixup", alpha=0.2)
    kind = dict(deploy=True) if deploy else dict(norm_cfg=dict(type="BN", groups=8))
    cosine = dict(
        type="CosineAnnealingLR", T_max=epochs, begin=0, end=epochs, by_epoch=True, convert_to_iter_based=True
    )
    return classic(
        dict(type="RepVGG", arch=arch, out_indices=(3,), **kind),
        WIDTHS.get(arch, 2560),
        epochs=epochs,
        no_decay=DECAY,
        data=data,
        **dict(schedule=[cosine]) | settings,
    )


RECIPES = {f"repvgg-{arch}_8xb32_in1k": partial(repvgg, arch) for arch in WIDTHS}
RECIPES |= {f"repvgg-{arch}_8xb32_in1k": partial(repvgg, arch, 200, strong=True) for arch in ("B2g4", "B3", "B3g4")}
RECIPES["repvgg-D2se_8xb32_in1k"] = partial(
    repvgg, "D2se", 300, strong=True, schedule=warmup_cosine(300, 5, by_iter=False, eta_min=1e-6)
)
RECIPES["repvgg-A0_deploy_in1k"] = partial(repvgg, "A0", deploy=True)


def get_config(name: str | None = None) -> ConfigDict:
    return pick(RECIPES, name)
