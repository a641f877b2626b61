"""Crops, turns and views made on the device: pixels of the host's, boxes distributed as the host's."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random
from sklearn.datasets import load_sample_images

from jaxpretrain.build import ConfigError
from jaxpretrain.data import device_crop, image_ops, transforms
from jaxpretrain.data.device import DevicePipeline, RandomRotate90, RandomRotation, sample_key
from jaxpretrain.data.device_crop import Box, CenterCrop, MAERandomResizedCrop, RandomResizedCrop, Resize
from jaxpretrain.data.device_geometry import quarter_turns
from jaxpretrain.data.pretext_transforms import RotationWithLabels
from jaxpretrain.data.random_rotation import RandomRotation as HostRotation

PHOTOS = load_sample_images().images
IMAGES = [
    np.ascontiguousarray(PHOTOS[0][100:172, 200:290]),
    np.ascontiguousarray(PHOTOS[1][200:272, 300:390]),
    np.random.default_rng(0).integers(0, 256, (72, 90, 3), np.uint8),
]
BOXES = [(0, 0, 72, 90), (3, 5, 60, 41), (40, 70, 32, 20), (10, 10, 5, 3), (71, 0, 1, 90), (20, 20, 24, 32)]
KEYS = random.split(random.key(1), 4000)


def plain(*steps: dict) -> DevicePipeline:
    return DevicePipeline(list(steps), [0, 0, 0], [1, 1, 1])


def batch(images: np.ndarray) -> dict:
    count = len(images)
    return dict(image=images, index=np.arange(count, dtype=np.int32), epoch=np.zeros(count, np.int32))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("backend", ["cv2", "pillow"])
def test_crop_is_the_hosts(backend, interpolation):
    crop = jax.jit(lambda image, box: device_crop.crop_and_resize(image, Box(*box), (32, 24), backend, interpolation))
    for box in BOXES:
        for image in IMAGES:
            part = np.ascontiguousarray(image_ops.crop(image, image_ops.Box(*box)))
            theirs = image_ops.resize(part, (32, 24), backend, interpolation).astype(float)
            off = np.abs(np.asarray(crop(image.astype(np.float32), np.float32(box))) - theirs)
            if interpolation == "bilinear" or backend == "cv2":
                assert off.max() <= 1, box
            else:  # the order of the axes, see device_crop.py; measured on noise: 3.2 %
                assert (off > 1).mean() < (0.05 if image is IMAGES[2] else 0.02), box
            assert off.mean() < 0.5


def boxes(draw, count: int = 4000) -> np.ndarray:
    return np.array([draw(np.random.default_rng(i)) for i in range(count)], float)


@pytest.mark.parametrize(
    ("size", "cfg"),
    [
        ((60, 80), dict(crop_ratio_range=(0.08, 1.0))),
        ((60, 60), dict(crop_ratio_range=(0.05, 0.14), aspect_ratio_range=(0.5, 2.0))),
        ((20, 200), dict(crop_ratio_range=(0.3, 1.0))),  # nothing fits: the central box
    ],
)
def test_boxes_are_distributed_as_the_hosts(size, cfg):
    host, ours = transforms.RandomResizedCrop(8, **cfg), RandomResizedCrop(8, **cfg)
    theirs = boxes(lambda rng: host.draw(rng, *size))
    drawn = np.stack(jax.jit(jax.vmap(lambda key: ours.draw(key, *size)))(KEYS), axis=1)
    assert_alike(drawn, theirs, size)


def test_mae_boxes_are_distributed_as_the_hosts():
    host, ours = transforms.MAERandomResizedCrop(8, (0.2, 1.0)), MAERandomResizedCrop(8, (0.2, 1.0), interpolation=3)
    theirs = boxes(lambda rng: host.draw(rng, 40, 90))
    assert_alike(np.stack(jax.jit(jax.vmap(lambda key: ours.draw(key, 40, 90)))(KEYS), axis=1), theirs, (40, 90))
    assert ours.interpolation == "bicubic" and ours.backend == "pillow"


def assert_alike(drawn: np.ndarray, theirs: np.ndarray, size: tuple[int, int]) -> None:
    assert np.array_equal(drawn, np.round(drawn)) and drawn.min() >= 0
    assert (drawn[:, 0] + drawn[:, 2]).max() <= size[0] and (drawn[:, 1] + drawn[:, 3]).max() <= size[1]
    error = np.sqrt((drawn.var(axis=0) + theirs.var(axis=0)) / len(theirs)) + 1e-6
    assert (np.abs(drawn.mean(axis=0) - theirs.mean(axis=0)) < 4 * error).all()
    np.testing.assert_allclose(drawn.std(axis=0), theirs.std(axis=0), rtol=0.06, atol=1e-6)
    if theirs.std(axis=0).min() > 0:
        np.testing.assert_allclose(np.corrcoef(drawn.T), np.corrcoef(theirs.T), atol=0.07)


def test_resize_and_central_crop_are_the_hosts():
    image = IMAGES[0]
    for ours, theirs in (
        (Resize((40, 30), backend="pillow"), transforms.Resize((40, 30), backend="pillow")),
        (Resize(40), transforms.Resize(40)),
        (CenterCrop((50, 31)), transforms.CenterCrop((50, 31))),
    ):
        np.testing.assert_allclose(ours(jnp.float32(image), random.key(0)), theirs.apply(image, None), atol=1)


# ---------------------------------------------------------------------------------------------------------------------
# Views

MULTI_CROP = dict(
    type="MultiView",
    num_views=[2, 3],
    transforms=[
        [
            dict(type="RandomResizedCrop", scale=16, crop_ratio_range=(0.14, 1.0), backend="pillow"),
            dict(type="RandomFlip", prob=0.5),
        ],
        [dict(type="RandomResizedCrop", scale=8, crop_ratio_range=(0.05, 0.14), backend="pillow")],
    ],
)


def test_views_are_cut_from_one_image():
    run, images = plain(MULTI_CROP), np.stack([image[:64, :64] for image in IMAGES])
    views = jax.jit(run)(batch(images), random.key(0))["image"]
    assert [view.shape for view in views] == [(3, 16, 16, 3)] * 2 + [(3, 8, 8, 3)] * 3
    assert np.abs(views[0] - views[1]).mean() > 1 and np.abs(views[2] - views[3]).mean() > 1
    # View 1 of sample 2, by hand.
    key = random.fold_in(sample_key(random.key(0), 0, 2), 1)
    expected = images[2].astype(np.float32)
    for i, transform in enumerate(run.transforms[0].views[1]):
        expected = transform(expected, random.fold_in(key, i))
    np.testing.assert_allclose(views[1][2], expected, atol=1e-3)


def test_views_that_crop_nothing_are_made_on_the_host():
    views = dict(type="MultiView", num_views=2, transforms=[[dict(type="RandomFlip", prob=0.5)]])
    with pytest.raises(ConfigError, match="has a RandomResizedCrop, and `pipeline` makes none"):
        plain(views)(batch(np.zeros((2, 8, 8, 3), np.uint8)), random.key(0))


def test_views_of_the_host_may_be_cropped_again():
    two = dict(type="MultiView", num_views=2, transforms=[[dict(type="RandomResizedCrop", scale=4)]])
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 8, 8, 3), np.uint8)
    views = plain(two)(dict(batch(images[0]), image=tuple(images)), random.key(0))["image"]
    assert [view.shape for view in views] == [(3, 4, 4, 3)] * 2


# ---------------------------------------------------------------------------------------------------------------------
# Turns


def test_rotation_with_labels_is_the_hosts():
    images = np.stack([image[:24, :24] for image in IMAGES])
    flip = dict(type="RandomFlip", prob=0.5)  # all four views of a sample alike, also without a copy on the host
    views = plain(flip, dict(type="RotationWithLabels"))(batch(images), random.key(0))["image"]
    assert len(views) == 4
    for i in range(3):
        theirs = RotationWithLabels()({"image": np.asarray(views[0][i])}, np.random.default_rng(0))["image"]
        for ours, expected in zip(views, theirs, strict=True):
            np.testing.assert_array_equal(ours[i], expected)
    flipped = [not np.array_equal(views[0][i], images[i]) for i in range(3)]
    assert all(np.array_equal(views[0][i], images[i, :, ::-1] if f else images[i]) for i, f in enumerate(flipped))


def test_turns_of_a_batch():
    images = np.stack([IMAGES[0][:16, :16]] * 4)
    turned = jax.jit(jax.vmap(quarter_turns))(images, jnp.arange(4))
    for k in range(4):
        np.testing.assert_array_equal(turned[k], np.rot90(images[k], -k))


def test_random_right_angles():
    corner = jnp.arange(12.0).reshape(2, 2, 3)
    for prob, turns, expected in (
        (1.0, (0, 1, 2, 3), (0.25, 0.25, 0.25, 0.25)),
        (0.5, (1, 3), (0.5, 0.25, 0, 0.25)),
    ):
        turn = RandomRotate90(prob, turns)
        first = np.asarray(jax.jit(jax.vmap(lambda key, turn=turn: turn(corner, key)[0, 0, 0]))(KEYS))
        shares = [(first == value).mean() for value in (0, 6, 9, 3)]  # by 0, 90, 180, 270 degrees
        assert np.abs(np.array(shares) - expected).max() < 4 * 0.5 / np.sqrt(4000)


def test_rotation_is_pillows():
    turn, host = jax.jit(RandomRotation(30).apply), HostRotation(30)
    for image in IMAGES:
        for angle in (-30.0, -1.7, 0.0, 12.3):
            host.range = (angle, angle)
            theirs = host({"image": image}, np.random.default_rng(0))["image"]
            off = np.asarray(turn(jnp.float32(image), angle)) != theirs
            # Pillow's places have 16 bits after the point: a pixel halfway between two may come from the other one.
            assert off.any(axis=-1).mean() < 2e-3
    angles = jax.vmap(lambda key: random.uniform(key, (), jnp.float32, -2, 2))(KEYS)
    assert RandomRotation(2).low == -2 and angles.min() < -1.99


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (dict(type="RandomResizedCrop", scale=0), "positive number"),
        (dict(type="RandomResizedCrop", scale=8, crop_ratio_range=(1.0, 0.1)), "must be ascending and positive"),
        (dict(type="RandomResizedCrop", scale=8, interpolation="area"), "does not run on the device"),
        (dict(type="RandomResizedCrop", scale=8, interpolation="bilinea"), "Did you mean 'bilinear'"),
        (dict(type="RandomResizedCrop", scale=8, backend="torch"), "no backend 'torch'"),
        (dict(type="RandomRotate90", turns=(1, 4)), "must be some of 0, 1, 2, 3"),
        (dict(type="RandomRotation", degrees=3, interpolation="bicubic"), "must be 'nearest'"),
    ],
)
def test_mistakes_are_named(cfg, message):
    with pytest.raises(ConfigError) as error:
        plain(cfg)
    assert message in str(error.value)


def test_shapes_that_do_not_fit_are_named():
    images = np.zeros((1, 8, 10, 3), np.uint8)
    with pytest.raises(ConfigError, match="is larger than images of 10x8"):
        plain(dict(type="CenterCrop", crop_size=9))(batch(images), random.key(0))
    with pytest.raises(ConfigError, match="square images, not of 8x10"):
        plain(dict(type="RandomRotate90"))(batch(images), random.key(0))
