"""MoCo v1, SwAV, NPID and the pretext tasks."""

from __future__ import annotations

import math
from typing import Any

from tests.method_cases.base import CE, RESNET, SIZE, Case

FEATURES = 64  # rows of NPID's memory: as many as the images that a test learns by heart
PROTOTYPES = 8


def swav(num_prototypes: Any = PROTOTYPES, **more: Any) -> dict[str, Any]:
    """Two crops of 16 pixels, two of 8."""
    loss = dict(type="SwAVLoss", feat_dim=8, num_crops=(2, 2), num_prototypes=num_prototypes)
    neck = dict(type="SwAVNeck", in_channels=16, hid_channels=16, out_channels=8)
    return dict(type="SwAV", backbone=RESNET, neck=neck, head=dict(type="SwAVHead", loss=loss), **more)


def npid(**more: Any) -> dict[str, Any]:
    return dict(
        type="NPID",
        backbone=RESNET,
        neck=dict(type="LinearNeck", in_channels=16, out_channels=8, gap_dim=2, norm_cfg=None),
        head=dict(type="ContrastiveHead", loss=CE, temperature=0.07),
        memory_bank=dict(type="SimpleMemory", length=FEATURES, feat_dim=8, momentum=0.5),
        neg_num=32,
        **more,
    )


def pretext(kind: str, neck: dict[str, Any], channels: int, classes: int) -> dict[str, Any]:
    head = dict(type="LinearClsHead", num_classes=classes, in_channels=channels, loss=CE, cal_acc=True)
    return dict(type=kind, backbone=RESNET, neck=neck, head=head)


RELATIVE_LOC = pretext("RelativeLoc", dict(type="RelativeLocNeck", in_channels=16, out_channels=32), 32, 8)
ROTATION_PRED = pretext("RotationPred", dict(type="GlobalAveragePooling"), 16, 4)
MOCOV1 = dict(
    type="MoCo",
    backbone=RESNET,
    neck=dict(type="LinearNeck", in_channels=16, out_channels=8, gap_dim=2, norm_cfg=None),
    head=dict(type="ContrastiveHead", loss=CE, temperature=0.07),
    queue_len=64,
    feat_dim=8,
    momentum=0.1,
)

CLUSTERED = {"feature_std", "assignment_entropy"}
CLASSIFIED = {"feature_std", "accuracy_top-1"}
CROPS = (SIZE, SIZE, SIZE // 2, SIZE // 2)
CASES = dict(
    # The queue holds the same images, so each is its own negative once.
    mocov1=Case(MOCOV1, floor=math.log(2)),
    swav=Case(swav(), views=CROPS, logged=CLUSTERED),
    swav_queue=Case(swav(queue_length=64, epoch_queue_starts=0), views=CROPS, logged=CLUSTERED),
    swav_heads=Case(swav((PROTOTYPES, 6)), views=CROPS, logged=CLUSTERED),
    npid=Case(npid(ensure_neg=True), views=SIZE),
    relative_loc=Case(RELATIVE_LOC, views=(SIZE,) * 9, logged=CLASSIFIED, learning_rate=1e-2),
    rotation_pred=Case(ROTATION_PRED, views=(SIZE,) * 4, logged=CLASSIFIED, learning_rate=1e-2),
)
