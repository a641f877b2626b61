"""`tools.browse_dataset` and what it draws: the pictures of training, from the data set's to the method's."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_image

from jaxpretrain import cli
from jaxpretrain.build import ConfigError
from jaxpretrain.config import load_config, to_plain
from jaxpretrain.data.chunks import Reader
from jaxpretrain.data.decode import decode
from jaxpretrain.data.device import DevicePipeline
from jaxpretrain.data.host_transforms import build_pipeline
from jaxpretrain.data.pipeline import EvalLoader, TrainLoader
from jaxpretrain.data.seeds import SAMPLE, generator
from jaxpretrain.data.stages import Picture, Tracer
from jaxpretrain.recipes import recipe
from jaxpretrain.tools.browse_dataset import caption, layout, main
from jaxpretrain.visualize.stages import contact_sheet, draw_card, draw_mask

JITTER = dict(type="ColorJitter", brightness=0.4, contrast=0.4)
INVERT = dict(type="Solarize", thr=128, prob=0.5)
FLIP = dict(type="RandomFlip", prob=0.5)
CROP = dict(type="RandomResizedCrop", scale=16)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Six JPEGs of three sizes in two class folders, cut from one photograph; the last is damaged."""
    root = tmp_path_factory.mktemp("photos")
    photo = load_sample_image("china.jpg")
    for i in range(6):
        path = root / ("lake" if i < 3 else "temple") / f"{i}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(photo[20 * i : 20 * i + 200 + 10 * (i % 3), 60 * i : 60 * i + 240]).save(path, quality=95)
    path.write_bytes(path.read_bytes()[:300])
    return root


def config_of(root, pipeline, device_pipeline=(), **fields):
    dataset = dict(type="CustomDataset", data_root=str(root))
    train = dict(dataset=dataset, pipeline=pipeline, device_pipeline=list(device_pipeline))
    val = dict(dataset=dataset, pipeline=[dict(type="ResizeEdge", scale=32), dict(type="CenterCrop", crop_size=32)])
    fields.setdefault("method", dict(type="SimCLR"))
    return recipe(data=dict(train=train, val=val), batch_size=2, seed=5, **fields)


def titles(trace):
    return [[picture and picture.title for picture in stage] for stage in trace.stages]


def test_host_stages_are_the_transforms_applied_by_hand(photos):
    steps = [
        dict(type="LoadImageFromFile"),
        dict(type="ResizeEdge", scale=64),
        dict(type="RandomCrop", crop_size=48),
        FLIP,
    ]
    (trace,) = Tracer(config_of(photos, steps))([(2, 0)], epoch=3)
    assert titles(trace) == [["original"], ["ResizeEdge"], ["RandomCrop"], ["RandomFlip"]]
    assert trace.name.endswith("lake/2.jpg") and trace.label == 0
    rng = generator(SAMPLE, 5, 3, 2)
    sample = {"image": decode((photos / "lake" / "2.jpg").read_bytes())}
    np.testing.assert_array_equal(trace.stages[0][0].image, sample["image"])
    for step, stage in zip(build_pipeline(steps[1:]).steps, trace.stages[1:], strict=True):
        sample = step(sample, rng)
        np.testing.assert_array_equal(stage[0].image, sample["image"])


def test_views_are_columns(photos):
    views = dict(type="MultiView", num_views=[1, 2], transforms=[[CROP, FLIP], [dict(CROP, scale=8)]])
    steps = [dict(type="ResizeEdge", scale=64), views]
    device = [dict(type="MultiView", num_views=[1, 2], transforms=[[], [JITTER]])]
    tracer = Tracer(config_of(photos, steps, device))
    (trace,) = tracer([(1, 0)])
    assert titles(trace) == [
        ["original"],
        ["ResizeEdge"],
        ["RandomResizedCrop"] * 3,
        ["RandomFlip", None, None],
        [None, "ColorJitter", "ColorJitter"],
    ]
    whole = Reader(tracer.source, build_pipeline(steps), 5).read(0, 1)[0]["image"]
    for view, last in zip(whole, (trace.stages[3][0], *trace.stages[2][1:]), strict=True):
        np.testing.assert_array_equal(last.image, view)
    assert [picture.title for picture in trace.final()] == ["view 1", "view 2", "view 3"]
    for picture, last in zip(trace.final(), (trace.stages[3][0], *trace.stages[4][1:]), strict=True):
        assert picture.image is last.image


