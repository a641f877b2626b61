"""Colour on the host: which channels arguments mean, orders, agreement with the device, errors. Pixels: test_host_golden.py."""

from __future__ import annotations

import pickle
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxpretrain.build import ConfigError
from jaxpretrain.data import device_colour
from jaxpretrain.data.augment_operations import OPERATIONS, GaussianBlur
from jaxpretrain.data.colour_transforms import ColorJitter, Jitter, Lighting, RandomGrayscale, RandomSolarize
from jaxpretrain.data.host_transforms import TRANSFORMS, build_pipeline, host_transform

from .test_host_golden import SMALL

EIGVEC = [[-0.5836, -0.6948, 0.4203], [-0.5808, -0.0045, -0.814], [-0.5675, 0.7192, 0.4009]]
EIGVAL = [55.4625, 4.794, 1.1475]
RED = np.full((4, 4, 3), (200, 0, 0), np.uint8)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def apply(step: Any, image: np.ndarray = SMALL, seed: int = 0) -> Any:
    return build_pipeline([step])({"image": image}, rng(seed))["image"]


def test_the_order_counts() -> None:
    jitter = ColorJitter(0.4, 0.4, 0.4, 0.1)
    one = jitter.apply(SMALL, Jitter((0, 1, 2, 3), 1.4, 0.6, 1.3, 0.05))
    other = jitter.apply(SMALL, Jitter((1, 0, 2, 3), 1.4, 0.6, 1.3, 0.05))
    assert (one != other).any()
    by_hand = SMALL
    for number, factor in ((2, 1.3), (0, 1.4)):
        factors: list[Any] = [None] * 4
        factors[number] = factor
        by_hand = jitter.apply(by_hand, Jitter((0, 1, 2, 3), *factors))
    assert (jitter.apply(SMALL, Jitter((2, 3, 0, 1), 1.4, None, 1.3, None)) == by_hand).all()


def test_jitter_of_nothing_changes_nothing() -> None:
    assert (apply(dict(type="ColorJitter")) == SMALL).all()
    drawn = ColorJitter(hue=0.1).draw(rng(), 1, 1)
    assert drawn[1:4] == (None, None, None) and abs(drawn.hue) <= 0.1


def test_backends_agree_within_few_levels() -> None:
    pinned = Jitter((3, 1, 2, 0), 0.8, 1.25, 0.6, -0.1)
    by_pillow, by_opencv = (ColorJitter(backend=name).apply(SMALL, pinned).astype(int) for name in ("pillow", "cv2"))
    assert np.abs(by_pillow - by_opencv).mean() < 2


@pytest.mark.parametrize(
    "pinned", [Jitter((0, 1, 2, 3), 1.3, 0.7, 1.2, 0.08), Jitter((3, 2, 1, 0), 0.7, 1.3, 0.5, -0.2)]
)
def test_jitter_is_the_device_s(pinned: Jitter) -> None:
    ours = ColorJitter().apply(SMALL, pinned).astype(int)
    theirs = np.asarray(device_colour.color_jitter(jnp.float32(SMALL), jnp.array(pinned.order), *pinned[1:])).astype(
        int
    )
    assert (np.abs(ours - theirs) > 1).mean() < 2e-3  # single pixels on the other side of a step of the hue


def test_grayscale_and_solarize_are_the_device_s() -> None:
    weights = (0.114, 0.587, 0.2989)
    grey = apply(dict(type="RandomGrayscale", prob=1.0, keep_channels=True, channel_weights=weights))
    theirs = np.asarray(device_colour.grayscale(jnp.float32(SMALL), weights[::-1]))
    assert (np.abs(grey - theirs) < 1).all()
    solarized = apply(dict(type="RandomSolarize", threshold=100, prob=1.0))
    assert (solarized == np.asarray(device_colour.solarize(jnp.float32(SMALL), 100))).all()
    assert (solarized == apply(dict(type="Solarize", thr=100, prob=1.0))).all()


def test_grayscale_reads_the_order_of_its_weights() -> None:
    for weights, order in (((0, 0, 1), "bgr"), ((1, 0, 0), "rgb")):
        grey = RandomGrayscale(1.0, True, weights, order).apply(RED, True)
        assert grey.shape == RED.shape and (grey == 200).all()
    assert (RandomGrayscale(1.0, True, (0, 0, 1), "rgb").apply(RED, True) == 0).all()


def test_lighting_reads_the_order_of_its_rows() -> None:
    rows = [[0.0, 0, 0], [0, 0, 0], [1, 0, 0]]  # the last channel alone: red of B, G, R, blue of R, G, B
    image, alpha = np.full((1, 1, 3), 100, np.uint8), np.array([0.5, 0, 0])
    assert Lighting([10, 1, 1], rows).apply(image, alpha).tolist() == [[[105, 100, 100]]]
    assert Lighting([10, 1, 1], rows, to_rgb=True).apply(image, alpha).tolist() == [[[100, 100, 105]]]
    assert Lighting([10, 1, 1], rows).apply(np.full((1, 1, 3), 253, np.uint8), alpha).max() == 255, "no wrapping around"
    assert Lighting([10, 1, 1], rows).apply(np.full((1, 1, 3), 2, np.uint8), -alpha).min() == 0


