"""Loaders and device prefetch: one stream whatever the workers and hosts, exact resume, bad files, and clean ends."""

from __future__ import annotations

import io
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from PIL import Image

from jaxpretrain.build import ConfigError
from jaxpretrain.data import chunks
from jaxpretrain.data.base import InMemory
from jaxpretrain.data.pipeline import EvalLoader, TooManyBadImages, TrainLoader
from jaxpretrain.data.prefetch import device_prefetch

CROP = [dict(type="RandomResizedCrop", scale=8), dict(type="RandomFlip", prob=0.5)]
BAD = (3, 11, 17)


def jpeg(seed: int) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).resize((20, 16)).save(buffer, "JPEG")
    return buffer.getvalue()


def make_folder(root, bad=()):
    """41 JPEGs in two classes: an odd number, so that epochs have a rest. Index i is file i."""
    for i in range(41):
        path = root / f"{'ab'[i > 20]}" / f"{i:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        data = jpeg(i)
        if i in bad:
            data = {3: data[: len(data) // 2], 11: b"<html>not found</html>", 17: b""}[i]
        path.write_bytes(data)
    return dict(dataset=dict(type="CustomDataset", data_root=str(root)), pipeline=CROP)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("good"))


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("bad"), BAD)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Several chunks to a batch, unevenly."""
    monkeypatch.setattr("jaxpretrain.data.pipeline.CHUNK", 3)


def take(loader, count: int) -> list[dict]:
    batches = [next(loader) for _ in range(count)]
    loader.close()
    return batches


def same(one: list[dict], other: list[dict]) -> bool:
    def equal(a, b):
        if isinstance(a, tuple):
            return len(a) == len(b) and all(map(equal, a, b))
        return a.shape == b.shape and a.dtype == b.dtype and (a == b).all()

    return len(one) == len(other) and all(
        a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a) for a, b in zip(one, other, strict=True)
    )


# ---------------------------------------------------------------------------------------------------------------------
# What a batch is


def test_batches(good):
    loader = TrainLoader(good, batch_size=8, seed=1)
    assert loader.steps_per_epoch == 5 and loader.num_classes == 2 and len(loader.source) == 41
    batches = take(loader, 10)
    for batch in batches:
        assert set(batch) == {"image", "label", "index", "epoch", "repeat"}
        assert batch["image"].shape == (8, 8, 8, 3) and batch["image"].dtype == np.uint8
        assert all(
            batch[key].shape == (8,) and batch[key].dtype == np.int32 for key in ("label", "index", "epoch", "repeat")
        )
        assert (batch["label"] == (batch["index"] > 20)).all()
    for epoch in range(2):
        part = batches[5 * epoch : 5 * epoch + 5]
        assert all((batch["epoch"] == epoch).all() for batch in part)
        seen = np.concatenate([batch["index"] for batch in part])
        assert len(set(seen)) == 40, "no sample twice in an epoch; the rest that fills no batch is left out"
    first, second = (np.concatenate([b["index"] for b in batches[k : k + 5]]) for k in (0, 5))
    assert (first != second).any()


def test_pixels_are_those_of_the_sample(good):
    """Decoding and transforms by hand, from (seed, epoch, index) alone."""
    batch = take(TrainLoader(good, batch_size=8, seed=1), 7)[6]
    from jaxpretrain.data.host_transforms import build_pipeline

    source = TrainLoader(good, batch_size=8).source
    for row in range(8):
        rng = chunks.generator(chunks.SAMPLE, 1, int(batch["epoch"][row]), int(batch["index"][row]))
        sample = dict(source[int(batch["index"][row])])
        sample["image"] = chunks.as_rgb(sample["image"])
        assert (build_pipeline(CROP)(sample, rng)["image"] == batch["image"][row]).all()


def test_views(good):
    views = dict(type="MultiView", num_views=[1, 1], transforms=[CROP, [dict(type="Resize", scale=4)]])
    loader = TrainLoader(dict(good, pipeline=[views]), batch_size=8)
    batch = take(loader, 1)[0]
    assert [view.shape for view in batch["image"]] == [(8, 8, 8, 3), (8, 4, 4, 3)]


def test_config_dicts(good):
    from ml_collections import ConfigDict

    config = ConfigDict(dict(good, pipeline=[dict(type="Resize", scale=(6, 4))], device_pipeline=[dict(type="X")]))
    assert take(TrainLoader(config, batch_size=8), 1)[0]["image"].shape == (8, 4, 6, 3)


def test_seeds_differ(good):
    one, same_seed, other = (take(TrainLoader(good, batch_size=8, seed=seed), 2) for seed in (1, 1, 2))
    assert same(one, same_seed)
    assert (one[0]["index"] != other[0]["index"]).any()
    # Also where the order is the same, the crops differ.
    by_index = {seed: {} for seed in (1, 2)}
    for seed in by_index:
        for batch in take(TrainLoader(good, batch_size=8, seed=seed), 5):
            by_index[seed].update(zip(batch["index"].tolist(), batch["image"], strict=True))
    common = by_index[1].keys() & by_index[2].keys()
    assert sum((by_index[1][i] != by_index[2][i]).any() for i in common) > len(common) // 2


# ---------------------------------------------------------------------------------------------------------------------
# Determinism


@pytest.mark.parametrize("threads", [0, 1, 5])
def test_threads_change_nothing(good, threads):
    assert same(take(TrainLoader(good, batch_size=8), 7), take(TrainLoader(good, batch_size=8, num_threads=threads), 7))


def test_worker_processes_change_nothing(bad):
    """One test for all that involves processes, for they take seconds to start: the stream, bad files, resume, errors."""
    reference = TrainLoader(bad, batch_size=8, seed=4, max_bad=0.1)
    expected = take(reference, 9)
    loader = TrainLoader(bad, batch_size=8, seed=4, max_bad=0.1, num_workers=2)
    batches = [next(loader) for _ in range(9)]
    assert same(batches, expected)
    assert all(type(batch["image"]) is np.ndarray for batch in batches), "not in shared memory, which would pile up"
    assert loader.get_state(9) == reference.get_state(9) and len(loader.bad_indices) >= 2
    loader.close()
    one = TrainLoader(bad, batch_size=8, seed=4, max_bad=0.1, num_workers=1)
    assert same([next(one)], expected[:1])
    one.set_state(json.loads(json.dumps(loader.get_state(6))))
    assert same([next(one)], expected[6:7])
    one.close()
    without = TrainLoader(bad, batch_size=8, seed=4, max_bad=0.1)
    without.set_state(one.get_state(7))
    assert same(take(without, 2), expected[7:])


class Refusal(Exception):
    pass


def refuse(sample):
    if sample["index"] == 20:
        raise Refusal("sample 20 is refused")
    return sample


def test_an_exception_crosses_from_a_worker_process(good):
    config = dict(good, pipeline=[*CROP, refuse])
    for workers in (0, 1):
        loader = TrainLoader(config, batch_size=40, num_workers=workers)
        with pytest.raises(Refusal, match="sample 20"):
            for _ in range(3):
                next(loader)
        loader.close()


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_change_nothing(bad, hosts):
    options = dict(batch_size=8, seed=3, max_bad=0.1)
    expected = take(TrainLoader(bad, **options), 7)
    parts = [take(TrainLoader(bad, **options, process_index=p, process_count=hosts), 7) for p in range(hosts)]
    joined = [{key: np.concatenate([p[step][key] for p in parts]) for key in expected[0]} for step in range(7)]
    assert same(joined, expected)


@pytest.mark.parametrize("step", range(9))
def test_resume_at_any_step(bad, step):
    uninterrupted = TrainLoader(bad, batch_size=8, seed=5, max_bad=0.1)
    expected = [next(uninterrupted) for _ in range(10)]
    state = json.loads(json.dumps(uninterrupted.get_state(step)))  # asked late: the loader is ahead by then
    final = uninterrupted.get_state(10)
    uninterrupted.close()

    stopped = TrainLoader(bad, batch_size=8, seed=5, max_bad=0.1)
    take(stopped, step)
    assert stopped.get_state(step) == state

    resumed = TrainLoader(bad, batch_size=8, seed=5, max_bad=0.1, num_threads=2)
    resumed.set_state(state)
    assert same(take(resumed, 10 - step), expected[step:])
    assert resumed.get_state(10) == final


def test_resume_with_other_hosts(good):
    expected = take(TrainLoader(good, batch_size=8), 6)
    state = TrainLoader(good, batch_size=8, process_count=2, process_index=1).get_state(4)
    loader = TrainLoader(good, batch_size=8, process_count=4, process_index=3)
    loader.set_state(state)
    assert (take(loader, 2)[1]["image"] == expected[5]["image"][6:]).all()


def test_a_run_that_moves_between_hosts_sees_each_sample_once(good):
    """One host for the first batches of an epoch, two for the next, then four: together the epoch, and then the next one."""
    options, seen, step = dict(batch_size=4, seed=9), [], 0
    for hosts, steps in ((1, 3), (2, 4), (4, 3), (1, 2), (2, 8)):
        loaders = [TrainLoader(good, **options, process_index=p, process_count=hosts) for p in range(hosts)]
        for loader in loaders:
            loader.set_state(json.loads(json.dumps(TrainLoader(good, **options).get_state(step))))
        for parts in zip(*(take(loader, steps) for loader in loaders), strict=True):
            seen.append({key: np.concatenate([part[key] for part in parts]) for key in parts[0]})
        step += steps
    assert same(seen, take(TrainLoader(good, **options), 20))
    for epoch in range(2):
        indices = np.concatenate([batch["index"] for batch in seen[10 * epoch : 10 * epoch + 10]])
        assert len(set(indices)) == 40 and (np.concatenate([b["epoch"] for b in seen])[:40] == 0).all()


def test_a_state_of_another_run_is_refused(good):
    state = TrainLoader(good, batch_size=8, seed=1).get_state(3)
    with pytest.raises(ConfigError, match="seed: 1 in the state, 2 here; batch_size: 8 in the state, 4 here"):
        TrainLoader(good, batch_size=4, seed=2).set_state(state)


# ---------------------------------------------------------------------------------------------------------------------
# Bad files


def test_bad_files_are_named_once_and_replaced(bad, good, caplog):
    loader = TrainLoader(bad, batch_size=8, max_bad=0.1)
    with caplog.at_level(logging.WARNING):
        batches = take(loader, 25)
    assert loader.bad_indices == list(BAD)
    messages = [record.getMessage() for record in caplog.records if "bad image" in record.getMessage()]
    assert len(messages) == 3
    for name, reason in (("03.jpg", "Truncated"), ("11.jpg", "not an image"), ("17.jpg", "empty file")):
        assert any(f"a/{name}: " in message and reason in message for message in messages), messages
    # In their place other samples, whole: pixels, label and index agree. The others are as without bad files.
    clean = take(TrainLoader(good, batch_size=8), 25)
    replaced = 0
    for batch, reference in zip(batches, clean, strict=True):
        assert (batch["label"] == (batch["index"] > 20)).all()
        different = batch["index"] != reference["index"]
        assert (different == np.isin(reference["index"], BAD)).all()
        assert (batch["image"][~different] == reference["image"][~different]).all()
        assert batch["image"].any(axis=(1, 2, 3)).all()
        replaced += different.sum()
    assert replaced > 3


def test_too_many_bad_files_stop_the_run(bad):
    loader = TrainLoader(bad, batch_size=8, max_bad=2 / 41)
    with pytest.raises(TooManyBadImages) as caught:
        for _ in range(11):
            next(loader)
    message = str(caught.value)
    assert "3 of 41 images (7.317%)" in message and "data.max_bad=0.0487805" in message
    assert all(f"{index:02d}.jpg" in message for index in BAD)
    loader.close()
    for _ in range(2):
        with pytest.raises(TooManyBadImages):  # the default of 0.1 % allows none of 41
            take(TrainLoader(bad, batch_size=40), 1)


def test_the_count_of_bad_files_survives_a_resume(bad):
    """As many as allowed before the interruption, one more after it."""
    options = dict(batch_size=8, seed=5, max_bad=2 / 41)
    loader = TrainLoader(bad, **options)
    steps = 0
    with pytest.raises(TooManyBadImages):
        while True:
            next(loader)
            steps += 1
    for step in range(steps + 1):
        resumed = TrainLoader(bad, **options)
        resumed.set_state(loader.get_state(step))
        for _ in range(steps - step):
            next(resumed)
        with pytest.raises(TooManyBadImages):
            next(resumed)
        resumed.close()


def test_many_bad_files(tmp_path):
    for i in range(30):
        (tmp_path / f"{i:02d}.jpg").write_bytes(jpeg(i) if i < 10 else b"bad")
    config = dict(dataset=dict(type="CustomDataset", data_root=str(tmp_path), with_label=False), pipeline=CROP)
    batch = take(TrainLoader(config, batch_size=30, max_bad=1.0), 1)[0]
    assert (batch["index"] < 10).all(), "replacements of replacements are good"
    with pytest.raises(TooManyBadImages, match=r"and \d more"):
        take(TrainLoader(config, batch_size=30, max_bad=0.5), 1)
    for i in range(10):
        (tmp_path / f"{i:02d}.jpg").unlink()
        (tmp_path / f"{i:02d}.jpg").write_bytes(b"")
    with pytest.raises(TooManyBadImages, match="no image of .* can be decoded"):
        TrainLoader(config, batch_size=30, max_bad=1.0)


def test_a_missing_file_is_a_bad_one(tmp_path, caplog):
    (tmp_path / "0.jpg").write_bytes(jpeg(0))
    (tmp_path / "list.txt").write_text("0.jpg 0\nlost.jpg 1\n")
    dataset = dict(type="CustomDataset", data_root=str(tmp_path), ann_file="list.txt")
    batch = take(TrainLoader(dict(dataset=dataset, pipeline=CROP), batch_size=2, max_bad=0.5), 1)[0]
    assert batch["index"].tolist() == [0, 0] and batch["label"].tolist() == [0, 0]
    assert "lost.jpg: FileNotFoundError: No such file" in caplog.text


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


def test_evaluation_is_one_ordered_pass_of_one_shape(good):
    loader = EvalLoader(dict(good, pipeline=[dict(type="Resize", scale=8)]), batch_size=16)
    assert len(loader) == 3 and loader.num_samples == 41 and loader.num_classes == 2
    passes = [list(loader) for _ in range(2)]
    assert same(*passes)
    for batch in passes[0]:
        assert set(batch) == {"image", "label", "index", "valid"}
        assert batch["image"].shape == (16, 8, 8, 3) and batch["valid"].dtype == bool
    valid = np.concatenate([batch["valid"] for batch in passes[0]])
    assert valid.tolist() == [True] * 41 + [False] * 7
    assert np.concatenate([batch["index"] for batch in passes[0]])[valid].tolist() == list(range(41))
    last = passes[0][-1]
    assert (last["label"][9:] == -1).all() and (last["index"][9:] == -1).all() and not last["image"][9:].any()


@pytest.mark.parametrize("hosts", [2, 8])
def test_hosts_share_an_evaluation(good, hosts):
    expected = list(EvalLoader(good, batch_size=16))
    parts = [list(EvalLoader(good, batch_size=16, process_index=p, process_count=hosts)) for p in range(hosts)]
    joined = [{key: np.concatenate([p[step][key] for p in parts]) for key in expected[0]} for step in range(3)]
    assert same(joined, expected), "also the last, of which some hosts have nothing"


def test_bad_files_in_an_evaluation_are_left_out(bad):
    loader = EvalLoader(bad, batch_size=16, max_bad=0.1)
    batches = list(loader)
    valid = np.concatenate([batch["valid"] for batch in batches])
    assert np.flatnonzero(~valid[:41]).tolist() == list(BAD)
    index = np.concatenate([batch["index"] for batch in batches])
    assert (index[:41][valid[:41]] == np.flatnonzero(valid[:41])).all()
    with pytest.raises(TooManyBadImages, match="3 of 41|2 of 41|1 of 41"):
        list(EvalLoader(bad, batch_size=16))


def test_an_evaluation_of_some(good):
    loader = EvalLoader(good, batch_size=4, limit=6)
    index = np.concatenate([batch["index"][batch["valid"]] for batch in loader])
    assert len(loader) == 2 and len(index) == 6 and (np.diff(index) >= 6).all(), "spread over the data set"
    assert EvalLoader(good, batch_size=4, limit=100).num_samples == 41


def test_an_evaluation_can_stop_early(good):
    before = threading.active_count()
    loader = EvalLoader(good, batch_size=4)
    next(iter(loader))
    loader.close()
    settle(before)


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        ({}, dict(batch_size=42), "41 samples, fewer than one batch of batch_size=42"),
        ({}, dict(batch_size=8, process_count=3), "batch_size=8 must .* divide evenly among 3 processes"),
        ({}, dict(batch_size=8, seed=-1), "seed=-1"),
        (dict(dataset=dict(type="CustomDatset")), dict(batch_size=8), "Did you mean 'CustomDataset'"),
        (dict(pipeline=[dict(type="Resize", scale=8, keep_rato=True)]), dict(batch_size=8), "'keep_ratio'"),
        (dict(pipeline=[lambda s: {**s, "image": s["image"] / 255}]), dict(batch_size=8), "uint8 pixels.*float64"),
    ],
)
def test_mistakes(good, config, options, message):
    with pytest.raises(ConfigError, match=message):
        TrainLoader({**good, **config}, **options)


def test_no_dataset():
    with pytest.raises(ConfigError, match="needs a 'dataset'"):
        TrainLoader(dict(pipeline=[]), batch_size=1)


def test_images_of_different_sizes():
    class Growing(InMemory):
        def __getitem__(self, index):
            return {"image": np.zeros((4 + index, 4, 3), np.uint8), "label": 0}

    dataset = Growing(np.zeros((4, 1, 1), np.uint8), np.zeros(4, int))
    with pytest.raises(ConfigError, match="differ in shape.*CenterCrop"):
        take(TrainLoader(dict(dataset=dataset), batch_size=4), 1)


def test_any_object_serves_as_a_source():
    class Squares:
        def __len__(self):
            return 6

        def __getitem__(self, index):
            return {"image": np.full((2, 2), index * index, np.uint8)}

    batch = take(TrainLoader(dict(dataset=Squares()), batch_size=6), 1)[0]
    assert (batch["image"][:, 1, 1, 2] == batch["index"] ** 2).all() and (batch["label"] == -1).all()


# ---------------------------------------------------------------------------------------------------------------------
# Resources


def settle(threads: int) -> None:
    """Waits until no more threads run than before."""
    deadline = time.time() + 10
    while threading.active_count() > threads and time.time() < deadline:
        time.sleep(0.05)
    assert threading.active_count() <= threads, [thread.name for thread in threading.enumerate()]


def test_threads_end(good):
    before = threading.active_count()
    loader = TrainLoader(good, batch_size=8)
    next(loader)
    batches = device_prefetch(loader, jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    next(batches)
    batches.close()
    loader.close()
    settle(before)


def test_images_in_memory_start_no_processes():
    import multiprocessing

    loader = TrainLoader(dict(dataset=dict(type="Digits"), pipeline=CROP), batch_size=8, num_workers=4)
    next(loader)
    assert not multiprocessing.active_children()
    loader.close()


def test_memory_stays_flat(good):
    """20,000 images in both loaders together, after a warm-up of 5,000."""

    def resident() -> float:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096 / 2**20

    loader = TrainLoader(good, batch_size=40)
    evaluation = EvalLoader(good, batch_size=40)
    sizes = []
    for round_ in range(520):
        next(loader)
        if round_ % 5 == 0:
            for _ in evaluation:
                pass
        if round_ in (100, 519):
            sizes.append(resident())
    loader.close()
    assert sizes[1] - sizes[0] < 16, f"{sizes} MiB"


PROGRAM = """
import multiprocessing, os, signal, sys
import jax
from jaxpretrain.data.pipeline import TrainLoader
from jaxpretrain.data.prefetch import device_prefetch

