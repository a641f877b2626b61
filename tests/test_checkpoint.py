"""Checkpoints: lossless, verified, atomic, on any mesh; and every error that they can give."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxpretrain.build import ConfigError
from jaxpretrain.checkpoint import Checkpointer, CheckpointError, load_params
from jaxpretrain.checkpoint_format import config_difference
from jaxpretrain.checksums import checksums
from tests.tiny import xla_flags

logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # Orbax leaves futures behind when reading fails

CONFIG = dict(method=dict(type="MAE", backbone=dict(arch="base", out_indices=(3,))), max_epochs=10, log_interval=50)


def make_state(seed: int | jax.Array = 0) -> dict:
    """A small state with everything that states have: lists' int keys, named tuples, an empty group, many dtypes."""
    keys = jax.random.split(jax.random.key(seed), 4)
    layer = lambda key: {"kernel": jax.random.normal(key, (8, 16)), "bias": jnp.zeros(16)}  # noqa: E731
    params = {"backbone": {"layers": {0: layer(keys[0]), 1: layer(keys[1])}}, "empty": jnp.zeros((0, 3))}
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.constant_schedule(1e-3)))
    extra = {
        "half": jax.random.normal(keys[2], (8, 6)).astype(jnp.bfloat16),
        "flags": jnp.array([True, False, True]),
        "small": jnp.arange(-3, 5, dtype=jnp.int8),
        "key": keys[3],
    }
    opt_state = optimizer.init(params)
    return dict(params=params, ema={}, model_state=extra, opt_state=opt_state, step=jnp.int32(seed), none=None)


def make_mesh(*shape: int) -> jax.sharding.Mesh:
    names = ("data", "fsdp")[: len(shape)]
    devices = jax.devices()[: int(np.prod(shape))]
    return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(shape), devices=devices)


def abstract_state(mesh: jax.sharding.Mesh | None = None) -> dict:
    def leaf(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        if mesh is None:
            return jax.ShapeDtypeStruct(x.shape, x.dtype)
        spec = P(mesh.axis_names[-1]) if x.ndim == 2 and x.shape[0] == 8 else P()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(leaf, jax.eval_shape(make_state, 0))


def on(mesh: jax.sharding.Mesh, state: dict) -> dict:
    return jax.device_put(state, jax.tree.map(lambda x: x.sharding, abstract_state(mesh)))


def assert_same(a: object, b: object) -> None:
    """Same structure, dtypes and bits."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with checkpoints of steps 1 to 3; tests that spoil it take a copy."""
    directory = tmp_path_factory.mktemp("run") / "checkpoints"
    with Checkpointer(directory, CONFIG, max_to_keep=-1, save_best="knn/top1") as checkpointer:
        for step, score in ((1, 0.2), (2, 0.7), (3, 0.5)):
            clock = dict(seconds=0.1 + step, images=256 * step)
            metrics = {"knn/top1": score}
            checkpointer.save(
                step, make_state(step), data_state=dict(at=step, raw=b"\0\xff"), clock=clock, metrics=metrics
            )
    return directory


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "checkpoints"))


# ----------------------------------------------------------------------------------------------------------------------
# Checksums


