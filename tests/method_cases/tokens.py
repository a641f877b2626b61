"""Methods that predict visual tokens of hidden patches: BEiT, BEiT v2 and CAE."""

from __future__ import annotations

from typing import Any

from tests.method_cases.base import CE, ONE_LAYER, SIZE, VIT, Case

GRID = SIZE // 4
STAND_IN = dict(type="RandomProjectionTokenizer", patch_size=4, num_embed=16, embed_dims=8)
LOGGED = {"accuracy", "assignment_entropy", "feature_std"}


def beit(target: dict[str, Any], tokens: int, *, neck: bool = False) -> dict[str, Any]:
    vit = VIT | dict(out_indices=(0, 1)) if neck else ONE_LAYER
    backbone = dict(type="BEiTPretrainViT", **vit, final_norm=not neck)
    head = dict(type="BEiTV2Head" if neck else "BEiTV1Head", embed_dims=16, num_embed=tokens, loss=CE)
    parts = dict(neck=dict(type="BEiTV2Neck", num_layers=1, early_layers=1)) if neck else {}
    return dict(type="BEiT", backbone=backbone, head=head, target_generator=target, **parts)


CONFIGS: dict[str, dict[str, Any]] = dict(
    beit=beit(dict(type="DALL-E", n_hid=8, vocab_size=16), 16),
    beitv2=beit(
        dict(type="VQKD", encoder_config=dict(VIT, out_type="featmap"), num_embed=16, embed_dims=8)
        | dict(quantize_kmeans_init=False),
        16,
        neck=True,
    ),
    beit_stand_in=beit(STAND_IN, 16),
    cae=dict(
        type="CAE",
        backbone=dict(type="CAEPretrainViT", **ONE_LAYER, layer_scale_init_value=0.1),
        neck=dict(
            type="CAENeck",
            num_classes=16,
            regressor_depth=1,
            decoder_depth=1,
            num_heads=2,
            layer_scale_init_value=0.1,
            mask_tokens_num=6,
        ),
        head=dict(type="CAEHead", loss=dict(type="CAELoss", lambd=2)),
        target_generator=STAND_IN,
    ),
)
MASK = (GRID, GRID, 6)
CASES = dict(
    # DALL-E makes one token of 8x8 pixels.
    beit=Case(CONFIGS["beit"], views=(SIZE, 8 * GRID), mask=MASK, logged=LOGGED),
    beitv2=Case(CONFIGS["beitv2"], mask=MASK, logged=LOGGED | {"loss_1", "loss_2"}),
    beit_stand_in=Case(CONFIGS["beit_stand_in"], mask=MASK, logged=LOGGED),
    cae=Case(CONFIGS["cae"], mask=MASK, logged=LOGGED | {"main", "align"}),
)
