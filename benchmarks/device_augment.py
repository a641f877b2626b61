"""Augmentation on the device against the host's: RandAugment of 224-pixel images, and SwAV's crops of one larger image.

Both sides start from decoded uint8 images in memory and are timed in turn, in one run; the device's program is compiled
before. The host's transforms run in one thread, image by image, and are what `TrainLoader` runs in each of its threads. On a
machine without an accelerator the device is the CPU, and what is compared is its program, with all cores, to one thread of
the host's.

    python benchmarks/device_augment.py [--images=256] [--rounds=3] [--only=randaugment]

Prints images/s of each (of the median round) and the median ratio device / host.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxpretrain.data.device import DevicePipeline
from jaxpretrain.data.host_transforms import build_pipeline

RANDAUGMENT = dict(type="RandAugment", policies="timm_increasing", num_policies=2, magnitude_level=9, magnitude_std=0.5)


def swav_crops(sizes: tuple[int, int], backend: str) -> dict[str, Any]:
    """SwAV's two large and six small crops."""
    return dict(
        type="MultiView",
        num_views=(2, 6),
        transforms=[
            [dict(type="RandomResizedCrop", scale=size, crop_ratio_range=part, backend=backend)]
            for size, part in zip(sizes, ((0.14, 1.0), (0.05, 0.14)), strict=True)
        ],
    )


CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "RandAugment (2 operations, level 9, std 0.5), 224 px": (224, RANDAUGMENT),
    "SwAV's crops, 2 x 224 and 6 x 96 of 288 px, antialiased": (288, swav_crops((224, 96), "pillow")),
    "SwAV's crops, 2 x 224 and 6 x 96 of 288 px, OpenCV's filter": (288, swav_crops((224, 96), "cv2")),
}


def photographs(count: int, size: int) -> np.ndarray:
    """uint8 [count, size, size, 3]: parts of scikit-learn's two photographs."""
    from sklearn.datasets import load_sample_images

    photos = load_sample_images().images
    rng = np.random.default_rng(0)
    images = np.empty((count, size, size, 3), np.uint8)
    for i in range(count):
        photo = photos[i % len(photos)]
        top, left = rng.integers(photo.shape[0] - size), rng.integers(photo.shape[1] - size)
        images[i] = photo[top : top + size, left : left + size]
    return images


def host(images: np.ndarray, cfg: dict[str, Any]) -> Callable[[], None]:
    pipeline = build_pipeline([cfg])

    def run() -> None:
        for i, image in enumerate(images):
            pipeline({"image": image}, np.random.default_rng(i))

    return run


def device(images: np.ndarray, cfg: dict[str, Any]) -> Callable[[], None]:
    pipeline = jax.jit(DevicePipeline([cfg], [0, 0, 0], [1, 1, 1]))
    index = np.arange(len(images), dtype=np.int32)
    batch = jax.device_put(dict(image=images, index=index, epoch=np.zeros_like(index)))
    key = jax.random.key(0)
    return lambda: jax.block_until_ready(pipeline(batch, key)["image"])


def seconds(run: Callable[[], None]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    args = parser.parse_args(argv)
    print(f"device: {jax.devices()[0].device_kind}")
    for name, (size, cfg) in CASES.items():
        if args.only.lower() not in name.lower():
            continue
        images = photographs(args.images, size)
        sides = dict(host=host(images, cfg), device=device(images, cfg))
        compiled = seconds(sides["device"])
        times: dict[str, list[float]] = {side: [] for side in sides}
        for _ in range(args.rounds):
            for side, run in sides.items():
                times[side].append(seconds(run))
        ratios = [h / d for h, d in zip(times["host"], times["device"], strict=True)]
        rates = {side: args.images / statistics.median(values) for side, values in times.items()}
        print(
            f"{name}: host {rates['host']:.0f} images/s, device {rates['device']:.0f} images/s, "
            f"{statistics.median(ratios):.2f} x host (compiled in {compiled:.0f} s)"
        )


if __name__ == "__main__":
    main()
