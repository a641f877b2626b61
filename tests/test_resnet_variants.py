"""ResNeXt, SE-ResNet, SE-ResNeXt and wide ResNet: the reference's numbers, and what sets them apart from ResNet."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from jaxpretrain.build import ConfigError
from jaxpretrain.flops import count_flops
from jaxpretrain.interop import mmpretrain
from jaxpretrain.models.layers import BatchNorm, Conv2d, Frozen, intermediates
from jaxpretrain.models.layers.se import SELayer, make_divisible
from tests.parity import assert_logits, assert_summary, build_by_reference, load_golden, one_pass, reference_input
from tests.test_resnet import SHORT, TINY, assert_close, blank, forward, normal, random, split, stats_of

ONE = dict(**SHORT, depth=50, groups=2, width_per_group=4)  # one stage of three blocks, 8 channels inside
VARIANTS = {
    "ResNeXt": ONE,
    "SEResNet": dict(**SHORT, depth=50, se_ratio=2),
    "SEResNeXt": dict(**ONE, se_ratio=2),
}


def variant(kind, **kwargs):
    return random({"type": kind, **VARIANTS[kind], **kwargs})


# --- the reference's numbers -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "resnext50-32x4d_8xb32_in1k",
        "seresnet50_8xb32_in1k",
        "seresnext50-32x4d",
        "wide-resnet50_3rdparty_8xb32_in1k",
        "resnet101-csra_1xb16_voc07-448px",
    ],
)
def test_classifier_equals_reference(name):
    golden = load_golden(name)
    model = build_by_reference(golden["model_cfg"], golden["manifest"])
    assert len(mmpretrain.names(model)) == golden["n_keys"]
    assert mmpretrain.num_parameters(model) == golden["n_params"]
    model.eval()
    graphdef, state = split(model)

    @jax.jit
    def run(state, images):
        model = one_pass(nnx.merge(graphdef, state))
        return model.extract_feat(images, "backbone"), model.extract_feat(images), model(images)

    feats, pooled, logits = run(state, reference_input(tuple(golden["input_shape"])))
    for ours, summaries in ((feats, golden["features"]), (pooled, golden["neck"] or golden["features"])):
        for array, summary in zip(ours, summaries, strict=True):
            assert_summary(array, summary)
    assert_logits(logits, golden["logits"])


@pytest.mark.parametrize("row", [pytest.param(row, id=row["names"][0]) for row in load_golden("zoo_resnets")])
def test_every_model_of_the_zoo_builds(row):
    """All classifiers and the retriever of MMPretrain's zoo with a ResNet or a variant, and a neck of MAE's linear probe."""
    model = blank(row["model"])
    assert len(mmpretrain.names(model)) == row["keys"]
    assert mmpretrain.num_parameters(model) == row["params"]
    trainable = sum(variable.size for _, variable in nnx.state(model, nnx.Param).flat_state())
    assert trainable == (row["trainable"] or row["params"])


# --- grouped convolutions --------------------------------------------------------------------------------------------


def grouped(x, kernel, groups, stride, dilation):
    """The definition, left to XLA."""
    pads = [(dilation * (size // 2),) * 2 for size in kernel.shape[:2]]
    dims = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x, kernel, (stride,) * 2, pads, None, (dilation,) * 2, dims, feature_group_count=groups
    )


@pytest.mark.parametrize(
    ("ins", "outs", "groups", "size", "stride", "dilation"),
    [
        (8, 8, 2, 3, 1, 1),  # all groups in one dense convolution
        (128, 128, 32, 3, 2, 1),  # four of them
        (96, 48, 6, 3, 1, 2),  # as many as there are groups but for two together
        (60, 30, 15, 1, 1, 1),  # groups that 8 does not divide, of a 1x1 kernel
        (512, 256, 4, 1, 1, 1),  # large groups stay apart
        (6, 12, 6, 3, 1, 1),  # depthwise
    ],
)
def test_grouped_convolution_equals_its_definition(ins, outs, groups, size, stride, dilation):
    conv = Conv2d(ins, outs, size, stride, dilation * (size // 2), dilation, groups, bias=False, rngs=nnx.Rngs(0))
    graphdef = nnx.graphdef(conv)
    x, kernel = normal(2, 5, 6, ins), np.asarray(conv.kernel[...])

    def ours(x, kernel):
        return nnx.merge(graphdef, {"kernel": kernel})(x)

    def theirs(x, kernel):
        return grouped(x, kernel, groups, stride, dilation)

    def value_and_grads(function):
        return jax.jit(lambda x, k: (function(x, k), jax.grad(lambda *a: (function(*a) ** 2).sum(), (0, 1))(x, k)))

    jax.tree.map(assert_close, value_and_grads(ours)(x, kernel), value_and_grads(theirs)(x, kernel))
    if groups < ins:
        assert count_flops(ours, x, kernel) == count_flops(theirs, x, kernel), "zeros are no work"


def test_grouped_convolution_is_split_on_cpu_alone():
    """XLA:CPU takes a hundred times as long for the kernel's gradient of a grouped convolution."""
    conv = Conv2d(64, 64, 3, 1, 1, groups=16, bias=False, rngs=nnx.Rngs(0))
    graphdef, params = split(conv, nnx.Param)
    step = jax.jit(jax.grad(lambda params, x: (nnx.merge(graphdef, params)(x) ** 2).sum()))
    traced = step.trace(params, normal(1, 4, 4, 64))
    for platform, groups in (("cpu", "1"), ("cuda", "16")):
        convolutions = [
            line
            for line in traced.lower(lowering_platforms=(platform,)).as_text().splitlines()
            if "stablehlo.convolution" in line
        ]
        counts = {count for line in convolutions for count in _group_counts(line)}
        assert counts == {"1", groups} and len(convolutions) == (4 if platform == "cpu" else 2)


