"""Where each sample of a tar shard lies: found once per shard by a walk over its headers, and kept in a file."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from jaxpretrain.build import ConfigError

VERSION = 1
_BLOCK = 512  # bytes; headers and contents start at multiples of it
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x04\x22\x4d\x18": "lz4",
}

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What to look for in a sample.

    Attributes:
        image: extensions of the image member, without the first dot; the first that a sample has is its image.
        label: extension of the member that holds the label; empty for none.
        key: in a JSON member, where the label is: `label`, or `annotation.class` for one inside another.
    """

    image: tuple[str, ...]
    label: str
    key: str


@dataclasses.dataclass(frozen=True)
class ShardIndex:
    """The samples of a shard that have an image, in order.

    Attributes:
        keys: their names in the shard, bytes [N].
        offset, size: of their images, in bytes of the shard [N].
        labels: contents of the label members as they stand, UTF-8 [N]; empty where there is none.
        without: number of samples without an image.
        seen: extensions that were met.
    """

    keys: np.ndarray
    offset: Int64[np.ndarray, " n"]
    size: Int64[np.ndarray, " n"]
    labels: np.ndarray
    without: int
    seen: tuple[str, ...]


def index_shard(shard: str, wanted: Wanted, folder: str | None = None) -> ShardIndex:
    """The index of a shard: from the file that an earlier call left in `folder`, or built now and left there.

    `folder` is that of the shard by default. Where nothing can be written, nothing is, and the next call builds it again.

    Raises:
        ConfigError: no such file; compressed, damaged or truncated; a JSON member without `key`.
    """
    try:
        status = os.stat(shard)
    except OSError as error:
        raise ConfigError(f"WebDataset: cannot read {os.path.abspath(shard)}: {error.strerror}") from error
    # An index is of one state of one shard and of one thing to look for.
    state = json.dumps([VERSION, status.st_size, status.st_mtime_ns, dataclasses.astuple(wanted)])
    file = _index_file(shard, wanted, folder)
    found = _load(file, state)
    if found is None:
        found = _build(shard, wanted)
        _save(file, state, found)
    return found


def _index_file(shard: str, wanted: Wanted, folder: str | None) -> Path:
    about = json.dumps(dataclasses.astuple(wanted))
    if folder is None:
        return Path(f"{shard}.{hashlib.sha256(about.encode()).hexdigest()[:8]}.index")
    about = os.path.abspath(shard) + about  # shards of one name may come from several folders
    return Path(folder, f"{os.path.basename(shard)}.{hashlib.sha256(about.encode()).hexdigest()[:8]}.index")


def _load(file: Path, state: str) -> ShardIndex | None:
    try:
        with np.load(file) as arrays:
            if str(arrays["state"]) != state:
                return None
            parts = {name: arrays[name] for name in ("keys", "offset", "size", "labels")}
            return ShardIndex(**parts, without=int(arrays["without"]), seen=tuple(arrays["seen"].tolist()))
    except FileNotFoundError:
        return None
    except Exception as error:  # a damaged file is as good as none
        logger.warning("%s is damaged (%s: %s); built again", file, type(error).__name__, error)
        return None


def _save(file: Path, state: str, index: ShardIndex) -> None:
    arrays: dict[str, Any] = {f.name: getattr(index, f.name) for f in dataclasses.fields(index)}
    partial = ""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, prefix=file.name, suffix=".partial", delete=False) as handle:
            partial = handle.name
            np.savez(handle, state=np.array(state), **{**arrays, "seen": np.array(index.seen, dtype=str)})
        os.replace(partial, file)
    except OSError as error:
        logger.info("the index of a shard is not kept: %s", error)
        if partial and os.path.exists(partial):
            os.unlink(partial)


def _build(shard: str, wanted: Wanted) -> ShardIndex:
    rows: list[tuple[bytes, int, int, bytes]] = []
    seen: dict[str, None] = {}
    without = 0
    with open(shard, "rb", buffering=0) as file:
        reader = _Reader(shard, file.fileno())
        for key, members in _samples(reader):
            seen.update(dict.fromkeys(members))
            image = next((members[extension] for extension in wanted.image if extension in members), None)
            if image is None:
                without += 1
                continue
            label = b""
            if wanted.label in members:
                label = _label(reader.read(*members[wanted.label]), wanted, f"{shard}: {key}")
            rows.append((os.fsencode(key), *image, label))
    if not rows:
        raise ConfigError(
            f"WebDataset: {os.path.abspath(shard)} has no image members; extensions looked for: "
            f"{', '.join(wanted.image)}; found: {', '.join(list(seen)[:20]) or 'nothing at all'}"
        )
    keys, offset, size, labels = zip(*rows, strict=True)
    return ShardIndex(
        np.array(keys), np.array(offset, np.int64), np.array(size, np.int64), np.array(labels), without, tuple(seen)
    )


