"""DINO: projector, loss, centre and temperatures against NumPy; the teacher; views of several sizes."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxpretrain.build import ConfigError, abstract, build
from jaxpretrain.methods.base import Progress
from jaxpretrain.methods.dino import DINOHead, DINONeck, WeightNormLinear, class_token, in_groups, multi_crop, watch
from jaxpretrain.models.layers import BatchNorm, Frozen, Linear
from jaxpretrain.models.layers.position import resize_pos_embed
from jaxpretrain.optim import build_optimizer
from jaxpretrain.train_state import split
from tests.method_cases import CASES
from tests.method_cases.base import make

VIT, RESNET = CASES["dino_vit"], CASES["dino_resnet"]


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def dino_loss(student: np.ndarray, teacher: np.ndarray, center: np.ndarray, student_temp: float, temp: float) -> float:
    """The paper's algorithm 1 with multi-crop (equation 3), view by view; [B, V, K] and [B, 2, K]."""
    terms = []
    for q in range(2):
        for v in range(student.shape[1]):
            if v != q:
                p = softmax((teacher[:, q] - center) / temp)
                terms.append(-(p * np.log(softmax(student[:, v] / student_temp))).sum(axis=1).mean())
    return float(np.mean(terms))


@pytest.fixture
def scores() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.standard_normal((4, 5, 7)), rng.standard_normal((4, 2, 7))


def test_loss_and_centre_by_hand(scores):
    student, teacher = scores
    head = DINOHead(7, student_temp=0.2, center_momentum=0.8, teacher_temp=0.05)
    center = np.zeros(7)
    for step in range(3):
        targets = head.targets(jnp.asarray(teacher + step), 0, 0)
        wanted = dino_loss(student, teacher + step, center, 0.2, 0.05)
        assert head.loss(jnp.asarray(student), targets) == pytest.approx(wanted, rel=1e-5)
        center = 0.8 * center + 0.2 * (teacher + step).reshape(-1, 7).mean(axis=0)
        np.testing.assert_allclose(head.center[...], center[None], rtol=1e-5, atol=1e-6)


def test_only_the_students_scores_have_a_gradient(scores):
    def loss(student: Any, teacher: Any) -> Any:
        head = DINOHead(7)
        return head.loss(student, head.targets(teacher, 0, 0))

    grads = jax.grad(loss, argnums=(0, 1))(*map(jnp.asarray, scores))
    assert np.abs(grads[0]).min() > 0
    assert not grads[1].any()


@pytest.mark.parametrize(
    ("epochs", "wanted"),
    [(0, [0.07] * 5), (1, [0.04, 0.07, 0.07, 0.07, 0.07]), (3, [0.04, 0.055, 0.07, 0.07, 0.07])],
)
def test_teacher_temperature(epochs, wanted):
    """np.linspace over the epochs of the warm-up, then constant, as the release has it."""
    for unit in ("epochs", "steps"):
        head = DINOHead(7, warmup_teacher_temp=0.04, teacher_temp=0.07, **{f"warmup_teacher_temp_{unit}": epochs})
        at = {"epochs": lambda n: (n, 99), "steps": lambda n: (99, n)}[unit]
        np.testing.assert_allclose([head.temperature(*map(jnp.int32, at(n))) for n in range(5)], wanted, rtol=1e-6)


def test_the_batchs_epoch_sets_the_temperature():
    config = dict(VIT.config, head=dict(VIT.config["head"], warmup_teacher_temp=0.02, warmup_teacher_temp_epochs=2))
    method = make(config)
    batch = VIT.batch()
    entropies = []
    for epoch in (None, 0, 1, 5):
        batch = {k: v for k, v in batch.items() if k != "epoch"}
        batch |= {} if epoch is None else {"epoch": jnp.full(8, epoch)}
        entropies.append(float(jax.jit(lambda m, b: m.loss(b, rngs=nnx.Rngs(0))[1]["teacher_entropy"])(method, batch)))
    assert entropies[0] == entropies[1] < entropies[2] == entropies[3]


def test_weight_normalised_layer():
    layer = WeightNormLinear(3, 5, fixed_length=False, rngs=nnx.Rngs(0))
    assert isinstance(layer.scale, nnx.Param)
    layer.scale.set_value(jnp.arange(1.0, 6)[:, None])
    x = np.random.default_rng(0).standard_normal((2, 4, 3)).astype(np.float32)
    v = np.asarray(layer.kernel[...], np.float64)
    np.testing.assert_allclose(layer(x), x @ (v / np.linalg.norm(v, axis=0) * np.arange(1, 6)), rtol=1e-5, atol=1e-6)
    assert layer(jnp.asarray(x, jnp.bfloat16)).dtype == jnp.float32
    assert isinstance(WeightNormLinear(3, 5, rngs=nnx.Rngs(0)).scale, Frozen)


