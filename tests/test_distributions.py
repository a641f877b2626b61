"""What host transforms draw is distributed as their documentation says: every random parameter of every transform.

Tests are chi-square and Kolmogorov-Smirnov with fixed seeds; they fail where the chance of what was found is below that of
five standard deviations. `CASES` and `NOTHING_RANDOM` hold all names; one that is added must be put into either.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import permutations
from typing import Any

import numpy as np
import pytest
from scipy import stats

from jaxpretrain.data.augment_operations import OPERATIONS
from jaxpretrain.data.auto_augment import AutoAugment, RandAugment
from jaxpretrain.data.host_transforms import TRANSFORMS, host_transform

FIVE_SIGMA = 5.7e-7
COUNT = 4000
LARGE = 20000  # pixels of an edge, so that rounding to pixels does not show

NOTHING_RANDOM = {
    "ApplyToList",
    "CenterCrop",
    "CleanCaption",
    "Collect",
    "EfficientNetCenterCrop",
    "ImageToTensor",
    "LoadImageFromFile",
    "MultiView",
    "Normalize",
    "NumpyToPIL",
    "PILToNumpy",
    "PackInputs",
    "PackMultiTaskInputs",
    "PackSelfSupInputs",
    "Pad",
    "Resize",
    "ResizeEdge",
    "RotationWithLabels",
    "ToNumpy",
    "ToPIL",
    "ToTensor",
    "Transpose",
    "torchvision/CenterCrop",
    "torchvision/Resize",
}


def even(values: Any, low: float, high: float) -> None:
    """Continuous, even between low and high."""
    values = np.asarray(values, float)
    assert low <= values.min() and values.max() <= high
    assert stats.kstest(values, stats.uniform(low, high - low).cdf).pvalue > FIVE_SIGMA


def counts(values: Any, probabilities: dict[Any, float] | list[Any]) -> None:
    """Discrete: of these probabilities, or all alike."""
    values = list(values)
    if not isinstance(probabilities, dict):
        probabilities = {value: 1 / len(probabilities) for value in probabilities}
    assert set(values) <= set(probabilities), set(values) - set(probabilities)
    kinds = [kind for kind, prob in probabilities.items() if prob > 0]
    assert all(probabilities[value] > 0 for value in set(values))
    observed = [values.count(kind) for kind in kinds]
    expected = [probabilities[kind] * len(values) for kind in kinds]
    assert stats.chisquare(observed, expected).pvalue > FIVE_SIGMA, dict(zip(kinds, observed, strict=True))


def independent(*columns: Any) -> None:
    """No pair of columns of numbers is correlated, in quarters of their ranks."""
    rng = np.random.default_rng(98765)  # breaks ties; not the numbers that were drawn from
    ranks = [np.argsort(np.lexsort((rng.random(len(column)), np.asarray(column)))) for column in columns]
    quarters = [rank * 4 // len(rank) for rank in ranks]
    for i, one in enumerate(quarters):
        for other in quarters[:i]:
            table = np.bincount(one * 4 + other, minlength=16).reshape(4, 4)
            assert stats.chi2_contingency(table).pvalue > FIVE_SIGMA


def drawn(transform: Any, height: int = 60, width: int = 80, count: int = COUNT, seed: int = 0) -> list[Any]:
    rng = np.random.default_rng(seed)
    return [transform.draw(rng, height, width) for _ in range(count)]


def crops(transform: Any, last: bool = True, area: tuple[float, float] = (0.1, 0.5)) -> None:
    """Boxes of even area and log aspect (3/4 to 4/3), at even places; all of these on their own."""
    boxes = np.array([box[0] if isinstance(box[0], tuple) else box for box in drawn(transform, LARGE, LARGE)], float)
    top, left, h, w = boxes.T
    ratio, log_aspect = h * w / LARGE**2, np.log(w / h)
    even(ratio, area[0] - 1e-3, area[1] + 1e-3)
    even(log_aspect, math.log(3 / 4) - 1e-3, math.log(4 / 3) + 1e-3)
    y, x = top / (LARGE - h), left / (LARGE - w)
    even(y, 0, 1)
    even(x, 0, 1)
    independent(ratio, log_aspect, y, x)
    fits = area[1] <= 0.5
    assert fits


def resized_crop(name: str, **arguments: Any) -> None:
    crops(host_transform(name)(32, **arguments))


def cut_crop() -> None:
    """MAERandomResizedCrop draws once: what does not fit is cut, not drawn anew."""
    crops(host_transform("MAERandomResizedCrop")(32, scale=(0.1, 0.5)))
    boxes = np.array(drawn(host_transform("MAERandomResizedCrop")(32, scale=(0.9, 1.0)), LARGE, LARGE), float)
    cut = (boxes[:, 2:] == LARGE).any(1).mean()
    # |log aspect| > -log area cuts: with a = -log area in (0, 0.105) and the aspect even, 1 - mean(a) / log(4/3).
    wanted = 1 - (1 - 0.9 + 0.9 * math.log(0.9)) / 0.1 / math.log(4 / 3)
    assert abs(cut - wanted) < 5 * math.sqrt(wanted * (1 - wanted) / COUNT)


def efficientnet_crop() -> None:
    transform = host_transform("EfficientNetRandomCrop")(32, crop_ratio_range=(0.1, 0.5))
    top, left, h, w = np.array(drawn(transform, LARGE, LARGE), float).T
    aspect = w / h
    even(aspect, 3 / 4 - 1e-3, 4 / 3 + 1e-3)
    shortest, tallest = (LARGE * np.sqrt(area / aspect) for area in (0.1, 0.5))
    y, x, height = top / (LARGE - h), left / (LARGE - w), (h - shortest) / (tallest - shortest)
    even(height, -1e-3, 1 + 1e-3)
    even(y, 0, 1)
    even(x, 0, 1)
    independent(aspect, height, y, x)


def random_crop(name: str) -> None:
    places = drawn(host_transform(name)((50, 64)))
    counts([box.top for box in places], list(range(11)))
    counts([box.left for box in places], list(range(17)))
    independent([box.top for box in places], [box.left for box in places])


def flips(name: str, **arguments: Any) -> None:
    direction = "vertical" if "Vertical" in name else "horizontal"
    counts(drawn(host_transform(name)(0.3, **arguments)), {direction: 0.3, None: 0.7})


def random_flip() -> None:
    flips("RandomFlip")
    several = host_transform("RandomFlip")([0.2, 0.3, 0.1], ["horizontal", "vertical", "diagonal"])
    counts(drawn(several), {"horizontal": 0.2, "vertical": 0.3, "diagonal": 0.1, None: 0.4})
    shared = host_transform("RandomFlip")(0.8, ["horizontal", "vertical"])
    counts(drawn(shared), {"horizontal": 0.4, "vertical": 0.4, None: 0.2})


def random_resize() -> None:
    scales = np.array(drawn(host_transform("RandomResize")((100000, 200000), (0.5, 2.0))), float)
    even(scales[:, 0] / 100000, 0.5 - 1e-4, 2.0)
    assert np.abs(scales[:, 1] - 2 * scales[:, 0]).max() <= 2, "one factor for both"
    scales = np.array(drawn(host_transform("RandomResize")([(20, 60), (30, 50)])))
    counts(scales[:, 0].tolist(), list(range(20, 31)))
    counts(scales[:, 1].tolist(), list(range(50, 61)))
    independent(*scales.T)


def translate_pad() -> None:
    places = drawn(host_transform("RandomTranslatePad")(90, aug_translate=True))
    counts([top for top, _ in places], list(range(30)))
    counts([left for _, left in places], list(range(10)))
    independent(*np.array(places).T)


def rotation() -> None:
    even(drawn(host_transform("RandomRotation")(30)), -30, 30)
    even(drawn(host_transform("RandomRotation")((10, 90))), 10, 90)


def jitter() -> None:
    found = drawn(host_transform("ColorJitter")(0.4, 1.5, (0.2, 0.7), 0.1), count=6000)
    counts([one.order for one in found], list(permutations(range(4))))
    factors = np.array([one[1:] for one in found])
    for column, (low, high) in zip(factors.T, ((0.6, 1.4), (0, 2.5), (0.2, 0.7), (-0.1, 0.1)), strict=True):
        even(column, low, high)
    independent(*factors.T, [one.order.index(0) for one in found])


def coin(name: str, prob: float = 0.3, **arguments: Any) -> None:
    counts(map(bool, drawn(host_transform(name)(prob=prob, **arguments))), {True: prob, False: 1 - prob})


def lighting() -> None:
    alpha = np.array(drawn(host_transform("Lighting")([1, 2, 3], np.eye(3).tolist(), alphastd=0.1)))
    for column in alpha.T:
        assert stats.kstest(column, stats.norm(0, 0.1).cdf).pvalue > FIVE_SIGMA
    independent(*alpha.T)


def erasing() -> None:
    transform = host_transform("RandomErasing")(0.3, 0.1, 0.3, aspect_range=(3 / 4, 4 / 3))
    found = drawn(transform, 300, 300)
    counts([one is not None for one in found], {True: 0.3, False: 0.7})
    transform = host_transform("RandomErasing")(1.0, 0.1, 0.5, aspect_range=(3 / 4, 4 / 3))
    transform.fill = lambda rng, height, width: None
    crops(transform)
    noise = host_transform("RandomErasing")(1.0, mode="rand").fill(np.random.default_rng(0), 40, 40)
    counts((noise.ravel() // 16).tolist(), list(range(16)))
    normal = host_transform("RandomErasing")(1.0, mode="rand", fill_color=(100, 120, 140), fill_std=(10, 20, 30))
    for channel, mean, std in zip(
        normal.fill(np.random.default_rng(0), 60, 60).T, (100, 120, 140), (10, 20, 30), strict=True
    ):
        levels = channel.ravel() + np.random.default_rng(1).random(3600)  # whole levels, cut off, made even again
        assert stats.kstest(levels, stats.norm(mean, std).cdf).pvalue > FIVE_SIGMA


def two_pictures() -> None:
    cls = host_transform("RandomResizedCropAndInterpolationWithTwoPic")
    crops(cls(32, scale=(0.1, 0.5)))
    seen: list[Any] = []
    transform = cls(8, second_size=4, interpolation="random")
    transform.apply = lambda image, box, interpolation: seen.append(interpolation)
    rng = np.random.default_rng(0)
    for _ in range(COUNT):
        transform({"image": np.zeros((30, 30, 3), np.uint8)}, rng)
    counts(seen, ["bilinear", "bicubic"])


def operation(name: str) -> None:
    """Probability, sign, and the three ways of drawing a strength."""
    cls = OPERATIONS[name]
    sign = dict(random_negative_prob=0.2) if cls.signed else {}
    if cls.argument is None:
        counts([one is not None for one in drawn(cls(prob=0.3))], {True: 0.3, False: 0.7})
        return
    fixed: dict[str, Any] = {cls.argument: 3}
    counts([one is not None for one in drawn(cls(prob=0.3, **fixed))], {True: 0.3, False: 0.7})
    if cls.signed:
        counts(np.sign(drawn(cls(prob=1.0, **fixed, **sign))).tolist(), {1.0: 0.8, -1.0: 0.2})
        counts(np.sign(drawn(cls(prob=1.0, **fixed))).tolist(), {1.0: 0.5, -1.0: 0.5})
    rng = np.random.default_rng(0)
    inf = cls(magnitude_range=(10, 30), magnitude_level=6, magnitude_std="inf")
    even([inf.strength(rng) for _ in range(COUNT)], 10, 22)
    around = cls(magnitude_range=(10, 30), magnitude_level=9, magnitude_std=2.0)
    found = np.array([around.strength(rng) for _ in range(COUNT)])
    inside = found < 30
    cut = stats.norm.sf(0.5)  # above total_level = 10, half a deviation away, all become 10
    counts(inside.tolist(), {True: 1 - cut, False: cut})
    assert stats.kstest(found[inside], stats.truncnorm(-7, 0.5, loc=28, scale=4).cdf).pvalue > FIVE_SIGMA
    assert {cls(magnitude_range=(10, 30), magnitude_level=5).strength(rng)} == {20.0}


def gaussian_blur() -> None:
    transform = host_transform("RandomGaussianBlur")(0.1, 2.0, prob=0.3)
    found = drawn(transform, count=3 * COUNT)
    counts([one is not None for one in found], {True: 0.3, False: 0.7})
    even([one for one in found if one is not None], 0.1, 2.0)


def cutout() -> None:
    operation("Cutout")
    boxes = drawn(OPERATIONS["Cutout"](shape=(2000, 4000), prob=1.0), LARGE, LARGE)
    top, left = np.array([(box.top, box.left) for box in boxes], float).T
    even(top[top > 0], 0, LARGE - 1000)
    even(left[left > 0], 0, LARGE - 2000)
    counts((top > 0).tolist(), {True: 0.95, False: 0.05})
    counts((left > 0).tolist(), {True: 0.9, False: 0.1})
    independent(top, left)


def spy(operations: list[Any], seen: list[int]) -> None:
    """Operations that only say that they were called."""
    for number, one in enumerate(operations):
        one.draw = lambda rng, height, width, number=number: seen.append(number)


def auto_augment() -> None:
    transform, seen = AutoAugment([[dict(type="Invert")] for _ in range(7)]), []
    spy([chain[0] for chain in transform.chains], seen)
    rng = np.random.default_rng(0)
    for _ in range(COUNT):
        transform({"image": np.zeros((1, 1, 3), np.uint8)}, rng)
    counts(seen, list(range(7)))
    assert len(AutoAugment("imagenet").chains) == 25


def rand_augment() -> None:
    transform, seen = RandAugment([dict(type="Invert") for _ in range(5)], num_policies=2, magnitude_level=9), []
    spy(transform.operations, seen)
    rng = np.random.default_rng(0)
    for _ in range(COUNT):
        transform({"image": np.zeros((1, 1, 3), np.uint8)}, rng)
    pairs = np.array(seen).reshape(COUNT, 2)
    counts((pairs[:, 0] * 5 + pairs[:, 1]).tolist(), list(range(25)))  # with replacement


def trivial_augment(name: str) -> None:
    transform = host_transform(name)(num_magnitude_bins=11)
    found = drawn(transform)
    counts([kind for kind, _ in found], list(transform.OPERATIONS))
    signed = [(kind, strength) for kind, strength in found if kind in transform.SIGNED]
    numbers = [round(10 * abs(strength) / transform.strength(kind, 10)) for kind, strength in signed]
    counts(numbers, list(range(11)))
    counts([strength > 0 for _, strength in signed if strength], [True, False])
    levels = [round(10 - strength / 25.5) for kind, strength in found if kind == "Solarize"]
    counts(levels, list(range(11)))


def random_apply() -> None:
    transform, rng = host_transform("RandomApply")([], prob=0.3), np.random.default_rng(0)
    counts([transform.draw(rng) for _ in range(COUNT)], {True: 0.3, False: 0.7})


def random_choice() -> None:
    rng = np.random.default_rng(0)
    for prob in (None, [0.1, 0.6, 0.0, 0.3]):
        transform = host_transform("RandomChoice")([[]] * 4, prob)
        counts([transform.draw(rng) for _ in range(COUNT)], dict(enumerate(prob or [0.25] * 4)))


def simmim_mask() -> None:
    transform, rng = host_transform("SimMIMMaskGenerator")(64, 16, 8, mask_ratio=0.25), np.random.default_rng(0)
    masks = np.array([transform.draw(rng)[::2, ::2].ravel() for _ in range(COUNT)])
    assert (masks.sum(1) == 4).all()
    # Numbers of the first and second masked square: every pair of squares is as likely as any other.
    pairs = np.array([np.flatnonzero(mask)[[0, 1, 2, 3]] for mask in masks])
    together = np.zeros((16, 16))
    for chosen in pairs:
        together[np.ix_(chosen, chosen)] += 1
    above = together[np.triu_indices(16, 1)]
    expected = COUNT * 6 / 120
    assert np.abs(above - expected).max() < 5 * math.sqrt(expected)
    assert np.abs(np.diag(together) - COUNT / 4).max() < 5 * math.sqrt(COUNT * 3 / 16)


def beit_mask() -> None:
    """Blocks: the area even between its limits, log aspect even; the rest is compared with the reference's masks."""
    transform = host_transform("BEiTMaskGenerator")(40, 400, min_num_patches=16)
    rng = np.random.default_rng(0)
    masks = np.array([transform.draw(rng) for _ in range(300)])
    assert (masks.sum((1, 2)) == 400).all() and not masks[:, -1].any() and not masks[:, :, -1].any()
    share = masks.mean(0)[:-1, :-1]
    # Nothing prefers left or right, top or bottom.
    for mirrored in (share[::-1], share[:, ::-1], share.T):
        error = np.sqrt(2 * 0.25 * 0.75 / 300)
        assert np.abs(share - mirrored).max() < 6 * error


