"""Draws what a masked method makes of images: `python -m jaxpretrain.tools.visualize_reconstruction IMAGE ... --checkpoint=SPEC`.

An IMAGE is a file, a folder or a URL. Writes one picture with a row for each image: original, masked, reconstructed, and
reconstructed with what was seen; methods that predict something else than pixels show what they can.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Num, UInt8

from jaxpretrain import cli
from jaxpretrain.build import ConfigError
from jaxpretrain.tools import checkpoints
from jaxpretrain.tools.checkpoints import Checkpoint

FLAGS = {
    "checkpoint": checkpoints.SPEC_HELP,
    "img-path": "an image, a folder or a URL (as IMAGE)",
    "out-file": "the picture to write (default: reconstruction.png)",
    "mask-ratio": "part of each image that is hidden (default: as in pre-training)",
    "seed": "of the masks (default: 0)",
    "size": "pixels of the images (default: as the checkpoint was evaluated, or trained)",
    "max-images": "at most so many (default: 16)",
}
_TITLES = {"pasted": "with what was seen"}


def main(argv: list[str]) -> int:
    images, rest = cli.positional(argv, FLAGS)
    flags = cli.parse(rest, FLAGS, usage=__doc__ or "").values
    images += [flags["img-path"]] if "img-path" in flags else []
    if not images or "checkpoint" not in flags:
        raise ConfigError("Give images and --checkpoint; --help says more")
    from jaxpretrain.visualize.reconstructions import reconstruction_grid, save_png

    checkpoint = checkpoints.resolve(flags["checkpoint"])
    size = int(flags["size"]) if "size" in flags else None
    pixels = load_images(images, checkpoint, size, int(flags.get("max-images", 16)))
    ratio = float(flags["mask-ratio"]) if "mask-ratio" in flags else None
    columns, scores = reconstruct(checkpoint, pixels, ratio, int(flags.get("seed", 0)), as_trained=size is None)
    grid = reconstruction_grid(columns, checkpoint.mean, checkpoint.std)
    path = save_png(Path(flags.get("out-file", "reconstruction.png")), grid)
    print(", ".join(f"{name} {value:.4g}" for name, value in scores.items()))
    print(path)
    return cli.OK


def load_images(
    sources: Sequence[str], checkpoint: Checkpoint, size: int | None, most: int
) -> UInt8[np.ndarray, "b h w 3"]:
    """The images, after the transforms of evaluation."""
    from jaxpretrain.data.host_transforms import build_pipeline
    from jaxpretrain.inference.images import list_images, load_image

    pipeline = build_pipeline(checkpoints.eval_pipeline(checkpoint, size))
    found = [image for source in sources for image in list_images(source)][:most]
    prepared = [pipeline({"image": load_image(image)}, np.random.default_rng(0))["image"] for image in found]
    if len({image.shape for image in prepared}) > 1:
        raise ConfigError("The images are of several sizes after preprocessing; give --size")
    return np.stack(prepared)


def reconstruct(
    checkpoint: Checkpoint,
    pixels: UInt8[np.ndarray, "b h w 3"],
    mask_ratio: float | None = None,
    seed: int = 0,
    as_trained: bool = True,
) -> tuple[dict[str, Num[np.ndarray, "b h w c"]], dict[str, float]]:
    """({title: pictures}, {score: value}) of what the method makes of images.

    Args:
        checkpoint: of a masked method.
        pixels: the images as the network sees them, before normalisation.
        mask_ratio: part that is hidden; None: as the method does it by itself.
        seed: of the masks.
        as_trained: whether masks come from the generator in the checkpoint's training pipeline, where there is one.

    Raises:
        ConfigError: a method that reconstructs nothing, or whose mask has another ratio by no means.
    """
    import jax
    from flax import nnx

    from jaxpretrain.build import abstract, build
    from jaxpretrain.evaluators.reconstruction import check_method, masked_error, pictures
    from jaxpretrain.interop import load_weights
    from jaxpretrain.zoo.weights import local_file

    if checkpoint.path is None:
        method = build(checkpoint.model, rngs=nnx.Rngs(seed))
        method.init_weights(nnx.Rngs(seed))
    else:
        method = abstract(checkpoint.model)
        check_method(method)
        load_weights(method, local_file(checkpoint.path))
    check_method(method)
    method.eval()
    options = _mask_options(method, checkpoint, len(pixels), mask_ratio, seed, as_trained)
    images = (pixels - np.asarray(checkpoint.mean, np.float32)) / np.asarray(checkpoint.std, np.float32)
    graphdef, state = nnx.split(method)

    @jax.jit
    def run(state: Any, images: Any, arrays: Mapping[str, Any]) -> Any:
        made = nnx.merge(graphdef, state).reconstruct(
            images,
            rngs=nnx.Rngs(jax.random.key(seed)),
            **arrays,
            **{k: options[k] for k in options.keys() - arrays.keys()},
        )
        scores = {name: value for name, value in made.items() if value.ndim == 0}
        if "pasted" in made and not scores:
            scores["masked_mse"] = masked_error(images, made)
        return pictures(images, made), scores

    columns, scores = jax.device_get(
        run(state, images, {name: value for name, value in options.items() if isinstance(value, np.ndarray)})
    )
    order = ["original", "masked", "reconstructed", "pasted"]
    order = [name for name in order if name in columns] + sorted(columns.keys() - set(order))
    return {_TITLES.get(name, name): columns[name] for name in order}, {k: float(v) for k, v in scores.items()}


def _mask_options(
    method: Any, checkpoint: Checkpoint, count: int, ratio: float | None, seed: int, as_trained: bool
) -> dict[str, Any]:
    """Arguments of `reconstruct` that make the masks wanted."""
    accepted = inspect.signature(method.reconstruct).parameters
    if ratio is None:
        generators = [step for step in checkpoint.train_pipeline if "MaskGenerator" in str(step.get("type"))]
        if not (as_trained and generators and "mask" in accepted):
            return {}
        from jaxpretrain.data.host_transforms import build_pipeline

        pipeline = build_pipeline(generators)
        made = [
            pipeline({"image": np.zeros((1, 1, 3), np.uint8)}, np.random.default_rng((seed, i))) for i in range(count)
        ]
        return {"mask": np.stack([sample["mask"] for sample in made])}
    if not 0 < ratio < 1:
        raise ConfigError(f"--mask-ratio={ratio} must be between 0 and 1")
    if "mask_ratio" in accepted:
        return {"mask_ratio": ratio}
    if hasattr(method.backbone, "mask_ratio"):
        method.backbone.mask_ratio = ratio
        return {}
    if "mask" in accepted and not hasattr(method.neck, "mask_tokens_num"):
        height, width = method.backbone.patch_resolution
        noise = np.random.default_rng(seed).random((count, height * width))
        hidden = noise.argsort(axis=1).argsort(axis=1) < round(ratio * height * width)
        return {"mask": hidden.astype(np.int32).reshape(count, height, width)}
    raise ConfigError(f"--mask-ratio: {type(method).__name__} hides as much as it was trained with, and nothing else")


if __name__ == "__main__":
    sys.exit(cli.run(main))