def trained_on(config, epochs=1):
    """{(epoch, index): (views in grey levels, mask)} of batches as the training step gets them."""
    train = to_plain(config.data.train)
    loader = TrainLoader(train, batch_size=config.batch_size, seed=config.seed, num_threads=2, max_bad=1.0)
    pipeline = DevicePipeline(train["device_pipeline"], **config.data_preprocessor)
    run = jax.jit(lambda batch: pipeline(batch, jax.random.key(config.seed)))
    seen = {}
    for _ in range(epochs * loader.steps_per_epoch):
        batch = run(next(loader))
        views = batch["image"] if isinstance(batch["image"], tuple) else (batch["image"],)
        levels = []
        for v, view in enumerate(views):
            mean, std = pipeline.mean_std[v == 1]
            levels.append(np.asarray(view) * std + mean)
        for row, key in enumerate(zip(np.asarray(batch["epoch"]), np.asarray(batch["index"]), strict=True)):
            mask = np.asarray(batch["mask"][row]) if "mask" in batch else None
            seen[tuple(map(int, key))] = [level[row] for level in levels], mask
    loader.close()
    return seen


MASK = dict(type="SimMIMMaskGenerator", input_size=16, mask_patch_size=8, model_patch_size=4, mask_ratio=0.5)
PICTURES = dict(type="RandomResizedCropAndInterpolationWithTwoPic", size=16, second_size=8)
CASES = {
    "one view": ([CROP], [FLIP, JITTER]),
    "two views": (
        [dict(type="MultiView", num_views=2, transforms=[[CROP]])],
        [dict(type="MultiView", num_views=(1, 1), transforms=[[JITTER, FLIP], [FLIP]])],
    ),
    "views made on the device": (
        [dict(type="Resize", scale=(32, 32))],
        [dict(type="MultiView", num_views=(1, 2), transforms=[[CROP, INVERT], [dict(CROP, scale=8)]])],
    ),
    "pictures of one crop, masked": ([PICTURES, MASK], [dict(type="Pictures", transforms=[INVERT, FLIP])]),
    "the host alone": ([CROP, MASK], []),
    "scaled decoding": ([dict(type="LoadImageFromFile", scaled=True), CROP], [FLIP]),
}


@pytest.mark.parametrize("case", CASES)
def test_the_last_stage_is_what_training_sees(photos, case):
    config = config_of(photos, *CASES[case])
    tracer = Tracer(config)
    seen = trained_on(config, epochs=2)
    traces = [t for epoch in range(2) for t in tracer([(i, 0) for e, i in seen if e == epoch], epoch)]
    assert len(traces) == len(seen)
    for trace in traces:
        final, (views, mask) = trace.final(), seen[trace.epoch, trace.index]
        assert len(final) == len(views) + (mask is not None)
        for picture, view in zip(final, views, strict=False):
            assert picture.image.shape == view.shape
            # Fusion may turn a level over the edge that jitter cuts at.
            assert np.mean(np.abs(picture.image - np.round(view)) > 1) < 0.01
        if mask is not None:
            np.testing.assert_array_equal(final[-1].mask, mask)
            assert final[-1].title == "masked"


def test_samples_are_those_that_an_epoch_begins_with():
    config = load_config("configs/simclr.py:digits", ["batch_size=8", "seed=2"])
    loader = TrainLoader(to_plain(config.data.train), batch_size=8, seed=2)
    tracer = Tracer(config)
    first = next(loader)["index"].tolist()
    loader.close()
    assert [index for index, _ in tracer.samples(8)] == first
    assert [index for index, _ in tracer.samples(8, epoch=1)] != first
    assert [index for index, _ in Tracer(config, "val").samples(3)] == [0, 99, 198]


def test_repeats_of_a_sample_differ(photos):
    config = config_of(photos, [CROP], [JITTER])
    config.data.train.sampler = dict(type="RepeatAugSampler", num_repeats=2)
    samples = Tracer(config).samples(4)
    assert [repeat for _, repeat in samples] == [0, 1, 0, 1] and samples[0][0] == samples[1][0]
    one, again = Tracer(config)([(1, 0), (1, 1)])
    assert not np.array_equal(one.stages[1][0].image, again.stages[1][0].image)
    np.testing.assert_array_equal(one.stages[0][0].image, again.stages[0][0].image)


