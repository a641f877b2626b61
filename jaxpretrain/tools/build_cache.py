"""Decodes and shortens the images of a data set once, into a cache on local disk that `CachedDataset` reads.

    python -m jaxpretrain.tools.build_cache --config=configs/mae.py --split=train --folder=/local/imagenet-train

Without --folder it makes the caches of all data sets in the config that are a `CachedDataset`. Its size is told before it
begins, and it refuses where the disk is too small. A build that was stopped goes on where it was when the same command is
run again.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from jaxpretrain import cli
from jaxpretrain.build import ConfigError, build

FLAGS = {
    "config": "recipe whose data sets are meant: configs/mae.py",
    "split": "train, val, ...: only this one",
    "folder": "make a cache of the split's data set here, also if the config does not use one",
    "format": "yuv420 (default), raw or jpeg",
    "short-edge": "pixels of the shorter edge at most (default: 256; 0 keeps all)",
    "threads": "that decode (default: one for each core)",
}
SWITCHES = {
    "rebuild": "delete what is in the folder, finished or not, and begin anew",
    "verify": "build nothing: read existing caches whole and compare checksums",
}


def main(argv: list[str]) -> int:
    flags = cli.parse(argv, FLAGS, SWITCHES, __doc__ or "")
    if not flags.config:
        raise ConfigError("--config is needed, e.g. --config=configs/mae.py")
    for name in ("short-edge", "threads"):
        if not flags.values.get(name, "0").isdigit():
            raise ConfigError(f"--{name}={flags.values[name]} is not a number")
    from jaxpretrain.config import load_config, to_plain
    from jaxpretrain.data.cache_builder import build_cache
    from jaxpretrain.logs import setup_logging

    setup_logging()
    caches = list(wanted(to_plain(load_config(flags.config, flags.overrides).data), flags))
    status = cli.OK
    for cfg in caches:
        if flags.verify:
            status = max(status, verify(cfg))
            continue
        options = {name: cfg[name] for name in ("format", "short_edge", "interpolation") if name in cfg}
        threads = int(flags.threads) if flags.threads else None
        build_cache(build(cfg["dataset"]), cfg["folder"], **options, threads=threads, rebuild=bool(flags.rebuild))
    return status


def wanted(data: dict[str, Any], flags: cli.Flags) -> Iterator[dict[str, Any]]:
    """The `dict(type='CachedDataset', ...)` of each cache that is meant."""
    splits = {name: part["dataset"] for name, part in data.items() if isinstance(part, dict) and part.get("dataset")}
    if flags.split:
        if flags.split not in splits:
            raise ConfigError(f"--split={flags.split}: the config has a data set for {', '.join(splits) or 'none'}")
        splits = {flags.split: splits[flags.split]}
    if flags.folder and len(splits) > 1:
        raise ConfigError(f"--folder is for one data set: say which with --split ({', '.join(splits)})")
    found = False
    for dataset in splits.values():
        parts = list(_cached(dataset))
        if flags.folder and not parts:
            parts = [{"dataset": dataset}]
        for cfg in parts:
            found = True
            yield cfg | _given(flags)
    if not found:
        raise ConfigError(
            f"no data set of {flags.config} is a CachedDataset; --split=train --folder=/local/folder makes a cache of one "
            "that is not"
        )


def _cached(cfg: Any) -> Iterator[dict[str, Any]]:
    """Every CachedDataset in a description, such as that inside a Subset."""
    if isinstance(cfg, list | tuple):
        for part in cfg:
            yield from _cached(part)
    elif isinstance(cfg, dict) and cfg.get("type") == "CachedDataset":
        yield cfg
    elif isinstance(cfg, dict):
        for part in cfg.values():
            yield from _cached(part)


def _given(flags: cli.Flags) -> dict[str, Any]:
    given: dict[str, Any] = {name: flags.values[name] for name in ("folder", "format") if name in flags.values}
    if "short-edge" in flags.values:
        given["short_edge"] = int(flags.values["short-edge"]) or None
    return given


def verify(cfg: dict[str, Any]) -> int:
    """Prints what is wrong with a finished cache; FAILED if anything is."""
    from jaxpretrain.data.cache import CachedDataset

    options = {name: value for name, value in cfg.items() if name not in ("type", "build", "indices")}
    cached = CachedDataset(**options)
    damaged = [cached.name(row) for row in cached.damaged()]
    bad = cached.bad()
    for name, reason in bad.items():
        print(f"bad image {name}: {reason}")
    for name in damaged:
        print(f"damaged in the cache: {name}")
    print(f"{cached.folder}: {len(cached)} images, {len(bad)} of them bad, {len(damaged)} damaged")
    return cli.FAILED if damaged else cli.OK


if __name__ == "__main__":
    sys.exit(cli.run(main))
