"""I-JEPA: block masks, the loss against NumPy, the slow copy, schedules, and the release's files."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxpretrain.build import ConfigError, abstract, build
from jaxpretrain.config import load_config, to_plain
from jaxpretrain.interop import export, load_weights
from jaxpretrain.interop import mmpretrain as hub
from jaxpretrain.methods.base import Progress, draw_key
from jaxpretrain.methods.ijepa import IJEPA, BlockMasks, Places
from jaxpretrain.models.layers import Frozen
from jaxpretrain.optim.schedules import weight_decays
from jaxpretrain.train_state import make_method
from tests import numpy_vit as reference
from tests.method_cases.base import VIT, make
from tests.method_cases.latent import IJEPA as CONFIG


@pytest.fixture(scope="module")
def method() -> IJEPA:
    method = make(CONFIG)
    # Another teacher than the student, and weights that are not small.
    for _, variable in nnx.state(method, (nnx.Param, Frozen)).flat_state():
        noise = jax.random.normal(jax.random.key(variable.size % 97), variable.shape)
        variable.set_value(variable[...] + 0.1 * noise)
    for _, variable in nnx.state(method.target_encoder, Frozen).flat_state():
        variable.set_value(variable[...] * 1.1)
    return method


@pytest.fixture(scope="module")
def images() -> jax.Array:
    return jax.random.normal(jax.random.key(3), (3, 16, 16, 3))


# Masks


@pytest.fixture(scope="module")
def drawn() -> tuple[BlockMasks, Places, Places]:
    masks = BlockMasks()
    context, targets = jax.jit(masks, static_argnums=(1, 2))(jax.random.key(0), 1000, (14, 14))
    return masks, jax.tree.map(np.asarray, context), jax.tree.map(np.asarray, targets)


def test_targets_are_blocks_of_the_size_that_the_paper_says(drawn):
    _, _, targets = drawn
    assert targets.patch.shape == targets.filled.shape == (1000, 4, 45)
    heights, widths = [], []
    for patch, filled in zip(targets.patch.reshape(4000, -1), targets.filled.reshape(4000, -1), strict=True):
        rows, columns = np.divmod(patch[filled], 14)
        height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
        assert len(set(patch[filled])) == filled.sum() == height * width  # a whole rectangle, none of it cut
        heights.append(height)
        widths.append(width)
    area, aspect = np.multiply(heights, widths) / 196, np.divide(heights, widths)
    assert 0.12 < area.min() < 0.15 and 0.2 < area.max() < 0.23  # sides are rounded
    assert area.mean() == pytest.approx(0.175, abs=0.005)
    assert 0.5 < aspect.min() < 0.8 and 1.3 < aspect.max() < 1.9
    assert aspect.mean() == pytest.approx(1.125, abs=0.05)
    counts = np.bincount(targets.patch[targets.filled], minlength=196).reshape(14, 14)
    assert counts.min() > 0  # corners too
    assert counts[4:10, 4:10].mean() > 2 * counts[[0, 0, -1, -1], [0, -1, 0, -1]].mean()  # for blocks must fit
    np.testing.assert_allclose(counts, counts[::-1], atol=0.15 * counts.max())


def test_context_is_one_block_without_the_targets(drawn):
    masks, context, targets = drawn
    assert masks.sizes((14, 14)) == (98, 45)
    assert context.patch.shape == (1000, 98)
    sizes = context.filled.sum(axis=1)
    for i in range(1000):
        seen = context.patch[i][context.filled[i]]
        asked = targets.patch[i][targets.filled[i]]
        assert len(set(seen)) == len(seen)
        assert not set(seen) & set(asked)
        if sizes[i] < 98:  # all that is left of a block of 12 to 14 patches each way
            left = set(range(196)) - set(asked)
            rows, columns = np.divmod(sorted(seen), 14)
            inside = {
                p for p in left if rows.min() <= p // 14 <= rows.max() and columns.min() <= p % 14 <= columns.max()
            }
            assert set(seen) == inside
            assert np.ptp(rows) + 1 >= 12 or len(asked) > 100
    assert 75 < sizes.mean() < 95
    assert (sizes == 98).mean() < 0.4  # of these, some patches are left out
    assert sizes.min() >= 10


def test_too_small_a_context_is_filled_up():
    masks = BlockMasks(context_scale=(0.01, 0.01), min_keep=7)
    context, targets = masks(jax.random.key(1), 50, (8, 8))
    sizes = context.filled.sum(axis=1)
    assert (sizes == 7).all()
    for i in range(50):
        seen = set(np.asarray(context.patch[i][context.filled[i]]).tolist())
        assert not seen & set(np.asarray(targets.patch[i][targets.filled[i]]).tolist())


def test_masks_differ_between_images_and_keys(drawn):
    masks, context, targets = drawn
    assert (targets.patch[0] != targets.patch[1]).any()
    assert (targets.patch[0, 0] != targets.patch[0, 1]).any()
    again, other = masks(jax.random.key(0), 1000, (14, 14))[0], masks(jax.random.key(1), 1000, (14, 14))[0]
    assert (again.patch == context.patch).all()
    assert (other.patch != context.patch).any()


@pytest.mark.parametrize("scale", [(0.15, 0.2), (0.05, 0.5), (0.3, 1.0)])
@pytest.mark.parametrize("grid", [(4, 4), (14, 14), (8, 5)])
def test_no_target_is_cut(grid, scale):
    masks = BlockMasks(target_scale=scale)
    blocks = masks.blocks(jax.random.key(0), (3000,), grid, scale, masks.target_aspect)
    assert int(blocks.sum(axis=1).max()) <= masks.sizes(grid)[1]
    assert int(blocks.sum(axis=1).min()) >= 1


# Loss


def numpy_loss(method: IJEPA, images: np.ndarray, context: Places, targets: Places) -> float:
    """Section 3, image by image and block by block, without empty places."""
    student, teacher, predictor = method.backbone, method.target_encoder.module[0], method.neck
    errors = []
    for i, image in enumerate(np.asarray(images, np.float64)):
        x = reference.patch_tokens(image, teacher)
        for layer in teacher.layers:
            x = reference.pre_norm_block(x, layer)
        target = reference.standardized(reference.layer_norm(x, teacher.ln1), -1)

        seen = np.asarray(context.patch[i])[np.asarray(context.filled[i])]
        x = reference.patch_tokens(image, student)[seen]
        for layer in student.layers:
            x = reference.pre_norm_block(x, layer)
        x = reference.layer_norm(x, student.ln1)
        positions = reference.array(predictor.predictor_pos_embed)[0]
        x = reference.linear(x, predictor.predictor_embed) + positions[seen]
        for b in range(targets.patch.shape[1]):
            asked = np.asarray(targets.patch[i, b])[np.asarray(targets.filled[i, b])]
            y = np.concatenate([x, reference.array(predictor.mask_token)[0] + positions[asked]])
            for layer in predictor.predictor_blocks:
                y = reference.pre_norm_block(y, layer)
            y = reference.linear(reference.layer_norm(y[len(x) :], predictor.predictor_norm), predictor.predictor_proj)
            difference = np.abs(y - target[asked])
            errors.append(np.where(difference < 1, difference**2 / 2, difference - 0.5))
    return float(np.concatenate(errors).mean())


def test_loss_by_hand(method, images):
    method.masks.context_scale, method.masks.min_keep = (0.2, 0.6), 2
    loss, metrics = jax.jit(lambda m, x: m.loss({"image": x}, rngs=nnx.Rngs(0)))(method, images)
    context, targets = method.masks(draw_key(nnx.Rngs(0), "mask"), 3, (4, 4))
    assert not context.filled.all() and not targets.filled.all()  # there are empty places
    assert loss == pytest.approx(numpy_loss(method, images, context, targets), rel=1e-5)
    tokens = np.asarray(method.target_encoder(images)[-1], np.float64).mean(axis=1)
    units = tokens / np.linalg.norm(tokens, axis=1, keepdims=True)
    assert metrics["feature_std"] == pytest.approx(units.std(axis=0).mean() * 4, rel=1e-4)


def test_scanned_layers_are_the_same(images):
    method = make(CONFIG | dict(backbone=dict(CONFIG["backbone"], layer_cfgs=dict(drop_rate=0.0))))
    losses = []
    for scan in (False, True):
        method.set_attributes(scan_layers=scan, remat="full" if scan else "none", raise_if_not_found=False)
        losses.append(float(jax.jit(lambda m, x: m.loss({"image": x}, rngs=nnx.Rngs(0))[0])(method, images)))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_only_student_and_predictor_learn(method):
    learning = {path[0] for path, _ in nnx.state(method, nnx.Param).flat_state()}
    assert learning == {"backbone", "neck"}
    assert isinstance(method.backbone.pos_embed, Frozen)
    assert isinstance(method.neck.predictor_pos_embed, Frozen)


def test_targets_are_not_noisy():
    method = build(
        CONFIG | dict(backbone=dict(CONFIG["backbone"], drop_path_rate=0.5, drop_rate=0.5)), rngs=nnx.Rngs(0)
    )
    x = jnp.ones((2, 16, 16, 3))
    np.testing.assert_array_equal(method.teacher(x)[-1], method.teacher(x)[-1])
    assert method.backbone.layers[1].drop_path_rate == 0.5


# The slow copy


def test_teacher_follows_on_a_straight_line():
    method = make(CONFIG)
    momentum = [float(method.teacher_momentum(Progress(jnp.int32(s), 10))) for s in (1, 6, 10)]
    np.testing.assert_allclose(momentum, [0.004, 0.002, 0.0004], rtol=1e-3)
    start = {p: np.asarray(v[...]) for p, v in nnx.state(method.backbone, nnx.Param).flat_state()}
    for _, variable in nnx.state(method.backbone, nnx.Param).flat_state():
        variable.set_value(variable[...] + 1)
    method.after_step(Progress(jnp.int32(6), 10))
    copy = dict(nnx.state(method.target_encoder.module[0], Frozen).flat_state())
    for path, value in start.items():
        np.testing.assert_allclose(copy[path][...], value + 0.002, atol=1e-6)
    assert method.target_encoder.steps == 6


def test_features_are_the_slow_copys(method, images):
    tokens = method.target_encoder(images)[-1]
    np.testing.assert_allclose(method.features(images), tokens.mean(axis=1), atol=1e-6)


def test_reconstruct(method, images):
    made = method.reconstruct(images.astype(jnp.bfloat16), rngs=nnx.Rngs(0))
    assert -1 <= made.pop("agreement") <= 1
    assert {name: x.shape for name, x in made.items()} == dict(
        masked=(3, 16, 16, 3), reconstructed=(3, 16, 16, 3), pasted=(3, 16, 16, 3), mask=(3, 16, 16, 1)
    )
    assert all(x.dtype == jnp.float32 for x in made.values())
    context, _ = method.masks(draw_key(nnx.Rngs(0), "mask"), 3, (4, 4))
    np.testing.assert_array_equal((1 - made["mask"]).sum(axis=(1, 2, 3)) / 16, context.filled.sum(axis=1))
    np.testing.assert_array_equal(made["masked"], jnp.where(made["mask"] > 0, 0, images.astype(jnp.bfloat16)))
    assert jnp.abs(made["reconstructed"]).max() <= 2.001


# Recipes


@pytest.mark.parametrize(
    ("name", "width", "layers", "patch_size"),
    [
        ("ijepa_vit-base-p16_600e_in1k", 768, 12, 16),
        ("ijepa_vit-large-p16_600e_in1k", 1024, 24, 16),
        ("ijepa_vit-huge-p14_300e_in1k", 1280, 32, 14),
        ("ijepa_vit-huge-p16_300e_in1k-448px", 1280, 32, 16),
    ],
)
def test_recipes(name, width, layers, patch_size):
    config = load_config(f"configs/ijepa.py:{name}")
    method = make_method(config)
    encoder = sum(x.size for x in jax.tree.leaves(nnx.state(method.backbone, nnx.Param)))
    patches, block, norm = (3 * patch_size**2 + 1) * width, 12 * width**2 + 13 * width, 2 * width
    assert encoder == patches + layers * block + norm
    assert method.masks.num_targets == 4
    decays = weight_decays(to_plain(config.param_scheduler), 0.04, 2 * config.max_epochs, 2)
    assert decays[0] == pytest.approx(0.04)
    assert decays[config.max_epochs] == pytest.approx(0.22, abs=2e-3)
    assert decays[-1] == pytest.approx(0.4, abs=1e-4)
    assert (np.diff(decays) > 0).all()


# The release's files


def release(method: IJEPA) -> dict[str, dict[str, np.ndarray]]:
    state: dict[str, dict[str, np.ndarray]] = {}
    for name, array in export(method, "ijepa").items():
        network, _, rest = name.partition(".")
        state.setdefault(network, {})[rest] = array
    return state


def test_release_names(method):
    state = release(method)
    assert state.keys() == {"encoder", "predictor", "target_encoder"}
    assert all(name.startswith("module.") for names in state.values() for name in names)
    assert {"module.pos_embed", "module.patch_embed.proj.weight", "module.norm.bias"} <= state["encoder"].keys()
    assert "module.blocks.1.mlp.fc2.weight" in state["target_encoder"]
    assert {"module.mask_token", "module.predictor_pos_embed", "module.predictor_proj.bias"} <= state[
        "predictor"
    ].keys()
    assert "module.predictor_blocks.0.attn.qkv.weight" in state["predictor"]


def test_release_files(method, tmp_path):
    torch = pytest.importorskip("torch")
    file = {k: {n: torch.from_numpy(a.copy()) for n, a in v.items()} for k, v in release(method).items()}
    torch.save(file | dict(opt={}, epoch=3, loss=0.1), tmp_path / "ijepa.pth.tar")

    whole = abstract(CONFIG)
    assert load_weights(whole, tmp_path / "ijepa.pth.tar", key="*").layout == "ijepa"
    theirs, ours = hub.to_state_dict(method), hub.to_state_dict(whole)
    assert ours.keys() == theirs.keys()
    for name in ours.keys() - {"target_encoder.steps"}:
        np.testing.assert_array_equal(ours[name], theirs[name])

    plain: dict[str, Any] = dict(type="VisionTransformer", with_cls_token=False, out_type="raw", **VIT)
    for kind in (dict(type="IJEPAViT", **VIT), plain):
        for key, wanted in ((None, method.target_encoder.module[0]), ("encoder", method.backbone)):
            encoder = abstract(kind)
            load_weights(encoder, tmp_path / "ijepa.pth.tar", key=key)
            np.testing.assert_array_equal(encoder.layers[1].ffn.fc1.kernel[...], wanted.layers[1].ffn.fc1.kernel[...])
            np.testing.assert_array_equal(encoder.pos_embed[...], wanted.pos_embed[...])


def test_round_trip_through_mmpretrains_layout(method):
    state = hub.to_state_dict(method)
    assert "target_encoder.module.0.layers.0.attn.qkv.weight" in state
    other = abstract(CONFIG)
    load_weights(other, state)
    for name, array in hub.to_state_dict(other).items():
        np.testing.assert_array_equal(array, state[name])


# Mistakes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(neck=dict(CONFIG["neck"], num_patches=9)), r"neck.num_patches \(3, 3\) is not the backbone's"),
        (dict(neck=dict(CONFIG["neck"], num_patches=10)), "num_patches=10 is no square"),
        (dict(backbone=dict(CONFIG["backbone"], out_type="avg_featmap")), "out_type='avg_featmap' must be 'raw'"),
        (dict(masks=dict(target_scale=(0.3, 0.2))), "target_scale"),
        (dict(masks=dict(target_aspect=(2.0, 1.0))), "target_aspect"),
        (dict(masks=dict(num_targets=0)), "num_targets=0"),
    ],
)
def test_mistakes(change, message):
    with pytest.raises(ConfigError, match=message):
        abstract(CONFIG | change)


def test_needs_a_key_and_images_of_its_size(method, images):
    with pytest.raises(ValueError, match="call it with rngs"):
        method.loss({"image": images})
    with pytest.raises(ValueError, match="for 4x4 patches, and got 64"):
        method.loss({"image": jnp.zeros((2, 32, 32, 3))}, rngs=nnx.Rngs(0))
