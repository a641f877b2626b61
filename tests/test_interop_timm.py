"""timm's layout: tiny models of all families against golden files, published ones by names and shapes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from jaxpretrain.interop import InteropError, export, load_weights, read_weights
from tests import interop_cases
from tests.interop_cases import GAP, Case, abstract, classifier, named, state

WIDE = dict(embed_dims=32, num_layers=2, num_heads=2, feedforward_channels=128)
GATED = dict(embed_dims=48, num_layers=2, num_heads=3, feedforward_channels=192)
HEAD = "VisionTransformerClsHead"
MEAN = dict(out_type="avg_featmap", final_norm=False)
EPS5, EPS6 = dict(type="LN", eps=1e-5), dict(type="LN", eps=1e-6)
CLIP = dict(pre_norm=True, norm_cfg=EPS5)


def vit(name: str, args: dict, ours: dict, kind: str = "VisionTransformer", head: str = HEAD, **kwargs: Any) -> Case:
    """A vision transformer of two layers."""
    theirs = kwargs.pop("theirs", "timm.models.vision_transformer.VisionTransformer")
    sizes = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=10)
    backbone = dict(type=kind, arch=WIDE, img_size=32, patch_size=8) | ours
    bare = args.get("num_classes") == 0
    return Case(theirs, name, sizes | args, backbone if bare else classifier(backbone, 32, head), **kwargs)


BEIT = dict(theirs="timm.models.beit.Beit", kind="BEiTViT", head="LinearClsHead")
EVA = dict(theirs="timm.models.eva.Eva", head="LinearClsHead")
SWIN = dict(embed_dim=16, depths=(2, 2, 2), num_heads=(1, 2, 4), window_size=4, img_size=64, num_classes=10)
SWIN_ARCH = dict(embed_dims=16, depths=[2, 2, 2], num_heads=[1, 2, 4], extra_norm_every_n_blocks=0)
ROTARY = dict(swiglu_mlp=True, use_rot_pos_emb=True, ref_feat_shape=(16, 16), mlp_ratio=4.0)


def swin(name: str, version: str, **kwargs: Any) -> Case:
    theirs = dict(V1="swin_transformer.SwinTransformer", V2="swin_transformer_v2.SwinTransformerV2")[version]
    kind = dict(V1="SwinTransformer", V2="SwinTransformerV2")[version]
    args = kwargs.pop("args", {})
    backbone = dict(type=kind, arch=SWIN_ARCH, img_size=64, window_size=4, out_indices=(2,), **kwargs)
    return Case(f"timm.models.{theirs}", name, SWIN | args, classifier(backbone, 64, neck=GAP), size=64)


def resnet(name: str, args: dict, kind: str, ours: dict, channels: int = 64) -> Case:
    backbone = dict(type=kind, base_channels=8) | ours
    args = dict(num_classes=10, channels=(8, 16, 32, 64)) | args
    return Case("timm.models.resnet.ResNet", name, args, classifier(backbone, channels, neck=GAP), size=64)


BASIC = dict(block="timm.models.resnet.BasicBlock", layers=(2, 2, 2, 2))
NECKS = dict(block="timm.models.resnet.Bottleneck", layers=(3, 4, 6, 3))
SE = dict(block_args=dict(attn_layer="se"))
CASES = [
    vit("vit", {}, {}),
    vit("vit_no_bias", dict(qkv_bias=False), dict(qkv_bias=False)),
    vit("vit_gap", dict(global_pool="avg"), MEAN, head="LinearClsHead"),
    vit(
        "vit_gap_registers",
        dict(global_pool="avg", class_token=False, no_embed_class=True, reg_tokens=4, init_values=1e-5),
        dict(with_cls_token=False, num_registers=4, layer_scale_init_value=1e-5, **MEAN),
        head="LinearClsHead",
    ),
    vit("vit_clip", dict(pre_norm=True, norm_layer="torch.nn.LayerNorm"), CLIP),
    vit(
        "vit_clip_quickgelu",
        dict(pre_norm=True, norm_layer="torch.nn.LayerNorm", act_layer="quick_gelu"),
        dict(layer_cfgs=dict(act_cfg=dict(type="QuickGELU")), **CLIP),
    ),
    vit("dinov2", dict(init_values=1e-5, num_classes=0), dict(layer_scale_init_value=1e-5)),
    vit(
        "dinov2_registers",
        dict(init_values=1e-5, num_classes=0, reg_tokens=4, no_embed_class=True),
        dict(layer_scale_init_value=1e-5, num_registers=4),
    ),
    vit(
        "dinov2_giant",
        dict(
            embed_dim=48,
            num_heads=3,
            init_values=1e-5,
            num_classes=0,
            mlp_ratio=2.66667 * 2,
            mlp_layer="timm.layers.SwiGLUPacked",
            act_layer="torch.nn.SiLU",
        ),
        dict(arch=GATED, layer_scale_init_value=1e-5, layer_cfgs=dict(ffn_type="swiglu_fused")),
    ),
    vit(
        "deit_distilled",
        {},
        {},
        "DistilledVisionTransformer",
        "DeiTClsHead",
        theirs="timm.models.deit.VisionTransformerDistilled",
    ),
    vit("deit3", dict(no_embed_class=True, init_values=1e-6), dict(ffn_norm="ln2"), "DeiT3"),
    vit("beit", dict(use_abs_pos_emb=False, use_rel_pos_bias=True, init_values=0.1), {}, **BEIT),
    vit(
        "beit_shared",
        dict(use_shared_rel_pos_bias=True, init_values=0.1),
        dict(use_abs_pos_emb=True, use_rel_pos_bias=False, use_shared_rel_pos_bias=True),
        **BEIT,
    ),
    vit(
        "eva_large",
        dict(global_pool="avg"),
        dict(use_abs_pos_emb=True, use_rel_pos_bias=False, layer_scale_init_value=0.0, layer_cfgs=dict(bias=True)),
        "BEiTViT",
        "LinearClsHead",
    ),
    vit(
        "eva_giant",
        {},
        dict(use_abs_pos_emb=True, use_rel_pos_bias=False, layer_scale_init_value=0.0),
        "BEiTViT",
        **EVA,
    ),
    vit("eva02", ROTARY, dict(rope="eva02", norm_cfg=EPS6, **MEAN), "ViTEVA02", **EVA),
    vit(
        "eva02_sub_ln",
        dict(qkv_fused=False, scale_mlp=True, **ROTARY),
        dict(rope="eva02", norm_cfg=EPS6, sub_ln=True, **MEAN),
        "ViTEVA02",
        **EVA,
    ),
    Case(
        "timm.models.vision_transformer_sam.VisionTransformerSAM",
        "sam",
        dict(
            img_size=64,
            patch_size=8,
            embed_dim=32,
            depth=2,
            num_heads=2,
            num_classes=0,
            neck_chans=8,
            window_size=3,
            global_attn_indexes=(1,),
            use_rel_pos=True,
        ),
        dict(
            type="ViTSAM",
            arch=dict(global_attn_indexes=[1], **WIDE),
            img_size=64,
            patch_size=8,
            out_channels=8,
            window_size=3,
            norm_cfg=EPS5,
        ),
        size=64,
        method="forward_features",
    ),
    swin("swin", "V1"),
    swin("swinv2", "V2", pretrained_window_sizes=(0, 0, 0)),
    swin("swinv2_pretrained", "V2", args=dict(pretrained_window_sizes=(6, 6, 6)), pretrained_window_sizes=(6, 6, 6)),
    resnet("resnet18", BASIC, "ResNet", dict(depth=18)),
    resnet("resnet50", NECKS, "ResNet", dict(depth=50), 256),
    resnet("resnet18c", dict(stem_type="deep", stem_width=32, **BASIC), "ResNetV1c", dict(depth=18)),
    resnet("resnet18d", dict(stem_type="deep", stem_width=32, avg_down=True, **BASIC), "ResNetV1d", dict(depth=18)),
    resnet(
        "resnet50d", dict(stem_type="deep", stem_width=32, avg_down=True, **NECKS), "ResNetV1d", dict(depth=50), 256
    ),
    resnet("seresnet50", NECKS | SE, "SEResNet", dict(depth=50), 256),
    resnet(
        "seresnext50",
        dict(cardinality=4, base_width=32, **NECKS, **SE),
        "SEResNeXt",
        dict(depth=50, groups=4, width_per_group=4),
        256,
    ),
]


# Published models, as MMPretrain's settings have them.


def big_vit(arch: str, channels: int, size: int = 224, patch: int = 16, **args: Any) -> dict[str, Any]:
    return named("VisionTransformer", channels, HEAD, arch=arch, img_size=size, patch_size=patch, **args)


def dinov2(arch: str, **args: Any) -> dict[str, Any]:
    return big_vit(arch, 0, 518, 14, layer_scale_init_value=1e-5, **args)


def deit3(arch: str, channels: int, size: int = 224, patch: int = 16) -> dict[str, Any]:
    return named("DeiT3", channels, HEAD, arch=arch, img_size=size, patch_size=patch)


def big_beit(arch: str, size: int, channels: int) -> dict[str, Any]:
    return named("BEiTViT", channels, arch=arch, img_size=size, patch_size=16)


def eva(arch: str, size: int, channels: int, **args: Any) -> dict[str, Any]:
    plain = dict(layer_scale_init_value=0.0, use_abs_pos_emb=True, use_rel_pos_bias=False)
    return named("BEiTViT", channels, arch=arch, img_size=size, patch_size=14, **plain, **args)


def eva02(arch: str, size: int, channels: int, **args: Any) -> dict[str, Any]:
    return named("ViTEVA02", channels, arch=arch, img_size=size, patch_size=14, **MEAN, **args)


def big_sam(arch: str) -> dict[str, Any]:
    return named("ViTSAM", 0, arch=arch, img_size=1024, patch_size=16)


def big_swin(
    arch: str, size: int, window: Any, channels: int, kind: str = "SwinTransformer", **args: Any
) -> dict[str, Any]:
    return named(kind, channels, arch=arch, img_size=size, window_size=window, **args)


NAMED = {
    "vit_small_patch16_224": big_vit("deit-small", 384),
    "vit_base_patch16_224": big_vit("base", 768),
    "vit_base_patch32_384": big_vit("base", 768, 384, 32),
    "vit_large_patch16_384": big_vit("large", 1024, 384),
    "vit_base_patch16_clip_224": big_vit("base", 768, pre_norm=True),
    "vit_large_patch14_clip_336": big_vit("large", 1024, 336, 14, pre_norm=True),
    "vit_base_patch14_dinov2": dinov2("base"),
    "vit_small_patch14_reg4_dinov2": dinov2("dinov2-small", num_registers=4),
    "vit_giant_patch14_dinov2": dinov2("dinov2-giant", layer_cfgs=dict(ffn_type="swiglu_fused")),
    "deit_tiny_patch16_224": big_vit("deit-tiny", 192),
    "deit_base_distilled_patch16_384": named(
        "DistilledVisionTransformer", 768, "DeiTClsHead", arch="deit-base", img_size=384, patch_size=16
    ),
    "deit3_small_patch16_224": deit3("small", 384),
    "deit3_medium_patch16_224": deit3("medium", 512),
    "deit3_large_patch16_384": deit3("large", 1024, 384),
    "deit3_huge_patch14_224": deit3("huge", 1280, 224, 14),
    "beit_base_patch16_224": big_beit("base", 224, 768),
    "beit_large_patch16_512": big_beit("large", 512, 1024),
    "beitv2_base_patch16_224": big_beit("base", 224, 768),
    "eva_large_patch14_336": eva("l", 336, 1024, layer_cfgs=dict(bias=True)),
    "eva_giant_patch14_560": eva("eva-g", 560, 1408),
    "eva02_tiny_patch14_336": eva02("t", 336, 192),
    "eva02_small_patch14_336": eva02("s", 336, 384),
    "eva02_base_patch14_448": eva02("b", 448, 768, sub_ln=True),
    "eva02_large_patch14_448": eva02("l", 448, 1024, sub_ln=True),
    "samvit_base_patch16": big_sam("base"),
    "samvit_huge_patch16": big_sam("huge"),
    "swin_tiny_patch4_window7_224": big_swin("tiny", 224, 7, 768),
    "swin_base_patch4_window12_384": big_swin("base", 384, 12, 1024),
    "swinv2_tiny_window16_256": big_swin("tiny", 256, [16, 16, 16, 8], 768, "SwinTransformerV2"),
    "swinv2_base_window12to24_192to384": big_swin(
        "base", 384, [24, 24, 24, 12], 1024, "SwinTransformerV2", pretrained_window_sizes=[12, 12, 12, 6]
    ),
    "resnet34": named("ResNet", 512, depth=34),
    "resnet50": named("ResNet", 2048, depth=50),
    "resnet152": named("ResNet", 2048, depth=152),
    "resnet50c": named("ResNetV1c", 2048, depth=50),
    "resnet101s": named("ResNetV1c", 2048, depth=101, stem_channels=128),
    "resnet50d": named("ResNetV1d", 2048, depth=50),
    "wide_resnet50_2": named("ResNet", 2048, depth=50, base_channels=128, expansion=2),
    "resnext101_32x8d": named("ResNeXt", 2048, depth=101, groups=32, width_per_group=8),
    "seresnet50": named("SEResNet", 2048, depth=50),
    "seresnext50_32x4d": named("SEResNeXt", 2048, depth=50),
}


@pytest.mark.parametrize("case", CASES, ids=repr)
class TestTiny(interop_cases.Tiny):
    pass


@pytest.mark.parametrize("name", NAMED)
def test_named(name: str) -> None:
    interop_cases.check_named("timm", name, NAMED[name])


# Details.


def case_of(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


def test_position_of_class_token_that_was_trained_here() -> None:
    """With registers, it becomes part of timm's class token, and the network stays the same."""
    case = case_of("dinov2_registers")
    model, again = abstract(case.ours), abstract(case.ours)
    load_weights(model, state(case))
    np.testing.assert_array_equal(model.pos_embed[:, 0], 0)
    model.pos_embed[...] = model.pos_embed[...].at[:, 0].set(0.5)
    exported = export(model, "timm")
    np.testing.assert_array_equal(exported["cls_token"], state(case)["cls_token"] + np.float32(0.5))
    load_weights(again, exported)
    patches = np.zeros((1, 16, 32), np.float32)
    np.testing.assert_array_equal(again.add_cls_token(patches), model.add_cls_token(patches))


