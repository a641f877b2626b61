"""Mean and standard deviation of the pixels of a data set: `python -m jaxpretrain.tools.channel_statistics DATA`.

Of R, G and B in grey levels, 0 to 255, over all pixels; exact, as all is counted in integers. Prints the line to put into a
recipe. Large images weigh more than small ones, unless `--size` makes all of them alike.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from jaxtyping import Int64

from jaxpretrain import cli
from jaxpretrain.data.decode import BadImage, as_rgb
from jaxpretrain.tools.sweep import DATA_FLAGS, DATA_HELP, number, open_data, progress, sweep

FLAGS = {
    **DATA_FLAGS,
    "sample": "look at so many images, evenly spread over the data set (default: at all)",
    "size": "of each image the middle square of so many pixels, as in evaluation (default: whole images as they are)",
}


@dataclass(frozen=True)
class Statistics:
    """mean, std: of R, G, B, in grey levels (the deviation of the pixels at hand: divided by their number). pixels, images,
    bad: how many; bad images are left out."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    pixels: int
    images: int
    bad: int


class Histogram:
    """Of image `index`: how many pixels of each grey level, for R, G and B; None if it cannot be read."""

    def __init__(self, source: Any, size: int | None = None):
        from jaxpretrain.data.host_transforms import build_pipeline

        edge = dict(type="ResizeEdge", scale=round(size * 256 / 224) if size else 0, backend="pillow")
        self.source, self.transform = (
            source,
            build_pipeline([edge, dict(type="CenterCrop", crop_size=size)] if size else []),
        )

    def __call__(self, index: int) -> Int64[np.ndarray, "3 256"] | None:
        try:
            image = np.asarray(as_rgb(self.source[index]["image"]))
        except (BadImage, OSError):
            return None
        image = self.transform({"image": image}, np.random.default_rng(0))["image"]
        return np.stack([np.bincount(image[..., channel].ravel(), minlength=256) for channel in range(3)])


def statistics(
    source: Any, *, sample: int | None = None, size: int | None = None, workers: int = 0, threads: int = 0
) -> Statistics:
    """The statistics of a data set.

    Args:
        source: the data set.
        sample: look at so many images; None: at all.
        size: of each the middle square of so many pixels, after the shorter edge was made 256/224 times that; None: as it is.
        workers, threads: see `sweep`.

    Raises:
        cli.ExpectedFailure: no image can be read.
    """
    count = len(source) if sample is None else min(sample, len(source))
    rows = [i * len(source) // count for i in range(count)]
    total, bad = np.zeros((3, 256), np.int64), 0
    with progress(count, "count") as bar:
        for numbers, results in sweep(Histogram(source, size), rows, workers=workers, threads=threads):
            for result in results:
                if result is None:
                    bad += 1
                else:
                    total += result
            bar.update(len(numbers))
    if bad == count:
        raise cli.ExpectedFailure(f"none of the {count} images looked at can be read; verify_dataset says why")
    mean, std = zip(*map(mean_and_deviation, total), strict=True)
    return Statistics(mean, std, int(total[0].sum()), count - bad, bad)


def mean_and_deviation(histogram: Int64[np.ndarray, " levels"]) -> tuple[float, float]:
    """Of the levels 0, 1, ... that occur so often; rounded once, at the end."""
    counts = [int(n) for n in histogram]
    pixels = sum(counts)
    mean = Fraction(sum(level * n for level, n in enumerate(counts)), pixels)
    square = Fraction(sum(level * level * n for level, n in enumerate(counts)), pixels)
    return float(mean), math.sqrt(square - mean * mean)


def main(argv: list[str]) -> int:
    given, rest = cli.positional(argv, FLAGS)
    flags = cli.parse(rest, FLAGS, usage=f"{__doc__}\n{DATA_HELP}\n")
    _, source = open_data(given, flags)
    found = statistics(
        source,
        sample=number(flags, "sample", 0, 1) if "sample" in flags.values else None,
        size=number(flags, "size", 0, 1) if "size" in flags.values else None,
        workers=number(flags, "num-workers", 0),
        threads=number(flags, "num-threads", 0),
    )
    left_out = f" ({found.bad} cannot be read and are left out)" if found.bad else ""
    print(f"{found.images} images{left_out}, {found.pixels} pixels")
    for channel, mean, std in zip("RGB", found.mean, found.std, strict=True):
        print(f"{channel}: mean {mean:.3f}, standard deviation {std:.3f}")
    means, stds = ([round(value, 3) for value in values] for values in (found.mean, found.std))
    print(f"config.data_preprocessor = dict(mean={means}, std={stds})")
    if 0 in stds:
        print("note: a channel is constant; normalisation would divide by zero")
    return cli.OK


if __name__ == "__main__":
    sys.exit(cli.run(main))
