"""ResNets, necks and classifiers: the reference's numbers, and what their options mean."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxpretrain.build import ConfigError, abstract
from jaxpretrain.models.classifiers import ImageClassifier
from jaxpretrain.models.layers import BatchNorm, Frozen
from jaxpretrain.models.necks import GlobalAveragePooling, NonLinearNeck
from jaxpretrain.models.resnet import ResNet
from tests.parity import assert_logits, assert_summary, fill_by_reference, load_golden, one_pass, reference_input

TINY = dict(stem_channels=8, base_channels=4)
TWO = dict(**TINY, num_stages=2, strides=(1, 2), dilations=(1, 1))
SHORT = dict(**TINY, num_stages=1, strides=(1,), dilations=(1,), out_indices=(0,))


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def blank(cfg):
    """A module with zeros for weights: no time is spent on random numbers."""
    module = abstract(cfg)
    for _, variable in nnx.state(module).flat_state():
        variable.set_value(np.zeros(variable.shape, variable.dtype))
    return module


def random(cfg, seed=0):
    """A module with plausible random weights, scales and statistics, drawn by NumPy."""
    module = blank(cfg)
    rng = np.random.default_rng(seed)
    for path, variable in nnx.state(module).flat_state():
        shape, name = variable.shape, path[-1]
        value = rng.standard_normal(shape)
        if name == "num_batches_tracked":
            continue
        if name == "kernel":
            value = value / np.sqrt(np.prod(shape[:-1]))
        elif name in ("scale", "var"):
            value = 1 + 0.1 * np.abs(value)
        value = 0.1 * value if name in ("bias", "mean") else value
        variable.set_value(jnp.asarray(value.astype(variable.dtype)))  # by JAX, each shape would be compiled for
    return module


def split(module, *filters):
    """Structure and plain arrays; states would hand the very variables on to what is merged."""
    graphdef, *states = nnx.split(module, *filters)
    return graphdef, *map(nnx.to_pure_dict, states)


def forward(module, *args, **kwargs):
    """`module(*args)` under jit; the module itself stays as it is."""
    graphdef, state = split(module)
    return jax.jit(lambda state, *args: nnx.merge(graphdef, state)(*args, **kwargs))(state, *args)


def assert_close(actual, desired, tolerance=1e-5):
    actual, desired = np.asarray(actual, np.float64), np.asarray(desired, np.float64)
    assert actual.shape == desired.shape
    assert np.abs(actual - desired).max() <= tolerance * np.abs(desired).max()


# --- the reference's numbers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "resnet18_8xb16_cifar10",
        "resnet18_8xb32_in1k",
        pytest.param("resnet50_8xb32_in1k", marks=pytest.mark.slow),
        pytest.param("resnetv1c50_8xb32_in1k", marks=pytest.mark.slow),
        pytest.param("resnetv1d50_8xb32_in1k", marks=pytest.mark.slow),
    ],
)
def test_classifier_equals_reference(name):
    golden = load_golden(name)
    model = blank(golden["model_cfg"])
    fill_by_reference(model, golden["manifest"])
    model.eval()
    assert len(nnx.state(model).flat_state()) == golden["n_keys"]
    assert sum(v.size for _, v in nnx.state(model, (nnx.Param, Frozen)).flat_state()) == golden["n_params"]

    graphdef, state = split(model)

    @jax.jit
    def run(state, images):
        model = one_pass(nnx.merge(graphdef, state))
        stages = {stage: model.extract_feat(images, stage) for stage in ("backbone", "neck", "pre_logits")}
        return stages, model(images)

    stages, logits = run(state, reference_input(tuple(golden["input_shape"])))
    for stage, summaries in (("backbone", golden["features"]), ("neck", golden["neck"])):
        for ours, summary in zip(stages[stage], summaries, strict=True):
            assert_summary(ours, summary)
    assert_summary(stages["pre_logits"], golden["pre_logits"])
    assert_logits(logits, golden["logits"])


@pytest.mark.parametrize(
    ("depth", "parameters"),
    [
        (18, 11_176_512),
        (50, 23_508_032),
        pytest.param(34, 21_284_672, marks=pytest.mark.slow),
        pytest.param(101, 42_500_160, marks=pytest.mark.slow),
        pytest.param(152, 58_143_808, marks=pytest.mark.slow),
    ],
)
def test_depths_have_their_published_size(depth, parameters):
    """The figures are torchvision's, without its classifier."""
    model = abstract(dict(type="ResNet", depth=depth))
    assert sum(v.size for _, v in nnx.state(model, nnx.Param).flat_state()) == parameters


