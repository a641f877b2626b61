"""Files of PyTorch: what is read, what is refused, and what every kind of broken file is told."""

from __future__ import annotations

import pickle
import sys
import types

import ml_dtypes
import numpy as np
import pytest
import torch

from jaxpretrain.interop import InteropError, files


def weights():
    rng = np.random.default_rng(0)
    return {"a.weight": rng.standard_normal((3, 4)).astype(np.float32), "a.steps": np.asarray(5)}


def tensors():
    return {name: torch.from_numpy(np.array(array)) for name, array in weights().items()}


def assert_same(state):
    assert state.keys() == weights().keys()
    for name, array in weights().items():
        assert state[name].dtype == array.dtype and state[name].shape == array.shape
        np.testing.assert_array_equal(state[name], array)


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors", "x.bin"])
def test_what_is_written_is_read(name, tmp_path):
    files.write(tmp_path / "deep" / name, weights())
    assert_same(files.read(tmp_path / "deep" / name))
    assert [path.name for path in (tmp_path / "deep").iterdir()] == [name]


def test_mmpretrain_s_form(tmp_path):
    files.write(tmp_path / "x.pth", weights(), meta=dict(epoch=3))
    checkpoint = torch.load(tmp_path / "x.pth", weights_only=True)
    assert checkpoint["meta"] == dict(epoch=3)
    assert_same({name: tensor.numpy() for name, tensor in checkpoint["state_dict"].items()})
    assert_same(files.read(tmp_path / "x.pth"))


def test_a_failed_write_leaves_the_old_file(tmp_path):
    files.write(tmp_path / "x.pth", weights())
    with pytest.raises(TypeError):
        files.write(tmp_path / "x.pth", {"a": np.array(["text"])})
    assert_same(files.read(tmp_path / "x.pth"))
    assert [path.name for path in tmp_path.iterdir()] == ["x.pth"]


def test_half_precision(tmp_path):
    half = torch.arange(6).reshape(2, 3).to(torch.bfloat16) / 3
    torch.save(dict(x=half, y=half.to(torch.float16)), tmp_path / "x.pth")
    state = files.read(tmp_path / "x.pth")
    assert state["x"].dtype == ml_dtypes.bfloat16 and state["y"].dtype == np.float16
    np.testing.assert_array_equal(state["x"].astype(np.float32), half.float().numpy())
    for name in ("y.pth", "y.safetensors"):
        files.write(tmp_path / name, state)
        again = files.read(tmp_path / name)
        assert again["x"].dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(again["x"].view(np.int16), state["x"].view(np.int16))


def test_the_format_before_pytorch_1_6(tmp_path):
    torch.save(dict(state_dict=tensors()), tmp_path / "x.pth", _use_new_zipfile_serialization=False)
    assert_same(files.read(tmp_path / "x.pth"))


@pytest.mark.parametrize("key", files.KEYS)
def test_weights_are_found_in_checkpoints(key, tmp_path):
    torch.save({key: tensors(), "optimizer": dict(state={}), "epoch": 3}, tmp_path / "x.pth")
    assert_same(files.read(tmp_path / "x.pth"))


def test_weights_are_found_where_the_key_says(tmp_path):
    other = {name: tensor + 1 for name, tensor in tensors().items()}
    torch.save(dict(state_dict=other, ema=dict(inner=tensors())), tmp_path / "x.pth")
    assert_same(files.read(tmp_path / "x.pth", key="ema.inner"))
    with pytest.raises(InteropError, match="nothing at 'ema_state'; there is state_dict, ema"):
        files.read(tmp_path / "x.pth", key="ema_state")


def test_a_checkpoint_without_weights(tmp_path):
    torch.save(dict(epoch=3, note="x"), tmp_path / "x.pth")
    with pytest.raises(InteropError, match="no weights that we can find, but epoch, note; say where"):
        files.read(tmp_path / "x.pth")


