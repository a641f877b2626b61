"""RepVGG, MobileOne, RepLKNet and RepMLPNet by the names of timm and of the papers' releases, in both forms."""

from __future__ import annotations

import numpy as np
import pytest

from jaxpretrain.build import abstract
from jaxpretrain.interop import export, load_weights
from jaxpretrain.models.fuse import deployed_config
from tests.backbone_cases import CASES
from tests.test_interop import random_state

# (layout, case) -> some names of a file in that layout: of the form for training, of that for inference.
NAMES = {
    ("timm", "RepVGGWithAll"): (
        "stem.conv_kxk.conv.weight stem.conv_1x1.bn.running_mean stages.1.1.identity.weight stages.0.0.attn.fc1.bias "
        "head.fc.weight",
        "stem.reparam_conv.weight stages.1.0.reparam_conv.bias stages.1.1.attn.fc2.weight head.fc.bias",
    ),
    ("repvgg", "RepVGGWithAll"): (
        "stage0.rbr_dense.conv.weight stage0.rbr_1x1.bn.running_var stage2.1.rbr_identity.weight stage1.0.se.down.bias "
        "linear.weight",
        "stage0.rbr_reparam.weight stage2.1.rbr_reparam.bias stage1.0.se.up.weight linear.bias",
    ),
    ("timm", "MobileOne"): (
        "stem.conv_kxk.0.conv.weight stem.conv_scale.bn.weight stages.1.2.identity.running_mean "
        "stages.0.0.conv_kxk.1.bn.bias stages.1.3.attn.fc1.weight head.fc.weight",
        "stem.reparam_conv.weight stages.0.1.reparam_conv.bias stages.1.3.attn.fc2.bias head.fc.bias",
    ),
    ("mobileone", "MobileOne"): (
        "stage0.rbr_conv.0.conv.weight stage0.rbr_scale.bn.weight stage2.2.rbr_skip.running_mean "
        "stage1.0.rbr_conv.1.bn.bias stage2.3.se.reduce.weight linear.weight",
        "stage0.reparam_conv.weight stage1.1.reparam_conv.bias stage2.3.se.expand.bias linear.bias",
    ),
    ("replknet", "RepLKNet"): (
        "stem.0.conv.weight stages.0.blocks.0.large_kernel.lkb_origin.conv.weight "
        "stages.1.blocks.0.large_kernel.small_conv.bn.weight stages.0.blocks.1.preffn_bn.bias "
        "transitions.0.1.bn.running_var norm.weight head.weight",
        "stages.0.blocks.0.large_kernel.lkb_reparam.weight stages.1.blocks.0.prelkb_bn.bias norm.running_mean head.bias",
    ),
    ("repmlp", "RepMLPNet"): (
        "conv_embedding.conv.weight conv_embedding.bn.weight stages.0.0.prebn1.bias stages.1.1.repmlp_block.gp.fc2.weight "
        "stages.1.0.repmlp_block.fc3_bn.running_mean stages.1.0.repmlp_block.repconv3.conv.weight "
        "stages.0.0.ffn_block.ffn_fc1.bn.weight embeds.0.conv.weight head_norm.weight head.weight",
        "stages.0.0.repmlp_block.fc3.bias stages.1.0.prebn2.running_var embeds.0.bn.bias head.bias",
    ),
}


@pytest.mark.parametrize("deploy", [False, True], ids=["train", "deploy"])
@pytest.mark.parametrize(("layout", "case"), NAMES)
def test_there_and_back(layout, case, deploy):
    """All names are of the layout, and the weights come back bit for bit; the layout is recognised."""
    backbone = dict(CASES[case].config)
    if backbone.pop("add_ppf", False):  # which nobody else has
        backbone["dilations"] = (1, 1)
    head = dict(type="LinearClsHead", num_classes=5, in_channels=32 if case == "MobileOne" else 16)
    config = dict(type="ImageClassifier", backbone=backbone, neck=dict(type="GlobalAveragePooling"), head=head)
    config = deployed_config(config) if deploy else config
    model = abstract(config)
    state = random_state(model)
    load_weights(model, state)
    theirs = export(model, layout)
    assert len(theirs) == len(state) and set(NAMES[layout, case][deploy].split()) <= theirs.keys()
    again = abstract(config)
    assert load_weights(again, theirs).layout == layout
    back = export(again)
    assert back.keys() == state.keys()
    for name, array in state.items():
        np.testing.assert_array_equal(back[name], array)