@pytest.mark.slow
def test_backbone_and_projector_equal_reference_in_training():
    """SimCLR's ResNet-50 and NonLinearNeck with the statistics of one batch: both views of 4 images, interleaved."""
    golden = load_golden("simclr_resnet50_16xb256-coslr-200e_in1k")
    images = np.stack([reference_input((4, 3, 224, 224), seed=view) for view in range(2)], axis=1)
    parts = {}
    for name in ("backbone", "neck"):
        parts[name] = blank(golden["model_cfg"][name])
        fill_by_reference(parts[name], golden["manifest"], prefix=f"{name}.")
    feats = forward(parts["backbone"], images.reshape(8, 224, 224, 3))
    (projected,) = forward(parts["neck"], feats)
    # Statistics of 8 images amplify rounding. Our float64 run is 2.9e-5 (backbone) and 1.0e-4 (projector) from the golden
    # float32 numbers, and our float32 run 1.1e-4 and 3.5e-4 from our float64 one, so 1e-5 is beyond either's precision.
    assert_summary(feats[0], golden["ssl"]["stages"]["backbone"][0][0], tolerance=1e-4)
    assert_summary(projected, golden["ssl"]["stages"]["neck"][0][0], tolerance=4e-4)


# --- options ---------------------------------------------------------------------------------------------------------


def test_out_indices_give_a_tuple_of_stages():
    model = random(dict(type="ResNet", depth=18, **TINY, out_indices=(0, 2, 3)))
    model.eval()
    x = normal(2, 64, 64, 3)
    outs = forward(model, x)
    assert [out.shape for out in outs] == [(2, 16, 16, 4), (2, 4, 4, 16), (2, 2, 2, 32)]
    model.out_indices = (3,)
    (last,) = forward(model, x)
    assert_close(last, outs[-1], 1e-6)


def test_stages_strides_dilations_expansion_and_channels():
    cfg = dict(type="ResNet", depth=50, in_channels=1, stem_channels=8, base_channels=4, expansion=2, num_stages=3)
    model = random(cfg | dict(strides=(1, 2, 1), dilations=(1, 1, 2), out_indices=(0, 1, 2)))
    assert not hasattr(model, "layer4")
    assert model.layer3[0].conv2.dilation == (2, 2) and model.layer3[0].conv2.padding == (2, 2)
    assert model.layer3[0].conv1.kernel.shape == (1, 1, 16, 16), (
        "8 output channels double per stage, half of them inside"
    )
    model.eval()
    assert [out.shape for out in forward(model, normal(1, 32, 32, 1))] == [(1, 8, 8, 8), (1, 4, 4, 16), (1, 4, 4, 32)]


@pytest.mark.parametrize(("style", "strides"), [("pytorch", (1, 2)), ("caffe", (2, 1))])
def test_style_says_where_a_bottleneck_strides(style, strides):
    block = blank(dict(type="ResNet", depth=50, **TINY, style=style)).layer2[0]
    assert (block.conv1.stride[0], block.conv2.stride[0]) == strides


def test_cifar_stem_keeps_the_resolution():
    model = random(dict(type="ResNet_CIFAR", depth=18, **TINY, out_indices=(0, 3)))
    model.eval()
    assert [out.shape for out in forward(model, normal(1, 32, 32, 3))] == [(1, 32, 32, 4), (1, 4, 4, 32)]


def test_zero_init_residual_is_an_initialisation_only():
    for depth, last in ((18, "bn2"), (50, "bn3")):
        for zero in (True, False):
            model = ResNet(depth, **SHORT, rngs=nnx.Rngs(0))
            model.zero_init_residual = zero
            assert (getattr(model.layer1[1], last).scale[...] == 1).all()
            model.init_weights(nnx.Rngs(1))
            assert (getattr(model.layer1[1], last).scale[...] == (0 if zero else 1)).all()
            assert (model.layer1[1].bn1.scale[...] == 1).all()
    kernel = np.asarray(model.layer1[0].conv2.kernel[...])
    assert kernel.std() == pytest.approx((2 / (9 * kernel.shape[-1])) ** 0.5, rel=0.2), "Kaiming, fan out"


def test_blocks_with_zero_scales_are_their_shortcut():
    model = random(dict(type="ResNet", depth=18, **SHORT))
    block = model.layer1[1]
    block.bn2.scale.set_value(jnp.zeros(4))
    block.bn2.bias.set_value(jnp.zeros(4))
    x = jnp.abs(normal(2, 8, 8, 4))
    np.testing.assert_array_equal(block(x), x)


def stats_of(module):
    return nnx.to_pure_dict(nnx.state(module, nnx.BatchStat))


