"""What is particular to AlexNet, LeNet-5, VGG, DenseNet, Inception v3, ResNeSt, Res2Net and RegNet."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxpretrain.build import ConfigError, abstract, build
from jaxpretrain.interop import mmpretrain
from jaxpretrain.models.inception_v3 import InceptionAux
from jaxpretrain.models.layers.norm import BatchNorm
from jaxpretrain.models.regnet import RegNet, stages_of
from jaxpretrain.models.res2net import Bottle2neck
from jaxpretrain.models.resnest import SplitAttentionConv2d


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def shapes(model: nnx.Module, *input_shape: int) -> list[tuple[int, ...]]:
    """Of all outputs; nothing is computed."""
    x = jax.ShapeDtypeStruct(input_shape, jnp.float32)
    return [out.shape for out in jax.tree.leaves(nnx.eval_shape(lambda m, x: m(x, rngs=nnx.Rngs(0)), model, x))]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dict(type="VGG", depth=12), r"VGG has no depth 12; its depths are \[11, 13, 16, 19\]"),
        (dict(type="VGG", depth=11, num_stages=6), "num_stages is 1 to 5, not 6"),
        (dict(type="VGG", depth=11, num_stages=2), "dilations .* need num_stages=2 entries"),
        (dict(type="VGG", depth=11, out_indices=(5,)), r"out_indices \(5,\) must be in 0 ... 4"),
        (dict(type="DenseNet", arch="122"), "unknown arch '122'. Did you mean '121'"),
        (dict(type="DenseNet", arch=dict(growth_rate=4)), "missing: depths, init_channels"),
        (dict(type="DenseNet", out_indices=4), "out_indices has 4"),
        (dict(type="ResNeSt", depth=18), r"ResNeSt has no depth 18; its depths are \[50, 101, 152, 200, 269\]"),
        (dict(type="Res2Net", depth=50, scales=1), "scales=1, but below 2 it is a ResNet"),
        (dict(type="RegNet", arch="regnetx_1.6g"), "unknown arch 'regnetx_1.6g'. Did you mean 'regnetx_1.6gf'"),
        (dict(type="RegNet", arch="regnetx_400mf", deep_stem=True), "no deep stem"),
        (dict(type="RegNet", arch="regnetx_400mf", strides=(2, 2)), "need num_stages=4 entries"),
    ],
)
def test_mistakes(config, message):
    with pytest.raises(ConfigError, match=message):
        abstract(config)


@pytest.mark.parametrize(
    ("config", "right", "wrong"),
    [
        (dict(type="AlexNet", num_classes=10), (224, 3), (256, 3)),
        (dict(type="LeNet5", num_classes=10), (32, 1), (28, 1)),
        (dict(type="VGG", depth=11, num_classes=10, out_indices=(0, 4)), (224, 3), (256, 3)),
    ],
)
def test_classifiers_are_for_one_size(config, right, wrong):
    model = abstract(config)
    assert shapes(model, 2, right[0], right[0], right[1])[-1] == (2, 10)
    with pytest.raises(ConfigError, match=r"classifier is for .* those of 256x256|classifier is for images of"):
        shapes(model, 2, wrong[0], wrong[0], wrong[1])
    features = abstract({**config, "num_classes": -1})
    assert len(shapes(features, 2, 96, 96, right[1])[0]) == 4


def test_vgg_gives_maps_and_logits():
    """In MMPretrain, logits are the output behind the last stage: they may be named, and come in any case."""
    model = abstract(dict(type="VGG", depth=11, num_classes=10, out_indices=(1, 5)))
    assert shapes(model, 1, 224, 224, 3) == [(1, 56, 56, 128), (1, 10)]
    model = abstract(dict(type="VGG", depth=16, with_last_pool=False))
    assert shapes(model, 1, 64, 64, 3) == [(1, 4, 4, 512)]
    odd = dict(type="VGG", depth=11, num_stages=2, dilations=(1, 1))
    assert shapes(abstract(odd), 1, 35, 35, 3) == [(1, 8, 8, 128)]
    assert shapes(abstract(odd | dict(ceil_mode=True)), 1, 35, 35, 3) == [(1, 9, 9, 128)]


def test_dropout_of_frozen_stages_is_off():
    model = abstract(dict(type="DenseNet", drop_rate=0.2, frozen_stages=1))
    rates = [[layer.dropout.rate for layer in stage.block] for stage in model.stages]
    assert {*rates[0]} == {0.0} and {*itertools.chain(*rates[1:])} == {0.2}


class TestInception:
    def test_auxiliary_logits_are_for_training(self):
        model = abstract(dict(type="InceptionV3", num_classes=10, aux_logits=True))
        assert shapes(model, 2, 299, 299, 3) == [(2, 10), (2, 10)]
        model.eval()
        assert shapes(model, 2, 299, 299, 3) == [(2, 10)]
        without = abstract(dict(type="InceptionV3", num_classes=10))
        assert shapes(without, 2, 299, 299, 3) == [(2, 10)]
        ours = set(mmpretrain.names(model)) - set(mmpretrain.names(without))
        assert ours == {f"AuxLogits.{name}" for name in mmpretrain.names(model.AuxLogits)}
        # torchvision's Inception v3 has 27,161,264 parameters with the auxiliary classifier of 1000 classes.
        assert mmpretrain.num_parameters(abstract(dict(type="InceptionV3", aux_logits=True))) == 27_161_264

    def test_auxiliary_classifier(self):
        """Pooling 5x5 by 3, 1x1, 5x5, mean, linear: what is left of 17x17 is one position."""
        aux = InceptionAux(4, 3, rngs=nnx.Rngs(0))
        aux.eval()
        x = normal(2, 17, 17, 4)
        pooled = np.stack(
            [x[:, i : i + 5, j : j + 5].mean((1, 2)) for i in range(0, 13, 3) for j in range(0, 13, 3)], 1
        )
        scale = 1 / np.sqrt(1 + 1e-3)  # of norms that know nothing yet
        hidden = np.maximum(pooled @ np.asarray(aux.conv0.conv.kernel[0, 0]) * scale, 0)
        hidden = hidden.reshape(2, -1) @ np.asarray(aux.conv1.conv.kernel[...]).reshape(-1, 768)
        logits = np.maximum(hidden * scale, 0) @ np.asarray(aux.fc.kernel[...]) + np.asarray(aux.fc.bias[...])
        np.testing.assert_allclose(aux(x), logits, rtol=1e-4, atol=1e-5)

    def test_initialisation(self):
        aux = build(dict(type=InceptionAux, in_channels=64, num_classes=50))
        aux.init_weights(nnx.Rngs(0))
        for layer, std in ((aux.conv0.conv, 0.01), (aux.fc, 0.001)):
            assert np.std(layer.kernel[...]) == pytest.approx(std, rel=0.05)


class TestSplitAttention:
    def make(self, radix, groups=1):
        module = SplitAttentionConv2d(
            4, 4, radix=radix, groups=groups, norm=lambda channels: BatchNorm(channels), rngs=nnx.Rngs(0)
        )
        module.eval()
        return module

    @pytest.mark.parametrize("groups", [1, 2])
    def test_weights_sum_to_one_over_splits(self, groups):
        module = self.make(3, groups)
        logits = normal(2, 12)
        weights = np.asarray(module._weights(logits))
        assert weights.shape == (2, 3, 4)
        np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-6)
        # Logits come group by group; within a group split by split.
        apart = logits.reshape(2, groups, 3, 4 // groups)
        wanted = np.exp(apart) / np.exp(apart).sum(2, keepdims=True)
        np.testing.assert_allclose(weights, np.moveaxis(wanted, 2, 1).reshape(2, 3, 4), rtol=1e-5)

    def test_one_split_is_a_gate(self):
        logits = normal(2, 4)
        np.testing.assert_allclose(self.make(1)._weights(logits)[:, 0], 1 / (1 + np.exp(-logits)), rtol=1e-5)
        assert self.make(1)(normal(2, 5, 5, 4)).shape == (2, 5, 5, 4)


class TestRes2Net:
    def make(self, **kwargs):
        block = Bottle2neck(scales=3, in_channels=8, out_channels=8, mid_channels=2, rngs=nnx.Rngs(0), **kwargs)
        block.eval()
        return block

    @pytest.mark.parametrize("first", [False, True])
    def test_parts_see_those_before(self, first):
        """A change in the first part reaches the second, not the last; in the first block of a stage it stays where it is."""
        block = self.make()
        block.first = first
        seen = {}
        block.conv3 = lambda x: seen.setdefault(len(seen), x) * 0
        block.bn3 = lambda x: x
        block.conv1 = lambda x: x[..., :6]
        x = np.abs(normal(1, 6, 6, 8))
        block.branch(x)
        block.branch(x + np.asarray([1, 1, 0, 0, 0, 0, 0, 0], np.float32))
        changed = np.abs(np.asarray(seen[1] - seen[0])).max((0, 1, 2)).reshape(3, 2).max(1) > 0
        assert changed.tolist() == [True, not first, False]

    def test_names_of_shortcuts(self):
        """With average pooling, convolutions of shortcuts are the second layer, even where nothing is pooled."""
        model = abstract(dict(type="Res2Net", depth=50))
        assert {"layer1.0.downsample.1.weight", "layer2.0.downsample.1.weight"} <= set(mmpretrain.names(model))
        plain = abstract(dict(type="Res2Net", depth=50, deep_stem=False, avg_down=False))
        assert {"layer1.0.downsample.0.weight", "layer2.0.downsample.0.weight"} <= set(mmpretrain.names(plain))


class TestRegNet:
    @pytest.mark.parametrize(
        ("arch", "depths", "widths"),
        [  # the paper's appendix
            ("regnetx_400mf", [1, 2, 7, 12], [32, 64, 160, 384]),
            ("regnetx_800mf", [1, 3, 7, 5], [64, 128, 288, 672]),
            ("regnetx_1.6gf", [2, 4, 10, 2], [72, 168, 408, 912]),
            ("regnetx_3.2gf", [2, 6, 15, 2], [96, 192, 432, 1008]),
            ("regnetx_4.0gf", [2, 5, 14, 2], [80, 240, 560, 1360]),
            ("regnetx_6.4gf", [2, 4, 10, 1], [168, 392, 784, 1624]),
            ("regnetx_8.0gf", [2, 5, 15, 1], [80, 240, 720, 1920]),
            ("regnetx_12gf", [2, 5, 11, 1], [224, 448, 896, 2240]),
        ],
    )
    def test_stages(self, arch, depths, widths):
        stages = stages_of(**RegNet.archs[(arch,)])
        assert [stage.blocks for stage in stages] == depths
        assert [stage.width for stage in stages] == widths
        assert all(stage.mid == stage.width and stage.mid % stage.group_width == 0 for stage in stages)

    def test_narrow_inside(self):
        """`bot_mul` is what blocks have inside; groups are no wider than that."""
        stages = stages_of(w0=16, wa=16.0, wm=2.0, group_w=16, depth=3, bot_mul=0.5)
        assert [(stage.width, stage.mid, stage.group_width) for stage in stages] == [
            (16, 8, 8),
            (32, 16, 16),
            (64, 32, 16),
        ]

    @pytest.mark.parametrize("wrong", [dict(w0=20), dict(wa=-1.0), dict(wm=1.0)])
    def test_mistakes(self, wrong):
        with pytest.raises(ConfigError, match="must be a multiple of 8"):
            stages_of(**(RegNet.archs[("regnetx_400mf",)] | wrong))
