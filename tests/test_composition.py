"""Transforms made of transforms, the bridges to Pillow, torchvision and albumentations, and what pipelines do besides pixels."""

from __future__ import annotations

import gzip
import json
import pickle
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from jaxpretrain.build import ConfigError
from jaxpretrain.data.composition import ApplyToList, MultiView, RandomApply, RandomChoice
from jaxpretrain.data.formatting import Collect
from jaxpretrain.data.host_transforms import TRANSFORMS, build_pipeline
from jaxpretrain.data.mask_transforms import Pictures
from jaxpretrain.data.padding import Pad

from .parity import GOLDEN
from .test_host_golden import SMALL

INVERT = dict(type="Invert", prob=1.0)
FLIP = dict(type="RandomFlip", prob=1.0)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def run(*steps: Any, seed: int = 0, **sample: Any) -> dict[str, Any]:
    return build_pipeline(steps)({"image": SMALL, **sample}, rng(seed))


def test_random_apply_is_all_or_nothing() -> None:
    step = RandomApply([INVERT, FLIP], prob=0.3)
    outs = [step({"image": SMALL}, rng(seed))["image"] for seed in range(200)]
    both = (255 - SMALL)[:, ::-1]
    applied = [(out == both).all() for out in outs]
    assert all(done or (out == SMALL).all() for done, out in zip(applied, outs, strict=True))
    assert abs(np.mean(applied) - 0.3) < 5 * np.sqrt(0.3 * 0.7 / 200)
    assert (run(dict(type="RandomApply", transforms=INVERT, prob=1.0))["image"] == 255 - SMALL).all(), (
        "one, without a list"
    )
    assert (run(dict(type="RandomApply", transforms=[INVERT], prob=0.0))["image"] == SMALL).all()


def test_random_choice_takes_one() -> None:
    step = RandomChoice([[INVERT], FLIP, []], prob=[0.5, 0.25, 0.25])
    wanted = [255 - SMALL, SMALL[:, ::-1], SMALL]
    found = [step({"image": SMALL}, rng(seed))["image"] for seed in range(400)]
    counts = [sum((out == image).all() for out in found) for image in wanted]
    assert sum(counts) == 400
    for count, prob in zip(counts, (0.5, 0.25, 0.25), strict=True):
        assert abs(count / 400 - prob) < 5 * np.sqrt(prob * (1 - prob) / 400)


@pytest.mark.parametrize(
    "step",
    [
        dict(type="RandomApply", transforms=[INVERT], prob=0.5),
        dict(type="RandomChoice", transforms=[[INVERT], []]),
        dict(type="RandAugment", policies=[dict(type="Invert", prob=0.5)], num_policies=1, magnitude_level=9),
        dict(
            type="AutoAugment", policies=[[dict(type="Invert", prob=1.0)], [dict(type="Posterize", bits=8, prob=1.0)]]
        ),
        dict(type="Invert", prob=0.5),
        dict(type="RandomSolarize", threshold=0, prob=0.5),
        dict(type="torchvision/RandomHorizontalFlip", p=0.5),
    ],
)
def test_views_are_drawn_independently(step: dict[str, Any]) -> None:
    pipeline = build_pipeline([dict(type="MultiView", num_views=2, transforms=[[]]), step])
    pairs = []
    for seed in range(400):
        views = pipeline({"image": SMALL}, rng(seed))["image"]
        pairs.append([(view != SMALL).any() for view in views])
    table = np.array(pairs).astype(int)
    counts = np.bincount(table[:, 0] * 2 + table[:, 1], minlength=4)
    assert ((counts - 100) ** 2 / 100).sum() < 40, counts  # chi-square of 3 degrees: 5 sigma is about 33


def test_pictures_of_one_crop_stay_together() -> None:
    pictures = Pictures((SMALL, SMALL[::2, ::2]))
    for seed in range(20):
        out = run(dict(type="RandomApply", transforms=[FLIP], prob=0.5), image=pictures, seed=seed)["image"]
        assert isinstance(out, Pictures)
        flipped = [(a != b).any() for a, b in zip(out, pictures, strict=True)]
        assert flipped[0] == flipped[1]


def test_nested_views() -> None:
    step = dict(type="MultiView", num_views=[1, 2], transforms=[[FLIP], [dict(type="RandomApply", transforms=INVERT)]])
    views = run(step)["image"]
    assert len(views) == 3 and (views[0] == SMALL[:, ::-1]).all()