def test_blur_spreads_a_point() -> None:
    point = np.zeros((41, 41, 3), np.uint8)
    point[20, 20] = 255
    wide = np.repeat(np.repeat(point, 1, 0), 1, 1).astype(np.uint8)
    wide[15:26, 15:26] = 255
    out = GaussianBlur(radius=3.0, prob=1.0).apply(wide, 3.0).astype(float)[..., 0]
    mass = out.sum()
    rows = (out.sum(1) * np.arange(41)).sum() / mass
    variance = (out.sum(1) * (np.arange(41) - rows) ** 2).sum() / mass
    assert abs(rows - 20) < 0.05 and abs(variance - (10 + 9)) < 1.0  # (11^2 - 1) / 12 of the square, 3^2 of the blur


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_stand_alone_in_pipelines(name: str) -> None:
    operation = OPERATIONS[name]
    strength = dict(Cutout=10, GaussianBlur=1.5, Posterize=3, Solarize=100, Rotate=15, SolarizeAdd=60)
    arguments = {operation.argument: strength.get(name, 0.3)} if operation.argument else {}
    assert TRANSFORMS[name].endswith(f"augment_operations:{name}")
    step = dict(type=name, prob=1.0, **arguments)
    image = np.arange(30 * 40 * 3, dtype=np.uint32).reshape(30, 40, 3) % 199
    image = image.astype(np.uint8)
    out = apply(step, image)
    assert out.dtype == np.uint8 and out.shape == image.shape and (out != image).any()
    assert (apply(step | dict(prob=0.0), image) == image).all()


def test_inputs_are_left_alone_and_transforms_pickle() -> None:
    image = SMALL.copy()
    image.setflags(write=False)
    for step in (
        dict(type="ColorJitter", brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1),
        dict(type="ColorJitter", brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, backend="cv2"),
        dict(type="RandomGrayscale", prob=1.0, keep_channels=True),
        dict(type="Lighting", eigval=EIGVAL, eigvec=EIGVEC),
        dict(type="RandomSolarize", prob=1.0),
        dict(type="GaussianBlur", magnitude_range=(0.1, 2.0), magnitude_level=10, magnitude_std="inf", prob=1.0),
        dict(type="Cutout", shape=10, prob=1.0),
        dict(type="torchvision/TrivialAugmentWide", interpolation="bicubic"),
    ):
        pipeline = build_pipeline([step])
        first = pipeline({"image": image[::-1]}, rng(3))["image"]
        again = pickle.loads(pickle.dumps(pipeline))({"image": image[::-1]}, rng(3))["image"]
        assert (first == again).all() and first.dtype == np.uint8


def test_blur_of_recipes_needs_no_level() -> None:
    out = apply(dict(type="GaussianBlur", magnitude_range=[0.1, 2.0], magnitude_std="inf", prob=1.0))
    assert (out != SMALL).any()


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (dict(type="ColorJiter"), "No host transform 'ColorJiter'.*'ColorJitter'"),
        (dict(type="ColorJitter", brightnes=0.4), "no argument 'brightnes'.*'brightness'"),
        (dict(type="ColorJitter", backend="pilow"), "backend='pilow'.*'pillow'"),
        (dict(type="ColorJitter", hue=0.7), "hue=0.7 leaves the range -0.5..0.5"),
        (dict(type="ColorJitter", brightness=-0.1), "brightness must be a number >= 0"),
        (dict(type="ColorJitter", contrast=(1.2, 0.8)), "contrast=\\(1.2, 0.8\\) leaves the range"),
        (dict(type="RandomGrayscale"), "keep_channels=True"),
        (dict(type="RandomGrayscale", keep_channels=True, color_format="brg"), "color_format='brg'.*'bgr'"),
        (dict(type="RandomGrayscale", keep_channels=True, channel_weights=(1, 1)), "three numbers"),
        (dict(type="RandomGrayscale", keep_channels=True, prob=2), "prob=2 is not a probability"),
        (dict(type="Lighting", eigval=EIGVAL, eigvec=EIGVEC[:2]), "its shape is \\(2, 3\\)"),
        (dict(type="RandomSolarize", prob=-1), "prob=-1"),
        (dict(type="GaussianBlur"), "either radius or magnitude_range"),
        (dict(type="GaussianBlur", sigma=1.0), "no argument 'sigma'"),
        (dict(type="torchvision/TrivialAugmentWid"), "TrivialAugmentWide"),
        (dict(type="torchvision/TrivialAugmentWide", interpolation="lanczos"), "neither nearest, bilinear nor bicubic"),
    ],
)
def test_mistakes(step: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_pipeline([step])


def test_every_name_leads_to_a_class() -> None:
    for name in TRANSFORMS:
        assert isinstance(host_transform(name), type), name
    assert isinstance(RandomSolarize().draw(rng(), 1, 1), bool | np.bool_)