@pytest.mark.parametrize("name", ["eva02", "eva02_sub_ln"])
def test_key_bias_that_was_trained_here(name: str) -> None:
    """timm has no place for it, and with rotary positions it does matter."""
    case = case_of(name)
    model = abstract(case.ours)
    load_weights(model, state(case))
    export(model, "timm")
    bias = model.backbone.layers[1].attn.qkv.bias
    bias[...] = bias[...].at[40].set(0.1)
    with pytest.raises(InteropError, match="no bias for keys"):
        export(model, "timm")


@pytest.mark.parametrize(
    ("name", "buffer"),
    [
        ("beit", "blocks.0.attn.relative_position_index"),
        ("swin", "layers.0.blocks.1.attn_mask"),
        ("swinv2", "layers.0.blocks.0.attn.relative_coords_table"),
        ("eva02", "rope.bands"),
    ],
)
def test_tables_of_early_releases(name: str, buffer: str) -> None:
    """They held tables that follow from the settings: left out, and said so."""
    model = abstract(case_of(name).ours)
    report = read_weights(model, state(case_of(name)) | {buffer: np.zeros((4, 4), np.float32)})
    assert report.layout == "timm" and report.ignored == [buffer]


def test_distributed_training() -> None:
    case = case_of("vit")
    report = read_weights(abstract(case.ours), {f"module.{key}": value for key, value in state(case).items()})
    assert report.layout == "timm" and not report.ignored