def test_apply_to_list() -> None:
    images = [SMALL, 255 - SMALL, SMALL[::-1]]
    step = ApplyToList([dict(type="RandomCrop", crop_size=20)], scatter_key="img", collate_keys=["img_path"])
    out = step({"image": images, "path": "a", "label": 3}, rng())
    assert isinstance(out["image"], tuple) and [image.shape for image in out["image"]] == [(20, 20, 3)] * 3
    assert out["path"] == ["a"] * 3 and out["label"] == 3
    one = ApplyToList([FLIP], "img", [])({"image": SMALL}, rng())
    assert (one["image"] == SMALL[:, ::-1]).all(), "one image is no list"
    captions = ApplyToList([dict(type="CleanCaption", keys="text")], "text", [])(
        {"image": 0, "text": ["A.", "B!"]}, rng()
    )
    assert captions["text"] == ["a", "b"]


def test_pipelines_of_mmpretrain_read_unchanged() -> None:
    sample = run(
        dict(type="LoadImageFromFile"),
        dict(type="ToPIL", to_rgb=True),
        dict(type="torchvision/Resize", size=40),
        dict(type="torchvision/RandomCrop", size=32, padding=4, padding_mode="reflect"),
        dict(type="torchvision/RandomHorizontalFlip", p=0.5),
        dict(type="ToNumpy", to_bgr=True),
        dict(type="PackInputs"),
    )
    assert sample["image"].shape == (32, 32, 3) and sample["image"].dtype == np.uint8
    crop = dict(type="MAERandomResizedCrop", size=24, interpolation=3)
    sample = run(
        dict(type="NumpyToPIL", to_rgb=True),
        crop,
        dict(type="PILToNumpy", to_bgr=True),
        dict(type="Collect", keys=["img"]),
    )
    assert sample["image"].shape == (24, 24, 3)
    run(
        dict(type="Transpose", keys=["img"], order=[2, 0, 1]),
        dict(type="ImageToTensor", keys=["img"]),
        dict(type="ToTensor", keys=["gt_label"]),
        dict(type="PackMultiTaskInputs", multi_task_fields=["gt_label"]),
        dict(type="PackSelfSupInputs", meta_keys=["img_path"], algorithm_keys=["mask"]),
    )


def pipelines(node: Any) -> Iterator[list[Any]]:
    """All lists called `pipeline` inside a description."""
    for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        if key == "pipeline":
            yield value
        else:
            yield from pipelines(value)


def test_every_pipeline_of_its_recipes_runs() -> None:
    found = {
        json.dumps(pipeline)
        for file in (GOLDEN / "recipes").glob("*.json.gz")
        for pipeline in pipelines(json.loads(gzip.decompress(file.read_bytes())))
    }
    assert len(found) > 25
    image = np.repeat(np.repeat(SMALL, 4, 0), 4, 1)
    for pipeline in found:
        out = build_pipeline(json.loads(pipeline))({"image": image, "label": 0}, rng())["image"]
        for view in out if isinstance(out, tuple) else (out,):
            assert view.dtype == np.uint8 and view.shape[2] == 3, pipeline


def test_channels_between_the_bridges() -> None:
    red = np.zeros((2, 2, 3), np.uint8)
    red[..., 0] = 200
    seen = []

    def look(sample: dict[str, Any]) -> dict[str, Any]:
        seen.append(sample["image"][0, 0].tolist())
        return sample

    for flag in (True, False):
        out = run(dict(type="NumpyToPIL", to_rgb=flag), look, dict(type="PILToNumpy", to_bgr=flag), image=red)["image"]
        assert (out == red).all()
    assert seen == [[200, 0, 0], [0, 0, 200]]


def test_collect_and_transpose() -> None:
    mask = np.arange(6).reshape(2, 3)
    out = run(Collect(["img", "mask"]), label=3, index=1, epoch=0, path="a", mask=mask, extra=1)
    assert set(out) == {"image", "label", "index", "epoch", "mask"}
    out = run(dict(type="Transpose", keys=["mask"], order=[1, 0]), mask=mask)
    assert (out["mask"] == mask.T).all() and out["image"] is SMALL
    assert run(dict(type="Transpose", keys=["img"], order=[1, 0, 2]))["image"].shape == (75, 57, 3)


def test_pad_of_larger_images() -> None:
    assert Pad(size=(10, 10)).apply(SMALL, None) is SMALL
    assert Pad(size=(80, 10)).apply(SMALL, None).shape == (57, 80, 3)
    assert Pad(size_divisor=1).apply(SMALL, None) is SMALL


