"""Images that change after some epochs: the loader's, the trainer's, and those of the pictures."""

from __future__ import annotations

import numpy as np
import pytest

from jaxpretrain.build import ConfigError
from jaxpretrain.data.base import InMemory
from jaxpretrain.data.phases import phase_at, phases_of
from jaxpretrain.data.pipeline import EvalLoader, TrainLoader
from jaxpretrain.data.stages import Tracer
from jaxpretrain.trainer import Trainer, train
from tests.test_resume import in_pieces
from tests.tiny import losses, tiny_config

FLIP = dict(type="RandomFlip", prob=0.5)


def crop(size):
    return dict(type="RandomResizedCrop", scale=size, crop_ratio_range=(0.5, 1.0))


PHOTOS = InMemory(np.random.default_rng(0).integers(0, 256, (13, 20, 20, 3), dtype=np.uint8), np.arange(13) % 3)
FIRST, SECOND, THIRD = [crop(8)], [crop(12), FLIP], [crop(16)]
SPLIT = dict(dataset=PHOTOS, pipeline=FIRST, later=[dict(begin=1, pipeline=SECOND), dict(begin=3, pipeline=THIRD)])
EPOCH = 3  # steps: 13 samples in batches of 4


def take(steps, *, start=0, **options):
    """Batches `start` to `steps` of a loader, as dictionaries of arrays."""
    fields = {name: options.pop(name) for name in ("pipeline", "later") if name in options}
    loader = TrainLoader(SPLIT | fields, batch_size=4, seed=7, **options)
    loader.set_order(None, start)
    batches = [next(loader) for _ in range(start, steps)]
    loader.close()
    return batches


def assert_same(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


def test_what_an_entry_lacks_stays():
    device = [dict(type="ColorJitter", brightness=0.4)]
    found = phases_of(
        dict(pipeline=FIRST, later=[dict(begin=2, device_pipeline=device), dict(begin=5, pipeline=THIRD)])
    )
    assert [(p.begin, p.pipeline, p.device_pipeline) for p in found] == [
        (0, FIRST, ()),
        (2, FIRST, device),
        (5, THIRD, device),
    ]
    assert [phase_at(found, epoch) for epoch in (0, 1, 2, 4, 5, 100)] == [0, 0, 1, 1, 2, 2]
    assert phases_of({}) == [(0, (), ())]


def test_each_epoch_has_the_images_of_its_phase():
    batches = take(4 * EPOCH)
    assert [batch["image"].shape[1] for batch in batches] == [8] * 3 + [12] * 6 + [16] * 3
    assert_same(batches[:3], take(3, later=[]))
    assert_same(batches[3:9], take(9, pipeline=SECOND, later=[])[3:])
    assert_same(batches[9:], take(12, start=9, pipeline=THIRD, later=[]))


@pytest.mark.parametrize(
    "options", [dict(start=4), dict(start=9), dict(num_threads=1), dict(num_threads=16, prefetch=8)]
)
def test_neither_interruptions_nor_threads_change_a_pixel(options):
    assert_same(take(12)[options.get("start", 0) :], take(12, **options))


def test_hosts_share_the_batches_of_every_phase():
    parts = [take(12, process_index=i, process_count=2) for i in range(2)]
    for whole, *halves in zip(take(12), *parts, strict=True):
        np.testing.assert_array_equal(whole["image"], np.concatenate([half["image"] for half in halves]))


def test_evaluation_is_that_of_the_beginning():
    (batch,) = EvalLoader(SPLIT, batch_size=13)
    assert batch["image"].shape == (13, 8, 8, 3)


@pytest.mark.parametrize(
    ("later", "message"),
    [
        ([dict(pipeline=SECOND)], r"data.train.later\[0\].begin=None must be a number of epochs, more than 0"),
        ([dict(begin=0, pipeline=SECOND)], "begin=0 must be .* more than 0"),
        ([dict(begin=2), dict(begin=2)], r"later\[1\].begin=2 must be .* more than 2"),
        ([dict(begin=1, pipline=SECOND)], r"later\[0\] has no field 'pipline'. Did you mean 'pipeline'"),
        ([dict(begin=1, pipeline=[dict(type="RandomFlipp")])], "Did you mean 'RandomFlip'"),
    ],
)
def test_mistakes_show_at_the_start(later, message):
    with pytest.raises(ConfigError, match=message):
        TrainLoader(SPLIT | dict(later=later), batch_size=4)


# The method takes images of 8 pixels: those of 12 are cut on the device.
LATER = [dict(begin=1, pipeline=SECOND, device_pipeline=[crop(8)])]


def config_of(later, **fields):
    config = tiny_config(batch_size=496, max_steps=6, mesh=dict(data=-1), **fields)
    config.data.train.later = later
    return config


def test_the_trainer_compiles_anew_and_goes_on(tmp_path, monkeypatch):
    compiled, original = [], Trainer.compile

    def watched(self, state, batch, phase):
        compiled.append((phase, batch["image"].shape[1]))
        return original(self, state, batch, phase)

    monkeypatch.setattr(Trainer, "compile", watched)
    train(config_of(LATER), tmp_path / "whole")
    train(config_of([]), tmp_path / "never")
    assert compiled == [(0, 8), (1, 12), (0, 8)]
    whole, never = dict(losses(tmp_path / "whole")), dict(losses(tmp_path / "never"))
    assert [whole[step] == never[step] for step in range(1, 7)] == [True] * 3 + [False] * 3


def test_a_run_that_is_stopped_goes_on_with_the_images_of_its_epoch(tmp_path):
    config = config_of(LATER, checkpoint=dict(interval=10, by_epoch=False))
    whole, pieces = in_pieces(config, tmp_path / "whole"), in_pieces(config, tmp_path / "pieces", 2, 4)
    assert [batch["image"].shape[1] for batch in pieces] == [8] * 3 + [12] * 3
    assert_same(whole, pieces)
    assert losses(tmp_path / "whole") == losses(tmp_path / "pieces")


def test_pictures_are_those_of_the_epoch():
    tracer = Tracer(config_of(LATER))
    names = [[stage[0].title for stage in tracer([(3, 0)], epoch)[0].stages] for epoch in (0, 1)]
    assert names == [
        ["original", "RandomResizedCrop"],
        ["original", "RandomResizedCrop", "RandomFlip", "RandomResizedCrop"],
    ]
    assert [tracer([(3, 0)], epoch)[0].final()[0].image.shape[0] for epoch in (0, 1)] == [8, 8]
