"""Methods that learn from a teacher's distributions, and VICReg."""

from __future__ import annotations

from typing import Any

from tests.method_cases.base import ONE_LAYER, RESNET, SIZE, VIT, Case
from tests.method_cases.contrastive import projector

CROPS = (SIZE, SIZE, SIZE // 2, SIZE // 2)
NECK = dict(in_channels=16, out_channels=24, hidden_channels=16, bottleneck_channels=8)
COLLAPSE = {"feature_std", "assignment_entropy", "teacher_entropy"}
# A quick teacher of a constant temperature: 200 steps are not many.
HEAD = dict(out_channels=24, warmup_teacher_temp=0.05, teacher_temp=0.05, warmup_teacher_temp_epochs=0)


def dino(backbone: dict[str, Any], **neck: Any) -> dict[str, Any]:
    return dict(
        type="DINO",
        backbone=backbone,
        neck=dict(NECK, type="DINONeck", **neck),
        head=dict(type="DINOHead", **HEAD),
        base_momentum=0.1,
    )


def ibot(**neck: Any) -> dict[str, Any]:
    head = dict(type="IBOTHead", teacher_patch_temp=0.05, warmup_teacher_patch_temp=0.05, **HEAD)
    if not neck.get("shared_head", True):
        head["patch_out_channels"] = neck["patch_out_channels"]
    return dict(
        type="IBOT",
        backbone=dict(type="IBOTViT", **ONE_LAYER),
        neck=dict(NECK, type="IBOTNeck", **neck),
        head=head,
        base_momentum=0.1,
        pred_ratio=(0.3, 0.3),
        pred_ratio_var=(0.0, 0.2),
    )


def dinov2(centering: str, vit: dict[str, Any], **more: Any) -> dict[str, Any]:
    head = {name: value for name, value in NECK.items() if name != "in_channels"}
    return dict(
        type="DINOv2",
        backbone=dict(
            type="IBOTViT",
            num_registers=2,
            layer_scale_init_value=1e-1,
            layer_cfgs=dict(ffn_type="swiglu_fused"),
            **vit,
        ),
        neck=dict(type="DINOv2Neck", dino_head=head, ibot_head=dict(head, out_channels=20)),
        head=dict(type="DINOv2Head", centering=centering, patch_out_channels=20, **HEAD),
        base_momentum=0.1,
        **more,
    )


VICREG = dict(
    type="VICReg",
    backbone=RESNET,
    neck=projector(16, True, with_bias=True, with_last_bn=False),
    head=dict(type="VICRegHead", loss=dict(type="VICRegLoss")),
)

CASES = dict(
    dino_vit=Case(dino(dict(type="VisionTransformer", drop_path_rate=0.1, **VIT)), CROPS, logged=COLLAPSE),
    dino_resnet=Case(dino(RESNET, norm_last_layer=False, use_bn=True), CROPS, logged=COLLAPSE),
    ibot=Case(ibot(), CROPS, logged=COLLAPSE | {"loss_cls", "loss_patch"}),
    ibot_two_heads=Case(
        ibot(shared_head=False, patch_out_channels=20), CROPS, logged=COLLAPSE | {"loss_cls", "loss_patch"}
    ),
    dinov2=Case(
        dinov2("sinkhorn_knopp", VIT, groups=2),
        CROPS,
        logged=COLLAPSE | {"loss_dino", "loss_ibot", "loss_koleo"},
    ),
    dinov2_centering=Case(
        dinov2("centering", ONE_LAYER), CROPS, logged=COLLAPSE | {"loss_dino", "loss_ibot", "loss_koleo"}
    ),
    vicreg=Case(VICREG, logged={"feature_std", "loss_invariance", "loss_variance", "loss_covariance"}),
)
