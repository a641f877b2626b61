"""Every transform recorded from the reference, with its random part pinned: pixels, drawn parameters, statistics.

`transforms.*`: 141 outputs of MMPretrain, and statistics of its draws. `host_transforms_extra.npz`: what that lacks, made in
the same way (its `spec` says how). `COVERED` and `STATISTICS` list everything recorded; a test fails if a record is not
among them. Policies and strengths of AutoAugment and RandAugment: test_auto_augment.py. Masks: test_mask_transforms.py.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from jaxpretrain.data.augment_operations import OPERATIONS
from jaxpretrain.data.base import Transform
from jaxpretrain.data.colour_transforms import Jitter
from jaxpretrain.data.formatting import CleanCaption
from jaxpretrain.data.host_transforms import build_pipeline, host_transform
from jaxpretrain.data.image_ops import Box
from jaxpretrain.data.torchvision_transforms import TrivialAugmentWide

from .parity import GOLDEN

SPEC = json.loads((GOLDEN / "transforms.json").read_text())
PIXELS = np.load(GOLDEN / "transforms.npz")
IMAGE = PIXELS["image"]

EXTRA = np.load(GOLDEN / "host_transforms_extra.npz")
EXTRA_SPEC = json.loads(str(EXTRA["spec"]))
SMALL = EXTRA["image"]

# Recorded transform -> how many outputs.
COVERED = {
    "AutoContrast": 2,
    "Brightness": 5,
    "CenterCrop": 4,
    "ColorJitter": 20,
    "ColorTransform": 5,
    "Contrast": 5,
    "Cutout": 3,
    "EfficientNetCenterCrop": 5,
    "Equalize": 2,
    "GaussianBlur": 3,
    "Invert": 1,
    "Lighting": 2,
    "MAERandomResizedCrop": 1,
    "Posterize": 5,
    "RandomCrop": 8,
    "RandomErasing": 2,
    "RandomFlip": 3,
    "RandomGrayscale": 2,
    "RandomResizedCrop": 4,
    "RandomResizedCropAndInterpolationWithTwoPic": 2,
    "Resize": 16,
    "ResizeEdge": 8,
    "Rotate": 5,
    "Sharpness": 5,
    "Shear": 8,
    "Solarize": 4,
    "SolarizeAdd": 3,
    "Translate": 8,
}
# Recorded statistics, and where they are tested.
STATISTICS = {
    "rrc_default": "test_draws_have_the_statistics_of_the_reference",
    "rrc_ssl_0.2": "test_draws_have_the_statistics_of_the_reference",
    "effnet_random_crop": "test_draws_have_the_statistics_of_the_reference",
    "random_erasing_patch": "test_draws_have_the_statistics_of_the_reference",
    "two_pic_params": "test_draws_have_the_statistics_of_the_reference",
    "rotate_magnitude_level9_std0.5": "test_strengths_have_the_statistics_of_the_reference",
    "gaussian_blur_magnitude_inf": "test_strengths_have_the_statistics_of_the_reference",
    "random_erasing_rand_uniform": "test_noise_has_the_statistics_of_the_reference",
    "random_erasing_rand_normal": "test_noise_has_the_statistics_of_the_reference",
    "mask_beit_75": "test_mask_transforms.py",
    "mask_beit_75_max75": "test_mask_transforms.py",
    "mask_maskfeat_78": "test_mask_transforms.py",
    "mask_simmim_192_32_4_0.6": "test_mask_transforms.py",
    "mask_simmim_224_32_32_0.5": "test_mask_transforms.py",
    "albumentations": "no values: the package was not there",
}


def test_everything_recorded_is_covered() -> None:
    kinds = [entry["config"]["type"] for entry in SPEC["transforms"].values()]
    assert {kind: kinds.count(kind) for kind in kinds} == COVERED
    assert SPEC["statistics"].keys() == STATISTICS.keys()
    policies = {"autoaugment", "randaugment", "randaugment_magnitudes_no_noise", "resnest_recipe_pipeline"}
    assert set(SPEC["policies"]) == policies | {"hparams_receivers", "autoaugment_hparams_quirk"}


# ---------------------------------------------------------------------------------------------------------------------
# Pixels


def in_rgb(config: dict[str, Any]) -> dict[str, Any]:
    """Our arguments: colours of the record are in keys that end in `_rgb`."""
    found = {
        key if key == "to_rgb" else key.removesuffix("_rgb"): in_rgb(value) if key == "pad_cfg" else value
        for key, value in config.items()
    }
    return found | (dict(color_format="rgb", prob=1.0) if config["type"] == "RandomGrayscale" else {})


def pinned_numbers(pinned: str) -> list[float]:
    """The last tuple of numbers in a sentence."""
    return [json.loads("[" + part.partition(")")[0] + "]") for part in pinned.split("(")[1:] if part[0].isdigit()][-1]


def output(entry: dict[str, Any], name: str, image: np.ndarray) -> np.ndarray:
    """Our output for a record of transforms.json."""
    config, pinned = in_rgb(entry["config"]), entry.get("pinned")
    cls = host_transform(config["type"])
    transform: Any = cls(**{key: value for key, value in config.items() if key != "type"})
    if isinstance(pinned, dict) and "order" in pinned:
        return transform.apply(image, Jitter(*(pinned[key] for key in Jitter._fields)))
    if isinstance(pinned, dict):
        return transform.apply(image, pinned["alpha"])
    if config["type"] == "Cutout":
        return transform({"image": image}, Pinned(pinned_numbers(pinned)))["image"]
    if pinned is None:
        return transform({"image": image}, np.random.default_rng(0))["image"]
    box = Box(*pinned_numbers(pinned))
    if config["type"] == "RandomErasing":
        return transform.apply(image, (box, transform.fill(np.random.default_rng(0), box.height, box.width)))
    if config["type"] == "RandomCrop":
        return transform.apply(transform.pad(image), box)
    if config["type"] == "RandomResizedCropAndInterpolationWithTwoPic":
        return transform.apply(image, box, config["interpolation"])[name == "two_pic_second"]
    return transform.apply(image, box)


class Pinned(np.random.Generator):
    """A generator whose `uniform` gives given numbers."""

    def __init__(self, numbers: list[float]):
        super().__init__(np.random.PCG64(0))
        self.numbers = list(numbers)

    def uniform(self, low: Any = 0.0, high: Any = 1.0, size: Any = None) -> Any:
        return self.numbers.pop(0)


@pytest.mark.parametrize("name", SPEC["transforms"])
def test_pixels_of_the_reference(name: str) -> None:
    entry, image = SPEC["transforms"][name], IMAGE
    if "low_contrast" in name:
        image = IMAGE // 4 + 90
    if "tall_input" in name:
        image = IMAGE.swapaxes(0, 1)
    if entry["config"].get("random_negative_prob") is None and entry["config"]["type"] in OPERATIONS:
        entry = {**entry, "config": {**entry["config"], "random_negative_prob": 0.0}}  # signs are in the magnitude
    out = output(entry, name, image)
    assert out.dtype == np.uint8 and list(out.shape) == entry["out_shape"]
    rows = out[::4] if entry["stored"] == "rows 0::4" else out
    difference = np.abs(rows.astype(int) - PIXELS[name])
    if name.startswith("lighting"):  # values that left 0..255 wrapped around there
        assert (difference >= 200).sum() <= 14
        difference = difference[difference < 200]
    kind = entry["config"]["type"]
    if kind in ("Shear", "Translate", "Rotate", "Sharpness"):
        # Fixed-point coordinates, and the rounding of filters, differ between OpenCV's versions, and show at edges.
        assert difference.mean() < 0.3 and (kind != "Sharpness" or difference.max() <= 1)
        return
    # OpenCV's resampling, and its conversions of colours, may differ by a level between versions; the rest is exact.
    by_opencv = entry["config"].get("backend", "cv2") == "cv2" and (
        "Resize" in kind or "EfficientNet" in kind or kind in ("ColorJitter", "ColorTransform") or "TwoPic" in kind
    )
    assert difference.max() <= (1 if by_opencv else 0)
    assert difference.mean() < 0.02


OTHERS = [name for name in EXTRA_SPEC if name not in ("draws", "made", "captions", "trivial_space")]


@pytest.mark.parametrize("name", OTHERS)
def test_pixels_of_the_reference_where_nothing_was_recorded(name: str) -> None:
    record = EXTRA_SPEC[name]
    config, pinned = dict(record["config"]), record.get("pinned")
    rows = slice(None)
    if name.startswith("bridge"):
        steps = [dict(type="NumpyToPIL", to_rgb=config["to_rgb"]), dict(type="PILToNumpy", to_bgr=config["to_bgr"])]
        steps.insert(1, dict(type="ColorJitter", hue=(config["hue"], config["hue"])))  # type: ignore[arg-type]
        out = build_pipeline(steps)({"image": SMALL}, np.random.default_rng(0))["image"]
    else:
        transform: Any = host_transform(config.pop("type"))(**config)
        if isinstance(transform, TrivialAugmentWide):
            kind, number, sign = pinned
            out, rows = transform.apply(SMALL, (kind, sign * transform.strength(kind, number))), slice(None, None, 3)
        elif name == "tv_random_crop":
            out = transform.apply(transform.pad(SMALL), Box(*pinned))
        elif pinned is not None:
            out = transform.apply(SMALL, Box(*pinned) if len(pinned) == 4 else tuple(pinned))
        else:
            out = transform({"image": SMALL}, np.random.default_rng(0))["image"]
    difference = np.abs(out[rows].astype(int) - EXTRA[name])
    if name == "lighting_to_rgb":  # see above
        assert (difference >= 200).sum() <= 14
        difference = difference[difference < 200]
    # OpenCV's versions; and torchvision's strengths, which are float32.
    rounded = name in ("effnet_random_crop_cv2", "random_resize_keep") or name.startswith("trivial_Brightness")
    assert difference.max() <= (1 if rounded else 0)


def test_boxes_move_with_the_image() -> None:
    for name in ("translate_pad", "translate_pad_random"):
        transform: Any = host_transform("RandomTranslatePad")(96, aug_translate="random" in name)
        if "random" in name:
            transform.draw = lambda rng, height, width: (7, 15)
        sample = transform({"image": SMALL, "gt_bboxes": [[1.0, 2.0, 30.0, 40.0]]}, np.random.default_rng(0))
        assert sample["gt_bboxes"].tolist() == EXTRA_SPEC[name]["boxes"]
        assert (sample["image"] == EXTRA[name]).all()


def test_captions_of_the_reference() -> None:
    for case in EXTRA_SPEC["captions"]:
        assert [CleanCaption(**case["args"]).clean(text) for text in case["texts"]] == case["out"]


def test_strengths_of_trivial_augment() -> None:
    transform = TrivialAugmentWide()
    assert set(transform.OPERATIONS) == EXTRA_SPEC["trivial_space"].keys() and len(transform.OPERATIONS) == 14
    for kind, space in EXTRA_SPEC["trivial_space"].items():
        assert (kind in transform.SIGNED) == space["signed"]
        wanted = space["magnitudes"] or [0.0] * 31
        assert [transform.strength(kind, number) for number in range(31)] == pytest.approx(wanted, abs=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Parameters


class Stream(np.random.Generator):
    """Uniform numbers made into others by the rule that the reference was given for its records."""

    def uniform(self, low: Any = 0.0, high: Any = 1.0, size: Any = None) -> Any:
        return low + (high - low) * self.random()

    def integers(self, low: Any, high: Any = None, **kwargs: Any) -> Any:
        low, high = (0, low) if high is None else (low, high)
        return low + int(self.random() * (high - low))


@pytest.mark.parametrize("name", EXTRA_SPEC["draws"])
def test_the_same_numbers_draw_the_same_parameters(name: str) -> None:
    record = EXTRA_SPEC["draws"][name]
    config = dict(record["config"])
    transform: Transform = host_transform(config.pop("type"))(**config)
    stream = Stream(np.random.PCG64(7))
    ours = np.array(
        [transform.draw(stream, *size) for size in record["sizes"] for _ in range(record["per_size"])], float
    )
    wanted = np.floor(EXTRA[f"draws_{name}"])  # the reference's central crops have edges that are not whole
    assert (ours == wanted).all()


def config_of(entry: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    config = dict(entry["config"])
    return config.pop("type"), config


@pytest.mark.parametrize("name", [n for n, where in STATISTICS.items() if where.startswith("test_draws")])
def test_draws_have_the_statistics_of_the_reference(name: str) -> None:
    entry = SPEC["statistics"][name]
    kind, config = config_of(entry)
    config.setdefault("size" if "TwoPic" in kind else "scale", 56) if kind != "RandomErasing" else None
    if kind == "RandomErasing":
        config["erase_prob"] = 1.0
    transform: Any = host_transform(kind)(**config)
    rng, count, theirs = np.random.default_rng(1), 6000, entry.get("draws", 2000)
    drawn = [transform.draw(rng, 97, 131) for _ in range(count)]
    boxes = np.array([box[0] if kind == "RandomErasing" else box for box in drawn], float)
    # Two samples of means, five standard errors of their difference; of standard deviations, 10 %.
    tolerance = 5 * np.array(entry["std"]) * np.sqrt(1 / theirs + 1 / count)
    assert (np.abs(boxes.mean(0) - entry["mean"]) < tolerance).all()
    assert np.allclose(boxes.std(0), entry["std"], rtol=0.1)
    area = boxes[:, 2] * boxes[:, 3] / (97 * 131)
    assert abs(area.mean() - entry["mean_area_ratio"]) < 5 * area.std() * np.sqrt(1 / theirs + 1 / count)
    if "mean_log_aspect_w_over_h" in entry:
        aspect = np.log(boxes[:, 3] / boxes[:, 2])
        error = 5 * aspect.std() * np.sqrt(1 / theirs + 1 / count)
        assert abs(aspect.mean() - entry["mean_log_aspect_w_over_h"]) < error


def test_strengths_have_the_statistics_of_the_reference() -> None:
    rng = np.random.default_rng(2)
    golden = SPEC["statistics"]["rotate_magnitude_level9_std0.5"]
    rotate = OPERATIONS["Rotate"](magnitude_range=(0, 30), magnitude_level=9, magnitude_std=0.5)
    angles = np.array([rotate.strength(rng) for _ in range(20000)])
    assert abs(angles.mean() - golden["mean"]) < 5 * golden["std"] * np.sqrt(2 / 20000)
    assert angles.std() == pytest.approx(golden["std"], rel=0.05) and angles.max() == golden["max"]
    golden = SPEC["statistics"]["gaussian_blur_magnitude_inf"]
    blur = OPERATIONS["GaussianBlur"](magnitude_range=(0.1, 2.0), magnitude_level=10, magnitude_std="inf")
    radii = np.array([blur.strength(rng) for _ in range(20000)])
    assert abs(radii.mean() - golden["mean"]) < 5 * 1.9 / np.sqrt(12) * np.sqrt(2 / 20000)
    assert 0.1 <= radii.min() < 0.102 and 1.998 < radii.max() <= 2.0


@pytest.mark.parametrize("name", ["random_erasing_rand_uniform", "random_erasing_rand_normal"])
def test_noise_has_the_statistics_of_the_reference(name: str) -> None:
    entry = SPEC["statistics"][name]
    kind, config = config_of(entry)
    for colour in ("fill_color", "fill_std"):  # B, G, R in the record
        if colour in config:
            config[colour] = config[colour][::-1]
    patch = host_transform(kind)(**config).fill(np.random.default_rng(0), 600, 600)
    assert np.allclose(patch.mean((0, 1)), entry["mean_rgb"], atol=0.4)
    assert np.allclose(patch.std((0, 1)), entry["std_rgb"], atol=0.4)
