"""Pictures of what a masked autoencoder makes of images that it sees a part of."""

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

    Writes `workdir/pictures/reconstruction_STEP.png` and, always the latest, `reconstruction.png`; without a workdir no
    picture. The masks are a function of `context.seed`, the same at each step. Returns {'masked_mse': ...}: the mean
    squared error over the hidden pixels of these images, normalised as the network sees them, so that painting all of
    them in the mean colour of the data gives about 1.

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
        pictures, mean, std, error = gather(self._paint(state, batch))
        if self.context.workdir is not None and jax.process_index() == 0:
            valid = pictures.pop("valid")
            grid = reconstruction_grid(**{name: images[valid] for name, images in pictures.items()}, mean=mean, std=std)
            for name in (f"reconstruction_{completed_steps(state)}.png", "reconstruction.png"):
                save_png(self.context.workdir / "pictures" / name, grid)
        return {"masked_mse": float(error)}

    def _paint_first(self, state: Any, batch: Batch) -> tuple[dict[str, Array], Array, Array, Float[Array, ""]]:
        method = self.context.method(state)
        if not hasattr(method, "reconstruct"):
            raise ConfigError(
                f"Reconstruction needs a method with `reconstruct`, such as MAE; {type(method).__name__} has none: "
                "take the evaluator out of config.evaluators"
            )
        batch = {name: value[: self.num_images] for name, value in batch.items()}
        images = self.context.preprocess(batch)["image"]
        made = method.reconstruct(images, rngs=nnx.Rngs(jax.random.key(self.context.seed)))
        pictures = dict(original=images, masked=made["masked"], reconstructed=made["pasted"])
        pictures = {name: picture.astype(jnp.float32) for name, picture in pictures.items()}
        hidden = jnp.broadcast_to(made["mask"] * batch["valid"][:, None, None, None], images.shape)
        error = jnp.sum(hidden * jnp.square(pictures["reconstructed"] - pictures["original"]))
        # Preprocessing is an affine map of each channel, so black and white tell its constants.
        black, white = (
            self.context.preprocess({**batch, "image": jnp.full_like(batch["image"], level)})["image"][0, 0, 0]
            for level in (0, 255)
        )
        std = 255 / (white - black).astype(jnp.float32)
        pictures["valid"] = batch["valid"]
        return pictures, -black.astype(jnp.float32) * std, std, error / jnp.maximum(hidden.sum(), 1)
