"""Input pipeline: a folder of 500x375 JPEGs to batches of 224-pixel crops on the device.

    python benchmarks/input_pipeline.py [--images=512] [--batches=24] [--rounds=5] [--workers=2] [--only=loaders]

Everything is measured in one run, in turn, on the same files (JPEGs of about 80 kB), and reported as the median over
rounds of ratios within a round:

- loaders: images/s against what most PyTorch scripts do, `torch.utils.data.DataLoader` over a data set that opens an image,
  takes a RandomResizedCrop, flips half, normalises, and hands over a tensor, one process per worker; the image by Pillow,
  as torchvision does it, and by OpenCV. Ours is `TrainLoader` as recipes use it, with as many threads as workers there: uint8
  batches, put on the device; flips and normalisation run there. Also with the cache of decoded images shortened to 256.
- core: CPU time against the bare loop in one thread that decodes with simplejpeg, crops and resizes with OpenCV.
- views: CPU time of SimCLR's two views and SwAV's eight crops, against that of one view, by filter.
- memory: of the process, in MiB, over 20,000 images.
"""

from __future__ import annotations

import argparse
import functools
import math
import random
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np

SIZE, BATCH = 224, 64
MEAN, STD = np.asarray([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], np.float32)
FILTERS: dict[str, dict[str, Any]] = {
    "OpenCV linear": dict(backend="cv2"),
    "OpenCV antialias": dict(backend="cv2", interpolation="antialias"),
    "Pillow bilinear": dict(backend="pillow"),
    "Pillow bicubic": dict(backend="pillow", interpolation="bicubic"),
}


def write_images(root: Path, count: int) -> None:
    """JPEGs of 500x375 with the size and detail of photographs (about 80 kB at quality 92), in ten class folders."""
    from sklearn.datasets import load_sample_images

    photos = load_sample_images().images
    rng = np.random.default_rng(0)
    for i in range(count):
        photo = photos[i % len(photos)]
        top, left = rng.integers(0, photo.shape[0] - 375), rng.integers(0, photo.shape[1] - 500)
        image = photo[top : top + 375, left : left + 500].astype(np.int16)
        image = np.clip(image + rng.normal(0, 6, image.shape), 0, 255).astype(np.uint8)
        folder = root / f"class{i % 10}"
        folder.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(folder / f"{i}.jpg"), image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 92])


