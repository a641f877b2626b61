"""Downloads: whole or not at all, resumed, verified, and clear where they fail. Against a server on this machine."""

from __future__ import annotations

import hashlib
import threading

import numpy as np
import pytest

from jaxpretrain.build import ConfigError
from jaxpretrain.cli import ExpectedFailure
from jaxpretrain.zoo import download as module
from jaxpretrain.zoo.download import DownloadError, download, file_name, home, read_url
from tests.weights_server import serve

DATA = np.random.default_rng(0).bytes(1_000_003)
DIGEST = hashlib.sha256(DATA).hexdigest()[:8]


@pytest.fixture
def server(monkeypatch, tmp_path):
    monkeypatch.setenv("JAXPRETRAIN_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(module, "_PAUSE", 0.01)
    with serve() as server:
        server.content[f"/net-{DIGEST}.pth"] = DATA
        yield server


@pytest.fixture
def url(server):
    return f"{server.url}/net-{DIGEST}.pth"


def test_a_file_is_fetched_once_and_kept_under_home(server, url, tmp_path):
    path = download(url, sha256=DIGEST)
    assert path == tmp_path / "home" / "downloads" / f"net-{DIGEST}.pth"
    assert path.read_bytes() == DATA
    assert download(url, sha256=DIGEST) == path
    assert len(server.requests) == 1
    assert sorted(p.name for p in path.parent.iterdir()) == [f".{path.name}.lock", path.name]


def test_home_is_in_the_users_cache_by_default(monkeypatch, tmp_path):
    monkeypatch.delenv("JAXPRETRAIN_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert home() == tmp_path / ".cache" / "jaxpretrain"


def test_a_connection_that_breaks_is_taken_up_again(server, url):
    server.breaks = [300_000, 200_000]
    assert download(url, sha256=DIGEST).read_bytes() == DATA
    assert [asked for _, asked in server.requests] == [None, "bytes=300000-", "bytes=500000-"]


def test_a_later_call_takes_up_what_an_earlier_one_left(server, url, tmp_path):
    part = tmp_path / "home" / "downloads" / f"net-{DIGEST}.pth.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(DATA[:123_456])
    assert download(url, sha256=DIGEST).read_bytes() == DATA
    assert [asked for _, asked in server.requests] == ["bytes=123456-"]
    assert not part.exists()


def test_a_complete_part_is_not_fetched_again(server, url, tmp_path):
    part = tmp_path / "home" / "downloads" / f"net-{DIGEST}.pth.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(DATA)
    assert download(url, sha256=DIGEST).read_bytes() == DATA


def test_a_part_that_is_too_long_is_thrown_away(server, url, tmp_path):
    part = tmp_path / "home" / "downloads" / f"net-{DIGEST}.pth.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(DATA + b"more")
    assert download(url, sha256=DIGEST).read_bytes() == DATA


def test_a_server_without_ranges_starts_over(server, url):
    server.ranges, server.breaks = False, [300_000]
    assert download(url, sha256=DIGEST).read_bytes() == DATA
    assert len(server.requests) == 2


def test_without_a_digest_nothing_is_resumed_from_earlier_calls(server, url, tmp_path):
    """The parts might be of different files, and nothing would tell."""
    part = tmp_path / "home" / "downloads" / f"net-{DIGEST}.pth.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"of an older file")
    assert download(url).read_bytes() == DATA
    assert server.requests[0][1] is None


def test_a_connection_that_always_breaks_ends_in_an_error_and_keeps_the_part(server, url, tmp_path):
    server.breaks = [0] * 100
    with pytest.raises(DownloadError, match="the connection ended after 0 of 1000003 bytes"):
        download(url, sha256=DIGEST)
    server.breaks = [1000] + [0] * 100
    with pytest.raises(DownloadError, match="the connection ended after 1000 of 1000003 bytes.*Call again to continue"):
        download(url, sha256=DIGEST)
    part = tmp_path / "home" / "downloads" / f"net-{DIGEST}.pth.part"
    assert part.read_bytes() == DATA[:1000] and not part.with_suffix("").exists()
    server.breaks = []
    assert download(url, sha256=DIGEST).read_bytes() == DATA


def test_a_wrong_digest_is_an_error_and_the_file_is_put_aside(server, url, tmp_path):
    server.content[f"/net-{DIGEST}.pth"] = DATA[:-1] + bytes([DATA[-1] ^ 1])
    with pytest.raises(
        DownloadError, match=f"its name promises {DIGEST}.*It was not used, and is now .*\\.pth\\.wrong"
    ):
        download(url, sha256=DIGEST)
    folder = tmp_path / "home" / "downloads"
    assert not (folder / f"net-{DIGEST}.pth").exists() and (folder / f"net-{DIGEST}.pth.wrong").exists()
    server.content[f"/net-{DIGEST}.pth"] = DATA
    assert download(url, sha256=DIGEST).read_bytes() == DATA


def test_a_file_put_there_by_hand_is_verified_too(server, url, tmp_path):
    path = tmp_path / "home" / "downloads" / f"net-{DIGEST}.pth"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"something else")
    with pytest.raises(DownloadError, match="damaged or another file"):
        download(url, sha256=DIGEST)
    path.write_bytes(DATA)
    assert download(url, sha256=DIGEST) == path
    assert not server.requests


def test_404_says_so_and_where_to_put_the_file(server, tmp_path):
    place = tmp_path / "home" / "downloads" / "gone-12345678.pth"
    with pytest.raises(DownloadError, match=f"the server answers 404 Not Found.*put it at {place}"):
        download(f"{server.url}/gone-12345678.pth", sha256="12345678")
    assert len(server.requests) == 1


def test_a_server_in_trouble_is_asked_again(server, url):
    server.errors = [503, 502]
    assert download(url, sha256=DIGEST).read_bytes() == DATA


def test_offline_says_which_file_to_put_where(server, tmp_path):
    place = tmp_path / "home" / "downloads" / "net-12345678.pth"
    url = "http://127.0.0.1:9/net-12345678.pth"  # nobody listens there
    with pytest.raises(DownloadError, match=f"{url} cannot be downloaded: .*refused.*put it at {place}"):
        download(url, sha256="12345678")
    assert issubclass(DownloadError, ExpectedFailure)


def test_two_at_once_download_once(server, url):
    found = []
    threads = [threading.Thread(target=lambda: found.append(download(url, sha256=DIGEST))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and len(server.requests) == 1


def test_a_disk_that_cannot_be_written(server, url, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "downloads").mkdir()
    (tmp_path / "home" / "downloads" / f"net-{DIGEST}.pth.part").mkdir()  # a folder is in the way
    with pytest.raises(DownloadError, match="cannot be downloaded"):
        download(url, sha256=DIGEST)


def test_names_of_files():
    assert file_name("https://host/a/b%20c.pth?download=1#x") == "b c.pth"
    for url in ("https://host/", "https://host", "https://host/a/.."):
        with pytest.raises(ConfigError, match="names no file"):
            file_name(url)


def test_reading_a_url_is_bounded(server):
    server.content["/small"] = b"abc"
    assert read_url(f"{server.url}/small", 3) == b"abc"
    with pytest.raises(DownloadError, match="larger than"):
        read_url(f"{server.url}/small", 2)
    with pytest.raises(DownloadError, match="404"):
        read_url(f"{server.url}/none", 3)
