"""DeepCluster and ODC, whose classes are clusters."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from jaxpretrain.models.layers import BaseModule, BatchNorm, Linear
from tests.method_cases.base import CE, RESNET, SIZE, STAGE, Case

SAMPLES, CLUSTERS = 64, 4
SOBEL = dict(type="ResNetSobel", depth=18, **STAGE)


def head(channels: int) -> dict[str, Any]:
    return dict(type="LinearClsHead", num_classes=CLUSTERS, in_channels=channels, loss=CE)


DEEPCLUSTER = dict(
    type="DeepCluster",
    backbone=SOBEL,
    neck=dict(type="GlobalAveragePooling"),
    head=head(16),
    num_samples=SAMPLES,
    clustering=dict(type="Kmeans", pca_dim=8),
)
ODC = dict(
    type="ODC",
    backbone=RESNET,
    neck=dict(type="ODCNeck", in_channels=16, hid_channels=16, out_channels=8),
    head=head(8),
    memory_bank=dict(type="ODCMemory", length=SAMPLES, feat_dim=8, momentum=0.5, min_cluster=2),
    centroids_update_interval=2,
)
CASES = dict(
    deepcluster=Case(DEEPCLUSTER, views=SIZE, logged={"feature_std", "assignment_entropy"}),
    odc=Case(ODC, views=SIZE, logged={"feature_std", "assignment_entropy", "change_ratio"}),
)


class TinyBackbone(BaseModule):
    """One hidden layer on 8x8 pixels, as a map of one position: compiles in a second."""

    def __init__(self, width: int = 16, *, rngs: nnx.Rngs):
        self.hidden = Linear(8 * 8 * 3, width, rngs=rngs)
        self.norm = BatchNorm(width)

    def __call__(self, x: jax.Array, *, rngs: nnx.Rngs | None = None) -> tuple[jax.Array]:
        return (jax.nn.relu(self.norm(self.hidden(x.reshape(len(x), -1))))[:, None, None],)


TINY = dict(type="tests.method_cases.clustering.TinyBackbone")
