"""Mixup, CutMix, ResizeMix: values against MMPretrain's, distributions, labels that fit pixels, sharding, errors."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict
from scipy import stats

from jaxpretrain.build import ConfigError
from jaxpretrain.data.batch_augments import (
    Box,
    CutMix,
    Mixup,
    RandomBatchAugment,
    ResizeMix,
    clipped_box,
)
from tests.parity import load_golden

GOLDEN = load_golden("batch_augments")
PERMUTATION = jnp.array(GOLDEN["perm"])
IMAGES = np.array(GOLDEN["inputs"], np.float32).reshape(GOLDEN["inputs_shape"]).transpose(0, 2, 3, 1)
ONE_HOT = np.eye(GOLDEN["num_classes"], dtype=np.float32)[GOLDEN["labels"]]
SOFT = np.array(GOLDEN["soft_scores"], np.float32)
KEYS = random.split(random.key(0), 4000)

# Images of one colour, their number, with one class each: shows who was mixed with whom, and how much.
NUMBERED = jnp.broadcast_to(jnp.arange(16.0)[:, None, None, None], (16, 20, 24, 3))
NUMBERS = jnp.eye(16)

KINDS = {"Mixup": Mixup, "CutMix": CutMix, "ResizeMix": ResizeMix}


@pytest.mark.parametrize("name", GOLDEN["cases"])
def test_equals_the_reference(name):
    case = GOLDEN["cases"][name]
    config, draws = dict(case["config"]), case["randint_draws"]
    augment = KINDS[config.pop("type")](**config)
    lam = case["beta_draw"]
    if isinstance(augment, ResizeMix):
        lam = augment.lam_min + (augment.lam_max - augment.lam_min) * lam
    args = [lam]
    if len(draws) == 2:
        args.append(clipped_box(lam, *draws, *IMAGES.shape[1:3]))
    elif draws:
        cut_height, cut_width, top, left = draws
        args.append(Box(*map(jnp.int32, (top, top + cut_height, left, left + cut_width))))
    labels = SOFT if case["labels"] == "soft_scores" else ONE_HOT
    images, labels = augment.mix(IMAGES, labels, PERMUTATION, *args)
    expected = np.array(case["mixed_inputs"]).reshape(GOLDEN["inputs_shape"]).transpose(0, 2, 3, 1)
    assert np.abs(images - expected).max() < 1e-6 * np.abs(expected).max()
    np.testing.assert_allclose(labels, case["mixed_scores"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("case", GOLDEN["cutmix_boxes"])
def test_boxes_equal_the_reference(case):
    height, width = case["image"]
    box = clipped_box(case["lam"], case["cy"], case["cx"], height, width)
    assert [int(v) for v in box] == case["box_y1_y2_x1_x2"]
    assert float(1 - box.area() / (height * width)) == pytest.approx(case["corrected_lam"], abs=1e-6)
    assert int(box.mask(height, width).sum()) == int(box.area())


@pytest.mark.parametrize("alpha", [0.1, 0.8])
def test_lambda_is_beta(alpha):
    draws = np.asarray(jax.jit(jax.vmap(Mixup(alpha).draw_lam))(KEYS))
    assert draws.min() >= 0 and draws.max() <= 1
    # Not Kolmogorov-Smirnov: at alpha 0.1 a tenth of the draws are nearer to 1 than float32 resolves, and become 1.
    for value in (1e-4, 1e-2, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99):
        share = stats.beta(alpha, alpha).cdf(value)
        assert abs((draws <= value).mean() - share) < 4 * np.sqrt(share * (1 - share) / 4000), value
    small = ResizeMix(alpha, lam_min=0.3, lam_max=0.6)
    assert float(small.draw_lam(KEYS[7])) == pytest.approx(0.3 + 0.3 * draws[7], abs=1e-6)


def test_boxes_are_spread_evenly():
    height, width, lam = 20, 24, 0.75
    boxes = jax.jit(jax.vmap(lambda key: CutMix(1.0).draw_box(key, lam, height, width)))(KEYS)
    covered = np.asarray(jax.vmap(lambda box: box.mask(height, width))(boxes)).mean(axis=0)

    def near(size: int) -> np.ndarray:
        """For each pixel of a row, the share of the places of a centre whose box, half the size, covers it."""
        pixel, half = np.arange(size), size // 4
        return (np.minimum(pixel + half, size - 1) - np.maximum(pixel - half + 1, 0) + 1) / size

    np.testing.assert_allclose(covered, np.outer(near(height), near(width)), atol=5 * 0.5 / np.sqrt(4000))


def test_boxes_by_minmax():
    height, width = 20, 30
    augment = CutMix(1.0, cutmix_minmax=[0.2, 0.8])
    boxes = jax.jit(jax.vmap(lambda key: augment.draw_box(key, 0.5, height, width)))(KEYS)
    for low, high, size in ((boxes.top, boxes.bottom, height), (boxes.left, boxes.right, width)):
        sides = np.asarray(high - low)
        assert low.min() == 0 and high.max() == size - 1  # the reference never draws the last place either
        values, counts = np.unique(sides, return_counts=True)
        np.testing.assert_array_equal(values, np.arange(int(0.2 * size), int(0.8 * size)))
        assert stats.chisquare(counts).pvalue > 1e-3
        expected = (size - sides - 1) / 2  # of evenly drawn places
        assert abs(((low - expected) / (size - sides)).mean()) < 4 * 0.3 / np.sqrt(4000)


@pytest.mark.parametrize("config", [dict(alpha=1.0), dict(alpha=1.0, cutmix_minmax=[0.2, 0.8])])
def test_cutmix_labels_are_the_shares_of_pixels(config):
    augment = jax.jit(CutMix(**config))
    partners = set()
    for seed in range(8):
        images, labels = augment(NUMBERED, NUMBERS, random.key(seed))
        for i, image in enumerate(np.asarray(images)):
            shares = np.bincount(image[..., 0].astype(int).ravel(), minlength=16) / image[..., 0].size
            np.testing.assert_allclose(labels[i], shares, atol=1e-6)
            partners.add((i, int(np.argmax(np.where(np.arange(16) == i, -1, shares)))))
    assert len(partners) > 60  # a new permutation each time


def test_mixup_mixes_images_and_labels_alike():
    augment = jax.jit(Mixup(0.8))
    images, labels = augment(NUMBERED, NUMBERS, random.key(3))
    np.testing.assert_allclose(images[:, 0, 0, 0], labels @ jnp.arange(16.0), rtol=1e-5)
    np.testing.assert_allclose(labels.sum(axis=0), np.ones(16), atol=1e-6)  # everyone is someone's partner
    weights = np.unique(np.round(np.asarray(labels), 5))
    assert len(weights) <= 4  # 0, lam, 1 - lam, and 1 where an image meets itself: one lambda for the batch


def test_resizemix_shows_the_whole_image():
    ramp = jnp.broadcast_to(jnp.linspace(0, 1, 24)[None, None, :, None], (2, 20, 24, 3)) + jnp.array([0, 10.0]).reshape(
        2, 1, 1, 1
    )
    box = Box(*map(jnp.int32, (4, 14, 6, 18)))
    images, labels = ResizeMix(1.0).mix(ramp, jnp.eye(2), jnp.array([1, 0]), 0.5, box)
    patch = np.asarray(images[0, 4:14, 6:18, 0]) - 10
    np.testing.assert_allclose(patch, np.broadcast_to((np.arange(12) * 2 + 0.5) / 23, (10, 12)), atol=1e-5)
    np.testing.assert_allclose(labels[0], [0.75, 0.25])
    empty = Box(*map(jnp.int32, (0, 0, 5, 5)))
    np.testing.assert_array_equal(ResizeMix(1.0).mix(ramp, jnp.eye(2), jnp.array([1, 0]), 0.5, empty)[0], ramp)


def test_bfloat16_stays():
    for config in (dict(type="Mixup", alpha=0.8), dict(type="CutMix", alpha=1.0), dict(type="ResizeMix", alpha=1.0)):
        augment = KINDS[config.pop("type")](**config)
        images, labels = augment(NUMBERED.astype(jnp.bfloat16), NUMBERS, random.key(0))
        assert images.dtype == jnp.bfloat16 and labels.dtype == jnp.float32


# ---------------------------------------------------------------------------------------------------------------------
# The choice among several


def marked(value: float):
    """An augmentation that is recognised by its result."""
    return lambda images, labels, key: (jnp.full_like(images, value), labels)


@pytest.mark.parametrize(
    ("probs", "shares"), [([0.5, 0.3], (0.2, 0.5, 0.3)), (None, (0, 0.5, 0.5)), ([0.0, 1.0], (0, 0, 1))]
)
def test_one_is_drawn_per_batch(probs, shares):
    augment = RandomBatchAugment([marked(1.0), marked(2.0)], probs)
    images, labels = jnp.zeros((2, 1, 1, 1)), jnp.eye(2)
    values = np.asarray(jax.jit(jax.vmap(lambda key: augment(images, labels, key)[0][:, 0, 0, 0]))(KEYS))
    np.testing.assert_array_equal(values[:, 0], values[:, 1])
    for value, share in enumerate(shares):
        assert abs((values[:, 0] == value).mean() - share) < 4 * np.sqrt(share * (1 - share) / 4000) + 1e-9


def test_forms_of_the_configuration():
    cutmix = dict(type="CutMix", alpha=1.0)
    expected = RandomBatchAugment([cutmix])(NUMBERED, NUMBERS, random.key(2))
    assert float(expected[1].max(axis=1).min()) < 1
    for form, probs in (
        (cutmix, None),
        (ConfigDict(cutmix), 1.0),
        (ConfigDict(dict(augments=[cutmix])).augments, [1.0]),
        (CutMix(1.0), None),
    ):
        for ours, theirs in zip(
            RandomBatchAugment(form, probs)(NUMBERED, NUMBERS, random.key(2)), expected, strict=True
        ):
            np.testing.assert_array_equal(ours, theirs)
    images, labels = RandomBatchAugment(cutmix, probs=0.0)(NUMBERED, NUMBERS, random.key(2))
    np.testing.assert_array_equal(images, NUMBERED)
    np.testing.assert_array_equal(labels, NUMBERS)


def test_devices_change_nothing():
    augment = jax.jit(RandomBatchAugment([dict(type="Mixup", alpha=0.8), dict(type="CutMix", alpha=1.0)], [0.45, 0.45]))
    images = random.normal(random.key(9), (16, 8, 8, 3))
    mesh = Mesh(np.array(jax.devices()[:8]), ("data",))
    split, everywhere = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    changed = []
    for seed in range(6):
        alone = jax.tree.map(np.asarray, augment(images, NUMBERS, random.key(seed)))
        spread = augment(
            jax.device_put(images, split), jax.device_put(NUMBERS, split), jax.device_put(random.key(seed), everywhere)
        )
        for a, b in zip(alone, spread, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)
        changed.append(not np.array_equal(alone[0], images))
    assert any(changed)


@pytest.mark.parametrize(
    ("augments", "probs", "message"),
    [
        (dict(type="MixUp", alpha=0.8), None, "Did you mean 'Mixup'"),
        (dict(type="Mixup", alpah=0.8), None, "no argument 'alpah'. Did you mean 'alpha'"),
        (dict(type="Mixup"), None, "Mixup needs alpha"),
        (dict(type="Mixup", alpha=0), None, "Mixup: alpha must be a number > 0"),
        (dict(type="CutMix", alpha=1.0, cutmix_minmax=[0.8, 0.2]), None, "cutmix_minmax must be (low, high)"),
        (dict(type="Mixup", alpha=0.8), [0.5, 0.5], "probs must be 1 numbers"),
        ([dict(type="Mixup", alpha=0.8), dict(type="CutMix", alpha=1.0)], [0.7, 0.7], "at most 1 in sum"),
        ([], None, "no augmentation"),
    ],
)
def test_mistakes_in_the_configuration(augments, probs, message):
    with pytest.raises(ConfigError) as error:
        RandomBatchAugment(augments, probs)
    assert message in str(error.value)


def test_resizemix_only_bilinear():
    with pytest.raises(ConfigError, match="must be 'bilinear'"):
        ResizeMix(1.0, interpolation="bicubic")
