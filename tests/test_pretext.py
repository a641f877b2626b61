"""Relative location and rotation: what the host makes of an image, and the losses against NumPy."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxpretrain.build import ConfigError
from jaxpretrain.data.host_transforms import build_pipeline
from jaxpretrain.methods.relative_loc import RelativeLocNeck
from tests.method_cases import CASES


def coordinates(height: int, width: int) -> np.ndarray:
    """An image whose pixels say where they are: (row, column, 7)."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows, columns, np.full_like(rows, 7)], axis=2).astype(np.uint8)


def transform(*steps: Any) -> Any:
    pipeline = build_pipeline(steps)
    return lambda image, seed=0: pipeline({"image": image, "label": 3}, np.random.default_rng(seed))


def test_patches_come_from_their_cells() -> None:
    cut = transform(dict(type="RandomPatchWithLabels", patch_jitter=4))
    cells = [(1, 1), (0, 0), (0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1), (2, 2)]
    starts = set()
    for seed in range(60):
        sample = cut(coordinates(61, 75), seed)
        assert sample["label"] == 3
        assert len(sample["image"]) == 9
        for patch, (row, column) in zip(sample["image"], cells, strict=True):
            assert patch.shape == (16, 21, 3)
            top, left = int(patch[0, 0, 0]) - 20 * row, int(patch[0, 0, 1]) - 25 * column
            assert 0 <= top <= 4 and 0 <= left <= 4
            np.testing.assert_array_equal(patch[..., :2] - patch[0, 0, :2], coordinates(16, 21)[..., :2])
            starts.add((top, left))
    assert len(starts) == 25


def test_patches_of_the_reference() -> None:
    patches = transform(dict(type="RandomPatchWithLabels"))(coordinates(255, 255))["image"]
    assert {patch.shape for patch in patches} == {(64, 64, 3)}


def test_rotations_are_clockwise() -> None:
    image = coordinates(5, 5)
    views = transform(dict(type="RotationWithLabels"))(image)["image"]
    for turns, view in enumerate(views):
        corner = [(0, 0), (4, 0), (4, 4), (0, 4)][turns]  # which corner came to the upper left
        assert tuple(view[0, 0, :2]) == corner
        assert sorted(map(tuple, view.reshape(-1, 3))) == sorted(map(tuple, image.reshape(-1, 3)))


def test_errors_of_the_transforms() -> None:
    with pytest.raises(ConfigError, match=r"cells of 20x20 pixels leave no patch with patch_jitter=21"):
        transform(dict(type="RandomPatchWithLabels"))(coordinates(60, 60))
    with pytest.raises(ConfigError, match="must not be negative"):
        transform(dict(type="RandomPatchWithLabels", patch_jitter=-1))
    with pytest.raises(ConfigError, match="one square image, not an image of 4x5 pixels"):
        transform(dict(type="RotationWithLabels"))(coordinates(4, 5))
    with pytest.raises(ConfigError, match="one square image, not views"):
        transform(dict(type="RotationWithLabels"), dict(type="RotationWithLabels"))(coordinates(4, 4))
    with pytest.raises(ConfigError, match="Did you mean 'RotationWithLabels'"):
        transform(dict(type="RotationWithLabel"))


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> float:
    logits = np.asarray(logits, np.float64)
    return float(np.mean(np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(logits)), labels]))


def test_relative_location_by_hand() -> None:
    """Each neighbour with the centre, one pair after the other; the neighbour's channels first."""
    method, batch = CASES["relative_loc"].make(), CASES["relative_loc"].batch()
    method.neck.dropout.rate = 0.0

    @nnx.jit
    def run(method: Any, batch: Any) -> Any:
        value, metrics = method.loss(batch, rngs=nnx.Rngs(0))
        method.neck.bn.use_running_average = False
        inner = method.backbone(batch["image"][0])[-1]
        outer = method.backbone(jnp.concatenate(batch["image"][1:]))[-1].mean(axis=(1, 2))
        inner = jnp.tile(inner.mean(axis=(1, 2)), (8, 1))
        logits = method.head(method.neck(jnp.concatenate([outer, inner], axis=1)[:, None, None], rngs=nnx.Rngs(0)))
        return value, metrics, logits

    value, metrics, logits = run(method, batch)
    labels = np.repeat(np.arange(8), 8)  # all first neighbours, then all second
    assert value == pytest.approx(cross_entropy(logits, labels), rel=1e-4)
    assert metrics["accuracy_top-1"] == pytest.approx(100 * np.mean(np.argmax(logits, axis=1) == labels))


def test_rotation_by_hand() -> None:
    method, batch = CASES["rotation_pred"].make(), CASES["rotation_pred"].batch()

    @nnx.jit
    def run(method: Any, batch: Any) -> Any:
        logits = method.head(method.neck(method.backbone(jnp.concatenate(batch["image"]))))
        return *method.loss(batch), logits

    value, metrics, logits = run(method, batch)
    labels = np.repeat(np.arange(4), 8)
    assert value == pytest.approx(cross_entropy(logits, labels), rel=1e-4)
    assert metrics["accuracy_top-1"] == pytest.approx(100 * np.mean(np.argmax(logits, axis=1) == labels))


def test_neck_drops_and_starts_small() -> None:
    neck = RelativeLocNeck(8, 4096, rngs=nnx.Rngs(0))
    neck.init_weights(nnx.Rngs(1))
    assert neck.bn.momentum == 0.003
    assert float(jnp.std(neck.fc.kernel[...])) == pytest.approx(0.01, rel=0.05)
    x = jax.random.normal(jax.random.key(0), (16, 2, 2, 16))
    (y,) = neck((x,), rngs=nnx.Rngs(3))
    assert float((y == 0).mean()) == pytest.approx(0.75, abs=0.02)  # half by relu, half of the rest by dropout
    neck.eval()
    assert neck((x,))[0].shape == (16, 4096)


@pytest.mark.parametrize("name", ["relative_loc", "rotation_pred"])
def test_wrong_number_of_views(name: str) -> None:
    with pytest.raises(ConfigError, match="the batch has 2"):
        CASES[name].make().loss(CASES["mocov2"].batch())