@pytest.mark.parametrize(
    "dtype", ["float32", "bfloat16", "float16", "float8_e4m3fn", "int8", "uint32", "bool", "complex64"]
)
def test_checksum_sees_every_bit_and_position(dtype: str) -> None:
    x = np.random.default_rng(0).integers(0, 2, (3, 4, 5)).astype(jnp.dtype(dtype))
    base = checksums([x])[0]
    assert checksums([jnp.asarray(x)]) == [base]
    if dtype != "bool":
        for bit in range(0, 8 * x.nbytes, 37):
            flipped = bytearray(x.tobytes())
            flipped[bit // 8] ^= 1 << (bit % 8)
            assert checksums([np.frombuffer(flipped, x.dtype).reshape(x.shape)])[0] != base, bit
    assert checksums([x[::-1].copy()])[0] != base  # the same words elsewhere
    assert checksums([x + x.dtype.type(1) if dtype != "bool" else ~x])[0] != base


def test_checksum_of_64_bit_types() -> None:
    with jax.enable_x64(True):
        for dtype in (np.float64, np.int64):
            x = np.arange(7).astype(dtype)
            flipped = bytearray(x.tobytes())
            flipped[8] ^= 1
            assert checksums([x]) != checksums([np.frombuffer(flipped, dtype)])


def test_checksum_is_the_same_under_every_sharding() -> None:
    x = jax.random.normal(jax.random.key(0), (16, 8, 3))
    expected = checksums([np.asarray(x)])
    for mesh, spec in (
        (make_mesh(8), P("data")),
        (make_mesh(8), P(None, "data")),
        (make_mesh(2, 4), P("fsdp", "data")),
        (make_mesh(2, 4), P(None, ("data", "fsdp"))),
        (make_mesh(1, 2), P()),
    ):
        assert checksums([jax.device_put(x, NamedSharding(mesh, spec))]) == expected, (mesh, spec)


def test_checksum_is_what_the_format_says() -> None:
    """Against plain Python: stored checkpoints depend on it."""
    values = np.random.default_rng(0).standard_normal(20).astype(np.float32)
    total = 0
    for position, word in enumerate(values.view(np.uint32).tolist()):
        mixed = word ^ ((position * 0x9E3779B1 + 0x85EBCA77) % 2**32)
        mixed = (mixed ^ (mixed >> 16)) * 0x85EBCA6B % 2**32
        mixed = (mixed ^ (mixed >> 13)) * 0xC2B2AE35 % 2**32
        total += mixed ^ (mixed >> 16)
    assert checksums([values.reshape(4, 5)]) == [total % 2**32]


# ----------------------------------------------------------------------------------------------------------------------
# Saving and restoring


def test_round_trip_is_lossless(saved: Path) -> None:
    with Checkpointer(saved, CONFIG) as checkpointer:
        assert (checkpointer.all_steps(), checkpointer.latest_step()) == ([1, 2, 3], 3)
        restored = checkpointer.restore(abstract_state())
        assert_same(restored.state, make_state(3))
        assert restored.step == 3
        assert restored.data_state == dict(at=3, raw=b"\0\xff")
        assert restored.clock == dict(seconds=3.1, images=768)
        assert restored.metrics == {"knn/top1": 0.5}
        assert restored.config["method"]["backbone"] == dict(arch="base", out_indices=[3])
        assert_same(checkpointer.restore(abstract_state(), 1).state, make_state(1))


def test_restores_on_another_mesh(tmp_path: Path) -> None:
    state = make_state(5)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, on(make_mesh(2, 4), state))
        checkpointer.wait()
        for mesh in (make_mesh(2), make_mesh(4, 2), make_mesh(1, 8)):
            restored = checkpointer.restore(abstract_state(mesh)).state
            assert_same(restored, state)
            assert restored["params"]["backbone"]["layers"][0]["kernel"].sharding.spec == P(mesh.axis_names[-1])
        assert_same(checkpointer.restore(abstract_state()).state, state)  # one device


def test_state_may_be_donated_right_after_save(tmp_path: Path) -> None:
    spoil = functools.partial(jax.jit, donate_argnums=0)(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree))
    make = jax.jit(lambda: {str(i): jax.random.normal(jax.random.key(i), (512, 512)) for i in range(8)})
    with Checkpointer(tmp_path) as checkpointer:
        for step in range(1, 4):
            state = make()
            checkpointer.save(step, state)
            for _ in range(3):
                state = spoil(state)
            jax.block_until_ready(state)
            checkpointer.wait()
            assert_same(checkpointer.restore(jax.eval_shape(make)).state, make())


