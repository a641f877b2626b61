"""Host transforms: pixels as the reference's, random parameters by the papers' rules, and helpful errors."""

from __future__ import annotations

import json

import numpy as np
import pytest

from jaxpretrain.build import ConfigError
from jaxpretrain.data.image_ops import Box
from jaxpretrain.data.transforms import (
    CenterCrop,
    MultiView,
    RandomCrop,
    RandomFlip,
    RandomResizedCrop,
    Resize,
    ResizeEdge,
    build_pipeline,
)

from .parity import GOLDEN

SPEC = json.loads((GOLDEN / "host_transforms.json").read_text())
PIXELS = np.load(GOLDEN / "host_transforms.npz")
IMAGE = PIXELS["image"]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def apply(transform, image=IMAGE, generator=None):
    return transform({"image": image}, generator or rng())["image"]


def run_golden(name: str) -> np.ndarray:
    """The output for a golden entry, by our transform with the random part pinned as it says."""
    entry = SPEC["transforms"][name]
    config = dict(entry["config"])
    kind = config.pop("type")
    image = IMAGE.swapaxes(0, 1) if "tall_input" in name else IMAGE
    if "pad_cfg" in config:
        config["pad_cfg"] = dict(pad_val=config["pad_cfg"]["pad_val_rgb"])
    if "pad_val_rgb" in config:
        config["pad_val"] = config.pop("pad_val_rgb")
    pinned = entry.get("pinned", "")
    box = Box(*json.loads("[" + pinned[pinned.rindex("(") + 1 : pinned.rindex(")")] + "]")) if "(" in pinned else None
    if name == "random_crop_padding4":
        box = Box(0, 49, 90, 90)
    if kind == "MAERandomResizedCrop":
        transform = RandomResizedCrop(config["size"], backend="pillow", interpolation="bicubic")
        return transform.apply(image, Box(9, 14, 70, 66))
    if kind == "RandomResizedCrop":
        return RandomResizedCrop(**config).apply(image, Box(11, 23, 61, 74))
    if kind == "RandomCrop":
        transform = RandomCrop(**config)
        return transform.apply(transform.pad(image), box)
    if kind == "RandomFlip":
        transform = RandomFlip(**config)
        return transform.apply(image, config["direction"])
    return apply({"Resize": Resize, "ResizeEdge": ResizeEdge, "CenterCrop": CenterCrop}[kind](**config), image)


@pytest.mark.parametrize("name", SPEC["transforms"])
def test_pixels_of_the_reference(name):
    out, entry = run_golden(name), SPEC["transforms"][name]
    assert out.dtype == np.uint8
    assert list(out.shape) == entry["out_shape"]
    rows = out[::4] if entry["stored"] == "rows 0::4" else out
    difference = np.abs(rows.astype(int) - PIXELS[name])
    # Copies and Pillow are exact. OpenCV's fixed-point resampling differs by one grey level between its versions.
    exact = "cv2" not in name and "tall" not in name
    assert difference.max() <= (0 if exact else 1)
    assert difference.mean() < 0.02


@pytest.mark.parametrize("name", ["rrc_default", "rrc_ssl_0.2"])
def test_random_resized_crop_is_distributed_as_the_reference(name):
    entry = SPEC["statistics"][name]
    config = {key: value for key, value in entry["config"].items() if key != "type"}
    transform, generator = RandomResizedCrop(**config), rng()
    boxes = np.array([transform.draw(generator, 97, 131) for _ in range(4000)], float)
    # Two samples of means: three standard errors of their difference.
    tolerance = 3 * np.array(entry["std"]) * np.sqrt(1 / 2000 + 1 / 4000)
    assert (np.abs(boxes.mean(0) - entry["mean"]) < tolerance).all()
    assert np.allclose(boxes.std(0), entry["std"], rtol=0.1)
    area = boxes[:, 2] * boxes[:, 3] / (97 * 131)
    assert abs(area.mean() - entry["mean_area_ratio"]) < 3 * entry["std_area_ratio"] * np.sqrt(1 / 2000 + 1 / 4000)
    assert (boxes[:, 0] + boxes[:, 2]).max() <= 97 and (boxes[:, 1] + boxes[:, 3]).max() <= 131
    assert (boxes[:, 0] + boxes[:, 2] == 97).any(), "the last position belongs to the range"


def test_random_resized_crop_falls_back_to_the_largest_central_crop():
    wide = RandomResizedCrop(8, crop_ratio_range=(1.0, 1.0))
    assert wide.draw(rng(), 30, 300) == Box(0, 130, 30, 40)  # aspect 4/3
    assert wide.draw(rng(), 300, 30) == Box(130, 0, 40, 30)  # aspect 3/4
    assert RandomResizedCrop(8, max_attempts=0).draw(rng(), 50, 60) == Box(0, 0, 50, 60)


