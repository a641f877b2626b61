"""Host transforms of geometry: sizes, probabilities, views, errors. Pixels of the reference: test_host_golden.py."""

from __future__ import annotations

import numpy as np
import pytest

from jaxpretrain.build import ConfigError
from jaxpretrain.data.composition import MultiView
from jaxpretrain.data.host_transforms import build_pipeline
from jaxpretrain.data.image_ops import Box
from jaxpretrain.data.transforms import RandomCrop, RandomFlip, RandomResizedCrop, Resize

from .parity import GOLDEN

IMAGE = np.load(GOLDEN / "transforms.npz")["image"]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def apply(transform, image=IMAGE, generator=None):
    return transform({"image": image}, generator or rng())["image"]


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
        (dict(type="Mixupp"), "No host transform 'Mixupp'.*train_cfg.augments"),
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