def test_load_params(saved: Path) -> None:
    for where in (saved, saved.parent):
        loaded = load_params(where)
        assert (loaded.step, set(loaded.state)) == (3, {"params", "ema", "model_state"})
        assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(loaded.state["params"]["backbone"]))
        assert_same(loaded.state, {k: make_state(3)[k] for k in ("params", "ema", "model_state")})  # int keys included
    assert load_params(saved, "best").step == 2
    assert load_params(saved, 1).step == 1
    assert load_params(saved / "1").step == 1
    mesh = make_mesh(2)
    loaded = load_params(saved, "latest", abstract_state(mesh))
    assert_same(loaded.state["params"], make_state(3)["params"])
    assert loaded.state["params"]["backbone"]["layers"][1]["kernel"].sharding == NamedSharding(mesh, P("data"))
    assert loaded.config["max_epochs"] == 10
    assert sorted(path.name for path in saved.iterdir()) == ["1", "2", "3"]


def test_load_params_without_averaged_weights_in_the_model(tmp_path: Path) -> None:
    state = make_state(1)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, dict(state, ema=state["params"]))
    assert load_params(tmp_path, abstract=abstract_state()).state["ema"] == {}
    with pytest.raises(CheckpointError, match=r"missing in the checkpoint: params/new: float32 \(2,\)"):
        abstract = abstract_state()
        abstract["params"]["new"] = jax.ShapeDtypeStruct((2,), jnp.float32)
        load_params(tmp_path, abstract=abstract)


def test_saving_twice_and_never(tmp_path: Path) -> None:
    with Checkpointer(tmp_path / "a") as checkpointer:
        assert checkpointer.save(1, make_state())
        assert not checkpointer.save(1, make_state())  # the last step of a run that is also due
    with Checkpointer(tmp_path / "never", interval=-1) as checkpointer:
        assert not checkpointer.should_save(1, total_steps=1)
        assert not checkpointer.save(1, make_state())
    assert not (tmp_path / "never").exists()


def test_should_save(tmp_path: Path) -> None:
    by_epoch = Checkpointer(tmp_path, interval=2, save_best="acc/top1")
    assert [step for step in range(1, 41) if by_epoch.should_save(step, 10)] == [20, 40]
    assert by_epoch.should_save(33, 10, total_steps=33)
    assert by_epoch.should_save(7, 10, metrics={"acc/top1": 0.1})
    assert not by_epoch.should_save(7, 10, metrics={"acc/top1": float("nan")})
    by_step = Checkpointer(tmp_path, interval=3, by_epoch=False)
    assert [step for step in range(1, 10) if by_step.should_save(step, 10)] == [3, 6, 9]


