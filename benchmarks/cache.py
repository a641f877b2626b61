"""The cache of decoded images in each of its formats: building time, size, and speed of training batches from it.

    python benchmarks/cache.py [--images=512] [--batches=24] [--rounds=5] [--workers=2] [--formats=yuv420,raw,jpeg]

JPEGs of 500x375, shortened to 256 pixels, to random resized crops of 224 pixels; see input_pipeline.py, which has the rest
of the pipeline. In one run, in turn, the median of ratios within a round: against PyTorch's DataLoader with Pillow on the
files, with as many processes as threads here, and against our own loader on the files. All files are in the system's
memory, so it is the cores that are measured.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from input_pipeline import BATCH, folder, in_turn, our_rate, plain_loader, rate, ratio, write_images


def build(root: Path, place: Path, format: str) -> dict[str, Any]:
    """Makes a cache in `place` of the images in `root`; the `dataset` of a config that reads it."""
    from jaxpretrain.data.cache_builder import build_cache
    from jaxpretrain.data.sources import CustomDataset

    data, begin = CustomDataset(str(root)), time.perf_counter()
    build_cache(data, place, format)
    seconds, size = time.perf_counter() - begin, sum(file.stat().st_size for file in place.iterdir())
    print(
        f"{format}: built at {len(data) / seconds:.0f} images/s, {size / len(data) / 1e3:.0f} kB per image", flush=True
    )
    return dict(type="CachedDataset", dataset=folder(root), folder=str(place), format=format)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--batches", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--formats", default="yuv420,raw,jpeg")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name) / "images"
        write_images(root, args.images)
        repeat = 1 + (args.batches + 6) * BATCH // args.images
        measures: dict[str, Callable[[], float]] = {
            "PyTorch, Pillow": lambda: rate(plain_loader(root, repeat, args.workers), args.batches),
            "files": functools.partial(our_rate, folder(root), args.workers, args.batches),
        }
        for format in args.formats.split(","):
            cached = build(root, Path(name) / format, format)
            measures[f"cache, {format}"] = functools.partial(our_rate, cached, args.workers, 2 * args.batches)
        found = in_turn(measures, args.rounds)
        for name, rates in found.items():
            ratios = [f"{ratio(rates, found[other]):.2f} x {other}" for other in ("PyTorch, Pillow", "files")]
            print(f"{name}: {statistics.median(rates):.0f} images/s, {', '.join(ratios)}")


if __name__ == "__main__":
    main()
