"""AutoAugment, RandAugment and their operations: policies and strengths of the reference. Its pixels: test_host_golden.py."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest

from jaxpretrain.build import ConfigError
from jaxpretrain.data.auto_augment import AUTOAUGMENT, OPERATIONS, RANDAUGMENT, AutoAugment, Operation, RandAugment
from jaxpretrain.data.host_transforms import build_pipeline
from jaxpretrain.data.random_erasing import RandomErasing

from .parity import GOLDEN

SPEC = json.loads((GOLDEN / "transforms.json").read_text())
IMAGE = np.load(GOLDEN / "transforms.npz")["image"]


def described(operation: Operation) -> dict:
    """An operation in the form of the reference's policies."""
    said = dict(type=type(operation).__name__, prob=operation.prob, random_negative_prob=operation.random_negative_prob)
    if operation.argument and operation.fixed is not None:
        said[operation.argument] = pytest.approx(operation.fixed, abs=1e-9)
    elif operation.argument:
        said["magnitude_range"] = list(operation.range)
    if hasattr(operation, "horizontal"):
        said["direction"] = "horizontal" if operation.horizontal else "vertical"
    return said


def without_idle_signs(policy: dict) -> dict:
    """`random_negative_prob` matters for operations with a sign alone."""
    return policy if OPERATIONS[policy["type"]].signed else policy | dict(random_negative_prob=0.0)


def test_policies_of_the_reference():
    ours = [[described(operation) for operation in chain] for chain in AutoAugment("imagenet").chains]
    wanted = SPEC["policies"]["autoaugment"]["imagenet"]
    assert ours == [[without_idle_signs(policy) for policy in chain] for chain in wanted]
    assert SPEC["policies"]["autoaugment"].keys() == AUTOAUGMENT.keys()
    for name, policies in SPEC["policies"]["randaugment"].items():
        ours = [described(operation) for operation in RandAugment(name, 2, 9).operations]
        assert ours == [without_idle_signs(policy) for policy in policies]
    assert SPEC["policies"]["randaugment"].keys() == RANDAUGMENT.keys()


def test_strengths_of_the_reference():
    for name, table in SPEC["policies"]["randaugment_magnitudes_no_noise"].items():
        for key, values in table.items():
            kind, _, direction = key.partition("_")
            for level, wanted in values.items():
                found = [
                    op.strength(np.random.default_rng())
                    for op in RandAugment(name, 2, float(level)).operations
                    if type(op).__name__ == kind and (not direction or op.horizontal == (direction == "horizontal"))
                ]
                assert found == [pytest.approx(wanted)]
    golden = SPEC["statistics"]["rotate_magnitude_level9_std0.5"]
    rotate = RandAugment([dict(type="Rotate", magnitude_range=(0, 30))], 1, 9, 0.5).operations[0]
    rng = np.random.default_rng(0)
    angles = np.array([rotate.strength(rng) for _ in range(20000)])
    assert angles.mean() == pytest.approx(golden["mean"], abs=0.1)
    assert angles.std() == pytest.approx(golden["std"], abs=0.1)
    assert angles.max() == 30
    uniform = RandAugment([dict(type="Rotate", magnitude_range=(0, 30))], 1, 5, "inf").operations[0]
    angles = np.array([uniform.strength(rng) for _ in range(20000)])
    assert 0 <= angles.min() < 0.1 and 14.9 < angles.max() <= 15 and abs(angles.mean() - 7.5) < 0.1


def test_hparams_reach_what_takes_them():
    augment = RandAugment("timm_increasing", 2, 9, hparams=dict(pad_val=[124, 116, 104], interpolation="bicubic"))
    warps = [op for op in augment.operations if hasattr(op, "pad_val")]
    assert [type(op).__name__ for op in warps] == ["Rotate", "Shear", "Shear", "Translate", "Translate"]
    assert all(op.pad_val == (124, 116, 104) and op.filter == 2 for op in warps)
    quirk = SPEC["policies"]["autoaugment_hparams_quirk"]
    for chain in AutoAugment("imagenet", hparams=dict(pad_val=0, interpolation="bicubic")).chains:
        for op in chain:
            if type(op).__name__ == "Rotate":
                assert op.pad_val == (0, 0, quirk["autoaugment_rotate"]["pad_val"]) and op.filter == 0


def test_randaugment_draws_with_replacement_and_signs(monkeypatch):
    """Two of fifteen operations, each applied half of the times; signs are even."""
    seen: Counter = Counter()
    strengths = []
    for cls in set(OPERATIONS.values()):
        monkeypatch.setattr(
            cls,
            "change",
            lambda self, image, strength: (
                seen.update([type(self).__name__]),
                strengths.append(strength) if type(self).__name__ == "Rotate" else None,
                image,
            )[-1],
        )
    augment, rng = RandAugment("timm_increasing", 2, 9), np.random.default_rng(0)
    for _ in range(15000):
        augment({"image": IMAGE[:4, :4]}, rng)
    assert sum(seen.values()) == pytest.approx(15000, rel=0.02)
    assert seen["Equalize"] == pytest.approx(1000, rel=0.12)
    assert seen["Shear"] == pytest.approx(2000, rel=0.1)
    assert {abs(s) for s in strengths} == {27.0}
    assert np.mean(np.sign(strengths)) == pytest.approx(0, abs=0.12)


def test_in_a_pipeline_and_of_several_views():
    pipeline = build_pipeline(
        [
            dict(type="RandAugment", policies="timm_increasing", num_policies=2, magnitude_level=9, magnitude_std=0.5),
            dict(type="RandomErasing", erase_prob=1.0, mode="rand", fill_std=(1.0, 1.0, 1.0)),
        ]
    )
    rng = np.random.default_rng(1)
    before = IMAGE.copy()
    views = pipeline({"image": (IMAGE, IMAGE)}, rng)["image"]
    assert all(view.shape == IMAGE.shape and view.dtype == np.uint8 for view in views)
    assert (views[0] != views[1]).any()
    assert (before == IMAGE).all()
    again = pipeline({"image": (IMAGE, IMAGE)}, np.random.default_rng(1))["image"]
    assert all((a == b).all() for a, b in zip(views, again, strict=True))


def test_cutout():
    cut = OPERATIONS["Cutout"](shape=20, prob=1.0, pad_val=(1, 2, 3))
    out = cut({"image": IMAGE}, np.random.default_rng(0))["image"]
    painted = (out == (1, 2, 3)).all(axis=-1)
    rows, columns = np.where(painted.any(axis=1))[0], np.where(painted.any(axis=0))[0]
    assert painted.sum() == (np.ptp(rows) + 1) * (np.ptp(columns) + 1) <= 400


def test_mistakes_are_named():
    with pytest.raises(ConfigError, match="no policies 'timm_increasin'. Did you mean 'timm_increasing'"):
        RandAugment("timm_increasin", 2, 9)
    with pytest.raises(ConfigError, match="No operation 'Rotat' to augment with. Did you mean 'Rotate'"):
        RandAugment([dict(type="Rotat")], 2, 9)
    with pytest.raises(ConfigError, match="needs either angle or magnitude_range"):
        OPERATIONS["Rotate"]()
    with pytest.raises(ConfigError, match="has no argument 'angel'"):
        OPERATIONS["Rotate"](angel=3)
    with pytest.raises(ConfigError, match="magnitude_std='big'"):
        RandAugment("timm_increasing", 2, 9, "big")
    with pytest.raises(ConfigError, match="mode='paint'"):
        RandomErasing(mode="paint")
    with pytest.raises(ConfigError, match="erase_prob=1.5"):
        RandomErasing(erase_prob=1.5)