def test_neck_by_hand():
    neck = DINONeck(6, 9, 8, 4, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).standard_normal((3, 6))
    layers = [layer for layer in neck.mlp if isinstance(layer, Linear)]
    assert [layer.kernel.shape for layer in layers] == [(6, 8), (8, 8), (8, 4)]
    h = x
    for i, layer in enumerate(layers):
        if i:
            h = h * (1 + np.vectorize(math.erf)(h / math.sqrt(2))) / 2
        h = h @ np.asarray(layer.kernel[...], np.float64) + np.asarray(layer.bias[...], np.float64)
    h /= np.linalg.norm(h, axis=1, keepdims=True)
    v = np.asarray(neck.last_layer.kernel[...], np.float64)
    np.testing.assert_allclose(neck(jnp.asarray(x)), h @ (v / np.linalg.norm(v, axis=0)), rtol=1e-4, atol=1e-6)


def test_neck_initialisation_and_forms():
    neck = DINONeck(64, 32, 256, 16, rngs=nnx.Rngs(0))
    assert float(neck.mlp[2].kernel[...].std()) == pytest.approx(0.02, rel=0.02)
    assert not neck.mlp[0].bias[...].any()
    assert isinstance(DINONeck(4, 5, 6, 3, use_bn=True, rngs=nnx.Rngs(0)).mlp[1], BatchNorm)
    assert DINONeck(4, 5, 6, 3, num_layers=1, rngs=nnx.Rngs(0)).mlp.kernel.shape == (4, 3)


def test_whole_loss_by_hand():
    """Views one by one through the networks, and the formula."""
    config = dict(VIT.config, backbone=dict(VIT.config["backbone"], drop_path_rate=0.0))
    method, batch = make(config), VIT.batch()
    value, metrics = jax.jit(lambda m, b: m.loss(b, rngs=nnx.Rngs(0)))(method, batch)
    student = np.stack([method.neck(method.backbone(view)[-1]) for view in batch["image"]], axis=1)
    backbone, neck = method.momentum_encoder.module
    teacher = np.stack([neck(backbone(view)[-1]) for view in batch["image"][:2]], axis=1)
    wanted = dino_loss(np.float64(student), np.float64(teacher), np.zeros(24), 0.1, 0.05)
    assert value == pytest.approx(wanted, rel=1e-5)
    p = softmax(np.float64(teacher) / 0.05)
    mean = p.reshape(-1, 24).mean(axis=0)
    assert metrics["assignment_entropy"] == pytest.approx(-(mean * np.log(mean)).sum() / math.log(24), rel=1e-4)
    assert metrics["teacher_entropy"] == pytest.approx(-(p * np.log(p)).sum(-1).mean() / math.log(24), rel=1e-4)


def test_metrics_tell_collapse():
    flat, one = jnp.full((4, 2, 8), 1 / 8), jax.nn.one_hot(jnp.zeros((4, 2), int), 8)
    spread = jax.nn.one_hot(jnp.arange(8).reshape(4, 2), 8)
    features = jnp.ones((4, 2, 3))
    found = [[float(v) for v in watch(features, t).values()] for t in (flat, one, spread)]
    np.testing.assert_allclose(found, [[0, 1, 1], [0, 0, 0], [0, 1, 0]], atol=1e-6)


# Views


def test_views_of_equal_size_pass_as_one_batch():
    seen = []

    def encode(x: jax.Array) -> jax.Array:
        seen.append(x.shape)
        return x.mean(axis=(1, 2))

    crops = [jnp.full((3, n, n, 2), 10 * i) + jnp.arange(3)[:, None, None, None] for i, n in enumerate((8, 8, 4, 4, 4))]
    out = in_groups(crops, encode)
    assert seen == [(6, 8, 8, 2), (9, 4, 4, 2)]
    np.testing.assert_array_equal(out[:, :, 0], np.arange(3)[:, None] + 10 * np.arange(5))


def test_small_views_interpolate_positions():
    """A ViT for 16 pixels sees 8: its 4 x 4 positions are resampled to 2 x 2, bicubically."""
    backbone = build(VIT.config["backbone"], rngs=nnx.Rngs(0))
    backbone.init_weights(nnx.Rngs(1))
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    tokens, grid = backbone.embed(x)
    assert grid == (2, 2)
    positions = resize_pos_embed(backbone.pos_embed[...], (4, 4), (2, 2), "bicubic", 1)[:, 1:]
    np.testing.assert_allclose(tokens, backbone.patch_embed(x)[0] + positions, rtol=1e-6)


@pytest.mark.parametrize("sizes", [8, (8,), (8, 4)], ids=repr)
def test_wrong_views(sizes):
    images = jnp.zeros((2, 8, 8, 3)) if sizes == 8 else tuple(jnp.zeros((2, n, n, 3)) for n in sizes)
    with pytest.raises(ConfigError, match=r"two large views.*MultiView"):
        multi_crop(dict(image=images))


def test_class_token_of_any_output():
    x = jnp.arange(24.0).reshape(2, 3, 4)
    np.testing.assert_array_equal(class_token((x,)), x[:, 0])
    np.testing.assert_array_equal(class_token((x[:, :, None],)), x.mean(axis=1))
    np.testing.assert_array_equal(class_token(x[:, 1]), x[:, 1])


# The teacher