def test_norm_eval_keeps_all_statistics_in_training():
    model = random(dict(type="ResNet", depth=18, **SHORT, norm_eval=True))
    model.train()
    before = stats_of(model)
    trained = model(normal(2, 16, 16, 3))
    assert jax.tree.all(jax.tree.map(np.array_equal, before, stats_of(model)))
    model.eval()
    assert_close(trained[0], model(normal(2, 16, 16, 3))[0])


@pytest.mark.parametrize("frozen_stages", [-1, 0, 2, 4])
@pytest.mark.parametrize("kind", ["ResNet", "ResNetV1d"])
def test_frozen_stages_do_not_learn(kind, frozen_stages):
    model = random(dict(type=kind, depth=18, **TINY, frozen_stages=frozen_stages, drop_path_rate=0.5))
    stem = {"stem"} if kind == "ResNetV1d" else {"conv1", "bn1"}
    frozen = {f"layer{i}" for i in range(1, frozen_stages + 1)} | (stem if frozen_stages >= 0 else set())
    others = (stem | {f"layer{i}" for i in range(1, 5)}) - frozen
    assert {path[0] for path, _ in nnx.state(model, Frozen).flat_state()} == frozen
    assert {path[0] for path, _ in nnx.state(model, nnx.Param).flat_state()} == others
    model.train()
    graphdef, state = split(model)
    same = {}

    def step(state, images):
        twin = nnx.merge(graphdef, state)
        before = stats_of(twin)
        twin(images, rngs=nnx.Rngs(0))
        same.update(jax.tree.map(lambda a, b: a is b, before, stats_of(twin)))

    jax.eval_shape(step, state, normal(4, 32, 32, 3))  # what stands still is not even computed
    for name, part in same.items():
        counts = [same for path, same in jax.tree.leaves_with_path(part) if "num_batches_tracked" in str(path)]
        assert counts and all(unchanged == (name in frozen) for unchanged in counts)
    rates = [block.drop_path_rate for i in range(1, 5) for block in getattr(model, f"layer{i}")]
    still = 2 * max(frozen_stages, 0)
    np.testing.assert_allclose(rates, [0.0] * still + np.linspace(0, 0.5, 8).tolist()[still:])


def test_drop_path_drops_samples_in_training_only():
    cfg = dict(type="ResNet", depth=18, **SHORT)
    model = random(cfg | dict(drop_path_rate=0.5))
    block = model.layer1[1]
    assert (model.layer1[0].drop_path_rate, block.drop_path_rate) == (0.0, 0.5)
    x = jnp.abs(normal(64, 4, 4, 4))
    with pytest.raises(ValueError, match="rngs"):
        block(x)
    block.set_attributes(norm_eval=True, raise_if_not_found=False)
    dropped = np.asarray((block(x, rngs=nnx.Rngs(dropout=3)) == x).all(axis=(1, 2, 3)))
    assert 16 < dropped.sum() < 48
    block.eval()
    assert not (block(x) == x).all(axis=(1, 2, 3)).any()
    # The kept branches are doubled; where the sums stay positive, the last ReLU hides nothing.
    calm = block(x)[~dropped]
    block.train()
    noisy = block(x, rngs=nnx.Rngs(dropout=3))[~dropped]
    positive = (noisy > 0) & (calm > 0)
    assert positive.mean() > 0.3
    assert_close((noisy - x[~dropped])[positive], 2 * (calm - x[~dropped])[positive])


@functools.cache
def trained_once(remat):
    """Loss, gradients, statistics, number of draws after a step; and the convolutions in the program."""
    model = random(dict(type="ResNetV1d", depth=18, **TWO, out_indices=(1,), drop_path_rate=0.3))
    model.set_attributes(remat=remat)
    graphdef, params, rest = split(model, nnx.Param, ...)

    def loss(params, images):
        twin, rngs = nnx.merge(graphdef, params, rest), nnx.Rngs(dropout=1)
        y = jnp.square(twin(images, rngs=rngs)[0]).mean()
        return y, (stats_of(twin), rngs.dropout.count[...])

    program = jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(params, normal(4, 32, 32, 3))
    convolutions = program.as_text().count("stablehlo.convolution")
    return program.compile()(params, normal(4, 32, 32, 3)), convolutions


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_remat_changes_nothing(remat):
    """Value, gradient, statistics (moved once) and random draws."""
    (plain, convolutions), (ours, ours_convolutions) = trained_once("none"), trained_once(remat)
    jax.tree.map(assert_close, ours, plain)
    (_, (stats, draws)), _ = ours
    assert stats["layer2"][1]["bn2"]["num_batches_tracked"] == 1
    assert draws == 3
    again = {"full": 8, "dots": 0}[remat]  # the 3x3 convolutions of four blocks
    assert ours_convolutions == convolutions + again