def test_random_resize() -> None:
    for seed in range(5):
        out = run(dict(type="RandomResize", scale=(60, 40), ratio_range=(0.5, 1.5), keep_ratio=True), seed=seed)[
            "image"
        ]
        assert abs(out.shape[1] / out.shape[0] - 75 / 57) < 0.05
    shape = run(dict(type="RandomResize", scale=[(10, 20), (10, 20)]))["image"].shape
    assert shape == (20, 10, 3)


def test_a_pipeline_of_everything_pickles() -> None:
    pipeline = build_pipeline(
        [
            dict(type="RandomResize", scale=(60, 40), ratio_range=(0.5, 1.5)),
            dict(type="RandomChoice", transforms=[[INVERT], [FLIP]]),
            dict(type="RandomApply", transforms=[dict(type="ColorJitter", hue=0.1)]),
            dict(type="EfficientNetRandomCrop", scale=20),
            dict(type="MultiView", num_views=2, transforms=[[dict(type="Pad", size=(32, 32))]]),
        ]
    )
    again = pickle.loads(pickle.dumps(pipeline))
    one, other = (p({"image": SMALL}, rng(5))["image"] for p in (pipeline, again))
    assert all((a == b).all() for a, b in zip(one, other, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# albumentations


def test_albumentations_follow_the_sample() -> None:
    pytest.importorskip("albumentations")
    steps = [
        dict(type="Albu", transforms=[
            dict(type="HorizontalFlip", p=0.5),
            dict(type="OneOf", transforms=[dict(type="Blur", blur_limit=5, p=1.0), dict(type="ChannelShuffle", p=1.0)], p=0.7),
            dict(type="RandomBrightnessContrast", p=0.5),
        ]),
    ]  # fmt: skip
    pipeline = build_pipeline(steps)
    outs = [pipeline({"image": SMALL, "label": 1}, rng(seed)) for seed in range(24)]
    assert all(out["label"] == 1 for out in outs)
    assert len({out["image"].tobytes() for out in outs}) > 8
    copy = pickle.loads(pickle.dumps(pipeline))
    with ThreadPoolExecutor(4) as pool:  # threads share the object; each sample still decides its pixels
        again = list(pool.map(lambda seed: copy({"image": SMALL}, rng(seed))["image"], range(24)))
    assert all((a["image"] == b).all() for a, b in zip(outs, again, strict=True))


def test_albumentations_get_rgb_and_give_uint8() -> None:
    pytest.importorskip("albumentations")
    grey = run(dict(type="Albumentations", transforms=[dict(type="ToGray", p=1.0)]))["image"]
    luma = SMALL @ np.array([0.299, 0.587, 0.114])
    assert np.abs(grey - luma[..., None]).max() <= 1
    with pytest.raises(ConfigError, match="must stay uint8"):
        run(dict(type="Albumentations", transforms=[dict(type="Normalize", p=1.0)]))
    with pytest.raises(ConfigError, match="'HorizontalFlp'.*'HorizontalFlip'"):
        run(dict(type="Albumentations", transforms=[dict(type="HorizontalFlp")]))
    with pytest.raises(ConfigError, match="needs a 'type'"):
        run(dict(type="Albumentations", transforms=[dict(p=1.0)]))
    with pytest.raises(ConfigError, match="only images"):
        run(dict(type="Albumentations", transforms=[], keymap=dict(gt_bboxes="bboxes")))


def test_albumentations_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "albumentations", None)
    with pytest.raises(ConfigError, match="pip install albumentations"):
        run(dict(type="Albumentations", transforms=[]))


# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (dict(type="RandomAply", transforms=[]), "'RandomApply'"),
        (dict(type="RandomApply", transforms=[], prob=1.5), "prob=1.5 is not a probability"),
        (dict(type="RandomApply", transforms=[dict(type="Inverte")]), "'Inverte'.*'Invert'"),
        (dict(type="RandomChoice", transforms=[]), "empty"),
        (dict(type="RandomChoice", transforms=[[], []], prob=[0.5, 0.6]), "1 in sum"),
        (dict(type="RandomChoice", transforms=[[], []], prob=[1.0]), "2 probabilities"),
        (dict(type="ApplyToList", transforms=[], scatter_key="img"), "needs collate_keys"),
        (dict(type="Normalize", mean=[1, 2, 3], std=[4, 5, 6]), "data_preprocessor = dict\\(mean=\\[1, 2, 3\\]"),
        (dict(type="PILToNumpy", dtype="float32"), "uint8"),
        (dict(type="PackInputs", algorithm_keys=["gt_bboxes"]), "batches hold"),
        (dict(type="PackMultiTaskInputs", multi_task_fields=["gt_caption"]), "batches hold"),
        (dict(type="Transpose", keys=["img"], order=[2, 1, 0]), "order=\\[2, 1, 0\\]"),
        (dict(type="Pad"), "either size, or size_divisor"),
        (dict(type="Pad", size=(8, 8), pad_to_square=True), "either size, or size_divisor"),
        (dict(type="Pad", size=8), "\\(width, height\\)"),
        (dict(type="Pad", size=(8, 8), padding_mode="reflct"), "'reflect'"),
        (dict(type="RandomResize", scale=(8, 8)), "goes with ratio_range"),
        (dict(type="RandomResize", scale=(8, 8), ratio_range=(2, 1)), "ascending"),
        (dict(type="RandomResize", scale=(8, 8), ratio_range=(1, 2), keep_ration=True), "'keep_ratio'"),
        (dict(type="RandomResize", scale=(8, 8), ratio_range=(1, 2), resize_type="Resiz"), "'Resize'"),
        (dict(type="EfficientNetRandomCrop", scale=(8, 8)), "square"),
        (dict(type="EfficientNetRandomCrop", scale=8, min_covered=-1), "negative"),
        (dict(type="EfficientNetRandomCrop", scale=8, min_cover=1), "'min_covered'"),
        (dict(type="torchvision/Resize", size=8, interpolation="bicubik"), "'bicubic'"),
        (dict(type="torchvision/Resize", size=8, max_size=4), "max_size=4"),
        (dict(type="torchvision/CenterCrop", size=0), "positive"),
        (dict(type="torchvision/RandomVerticalflip"), "torchvision/RandomVerticalFlip"),
    ],
)
def test_mistakes(step: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_pipeline([step])


@pytest.mark.parametrize(
    ("step", "sample", "message"),
    [
        (dict(type="Collect", keys=["img", "gt_score"]), {}, "no gt_score"),
        (dict(type="CleanCaption"), {}, "'gt_caption' of a sample must be text"),
        (dict(type="RandomTranslatePad", size=60), {}, "57x75 exceeds size=60"),
        (dict(type="ApplyToList", transforms=[], scatter_key="img", collate_keys=[]), {"image": []}, "is empty"),
    ],
)
def test_mistakes_found_while_running(step: dict[str, Any], sample: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(step, **sample)


def test_names_of_mmpretrain_are_all_there() -> None:
    """Every name of MMPretrain's registry, but for `OFAAddObjects`, which belongs to text."""
    names = [
        "Albu",
        "Albumentations",
        "ApplyToList",
        "AutoAugment",
        "AutoContrast",
        "BEiTMaskGenerator",
        "Brightness",
        "CenterCrop",
        "CleanCaption",
        "Collect",
        "ColorJitter",
        "ColorTransform",
        "Contrast",
        "Cutout",
        "EfficientNetCenterCrop",
        "EfficientNetRandomCrop",
        "Equalize",
        "GaussianBlur",
        "Invert",
        "Lighting",
        "LoadImageFromFile",
        "MAERandomResizedCrop",
        "MultiView",
        "Normalize",
        "NumpyToPIL",
        "PILToNumpy",
        "PackInputs",
        "PackMultiTaskInputs",
        "Posterize",
        "RandAugment",
        "RandomCrop",
        "RandomErasing",
        "RandomFlip",
        "RandomGrayscale",
        "RandomResize",
        "RandomResizedCrop",
        "RandomResizedCropAndInterpolationWithTwoPic",
        "RandomTranslatePad",
        "Resize",
        "ResizeEdge",
        "Rotate",
        "Sharpness",
        "Shear",
        "SimMIMMaskGenerator",
        "Solarize",
        "SolarizeAdd",
        "ToNumpy",
        "ToPIL",
        "Translate",
        "Transpose",
        "RandomApply",
        "RandomChoice",
        "Pad",
    ]
    assert not set(names) - set(TRANSFORMS)
    assert isinstance(build_pipeline([dict(type="MultiView", num_views=1, transforms=[[]])]).steps[0], MultiView)
