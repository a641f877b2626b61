"""Random erasing on the device: pixels of the host's, boxes and noise distributed as the reference's."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random

from jaxpretrain.build import ConfigError
from jaxpretrain.data import image_ops, random_erasing
from jaxpretrain.data.device import DevicePipeline
from jaxpretrain.data.device_crop import Box
from jaxpretrain.data.device_erasing import RandomErasing, erase

from .parity import GOLDEN

STATISTICS = json.loads((GOLDEN / "transforms.json").read_text())["statistics"]
IMAGE = np.random.default_rng(0).integers(0, 256, (24, 30, 3), np.uint8)
KEYS = random.split(random.key(0), 8000)


@pytest.mark.parametrize("box", [(0, 0, 24, 30), (3, 7, 10, 1), (23, 29, 1, 1)])
def test_erased_pixels_are_the_hosts(box):
    transform = random_erasing.RandomErasing(fill_color=(1, 2, 3.7))
    theirs = transform.apply(IMAGE, (image_ops.Box(*box), transform.fill(np.random.default_rng(), *box[2:])))
    paint = RandomErasing(fill_color=(1, 2, 3.7)).paint(random.key(0), 24, 30)
    np.testing.assert_array_equal(erase(jnp.float32(IMAGE), Box(*box), paint), theirs)


def test_boxes_are_distributed_as_the_reference():
    golden = STATISTICS["random_erasing_patch"]
    transform = RandomErasing(**{k: v for k, v in golden["config"].items() if k != "type"})
    boxes = np.stack(jax.jit(jax.vmap(lambda key: transform.draw(key, *golden["image"])))(KEYS), axis=1)
    # The reference's are those of a quarter of its draws, the others paint nothing.
    error = np.array(golden["std"]) * np.sqrt(1 / len(boxes) + 4 / golden["draws"])
    assert (np.abs(boxes.mean(axis=0) - golden["mean"]) < 4 * error).all()
    np.testing.assert_allclose(boxes.std(axis=0), golden["std"], rtol=0.08)


@pytest.mark.parametrize("name", ["random_erasing_rand_uniform", "random_erasing_rand_normal"])
def test_noise_of_the_reference(name):
    golden = STATISTICS[name]
    config = {key: value[::-1] if "fill" in key else value for key, value in golden["config"].items() if key != "type"}
    noise = np.asarray(RandomErasing(**config).paint(random.key(0), 600, 600))
    assert np.array_equal(noise, np.round(noise)) and noise.min() >= 0 and noise.max() <= 255
    np.testing.assert_allclose(noise.mean(axis=(0, 1)), golden["mean_rgb"], atol=0.5)
    np.testing.assert_allclose(noise.std(axis=(0, 1)), golden["std_rgb"], atol=0.5)


@pytest.mark.parametrize("prob", [0.0, 0.25, 1.0])
def test_probability(prob):
    cfg = dict(type="RandomErasing", erase_prob=prob, mode="rand", fill_color=[1, 2, 3], fill_std=[57, 57, 58])
    count = 2000
    images = np.broadcast_to(IMAGE[:12, :12], (count, 12, 12, 3))
    index = np.arange(count, dtype=np.int32)
    run = jax.jit(DevicePipeline([cfg], [0, 0, 0], [1, 1, 1]))
    out = np.asarray(run(dict(image=images, index=index, epoch=np.zeros_like(index)), random.key(0))["image"])
    changed = (out != images).any(axis=(1, 2, 3)).mean()
    assert abs(changed - prob) < 4 * np.sqrt(prob * (1 - prob) / count) + 1e-9


def test_mistakes_are_named():
    for cfg, message in ((dict(mode="paint"), "mode='paint'"), (dict(erase_prob=1.5), "erase_prob=1.5")):
        with pytest.raises(ConfigError, match=message):
            RandomErasing(**cfg)