def test_with_cp_is_remat():
    assert blank(dict(type="ResNet", depth=18, **TINY, with_cp=True)).remat == "full"


def test_unknown_remat_is_named():
    model = blank(dict(type="ResNet", depth=18, **TINY))
    model.remat = "ful"
    model.eval()
    with pytest.raises(ConfigError, match="Did you mean 'full'"):
        jax.eval_shape(model, normal(2, 32, 32, 3))


def test_bfloat16_images_run_in_bfloat16_with_float32_state():
    model = random(
        dict(
            type="ImageClassifier",
            backbone=dict(type="ResNet", depth=18, **SHORT, norm_cfg=dict(type="BN", groups=2)),
            neck=dict(type="GlobalAveragePooling"),
            head=dict(type="LinearClsHead", num_classes=5, in_channels=4),
        )
    )
    x = normal(4, 32, 32, 3)
    graphdef, params, rest = split(model, nnx.Param, ...)

    @jax.jit
    def step(params, images):
        def loss(params):
            twin = nnx.merge(graphdef, params, rest)
            logits = twin(images)
            return twin.head.loss_module(logits, jnp.arange(4)), (logits, stats_of(twin))

        return jax.grad(loss, has_aux=True)(params)

    grads, (logits, stats) = step(params, jnp.asarray(x).astype(jnp.bfloat16))
    _, (precise, precise_stats) = step(params, x)
    assert logits.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
    assert {leaf.dtype for leaf in jax.tree.leaves(stats)} == {jnp.dtype("float32"), jnp.dtype("int32")}
    assert_close(logits.astype(jnp.float32), precise, 0.03)  # 8 bits of mantissa through 6 layers
    assert_close(stats["backbone"]["bn1"]["mean"], precise_stats["backbone"]["bn1"]["mean"], 0.01)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dict(depth=19), r"no depth 19; its depths are \[18, 34, 50, 101, 152\]"),
        (dict(depth=18, num_stages=5), "num_stages is 1 to 4"),
        (dict(depth=18, num_stages=3), "need num_stages=3 entries"),
        (dict(depth=18, out_indices=(4,)), "must be in 0 ... 3"),
        (dict(depth=18, style="torch"), "'pytorch' or 'caffe'"),
        (dict(depth=18, frozen_stages=5), "frozen_stages is -1"),
        (dict(depth=50, expansion=3, base_channels=3, stem_channels=8, norm_cfg=dict(type="BM")), "Did you mean 'BN'"),
        (dict(depth=18, out_indexes=(3,)), "Did you mean 'out_indices'"),
        (dict(type="ResNetV1c", depth=18, norm_evl=True), "Did you mean 'norm_eval'"),
        (dict(type="ResNet_CIFAR", depth=18, deep_stem=True), "no deep stem"),
    ],
)
def test_wrong_settings_are_named(config, message):
    with pytest.raises(ConfigError, match=message):
        blank({"type": "ResNet", **config})


# --- necks and classifiers -------------------------------------------------------------------------------------------


def test_global_average_pooling_takes_arrays_and_tuples():
    x = normal(2, 3, 4, 5)
    assert_close(GlobalAveragePooling()(x), x.mean(axis=(1, 2)))
    pooled = GlobalAveragePooling()((x, x[:, :2]))
    assert isinstance(pooled, tuple)
    assert_close(pooled[1], x[:, :2].mean(axis=(1, 2)))
    assert_close(GlobalAveragePooling(dim=1)(x[:, 0]), x[:, 0].mean(axis=1))
    assert_close(GlobalAveragePooling(dim=3)(x[:, None]), x.mean(axis=(1, 2)))
    with pytest.raises(ValueError, match="dim=2"):
        GlobalAveragePooling()(x[:, 0])
    with pytest.raises(ConfigError, match="1, 2 or 3"):
        GlobalAveragePooling(dim=4)


