"""RepMLP: Re-parameterizing Convolutions into Fully-connected Layers for Image Recognition (Ding et al., 2021), with labels.

These have not been run by us; published by MMPretrain: top-1 on ImageNet-1k, of weights from the paper's own training, which
was another.

| recipe | command | hardware | wall time | metric |
|---|---|---|---|---|
| repmlp-base_3rdparty_8xb64_in1k | `--config=configs/repmlp.py` | 8 GPUs | | 80.41 |
| repmlp-base_3rdparty_8xb64_in1k-256px | `--config=configs/repmlp.py:NAME` | 8 GPUs | | 81.11 |
"""

from __future__ import annotations

from functools import partial

from ml_collections import ConfigDict

from jaxpretrain.config import pick
from jaxpretrain.recipes import warmup_cosine
from jaxpretrain.supervised_recipes import CROSS_ENTROPY, TOKENS_NO_DECAY, from_scratch, plain_crops


def repmlp(size: int = 224, deploy: bool = False) -> ConfigDict:
    """Crops and mirrors alone. `deploy`: the network whose convolutions are fused into its linear layers."""
    if size == 224:
        data = plain_crops(backend="pillow")
        data["val"]["pipeline"][0] = dict(type="Resize", scale=(256, 256), backend="pillow")
        settings = dict(lr=1e-3, clip=5.0)
    else:
        data = plain_crops(size, edge=292)
        data["val"]["pipeline"][0]["backend"] = "pillow"
        settings = dict(
            lr=3e-3,
            weight_decay=0.3,
            clip=1.0,
            no_decay=TOKENS_NO_DECAY,
            param_scheduler=warmup_cosine(300, 30, by_iter=False),
        )
    return from_scratch(
        dict(
            type="RepMLPNet",
            arch="B",
            img_size=size,
            reparam_conv_kernels=(1, 3),
            norm_cfg=dict(type="BN", requires_grad=True, groups=8),
            deploy=deploy,
        ),
        768,
        gpus=8,
        per_gpu=64,
        loss=CROSS_ENTROPY,
        mixed=False,
        model=dict(neck=dict(type="GlobalAveragePooling")),
        data=data,
        auto_scale_lr=dict(base_batch_size=512),
        **settings,
    )


RECIPES = {
    "repmlp-base_3rdparty_8xb64_in1k": repmlp,
    "repmlp-base_3rdparty_8xb64_in1k-256px": partial(repmlp, 256),
    "repmlp-base_delopy_8xb64_in1k": partial(repmlp, deploy=True),  # the name is that of MMPretrain's file
    "repmlp-base_deploy_8xb64_in1k-256px": partial(repmlp, 256, deploy=True),
}


def get_config(name: str | None = None) -> ConfigDict:
    return pick(RECIPES, name)
