"""ODC: Online Deep Clustering for Unsupervised Representation Learning (Zhan et al., 2020).

Measured here: `digits`, on 2 CPU cores. The other has not been run by us; published by MMSelfSup: linear probe on ImageNet-1k.

| recipe | command | hardware | wall time | metric |
|---|---|---|---|---|
| digits | `--config=configs/odc.py:digits` | 2 CPU cores | 2.1 CPU min | probe 80.1, trained 89.2; kNN 70.4, 84.2 |
| odc_resnet50_8xb64-steplr-440e_in1k | `--config=configs/odc.py` | 8 GPUs | | 53.42 |
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

HEAD_WITHOUT_MOMENTUM = {"head": dict(momentum=0.0)}  # its targets change all the time


def pretrain() -> ConfigDict:
    clusters = 10000
    return recipe(
        method=dict(
            type="ODC",
            backbone=dict(type="ResNet", depth=50, norm_cfg=dict(type="SyncBN")),
            neck=dict(type="ODCNeck", in_channels=2048, hid_channels=512, out_channels=256, with_avg_pool=True),
            head=dict(type="LinearClsHead", in_channels=256, num_classes=clusters, loss=dict(type="CrossEntropyLoss")),
            memory_bank=dict(
                type="ODCMemory",
                length=IMAGENET_IMAGES,
                feat_dim=256,
                momentum=0.5,
                num_classes=clusters,
                min_cluster=20,
            ),
            # faiss starts from random rows.
            clustering=dict(type="Kmeans", k=clusters, pca_dim=-1, init="random", iterations=20),
            reweight=True,
            reweight_pow=0.5,
            centroids_update_interval=10,
            deal_with_small_clusters_interval=1,
            replace=True,
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
        max_epochs=440,
        optim_wrapper=dict(
            optimizer=dict(type="SGD", lr=0.06, weight_decay=1e-5, momentum=0.9),
            paramwise_cfg=dict(custom_keys=HEAD_WITHOUT_MOMENTUM),
        ),
        param_scheduler=[dict(type="MultiStepLR", by_epoch=True, milestones=[400], gamma=0.4)],
        checkpoint=dict(interval=10),
    )


def tiny() -> ConfigDict:
    """A narrow ResNet-18 on real handwritten digits, in 30 clusters."""
    clusters, size = 30, 16
    return on_digits(
        method=dict(
            type="ODC",
            backbone=dict(
                type="ResNet_CIFAR",
                depth=18,
                num_stages=3,
                strides=(1, 2, 2),
                dilations=(1, 1, 1),
                out_indices=(2,),
                stem_channels=16,
                base_channels=16,
            ),
            neck=dict(type="ODCNeck", in_channels=64, hid_channels=64, out_channels=32),
            head=dict(type="LinearClsHead", in_channels=32, num_classes=clusters, loss=dict(type="CrossEntropyLoss")),
            memory_bank=dict(type="ODCMemory", length=1500, feat_dim=32, momentum=0.5, min_cluster=10),
            centroids_update_interval=2,
        ),
        data=digits(
            [dict(type="RandomResizedCrop", scale=size, crop_ratio_range=(0.5, 1.0))],
            [jitter(0.6, 0.6, 0.0, 0.0)],
            size=size,
        ),
        max_epochs=20,
        optim_wrapper=dict(
            optimizer=dict(type="SGD", lr=0.06, weight_decay=1e-4, momentum=0.9),
            paramwise_cfg=dict(custom_keys={"head": dict(momentum=0.0, lr_mult=20.0)}),
        ),
        evaluation=dict(at_start=True),
        checkpoint=dict(interval=5),
    )


RECIPES = {
    "odc_resnet50_8xb64-steplr-440e_in1k": pretrain,
    "digits": tiny,
}


def get_config(name: str | None = None) -> ConfigDict:
    return pick(RECIPES, name)