@pytest.mark.parametrize(
    ("metric", "scores", "kept"),
    [
        ("knn/top1", [0.1, 0.9, 0.3, float("nan"), None, 0.2], [2, 5, 6]),
        ("val/loss", [3.0, 2.0, 1.0, 2.5, 2.5, 2.5], [3, 5, 6]),
        ("knn/top1", [0.5, 0.5, 0.1, 0.1, 0.1, 0.1], [2, 5, 6]),
        ("error/x", [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [1, 5, 6]),
        (None, [1.0] * 6, [5, 6]),
    ],
)
def test_keeps_latest_and_best(tmp_path: Path, metric: str | None, scores: list, kept: list[int]) -> None:
    state = {"w": jnp.ones(3)}
    with Checkpointer(tmp_path, max_to_keep=2, save_best=metric) as checkpointer:
        for step, score in enumerate(scores, 1):
            metrics = None if score is None else {metric or "other": score}
            checkpointer.save(step, state, metrics=metrics)
    with Checkpointer(tmp_path, max_to_keep=2, save_best=metric) as checkpointer:  # nothing but the files knows
        assert checkpointer.all_steps() == kept
        assert checkpointer.best_step() == (kept[0] if metric else None)
        if metric:
            better = {"knn/top1": 0.95, "val/loss": 0.95, "error/x": 0.95}
            assert checkpointer.should_save(7, 1000, metrics=better)
            assert not checkpointer.should_save(7, 1000, metrics={metric: scores[kept[0] - 1]})


def test_going_on_from_an_older_step_removes_later_ones(copy: Path) -> None:
    with Checkpointer(copy, CONFIG, step=1) as checkpointer:
        checkpointer.restore(abstract_state())
        assert checkpointer.all_steps() == [1, 2, 3]
        checkpointer.save(2, make_state(22))
        checkpointer.wait()
        assert checkpointer.all_steps() == [1, 2]
        assert_same(checkpointer.restore(abstract_state(), "latest").state, make_state(22))
        assert checkpointer.best_step() is None  # that of the former step 2 is forgotten


def test_refuses_to_save_over_a_run_that_was_not_restored(copy: Path) -> None:
    with (
        Checkpointer(copy, CONFIG) as checkpointer,
        pytest.raises(CheckpointError, match=r"steps 1, 2, 3.*new --workdir"),
    ):
        checkpointer.save(1, make_state())


# ----------------------------------------------------------------------------------------------------------------------
# Refusals


def test_another_config_is_refused_with_the_difference(saved: Path) -> None:
    other = json.loads(json.dumps(CONFIG))
    other["method"]["backbone"]["arch"] = "large"
    other["log_interval"] = 1
    with pytest.raises(CheckpointError) as error:
        Checkpointer(saved, other).restore(abstract_state())
    message = str(error.value)
    assert "\n  method.backbone.arch: base -> large\n" in message and "log_interval" not in message
    assert "new --workdir" in message and "--config.checkpoint.ignore_config=True" in message
    assert Checkpointer(saved, other, ignore_config=True).restore(abstract_state()).step == 3
    assert Checkpointer(saved, ml_collections.ConfigDict(CONFIG)).restore(abstract_state()).step == 3


def test_config_difference() -> None:
    old = dict(
        a=1,
        betas=(0.9, 0.95),
        param_scheduler=[dict(type="LinearLR", end=40), dict(type="CosineAnnealingLR")],
        mesh=dict(data=8),
        data=dict(num_workers=0, train=dict(x=1)),
        method=dict(backbone=dict(arch="base")),
    )
    new = dict(
        a=1.5,
        betas=[0.9, 0.95],
        param_scheduler=[dict(type="LinearLR", end=20), dict(type="CosineAnnealingLR", eta_min=0.1)],
        mesh=dict(data=2),
        data=dict(num_workers=4, train=dict(x=2)),
        method=dict(backbone=None),
    )
    assert config_difference(old, ml_collections.ConfigDict(old)) == []
    assert config_difference(old, new) == [
        "a: 1 -> 1.5",
        "param_scheduler[0].end: 40 -> 20",
        "data.train.x: 1 -> 2",
        "method.backbone.arch: base -> (absent)",
        "param_scheduler[1].eta_min: (absent) -> 0.1",
        "method.backbone: (absent) -> None",
    ]
    assert config_difference(dict(max_epochs=1, remat="none"), dict(max_epochs=2, remat="full")) == [
        "max_epochs: 1 -> 2"
    ]
    assert config_difference(dict(meshes=1), dict(meshes=2)) == ["meshes: 1 -> 2"]  # not below `mesh`
    assert config_difference(dict(a=1, b=1), dict(a=2, b=2), neutral=["b"]) == ["a: 1 -> 2"]


def test_leaves_that_do_not_fit_are_listed_at_once(saved: Path) -> None:
    abstract = abstract_state()
    layers = abstract["params"]["backbone"]["layers"]
    layers[0]["kernel"] = jax.ShapeDtypeStruct((8, 32), jnp.float32)
    layers[1]["bias"] = jax.ShapeDtypeStruct((16,), jnp.bfloat16)
    layers[2] = {"bias": layers[1].pop("kernel")}
    with pytest.raises(CheckpointError) as error:
        Checkpointer(saved, CONFIG).restore(abstract)
    for line in (
        "params/backbone/layers/0/kernel: float32 (8, 16) in the checkpoint, float32 (8, 32) here",
        "params/backbone/layers/1/bias: float32 (16,) in the checkpoint, bfloat16 (16,) here",
        "only in the checkpoint: params/backbone/layers/1/kernel: float32 (8, 16)",
        "missing in the checkpoint: params/backbone/layers/2/bias: float32 (8, 16)",
    ):
        assert f"\n  {line}" in str(error.value)


def test_foreign_directories(tmp_path: Path, saved: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "epoch_100.pth").touch()
    with pytest.raises(CheckpointError, match=r"not a directory of jaxpretrain.*epoch_100\.pth; weights of PyTorch"):
        Checkpointer(tmp_path / "torch")
    (tmp_path / "orbax" / "12" / "default").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="It holds 12, with default but without the 'meta'"):
        Checkpointer(tmp_path / "orbax")
    with pytest.raises(CheckpointError, match=r"epoch_100\.pth is a file.*converted"):
        load_params(tmp_path / "torch" / "epoch_100.pth")
    with pytest.raises(CheckpointError, match="There is no directory"):
        load_params(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="There is no checkpoint in"):
        Checkpointer(tmp_path / "empty").restore(abstract_state())
    with pytest.raises(CheckpointError, match=r"no checkpoint 7 in .*; there are 1, 2, 3"):
        load_params(saved, 7)