def weights(module: nnx.Module) -> dict[tuple, np.ndarray]:
    return {path: np.asarray(v[...]) for path, v in nnx.state(module, (nnx.Param, Frozen)).flat_state()}


@pytest.mark.parametrize("case", [VIT, RESNET], ids=["vit", "resnet"])
def test_teacher_follows(case):
    method = case.make()
    online, teacher = nnx.List([method.backbone, method.neck]), method.momentum_encoder
    start = weights(teacher.module)
    assert start.keys() == weights(online).keys()
    assert all((start[path] == value).all() for path, value in weights(online).items())
    assert not jax.tree.leaves(nnx.state(teacher, nnx.Param))
    assert all(getattr(m, "drop_path_rate", 0.0) == 0.0 for _, m in nnx.iter_modules(teacher))
    for _, variable in nnx.state(online, nnx.Param).flat_state():
        variable.set_value(variable[...] + 1)
    method.after_step(Progress(jnp.int32(3), 10))
    momentum = 0.1 * (1 + math.cos(math.pi * 2 / 10)) / 2  # the third update is that of step 2, counted from 0
    for path, value in weights(teacher.module).items():
        wanted = start[path] + momentum * (weights(online)[path] - start[path])
        np.testing.assert_allclose(value, wanted, rtol=1e-5, atol=1e-6)
    assert teacher.steps == 3


def test_the_release_s_momentum():
    method = abstract(dict(VIT.config, base_momentum=0.004))
    found = [float(method.teacher_momentum(Progress(jnp.int32(step), 100))) for step in (1, 51, 100)]
    wanted = [1 - (1 - 0.004 * (math.cos(math.pi * it / 100) + 1) / 2) for it in (0, 50, 99)]
    np.testing.assert_allclose(found, wanted, rtol=1e-4)


def test_features_are_the_teachers():
    method = VIT.make()
    method.eval()
    x = VIT.batch()["image"][0]
    np.testing.assert_array_equal(method.features(x), method.momentum_encoder.module[0](x)[-1])
    method.backbone.cls_token.set_value(method.backbone.cls_token[...] + 1)
    np.testing.assert_array_equal(method.features(x), method.momentum_encoder.module[0](x)[-1])


def test_the_teachers_statistics_are_its_own():
    method = RESNET.make()
    method.loss(RESNET.batch())
    student, teacher = method.neck.mlp[1], method.momentum_encoder.module[1].mlp[1]
    assert student.num_batches_tracked == teacher.num_batches_tracked == 1
    assert (student.mean[...] != teacher.mean[...]).any()  # four views and two


def test_vit_initialisation():
    config = dict(
        VIT.config, backbone=dict(VIT.config["backbone"], arch=dict(VIT.config["backbone"]["arch"], embed_dims=64))
    )
    config["neck"] = dict(config["neck"], in_channels=64)
    backbone = make(config).backbone
    for kernel in (backbone.layers[0].attn.qkv.kernel, backbone.layers[1].ffn.fc1.kernel):
        assert float(kernel[...].std()) == pytest.approx(0.02, rel=0.05)
    assert not backbone.layers[1].ffn.fc1.bias[...].any()
    assert 0.01 < float(backbone.cls_token[...].std()) < 0.03


def test_last_layer_stands_still_at_first():
    """The recipes' way to cancel its gradient in the first epoch."""
    config = dict(VIT.config, neck=dict(VIT.config["neck"], norm_last_layer=False))
    _, params, _ = split(make(config))
    wrapper = dict(optimizer=dict(type="AdamW", lr=0.1), paramwise_cfg=dict(custom_keys={"last_layer": dict(begin=2)}))
    optimizer = build_optimizer(wrapper, np.full(4, 0.1), params)
    state, grads = optimizer.init(params), jax.tree.map(jnp.ones_like, params)
    moved = []
    for _ in range(4):
        updates, state = optimizer.update(grads, state, params)
        moved.append([bool(jnp.abs(updates["neck"][name]["kernel"]).max() > 0) for name in ("last_layer",)])
        assert jnp.abs(updates["neck"]["mlp"][0]["kernel"]).max() > 0
    assert moved == [[False], [False], [True], [True]]


def test_parts_that_do_not_fit():
    with pytest.raises(ConfigError, match="the neck scores 24 prototypes, the head expects 25"):
        build(dict(VIT.config, head=dict(type="DINOHead", out_channels=25)), rngs=nnx.Rngs(0))
    neck = {k: v for k, v in VIT.config["neck"].items() if k != "in_channels"}
    assert abstract(dict(VIT.config, neck=neck)).neck.in_channels == 16


def test_published_sizes():
    """The release's projection head of ViT-S/16: 22 million parameters, of which 65,536 lengths are fixed."""
    neck = abstract(dict(type="DINONeck", in_channels=384))
    count = sum(math.prod(v.shape) for _, v in nnx.state(neck, (nnx.Param, Frozen)).flat_state())
    assert count == 384 * 2048 + 2048 + 2048**2 + 2048 + 2048 * 256 + 256 + 256 * 65536 + 65536
