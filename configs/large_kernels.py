"""HorNet (Rao et al., 2022), VAN (Guo et al., 2023), ConvMixer (Trockman & Kolter, 2022) and MLP-Mixer (Tolstikhin et al., 2021),
trained with labels.

These have not been run by us; published by MMPretrain: top-1 on ImageNet-1k, of weights from the papers' own training.

| recipe | command | hardware | wall time | metric |
|---|---|---|---|---|
| hornet-tiny_3rdparty_in1k | `--config=configs/large_kernels.py` | 8 GPUs | | 82.84 |
| hornet-tiny-gf_3rdparty_in1k | `--config=configs/large_kernels.py:NAME` | 8 GPUs | | 82.98 |
| hornet-small_3rdparty_in1k | | 8 GPUs | | 83.79 |
| hornet-small-gf_3rdparty_in1k | | 8 GPUs | | 83.98 |
| hornet-base_3rdparty_in1k | | 8 GPUs | | 84.24 |
| hornet-base-gf_3rdparty_in1k | | 8 GPUs | | 84.32 |
"""

from __future__ import annotations

from functools import partial

from ml_collections import ConfigDict

from jaxpretrain.config import pick
from jaxpretrain.followers import CENTRED
from jaxpretrain.recipes import FLIP, NO_DECAY, imagenet, warmup_cosine
from jaxpretrain.supervised_recipes import CROSS_ENTROPY, from_scratch, resized

POOLED = dict(neck=dict(type="GlobalAveragePooling"))
LINEAR_INIT = [
    dict(type="TruncNormal", layer="Linear", std=0.02, bias=0.0),
    dict(type="Constant", layer="LayerNorm", val=1.0, bias=0.0),
]


def hornet(arch: str, width: int, drop_path_rate: float, clip: float, per_gpu: int = 64) -> ConfigDict:
    scale = dict(type="Constant", layer=["LayerScale"], val=1e-6)
    return from_scratch(
        dict(type="HorNet", arch=arch, drop_path_rate=drop_path_rate),
        width,
        lr=4e-3,
        gpus=8,
        per_gpu=per_gpu,
        clip=clip,
        averaged=4e-5,
        head=dict(init_cfg=None),
        model=dict(init_cfg=[*LINEAR_INIT, scale]),
    )


def van(arch: str, width: int = 512, drop_path_rate: float = 0.1, mixed: bool = True) -> ConfigDict:
    """`mixed`: with mixed images, and kernels of linear layers from a narrow normal distribution.

    BatchNorm is over the whole batch here; MMPretrain's is over each GPU's 128 images.
    """
    data = resized(248, fill=(127.5,) * 3, fill_std=(127.5,) * 3, pad=(128, 128, 128))
    data["train"]["device_pipeline"] = [dict(type="ColorJitter", brightness=0.4, contrast=0.4, saturation=0.4)]
    return from_scratch(
        dict(type="VAN", arch=arch, drop_path_rate=drop_path_rate),
        width,
        lr=1e-3,
        gpus=8,
        per_gpu=128,
        clip=5.0,
        mixed=mixed,
        head=dict(init_cfg=None),
        model=POOLED | (dict(init_cfg=LINEAR_INIT) if mixed else {}),
        data=data,
        data_preprocessor=CENTRED,
    )


def convmixer(arch: str, epochs: int = 150, **backbone: object) -> ConfigDict:
    return from_scratch(
        dict(type="ConvMixer", arch=arch, norm_cfg=dict(type="BN", groups=10), **backbone),
        int(arch.split("/")[0]),
        lr=0.01,
        gpus=10,
        per_gpu=64,
        epochs=epochs,
        clip=5.0,
        loss=CROSS_ENTROPY,
        mixed=False,
        model=POOLED,
        data=resized(233),
        auto_scale_lr=dict(base_batch_size=640),
    )


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
        no_decay=dict(custom_keys={"/cls_token": NO_DECAY, "/pos_embed": NO_DECAY}),
        model=dict(neck=dict(type="GlobalAveragePooling", dim=1)),
        data=imagenet([dict(type="RandomResizedCrop", scale=224)], [FLIP], resize=resize),
        data_preprocessor=CENTRED,
        param_scheduler=warmup_cosine(300, 30, by_iter=False),
        auto_scale_lr=dict(base_batch_size=4096),
    )


RECIPES = {
    "hornet-tiny_3rdparty_in1k": partial(hornet, "tiny", 512, 0.2, 100.0, 128),
    "hornet-tiny-gf_3rdparty_in1k": partial(hornet, "tiny-gf", 512, 0.2, 1.0, 128),
    "hornet-small_3rdparty_in1k": partial(hornet, "small", 768, 0.4, 5.0),
    "hornet-small-gf_3rdparty_in1k": partial(hornet, "small-gf", 768, 0.4, 1.0),
    "hornet-base_3rdparty_in1k": partial(hornet, "base", 1024, 0.5, 5.0),
    "hornet-base-gf_3rdparty_in1k": partial(hornet, "base-gf", 1024, 0.5, 1.0),
    "van-tiny_3rdparty_in1k": partial(van, "tiny", 256),
    "van-small_3rdparty_in1k": partial(van, "small"),
    "van-base_3rdparty_in1k": partial(van, "base", mixed=False),
    "van-large_3rdparty_in1k": partial(van, "large", drop_path_rate=0.2, mixed=False),
    "convmixer-768-32_3rdparty_in1k": partial(convmixer, "768/32", 300, act_cfg=dict(type="ReLU")),
    "convmixer-1024-20_3rdparty_in1k": partial(convmixer, "1024/20"),
    "convmixer-1536-20_3rdparty_in1k": partial(convmixer, "1536/20"),
    "mlp-mixer-base-p16_3rdparty_64xb64_in1k": partial(mixer, "b", 768),
    "mlp-mixer-large-p16_3rdparty_64xb64_in1k": partial(mixer, "l", 1024),
}


def get_config(name: str | None = None) -> ConfigDict:
    return pick(RECIPES, name)