def test_best_without_a_metric(tmp_path: Path) -> None:
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, make_state())
    with pytest.raises(CheckpointError, match=r"a metric to choose by.*save_best=METRIC"):
        load_params(tmp_path, "best")


def test_mistakes_in_the_config(tmp_path: Path) -> None:
    for wrong in (dict(interval=0), dict(max_to_keep=0), dict(best_mode="largest")):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            Checkpointer(tmp_path, **wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"save_best='knn/top': no evaluator.*Did you mean 'knn/top1'"):
        Checkpointer(tmp_path, save_best="knn/top").save(1, make_state(), metrics={"knn/top1": 1.0, "linear/top1": 1.0})


# ----------------------------------------------------------------------------------------------------------------------
# Damage


def flip(path: Path, position: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax's, after an error
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")
def test_a_flipped_byte_anywhere_is_noticed_or_harmless(copy: Path) -> None:
    rng = random.Random(0)
    wrong = []
    for path in sorted(p for p in (copy / "3").rglob("*") if p.is_file()):
        original = path.read_bytes()
        positions = sorted({rng.randrange(len(original)) for _ in range(6)}) if original else []
        for position in positions:
            flip(path, position, rng.randrange(8))
            try:
                assert_same(Checkpointer(copy, CONFIG).restore(abstract_state()).state, make_state(3))
            except CheckpointError as error:
                assert "step 3 is damaged" in str(error) and "steps 1, 2" in str(error), error
                wrong.append(str(error))
            path.write_bytes(original)
    assert any("wrong checksum" in message for message in wrong) and any("digest" in message for message in wrong)
    assert_same(Checkpointer(copy, CONFIG).restore(abstract_state()).state, make_state(3))


def test_wrong_numbers_are_named(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every leaf is verified: whichever one comes back changed is the one that is named."""
    checkpointer = Checkpointer(copy, CONFIG)
    orbax = checkpointer._orbax()
    honest = orbax.restore
    for path in (
        ("params", "backbone", "layers", "0", "kernel"),
        ("opt_state", "1", "0", "mu", "backbone", "layers", "1", "bias"),
    ):

        def tampered(*args: object, path: tuple[str, ...] = path, **kwargs: object) -> dict:
            tree = honest(*args, **kwargs)["state"]
            node = functools.reduce(lambda node, key: node[key], path[:-1], tree)
            node[path[-1]] = node[path[-1]].at[-1].add(1)
            return dict(state=tree)

        monkeypatch.setattr(orbax, "restore", tampered)
        with pytest.raises(CheckpointError) as error:
            checkpointer.restore(abstract_state())
        assert f"step 3 is damaged: {'/'.join(path)} in {copy / '3' / 'state'}: wrong checksum" in str(error.value)


def test_damage_offers_the_older_steps(copy: Path) -> None:
    meta = copy / "3" / "meta" / "metadata"
    meta.write_text(meta.read_text().replace('"images": 768', '"images": 769'))
    with pytest.raises(
        CheckpointError, match=r"step 3 is damaged.*metadata does not match its digest.*checkpoint\.step=2 "
    ):
        Checkpointer(copy, CONFIG).restore(abstract_state())
    assert Checkpointer(copy, CONFIG, step=2).restore(abstract_state()).step == 2
    assert Checkpointer(copy, CONFIG, save_best="knn/top1").best_step() == 2  # does not need the damaged one
    shutil.rmtree(copy / "1")
    shutil.rmtree(copy / "2")
    with pytest.raises(CheckpointError, match="no older one: start in a new --workdir"):
        Checkpointer(copy, CONFIG).restore(abstract_state())


def test_truncated_and_missing_files(copy: Path) -> None:
    data = max((p for p in (copy / "3" / "state").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data.write_bytes(data.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="step 3 is damaged"):
        Checkpointer(copy, CONFIG).restore(abstract_state())
    shutil.rmtree(copy / "3" / "state")
    with pytest.raises(CheckpointError, match="step 3 is damaged"):
        Checkpointer(copy, CONFIG).restore(abstract_state())
    shutil.rmtree(copy / "3" / "meta")
    with pytest.raises(CheckpointError, match=r"step 3 is damaged.*No such file"):
        Checkpointer(copy, CONFIG).restore(abstract_state())


# ----------------------------------------------------------------------------------------------------------------------
# Faults from outside, in real processes


@jax.jit
def state_at(step: jax.Array | int) -> dict:
    """10 MB that do not compress; whole numbers, so that counting up is exact."""
    noise = lambda i: jax.random.randint(jax.random.key(i), (256, 1024), 0, 2**20).astype(jnp.float32)  # noqa: E731
    return {str(i): noise(i) + step for i in range(10)} | {"step": jnp.int32(step)}


@functools.partial(jax.jit, donate_argnums=0)
def advance(state: dict) -> dict:
    return jax.tree.map(lambda x: x + 1, state)


def restore_state(directory: Path | str, step: int | None = None) -> dict:
    return Checkpointer(directory, read_only=True).restore(jax.eval_shape(state_at, 0), step).state


@contextlib.contextmanager
def start(program: str, *args: object, **env: str) -> Iterator[subprocess.Popen]:
    """A process that runs `program` with what this file defines; killed at the end, whatever happens."""
    command = [sys.executable, "-c", "from tests.test_checkpoint import *\n" + program, *map(str, args)]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), **env}
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_killed_while_saving(tmp_path: Path) -> None:
    """SIGKILL at random moments of a process that saves without pause: what is there is whole, and it goes on."""
    program = """
checkpointer = Checkpointer(sys.argv[1], max_to_keep=2)
step = checkpointer.latest_step() or 0
state = checkpointer.restore(jax.eval_shape(state_at, 0)).state if step else state_at(0)
print("started at", step, flush=True)
while True:
    step, state = step + 1, advance(state)
    checkpointer.save(step, state)  # which first waits for the one before
    print("saved", step - 1, flush=True)
"""
    rng, reached = random.Random(), 0
    for _ in range(3):
        with start(program, tmp_path) as process:
            assert process.stdout is not None
            output = iter(process.stdout.readline, "")
            first = next((line for line in output if line.startswith("started")), "did not start")
            assert first == f"started at {reached}\n"  # where the last one got: nothing is lost or skipped
            if not reached:
                assert "saved 1\n" in output
            time.sleep(rng.uniform(0.1, 1.5))
            assert process.poll() is None
        for step in Checkpointer(tmp_path, read_only=True).all_steps():
            assert_same(restore_state(tmp_path, step), state_at(step))
            reached = step
    assert reached > 0
    Checkpointer(tmp_path)
    assert all(path.name.isdecimal() for path in tmp_path.iterdir())  # what the killed ones left is gone


def check_full_disk(directory: Path, fill: str, free: str, why: str) -> None:
    program = """
checkpointer = Checkpointer(sys.argv[1])
checkpointer.save(1, state_at(1))
checkpointer.wait()
exec(sys.argv[2])
try:
    checkpointer.save(2, state_at(2))
    checkpointer.wait()
except CheckpointError as error:
    print(f"error: {error}")
assert_same(restore_state(sys.argv[1], 1), state_at(1))
exec(sys.argv[3])
checkpointer.save(3, state_at(3))
checkpointer.close()
print("steps", checkpointer.all_steps())
"""
    with start(program, directory, fill, free) as process:
        output, _ = process.communicate(timeout=600)
    message = f"error: The checkpoint of step 2 could not be written ({directory / '2'}): {why}; "
    assert message + "the checkpoint of step 1 is intact, and the run can go on from it\n" in output, output
    assert "steps [1, 3]" in output, output  # it went on as soon as there was room
    assert sorted(path.name for path in directory.iterdir()) == ["1", "3"]
    assert_same(restore_state(directory, 1), state_at(1))


def test_write_failure_leaves_the_previous_checkpoint(tmp_path: Path) -> None:
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({}, resource.RLIM_INFINITY))"
    check_full_disk(tmp_path, limit.format(100_000), limit.format("resource.RLIM_INFINITY"), "File too large")


def test_full_disk(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        filler = disk / "filler"
        space = f"os.statvfs({str(disk)!r}).f_bavail * os.statvfs({str(disk)!r}).f_frsize - 1_000_000"
        fill = f"Path({str(filler)!r}).write_bytes(bytes({space}))"
        check_full_disk(disk / "checkpoints", fill, f"os.remove({str(filler)!r})", "No space left on device")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_two_processes_save_one_checkpoint(tmp_path: Path) -> None:
    program = """
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{sys.argv[2]}", 2, int(sys.argv[3]))
mesh = make_mesh(4)
shardings = jax.tree.map(lambda x: NamedSharding(mesh, P("data") if x.ndim else P()), jax.eval_shape(state_at, 0))
make = jax.jit(state_at, out_shardings=shardings)
with Checkpointer(sys.argv[1], dict(a=1), max_to_keep=2, save_best="m") as checkpointer:
    for step in range(1, 6):
        checkpointer.save(step, make(step), data_state=step, metrics={"m": 1 / step})
    checkpointer.wait()
    restored = checkpointer.restore(jax.eval_shape(make, 0), 4)
    same = jax.tree.map(lambda a, b: (a == b).all(), restored.state, make(4))
    assert all(bool(x) for x in jax.tree.leaves(same)) and restored.data_state == 4
    checkpointer.save(5, make(50))
with Checkpointer(sys.argv[1], read_only=True) as checkpointer:
    print("steps", checkpointer.all_steps(), checkpointer.best_step())
"""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(start(program, tmp_path, port, i, XLA_FLAGS=xla_flags(2))) for i in range(2)]
        outputs = [process.communicate(timeout=600)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    assert all("steps [1, 4, 5] 1" in output for output in outputs), outputs
    assert_same(restore_state(tmp_path, 5), state_at(50))  # in one process, on one device