def test_scales_are_width_height():
    assert apply(RandomResizedCrop((20, 10))).shape == (10, 20, 3)
    assert apply(Resize((20, 10))).shape == (10, 20, 3)
    assert apply(Resize(scale_factor=(0.5, 0.25))).shape == (24, 66, 3)
    assert apply(Resize(scale_factor=2.0)).shape == (194, 262, 3)
    assert apply(RandomCrop((20, 10))).shape == (20, 10, 3), "but RandomCrop's is (height, width)"


def test_flip_probabilities():
    flip, generator = RandomFlip([0.2, 0.5], ["horizontal", "vertical"]), rng()
    drawn = [flip.draw(generator, 1, 1) for _ in range(4000)]
    assert abs(drawn.count("horizontal") / 4000 - 0.2) < 0.02
    assert abs(drawn.count("vertical") / 4000 - 0.5) < 0.025
    shared = RandomFlip(0.5, ["horizontal", "vertical"])
    drawn = [shared.draw(generator, 1, 1) for _ in range(4000)]
    assert abs(drawn.count("horizontal") / 4000 - 0.25) < 0.02
    assert all(RandomFlip(1.0).draw(generator, 1, 1) == "horizontal" for _ in range(100))
    assert all(RandomFlip(0.0).draw(generator, 1, 1) is None for _ in range(100))


def test_the_sample_decides_its_pixels():
    pipeline = build_pipeline([dict(type="RandomResizedCrop", scale=16), dict(type="RandomFlip", prob=0.5)])
    one, again, other = (apply(pipeline, generator=rng(seed)) for seed in (1, 1, 2))
    assert (one == again).all() and (one != other).any()


def test_multi_view_draws_for_each_view():
    crop = dict(type="RandomResizedCrop", scale=16)
    pipeline = build_pipeline(
        [
            dict(type="LoadImageFromFile"),
            dict(type="MultiView", num_views=[2, 1], transforms=[[crop], [dict(crop, scale=8)]]),
            dict(type="RandomFlip", prob=1.0),
            dict(type="PackInputs"),
        ]
    )
    views = apply(pipeline)
    assert [view.shape[0] for view in views] == [16, 16, 8]
    assert (views[0] != views[1]).any()
    unflipped = apply(MultiView([[crop], [dict(crop, scale=8)]], [2, 1]))
    assert all((a == b[:, ::-1]).all() for a, b in zip(views, unflipped, strict=True))
    assert len(apply(MultiView(num_views=2, transforms=[[crop]]))) == 2


def test_functions_of_users():
    def invert(sample):
        return {**sample, "image": 255 - sample["image"]}

    def roll(sample, rng):
        return {**sample, "image": np.roll(sample["image"], rng.integers(1, 5), axis=1)}

    assert (apply(build_pipeline([invert])) == 255 - IMAGE).all()
    assert (apply(build_pipeline([roll])) != IMAGE).any()
    with pytest.raises(ConfigError, match="must return the sample"):
        apply(build_pipeline([lambda sample: None]))


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (dict(type="RandomResizeCrop", scale=8), "Did you mean 'RandomResizedCrop'"),
        (dict(type="ColorJitter"), "device_pipeline"),
        (dict(type="RandomResizedCrop", scal=8), "no argument 'scal'.*'scale'"),
        (dict(type="RandomResizedCrop"), "needs scale"),
        (dict(type="Resize", scale=8, interpolation="bicubik"), "Did you mean 'bicubic'"),
        (dict(type="Resize", scale=8, interpolation="area", backend="pillow"), "pillow has no interpolation 'area'"),
        (dict(type="Resize", scale=8, backend="pil"), "no backend 'pil'"),
        (dict(type="Resize"), "either scale or scale_factor"),
        (dict(type="CenterCrop", crop_size=0), "positive"),
        (dict(type="ResizeEdge", scale=8, edge="shorter"), "Did you mean 'short'"),
        (dict(type="RandomFlip"), "needs prob"),
        (dict(type="RandomFlip", prob=0.5, direction="horizontall"), "Did you mean 'horizontal'"),
        (dict(type="MultiView", num_views=[1], transforms=[[], []]), "1 numbers for 2 pipelines"),
        (dict(type="LoadImageFromFile", to_float32=True), "uint8 RGB"),
        ("RandomFlip", "dict\\(type=...\\) or callables"),
    ],
)
def test_mistakes(step, message):
    with pytest.raises(ConfigError, match=message):
        build_pipeline([step])


def test_a_crop_larger_than_the_image():
    with pytest.raises(ConfigError, match="97x131 .* smaller than crop_size=\\(120, 120\\)"):
        apply(RandomCrop(120))
    assert apply(RandomCrop(120, pad_if_needed=True)).shape == (120, 120, 3)
