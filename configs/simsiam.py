"""SimSiam: Exploring Simple Siamese Representation Learning (Chen & He, 2020).

Measured here: `digits`, on 2 CPU cores. The others have not been run by us; published by MMPretrain: top-1 on ImageNet-1k.

| recipe | command | hardware | wall time | metric |
|---|---|---|---|---|
| digits | `--config=configs/simsiam.py:digits` | 2 CPU cores | 2.3 CPU min | probe 80.1, trained 86.9; kNN 70.4, 80.8 |
| simsiam_resnet50_8xb32-coslr-100e_in1k | `--config=configs/simsiam.py` | 8 GPUs | | |
| simsiam_resnet50_8xb32-coslr-200e_in1k | `--config=configs/simsiam.py:NAME` | 8 GPUs | | |
| resnet50_simsiam-100e-pre_8xb512-linear-coslr-90e_in1k | `--config.load_from.path=RUN` | 8 GPUs | | 68.3 (linear probe) |
| resnet50_simsiam-200e-pre_8xb512-linear-coslr-90e_in1k | | 8 GPUs | | 69.8 (linear probe) |

The predictor keeps its learning rate (`fix_lr`) while that of the rest falls on a cosine.
"""

from __future__ import annotations

from functools import partial

from ml_collections import ConfigDict

from jaxpretrain.config import pick
from jaxpretrain.followers import probe_resnet50
from jaxpretrain.recipes import MOCO_CROP, MOCO_VIEW, imagenet, recipe, tiny_siamese, two_views

PREDICTOR_FIXED = dict(custom_keys={"predictor": dict(fix_lr=True)})


def method(backbone: dict, width: int, projection: int, bottleneck: int) -> dict:
    """Projector of three layers, predictor with a bottleneck."""
    return dict(
        type="SimSiam",
        backbone=backbone,
        neck=dict(
            type="NonLinearNeck",
            in_channels=width,
            hid_channels=projection,
            out_channels=projection,
            num_layers=3,
            with_last_bn_affine=False,
            with_avg_pool=True,
        ),
        head=dict(
            type="LatentPredictHead",
            loss=dict(type="CosineSimilarityLoss"),
            predictor=dict(
                type="NonLinearNeck",
                in_channels=projection,
                hid_channels=bottleneck,
                out_channels=projection,
                with_avg_pool=False,
                with_last_bn=False,
                with_last_bias=True,
            ),
        ),
    )


def pretrain(epochs: int) -> ConfigDict:
    backbone = dict(type="ResNet", depth=50, norm_cfg=dict(type="SyncBN"), zero_init_residual=True)
    return recipe(
        method=method(backbone, 2048, 2048, 512),
        data=imagenet(*two_views(MOCO_CROP, MOCO_VIEW)),
        batch_size=256,
        max_epochs=epochs,
        optim_wrapper=dict(
            optimizer=dict(type="SGD", lr=0.05, weight_decay=1e-4, momentum=0.9), paramwise_cfg=PREDICTOR_FIXED
        ),
        param_scheduler=[dict(type="CosineAnnealingLR", T_max=epochs, by_epoch=True, begin=0, end=epochs)],
        checkpoint=dict(interval=10),
    )


def tiny() -> ConfigDict:
    """A narrow ResNet-18 on real handwritten digits."""
    return tiny_siamese(
        lambda backbone, width: method(backbone, width, 128, 32), lr=0.05, paramwise_cfg=PREDICTOR_FIXED
    )


def probe() -> ConfigDict:
    return probe_resnet50(dict(type="LARS", lr=1.6, weight_decay=0.0), 90, 512)


RECIPES = {
    "simsiam_resnet50_8xb32-coslr-100e_in1k": partial(pretrain, 100),
    "simsiam_resnet50_8xb32-coslr-200e_in1k": partial(pretrain, 200),
    "resnet50_simsiam-100e-pre_8xb512-linear-coslr-90e_in1k": probe,
    "resnet50_simsiam-200e-pre_8xb512-linear-coslr-90e_in1k": probe,
    "digits": tiny,
}


def get_config(name: str | None = None) -> ConfigDict:
    return pick(RECIPES, name)