def test_evaluation_has_its_own_pipeline(photos):
    config = config_of(photos, [CROP], [JITTER])
    loader = EvalLoader(to_plain(config.data.val), batch_size=2, max_bad=1.0)
    batch = next(iter(loader))
    loader.close()
    traces = Tracer(config, "val")([(0, 0), (1, 0)])
    assert titles(traces[0]) == [["original"], ["ResizeEdge"], ["CenterCrop"]]
    np.testing.assert_array_equal([trace.final()[0].image for trace in traces], batch["image"])


def test_skipped_transforms_are_left_out(photos):
    config = config_of(photos, [CROP, FLIP], [dict(type="RandomApply", transforms=[JITTER]), FLIP])
    assert titles(Tracer(config)([(0, 0)])[0]) == [
        [name] for name in ("original", CROP["type"], "RandomFlip", "ColorJitter", "RandomFlip")
    ]
    assert titles(Tracer(config, skip=["RandomFlip"])([(0, 0)])[0]) == [
        [name] for name in ("original", CROP["type"], "ColorJitter")
    ]


def test_a_mixed_batch_shows_its_shares(photos):
    train_cfg = dict(augments=[dict(type="Mixup", alpha=1.0)])
    config = config_of(
        photos, [CROP], method=dict(type="Supervised", model=dict(type="ImageClassifier", train_cfg=train_cfg))
    )
    traces = Tracer(config)([(0, 0), (3, 0)])
    assert titles(traces[0])[-1] == ["Mixup"]
    for trace, other in (traces, traces[::-1]):
        share, rest = trace.mixed[trace.label], trace.mixed[other.label]
        assert share + rest == pytest.approx(1) and caption(trace, ("lake", "temple")).count("%") == (2 if rest else 1)
        own, theirs = (t.stages[1][0].image.astype(float) for t in (trace, other))
        np.testing.assert_allclose(trace.final()[0].image, share * own + rest * theirs, atol=0.51)
    assert titles(Tracer(config, skip=["Mixup"])([(0, 0)])[0])[-1] == [CROP["type"]]
    config.method.model.train_cfg = dict(
        augments=[*train_cfg["augments"], dict(type="CutMix", alpha=1.0)], probs=[0.2, 0.5]
    )
    both, one = (Tracer(config, skip=skip).augment for skip in ((), ["Mixup"]))
    assert [type(augment).__name__ for augment in both.augments[:2]] == ["Mixup", "CutMix"] and both.probs[:2] == [
        0.2,
        0.5,
    ]
    assert type(one.augments[0]).__name__ == "CutMix" and one.probs == pytest.approx([0.5, 0.5])


def test_captions():
    class Given:
        mixed = None

    given = Given()
    for label, words in (
        (1, "1: dog"),
        (-1, "no label"),
        (np.array([1, 0, -1], np.int8), "0: cat, 2: owl (difficult)"),
        (np.zeros(3, np.int8), "no class"),
        ({"kind": 2, "colour": 0}, "kind: class 2, colour: class 0"),
    ):
        given.label = label
        assert caption(given, ("cat", "dog", "owl")) == words
    given.label = 3
    assert caption(given, None) == "class 3"


