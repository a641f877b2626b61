"""Downloads of published data sets: checked, from the first place that answers, and unpacked whole or not at all."""

from __future__ import annotations

import os
import shutil
import tarfile
from collections.abc import Sequence
from pathlib import Path

from jaxpretrain.zoo.download import DownloadError, download, locked


def fetch(urls: Sequence[str], sha256: str, folder: Path) -> Path:
    """The file of that digest in `folder`, from the first of `urls` that has it; nothing is fetched if it is there.

    Raises:
        DownloadError: none of them has it.
    """
    problems = []
    for url in urls:
        try:
            return download(url, sha256=sha256, folder=folder)
        except DownloadError as error:
            problems.append(str(error))
    raise DownloadError("\n".join(problems))


def unpack(archive: Path, member: str) -> Path:
    """Unpacks a .tar.gz that holds the folder `member` beside itself, unless that folder is there.

    Several processes may ask at once: one unpacks, the others wait. What broke off leaves no folder of that name.

    Raises:
        DownloadError: the archive holds no such folder.
    """
    target = archive.parent / member
    with locked(target):
        if target.is_dir():
            return target
        partial = archive.parent / f"{member}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        with tarfile.open(archive) as tar:
            tar.extractall(partial, filter="data")  # refuses paths and links that lead out of the folder
        if not (partial / member).is_dir():
            shutil.rmtree(partial)
            raise DownloadError(f"{archive} holds no folder {member}; it is another archive")
        os.replace(partial / member, target)
        shutil.rmtree(partial)
    return target
