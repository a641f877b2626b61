"""ResNeSt: Split-Attention Networks (Zhang et al., 2020), trained with labels.

None of these has been run by us, and MMPretrain publishes no weights of them.

| recipe | command | hardware | wall time | metric |
|---|---|---|---|---|
| resnest50_32xb64_in1k | `--config=configs/resnest.py` | 32 GPUs | | |
| resnest101_32xb64_in1k | `--config=configs/resnest.py:NAME` | 32 GPUs | | |
| resnest200_64xb32_in1k |  | 64 GPUs | | |
| resnest269_64xb32_in1k |  | 64 GPUs | | |

The images of a GPU are normalised apart: BatchNorm in 32 or 64 groups. ResNeSt-200 sees plain crops of 224 pixels: its file in
MMPretrain does not use the pipeline that it describes.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from ml_collections import ConfigDict

from jaxpretrain.config import pick
from jaxpretrain.recipes import FLIP, imagenet, warmup_cosine
from jaxpretrain.supervised_recipes import classic, plain_crops, smoothing


def operation(kind: str, key: str | None = None, magnitudes: tuple = (), **args: Any) -> dict:
    """One of RandAugment's, applied with probability 1/2."""
    strength = dict(magnitude_key=key, magnitude_range=magnitudes) if key else {}
    return dict(type=kind, prob=0.5, **strength, **args)


BLACK = dict(pad_val=0, random_negative_prob=0.5)
# Ranges are those of the paper's code.
OPERATIONS = [
    operation("AutoContrast"),
    operation("Equalize"),
    operation("Invert"),
    operation("Rotate", "angle", (0, 30), **BLACK),
    operation("Posterize", "bits", (0, 4)),
    operation("Solarize", "thr", (0, 256)),
    operation("SolarizeAdd", "magnitude", (0, 110), thr=128),
    *(
        operation(kind, "magnitude", (-0.9, 0.9), random_negative_prob=0.0)
        for kind in ("ColorTransform", "Contrast", "Brightness", "Sharpness")
    ),
    operation("Shear", "magnitude", (0, 0.3), direction="horizontal", **BLACK),
    operation("Shear", "magnitude", (0, 0.3), direction="vertical", **BLACK),
    operation("Cutout", "shape", (1, 41), pad_val=0),
    operation("Translate", "magnitude", (0, 0.3), direction="horizontal", interpolation="bicubic", **BLACK),
    operation("Translate", "magnitude", (0, 0.3), direction="vertical", interpolation="bicubic", **BLACK),
]
LIGHTING = dict(
    type="Lighting",
    eigval=[55.4625, 4.794, 1.1475],
    eigvec=[[-0.5836, -0.6948, 0.4203], [-0.5808, -0.0045, -0.814], [-0.5675, 0.7192, 0.4009]],
    alphastd=0.1,
    to_rgb=False,
)


def strong(size: int, tested: int) -> dict:
    """`data`: RandAugment of whole images, so colours change on the host too."""
    data = imagenet(
        [
            dict(type="RandAugment", policies=OPERATIONS, num_policies=2, magnitude_level=12),
            dict(type="EfficientNetRandomCrop", scale=size, backend="pillow"),
            dict(type="ColorJitter", brightness=0.4, contrast=0.4, saturation=0.4),
            LIGHTING,
        ],
        [FLIP],
    )
    data["val"]["pipeline"] = [dict(type="EfficientNetCenterCrop", crop_size=tested, backend="pillow")]
    return data


def resnest(depth: int, gpus: int, data: dict, stem_channels: int = 128) -> ConfigDict:
    backbone = dict(
        type="ResNeSt",
        depth=depth,
        num_stages=4,
        stem_channels=stem_channels,
        out_indices=(3,),
        style="pytorch",
        norm_cfg=dict(type="BN", requires_grad=True, groups=gpus),
    )
    return classic(
        backbone,
        2048,
        gpus=gpus,
        per_gpu=2048 // gpus,
        epochs=270,
        optimizer=dict(lr=0.8),
        schedule=warmup_cosine(270, 5, 1e-6, by_iter=False),
        loss=smoothing(num_classes=1000, reduction="mean", loss_weight=1.0),
        augments=dict(type="Mixup", alpha=0.2),
        no_decay=dict(bias_decay_mult=0.0, norm_decay_mult=0.0),
        data=data,
    )


RECIPES = {
    "resnest50_32xb64_in1k": partial(resnest, 50, 32, strong(224, 256), stem_channels=64),
    "resnest101_32xb64_in1k": partial(resnest, 101, 32, strong(256, 256)),
    "resnest200_64xb32_in1k": partial(resnest, 200, 64, plain_crops()),
    "resnest269_64xb32_in1k": partial(resnest, 269, 64, strong(416, 416)),
}


def get_config(name: str | None = None) -> ConfigDict:
    return pick(RECIPES, name)
