"""EfficientNet and its like: fused forms, architectures, mistakes."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from flax import nnx

from jaxpretrain.build import ConfigError, abstract, build
from jaxpretrain.interop import mmpretrain
from jaxpretrain.models.layers.offset_attention import offset_bias, offset_index
from tests.backbone_cases.efficient import CASES
from tests.test_backbones import call, images, made
from tests.test_resnet import random


def shapes(model, size):
    """What the model's outputs would be of images of this size."""
    model.eval()
    return [out.shape for out in nnx.eval_shape(lambda model, x: model(x), model, images(size))]


@pytest.mark.parametrize(("shape", "stride"), [((3, 3), 1), ((2, 4), 1), ((5, 5), 2)])
def test_offset_bias_is_the_lookup(shape, stride):
    table = np.random.default_rng(0).standard_normal((2, shape[0] * shape[1])).astype(np.float32)
    index = offset_index(shape, stride)
    np.testing.assert_array_equal(offset_bias(jax.numpy.asarray(table), shape, stride), table[:, index])
    assert index[0].tolist() == list(range(shape[0] * shape[1])), "offsets from the first token, in row-major order"


@pytest.mark.parametrize("name", ["LeViT", "RIFormer"])
def test_deployed_backbone_gives_the_same(name):
    """In place, and with the names of one that is built so; a second time changes nothing."""
    case = CASES[name]
    model, x = made(case.config, training=False), images(case.size)
    before = call(model, x)
    fused = abstract(case.config | dict(deploy=True))
    for _ in range(2):
        model.switch_to_deploy()
        assert model.deploy
        assert mmpretrain.shapes(model) == mmpretrain.shapes(fused)
        for ours, wanted in zip(call(model, x), before, strict=True):
            assert np.abs(ours - wanted).max() <= 1e-5 * np.abs(wanted).max()
    assert not [key for key in mmpretrain.shapes(fused) if key.endswith((".bn.weight", "token_mixer.affine.weight"))]


@pytest.mark.parametrize("distillation", [True, False])
def test_deployed_head_gives_the_same(distillation):
    cfg = dict(type="LeViTClsHead", num_classes=5, in_channels=8, distillation=distillation)
    head, x = random(cfg), images(4)[..., :1].reshape(4, -1)[:, :8]
    head.eval()
    before = head((x,))
    head.switch_to_deploy()
    np.testing.assert_allclose(head((x,)), before, rtol=1e-5, atol=1e-6)
    assert set(mmpretrain.shapes(head)) == set(mmpretrain.shapes(abstract(cfg | dict(deploy=True))))
    assert ("head_dist.weight" in mmpretrain.shapes(head)) == distillation


def test_head_with_a_teacher_does_not_learn():
    head = random(dict(type="LeViTClsHead", num_classes=5, in_channels=8))
    with pytest.raises(ConfigError, match="distillation=False"):
        head.loss((images(4)[:, 0, :, 0],), np.zeros(4, np.int32))
    with pytest.raises(ConfigError, match="needs in_channels"):
        build(dict(type="LeViTClsHead", num_classes=5))


def test_deployed_block_of_frozen_weights_stays_frozen():
    model = made(CASES["RIFormer"].config | dict(frozen_stages=2), training=False)
    frozen = len(nnx.state(model, nnx.Param).flat_state())
    model.switch_to_deploy()
    assert len(nnx.state(model, nnx.Param).flat_state()) == frozen, "all blocks are frozen, and so is what they became"


@pytest.mark.parametrize("name", ["PoolFormer", "RIFormer"])
def test_scanned_blocks_give_the_same(name):
    case = CASES[name]
    model, x = made(case.config, training=False), images(case.size)
    plain = call(model, x)
    model.scan_layers, model.remat = True, "full"
    for ours, wanted in zip(call(model, x), plain, strict=True):
        assert np.abs(ours - wanted).max() <= 1e-5 * np.abs(wanted).max()


def test_poolformer_freezes_its_stem_by_default():
    """MMPretrain's default of 0 does so."""
    model = abstract(dict(type="PoolFormer"))
    assert not isinstance(model.patch_embed.proj.kernel, nnx.Param)
    assert isinstance(model.network[0][0].mlp.fc1.kernel, nnx.Param)


@pytest.mark.parametrize(
    ("arch", "blocks"),
    [("b0", [1, 2, 2, 6, 5]), ("b4", [2, 4, 4, 12, 10]), ("em", [2, 3, 5, 11, 3])],
)
def test_depth_of_efficientnets(arch, blocks):
    model = abstract(dict(type="EfficientNet", arch=arch))
    assert [len(layer) for layer in model.layers if isinstance(layer, nnx.List)] == blocks
    assert sum(model.group_sizes) == sum(blocks)


def test_edge_networks_start_over_in_their_first_stage():
    """Further blocks there widen by 4 rather than 3, and have no shortcut; there is no squeeze and excitation."""
    model = abstract(dict(type="EfficientNet", arch="em"))
    first, second = model.layers[1]
    assert first.conv1.conv.kernel.shape == (3, 3, 32, 96) and second.conv1.conv.kernel.shape == (3, 3, 24, 96)
    assert not second.has_shortcut and model.layers[2][1].has_shortcut
    assert not [key for key in mmpretrain.shapes(model) if ".se." in key]


def test_reshaped_last_feature():
    case = CASES["EfficientFormer"]
    model = abstract(case.config | dict(reshape_last_feat=True))
    assert shapes(model, case.size) == [(4, 7, 7, 16)]
    assert shapes(abstract(case.config), case.size) == [(4, 49, 16)]


def test_maps_of_tinyvit():
    case = CASES["TinyViT"]
    assert shapes(abstract(case.config | dict(gap_before_final_norm=False)), 36) == [(4, 3, 3, 16)]
    assert shapes(abstract(case.config), 36) == [(4, 16)]


@pytest.mark.parametrize("name", sorted(CASES))
def test_unknown_architectures(name):
    kind = dict(type=name)
    with pytest.raises(ConfigError, match=f"{name} has no arch 'x99'"):
        build(kind | dict(arch="x99"))
    with pytest.raises(ConfigError, match="arch"):
        build(kind | dict(arch=dict(depth=3)))
    with pytest.raises(ConfigError, match="out_indices"):
        build(CASES[name].config | dict(out_indices=(9,)))


@pytest.mark.parametrize("name", sorted(name for name, case in CASES.items() if case.frozen_stages is not None))
def test_too_many_frozen_stages(name):
    with pytest.raises(ConfigError, match="frozen_stages is"):
        build(CASES[name].config | dict(frozen_stages=9))


@pytest.mark.parametrize("name", ["LeViT", "EfficientFormer"])
def test_images_of_another_size(name):
    """Biases are for one size of maps."""
    case = CASES[name]
    with pytest.raises(ConfigError, match="images"):
        shapes(abstract(case.config), 2 * case.size)
