"""Supervised learning, MAE and the methods of two views."""

from __future__ import annotations

import math
from typing import Any

from tests.method_cases.base import CE, ONE_LAYER, RESNET, SIZE, Case


def projector(channels: int, pooled: bool, **more: Any) -> dict[str, Any]:
    sizes = dict(in_channels=channels, hid_channels=16, out_channels=8)
    return dict(type="NonLinearNeck", **sizes, with_avg_pool=pooled, **more)


def moco(backbone: dict, channels: int, pooled: bool) -> dict[str, Any]:
    head = dict(type="MoCoV3Head", predictor=projector(8, False), loss=CE | dict(loss_weight=0.4), temperature=0.2)
    return dict(type="MoCoV3", backbone=backbone, neck=projector(channels, pooled), head=head)


def siamese(kind: str) -> dict[str, Any]:
    predictor = projector(8, False, with_last_bn=False, with_last_bias=True)
    loss = dict(type="CosineSimilarityLoss", shift_factor=1.0)  # so that it can fall to 0
    head = dict(type="LatentPredictHead", predictor=predictor, loss=loss)
    return dict(type=kind, backbone=RESNET, neck=projector(16, True), head=head)


def classifier(**model: Any) -> dict[str, Any]:
    head = dict(type="LinearClsHead", num_classes=4, in_channels=16, loss=CE)
    return dict(
        type="Supervised",
        model=dict(type="ImageClassifier", backbone=RESNET, neck=dict(type="GlobalAveragePooling"), head=head, **model),
    )


CONFIGS: dict[str, dict[str, Any]] = dict(
    supervised=classifier(),
    mae=dict(
        type="MAE",
        backbone=dict(type="MAEViT", **ONE_LAYER),
        neck=dict(type="MAEPretrainDecoder", patch_size=4, decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2),
        head=dict(
            type="MAEPretrainHead",
            norm_pix=True,
            patch_size=4,
            loss=dict(type="PixelReconstructionLoss", criterion="L2"),
        ),
    ),
    simclr=dict(
        type="SimCLR",
        backbone=RESNET,
        neck=projector(16, True),
        head=dict(type="ContrastiveHead", loss=CE, temperature=0.1),
    ),
    simsiam=siamese("SimSiam"),
    byol=siamese("BYOL"),
    barlowtwins=dict(
        type="BarlowTwins",
        backbone=RESNET,
        neck=projector(16, True, with_last_bn=False),
        head=dict(type="LatentCrossCorrelationHead", in_channels=8, loss=dict(type="CrossCorrelationLoss")),
    ),
    mocov2=dict(
        type="MoCo",
        backbone=RESNET,
        neck=dict(type="MoCoV2Neck", in_channels=16, hid_channels=16, out_channels=8),
        head=dict(type="ContrastiveHead", loss=CE, temperature=0.2),
        queue_len=64,
        feat_dim=8,
        momentum=0.1,
    ),
    densecl=dict(
        type="DenseCL",
        backbone=RESNET,
        neck=dict(type="DenseCLNeck", in_channels=16, hid_channels=16, out_channels=8),
        head=dict(type="ContrastiveHead", loss=CE, temperature=0.2),
        queue_len=64,
        feat_dim=8,
        momentum=0.1,
    ),
    mocov3_vit=moco(dict(type="MoCoV3ViT", stop_grad_conv1=True, **ONE_LAYER), 16, False),
    mocov3_resnet=moco(RESNET, 16, True),
)


DENSECL = {"loss_single", "loss_dense", "feature_std"}
CASES = dict(
    supervised=Case(CONFIGS["supervised"], views=SIZE, logged={"accuracy_top-1"}, bfloat16=0.05),
    mae=Case(CONFIGS["mae"], views=SIZE, learning_rate=1e-2, bfloat16=0.05),
    simclr=Case(CONFIGS["simclr"]),
    simsiam=Case(CONFIGS["simsiam"]),
    byol=Case(CONFIGS["byol"]),
    barlowtwins=Case(CONFIGS["barlowtwins"]),
    # The queue holds the same images, so each is its own negative once.
    mocov2=Case(CONFIGS["mocov2"], floor=math.log(2)),
    densecl=Case(CONFIGS["densecl"], floor=math.log(2), logged=DENSECL),
    mocov3_vit=Case(CONFIGS["mocov3_vit"]),
    mocov3_resnet=Case(CONFIGS["mocov3_resnet"]),
)
