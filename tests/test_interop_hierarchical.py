"""The layouts of HiViT's, iTPN's, MixMIM's and Vision GNN's releases: names as their code has them, both ways."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from flax import nnx

from jaxpretrain.build import abstract
from jaxpretrain.interop import InteropError, export, load_weights
from jaxpretrain.interop import mmpretrain as hub
from tests.method_cases.hierarchical import CONFIGS
from tests.test_resnet import random

HIVIT = dict(type="HiViT", arch=dict(embed_dims=16, depths=[1, 1, 2], num_heads=2), img_size=32, rpe=True)
MIXMIM = dict(
    type="MixMIMTransformer",
    arch=dict(embed_dims=8, depths=[1, 2], num_heads=[2, 2]),
    window_size=[4, 4],
    img_size=32,
)
VIG = dict(type="Vig", arch=dict(num_blocks=2, channels=8), k=2)
PYRAMID = dict(type="PyramidVig", arch=dict(blocks=[1, 2], channels=[8, 12]), k=2)


def classifier(backbone: dict[str, Any], width: int, **head: Any) -> dict[str, Any]:
    return dict(type="ImageClassifier", backbone=backbone, head=dict(num_classes=5, in_channels=width) | head)


LINEAR = dict(type="LinearClsHead")
VIG_HEAD = dict(type="VigClsHead", hidden_dim=6)
# layout, ours -> some of the names in the release's code with their shapes, and how many names there are.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, tuple[int, ...]]]] = {
    "hivit": (
        "hivit",
        HIVIT,
        {
            "patch_embed.proj.weight": (4, 3, 4, 4),
            "absolute_pos_embed": (1, 4, 16),
            "blocks.0.norm2.weight": (4,),
            "blocks.1.mlp.fc1.weight": (12, 4),
            "blocks.2.norm.weight": (16,),
            "blocks.2.reduction.weight": (8, 16),
            "blocks.6.attn.relative_position_bias_table": (9, 2),
            "blocks.7.attn.qkv.weight": (48, 16),
        },
    ),
    "itpn": (
        "itpn",
        CONFIGS["itpn"],
        {
            "align_dim_16tofpn.weight": (8, 16),
            "align_dim_8to4.weight": (8, 4),
            "split_16to8.reduction.weight": (32, 16),
            "fpn_modules.2.mlp.fc1.weight": (32, 8),
            "block_8to4.0.norm2.bias": (8,),
            "decoder_embed.1.0.weight": (8,),
            "decoder_embed.1.1.weight": (4, 8),
            "decoder_blocks.0.attn.qkv.weight": (48, 16),
            "decoder_blocks.0.mlp.fc2.bias": (16,),
            "decoder_norm.weight": (16,),
            "mask_token": (1, 1, 16),
        },
    ),
    "mixmim_ft": (
        "mixmim",
        classifier(MIXMIM, 16, **LINEAR),
        {
            "patch_embed.proj.weight": (8, 3, 4, 4),
            "patch_embed.norm.bias": (8,),
            "layers.1.blocks.1.norm1.weight": (16,),
            "layers.0.blocks.0.attn.relative_position_index": (16, 16),
            "layers.0.downsample.reduction.weight": (16, 32),
            "layers.0.downsample.norm.weight": (32,),
            "norm.weight": (16,),
            "head.weight": (5, 16),
        },
    ),
    "mixmim": (
        "mixmim",
        CONFIGS["mixmim"],
        {
            "decoder_embed.weight": (16, 16),
            "decoder_pos_embed": (1, 16, 16),
            "decoder_blocks.0.norm2.weight": (16,),
            "decoder_pred.weight": (48, 16),
        },
    ),
    "vig": (
        "vig",
        classifier(VIG, 8, **VIG_HEAD),
        {
            "pos_embed": (1, 8, 14, 14),
            "stem.convs.0.weight": (1, 3, 3, 3),
            "stem.convs.13.running_mean": (8,),
            "backbone.1.0.graph_conv.gconv.nn.0.weight": (16, 4, 1, 1),
            "backbone.1.1.fc2.1.num_batches_tracked": (),
            "prediction.0.weight": (6, 8, 1, 1),
            "prediction.1.running_var": (6,),
            "prediction.4.weight": (5, 6, 1, 1),
        },
    ),
    "pvig": (
        "vig",
        classifier(PYRAMID, 12, **VIG_HEAD),
        {
            "backbone.0.0.relative_pos": (1, 3136, 196),
            "backbone.1.conv.0.weight": (12, 8, 3, 3),
            "backbone.1.conv.1.running_mean": (12,),
            "backbone.3.0.fc1.0.weight": (12, 12, 1, 1),
        },
    ),
}


def equal(one: nnx.Module, other: nnx.Module) -> None:
    ours, theirs = hub.to_state_dict(one), hub.to_state_dict(other)
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[name], err_msg=name)


@pytest.mark.parametrize("name", CASES)
def test_names_and_round_trip(name):
    layout, config, known = CASES[name]
    model = random(config)
    state = export(model, layout)
    assert {key: state[key].shape for key in known} == known
    assert len(state) == len(hub.to_state_dict(model))
    loaded = abstract(config)
    report = load_weights(loaded, state)
    assert report.layout == layout and not report.ignored
    equal(loaded, model)


@pytest.mark.parametrize(("name", "part"), [("itpn", "hivit"), ("mixmim", "mixmim_ft")])
def test_encoders_of_pretrained_files(name, part):
    layout, config, _ = CASES[name]
    source = random(config)
    state = export(source, layout)
    backbone = dict(config["backbone"])
    backbone["type"] = {"hivit": "HiViT", "mixmim_ft": "MixMIMTransformer"}[part]
    target = abstract(backbone)
    report = load_weights(target, state)
    assert report.layout == CASES[part][0] and report.ignored
    equal(target, source.backbone)


def test_patches_are_merged_in_another_order():
    """The release joins columns before rows before channels; MMPretrain channels before both."""
    model = random(CASES["mixmim_ft"][1])
    theirs = export(model, "mixmim")["layers.0.downsample.reduction.weight"]
    ours = hub.to_state_dict(model)["backbone.layers.0.downsample.reduction.weight"]
    np.testing.assert_array_equal(theirs.reshape(16, 2, 2, 8), ours.reshape(16, 8, 2, 2).transpose(0, 3, 2, 1))


def test_a_classifier_of_hivit_is_no_classifier_here():
    """It has a norm before its last layer, which MMPretrain's has not."""
    model = random(classifier(HIVIT, 16, **LINEAR) | dict(neck=dict(type="GlobalAveragePooling")))
    state = export(model.backbone, "hivit") | {"fc_norm.weight": np.ones(16), "head.weight": np.ones((5, 16))}
    with pytest.raises(InteropError, match="The file has no such head"):
        load_weights(abstract(classifier(HIVIT, 16, **LINEAR)), state, layout="hivit")
