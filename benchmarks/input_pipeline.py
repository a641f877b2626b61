"""Input pipeline: a folder of 500x375 JPEGs to batches of 224-pixel crops, against a plain PyTorch-style loader.

Both decode, take a RandomResizedCrop of 224 pixels and flip half of the images, in one run, in turn, on the same files.
The plain loader is what most PyTorch scripts do: `torch.utils.data.DataLoader` over a data set that opens an image with
Pillow, crops and flips it and hands over a normalised tensor, one process per worker. Ours is `TrainLoader` as recipes
use it: uint8 batches; flips and normalisation run on the device.

    python benchmarks/input_pipeline.py [--images=512] [--rounds=3] [--workers=2]

Prints images/s of each, their ratio per round, and peak host memory over 20,000 images.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import resource
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np

SIZE, BATCH = 224, 64


def write_images(root: Path, count: int) -> None:
    """JPEGs of 500x375 with the size and detail of photographs (about 55 kB at quality 92), in ten class folders."""
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


class PillowDataset:
    """Open, random resized crop, flip, to an array in CHW: as torchvision's transforms do it, on Pillow."""

    def __init__(self, root: Path, repeat: int):
        self.paths = sorted(root.glob("*/*.jpg")) * repeat

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple[Any, int]:
        import torch
        from PIL import Image

        image = Image.open(self.paths[i]).convert("RGB")
        width, height = image.size
        box = (0, 0, width, height)
        for _ in range(10):
            area = width * height * random.uniform(0.08, 1.0)
            ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                left, top = random.randint(0, width - w), random.randint(0, height - h)
                box = (left, top, left + w, top + h)
                break
        image = image.resize((SIZE, SIZE), Image.Resampling.BILINEAR, box=box)
        if random.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        array = np.asarray(image, np.float32).transpose(2, 0, 1) / 255
        mean, std = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
        return torch.from_numpy((array - mean[:, None, None]) / std[:, None, None]), 0


def plain_loader(root: Path, repeat: int, workers: int) -> Iterator[Any]:
    from torch.utils.data import DataLoader

    data = PillowDataset(root, repeat)
    return iter(DataLoader(data, BATCH, shuffle=True, num_workers=workers, drop_last=True))  # type: ignore[arg-type]


def our_loader(root: Path, workers: int, threads: int, crop: dict[str, Any]) -> Any:
    from jaxpretrain.data.pipeline import TrainLoader

    pipeline = [dict(type="RandomResizedCrop", scale=SIZE, **crop)]
    return TrainLoader(
        dict(dataset=dict(type="CustomDataset", data_root=str(root)), pipeline=pipeline),
        batch_size=BATCH,
        num_workers=workers,
        num_threads=threads,
    )


def rate(batches: Iterator[Any], count: int, skip: int = 3) -> float:
    """Images per second over `count` batches, after `skip` to start the workers."""
    for _ in range(skip):
        next(batches)
    begin = time.perf_counter()
    for _ in range(count):
        next(batches)
    return count * BATCH / (time.perf_counter() - begin)


def memory(root: Path, workers: int, images: int = 20_000) -> dict[str, float]:
    """Resident memory of this process, in MiB, after 2,000 images and after `images`."""
    loader = iter(our_loader(root, workers, 2, {}))
    used = {}
    for step in range(1, images // BATCH + 1):
        next(loader)
        if step * BATCH in range(2_000, 2_000 + BATCH) or step == images // BATCH:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            used[f"after_{step * BATCH}_images_mib"] = round(pages * resource.getpagesize() / 2**20, 1)
    loader.close()
    return used


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--batches", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--memory", action="store_true")
    args = parser.parse_args()
    crops = {
        "ours, OpenCV filter (the default of supervised recipes)": dict(backend="cv2"),
        "ours, Pillow filter (the default of self-supervised recipes)": dict(backend="pillow"),
    }
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_images(root, args.images)
        if args.memory:
            print(json.dumps(memory(root, 0)))
            return
        rates: dict[str, list[float]] = {}
        for _ in range(args.rounds):
            repeat = 1 + (args.batches + 6) * BATCH // args.images
            rates.setdefault("plain", []).append(rate(plain_loader(root, repeat, args.workers), args.batches))
            for name, crop in crops.items():
                loader = iter(our_loader(root, 0, args.workers, crop))
                rates.setdefault(name, []).append(rate(loader, args.batches))
                loader.close()
        for name, values in rates.items():
            ratios = [ours / plain for ours, plain in zip(values, rates["plain"], strict=True)]
            print(f"{name}: {statistics.median(values):.0f} images/s, {statistics.median(ratios):.2f} x plain")


if __name__ == "__main__":
    main()
