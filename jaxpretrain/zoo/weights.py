"""The zoo's weights: downloaded, checked, converted once, and kept in a form that needs no PyTorch."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from jaxpretrain.build import ConfigError
from jaxpretrain.zoo.download import download, file_name, home, is_url, locked, sha256_of
from jaxpretrain.zoo.index import ModelInfo, weights_hash

UrlMapping = tuple[str, str]


def converted_weights(info: ModelInfo, url_mapping: UrlMapping | None = None) -> Path:
    """The weights of a model as a .safetensors file, which the first call downloads and converts.

    Names and arrays are those of MMPretrain's file, so it serves a model with changed settings as well. A note beside it
    has its digest; a file that was damaged since is made again.

    Args:
        info: the model.
        url_mapping: as of `get_model`.

    Raises:
        ConfigError: the model has no published weights, or their file cannot be read.
        DownloadError: they cannot be downloaded; the message says where to put the file.
    """
    if info.weights is None:
        raise ConfigError(f"MMPretrain published no weights of {info.name}; load your own with pretrained='FILE.pth'")
    target = home() / "models" / Path(file_name(info.weights)).with_suffix(".safetensors").name
    note = target.with_suffix(".json")
    if _is_intact(target, note):
        return target
    from jaxpretrain.interop import files

    with locked(target):
        if not _is_intact(target, note):  # another process may have made it meanwhile
            files.write(target, files.read(local_file(info.weights, url_mapping)))
            about = dict(sha256=sha256_of(target), weights=info.weights, license=info.license)
            note.write_text(json.dumps(about, indent=2) + "\n")
    return target


def local_file(source: str | os.PathLike, url_mapping: UrlMapping | None = None) -> Path:
    """The file or directory that `source`, a path or URL, stands for: a URL is downloaded, and checked if it can be."""
    text = os.fspath(source)
    digest = weights_hash(text)
    if url_mapping is not None and is_url(text):
        text = re.sub(*url_mapping, text)
    if is_url(text):
        return download(text, sha256=digest)
    path = Path(text).expanduser()
    if not path.exists():
        raise ConfigError(f"There are no weights at {path}" + ("" if path.is_absolute() else f" in {Path.cwd()}"))
    return path


def _is_intact(file: Path, note: Path) -> bool:
    try:
        return json.loads(note.read_text())["sha256"] == sha256_of(file)
    except (OSError, ValueError, KeyError):
        return False
