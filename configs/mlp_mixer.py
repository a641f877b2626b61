"""MLP-Mixer: An all-MLP Architecture for Vision (Tolstikhin et al., 2021), with labels.

These have not been run by us; published by MMPretrain: top-1 on ImageNet-1k, of weights from the paper's own training.

| recipe | command | hardware | wall time | metric |
|---|---|---|---|---|
| mlp-mixer-base-p16_3rdparty_64xb64_in1k | `--config=configs/mlp_mixer.py` | 64 GPUs | | 76.68 |
| mlp-mixer-large-p16_3rdparty_64xb64_in1k | `--config=configs/mlp_mixer.py:NAME` | 64 GPUs | | 72.34 |
"""

from __future__ import annotations

from functools import partial

from ml_collections import ConfigDict

from jaxpretrain.config import pick
from jaxpretrain.followers import CENTRED
from jaxpretrain.recipes import FLIP, imagenet, warmup_cosine
from jaxpretrain.supervised_recipes import CROSS_ENTROPY, TOKENS_NO_DECAY, from_scratch


def mixer(arch: str, width: int) -> ConfigDict:
    kaiming = dict(type="Kaiming", layer="Conv2d", mode="fan_in", nonlinearity="linear")
    resize = dict(type="ResizeEdge", scale=256, edge="short", interpolation="bicubic")
    return from_scratch(
        dict(type="MlpMixer", arch=arch, img_size=224, patch_size=16, drop_rate=0.1, init_cfg=[kaiming]),
        width,
        lr=3e-3,
        gpus=64,
        per_gpu=64,
        weight_decay=0.3,
        clip=1.0,
        loss=CROSS_ENTROPY,
        mixed=False,
        no_decay=TOKENS_NO_DECAY,
        model=dict(neck=dict(type="GlobalAveragePooling", dim=1)),
        data=imagenet([dict(type="RandomResizedCrop", scale=224)], [FLIP], resize=resize),
        data_preprocessor=CENTRED,
        param_scheduler=warmup_cosine(300, 30, by_iter=False),
        auto_scale_lr=dict(base_batch_size=4096),
    )


RECIPES = {
    "mlp-mixer-base-p16_3rdparty_64xb64_in1k": partial(mixer, "b", 768),
    "mlp-mixer-large-p16_3rdparty_64xb64_in1k": partial(mixer, "l", 1024),
}


def get_config(name: str | None = None) -> ConfigDict:
    return pick(RECIPES, name)