def patches() -> None:
    transform, rng = host_transform("RandomPatchWithLabels")(patch_jitter=5), np.random.default_rng(0)
    y, x = np.mgrid[:60, :60]
    image = np.stack([y, x, y * 0], -1).astype(np.uint8)
    offsets = []
    for _ in range(600):
        views = transform({"image": image}, rng)["image"]
        offsets += [(int(view[0, 0, 0]) % 20, int(view[0, 0, 1]) % 20) for view in views]
    counts([dy for dy, _ in offsets], list(range(6)))
    counts([dx for _, dx in offsets], list(range(6)))
    independent(*np.array(offsets).T, np.arange(len(offsets)) % 9)


def albumentations() -> None:
    pytest.importorskip("albumentations")
    even(drawn(host_transform("Albumentations")([])), 0, 2**31)


CASES: dict[str, Callable[[], None]] = {
    "Albu": albumentations,
    "Albumentations": albumentations,
    "AutoAugment": auto_augment,
    "BEiTMaskGenerator": beit_mask,
    "ColorJitter": jitter,
    "Cutout": cutout,
    "EfficientNetRandomCrop": efficientnet_crop,
    "Lighting": lighting,
    "MAERandomResizedCrop": cut_crop,
    "RandAugment": rand_augment,
    "RandomApply": random_apply,
    "RandomChoice": random_choice,
    "RandomCrop": lambda: random_crop("RandomCrop"),
    "RandomErasing": erasing,
    "RandomFlip": random_flip,
    "RandomGaussianBlur": gaussian_blur,
    "RandomGrayscale": lambda: coin("RandomGrayscale", keep_channels=True),
    "RandomPatchWithLabels": patches,
    "RandomResize": random_resize,
    "RandomResizedCrop": lambda: resized_crop("RandomResizedCrop", crop_ratio_range=(0.1, 0.5)),
    "RandomResizedCropAndInterpolationWithTwoPic": two_pictures,
    "RandomRotation": rotation,
    "RandomSolarize": lambda: coin("RandomSolarize"),
    "RandomTranslatePad": translate_pad,
    "SimMIMMaskGenerator": simmim_mask,
    "TrivialAugmentWide": lambda: trivial_augment("TrivialAugmentWide"),
    "torchvision/RandomCrop": lambda: random_crop("torchvision/RandomCrop"),
    "torchvision/RandomHorizontalFlip": lambda: flips("torchvision/RandomHorizontalFlip"),
    "torchvision/RandomResizedCrop": lambda: resized_crop("torchvision/RandomResizedCrop", scale=(0.1, 0.5)),
    "torchvision/RandomVerticalFlip": lambda: flips("torchvision/RandomVerticalFlip"),
    "torchvision/TrivialAugmentWide": lambda: trivial_augment("torchvision/TrivialAugmentWide"),
} | {name: (lambda name=name: operation(name)) for name in OPERATIONS if name != "Cutout"}


@pytest.mark.parametrize("name", CASES)
def test_distribution(name: str) -> None:
    CASES[name]()


def test_all_names_are_here() -> None:
    assert not NOTHING_RANDOM & set(CASES)
    assert set(TRANSFORMS) == NOTHING_RANDOM | set(CASES)


def test_these_tests_can_fail() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(AssertionError):
        even(rng.beta(1.2, 1, COUNT), 0, 1)
    with pytest.raises(AssertionError):
        counts(rng.choice(4, COUNT, p=[0.3, 0.25, 0.25, 0.2]).tolist(), list(range(4)))
    values = rng.random(COUNT)
    with pytest.raises(AssertionError):
        independent(values, values + rng.random(COUNT) * 3)