def test_nonlinear_neck_by_definition():
    neck = NonLinearNeck(6, 8, 4, num_layers=3, with_bias=True, with_last_bn_affine=False, rngs=nnx.Rngs(0))
    names = {".".join(map(str, path)) for path, _ in nnx.state(neck, nnx.Param).flat_state()}
    assert names == {
        *("fc0.kernel", "fc0.bias", "bn0.scale", "bn0.bias", "fc1.kernel", "fc1.bias", "bn1.scale", "bn1.bias"),
        "fc2.kernel",
    }
    assert isinstance(neck.bn2, BatchNorm)
    x = normal(16, 3, 3, 6)
    y = x.mean(axis=(1, 2))
    for i, fc in enumerate((neck.fc0, neck.fc1, neck.fc2)):
        y = (np.maximum(y, 0) if i else y) @ np.asarray(fc.kernel[...])
        y = (y - y.mean(0)) / np.sqrt(y.var(0) + 1e-5)  # which cancels the bias
    assert_close(neck(x), y, 1e-4)  # the variance of 16 values amplifies rounding
    (projected,) = neck((x,))
    assert projected.shape == (16, 4)
    with pytest.raises(ValueError, match="one feature map, not 2"):
        neck((x, x))


def test_nonlinear_neck_without_last_norm_or_pooling():
    neck = NonLinearNeck(6, 8, 4, with_last_bn=False, with_last_bias=True, with_avg_pool=False, rngs=nnx.Rngs(0))
    assert neck.bn1 is None and neck.fc1.bias is not None and neck.fc0.bias is None
    assert neck(normal(5, 6)).shape == (5, 4)
    assert neck(normal(5, 1, 2, 3)).shape == (5, 4), "without pooling, positions are flattened"


def classifier(**kwargs):
    cfg = dict(
        type="ImageClassifier",
        backbone=dict(type="ResNet", depth=18, **TWO, out_indices=(0, 1)),
        neck=dict(type="GlobalAveragePooling"),
        head=dict(type="LinearClsHead", num_classes=5, in_channels=8, topk=(1, 5), loss=dict(type="CrossEntropyLoss")),
    )
    return random(cfg | kwargs)


def test_classifier_stages_loss_and_scores():
    model = classifier(
        train_cfg=dict(augments=dict(type="Mixup", alpha=0.2)), data_preprocessor=dict(num_classes=5), pretrained=None
    )
    assert model.train_cfg == dict(augments=dict(type="Mixup", alpha=0.2))
    model.eval()
    x, labels = jnp.asarray(normal(2, 16, 16, 3)), jnp.asarray([1, 4])
    maps, pooled = model.extract_feat(x, "backbone"), model.extract_feat(x)
    assert [m.shape for m in maps] == [(2, 4, 4, 4), (2, 2, 2, 8)]
    assert [p.shape for p in pooled] == [(2, 4), (2, 8)]
    np.testing.assert_array_equal(model.extract_feat(x, "pre_logits"), pooled[-1])
    logits = model(x)
    assert_close(logits, pooled[-1] @ model.head.fc.kernel[...] + model.head.fc.bias[...])
    loss, metrics = model.loss(x, labels)
    assert_close(loss, -np.mean(jax.nn.log_softmax(logits)[jnp.arange(2), labels]))
    assert metrics == {}
    assert_close(model.predict(x), jax.nn.softmax(logits))


def test_classifier_without_neck_or_head():
    model = classifier(neck=None, head=None)
    model.eval()
    x = jnp.asarray(normal(2, 16, 16, 3))
    assert [m.shape for m in model(x)] == [(2, 4, 4, 4), (2, 2, 2, 8)]
    with pytest.raises(ConfigError, match="needs a head"):
        model.extract_feat(x, "pre_logits")
    with pytest.raises(ConfigError, match="no head"):
        model.predict(x)
    with pytest.raises(ConfigError, match="Did you mean 'backbone'"):
        model.extract_feat(x, "backbon")


def test_classifier_takes_built_parts():
    backbone = random(dict(type="ResNet", depth=18, **TINY))
    model = ImageClassifier(backbone, GlobalAveragePooling(), rngs=nnx.Rngs(0))
    assert model.backbone is backbone


def test_classifier_initialises_outer_rules_first():
    model = classifier(
        backbone=dict(type="ResNet", depth=18, **SHORT),
        head=dict(type="LinearClsHead", num_classes=50, in_channels=4),
        init_cfg=dict(type="Constant", layer=["Linear", "Conv2d"], val=7.0, bias=7.0),
    )
    model.init_weights(nnx.Rngs(0))
    assert np.std(model.head.fc.kernel[...]) == pytest.approx(0.01, rel=0.3), "the head's own rule comes last"
    assert abs(np.mean(model.backbone.conv1.kernel[...])) < 0.1
    pretrained = classifier(pretrained="resnet.pth")
    assert pretrained.init_cfg == dict(type="Pretrained", checkpoint="resnet.pth")
    pretrained.init_weights(nnx.Rngs(0))  # which loads nothing: that is the trainer's
