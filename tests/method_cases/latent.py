"""Methods that predict features: MILAN, EVA, I-JEPA and data2vec 2.0."""

from __future__ import annotations

from typing import Any

from tests.method_cases.base import ONE_LAYER, SIZE, VIT, Case

STAND_IN = dict(
    type="CLIPGenerator",
    arch=dict(embed_dims=16, num_layers=1, num_heads=2, feedforward_channels=64),
    img_size=SIZE,
    patch_size=4,
    out_dims=12,
    stand_in=True,
)
COSINE = dict(type="MIMHead", loss=dict(type="CosineSimilarityLoss", shift_factor=2.0, scale_factor=2.0))
DECODER = dict(patch_size=4, decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2, predict_feature_dim=12)


def clip_targets(kind: str, backbone: str, neck: str) -> dict[str, Any]:
    return dict(
        type=kind,
        backbone=dict(type=backbone, mask_ratio=0.5, **ONE_LAYER),
        neck=dict(type=neck, **DECODER),
        head=COSINE,
        target_generator=STAND_IN,
    )


IJEPA = dict(
    type="IJEPA",
    backbone=dict(type="IJEPAViT", **VIT),
    neck=dict(type="IJEPAPredictor", predictor_embed_dim=16, depth=1, num_heads=2),
    masks=dict(min_keep=4),
)
DATA2VEC = dict(
    type="Data2Vec2",
    backbone=dict(type="Data2VecViT", num_masks=2, mask_ratio=0.5, block_size=2, **VIT),
    neck=dict(type="Data2VecDecoder", decoder_dim=16, decoder_layers=2, decoder_groups=4),
    head=dict(type="Data2VecHead", top_k=2),
    cls_loss=0.1,
)
CASES = dict(
    milan=Case(clip_targets("MILAN", "MILANViT", "MILANPretrainDecoder"), views=SIZE, bfloat16=0.05),
    eva=Case(clip_targets("EVA", "MAEViT", "MAEPretrainDecoder"), views=SIZE, bfloat16=0.05),
    ijepa=Case(IJEPA, views=SIZE, bfloat16=0.05),
    data2vec=Case(DATA2VEC, views=SIZE, logged={"loss_regression", "loss_cls", "feature_std"}, bfloat16=0.05),
)