def random_box(width: int, height: int, uniform: Callable[[float, float], float]) -> tuple[int, int, int, int]:
    """(left, top, width, height) of a RandomResizedCrop."""
    for _ in range(10):
        area = width * height * uniform(0.08, 1.0)
        ratio = math.exp(uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(uniform(0, width - w + 1)), int(uniform(0, height - h + 1)), w, h
    return 0, 0, width, height


class TorchDataset:
    """Open, random resized crop, flip, normalise, to a tensor in CHW."""

    def __init__(self, root: Path, repeat: int, opencv: bool):
        self.paths, self.opencv = sorted(root.glob("*/*.jpg")) * repeat, opencv

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple[Any, int]:
        import torch

        array = self.with_opencv(str(self.paths[i])) if self.opencv else self.with_pillow(self.paths[i])
        array = np.ascontiguousarray(array.transpose(2, 0, 1), np.float32) / 255
        return torch.from_numpy((array - MEAN[:, None, None]) / STD[:, None, None]), 0

    @staticmethod
    def with_pillow(path: Path) -> np.ndarray:
        from PIL import Image

        image = Image.open(path).convert("RGB")
        left, top, w, h = random_box(*image.size, random.uniform)
        image = image.resize((SIZE, SIZE), Image.Resampling.BILINEAR, box=(left, top, left + w, top + h))
        return np.asarray(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if random.random() < 0.5 else image)

    @staticmethod
    def with_opencv(path: str) -> np.ndarray:
        cv2.setNumThreads(1)
        image: Any = cv2.cvtColor(cv2.imread(path), cv2.COLOR_BGR2RGB)  # type: ignore[arg-type]
        left, top, w, h = random_box(image.shape[1], image.shape[0], random.uniform)
        image = cv2.resize(image[top : top + h, left : left + w], (SIZE, SIZE), interpolation=cv2.INTER_LINEAR)
        return image[:, ::-1] if random.random() < 0.5 else image


def plain_loader(root: Path, repeat: int, workers: int, opencv: bool = False) -> Iterator[Any]:
    from torch.utils.data import DataLoader

    spawned = "spawn" if workers else None  # JAX, which has threads, is in this process
    data: Any = TorchDataset(root, repeat, opencv)
    return iter(
        DataLoader(data, BATCH, shuffle=True, num_workers=workers, drop_last=True, multiprocessing_context=spawned)
    )


def our_loader(dataset: Any, threads: int, steps: list[Any], workers: int = 0) -> Any:
    from jaxpretrain.data.pipeline import TrainLoader

    split = dict(dataset=dataset, pipeline=steps)
    return TrainLoader(split, batch_size=BATCH, num_workers=workers, num_threads=threads)


def folder(root: Path) -> dict[str, Any]:
    return dict(type="CustomDataset", data_root=str(root))


def crop(size: int = SIZE, **options: Any) -> dict[str, Any]:
    return dict(type="RandomResizedCrop", scale=size, **options)


def rate(batches: Iterator[Any], count: int, skip: int = 6) -> float:
    """Images per second over `count` batches, after `skip` to start the workers and use up what they have made ahead."""
    for _ in range(skip):
        next(batches)
    begin = time.perf_counter()
    for _ in range(count):
        next(batches)
    return count * BATCH / (time.perf_counter() - begin)


def our_rate(dataset: Any, threads: int, count: int, **options: Any) -> float:
    import jax

    from jaxpretrain.data.prefetch import device_prefetch

    loader = our_loader(dataset, threads, [crop(**options)])
    with device_prefetch(loader, jax.sharding.SingleDeviceSharding(jax.devices()[0])) as batches:
        images_per_second = rate(batches, count)
    loader.close()
    return images_per_second


def cpu(loader: Any, count: int) -> float:
    """CPU milliseconds per image, of all threads."""
    for _ in range(3):
        next(loader)
    begin = time.process_time()
    for _ in range(count):
        next(loader)
    used = time.process_time() - begin
    loader.close()
    return used / count / BATCH * 1e3


def bare(root: Path, count: int) -> float:
    """CPU milliseconds per image of decoding, cropping and resizing in a loop."""
    import simplejpeg

    cv2.setNumThreads(1)
    paths, uniform = sorted(root.glob("*/*.jpg")), np.random.default_rng(0).uniform
    begin = time.process_time()
    for i in range(count):
        image = simplejpeg.decode_jpeg(paths[i % len(paths)].read_bytes(), "RGB")
        left, top, w, h = random_box(image.shape[1], image.shape[0], uniform)
        cv2.resize(image[top : top + h, left : left + w], (SIZE, SIZE), interpolation=cv2.INTER_LINEAR)
    return (time.process_time() - begin) / count * 1e3


def in_turn(measures: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Each measure once per round."""
    found: dict[str, list[float]] = {name: [] for name in measures}
    for _ in range(rounds):
        for name, measure in measures.items():
            found[name].append(measure())
    return found


def ratio(ones: list[float], others: list[float]) -> float:
    return statistics.median(one / other for one, other in zip(ones, others, strict=True))


def loaders(root: Path, cache: Path, args: argparse.Namespace) -> None:
    repeat = 1 + (args.batches + 12) * BATCH // args.images
    cached = dict(type="CachedDataset", dataset=folder(root), folder=str(cache), build=True)
    our_rate(cached, args.workers, 1)  # builds it

    def theirs(opencv: bool) -> float:
        return rate(plain_loader(root, repeat, args.workers, opencv), args.batches)

    measures: dict[str, Callable[[], float]] = {
        "PyTorch, Pillow": lambda: theirs(False),
        "PyTorch, OpenCV": lambda: theirs(True),
    }
    for name, options in FILTERS.items():
        measures[f"ours, {name}"] = functools.partial(our_rate, folder(root), args.workers, args.batches, **options)
    measures["ours, cache, OpenCV linear"] = lambda: our_rate(cached, args.workers, args.batches)
    found = in_turn(measures, args.rounds)
    for name, rates in found.items():
        print(
            f"{name}: {statistics.median(rates):.0f} images/s, "
            f"{ratio(rates, found['PyTorch, Pillow']):.2f} x PyTorch with Pillow, "
            f"{ratio(rates, found['PyTorch, OpenCV']):.2f} x with OpenCV"
        )


def core(root: Path, args: argparse.Namespace) -> None:
    measures: dict[str, Callable[[], float]] = {"bare loop": lambda: bare(root, args.batches * BATCH)}
    for threads in sorted({1, args.workers}):
        one = functools.partial(our_loader, folder(root), threads, [crop()])
        measures[f"ours, {threads} threads"] = lambda one=one: cpu(one(), args.batches)  # type: ignore[misc]
    found = in_turn(measures, args.rounds)
    for name, used in found.items():
        share = ratio(found["bare loop"], used)
        print(
            f"{name}: {statistics.median(used):.2f} ms of CPU per image, {share:.0%} of the bare loop's speed per core"
        )


def views(root: Path, args: argparse.Namespace) -> None:
    measures: dict[str, Callable[[], float]] = {}
    for name, options in FILTERS.items():
        large, small = [crop(**options)], [crop(96, crop_ratio_range=(0.05, 0.14), **options)]
        pipelines = {
            "one view": large,
            "SimCLR's two views": [dict(type="MultiView", num_views=[2], transforms=[large])],
            "SwAV's eight crops": [
                dict(
                    type="MultiView",
                    num_views=[2, 6],
                    transforms=[[crop(crop_ratio_range=(0.14, 1.0), **options)], small],
                )
            ],
        }
        for what, steps in pipelines.items():
            one = functools.partial(our_loader, folder(root), args.workers, steps)
            measures[f"{name}, {what}"] = lambda one=one: cpu(one(), args.batches)  # type: ignore[misc]
    found = in_turn(measures, args.rounds)
    for name, used in found.items():
        single = found[name.split(", ")[0] + ", one view"]
        print(f"{name}: {statistics.median(used):.2f} ms of CPU per image, {ratio(used, single):.2f} x one view")


def memory(root: Path, workers: int, images: int = 20_000) -> None:
    loader, steps = our_loader(folder(root), 2, [crop()], workers), images // BATCH
    for step in range(1, steps + 1):
        next(loader)
        if step in (steps // 10, steps // 2, steps):
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            print(f"after {step * BATCH} images: {pages * resource.getpagesize() / 2**20:.0f} MiB")
    loader.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--batches", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", choices=("loaders", "core", "views", "memory"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name) / "images"
        write_images(root, args.images)
        parts: dict[str, Callable[[], None]] = {
            "loaders": lambda: loaders(root, Path(name) / "cache", args),
            "core": lambda: core(root, args),
            "views": lambda: views(root, args),
            "memory": lambda: memory(root, 0),
        }
        for part, measure in parts.items():
            if args.only in (None, part):
                measure()


if __name__ == "__main__":
    main()
