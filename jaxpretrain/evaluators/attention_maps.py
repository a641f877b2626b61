"""Pictures of what a Vision Transformer's class token looks at."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxpretrain.build import ConfigError
from jaxpretrain.evaluators.base import Batch, EvalContext, Evaluator, check_counts, completed_steps, gather
from jaxpretrain.visualize.attention import MASS, attention_grid, class_attention, most_attended
from jaxpretrain.visualize.reconstructions import save_png


class AttentionMaps(Evaluator):
    """Draws the last layer's self-attention of the class token for the first images of `val` (see `attention_grid`).

    Writes `workdir/pictures/attention_STEP.png` and, always the latest, `attention.png`; without a workdir no picture.
    Returns {'area': percent of the patches that hold `mass` of the mean map}: the smaller, the more to the point; evenly
    spread attention gives 100 * mass.

    Args:
        context: of the run; its method's backbone must be a ViT with a class token.
        num_images: how many images; fewer if a batch, or the split, has fewer.
        mass: part of the attention that is outlined.
        max_heads: heads that are drawn.

    Raises:
        ConfigError: an empty val split, or a backbone without such attention.
    """

    def __init__(self, context: EvalContext, num_images: int = 8, mass: float = MASS, max_heads: int = 6):
        super().__init__(context)
        (self.num_images,) = check_counts("AttentionMaps.num_images", num_images)
        (self.max_heads,) = check_counts("AttentionMaps.max_heads", max_heads)
        if not 0 < mass < 1:
            raise ConfigError(f"AttentionMaps.mass is {mass}; it must be between 0 and 1")
        self.mass = mass
        self._look = jax.jit(self._look_at_first)

    def run(self, state: Any) -> dict[str, float]:
        batch = next(iter(self.context.loader("val")), None)
        if batch is None:
            raise ConfigError("AttentionMaps: the val split has no images; check config.data.val.dataset")
        images, maps, valid = gather(self._look(state, batch))
        images, maps = images[valid], maps[valid]
        if self.context.workdir is not None and jax.process_index() == 0:
            grid = attention_grid(images, maps, self.mass, self.max_heads)
            for name in (f"attention_{completed_steps(state)}.png", "attention.png"):
                save_png(self.context.workdir / "pictures" / name, grid)
        return {"area": 100 * float(most_attended(maps.mean(axis=1), self.mass).mean())}

    def _look_at_first(self, state: Any, batch: Batch) -> tuple[Array, Array, Array]:
        batch = {name: value[: self.num_images] for name, value in batch.items()}
        maps = class_attention(self.context.method(state), self.context.preprocess(batch)["image"])
        return batch["image"], maps.astype(jnp.float32), batch["valid"]