def test_names_in_errors_are_the_files() -> None:
    """What the table knows but the model has not is reported by the name in the file."""
    plain, clip = case_of("vit"), case_of("vit_clip")
    with pytest.raises(InteropError, match=r"no place for +norm_pre\.weight \(32,\)"):
        read_weights(abstract(plain.ours), state(clip), layout="timm")
    with pytest.raises(InteropError, match=r"nothing for +backbone\.pre_norm\.weight \(32,\)"):
        read_weights(abstract(clip.ours), state(plain), layout="timm")


def test_encoder_of_a_method() -> None:
    """A classifier of timm's starts MAE: its head and the decoder stay out."""
    backbone = dict(type="MAEViT", arch=WIDE, img_size=32, patch_size=8)
    neck = dict(type="MAEPretrainDecoder", patch_size=8, num_patches=16, embed_dim=32, decoder_embed_dim=16)
    loss = dict(type="PixelReconstructionLoss", criterion="L2")
    head = dict(type="MAEPretrainHead", patch_size=8, loss=loss)
    method = abstract(dict(type="MAE", backbone=backbone, neck=neck, head=head))
    report = read_weights(method, state(case_of("vit")), part="backbone")
    assert report.layout == "timm" and {path[0] for path in report.arrays} == {"backbone"}


def test_what_timm_has_not() -> None:
    model = abstract(dict(type="ResNet_CIFAR", depth=18))
    with pytest.raises(InteropError, match="'timm' has no ResNet_CIFAR; layouts that have: mmpretrain"):
        export(model, "timm")