def gradient(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_a_card_holds_its_pictures():
    small, large, wide = gradient(16, 16), gradient(224, 224, 1), gradient(100, 448, 2)
    card = draw_card([[Picture("a", small), Picture("b", large)], [None, Picture("c", wide)]], "heading", "note")
    assert card.shape[1] == 2 * 12 + 2 * 224 + 8
    assert card.shape[0] == (12 + 16 + 13 + 16) + (224 + 50) + (50 + 50) + 12 - 8
    top = 57
    np.testing.assert_array_equal(card[top : top + 224, 12:236], small.repeat(14, 0).repeat(14, 1))
    np.testing.assert_array_equal(card[top : top + 224, 244:468], large)
    below = card[top + 274 : top + 324]
    assert (below[:, 12:236] == 255).all()  # nothing there
    np.testing.assert_allclose(below[:, 244:468].mean((0, 1)), wide.mean((0, 1)), atol=2)
    assert (card[:top] < 255).any() and (card[top + 224 : top + 250, 12:236] < 128).any()  # heading and title


def test_rescale_factor():
    image = gradient(10, 20)
    card = draw_card([[Picture("a title that is too long for its picture", image)]], "x" * 200, rescale_factor=5)
    assert card.shape[1] == 2 * 12 + 100
    np.testing.assert_array_equal(card[57:107, 12:112], image.repeat(5, 0).repeat(5, 1))
    assert draw_card([[Picture("a", gradient(400, 600))]], "", rescale_factor=0.5).shape[1] == 2 * 12 + 300


def test_masked_patches_are_covered_and_the_others_untouched():
    image, mask = gradient(24, 16), np.array([[1, 0], [0, 2], [0, 0]])
    drawn = draw_mask(image, mask)
    hidden = mask.repeat(8, 0).repeat(8, 1) > 0
    np.testing.assert_array_equal(drawn[~hidden], image[~hidden])
    assert drawn[hidden].std() < 0.3 * image[hidden].std()


@pytest.mark.parametrize(("count", "columns"), [(1, 1), (6, 3), (7, 3), (16, 4)])
def test_contact_sheet(count, columns):
    cards = [gradient(30, 34, i) for i in range(count)]
    sheet = contact_sheet(cards)
    assert sheet.shape[:2] == (-(-count // columns) * 30, columns * 34)
    for i, card in enumerate(cards):
        row, column = divmod(i, columns)
        np.testing.assert_array_equal(
            sheet[row * 30 + 1 : row * 30 + 30, column * 34 + 1 : column * 34 + 34], card[1:, 1:]
        )


@pytest.mark.parametrize(("mode", "cells"), [("original", 1), ("transformed", 2), ("concat", 3), ("pipeline", 2)])
def test_pictures_are_written(tmp_path, capsys, mode, cells):
    arguments = ["--config=configs/simclr.py:digits", f"--mode={mode}", "--show-number=3", f"--output-dir={tmp_path}"]
    assert main(arguments) == cli.OK
    index = Tracer(load_config("configs/simclr.py:digits")).samples(3)[1][0]
    assert len(list(tmp_path.glob("0*.png"))) == 3 and str(tmp_path / "contact_sheet.png") in capsys.readouterr().out
    card = np.asarray(Image.open(tmp_path / f"{index:06d}.png"))
    assert card.shape[1] == 2 * 12 + cells * (224 + 8) - 8
    if mode != "transformed":
        image = np.asarray(Tracer(load_config("configs/simclr.py:digits"), "train").source[index]["image"])
        np.testing.assert_array_equal(card[57:281, 12:236, 0], image.repeat(28, 0).repeat(28, 1))


@pytest.mark.parametrize("device_pipeline", [[], [FLIP]])
def test_the_mask_is_drawn_in_the_end(photos, device_pipeline):
    (trace,) = Tracer(config_of(photos, [CROP, MASK], device_pipeline))([(4, 0)])
    (row,) = layout(trace, "pipeline")
    masked = [picture.title for picture in row if picture.mask is not None]
    assert masked == ["SimMIMMaskGenerator", *(["masked"] if device_pipeline else [])] and row[-1].mask is not None
    assert [picture.title for picture in layout(trace, "concat")[0]] == ["original", "transformed", "masked"]


def test_given_samples_and_channels(tmp_path, photos):
    arguments = [
        "--config=configs/resnet.py:digits",
        f"--config.data.val.dataset={dict(type='CustomDataset', data_root=str(photos))}",
        "--split=val",
        "--mode=original",
        f"--output-dir={tmp_path}",
    ]
    assert main([*arguments, "--indices=0,5", "--channel-order=bgr", "--rescale-factor=1"]) == cli.OK  # 5 is damaged
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000000.png", "contact_sheet.png"]
    card = np.asarray(Image.open(tmp_path / "000000.png"))
    np.testing.assert_array_equal(
        card[57 : 57 + 200, 12 : 12 + 240, ::-1], decode((photos / "lake/0.jpg").read_bytes())
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--config is needed"),
        (["--config=configs/mae.py:digits", "--mode=transform"], "transformed"),
        (["--config=configs/mae.py:digits", "--split=vall"], "val"),
        (["--config=configs/mae.py:digits", "--indices=1500"], "1500 samples, 0 to 1499"),
        (["--config=configs/mae.py:digits", "--num=0"], "at least 1"),
        (["--config=configs/mae.py:digits", "--channel-order=rbg"], "rgb"),
    ],
)
def test_mistakes(arguments, message):
    with pytest.raises(ConfigError, match=message):
        main(arguments)


def test_no_display(monkeypatch):
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("sys.platform", "linux")
    with pytest.raises(ConfigError, match="display"):
        main(["--config=configs/mae.py:digits", "--show"])
