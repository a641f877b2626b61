"""DeepCluster: Deep Clustering for Unsupervised Learning of Visual Features (Caron et al., 2018).

Measured here: `digits`, on 2 CPU cores. The other has not been run by us; published by MMSelfSup: linear probe on ImageNet-1k.

| recipe | command | hardware | wall time | metric |
|---|---|---|---|---|
| digits | `--config=configs/deepcluster.py:digits` | 2 CPU cores | 1.5 CPU min | probe 87.9, trained 97.6; kNN 78.1, 93.6 |
| deepcluster-sobel_resnet50_8xb64-steplr-200e_in1k | `--config=configs/deepcluster.py` | 8 GPUs | | 46.92 |
"""

from __future__ import annotations

from ml_collections import ConfigDict

from jaxpretrain.config import pick
from jaxpretrain.recipes import (
    FLIP,
    GRAYSCALE,
    IMAGENET_IMAGES,
    digits,
    imagenet,
    jitter,
    on_digits,
    recipe,
)

HEAD_WITHOUT_MOMENTUM = {"head": dict(momentum=0.0)}  # its targets change with each clustering


def pretrain() -> ConfigDict:
    clusters = 10000
    return recipe(
        method=dict(
            type="DeepCluster",
            backbone=dict(type="ResNetSobel", depth=50, norm_cfg=dict(type="BN", groups=8)),
            neck=dict(type="GlobalAveragePooling"),
            head=dict(type="LinearClsHead", in_channels=2048, num_classes=clusters, loss=dict(type="CrossEntropyLoss")),
            num_samples=IMAGENET_IMAGES,
            # faiss starts from random rows.
            clustering=dict(type="Kmeans", k=clusters, pca_dim=256, init="random", iterations=20),
            unif_sampling=True,
            reweight=False,
            reweight_pow=0.5,
            interval=1,
        ),
        data=imagenet(
            [
                dict(type="RandomResizedCrop", scale=224, backend="pillow"),
                dict(type="RandomRotation", degrees=2),
            ],
            [FLIP, jitter(0.4, 0.4, 1.0, 0.5, prob=1.0), GRAYSCALE],
            resize=dict(type="ResizeEdge", scale=256, edge="short", backend="pillow"),
        ),
        batch_size=512,
        max_epochs=200,
        optim_wrapper=dict(
            optimizer=dict(type="SGD", lr=0.1, weight_decay=1e-5, momentum=0.9),
            paramwise_cfg=dict(custom_keys=HEAD_WITHOUT_MOMENTUM),
        ),
        # As released: 400 is later than the end, so the rate stays.
        param_scheduler=[dict(type="MultiStepLR", by_epoch=True, milestones=[400], gamma=0.1)],
        checkpoint=dict(interval=10),
    )


def tiny() -> ConfigDict:
    """A narrow ResNet-18 on the edges of real handwritten digits, in 30 clusters."""
    clusters, size = 30, 32
    return on_digits(
        method=dict(
            type="DeepCluster",
            backbone=dict(
                type="ResNetSobel",
                depth=18,
                num_stages=3,
                strides=(1, 2, 2),
                dilations=(1, 1, 1),
                out_indices=(2,),
                stem_channels=16,
                base_channels=16,
            ),
            neck=dict(type="GlobalAveragePooling"),
            head=dict(type="LinearClsHead", in_channels=64, num_classes=clusters, loss=dict(type="CrossEntropyLoss")),
            num_samples=1500,
            clustering=dict(type="Kmeans", k=clusters, pca_dim=32),
            interval=5,  # an epoch has 11 steps only
        ),
        data=digits(
            [dict(type="RandomResizedCrop", scale=size, crop_ratio_range=(0.5, 1.0))],
            [jitter(0.6, 0.6, 0.0, 0.0)],
            size=size,
        ),
        max_epochs=20,
        optim_wrapper=dict(
            optimizer=dict(type="SGD", lr=0.05, weight_decay=1e-4, momentum=0.9),
            paramwise_cfg=dict(custom_keys={"head": dict(momentum=0.0, lr_mult=20.0)}),
        ),
        evaluation=dict(at_start=True),
        checkpoint=dict(interval=5),
    )


RECIPES = {
    "deepcluster-sobel_resnet50_8xb64-steplr-200e_in1k": pretrain,
    "digits": tiny,
}


def get_config(name: str | None = None) -> ConfigDict:
    return pick(RECIPES, name)
