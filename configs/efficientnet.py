"""EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks (Tan & Le, 2019), trained with labels.

None of these has been run by us; published by MMPretrain: top-1 on ImageNet-1k, of weights from the papers' own training, which
was another; its recipes are those of its ResNets, on larger images.

| recipe | command | hardware | wall time | metric |
|---|---|---|---|---|
| efficientnet-b0_3rdparty_8xb32_in1k | `--config=configs/efficientnet.py` | 8 GPUs | | 76.74 |
| efficientnet-b1_3rdparty_8xb32_in1k | `--config=configs/efficientnet.py:NAME` | 8 GPUs | | 78.68 |
| efficientnet-b2_3rdparty_8xb32_in1k | | 8 GPUs | | 79.64 |
| efficientnet-b3_3rdparty_8xb32_in1k | | 8 GPUs | | 81.01 |
| efficientnet-b4_3rdparty_8xb32_in1k | | 8 GPUs | | 82.57 |
| efficientnet-b5_3rdparty_8xb32_in1k | | 8 GPUs | | 83.18 |
| efficientnet-b8_8xb32_in1k | | 8 GPUs | | |
| efficientnet-es_8xb32-01norm_in1k | | 8 GPUs | | |
| efficientnet-em_8xb32-01norm_in1k | | 8 GPUs | | |
| efficientnet-bN_3rdparty_8xb32-aa_in1k | | 8 GPUs | | 77.26 to 84.38 (b0 to b7) |
| efficientnet-bN_3rdparty_8xb32-aa-advprop_in1k | | 8 GPUs | | 77.53 to 85.38 (b0 to b8) |
| efficientnet-bN_3rdparty-ra-noisystudent_in1k | | 8 GPUs | | 77.63 to 86.83 (b0 to b7) |
| efficientnet-l2_3rdparty-ra-noisystudent_in1k-475px | | 8 GPUs | | 88.18 |
| efficientnet-l2_3rdparty-ra-noisystudent_in1k-800px | | 8 GPUs | | 88.33 |

The weights of `aa` come from AutoAugment, those of `advprop` from adversarial examples, those of `noisystudent` from a teacher
and unlabelled images; the recipes have none of it. `8xb32` means 8 GPUs with 32 images each, normalised apart: BatchNorm in 8
groups, on any number of devices.
"""

from __future__ import annotations

from functools import partial

from ml_collections import ConfigDict

from jaxpretrain.config import pick
from jaxpretrain.followers import CENTRED
from jaxpretrain.recipes import FLIP, imagenet
from jaxpretrain.supervised_recipes import classic

# Width of the features, edge of the images.
ARCHS = dict(
    b0=(1280, 224),
    b1=(1280, 240),
    b2=(1408, 260),
    b3=(1536, 300),
    b4=(1792, 380),
    b5=(2048, 456),
    b6=(2304, 528),
    b7=(2560, 600),
    b8=(2816, 672),
    l2=(5504, 800),
    es=(1280, 224),
    em=(1280, 240),
)


def efficientnet(arch: str, *, centred: bool = False, size: int | None = None, per_gpu: int = 32) -> ConfigDict:
    """`centred`: grey levels as -1 to 1."""
    width, usual = ARCHS[arch]
    size = size or usual
    data = imagenet([dict(type="EfficientNetRandomCrop", scale=size)], [FLIP])
    data["val"]["pipeline"] = [dict(type="EfficientNetCenterCrop", crop_size=size)]
    backbone = dict(type="EfficientNet", arch=arch, norm_cfg=dict(type="BN", eps=1e-3, groups=8))
    if arch in ("es", "em"):
        backbone["act_cfg"] = dict(type="ReLU")
    fields = dict(data_preprocessor=CENTRED) if centred else {}
    return classic(backbone, width, per_gpu=per_gpu, data=data, auto_scale_lr=dict(base_batch_size=256), **fields)


RECIPES = {f"efficientnet-b{n}_3rdparty_8xb32_in1k": partial(efficientnet, f"b{n}") for n in range(6)}
RECIPES |= {f"efficientnet-b{n}_3rdparty_8xb32-aa_in1k": partial(efficientnet, f"b{n}") for n in range(8)}
RECIPES |= {
    f"efficientnet-b{n}_3rdparty_8xb32-aa-advprop_in1k": partial(efficientnet, f"b{n}", centred=True) for n in range(9)
}
RECIPES |= {f"efficientnet-b{n}_3rdparty-ra-noisystudent_in1k": partial(efficientnet, f"b{n}") for n in range(8)}
RECIPES |= {
    "efficientnet-b8_8xb32_in1k": partial(efficientnet, "b8"),
    "efficientnet-es_8xb32-01norm_in1k": partial(efficientnet, "es"),  # MMPretrain's file is not centred either
    "efficientnet-em_8xb32-01norm_in1k": partial(efficientnet, "em", centred=True),
    "efficientnet-l2_3rdparty-ra-noisystudent_in1k-475px": partial(efficientnet, "l2", size=475),
    "efficientnet-l2_3rdparty-ra-noisystudent_in1k-800px": partial(efficientnet, "l2", per_gpu=8),
}


def get_config(name: str | None = None) -> ConfigDict:
    return pick(RECIPES, name)
