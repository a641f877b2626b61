"""Masks of patches and two pictures of one crop: the reference's distributions and pixels, and helpful errors."""

from __future__ import annotations

import json

import numpy as np
import pytest

from jaxpretrain.build import ConfigError
from jaxpretrain.data.host_transforms import build_pipeline
from jaxpretrain.data.image_ops import Box
from jaxpretrain.data.mask_transforms import (
    BEiTMaskGenerator,
    Pictures,
    RandomResizedCropAndInterpolationWithTwoPic,
    SimMIMMaskGenerator,
)
from jaxpretrain.data.pipeline import TrainLoader
from jaxpretrain.data.torchvision_transforms import TorchvisionRandomCrop

from .parity import GOLDEN

SPEC = json.loads((GOLDEN / "transforms.json").read_text())
PIXELS = np.load(GOLDEN / "transforms.npz")
IMAGE = PIXELS["image"]
TWO = "RandomResizedCropAndInterpolationWithTwoPic"


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def build_step(step):
    return build_pipeline([step])


@pytest.mark.parametrize("name", [name for name in SPEC["statistics"] if name.startswith("mask")])
def test_masks_are_distributed_as_the_reference(name):
    entry = SPEC["statistics"][name]
    transform, generator, draws = build_step(entry["config"]), rng(), 2000
    masks = np.stack([transform({"image": IMAGE}, generator)["mask"] for _ in range(draws)])
    assert masks.dtype == np.int32 and list(masks.shape[1:]) == entry["mask_shape"]
    assert set(np.unique(masks)) == {0, 1}
    counts = masks.sum((1, 2))
    assert (counts == entry["mean_count"]).all(), "of every mask"
    h, w = masks.shape[1:]
    found = {
        "probability_corner": masks[:, 0, 0],
        "probability_last_corner": masks[:, -1, -1],
        "probability_centre": masks[:, h // 2, w // 2],
    }
    for key, values in found.items():
        p = entry[key]
        # The reference's figure is a mean of as many draws: three standard errors of the difference.
        assert abs(values.mean() - p) <= 3 * np.sqrt(2 * p * (1 - p) / draws), key
    equal = (masks[:, 1:] == masks[:, :-1]).mean((1, 2))
    assert abs(equal.mean() - entry["vertical_neighbours_equal"]) <= 3 * equal.std() * np.sqrt(2 / draws) + 1e-4


@pytest.mark.parametrize(("aspect", "shape"), [(2 / 3, (4, 6)), (6.0, (12, 2))])
def test_blocks_have_the_area_and_the_aspect(aspect, shape):
    transform, generator = BEiTMaskGenerator((20, 15), 24, 24, 24, min_aspect=aspect, max_aspect=aspect), rng()
    for _ in range(20):
        rows, columns = np.nonzero(transform.draw(generator))
        assert (np.ptp(rows) + 1, np.ptp(columns) + 1) == shape, "aspect is height / width"


def test_squares_of_simmim():
    mask = SimMIMMaskGenerator(16, 8, 2, 0.6).draw(rng())
    assert mask.shape == (8, 8) and mask.sum() == 3 * 16, "0.6 of 4 squares, rounded up, of 4x4 patches each"
    blocks = mask.reshape(2, 4, 2, 4).transpose(0, 2, 1, 3).reshape(4, 16)
    assert (blocks == blocks[:, :1]).all()


@pytest.mark.parametrize("name", [name for name in SPEC["statistics"] if name.startswith(("mask", "two_pic"))])
def test_the_sample_decides(name):
    config = SPEC["statistics"][name]["config"]
    config = {"size": 8, "second_size": 4, **config} if config["type"] == TWO else config
    transform = build_step(config)
    key = "image" if config["type"] == TWO else "mask"
    one, again, other = (np.asarray(transform({"image": IMAGE}, rng(seed))[key][0]) for seed in (1, 1, 2))
    assert (one == again).all() and (one != other).any()


def test_two_pictures_have_the_reference_s_pixels():
    config = dict(SPEC["transforms"]["two_pic_first"]["config"])
    assert config.pop("type") == TWO
    pictures = RandomResizedCropAndInterpolationWithTwoPic(**config).apply(IMAGE, Box(9, 14, 70, 66), "bicubic")
    for picture, name in zip(pictures, ("two_pic_first", "two_pic_second"), strict=True):
        assert picture.dtype == np.uint8 and picture.shape == PIXELS[name].shape
        # OpenCV's fixed-point resampling differs by one grey level between its versions.
        assert np.abs(picture.astype(int) - PIXELS[name]).max() <= 1


def test_two_pictures_boxes_are_distributed_as_the_reference():
    entry = SPEC["statistics"]["two_pic_params"]
    transform, generator = RandomResizedCropAndInterpolationWithTwoPic(8), rng()
    boxes = np.array([transform.draw(generator, 97, 131) for _ in range(4000)], float)
    tolerance = 3 * np.array(entry["std"]) * np.sqrt(1 / 2000 + 1 / 4000)
    assert (np.abs(boxes.mean(0) - entry["mean"]) < tolerance).all()
    assert np.allclose(boxes.std(0), entry["std"], rtol=0.1)
    assert boxes[:, 2].max() < 97 and boxes[:, 3].max() < 131
    assert (boxes[:, 0] + boxes[:, 2]).max() < 97 and (boxes[:, 1] + boxes[:, 3]).max() < 131, "never the last position"
    whole = RandomResizedCropAndInterpolationWithTwoPic(8, scale=(1.0, 1.0))
    assert whole.draw(rng(), 30, 300) == Box(0, 130, 30, 40)
    assert whole.draw(rng(), 50, 60) == Box(0, 0, 50, 60)


def test_two_pictures_are_of_one_crop():
    transform = RandomResizedCropAndInterpolationWithTwoPic(32, 16, interpolation="random", second_interpolation="area")
    pictures = transform({"image": IMAGE}, rng())["image"]
    assert isinstance(pictures, Pictures) and [picture.shape for picture in pictures] == [(32, 32, 3), (16, 16, 3)]
    halved = pictures[0].astype(float).reshape(16, 2, 16, 2, 3).mean((1, 3))
    assert np.abs(halved - pictures[1]).mean() < 6
    assert RandomResizedCropAndInterpolationWithTwoPic(32)({"image": IMAGE}, rng())["image"].shape == (32, 32, 3)
    assert transform.interpolations == ("bilinear", "bicubic")


def test_flips_keep_two_pictures_aligned():
    steps = [
        dict(type=TWO, size=16, second_size=16, second_interpolation="bilinear"),
        dict(type="RandomFlip", prob=0.5),
    ]
    crop, both = build_pipeline(steps[:1]), build_pipeline(steps)
    flipped = []
    for seed in range(20):
        plain, pictures = crop({"image": IMAGE}, rng(seed))["image"], both({"image": IMAGE}, rng(seed))["image"]
        assert (pictures[0] == pictures[1]).all()
        flipped.append(bool((pictures[0] != plain[0]).any()))
    assert 0 < sum(flipped) < 20


def test_crops_of_the_linear_probe():
    crop = build_step(dict(type="MAERandomResizedCrop", size=24, scale=(1.0, 1.0), interpolation=3)).steps[0]
    assert (crop.interpolation, crop.backend) == ("bicubic", "pillow")
    boxes = [crop.draw(rng(seed), 40, 40) for seed in range(50)]
    assert all(max(box.height, box.width) == 40 for box in boxes), "the edge that is too long is cut"
    assert min(min(box.height, box.width) for box in boxes) < 38
    half = build_step(dict(type="MAERandomResizedCrop", size=24, scale=(0.5, 0.5))).steps[0]
    areas = [box.height * box.width for box in (half.draw(rng(seed), 100, 100) for seed in range(50))]
    assert np.allclose(areas, 5000, rtol=0.03)


def test_crops_of_torchvision_reflect():
    crop = build_step(dict(type="torchvision/RandomCrop", size=105, padding=4, padding_mode="reflect")).steps[0]
    assert isinstance(crop, TorchvisionRandomCrop)
    assert (crop.pad(IMAGE) == np.pad(IMAGE, ((4, 4), (4, 4), (0, 0)), mode="reflect")).all()
    assert crop({"image": IMAGE}, rng())["image"].shape == (105, 105, 3)


def test_batches_carry_masks():
    loader = TrainLoader(
        dict(
            dataset=dict(type="Digits", split="train"),
            pipeline=[
                dict(type=TWO, size=16, second_size=8),
                dict(type="BEiTMaskGenerator", input_size=(5, 6), num_masking_patches=9),
                dict(type="PackInputs", algorithm_keys=["mask"]),
            ],
        ),
        batch_size=4,
    )
    batch = next(loader)
    loader.close()
    assert [picture.shape for picture in batch["image"]] == [(4, 16, 16, 3), (4, 8, 8, 3)]
    assert batch["mask"].shape == (4, 5, 6) and (batch["mask"].sum((1, 2)) == 9).all()
    assert (batch["mask"][0] != batch["mask"][1]).any()


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (dict(type="BEiTMaskGenerator", input_size=4, num_masking_patches=10), "within 1..9"),
        (dict(type="BEiTMaskGenerator", input_size=4, num_masking_patches=4, min_aspect=2.0), "must ascend"),
        (dict(type="BEiTMaskGenerater", input_size=4, num_masking_patches=4), "Did you mean 'BEiTMaskGenerator'"),
        (dict(type="SimMIMMaskGenerator", input_size=100), "multiple of mask_patch_size"),
        (dict(type="SimMIMMaskGenerator", mask_ratio=1.5), "within"),
        (dict(type=TWO, size=8, interpolation="cubic"), "Did you mean 'bicubic'"),
        (dict(type=TWO, size=8, scale=(1.0, 0.5)), "ascending"),
        (dict(type="MAERandomResizedCrop", size=8, interpolation=9), "no interpolation"),
    ],
)
def test_mistakes(step, message):
    with pytest.raises(ConfigError, match=message):
        build_step(step)


def test_mistakes_found_while_drawing():
    with pytest.raises(ConfigError, match="lower min_num_patches"):
        stuck = BEiTMaskGenerator(4, 9, 100, min_aspect=4.0, max_aspect=4.0)
        stuck.ATTEMPTS = 1000
        stuck.draw(rng())
    with pytest.raises(ConfigError, match="2 views already"):
        build_step(dict(type=TWO, size=8))({"image": (IMAGE, IMAGE)}, rng())