def test_a_training_checkpoint_of_mmengine(tmp_path, monkeypatch):
    """It holds log histories: objects of a class of MMEngine's with NumPy arrays inside. They are passed over."""
    module = types.ModuleType("mmengine.logging.history_buffer")

    class HistoryBuffer:
        def __init__(self):
            self._log_history = np.arange(3.0)
            self._count = np.float64(2.5)

    HistoryBuffer.__module__, HistoryBuffer.__qualname__ = module.__name__, "HistoryBuffer"
    module.HistoryBuffer = HistoryBuffer
    for name in ("mmengine", "mmengine.logging", module.__name__):
        monkeypatch.setitem(sys.modules, name, module)
    checkpoint = dict(
        meta=dict(epoch=1),
        state_dict=tensors(),
        message_hub=dict(log_scalars=dict(loss=HistoryBuffer())),
        optimizer=dict(state={0: dict(exp_avg=torch.zeros(3, 4))}, param_groups=[dict(lr=np.float64(0.1))]),
        ema_state_dict={f"module.{name}": tensor for name, tensor in tensors().items()},
    )
    torch.save(checkpoint, tmp_path / "epoch_1.pth")
    for name in ("mmengine", "mmengine.logging", module.__name__):
        monkeypatch.delitem(sys.modules, name)
    assert_same(files.read(tmp_path / "epoch_1.pth"))
    averaged = files.read(tmp_path / "epoch_1.pth", key="ema_state_dict")
    assert_same({name.removeprefix("module."): array for name, array in averaged.items()})


class Attack:
    """Unpickling this calls open(...): what a malicious file would do with os.system."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("new_format", [True, False])
def test_code_in_a_file_is_refused_and_not_run(new_format, tmp_path):
    checkpoint = dict(state_dict=tensors(), payload=Attack(tmp_path / "owned"))
    torch.save(checkpoint, tmp_path / "evil.pth", _use_new_zipfile_serialization=new_format)
    with pytest.raises(InteropError, match="refused: reading it would run code"):
        files.read(tmp_path / "evil.pth")
    assert not (tmp_path / "owned").exists()


def test_a_plain_pickle_with_code_is_refused(tmp_path):
    (tmp_path / "evil.pth").write_bytes(pickle.dumps(Attack(tmp_path / "owned"), protocol=2))
    with pytest.raises(InteropError):
        files.read(tmp_path / "evil.pth")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
@pytest.mark.parametrize("part", [0.05, 0.5, 0.99])
def test_a_file_cut_short(name, part, tmp_path):
    files.write(tmp_path / name, {f"layer{i}": np.zeros((10, 10), np.float32) for i in range(20)})
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: int(part * len(data))])
    with pytest.raises(InteropError, match=f"{name} is (not a file of PyTorch, or is )?damaged"):
        files.read(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html>\n<html><body>404</body></html>", "is an HTML page"),
        (b"\n  <HTML><head></head></HTML>", "is an HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git LFS pointer"),
        (b"just some text", "not a file of PyTorch, or is damaged|is damaged or cut short"),
    ],
)
@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
def test_what_is_no_weight_file(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    if name == "x.safetensors" and content.startswith(b"just"):
        message = "is damaged"
    with pytest.raises(InteropError, match=message):
        files.read(tmp_path / name)


def test_missing_files_and_directories(tmp_path):
    with pytest.raises(InteropError, match="There is no file"):
        files.read(tmp_path / "x.pth")
    with pytest.raises(InteropError, match="is a directory; there are no weight files in it"):
        files.read(tmp_path)
    files.write(tmp_path / "model.safetensors", weights())
    with pytest.raises(InteropError, match="give one of the files in it: model.safetensors"):
        files.read(tmp_path)


def test_writing_needs_a_known_suffix(tmp_path):
    with pytest.raises(InteropError, match="ends in .pth, .safetensors or .npz"):
        files.write(tmp_path / "x.onnx", weights())


def test_without_pytorch(tmp_path, monkeypatch):
    files.write(tmp_path / "x.pth", weights())
    files.write(tmp_path / "x.safetensors", weights())
    monkeypatch.setitem(sys.modules, "torch", None)
    assert_same(files.read(tmp_path / "x.safetensors"))
    with pytest.raises(InteropError, match="needs PyTorch"):
        files.read(tmp_path / "x.pth")
