"""Files from the network: with a progress bar, resumed where they broke off, checked, and never half there."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote, urlsplit

from jaxpretrain.build import ConfigError
from jaxpretrain.cli import ExpectedFailure

_CHUNK = 1 << 18
_TIMEOUT = 30  # seconds without a byte
_ATTEMPTS = 5  # in a row that bring nothing new
_PAUSE = 1.0  # seconds before the next attempt; doubled each time


class DownloadError(ExpectedFailure):
    """A file that could not be had, or is not what it should be; the message says what to do."""


class _Broken(Exception):
    """The connection ended early; what came is kept."""


_FAILURES = (OSError, HTTPException, _Broken)


def home() -> Path:
    """Where downloads and converted weights are kept: `$JAXPRETRAIN_HOME`, by default `~/.cache/jaxpretrain`."""
    return Path(os.environ.get("JAXPRETRAIN_HOME") or Path.home() / ".cache" / "jaxpretrain").expanduser()


def is_url(path: object) -> bool:
    return isinstance(path, str) and path.lower().startswith(("http://", "https://"))


def file_name(url: str) -> str:
    """The last part of a URL's path."""
    name = Path(unquote(urlsplit(url).path)).name
    if name in ("", ".."):
        raise ConfigError(f"{url} names no file")
    return name


def download(url: str, *, sha256: str | None = None, folder: str | os.PathLike | None = None) -> Path:
    """The local copy of `url`, which is fetched unless it is there already.

    Several processes may ask at once: one downloads, the others wait. What broke off is continued, at the next call too,
    where the server can (HTTP ranges) and `sha256` tells whether the parts belong together.

    Args:
        url: http or https.
        sha256: the digest in hexadecimal, or how it begins. A file that has another one is put aside and never used.
        folder: where to keep the file; by default `downloads` in `home()`.

    Raises:
        DownloadError: no connection, no such file, or another digest.
    """
    target = Path(folder or home() / "downloads") / file_name(url)
    target.parent.mkdir(parents=True, exist_ok=True)
    with locked(target):
        if not target.exists():
            part = target.with_name(target.name + ".part")
            if sha256 is None:
                part.unlink(missing_ok=True)
            try:
                _fetch(url, part)
            except _FAILURES as error:
                raise DownloadError(_no_file(url, target, error)) from error
            os.replace(part, target)
        _verify(target, sha256, url)
    return target


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds a lock beside `path`, so that processes of this machine work on it one after the other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f".{path.name}.lock"), "w") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        except (ImportError, OSError):  # Windows, and file systems without locks: both fetch, and the last one wins
            pass
        yield


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_url(url: str, limit: int) -> bytes:
    """The content of a URL, which must not be larger than `limit` bytes. Raises DownloadError."""
    try:
        with urllib.request.urlopen(_request(url), timeout=_TIMEOUT) as response:
            data = response.read(limit + 1)
    except (*_FAILURES, ValueError) as error:
        raise DownloadError(f"{url} cannot be read: {_reason(error)}") from error
    if len(data) > limit:
        raise DownloadError(f"{url} is larger than {limit >> 20} MiB")
    return data


def _request(url: str, start: int = 0) -> urllib.request.Request:
    headers = {"User-Agent": "jaxpretrain"} | ({"Range": f"bytes={start}-"} if start else {})
    return urllib.request.Request(url, headers=headers)


def _fetch(url: str, part: Path) -> None:
    """Brings `part` to its full length, in as many requests as it takes."""
    failures, pause = 0, _PAUSE
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            return _request_rest(url, part)
        except urllib.error.HTTPError as error:
            if error.code < 500:
                raise
            problem: Exception = error
        except _FAILURES as error:
            if getattr(error, "filename", None) or getattr(error, "errno", None) == errno.ENOSPC:  # it is our disk
                raise
            problem = error
        failures = 0 if part.exists() and part.stat().st_size > before else failures + 1
        if failures >= _ATTEMPTS or (failures and _is_offline(problem)):
            raise problem
        time.sleep(pause if failures else 0)
        pause *= 2 if failures else 1


def _request_rest(url: str, part: Path) -> None:
    start = part.stat().st_size if part.exists() else 0
    try:
        response = urllib.request.urlopen(_request(url, start), timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not start:  # 416: nothing is left after `start`
            raise
        if error.headers.get("Content-Range", "").rpartition("/")[2] == str(start):
            return
        part.unlink()
        raise _Broken("the part here is longer than the file there") from error
    with response:
        resumed = re.match(rf"bytes {start}-", response.headers.get("Content-Range", "")) and response.status == 206
        start = start if resumed else 0
        length = response.headers.get("Content-Length")
        total = start + int(length) if length else None
        with open(part, "ab" if start else "wb") as file:
            _copy(response, file, part.name.removesuffix(".part"), start, total)
        size = part.stat().st_size
        if total is not None and size != total:
            raise _Broken(f"the connection ended after {size} of {total} bytes")


def _copy(response: Any, file: BinaryIO, name: str, start: int, total: int | None) -> None:
    from tqdm import tqdm

    bar = tqdm(initial=start, total=total, unit="B", unit_scale=True, unit_divisor=1024, desc=name, disable=None)
    with bar:
        while chunk := response.read(_CHUNK):
            file.write(chunk)
            bar.update(len(chunk))


def _verify(path: Path, sha256: str | None, url: str) -> None:
    if sha256 is None or (digest := sha256_of(path)).startswith(sha256.lower()):
        return
    aside = path.with_name(path.name + ".wrong")
    os.replace(path, aside)
    raise DownloadError(
        f"{path.name} from {url} has the SHA-256 {digest[:8]}..., and its name promises {sha256}: it is damaged or another "
        f"file. It was not used, and is now {aside}. Try again, or put the right file at {path}"
    )


def _is_offline(error: Exception) -> bool:
    """Whether no connection was made at all, so that trying again at once is of no use."""
    return isinstance(error, urllib.error.URLError) and not isinstance(error, urllib.error.HTTPError)


def _no_file(url: str, target: Path, error: Exception) -> str:
    return (
        f"{url} cannot be downloaded: {_reason(error)}. Call again to continue; or fetch it where there is a connection, "
        f"and put it at {target}"
    )


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"the server answers {error.code} {error.reason}"
    return str(getattr(error, "reason", None) or error)