def _group_counts(line):
    return [line.split(f"{kind}_group_count = ")[1].split(" ")[0] for kind in ("feature", "batch")]


# --- ResNeXt ---------------------------------------------------------------------------------------------------------


def test_resnext_is_wider_inside_and_grouped():
    model = blank(dict(type="ResNeXt", depth=50, groups=4, width_per_group=2, **TINY))
    for i, width in enumerate((8, 16, 32, 64), start=1):
        block = getattr(model, f"layer{i}")[0]
        assert [getattr(block, f"conv{j}").kernel.shape[-1] for j in (1, 2, 3)] == [width, width, 16 * 2 ** (i - 1)]
        assert block.conv2.kernel.shape == (3, 3, width // 4, width)
    plain = blank(dict(type="ResNeXt", depth=50, groups=1, width_per_group=7, **TINY))
    resnet = blank(dict(type="ResNet", depth=50, **TINY))
    assert mmpretrain.shapes(plain) == mmpretrain.shapes(resnet), "one group is ResNet"


def test_wide_resnet_is_a_setting():
    block = blank(dict(type="ResNet", depth=50, base_channels=8, expansion=2, stem_channels=4)).layer1[1]
    assert [getattr(block, f"conv{j}").kernel.shape[2:] for j in (1, 2, 3)] == [(16, 8), (8, 8), (8, 16)]


# --- squeeze and excitation ------------------------------------------------------------------------------------------


def test_excitation_by_definition():
    layer = SELayer(6, squeeze_channels=4, rngs=nnx.Rngs(0))
    x = normal(3, 5, 4, 6)
    kernels = [np.asarray(conv.conv.kernel[...])[0, 0] for conv in (layer.conv1, layer.conv2)]
    biases = [np.asarray(conv.conv.bias[...]) for conv in (layer.conv1, layer.conv2)]
    hidden = np.maximum(x.mean(axis=(1, 2)) @ kernels[0] + biases[0], 0)
    weights = 1 / (1 + np.exp(-(hidden @ kernels[1] + biases[1])))
    y, found = intermediates(layer, x)
    assert_close(y, x * weights[:, None, None])
    assert_close(found["weights"][:, 0, 0], weights)


@pytest.mark.parametrize(
    ("value", "divided"), [(16, 16), (19, 24), (20, 24), (1, 8), (0, 8), (8.5, 8), (11, 16), (44.4, 48)]
)
def test_make_divisible(value, divided):
    """11 and 19 are nearer to 8 and 16, but those are under 0.9 of them."""
    assert make_divisible(value, 8) == divided


def test_se_ratio_sets_the_width_of_the_excitation():
    for kind in ("SEResNet", "SEResNeXt"):
        model = blank(dict(type=kind, depth=50))
        assert model.layer4[2].se_layer.conv1.conv.kernel.shape == (1, 1, 2048, 128)
        model = blank(
            dict(type=kind, depth=50, se_ratio=4, num_stages=1, strides=(1,), dilations=(1,), out_indices=(0,))
        )
        assert model.layer1[0].se_layer.conv1.conv.kernel.shape == (1, 1, 256, 64)


def test_excitation_scales_the_branch_not_the_shortcut():
    block = variant("SEResNet").layer1[1]
    block.eval()
    x = jnp.abs(normal(2, 6, 6, 16))
    plain = block.branch(x)
    block.se_layer.conv2.conv.kernel.set_value(jnp.zeros((1, 1, 8, 16)))
    block.se_layer.conv2.conv.bias.set_value(jnp.full(16, -1e9))
    np.testing.assert_array_equal(block(x), x)
    block.se_layer.conv2.conv.bias.set_value(jnp.full(16, 1e9))
    whole = block(x) - x
    positive = np.asarray(block(x) > 0)
    assert (np.abs(plain)[positive] <= np.abs(whole)[positive] + 1e-6).all()


# --- what every variant does -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", VARIANTS)
def test_stages_and_sizes(kind):
    two = dict(num_stages=2, strides=(1, 2), dilations=(1, 1), out_indices=(0, 1))
    model = variant(kind, **two)
    model.eval()
    first, last = jax.eval_shape(model, jnp.zeros((1, 24, 40, 3)))
    assert (first.shape, last.shape) == ((1, 6, 10, 16), (1, 3, 5, 32))
    first, last = jax.eval_shape(model, jnp.zeros((1, 30, 18, 3), jnp.bfloat16))
    assert (first.shape, last.shape, last.dtype) == ((1, 8, 5, 16), (1, 4, 3, 32), jnp.bfloat16)


def test_bfloat16_is_near_float32():
    model = variant("SEResNeXt")
    model.eval()
    x = normal(2, 16, 16, 3)
    (precise,), (half,) = forward(model, x), forward(model, jnp.asarray(x, jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    assert_close(half.astype(jnp.float32), precise, 0.03)  # 8 bits of mantissa through 10 layers


def test_modes():
    model = variant("SEResNeXt")
    x = normal(4, 16, 16, 3)

    @jax.jit
    def run(state, x):
        twin = nnx.merge(graphdef, state)
        return twin(x)[0], stats_of(twin)

    graphdef, state = split(model)
    trained, moved = run(state, x)
    counters = [
        leaf for path, leaf in jax.tree.leaves_with_path(moved) if "num_batches_tracked" in jax.tree_util.keystr(path)
    ]
    assert len(counters) == 11 and all(count == 1 for count in counters)
    model.eval()
    evaluated = forward(model, x)[0]
    assert np.abs(np.asarray(trained - evaluated)).max() > 1e-3
    jax.tree.map(np.testing.assert_array_equal, stats_of(model), stats_of(variant("SEResNeXt")))


def test_gradients_by_finite_differences():
    """In float64 and training mode, along a random direction."""
    with jax.enable_x64(True):
        graphdef, params, rest = split(variant("SEResNeXt"), nnx.Param, ...)
        params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), params)
        rng = np.random.default_rng(0)
        along = jax.tree.map(lambda a: jnp.asarray(rng.standard_normal(a.shape)), params)
        x = jnp.asarray(normal(2, 8, 8, 3), jnp.float64)

        @jax.jit
        @jax.value_and_grad
        def loss(params):
            return jnp.sin(nnx.merge(graphdef, params, rest)(x)[0]).sum()

        value, grads = loss(params)
        assert value.dtype == jnp.float64
        assert all(np.abs(grad).max() > 0 for grad in jax.tree.leaves(grads)), "a parameter has no gradient"
        slope = sum(jnp.vdot(g, d) for g, d in zip(*map(jax.tree.leaves, (grads, along)), strict=True))
        ahead, behind = (loss(jax.tree.map(lambda p, d, s=s: p + s * d, params, along))[0] for s in (1e-6, -1e-6))
        assert (ahead - behind) / 2e-6 == pytest.approx(float(slope), rel=1e-5)


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_remat_changes_nothing(remat):
    jax.tree.map(assert_close, trained_once(remat), trained_once("none"))


@functools.cache
def trained_once(remat):
    """Loss, statistics and gradients of two blocks."""
    model = variant("SEResNeXt", drop_path_rate=0.3)
    model.layer1 = nnx.List(model.layer1[:2])
    model.remat = remat
    graphdef, params, rest = split(model, nnx.Param, ...)

    def loss(params, x):
        twin = nnx.merge(graphdef, params, rest)
        return jnp.square(twin(x, rngs=nnx.Rngs(dropout=1))[0]).mean(), stats_of(twin)

    with jax.enable_x64(True):  # in float32 the stem's gradients differ by rounding, 1.05e-5
        return jax.jit(jax.value_and_grad(loss, has_aux=True))(params, normal(4, 16, 16, 3).astype(np.float64))


@pytest.mark.parametrize("kind", VARIANTS)
def test_drop_path_and_frozen_stages(kind):
    model = variant(kind, drop_path_rate=0.5, frozen_stages=0)
    assert [block.drop_path_rate for block in model.layer1] == [0.0, 0.25, 0.5]
    block = model.layer1[2]
    block.set_attributes(norm_eval=True, raise_if_not_found=False)
    x = jnp.abs(normal(64, 2, 2, 16))
    graphdef, state = split(block)
    y = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x, rngs=nnx.Rngs(dropout=3)))(state, x)
    dropped = np.asarray((y == x).all(axis=(1, 2, 3)))
    assert 16 < dropped.sum() < 48
    frozen = variant(kind, frozen_stages=1)
    assert not nnx.state(frozen, nnx.Param).flat_state()
    assert nnx.state(model, Frozen).flat_state() and nnx.state(model, nnx.Param).flat_state()
    assert all(module.norm_eval for _, module in nnx.iter_modules(frozen) if isinstance(module, BatchNorm))


def test_initialisation_starts_blocks_as_their_shortcut():
    model = variant("SEResNeXt")
    model.init_weights(nnx.Rngs(0))
    assert not any(np.any(block.bn3.scale[...]) for block in model.layer1)
    kernel = np.asarray(model.layer1[0].conv2.kernel[...])
    assert kernel.std() == pytest.approx((2 / (9 * 8)) ** 0.5, rel=0.2), (
        "Kaiming; groups do not lessen PyTorch's fan out"
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dict(type="ResNeXt", depth=18), r"ResNeXt has no depth 18; its depths are \[50, 101, 152\]"),
        (dict(type="SEResNet", depth=34), r"SEResNet has no depth 34"),
        (dict(type="SEResNeXt", depth=50, groups=0), "SEResNeXt: groups=0"),
        (dict(type="SEResNeXt", depth=50, with_per_group=4), "Did you mean 'width_per_group'"),
        (dict(type="SEResNeXt", depth=50, seratio=4), "Did you mean 'se_ratio'"),
    ],
)
def test_wrong_settings_are_named(config, message):
    with pytest.raises(ConfigError, match=message):
        blank(config)
