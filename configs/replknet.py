"""RepLKNet: Scaling Up Your Kernels to 31x31 (Ding et al., 2022), with labels.

These have not been run by us; published by MMPretrain: top-1 on ImageNet-1k, of weights from the paper's own training, which
was another; MMPretrain's recipes are those of its ResNets, for 300 epochs.

| recipe | command | hardware | wall time | metric |
|---|---|---|---|---|
| replknet-31B_3rdparty_in1k | `--config=configs/replknet.py` | 32 GPUs | | 83.48 |
| replknet-31B_3rdparty_in1k-384px | `--config=configs/replknet.py:NAME` | 32 GPUs | | 84.84 |
| replknet-31B_in21k-pre_3rdparty_in1k | | 32 GPUs | | 85.20 |
| replknet-31B_in21k-pre_3rdparty_in1k-384px | | 32 GPUs | | 85.99 |
| replknet-31L_in21k-pre_3rdparty_in1k-384px | | 32 GPUs | | 86.63 |
| replknet-XL_meg73m-pre_3rdparty_in1k-320px | | 32 GPUs | | 87.57 |
"""

from __future__ import annotations

from functools import partial

from ml_collections import ConfigDict

from jaxpretrain.config import pick
from jaxpretrain.supervised_recipes import PILLOW, classic, cosine_schedule, larger_images, plain_crops

WIDTHS = {"31B": 1024, "31L": 1536, "XL": 2048}


def replknet(arch: str, size: int = 384, deploy: bool = False) -> ConfigDict:
    """`deploy`: the network whose small kernels are fused into the large ones."""
    settings = {}
    if arch == "XL":
        settings = dict(data_preprocessor=dict(mean=(122.5,) * 3, std=(122.5,) * 3))
    return classic(
        dict(
            type="RepLKNet",
            arch=arch,
            out_indices=(3,),
            norm_cfg=dict(type="BN", groups=32),
            **(dict(small_kernel_merged=True) if deploy else {}),
        ),
        WIDTHS[arch],
        gpus=32,
        per_gpu={224: 32, 384: 16, 320: 8}[size],
        epochs=300,
        schedule=cosine_schedule(300),
        data=larger_images(size) if size == 384 else plain_crops(size, {224: 256, 320: 365}[size], **PILLOW),
        auto_scale_lr=dict(base_batch_size=256),
        **settings,
    )


RECIPES = {
    "replknet-31B_3rdparty_in1k": partial(replknet, "31B", 224),
    "replknet-31B_3rdparty_in1k-384px": partial(replknet, "31B"),
    "replknet-31B_in21k-pre_3rdparty_in1k": partial(replknet, "31B", 224),
    "replknet-31B_in21k-pre_3rdparty_in1k-384px": partial(replknet, "31B"),
    "replknet-31L_in21k-pre_3rdparty_in1k-384px": partial(replknet, "31L"),
    "replknet-XL_meg73m-pre_3rdparty_in1k-320px": partial(replknet, "XL", 320),
    "replknet-31L-deploy_32xb64_in1k-384px": partial(replknet, "31L", deploy=True),
    "replknet-XL-deploy_32xb64_in1k-320px": partial(replknet, "XL", 320, deploy=True),
}


def get_config(name: str | None = None) -> ConfigDict:
    return pick(RECIPES, name)
