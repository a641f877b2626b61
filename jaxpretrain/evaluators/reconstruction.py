"""Pictures of what a masked method makes of images that it sees a part of."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxpretrain.build import ConfigError
from jaxpretrain.evaluators.base import Batch, EvalContext, Evaluator, check_counts, completed_steps, gather
from jaxpretrain.visualize.reconstructions import reconstruction_grid, save_png


class Reconstruction(Evaluator):
    """Draws the first images of `val`: original, masked, and reconstructed (with the patches that were seen pasted in).

    Methods that predict no pixels show what they can: each picture that their `reconstruct` gives is a column under its
    name (see `pictures`).

    Writes `workdir/pictures/reconstruction_STEP.png` and, always the latest, `reconstruction.png`; without a workdir no
    picture. The masks are a function of `context.seed`, the same at each step. Returns the scalars that `reconstruct`
    gives, such as the accuracy of tokens; where it gives none, {'masked_mse': ...}: the mean squared error over the hidden
    pixels of these images, normalised as the network sees them, so that painting all of them in the mean colour of the data
    gives about 1.

    Args:
        context: of the run; its method must have `reconstruct`, as MAE has.
        num_images: how many images; fewer if a batch, or the split, has fewer.

    Raises:
        ConfigError: num_images below 1, an empty val split, or a method that reconstructs nothing.
    """

    def __init__(self, context: EvalContext, num_images: int = 8):
        super().__init__(context)
        (self.num_images,) = check_counts("Reconstruction.num_images", num_images)
        self._paint = jax.jit(self._paint_first)

    def run(self, state: Any) -> dict[str, float]:
        batch = next(iter(self.context.loader("val")), None)
        if batch is None:
            raise ConfigError("Reconstruction: the val split has no images; check config.data.val.dataset")
        columns, valid, mean, std, scores = gather(self._paint(state, batch))
        if self.context.workdir is not None and jax.process_index() == 0:
            drawn = {title: columns[title][valid] for title in sorted(columns, key=_place)}
            grid = reconstruction_grid(drawn, mean=mean, std=std)
            for name in (f"reconstruction_{completed_steps(state)}.png", "reconstruction.png"):
                save_png(self.context.workdir / "pictures" / name, grid)
        return {name: float(value) for name, value in scores.items()}

    def _paint_first(self, state: Any, batch: Batch) -> tuple[dict[str, Array], Array, Array, Array, dict[str, Array]]:
        method = self.context.method(state)
        check_method(method)
        batch = {name: value[: self.num_images] for name, value in batch.items()}
        images = self.context.preprocess(batch)["image"]
        given = {"mask": batch["mask"]} if "mask" in batch else {}
        made = method.reconstruct(images, rngs=nnx.Rngs(jax.random.key(self.context.seed)), **given)
        columns = pictures(images, made)
        if "pasted" in made:
            columns["reconstructed"] = columns.pop("pasted")
        scores = {name: value for name, value in made.items() if jnp.ndim(value) == 0}
        if "pasted" in made and not scores:
            scores["masked_mse"] = masked_error(images, made, batch["valid"])
        # Preprocessing is an affine map of each channel, so black and white tell its constants.
        black, white = (
            self.context.preprocess({**batch, "image": jnp.full_like(batch["image"], level)})["image"][0, 0, 0]
            for level in (0, 255)
        )
        std = 255 / (white - black).astype(jnp.float32)
        return columns, batch["valid"], -black.astype(jnp.float32) * std, std, scores


def check_method(method: Any) -> None:
    """Raises ConfigError if the method reconstructs nothing."""
    if not hasattr(method, "reconstruct"):
        raise ConfigError(
            f"Reconstruction needs a method with `reconstruct`, such as MAE; {type(method).__name__} has none: "
            "take the evaluator out of config.evaluators"
        )


def pictures(images: Float[Array, "b h w 3"], made: dict[str, Array]) -> dict[str, Array]:
    """What can be drawn of what `reconstruct` gives for normalised images, by title.

    That is every array [B, h, w, 3] or [B, h, w, 1] but the mask: float ones are normalised as the images are, uint8 ones are
    shown as they are.
    """
    columns = {"original": images} | {
        name: value
        for name, value in made.items()
        if name != "mask" and jnp.ndim(value) == 4 and value.shape[-1] in (1, 3)
    }
    floats = {k: v if v.dtype == jnp.uint8 else v.astype(jnp.float32) for k, v in columns.items()}
    return {name.replace("_", " "): value for name, value in floats.items()}


def masked_error(
    images: Float[Array, "b h w 3"], made: dict[str, Array], valid: Array | None = None
) -> Float[Array, ""]:
    """The mean squared error over hidden pixels (of the images where `valid`), normalised as the images are."""
    weight = made["mask"] if valid is None else made["mask"] * valid[:, None, None, None]
    hidden = jnp.broadcast_to(weight, images.shape).astype(jnp.float32)
    difference = made["pasted"].astype(jnp.float32) - images.astype(jnp.float32)
    return jnp.sum(hidden * jnp.square(difference)) / jnp.maximum(hidden.sum(), 1)


def _place(title: str) -> tuple[int, str]:
    """The order of the columns."""
    first = ("original", "masked", "reconstructed", "pasted")
    return (first.index(title) if title in first else len(first), title)
