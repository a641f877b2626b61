"""RandAugment and AutoAugment on the device: each operation against the host's, draws, keys, devices."""

from __future__ import annotations

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax, random
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from sklearn.datasets import load_sample_images

from jaxpretrain.build import ConfigError
from jaxpretrain.data import auto_augment
from jaxpretrain.data.augment_operations import OPERATIONS, Operation
from jaxpretrain.data.device import DevicePipeline, sample_key
from jaxpretrain.data.device_auto_augment import AutoAugment, RandAugment, Table
from jaxpretrain.data.image_ops import Box

PHOTOS = load_sample_images().images
NOISE = np.random.default_rng(0).integers(0, 256, (48, 60, 3), np.uint8)
DULL = (PHOTOS[0][100:148, 200:260] // 4 + 90).astype(np.uint8)
FLAT = np.full((48, 60, 3), (7, 200, 255), np.uint8)
IMAGES = [PHOTOS[0][100:148, 200:260], PHOTOS[1][200:248, 300:360], NOISE, DULL, FLAT]

FILL = dict(pad_val=(124, 116, 104))
WARPS = [
    (name, dict(argument | direction, interpolation=filter, **FILL))
    for filter in ("nearest", "bilinear", "bicubic")
    for name, argument, direction in (
        *(("Rotate", dict(angle=a), {}) for a in (-30, -7.7, 0, 27)),
        *(
            ("Shear", dict(magnitude=m), dict(direction=d))
            for m, d in ((-0.3, "horizontal"), (0.11, "vertical"), (0.27, "horizontal"), (0.27, "vertical"))
        ),
        *(
            ("Translate", dict(magnitude=m), dict(direction=d))
            for m, d in ((-0.45, "horizontal"), (0.1033, "vertical"), (0.405, "horizontal"), (0.405, "vertical"))
        ),
    )
]
PLAIN = [
    *((name, {}) for name in ("AutoContrast", "Equalize", "Invert")),
    *(("Posterize", dict(bits=b)) for b in (0, 0.4, 1.6, 4, 8)),
    *(("Solarize", dict(thr=t)) for t in (0, 25.6, 128, 256)),
    *(("SolarizeAdd", dict(magnitude=m)) for m in (0.0, 33.3, 110.0)),
    ("SolarizeAdd", dict(magnitude=99.0, thr=200)),
    *(
        (name, dict(magnitude=m))
        for name in ("Brightness", "Contrast", "ColorTransform", "Sharpness")
        for m in (-0.9, -0.41, 0.0, 0.2, 0.9)
    ),
    ("Rotate", dict(angle=20, center=(5, 40), scale=1.3, pad_val=77)),
]


def built(name: str, arguments: dict) -> Operation:
    return OPERATIONS[name](**arguments, prob=1.0, random_negative_prob=0.0)


PINNED = [built(*case) for case in PLAIN + WARPS]
TABLE = Table(PINNED)
CHANGE = jax.jit(lambda image, row, strength: TABLE.change(image, TABLE.row(row), strength, jnp.zeros(2), True))


@pytest.mark.parametrize("number", range(len(PINNED)), ids=[f"{n}-{a}" for n, a in PLAIN + WARPS])
def test_operation_is_the_hosts(number):
    operation = PINNED[number]
    strength = 0.0 if operation.argument is None else operation.fixed
    for image in IMAGES:
        ours = np.asarray(CHANGE(image.astype(np.float32), number, np.float32(strength)))
        assert np.array_equal(ours, np.round(ours)) and ours.min() >= 0 and ours.max() <= 255
        off = np.abs(ours - operation.change(np.ascontiguousarray(image), strength).astype(float))
        if number >= len(PLAIN) and int(cv2.__version__.split(".")[0]) < 5:
            # OpenCV 4 rounds the places between pixels to 1/32, which noise shows most.
            assert off.mean() < 2
        else:
            assert off.max() <= 1


def test_one_table_does_what_single_operations_do():
    """What is drawn does not depend on which other operations there are: kernels of fewer taps, fewer branches."""
    for case in (WARPS[0], WARPS[6], ("Equalize", {}), ("Sharpness", dict(magnitude=0.5))):
        operation = built(*case)
        alone, strength = Table([operation]), np.float32(operation.fixed or 0)
        ours = alone.change(jnp.float32(IMAGES[0]), alone.row(0), strength, jnp.zeros(2), True)
        np.testing.assert_allclose(ours, operation.change(IMAGES[0], operation.fixed), atol=1)


def test_blur_is_pillows_up_to_its_roundings():
    table, image = Table([built("GaussianBlur", dict(radius=2.0))]), IMAGES[0]
    for sigma in (0.1, 1.0, 2.0):
        ours = table.change(jnp.float32(image), table.row(0), jnp.float32(sigma), jnp.zeros(2), True)
        off = np.abs(ours - OPERATIONS["GaussianBlur"](radius=sigma).change(image, sigma).astype(float))
        # See device_colour.gaussian_blur: Pillow's is three box blurs, each rounded. Measured: 0.6 on average.
        assert off.mean() < 0.8 and np.quantile(off, 0.99) < 5


@pytest.mark.parametrize("shape", [11, (6, 20)])
def test_cutout(shape):
    operation = built("Cutout", dict(shape=shape, pad_val=(1, 2, 3)))
    table, (height, width) = Table([operation]), IMAGES[0].shape[:2]
    h, w = (shape, shape) if isinstance(shape, int) else shape
    for y, x in ((0, 0), (20, 30), (47, 59)):
        place = jnp.array([(y + 0.5) / height, (x + 0.5) / width])
        ours = table.change(jnp.float32(IMAGES[0]), table.row(0), jnp.float32(h), place, True)
        box = Box(int(max(y + 0.5 - h / 2, 0)), int(max(x + 0.5 - w / 2, 0)), h, w)
        np.testing.assert_array_equal(ours, operation.change(IMAGES[0], box))


# ---------------------------------------------------------------------------------------------------------------------
# Draws

KEYS = random.split(random.key(1), 4000)
LEVELS = [dict(magnitude_std=0.5), dict(magnitude_std="inf"), dict(magnitude_std=0.0), dict(magnitude_std=4)]


def near(ours: np.ndarray, theirs: np.ndarray) -> bool:
    """Whether two samples have the same mean and spread, within four standard errors."""
    spread = np.sqrt(ours.var() / len(ours) + theirs.var() / len(theirs)) + 1e-6
    return abs(ours.mean() - theirs.mean()) < 4 * spread and abs(ours.std() - theirs.std()) < 0.05 * theirs.std() + 1e-6


@pytest.mark.parametrize("level", LEVELS, ids=str)
def test_strengths_are_distributed_as_the_hosts(level):
    policies = [
        dict(type="Rotate", magnitude_range=(0, 30), prob=0.3),
        dict(type="Posterize", magnitude_range=(4, 0)),
        dict(type="Brightness", magnitude_range=(0, 0.9), random_negative_prob=0.2),
        dict(type="Shear", magnitude=0.2, prob=1.0),
        dict(type="Invert", prob=0.8),
    ]
    host = auto_augment.RandAugment(policies, 2, 7, total_level=8, **level).operations
    table = RandAugment(policies, 2, 7, total_level=8, **level).table
    draw = jax.jit(lambda row: jax.vmap(lambda key: table.draw(table.row(row), key))(KEYS))
    rng = np.random.default_rng(0)
    for row, operation in enumerate(host):
        done, strengths, places = map(np.asarray, draw(row))
        theirs = [operation.draw(rng, 20, 20) for _ in range(4000)]
        assert near(done.astype(float), np.array([s is not None for s in theirs], float))
        if operation.argument:
            assert near(strengths[done], np.array([s for s in theirs if s is not None]))
            assert near(np.abs(strengths[done]), np.abs([s for s in theirs if s is not None]))
        assert places.min() >= 0 and places.max() < 1 and np.abs(places.mean(axis=0) - 0.5).max() < 0.02


def test_strengths_without_noise_are_the_hosts():
    for level in (0, 5, 9, 10):
        for policies in auto_augment.RANDAUGMENT:
            host = auto_augment.RandAugment(policies, 2, level).operations
            table = RandAugment(policies, 2, level).table
            for row, operation in enumerate(host):
                _, strength, _ = table.draw(table.row(row), random.key(row))
                if operation.argument:
                    expected = operation.strength(np.random.default_rng())
                    assert abs(float(strength)) == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_operations_and_chains_are_drawn_evenly():
    numbers = np.asarray(jax.vmap(RandAugment("timm_increasing", 3, 9).draw)(KEYS))
    counts = np.bincount(numbers.ravel(), minlength=15)
    assert numbers.shape == (4000, 3) and len(counts) == 15 and np.abs(counts - 800).max() < 5 * np.sqrt(800)
    augment = AutoAugment("imagenet")
    chains, counts = np.unique(jax.vmap(augment.draw)(KEYS), axis=0, return_counts=True)
    assert (chains == np.arange(50).reshape(25, 2)).all() and np.abs(counts - 160).max() < 5 * np.sqrt(160)
    host = [op for chain in auto_augment.AutoAugment("imagenet").chains for op in chain]
    np.testing.assert_allclose(augment.table.rows.prob, [op.prob for op in host])
    strengths = [op.fixed or 0 for op in host]
    np.testing.assert_allclose(augment.table.rows.first, strengths, rtol=1e-6)
    # A single number to Rotate is blue alone, as on the host.
    turned = [i for i, op in enumerate(host) if type(op).__name__ == "Rotate"]
    assert (augment.table.rows.fill[turned] == (0, 0, 128)).all()


def test_chains_of_different_lengths():
    invert = dict(type="Invert", prob=1.0)
    augment = AutoAugment([[invert], [invert, dict(type="Solarize", thr=0, prob=1.0)]])
    out = jax.jit(jax.vmap(lambda key: augment(jnp.float32(DULL[:2, :2]), key)))(KEYS[:200])
    inverted = (np.asarray(out) == 255 - DULL[:2, :2]).all(axis=(1, 2, 3))
    assert 60 < inverted.sum() < 140 and (np.asarray(out)[~inverted] == DULL[:2, :2]).all()


# ---------------------------------------------------------------------------------------------------------------------
# The whole

RAND = dict(
    type="RandAugment",
    policies="timm_increasing",
    num_policies=2,
    magnitude_level=9,
    magnitude_std=0.5,
)
PIPELINE = DevicePipeline([RAND], [0, 0, 0], [1, 1, 1])
RUN = jax.jit(PIPELINE)
BATCH = dict(
    image=np.stack([PHOTOS[i % 2][10 * i : 10 * i + 24, 20 * i : 20 * i + 24] for i in range(16)]),
    index=np.arange(16, dtype=np.int32),
    epoch=np.full(16, 2, np.int32),
)


def test_a_pipeline_does_what_is_drawn():
    out = np.asarray(RUN(BATCH, random.key(3))["image"])
    (augment,), shares = PIPELINE.transforms, []
    host = auto_augment.RandAugment(**{k: v for k, v in RAND.items() if k != "type"}).operations
    draw = jax.jit(lambda number, key: augment.table.draw(augment.table.row(number), key)[:2])
    for i, image in enumerate(BATCH["image"]):
        key = random.fold_in(random.fold_in(sample_key(random.key(3), 2, i), 0), 0)
        drawn, done = random.split(key)
        for number, own in zip(augment.draw(drawn), random.split(done, 2), strict=True):
            do, strength = draw(number, own)
            image = host[int(number)].change(np.ascontiguousarray(image), float(strength)) if do else image
        shares.append((np.abs(out[i] - image) > 1).mean())
    # The second operation may carry a difference of one level of the first on, and thresholds make it large.
    assert np.mean(shares) < 0.01 and np.median(shares) == 0
    assert (out != BATCH["image"]).any(axis=(1, 2, 3)).sum() >= 8


def test_pixels_do_not_depend_on_devices_or_dtype_and_steps_do_not_compile():
    whole = np.asarray(RUN(BATCH, random.key(3))["image"])
    compiled = RUN._cache_size()
    assert (np.asarray(RUN({**BATCH, "epoch": BATCH["epoch"] + 1}, random.key(3))["image"]) != whole).any()
    assert RUN._cache_size() == compiled
    np.testing.assert_array_equal(
        RUN({**BATCH, "image": BATCH["image"].astype(np.float32)}, random.key(3))["image"], whole
    )
    mesh = Mesh(np.array(jax.devices()[:8]), ("data",))
    split = NamedSharding(mesh, P("data"))
    spread = RUN(jax.device_put(BATCH, split), jax.device_put(random.key(3), NamedSharding(mesh, P())))["image"]
    assert spread.sharding.is_equivalent_to(split, 4)
    np.testing.assert_array_equal(spread, whole)


def test_one_by_one_is_the_same(monkeypatch):
    """What a single CPU does instead of vmap."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    calls = []
    monkeypatch.setattr(lax, "map", lambda f, xs, map=lax.map: (calls.append(1), map(f, xs))[1])
    single = jax.jit(lambda *args: PIPELINE(*args))(BATCH, random.key(3))["image"]
    assert calls
    np.testing.assert_array_equal(single, RUN(BATCH, random.key(3))["image"])


def test_autoaugment_runs_in_a_pipeline():
    run = jax.jit(DevicePipeline([dict(type="AutoAugment", policies="imagenet")], [0, 0, 0], [1, 1, 1]))
    out = np.asarray(run(BATCH, random.key(0))["image"])
    assert np.array_equal(out, np.round(out)) and out.min() >= 0 and out.max() <= 255
    assert 8 <= (out != BATCH["image"]).any(axis=(1, 2, 3)).sum() <= 16


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (dict(RAND, policies="timm_increasin"), "Did you mean 'timm_increasing'"),
        (dict(RAND, magnitude_levl=3), "no argument 'magnitude_levl'. Did you mean 'magnitude_level'"),
        (dict(type="AutoAugment", policies=[[dict(type="Rotat", angle=3)]]), "Did you mean 'Rotate'"),
        (
            dict(RAND, policies=[dict(type="Shear", magnitude=0.1, interpolation="lanczos")]),
            "nearest, bilinear or bicubic",
        ),
    ],
)
def test_mistakes_are_named(cfg, message):
    with pytest.raises(ConfigError) as error:
        DevicePipeline([cfg], [0, 0, 0], [1, 1, 1])
    assert message in str(error.value)


def test_operations_of_ones_own_stay_on_the_host():
    class Mine(Operation):
        argument = None

    with pytest.raises(ConfigError, match="'Mine' does not run on the device"):
        RandAugment([dict(type=Mine)], 1, 5)