if __name__ == "__main__":
    config = dict(dataset=dict(type="CustomDataset", data_root=sys.argv[1]), pipeline=[dict(type="Resize", scale=8)])
    loader = TrainLoader(config, batch_size=8, num_workers=1)
    batches = device_prefetch(loader, jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    next(batches)
    print(*[child.pid for child in multiprocessing.active_children()], flush=True)
    if sys.argv[2] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    raise SystemExit(3)
"""


@pytest.mark.parametrize(("end", "code"), [("killed", -signal.SIGKILL), ("exit", 3)])
def test_worker_processes_end_with_the_program(good, tmp_path, end, code):
    """However it ends, without `close`: no process stays behind, and an ordinary end is silent."""
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    root = str(Path(__file__).parents[1])
    run = subprocess.run(
        [sys.executable, str(script), good["dataset"]["data_root"], end],
        stdout=subprocess.PIPE,
        stderr=(tmp_path / "stderr").open("w"),  # not a pipe, which a process left behind would keep open
        env={**os.environ, "PYTHONPATH": root},
        timeout=120,
    )
    assert run.returncode == code
    workers = [int(pid) for pid in run.stdout.split()]
    assert workers
    deadline = time.time() + 20
    while any(alive(pid) for pid in workers) and time.time() < deadline:
        time.sleep(0.1)
    assert not any(alive(pid) for pid in workers)
    if end == "exit":
        assert (tmp_path / "stderr").read_text() == ""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_small_shared_memory_is_pointed_out(good, caplog, monkeypatch):
    loader = TrainLoader(good, batch_size=8)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=4))
    loader._check_shared_memory(8)
    assert "--shm-size" in caplog.text


# ---------------------------------------------------------------------------------------------------------------------
# To the devices


@pytest.fixture
def sharding():
    return NamedSharding(jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)), P("data"))


def test_prefetch_keeps_order_and_places_batches(good, sharding):
    expected = take(TrainLoader(good, batch_size=8), 7)
    loader = TrainLoader(good, batch_size=8)
    with jax.transfer_guard("disallow"), device_prefetch(loader, sharding) as batches:
        received = [next(batches) for _ in range(7)]
    loader.close()
    for batch in received:
        assert all(leaf.sharding == sharding for leaf in jax.tree.leaves(batch))
    assert same([jax.device_get(batch) for batch in received], expected)


def test_prefetch_under_the_global_transfer_guard(sharding):
    """The guard set for the whole program also reaches the prefetch thread."""
    jax.config.update("jax_transfer_guard", "disallow")
    try:
        with device_prefetch(iter([{"x": np.arange(8), "y": (np.zeros((8, 2), np.uint8),)}]), sharding) as batches:
            assert next(batches)["x"].shape == (8,)
            with pytest.raises(StopIteration):
                next(batches)
    finally:
        jax.config.update("jax_transfer_guard", "allow")


def test_prefetch_runs_ahead_by_size(sharding):
    made = []

    def source():
        for i in range(10):
            made.append(i)
            yield {"x": np.full(8, i)}

    with device_prefetch(source(), sharding, size=3) as batches:
        deadline = time.time() + 5
        while len(made) < 3 and time.time() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)
        assert made == [0, 1, 2]
        assert int(next(batches)["x"][0]) == 0
        rest = [int(batch["x"][0]) for batch in batches]
    assert rest == list(range(1, 10))


def test_prefetch_measures_the_wait(sharding):
    def slow():
        for _ in range(3):
            time.sleep(0.1)
            yield {"x": np.zeros(8)}

    with device_prefetch(slow(), sharding, size=1) as batches:
        for _ in range(3):
            next(batches)
        assert 0.2 < batches.wait_seconds < 3

    with device_prefetch(iter([{"x": np.zeros(8)}] * 3), sharding, size=3) as batches:
        time.sleep(0.3)
        for _ in range(3):
            next(batches)
        assert batches.wait_seconds < 0.1


def test_prefetch_passes_exceptions_on_in_their_place(sharding):
    def source():
        yield {"x": np.zeros(8)}
        yield {"x": np.zeros(8)}
        raise TooManyBadImages("here")

    with device_prefetch(source(), sharding) as batches:
        next(batches)
        next(batches)
        for _ in range(2):
            with pytest.raises(TooManyBadImages, match="here"):
                next(batches)


def test_prefetch_takes_a_function_for_the_sharding(sharding):
    replicated = NamedSharding(sharding.mesh, P())
    choose = lambda array: sharding if array.ndim else replicated  # noqa: E731
    with device_prefetch(iter([{"x": np.zeros(8), "scale": np.float32(2)}]), choose) as batches:
        batch = next(batches)
    assert batch["x"].sharding == sharding and batch["scale"].sharding == replicated
    with pytest.raises(ValueError, match="size=0"):
        device_prefetch(iter([]), sharding, size=0)