def _label(content: bytes, wanted: Wanted, where: str) -> bytes:
    if wanted.label != "json" and not wanted.label.endswith(".json"):
        return content.strip()
    try:
        value = json.loads(content)
        for part in wanted.key.split("."):
            if not isinstance(value, dict) or part not in value:
                has = f"it has {', '.join(value)}" if isinstance(value, dict) else f"but {value!r}"
                raise ConfigError(f"WebDataset: {where}.{wanted.label} has no {wanted.key!r} (label): {has}")
            value = value[part]
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"WebDataset: {where}.{wanted.label} is not JSON: {error}") from error
    return (value if isinstance(value, str) else json.dumps(value)).encode()


def _samples(reader: _Reader) -> Iterator[tuple[str, dict[str, tuple[int, int]]]]:
    """(key, {extension: (offset, size)}): members that follow each other with the same name up to its first dot."""
    key = ""
    members: dict[str, tuple[int, int]] = {}
    for name, offset, size in reader.members():
        folder, _, base = name.rpartition("/")
        stem, dot, extension = base.partition(".")
        if not dot or not stem or stem.startswith("__"):  # no member of a sample; __x__ are notes about the shard
            continue
        this = f"{folder}/{stem}" if folder else stem
        if this != key:
            if members:
                yield key, members
            key, members = this, {}
        members[extension.lower()] = (offset, size)
    if members:
        yield key, members


class _Reader:
    """Walks over a tar file (POSIX.1-2001 and GNU's long names); several times as fast as `tarfile`."""

    def __init__(self, shard: str, descriptor: int):
        self.shard, self.descriptor = shard, descriptor
        self.length = os.fstat(descriptor).st_size
        start = os.pread(descriptor, 8, 0)
        for magic, kind in _COMPRESSED.items():
            if start.startswith(magic):
                raise ConfigError(
                    f"WebDataset: {os.path.abspath(shard)} is compressed ({kind}), so it cannot be read at random; "
                    f"decompress it once (images do not become smaller by {kind} anyway)"
                )

    def read(self, offset: int, size: int) -> bytes:
        return os.pread(self.descriptor, size, offset)

    def members(self) -> Iterator[tuple[str, int, int]]:
        """(name, offset of the content, size) of each plain file."""
        at, long_name = 0, ""
        attributes: dict[str, str] = {}
        while at + _BLOCK <= self.length:
            header = self.read(at, _BLOCK)
            if not header.strip(b"\0"):  # the end is marked by empty blocks
                return
            self._check(header, at)
            size = int(attributes.get("size", 0)) or _number(header[124:136])
            content, kind = at + _BLOCK, header[156:157]
            at = content + -(-size // _BLOCK) * _BLOCK
            if at > self.length:
                raise ConfigError(
                    f"WebDataset: {os.path.abspath(self.shard)} is truncated: a member ends at byte {at}, the file at "
                    f"{self.length}; download it again"
                )
            if kind == b"L":
                long_name = _text(self.read(content, size))
            elif kind == b"x":
                attributes = _attributes(self.read(content, size))
            elif kind != b"g":
                name, prefix = _text(header[:100]), _text(header[345:500]) if header[257:262] == b"ustar" else ""
                if prefix and header[263:265] == b"00":  # GNU's own format has other things there
                    name = f"{prefix}/{name}"
                if kind in (b"0", b"\0"):
                    yield attributes.get("path") or long_name or name, content, size
                long_name, attributes = "", {}
        logger.warning("%s has no mark at its end, as if it were truncated", self.shard)

    def _check(self, header: bytes, at: int) -> None:
        try:
            announced = _number(header[148:156])
        except ValueError:
            announced = -1
        if announced != sum(header[:148]) + 8 * 32 + sum(header[156:]):  # the sum counts itself as blanks
            what = "is not a tar file" if at == 0 else f"is damaged at byte {at} (checksum)"
            raise ConfigError(f"WebDataset: {os.path.abspath(self.shard)} {what}")


def _number(field: bytes) -> int:
    """Octal digits, or from 8 GiB on binary with the first bit set."""
    if field[0] & 0x80:
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    return int(field.strip(b"\0 ") or b"0", 8)


def _text(field: bytes) -> str:
    return os.fsdecode(field.split(b"\0", 1)[0])


def _attributes(content: bytes) -> dict[str, str]:
    """Lines of `length key=value`; the length counts the whole line."""
    found: dict[str, str] = {}
    while content:
        length = int(content.split(b" ", 1)[0])
        key, _, value = content[:length].split(b" ", 1)[1].rstrip(b"\n").partition(b"=")
        found[key.decode()] = os.fsdecode(value)
        content = content[length:]
    return found
