"""verify_dataset: finds every kind of bad file, goes on after being killed, moves files aside without losing one."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from jaxpretrain import cli
from jaxpretrain.data.records import write_array_record
from jaxpretrain.data.sources import CustomDataset
from jaxpretrain.tools import verify_dataset
from jaxpretrain.tools.sweep import Log, sweep
from jaxpretrain.tools.verify_dataset import main, wrong_extension


def picture(level: int = 0, form: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(level).integers(0, 256, (24, 24, 3), np.uint8)).save(buffer, form)
    return buffer.getvalue()


BAD = {"b/empty.jpg": b"", "a/cut.jpg": picture(1)[:700], "a/deep/page.jpg": b"<html>404</html>"}


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good = {"a/1.jpg": picture(), "b/1.jpg": picture(), "b/odd.jpg": picture(form="PNG")}
    for name, content in {**BAD, **good}.items():
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "images"


def listed(path="bad_images.txt") -> dict[str, str]:
    return dict(line.rstrip("\n").split("\t") for line in open(path))


@pytest.mark.parametrize("workers", [0, 2])
def test_the_list(data, capsys, workers):
    if workers:
        for i in range(70):  # several chunks
            (data / f"a/good{i}.jpg").write_bytes(picture(i))
    assert main([str(data), f"--num-workers={workers}"]) == cli.FAILED
    found = listed()
    assert found.keys() == {str(data / name) for name in BAD}
    assert found[str(data / "b/empty.jpg")] == "empty file" and "<html>" in found[str(data / "a/deep/page.jpg")]
    out = capsys.readouterr().out
    assert "odd.jpg: the name says JPEG, the contents are PNG" in out
    assert f"{76 if workers else 6} images, 3 bad" in out and "see bad_images.txt" in out
    assert all((data / name).exists() for name in BAD)


def test_a_good_data_set(data, capsys):
    for name in BAD:
        (data / name).unlink()
    assert main([str(data), "--out-file=lists/bad.txt"]) == cli.OK
    assert "3 images, 0 bad" in capsys.readouterr().out and listed("lists/bad.txt") == {}


def test_fix(data, capsys):
    assert main([str(data), "--fix"]) == cli.OK, "no bad image is in its place any more"
    aside = data.parent / "images_bad"
    for name, content in BAD.items():
        assert (aside / name).read_bytes() == content and not (data / name).exists()
    moved = listed(aside / "moved.txt")
    assert moved == {str(data / name): str(aside / name) for name in BAD}
    assert main([str(data)]) == cli.OK
    # A second bad file of the same name does not replace the first.
    (data / "b/empty.jpg").write_bytes(b"")
    (data / "b/link.jpg").symlink_to(aside / "b/empty.jpg")
    assert main([str(data), "--fix"]) == cli.OK
    assert (aside / "b/empty.jpg.1").read_bytes() == b"" and (aside / "b/link.jpg").is_symlink()
    assert (aside / "b/empty.jpg").exists()


def test_fix_after_looking_at_the_list(data, capsys, monkeypatch):
    assert main([str(data)]) == cli.FAILED
    (data / "a/cut.jpg").write_bytes(picture(1))  # repaired in the meantime
    monkeypatch.setattr(verify_dataset, "verify", None)  # nothing is verified again
    assert main([str(data), "--fix", f"--bad-folder={data.parent}/aside"]) == cli.OK
    assert (data / "a/cut.jpg").exists() and (data.parent / "aside/b/empty.jpg").exists()
    assert not (data / "b/empty.jpg").exists()


def test_a_finished_run_is_not_believed_for_ever(data):
    assert main([str(data)]) == cli.FAILED
    for name in BAD:
        (data / name).write_bytes(picture())
    assert main([str(data)]) == cli.OK
    (data / "a/new.jpg").write_bytes(b"")
    assert main([str(data)]) == cli.FAILED and listed().keys() == {str(data / "a/new.jpg")}


def test_what_fix_refuses(data, capsys):
    assert cli.run(main, [str(data), "--fix", f"--bad-folder={data}/bad"]) == cli.USAGE
    assert "lies inside the data" in capsys.readouterr().err
    assert all((data / name).exists() for name in BAD)
    write_array_record(data.parent / "records" / "x.array_record", [dict(image=b"", label=0), dict(image=picture())])
    spec = json.dumps(dict(type="ArrayRecordDataset", paths=str(data.parent / "records"), num_classes=1))
    assert main([spec, "--fix", "--out-file=r.txt"]) == cli.FAILED, "a part of a file cannot be moved"
    assert "stays: record 0 of" in capsys.readouterr().out


def test_lists_and_missing_files(data, capsys):
    (data / "list.txt").write_text("a/1.jpg 0\nb/empty.jpg 1\nb/lost.jpg 1\n")
    spec = dict(type="CustomDataset", data_root=str(data), ann_file="list.txt")
    (data.parent / "data.json").write_text(json.dumps(spec))
    assert main(["data.json", "--fix"]) == cli.FAILED, "what is missing cannot be moved"
    out = capsys.readouterr().out
    assert "lost.jpg: FileNotFoundError: No such file" in out and "ann_file" in out
    assert (data.parent / "images_bad/b/empty.jpg").exists()


def test_any_exception_of_a_source_is_a_reason(tmp_path):
    class Broken:
        def __len__(self):
            return 3

        def __getitem__(self, index):
            if index == 1:
                raise ZeroDivisionError("odd")
            return {"image": np.zeros((2, 2, 3), np.float32 if index else np.uint8), "label": 0}

    bad, odd = verify_dataset.verify({}, Broken(), tmp_path / "bad.txt")
    assert [r["index"] for r in bad] == [1, 2] and bad[0]["reason"] == "ZeroDivisionError: odd" and not odd


def test_going_on(data, monkeypatch, capsys):
    """A run that ends in the middle leaves what it found; the next one reads the rest alone."""
    for i in range(100):
        (data / f"a/x{i:03d}.jpg").write_bytes(b"" if i % 10 == 0 else picture(i))
    looked, look = [], verify_dataset.Inspect.__call__

    def interrupted(self, index):
        if index == 70:
            raise KeyboardInterrupt
        looked.append(index)
        return look(self, index)

    monkeypatch.setattr(verify_dataset.Inspect, "__call__", interrupted)
    assert cli.run(main, [str(data), "--num-threads=1"]) == 130
    part = listed()
    assert 5 <= len(part) < 13
    monkeypatch.setattr(verify_dataset.Inspect, "__call__", lambda self, i: looked.append(i) or look(self, i))
    del looked[:]
    assert main([str(data), "--num-threads=1"]) == cli.FAILED
    assert "going on at image 64 of 106" in capsys.readouterr().out
    assert looked == list(range(64, 106))
    assert len(listed()) == 13 and part.items() <= listed().items()


def test_going_on_after_a_kill(data):
    for i in range(300):
        (data / f"a/x{i:03d}.jpg").write_bytes(b"" if i % 10 == 0 else picture(i))
    slow = (
        "import sys, time\n"
        "from jaxpretrain.tools import verify_dataset as v\n"
        "look = v.Inspect.__call__\n"
        "v.Inspect.__call__ = lambda self, i: time.sleep(0.01) or look(self, i)\n"
        "v.main(sys.argv[1:])\n"
    )
    command = [sys.executable, "-c", slow, str(data), "--num-threads=1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log = data.parent / "bad_images.txt.log"
    deadline = time.time() + 60
    while not (log.exists() and '"done": 64' in log.read_text()) and time.time() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    lines = log.read_text().splitlines(keepends=True)
    assert 0 < max(json.loads(line).get("done", 0) for line in lines[1:]) < 306
    log.write_text("".join(lines) + '{"index": 299, "na')  # and the last line was cut off
    assert main([str(data)]) == cli.FAILED
    source = CustomDataset(str(data))
    expected = {source.name(i) for i in range(len(source)) if not os.path.getsize(source.name(i))}
    assert {path for path, reason in listed().items() if reason == "empty file"} == expected
    assert len(listed()) == len(expected) + 2


def test_the_log_of_other_work(data, capsys):
    log = Log("bad_images.txt.log", {"tool": "verify_dataset", "data": {}, "count": 1, "names": ""})
    log.write(done=1)
    log.close()
    assert cli.run(main, [str(data)]) == cli.USAGE
    assert "log of other work (data, count, names changed since)" in capsys.readouterr().err
    assert main([str(data), "--restart"]) == cli.FAILED
    (data.parent / "mine.txt.log").write_text("my diary")
    assert cli.run(main, [str(data), "--out-file=mine.txt"]) == cli.USAGE
    assert (data.parent / "mine.txt.log").read_text() == "my diary"


def test_mistakes(data, capsys):
    for argv, message in (
        ([], "Which data set"),
        (["nowhere"], "is no folder, recipe or JSON"),
        ([str(data), "--config.data.x=1"], "goes with a recipe"),
        ([str(data), "--type=ImageNt"], "Did you mean 'ImageNet'"),
        (["{not json"], "is not JSON"),
        ([str(data), "--num-threads=two"], "must be a whole number"),
        (["configs/mae.py:digits", "--split=test"], "has no data.test"),
    ):
        assert cli.run(main, argv) == cli.USAGE
        assert message in capsys.readouterr().err


def test_recipes(data, capsys):
    assert main(["configs/mae.py:digits", "--split=val"]) == cli.OK
    assert "297 images, 0 bad" in capsys.readouterr().out


def test_extensions():
    assert wrong_extension(picture(form="WEBP"), "a/b.JPEG") == "the name says JPEG, the contents are WEBP"
    assert (
        not wrong_extension(picture(), "a/b.JPEG")
        and not wrong_extension(picture(), "b")
        and not wrong_extension(b"", "")
    )
    assert not wrong_extension(b"unknown", "a.png")


@pytest.mark.parametrize("options", [dict(threads=3), dict(workers=2)])
def test_sweep(options):
    found = list(sweep(abs, range(-10, 0), chunk=4, **options))
    assert found == [
        ([-10, -9, -8, -7], [10, 9, 8, 7]),
        ([-6, -5, -4, -3], [6, 5, 4, 3]),
        ([-2, -1], [2, 1]),
    ]
    assert sorted(sweep(abs, range(-10, 0), chunk=4, ordered=False, **options)) == found
    with pytest.raises(TypeError):
        list(sweep(abs, ["x"], **options))
